"""The exponential moving average of a model's state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """Averages every floating-point tensor of a state dict; other tensors are copied.

    The decay rises to its value over the first steps, as (1 + n) / (10 + n), so that the start is forgotten.

    Args:
        state: gives the live state dict, whose tensors are read in place.
    """

    def __init__(self, state: Callable[[], dict[str, Tensor]], decay: float):
        self.state, self.decay, self.updates = state, decay, 0
        self.average = {k: v.detach().clone() for k, v in state().items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = [(self.average[k], v) for k, v in self.state().items()]
        floats = [(a, v) for a, v in pairs if v.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [v for _, v in floats], 1 - decay)
        for a, v in pairs:
            if not v.is_floating_point():
                a.copy_(v)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the live state holds the average."""
        with torch.no_grad():
            kept = {k: v.clone() for k, v in self.state().items()}
            self._copy(self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                self._copy(kept)

    def _copy(self, source: dict[str, Tensor]) -> None:
        for k, v in self.state().items():
            v.copy_(source[k])

    def state_dict(self) -> dict:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, saved: dict) -> None:
        self.updates = saved["updates"]
        for k, v in self.average.items():
            v.copy_(saved["average"][k])
