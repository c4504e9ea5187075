"""Captioning with models made up for the purpose."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from unitok.config import make_recipe
from unitok.eval import get
from unitok.eval.captions import constant, evaluate, exact_match

COLOURS = ("red", "green", "blue", "yellow")


def make_rows(folder, n, prefix):
    rows = []
    for i in range(n):
        colour = COLOURS[i % 4 if i % 3 else 0]
        file = folder / f"{prefix}{i}.png"
        image = Image.new("RGB", (4, 4), colour)
        image.putpixel((0, 0), (i, 0, 0))
        image.save(file)
        rows.append(
            {"id": f"{prefix}{i}", "image": file, "captions": [f"a {colour} square", f"there is a {colour} square"]}
        )
    return rows


class Oracle:
    def captions(self, images, *, temperature):
        names = {Image.new("RGB", (1, 1), c).getpixel((0, 0)): c for c in COLOURS}
        return [f"There is a {names[Image.open(image).getpixel((3, 3))]} square.\nnoise" for image in images]


class Constant:
    def captions(self, images, *, temperature):
        return ["a red square"] * len(images)


def test_an_oracle_wins_and_the_controls_lose(tmp_path):
    rows, train = make_rows(tmp_path, 60, "e"), make_rows(tmp_path, 40, "t")
    (score,) = evaluate(Oracle(), rows, train)
    assert (score.name, score.value, score.n) == ("captions/exact_match", 1.0, 60)
    assert set(score.baselines) == {"constant", "shuffled_images"} and max(score.baselines.values()) < 0.6
    (score,) = evaluate(Constant(), rows, train)
    assert score.value == score.baselines["constant"] == score.baselines["shuffled_images"]
    assert constant(train) == "a red square"


def test_exact_match_takes_any_accepted_caption():
    assert exact_match(["A red  square.", "a red circle", ""], [["a red square", "x"], ["a red square"], ["a"]]) == [
        1,
        0,
        0,
    ]


def words(predictions, references):
    """A metric of one's own: the length of the prediction."""
    return [float(len(text.split())) for text in predictions]


def test_a_metric_can_be_added_by_name(tmp_path):
    rows = make_rows(tmp_path, 4, "e")
    exact, length = evaluate(Constant(), rows, metrics=["exact_match", f"{__name__}:words"])
    assert length.name == f"captions/{__name__}:words" and length.value == 3.0 and exact.n == 4
    for wrong, word in [("blue", "unknown metric"), ("nowhere:cider", "nowhere"), (f"{__name__}:cider", "cider")]:
        with pytest.raises(ValueError, match=word):
            evaluate(Constant(), rows, metrics=[wrong])


def test_a_recipe_over_both_caption_forms(tmp_path):
    rows = make_rows(tmp_path, 12, "e")
    lines = [{"image": row["image"].name, "captions": row["captions"]} for row in rows[:6]]
    lines += [{"image": row["image"].name, "text": row["captions"][1]} for row in rows[6:]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    values = {
        "kind": "evaluation",
        "task": "captions",
        "data": str(tmp_path / "rows.jsonl"),
        "out": str(tmp_path / "out"),
    }
    (score,) = get("captions").run(Oracle(), make_recipe(values))
    assert score.value == 1.0 and score.n == 12 and "constant" not in score.baselines
