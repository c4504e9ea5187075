"""Trains an image tokenizer from a recipe; `run.py` says what a run leaves in `out` and how it goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unitok import tokenizers
from unitok.config import TokenizerRecipe
from unitok.nn.codes import CodebookUse, collapse_warning, count_codes
from unitok.tokenizers.base import ImageTokenizer, load_tokenizer
from unitok.training.run import TrainingRun, check_arguments, constructor_arguments, psnr, rows_of
from unitok.training.run import lr_factor as lr_factor  # beside `score`, for callers of this engine


def train(recipe: TokenizerRecipe) -> Path:
    """Run the recipe, or go on where it stopped; returns the folder of the finished tokenizer.

    Of no steps, the tokenizer as it is built. KeyboardInterrupt after SIGINT or SIGTERM, with a checkpoint written.
    ValueError where the recipe, the data or an older checkpoint do not fit, or the loss is no longer finite.
    """
    if not recipe.steps:
        return _write(recipe)
    if recipe.flush_denormal:
        torch.set_flush_denormal(True)  # before the first operation: worker threads inherit it
    return TokenizerRun(recipe).run()


def _write(recipe: TokenizerRecipe) -> Path:
    out = Path(recipe.out)
    if (out / "training").exists():
        raise ValueError(f"{out} holds a trained tokenizer: choose another out for one of no steps")
    torch.manual_seed(recipe.seed)
    build(recipe).eval().save_pretrained(out)
    print(f"tokenizer written to {out}", flush=True)
    return out


class TokenizerRun(TrainingRun):
    """The state of one training run: a tokenizer, and its adversary where it has one."""

    kind = "tokenizer"
    shown = "originals over reconstructions"

    def __init__(self, recipe: TokenizerRecipe):
        torch.manual_seed(recipe.seed)
        self.tokenizer = build(recipe)
        super().__init__(
            recipe,
            self.tokenizer,
            recipe.tokenizer.name,
            self.tokenizer.preprocess,
            self.tokenizer.image_size,
            captioned=recipe.stage in self.tokenizer.text_stages,
            partly=len(self.tokenizer.stages) > 1,  # a stage need not use every parameter
        )
        self.critic = self.tokenizer.critic()
        adversary = set(map(id, self.critic.parameters())) if self.critic else set()
        own = [p for p in self.tokenizer.parameters() if p.requires_grad and id(p) not in adversary]
        if not own:
            raise ValueError(f"{type(self.tokenizer).__name__} has nothing to train in stage {recipe.stage!r}")
        self.begin(own, lambda batch, step: self.tokenizer.loss(batch, step, stage=recipe.stage))
        if self.critic:
            self.critic_own = [p for p in self.critic.parameters() if p.requires_grad]
            loss: Any = self.critic.loss
            self.critic_loss, self.critic_optimizer = self.prepare(self.critic, self.critic_own, loss)

    def batch(self, index: Tensor, images: Tensor) -> dict[str, Any]:
        batch = super().batch(index, images)
        return {**batch, "texts": self.pictures.texts(index, self.step)} if self.pictures.captioned else batch

    def update(self, batch: Mapping[str, Any], lr: float) -> dict[str, Tensor]:
        parts = super().update(batch, lr)
        if self.critic:
            theirs = self.descend(self.critic_loss, self.critic_optimizer, self.critic_own, batch, lr)
            parts |= {f"critic_{k}": v for k, v in theirs.items()}
        return parts

    def sheet(self, images: Tensor) -> Tensor:
        """float [3, 2 S, n S]: originals over reconstructions."""
        originals = self.floats(images)
        return rows_of(originals, self.tokenizer.decode(self.tokenizer.encode(originals))).cpu()

    def scores(self, images: Tensor) -> tuple[dict[str, float], str | None]:
        return score(self.tokenizer, images, self.recipe.batch_size)

    def more_state(self) -> dict[str, Any]:
        return {
            "critic": self.critic.state_dict() if self.critic else None,
            "critic_optimizer": self.critic_optimizer.state_dict() if self.critic else None,
        }

    def load_more(self, state: Mapping[str, Any]) -> None:
        if self.critic:
            self.critic.load_state_dict(state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])

    def report(self, found: dict[str, float]) -> list[dict[str, Any]]:
        held, found = self.pictures.held_out, dict(found)
        if "psnr" not in found:
            return []
        flat = held.float().div(255)
        mean_colour = psnr(flat.mean(dim=(2, 3), keepdim=True).expand_as(flat), flat).mean().item()
        margin = 1.96 * found.pop("psnr_error")
        value = found.pop("psnr")
        return [
            {
                "name": "psnr",
                "value": value,
                "n": len(held),
                "interval": [value - margin, value + margin],
                "baselines": {"untrained": self.untrained["psnr"], "mean colour": mean_colour},
                "protocol": {
                    "unit": "dB",
                    "pictures": "held out of the training data",
                    "resize": self.tokenizer.resize,
                    "image_size": self.tokenizer.image_size,
                    "steps": self.step,
                    **found,
                },
            }
        ]


def build(recipe: TokenizerRecipe) -> ImageTokenizer:
    """The recipe's tokenizer, new or from `init_from`. ValueError for a wrong name, argument or stage."""
    cls, arguments = tokenizers.get(recipe.tokenizer.name), recipe.tokenizer.arguments
    check_arguments(f"tokenizer {recipe.tokenizer.name!r}", arguments, constructor_arguments(cls))
    tokenizer = cls(**arguments)
    if recipe.steps and not tokenizer.stages:
        raise ValueError(f"tokenizer {recipe.tokenizer.name!r} has nothing to train: give steps 0, which writes it")
    if recipe.steps and recipe.stage not in tokenizer.stages:
        raise ValueError(
            f"tokenizer {recipe.tokenizer.name!r} has no stage {recipe.stage!r}; it has {', '.join(tokenizer.stages)}"
        )
    if recipe.init_from:
        tokenizer.load_own_state(load_tokenizer(recipe.init_from).own_state(), what=recipe.init_from)
    return tokenizer


@torch.no_grad()
def score(tokenizer: ImageTokenizer, images: Tensor, batch_size: int) -> tuple[dict[str, float], str | None]:
    """uint8 [n, 3, S, S] -> scores, and a line of warning where a codebook has collapsed.

    PSNR in dB (mean over pictures, and its standard error) where the tokenizer has a decoder; of the codes the share in
    use and the perplexity, named NAME/codebook=K where there are several codebooks.
    """
    psnrs, codes = [], []
    for chunk in images.split(batch_size):
        originals = chunk.to(tokenizer.device).float() / 255
        found = tokenizer.encode(originals)
        with suppress(NotImplementedError):  # its codes need a detokenizer, and are counted all the same
            psnrs.append(psnr(tokenizer.decode(found), originals).cpu())
        codes.append(found.cpu())
    counts = count_codes(torch.cat(codes).numpy(), tokenizer.token_codebook().numpy(), tokenizer.codebook_sizes)
    scores = {}
    if psnrs:
        values = torch.cat(psnrs)
        error = values.std(unbiased=False) / math.sqrt(len(values))
        scores = {"psnr": values.mean().item(), "psnr_error": error.item()}
    for book, use in enumerate(map(CodebookUse.of, counts)):
        suffix = f"/codebook={book}" if len(counts) > 1 else ""
        scores |= {f"codes_used{suffix}": use.share, f"perplexity{suffix}": use.perplexity}
    # of words few are ever needed
    return scores, collapse_warning(counts) if tokenizer.vocabulary == "codes" else None
