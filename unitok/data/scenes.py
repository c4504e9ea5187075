"""Scenes: the built-in pictures with a known truth.

A scene is one to three coloured shapes on a plain background. This file draws it, names it (captions), asks about it
(questions) and answers from the symbols alone (`answer`, the oracle that checks every question). `scene_files.py`
writes ordinary folders of pictures and JSON lines from it; nothing after that knows about scenes, except the judge.

Some (shape, colour) pairs are held out of everything a language model is trained on: see `HELD_OUT`.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (222, 44, 44),
    "green": (46, 172, 62),
    "blue": (52, 84, 232),
    "yellow": (246, 206, 44),
    "purple": (164, 62, 204),
    "cyan": (48, 204, 220),
}
MORE_COLOURS = {  # of some training pictures (`Setting.more`); no scored picture has them, and the judge reads none
    "orange": (240, 130, 30),
    "pink": (246, 150, 190),
    "brown": (120, 72, 36),
    "lime": (160, 230, 60),
    "teal": (20, 120, 120),
    "navy": (24, 32, 120),
    "maroon": (120, 20, 36),
    "magenta": (226, 40, 150),
    "olive": (128, 128, 32),
    "violet": (110, 60, 220),
    "sky": (120, 190, 250),
    "salmon": (250, 140, 114),
}
SIZES = {"small": 4.0, "large": 6.5}  # radius in pixels of a 32-pixel picture
BACKGROUNDS = {"black": (12, 12, 12), "white": (244, 244, 244), "gray": (128, 128, 128)}
NUMBERS = ("zero", "one", "two", "three")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
KINDS = ("colour", "shape", "count", "relation", "yes/no")

# 5 of 24 pairs (21 %): no colour is missing twice and every shape is missing once, so that each word stays well known.
HELD_OUT = frozenset(
    {("circle", "red"), ("square", "green"), ("triangle", "blue"), ("cross", "yellow"), ("circle", "purple")}
)
PAIRS = tuple(itertools.product(SHAPES, COLOURS))
TRAIN_PAIRS = tuple(p for p in PAIRS if p not in HELD_OUT)
MORE_PAIRS = (*TRAIN_PAIRS, *itertools.product(SHAPES, MORE_COLOURS))

REFERENCE_SIZE = 32  # SIZES and margins are given for this picture size and scale with it
CLEARANCE = 4  # pixels by which the dominant axis of a relation must win
GAP = 2  # pixels between two things


@dataclass(frozen=True)
class Thing:
    """One shape; x, y: its centre on whole pixels, x to the right, y downwards."""

    shape: str
    colour: str
    size: str
    x: int
    y: int

    @property
    def pair(self) -> tuple[str, str]:
        return (self.shape, self.colour)


@dataclass(frozen=True)
class Scene:
    """Things in the order captions name them first; image_size: pixels a side."""

    things: tuple[Thing, ...]
    background: str
    image_size: int = REFERENCE_SIZE

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(d: dict) -> Scene:
        return Scene(tuple(Thing(**t) for t in d["things"]), d["background"], d["image_size"])


@dataclass(frozen=True)
class Setting:
    """Which scenes are drawn: `counts[i]` is the share of pictures with i + 1 things.

    step: centres stand on multiples of it, in pixels of the picture; 1 leaves them free.
    beside: the two things of a picture stand left and right or above and below, each in the middle of its half, and
    one alone in the middle.
    related: captions of two things always say how they stand to each other.
    more: share of training pictures whose things come from MORE_PAIRS: what sees a shape in sixteen colours knows it
    in another, which a small network that sees it in four or five does not.
    """

    counts: tuple[float, ...] = (0.5, 0.5)
    backgrounds: tuple[str, ...] = ("black", "white")
    image_size: int = REFERENCE_SIZE
    step: int = 1
    beside: bool = False
    related: bool = False
    more: float = 0.0


DEMO = Setting()
FULL = Setting(counts=(0.34, 0.33, 0.33), backgrounds=tuple(BACKGROUNDS))
BASE = Setting(counts=(0.35, 0.65))
LATTICE = Setting(counts=(0.35, 0.65), step=4)
BESIDE = Setting(counts=(0.0, 1.0), beside=True, related=True)
PLACED = Setting(beside=True, related=True, more=0.5)
SETTINGS = {"demo": DEMO, "full": FULL, "base": BASE, "lattice": LATTICE, "beside": BESIDE, "placed": PLACED}


# ---------------------------------------------------------------- drawing


def radius(size: str, image_size: int = REFERENCE_SIZE) -> float:
    return SIZES[size] * image_size / REFERENCE_SIZE


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points (in radii from the centre, y downwards) belong to the shape."""
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 0.9
    if shape == "triangle":  # apex up
        return (y <= 0.85) & (2 * np.abs(x) <= 1.1 * (y + 1))
    if shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        return (np.minimum(ax, ay) <= 0.36) & (np.maximum(ax, ay) <= 1)
    raise ValueError(f"unknown shape {shape!r}: expected one of {', '.join(SHAPES)}")


