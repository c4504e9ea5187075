"""Pictures as texts, held-out scenes: do a text-to-image model and the words of a De-Diffusion tokenizer hold?

    python -m unitok.data.scene_files out/dediffusion_test --validation 1024 --test 512 --setting base --seed 9
    python benchmarks/dediffusion.py --second out/generator/second --tokenizer out/dediffusion/tokenizer

Gate      denoising loss of both generators under the true captions, beside those of other pictures and empty ones
Guidance  captions drawn at scales of 1 to 8, read by the judge: readable, exact, shape and colour
Texts     those that a tokenizer writes of pictures, drawn by the generator and by the second one, which it never met:
          shape and colour of the picture, beside drawings of other pictures' texts; true captions through the same
Untrained the same by generators before their training; the interval is over generators, for what one of them makes of
          a text by chance it makes of every picture's
Losses    denoising loss under a tokenizer's words, beside those of other pictures, empty and true captions

Shape and colour is the share of a picture's things whose pair of both is found in the drawing: of drawings that the
judge can read (`things`; in others nothing is found), and of its best drawing of whatever is there (`things_best`).
Gate and guidance use validation pictures, texts and losses test pictures. Every picture of both has a pair of shape and
colour that no training showed. Prints JSON lines; intervals are of the paired difference of ours and peer, 95 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# a script's folder comes first on sys.path, and tokenizers.py in it stands for the library of that name
sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]

import torch
from torch import Tensor

from unitok.config import DataSource
from unitok.data.scenes import Claim, Scene
from unitok.data.sources import read_image
from unitok.detokenizers.base import Condition, load_detokenizer
from unitok.detokenizers.text_to_image import TextToImageDetokenizer
from unitok.eval import judge
from unitok.eval.denoising import LEVELS, Advantage, advantages, denoising_losses, others, passes, with_controls
from unitok.eval.progress import batches, row_seed
from unitok.eval.results import mean, paired_difference
from unitok.eval.text_to_image import load_prompts, score_readings, things_kept
from unitok.tokenizers.base import ImageTokenizer, fit, load_tokenizer, to_pil, to_tensor
from unitok.tokenizers.dediffusion import DeDiffusionTokenizer

SCALES = (1.0, 2.0, 3.0, 5.0, 8.0)
BATCH = 50
SHOWN = 6  # texts that are printed
UNTRAINED = range(1, 9)  # seeds of untrained generators: guided, each tints its noise by the text in a way of its own
UNTRAINED_STEPS = 5  # noise is what comes of any
STUDENT = 2.365  # 97.5 % of Student's t with as many degrees of freedom as there are untrained generators, less one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", default="out/generator/first", help="detokenizer folder")
    parser.add_argument("--second", help="detokenizer folder of the independent one")
    parser.add_argument("--tokenizer", nargs="*", default=[], help="folders of tokenizers whose vocabulary is text")
    parser.add_argument("--data", type=Path, default=Path("out/dediffusion_test"))
    parser.add_argument("--n", type=int, default=500, help="test pictures")
    parser.add_argument("--few", type=int, default=256, help="validation pictures of gate and guidance")
    parser.add_argument("--levels", type=int, default=LEVELS, help="of noise")
    parser.add_argument("--scale", type=float, help="guidance of texts; default: the generator's own")
    parser.add_argument("--sheet", type=Path, help="PNG: pictures, and drawings of their texts by each generator")
    parser.add_argument("--only", nargs="*", help="gate, guidance, texts, untrained, losses")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    for name in arguments.only or ("gate", "guidance", "texts", "untrained", "losses"):
        getattr(bench, name)()


# ---- pictures and what is drawn


@dataclass(frozen=True)
class Rows:
    """Held-out pictures: ids, captions, what is in them, and where their files are."""

    ids: list[str]
    captions: list[str]
    claims: list[Claim]
    paths: list[Path]

    @classmethod
    def load(cls, path: Path, limit: int) -> Rows:
        rows = load_prompts([DataSource(path=str(path), limit=limit)])
        ids = [f"{path.stem}:{number}" for number in range(len(rows))]
        claims = [Claim.from_dict(row["claim"]) for row in rows]
        return cls(ids, [row["prompt"] for row in rows], claims, [row["image"] for row in rows])

    def images(self, size: int) -> Tensor:
        return torch.stack([to_tensor(fit(read_image(path), size, "squash-bicubic")) for path in self.paths])


def opened(folder: str) -> TextToImageDetokenizer:
    generator = load_detokenizer(folder)
    if not isinstance(generator, TextToImageDetokenizer):
        raise SystemExit(f"{folder} draws from no texts")
    return generator


def draw(generator: TextToImageDetokenizer, texts: Sequence[str], ids: Sequence[str], scale: float | None) -> Tensor:
    """float [n, 3, S, S]; the noise of a drawing is its row's own, whatever the text and generator."""
    guidance, made = generator.guidance if scale is None else scale, []
    for places in batches(range(len(texts)), BATCH, "draw"):
        condition = Condition(texts=[texts[i] for i in places])
        seeds = [row_seed(0, "draw", ids[i]) for i in places]
        made.append(generator.generate(condition, seeds=seeds, guidance=guidance))
    return torch.cat(made)


