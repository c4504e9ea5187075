"""DALL-E's discrete VAE: OpenAI's two pickled modules, and the copy of its encoder that FLAVA uses."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from unitok.convert.base import Format, Shapes, Source, agree, count, fill, setting, size
from unitok.tokenizers.base import ImageTokenizer
from unitok.tokenizers.dvae import DVAETokenizer

ENDS = {"weight": "w", "bias": "b"}


def openai(source: Source, image_size: int | None) -> ImageTokenizer:
    """encoder.pkl and decoder.pkl, in any order."""
    parts: dict[str, dict[str, Tensor]] = {}
    for table in source.tables:
        shapes = {name: tuple(tensor.shape) for name, tensor in table.items()}
        part = "encoder" if size(shapes, "blocks.input.w", 1) == 3 else "decoder"
        if part in parts:
            raise ValueError(f"two files hold the {part}: give encoder.pkl and decoder.pkl")
        parts[part] = table
    if lost := {"encoder", "decoder"} - parts.keys():
        raise ValueError(f"the {lost.pop()} is missing: give encoder.pkl and decoder.pkl")
    state = {f"{part}.{name}": tensor for part, table in parts.items() for name, tensor in table.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    sizes = _sizes(shapes, "encoder.blocks", "group_{}.block_{}.", ".w")
    agree(source.config, n_hid=sizes["width"], vocab_size=sizes["vocab_size"], group_count=sizes["groups"],
          n_blk_per_group=sizes["blocks"])  # fmt: skip
    tokenizer = DVAETokenizer(
        image_size or 256, **sizes, code_width=size(shapes, "decoder.blocks.input.w"), resize="crop-lanczos"
    )
    return fill(tokenizer, state, _openai_name)


def flava(source: Source, image_size: int | None) -> ImageTokenizer:
    """FlavaImageCodebook, alone or within FLAVA."""
    sizes = _sizes(source.shapes, "blocks", "group_{}.group.block_{}.", ".weight")
    config = setting(source.config, "image_codebook_config", source.config)  # within FLAVA's
    agree(config, hidden_size=sizes["width"], vocab_size=sizes["vocab_size"], num_groups=sizes["groups"],
          num_blocks_per_group=sizes["blocks"])  # fmt: skip
    tokenizer = DVAETokenizer(image_size or 112, **sizes, resize="squash-lanczos", decoder=False)
    return fill(tokenizer, source.state, _flava_name)


def _sizes(shapes: Shapes, root: str, block: str, end: str) -> dict[str, Any]:
    """Arguments of the tokenizer from the shapes of its encoder."""
    return {
        "width": size(shapes, f"{root}.input{end}"),
        "groups": count(shapes, root + ".group_{}.", start=1),
        "blocks": count(shapes, f"{root}.{block.format(1, '{}')}", start=1),
        "vocab_size": size(shapes, f"{root}.output.conv{end}"),
    }


def _openai_name(ours: str) -> str:
    part, rest, end = re.fullmatch(r"(\w+)\.(.*)\.(\w+)", ours).groups()  # type: ignore[union-attr]
    return f"{part}.blocks.{rest}.{ENDS[end]}"


def _flava_name(ours: str) -> str:
    name = ours.replace("encoder.", "blocks.", 1).replace(".block_", ".group.block_")
    return name.replace("res_path.", "res_path.path.")


FORMATS = (
    Format(
        "openai-dvae",
        "DALL-E's encoder.pkl and decoder.pkl",
        detect=lambda shapes: "blocks.input.w" in shapes,
        convert=openai,
        pixels="[0.1, 0.9]",
        licence="Modified MIT (OpenAI): say where DALL-E's dVAE was used",
    ),
    Format(
        "flava",
        "FLAVA's image codebook: DALL-E's encoder, without a decoder",
        detect=lambda shapes: "blocks.input.weight" in shapes,
        convert=flava,
        pixels="[0.1, 0.9]",
        licence="BSD-3-Clause (FLAVA)",
        prefixes=("image_codebook.",),
    ),
)
