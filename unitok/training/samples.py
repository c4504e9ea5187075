"""What a language model draws and answers while it trains, for TensorBoard.

    train(recipe, sampler=Samples.of(recipe))

The same prompts, questions and seeds at every look, so that pictures are compared over the steps.
"""

from __future__ import annotations

from typing import Any

import torch

from unitok.checkpoint import open_folder
from unitok.config import LanguageModelRecipe
from unitok.data.sources import read_image
from unitok.model import UnifiedModel, around
from unitok.tokenizers.base import to_tensor

PICTURES = 4  # of each prompt


class Samples:
    """A sampler of the language model engine. ValueError at once where a picture that is asked about cannot be read."""

    def __init__(self, recipe: LanguageModelRecipe):
        self.recipe, self.asked = recipe, recipe.samples
        self.rows = [
            {"image": None if q.image is None else read_image(q.image), "question": q.question}
            for q in self.asked.questions
        ]
        self.model: UnifiedModel | None = None

    @classmethod
    def of(cls, recipe: LanguageModelRecipe) -> Samples | None:
        """None where the recipe names neither prompts nor questions."""
        return cls(recipe) if recipe.samples.prompts or recipe.samples.questions else None

    def __call__(self, lm: Any, step: int, writer: Any) -> None:
        """lm: the model in training, in eval mode. All processes draw, since a model may be split over them."""
        if lm.get_input_embeddings().weight.numel() == 0:  # ZeRO stage 3 holds the rows elsewhere
            return
        if self.model is None:
            self.model = around(
                lm, open_folder(self.recipe.model), template=self.recipe.template, tokenizer=self.asked.tokenizer
            )
        for prompt, strip in self._draw(self.model).items():
            if writer is not None:
                writer.add_image(f"drawn: {prompt}", strip, step)
        replies = self.model.answers(self.rows) if self.rows else []
        if writer is not None and replies:
            lines = [f"- {_words(q)}  \n  {reply}" for q, reply in zip(self.asked.questions, replies, strict=True)]
            writer.add_text("answers", "\n".join(lines), step)
            writer.flush()

    def _draw(self, model: UnifiedModel) -> dict[str, torch.Tensor]:
        """float [3, H, n W] of each prompt: its pictures side by side."""
        if not self.asked.prompts:
            return {}
        drawn = model.images(
            self.asked.prompts, n=PICTURES, guidance=self.asked.guidance, temperature=self.asked.temperature
        )
        strips = (drawn[i : i + PICTURES] for i in range(0, len(drawn), PICTURES))
        pairs = zip(self.asked.prompts, strips, strict=True)
        return {prompt: torch.cat([to_tensor(picture) for picture in strip], dim=2) for prompt, strip in pairs}


def _words(question: Any) -> str:
    return question.question if question.image is None else f"{question.image}: {question.question}"
