"""A diffusion detokenizer on held-out scenes: does it draw what its codes say, and how fast?

    python -m unitok.data.scene_files out/detokenizer_test --test 512 --seed 9
    python benchmarks/detokenizer.py DETOKENIZER [--tokenizer T | --clip FOLDER] [--distilled D ...] [--n 512]

Arms      the codes of the picture, those of another picture (shuffled), none (guidance 0), the tokenizer's own decoder:
          PSNR against the picture, and the share that the judge reads as the picture's whole scene
Guidance  0, 1, 2, 4, 8: the judge, and diversity: the standard deviation of a pixel over four seeds
Steps     the detokenizer with fewer steps, and distilled: the judge, and how much faster (the two take turns)
Inversion DDIM backwards, then forwards: the error after 20 to 1000 steps of each
bfloat16  the judge, beside float32

With --clip the detokenizer draws from one image embedding, and there is no decoder beside it. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# a script's folder comes first on sys.path, and tokenizers.py in it stands for the library of that name
sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]

import torch
from torch import Tensor

from unitok.data.scenes import satisfies
from unitok.data.sources import read_image
from unitok.detokenizers.base import Condition, load_detokenizer
from unitok.detokenizers.diffusion import DiffusionDetokenizer
from unitok.eval import judge
from unitok.eval.results import bootstrap, wilson
from unitok.eval.text_to_image import everything
from unitok.tokenizers.base import fit, to_pil, to_tensor
from unitok.training.detokenizer import ClipSource, TokenizerSource
from unitok.training.run import psnr

SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
BATCH = 64
RUNS = 5  # of either side, where times are compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detokenizer")
    parser.add_argument("--tokenizer", default="out/scenes_fsq")
    parser.add_argument("--clip")
    parser.add_argument("--distilled", nargs="*", default=[])
    parser.add_argument("--data", type=Path, default=Path("out/detokenizer_test"))
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--few", type=int, default=128, help="pictures of the rows on guidance, inversion and bfloat16")
    parser.add_argument("--only", nargs="*", help="arms, guidance, steps, inversion, bf16")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in (arguments.data / "test_captions.jsonl").read_text().splitlines()]
    rows = rows[: arguments.n]
    detokenizer = opened(arguments.detokenizer)
    bench = Bench(detokenizer, [arguments.data / row["image"] for row in rows], arguments)
    for name in arguments.only or ("arms", "guidance", "steps", "inversion", "bf16"):
        getattr(bench, name)()


def opened(folder: str) -> DiffusionDetokenizer:
    detokenizer = load_detokenizer(folder)
    if not isinstance(detokenizer, DiffusionDetokenizer):
        raise SystemExit(f"{folder} is no diffusion detokenizer")
    return detokenizer


class Bench:
    """The pictures, their scenes as the judge reads them, and their conditions."""

    def __init__(self, detokenizer: DiffusionDetokenizer, paths: Sequence[Path], arguments: argparse.Namespace):
        self.detokenizer, self.arguments = detokenizer, arguments
        device = torch.device("cpu")
        source = ClipSource(arguments.clip, device) if arguments.clip else TokenizerSource(arguments.tokenizer, device)
        self.tokenizer = source.tokenizer if isinstance(source, TokenizerSource) else None
        size = detokenizer.image_size
        self.images = torch.stack([to_tensor(fit(read_image(path), size, source.resize)) for path in paths])
        self.claims = [everything(scene) for scene in judge.read(self.images)]
        kept = torch.cat([source.see(some) for some in self.images.split(BATCH)])
        self.condition = source.condition(kept, detokenizer)
        self.other = torch.arange(len(paths)).roll(1)

    # ---- rows

    def arms(self) -> None:
        n = len(self.images)
        shuffled = self.condition.rows(self.other.tolist())
        made = {
            "real": self.draw(self.condition),
            "shuffled": self.draw(shuffled),
            "none": self.draw(self.condition, 0.0),
        }
        codes, grid = self.condition.codes, self.condition.grid
        if self.tokenizer is not None and codes is not None:
            with contextlib.suppress(NotImplementedError):  # a tokenizer without a decoder has none to stand beside
                made["decoder"] = torch.cat([self.tokenizer.decode(some, grid) for some in codes.split(BATCH)])
        scores = {name: (psnr(pictures, self.images), self.judged(pictures)) for name, pictures in made.items()}
        for name, (decibel, right) in scores.items():
            low, high = bootstrap(decibel.tolist(), seed=0)
            self.say(f"detokenizer_{name}_psnr", decibel.mean().item(), scores["shuffled"][0].mean().item(), "dB",
                     ratio=10 ** ((decibel.mean() - scores["shuffled"][0].mean()).item() / 10), n=n,
                     interval=[round(low, 2), round(high, 2)])  # fmt: skip
            share = right.mean().item()
            self.say(f"detokenizer_{name}_judged", share, scores["shuffled"][1].mean().item(), "share", n=n,
                     interval=[round(x, 4) for x in wilson(right.sum().item(), n)])  # fmt: skip
        self.sheet([self.images, *made.values()], "arms.png")

    def guidance(self) -> None:
        few = self.arguments.few
        some = self.condition.rows(slice(few))
        for scale in SCALES:
            drawn = torch.stack([self.draw(some, scale, seed=s) for s in range(4)])  # [4, few, 3, S, S]
            right = torch.cat([self.judged(pictures) for pictures in drawn]).mean().item()
            spread = drawn.std(0).mean().item()
            self.say(f"guidance_{scale:g}", right, None, "share", n=4 * few, diversity=round(spread, 4))

    def steps(self) -> None:
        full = self.judged(self.draw(self.condition)).mean().item()
        self.say(f"steps_{self.detokenizer.steps}", full, full, "share", n=len(self.images))
        fewer = [(f"undistilled_{count}", self.detokenizer, count) for count in (20, 8, 4)]
        students = [opened(folder) for folder in self.arguments.distilled]
        fewer += [(f"distilled_{student.steps}", student, student.steps) for student in students]
        for name, by, count in fewer:
            right = self.judged(self.draw(self.condition, steps=count, by=by)).mean().item()
            self.say(name, right, full, "share", n=len(self.images), **self._faster(by, count))

    def _faster(self, by: DiffusionDetokenizer, count: int) -> dict[str, Any]:
        """How often the time of `count` steps fits into that of all: the two take turns, and the median counts."""
        some, ratios = self.condition.rows(slice(BATCH)), []

        def seconds(drawer: DiffusionDetokenizer, steps: int | None) -> float:
            begun = time.perf_counter()
            self.draw(some, steps=steps, by=drawer)
            return time.perf_counter() - begun

        for _ in range(RUNS):
            ratios.append(seconds(self.detokenizer, None) / seconds(by, count))
        return {"faster": round(statistics.median(ratios), 2), "slowest": round(min(ratios), 2), "runs": RUNS}

    @torch.no_grad()
    def inversion(self) -> None:
        some = self.condition.rows(slice(self.arguments.few // 8))
        images = self.images[: len(some)]
        for count in (20, 50, 250, 1000):
            noise = self.detokenizer.invert(images, some, steps=count)
            again = self.detokenizer.draw(noise, some, steps=count)
            error = (again - images).square().mean().sqrt().item()
            self.say(f"inversion_{count}", error, None, "root mean squared error of pixels", n=len(some))

    def bf16(self) -> None:
        some, claims = self.condition.rows(slice(self.arguments.few)), self.claims[: self.arguments.few]
        plain = self.judged(self.draw(some)).mean().item()
        half = opened(self.arguments.detokenizer).to(torch.bfloat16)
        right = self.judged(self.draw(some, by=half)).mean().item()
        self.say("bfloat16", right, plain, "share", n=len(claims))

    # ---- helpers

    def draw(self, condition: Condition, guidance: float | None = None, *, seed: int = 0, steps: int | None = None,
             by: DiffusionDetokenizer | None = None) -> Tensor:  # fmt: skip
        by = by or self.detokenizer
        scale = by.guidance if guidance is None else guidance
        made = []
        for start in range(0, len(condition), BATCH):
            rows = list(range(start, min(start + BATCH, len(condition))))
            seeds = [1000 * seed + i for i in rows]
            made.append(by.generate(condition.rows(rows), seeds=seeds, guidance=scale, steps=steps).float())
        return torch.cat(made)

    def judged(self, pictures: Tensor) -> Tensor:
        """float [n]: 1 where the judge reads the whole scene of the real picture."""
        pairs = zip(judge.read(pictures.clamp(0, 1)), self.claims, strict=False)
        return torch.tensor([float(s is not None and c is not None and satisfies(s, c)) for s, c in pairs])

    def say(self, name: str, ours: float, peer: float | None, unit: str, **more) -> None:
        if "ratio" not in more:
            more["ratio"] = None if not peer else round(ours / peer, 3)
        line = {"name": name, "ratio": more.pop("ratio"), "ours": round(ours, 4), "peer": peer and round(peer, 4),
                "unit": unit, "runs": 1, "spread": 0.0, **more}  # fmt: skip
        if isinstance(line["ratio"], float) and math.isfinite(line["ratio"]):
            line["ratio"] = round(line["ratio"], 3)
        print(json.dumps(line), flush=True)

    def sheet(self, rows: Sequence[Tensor], name: str) -> None:
        picture = torch.cat([torch.cat(list(row[:16]), dim=2) for row in rows], dim=1)
        folder = Path(self.arguments.detokenizer) / "training"
        folder.mkdir(parents=True, exist_ok=True)
        to_pil(picture.clamp(0, 1)).resize((picture.shape[2] * 3, picture.shape[1] * 3), 0).save(folder / name)


if __name__ == "__main__":
    main()
