"""A tiny model folder and token shards made of nothing, for tests of the language model engine.

As a program: python lm_fixture.py FOLDER CHANGES [STEP] runs the recipe of FOLDER with the JSON CHANGES and dies at
STEP.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from unitok.config import make_recipe
from unitok.data import shards
from unitok.data.schema import Document, codes_part, text_part
from unitok.lm.expand import expand
from unitok.lm.text import text_tokenizer_hash
from unitok.manifest import Manifest

WORDS = "a red green blue big small circle square what colour is it ? Q : A yes no left right".split()
SECTION = {"class": "toy", "vocabulary": "codes", "codebook_sizes": [16], "grid": [2, 2], "image_size": 8}


def text_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def model_folder(out: Path, *, tied: bool = True, **sizes) -> Path:
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
    config = LlamaConfig(vocab_size=32, num_key_value_heads=sizes["num_attention_heads"], max_position_embeddings=256,
                         tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, **sizes)  # fmt: skip
    model, words = LlamaForCausalLM(config), text_tokenizer()
    vocab = expand(model, words, None, "toy", SECTION)
    model.save_pretrained(out)
    words.save_pretrained(out)
    text = {"hash": text_tokenizer_hash(words)}
    Manifest(tokenizers={"toy": SECTION}, vocab=vocab.to_dict(), text_tokenizer=text).save(out)
    return out


def documents(n: int, seed: int = 0) -> list[Document]:
    """Captions and questions about four codes that say the colour and the shape."""
    rng, out = np.random.default_rng(seed), []
    for i in range(n):
        colour, shape = int(rng.integers(3)), int(rng.integers(2))
        codes = codes_part([colour, shape, int(rng.integers(16)), colour + shape], (2, 2), "toy")
        name, thing = WORDS[1 + colour], WORDS[6 + shape]
        if i % 2:
            asked = text_part("what colour is it ?", role="question", loss=False)
            shown = codes_part(codes.codes, (2, 2), "toy", loss=False)
            out.append(Document(f"q{i}", (shown, asked, text_part(name, role="answer")), "question"))
        else:
            out.append(Document(f"c{i}", (text_part(f"a {name} {thing}"), codes), "caption"))
    return out


def write_shards(out: Path, written: list[Document]) -> Path:
    out.mkdir(parents=True)
    pq.write_table(shards._table(written), out / "shard-000000.parquet")
    Manifest(tokenizers={"toy": SECTION}).save(out)
    return out


def recipe(folder: Path, **changes):
    """A recipe on folder/model and folder/shards that writes folder/out."""
    values = {
        "kind": "language_model", "model": str(folder / "model"), "out": str(folder / "out"),
        "data": [{"shards": str(folder / "shards"), "flip": 0.5, "caption_drop": 0.2}], "length": 48, "batch_size": 4,
        "steps": 12, "lr": 3e-3, "lora": {"rank": 4, "alpha": 8}, "log_every": 1, "checkpoint_every": 6,
        "dtype": "float32",
    }  # fmt: skip
    return make_recipe(values | changes)


def losses(out: Path) -> dict[int, float]:
    """Loss by step, as logged."""
    return {r["step"]: r["loss"] for r in map(json.loads, (out / "log.jsonl").read_text().splitlines())}


if __name__ == "__main__":
    from unitok.training.language_model import train

    def die(model, step, writer):
        if step == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

    train(recipe(Path(sys.argv[1]), **json.loads(sys.argv[2])), sampler=die if len(sys.argv) > 3 else None)
