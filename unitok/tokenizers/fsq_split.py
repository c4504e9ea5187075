"""Structure and colour in codes of their own: an FSQ autoencoder (arXiv 2309.15505) with two codebooks.

    structure   one code a 4 x 4 block, from a grey picture of where things are: how far each pixel is from the colour
                of the border, over the farthest nearby. What colour a thing has does not show in it.
    colour      one code an 8 x 8 block, from a picture whose every pixel has the colour, of those nearby, that stands
                out most from the border. How much of a block a thing covers does not show in it.
    decoder     both together -> pixels; structure alone -> the grey picture, which keeps colour out of its codes.

Plain codes hold one value for every combination of outline and colour, and a language model has to meet each of them.
Here a red circle is the outline of any circle and the red of any square, as the luma and chroma planes of video are
kept apart, and coarser for colour. It suits pictures of things on a ground; photographs have little to gain.

Shapes: B images, H x W pixels, h x w structure positions (H / 4, W / 4), colour positions (h / 2, w / 2), N tokens:
the colour codes row by row, then the structure codes in four turns, each one code of every 8 x 8 block, row by row.
Colours first: a language model lays out what its prompt names before it draws an outline, and each outline finds the
word of its thing by the colour in its place, which stands as many tokens before it wherever the thing is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ

from unitok.nn.blocks import ResidualBlock, fit_batch_norm, pixel_losses, psnr, variation
from unitok.tokenizers.base import ImageTokenizer, parse_resize

NEARBY = 3  # pixels: the window whose farthest pixel counts as 1
AROUND = 3  # pixels: the window that a colour spreads over
FAINT = 0.15  # a distance from the border's colour (of 1) below which nothing is scaled up
WARM_UP = (300, 900)  # steps between which smoothness sets in: at once it would leave no structure to learn


class SplitFSQTokenizer(ImageTokenizer):
    """(image_size / 8)^2 colour codes (codebook 1), then (image_size / 4)^2 structure codes (codebook 0).

    Args:
        image_size: pixels per side; a multiple of 8.
        width: channels at the structure positions.
        levels, colour_levels: values per quantized channel of either codebook, each 3 or more.
        edge_weight: factor on the pixel error near local contrast.
        smoothness, colour_smoothness: weight of the mean difference of neighbouring quantized values.
    """

    token_order = "colours, then structure in turns"
    exact = ("quantizer", "colour_quantizer")

    def __init__(self, image_size: int = 32, width: int = 96, levels: Sequence[int] = (3, 3, 3),
                 colour_levels: Sequence[int] = (3, 3, 3, 3), edge_weight: float = 4.0, smoothness: float = 0.05,
                 colour_smoothness: float = 0.1, resize: str = "squash-bicubic"):  # fmt: skip
        super().__init__()
        parse_resize(resize)
        if image_size < 8 or image_size % 8:
            raise ValueError(f"image_size must be a multiple of 8, got {image_size}")
        for name, given in (("levels", levels), ("colour_levels", colour_levels)):
            if not given or any(not isinstance(n, int) or n < 3 for n in given) or math.prod(given) > 2**16:
                raise ValueError(f"{name} must be integers of 3 or more with at most 2**16 codes, got {tuple(given)}")
        self.image_size, self.resize, self.edge_weight = image_size, resize, edge_weight
        self.smoothness, self.colour_smoothness = smoothness, colour_smoothness
        self.tokens = (image_size // 4) ** 2 + (image_size // 8) ** 2
        self.codebook_sizes = (math.prod(levels), math.prod(colour_levels))
        half, a, b = width // 2, len(levels), len(colour_levels)

        self.quantizer, self.colour_quantizer = FSQ(list(levels)), FSQ(list(colour_levels))
        self.encoder = _encoder(1, 4, width, a)
        self.colour_encoder = _encoder(3, 8, width, b)
        self.structure_decoder = _decoder(a, width, 1)
        self.colour_up = nn.ConvTranspose2d(b, half, 4, 2, 1)
        self.decoder = _decoder(a + half, width, 3)

    def token_codebook(self, grid: tuple[int, ...] | None = None) -> Tensor:
        self.check_grid(grid)
        side = self.image_size // 8
        return torch.cat([torch.ones(side * side, dtype=torch.int64), torch.zeros(4 * side * side, dtype=torch.int64)])

    def encode(self, images: Tensor) -> Tensor:
        # the quantizers in float32: half precision would move values across the borders of the levels
        _, structure = self.quantizer(self.encoder(grey_structure(images)).float())  # int32 [B, h, w]
        _, colour = self.colour_quantizer(self.colour_encoder(spread_colour(images)).float())
        return torch.cat([colour.flatten(1), _by_turns(structure)], dim=1).long()  # [B, N]

    def decode(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        structure, colour = self._vectors(codes)
        return ((self._pixels(structure, colour) + 1) / 2).clamp(0, 1).float()

    def embed(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """[B, N, D]: structure values in the first channels or colour values in the last, the others 0."""
        rows, colour = self._vectors(codes)
        structure, colour = _by_turns(rows).transpose(1, 2), colour.flatten(2).transpose(1, 2)  # [B, M, a], [B, M/4, b]
        return torch.cat([F.pad(colour, (structure.shape[2], 0)), F.pad(structure, (0, colour.shape[2]))], dim=1)

    def loss(self, batch: Mapping[str, Any], step: int, stage: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels and their slopes, the grey picture from structure alone, and smoothness of both codes."""
        images = batch["images"]
        target, grey = images * 2 - 1, grey_structure(images)
        structure, _ = self.quantizer(self.encoder(grey))
        colour, _ = self.colour_quantizer(self.colour_encoder(spread_colour(images)))
        error = self._pixels(structure, colour) - target  # [B, 3, H, W]
        pixels, slopes = pixel_losses(error, target, self.edge_weight)
        outline = self.structure_decoder(structure) - grey
        outlines = outline.abs().mean() + outline.square().mean()
        first, last = WARM_UP
        ramp = min(1.0, max(0, step - first) / (last - first))
        rough, blotchy = variation(structure), variation(colour)
        total = pixels + slopes + outlines + ramp * (self.smoothness * rough + self.colour_smoothness * blotchy)
        parts = {"pixels": pixels, "slopes": slopes, "outlines": outlines, "variation": rough,
                 "colour_variation": blotchy, "psnr": psnr(error)}  # fmt: skip
        return total, {name: part.detach() for name, part in parts.items()}

    @classmethod
    def tiny(cls) -> SplitFSQTokenizer:
        tokenizer = cls(image_size=16, width=16, levels=(3, 3), colour_levels=(4, 3))
        noise = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        fit_batch_norm(tokenizer.encoder, grey_structure(noise))
        fit_batch_norm(tokenizer.colour_encoder, spread_colour(noise))
        return tokenizer

    def _vectors(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized values [B, a, h, w] and [B, b, h / 2, w / 2]."""
        side = self.image_size // 4
        colour, structure = codes.split([side * side // 4, side * side], dim=1)
        first = self.quantizer.indices_to_codes(_by_rows(structure, side))
        second = self.colour_quantizer.indices_to_codes(colour.unflatten(1, (side // 2, side // 2)))
        return first.to(self.dtype), second.to(self.dtype)

    def _pixels(self, structure: Tensor, colour: Tensor) -> Tensor:
        return self.decoder(torch.cat([structure, self.colour_up(colour)], dim=1))  # [B, 3, H, W] around [-1, 1]


def _encoder(channels: int, block: int, width: int, out: int) -> nn.Sequential:
    """Each block by itself: what stands beside a thing does not change its codes, so scenes compose."""
    return nn.Sequential(
        nn.PixelUnshuffle(block), nn.Conv2d(channels * block * block, width, 1), nn.SiLU(),
        nn.Conv2d(width, width, 1), nn.SiLU(), nn.Conv2d(width, out, 1), nn.BatchNorm2d(out, affine=False),
    )  # fmt: skip


def _decoder(channels: int, width: int, out: int) -> nn.Sequential:
    half = width // 2
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.SiLU(), ResidualBlock(width), ResidualBlock(width),
        nn.ConvTranspose2d(width, half, 4, 2, 1), nn.SiLU(), nn.Conv2d(half, 4 * out, 3, padding=1),
        nn.PixelShuffle(2),
    )  # fmt: skip


def _by_turns(rows: Tensor) -> Tensor:
    """[..., h, w] -> [..., h * w]: the upper left code of every 8 x 8 block, then every upper right one, and so on."""
    h, w = rows.shape[-2:]
    blocks = rows.reshape(-1, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3)
    return blocks.reshape(*rows.shape[:-2], h * w)


def _by_rows(turns: Tensor, side: int) -> Tensor:
    """The inverse of `_by_turns`: [B, side * side] -> [B, side, side]."""
    blocks = turns.unflatten(1, (2, 2, side // 2, side // 2)).permute(0, 3, 1, 4, 2)
    return blocks.reshape(-1, side, side)


@torch.no_grad()
def grey_structure(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [B, 1, H, W] in [-1, 1]: how far from the border's colour, over the farthest nearby."""
    distance = _distance(images)
    farthest = F.max_pool2d(distance, NEARBY, 1, NEARBY // 2).clamp_min(FAINT)
    return distance / farthest * 2 - 1


@torch.no_grad()
def spread_colour(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> the same shape in [-1, 1]: the colour nearby that is farthest from the border's."""
    _, where = F.max_pool2d(_distance(images), AROUND, 1, AROUND // 2, return_indices=True)  # [B, 1, H, W]
    return images.flatten(2).gather(2, where.flatten(2).expand(-1, 3, -1)).view_as(images) * 2 - 1


def _distance(images: Tensor) -> Tensor:
    """[B, 1, H, W]: the largest difference of a channel from the median colour of the border."""
    sides = (images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1])
    ground = torch.cat(sides, dim=2).median(dim=2).values[:, :, None, None]  # [B, 3, 1, 1]
    return (images - ground).abs().amax(dim=1, keepdim=True)
