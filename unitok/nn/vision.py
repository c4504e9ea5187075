"""A vision tower of transformers, mostly frozen: patch features, and the projected image embedding where it is a CLIP.

Shapes: B images, H x W pixels, M positions (patches, and mostly a class token before them), C width, D projected size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Blip2VisionModel, CLIPVisionModelWithProjection, PreTrainedConfig

from unitok import checkpoint

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# EVA-CLIP-g of BLIP-2 and SEED: 39 of its 40 blocks, no norm at the end
BLIP_2 = "blip_2_vision_model"
EVA_G = {"model_type": BLIP_2, "initializer_range": 0.02}
CLASSES: dict[str, Any] = {"clip_vision_model": CLIPVisionModelWithProjection, BLIP_2: Blip2VisionModel}


class Vision(nn.Module):
    """A tower that sees pixels in [0, 1].

    Args:
        tower: what `open_tower` or `build_tower` gave.
        mean, std: of a colour channel, for the normalisation of pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.tower: Any = tower
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(list(values)).view(3, 1, 1), persistent=False)

    @property
    def config(self) -> dict[str, Any]:
        """What `build_tower` makes the same tower from."""
        return {k: v for k, v in self.tower.config.to_diff_dict().items() if k not in ("transformers_version", "dtype")}

    @property
    def projected(self) -> int:
        """D; 0 where it is no CLIP with a projection."""
        return self.tower.config.projection_dim if isinstance(self.tower, CLIPVisionModelWithProjection) else 0

    @property
    def width(self) -> int:
        """C."""
        return self.tower.config.hidden_size

    def take_norm(self) -> nn.LayerNorm:
        """A norm for the features, to be trained: BLIP-2's own, which is taken off the tower, else a new one."""
        norm = nn.LayerNorm(self.width)
        if self.tower.config.model_type == BLIP_2:
            norm.load_state_dict(self.tower.post_layernorm.state_dict())
            self.tower.post_layernorm = nn.Identity()
        return norm

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """float [B, 3, H, W] in [0, 1] -> features [B, M, C], and CLIP's image embedding [B, D], not normalised."""
        found = self.tower((images - self.mean) / self.std)
        return found.last_hidden_state, getattr(found, "image_embeds", None)


class FrozenVision(Vision):
    """Takes no gradient, and stays in eval mode."""

    def __init__(self, tower: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__(tower.requires_grad_(False).eval(), mean, std)

    def train(self, mode: bool = True) -> FrozenVision:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().forward(images)


def build_tower(config: Mapping[str, Any]) -> nn.Module:
    """A tower of random weights; `config` as in a config.json, with its model_type."""
    told = _config_of(AutoConfig.for_model(**config))
    cls = CLASSES.get(told.model_type)
    return cls(told) if cls else AutoModel.from_config(told)


def open_tower(folder: str | Path) -> nn.Module:
    """The vision tower of a folder or Hub id of transformers (CLIP, BLIP-2, or a plain vision model), in float32.

    ValueError where it holds none.
    """
    whole = checkpoint.open_folder(folder)
    try:
        config = _config_of(AutoConfig.from_pretrained(whole))
        if getattr(config, "image_size", None) is None:
            raise ValueError(f"a {config.model_type} sees no pictures of one size")
        cls = CLASSES.get(config.model_type, AutoModel)
        # BLIP-2 calls its tower so, which transformers does not look for by itself
        names = {r"^vision_model\.": ""} if config.model_type == BLIP_2 else None
        with checkpoint.quiet():
            tower, told = cls.from_pretrained(
                whole, config=config, dtype=torch.float32, key_mapping=names, output_loading_info=True
            )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: no vision tower can be read from it ({str(error).splitlines()[0]})") from error
    if told["missing_keys"]:
        raise ValueError(f"{folder}: its vision tower is not whole: {min(told['missing_keys'])} is missing")
    return tower


def scaled(images: Tensor, size: int) -> Tensor:
    """float [B, 3, H, W] in [0, 1] -> [B, 3, size, size], smoothed where it shrinks."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


def pixel_statistics(folder: str | Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation that a tower's pixels are normalised by; 0.5 where its folder does not say."""
    path = checkpoint.open_folder(folder) / "preprocessor_config.json"
    said = checkpoint.read_json(path) if path.is_file() else {}
    return list(said.get("image_mean", [0.5] * 3)), list(said.get("image_std", [0.5] * 3))


def _config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the vision tower alone."""
    inner = getattr(config, "vision_config", None)
    if inner is None:
        return config
    if hasattr(inner, "projection_dim") and hasattr(config, "projection_dim"):
        inner.projection_dim = config.projection_dim  # CLIP's projection goes by the outer one
    return inner
