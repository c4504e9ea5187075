"""The contract of detokenizers: codes, vectors or texts to pixels, other than by the tokenizer's own decoder.

Shapes: B images, N tokens, M vectors of size D, H x W pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unitok import checkpoint
from unitok.manifest import Manifest
from unitok.nn.pretrained import Pretrained, lacking, read_section


@dataclass
class Condition:
    """What a picture is made from; any part may be missing. The caller builds it.

    Attributes:
        codes: int64 [B, N].
        grid: the grid of the codes.
        vectors: float [B, M, D], from a tokenizer's `embed`.
        texts: B strings.
    """

    codes: Tensor | None = None
    grid: tuple[int, ...] | None = None
    vectors: Tensor | None = None
    texts: Sequence[str] | None = None

    def parts(self) -> frozenset[str]:
        """Names of the parts that are there, of "codes", "vectors", "texts"."""
        return frozenset(n for n in ("codes", "vectors", "texts") if getattr(self, n) is not None)

    def __len__(self) -> int:
        """B. ValueError where there is no part, or the parts disagree."""
        sizes = {name: len(getattr(self, name)) for name in sorted(self.parts())}
        if not sizes:
            raise ValueError("the condition is empty: give codes, vectors or texts")
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the parts of the condition disagree on the number of images: {sizes}")
        return next(iter(sizes.values()))

    def rows(self, index: slice | Sequence[int]) -> Condition:
        """The condition of some of its images."""
        chosen = range(len(self))[index] if isinstance(index, slice) else index
        picked: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                picked[f.name] = value[list(chosen)]
            elif f.name == "texts" and value is not None:
                picked[f.name] = [value[i] for i in chosen]
        return replace(self, **picked)

    def to(self, device: torch.device | str) -> Condition:
        there = [n for n in ("codes", "vectors") if getattr(self, n) is not None]
        moved: dict[str, Any] = {n: getattr(self, n).to(device) for n in there}
        return replace(self, **moved)


class Detokenizer(Pretrained):
    """Base of every detokenizer.

    `generate` of a subclass is wrapped: its condition, seeds and guidance are checked, it runs without gradients, and
    the condition is on the module's device. A picture depends on its own seed and condition, never on its batch:
    draw noise from `generators(seeds)`. Guidance 1 runs the conditional branch alone.
    """

    takes: frozenset[str]  # parts of a Condition it can use, of "codes", "vectors", "texts"
    image_size: int
    guidance: float = 1.0  # the scale that suits it, for callers that are told none

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "generate" in cls.__dict__:
            cls.generate = _checked_generate(cls.__dict__["generate"])  # type: ignore[method-assign]

    def generate(
        self,
        condition: Condition,
        *,
        seeds: Sequence[int],
        guidance: float = 1.0,
        steps: int | None = None,
        negative: Condition | None = None,
    ) -> Tensor:
        """One seed an image -> float [B, 3, H, W] in [0, 1]."""
        raise lacking(self, "generate")

    def loss(self, images: Tensor, condition: Condition, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """images float [B, 3, H, W] in [0, 1] -> (scalar, dict of detached scalars)."""
        raise lacking(self, "loss")

    def fit_vectors(self, vectors: Tensor) -> None:
        """Take what normalises vectors from these of the training data, [n, M, D]; called once, before training."""

    @classmethod
    def tiny(cls) -> Detokenizer:
        """A small one for tests: no network, seconds on one core."""
        raise lacking(cls, "tiny")

    def condition_of(self, tokenizer: Any, codes: Tensor, grid: tuple[int, ...] | None = None) -> Condition:
        """int64 [B, N] of an image tokenizer -> the codes, and what else of them this detokenizer takes."""
        vectors = tokenizer.embed(codes, grid) if "vectors" in self.takes else None
        texts = tokenizer.to_text(codes) if "texts" in self.takes and tokenizer.vocabulary == "text" else None
        return Condition(codes=codes, grid=grid, vectors=vectors, texts=texts)

    def check_condition(self, condition: Condition) -> None:
        """ValueError unless the condition has a part this detokenizer takes, well formed."""
        if not condition.parts() & self.takes:
            raise ValueError(
                f"{type(self).__name__} takes {' or '.join(sorted(self.takes))}; "
                f"the condition has {', '.join(sorted(condition.parts())) or 'nothing'}"
            )
        len(condition)
        codes, vectors = condition.codes, condition.vectors
        if codes is not None and (codes.dtype != torch.int64 or codes.ndim != 2):
            raise ValueError(f"condition codes must be int64 [B, N], got {codes.dtype} {tuple(codes.shape)}")
        if vectors is not None and (not vectors.is_floating_point() or vectors.ndim != 3):
            raise ValueError(f"condition vectors must be float [B, M, D], got {vectors.dtype} {tuple(vectors.shape)}")
        if vectors is not None and not torch.isfinite(vectors).all():
            raise ValueError("condition vectors must be finite, got NaN or infinity")

    def generators(self, seeds: Sequence[int]) -> list[torch.Generator]:
        """One CPU generator an image, so that a picture does not depend on its batch or on the device."""
        return [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def manifest(self) -> Manifest:
        return Manifest(detokenizer=detokenizer_section(self))

    @staticmethod
    def section_of(manifest: Manifest) -> dict[str, Any] | None:
        return manifest.detokenizer


def _checked_generate(method: Callable) -> Callable:
    @functools.wraps(method)
    @torch.no_grad()
    def generate(
        self: Detokenizer,
        condition: Condition,
        *,
        seeds: Sequence[int],
        guidance: float = 1.0,
        steps: int | None = None,
        negative: Condition | None = None,
    ) -> Tensor:
        self.check_condition(condition)
        if len(seeds) != len(condition):
            raise ValueError(f"one seed an image is needed: {len(condition)} images, {len(seeds)} seeds")
        if not math.isfinite(guidance) or guidance < 0:
            raise ValueError(f"guidance must be a number of 0 or more, got {guidance}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be 1 or more, got {steps}")
        if negative is not None:
            self.check_condition(negative)
            if len(negative) != len(condition):
                raise ValueError(f"the negative condition has {len(negative)} images, the condition {len(condition)}")
            negative = negative.to(self.device)
        return method(self, condition.to(self.device), seeds=seeds, guidance=guidance, steps=steps, negative=negative)

    return generate


def detokenizer_section(detokenizer: Detokenizer) -> dict[str, Any]:
    """What a manifest says about a detokenizer."""
    from unitok import detokenizers

    return {
        "class": detokenizers.name_of(type(detokenizer)),
        **detokenizer.hashes(),
        "image_size": detokenizer.image_size,
        "takes": sorted(detokenizer.takes),
        "pixels": "float01",
    }


def load_detokenizer(
    path_or_hub_id: str | Path, device: str | torch.device = "cpu", *, revision: str | None = None
) -> Detokenizer:
    """A saved detokenizer (a folder or a Hub id), in eval mode. ValueError where its files do not fit together."""
    from unitok import detokenizers

    folder = checkpoint.open_folder(path_or_hub_id, revision=revision)
    section = read_section(Detokenizer, folder)
    return detokenizers.get(section["class"]).from_pretrained(folder, map_location=device)
