"""Trains a detokenizer from a recipe; `run.py` says what a run leaves in `out` and how it goes on.

A picture's condition is made of exactly the parts that the detokenizer takes: codes of the recipe's tokenizer, vectors
that it embeds them as or that the recipe's CLIP sees, captions. Codes and CLIP's vectors of pictures that are kept in
memory are computed once.

Samples show originals, what is drawn from their conditions, and the control: what is drawn from another picture's.

With `distill` the run halves the steps of sampling until they are few (progressive distillation, Salimans and Ho 2022,
arXiv 2202.00512): each student starts as its teacher's copy, and its average is the next one's teacher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from unitok import detokenizers
from unitok.checkpoint import open_folder, state_hash
from unitok.config import DetokenizerRecipe
from unitok.detokenizers.base import Condition, Detokenizer, load_detokenizer
from unitok.nn.vision import scaled
from unitok.tokenizers.base import fit, load_tokenizer, to_tensor
from unitok.training.clip import RESIZE, pixel_values
from unitok.training.run import (
    TrainingRun,
    check_arguments,
    check_same,
    constructor_arguments,
    lr_factor,
    psnr,
    rows_of,
)

AT_ONCE = 256  # pictures encoded together
FITTED = 4096  # pictures whose vectors say how vectors are normalised
CODE_ARGUMENTS = ("codebook_sizes", "grid", "codes_as")
VECTOR_ARGUMENTS = ("vector_size", "vectors_as")


def train(recipe: DetokenizerRecipe) -> Path:
    """Run the recipe, or go on where it stopped; returns the folder of the finished detokenizer.

    KeyboardInterrupt after SIGINT or SIGTERM, with a checkpoint written. ValueError where the recipe, the data or an
    older checkpoint do not fit, or the loss is no longer finite.
    """
    if recipe.flush_denormal:
        torch.set_flush_denormal(True)  # before the first operation: worker threads inherit it
    return DetokenizerRun(recipe).run()


# ---- what pictures are drawn from


class Source:
    """What a picture is drawn from beside its caption: here nothing, in subclasses what a frozen network sees in it.

    Attributes:
        digest: hash of the network's weights.
        image_size: of the pictures it sees; None: any.
        resize: the rule by which pictures are brought to a size.
    """

    digest: str = ""
    image_size: int | None = None
    resize: str = RESIZE

    def see(self, images: Tensor) -> Tensor:
        """float [B, 3, S, S] in [0, 1] -> [B, ...], which is kept of each picture."""
        return torch.empty(len(images), 0)

    def condition(self, kept: Tensor, detokenizer: Detokenizer) -> Condition:
        """Of what was kept of each picture, on the device."""
        return Condition()

    def sizes(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a detokenizer that follow from the source; given: those of the recipe."""
        return {}


