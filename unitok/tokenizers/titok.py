"""TiTok (Yu et al. 2024, arXiv 2406.07550; bytedance/1d-tokenizer): a picture as a few tokens that have no place in it.

    encoder   a ViT over patches and N learnt latent tokens; what the latent tokens become is looked up in the codebook
    decoder   a ViT over the codes' vectors and a mask token for every patch
    pixels    single-stage models: patches by a linear layer, then one convolution
              two-stage models: logits over the codes of MaskGIT's VQGAN, whose expected vectors its decoder turns into
              pixels; they also mix up positions and channels before the lookup, which is kept

Shapes: B images, N tokens, D size of a code's vector, C width, g x g patches, P codes and Q vector size of the pixel
decoder.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.nn.adversary import PatchCritic
from unitok.nn.picture_loss import PictureLoss
from unitok.nn.quantizers import VQ
from unitok.tokenizers.base import ImageTokenizer, parse_resize


class TiTokTokenizer(ImageTokenizer):
    """The published TiTok-L-32 is the default.

    Args:
        image_size, patch: pixels a side, of the picture and of a patch. Other sizes cannot be encoded.
        tokens: N.
        encoder_width, encoder_layers, decoder_width, decoder_layers, head_width: of the transformers; the widths are
            multiples of `head_width`.
        codebook_size, code_dim: codes, and the size of their vectors.
        normalize: lookup by the angle; the codes' vectors have length 1.
        pixel_codes: codes that the decoder of a two-stage model predicts; 0 for a single-stage model, which ignores
            the arguments that follow.
        pixel_dim, pixel_channels, pixel_multipliers, pixel_blocks: size of those codes' vectors, channels of the first
            level (a multiple of 32) and their multiples in every level, residual blocks a level.
        beta: weight of the commitment of vectors to their codes.
        perceptual, perceptual_weight, adversarial_weight, adversary_*: as in nn/picture_loss.py.
    """

    token_order = "latent"

    def __init__(
        self,
        image_size: int = 256,
        patch: int = 16,
        tokens: int = 32,
        encoder_width: int = 1024,
        encoder_layers: int = 24,
        decoder_width: int = 1024,
        decoder_layers: int = 24,
        head_width: int = 64,
        codebook_size: int = 4096,
        code_dim: int = 12,
        normalize: bool = True,
        pixel_codes: int = 1024,
        pixel_dim: int = 256,
        pixel_channels: int = 128,
        pixel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        pixel_blocks: int = 2,
        beta: float = 0.25,
        resize: str = "crop-bicubic",
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
        self.two_stage = pixel_codes > 0
        for name, value, fits in (
            ("patch", patch, patch >= 1),
            ("image_size", image_size, image_size >= patch and image_size % patch == 0),
            ("tokens", tokens, tokens >= 1),
            ("encoder_width", encoder_width, encoder_width >= head_width and encoder_width % head_width == 0),
            ("decoder_width", decoder_width, decoder_width >= head_width and decoder_width % head_width == 0),
            ("codebook_size", codebook_size, codebook_size >= 2),
            ("pixel_codes", pixel_codes, pixel_codes >= 0),
            ("pixel_channels", pixel_channels, not self.two_stage or pixel_channels % 32 == 0),
            ("pixel_multipliers", pixel_multipliers, not self.two_stage or 2 ** (len(pixel_multipliers) - 1) == patch),
        ):
            if not fits:
                raise ValueError(f"titok cannot have {name} = {value}; see the arguments of {type(self).__name__}")
        self.image_size, self.resize, self.codebook_sizes = image_size, resize, (codebook_size,)
        self.tokens, side = tokens, image_size // patch
        out = pixel_codes if self.two_stage else 0
        self.encoder = _Encoder(
            side, patch, tokens, encoder_width, encoder_layers, head_width, code_dim, mixed=self.two_stage
        )
        self.decoder = _Decoder(side, patch, tokens, decoder_width, decoder_layers, head_width, code_dim, out)
        self.latent_tokens = _positions(tokens, encoder_width)
        self.apply(_init)
        self.quantize = VQ(codebook_size, code_dim, normalize, beta)
        if self.two_stage:
            self.pixel_quantize = nn.ModuleDict({"embedding": nn.Embedding(pixel_codes, pixel_dim)})
            self.pixel_decoder = _PixelDecoder(pixel_dim, pixel_channels, pixel_multipliers, pixel_blocks)
        self.picture_loss = PictureLoss(
            perceptual, perceptual_weight, adversarial_weight, adversary_start, adversary_width, adversary_layers,
            adversary_adaptive,
        )  # fmt: skip

    def encode(self, images: Tensor) -> Tensor:
        return self.quantize.encode(self.encoder(images, self.latent_tokens)).squeeze(-1)  # [B, N]

    def decode(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        return self.pixels(self.embed(codes)).clamp(0, 1)

    def embed(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        return self.quantize.vectors(codes.unsqueeze(-1))  # [B, N, D]

    def pixels(self, vectors: Tensor) -> Tensor:
        """Vectors of codes [B, N, D] -> pixels [B, 3, H, W], not clamped."""
        out = self.decoder(vectors)
        if not self.two_stage:
            return out
        book: Any = self.pixel_quantize["embedding"]
        return self.pixel_decoder(torch.einsum("bphw,pq->bqhw", out.softmax(1), book.weight))

    def loss(self, batch: Mapping[str, Any], step: int, stage: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the pixels, perceptual, adversary, and the quantizer's loss. In a two-stage model encoder
        and codes stay as they are and the rest is tuned, as its second stage does. The published first stage
        (prediction of VQGAN codes) is not here."""
        images = batch["images"]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.two_stage):
            chosen, _, quantizer = self.quantize(self.encoder(images, self.latent_tokens), step)
        made = self.pixels(chosen)
        error = F.mse_loss(made, images)
        last: Any = (self.pixel_decoder if self.two_stage else self.decoder).conv_out
        rebuilt, further = self.picture_loss(made, images, error, step, last.weight)
        parts = {"pixel": error, "quantizer": quantizer, **further, "psnr": -10 * error.log10()}
        return rebuilt + quantizer * (not self.two_stage), {name: part.detach() for name, part in parts.items()}

    def critic(self) -> PatchCritic | None:
        return self.picture_loss.critic

    @classmethod
    def tiny(cls) -> TiTokTokenizer:
        return cls(
            image_size=16, patch=4, tokens=12, encoder_width=32, encoder_layers=2, decoder_width=32, decoder_layers=1,
            head_width=16, codebook_size=256, code_dim=8, pixel_codes=0,
        )  # fmt: skip


