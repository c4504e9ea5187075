"""From logits to one id a row: temperature, top-k, top-p, and draws that belong to the row.

Every function takes the logits of the allowed ids only (sliced, guidance already mixed in), so what it cuts off is cut
off from the renormalised distribution. Shapes: n rows, K allowed ids; logits float32 [n, K].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Choice:
    """How ids are drawn. temperature 0 is greedy; top_k 0 and top_p 1 cut nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; expected 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; expected 0 (off) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected 0 < top_p <= 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


def warp(logits: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Logits of the distribution that is drawn from, -inf where cut: temperature, then top-k, then top-p. [n, K]

    Ties with the last id kept are kept.
    """
    logits = logits / choice.temperature
    kept = None  # the logits still in, largest first
    if 0 < choice.top_k < logits.shape[1]:
        kept = logits.topk(choice.top_k, dim=1).values
    if choice.top_p < 1:
        kept = logits.sort(dim=1, descending=True).values if kept is None else kept
        p = kept.softmax(1)
        inside = p.cumsum(1) - p < choice.top_p  # the mass before it; the first is always in
        kept = kept.masked_fill(~inside, float("inf"))
    return logits if kept is None else logits.masked_fill(logits < kept.amin(1, keepdim=True), float("-inf"))


def choose(logits: torch.Tensor, choice: Choice, keys: torch.Tensor) -> torch.Tensor:
    """The index chosen in each row, int64 [n]; `keys` int64 [n] (from `draw_keys`) decide every draw."""
    if choice.greedy:
        return logits.argmax(1)
    # argmax(logits + Gumbel noise) draws from softmax(logits), and hardly ever flips when another batch size moves the
    # logits by a rounding error; inverting a cumulative sum over thousands of ids would.
    return (warp(logits, choice) - exponential(keys, logits.shape[1]).log_()).argmax(1)


def draw_keys(seeds: Sequence[int], count: int) -> torch.Tensor:
    """int64 [B, count]: one key a draw, each row from a generator of its own."""
    out = torch.empty(len(seeds), count, dtype=torch.int64)
    for row, seed in enumerate(seeds):
        torch.randint(0, 2**63 - 1, (count,), generator=torch.Generator().manual_seed(int(seed)), out=out[row])
    return out


def exponential(keys: torch.Tensor, width: int) -> torch.Tensor:
    """Exponential(1) noise, float32 [n, width], a function of each row's key: the same in any batch, on any device.

    SplitMix64 (Steele, Lea and Flood 2014) seeded with the key; each 64-bit output serves two ids.
    """
    index = torch.arange(1, (width + 1) // 2 + 1, device=keys.device)
    z = keys[:, None] + index * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shift(z, shift)).mul_(_signed(factor))
    z ^= _shift(z, 31)
    bits = z.view(torch.int32)[:, :width]
    # u in (0, 1), fine near 0 (the likely winners), kept off 1, where float32 rounding would make the noise infinite.
    u = (bits & 0x7FFFFFFF).float().add_(0.5).mul_(2**-31 * (1 - 2**-23))
    return u.neg_().log1p_().neg_()


def _shift(z: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word."""
    return word - 2**64 if word >= 2**63 else word