# ---- rows of the table


class Bench:
    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.tokenizers: dict[str, ImageTokenizer] = {folder: load_tokenizer(folder) for folder in arguments.tokenizer}
        for folder, tokenizer in self.tokenizers.items():
            if tokenizer.vocabulary != "text":
                raise SystemExit(f"{folder} writes no texts: its vocabulary is {tokenizer.vocabulary}")

    @cached_property
    def generators(self) -> dict[str, TextToImageDetokenizer]:
        given = {"first": self.arguments.generator, "second": self.arguments.second}
        return {name: opened(folder) for name, folder in given.items() if folder}

    @cached_property
    def validation(self) -> Rows:
        return Rows.load(self.arguments.data / "validation_prompts.jsonl", self.arguments.few)

    @cached_property
    def test(self) -> Rows:
        return Rows.load(self.arguments.data / "test_prompts.jsonl", self.arguments.n)

    def gate(self) -> None:
        for name, generator in self.generators.items():
            found = self._losses(generator, self.validation, with_controls(self.validation.captions))
            held = passes(found)
            for other, advantage in found.items():
                say_loss(f"gate_{name}_true_{other}", advantage, passes=held)

    def guidance(self) -> None:
        rows = self.validation
        for scale in SCALES:
            drawings = judge.draw(draw(self.generators["first"], rows.captions, rows.ids, scale))
            read = dict(zip(rows.ids, map(readable, drawings), strict=True))
            scores = {s.name: s for s in score_readings(dict(zip(rows.ids, rows.claims, strict=True)), read)}
            for what in ("readable", "exact", "pairs"):
                score = scores[f"t2i_{what}"]
                say(f"guidance_{scale:g}_{what}", score.value, score.baselines.get("shuffled_captions"), "share",
                    score.n, interval_of_ours=rounded(score.interval))  # fmt: skip
            self._things(f"guidance_{scale:g}", rows.claims, drawings)

    def texts(self) -> None:
        rows, size = self.test, self.generators["first"].image_size
        self._things("texts_pictures_themselves", rows.claims, judge.draw(rows.images(size)))
        for source, texts in self._sources():
            print(json.dumps({"name": f"texts_{source}", "texts": texts[:SHOWN], "n": len(set(texts))}), flush=True)
            shown = [rows.images(size)[:16]]
            for name, generator in self.generators.items():
                made = draw(generator, texts, rows.ids, self.arguments.scale)
                self._things(f"texts_{source}_{name}", rows.claims, judge.draw(made))
                shown.append(made[:16])
            if self.arguments.sheet:
                sheet(shown, self.arguments.sheet.with_stem(f"{self.arguments.sheet.stem}_{Path(source).name}"))

    def untrained(self) -> None:
        rows, config = self.test, self.generators["first"].config
        if not config.get("components"):
            raise SystemExit(f"{self.arguments.generator} is no new pipeline: there is none before its training")
        generators = []
        for seed in UNTRAINED:
            torch.manual_seed(seed)
            generators.append(TextToImageDetokenizer(**{**config, "steps": UNTRAINED_STEPS}).eval())
        for source, texts in self._sources():
            found: list[tuple[float, float]] = []
            for generator in generators:
                drawings = judge.draw(draw(generator, texts, rows.ids, self.arguments.scale))
                own, peers = things_of(rows.claims, drawings, best)
                found.append((mean(own), mean(peers)))
            ours, peer = (mean([pair[side] for pair in found]) for side in (0, 1))
            differences = [own - peers for own, peers in found]
            margin = STUDENT * statistics.stdev(differences) / len(found) ** 0.5
            say(f"untrained_{source}_things_best", ours, peer, "share", len(found), difference=round(ours - peer, 4),
                interval=rounded((ours - peer - margin, ours - peer + margin)),
                each=rounded(differences))  # fmt: skip

    def _sources(self) -> Iterator[tuple[str, list[str]]]:
        yield "captions", self.test.captions
        for name in self.tokenizers:
            yield name, self._written(name)[1]

    def losses(self) -> None:
        for folder, tokenizer in self.tokenizers.items():
            codes, texts = self._written(folder)
            for name, generator in self.generators.items():
                given: dict[str, Any] = {**with_controls(texts, "own"), "true": self.test.captions}
                if name == "first" and isinstance(tokenizer, DeDiffusionTokenizer):
                    given["codes"] = generator.pipeline.frame(codes)  # what `own` is where texts are read as other ids
                for other, advantage in self._losses(generator, self.test, given, of="own").items():
                    say_loss(f"losses_{folder}_{name}_own_{other}", advantage)

    # ---- helpers

    def _losses(
        self, generator: TextToImageDetokenizer, rows: Rows, texts: Mapping[str, Any], of: str = "true"
    ) -> dict[str, Advantage]:
        images = rows.images(generator.image_size)
        return advantages(denoising_losses(generator.pipeline, images, texts, levels=self.arguments.levels), of)

    def _written(self, folder: str) -> tuple[Tensor, list[str]]:
        """Codes and texts of the test pictures."""
        tokenizer, codes = self.tokenizers[folder], []
        for some in self.test.images(tokenizer.image_size).split(BATCH):
            codes.append(tokenizer.encode(some))
        return torch.cat(codes), tokenizer.to_text(torch.cat(codes))

    def _things(self, name: str, claims: Sequence[Claim], drawings: Sequence[judge.Drawing]) -> None:
        for what, of in (("things", readable), ("things_best", best)):
            say_difference(f"{name}_{what}", *things_of(claims, drawings, of))


