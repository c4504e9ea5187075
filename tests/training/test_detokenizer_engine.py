"""The detokenizer engine: goes on where it was stopped, refuses what does not fit, and beats its control."""

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
from transformers import CLIPConfig, CLIPModel

from unitok import checkpoint
from unitok.config import DetokenizerRecipe
from unitok.detokenizers.base import Condition, Detokenizer, load_detokenizer
from unitok.detokenizers.diffusion import DiffusionDetokenizer
from unitok.tokenizers.base import ImageTokenizer
from unitok.training.detokenizer import DetokenizerRun, TokenizerSource, build, train

FAULT: dict = {}  # step -> what happens in it, once
SEEN: list = []  # batches that the tokenizer encoded
NAME = f"{__name__}:Faulty"


class Blocks(ImageTokenizer):
    """Codes are block means of 4 levels a channel, 64 codes; embeddings are those colours."""

    def __init__(self, image_size: int = 16):
        super().__init__()
        self.image_size, self.codebook_sizes, self.fully_convolutional, self.stride = image_size, (64,), True, 4

    def encode(self, images):
        SEEN.append(len(images))
        levels = (nn.functional.avg_pool2d(images, 4) * 3).round().long()
        return (levels * torch.tensor([1, 4, 16]).view(3, 1, 1)).sum(1).flatten(1)

    def embed(self, codes, grid=None):
        return torch.stack([codes % 4, codes // 4 % 4, codes // 16], 2) / 3


class Faulty(DiffusionDetokenizer):
    """Can be interrupted."""

    def loss(self, images, condition, step):
        if step in FAULT:
            FAULT.pop(step)()
        return super().loss(images, condition, step)

    def distill_loss(self, teacher, images, condition, step, sampling_steps):
        if step in FAULT:
            FAULT.pop(step)()
        TAUGHT.append((step, sampling_steps, teacher.guidance, checkpoint.state_hash(teacher.own_state())))
        return super().distill_loss(teacher, images, condition, step, sampling_steps)


TAUGHT: list = []


@pytest.fixture(autouse=True)
def forgotten():
    FAULT.clear()
    SEEN.clear()
    TAUGHT.clear()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """60 captioned pictures of one colour with a square of another, a tokenizer, and an untrained CLIP."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (folder / "pictures").mkdir()
    rows = []
    for i in range(60):
        picture = np.full((16, 16, 3), rng.integers(0, 256, 3), np.uint8)
        x, y = rng.integers(0, 9, 2)
        picture[y : y + 8, x : x + 8] = rng.integers(0, 256, 3)
        Image.fromarray(picture).save(folder / "pictures" / f"{i:02d}.png")
        rows.append({"image": f"pictures/{i:02d}.png", "captions": [f"picture {i}", f"number {i}"]})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Blocks().save_pretrained(folder / "tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**sizes, "image_size": 8, "patch_size": 4, "projection_dim": 6}
    torch.manual_seed(0)
    text = {**sizes, "vocab_size": 8, "projection_dim": 6}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).save_pretrained(folder / "clip")
    return folder


def recipe(data: Path, out: Path, **changes) -> DetokenizerRecipe:
    body = {"width": 16, "depth": 1, "heads": 2, "patch_size": 4, "timesteps": 50, "steps": 2}
    values = {
        "kind": "detokenizer",
        "detokenizer": {"name": NAME, **body},
        "tokenizer": str(data / "tokenizer"),
        "data": str(data / "pictures"),
        "out": str(out),
        "steps": 8,
        "batch_size": 6,
        "lr": 1e-3,
        "warmup": 1,
        "ema": 0.9,
        "checkpoint_every": 3,
        "sample_every": 100,
        "log_every": 4,
        "eval_images": 4,
    }
    return DetokenizerRecipe(**{**values, **changes})


def state_of(out: Path) -> dict:
    saved = checkpoint.load_torch(out / "training" / "checkpoint.pt")
    moments = {f"{i}.{k}": v for i, entry in saved["optimizer"]["state"].items() for k, v in entry.items()}
    return {
        "folder": (out / "model.safetensors").read_bytes().hex(),
        "step": saved["step"],
        "detokenizer": checkpoint.state_hash(saved["detokenizer"]),
        "moments": checkpoint.state_hash(moments),
        "ema": checkpoint.state_hash(saved["ema"]["average"]),
        "teacher": checkpoint.state_hash(saved["teacher"]) if saved["teacher"] else "",
    }


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> Path:
    return train(recipe(data, tmp_path_factory.mktemp("whole") / "out"))


# ---- going on


def test_ctrl_c_saves_and_the_next_run_ends_the_same(data, uninterrupted, tmp_path):
    FAULT[4] = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 5"):
        train(recipe(data, tmp_path))
    assert not (tmp_path / "unitok.json").exists()  # not finished
    train(recipe(data, tmp_path))
    assert state_of(tmp_path) == state_of(uninterrupted)


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_ends_the_same(data, tmp_path):
    """A tokenizer and a detokenizer that another process knows; it dies in step 5, after the checkpoint of step 3."""
    from unitok.tokenizers.fsq import FSQTokenizer

    FSQTokenizer(image_size=16, width=8, min_width=8, levels=(4, 3, 3)).save_pretrained(tmp_path / "tokenizer")
    detokenizer = recipe(data, tmp_path).detokenizer.arguments | {"name": "diffusion"}
    killed = recipe(data, tmp_path / "killed", tokenizer=str(tmp_path / "tokenizer"), detokenizer=detokenizer)
    script = f"""
import os, signal
from unitok.config import DetokenizerRecipe
from unitok.detokenizers.diffusion import DiffusionDetokenizer
from unitok.training.detokenizer import train
loss = DiffusionDetokenizer.loss
def dying(self, images, condition, step):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, images, condition, step)
DiffusionDetokenizer.loss = dying
train(DetokenizerRecipe.model_validate_json({killed.model_dump_json()!r}))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert told.returncode == -signal.SIGKILL, told.stderr
    assert checkpoint.load_torch(tmp_path / "killed" / "training" / "checkpoint.pt")["step"] == 3
    train(killed)
    train(killed.model_copy(update={"out": str(tmp_path / "whole")}))
    assert state_of(tmp_path / "killed") == state_of(tmp_path / "whole")


def test_another_recipe_is_not_continued(data, uninterrupted):
    with pytest.raises(ValueError, match=r"lr = 0.001, the recipe says 0.002"):
        train(recipe(data, uninterrupted, lr=2e-3))


def test_another_network_in_the_same_folder_is_not_continued(data, tmp_path):
    folder = tmp_path / "clip"
    for seed in (0, 1):
        torch.manual_seed(seed)
        CLIPModel(CLIPConfig.from_pretrained(data / "clip")).save_pretrained(folder)
        asked = recipe(data, tmp_path / "out", tokenizer=None, clip=str(folder), detokenizer=mean("vectors"), steps=1)
        if seed == 0:
            train(asked)
    with pytest.raises(ValueError, match="was made with the source's weights = "):
        train(asked)


def test_what_a_run_leaves_behind(data, uninterrupted):
    detokenizer = load_detokenizer(uninterrupted)
    assert type(detokenizer) is Faulty and detokenizer.image_size == 16
    assert detokenizer.config["codebook_sizes"] == [64] and detokenizer.config["grid"] == [4, 4]
    assert Image.open(uninterrupted / "training" / "samples" / "step-0000008.png").size == (4 * 16, 3 * 16)
    (psnr,) = json.loads((uninterrupted / "training" / "report.json").read_text())["scores"]
    assert psnr["n"] == 4 and set(psnr["baselines"]) == {"untrained", "shuffled"}


# ---- what it learns from


@pytest.mark.parametrize(
    ("given", "takes"),
    [
        ({}, {"codes"}),
        ({"codes_as": "context"}, {"codes"}),
        ({"vectors_as": "context"}, {"vectors"}),
        ({"vectors_as": None}, {"codes"}),
        ({"vectors_as": "context", "codes_as": "patches"}, {"codes", "vectors"}),
    ],
)
def test_what_is_taken_follows_from_the_arguments(data, tmp_path, given, takes):
    asked = recipe(data, tmp_path)
    source = TokenizerSource(asked.tokenizer, torch.device("cpu"))
    values = asked.model_dump() | {"detokenizer": {**asked.detokenizer.model_dump(), **given}}
    assert build(DetokenizerRecipe(**values), source).takes == takes


def test_codes_of_pictures_in_memory_are_computed_once(data, tmp_path):
    run = DetokenizerRun(recipe(data, tmp_path, eval_images=0))
    before = sum(SEEN)
    run.train_step(*next(run.pictures.indexed_batches(0, 1, 6)))
    assert sum(SEEN) == before
    index, images = next(run.pictures.indexed_batches(3, 4, 6))
    condition = run.batch(index, images)["condition"]
    assert torch.equal(condition.codes, run.source.tokenizer.encode(images / 255)) and condition.grid == (4, 4)


def test_shuffled_codes_lose(data, tmp_path):
    body = {"name": "diffusion", "width": 48, "depth": 1, "heads": 2, "steps": 8, "prediction": "x0", "drop": 0.0}
    out = train(recipe(data, tmp_path, detokenizer=body, steps=200, batch_size=32, lr=3e-3, checkpoint_every=1000))
    (psnr,) = json.loads((out / "training" / "report.json").read_text())["scores"]
    assert psnr["value"] > psnr["baselines"]["shuffled"] + 3
    assert psnr["value"] > psnr["baselines"]["untrained"]  # which draws grey


class Mean(Detokenizer):
    """A picture of one colour, from whatever it takes; remembers what it was given."""

    def __init__(self, takes: list | None = None, vector_size: int | None = None, image_size: int = 16):
        super().__init__()
        self.takes, self.image_size = frozenset(takes or ["vectors"]), image_size
        self.colour = nn.Parameter(torch.full((3,), 0.5))
        self.register_buffer("mean", torch.zeros(vector_size or 1))

    def fit_vectors(self, vectors):
        self.mean.copy_(vectors.mean((0, 1)))

    def generate(self, condition, *, seeds, guidance=1.0, steps=None, negative=None):
        return self.colour.clamp(0, 1).view(1, 3, 1, 1).expand(len(condition), 3, self.image_size, self.image_size)

    def loss(self, images, condition, step):
        GIVEN.append(condition)
        return (images - self.colour.view(1, 3, 1, 1)).square().mean(), {}


GIVEN: list[Condition] = []


def mean(*takes: str, **arguments) -> dict:
    return {"name": f"{__name__}:Mean", "takes": list(takes), **arguments}


def test_vectors_of_a_clip_are_raw_and_their_mean_is_taken_once(data, tmp_path):
    GIVEN.clear()
    run = DetokenizerRun(recipe(data, tmp_path, clip=str(data / "clip"), tokenizer=None, detokenizer=mean("vectors")))
    model = CLIPModel.from_pretrained(data / "clip").eval()
    small = nn.functional.interpolate(run.pictures.cache / 255, size=(8, 8), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        raw = model.get_image_features(pixel_values=small * 2 - 1).pooler_output
    torch.testing.assert_close(run.kept, raw[:, None], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run.detokenizer.mean, raw.mean(0), atol=1e-5, rtol=1e-5)
    assert run.detokenizer.config["vector_size"] == 6
    run.train_step(*next(run.pictures.indexed_batches(0, 1, 6)))
    assert GIVEN[0].vectors.shape == (6, 1, 6) and GIVEN[0].parts() == {"vectors"}
    torch.testing.assert_close(run.ema.average["mean"], raw.mean(0), atol=1e-5, rtol=1e-5)


def test_embeddings_of_a_tokenizer_and_captions(data, tmp_path):
    GIVEN.clear()
    vectors = mean("vectors", "texts") | {"vector_size": 3}
    asked = recipe(data, tmp_path, detokenizer=vectors, texts=True)
    captioned = asked.model_dump() | {"data": str(data / "captions.jsonl")}
    run = DetokenizerRun(DetokenizerRecipe(**captioned))
    index, images = next(run.pictures.indexed_batches(0, 1, 6))
    run.train_step(index, images)
    assert GIVEN[0].vectors.shape == (6, 16, 3)
    numbers = [text.split()[1] for text in GIVEN[0].texts]
    assert numbers == [run.pictures.items[i].captions[0].split()[1] for i in index.tolist()]
    run.loop()
    assert {text.split()[0] for given in GIVEN for text in given.texts} == {"picture", "number"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"detokenizer": {"name": NAME, "codebook_sizes": [32]}}, r"codebook_sizes is \[32\], that of the tokenizer"),
        ({"detokenizer": {"name": NAME, "grid": [2, 2]}}, r"grid is \[2, 2\], that of the tokenizer \[4, 4\]"),
        ({"detokenizer": {"name": NAME, "vector_size": 5}}, "vector_size is 5, that of the tokenizer 3"),
        ({"detokenizer": {"name": NAME, "widht": 8}}, "no argument 'widht' .did you mean 'width'"),
        ({"detokenizer": {"name": "difusion"}}, "unknown detokenizer 'difusion'"),
        ({"detokenizer": mean("codes", "texts")}, "takes codes and texts, and the recipe has no texts"),
        ({"distill": {"teacher": "x"}}, "give detokenizer, or distill"),
        ({"detokenizer": None, "distill": {"teacher": "x", "start": 48, "stop": 10}}, "start must be stop times 2, 4"),
        ({"clip": "x"}, "one tokenizer or one clip, not both"),
        ({"tokenizer": None}, "what pictures are drawn from"),
    ],
)
def test_recipes_that_cannot_be_run(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(recipe(data, tmp_path, **changes))


# ---- distillation


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory) -> Path:
    body = recipe(data, Path("x")).detokenizer.arguments | {"name": NAME, "guidance": 2.0}
    return train(recipe(data, tmp_path_factory.mktemp("teacher") / "out", detokenizer=body))