@lru_cache(maxsize=256)
def stamp(shape: str, size: str, image_size: int = REFERENCE_SIZE, supersample: int = 8) -> np.ndarray:
    """Coverage in [0, 1] of a shape centred in its window, float32 [2h, 2h]; h whole pixels hold the radius."""
    r = radius(size, image_size)
    h = int(np.ceil(r)) + 1
    t = (np.arange(2 * h * supersample) + 0.5) / supersample - h
    inside = _inside(shape, t[None, :] / r, t[:, None] / r).astype(np.float32)
    return inside.reshape(2 * h, supersample, 2 * h, supersample).mean((1, 3))  # [2h, 2h]


_PAINTS = {**COLOURS, **MORE_COLOURS}


def render_scene(scene: Scene) -> np.ndarray:
    """uint8 [H, W, 3], anti-aliased."""
    n = scene.image_size
    picture = np.empty((n, n, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for t in scene.things:
        alpha = stamp(t.shape, t.size, n)
        h = len(alpha) // 2
        y0, x0 = t.y - h, t.x - h
        ys, xs = slice(max(y0, 0), min(y0 + 2 * h, n)), slice(max(x0, 0), min(x0 + 2 * h, n))
        a = alpha[ys.start - y0 : ys.stop - y0, xs.start - x0 : xs.stop - x0, None]
        picture[ys, xs] += a * (np.array(_PAINTS[t.colour], np.float32) - picture[ys, xs])
    return np.round(picture).astype(np.uint8)


# ---------------------------------------------------------------- drawing lots


def relation(a: Thing, b: Thing) -> str | None:
    """Where a is, seen from b: left, right, above, below; None where neither axis clearly wins."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(abs(dx) - abs(dy)) < CLEARANCE:
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def random_scene(
    rng: np.random.Generator, setting: Setting = DEMO, pairs: tuple = PAIRS, must: frozenset | None = None
) -> Scene:
    """A scene whose things come from `pairs` (all different); `must`: one thing at least is one of these pairs.

    Every two neighbours in the order of things stand in a clear relation, and nothing touches.
    """
    n = setting.image_size
    count = int(rng.choice(len(setting.counts), p=setting.counts)) + 1
    while True:
        chosen = [pairs[i] for i in rng.choice(len(pairs), count, replace=False)]
        if must:
            pool = [p for p in sorted(must) if p in pairs]
            chosen[int(rng.integers(count))] = pool[int(rng.integers(len(pool)))]
            if len(set(chosen)) < count:
                continue
        things: list[Thing] = []
        places = _middles(rng, n, count) if setting.beside else [None] * count
        for (shape, colour), place in zip(chosen, places, strict=True):
            size = ("small", "large")[int(rng.integers(2))]
            edge = int(np.ceil(radius(size, n))) + 1
            first, last = -(-edge // setting.step), (n - edge) // setting.step
            x, y = place or (int(v) * setting.step for v in rng.integers(first, last + 1, 2))
            things.append(Thing(shape, colour, size, x, y))
        if all(_apart(a, b, n) for a, b in itertools.combinations(things, 2)) and all(
            relation(a, b) for a, b in itertools.pairwise(things)
        ):
            return Scene(tuple(things), setting.backgrounds[int(rng.integers(len(setting.backgrounds)))], n)


def _middles(rng: np.random.Generator, n: int, count: int) -> list[tuple[int, int]]:
    """The middles of the left and right half or of upper and lower, in a drawn order; of one thing, of the picture."""
    near, middle, far = n // 4, n // 2, 3 * n // 4
    if count == 1:
        return [(middle, middle)]
    both = [(near, middle), (far, middle)] if rng.random() < 0.5 else [(middle, near), (middle, far)]
    return both if rng.random() < 0.5 else both[::-1]


def _apart(a: Thing, b: Thing, n: int) -> bool:
    reach = radius(a.size, n) + radius(b.size, n) + GAP
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= reach


# ---------------------------------------------------------------- captions


@dataclass(frozen=True)
class Claim:
    """What a caption says, symbolically: a thing is (shape, colour, size or None); relation: first seen from second."""

    things: tuple[tuple[str, str, str | None], ...]
    relations: tuple[str, ...] = ()
    background: str | None = None

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(d: dict) -> Claim:
        return Claim(tuple(tuple(t) for t in d["things"]), tuple(d["relations"]), d["background"])


def satisfies(scene: Scene, claim: Claim) -> bool:
    """Exactly what is named is there: the number of things, every attribute and every relation named."""
    if len(scene.things) != len(claim.things) or claim.background not in (None, scene.background):
        return False
    for order in itertools.permutations(scene.things):
        fits = all(
            t.pair == (shape, colour) and size in (None, t.size)
            for t, (shape, colour, size) in zip(order, claim.things, strict=True)
        )
        if fits and all(
            relation(a, b) == r for (a, b), r in zip(itertools.pairwise(order), claim.relations, strict=False)
        ):
            return True
    return False


def named(thing: tuple[str, str, str | None]) -> str:
    """Of (shape, colour, size or None): a small red circle, a red circle."""
    shape, colour, size = thing
    return f"a {size} {colour} {shape}" if size else f"a {colour} {shape}"


_BETWEEN = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}


def phrasings(claim: Claim) -> list[str]:
    """All captions that say exactly this claim, things in its order."""
    names = [named(t) for t in claim.things]
    if claim.relations:
        bodies = [names[0]]
        for name, r in zip(names[1:], claim.relations, strict=True):
            bodies = [f"{b} {word} {name}" for b in bodies for word in _BETWEEN[r]]
    else:
        bodies = [" and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]]
    ends = [f" on a {claim.background} background", f" on {claim.background}"] if claim.background else [""]
    return [f"{start}{body}{end}" for start in ("", "there is ") for body in bodies for end in ends]


def claims(scene: Scene) -> list[Claim]:
    """All true claims captions make of a scene: with and without sizes, background, relation, in every order that
    keeps neighbours in a clear relation."""
    out = []
    for order in itertools.permutations(scene.things):
        relations = tuple(r for a, b in itertools.pairwise(order) if (r := relation(a, b)))
        clear = len(relations) == len(order) - 1 > 0
        for sized, ground, related in itertools.product((False, True), repeat=3):
            if related and not clear:
                continue
            out.append(
                Claim(
                    tuple((t.shape, t.colour, t.size if sized else None) for t in order),
                    relations if related else (),
                    scene.background if ground else None,
                )
            )
    return out


def random_caption(
    scene: Scene, rng: np.random.Generator, ordered: float | None = None, related: bool = False
) -> tuple[str, Claim]:
    """A caption and what it claims; two things out of three times carry their relation.

    ordered: of captions with one relation the share that begins with the left or upper thing; None: as many as not.
    related: two things always carry their relation.
    """
    options = claims(scene)
    if related:
        options = [c for c in options if c.relations] or options
    weights = np.array([2.0 if c.relations or len(c.things) == 1 else 1.0 for c in options])
    if ordered is not None:
        shares = {"left": ordered, "above": ordered, "right": 1 - ordered, "below": 1 - ordered}
        weights *= [2 * shares[c.relations[0]] if len(c.relations) == 1 else 1.0 for c in options]
    claim = options[int(rng.choice(len(options), p=weights / weights.sum()))]
    texts = phrasings(claim)
    return texts[int(rng.integers(len(texts)))], claim


def all_captions(scene: Scene) -> list[str]:
    return sorted({text for claim in claims(scene) for text in phrasings(claim)})


# ---------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """kind: one of KINDS. about: the symbols the oracle answers from. names: the (shape, colour) pairs it spells."""

    kind: str
    text: str
    answer: str
    about: tuple = ()

    @property
    def names(self) -> frozenset:
        return frozenset(a for a in self.about if isinstance(a, tuple))


def answer(scene: Scene, kind: str, about: tuple) -> str | None:
    """The symbolic oracle; None: not answerable for this scene."""
    things = scene.things
    if kind == "colour":  # about: (shape,)
        found = [t for t in things if t.shape == about[0]]
        return found[0].colour if len(found) == 1 else None
    if kind == "shape":  # about: (colour,)
        found = [t for t in things if t.colour == about[0]]
        return found[0].shape if len(found) == 1 else None
    if kind == "count":  # about: () or (shape or colour,)
        return NUMBERS[sum(not about or about[0] in t.pair for t in things)]
    if kind == "yes/no":  # about: ((shape, colour),)
        return "yes" if any(t.pair == about[0] for t in things) else "no"
    if kind == "relation":  # about: (pair, pair), (shape, shape) or (colour, colour)
        meant = [[t for t in things if name in (t.pair, t.shape, t.colour)] for name in about]
        return relation(meant[0][0], meant[1][0]) if all(len(m) == 1 for m in meant) else None
    raise ValueError(f"unknown kind of question {kind!r}: expected one of {', '.join(KINDS)}")


def noun(name: str | tuple[str, str]) -> str:
    """Of a shape, a colour or a pair: circle, red object, red circle."""
    if isinstance(name, tuple):
        return f"{name[1]} {name[0]}"
    return name if name in SHAPES else f"{name} object"


def plural(about: tuple) -> str:
    """Of what a question of kind count is about."""
    one = noun(about[0]) if about else "object"
    return one + ("es" if one.endswith("s") else "s")


def ask(scene: Scene, kind: str, about: tuple) -> Question | None:
    """The question with the oracle's answer; None where there is none."""
    reply = answer(scene, kind, about)
    if reply is None:
        return None
    if kind == "colour":
        text = f"what colour is the {about[0]}?"
    elif kind == "shape":
        text = f"what shape is the {about[0]} object?"
    elif kind == "count":
        text = f"how many {plural(about)} are there?"
    elif kind == "yes/no":
        text = f"is there a {noun(about[0])}?"
    else:
        text = f"where is the {noun(about[0])}, seen from the {noun(about[1])}?"
    return Question(kind, text, reply, about)


def questions(scene: Scene, rng: np.random.Generator, pairs: tuple = TRAIN_PAIRS) -> list[Question]:
    """Questions of every kind the scene can answer, at most one a kind, in random order.

    `pairs`: the (shape, colour) pairs a question may name; a "no" is about an absent pair of `pairs` that shares the
    shape or the colour of something present, so that the answer cannot be told from single words.
    """
    allowed = set(pairs)
    out: list[Question | None] = []

    def pick(options: list) -> Any:
        return options[int(rng.integers(len(options)))]

    for kind, index in (("colour", 0), ("shape", 1)):
        asked = [ask(scene, kind, (t.pair[index],)) for t in scene.things]
        valid = [q for q in asked if q]
        out.append(pick(valid) if valid else None)
    if rng.random() < 0.5:
        out.append(ask(scene, "count", ()))
    else:
        words = [*SHAPES, *COLOURS] if rng.random() < 0.3 else list(pick(list(scene.things)).pair)
        out.append(ask(scene, "count", (str(pick(words)),)))

    present = [t.pair for t in scene.things]
    yes = [p for p in present if p in allowed]
    no = absent_like(pairs, present, present)
    if yes and (rng.random() < 0.5 or not no):
        out.append(ask(scene, "yes/no", (pick(yes),)))
    elif no and (yes or rng.random() < 0.5):
        out.append(ask(scene, "yes/no", (pick(no),)))
    if len(scene.things) > 1:
        i = int(rng.integers(len(scene.things) - 1))
        a, b = scene.things[i], scene.things[i + 1]
        if rng.random() < 0.5:
            a, b = b, a
        valid = wheres(scene, a, b, allowed)
        if valid:
            out.append(pick(valid))
    kept = [q for q in out if q]
    return [kept[i] for i in rng.permutation(len(kept))]


def told(scene: Scene) -> bool:
    """Whether words alone tell which of two things of a training scene has which colour: the exchange of their colours
    names a held-out pair. Who learns from such pictures learns what is never said, and reads less."""
    pairs = itertools.combinations(scene.things, 2)
    return any(HELD_OUT & {(a.shape, b.colour), (b.shape, a.colour)} for a, b in pairs)


def absent_like(pairs: tuple, present: list, like: list) -> list:
    """Those of `pairs` that are not present and share the shape or the colour of one in `like`."""
    return [p for p in pairs if p not in present and any(p[0] == q[0] or p[1] == q[1] for q in like)]


def wheres(scene: Scene, a: Thing, b: Thing, allowed: set) -> list[Question]:
    """The questions where a is, seen from b, by shapes, by colours and, where both may be named, by both."""
    names: list[tuple] = [(a.shape, b.shape), (a.colour, b.colour)]
    if a.pair in allowed and b.pair in allowed:
        names.append((a.pair, b.pair))
    return [q for q in (ask(scene, "relation", name) for name in names) if q]
