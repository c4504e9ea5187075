"""SEED's tokenizer (AILab-CVC/SEED): seed_quantizer.pt, and eva_vit_g.pth, the vision tower that it leaves out."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unitok.convert.base import Format, Shapes, Source, fill, setting, size
from unitok.nn.vision import CLIP_MEAN, CLIP_STD
from unitok.tokenizers.base import ImageTokenizer
from unitok.tokenizers.seed import SeedTokenizer

TOWER = "visual_encoder."
BOOK = "quantize.embedding.weight"
HEADS, VISION_HEAD = 12, 88  # heads of every transformer but the tower, and channels of a head of the tower
POSITIONS = 512  # of BERT's words
LAYERS = {768: 12}  # of the Q-Former, by its width, where it is a published one
BLOCKS = {1408: 39}  # of the tower; the file may hold a 40th, which SEED does not use


def seed(source: Source, image_size: int | None) -> ImageTokenizer:
    state = _named(source.tables)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    told = arguments(shapes, source.config)
    if image_size not in (None, told["image_size"]):
        raise ValueError(f"its image size is {told['image_size']}, no other: {TOWER}pos_embed says so")
    with torch.device("meta"):
        names = [theirs(name) for name in SeedTokenizer(**told).own_state()]
    unread = [f"{kind}.bert.embeddings.position_ids" for kind in ("Qformer", "Reverse_Qformer")]
    unread = unread[: 2 if told["head"] == "reverse" else 1]
    for name in unread:  # numbers from 0 up: nothing to keep, but part of the layout
        if (size(shapes, name), size(shapes, name, 1)) != (1, POSITIONS):
            raise ValueError(f"the tensors do not fit: {name} is {shapes[name]}, expected {(1, POSITIONS)}")
    biases = [name for name in names if name.startswith(TOWER) and name.endswith("attn.qkv.bias")]
    state = _with_bias(state, biases, told["vision"]["hidden_size"])
    if extra := sorted(set(state) - set(names) - set(unread)):
        kinds = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in extra)
        listed = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in kinds.items())
        source.notes.append(f"{len(extra)} tensors are no part of the tokenizer and were left out: {listed}")
    return fill(SeedTokenizer(**told), {name: state[name] for name in names if name in state}, theirs)


def arguments(shapes: Shapes, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The tokenizer's arguments that shapes tell, by the names of `visual_encoder.*` and SEED's own."""
    width, features = size(shapes, "query_tokens", 2), size(shapes, "ln_vision.weight")
    patch = size(shapes, TOWER + "patch_embed.proj.weight", 2)
    pixels = patch * math.isqrt(size(shapes, TOWER + "pos_embed", 1) - 1)
    heads = setting(config or {}, "heads", HEADS)
    reverse = "reverse_tokens" in shapes
    head_sizes = [] if reverse else [size(shapes, f"image_down.{i}.weight") for i in (0, 2, 4)]
    return {
        "image_size": pixels,
        "vision": {
            "model_type": "blip_2_vision_model",
            "hidden_size": features,
            "intermediate_size": size(shapes, TOWER + "blocks.0.mlp.fc1.weight"),
            "num_hidden_layers": BLOCKS.get(features) or _layers(shapes, TOWER + "blocks."),
            "num_attention_heads": setting(config or {}, "vision_heads", max(1, features // VISION_HEAD)),
            "image_size": pixels,
            "patch_size": patch,
        },
        "mean": list(CLIP_MEAN),
        "std": list(CLIP_STD),
        "target_size": size(shapes, "distill_image_proj.weight"),
        "tokens": size(shapes, "query_tokens", 1),
        "width": width,
        "layers": LAYERS.get(width) or _layers(shapes, "Qformer.bert.encoder.layer."),
        "heads": heads,
        "codebook_size": size(shapes, BOOK),
        "code_dim": size(shapes, BOOK, 1),
        "depth": _layers(shapes, "blocks."),
        "head": "reverse" if reverse else "mlp",
        **({"reverse_layers": _layers(shapes, "Reverse_Qformer.bert.encoder.layer.")} if reverse else {}),
        **({} if reverse else {"head_sizes": head_sizes}),
    }


def theirs(ours: str) -> str:
    """The published name of a tensor, the tower's with `visual_encoder.` in front."""
    for pattern, their in _NAMES:
        ours = re.sub(pattern, their, ours)
    return ours


_NAMES = (
    (r"^vision\.tower\.embeddings\.class_embedding$", TOWER + "cls_token"),
    (r"^vision\.tower\.embeddings\.position_embedding$", TOWER + "pos_embed"),
    (r"^vision\.tower\.embeddings\.patch_embedding\.", TOWER + "patch_embed.proj."),
    (r"^vision\.tower\.encoder\.layers\.(\d+)\.", TOWER + r"blocks.\1."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.projection\.", ".attn.proj."),
    (r"\.self_attn\.", ".attn."),
    (r"^qformer\.", "Qformer.bert."),
    (r"^reverse_qformer\.", "Reverse_Qformer.bert."),
    (r"\.bert\.layernorm\.", ".bert.embeddings.LayerNorm."),
    (r"attention\.attention\.", "attention.self."),
)


def _named(tables: tuple[dict[str, Tensor], ...]) -> dict[str, Tensor]:
    """All tensors by SEED's names: the tower's file has names of its own, some of which SEED gives to other tensors."""
    state: dict[str, Tensor] = {}
    for table in tables:
        prefix = "" if BOOK in table or any(name.startswith(TOWER) for name in table) else TOWER
        named = {prefix + name: tensor for name, tensor in table.items()}
        if twice := sorted(state.keys() & named.keys()):
            raise ValueError(f"two of the files hold {twice[0]}: give one file of a kind")
        state |= named
    if not any(name.startswith(TOWER) for name in state):
        raise ValueError("the vision tower is missing: give eva_vit_g.pth too, which seed_quantizer.pt leaves out")
    return state


def _with_bias(state: Mapping[str, Tensor], names: list[str], width: int) -> dict[str, Tensor]:
    """The tower's biases of queries and values as one with that of keys, which is zero."""
    state = dict(state)
    for name in names:
        parts = [name.replace("qkv.bias", f"{part}_bias") for part in "qv"]
        for part in parts:
            if part not in state:
                raise ValueError(f"the tensors do not fit: missing: {part}")
            if state[part].shape != (width,):
                raise ValueError(f"the tensors do not fit: {part} is {tuple(state[part].shape)}, expected {(width,)}")
        query, value = (state.pop(part) for part in parts)
        state[name] = torch.cat([query, torch.zeros_like(query), value])
    return state


def _layers(shapes: Shapes, prefix: str) -> int:
    """One more than the highest number that follows `prefix`: a layer lost below it is missed, not skipped."""
    found = [re.match(re.escape(prefix) + r"(\d+)\.", name) for name in shapes]
    return 1 + max((int(match[1]) for match in found if match), default=0)


FORMATS = (
    Format(
        "seed",
        "SEED's tokenizer (SEED-2, of SEED-LLaMA): seed_quantizer.pt and eva_vit_g.pth",
        detect=lambda shapes: {BOOK, "query_tokens", "decode_task_layer.0.weight"} <= set(shapes),
        convert=seed,
        pixels="CLIP's mean and standard deviation",
        licence="Apache-2.0 (AILab-CVC/SEED); eva_vit_g.pth has the terms of EVA-CLIP and BLIP-2",
        drops=(),
    ),
)
