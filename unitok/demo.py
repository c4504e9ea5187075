"""The main job in one command, on the embedded default: `make demo`.

    data      scenes as pictures and JSON lines, no held-out pair in training
    tokenize  the training documents become token shards
    before    the base as it is: scores
    tune      LoRA + new rows under DeepSpeed: interleaved questions, captions both ways
    merge     adapter into the base: an ordinary Hugging Face folder
    after     pictures drawn, questions answered, captions written: scores beside their baselines
    report    report.html, report.json

Stages exchange files in OUT and each is done once: a second run, or one after an interruption, goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from unitok.checkpoint import ASSETS, config_hash, file_sha256, write_json
from unitok.config import DataSource, LanguageModelRecipe, make_recipe
from unitok.stages import Stage, beside, run_stages

if TYPE_CHECKING:
    from unitok.eval.results import Score

BASE = ASSETS / "scenes"
PICTURES = {"train": 6000, "validation": 100, "test": 500}
SHOTS = 1000  # interleaved documents
ASKS = 4  # rounds of questions about a training picture
SOURCES = ("train_draw", "train_describe", "train_questions", "train_shots")
DRAW = {"guidance": 1.5, "temperature": 0.7}  # chosen on validation scenes: benchmarks/NOTES.md
CANDIDATES = 4  # the tuned model draws so many pictures of a prompt and keeps the one it reads best
ANSWER = {"guidance": 2.0}  # of the tuned model's text, against no picture; chosen there too
SCALES = (1.0, 1.5, 3.0)  # shown in the report
QUESTIONS = 1200  # rows scored
SHOT_QUESTIONS = 200  # of them with shots, which cost five pictures each
BATCH = 200
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 1},
}


def tuning(out: Path, model: Path, seed: int = 0) -> LanguageModelRecipe:
    """The LoRA recipe of the demo; training/scenes_lora.yaml is the same for use by hand."""
    shards = [str(out / "shards" / name) for name in SOURCES]
    values = {
        "kind": "language_model",
        "model": str(model),
        "method": "lora",
        "lora": {"rank": 32, "alpha": 64, "rows": "new"},
        "data": [
            {"shards": shards[0], "weight": 5, "caption_drop": 0.1},
            {"shards": shards[1], "weight": 1},
            {"shards": shards[2], "weight": 4, "share_prefix": True},
            {"shards": shards[3], "weight": 0.5},
        ],
        "out": str(out / "adapter"),
        "seed": seed,
        "length": 512,
        "batch_size": 4,
        "steps": 600,
        "lr": 2e-3,
        "schedule": "linear",
        "warmup": 20,
        "betas": [0.9, 0.95],
        "weight_decay": 0.0,
        "clip": 1.0,
        "dtype": "float32",
        "text_weight": 4.0,
        "deepspeed": str(out / "deepspeed.json"),
        "checkpoint_every": 200,
        "log_every": 20,
    }
    recipe = make_recipe(values, "the demo's recipe")
    assert isinstance(recipe, LanguageModelRecipe)
    return recipe


def run(out: str | Path = "out/demo", *, tokenizer: str = "fsq_split", from_scratch: bool = False) -> Path:
    """Run what is not yet done in `out` and return the report's path. ValueError for an unknown tokenizer."""
    if tokenizer == "seed":
        from unitok.demo_seed import SeedDemo

        return SeedDemo(Path(out)).run()
    if tokenizer != "fsq_split":
        raise ValueError(f"demo has no recipe for the image tokenizer {tokenizer!r}; it has: fsq_split, seed")
    return Demo(Path(out), from_scratch=from_scratch).run()