def things_of(
    claims: Sequence[Claim], drawings: Sequence[judge.Drawing], of: Callable[[judge.Drawing], Scene | None]
) -> tuple[list[float], list[float]]:
    """Shape and colour of the claims in drawings of their own texts, and in those of other rows' texts, row by row."""
    reads, other = [of(drawing) for drawing in drawings], others(len(claims))
    own = [things_kept(claim, read) for claim, read in zip(claims, reads, strict=True)]
    return own, [things_kept(claim, reads[i]) for claim, i in zip(claims, other, strict=True)]


def readable(drawing: judge.Drawing) -> Scene | None:
    return drawing.scene if drawing.readable else None


def best(drawing: judge.Drawing) -> Scene | None:
    return drawing.scene


def say_difference(name: str, ours: Sequence[float], peer: Sequence[float]) -> None:
    difference, interval = paired_difference(peer, ours)
    say(name, mean(ours), mean(peer), "share", len(ours), difference=round(difference, 4), interval=rounded(interval))


def rounded(interval: Sequence[float]) -> list[float]:
    return [round(end, 5) for end in interval]


def say(name: str, ours: float, peer: float | None, unit: str, n: int, *, ratio: float | None = None, **more) -> None:
    """A line; ratio: above 1 where ours is better; default: where it is more."""
    if ratio is None and peer:
        ratio = ours / peer
    line = {"name": name, "ratio": ratio and round(ratio, 3), "ours": round(ours, 5), "peer": peer and round(peer, 5),
            "unit": unit, "runs": 1, "spread": 0.0, "n": n, **more}  # fmt: skip
    print(json.dumps(line), flush=True)


def say_loss(name: str, found: Advantage, **more) -> None:
    say(name, found.ours, found.other, "mean squared error", found.n, ratio=found.other / found.ours,
        difference=round(found.value, 5), interval=rounded(found.interval), **more)  # fmt: skip


def sheet(rows: Sequence[Tensor], path: Path) -> None:
    picture = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).clamp(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(picture).resize((picture.shape[2] * 3, picture.shape[1] * 3), 0).save(path)


if __name__ == "__main__":
    main()
