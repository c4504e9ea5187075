"""Text to picture, judged: does the picture show exactly what the prompt claims?

A row is {"id", "prompt", "claim": Claim.to_dict()} and, for the ceiling, {"image": a picture of the claimed scene}. The
model is any object with

    images(prompts, *, n, guidance, temperature, top_k, top_p, seed) -> list of PIL images, prompt-major
    candidates(prompts, count, *, seeds, guidance, ...) -> [(PIL image, how well the model likes it), ...] a prompt;
                                                           only where several candidates are asked for

seed: a list, one a prompt, so that a picture depends on neither batch nor order. The judge (judge.py) reads every
picture back into a scene; exact = the number of things and every attribute and relation the prompt names. A picture it
cannot read is wrong in everything.

Baselines
    shuffled_captions  the same pictures against the claim of another scored row (one that claims something else)
    one_candidate      where the model chose among several drawings: the first of them
    ceiling            the same score of the tokenizer's own reconstructions of the rows' real pictures
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unitok.checkpoint import config_hash
from unitok.data.scenes import NUMBERS, Claim, Scene, Thing, relation, satisfies
from unitok.data.sources import read_image, read_source
from unitok.eval import judge
from unitok.eval.images import block_mean
from unitok.eval.progress import ReplyLog, batches, model_stamp, row_rng, row_seed
from unitok.eval.results import Score, summarise
from unitok.eval.rows import image_keys, subset

READINGS = "readings.jsonl"
PICTURES = "pictures"
CEILING = "reconstruction_judged"

Row = Mapping[str, Any]
Metric = Callable[[Scene, Claim], bool]


# ---- what is scored --------------------------------------------------------------------------------------------------


def _same(of_thing: Callable[[Thing], Any], named: Callable[[tuple], Any]) -> Metric:
    """Whether scene and claim have the same things as often, seen by one of their attributes."""
    return lambda scene, claim: Counter(map(of_thing, scene.things)) == Counter(map(named, claim.things))


def _related(scene: Scene, claim: Claim) -> bool:
    pairs = tuple((shape, colour, None) for shape, colour, _ in claim.things)
    return satisfies(scene, Claim(pairs, claim.relations))


METRICS: dict[str, Metric] = {
    "exact": satisfies,
    "readable": lambda scene, claim: True,
    "count": lambda scene, claim: len(scene.things) == len(claim.things),
    "shapes": _same(lambda thing: thing.shape, lambda named: named[0]),
    "colours": _same(lambda thing: thing.colour, lambda named: named[1]),
    "pairs": _same(lambda thing: thing.pair, lambda named: named[:2]),
    "sizes": _same(lambda thing: thing.size, lambda named: named[2]),
    "relation": _related,
    "background": lambda scene, claim: scene.background == claim.background,
}
NAMED: dict[str, Callable[[Claim], bool]] = {  # attributes that not every claim names
    "sizes": lambda claim: all(size for *_, size in claim.things),
    "relation": lambda claim: bool(claim.relations),
    "background": lambda claim: claim.background is not None,
}


# ---- the task --------------------------------------------------------------------------------------------------------


def run(model, recipe) -> list[Score]:
    """The scores of one recipe. `recipe.options`: name. Temperature is 1 unless the recipe gives one.

    Pictures go to `recipe.out`/pictures, readings to readings.jsonl beside them, from where an interrupted run goes on.
    """
    options = dict(recipe.options)
    if unknown := sorted(set(options) - {"name"}):
        raise ValueError(f"text_to_image: unknown option {unknown[0]!r}; known: name")
    temperature = 1.0 if recipe.temperature is None else recipe.temperature
    return evaluate(
        model,
        subset(load_prompts(recipe.data), recipe.n, recipe.seed),
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        decode={
            "guidance": recipe.guidance,
            "temperature": temperature,
            "top_k": recipe.top_k,
            "top_p": recipe.top_p,
            "candidates": recipe.candidates,
        },
        out=Path(recipe.out) if recipe.out else None,
        stamp=model_stamp(recipe),
        **options,
    )


def load_prompts(sources: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows of recipe sources (path, limit), each with a unique "id"; pictures relative to their file.

    Raises:
        ValueError: a row without prompt or claim (by its place), or no row. FileNotFoundError: no such source.
    """
    rows = []
    for source in sources:
        for number, (where, row, base) in enumerate(read_source(source.path)):
            if source.limit is not None and number >= source.limit:
                break
            try:
                if isinstance(row, ValueError):
                    raise row
                kept = {"prompt": str(row["prompt"]), "claim": Claim.from_dict(row["claim"]).to_dict()}
                if isinstance(row.get("image"), str):
                    kept["image"] = Path(base) / row["image"]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{where}: not a row with a prompt and a claim: {error!r}") from None
            rows.append({**kept, "id": str(row.get("id", where))})
    if not rows:
        raise ValueError("text_to_image: no rows to score")
    if len({row["id"] for row in rows}) < len(rows):
        rows = [{**row, "id": f"{row['id']}@{number}"} for number, row in enumerate(rows)]
    return rows


