"""Classifier-free guidance as a weighted sum of branches.

Branches: 0 the prompt itself, 1 the prompt with everything dropped (or a negative prompt), 2 the prompt with its text
dropped and its images kept. With logits c, n, i of these:

    one scale s:                n + s (c - n)                weights s, 1 - s, 0
    a pair (text t, image m):   n + m (i - n) + t (c - i)    weights t, 1 - m, m - t    (InstructPix2Pix, 2211.09800)

A branch of weight 0 is never computed: scale 1 is the conditional branch alone. Mixing raw logits equals mixing
log-probabilities up to a constant of the row.

Text is guided by a branch of its own, 3, the prompt without its images, of logits b:

    one scale s:                b + s (c - b)                weights s, 0, 0, 1 - s

What a text says by habit, whatever the images show, is taken off (visual contrastive decoding, 2311.16922, with the
images absent instead of noisy). Ids that habit makes likely all count alike (`habit`): guidance lifts what is never
said, and does not choose among what is often said. Ids that the prompt itself makes improbable stay out
(`plausible`): differences among those mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

BRANCHES = 4
BLIND = 3  # the branch of text; the others are of images
LIKELY = 0.1  # of the most probable id's probability: what is above is likely by habit, and no more likely than others
IMPLAUSIBLE = 0.02  # of the most probable id's probability: what is below is not chosen under guidance


def branch_weights(guidance, rows: int) -> np.ndarray:
    """Of image codes: float32 [rows, 3] from a number, a tuple (text, image), or a list with one of these a row."""
    each = [guidance] * rows if isinstance(guidance, (int, float, tuple)) else list(guidance)
    if len(each) != rows:
        raise ValueError(f"guidance has {len(each)} entries for {rows} rows")
    out = np.zeros((rows, BLIND), np.float32)
    for row, scale in enumerate(each):
        if isinstance(scale, (tuple, list)):
            if len(scale) != 2:
                raise ValueError(f"guidance {scale!r} of row {row} is neither a number nor a pair (text, image)")
            text, image = map(float, scale)
        else:
            text = image = float(scale)
        if not (np.isfinite(text) and np.isfinite(image)):
            raise ValueError(f"guidance {scale!r} of row {row} is not finite")
        out[row] = text, 1 - image, image - text
    return out


def mix(
    cond: torch.Tensor,  # [n, K]
    others: torch.Tensor,  # [m, K]
    owner: torch.Tensor,  # [m] the row of cond each of others belongs to
    weights: torch.Tensor,  # [n]
    other_weights: torch.Tensor,  # [m]
) -> torch.Tensor:
    """Guided logits [n, K]."""
    return (cond * weights[:, None]).index_add_(0, owner, others * other_weights[:, None])


def text_weights(scale: float | Sequence[float], rows: int) -> np.ndarray:
    """Of text: float32 [rows, 4] from a number, or one a row."""
    scales = np.asarray([scale] * rows if isinstance(scale, (int, float)) else scale, np.float32)
    if scales.shape != (rows,) or not np.isfinite(scales).all():
        raise ValueError(f"text_guidance is {scale}; expected a finite number, or one for each of {rows} rows")
    out = np.zeros((rows, BRANCHES), np.float32)
    out[:, 0], out[:, BLIND] = scales, 1 - scales
    return out


def habit(blind: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Logits [m, K] of prompts without their images, at most LIKELY of the highest probability each.

    weights [m]: of these logits; where it is not negative nothing is taken off, and they stay as they are.
    """
    return torch.where(weights[:, None] < 0, blind.minimum(blind.amax(1, keepdim=True) + math.log(LIKELY)), blind)


def plausible(cond: torch.Tensor, guided: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`guided` [n, K] with -inf where `cond` has less than IMPLAUSIBLE of its highest probability.

    weights [n]: of `cond` in `guided`; a row of weight 1 is not guided, and stays whole.
    """
    floor = cond.amax(1, keepdim=True) + math.log(IMPLAUSIBLE)
    return guided.masked_fill((cond < floor) & (weights != 1)[:, None], float("-inf"))
