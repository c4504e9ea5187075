"""The tokenizer engine: a run that was stopped or killed ends as if it had not been; bad pictures do not stop it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unitok import checkpoint
from unitok.config import DataSource, TokenizerRecipe
from unitok.tokenizers import get
from unitok.tokenizers.base import load_tokenizer, to_tensor
from unitok.tokenizers.fsq import FSQTokenizer
from unitok.training.ema import Ema
from unitok.training.pictures import Order, Pictures
from unitok.training.tokenizer import lr_factor, score, train

FAULT: dict = {}  # step -> what happens in it, once


class Noisy(FSQTokenizer):
    """Draws noise in its loss, has an adversary, and can be interrupted: all that resuming must get right."""

    def __init__(self, image_size: int = 16):
        super().__init__(image_size=image_size, width=8, min_width=8, levels=(4, 3, 3))
        self.adversary = [Adversary()]  # in a list, so that it is no part of this module's state

    def loss(self, batch, step, stage="main"):
        if step in FAULT:
            FAULT.pop(step)()
        noisy = {"images": (batch["images"] + 0.05 * torch.rand_like(batch["images"])).clamp(max=1)}
        loss, parts = super().loss(noisy, step, stage)
        return loss + 0.01 * self.adversary[0].net(batch["images"]).mean(), parts

    def critic(self):
        return self.adversary[0]


class Adversary(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(3, 1, 4, 4)

    def loss(self, batch, step):
        loss = (self.net(batch["images"]) - batch["images"].mean()).square().mean()
        return loss, {"distance": loss.detach()}


@pytest.fixture(autouse=True)
def no_fault_left():
    FAULT.clear()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """40 pictures of one random colour with a random square in it."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(40):
        picture = np.full((20, 20, 3), rng.integers(0, 256, 3), np.uint8)
        x, y = rng.integers(0, 12, 2)
        picture[y : y + 8, x : x + 8] = rng.integers(0, 256, 3)
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
    return folder


def recipe(pictures: Path, out: Path, **changes) -> TokenizerRecipe:
    arguments = {
        "kind": "tokenizer",
        "tokenizer": {"name": f"{__name__}:Noisy"},
        "data": str(pictures),
        "out": str(out),
        "steps": 10,
        "batch_size": 8,
        "lr": 1e-3,
        "schedule": "linear",
        "warmup": 2,
        "ema": 0.9,
        "checkpoint_every": 4,
        "sample_every": 100,
        "log_every": 5,
        "eval_images": 4,
    }
    return TokenizerRecipe(**{**arguments, **changes})


def state_of(out: Path) -> dict[str, str]:
    """Hashes of everything that a run leaves behind and that must not depend on where it was stopped."""
    saved = checkpoint.load_torch(out / "training" / "checkpoint.pt")
    moments = {f"{i}.{k}": v for i, entry in saved["optimizer"]["state"].items() for k, v in entry.items()}
    return {
        "folder": (out / "model.safetensors").read_bytes().hex(),
        "step": saved["step"],
        "tokenizer": checkpoint.state_hash(saved["tokenizer"]),
        "moments": checkpoint.state_hash(moments),
        "critic": checkpoint.state_hash(saved["critic"]) if saved["critic"] else "",
        "ema": checkpoint.state_hash(saved["ema"]["average"]),
    }


@pytest.fixture(scope="module")
def uninterrupted(pictures, tmp_path_factory) -> Path:
    FAULT.clear()
    return train(recipe(pictures, tmp_path_factory.mktemp("whole") / "out"))


