"""Bodies of diffusion models, and what turns conditions into the form that bodies take.

Shapes: B pictures of C channels, H x W pixels or latents; conditions have F features; g x g patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SanaTransformer2DModel, UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from torch import Tensor, nn


@dataclass
class Hints:
    """What a body is told beside x_t and t; any part may be missing.

    Attributes:
        patches: [B, F, h, w], of places in the picture.
        vector: [B, F], of all of it.
        context: [B, L, F], to attend to.
        mask: bool [B, L], True where a token of the context counts; None: all do.
    """

    patches: Tensor | None = None
    vector: Tensor | None = None
    context: Tensor | None = None
    mask: Tensor | None = None

    @staticmethod
    def cat(first: Hints, second: Hints) -> Hints:
        """Both batches, one after the other; the shorter context is filled up."""

        def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.cat([a, b])

        patches, vector = both(first.patches, second.patches), both(first.vector, second.vector)
        if first.context is None or second.context is None:
            return Hints(patches, vector)
        a, b = first.context, second.context
        if first.mask is None and second.mask is None and a.shape == b.shape:
            return Hints(patches, vector, torch.cat([a, b]))
        longer = max(a.shape[1], b.shape[1])
        contexts, masks = [], []
        for part, mask in ((a, first.mask), (b, second.mask)):
            more = longer - part.shape[1]
            contexts.append(F.pad(part, (0, 0, 0, more)))
            masks.append(F.pad(_ones(part) if mask is None else mask, (0, more)))
        return Hints(patches, vector, torch.cat(contexts), torch.cat(masks))


def _ones(context: Tensor) -> Tensor:
    return torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)


# ---- conditions


class Conditioner(nn.Module):
    """Codes, vectors and texts -> Hints. Each part has a learned null, which stands where it is missing or dropped.

    Codes: an embedding a sub-token, summed; "patches" keeps their places, "context" gives each position one of its own.
    Vectors: normalised, two layers; one of them is added to the time ("time") and, with "patches", spread over places
    by one more layer, as in generators of pictures from a vector (Radford et al. 2016, arXiv 1511.06434); or any number
    are attended to ("context"). Texts: hidden states of a text encoder, one layer, attended to.

    Args:
        width: F.
        codebook_sizes, grid: of the codes; positions, then sub-tokens. One size stands for every sub-token.
        codes_as: "patches" or "context".
        vector_size: D of the vectors.
        vectors_as: "time", "patches" or "context".
        text_size: of the hidden states.
        places: h, w that a vector is spread over; theirs where codes are patches.
    """

    offsets: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        width: int,
        codebook_sizes: Sequence[int] | None = None,
        grid: Sequence[int] | None = None,
        codes_as: str = "patches",
        vector_size: int | None = None,
        vectors_as: str = "time",
        text_size: int | None = None,
        places: Sequence[int] | None = None,
    ):
        super().__init__()
        self.width, self.codes_as, self.vectors_as = width, codes_as, vectors_as
        self.parts: list[str] = []
        self.null = nn.ParameterDict()
        self.places = tuple(places or ())  # of what stands at places
        if codebook_sizes is not None:
            assert grid is not None
            self._add("codes")
            self.positions, subs = tuple(grid[:2]), math.prod(grid[2:])
            if codes_as == "patches":
                self.places = self.positions
            sizes = list(codebook_sizes) * (subs if len(codebook_sizes) == 1 else 1)
            self.sizes = sizes
            self.code_embedding = nn.Embedding(sum(sizes), width)
            nn.init.normal_(self.code_embedding.weight, std=subs**-0.5)
            self.register_buffer("offsets", torch.tensor([0, *sizes[:-1]]).cumsum(0), persistent=False)
            if codes_as == "context":
                self.code_positions = nn.Parameter(torch.randn(math.prod(self.positions), width) * 0.02)
        if vector_size is not None:
            self._add("vectors")
            self.register_buffer("mean", torch.zeros(vector_size))
            self.register_buffer("std", torch.ones(vector_size))
            self.vector_in = nn.Sequential(nn.Linear(vector_size, width), nn.SiLU(), nn.Linear(width, width))
            if vectors_as == "patches":
                self.spread = nn.Linear(width, math.prod(self.places) * width)
        if text_size is not None:
            self._add("texts")
            self.text_in = nn.Linear(text_size, width)

    def _add(self, part: str) -> None:
        self.parts.append(part)
        self.null[part] = nn.Parameter(torch.randn(self.width) * 0.02)

    @property
    def has_vector(self) -> bool:
        return "vectors" in self.parts and self.vectors_as != "context"

    @property
    def has_patches(self) -> bool:
        return self._aligned or self.has_vector and self.vectors_as == "patches"

    @property
    def has_context(self) -> bool:
        return len(self.parts) > self.has_vector + self._aligned

    @property
    def _aligned(self) -> bool:
        return "codes" in self.parts and self.codes_as == "patches"

    @torch.no_grad()
    def fit(self, vectors: Tensor) -> None:
        """Take mean and deviation from these vectors [n, M, D]."""
        flat = vectors.flatten(0, -2).float()
        self.mean.copy_(flat.mean(0))
        self.std.copy_(flat.std(0, unbiased=False).clamp_min(1e-4))

    @property
    def fitted(self) -> bool:
        return bool((self.mean != 0).any() or (self.std != 1).any())

    def forward(
        self,
        count: int,
        codes: Tensor | None = None,
        vectors: Tensor | None = None,
        texts: tuple[Tensor, Tensor] | None = None,
        dropped: Mapping[str, Tensor] | None = None,
    ) -> Hints:
        """Hints of `count` pictures.

        codes int64 [B, N]; vectors [B, M, D]; texts ([B, L, D], bool [B, L] of tokens that count; without any
        there is no text); dropped: bool [B] of the pictures that go without a part.
        """
        hints, contexts = Hints(), []
        if "codes" in self.parts:
            tokens = None if codes is None else self._codes(codes)
            if self._aligned:
                tokens = self._fill("codes", tokens, (count, math.prod(self.places)), dropped)
                hints.patches = tokens.transpose(1, 2).unflatten(2, self.places)
            else:
                contexts.append(self._attended("codes", tokens, None, count, dropped))
        if "vectors" in self.parts:
            tokens = None if vectors is None else self.vector_in((vectors - self.mean) / self.std)
            if self.has_vector:
                hints.vector = self._fill("vectors", tokens, (count, 1), dropped)[:, 0]
                if self.vectors_as == "patches":
                    spread = self.spread(hints.vector).unflatten(1, (self.width, *self.places))
                    hints.patches = spread if hints.patches is None else hints.patches + spread
            else:
                tokens = None if tokens is None else tokens + _positions(tokens)
                contexts.append(self._attended("vectors", tokens, None, count, dropped))
        if "texts" in self.parts:
            if texts is None:
                contexts.append(self._attended("texts", None, None, count, None))
            else:
                empty = ~texts[1].any(1)  # of no words at all
                gone = {"texts": empty if dropped is None else empty | dropped["texts"]}
                contexts.append(self._attended("texts", self.text_in(texts[0]), texts[1], count, gone))
        if contexts:
            hints.context = torch.cat([context for context, _ in contexts], 1)
            if any(mask is not None for _, mask in contexts):
                hints.mask = torch.cat([_ones(c) if mask is None else mask for c, mask in contexts], 1)
        return hints

    def _codes(self, codes: Tensor) -> Tensor:
        subs = len(self.sizes)
        tokens = self.code_embedding(codes.unflatten(1, (-1, subs)) + self.offsets).sum(2)  # [B, P, F]
        return tokens + self.code_positions if self.codes_as == "context" else tokens

    def _fill(
        self, part: str, tokens: Tensor | None, shape: tuple[int, int], dropped: Mapping[str, Tensor] | None
    ) -> Tensor:
        null = self.null[part]
        if tokens is None:
            return null.expand(*shape, -1)
        return tokens if dropped is None else torch.where(dropped[part][:, None, None], null.to(tokens.dtype), tokens)

    def _attended(
        self, part: str, tokens: Tensor | None, mask: Tensor | None, count: int, dropped: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens and their mask; a picture without them has the null for its one token."""
        filled = self._fill(part, tokens, (count, 1), dropped)
        if tokens is None or dropped is None:
            return filled, mask
        first = torch.arange(tokens.shape[1], device=tokens.device) == 0
        return filled, torch.where(dropped[part][:, None], first, _ones(tokens) if mask is None else mask)


