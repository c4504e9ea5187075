"""A general convolutional autoencoder with finite scalar quantization (FSQ, arXiv 2309.15505).

The quantizer is vector_quantize_pytorch's. A BatchNorm in front of it keeps the values spread over all levels, which
prevents codes from dying without any auxiliary loss. Fully convolutional: any size that is a multiple of the stride.

Shapes: B images, H x W pixels, h x w positions (H / stride, W / stride), D quantized channels (one per level).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ

from unitok.nn.blocks import ResidualBlock, fit_batch_norm, pixel_losses, psnr, variation
from unitok.tokenizers.base import ImageTokenizer, parse_resize

MOST_CODES = 2**20  # beyond, the quantizer's float32 arithmetic mixes codes up


class FSQTokenizer(ImageTokenizer):
    """One code per position, of prod(levels) values.

    The finest step folds 2 x 2 pixels into channels and back, so that no convolution runs at full resolution.

    Args:
        image_size: pixels per side it is trained at; a multiple of 2**downsample.
        width: channels at the coarsest resolution; halved at each finer one, down to `min_width`.
        levels: values per quantized channel, each 3 or more; their product is the codebook size.
        downsample: number of steps that halve the resolution, 1 or more; the stride is 2**downsample.
        blocks: residual blocks in the encoder and in the decoder, at the coarsest resolution.
        edge_weight: factor on the pixel error near local contrast.
        smoothness: weight of the mean difference of neighbouring quantized values. It keeps flat areas on one code and
            what a thing needs near the thing: fewer bits for a language model to predict, at little cost in pixels.
    """

    fully_convolutional = True
    exact = ("quantizer",)

    def __init__(
        self,
        image_size: int = 32,
        width: int = 96,
        levels: Sequence[int] = (8, 5, 5, 5),
        downsample: int = 2,
        blocks: int = 1,
        min_width: int = 32,
        edge_weight: float = 4.0,
        smoothness: float = 0.0,
        resize: str = "squash-bicubic",
    ):
        super().__init__()
        parse_resize(resize)
        levels = tuple(levels)
        if downsample < 1:
            raise ValueError(f"downsample must be 1 or more, got {downsample}")
        self.stride = 2**downsample
        if image_size < self.stride or image_size % self.stride:
            raise ValueError(f"image_size must be a multiple of 2**downsample = {self.stride}, got {image_size}")
        if not levels or any(not isinstance(n, int) or n < 3 for n in levels):
            raise ValueError(f"levels must be integers of 3 or more, got {levels}")
        if math.prod(levels) > MOST_CODES:
            raise ValueError(f"levels {levels} give {math.prod(levels)} codes; at most {MOST_CODES} are possible")
        self.image_size, self.resize = image_size, resize
        self.edge_weight, self.smoothness = edge_weight, smoothness
        self.codebook_sizes = (math.prod(levels),)

        widths = [max(min_width, width >> i) for i in range(downsample - 1, -1, -1)]  # from half resolution on
        steps = list(itertools.pairwise(widths))
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, widths[0], 3, padding=1),
            nn.SiLU(),
            *(layer for fine, coarse in steps for layer in (nn.Conv2d(fine, coarse, 4, 2, 1), nn.SiLU())),
            *(ResidualBlock(widths[-1]) for _ in range(blocks)),
            nn.Conv2d(widths[-1], len(levels), 1),
            nn.BatchNorm2d(len(levels), affine=False),
        )
        self.quantizer = FSQ(list(levels))
        self.decoder = nn.Sequential(
            nn.Conv2d(len(levels), widths[-1], 3, padding=1),
            nn.SiLU(),
            *(ResidualBlock(widths[-1]) for _ in range(blocks)),
            *(
                layer
                for fine, coarse in reversed(steps)
                for layer in (nn.ConvTranspose2d(coarse, fine, 4, 2, 1), nn.SiLU())
            ),
            nn.Conv2d(widths[0], 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        everything = torch.arange(self.codebook_sizes[0], dtype=torch.int32)
        if not torch.equal(self.quantizer.codes_to_indices(self.quantizer.implicit_codebook), everything):
            raise ValueError(f"levels {levels} cannot be told apart in float32; use fewer or smaller ones")

    def encode(self, images: Tensor) -> Tensor:
        # in float32: the rounding of half precision would move values across the borders of the levels
        _, indices = self.quantizer(self.encoder(images * 2 - 1).float())  # int32 [B, h, w]
        return indices.flatten(1).long()

    def decode(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        quantized = self.embed(codes, grid).transpose(1, 2).unflatten(2, self.check_grid(grid))  # [B, D, h, w]
        return ((self.decoder(quantized) + 1) / 2).clamp(0, 1).float()

    def embed(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        # never through the quantizer's forward: it applies tanh again, and most values would fall to other levels
        return self.quantizer.indices_to_codes(codes).to(self.dtype)  # [B, h*w, D]

    def loss(self, batch: Mapping[str, Any], step: int, stage: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """|e| + e^2, heavier near local contrast, plus L1 on the differences of neighbouring pixels; smoothness."""
        target = batch["images"] * 2 - 1
        quantized, _ = self.quantizer(self.encoder(target))
        error = self.decoder(quantized) - target  # [B, 3, H, W]
        pixels, slopes = pixel_losses(error, target, self.edge_weight)
        rough = variation(quantized)
        parts = {"pixels": pixels, "slopes": slopes, "variation": rough, "psnr": psnr(error)}
        return pixels + slopes + self.smoothness * rough, {name: part.detach() for name, part in parts.items()}

    @classmethod
    def tiny(cls) -> FSQTokenizer:
        tokenizer = cls(image_size=16, width=16, levels=(4, 3, 3), downsample=2, min_width=8)
        fit_batch_norm(tokenizer.encoder, torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1)
        return tokenizer
