"""The tokenizer of Emu3 (Wang et al. 2024, arXiv 2409.18869; baaivision/Emu3) for still images.

The module is transformers' `Emu3VQVAE`, made for videos: a still stands for `frames` equal ones, which become one set
of codes, and the first of the decoded frames is the picture. Here the layers that treat every frame alone run on one
frame only, for the same codes and pixels.

Shapes: B images, H x W pixels, h x w positions (H and W over the stride 2**(levels - 1)), F frames, D size of a code's
vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from unitok.nn.quantizers import nearest, straight_through
from unitok.tokenizers.base import ImageTokenizer, parse_resize


class Emu3Tokenizer(ImageTokenizer):
    """The published model is the default; a small one has fewer `channels`.

    Args:
        image_size: pixels a side, a multiple of the stride; other multiples can be encoded too.
        channels: of the first level, a multiple of 32; `multipliers` times as many in every level.
        blocks: residual blocks a level, and temporal ones.
        attention: the levels (0 is the full resolution) whose blocks are each followed by attention.
        frames: what one set of codes stands for, a power of two.
        code_dim: size of a code's vector, and channels of the latent.
        beta: weight of the commitment of vectors to their codes.
    """

    fully_convolutional = True

    def __init__(
        self,
        image_size: int = 512,
        channels: int = 256,
        multipliers: Sequence[int] = (1, 2, 2, 4),
        blocks: int = 2,
        attention: Sequence[int] = (3,),
        frames: int = 4,
        codebook_size: int = 32768,
        code_dim: int = 4,
        beta: float = 0.25,
        resize: str = "crop-bicubic",
    ):
        super().__init__()
        parse_resize(resize)
        levels = len(multipliers)
        self.stride = 2 ** (levels - 1)
        for name, value, fits in (
            ("channels", channels, channels >= 32 and channels % 32 == 0),
            ("multipliers", multipliers, levels >= 1 and min(multipliers) >= 1),
            ("blocks", blocks, blocks >= 1),
            ("attention", attention, all(0 <= level < levels for level in attention)),
            ("frames", frames, frames >= 1 and frames & (frames - 1) == 0),
            ("codebook_size", codebook_size, codebook_size >= 2),
            ("code_dim", code_dim, code_dim >= 1),
            ("image_size", image_size, image_size >= self.stride and image_size % self.stride == 0),
        ):
            if not fits:
                raise ValueError(f"emu3 cannot have {name} = {value}; see the arguments of {type(self).__name__}")
        self.image_size, self.resize, self.codebook_sizes = image_size, resize, (codebook_size,)
        self.frames, self.beta = frames, beta
        self.model = Emu3VQVAE(
            Emu3VQVAEConfig(
                codebook_size=codebook_size,
                embed_dim=code_dim,
                latent_channels=code_dim,
                temporal_downsample_factor=frames,
                base_channels=channels,
                channel_multiplier=list(multipliers),
                num_res_blocks=blocks,
                attn_resolutions=list(attention),
                hidden_size=channels * multipliers[-1],  # of attention, which the published model has there alone
            )
        )

    def encode(self, images: Tensor) -> Tensor:
        return nearest(self.latent(images), self.model.quantize.embedding.weight)

    def decode(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        pixels = self.pixels(self.embed(codes, grid), self.check_grid(grid))
        return ((pixels + 1) / 2).clamp(0, 1)

    def embed(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        return self.model.quantize.embedding(codes)  # [B, h*w, D]

    def loss(self, batch: Mapping[str, Any], step: int, stage: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of pixels in [-1, 1], and that between vectors and codes: codes follow vectors with weight 1,
        vectors codes with `beta`. The perceptual and adversarial terms of the published training are not here."""
        images = batch["images"]
        z = self.latent(images)
        chosen = self.embed(nearest(z.detach(), self.model.quantize.embedding.weight), self.grid(*images.shape[2:]))
        pixels = self.pixels(straight_through(z, chosen), self.grid(*images.shape[2:]))
        error = F.mse_loss(pixels, 2 * images - 1)
        quantizer = F.mse_loss(chosen, z.detach()) + self.beta * F.mse_loss(z, chosen.detach())
        parts = {"pixel": error, "quantizer": quantizer, "psnr": 10 * (4 / error).log10()}
        return error + quantizer, {name: part.detach() for name, part in parts.items()}

    def latent(self, images: Tensor) -> Tensor:
        """Images in [0, 1] -> the vectors that are looked up in the codebook [B, h*w, D]."""
        encoder = self.model.encoder
        h = encoder.middle_block(encoder.down_block(encoder.conv_in(2 * images - 1)))
        h = encoder.conv_out(F.silu(encoder.norm_out(h)))
        h = h.unsqueeze(2).repeat(1, 1, self.frames, 1, 1)  # [B, D, F, h, w]
        for conv in encoder.time_conv:
            h = F.silu(conv(h))
        for block in encoder.time_res_stack:
            h = block(h)
        return self.model.quant_conv(h).flatten(2).transpose(1, 2)

    def pixels(self, vectors: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Vectors [B, h*w, D] -> pixels in [-1, 1], not clamped."""
        decoder = self.model.decoder
        codes = vectors.transpose(1, 2).unflatten(2, (1, *grid)).contiguous()  # [B, D, 1, h, w]
        both = torch.cat([self.model.post_quant_conv(codes), codes])  # the second half steers the norms
        for block in decoder.time_res_stack:
            both = block(both)
        for conv in decoder.time_conv:
            both = F.silu(conv(both))
        h, steering = both[:, :, 0].chunk(2)  # the first of the frames [B, D, h, w]
        h = decoder.up_block(decoder.middle_block(decoder.conv_in(h), steering), steering)
        return decoder.conv_out(F.silu(decoder.norm_out(h, steering)))

    @classmethod
    def tiny(cls) -> Emu3Tokenizer:
        return cls(image_size=16, channels=32, multipliers=(1, 1, 2), blocks=1, attention=(2,), codebook_size=64)