# ---- the transformers; names of modules and parameters are the published ones


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class _Transformer(nn.Module):
    """What encoder and decoder share: one class token and g*g patches, then N latent tokens."""

    def __init__(self, side: int, tokens: int, width: int, layers: int, head_width: int):
        super().__init__()
        self.side = side
        self.class_embedding = _positions(1, width)
        self.positional_embedding = _positions(side**2 + 1, width)
        self.latent_token_positional_embedding = _positions(tokens, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(_Block(width, width // head_width) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)

    def mix(self, patches: Tensor, latents: Tensor) -> Tensor:
        """[B, g*g, C] and [B, N, C] -> [B, 1 + g*g + N, C]."""
        patches = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], 1) + self.positional_embedding
        x = self.ln_pre(torch.cat([patches, latents + self.latent_token_positional_embedding], 1))
        for block in self.transformer:
            x = block(x)
        return x


class _Encoder(_Transformer):
    def __init__(
        self, side: int, patch: int, tokens: int, width: int, layers: int, head_width: int, dim: int, mixed: bool
    ):
        super().__init__(side, tokens, width, layers, head_width)
        self.mixed = mixed
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.conv_out = nn.Conv2d(width, dim, 1)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """[B, 3, H, W] and [N, C] -> [B, N, D]."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = self.mix(patches, latent_tokens.expand(len(images), -1, -1))
        x = self.ln_post(x[:, 1 + self.side**2 :])  # [B, N, C]
        # the published two-stage models read the [N, C] numbers as [C, N]
        columns = x.reshape(len(x), x.shape[2], x.shape[1]) if self.mixed else x.transpose(1, 2)
        return self.conv_out(columns.unsqueeze(-1)).squeeze(-1).transpose(1, 2)


class _Decoder(_Transformer):
    """Args: out: logits a patch; 0: pixels."""

    def __init__(
        self, side: int, patch: int, tokens: int, width: int, layers: int, head_width: int, dim: int, out: int
    ):
        super().__init__(side, tokens, width, layers, head_width)
        self.decoder_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(_positions(1, width).data.unsqueeze(0))  # [1, 1, C]
        self.patch = None if out else patch
        self.conv_out: nn.Module = nn.Identity() if out else nn.Conv2d(3, 3, 3, padding=1)
        wide = [nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, out, 1)] if out else []
        self.ffn = nn.Sequential(*wide or [nn.Conv2d(width, patch * patch * 3, 1)])

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, N, D] -> logits [B, P, g, g] or pixels [B, 3, H, W]."""
        x = self.mix(self.mask_token.expand(len(vectors), self.side**2, -1), self.decoder_embed(vectors))
        x = self.ln_post(x[:, 1 : 1 + self.side**2])
        x = self.ffn(x.transpose(1, 2).unflatten(2, (self.side, self.side)))
        if self.patch is not None:
            x = x.unflatten(1, (self.patch, self.patch, 3)).permute(0, 3, 4, 1, 5, 2)  # [B, 3, g, patch, g, patch]
            x = x.flatten(4, 5).flatten(2, 3)
        return self.conv_out(x)


def _positions(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(width**-0.5 * torch.randn(count, width))


def _init(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        fan_in = module.weight[0].numel()
        # 0.02, as published, where 1024 numbers come in; narrow layers would pass nothing of the picture on
        nn.init.trunc_normal_(module.weight, std=0.64 * fan_in**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---- the decoder of MaskGIT's VQGAN (Chang et al. 2022, arXiv 2202.04200), by the names of its port


class _PixelBlock(nn.Module):
    def __init__(self, fan_in: int, fan_out: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, fan_in, eps=1e-6)
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, fan_out, eps=1e-6)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(fan_out, fan_out, 1, bias=False) if fan_in != fan_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        # the published weights belong to a shortcut around nothing: it starts at h, not at x
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class _PixelLevel(nn.Module):
    def __init__(self, widths: Sequence[int], upsample: bool):
        super().__init__()
        self.block = nn.ModuleList(_PixelBlock(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.upsample_conv = nn.Conv2d(widths[-1], widths[-1], 3, padding=1) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.upsample_conv is None else self.upsample_conv(F.interpolate(x, scale_factor=2.0))


class _PixelDecoder(nn.Module):
    def __init__(self, dim: int, channels: int, multipliers: Sequence[int], blocks: int):
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(_PixelBlock(widths[-1], widths[-1]) for _ in range(blocks))
        before = [*widths[1:], widths[-1]]  # what comes into a level: the width of the next lower resolution
        self.up = nn.ModuleList(
            _PixelLevel([a] + [b] * blocks, upsample=i > 0) for i, (a, b) in enumerate(zip(before, widths, strict=True))
        )
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, Q, g, g] -> [B, 3, H, W]."""
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