def test_ctrl_c_saves_and_the_next_run_ends_the_same(pictures, uninterrupted, tmp_path):
    FAULT[5] = lambda: os.kill(os.getpid(), signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 6"):
        train(recipe(pictures, tmp_path))
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.load_torch(tmp_path / "training" / "checkpoint.pt")["step"] == 6
    assert not (tmp_path / "unitok.json").exists()  # not finished
    train(recipe(pictures, tmp_path))
    assert state_of(tmp_path) == state_of(uninterrupted)


def test_a_crash_goes_on_from_the_last_checkpoint_and_ends_the_same(pictures, uninterrupted, tmp_path):
    def crash():
        raise RuntimeError("the machine went away")

    FAULT[7] = crash
    with pytest.raises(RuntimeError):
        train(recipe(pictures, tmp_path))
    assert checkpoint.load_torch(tmp_path / "training" / "checkpoint.pt")["step"] == 4
    train(recipe(pictures, tmp_path))
    assert state_of(tmp_path) == state_of(uninterrupted)


def test_kill_9_while_saving_leaves_the_older_checkpoint_whole(pictures, tmp_path):
    """The process dies with half of the second checkpoint on disk; a run in this process ends like an unbroken one."""
    arguments = recipe(
        pictures,
        tmp_path / "killed",
        tokenizer={"name": "fsq", "image_size": 16, "width": 8, "min_width": 8, "levels": [4, 3, 3]},
    )
    script = f"""
import os, signal, torch
from unitok.config import TokenizerRecipe
from unitok.training import tokenizer
save, count = torch.save, []
def dying_save(state, path):
    save(state, path)
    count.append(path)
    if len(count) == 2:
        os.truncate(path, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = dying_save
tokenizer.train(TokenizerRecipe.model_validate_json({arguments.model_dump_json()!r}))
"""
    process = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert checkpoint.load_torch(tmp_path / "killed" / "training" / "checkpoint.pt")["step"] == 4
    train(arguments)
    train(arguments.model_copy(update={"out": str(tmp_path / "whole")}))
    assert state_of(tmp_path / "killed") == state_of(tmp_path / "whole")


def test_what_a_run_leaves_behind(pictures, uninterrupted):
    saved = checkpoint.load_torch(uninterrupted / "training" / "checkpoint.pt")
    tokenizer = load_tokenizer(uninterrupted)
    assert type(tokenizer) is Noisy
    own = checkpoint.state_hash(tokenizer.own_state())
    assert own == checkpoint.state_hash(saved["ema"]["average"]) != checkpoint.state_hash(saved["tokenizer"])
    assert not any("adversary" in name for name in tokenizer.own_state())
    sheet = Image.open(uninterrupted / "training" / "samples" / "step-0000010.png")
    assert sheet.size == (4 * 16, 2 * 16)  # 4 held-out pictures over their reconstructions
    assert list((uninterrupted / "training" / "logs").glob("events.*"))
    report = json.loads((uninterrupted / "training" / "report.json").read_text())
    (psnr,) = report["scores"]
    assert psnr["name"] == "psnr" and psnr["n"] == 4 and psnr["interval"][0] <= psnr["value"] <= psnr["interval"][1]
    assert set(psnr["baselines"]) == {"untrained", "mean colour"} and report["seconds"]["train"] > 0
    assert not list(uninterrupted.rglob("*.tmp"))


def test_a_finished_run_changes_nothing(pictures, uninterrupted):
    before = state_of(uninterrupted)
    train(recipe(pictures, uninterrupted))
    assert state_of(uninterrupted) == before


def test_training_beats_its_baselines(pictures, tmp_path):
    """Held-out pictures, after some seconds: better than untrained, and than the mean colour of each picture."""
    out = train(
        recipe(
            pictures,
            tmp_path,
            steps=200,
            batch_size=16,
            lr=5e-3,
            ema=0.95,
            checkpoint_every=1000,
            tokenizer={"name": "fsq", "image_size": 16, "width": 16, "min_width": 16, "levels": [8, 5, 5]},
        )
    )
    (psnr,) = json.loads((out / "training" / "report.json").read_text())["scores"]
    assert psnr["value"] > max(psnr["baselines"].values()) + 1


class Collapsed(FSQTokenizer):
    """Has one code for everything."""

    def encode(self, images):
        return torch.full((len(images), 16), 3)


def test_a_collapsed_codebook_is_told(pictures, tmp_path, capsys):
    collapsed = {"name": f"{__name__}:Collapsed", "image_size": 16, "width": 8, "min_width": 8, "levels": [8, 8, 8]}
    run = train(recipe(pictures, tmp_path / "collapsed", steps=2, tokenizer=collapsed))
    line = "warning: 1 of 512 codes in use (perplexity 1.0): the codebook has collapsed;"
    assert capsys.readouterr().out.count(line) == 2  # before training and at its end
    (report,) = json.loads((run / "training" / "report.json").read_text())["scores"]
    assert (report["protocol"]["codes_used"], report["protocol"]["perplexity"]) == (1 / 512, 1.0)
    small = {"name": "fsq", "image_size": 16, "width": 8, "min_width": 8, "levels": [3, 3]}
    train(recipe(pictures, tmp_path / "used", steps=2, tokenizer=small))
    assert "warning" not in capsys.readouterr().out


class Undecoded(Collapsed):
    """Its codes need a detokenizer."""

    def decode(self, codes, grid=None):
        raise NotImplementedError("needs a detokenizer")


def test_no_steps_write_the_tokenizer_as_it_is(pictures, uninterrupted, tmp_path):
    table = tmp_path / "phrases.txt"
    table.write_text("red circle\nblue square")
    clip = get("interrogator").tiny().config["clip"]
    values = {"name": "interrogator", "clip": clip, "text_tokenizer": "builtin:scenes", "phrases": str(table)}
    plan = {"kind": "tokenizer", "tokenizer": values, "out": str(tmp_path / "out"), "steps": 0}
    train(TokenizerRecipe(**plan))
    made = load_tokenizer(tmp_path / "out")
    assert made.to_text(made.encode(torch.rand(1, 3, 16, 16)))[0].startswith(("red circle", "blue square"))
    training = {**plan, "steps": 1, "data": str(pictures), "batch_size": 1, "lr": 1}
    with pytest.raises(ValueError, match="'interrogator' has nothing to train: give steps 0"):
        train(TokenizerRecipe(**training))
    with pytest.raises(ValueError, match="holds a trained tokenizer: choose another out"):
        train(recipe(pictures, uninterrupted, steps=0))


def test_codes_without_a_decoder_are_counted(pictures, tmp_path, capsys):
    arguments = {"name": f"{__name__}:Undecoded", "image_size": 16, "width": 8, "min_width": 8, "levels": [8, 8, 8]}
    run = train(recipe(pictures, tmp_path / "undecoded", steps=2, tokenizer=arguments))
    said = capsys.readouterr().out
    assert "no sample pictures: needs a detokenizer" in said and said.count("1 of 512 codes in use") == 2
    assert json.loads((run / "training" / "report.json").read_text())["scores"] == []
    assert not list((run / "training").glob("samples/*.png"))


def test_every_codebook_is_scored():
    tokenizer = get("fsq_split").tiny().eval()
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scores, warning = score(tokenizer, images, batch_size=4)
    codes, books = tokenizer.encode(images.float() / 255), tokenizer.token_codebook()
    for book, size in enumerate(tokenizer.codebook_sizes):
        _, counts = codes[:, books == book].unique(return_counts=True)
        shares = counts / counts.sum()
        assert scores[f"codes_used/codebook={book}"] == pytest.approx(len(counts) / size)
        assert scores[f"perplexity/codebook={book}"] == pytest.approx((-(shares * shares.log()).sum()).exp().item())
    assert warning is None and len(scores) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 2e-3}, r"lr = 0.001, the recipe says 0.002"),
        ({"steps": 20}, r"steps = 10, the recipe says 20"),
        ({"tokenizer": {"name": f"{__name__}:Noisy", "image_size": 8}}, "made with tokenizer"),
    ],
)
def test_another_recipe_is_not_continued(pictures, uninterrupted, changes, message):
    with pytest.raises(ValueError, match=message):
        train(recipe(pictures, uninterrupted, **changes))


