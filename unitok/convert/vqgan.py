"""The VQGAN family: taming's layout, those who kept it, and those who renamed it.

taming, ldm, gumbel-f8, chameleon   taming's names; up.0 is the highest resolution
janus                               the same names; up.0 is the lowest resolution
llamagen, diffusers, amused         other names; the first level of the decoder is the lowest resolution
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from unitok.convert.base import Format, Shapes, Source, agree, count, fill, setting, size, unit_rows
from unitok.tokenizers.base import ImageTokenizer
from unitok.tokenizers.vqgan import VQGANTokenizer

Names = Callable[[str], str]  # our names, or their beginnings, -> published ones
BOOK = "quantize.embedding.weight"
CHAMELEON = "Chameleon Research License (Meta): research only, no commercial use"


def taming(source: Source, image_size: int | None) -> ImageTokenizer:
    return _fill(source, source.state, image_size, 256, str)


def gumbel(source: Source, image_size: int | None) -> ImageTokenizer:
    return _fill(source, source.state, image_size, 256, str, quantizer="gumbel")


def chameleon(source: Source, image_size: int | None) -> ImageTokenizer:
    if not any(name.startswith("decoder.") for name in source.shapes):
        raise ValueError(
            "decoder.conv_in.weight and the rest of the decoder are missing: take vqgan.ckpt, which has it"
        )
    return _fill(source, source.state, image_size, 512, str)


def janus(source: Source, image_size: int | None) -> ImageTokenizer:
    names = _reversed(str, count(source.shapes, "encoder.down.{}."))
    return _fill(source, _normalised(source), image_size, 384, names, normalize=True)


def llamagen(source: Source, image_size: int | None) -> ImageTokenizer:
    names = _reversed(_llamagen_name, count(source.shapes, "encoder.conv_blocks.{}."))
    return _fill(source, _normalised(source), image_size, 256, names, normalize=True, resize="crop-bicubic")


def diffusers(source: Source, image_size: int | None) -> ImageTokenizer:
    if setting(source.config, "lookup_from_codebook", False):
        raise ValueError("lookup_from_codebook marks aMUSEd's VQModel, whose pixels are [0, 1]: take the format amused")
    if not (source.config or any(name.startswith("encoder.mid_block.attentions.") for name in source.shapes)):
        source.notes.append("pixels are taken as [-1, 1] (no config says); where the weights are aMUSEd's, as [0, 1]: "
                            "take the format amused")  # fmt: skip
    return _diffusers(source, image_size)


def amused(source: Source, image_size: int | None) -> ImageTokenizer:
    """Its pipelines neither scale pixels to [-1, 1] in front of the encoder nor back behind the decoder."""
    if source.config and not setting(source.config, "lookup_from_codebook", False):
        raise ValueError("the config has no lookup_from_codebook = true, which aMUSEd's has: take the format diffusers")
    return _diffusers(source, image_size, pixel_range=[0.0, 1.0])


def _diffusers(source: Source, image_size: int | None, **told: Any) -> ImageTokenizer:
    spatial = [name for name in source.shapes if ".conv_y." in name or ".norm_layer." in name]
    if spatial or setting(source.config, "norm_type", "group") == "spatial":
        raise ValueError(
            f"its decoder has spatial norm (MoVQ), which is not supported: {(spatial or ['norm_type'])[0]}"
        )
    state = {_before_2023(name): tensor for name, tensor in source.state.items()}
    names = _reversed(_diffusers_name, count(source.shapes, "encoder.down_blocks.{}."))
    groups = setting(source.config, "norm_num_groups", 32)
    return _fill(source, state, image_size, 256, names, norm_groups=groups, **told)


def _fill(
    source: Source, state: Mapping[str, Tensor], image_size: int | None, default: int, names: Names, **told: Any
) -> ImageTokenizer:
    """A tokenizer of the sizes of the tensors, with the tensors in it. `told`: arguments that no tensor tells."""
    sizes = _sizes({name: tuple(tensor.shape) for name, tensor in state.items()}, names, told.get("quantizer", "vq"))
    config = source.config
    for part in ("vq_config", "first_stage_config"):  # within the config of a larger model
        config = setting(config, part, config)
    _compare(config, sizes)
    pixels = image_size or setting(config, "resolution") or default
    return fill(VQGANTokenizer(int(pixels), **sizes, **told), state, names)


def _sizes(shapes: Shapes, names: Names, quantizer: str) -> dict[str, Any]:
    """The arguments of the tokenizer, from the encoder and the codebook."""

    def there(ours: str) -> bool:
        return any(name.startswith(names(ours)) for name in shapes)

    def side(ours: str, axis: int = 0) -> int:
        return size(shapes, names(ours), axis)

    def most(*places: tuple[str, int]) -> int:
        """The side that most of these tensors have, so that one of another shape is the one that does not fit."""
        given = [place for place in places if there(place[0])] or places
        return statistics.mode(side(*place) for place in given)

    def run(ours: str) -> list[int]:
        n = 0
        while there(ours.format(n)):
            n += 1
        return list(range(n))

    channels = side("encoder.conv_in.weight")
    widths = {f"encoder.down.{i}.block.0.conv1.weight": 0 for i in run("encoder.down.{}.")}
    for name in widths:
        widths[name] = side(name)
        if widths[name] % channels:
            raise ValueError(f"{names(name)} has {widths[name]} channels, expected a multiple of {channels}")
    book = "quantize.embed.weight" if quantizer == "gumbel" else BOOK
    return {
        "channels": channels,
        "multipliers": [width // channels for width in widths.values()],
        "blocks": len(run("encoder.down.0.block.{}.")),
        "latent": most(("encoder.conv_out.weight", 0), ("decoder.conv_in.weight", 1), ("quant_conv.weight", 1)),
        "attention": [i for i in run("encoder.down.{}.") if there(f"encoder.down.{i}.attn.0.")],
        "middle_attention": there("encoder.mid.attn_1."),
        "pointwise": there("quant_conv."),
        "codebook_size": side(book),
        "code_dim": most((book, 1), ("quant_conv.weight", 0), ("post_quant_conv.weight", 1)),
    }


def _compare(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """ValueError where a config, by the names of taming, transformers or diffusers, says otherwise than the tensors."""
    widths = [sizes["channels"] * m for m in sizes["multipliers"]]
    agree(config, ddconfig__ch=sizes["channels"], base_channels=sizes["channels"], block_out_channels=widths)
    agree(config, ddconfig__ch_mult=sizes["multipliers"], channel_multiplier=sizes["multipliers"])
    agree(config, num_res_blocks=sizes["blocks"], layers_per_block=sizes["blocks"])
    agree(config, z_channels=sizes["latent"], latent_channels=sizes["latent"], double_z=False, double_latent=False)
    agree(config, n_embed=sizes["codebook_size"], num_embeddings=sizes["codebook_size"],
          num_vq_embeddings=sizes["codebook_size"], codebook_size=sizes["codebook_size"])  # fmt: skip
    agree(config, embed_dim=sizes["code_dim"], codebook_embed_dim=sizes["code_dim"])
    if setting(config, "vq_embed_dim") is not None:
        agree(config, vq_embed_dim=sizes["code_dim"])
    agree(config, in_channels=3, out_ch=3, out_channels=3, act_fn="silu")
    middle = "vanilla" if sizes["middle_attention"] else "none"
    agree(config, attn_type=middle, mid_block_add_attention=sizes["middle_attention"])
    resolution, attended = setting(config, "resolution"), setting(config, "attn_resolutions")
    if resolution and isinstance(attended, Sequence):
        seen = [resolution >> level for level in range(len(widths))]
        tensors = [seen[level] for level in sizes["attention"]]
        if sorted(n for n in attended if n in seen) != sorted(tensors):
            raise ValueError(f"the config says attn_resolutions = {list(attended)!r}, the tensors say {tensors!r}")


def _normalised(source: Source) -> dict[str, Tensor]:
    state = dict(source.state)
    if BOOK in state and state[BOOK].ndim == 2:
        state[BOOK] = unit_rows(state[BOOK], source.notes)
    return state


# ---- names


def _reversed(names: Names, levels: int) -> Names:
    """`names` where the decoder's levels are counted from the lowest resolution."""

    def flipped(ours: str) -> str:
        return names(re.sub(r"^decoder\.up\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", ours))

    return flipped


