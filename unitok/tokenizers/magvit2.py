"""Tokenizers with lookup-free quantization (LFQ; MAGVIT-v2, arXiv 2310.05737): a code is the signs of a vector.

Two published layouts, alike in all but their layers:

    open-magvit2   TencentARC/SEED-Voken, arXiv 2409.04410: convolutions without bias, no attention, depth-to-space
                   upsampling, and before each level of the decoder a normalisation whose scale and shift follow from
                   deviation and mean of the whole picture's code vectors
    show-o         showlab/Show-o, arXiv 2408.12528: the VQGAN backbone with attention in the middle only, and widths
                   and depths of its own in encoder and decoder

Shapes: B images, H x W pixels, h x w positions (H and W over the stride), n = h*w, D bits and K tokens a position, C
channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.nn import quantizers, taming
from unitok.nn.adversary import PatchCritic
from unitok.nn.blocks import psnr
from unitok.nn.picture_loss import PictureLoss
from unitok.tokenizers.base import ImageTokenizer, parse_resize

LAYOUTS = ("open-magvit2", "show-o")
GROUPS = 32  # of every normalisation
EPS = 1e-6


class MAGVIT2Tokenizer(ImageTokenizer):
    """The default is Open-MAGVIT2's at 256 pixels with 2**18 codes; small ones have fewer channels, levels and blocks.

    Args:
        image_size: pixels a side, a multiple of the stride 2**(levels - 1); other multiples can be encoded too.
        layout: "open-magvit2" or "show-o", see above.
        channels, multipliers: level i, 0 at full resolution, has channels * multipliers[i] channels; a multiple of 32.
        blocks: residual blocks of each level; open-magvit2 has as many in the middle as at the last level.
        decoder_multipliers, decoder_blocks: the decoder's, by level likewise; empty: as the encoder's.
        bits: of each token of a position: (18,) is one of 2**18 codes, (6, 12) two, of 64 and of 4096 codes, the
            first from the first six channels. A factorised one has the grid (h, w, K).
        lsb_first: a token's lowest bit is its first channel (Open-MAGVIT2), else its last (Show-o).
        pixel: "l1" or "l2", between pixels in [-1, 1].
        entropy_weight, beta: of the entropy terms and of |z - sign z|^2.
        perceptual, perceptual_weight, adversarial_weight, adversary_*: as in nn/picture_loss.py.
    """

    fully_convolutional = True
    exact = ("quantizer",)

    def __init__(
        self,
        image_size: int = 256,
        layout: str = "open-magvit2",
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: Sequence[int] = (4, 4, 4, 4, 4),
        decoder_multipliers: Sequence[int] = (),
        decoder_blocks: Sequence[int] = (),
        bits: Sequence[int] = (18,),
        lsb_first: bool = True,
        pixel: str = "l1",
        entropy_weight: float = 0.1,
        beta: float = 0.25,
        resize: str = "crop-bilinear",
        perceptual: str | None = None,
        perceptual_weight: float = 1.0,
        adversarial_weight: float = 0.0,
        adversary_start: int = 0,
        adversary_width: int = 64,
        adversary_layers: int = 3,
        adversary_adaptive: bool = True,
    ):
        super().__init__()
        parse_resize(resize)
        depths = {
            "multipliers": multipliers,
            "blocks": blocks,
            "decoder_multipliers": decoder_multipliers or multipliers,
            "decoder_blocks": decoder_blocks or blocks,
        }
        self.stride = 2 ** (len(multipliers) - 1)
        for name, value, fits in (
            ("layout", layout, layout in LAYOUTS),
            ("channels", channels, channels >= GROUPS and channels % GROUPS == 0),
            *((name, d, len(d) == len(multipliers) and d and min(d) >= 1) for name, d in depths.items()),
            ("image_size", image_size, image_size >= self.stride and image_size % self.stride == 0),
            ("pixel", pixel, pixel in ("l1", "l2")),
        ):
            if not fits:
                raise ValueError(f"magvit2 cannot have {name} = {value}; see the arguments of {type(self).__name__}")
        self.image_size, self.resize, self.pixel = image_size, resize, pixel
        self.quantizer = quantizers.make(
            "lfq", size=0, dim=0, bits=bits, lsb_first=lsb_first, entropy_weight=entropy_weight, beta=beta
        )
        self.codebook_sizes = self.quantizer.sizes
        encoder, decoder = (_Encoder, _Decoder) if layout == LAYOUTS[0] else (_AttendedEncoder, _AttendedDecoder)
        width, dim = channels, self.quantizer.dim
        self.encoder = encoder(width, depths["multipliers"], depths["blocks"], dim)
        self.decoder = decoder(width, depths["decoder_multipliers"], depths["decoder_blocks"], dim)
        self.picture_loss = PictureLoss(
            perceptual, perceptual_weight, adversarial_weight, adversary_start, adversary_width, adversary_layers,
            adversary_adaptive,
        )  # fmt: skip

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        per_position = len(self.codebook_sizes)
        return (*super().grid(height, width), *([per_position] if per_position > 1 else []))

    def token_codebook(self, grid: tuple[int, ...] | None = None) -> Tensor:
        height, width, *_ = self.check_grid(grid)
        return torch.tensor(self.quantizer.books).repeat(height * width)

    def encode(self, images: Tensor) -> Tensor:
        return self.quantizer.encode(self._signals(images * 2 - 1)).flatten(1)  # [B, n*K]

    def decode(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        pixels = self._pixels(self.embed(codes, grid), self.check_grid(grid))
        return ((pixels.float() + 1) / 2).clamp(0, 1)

    def embed(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        return self.quantizer.vectors(codes.unflatten(1, (-1, len(self.codebook_sizes)))).to(self.dtype)  # [B, n, D]

    def loss(self, batch: Mapping[str, Any], step: int, stage: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels, perceptual, adversary, and the quantizer's own terms, which count in training mode only."""
        images = batch["images"]
        vectors, _, own = self.quantizer(self._signals(images * 2 - 1), step)
        made = (self._pixels(vectors, self.grid(*images.shape[2:])).float() + 1) / 2
        error = (made - images) * 2  # [B, 3, H, W]
        pixels = (error.abs() if self.pixel == "l1" else error.square()).mean()
        rebuilt, further = self.picture_loss(made, images, pixels, step, self.decoder.conv_out.weight)
        parts = {"pixels": pixels, "quantizer": own, **further, "psnr": psnr(error)}
        return rebuilt + own, {name: part.detach() for name, part in parts.items()}

    def critic(self) -> PatchCritic | None:
        return self.picture_loss.critic

    def _signals(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels).flatten(2).transpose(1, 2)  # [B, n, D]

    def _pixels(self, vectors: Tensor, grid: tuple[int, ...]) -> Tensor:
        return self.decoder(vectors.transpose(1, 2).unflatten(2, grid[:2]))  # [B, 3, H, W]

    @classmethod
    def tiny(cls) -> MAGVIT2Tokenizer:
        return cls(image_size=16, channels=32, multipliers=(1, 1, 1), blocks=(1, 1, 1), bits=(3, 4))


