"""SEED end to end on scenes, from nothing: `unitok demo --tokenizer seed`. No weights of it are shipped.

    data         scenes whose things stand at fixed places; no held-out pair in training
    clip         a small CLIP, frozen from here on: what sees, and what the image embedding is
    contrastive  the causal Q-Former: pictures and captions find each other
    codes        the codebook, and the way back to CLIP's image embedding
    painter      a diffusion decoder that draws from an image embedding
    tokenize     captioned pictures become token shards
    language     the embedded base LLM gets SEED's rows and learns captions -> codes and codes -> captions
    scores       retrieval from codes; pictures drawn from captions of held-out pairs, judged
    report       report.json, and a sheet

Stages exchange files in OUT and each is done once: a second run, or one after an interruption, goes on from there. The
recipes are those of the root folders, so it runs where they lie.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from unitok.checkpoint import config_hash, read_json, write_json
from unitok.config import DataSource, TokenizerRecipe, load_recipe
from unitok.stages import Stage, run_stages

if TYPE_CHECKING:
    from unitok.model import UnifiedModel
    from unitok.tokenizers.base import ImageTokenizer

HERE = Path("out/placed")  # where the recipes have everything
PICTURES = {"train": 20_000, "validation": 1024, "test": 600}
CAPTIONS = 4  # of each training picture
NAME = "seed"
CLIP, CONTRASTIVE, CODES, PAINTER, LANGUAGE = (
    "training/placed_clip.yaml",
    "tokenizers/scenes_seed_contrastive.yaml",
    "tokenizers/scenes_seed.yaml",
    "training/scenes_unclip.yaml",
    "training/scenes_seed_llm.yaml",
)
RECIPES = (CLIP, CONTRASTIVE, CODES, PAINTER, LANGUAGE)
SOURCES = ("train_draw", "train_describe")
DRAW: dict[str, Any] = {"guidance": 1.5, "temperature": 0.7}
PROCESSES = min(2, os.cpu_count() or 1)
SHOWN = 12
BATCH = 200


class SeedDemo:
    """One run; `seconds` by stage. pictures: of each split. changes: `key=value` of recipes, by their files."""

    def __init__(
        self, out: Path, *, pictures: Mapping[str, int] = PICTURES, changes: Mapping[str, Sequence[str]] | None = None
    ):
        self.out, self.pictures, self.changes = out, dict(pictures), dict(changes or {})
        self.console = Console(stderr=True)
        self.seconds: dict[str, float] = {}

    def run(self) -> Path:
        """Run what is not yet done and return the path of report.json. ValueError where `out` holds another demo."""
        stages: dict[str, Stage] = {
            "data": self.data,
            "clip": lambda: self.train(CLIP, processes=1),
            "contrastive": lambda: self.train(CONTRASTIVE),
            "codes": lambda: self.train(CODES),
            "painter": lambda: self.train(PAINTER),
            "tokenize": self.tokenize,
            "language": self.language,
            "scores": self.scores,
            "report": self.report,
        }
        for file in RECIPES:
            if not Path(file).is_file():
                raise FileNotFoundError(f"no {file} here: run this demo in the folder of the project")
        recipes = {file: [yaml.safe_load(Path(file).read_text()), *self.changes.get(file, ())] for file in RECIPES}
        self.console.print("every stage is trained here, in about an hour on 2 CPU cores; stopped, it goes on")
        asked = config_hash({"recipes": recipes, "pictures": self.pictures})
        run_stages(self.out, stages, asked, self.seconds, self.console)
        self.console.print(f"{sum(self.seconds.values()):.0f} s in all")
        return self.out / "report.json"

    # ---- stages

    def data(self) -> None:
        from unitok.data.scene_files import write_scenes

        write_scenes(self.out / "data", setting="placed", pictures=self.pictures, captions=CAPTIONS, seed=0)

    def train(self, file: str, *, processes: int = PROCESSES) -> None:
        """A recipe of the root folders with everything in `out`, as processes of their own.

        Two processes of one thread are faster than one of two; and a stage's memory goes when it ends.
        """
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
        threads = {"OMP_NUM_THREADS": "1"} if processes > 1 else {}
        moved = [*self.changes.get(file, ()), *(f"{key}={value}" for key, value in self._moved(file))]
        done = subprocess.run([*command, "unitok", "train", file, *moved], env={**os.environ, **threads})
        if done.returncode:
            raise ValueError(f"the stage of {file} stopped, and says why above; the same command goes on from there")

    def tokenize(self) -> None:
        from unitok.data.shards import census_line, summary_line, tokenize

        for source in SOURCES:
            shards = self.out / "shards" / source
            summary = tokenize(self.out / "data" / f"{source}.jsonl", self.out / "tokenizer", shards, name=NAME)
            self.console.print(f"  {source}: {summary_line(summary)}", highlight=False)
            self.console.print(f"  {census_line(summary)}", highlight=False)

    def language(self) -> None:
        from unitok.lm.expand import expand_folder

        expanded = self.out / "expanded"
        if not (expanded / "unitok.json").is_file():
            shutil.rmtree(expanded, ignore_errors=True)
            expand_folder("builtin:scenes", self.out / "tokenizer", expanded, NAME, detokenizer=self.out / "painter")
        self.train(LANGUAGE)

    def scores(self) -> None:
        from unitok.eval import retrieval, text_to_image
        from unitok.eval.results import write_results
        from unitok.eval.rows import load_rows
        from unitok.model import load

        model = load(self.out / "model", tokenizer=NAME)
        size = min(retrieval.GALLERY, self.pictures["validation"] // 4)
        rows = retrieval.gallery(load_rows([self._source("validation_captions.jsonl")], "caption"), size)
        found = retrieval.evaluate(model.image_tokenizer, rows)
        nothing = {score.name: score.value for score in retrieval.evaluate(self._untrained(), rows)}
        found = [replace(s, baselines={**s.baselines, "untrained": nothing[s.name]}) for s in found]
        prompts = text_to_image.load_prompts([self._source("test_prompts.jsonl")])
        found += text_to_image.evaluate(model, prompts, batch_size=BATCH, decode=DRAW, out=self.out / "images")
        write_results(self.out / "scores.json", found)
        self._sheet(model, prompts[:SHOWN])

    def _untrained(self) -> ImageTokenizer:
        """The same tokenizer before its first stage, behind the same frozen tower."""
        from unitok.training.tokenizer import build

        overrides = [*self.changes.get(CODES, ()), *(f"{k}={v}" for k, v in self._moved(CODES) if k != "init_from")]
        recipe = load_recipe(CODES, [*overrides, "init_from=null"])
        assert isinstance(recipe, TokenizerRecipe)
        return build(recipe)

    def _sheet(self, model: UnifiedModel, rows: Sequence[Mapping[str, Any]]) -> None:
        """The prompts' real pictures, drawn from their own codes, and what the model draws of the prompts."""
        from unitok.data.sources import read_image
        from unitok.eval.images import contact_sheet

        real = [read_image(row["image"]) for row in rows]
        parts: list[Any] = model.encode(real)
        codes = [(NAME, part.codes, part.grid) for part in parts]
        drawn = model.images([row["prompt"] for row in rows], seed=0, **DRAW)
        strips = {"pictures": real, "drawn from their codes": model.pictures(codes), "drawn from their captions": drawn}
        contact_sheet(strips).save(self.out / "sheet.png")

    def report(self) -> None:
        scores = read_json(self.out / "scores.json")["scores"]
        write_json(self.out / "report.json", {"seconds": self.seconds, "scores": scores})
        for score in scores:
            beside = ", ".join(f"{name} {value:.3f}" for name, value in score["baselines"].items())
            self.console.print(f"  {score['name']} {score['value']:.3f} (n {score['n']}; {beside})", highlight=False)

    def _moved(self, file: str) -> list[tuple[str, Path]]:
        """The paths of a recipe, in `out`."""
        return [(key, self.out / Path(value).relative_to(HERE)) for key, value in _paths(file)]

    def _source(self, name: str) -> DataSource:
        return DataSource(path=str(self.out / "data" / name))


def _paths(file: str) -> list[tuple[str, str]]:
    """Where a recipe points into HERE: (key with dots, path)."""
    found: list[tuple[str, str]] = []

    def walk(key: str, value) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, item in items:
            walk(f"{key}.{name}" if key else str(name), item)
        if isinstance(value, str) and Path(value).is_relative_to(HERE):
            found.append((key, value))

    walk("", yaml.safe_load(Path(file).read_text()))
    return found
