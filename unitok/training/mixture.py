"""The data of a language model recipe: the documents of every shard source, rendered once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from unitok.config import LanguageModelRecipe, ShardSource
from unitok.data.packing import Source, Store, share_prefixes, split_long
from unitok.data.render import Rendered, Template, null_parts, render
from unitok.data.schema import Document, Part
from unitok.data.shards import read_shards
from unitok.manifest import FILE, Manifest
from unitok.vocab import JointVocab

NO_ROOM = "{} ids do not fit a packed row of {}; raise `length`"


@dataclass
class Mixture:
    """store: every document in every form that can be drawn; sources: which forms; refused: (shards, id, reason)."""

    store: Store
    sources: list[Source]
    refused: list[tuple[str, str, str]]

    def summary(self) -> str:
        documents = sum(len(source.variants) for source in self.sources)
        longest = int(self.store.lengths.max())
        return f"{documents} documents, {int(self.store.lengths.mean())} ids on average, {longest} at most"


def read_mixture(
    recipe: LanguageModelRecipe, manifest: Manifest, vocab: JointVocab | None, text_tokenizer, template: Template,
    *, show: bool = False,
) -> Mixture:  # fmt: skip
    """Read and render every source of the recipe.

    Documents that cannot be used (too long for a row with an image in them, codes that do not fit) are refused, with
    the reason; a text that is too long becomes several documents. ValueError where shards and model do not fit, or a
    source has no usable document. show: draw a bar on a terminal where this takes long.
    """
    rendered: list[Any] = []  # Rendered, or Branched
    refused: list[tuple[str, str, str]] = []
    sources = []
    for mix in recipe.data:
        if (Path(mix.shards) / FILE).is_file():
            manifest.check(Manifest.load(mix.shards), what=("model", "shards"))
        documents = read_shards(mix.shards)
        variants: list[list[int]] = []
        first = len(rendered)
        bar = tqdm(documents, Path(mix.shards).name, unit="document", delay=2, disable=None if show else True)
        for document in bar:
            try:
                forms = _forms(document, mix, template)
                pieces = {key: _fit(parts, recipe.length, vocab, text_tokenizer, template) for key, parts in forms}
            except ValueError as error:
                refused.append((mix.shards, document.id, str(error)))
                continue
            variants += _number(pieces, rendered)
        if mix.share_prefix:
            rendered[first:] = share_prefixes(rendered[first:], recipe.length)
            variants = [[n] * 4 for n in range(first, len(rendered))]
        if not variants:
            reason = f"; {refused[-1][1]}: {refused[-1][2]}" if refused else ""
            raise ValueError(f"{mix.shards}: no document can be used{reason}")
        sources.append(Source(np.array(variants, np.int64), mix.weight, mix.flip, mix.caption_drop))
    store = Store(rendered)
    store.weigh(text=recipe.text_weight, image=recipe.image_weight)
    return Mixture(store, sources, refused)


def _forms(document: Document, mix: ShardSource, template: Template) -> list[tuple[int, list[Part]]]:
    """The forms in which a document may be drawn, by 2 * flipped + dropped."""
    parts = list(document.parts)
    if mix.loss == "all":
        parts = [replace(part, loss=True) for part in parts]
    orders = [(0, parts)]
    if mix.flip and {p.type for p in parts} == {"text", "image"} and len(parts) == 2 and parts[0].role == "plain":
        orders.append((2, parts[::-1]))
    forms = list(orders)
    if mix.caption_drop:
        for key, order in orders:
            dropped = null_parts(order, template)
            if dropped != order:
                forms.append((key + 1, dropped))
    return forms


def _fit(parts, length: int, vocab, text_tokenizer, template: Template) -> list[Rendered]:
    one = render(parts, vocab, text_tokenizer, template)
    pieces = [piece for piece in split_long(one, length) if len(piece.ids) > 1]
    if not pieces:
        raise ValueError(NO_ROOM.format(len(one.ids), length) if len(one.ids) > length else "the document is empty")
    return pieces


def _number(pieces: dict[int, list[Rendered]], rendered: list[Rendered]) -> list[list[int]]:
    """Append the forms of a document to `rendered`; its numbers, one row for each stretch of a long text."""
    at = {}
    for key, own in pieces.items():
        at[key] = range(len(rendered), len(rendered) + len(own))
        rendered += own
    if len(pieces[0]) > 1:  # text alone has one form
        return [[n] * 4 for n in at[0]]
    plain = at[0][0]
    flipped = at.get(2, at[0])[0]
    return [[plain, at.get(1, at[0])[0], flipped, at[3][0] if 3 in at else flipped]]
