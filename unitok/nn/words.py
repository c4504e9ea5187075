"""Text tokenizers inside models of ours: which of their tokens are words, and their files.

V: rows of the table that a text encoder looks ids up in, which may be more than its tokenizer has tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unitok import checkpoint

VOCABULARIES = ("paper", "word_final")
# what transformers writes of how a tokenizer was last read or called, which is not part of what it is
OF_USE = ("is_local", "local_files_only", "truncation", "padding")


def allowed_tokens(words: PreTrainedTokenizerBase, rows: int, vocab: str, only: Sequence[str] | None = None) -> Tensor:
    """bool [V]: the tokens that a text may be made of.

    "paper": those with a letter or a digit in them (De-Diffusion, arXiv 2311.00618, forbids punctuation). "word_final":
    of those the ones that are whole words by themselves, ends of words included: any row of them, written with spaces,
    is read as the same ids again. only: words to choose from, each of them one such token.
    """
    if vocab not in VOCABULARIES:
        raise ValueError(f"vocab must be one of {', '.join(VOCABULARIES)}, got {vocab!r}")
    if len(words) > rows:
        raise ValueError(f"the text tokenizer has {len(words)} tokens, its encoder {rows} rows only")
    special = {*words.all_special_ids, *words.added_tokens_decoder}
    ids = [i for i in range(len(words)) if i not in special]
    if vocab == "paper":
        found = [any(map(str.isalnum, text)) for text in texts_of([[i] for i in ids], words)]
    else:
        # pieces of words run together when they are written twice, and end in other tokens when they are read
        twice = texts_of([[i, i] for i in ids], words)
        read = words(twice, add_special_tokens=False)["input_ids"]
        found = [
            back == [i, i] and len(text.split()) == 2 and all(map(str.isalnum, text.split()))
            for i, text, back in zip(ids, twice, read, strict=True)
        ]
    allowed = torch.zeros(rows, dtype=torch.bool)
    allowed[ids] = torch.tensor(found, dtype=torch.bool)
    if only is None:
        return allowed
    chosen = torch.zeros_like(allowed)
    for word, row in zip(only, words(list(only), add_special_tokens=False)["input_ids"], strict=True):
        if len(row) != 1 or not allowed[row[0]]:
            raise ValueError(f"{word!r} is not one token of the {vocab} vocabulary: choose words that are")
        chosen[row[0]] = True
    return chosen


def texts_of(ids: list[list[int]], words: PreTrainedTokenizerBase) -> list[str]:
    """The texts that ids are written as, without special tokens."""
    return words.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def files_of(words: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """What AutoTokenizer opens the same tokenizer from, by file name; the same bytes whatever its use before."""
    with tempfile.TemporaryDirectory() as folder:
        words.save_pretrained(folder)
        for path in (Path(folder) / name for name in ("tokenizer.json", "tokenizer_config.json")):
            if path.is_file():
                checkpoint.write_json(path, {k: v for k, v in checkpoint.read_json(path).items() if k not in OF_USE})
        return read_files(Path(folder))


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
