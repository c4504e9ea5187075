"""Captioning: exact match against the captions a row accepts, and any metric of (predictions, references).

A row is {"id", "image", "captions": every caption that counts as right, ...}. The model is any object with

    captions(images, **decode) -> list[str]

images: paths or PIL images; decode as in vqa.py. A metric maps predictions and references (for every row its list) to
one number a row, so that one which needs the whole set (CIDEr) fits too.

Baselines
    constant         the training caption that most training rows accept, said of every picture
    shuffled_images  the model's own caption of another row's picture
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unitok.eval.progress import ReplyLog, cut_reply, decoding, model_stamp, seeded
from unitok.eval.results import Score, summarise
from unitok.eval.rows import can_shuffle, image_keys, load_rows, other_row, rows_hash, subset, with_picture

REPLIES = "replies.jsonl"

Row = Mapping[str, Any]
Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], Sequence[float]]


def normalise(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """1.0 where the prediction, normalised, is one of the row's captions."""
    return [
        float(normalise(said) in {normalise(text) for text in right})
        for said, right in zip(predictions, references, strict=True)
    ]


METRICS: dict[str, Metric] = {"exact_match": exact_match}


def run(model, recipe) -> list[Score]:
    """The scores of one recipe. `recipe.train`: rows of the constant baseline. `recipe.options`: metrics (names of
    METRICS, or "module:function"), cut, max_new_tokens, name. Decoding is greedy unless the recipe gives a temperature.
    """
    options = dict(recipe.options)
    known = {"metrics", "cut", "max_new_tokens", "name"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"captions: unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")
    out = Path(recipe.out) if recipe.out else None
    rows = subset(load_rows(recipe.data, "caption", out=out), recipe.n, recipe.seed)
    decode = decoding(recipe)
    if "max_new_tokens" in options:
        decode["max_new_tokens"] = options.pop("max_new_tokens")
    return evaluate(
        model,
        rows,
        load_rows(recipe.train, "caption"),
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        decode=decode,
        replies=None if out is None else out / REPLIES,
        stamp=model_stamp(recipe),
        **options,
    )


def evaluate(
    model,
    rows: Sequence[Row],
    train: Sequence[Row] = (),
    *,
    metrics: Sequence[str] = ("exact_match",),
    seed: int = 0,
    batch_size: int = 16,
    cut: Sequence[str] = ("\n",),
    decode: Mapping[str, Any] | None = None,
    replies: Path | None = None,
    stamp: Any = None,
    name: str = "captions",
) -> list[Score]:
    """One score a metric, called name/metric."""
    if not rows:
        raise ValueError("captions: no rows to score")
    functions = {metric: _metric(metric) for metric in metrics}
    decode = {"temperature": 0.0, **(decode or {})}
    protocol = {"seed": seed, "cut": list(cut), "decode": decode, "data_hash": rows_hash(rows)}
    protocol["train_hash"] = rows_hash(train, pictures=False) if train else None
    log = ReplyLog(replies, {"model": stamp, "protocol": protocol})
    by_id = {row["id"]: row for row in rows}
    if len(by_id) != len(rows):
        raise ValueError("captions: two rows have the same id")

    def ask(ids: Sequence[str]) -> list[str]:
        return model.captions([with_picture(by_id[i])["image"] for i in ids], **seeded(decode, seed, ids))

    ids = list(by_id)
    said = {i: cut_reply(text, cut) for i, text in log.collect("model", ids, batch_size, ask).items()}
    log.finish()
    arms = {"model": [said[i] for i in ids]}
    if train:
        arms["constant"] = [constant(train)] * len(rows)
    shown = {row["id"]: image_keys(row) for row in rows}
    if can_shuffle(shown):
        arms["shuffled_images"] = [said[other_row(row, rows, shown, seed)["id"]] for row in rows]
    references = [row["captions"] for row in rows]
    groups = {i: tuple(sorted(keys)) or i for i, keys in shown.items()}
    out = []
    for metric, function in functions.items():
        tables = {arm: dict(zip(ids, function(texts, references), strict=True)) for arm, texts in arms.items()}
        values, note = tables.pop("model"), {**protocol, "metric": metric}
        out.append(summarise(f"{name}/{metric}", values, baselines=tables, protocol=note, groups=groups, seed=seed))
    return out


def constant(train: Sequence[Row]) -> str:
    """The caption that most rows accept; the first of equals."""
    return Counter(text for row in train for text in dict.fromkeys(row["captions"])).most_common(1)[0][0]


def _metric(name: str) -> Metric:
    if name in METRICS:
        return METRICS[name]
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"unknown metric {name!r}: one of {', '.join(METRICS)}, or module:function")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"metric {name!r}: {error}") from None