# ---- layers of open-magvit2, by their published names


class _Block(nn.Module):
    def __init__(self, channels: int, out: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, channels, EPS), nn.GroupNorm(GROUPS, out, EPS)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class _Level(nn.Module):
    """The blocks of one resolution, and the change to the next."""

    def __init__(self, channels: int, out: int, depth: int):
        super().__init__()
        self.block = _blocks(channels, out, depth)
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.block, self.downsample, self.upsample):
            x = x if layer is None else layer(x)
        return x


class _Encoder(nn.Module):
    def __init__(self, channels: int, multipliers: Sequence[int], blocks: Sequence[int], bits: int):
        super().__init__()
        width = channels
        self.conv_in = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for i, multiplier in enumerate(multipliers):
            level = _Level(width, channels * multiplier, blocks[i])
            width = channels * multiplier
            if i < len(multipliers) - 1:
                level.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.down.append(level)
        self.mid_block = _blocks(width, width, blocks[-1])
        self.norm_out = nn.GroupNorm(GROUPS, width, EPS)
        self.conv_out = nn.Conv2d(width, bits, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in (*self.down, *self.mid_block):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # [B, D, h, w]


class _Decoder(nn.Module):
    def __init__(self, channels: int, multipliers: Sequence[int], blocks: Sequence[int], bits: int):
        super().__init__()
        width = channels * multipliers[-1]
        self.conv_in = nn.Conv2d(bits, width, 3, padding=1)
        self.mid_block = _blocks(width, width, blocks[-1])
        self.up, self.adaptive = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(len(multipliers))):  # stored from the finest level to the coarsest
            self.adaptive.insert(0, _AdaptiveNorm(bits, width))
            level = _Level(width, channels * multipliers[i], blocks[i])
            width = channels * multipliers[i]
            if i > 0:
                level.upsample = _Upsample(width)
            self.up.insert(0, level)
        self.norm_out = nn.GroupNorm(GROUPS, width, EPS)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, code: Tensor) -> Tensor:
        x = self.conv_in(code)
        for block in self.mid_block:
            x = block(x)
        for adapt, level in zip(reversed(self.adaptive), reversed(self.up), strict=True):
            x = level(adapt(x, code))
        return self.conv_out(F.silu(self.norm_out(x)))  # [B, 3, H, W]


