"""Write a plain Hugging Face checkpoint: adapters merged, nothing of ours needed to load it.

    export("model_or_adapter/", "out/")
    export("model/", "out/", token_strings=True)     # for servers that address image tokens by string

With token strings the text tokenizer knows every row: `<scenes_begin>`, `<scenes_0>`, `<scenes_1>`, ... Text that
spells one is then read as that image token, so unitok itself keeps to ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from unitok.checkpoint import open_folder
from unitok.lm.adapters import adapter_base, is_adapter, load_adapter, merge
from unitok.lm.expand import copy_image_parts, empty_folder, open_lm
from unitok.lm.text import copy_text_tokenizer, load_text_tokenizer, text_tokenizer_hash
from unitok.manifest import Manifest
from unitok.vocab import JointVocab


def export(model: str | Path, out: str | Path, *, token_strings: bool = False, base: str | Path | None = None) -> Path:
    """Write `out`: config, weights, text tokenizer, and the manifest that says what the ids mean.

    model: a model folder, or an adapter folder, which is merged into its base (`base`, where it is not where the
    adapter says). ValueError where `out` is in use, or where token strings cannot get the ids of their rows.
    """
    folder = open_folder(model)
    out = empty_folder(out)
    if is_adapter(folder):
        source = adapter_base(folder, base)
        lm = merge(load_adapter(folder, source))
    else:
        source = folder
        lm = open_lm(folder)
    manifest = Manifest.load(folder)
    if not manifest.vocab:
        raise ValueError(
            f"{model}: its manifest has no vocabulary, so it is no model folder: make one with unitok expand"
        )
    text_tokenizer = load_text_tokenizer(source)
    if token_strings:
        add_token_strings(text_tokenizer, JointVocab.from_dict(manifest.vocab))
    out.mkdir(parents=True, exist_ok=True)
    lm.save_pretrained(out)
    if token_strings:
        text_tokenizer.save_pretrained(out)
        text = {**(manifest.text_tokenizer or {}), "hash": text_tokenizer_hash(text_tokenizer)}
        manifest = replace(manifest, text_tokenizer=text)
    else:
        copy_text_tokenizer(text_tokenizer, source, out)
    copy_image_parts(source, out)
    manifest.save(out)
    return out


def add_token_strings(text_tokenizer: PreTrainedTokenizerBase, vocab: JointVocab) -> None:
    """Give every row behind the text tokenizer's own ids a string, in place: its length becomes the number of rows."""
    taken = text_tokenizer.get_vocab()
    first = max(taken.values()) + 1
    if len(taken) < first:
        raise ValueError(
            f"the text tokenizer has {len(taken)} tokens for ids up to {first - 1}: strings would get other ids"
        )
    tokens = list(_row_strings(vocab, first))
    seen = set(taken)
    for token in tokens:
        if token.content in seen:
            raise ValueError(f"there is already a token {token.content}: give the image tokenizer another name")
        seen.add(token.content)
    text_tokenizer.add_tokens(tokens)
    if text_tokenizer.convert_tokens_to_ids([t.content for t in tokens]) != list(range(first, vocab.rows)):
        raise ValueError(
            "the text tokenizer numbers added tokens in its own way: token strings cannot get their rows' ids"
        )


def _row_strings(vocab: JointVocab, first: int) -> Iterator[AddedToken]:
    """A token per row from `first` on. Codes are not special, so decoding with skip_special_tokens keeps them."""
    names: dict[int, str] = {}
    codes: set[int] = set()
    for name, image in vocab.images.items():
        names.update({row: f"<{name}_{control}>" for control, row in image.control.items()})
        for k, book in enumerate(image.codebooks):
            prefix = name if len(image.codebooks) == 1 else f"{name}_{k}"
            names.update({row: f"<{prefix}_{code}>" for code, row in enumerate(book.ids)})
            codes.update(book.ids)
    for row in range(first, vocab.rows):
        # Rows without meaning (padding of the base) need a string too: ids of added tokens have no gaps.
        yield AddedToken(names.get(row, f"<unused_{row}>"), normalized=False, special=row not in codes)
