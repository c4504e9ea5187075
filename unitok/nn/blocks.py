"""Blocks and losses that several image tokenizers use.

Shapes: B images, C channels, H x W pixels or positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.mix(x))


@torch.no_grad()
def contrast_weight(images: Tensor, heaviest: float) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H, W]: 1 in flat areas, up to `heaviest` within a pixel of a step of 1 or more."""
    across = images.diff(dim=3).abs().amax(dim=1, keepdim=True)  # [B, 1, H, W - 1]
    down = images.diff(dim=2).abs().amax(dim=1, keepdim=True)
    across = torch.maximum(F.pad(across, (0, 1)), F.pad(across, (1, 0)))
    down = torch.maximum(F.pad(down, (0, 0, 0, 1)), F.pad(down, (0, 0, 1, 0)))
    contrast = F.max_pool2d(torch.maximum(across, down), 3, stride=1, padding=1).clamp(max=1)
    return 1 + (heaviest - 1) * contrast


def pixel_losses(error: Tensor, target: Tensor, edge_weight: float) -> tuple[Tensor, Tensor]:
    """(|e| + e^2, heavier near local contrast; L1 on the differences of neighbouring pixels), both scalars."""
    pixels = (contrast_weight(target, edge_weight) * (error.abs() + error.square())).mean()
    return pixels, variation(error)


@torch.no_grad()
def psnr(error: Tensor) -> Tensor:
    """dB of a whole batch, a scalar; error of pixels in [-1, 1]."""
    return 10 * torch.log10(4 / error.square().mean().clamp_min(1e-10))  # 4: the range of 2, squared


def variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, down plus across; x: [B, C, H, W]."""
    return x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()


@torch.no_grad()
def fit_batch_norm(encoder: nn.Sequential, images: Tensor) -> None:
    """Give the BatchNorm that ends `encoder` the statistics of these images, as training would have: without them an
    untrained encoder gives every picture the same codes."""
    norm = encoder[-1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    features = encoder[:-1](images)  # [B, C, h, w]
    norm.running_mean.copy_(features.mean(dim=(0, 2, 3)))
    norm.running_var.copy_(features.var(dim=(0, 2, 3)))