def test_other_data_are_not_continued(pictures, uninterrupted, tmp_path):
    for i, file in enumerate(sorted(pictures.iterdir())):
        if i != 3:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="made from other pictures"):
        train(recipe(tmp_path, uninterrupted))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": {"name": "fsq", "widht": 8}}, "no argument 'widht' .did you mean 'width'"),
        ({"tokenizer": {"name": "fqs"}}, "unknown tokenizer 'fqs'"),
        ({"stage": "second"}, "no stage 'second'; it has main"),
    ],
)
def test_recipes_that_cannot_be_run(pictures, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(recipe(pictures, tmp_path, **changes))


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(pictures, tmp_path):
    class Diverging(Noisy):
        def loss(self, batch, step, stage="main"):
            loss, parts = super().loss(batch, step, stage)
            return loss * (float("nan") if step == 6 else 1), parts

    globals()["Diverging"] = Diverging
    with pytest.raises(ValueError, match=r"loss became nan before step 8 \(the last checkpoint is of step 4\)"):
        train(recipe(pictures, tmp_path, tokenizer={"name": f"{__name__}:Diverging"}, log_every=100))
    saved = checkpoint.load_torch(tmp_path / "training" / "checkpoint.pt")
    assert saved["step"] == 4 and all(torch.isfinite(v).all() for v in saved["tokenizer"].values())


def test_a_later_stage_starts_from_a_saved_tokenizer(pictures, uninterrupted, tmp_path):
    begun = train(recipe(pictures, tmp_path, init_from=str(uninterrupted), lr=1e-12, steps=1, ema=None))
    start, end = load_tokenizer(uninterrupted).state_dict(), load_tokenizer(begun).state_dict()
    for name in start:
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(end[name], start[name], atol=1e-9, rtol=0)


# ---- pictures


@pytest.fixture
def mixed(pictures, tmp_path) -> Path:
    """JSON lines with five usable pictures and six rows that are not."""
    good = sorted(pictures.iterdir())[:5]
    whole = good[0].read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    rows = [{"image": str(p)} for p in good]
    rows += [{"image": n} for n in ("cut.png", "text.jpg", "empty.png", "nowhere.png", "https://example.org/a.png")]
    lines = [json.dumps(r) for r in rows]
    lines.insert(2, '{"image": ')
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "rows.jsonl"


def read(path: Path, tmp_path: Path, **arguments) -> Pictures:
    def squash(image):
        return to_tensor(image.resize((8, 8)))

    return Pictures([DataSource(path=str(path))], squash, 8, seed=0, quarantine=tmp_path / "q.jsonl", **arguments)


@pytest.mark.parametrize("in_memory", [1 << 20, 0])
def test_bad_pictures_are_quarantined_and_counted(mixed, tmp_path, in_memory):
    found = read(mixed, tmp_path, in_memory=in_memory)
    list(found.batches(0, 5, 4))  # a stream learns of them on the way
    assert found.refused == 6
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all(line["source"] and line["reason"] for line in lines)


def test_a_folder_of_bad_pictures_is_an_error(tmp_path):
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(ValueError, match="no picture could be read; 1 refused"):
        read(tmp_path, tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_gives_the_pictures_that_memory_gives(pictures, tmp_path, workers):
    cached, streamed = (read(pictures, tmp_path, eval_images=4, in_memory=m, workers=workers) for m in (1 << 30, 0))
    assert cached.cache is not None and streamed.cache is None
    assert torch.equal(cached.held_out, streamed.held_out)
    for a, b in zip(cached.batches(3, 9, 8), streamed.batches(3, 9, 8), strict=True):
        assert torch.equal(a, b)


def test_held_out_pictures_are_never_trained_on(pictures, tmp_path):
    found = read(pictures, tmp_path, eval_images=10)
    assert len(found.held_out) == 4 and found.count == 36  # one in ten at most
    seen = {image.numpy().tobytes() for batch in found.batches(0, 9, 8) for image in batch}
    assert len(seen) == 36 and not seen & {image.numpy().tobytes() for image in found.held_out}


def test_processes_share_a_step(pictures, tmp_path):
    found = read(pictures, tmp_path)
    for step in (0, 7):
        (whole,) = found.batches(step, step + 1, 8)
        halves = [next(found.batches(step, step + 1, 8, rank, 2)) for rank in (0, 1)]
        assert torch.equal(torch.cat(halves), whole)


def test_order_shows_each_picture_as_often_as_its_weight_says():
    order = Order([10, 4, 6], [1, 2, 0.5], seed=3)
    assert order.length == 10 + 8 + 3
    epochs = [order.take(e * 21, 21) for e in range(3)]
    for epoch in epochs:
        counts = np.bincount(epoch, minlength=20)
        assert (counts[:10] == 1).all() and (counts[10:14] == 2).all() and counts[14:].sum() == 3
    assert not np.array_equal(epochs[0], epochs[1])
    pieces = np.concatenate([order.take(at, 7) for at in range(0, 63, 7)])
    assert np.array_equal(pieces, np.concatenate(epochs))
    assert not np.array_equal(Order([10, 4, 6], [1, 2, 0.5], seed=4).take(0, 21), epochs[0])


# ---- numerics


def test_ema_is_the_weighted_mean_of_what_it_saw():
    value = {"x": torch.zeros(1), "n": torch.tensor(0)}
    ema = Ema(lambda: value, 0.5)
    expected = 0.0
    for i in range(1, 20):
        value["x"].fill_(i)
        value["n"].fill_(i)
        ema.update()
        decay = min(0.5, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * i
    assert ema.average["x"].item() == pytest.approx(expected, rel=1e-5) and ema.average["n"].item() == 19
    with ema.applied():
        assert value["x"].item() == pytest.approx(expected, rel=1e-5)
    assert value["x"].item() == 19


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_schedules(schedule, middle):
    factors = [lr_factor(s, 110, 10, schedule) for s in range(111)]
    assert all(a < b for a, b in zip(factors[:9], factors[1:10], strict=True)) and factors[10] == 1
    assert factors[60] == pytest.approx(middle)
    assert factors[110] == pytest.approx(1 if schedule == "constant" else 0)