def distilled(data: Path, teacher: Path, out: Path) -> DetokenizerRecipe:
    distill = {"teacher": str(teacher), "start": 8, "stop": 2}
    return recipe(data, out, detokenizer=None, distill=distill, checkpoint_every=1, steps=7)


def test_students_become_teachers_and_their_steps_halve(data, teacher, tmp_path):
    train(distilled(data, teacher, tmp_path))
    assert [steps for _, steps, _, _ in TAUGHT] == [4, 4, 4, 4, 2, 2, 2]
    assert [guidance for _, _, guidance, _ in TAUGHT] == [2.0] * 4 + [1.0] * 3  # what is guided is learned once
    hashes = [digest for *_, digest in TAUGHT]
    assert len(set(hashes[:4])) == len(set(hashes[4:])) == 1 and hashes[0] != hashes[4]
    assert hashes[0] == checkpoint.state_hash(load_detokenizer(teacher).own_state())
    student = load_detokenizer(tmp_path)
    assert (student.steps, student.guidance) == (2, 1.0)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_distillation_goes_on_in_either_halving_and_ends_the_same(data, teacher, tmp_path, step):
    whole = train(distilled(data, teacher, tmp_path / "whole"))
    FAULT[step] = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(distilled(data, teacher, tmp_path / "stopped"))
    TAUGHT.clear()
    stopped = train(distilled(data, teacher, tmp_path / "stopped"))
    assert TAUGHT[0][0] == step + 1
    assert state_of(stopped) == state_of(whole)


def test_the_student_starts_as_the_teacher_and_each_halving_has_its_own_rates(data, teacher, tmp_path):
    run = DetokenizerRun(distilled(data, teacher, tmp_path))
    theirs = checkpoint.state_hash(load_detokenizer(teacher).own_state())
    assert checkpoint.state_hash(run.detokenizer.own_state()) == theirs
    rates = []
    for run.step in range(7):  # halvings of 4 and 3 steps, of which the first warms up
        rates.append(run.lr() / 1e-3)
    assert rates == pytest.approx([0.5, 1, 0.75, 0.25, 0.5, 1, 0.5])
