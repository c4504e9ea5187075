"""Does a text help a text-to-image model to tell a picture from noise? Same picture, levels and noises, other texts.

A loss of one level and noise says little of a text: levels differ by far more than texts do. So every text is asked
about the same grid of levels, one noise a picture and level, and losses are compared picture by picture.

Shapes: n pictures, B of them at once, H x W pixels, K levels, L ids of a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unitok.eval.progress import batches, row_seed
from unitok.eval.results import mean, paired_difference
from unitok.nn.text_to_image import TextToImage

LEVELS = 10
CONTROLS = ("shuffled", "empty")


@dataclass(frozen=True)
class Advantage:
    """How much lower the loss of one set of texts is than that of another, over n pictures.

    ours, other: mean losses. value: mean of other - ours; interval: its 95 % bootstrap interval, paired by picture.
    """

    ours: float
    other: float
    value: float
    interval: tuple[float, float]
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval lies above 0."""
        return self.interval[0] > 0


def others(count: int, seed: int = 0) -> list[int]:
    """For each of `count` rows another one, each once: rows in a drawn order, and the next of each. ValueError for one
    row alone."""
    if count < 2:
        raise ValueError(f"shuffling needs two rows or more, got {count}")
    order = np.random.default_rng([seed, count]).permutation(count)
    other = np.empty(count, np.int64)
    other[order] = np.roll(order, -1)
    return other.tolist()


def with_controls(texts: Sequence[str], name: str = "true", seed: int = 0) -> dict[str, list[str]]:
    """The texts by name, beside the same ones of other pictures ("shuffled") and none ("empty")."""
    return {name: list(texts), "shuffled": [texts[i] for i in others(len(texts), seed)], "empty": [""] * len(texts)}


def grid(timesteps: int, count: int) -> list[int]:
    """The middle levels of `count` equal parts of 0 .. timesteps - 1, rising. ValueError for more parts than levels."""
    if not 1 <= count <= timesteps:
        raise ValueError(f"levels must be 1 to {timesteps}, the timesteps of the model, got {count}")
    return [timesteps * (2 * k + 1) // (2 * count) for k in range(count)]


@torch.no_grad()
def denoising_losses(
    generator: TextToImage,
    images: Tensor,
    texts: Mapping[str, Sequence[str] | Tensor],
    *,
    levels: int = LEVELS,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """The generator's own denoising loss of each picture under each set of texts, mean over levels: float [n] on CPU.

    Args:
        images: float [n, 3, H, W] in [0, 1], of the generator's size.
        texts: n texts a set, or their ids int64 [n, L] as `frame` and `ids` of the generator make them.
        levels: how many, by `grid`. seed: of the noises, which depend on a picture's place, not on its batch.

    Raises:
        ValueError: a set of another length than the pictures, or more levels than the generator has.
    """
    for name, some in texts.items():
        if len(some) != len(images):
            raise ValueError(f"{name}: {len(some)} texts for {len(images)} pictures")
    process, device = generator.process, generator.device
    times = grid(process.timesteps, levels)
    ids = {name: some if isinstance(some, Tensor) else generator.ids(some) for name, some in texts.items()}
    shape = (levels, generator.unet.config.in_channels, generator.side, generator.side)
    was_training = generator.training
    generator.eval()
    found: dict[str, list[Tensor]] = {name: [] for name in texts}
    for places in batches(range(len(images)), batch_size, "denoise"):
        some = images[list(places)].to(device)
        draws = [torch.Generator().manual_seed(row_seed(seed, "noise", str(i))) for i in places]
        noise = torch.stack([torch.randn(shape, generator=draw) for draw in draws], 1).to(device)  # [K, B, C, h, w]
        for name, rows in ids.items():
            states = generator.encode(rows[list(places)].to(device))
            each = [
                generator.denoising_loss(some, states, torch.full((len(some),), t, device=device), noise[k])
                for k, t in enumerate(times)
            ]
            found[name].append(torch.stack(each).mean(0).float().cpu())
    generator.train(was_training)
    return {name: torch.cat(parts) for name, parts in found.items()}


def advantages(losses: Mapping[str, Tensor], of: str = "true", *, seed: int = 0) -> dict[str, Advantage]:
    """Losses [n] by set of texts -> how much lower those of `of` are than each other set's, by its name."""
    mine, out = losses[of].tolist(), {}
    for name, values in losses.items():
        if name != of:
            other = values.tolist()
            value, interval = paired_difference(mine, other, seed=seed)
            out[name] = Advantage(mean(mine), mean(other), value, interval, len(mine))
    return out


def passes(found: Mapping[str, Advantage], against: Iterable[str] = CONTROLS) -> bool:
    """The gate: texts beat every control, with an interval that lies above 0."""
    return all(found[name].clear for name in against)