def evaluate(
    model,
    rows: Sequence[Row],
    *,
    seed: int = 0,
    batch_size: int = 16,
    decode: Mapping[str, Any] | None = None,
    out: Path | None = None,
    stamp: Any = None,
    name: str = "t2i",
) -> list[Score]:
    """Draw every prompt once -> the scores of `score_readings`.

    `reconstruction_judged` and the ceilings come with them where all rows have pictures and the model has one image
    tokenizer.

    Args:
        decode: guidance, temperature, top_k, top_p, and candidates: how many the model draws of each prompt, of which
            it keeps the one it likes best.
        out: folder of pictures and readings. stamp: what tells this model from another when going on from it.
    """
    claims = _claims(rows)
    prompts = {row["id"]: row["prompt"] for row in rows}
    decode = {"guidance": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "candidates": 1, **(decode or {})}
    count = int(decode["candidates"])
    choice = {key: value for key, value in decode.items() if key != "candidates"}
    protocol = {**_protocol(rows), "decode": decode, "seed": seed}
    log = ReplyLog(None if out is None else Path(out) / READINGS, {"model": stamp, "protocol": protocol})

    def draw_and_read(ids: Sequence[str]) -> list[str]:
        seeds = [row_seed(seed, "draw", i) for i in ids]
        texts = [prompts[i] for i in ids]
        if count > 1:
            drawn = model.candidates(texts, count, seeds=seeds, **choice)
            made = [max(of_one, key=lambda pair: pair[1])[0] for of_one in drawn]
            first = [of_one[0][0] for of_one in drawn]
        else:
            made, first = model.images(texts, n=1, seed=seeds, **choice), []
        if len(made) != len(ids):
            raise ValueError(f"the model must draw one picture a prompt: {len(ids)} prompts, got {len(made)} pictures")
        if out is not None:
            for number, picture in zip(ids, made, strict=True):
                path = Path(out) / PICTURES / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', number)}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
        pictures = np.stack([np.asarray(p.convert("RGB"), np.float32) / 255 for p in [*made, *first]])  # [., n, n, 3]
        scenes = [scene and scene.to_dict() for scene in judge.read(pictures.transpose(0, 3, 1, 2))]
        return [json.dumps(scenes[i :: len(ids)]) for i in range(len(ids))]  # [chosen], or [chosen, first]

    replies = log.collect("model", list(claims), batch_size, draw_and_read)
    log.finish()
    scenes = {i: [scene and Scene.from_dict(scene) for scene in json.loads(text)] for i, text in replies.items()}
    read = {i: of_row[0] for i, of_row in scenes.items()}
    first = {i: of_row[1] for i, of_row in scenes.items()} if count > 1 else None
    tokenizer = getattr(model, "image_tokenizer", None)
    if tokenizer is None or not all(row.get("image") for row in rows):
        return score_readings(claims, read, first=first, protocol=protocol, seed=seed, name=name)
    made, real, means = _reconstructed(tokenizer, rows, batch_size, getattr(model, "decode", None))
    scores = score_readings(claims, read, first=first, ceiling=made, protocol=protocol, seed=seed, name=name)
    return [*scores, _judged(claims, made, real, means, _protocol(rows))]


def score_readings(
    claims: Mapping[str, Claim],
    read: Mapping[str, Scene | None],
    *,
    first: Mapping[str, Scene | None] | None = None,
    ceiling: Mapping[str, Scene | None] | None = None,
    protocol: Mapping[str, Any] | None = None,
    seed: int = 0,
    name: str = "t2i",
) -> list[Score]:
    """Scores of readings (row id -> scene; None: unreadable) against the claims of their rows.

    NAME_exact, NAME_exact_one_object (_two_objects, _three_objects) where rows differ in it, NAME_readable, and one an
    attribute over the rows whose claims name it: the right multiset (count, shapes, colours, pairs of both, sizes,
    background), or the right pairs in the right relation. `first`: readings of each first candidate, `ceiling`: of the
    tokenizer's reconstructions.
    """

    def score(what: str, metric: str, ids: Sequence[str]) -> Score:
        holds = METRICS[metric]

        def right(scenes: Mapping[str, Scene | None], against: Mapping[str, Claim]) -> dict[str, float]:
            return {i: float((scene := scenes[i]) is not None and holds(scene, against[i])) for i in ids}

        beside = {}
        others = {i: claims[other] for i in ids if (other := _other(i, ids, claims, seed)) is not None}
        if len(others) == len(ids) and metric != "readable":
            beside["shuffled_captions"] = right(read, others)
        if first is not None:
            beside["one_candidate"] = right(first, claims)
        if ceiling is not None:
            beside["ceiling"] = right(ceiling, claims)
        note = {**(protocol or {}), "metric": metric}
        return summarise(f"{name}_{what}", right(read, claims), baselines=beside, protocol=note, proportion=True)

    scores = [score("exact", "exact", list(claims))]
    counts = sorted({len(claim.things) for claim in claims.values()})
    for count in counts if len(counts) > 1 else ():
        ids = [i for i, claim in claims.items() if len(claim.things) == count]
        scores.append(score(f"exact_{NUMBERS[count]}_object{'s' if count > 1 else ''}", "exact", ids))
    for metric in METRICS:
        ids = [i for i, claim in claims.items() if metric not in NAMED or NAMED[metric](claim)]
        if ids and metric != "exact":
            scores.append(score(metric, metric, ids))
    return scores