class _AdaptiveNorm(nn.Module):
    """Normalised features, scaled and shifted per channel by deviation and mean of the picture's code vectors."""

    def __init__(self, bits: int, channels: int):
        super().__init__()
        self.gn = nn.GroupNorm(GROUPS, channels, EPS, affine=False)
        self.gamma, self.beta = nn.Linear(bits, channels), nn.Linear(bits, channels)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        code = code.flatten(2)  # [B, D, h*w]
        # the published one divides by n - 1, which leaves one position without a spread: it is 0 there
        spread = (code.var(2, correction=min(1, code.shape[2] - 1)) + EPS).sqrt()
        scale, shift = self.gamma(spread), self.beta(code.mean(2))  # [B, C] each
        return scale[:, :, None, None] * self.gn(x) + shift[:, :, None, None]


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).unflatten(1, (4, -1)).transpose(1, 2)  # the corner comes before the channel: [B, C, 4, h, w]
        return F.pixel_shuffle(x.flatten(1, 2), 2)


def _blocks(channels: int, out: int, depth: int) -> nn.ModuleList:
    return nn.ModuleList(_Block(channels if i == 0 else out, out) for i in range(depth))


# ---- layers of show-o, by their published names: taming's, of varying depth, with the 1 x 1 convolutions inside


class _AttendedEncoder(taming.Encoder):
    def __init__(self, channels: int, multipliers: Sequence[int], blocks: Sequence[int], bits: int):
        super().__init__(channels, multipliers, 1, bits, (), True, GROUPS)
        _deepen(self.down, channels, multipliers, blocks)
        self.quant_conv = nn.Conv2d(bits, bits, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_conv(super().forward(x))


class _AttendedDecoder(taming.Decoder):
    def __init__(self, channels: int, multipliers: Sequence[int], blocks: Sequence[int], bits: int):
        super().__init__(channels, multipliers, 0, bits, (), True, GROUPS)  # one block a level
        _deepen(self.up, channels, multipliers, blocks)
        self.post_quant_conv = nn.Conv2d(bits, bits, 1)

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(self.post_quant_conv(z))


def _deepen(levels: nn.ModuleList, channels: int, multipliers: Sequence[int], blocks: Sequence[int]) -> None:
    """Levels of one block each get the blocks that they lack."""
    for level, multiplier, depth in zip(levels, multipliers, blocks, strict=True):
        width = channels * multiplier
        assert isinstance(level, taming.Level)
        level.block.extend(taming.ResnetBlock(width, width, GROUPS) for _ in range(depth - 1))