class TokenizerSource(Source):
    """Codes of an image tokenizer, and what it embeds them as."""

    def __init__(self, path: str, device: torch.device):
        self.tokenizer = load_tokenizer(path, device).requires_grad_(False)
        self.image_size, self.resize = self.tokenizer.image_size, self.tokenizer.resize
        self.digest = state_hash(self.tokenizer.own_state())

    def see(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images).to(torch.int32)

    @torch.no_grad()
    def condition(self, kept: Tensor, detokenizer: Detokenizer) -> Condition:
        return detokenizer.condition_of(self.tokenizer, kept.long(), self.tokenizer.grid())

    def sizes(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of codes, unless the recipe has arguments of vectors and none of codes."""
        tokenizer = self.tokenizer
        found: dict[str, Any] = {"image_size": self.image_size}
        vectors = any(given.get(name) is not None for name in VECTOR_ARGUMENTS)
        if any(given.get(name) is not None for name in CODE_ARGUMENTS) or not vectors:
            found |= {"codebook_sizes": list(tokenizer.codebook_sizes), "grid": list(tokenizer.grid())}
        if vectors:
            codes = torch.zeros(1, math.prod(tokenizer.grid()), dtype=torch.int64)
            found |= {"vector_size": tokenizer.embed(codes).shape[2]}
        return found


class ClipSource(Source):
    """The projected image embedding of a transformers CLIPModel: one vector a picture, not normalised."""

    def __init__(self, path: str, device: torch.device):
        from transformers import CLIPModel

        self.clip: Any = CLIPModel.from_pretrained(open_folder(path)).eval().requires_grad_(False)
        self.clip.to(device)
        self.image_size = self.clip.config.vision_config.image_size
        self.digest = state_hash(self.clip.state_dict())

    def see(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.clip.get_image_features(pixel_values=pixel_values(images * 255)).pooler_output[:, None]

    def condition(self, kept: Tensor, detokenizer: Detokenizer) -> Condition:
        return Condition(vectors=kept)

    def sizes(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"image_size": self.image_size, "vector_size": self.clip.config.projection_dim}


# ---- the detokenizer


def build(recipe: DetokenizerRecipe, source: Source) -> Detokenizer:
    """The recipe's detokenizer, new or from `init_from`; sizes that it leaves out are the source's.

    ValueError for a wrong name or argument, and for a size that is given and is not the source's.
    """
    assert recipe.detokenizer is not None
    cls, given = detokenizers.get(recipe.detokenizer.name), recipe.detokenizer.arguments
    known, what = constructor_arguments(cls), f"detokenizer {recipe.detokenizer.name!r}"
    check_arguments(what, given, known)
    sizes = {name: value for name, value in source.sizes(given).items() if name in known}
    for name, value in sizes.items():
        if name != "image_size" and given.get(name) not in (None, value):
            whose = "tokenizer" if recipe.tokenizer else "clip"
            raise ValueError(f"{what}: {name} is {given[name]}, that of the {whose} {value}; leave it out")
    detokenizer = cls(**{**sizes, **{name: value for name, value in given.items() if value is not None}})
    if recipe.init_from:
        detokenizer.load_own_state(load_detokenizer(recipe.init_from).own_state(), what=recipe.init_from)
    return detokenizer


def student_of(teacher: Detokenizer, steps: int) -> Detokenizer:
    """A copy that samples in `steps` steps unless told otherwise, and needs no guidance: it learns what is guided."""
    cls = type(teacher)
    if not hasattr(cls, "distill_loss"):
        raise ValueError(f"{cls.__name__} cannot be distilled: it has no distill_loss")
    student = cls(**{**teacher.config, "steps": steps, "guidance": 1.0})
    student.load_own_state(teacher.own_state(), what="the teacher's weights")
    return student


# ---- the run


class DetokenizerRun(TrainingRun):
    """The state of one training run: a detokenizer, what it draws from, and its teacher where it has one."""

    kind = "detokenizer"
    shown = "originals, drawn from theirs, drawn from others' conditions"

    def __init__(self, recipe: DetokenizerRecipe):
        torch.manual_seed(recipe.seed)
        device = PartialState().device  # that of the Accelerator
        self.source = Source()
        if recipe.tokenizer:
            self.source = TokenizerSource(recipe.tokenizer, device)
        elif recipe.clip:
            self.source = ClipSource(recipe.clip, device)
        self.frozen = {"the source's weights": self.source.digest}  # hashes of what must not change under a run
        self.teacher: Any = None  # of a class that has distill_loss
        self.detokenizer: Any
        if recipe.distill:
            self.teacher = load_detokenizer(recipe.distill.teacher, device).requires_grad_(False)
            self.detokenizer = student_of(self.teacher, recipe.distill.stop)
            name = f"{recipe.distill.teacher} to {recipe.distill.stop} steps"
            self.frozen["the teacher's weights"] = state_hash(self.teacher.own_state())
        else:
            assert recipe.detokenizer is not None
            self.detokenizer, name = build(recipe, self.source), recipe.detokenizer.name
        size = self.detokenizer.image_size
        super().__init__(
            recipe,
            self.detokenizer,
            name,
            lambda image: to_tensor(fit(image, size, self.source.resize)),
            size,
            captioned=recipe.texts,
            partly=True,  # a null that no picture of a batch needs
        )
        self._check_condition()
        self.kept: Tensor | None = None
        if self.pictures.cache is not None:
            self.kept = torch.cat([self._see(some).cpu() for some in self.pictures.cache.split(AT_ONCE)])
        if not (recipe.init_from or recipe.distill):
            kept = self._see(self._some(FITTED)) if self.kept is None else self.kept[:FITTED]
            vectors = self._condition(kept, None).vectors
            if vectors is not None:
                self.detokenizer.fit_vectors(vectors.cpu())
        self.begin([p for p in self.detokenizer.parameters() if p.requires_grad], self._loss)

    def _check_condition(self) -> None:
        texts = ["a"] if self.pictures.captioned else None
        condition = self._condition(self._see(self._some(1)), texts)
        if lacks := self.detokenizer.takes - condition.parts():
            raise ValueError(
                f"{self.name} takes {' and '.join(sorted(self.detokenizer.takes))}, and the recipe has no "
                f"{' and no '.join(sorted(lacks))}: tokenizer gives codes or vectors, clip vectors, texts: true texts"
            )

    def _some(self, count: int) -> Tensor:
        return next(self.pictures.batches(0, 1, min(count, self.pictures.count)))

    def _see(self, images: Tensor) -> Tensor:
        """What is kept of pictures uint8 [B, 3, S, S], which the source may see in another size."""
        floats, size = self.floats(images), self.source.image_size
        return self.source.see(floats if size is None else scaled(floats, size))

    def _condition(self, kept: Tensor, texts: list[str] | None) -> Condition:
        condition = self.source.condition(kept.to(self.accelerator.device), self.detokenizer)
        return condition if texts is None else replace(condition, texts=texts)

    def batch(self, index: Tensor, images: Tensor) -> dict[str, Any]:
        kept = self._see(images) if self.kept is None else self.kept[index]
        texts = self.pictures.texts(index, self.step) if self.pictures.captioned else None
        return {**super().batch(index, images), "condition": self._condition(kept, texts)}

    def _loss(self, batch: Mapping[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, condition = batch["images"], batch["condition"]
        if self.teacher is None:
            return self.detokenizer.loss(images, condition, step)
        return self.detokenizer.distill_loss(self.teacher, images, condition, step, self.sampling_steps)

    # ---- distillation

    def _halving(self, step: int) -> int:
        """Which halving a step is part of."""
        return step * self.recipe.distill.halvings // self.recipe.steps

    @property
    def sampling_steps(self) -> int:
        """Steps that the student of now is to take."""
        distill = self.recipe.distill
        return distill.start >> (self._halving(min(self.step, self.recipe.steps - 1)) + 1)

    def lr(self) -> float:
        r = self.recipe
        if r.distill is None:
            return super().lr()
        count, now = r.distill.halvings, self._halving(self.step)
        first, end = (-(-n * r.steps // count) for n in (now, now + 1))  # the steps of this halving
        return r.lr * lr_factor(self.step - first, end - first, r.warmup, r.schedule)

    def after_step(self) -> None:
        r = self.recipe
        if r.distill is None or self.step == r.steps or self._halving(self.step) == self._halving(self.step - 1):
            return
        if self.ema:
            self.detokenizer.load_own_state(self.ema.average, what="their average")
            self.ema.updates = 0
        self._follow(self.detokenizer.own_state())
        self.optimizer.state.clear()  # moments of another target

    def _follow(self, state: dict[str, Tensor]) -> None:
        """Make a student of this state the teacher."""
        self.teacher = student_of(self.detokenizer, self.recipe.distill.stop)
        self.teacher.load_own_state(state, what="the student's weights")
        self.teacher.requires_grad_(False).eval().to(self.accelerator.device)

    def more_state(self) -> dict[str, Any]:
        """The teacher, from the first halving on: before it is that of the recipe."""
        later = self.teacher is not None and self._halving(self.step) > 0
        return {"teacher": self.teacher.own_state() if later else None, "frozen": self.frozen}

    def load_more(self, state: Mapping[str, Any]) -> None:
        check_same(state.get("frozen", self.frozen), self.frozen, self.folder)
        if state["teacher"]:
            self._follow(state["teacher"])

    # ---- what the user sees

    def _draw(self, images: Tensor, texts: list[str] | None) -> tuple[Tensor, Tensor]:
        """uint8 [n, 3, S, S] -> float [n, 3, S, S] drawn from their conditions, and from each other's."""
        condition = self._condition(self._see(images), texts)
        steps = self.sampling_steps if self.teacher else None
        guidance, seeds = self.detokenizer.guidance, range(len(images))

        def draw(given: Condition) -> Tensor:
            return self.detokenizer.generate(given, seeds=seeds, guidance=guidance, steps=steps)

        return draw(condition), draw(condition.rows([*range(1, len(images)), 0]))

    def _held_texts(self, first: int, count: int) -> list[str] | None:
        captions = self.pictures.held_out_captions[first : first + count]
        return [options[0] for options in captions] if self.pictures.captioned else None

    def sheet(self, images: Tensor) -> Tensor:
        """float [3, 3 S, n S]: originals, drawn from their conditions, drawn from each other's."""
        if len(self.pictures.held_out) == 0 and self.pictures.captioned:
            raise ValueError("pictures drawn from captions are shown of held-out pictures: raise eval_images")
        return rows_of(self.floats(images), *self._draw(images, self._held_texts(0, len(images)))).cpu()

    def scores(self, images: Tensor) -> tuple[dict[str, float], str | None]:
        """Mean PSNR in dB of pictures drawn from their own conditions and from each other's, and the first's error."""
        both: tuple[list[Tensor], list[Tensor]] = ([], [])
        for first in range(0, len(images), AT_ONCE):
            some = images[first : first + AT_ONCE]
            for values, drawn in zip(both, self._draw(some, self._held_texts(first, len(some))), strict=True):
                values.append(psnr(drawn, self.floats(some)).cpu())
        own, shuffled = (torch.cat(values) for values in both)
        error = (own.std(unbiased=False) / math.sqrt(len(own))).item()
        return {"psnr": own.mean().item(), "psnr_shuffled": shuffled.mean().item(), "psnr_error": error}, None

    def report(self, found: dict[str, float]) -> list[dict[str, Any]]:
        margin = 1.96 * found["psnr_error"]
        return [
            {
                "name": "psnr",
                "value": found["psnr"],
                "n": len(self.pictures.held_out),
                "interval": [found["psnr"] - margin, found["psnr"] + margin],
                "baselines": {"untrained": self.untrained["psnr"], "shuffled": found["psnr_shuffled"]},
                "protocol": {
                    "unit": "dB",
                    "pictures": "held out of the training data",
                    "condition": sorted(self.detokenizer.takes),
                    "source": self.source.digest,
                    "sampling_steps": getattr(self.detokenizer, "steps", None),
                    "guidance": self.detokenizer.guidance,
                    "image_size": self.detokenizer.image_size,
                    "steps": self.step,
                },
            }
        ]