# ---- the ceiling -----------------------------------------------------------------------------------------------------


def reconstruction_judged(tokenizer, rows: Sequence[Row], *, batch_size: int = 64) -> Score:
    """The judge on encode -> decode of the rows' pictures ({"id", "image"}), by their "claim".

    A row without a claim must keep the whole scene that the judge reads from the real picture: things with their sizes,
    the background, and the relations of neighbours where all are clear. Baselines: `originals`, the real pictures;
    `block_mean`, one colour a token.
    """
    made, real, means = _reconstructed(tokenizer, rows, batch_size)
    claims: dict[str, Claim | None] = {}
    for row in rows:
        claims[row["id"]] = Claim.from_dict(row["claim"]) if "claim" in row else everything(real[row["id"]])
    return _judged(claims, made, real, means, _protocol(rows))


Readings = dict[str, Scene | None]


@torch.no_grad()
def _reconstructed(
    tokenizer, rows: Sequence[Row], batch_size: int, decode: Callable[..., torch.Tensor] | None = None
) -> tuple[Readings, Readings, Readings]:
    """Readings of the reconstructions, of the pictures themselves, and of their block means.

    decode: codes, grid -> pictures, in place of the tokenizer's own decoder.
    """
    decode = decode or tokenizer.decode
    device = next(tokenizer.parameters(), torch.empty(0)).device
    was_training = tokenizer.training
    tokenizer.eval()
    out: tuple[Readings, Readings, Readings] = ({}, {}, {})
    for batch in batches(rows, batch_size, "reconstruct"):
        images = torch.stack([tokenizer.preprocess(read_image(row["image"])) for row in batch])  # [B, 3, n, n]
        grid = tuple(tokenizer.grid(*images.shape[-2:]))
        made = decode(tokenizer.encode(images.to(device)), grid).float().cpu()
        for readings, pictures in zip(out, (made, images, block_mean(images, grid)), strict=True):
            readings.update(zip((row["id"] for row in batch), judge.read(pictures), strict=True))
    tokenizer.train(was_training)
    return out


def _judged(
    claims: Mapping[str, Claim | None], made: Readings, real: Readings, means: Readings, protocol: Mapping[str, Any]
) -> Score:
    def right(read: Readings) -> dict[str, float]:
        return {
            i: float(claim is not None and (scene := read[i]) is not None and satisfies(scene, claim))
            for i, claim in claims.items()
        }

    beside = {"originals": right(real), "block_mean": right(means)}
    note = {**protocol, "metric": "exact"}
    return summarise(CEILING, right(made), baselines=beside, protocol=note, proportion=True)


def everything(scene: Scene | None) -> Claim | None:
    """All that can be claimed of a scene in its order."""
    if scene is None:
        return None
    things = tuple((t.shape, t.colour, t.size) for t in scene.things)
    relations = [r for a, b in itertools.pairwise(scene.things) if (r := relation(a, b)) is not None]
    return Claim(things, tuple(relations) if len(relations) == len(things) - 1 else (), scene.background)


def things_kept(claim: Claim, scene: Scene | None) -> float:
    """Share of the claim's things whose shape and colour together are found in the scene, each thing counted once; 0
    where there is no scene."""
    claimed = Counter((shape, colour) for shape, colour, _ in claim.things)
    found = Counter(thing.pair for thing in scene.things) if scene else Counter()
    return (claimed & found).total() / claimed.total()


# ---- rows ------------------------------------------------------------------------------------------------------------


def _claims(rows: Sequence[Row]) -> dict[str, Claim]:
    if not rows:
        raise ValueError("text_to_image: no rows to score")
    claims = {row["id"]: Claim.from_dict(row["claim"]) for row in rows}
    if len(claims) != len(rows):
        twice = next(i for i, count in Counter(row["id"] for row in rows).items() if count > 1)
        raise ValueError(f"text_to_image: two rows have the id {twice!r}")
    return claims


def _other(row_id: str, ids: Sequence[str], claims: Mapping[str, Claim], seed: int) -> str | None:
    """The first row, from a place drawn for this one, that claims something else."""
    start = row_rng(seed, "shuffled", row_id).randrange(len(ids))
    turn = (ids[(start + step) % len(ids)] for step in range(len(ids)))
    return next((other for other in turn if claims[other] != claims[row_id]), None)


def _pictures(row: Row) -> frozenset[str]:
    return image_keys(row) if row.get("image") else frozenset()


def _protocol(rows: Sequence[Row]) -> dict[str, Any]:
    """What was scored and by which instrument."""
    content = [[row["id"], row.get("prompt"), row.get("claim"), sorted(_pictures(row))] for row in rows]
    return {"judge": dict(judge.LIMITS), "data_hash": config_hash({"rows": content})[:12]}
