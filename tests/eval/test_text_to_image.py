"""Drawing by prompt, judged, with painters made up for the purpose."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from unitok.config import make_recipe
from unitok.data.scenes import (
    COLOURS,
    DEMO,
    FULL,
    HELD_OUT,
    Claim,
    Scene,
    random_caption,
    random_scene,
    render_scene,
)
from unitok.eval import get, names
from unitok.eval.text_to_image import PICTURES, READINGS, evaluate, load_prompts, reconstruction_judged, score_readings


def make_rows(n, setting=DEMO, seed=0):
    """Rows, and the scene that each prompt was made from."""
    rng, rows, scenes = np.random.default_rng(seed), [], {}
    for i in range(n):
        scene = random_scene(rng, setting, must=HELD_OUT)
        prompt, claim = random_caption(scene, rng)
        rows.append({"id": f"r{i}", "prompt": f"{prompt} #{i}", "claim": claim.to_dict()})
        scenes[rows[-1]["prompt"]] = scene
    return rows, scenes


class Painter:
    """Draws the scene behind each prompt, after `change`; keeps what it was asked."""

    def __init__(self, scenes, change=lambda scene: scene):
        self.scenes, self.change, self.calls = scenes, change, []

    def images(self, prompts, *, n, guidance, temperature, top_k, top_p, seed):
        self.calls.append((list(prompts), list(seed), (n, guidance, temperature, top_k, top_p)))
        return [Image.fromarray(render_scene(self.change(self.scenes[p]))) for p in prompts]


class Noise(Painter):
    def images(self, prompts, *, seed, **decode):
        draws = [np.random.default_rng(s).integers(0, 256, (32, 32, 3), np.uint8) for s in seed]
        return [Image.fromarray(x) for x in draws]


def by_name(scores):
    return {score.name: score for score in scores}


class Chooser(Painter):
    """Draws something else first, then the scene of the prompt, and likes the second best."""

    def candidates(self, prompts, count, *, seeds, **decode):
        assert "candidates" not in decode and len(seeds) == len(prompts)
        wrong = random_scene(np.random.default_rng(0))
        draws = [[wrong, self.scenes[p], wrong][:count] for p in prompts]
        return [[(Image.fromarray(render_scene(s)), float(k == 1)) for k, s in enumerate(of_one)] for of_one in draws]


def test_of_several_candidates_the_liked_one_is_scored_beside_the_first(tmp_path):
    rows, scenes = make_rows(30)
    scores = by_name(evaluate(Chooser(scenes), rows, decode={"candidates": 3}, out=tmp_path, batch_size=8))
    exact = scores["t2i_exact"]
    assert exact.value == 1 and exact.baselines["one_candidate"] < 0.2
    assert exact.protocol["decode"]["candidates"] == 3
    assert "one_candidate" not in by_name(evaluate(Chooser(scenes), rows))["t2i_exact"].baselines


def test_a_true_painter_wins_and_the_controls_lose():
    rows, scenes = make_rows(120)
    scores = by_name(evaluate(Painter(scenes), rows))
    exact = scores["t2i_exact"]
    assert exact.value == 1 and exact.n == 120 and exact.baselines["shuffled_captions"] <= 0.05
    assert scores["t2i_exact_one_object"].n + scores["t2i_exact_two_objects"].n == 120
    assert all(score.value == 1 for score in scores.values())
    assert exact.protocol["decode"] == {
        "guidance": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "candidates": 1
    }  # fmt: skip
    for score in evaluate(Noise(scenes), rows):
        assert score.value == 0, score.name  # unreadable is wrong in everything


@pytest.mark.parametrize(
    "wrong, kept",
    [
        ("background", {"count", "shapes", "colours", "pairs", "sizes", "relation"}),
        ("sizes", {"count", "shapes", "colours", "pairs", "relation", "background"}),
        ("count", {"background"}),
        ("colours", {"count", "shapes", "sizes", "background"}),
        ("shapes", {"count", "colours", "sizes", "background"}),
        ("relation", {"count", "shapes", "colours", "pairs", "sizes", "background"}),
    ],
)
def test_a_painter_that_gets_one_thing_wrong_loses_that_alone(wrong, kept):
    def change(scene):
        first, *rest = scene.things
        if wrong == "background":
            return replace(scene, background="white" if scene.background == "black" else "black")
        if wrong == "sizes":  # smaller always fits, but small things stay
            return replace(scene, things=tuple(replace(t, size="small") for t in scene.things))
        if wrong == "count":
            return replace(scene, things=scene.things[1:] or (replace(first, x=7, y=7), replace(first, x=25, y=7)))
        if wrong == "colours":
            other = next(c for c in COLOURS if c not in {t.colour for t in scene.things})
            return replace(scene, things=(replace(first, colour=other), *rest))
        if wrong == "shapes":
            other = next(s for s in ("square", "circle", "cross") if s not in {t.shape for t in scene.things})
            return replace(scene, things=(replace(first, shape=other), *rest))
        return replace(scene, things=tuple(replace(t, x=32 - t.x, y=32 - t.y) for t in scene.things))

    rows, scenes = make_rows(80, seed=1)
    scores = by_name(evaluate(Painter(scenes, change), rows))
    if wrong == "sizes":
        assert scores["t2i_sizes"].value < 0.6
    else:
        assert scores[f"t2i_{wrong}"].value == 0
    assert {what for what in kept if scores[f"t2i_{what}"].value < 1} == set()
    # exact is lost where the prompt names what is wrong, and there alone
    for row in rows:
        claim = Claim.from_dict(row["claim"])
        named = {"background": claim.background is not None, "relation": bool(claim.relations)}.get(wrong, True)
        if wrong != "sizes":
            assert scores["t2i_exact"].items[row["id"]] == (not named)


def test_swapped_colours_keep_every_attribute_but_the_pairs():
    rows, scenes = make_rows(80, seed=2)
    rows = [row for row in rows if len(row["claim"]["things"]) == 2]
    rows = [
        r for r in rows if len({t[0] for t in r["claim"]["things"]}) == len({t[1] for t in r["claim"]["things"]}) == 2
    ]

    def swap(scene):
        a, b = scene.things
        return replace(scene, things=(replace(a, colour=b.colour), replace(b, colour=a.colour)))

    scores = by_name(evaluate(Painter(scenes, swap), rows))
    assert len(rows) > 15 and scores["t2i_shapes"].value == scores["t2i_colours"].value == 1
    assert scores["t2i_pairs"].value == scores["t2i_exact"].value == scores["t2i_relation"].value == 0
    assert "t2i_exact_two_objects" not in scores  # all rows have two: it would be t2i_exact again


def test_three_objects_are_reported_apart():
    rows, scenes = make_rows(60, FULL, seed=3)
    scores = by_name(evaluate(Painter(scenes), rows))
    parts = [scores[f"t2i_exact_{n}"].n for n in ("one_object", "two_objects", "three_objects")]
    assert sum(parts) == 60 and min(parts) > 0


def test_shuffled_captions_never_pair_a_row_with_its_own_claim():
    claim = Claim((("circle", "red", None),))
    scene = Scene.from_dict({"things": [dict(shape="circle", colour="red", size="small", x=9, y=9)], "background": "white", "image_size": 32})  # fmt: skip # noqa: E501
    same = score_readings({"a": claim, "b": claim}, {"a": scene, "b": scene})[0]
    assert same.value == 1 and "shuffled_captions" not in same.baselines
    other = Claim((("square", "red", None),))
    mixed = score_readings({"a": claim, "b": claim, "c": other}, {"a": scene, "b": scene, "c": scene})[0]
    assert mixed.baselines["shuffled_captions"] == pytest.approx(1 / 3)  # row c alone fits a claim of others


def test_draws_do_not_depend_on_batches_and_a_run_goes_on(tmp_path):
    rows, scenes = make_rows(30, seed=4)
    whole, parts = Painter(scenes), Painter(scenes)
    evaluate(whole, rows, batch_size=30, seed=5)
    evaluate(parts, rows, batch_size=7, seed=5)

    def seeds(painter):
        return {p: s for prompts, seed, _ in painter.calls for p, s in zip(prompts, seed, strict=True)}

    assert seeds(whole) == seeds(parts) and len(set(seeds(whole).values())) == 30

    class Dies(Painter):
        def images(self, prompts, **decode):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().images(prompts, **decode)

    decode = {"guidance": 2.0, "temperature": 0.5, "top_k": 9, "top_p": 0.8}
    settings = dict(batch_size=8, out=tmp_path, stamp="model", decode=decode)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Dies(scenes), rows, **settings)
    rest = Painter(scenes)
    resumed = evaluate(rest, rows, **settings)
    assert [len(prompts) for prompts, *_ in rest.calls] == [8, 6]  # 16 of 30 were drawn before
    assert rest.calls[0][2] == (1, 2.0, 0.5, 9, 0.8)
    assert [s.to_dict() for s in resumed] == [s.to_dict() for s in evaluate(Painter(scenes), rows, decode=decode)]
    assert len(list((tmp_path / PICTURES).glob("*.png"))) == 30 and (tmp_path / READINGS).is_file()


class Tokenizer(torch.nn.Module):
    """Keeps a picture in pixels as `factor` block means a side: 1 loses nothing, 8 everything."""

    image_size = 32

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def grid(self, height=32, width=32):
        return (height // 8, width // 8)

    def preprocess(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    def encode(self, images):
        self.kept = F.avg_pool2d(images, self.factor)
        return torch.zeros(len(images), 16, dtype=torch.int64)

    def decode(self, codes, grid=None):
        return F.interpolate(self.kept, scale_factor=self.factor)


def test_the_ceiling_is_the_judge_on_reconstructions(tmp_path):
    rows, scenes = make_rows(60, seed=6)
    rows = [{**row, "image": Image.fromarray(render_scene(scenes[row["prompt"]]))} for row in rows]
    for drop in ((), ("claim", "prompt")):
        given = [{k: v for k, v in row.items() if k not in drop} for row in rows]
        good, bad = (reconstruction_judged(Tokenizer(factor), given) for factor in (1, 8))
        assert good.name == "reconstruction_judged" and good.value == 1 and good.n == 60
        assert good.baselines == {"originals": 1, "block_mean": 0}
        assert bad.value == 0 and bad.baselines["originals"] == 1

    model = Painter(scenes)
    model.image_tokenizer = Tokenizer(4)
    scores = by_name(evaluate(model, rows))
    ceiling = scores["reconstruction_judged"]
    assert scores["t2i_exact"].value == 1 and scores["t2i_exact"].baselines["ceiling"] == ceiling.value < 0.5
    assert scores["t2i_readable"].baselines["ceiling"] < 1


def test_as_a_task_by_recipe(tmp_path):
    assert "text_to_image" in names()
    rows, scenes = make_rows(20, seed=7)
    model = Painter(scenes)
    model.image_tokenizer = Tokenizer(1)
    lines = []
    for i, row in enumerate(rows):
        Image.fromarray(render_scene(scenes[row["prompt"]])).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"prompt": row["prompt"], "claim": row["claim"], "image": f"{i}.png"}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    values = {"kind": "evaluation", "task": "text_to_image", "data": [{"path": str(tmp_path / "prompts.jsonl")}]}
    values |= {"n": 15, "guidance": 1.5, "temperature": 0.9, "batch_size": 4, "out": str(tmp_path / "out")}
    scores = by_name(get("text_to_image").run(model, make_recipe(values)))
    assert scores["t2i_exact"].value == 1 and scores["t2i_exact"].n == 15
    assert scores["reconstruction_judged"].value == 1
    assert model.calls[0][2] == (1, 1.5, 0.9, 0, 1.0)
    with pytest.raises(ValueError, match="unknown option 'nmae'"):
        get("text_to_image").run(model, make_recipe({**values, "options": {"nmae": "x"}}))


@pytest.mark.parametrize(
    "line", ['{"prompt": "a red circle"}', '{"claim": {}, "prompt": "x"}', '{"prompt": "x", "claim": 3}']
)
def test_a_row_without_a_claim_is_named(tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    good = json.dumps({"prompt": "a", "claim": Claim((("circle", "red", None),)).to_dict()})
    file.write_text(f"{good}\n{line}\n")
    recipe = make_recipe({"kind": "evaluation", "task": "text_to_image", "data": [{"path": str(file)}]})
    with pytest.raises(ValueError, match="prompts.jsonl:2: not a row with a prompt and a claim"):
        load_prompts(recipe.data)


def test_rows_and_models_that_cannot_be_scored():
    rows, scenes = make_rows(3, seed=8)
    with pytest.raises(ValueError, match="no rows"):
        evaluate(Painter(scenes), [])
    with pytest.raises(ValueError, match="two rows have the id 'r0'"):
        evaluate(Painter(scenes), [rows[0], rows[0]])

    class Short(Painter):
        def images(self, prompts, **decode):
            return super().images(prompts, **decode)[1:]

    with pytest.raises(ValueError, match="one picture a prompt"):
        evaluate(Short(scenes), rows)