def _positions(tokens: Tensor) -> Tensor:
    """Sines and cosines of the place in the sequence: [M, F]."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return Timesteps(tokens.shape[2], flip_sin_to_cos=True, downscale_freq_shift=0)(places).to(tokens.dtype)


# ---- bodies


class DiT(nn.Module):
    """Transformer over patches, modulated by the time (adaLN-Zero, Peebles and Xie 2023, arXiv 2212.09748).

    Codes are added to the patches they stand at: nearest neighbours where patches are finer, a strided convolution
    where codes are. A context is attended to in every block. Untrained it says 0 of everything, and every block passes
    on what came in.

    Args:
        channels, out_channels: of x_t and of what is said of it.
        size: H = W.
        patch: pixels a patch and side.
        width, depth, heads: of the transformer; width is also F.
        places: h, w of the codes, or None.
        context: whether there is one.
        local: a depthwise 3 x 3 convolution of the patches before each block, at first 0 (conditional positions, Chu
            et al. 2021, arXiv 2102.10882): small models find out much sooner what is next to what.
    """

    positions: Tensor

    def __init__(
        self,
        channels: int,
        out_channels: int,
        size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        places: tuple[int, ...] | None = None,
        context: bool = False,
        local: bool = False,
    ):
        super().__init__()
        if size % patch or width % heads or width % 4:
            raise ValueError(
                f"patch_size {patch} must divide the picture's {size} pixels or latents a side, heads {heads} the "
                f"width {width}, and 4 the width"
            )
        self.side, self.patch = size // patch, patch
        self.patch_in = nn.Conv2d(channels, width, patch, stride=patch)
        positions = get_2d_sincos_pos_embed(width, self.side, output_type="pt")
        self.register_buffer("positions", positions.float(), persistent=False)  # [g*g, F]
        self.finer = _finer(places, self.side)
        self.codes_in = nn.Conv2d(width, width, self.finer, stride=self.finer) if self.finer > 1 else None
        self.time_steps = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_in = TimestepEmbedding(256, width)
        self.blocks = nn.ModuleList(_Block(width, heads, context, local) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch * patch * out_channels)
        self._initialise()

    def _initialise(self) -> None:
        """As published: torch's own start lets a third of the variance through, and attention is late to learn."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.patch_in.weight.view(self.patch_in.out_channels, -1))
        for block in self.blocks:
            assert isinstance(block, _Block)
            for layer in (block.modulation, *([block.cross.out] if block.cross else ())):
                _zero(layer)
        for layer in (self.modulation, self.out):
            _zero(layer)

    def forward(self, x: Tensor, t: Tensor, hints: Hints) -> Tensor:
        """x_t [B, C, H, W], t float [B] of 1000 -> [B, out_channels, H, W]."""
        patches = self.patch_in(x)  # [B, F, g, g]
        if hints.patches is not None:
            codes = self.codes_in(hints.patches) if self.codes_in else hints.patches
            patches = patches + F.interpolate(codes, size=(self.side, self.side))
        tokens = patches.flatten(2).transpose(1, 2) + self.positions.to(patches.dtype)
        time = self.time_in(self.time_steps(t).to(x.dtype))  # [B, F]
        time = F.silu(time if hints.vector is None else time + hints.vector)
        mask = None if hints.mask is None else hints.mask[:, None, None]  # [B, 1, 1, L]
        for block in self.blocks:
            tokens = block(tokens, time, hints.context, mask)
        shift, scale = self.modulation(time)[:, None].chunk(2, 2)
        out = self.out(self.norm(tokens) * (1 + scale) + shift)  # [B, g*g, p*p*C]
        out = out.unflatten(1, (self.side, self.side)).unflatten(3, (self.patch, self.patch, -1))
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _finer(places: tuple[int, ...] | None, side: int) -> int:
    """Codes a patch and side; 1 where patches are the finer ones. ValueError where they do not fit."""
    if places is None:
        return 1
    if len(places) != 2 or places[0] != places[1] or (side % places[0] and places[0] % side):
        raise ValueError(
            f"codes of grid {places} do not fit {side} x {side} patches: one must be a multiple of the other; choose "
            "another patch_size, or codes_as: context"
        )
    return max(1, places[0] // side)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, context: bool, local: bool):
        super().__init__()
        self.local = _zero(nn.Conv2d(width, width, 3, padding=1, groups=width)) if local else None
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attention = _Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width, eps=1e-6) if context else None
        self.cross = _Attention(width, heads) if context else None
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.local is not None:
            side = math.isqrt(x.shape[1])
            x = x + self.local(x.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, 2)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(h, h)
        if self.cross is not None:
            assert self.cross_norm is not None and context is not None
            x = x + self.cross(self.cross_norm(x), context, mask)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key_value, self.out = (nn.Linear(width, n * width) for n in (1, 2, 1))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, F] attends to [B, L, F]; mask: bool [B, 1, 1, L], True where it may."""
        query = self.query(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(context).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


def _zero(layer: Any) -> Any:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class UNet(nn.Module):
    """diffusers' U-Net, scale and shift by the time as in ADM (Dhariwal and Nichol 2021).

    Codes are enlarged to the picture (nearest neighbours) and concatenated with x_t. A context is attended to beside
    the picture itself, where there is attention. Untrained it says 0 of everything, and every block passes
    on what came in.

    Args:
        channels, out_channels: of x_t and of what is said of it.
        size: H = W.
        widths: channels of each level; a level halves H and W.
        attention: whether a level has attention; the middle has it.
        layers: residual blocks a level.
        head_width: channels a head.
        features: F.
        patches, vector, context: whether there are any.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        size: int,
        widths: Sequence[int],
        attention: Sequence[bool],
        layers: int,
        head_width: int,
        features: int,
        patches: bool = False,
        vector: bool = False,
        context: bool = False,
    ):
        super().__init__()
        if len(attention) != len(widths) or size % 2 ** (len(widths) - 1):
            raise ValueError(
                f"the U-Net of {len(widths)} levels needs as many values of unet_attention, got {len(attention)}, and "
                f"a side divisible by {2 ** (len(widths) - 1)}, got {size}"
            )
        kind = "CrossAttn" if context else "Attn"
        levels = [kind if attends else "" for attends in attention]
        net: Any = UNet2DConditionModel(
            sample_size=size,
            in_channels=channels + features * patches,
            out_channels=out_channels,
            down_block_types=tuple(f"{level}DownBlock2D" for level in levels),
            up_block_types=tuple(f"{level}UpBlock2D" for level in reversed(levels)),
            mid_block_type="UNetMidBlock2DCrossAttn" if context else "UNetMidBlock2D",
            block_out_channels=tuple(widths),
            layers_per_block=layers,
            norm_num_groups=math.gcd(32, *widths),
            cross_attention_dim=features,
            attention_head_dim=tuple(max(1, w // head_width) for w in widths) if context else head_width,
            class_embed_type="identity" if vector else None,
            resnet_time_scale_shift="scale_shift",
        )
        self.vector_in = nn.Linear(features, 4 * widths[0]) if vector else None
        last = {"ResnetBlock2D": "conv2", "Attention": "to_out.0", "Transformer2DModel": "proj_out"}
        for module in net.modules():
            if (name := last.get(type(module).__name__)) and getattr(module, "residual_connection", True):
                _zero(module.get_submodule(name))
        _zero(net.conv_out)
        self.net = net

    def forward(self, x: Tensor, t: Tensor, hints: Hints) -> Tensor:
        """x_t [B, C, H, W], t float [B] of 1000 -> [B, out_channels, H, W]."""
        if hints.patches is not None:
            x = torch.cat([x, F.interpolate(hints.patches, size=x.shape[2:])], 1)
        vector = None if self.vector_in is None else self.vector_in(hints.vector)
        return self.net(
            x,
            t,
            encoder_hidden_states=hints.context,
            encoder_attention_mask=hints.mask,
            class_labels=vector,
            return_dict=False,
        )[0]


class Sana(nn.Module):
    """diffusers' SANA (Xie et al. 2024, arXiv 2410.10629): linear attention, mixing convolutions, no positions.

    It is told everything through attention: its caption projection takes F features in the place of a text's. Untrained
    it says 0 of everything.

    Args:
        channels, out_channels: of x_t and of what is said of it.
        size: H = W.
        patch: latents a patch and side.
        width, depth: of the transformer; width is also F. Its linear attention has heads of 32.
        heads: of the attention to the context.
    """

    def __init__(self, channels: int, out_channels: int, size: int, patch: int, width: int, depth: int, heads: int):
        super().__init__()
        if size % patch or width % heads or width % 32:
            raise ValueError(
                f"patch_size {patch} must divide the picture's {size} pixels or latents a side, heads {heads} and 32 "
                f"the width {width}"
            )
        net: Any = SanaTransformer2DModel(
            in_channels=channels,
            out_channels=out_channels,
            sample_size=size,
            patch_size=patch,
            num_attention_heads=width // 32,
            attention_head_dim=32,
            num_layers=depth,
            num_cross_attention_heads=heads,
            cross_attention_head_dim=width // heads,
            cross_attention_dim=width,
            caption_channels=width,
        )
        _zero(net.proj_out)
        self.net = net

    def forward(self, x: Tensor, t: Tensor, hints: Hints) -> Tensor:
        """x_t [B, C, H, W], t float [B] of 1000 -> [B, out_channels, H, W]."""
        return self.net(x, hints.context, t, encoder_attention_mask=hints.mask, return_dict=False)[0]
