"""The SEED demo, small: every stage runs, its files stand, a second run goes on, another setting is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from unitok import demo_seed
from unitok.demo_seed import CLIP, CODES, CONTRASTIVE, LANGUAGE, PAINTER, SeedDemo
from unitok.model import load

ROOT = Path(__file__).parents[1]
FEW = ["steps=2", "batch_size=8", "eval_images=0"]
PICTURES = {"train": 24, "validation": 48, "test": 6}
SMALL = {
    CLIP: [*FEW[:2], "gallery_size=8"],
    CONTRASTIVE: [*FEW, "tokenizer.width=32"],
    CODES: [*FEW, "tokenizer.width=32"],
    PAINTER: [*FEW, "detokenizer.steps=2", "detokenizer.width=64", "detokenizer.depth=1"],
    LANGUAGE: ["steps=2", "batch_size=1"],
}


@pytest.mark.slow
def test_every_stage_from_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo_seed, "PROCESSES", 1)
    report = json.loads(SeedDemo(tmp_path / "out", pictures=PICTURES, changes=SMALL).run().read_text())
    assert list(report["seconds"]) == [
        "data", "clip", "contrastive", "codes", "painter", "tokenize", "language", "scores",
    ]  # fmt: skip
    scores = {score["name"]: score for score in report["scores"]}
    assert scores["t2i_exact"]["n"] == 6 and {"ceiling", "shuffled_captions"} <= scores["t2i_exact"]["baselines"].keys()
    assert scores["retrieval_caption_of_picture"]["n"] == 12

    model = load(tmp_path / "out" / "model", tokenizer="seed")
    assert model.manifest.detokenizer["tokenizer"] == "seed" and model.detokenizer is not None
    assert model.images(["a red circle"], seed=1)[0].size == (32, 32)

    shutil.rmtree(tmp_path / "out" / "clip")  # a stage that is done is not looked at again
    capsys.readouterr()
    SeedDemo(tmp_path / "out", pictures=PICTURES, changes=SMALL).run()
    assert capsys.readouterr().err.count("reused") == 9
    with pytest.raises(ValueError, match="choose another --out"):
        SeedDemo(tmp_path / "out", pictures={**PICTURES, "test": 7}, changes=SMALL).run()


def test_away_from_its_recipes_it_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="run this demo in the folder of the project"):
        SeedDemo(tmp_path / "out").run()
