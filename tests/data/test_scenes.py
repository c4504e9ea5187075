"""The scene language: true, unambiguous, answerable, and blind to the held-out pairs where it must be."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from unitok.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    DEMO,
    FULL,
    GAP,
    HELD_OUT,
    KINDS,
    LATTICE,
    NUMBERS,
    OPPOSITE,
    PAIRS,
    SETTINGS,
    SHAPES,
    SIZES,
    TRAIN_PAIRS,
    Claim,
    Question,
    Scene,
    Setting,
    Thing,
    all_captions,
    answer,
    claims,
    phrasings,
    questions,
    radius,
    random_caption,
    random_scene,
    relation,
    render_scene,
    satisfies,
    stamp,
    told,
)
from unitok.data.statements import bindings, choice, facts, findings, places, sides, statement, truths

WORDS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}


_DRAWN: dict = {}


def draw(n, setting=FULL, **limits):
    """The first n scenes of a setting; tests share them."""
    rng, scenes = _DRAWN.setdefault((setting, *limits.items()), (np.random.default_rng(0), []))
    scenes += [random_scene(rng, setting, **limits) for _ in range(n - len(scenes))]
    return scenes[:n]


# ---- pictures


def test_a_seed_gives_the_same_scenes_pictures_and_words():
    def everything(seed):
        rng = np.random.default_rng(seed)
        scenes = [random_scene(rng, FULL) for _ in range(20)]
        words = [(random_caption(s, rng), questions(s, rng)) for s in scenes]
        return scenes, words, [render_scene(s).tobytes() for s in scenes]

    assert everything(3) == everything(3)
    assert everything(3) != everything(4)


@pytest.mark.parametrize("name, setting", SETTINGS.items())
def test_everything_occurs(name, setting):
    scenes = draw(2000, setting)
    things = [t for s in scenes for t in s.things]
    assert {t.pair for t in things} == set(PAIRS) == set(itertools.product(SHAPES, COLOURS))
    assert {(t.pair, t.size) for t in things} == set(itertools.product(PAIRS, SIZES))
    assert {s.background for s in scenes} == set(setting.backgrounds)
    for i, share in enumerate(setting.counts):
        assert np.mean([len(s.things) == i + 1 for s in scenes]) == pytest.approx(share, abs=0.04)
    assert len(SHAPES) >= 4 and len(COLOURS) >= 6 and len(SIZES) >= 2 and len(PAIRS) == 24
    # every whole pixel (of the lattice, if there is one) at which a small thing fits, in both directions
    edge = int(np.ceil(radius("small"))) + 1
    for axis in ("x", "y"):
        where = {v for v in range(edge, 32 - edge + 1) if v % setting.step == 0}
        if setting.beside:
            where = {8, 16, 24}
        assert {getattr(t, axis) for t in things if t.size == "small"} == where


def test_two_things_beside_each_other_stand_in_the_middles_of_halves():
    for scene in draw(200, SETTINGS["beside"]):
        places = {(t.x, t.y) for t in scene.things}
        assert places in ({(8, 16), (24, 16)}, {(16, 8), (16, 24)})
    alone = [scene.things[0] for scene in draw(200, SETTINGS["placed"]) if len(scene.things) == 1]
    assert 60 < len(alone) < 140 and {(t.x, t.y) for t in alone} == {(16, 16)}


@pytest.mark.parametrize(("ordered", "related"), [(None, False), (0.8, False), (0.8, True), (1.0, True)])
def test_captions_begin_with_the_left_or_upper_thing_as_often_as_asked(ordered, related):
    rng = np.random.default_rng(0)
    claims = [random_caption(scene, rng, ordered, related)[1] for scene in draw(3000, SETTINGS["beside"])]
    said = [claim.relations[0] for claim in claims if claim.relations]
    assert len(said) == len(claims) if related else len(said) / len(claims) == pytest.approx(2 / 3, abs=0.03)
    share = np.mean([relation in ("left", "above") for relation in said])
    assert share == pytest.approx(0.5 if ordered is None else ordered, abs=0.03)


@pytest.mark.parametrize("image_size", [32, 48, 64])
def test_things_stand_apart_inside_the_picture_and_in_clear_relations(image_size):
    for scene in draw(300, Setting(FULL.counts, FULL.backgrounds, image_size)):
        assert len({t.pair for t in scene.things}) == len(scene.things) and scene.image_size == image_size
        assert all(relation(a, b) for a, b in itertools.pairwise(scene.things))
        inked = [drawn_pixels(replace(scene, things=(t,))) for t in scene.things]
        for ink, thing in zip(inked, scene.things, strict=True):
            middle = replace(scene, things=(replace(thing, x=image_size // 2, y=image_size // 2),))
            assert ink.sum() == drawn_pixels(middle).sum()  # nothing is cut off
            ys, xs = np.nonzero(ink)
            assert np.ptp(ys) <= 2 * radius(thing.size, image_size) + 2
            assert abs(xs.min() + xs.max() + 1 - 2 * thing.x) <= 1  # x is the middle
        for a, b in itertools.combinations(inked, 2):
            ya, xa, yb, xb = (v for ink in (a, b) for v in np.nonzero(ink))
            distance = np.maximum(abs(ya[:, None] - yb), abs(xa[:, None] - xb)).min()
            assert distance >= GAP - 1  # a free pixel at least between the faintest edges
        assert (drawn_pixels(scene) == np.logical_or.reduce(inked)).all()


def drawn_pixels(scene):
    return (render_scene(scene) != np.array(BACKGROUNDS[scene.background])).any(2)


@pytest.mark.parametrize("image_size", [32, 48, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_stamps_are_anti_aliased_shapes_of_the_right_area(shape, image_size):
    areas = {"circle": np.pi, "square": 1.8**2, "triangle": 1.85 * (1.1 * 1.85) / 2, "cross": 4 * 0.72 - 0.72**2}
    for size in SIZES:
        a = stamp(shape, size, image_size)
        assert a.dtype == np.float32 and a.min() == 0 and a.max() == 1
        assert a.sum() == pytest.approx(areas[shape] * radius(size, image_size) ** 2, rel=0.04)
        assert ((a > 0) & (a < 1)).any()
        assert np.allclose(a, a[:, ::-1])  # left is right
        fine = stamp(shape, size, image_size, 32)  # finer sampling hardly changes it: coverage, not a threshold
        assert abs(a - fine).max() < 0.13 and abs(a - fine).mean() < 0.02


def test_pictures_have_the_colours_of_their_things_and_soft_edges():
    for scene in draw(100, FULL):
        picture = render_scene(scene)
        assert picture.dtype == np.uint8 and picture.shape == (32, 32, 3)
        for thing in scene.things:
            assert tuple(picture[thing.y, thing.x]) == COLOURS[thing.colour]
        pure = {BACKGROUNDS[scene.background], *(COLOURS[t.colour] for t in scene.things)}
        assert {tuple(map(int, p)) for p in picture.reshape(-1, 3)} - pure


def test_every_scene_has_its_own_picture():
    scenes = {scene for scene in draw(2000) if len(scene.things) == 1}
    assert len({render_scene(s).tobytes() for s in scenes}) == len(scenes)


def test_scenes_and_claims_survive_json():
    for scene in draw(30, FULL):
        assert Scene.from_dict(scene.to_dict()) == scene
        for claim in claims(scene):
            assert Claim.from_dict(claim.to_dict()) == claim


# ---- held-out pairs


def test_held_out_pairs():
    assert len(HELD_OUT) / len(PAIRS) >= 0.2 and set(TRAIN_PAIRS) == set(PAIRS) - HELD_OUT
    # every word is still seen with most of its partners
    seen = Counter(word for pair in TRAIN_PAIRS for word in pair)
    assert min(seen[s] for s in SHAPES) >= 4 and min(seen[c] for c in COLOURS) >= 3
    for scene in draw(500, FULL, must=HELD_OUT):
        assert HELD_OUT & {t.pair for t in scene.things}
    for scene in draw(500, FULL, pairs=TRAIN_PAIRS):
        assert not HELD_OUT & {t.pair for t in scene.things}


def test_no_training_question_or_caption_names_a_held_out_pair():
    rng = np.random.default_rng(1)
    spelled = {f"{colour} {shape}" for shape, colour in HELD_OUT}
    for scene in draw(1000, FULL, pairs=TRAIN_PAIRS):
        texts = [random_caption(scene, rng)[0]]
        for q in questions(scene, rng):
            assert not q.names & HELD_OUT
            texts.append(q.text)
        assert not any(name in text for text in texts for name in spelled)


def test_statements_are_true_and_name_no_held_out_pair():
    rng = np.random.default_rng(6)
    spelled = {f"{colour} {shape}" for shape, colour in HELD_OUT}
    kinds = set()
    for scene in draw(400, FULL, pairs=TRAIN_PAIRS):
        said = facts(scene, rng, n=4)
        assert "?" not in said and not any(name in said for name in spelled)
        abouts = {"colour": [(x,) for x in SHAPES], "shape": [(x,) for x in COLOURS], "yes/no": [(p,) for p in PAIRS]}
        abouts["count"] = [(), *((x,) for x in (*SHAPES, *COLOURS))]
        names = [name for t in scene.things for name in (t.pair, t.shape, t.colour)]
        abouts["relation"] = list(itertools.permutations(set(names), 2))
        true = {
            statement(Question(kind, "", reply, about)).replace(", seen", " seen")
            for kind, of_kind in abouts.items()
            for about in of_kind
            if (reply := answer(scene, kind, about))
        }
        assert set(said.rstrip(".").replace(", seen", " seen").split(", ")) <= true
        kinds |= {q.kind for q in questions(scene, rng) if statement(q) in said}
        assert "seen from" not in facts(scene, rng, n=9, relations=False)
    assert kinds == set(KINDS)
    assert statement(Question("count", "", "two", ("cross",))) == "there are two crosses"
    assert statement(Question("yes/no", "", "no", (("cross", "red"),))) == "there is no red cross"


def test_of_a_choice_the_colour_alone_says_which_it_is():
    rng = np.random.default_rng(7)
    for shape, colour in TRAIN_PAIRS * 10:
        options = [o.split() for o in choice(Thing(shape, colour, "small", 9, 9), rng).split(" or ")]
        assert 2 <= len(options) <= 4 and ["a", colour, shape] in options
        assert len({c for _, c, _ in options}) == len(options)
        assert all((s, c) in TRAIN_PAIRS and (s != shape or c == colour) for _, c, s in options)


def test_a_step_puts_centres_on_a_lattice():
    things = [t for scene in draw(100, LATTICE) for t in scene.things]
    assert all(t.x % 4 == t.y % 4 == 0 for t in things) and len({(t.x, t.y) for t in things}) == 25


# ---- captions


@pytest.mark.parametrize("name, setting", SETTINGS.items())
def test_a_caption_is_true_of_its_scene_and_of_none_with_something_named_changed(name, setting):
    rng = np.random.default_rng(2)
    for scene in draw(300, setting):
        text, claim = random_caption(scene, rng)
        assert satisfies(scene, claim) and text in phrasings(claim)
        for i, thing in enumerate(scene.things):

            def changed(scene=scene, i=i, thing=thing, **attributes):
                things = (*scene.things[:i], replace(thing, **attributes), *scene.things[i + 1 :])
                return replace(scene, things=things)

            assert not any(satisfies(changed(shape=s), claim) for s in SHAPES if s != thing.shape)
            assert not any(satisfies(changed(colour=c), claim) for c in COLOURS if c != thing.colour)
            other = changed(size="small" if thing.size == "large" else "large")
            assert satisfies(other, claim) == (claim.things[0][2] is None)
            assert not satisfies(replace(scene, things=scene.things[:i] + scene.things[i + 1 :]), claim)
        assert not satisfies(replace(scene, things=(*scene.things, scene.things[0])), claim)
        for ground in set(BACKGROUNDS) - {scene.background}:
            assert satisfies(replace(scene, background=ground), claim) == (claim.background is None)
        turned = replace(scene, things=tuple(replace(t, x=32 - t.x, y=32 - t.y) for t in scene.things))
        assert satisfies(turned, claim) == (not claim.relations)  # every relation is the opposite now
        assert satisfies(replace(scene, things=scene.things[::-1]), claim)  # the order of things says nothing


def test_swapping_what_belongs_to_which_thing_makes_a_caption_false():
    rng = np.random.default_rng(3)
    tried = 0
    for scene in draw(400, DEMO):
        if (
            len(scene.things) < 2
            or len({t.colour for t in scene.things}) < 2
            or len({t.shape for t in scene.things}) < 2
        ):
            continue
        a, b = scene.things
        swapped = replace(scene, things=(replace(a, colour=b.colour), replace(b, colour=a.colour)))
        assert not satisfies(swapped, random_caption(scene, rng)[1])
        tried += 1
    assert tried > 100


def test_a_caption_says_one_thing_only():
    meaning = {}
    for scene in draw(300, FULL):
        for claim in claims(scene):
            assert satisfies(scene, claim)
            for text in phrasings(claim):
                assert meaning.setdefault(text, claim) == claim, text
    assert len(meaning) > 5000


def test_captions_come_in_several_phrasings_and_say_what_the_claim_says():
    for scene in draw(200, FULL):
        assert all(len(phrasings(c)) >= 2 for c in claims(scene))
        for claim in claims(scene):
            for text in phrasings(claim):
                found = [w for w in text.replace(",", "").split() if w in COLOURS or w in SHAPES or w in SIZES]
                assert found == [w for s, c, size in claim.things for w in ((size,) if size else ()) + (c, s)]
                assert [w for w in text.split() if w in OPPOSITE] == list(claim.relations)
                assert [w for w in text.split() if w in BACKGROUNDS] == ([claim.background] if claim.background else [])
        texts = all_captions(scene)
        assert len(set(texts)) == len(texts)


def test_relations_are_geometry():
    for scene in draw(500, FULL):
        for a, b in itertools.permutations(scene.things, 2):
            r = relation(a, b)
            if r is None:
                assert abs(abs(a.x - b.x) - abs(a.y - b.y)) < 4
            else:
                x, y = WORDS[r]
                assert (a.x - b.x) * x + (a.y - b.y) * y > 0
                assert relation(b, a) == OPPOSITE[r]


# ---- questions


def independent_answer(scene: Scene, text: str) -> str | None:
    """Answers from the words of a question alone, without `answer` and `about`."""
    words = text.rstrip("?").replace(",", "").split()
    plain = {"crosses": "cross", **{f"{s}s": s for s in SHAPES if s != "cross"}}
    words = [plain.get(w, w) for w in words]

    def matching(part):
        named = [w for w in part if w in SHAPES or w in COLOURS]
        return [t for t in scene.things if all(w in t.pair for w in named)]

    if text.startswith("what colour"):
        return "/".join(t.colour for t in matching(words))
    if text.startswith("what shape"):
        return "/".join(t.shape for t in matching(words[2:]))
    if text.startswith("how many"):
        return NUMBERS[len(matching(words))]
    if text.startswith("is there"):
        return "yes" if matching(words) else "no"
    cut = words.index("seen")
    (a,), (b,) = matching(words[:cut]), matching(words[cut:])
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


@pytest.mark.parametrize("pairs", [TRAIN_PAIRS, PAIRS], ids=["train", "all"])
@pytest.mark.parametrize("name, setting", SETTINGS.items())
def test_every_question_is_answered_by_the_oracle_and_by_its_words(name, setting, pairs):
    rng, kinds = np.random.default_rng(4), Counter()
    for scene in draw(1000, setting, pairs=pairs):
        asked = questions(scene, rng, pairs)
        assert len({q.kind for q in asked}) == len(asked)
        for q in asked:
            assert q.answer == answer(scene, q.kind, q.about) == independent_answer(scene, q.text), q
            kinds[q.kind] += 1
    assert set(kinds) == set(KINDS) and len(KINDS) >= 5
    assert min(kinds.values()) > 300


def test_a_question_asks_one_thing_only():
    rng, meaning = np.random.default_rng(5), {}
    for scene in draw(2000, FULL):
        for q in questions(scene, rng, PAIRS):
            assert meaning.setdefault(q.text, (q.kind, q.about)) == (q.kind, q.about), q.text


def test_answers_cannot_be_told_from_single_words():
    """No question string of a kind gives its answer away, and a "no" shares a word with something in the picture."""
    rng = np.random.default_rng(6)
    replies, yes = defaultdict(Counter), Counter()
    for scene in draw(4000, DEMO, pairs=TRAIN_PAIRS):
        for q in questions(scene, rng):
            replies[q.kind, q.text][q.answer] += 1
            if q.kind == "yes/no":
                yes[q.answer] += 1
                (pair,) = q.about
                assert any(pair[0] == t.shape or pair[1] == t.colour for t in scene.things)
    assert yes["yes"] / yes.total() == pytest.approx(0.5, abs=0.05)
    for kind in ("colour", "shape", "relation"):
        best = sum(max(c.values()) for (k, _), c in replies.items() if k == kind)
        assert best / sum(c.total() for (k, _), c in replies.items() if k == kind) < 0.55, kind


def test_the_oracle_says_when_it_cannot_know():
    a, b = Thing("circle", "red", "small", 8, 8), Thing("circle", "blue", "small", 24, 23)
    scene = Scene((a, b), "white")
    assert answer(scene, "colour", ("circle",)) is None and answer(scene, "colour", ("square",)) is None
    assert answer(scene, "shape", ("red",)) == "circle"
    assert answer(scene, "relation", (a.pair, b.pair)) is None  # neither axis wins
    assert answer(scene, "count", ("circle",)) == "two" and answer(scene, "count", ("green",)) == "zero"
    with pytest.raises(ValueError, match="unknown kind"):
        answer(scene, "smell", ())
    with pytest.raises(ValueError, match="unknown shape"):
        stamp("star", "small")


def as_question(finding: str) -> tuple[str, str]:
    """The question that a finding answers and its answer, from its words alone."""
    stem, reply = finding.rsplit(" ", 1)
    words = stem.split()
    if stem.startswith("the number of"):
        return f"how many {' '.join(words[3:-1])} are there?", reply
    if ", " in stem:  # either may come first
        asked, seen = sorted(stem.removesuffix(" is").strip(",").split(", "), key=lambda part: part.startswith("seen"))
        return f"where is {asked}, {seen}?", reply
    if words[1] in ("colour", "shape"):
        return f"what {words[1]} is {' '.join(words[3:-1])}?", reply
    if reply in ("there", "missing"):
        return f"is there a {' '.join(words[1:-1])}?", {"there": "yes", "missing": "no"}[reply]
    if words[2:] == ["object", "is", "a"]:
        return f"what shape is the {words[1]} object?", reply
    return f"what colour is the {words[1]}?", reply


@pytest.mark.parametrize("setting", [FULL, DEMO])
def test_findings_end_with_what_was_looked_for_and_say_where_everything_is(setting):
    rng = np.random.default_rng(8)
    spelled = {f"{colour} {shape}" for shape, colour in HELD_OUT}
    for scene in draw(200, setting, pairs=TRAIN_PAIRS):
        called = truths(scene, rng)
        assert sum(one.endswith(", yes") for one in called) == len(scene.things)
        for one in called:
            text, reply = one.removeprefix("there is ").split(", ")
            assert independent_answer(scene, f"is there {text}?") == reply and not any(name in one for name in spelled)
        said = findings(scene, rng, rounds=2)
        assert len(set(said)) == len(said) and not any(name in one for one in said for name in spelled)
        for one in said:
            question, reply = as_question(one)
            assert independent_answer(scene, question) == reply, one
        assert set(places(scene)) == {one for one in said if "seen from" in one}
        for a, b in itertools.permutations(scene.things, 2):
            if r := relation(a, b):
                asked, seen = f"the {a.colour} {a.shape}", f"seen from the {b.colour} {b.shape}"
                assert {f"{seen}, {asked} is {r}", f"{asked}, {seen}, is {r}"} <= set(said)


def test_bindings_are_said_where_words_do_not_tell_and_sides_of_both_things():
    bound = 0
    for scene in draw(300, DEMO, pairs=TRAIN_PAIRS):
        said = bindings(scene)
        for one in said:
            question, reply = as_question(one)
            assert independent_answer(scene, question) == reply
            exchanged = {(a.shape, b.colour) for a, b in itertools.permutations(scene.things, 2)}
            assert len(said) == 8 and not exchanged & HELD_OUT and not told(scene)
        bound += bool(said)
        looks = {text for t in scene.things for text in (f"is {t.colour}", f"is a {t.shape}")}
        for one in sides(scene):
            assert any(one.endswith(look) for look in looks)
        if len(scene.things) == 2 and (r := relation(*scene.things)):
            side = {"left": "left object", "right": "right object", "above": "object above", "below": "object below"}[r]
            assert f"the {side} is {scene.things[0].colour}" in sides(scene) and len(sides(scene)) == 4
        else:
            assert not sides(scene)
    assert bound > 30
