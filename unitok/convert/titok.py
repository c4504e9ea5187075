"""TiTok's image tokenizers: two-stage ones with a pixel decoder (l32, b64, s128), single-stage ones (vq8k)."""

from __future__ import annotations

import math
from typing import Any

from unitok.convert.base import Format, Shapes, Source, agree, count, fill, setting, size
from unitok.tokenizers.base import ImageTokenizer
from unitok.tokenizers.titok import TiTokTokenizer

MODELS = {512: "small", 768: "base", 1024: "large"}  # by the width of their transformer; all have heads of 64
BOOK = "quantize.embedding.weight"


def titok(source: Source, image_size: int | None) -> ImageTokenizer:
    shapes, config = source.shapes, source.config
    if BOOK not in shapes:
        raise ValueError(f"the tensors do not fit: missing: {BOOK}; a TiTok without it (vae) has no codes")
    sizes = arguments(shapes)
    two_stage = sizes["pixel_codes"] > 0
    if image_size not in (None, sizes["image_size"]):
        raise ValueError(f"its image size is {sizes['image_size']}, no other: encoder.positional_embedding says so")
    if setting(config, "use_l2_norm") is None:
        rule = "angle" if two_stage else "distance"
        source.notes.append(f"codes are looked up by {rule}, as in the published models of this kind (no config says)")
    widths = {name: sizes[f"{name}_width"] for name in ("encoder", "decoder")}
    agree(config, codebook_size=sizes["codebook_size"], token_size=sizes["code_dim"],
          num_latent_tokens=sizes["tokens"], crop_size=sizes["image_size"], vit_enc_patch_size=sizes["patch"],
          vit_dec_patch_size=sizes["patch"], finetune_decoder=two_stage, is_legacy=two_stage, quantize_mode="vq",
          vit_enc_model_size=MODELS.get(widths["encoder"], f"a width of {widths['encoder']}"),
          vit_dec_model_size=MODELS.get(widths["decoder"], f"a width of {widths['decoder']}"))  # fmt: skip
    tokenizer = TiTokTokenizer(**sizes, normalize=setting(config, "use_l2_norm", two_stage))
    return fill(tokenizer, source.state)


def arguments(shapes: Shapes) -> dict[str, Any]:
    """The tokenizer's arguments that shapes tell."""
    side = math.isqrt(size(shapes, "encoder.positional_embedding") - 1)
    patch = size(shapes, "encoder.patch_embed.weight", 2)
    return {
        "image_size": side * patch,
        "patch": patch,
        "tokens": size(shapes, "latent_tokens"),
        "encoder_width": size(shapes, "latent_tokens", 1),
        "encoder_layers": count(shapes, "encoder.transformer.{}."),
        "decoder_width": size(shapes, "decoder.decoder_embed.weight"),
        "decoder_layers": count(shapes, "decoder.transformer.{}."),
        "codebook_size": size(shapes, BOOK),
        "code_dim": size(shapes, BOOK, 1),
        **(_pixel_arguments(shapes, patch) if "decoder.ffn.2.weight" in shapes else {"pixel_codes": 0}),
    }


def _pixel_arguments(shapes: Shapes, patch: int) -> dict[str, Any]:
    if not any(name.startswith("pixel_") for name in shapes):
        raise ValueError(
            "pixel_quantize.embedding.weight and pixel_decoder are missing: a first stage predicts codes of a VQGAN, "
            "not pixels; take the weights of the second stage"
        )
    channels = size(shapes, "pixel_decoder.norm_out.weight")
    levels = range(patch.bit_length())  # each but the first doubles the size, from one position a patch
    widths = [size(shapes, f"pixel_decoder.up.{i}.block.0.conv1.weight") for i in levels]
    for i, width in zip(levels, widths, strict=True):
        if width % channels:
            raise ValueError(f"pixel_decoder.up.{i} has {width} channels, expected a multiple of {channels}")
    return {
        "pixel_codes": size(shapes, "pixel_quantize.embedding.weight"),
        "pixel_dim": size(shapes, "pixel_quantize.embedding.weight", 1),
        "pixel_channels": channels,
        "pixel_multipliers": [width // channels for width in widths],
        "pixel_blocks": count(shapes, "pixel_decoder.mid.{}."),
    }


FORMATS = (
    Format(
        "titok",
        "TiTok's image tokenizers, 32 to 256 tokens a picture: model.safetensors or .bin",
        detect=lambda shapes: "encoder.latent_token_positional_embedding" in shapes,
        convert=titok,
        pixels="[0, 1]",
        licence="Apache-2.0; its authors mean the models for research",
    ),
)
