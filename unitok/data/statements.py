"""What may be said about a scene without asking: statements, for a base language model that never sees a question.

They are drawn from the questions of `scenes.py` and their answers, and name no (shape, colour) pair that is held out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from unitok.data.scenes import (
    NUMBERS,
    TRAIN_PAIRS,
    Question,
    Scene,
    Thing,
    absent_like,
    ask,
    named,
    noun,
    plural,
    questions,
    relation,
    told,
    wheres,
)


def statement(q: Question) -> str:
    """What a question and its answer say, asking nothing."""
    if q.kind == "colour":
        return f"the {q.about[0]} is {q.answer}"
    if q.kind == "shape":
        return f"the {q.about[0]} object is a {q.answer}"
    if q.kind == "count":
        if q.answer == NUMBERS[1]:
            return f"there is one {noun(q.about[0]) if q.about else 'object'}"
        return f"there are {q.answer} {plural(q.about)}"
    if q.kind == "yes/no":
        return f"there is {'a' if q.answer == 'yes' else 'no'} {noun(q.about[0])}"
    return f"the {noun(q.about[0])} is {q.answer}, seen from the {noun(q.about[1])}"


def finding(q: Question) -> str:
    """The same as a statement that names what it is about first and ends with what is found: the order of an answer."""
    if q.kind == "count":
        return f"the number of {plural(q.about)} is {q.answer}"
    if q.kind == "yes/no":
        return f"the {noun(q.about[0])} is {'there' if q.answer == 'yes' else 'missing'}"
    if q.kind == "relation":
        return f"seen from the {noun(q.about[1])}, the {noun(q.about[0])} is {q.answer}"
    return statement(q)  # colour and shape end so already


def of_which(q: Question) -> str:
    """The same in the order of the question's words: "the colour of the cross is red"."""
    if q.kind == "colour":
        return f"the colour of the {q.about[0]} is {q.answer}"
    if q.kind == "shape":
        return f"the shape of the {q.about[0]} object is {q.answer}"
    if q.kind == "relation":
        return f"the {noun(q.about[0])}, seen from the {noun(q.about[1])}, is {q.answer}"
    return finding(q)  # count and yes/no have one order


def places(scene: Scene, worded: bool = True) -> list[str]:
    """Where each thing is, seen from each other one, however it is named; no held-out pair is.

    worded: in the order of a question's words, too.
    """
    things = itertools.permutations(scene.things, 2)
    return _said((q for a, b in things for q in wheres(scene, a, b, set(TRAIN_PAIRS))), worded)


def _said(asked: Iterable[Question], worded: bool) -> list[str]:
    orders = (finding, of_which) if worded else (finding,)
    return [*{order(q): None for q in asked for order in orders}]


def _looks(scene: Scene) -> list[Question]:
    """Which colour each thing has, named by its shape, and which shape, named by its colour, where one is meant."""
    asked = (q for t in scene.things for q in (ask(scene, "colour", (t.shape,)), ask(scene, "shape", (t.colour,))))
    return [q for q in asked if q]


_SIDES = {"left": "left object", "right": "right object", "above": "object above", "below": "object below"}


def sides(scene: Scene) -> list[str]:
    """Colour and shape of each of two things, named by where it is seen from the other."""
    if len(scene.things) != 2:
        return []
    a, b = scene.things
    seen = ((_SIDES[side], t) for t, side in ((a, relation(a, b)), (b, relation(b, a))) if side)
    return [f"the {name} is {what}" for name, t in seen for what in (t.colour, f"a {t.shape}")]


def bindings(scene: Scene, worded: bool = True) -> list[str]:
    """Which colour each of two things of a training scene has, named by its shape, and which shape, by its colour.

    Only where the words do not tell already: the two differ in both, and exchanging them names no held-out pair.
    worded: as in `places`.
    """
    if len(scene.things) != 2:
        return []
    a, b = scene.things
    alike = a.shape == b.shape or a.colour == b.colour
    return [] if alike or told(scene) else _said(_looks(scene), worded)


def truths(scene: Scene, rng: np.random.Generator) -> list[str]:
    """That each thing of a training scene is there, and as many absent ones that share its shape or colour.

    Each is said and called true or not: "there is a red circle, no". No held-out pair is named.
    """
    present = [t.pair for t in scene.things]
    said = []
    for pair in present:
        absent = absent_like(TRAIN_PAIRS, present, [pair])
        said += [(pair, "yes"), (absent[int(rng.integers(len(absent)))], "no")]
    found = [*dict.fromkeys(f"there is a {noun(pair)}, {true}" for pair, true in said)]
    return [found[i] for i in rng.permutation(len(found))]


def findings(scene: Scene, rng: np.random.Generator, rounds: int = 3, worded: bool = True) -> list[str]:
    """What so many rounds of questions about a scene find, and its `places`; each once, in random order."""
    asked = [finding(q) for _ in range(rounds) for q in questions(scene, rng)]
    found = [*dict.fromkeys([*asked, *places(scene, worded)])]
    return [found[i] for i in rng.permutation(len(found))]


def facts(scene: Scene, rng: np.random.Generator, n: int = 3, relations: bool = True) -> str:
    """Up to n true statements in random order, most of them about which thing has which colour and shape.

    None names a held-out pair, not even one that is absent; relations: whether they may say where a thing is.
    """
    asked = {q.text: q for q in questions(scene, rng) if relations or q.kind != "relation"}
    asked |= {q.text: q for q in _looks(scene)}
    found = list(asked.values())
    return ", ".join(statement(found[i]) for i in rng.permutation(len(found))[:n]) + "."


def choice(thing: Thing, rng: np.random.Generator, pairs: tuple = TRAIN_PAIRS) -> str:
    """A caption that leaves open which of two to four pairs there is. No two share the colour, and the others have
    another shape: the colour alone says which one a picture shows, and so which shape it has to have."""
    options = [thing.pair]
    n = int(rng.integers(2, 5))
    for i in rng.permutation(len(pairs)):
        shape, colour = pairs[i]
        if len(options) < n and shape != thing.shape and colour not in [c for _, c in options]:
            options.append(pairs[i])
    return " or ".join(named((*options[i], None)) for i in rng.permutation(len(options)))