class Demo:
    """One run; `seconds` by stage."""

    def __init__(self, out: Path, *, from_scratch: bool = False):
        self.out, self.from_scratch = out, from_scratch
        self.console = Console(stderr=True)
        self.seconds: dict[str, float] = {}
        self.base = out / "scratch" / "base" if from_scratch else BASE

    def run(self) -> Path:
        stages: dict[str, Stage] = {
            "data": self.data,
            "tokenize": self.tokenize,
            "before": self.before,
            "tune": self.tune,
            "merge": self.merge,
            "after": self.after,
            "report": self.report,
        }
        if self.from_scratch:
            stages = {"scratch": self.scratch, **stages}
        elif not (self.base / "unitok.json").is_file():
            raise FileNotFoundError("the embedded default is not in this installation: run with --from-scratch")
        run_stages(self.out, stages, self._asked(), self.seconds, self.console)
        report = self.out / "report.html"
        self.console.print(f"{sum(self.seconds.values()):.0f} s in all; report: {report}")
        return report

    def _asked(self) -> str:
        """What decides the result, wherever folders lie: another base with the same manifest is another demo."""
        recipe = tuning(Path("out"), Path("base")).model_dump(mode="json")
        files = () if self.from_scratch else ("unitok.json", "model.safetensors")
        base = [file_sha256(self.base / file) for file in files]
        said = {
            "pictures": PICTURES,
            "shots": SHOTS,
            "asks": ASKS,
            "draw": DRAW,
            "candidates": CANDIDATES,
            "answer": ANSWER,
            "base": base,
        }
        return config_hash({"recipe": recipe, **said})

    # ---- stages

    def scratch(self) -> None:
        from unitok import weights

        weights.make(self.out / "scratch")

    def data(self) -> None:
        from unitok.data.scene_files import write_scenes

        write_scenes(self.out / "data", pictures=PICTURES, captions=1, shots=SHOTS, asks=ASKS, seed=2)

    def tokenize(self) -> None:
        from unitok.data.shards import summary_line, tokenize_each
        from unitok.weights import NAME

        jobs = [(self.out / "data" / f"{source}.jsonl", self.out / "shards" / source) for source in SOURCES]
        for source, summary in zip(SOURCES, tokenize_each(jobs, self.base, name=NAME), strict=True):
            self.console.print(f"  {source}: {summary_line(summary)}", highlight=False)

    def tune(self) -> None:
        from unitok.training.language_model import train
        from unitok.training.launch import second_process, two_pay

        write_json(self.out / "deepspeed.json", DEEPSPEED)
        recipe = tuning(self.out, self.base)
        with contextlib.ExitStack() as stack:
            if two_pay():
                recipe = recipe.model_copy(update={"batch_size": recipe.batch_size // 2})
                write_json(self.out / "tune.json", recipe.model_dump(mode="json"))
                command = [sys.executable, "-m", "unitok", "train", str(self.out / "tune.json")]
                stack.enter_context(second_process(command))
            train(recipe, log=lambda line: self.console.print(f"  {line}", highlight=False))

    def merge(self) -> None:
        from unitok.lm.export import export

        shutil.rmtree(self.out / "model", ignore_errors=True)  # of an interrupted run
        export(self.out / "adapter", self.out / "model", base=self.base)

    def before(self) -> None:
        self._score(self.base, "before")

    def after(self) -> None:
        self._score(self.out / "model", "after")

    def report(self) -> None:
        from unitok.report import write_report

        write_report(self.out, self.seconds)

    # ---- scores

    def _score(self, folder: Path, label: str) -> None:
        """Scores of a model folder into LABEL/scores.json; before tuning only what is printed beside the later ones."""
        from unitok.eval.results import write_results

        data, place, after = self.out / "data", self.out / label, label == "after"
        with beside(partial(score_texts, folder, data, place, after, QUESTIONS)) as texts:
            scores, lines = score_pictures(folder, data, place, after)
            more, others = texts()
        for line in lines + others:
            self.console.print(f"  {line}", highlight=False)
        write_results(place / "scores.json", scores + more)


def score_pictures(folder: Path, data: Path, place: Path, after: bool) -> tuple[list[Score], list[str]]:
    """Scores of the pictures that a model draws, and after tuning of its tokenizer's; lines that say what took long."""
    from unitok.eval import images, text_to_image
    from unitok.eval.rows import load_rows
    from unitok.model import load

    model = load(folder)
    lines: list[str] = []
    prompts = text_to_image.load_prompts(_source(data, "test_prompts"))
    with _step("pictures of held-out pairs", lines):
        draw = {**DRAW, "candidates": CANDIDATES} if after else DRAW
        scores = text_to_image.evaluate(model, prompts, batch_size=BATCH, decode=draw, out=place / "images")
    if after:
        with _step("reconstructions", lines):
            shown = load_rows(_source(data, "test_captions"), "caption")
            pictures = [{"id": row["id"], "image": row["image"]} for row in shown]
            made = images.evaluate(model.image_tokenizer, pictures, sheet=place / "reconstructions.png")
            scores += [replace(score, name=f"reconstruction_{score.name}") for score in made]
    return scores, lines


def score_texts(folder: Path, data: Path, place: Path, after: bool, count: int) -> tuple[list[Score], list[str]]:
    """Scores of the answers to `count` questions and of the captions that a model writes; lines as above."""
    from unitok.eval import captions, vqa
    from unitok.eval.rows import load_rows, subset
    from unitok.model import load

    decode = ANSWER if after else None  # a base that was never asked has no habit of answers to be guided off
    model = load(folder)
    lines: list[str] = []
    scores: list[Score] = []
    questions = subset(load_rows(_source(data, "test_questions"), "question"), count, 0)
    train = load_rows(_source(data, "train_questions"), "question") if after else []
    arms = {0: ("blind", "majority", "no_image", "shuffled_images"), 1: (), 4: ("permuted_shots",)}
    for shots, others in arms.items() if after else ((0, ()),):
        with _step(f"questions, {shots} shots", lines):
            scores += vqa.evaluate(
                model, subset(questions, SHOT_QUESTIONS, 0) if shots else questions, train, shots=shots,
                mode="exact", baselines=others, batch_size=BATCH, breakdown=("kind", "objects"), decode=decode,
                name=f"vqa_{shots}shot", replies=place / f"vqa_{shots}shot.jsonl",
            )  # fmt: skip
    with _step("captions", lines):
        shown = load_rows(_source(data, "test_captions"), "caption")
        replies = place / "captions.jsonl"
        scores += captions.evaluate(model, shown, batch_size=BATCH, decode=decode, replies=replies)
    return scores, lines


def _source(data: Path, name: str) -> list[DataSource]:
    return [DataSource(path=str(data / f"{name}.jsonl"))]


@contextlib.contextmanager
def _step(what: str, lines: list[str]) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    lines.append(f"{what}: {time.perf_counter() - begun:.0f} s")


def named_scores(before: list[dict], after: list[dict]) -> list[dict]:
    """The demo's scores under their names in report.json, with the untuned base's as the baseline `before`."""
    earlier = {score["name"]: score["value"] for score in before}
    names = {
        "t2i_exact": "t2i_exact",
        "t2i_exact_two_objects": "t2i_exact_two_objects",
        "vqa_0shot": "vqa_0shot",
        "vqa_0shot/objects=2": "vqa_0shot_two_objects",
        "vqa_1shot": "vqa_1shot",
        "vqa_4shot": "vqa_4shot",
        "captions/exact_match": "caption_exact",
        "reconstruction_judged": "reconstruction_judged",
        "reconstruction_psnr": "reconstruction_psnr",
    }
    names |= {
        score["name"]: score["name"].replace("/kind=", "_").replace("/", "_")
        for score in after
        if score["name"].startswith("vqa_0shot/kind=")
    }
    by_name = {score["name"]: score for score in after}
    out = []
    for old, new in names.items():
        if old in by_name:
            score = json.loads(json.dumps(by_name[old]))
            if old in earlier and not old.startswith("reconstruction"):
                score["baselines"] = {"before": earlier[old], **score["baselines"]}
            out.append({**score, "name": new})
    return out
