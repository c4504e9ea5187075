"""Tiny language models of several families, a text tokenizer, and tokenizer folders, all made here in milliseconds."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.llama import LlamaConfig
from transformers.models.phi import PhiConfig
from transformers.models.qwen3 import Qwen3Config

from unitok.checkpoint import save_weights, write_json
from unitok.manifest import Manifest

ROWS = 128  # of which the text tokenizer uses fewer
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda **tie: LlamaConfig(vocab_size=ROWS, **GROUPED, **tie),
    "gpt2": lambda **tie: GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=2, n_head=4, n_positions=64, **tie),
    "qwen3": lambda **tie: Qwen3Config(vocab_size=ROWS, head_dim=8, **GROUPED, **tie),
    "gemma3": lambda **tie: Gemma3TextConfig(vocab_size=ROWS, head_dim=8, **GROUPED, **tie),  # scales its embedding
    "phi": lambda **tie: PhiConfig(vocab_size=ROWS, **GROUPED, **tie),  # lm_head has a bias
}


def make_lm(family: str, tied: bool, seed: int = 0):
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(CONFIGS[family](tie_word_embeddings=tied)).eval()
    if lm.get_output_embeddings().bias is not None:
        lm.get_output_embeddings().bias.data.normal_()
    return lm


def section(*sizes: int, grid=(4, 4), **other) -> dict:
    """A tokenizer's section of a manifest."""
    return {
        "class": "fsq",
        "config_hash": "c" * 64,
        "weight_hash": "w" * 64,
        "image_size": 16,
        "resize": "squash-bicubic",
        "pixels": "float01",
        "codebook_sizes": list(sizes),
        "grid": list(grid),
        "vocabulary": "codes",
        **other,
    }


def make_tokenizer_folder(folder: Path, name: str = "fsq", **other) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"image_size": 16})
    save_weights(folder / "model.safetensors", {"weight": torch.zeros(2)})
    (folder / "assets").mkdir()
    (folder / "assets" / "words.txt").write_text("a b")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step_10.pt").write_text("not for models")
    Manifest(tokenizers={name: section(40, **other)}, licences=["pictures: CC0"]).save(folder)
    return folder


@torch.no_grad()
def logits(lm, ids) -> torch.Tensor:
    return lm(input_ids=ids).logits


def some_ids(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, rows, (2, 9), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The functions above, for tests."""
    return SimpleNamespace(
        rows=ROWS, lm=make_lm, section=section, tokenizer_folder=make_tokenizer_folder, logits=logits, ids=some_ids
    )


@pytest.fixture(scope="session")
def text_tokenizer() -> PreTrainedTokenizerFast:
    """Byte fallback behind a normaliser that prepends U+2581, as Llama 2's: where careless added tokens break."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in "▁abcdefghijklmnopqrstuvwxyz.,!?<>_0123456789":
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", "a"), ("c", "a"), ("ca", "t"), ("o", "n")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def lm_folder(tmp_path, text_tokenizer):
    """Callable: (family, tied) -> a folder as published."""

    def make(family: str = "llama", tied: bool = True) -> Path:
        folder = tmp_path / f"base_{family}_{tied}"
        make_lm(family, tied).save_pretrained(folder)
        text_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def stories() -> Path:
    data = os.environ.get("UNITOK_DATA")
    folder = Path(data or "", "stories260k", "hf")
    if not data or not folder.is_dir():
        pytest.skip("UNITOK_DATA is not set or has no stories260k: no real language model to check")
    return folder
