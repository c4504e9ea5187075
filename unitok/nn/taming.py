"""The convolutional encoder and decoder of VQGAN (Esser et al. 2021, arXiv 2012.09841; CompVis/taming-transformers).

Module names are the published ones, so that checkpoints of the family fit after little renaming. Levels count from 0,
the full resolution; every further level halves it.

Shapes: B images, H x W pixels, h x w positions (H and W over patch * 2**(levels - 1)), Z latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ResnetBlock(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, groups: int):
        super().__init__()
        self.norm1 = normalisation(fan_in, groups)
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, padding=1)
        self.norm2 = normalisation(fan_out, groups)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(fan_in, fan_out, 1) if fan_in != fan_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = normalisation(width, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (proj(normed).flatten(2).transpose(1, 2).unsqueeze(1) for proj in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B, 1, h*w, C]
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Blocks of one resolution, each followed by attention where the level has it, and the change of resolution."""

    def __init__(self, widths: Sequence[int], attention: bool, groups: int):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False))
        self.attn = nn.ModuleList(Attention(b, groups) for b in widths[1:] if attention)
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for change in (self.downsample, self.upsample):
            if change is not None:
                x = change(x)
        return x


class Middle(nn.Module):
    def __init__(self, width: int, attention: bool, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(width, width, groups)
        self.attn_1 = Attention(width, groups) if attention else None
        self.block_2 = ResnetBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_1(x)
        return self.block_2(x if self.attn_1 is None else self.attn_1(x))


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, Z, h, w].

    Args:
        channels, multipliers: level i has channels * multipliers[i] channels.
        blocks: residual blocks a level.
        attention: levels whose blocks are each followed by attention.
        middle_attention: whether the two blocks in the middle have attention between them.
        patch: pixels a side that are laid into channels before the first convolution: published ones have 1; 2 makes
            small ones several times faster.
    """

    def __init__(
        self,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        latent: int,
        attention: Sequence[int],
        middle_attention: bool,
        groups: int,
        patch: int = 1,
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.unshuffle = nn.PixelUnshuffle(patch)
        self.conv_in = nn.Conv2d(3 * patch**2, channels, 3, padding=1)
        self.down = nn.ModuleList()
        before = channels
        for i, width in enumerate(widths):
            level = Level([before] + [width] * blocks, i in attention, groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
            before = width
        self.mid = Middle(before, middle_attention, groups)
        self.norm_out = normalisation(before, groups)
        self.conv_out = nn.Conv2d(before, latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(self.unshuffle(x))
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[B, Z, h, w] -> [B, 3, H, W]; arguments as the encoder's, with one more block a level."""

    def __init__(
        self,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        latent: int,
        attention: Sequence[int],
        middle_attention: bool,
        groups: int,
        patch: int = 1,
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        before = widths[-1]
        self.conv_in = nn.Conv2d(latent, before, 3, padding=1)
        self.mid = Middle(before, middle_attention, groups)
        levels = []
        for i, width in reversed(list(enumerate(widths))):
            level = Level([before] + [width] * (blocks + 1), i in attention, groups)
            if i > 0:
                level.upsample = Upsample(width)
            levels.append(level)
            before = width
        self.up = nn.ModuleList(reversed(levels))  # published files count them from the highest resolution
        self.norm_out = normalisation(before, groups)
        self.conv_out = nn.Conv2d(before, 3 * patch**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(patch)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.shuffle(self.conv_out(F.silu(self.norm_out(x))))


def normalisation(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)
