"""How codes are used: counts -> codes in use, entropy, perplexity; and what codes cost in bits.

numpy alone, so that plain commands need no torch. Shapes: B pictures, N tokens, V codes of a codebook.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COLLAPSED = 0.1  # share of its codes in use, below which a codebook has collapsed


@dataclass(frozen=True)
class CodebookUse:
    """The use of one codebook: its size, the codes met at least once, and the entropy of their frequencies in bits."""

    size: int
    used: int
    entropy: float

    @classmethod
    def of(cls, counts: np.ndarray) -> CodebookUse:
        """From how often each code was met: int [V]. Codes never counted at all have entropy 0."""
        met = counts[counts > 0].astype(np.float64)
        shares = met / met.sum()
        entropy = max(0.0, float(-(shares * np.log2(shares)).sum()))  # no -0.0
        return cls(len(counts), len(met), entropy)

    @property
    def dead(self) -> int:
        return self.size - self.used

    @property
    def share(self) -> float:
        return self.used / self.size

    @property
    def perplexity(self) -> float:
        """2**entropy: as many codes used equally often would have this entropy; 1 where there is a single code."""
        return 2.0**self.entropy

    def __str__(self) -> str:
        return (f"{self.used} of {self.size} codes used, {self.dead} dead, {self.entropy:.2f} of "
                f"{math.log2(self.size):.2f} bits (perplexity {self.perplexity:.1f})")  # fmt: skip


def count_codes(codes: np.ndarray, books: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """int [..., N] codes, the codebook of each token int [N], codebook sizes -> int64 [V] of each codebook."""
    return [np.bincount(codes[..., books == book].ravel(), minlength=size) for book, size in enumerate(sizes)]


def leave_one_out(counts: np.ndarray, pictures: Sequence[np.ndarray]) -> list[CodebookUse]:
    """The use of a codebook without each picture in turn: int [V] counts over all, and each one's codes int [N]."""
    total, whole, used = int(counts.sum()), _x_log_x(counts).sum(), int((counts > 0).sum())
    out = []
    for codes in pictures:
        met, times = np.unique(codes, return_counts=True)
        rest, left = counts[met] - times, total - len(codes)
        entropy = math.log2(left) - (whole - (_x_log_x(counts[met]) - _x_log_x(rest)).sum()) / left if left else 0.0
        out.append(CodebookUse(len(counts), used - int((rest == 0).sum()), max(0.0, float(entropy))))
    return out


def _x_log_x(counts: np.ndarray) -> np.ndarray:
    return counts * np.log2(np.maximum(counts, 1))


def bits(books: np.ndarray, sizes: Sequence[int]) -> float:
    """Bits of a picture whose tokens come from these codebooks, int [N]: the sum of log2 of each one's size."""
    tokens = np.bincount(books, minlength=len(sizes))
    return math.fsum(n * math.log2(size) for n, size in zip(tokens.tolist(), sizes, strict=True))


def collapse_warning(counts: Sequence[np.ndarray]) -> str | None:
    """A plain line where fewer than a tenth of a codebook (of the codes met, where those are fewer) is in use, or None.

    counts: int [V] of each codebook.
    """
    for book, met in enumerate(counts):
        use = CodebookUse.of(met)
        if use.used < COLLAPSED * min(use.size, met.sum()):
            which = f" of codebook {book}" if len(counts) > 1 else ""
            return (
                f"warning: {use.used} of {use.size} codes{which} in use (perplexity {use.perplexity:.1f}): the "
                "codebook has collapsed; if it stays so, revive dead codes, or take a lower lr or fewer codes"
            )
    return None
