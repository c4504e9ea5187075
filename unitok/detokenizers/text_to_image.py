"""Text to pictures by a text-to-image pipeline of diffusers: a published one, by name, or a small one trained here.

Shapes: B images, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from unitok.detokenizers.base import Condition, Detokenizer
from unitok.nn.diffusion import draw_levels
from unitok.nn.frozen import Frozen
from unitok.nn.text_to_image import TINY, new_text_to_image, open_text_to_image
from unitok.nn.words import files_of

PIPELINE = "pipeline"  # in the folder of one that was trained: all of it as a folder of diffusers


class TextToImageDetokenizer(Frozen, Detokenizer):
    """Takes texts. One that was trained is also written to `pipeline/` in its folder, as a folder of diffusers.

    Guidance is away from the empty text, or from the texts of a negative condition.

    Args:
        pipeline: folder or Hub id, as `open_text_to_image` takes it. None: a new one, by `components`.
        revision: commit of a Hub id, which must be given.
        trained: train U-Net and text encoder of a named pipeline and keep them in the folder; else they stay frozen,
            by name. Those of a new one are trained, except a text encoder that is taken from a folder.
        components: without a pipeline, what `new_text_to_image` takes.
        steps: of sampling.
        guidance: the scale to use unless told otherwise; for callers, who pass it to `generate`.
        drop: probability of the empty text in training.
        min_snr: weigh levels in the loss by the signal-to-noise ratio up to this one (published: 5); None: all the
            same.
        shift: above 1, noisy levels are drawn more often in training: see `nn.diffusion.draw_levels`.
    """

    def __init__(
        self,
        pipeline: str | None = None,
        revision: str | None = None,
        trained: bool = False,
        components: Mapping[str, Any] | None = None,
        steps: int = 50,
        guidance: float = 3.0,
        drop: float = 0.1,
        min_snr: float | None = None,
        shift: float = 1.0,
    ):
        super().__init__()
        if pipeline is not None and components is None:
            self.pipeline = open_text_to_image(pipeline, revision)
        elif components is not None and pipeline is None:
            self.pipeline = new_text_to_image(components)
        else:
            raise ValueError("give the pipeline of a text-to-image model, or components to make a new one")
        for name, value in (("min_snr", min_snr), ("shift", shift)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.pipeline.process.grid(steps)
        self.named, self.trained = pipeline is not None, trained or pipeline is None
        self.steps, self.guidance, self.drop, self.min_snr, self.shift = steps, guidance, drop, min_snr, shift
        if not self.trained:
            self.freeze("pipeline")
        else:
            taken = isinstance((components or {}).get("text_encoder"), str)
            kept = {"pipeline.vae": self.named and self.pipeline.vae is not None, "pipeline.text_encoder": taken}
            self.freeze(*(name for name, holds in kept.items() if holds))
            if self.pipeline.vae is not None:
                self.pipeline.vae.requires_grad_(False)
        self.takes = frozenset({"texts"})
        self.image_size = self.pipeline.image_size

    def assets(self) -> dict[str, bytes]:
        """The text tokenizer of a new pipeline, beside the hashes of what is frozen."""
        return {**super().assets(), **({} if self.named else files_of(self.pipeline.tokenizer))}

    def load_assets(self, folder: Path) -> None:
        super().load_assets(folder)
        if not self.named:
            self.pipeline.tokenizer = AutoTokenizer.from_pretrained(folder)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        if self.trained:
            self.pipeline.save(Path(save_directory) / PIPELINE)
        return super().save_pretrained(save_directory, **options)

    def _states(self, texts: Sequence[str]) -> Tensor:
        return self.pipeline.encode(self.pipeline.ids(texts))

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
        assert condition.texts is not None
        states = self._states(condition.texts)
        if negative is not None and negative.texts is not None:
            unwanted = self._states(negative.texts)
        else:
            unwanted = self._states([""]).expand_as(states)
        steps = self.steps if steps is None else steps
        return self.pipeline.draw(states, unwanted, self.generators(seeds), guidance, steps)

    def loss(self, images: Tensor, condition: Condition, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The pipeline's own denoising loss. Levels, noise and dropping are drawn from torch's global generator."""
        self.check_condition(condition)
        assert condition.texts is not None
        dropped = (torch.rand(len(images)) < self.drop).tolist()
        texts = ["" if drop else text for text, drop in zip(condition.texts, dropped, strict=True)]
        t = draw_levels(len(images), self.pipeline.process.timesteps, self.shift, device=images.device)
        each = self.pipeline.denoising_loss(images, self._states(texts), t, min_snr=self.min_snr)
        return each.mean(), {}

    @classmethod
    def tiny(cls) -> TextToImageDetokenizer:
        return cls(steps=3, components=TINY)

    def example_condition(self) -> Condition:
        """Three texts of its words."""
        return Condition(texts=["a red circle", "a blue square", ""])
