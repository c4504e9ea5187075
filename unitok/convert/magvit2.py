"""Tokenizers of lookup-free quantization: Open-MAGVIT2's codes begin at the lowest bit, Show-o's at the highest.

Neither stores a codebook that one would need: a code is its bits.
"""

from __future__ import annotations

import torch

from unitok.convert.base import Format, Shapes, Source, agree, count, fill, setting, size
from unitok.nn.quantizers import codes_to_bits
from unitok.tokenizers.base import ImageTokenizer
from unitok.tokenizers.magvit2 import GROUPS, MAGVIT2Tokenizer

GRID = 16  # positions a side at the size that the published ones were trained at
SHOW_O = {"encoder": [4, 3, 4, 3, 4], "decoder": [4, 4, 3, 4, 3]}  # residual blocks of each level, as published
BUFFERS = ("quantize.embedding", "quantize.power_vals")  # of Show-o: all code vectors, and what each bit counts


def open_magvit2(source: Source, image_size: int | None) -> ImageTokenizer:
    """A config with token_factorization makes as many tokens a position as its factorized_bits, [6, 12] as published.

    Every level is as deep as the deepest, in the encoder and in the decoder: what one lacks is missing.
    """
    shapes, config = source.shapes, source.config
    levels = max(1, count(shapes, "encoder.down.{}."))
    channels, multipliers = _widths(shapes, "encoder.down", levels)
    depth = max(max(_depths(shapes, part)) for part in ("encoder.down", "decoder.up"))
    dim = size(shapes, "encoder.conv_out.weight")
    agree(config, ddconfig__ch=channels, ddconfig__ch_mult=multipliers, ddconfig__num_res_blocks=depth,
          ddconfig__z_channels=dim, embed_dim=dim, n_embed=2**dim)  # fmt: skip
    bits = setting(config, "factorized_bits", [9, 9]) if setting(config, "token_factorization") else [dim]
    if sum(bits) != dim:
        raise ValueError(f"the config says factorized_bits = {bits}, the tensors have {dim} bits: encoder.conv_out")
    tokenizer = MAGVIT2Tokenizer(
        image_size=image_size or GRID * 2 ** (len(multipliers) - 1), channels=channels, multipliers=multipliers,
        blocks=[depth] * len(multipliers), bits=bits, lsb_first=True,
    )  # fmt: skip
    return fill(tokenizer, source.state)


def show_o(source: Source, image_size: int | None) -> ImageTokenizer:
    """Its levels differ in depth: as published where there are five, as a config says (num_res_blocks of its encoder
    and decoder), else all as deep as the deepest; what a level then lacks is missing."""
    state, shapes = source.state, source.shapes
    levels = max(1, *(count(shapes, part + ".{}.") for part in ("encoder.down", "decoder.up")))
    channels, multipliers = _widths(shapes, "encoder.down", levels)
    _, decoder_multipliers = _widths(shapes, "decoder.up", levels)
    blocks = {}
    for part, where in (("encoder", "encoder.down"), ("decoder", "decoder.up")):
        usual = SHOW_O[part] if levels == len(SHOW_O[part]) else [max(_depths(shapes, where))] * levels
        said = setting(source.config, f"{part}.num_res_blocks", usual)
        blocks[part] = [said] * levels if isinstance(said, int) else said
    dim = size(shapes, "encoder.quant_conv.weight")
    for name, expected in zip(BUFFERS, ((2**dim, dim), (dim,)), strict=True):
        size(shapes, name)
        if shapes[name] != expected:
            raise ValueError(f"the tensors do not fit: {name} is {shapes[name]}, expected {expected}")
    vectors, values = (state.pop(name) for name in BUFFERS)
    signs = codes_to_bits(torch.arange(2**dim)[:, None], (dim,)) * 2 - 1
    for name, found, right in zip(BUFFERS, (vectors, values), (signs, 2 ** torch.arange(dim).flip(0)), strict=True):
        if not torch.equal(found.long(), right):
            raise ValueError(f"{name} holds other values than codes that begin at the highest bit: no file of Show-o's")
    tokenizer = MAGVIT2Tokenizer(
        image_size=image_size or GRID * 2 ** (len(multipliers) - 1), layout="show-o", channels=channels,
        multipliers=multipliers, blocks=blocks["encoder"], decoder_multipliers=decoder_multipliers,
        decoder_blocks=blocks["decoder"], bits=[dim], lsb_first=False, resize="crop-bicubic",
    )  # fmt: skip
    return fill(tokenizer, state)


def _widths(shapes: Shapes, part: str, levels: int) -> tuple[int, list[int]]:
    """Channels at the entrance, and how many times as many each level has."""
    first = "encoder.conv_in.weight"
    channels = size(shapes, first)
    if channels < GROUPS or channels % GROUPS:
        raise ValueError(
            f"the tensors do not fit: {first} is {shapes[first]}, expected a multiple of {GROUPS} channels"
        )
    multipliers = []
    for level in range(levels):
        name = f"{part}.{level}.block.0.conv1.weight"
        width = size(shapes, name)
        if width < channels or width % channels:
            raise ValueError(f"the tensors do not fit: {name} is {shapes[name]}, expected a multiple of {channels}")
        multipliers.append(width // channels)
    return channels, multipliers


def _depths(shapes: Shapes, levels: str) -> list[int]:
    """Residual blocks of each level."""
    return [count(shapes, f"{levels}.{i}.block.{{}}.") for i in range(max(1, count(shapes, levels + ".{}.")))]


FORMATS = (
    Format(
        "open-magvit2",
        "Open-MAGVIT2's image tokenizers (.ckpt), of 2**14 or 2**18 codes",
        detect=lambda shapes: any(name.startswith("decoder.adaptive.") for name in shapes),
        convert=open_magvit2,
        licence="Apache-2.0",
    ),
    Format(
        "show-o",
        "Show-o's MAGVIT-v2, of 2**13 codes",
        detect=lambda shapes: any(name.startswith(("encoder.quant_conv.", "quantize.power_vals")) for name in shapes),
        convert=show_o,
    ),
)
