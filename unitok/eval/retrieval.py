"""Retrieval: does a picture's code find its caption among others, and the caption its picture?

For tokenizers whose codes can be compared with text: `contrastive(codes=)` and `text_embedding(texts)`, as SEED has
them. The gallery is `n` pictures with as many different captions: one of each picture's own that no other picture of
the gallery lists.

Baselines
    shuffled  the codes of another picture with every caption
    pictures  the embedding before the codes: what is lost by them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unitok.data.sources import read_image
from unitok.eval.progress import batches, row_rng
from unitok.eval.results import Score, summarise
from unitok.eval.rows import load_rows, rows_hash

GALLERY = 256
BATCH = 64


def run(model, recipe) -> list[Score]:
    """The scores of one recipe: `recipe.n` pictures (default 256). `model`: a model with such a tokenizer, or one."""
    tokenizer = getattr(model, "image_tokenizer", model)
    rows = gallery(load_rows(recipe.data, "caption"), recipe.n or GALLERY, recipe.seed)
    return evaluate(tokenizer, rows, batch_size=recipe.batch_size, seed=recipe.seed)


def gallery(rows: Sequence[Mapping[str, Any]], size: int, seed: int = 0) -> list[dict[str, Any]]:
    """`size` rows with one caption each ("caption"), all different. ValueError where there are not so many."""
    chosen: list[dict[str, Any]] = []
    listed: Counter[str] = Counter()
    taken: set[str] = set()
    for row in rows:
        if taken & set(row["captions"]):
            continue
        free = sorted({caption for caption in row["captions"] if not listed[caption]})
        if not free:
            continue
        caption = free[row_rng(seed, "caption", row["id"]).randrange(len(free))]
        taken.add(caption)
        listed.update(set(row["captions"]))
        chosen.append({**row, "caption": caption})
        if len(chosen) == size:
            return chosen
    raise ValueError(
        f"a gallery of {size} pictures with different captions needs more rows: {len(chosen)} of {len(rows)}"
    )


@torch.no_grad()
def evaluate(
    tokenizer, rows: Sequence[Mapping[str, Any]], *, batch_size: int = BATCH, seed: int = 0, name: str = "retrieval"
) -> list[Score]:
    """R@1 of rows with "image" and "caption": NAME_caption_of_picture and NAME_picture_of_caption, by codes."""
    if not hasattr(tokenizer, "contrastive"):
        raise ValueError(f"{type(tokenizer).__name__} has no text beside its codes: retrieval needs one such as seed")
    tokenizer.eval()
    by_code, by_picture = [], []
    for batch in batches(rows, batch_size, "retrieval"):
        images = torch.stack([tokenizer.preprocess(read_image(row["image"])) for row in batch]).to(tokenizer.device)
        by_code.append(tokenizer.contrastive(codes=tokenizer.encode(images)))
        by_picture.append(tokenizer.contrastive(images=images))
    read = tokenizer.text_embedding([row["caption"] for row in rows])  # [n, E]
    arms = {"codes": torch.cat(by_code), "pictures": torch.cat(by_picture)}
    arms["shuffled"] = arms["codes"].roll(1, 0)
    protocol = {"gallery": len(rows), "data_hash": rows_hash(rows), "metric": "R@1", "seed": seed}
    ids, scores = [row["id"] for row in rows], []
    for what, across in (("caption_of_picture", False), ("picture_of_caption", True)):
        hits = {arm: map(float, first_is_own(seen, read, across)) for arm, seen in arms.items()}
        values: dict[str, Any] = {arm: dict(zip(ids, right, strict=True)) for arm, right in hits.items()}
        own = values.pop("codes")
        beside = {**values, "chance": 1 / len(rows)}
        scores.append(summarise(f"{name}_{what}", own, baselines=beside, protocol=protocol, proportion=True))
    return scores


def first_is_own(seen: Tensor, read: Tensor, from_texts: bool) -> list[bool]:
    """[n, E] of pictures and of their captions -> whether the nearest of the other kind is the own one."""
    similarity = seen @ read.T  # [pictures, captions]
    nearest = similarity.argmax(0 if from_texts else 1)
    return (nearest == torch.arange(len(seen), device=nearest.device)).tolist()
