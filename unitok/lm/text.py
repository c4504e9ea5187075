"""The LLM's own tokenizer: loaded, fingerprinted, and carried along untouched."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from unitok.checkpoint import config_hash

# Spaces, case, digits, accents, an emoji, code: what normalisers and pre-tokenizers treat differently.
PROBE = "Hello  world,\n\tÀ café costs 12.50€ 😀 — def f(x): return x_1 <image> </s>"

# Beside the vocabulary files, which every tokenizer class names itself.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def load_text_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The text tokenizer of an LLM's folder; ValueError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the loaders raise OSError, ValueError, KeyError and more for the same cause
        raise ValueError(f"{folder}: no text tokenizer could be loaded ({_first_line(error)})") from error


def text_tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex fingerprint of what decides ids: the vocabulary, and how a fixed text is split."""
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    return config_hash({"vocab": tokenizer.get_vocab(), "probe": list(ids)})


def copy_text_tokenizer(tokenizer: PreTrainedTokenizerBase, source: Path, out: Path) -> None:
    """Carry the text tokenizer's own files over byte for byte; it is written anew only where that is not enough."""
    names = {*COMPANIONS, *tokenizer.vocab_files_names.values()}
    for name in sorted(names):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", out / "additional_chat_templates", dirs_exist_ok=True)
    try:
        same = text_tokenizer_hash(load_text_tokenizer(out)) == text_tokenizer_hash(tokenizer)
    except ValueError:  # it has files of other names
        same = False
    if not same:
        tokenizer.save_pretrained(out)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