def _llamagen_name(ours: str) -> str:
    name = re.sub(r"^(encoder\.down|decoder\.up)\.", lambda found: f"{found[1].split('.')[0]}.conv_blocks.", ours)
    name = re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)
    return re.sub(r"\.mid\.(block_1|attn_1|block_2)", lambda found: f".mid.{_MIDDLE.index(found[1])}", name)


def _diffusers_name(ours: str) -> str:
    for pattern, their in _DIFFUSERS:
        ours = re.sub(pattern, their, ours)
    return ours


def _before_2023(name: str) -> str:
    """The present name of an attention's layer; the first releases had others."""
    return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda f: f"{f[1]}.{_OLD[f[2]]}.", name)


_MIDDLE = ("block_1", "attn_1", "block_2")
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_DIFFUSERS = (
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"^decoder\.up\.", "decoder.up_blocks."),
    (r"\.block\.(\d+)", r".resnets.\1"),
    (r"\.mid\.block_1", ".mid_block.resnets.0"),
    (r"\.mid\.block_2", ".mid_block.resnets.1"),
    (r"\.mid\.attn_1", ".mid_block.attentions.0"),
    (r"\.attn\.(\d+)", r".attentions.\1"),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"nin_shortcut", "conv_shortcut"),
    (r"\.(down|up)sample\.conv", r".\1samplers.0.conv"),
    (r"coder\.norm_out", "coder.conv_norm_out"),
)


