"""Emu3's vision tokenizer: BAAI's own file, and transformers' renaming of it, alone or within the language model."""

from __future__ import annotations

from unitok.convert.base import Format, Shapes, Source, agree, count, fill, setting, size
from unitok.tokenizers.base import ImageTokenizer
from unitok.tokenizers.emu3 import Emu3Tokenizer

RENAMED = (  # transformers' names -> BAAI's, in this order
    ("coder.middle_block.attn_norm.", "coder.mid.attn_1.norm."),
    ("coder.middle_block.", "coder.mid."),
    ("encoder.down_block.down.", "encoder.down."),
    ("decoder.up_block.up.", "decoder.up."),
    (".q_proj.", ".q."),
    (".k_proj.", ".k."),
    (".v_proj.", ".v."),
    (".out_proj.", ".proj_out."),
)


def emu3(source: Source, image_size: int | None) -> ImageTokenizer:
    shapes = source.shapes
    raw = not any(name.startswith(("encoder.down_block.", "decoder.up_block.")) for name in shapes)
    levels = "encoder.down." if raw else "encoder.down_block.down."
    channels = size(shapes, "encoder.conv_in.weight")
    multipliers = []
    for level in range(max(1, count(shapes, levels + "{}."))):
        name = f"{levels}{level}.block.0.conv1.weight"
        if size(shapes, name) % channels:
            raise ValueError(f"the tensors do not fit: {name} is {shapes[name]}, expected a multiple of {channels}")
        multipliers.append(size(shapes, name) // channels)
    sizes = {
        "channels": channels,
        "multipliers": multipliers,
        "blocks": count(shapes, levels + "0.block.{}."),
        "attention": [i for i in range(len(multipliers)) if count(shapes, f"{levels}{i}.attn.{{}}.")],
        "frames": 2 ** count(shapes, "encoder.time_conv.{}."),
        "codebook_size": size(shapes, "quantize.embedding.weight"),
        "code_dim": size(shapes, "quantize.embedding.weight", 1),
    }
    config = setting(source.config, "vq_config", source.config)  # within that of the language model
    dim = sizes["code_dim"]
    agree(config, codebook_size=sizes["codebook_size"], embed_dim=dim, z_channels=dim, latent_channels=dim,
          ch=channels, base_channels=channels, ch_mult=multipliers, channel_multiplier=multipliers,
          num_res_blocks=sizes["blocks"], attn_resolutions=sizes["attention"], double_z=False, double_latent=False,
          temporal_downsample_factor=sizes["frames"], in_channels=3, out_channels=3,
          hidden_size=channels * multipliers[-1], num_attention_heads=1)  # fmt: skip
    tokenizer = Emu3Tokenizer(image_size or 512, **sizes)
    return fill(tokenizer, source.state, _raw_name if raw else _hf_name)


def _hf_name(ours: str) -> str:
    return ours.removeprefix("model.")


def _raw_name(ours: str) -> str:
    name = _hf_name(ours)
    for theirs, raw in RENAMED:
        name = name.replace(theirs, raw)
    before, found, after = name.partition(".attn_norms.")
    if found:
        block, _, rest = after.partition(".")
        name = f"{before}.attn.{block}.norm.{rest}"
    return name


def _detect(shapes: Shapes) -> bool:
    return any(name.startswith(("encoder.time_", "decoder.time_")) for name in shapes)


FORMATS = (
    Format(
        "emu3",
        "Emu3's vision tokenizer, as BAAI or as transformers names it, alone or within the language model",
        detect=_detect,
        convert=emu3,
        licence="Apache-2.0",
        prefixes=("model.vqmodel.", "vqmodel."),
    ),
)
