"""What diffusion runs in: pixels in [-1, 1], or the scaled latents of a frozen VAE of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unitok import checkpoint


def open_vae(source: str, revision: str | None = None) -> Any:
    """A VAE of diffusers, of whatever class its folder names."""
    import diffusers

    folder = checkpoint.open_folder(source, revision=revision)
    name = str(checkpoint.read_json(folder / "config.json").get("_class_name"))
    kind = getattr(diffusers, name, None)
    if not name.startswith("Autoencoder") or kind is None:
        raise ValueError(f"{source}: not the folder of a diffusers VAE: its config.json names the class {name}")
    return kind.from_pretrained(folder)


def to_latents(vae: Any, images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [B, C, h, w]; without a VAE the pixels. No gradient passes through the VAE."""
    pixels = images * 2 - 1
    if vae is None:
        return pixels
    with torch.no_grad():
        out = vae.encode(pixels.to(vae.dtype))
    latents = out.latent_dist.mode() if hasattr(out, "latent_dist") else out[0]
    shift, scale = _scaling(vae)
    return ((latents - shift) * scale).to(images.dtype)


def to_images(vae: Any, x: Tensor) -> Tensor:
    """The way back: float [B, 3, H, W] in [0, 1]."""
    if vae is not None:
        shift, scale = _scaling(vae)
        x = vae.decode((x / scale + shift).to(vae.dtype)).sample
    return ((x + 1) / 2).clamp(0, 1).float()


def _scaling(vae: Any) -> tuple[float, float]:
    return vae.config.get("shift_factor") or 0.0, vae.config.get("scaling_factor") or 1.0
