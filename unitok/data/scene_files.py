"""Scenes as an ordinary folder of pictures and JSON lines, in the row forms that every other data set has.

    python -m unitok.data.scene_files OUT [--setting demo|full|base|lattice|beside|placed] [--pictures N ...]
    python -m unitok.data.scene_files OUT --readings

    images/SPLIT/*.png
    eyes.jsonl                   pictures of every pair: for the image tokenizer, which is not a language model
    train_captions.jsonl         {"image", "text"}                         no held-out pair in any train_ file
    train_draw.jsonl             {"parts": [text without loss, image]}     the same captions as things to draw ...
    train_describe.jsonl         {"parts": [image, text]}                  ... and as things to say
    train_questions.jsonl        {"image", "question", "answers", ...}
    train_shots.jsonl            {"messages": [...]}: interleaved documents of 1 to 5 pictures with a question each
    train_texts.jsonl            {"parts": [{"type": "text", ...}]}: sentences without pictures, never a question
    train_told.jsonl             {"parts": [text without loss, text]}      a caption, then what is true if it is
    train_facts.jsonl            {"parts": [image without loss, text]}     the same statements about a picture
    train_findings.jsonl         {"parts": [image, "seen:", text]}         one statement that ends with what is found
    train_places.jsonl           {"parts": [image, "seen:", text]}         those about where a thing is
    train_sides.jsonl            {"parts": [image, "seen:", text]}         "the left object is a cross"
    train_bindings.jsonl         {"parts": [image, "seen:", text]}         "the cross is red", of two things
    train_truths.jsonl           {"parts": [image, "seen:", text]}         "there is a red cross, no"
    train_choices.jsonl          {"parts": [text without loss, image]}     "a red square or a blue cross": one of them
    train_read.jsonl             {"messages": [...]}: a true caption and a question, then its answer  (--readings)
    train_blind.jsonl            {"messages": [...]}: the question alone, then its answer             (--readings)
    SPLIT_captions.jsonl         {"image", "captions": every true caption}      SPLIT: validation, test
    SPLIT_questions.jsonl        as above                                       (and `SPLIT_seen_`, see below)
    SPLIT_prompts.jsonl          {"prompt", "claim", "image"}: to draw; the claim is what a judge checks

Training documents that read a picture leave out those where words alone tell which of two things has which colour
(`scenes.told`): whoever learns from them looks less. Every picture of `validation` and `test` holds at least one
held-out pair; `test_seen` holds train pairs only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unitok.checkpoint import read_json, write_atomic, write_json
from unitok.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    MORE_PAIRS,
    NUMBERS,
    OPPOSITE,
    PAIRS,
    SETTINGS,
    SHAPES,
    SIZES,
    TRAIN_PAIRS,
    Question,
    Scene,
    Setting,
    all_captions,
    questions,
    random_caption,
    random_scene,
    render_scene,
    told,
)
from unitok.data.statements import bindings, choice, facts, findings, places, sides, truths

FOUND = "seen:"  # before a statement in train_findings.jsonl: it is no caption
BEHIND = ": "  # between caption and question in train_read.jsonl: what a template has as image_suffix
DONE = "scenes.json"  # written last: the arguments that made the folder, and what the setting was then
MAX_SHOTS = 4
SPLITS: dict[str, dict[str, Any]] = {  # which pairs a split shows; seeds differ by position
    "eyes": {},
    "train": {"pairs": TRAIN_PAIRS},
    "validation": {"must": HELD_OUT},
    "test": {"must": HELD_OUT},
    "test_seen": {"pairs": TRAIN_PAIRS},
}


def write_scenes(
    out: str | Path,
    *,
    setting: str = "demo",
    image_size: int = 32,
    pictures: dict[str, int] | None = None,
    captions: int = 1,
    shots: int = 0,
    texts: int = 0,
    seed: int = 0,
    ordered: float | None = None,
    rounds: int = 0,
    asks: int = 1,
) -> Path:
    """Write the folder; nothing is done where it stands already, made by the same arguments.

    pictures: how many in each split of SPLITS; captions: of each training picture; shots: interleaved documents;
    texts: sentences without pictures, and as many captions with what follows from them; where there are any, also the
    statements and choices about the training pictures that a base model learns from; ordered: of the training captions,
    see `random_caption`; rounds: of findings about each training picture, see `statements.findings`; asks: rounds of
    questions about each training picture, of which each is asked once.
    Raises ValueError where `out` holds scenes made by other arguments.
    """
    out = Path(out)
    pictures = {name: (pictures or {}).get(name, 0) for name in SPLITS}
    if setting not in SETTINGS:
        raise ValueError(f"unknown setting {setting!r}: expected one of {', '.join(SETTINGS)}")
    base = SETTINGS[setting]
    drawn = {field: list(value) if isinstance(value, tuple) else value for field, value in asdict(base).items()}
    asked = {"setting": setting, "drawn": drawn, "image_size": image_size, "pictures": pictures, "captions": captions,
             "shots": shots, "texts": texts, "seed": seed, "ordered": ordered, "rounds": rounds,
             "asks": asks}  # fmt: skip
    if (out / DONE).exists():
        made = read_json(out / DONE)
        for key, value in asked.items():
            if made.get(key) != value:
                raise ValueError(f"{out} holds scenes with {key} = {made.get(key)}, not {value}: choose another folder")
        return out
    drawn_as = replace(base, image_size=image_size)

    for index, split in enumerate(SPLITS):
        rng = np.random.default_rng([seed, index])
        scenes = [random_scene(rng, drawn_as, **_limits(split, drawn_as, rng)) for _ in range(pictures[split])]
        names = list(_draw(scenes, out, split))
        if not scenes:
            continue
        if split == "eyes":
            _write(out / "eyes.jsonl", ({"image": name} for name in names))
        elif split == "train":
            _write_training(out, scenes, names, rng, captions=captions, shots=shots, texts=texts, setting=drawn_as,
                            ordered=ordered, rounds=rounds, asks=asks)  # fmt: skip
        else:
            _write_scored(out, split, scenes, names, rng)
    write_json(out / DONE, asked)
    return out


def _limits(split: str, setting: Setting, rng: np.random.Generator) -> dict[str, Any]:
    """Which pairs the next picture of the split shows."""
    if split == "train" and setting.more and rng.random() < setting.more:
        return {"pairs": MORE_PAIRS}
    return SPLITS[split]


def write_readings(folder: str | Path, seed: int = 0) -> Path:
    """Write train_read.jsonl and train_blind.jsonl of a folder of scenes: its training questions without pictures.

    They teach a language model to answer from true captions, and without any; each question gets one of the captions
    of its picture. Returns the folder.
    """
    folder, rng = Path(folder), np.random.default_rng([seed, 99])
    captions: dict[str, list[str]] = {}
    for row in _rows(folder / "train_captions.jsonl"):
        captions.setdefault(row["image"], []).append(row["text"])
    asked = [(row["question"], row["answers"][0], captions[row["image"]])
             for row in _rows(folder / "train_questions.jsonl")]  # fmt: skip
    told = (said[int(rng.integers(len(said)))] + BEHIND for _, _, said in asked)
    _write(folder / "train_read.jsonl", (_turns(t + q, a) for t, (q, a, _) in zip(told, asked, strict=True)))
    _write(folder / "train_blind.jsonl", (_turns(q, a) for q, a, _ in asked))
    return folder


def _rows(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _turns(asked: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def _draw(scenes: list[Scene], out: Path, split: str) -> Iterator[str]:
    folder = out / "images" / split
    if scenes:
        folder.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(scenes):
        Image.fromarray(render_scene(scene)).save(folder / f"{i:06d}.png")
        yield f"images/{split}/{i:06d}.png"


def _write_training(
    out,
    scenes,
    names,
    rng,
    *,
    captions: int,
    shots: int,
    texts: int,
    setting: Setting,
    ordered: float | None,
    rounds: int,
    asks: int,
) -> None:
    captioned = [
        (name, random_caption(scene, rng, ordered, related=setting.related)[0])
        for scene, name in zip(scenes, names, strict=True)
        for _ in range(captions)
    ]
    _write(out / "train_captions.jsonl", ({"image": name, "text": text} for name, text in captioned))
    _write(out / "train_draw.jsonl", (_ordered_row(name, text, "text") for name, text in captioned))
    read = [(name, scene) for name, scene in zip(names, scenes, strict=True) if not told(scene)]
    by_reading = {name for name, _ in read}
    rows = (_ordered_row(name, text, "image") for name, text in captioned if name in by_reading)
    _write(out / "train_describe.jsonl", rows)
    asked = [(name, scene, _asked(scene, asks, rng)) for name, scene in read]
    _write(out / "train_questions.jsonl", (_question_row(n, q, s) for n, s, qs in asked for q in qs))
    if shots:
        _write(out / "train_shots.jsonl", (_shot_row(asked, rng) for _ in range(shots)))
    if texts:
        _write(out / "train_texts.jsonl", ({"parts": [_text(t)]} for t in _texts(texts, rng, setting)))
        _write(out / "train_told.jsonl", (_told_row(rng, setting) for _ in range(texts)))
        shown = [one for one in read for _ in range(captions)]
        rows = ({"parts": [_image(n, loss=False), _text(facts(s, rng))]} for n, s in shown)
        _write(out / "train_facts.jsonl", rows)
        single = [(name, scene.things[0]) for name, scene in shown if len(scene.things) == 1]
        rows = (_ordered_row(name, choice(thing, rng), "text") for name, thing in single)
        _write(out / "train_choices.jsonl", rows)
    if rounds:
        worded = not setting.beside  # at fixed places things are found in one order of words first
        kinds: dict[str, Callable[[Scene], list[str]]] = {
            "findings": lambda scene: findings(scene, rng, rounds, worded),
            "places": lambda scene: places(scene, worded),
            "sides": sides,
            "bindings": lambda scene: bindings(scene, worded),
            "truths": lambda scene: truths(scene, rng),
        }
        for kind, said in kinds.items():
            found = (_found_row(name, text) for name, scene in read for text in said(scene))
            _write(out / f"train_{kind}.jsonl", found)


def _asked(scene: Scene, rounds: int, rng: np.random.Generator) -> list[Question]:
    return list({q.text: q for _ in range(rounds) for q in questions(scene, rng)}.values())


def _write_scored(out, split: str, scenes, names, rng) -> None:
    allowed = PAIRS if split != "test_seen" else TRAIN_PAIRS  # what is asked about may be held out where pictures are
    rows = (_question_row(n, q, s) for n, s in zip(names, scenes, strict=True) for q in questions(s, rng, allowed))
    _write(out / f"{split}_questions.jsonl", rows)
    rows = (
        {"image": name, "captions": all_captions(scene), "objects": len(scene.things)}
        for scene, name in zip(scenes, names, strict=True)
    )
    _write(out / f"{split}_captions.jsonl", rows)
    prompts = [(name, *random_caption(scene, rng)) for scene, name in zip(scenes, names, strict=True)]
    rows = ({"image": name, "prompt": text, "claim": claim.to_dict()} for name, text, claim in prompts)
    _write(out / f"{split}_prompts.jsonl", rows)


def _ordered_row(name: str, text: str, first: str) -> dict:
    """Caption and picture in one order. The caption of a picture to draw is not learnt. A picture that comes first is:
    pictures without a prompt are the other half of classifier-free guidance."""
    if first == "text":
        return {"parts": [_text(text, loss=False), _image(name)]}
    return {"parts": [_image(name), _text(text)]}


def _found_row(name: str, text: str) -> dict:
    """Nothing is learnt before the statement, so that all about a picture can share it (`share_prefix`)."""
    return {"parts": [_image(name, loss=False), _text(FOUND, loss=False), _text(text)]}


def _text(text: str, **more: Any) -> dict:
    return {"type": "text", "text": text, **more}


def _image(name: str, **more: Any) -> dict:
    return {"type": "image", "image": name, **more}


def _told_row(rng: np.random.Generator, setting: Setting) -> dict:
    """A caption of two or three things and statements that follow from it: what words say about each other."""
    scene = random_scene(rng, replace(setting, counts=(0.0, 0.5, 0.5)), TRAIN_PAIRS)
    caption, claim = random_caption(scene, rng)
    said = facts(scene, rng, n=4, relations=bool(claim.relations) and len(scene.things) == 2)
    return {"parts": [_text(caption + ":", loss=False), _text(" " + said)]}


def _question_row(name: str, q: Question, scene: Scene) -> dict:
    return {"image": name, "question": q.text, "answers": [q.answer], "kind": q.kind, "objects": len(scene.things)}


def _shot_row(asked: list[tuple[str, Scene, list[Question]]], rng: np.random.Generator) -> dict:
    """One to five pictures, a question and its answer each: the later ones have exemplars before them."""
    messages = []
    for i in rng.choice(len(asked), int(rng.integers(1, MAX_SHOTS + 2)), replace=False):
        name, _, questions_of_it = asked[i]
        q = questions_of_it[int(rng.integers(len(questions_of_it)))]
        content = [_image(name), _text(q.text)]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": q.answer}]
    return {"messages": messages}


# Sentences that use the words of questions and answers without asking anything: what a base model has read somewhere.
_SAYINGS = (
    "how many objects there are is a number, one, two or three.",
    "what colour the object is, and what shape, is seen from the picture.",
    "where the one object is, seen from the other, is left, right, above or below.",
    "yes is the opposite of no, and no is the opposite of yes.",
    "is it so? is answered by yes or no.".replace("?", ""),
    "zero objects are no objects.",
    "circles, squares, triangles and crosses are shapes.",
)


def _texts(n: int, rng: np.random.Generator, setting: Setting) -> Iterator[str]:
    shapes, colours = list(SHAPES), list(COLOURS)
    sides = list(OPPOSITE)
    for _ in range(n):
        kind = int(rng.integers(7))
        side, number = sides[int(rng.integers(4))], NUMBERS[int(rng.integers(1, 4))]
        shape, colour = shapes[int(rng.integers(4))], colours[int(rng.integers(6))]
        if kind == 0:
            yield _SAYINGS[int(rng.integers(len(_SAYINGS)))]
        elif kind == 1:
            yield f"{side} is the opposite of {OPPOSITE[side]}."
        elif kind == 2:
            yield f"{colour} is a colour, and {shape} is a shape."
        elif kind == 3:
            yield f"a {shape} is an object that has the shape of a {shape}."
        elif kind == 4:
            yield f"the {colour} object is {colour}, yes, and has no other colour than {colour}."
        elif kind == 5:
            yield f"{number} is how many objects there are where there are {number}."
        else:
            yield random_caption(random_scene(rng, setting, TRAIN_PAIRS), rng)[0]


def vocabulary_text(setting: str = "full", n: int = 4000, seed: int = 0) -> Iterator[str]:
    """Sentences with every word of the scene language, to train a text tokenizer on: captions, questions, answers.

    Words only: all pairs' words occur apart from each other anyway, and no picture is involved.
    """
    rng = np.random.default_rng([seed, 77])
    yield from _texts(n, rng, SETTINGS[setting])
    for _ in range(n):
        scene = random_scene(rng, SETTINGS[setting], TRAIN_PAIRS)
        yield random_caption(scene, rng)[0]
        for q in questions(scene, rng):
            yield q.text
            yield q.answer
    yield " ".join((*SHAPES, *COLOURS, *SIZES, *BACKGROUNDS, *NUMBERS, *OPPOSITE))


def _write(path: Path, rows: Iterable[dict]) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write scenes as a folder of pictures and JSON lines.")
    parser.add_argument("out")
    parser.add_argument("--setting", default="demo", choices=list(SETTINGS))
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--captions", type=int, default=1, help="captions of each training picture")
    parser.add_argument("--shots", type=int, default=0, help="interleaved question documents")
    parser.add_argument("--texts", type=int, default=0, help="sentences without pictures")
    parser.add_argument("--seed", type=int, default=0)
    for split in SPLITS:
        parser.add_argument(f"--{split.replace('_', '-')}", type=int, default=0, metavar="N", help=f"{split} pictures")
    parser.add_argument("--readings", action="store_true", help="of OUT as it is, write train_read and train_blind")
    args = vars(parser.parse_args())
    if args.pop("readings"):
        print(write_readings(args["out"], args["seed"]))
        return
    pictures = {split: args.pop(split) for split in SPLITS}
    print(write_scenes(args.pop("out"), pictures=pictures, **args))


if __name__ == "__main__":
    main()