# ---- formats


def _has(*names: str, but: tuple[str, ...] = ()) -> Callable[[Shapes], bool]:
    """Whether there are names that begin with each of `names`, and none that begins with one of `but`."""

    def detect(shapes: Shapes) -> bool:
        every = all(any(name.startswith(begin) for name in shapes) for begin in names)
        return every and not any(name.startswith(but) for name in shapes)

    return detect


# relatives that share most names: Gumbel, Show-o, Open-MAGVIT2, Emu3
_RELATIVES = ("quantize.proj.", "encoder.quant_conv.", "decoder.adaptive.", "encoder.time_")
_taming = _has("encoder.down.0.block.0.", "encoder.mid.block_1.", but=_RELATIVES)

FORMATS = (
    Format("taming", "taming-transformers' VQGAN: a .ckpt, its .yaml as --config", _taming, taming),
    Format("ldm", "first stages of latent diffusion (vq-f4, vq-f8, ...), alone or within the model", _taming, taming,
           prefixes=("first_stage_model.",)),
    Format("gumbel-f8", "taming's and Sber's VQGAN with a Gumbel softmax", _has("encoder.down.0.", "quantize.proj."),
           gumbel),
    Format("chameleon", "Chameleon's vqgan.ckpt, with its decoder", _taming, chameleon, licence=CHAMELEON,
           non_commercial=True, prefixes=("model.vqmodel.", "vqmodel.")),
    Format("janus", "the generation tokenizer of Janus, as in transformers", _taming, janus,
           prefixes=("model.vqmodel.", "vqmodel.")),
    Format("llamagen", "LlamaGen's vq_ds16_*.pt and vq_ds8_*.pt", _has("encoder.conv_blocks.0."),
           llamagen, licence="MIT (LlamaGen)", drops=("loss.", "quantize.codebook_used"),
           prefixes=("gen_vision_model.",)),
    Format("diffusers", "a VQModel of diffusers: its folder, or its weights and config.json as --config",
           _has("encoder.down_blocks.0."), diffusers),
    Format("amused", "aMUSEd's and Meissonic's VQModel: its folder, or its weights and config.json as --config",
           _has("encoder.down_blocks.0.", but=("encoder.mid_block.attentions.",)), amused, pixels="[0, 1]",
           licence="openrail++ (aMUSEd)"),
)  # fmt: skip
