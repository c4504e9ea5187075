"""The main job, small: all stages run, are reused, and go on after a kill; the report says what the issue asks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from unitok import demo
from unitok.checkpoint import load_weights, save_weights
from unitok.config import load_recipe
from unitok.demo import DEEPSPEED, named_scores, tuning

SMALL = """
import sys, unitok.demo as demo
from pathlib import Path
demo.BASE = Path(sys.argv[1])
demo.PICTURES, demo.SHOTS, demo.QUESTIONS = {"train": 60, "validation": 4, "test": 24}, 40, 30
full = demo.tuning
demo.tuning = lambda *a: full(*a).model_copy(update={"steps": 3})
if len(sys.argv) > 3:
    stage = getattr(demo.Demo, sys.argv[3])
    def killed(self):
        stage(self)
        import os; os._exit(9)
    setattr(demo.Demo, sys.argv[3], killed)
print(demo.run(sys.argv[2]))
"""
NAMES = {
    "t2i_exact", "t2i_exact_two_objects", "vqa_0shot", "vqa_0shot_two_objects", "vqa_1shot", "vqa_4shot",
    "caption_exact", "reconstruction_judged", "reconstruction_psnr",
}  # fmt: skip
BESIDE = {
    "t2i_exact": {"before", "shuffled_captions", "ceiling"},
    "vqa_0shot": {"before", "blind", "majority", "no_image", "shuffled_images"},
    "vqa_4shot": {"permuted_shots"},
    "caption_exact": {"before"},
    "reconstruction_psnr": {"block_mean"},
}


def small_demo(base, out, *kill):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", SMALL, str(base), str(out), *kill]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_the_main_job_runs_resumes_and_reports(scene_model, tmp_path):
    out = tmp_path / "demo"
    assert small_demo(scene_model, out, "tune").returncode == 9  # killed after tuning, before it was noted
    done = small_demo(scene_model, out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "reused" in done.stderr
    report = json.loads((out / "report.json").read_text())
    scores = {score["name"]: score for score in report["scores"]}
    assert scores.keys() >= NAMES
    for name, beside in BESIDE.items():
        assert scores[name]["baselines"].keys() >= beside, name
    for score in scores.values():
        assert set(score) == {"name", "value", "n", "interval", "baselines", "protocol"}
        low, high = score["interval"]
        assert low <= score["value"] <= high
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") > 20 and "held out" in page and "<svg" in page
    assert "http" not in page  # one file, nothing fetched

    stamp = (out / "report.html").stat().st_mtime_ns
    again = small_demo(scene_model, out)
    assert again.returncode == 0 and (out / "report.html").stat().st_mtime_ns == stamp


def test_a_demo_may_move_and_another_base_is_another_demo(scene_model, tmp_path, monkeypatch):
    def asked(base, out):
        monkeypatch.setattr(demo, "BASE", base)
        return demo.Demo(out)._asked()

    moved, other = (shutil.copytree(scene_model, tmp_path / name) for name in ("moved", "other"))
    weights = load_weights(other / "model.safetensors")
    save_weights(other / "model.safetensors", {name: tensor + 1 for name, tensor in weights.items()})
    here = asked(scene_model, tmp_path / "a")
    assert asked(moved, tmp_path / "b") == here != asked(other, tmp_path / "a")
    assert demo.Demo(tmp_path / "a", from_scratch=True)._asked() != here


def test_the_recipe_for_use_by_hand_is_the_demos():
    root = Path(__file__).parents[1]
    by_hand = load_recipe(root / "training/scenes_lora.yaml").model_dump()
    own = tuning(Path("out/demo"), Path("builtin:scenes")).model_dump()
    assert json.loads((root / by_hand.pop("deepspeed")).read_text()) == DEEPSPEED and own.pop("deepspeed")
    assert by_hand == own


def test_scores_get_their_names_and_the_untuned_base_beside_them():
    record = {"n": 2, "interval": [0.0, 1.0], "protocol": {}}
    after = [{"name": "vqa_0shot/objects=2", "value": 0.5, "baselines": {"blind": 0.1}, **record},
             {"name": "vqa_0shot/kind=yes/no", "value": 0.5, "baselines": {}, **record}]  # fmt: skip
    before = [{"name": "vqa_0shot/objects=2", "value": 0.25, "baselines": {}, **record}]
    two, kind = named_scores(before, after)
    assert two["name"] == "vqa_0shot_two_objects" and two["baselines"] == {"before": 0.25, "blind": 0.1}
    assert kind["name"] == "vqa_0shot_yes_no" and kind["baselines"] == {}
