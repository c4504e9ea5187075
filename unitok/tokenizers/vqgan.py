"""VQGAN and its family (Esser et al. 2021, arXiv 2012.09841): one convolutional backbone, quantizers by name.

With `adversarial_weight=0` and no perceptual network it is a plain VQ-VAE. Published checkpoints of taming, latent
diffusion, LlamaGen, Chameleon and diffusers' VQModel are configurations of it.

Shapes: B images, H x W pixels, h x w positions, K codes a position (flattened position-major), D size of a code's
vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unitok.nn import quantizers
from unitok.nn.adversary import PatchCritic
from unitok.nn.blocks import psnr
from unitok.nn.picture_loss import PictureLoss
from unitok.nn.taming import Decoder, Encoder
from unitok.tokenizers.base import ImageTokenizer, parse_resize

PIXEL_LOSSES = ("l1", "l2")


class VQGANTokenizer(ImageTokenizer):
    """The defaults are taming's f16 with 1,024 codes.

    Args:
        image_size: pixels a side, a multiple of the stride, patch * 2**(len(multipliers) - 1); others can be encoded.
        channels, multipliers, blocks: level i (0 is full resolution) has `blocks` residual blocks of channels *
            multipliers[i] channels, one more in the decoder.
        latent: channels that leave the encoder; `pointwise` 1 x 1 convolutions lead from them to a code's vector and
            back. Without them `latent` is the size of a code's vector.
        attention: levels whose blocks are each followed by attention. patch: as in nn/taming.py.
        quantizer: one of nn/quantizers.py: vq, ema, simvq, rvq, gumbel, fsq, lfq, bsq.
        codebook_size, code_dim: of vq, ema, simvq, rvq, gumbel. depth: codes a position, of rvq.
        normalize: look codes up by their angle; vq and ema.
        levels: of fsq. bits: of every code of a position, for lfq and bsq: (9, 9) is 2**18 as two sub-vocabularies.
        lsb_first: the first channel is the lowest bit of a code.
        beta: weight of the commitment; `legacy` swaps it onto the codes, as taming's released code does.
        revive: codes that fall out of use become vectors of the batch; for vq, after so many steps without use; for
            ema and rvq, where the moving count of a code falls below it. 0 never does.
        entropy_weight, entropy_temperature: of lfq and bsq. kl_weight, temperature, temperature_steps: of gumbel.
        pixel: "l1" or "l2", between pixels in [-1, 1].
        perceptual, perceptual_weight, adversarial_weight, adversary_*: as in nn/picture_loss.py.
        pixel_range: what black and white are to the network; aMUSEd's has (0, 1).
    """

    fully_convolutional = True
    exact = ("quant_conv", "quantize")

    def __init__(
        self,
        image_size: int = 256,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        latent: int = 256,
        attention: Sequence[int] = (4,),
        middle_attention: bool = True,
        patch: int = 1,
        norm_groups: int = 32,
        pointwise: bool = True,
        quantizer: str = "vq",
        codebook_size: int = 1024,
        code_dim: int = 256,
        normalize: bool = False,
        levels: Sequence[int] = (),
        bits: Sequence[int] = (),
        lsb_first: bool = False,
        depth: int = 1,
        beta: float = 0.25,
        legacy: bool = False,
        revive: float = 0,
        entropy_weight: float = 0.1,
        entropy_temperature: float = 0.01,
        kl_weight: float = 5e-4,
        temperature: Sequence[float] = (1.0, 1 / 16),
        temperature_steps: int = 10_000,
        pixel: str = "l1",
        perceptual: str | None = None,
        perceptual_weight: float = 1.0,
        adversarial_weight: float = 0.0,
        adversary_start: int = 0,
        adversary_width: int = 64,
        adversary_layers: int = 3,
        adversary_adaptive: bool = True,
        resize: str = "crop-lanczos",
        pixel_range: Sequence[float] = (-1.0, 1.0),
    ):
        super().__init__()
        parse_resize(resize)
        self.stride = patch * 2 ** (len(multipliers) - 1)
        widths = [channels * m for m in multipliers]
        for name, value, fits in (
            ("patch", patch, patch > 0),
            ("multipliers", multipliers, len(multipliers) > 0 and min(multipliers) > 0),
            ("image_size", image_size, image_size >= self.stride and image_size % self.stride == 0),
            ("attention", attention, all(0 <= level < len(multipliers) for level in attention)),
            ("norm_groups", norm_groups, norm_groups > 0 and all(w % norm_groups == 0 for w in [channels, *widths])),
            ("pixel", pixel, pixel in PIXEL_LOSSES),
            ("temperature", temperature, len(temperature) == 2 and min(temperature) > 0),
            ("pixel_range", pixel_range, len(pixel_range) == 2 and pixel_range[0] < pixel_range[1]),
        ):
            if not fits:
                raise ValueError(f"vqgan cannot have {name} = {value}; see the arguments of {type(self).__name__}")
        self.image_size, self.resize = image_size, resize
        self.pixel, self.black, self.white = pixel, *pixel_range
        options: dict[str, dict[str, Any]] = {
            "vq": {"normalize": normalize, "beta": beta, "legacy": legacy, "revive_after": int(revive)},
            "ema": {"normalize": normalize, "beta": beta, "revive_below": revive},
            "simvq": {"beta": beta},
            "rvq": {"beta": beta, "revive_below": revive},
            "gumbel": {"kl_weight": kl_weight, "temperature": temperature, "temperature_steps": temperature_steps},
            "lfq": {
                "beta": beta,
                "entropy_weight": entropy_weight,
                "entropy_temperature": entropy_temperature,
                "lsb_first": lsb_first,
            },
        }
        options["bsq"] = options["lfq"]
        self.quantize = quantizers.make(
            quantizer, size=codebook_size, dim=code_dim, levels=tuple(levels), bits=tuple(bits), depth=depth,
            **options.get(quantizer, {}),
        )  # fmt: skip
        self.codebook_sizes = self.quantize.sizes
        dim = self.quantize.dim
        if not pointwise and latent != dim:
            raise ValueError(f"vqgan without pointwise convolutions needs latent = {dim}, the size of a code's vector")
        shape = (channels, tuple(multipliers), blocks, latent, tuple(attention), middle_attention, norm_groups, patch)
        self.encoder, self.decoder = Encoder(*shape), Decoder(*shape)
        self.quant_conv = nn.Conv2d(latent, dim, 1) if pointwise else None
        self.post_quant_conv = nn.Conv2d(dim, latent, 1) if pointwise else None
        self.picture_loss = PictureLoss(
            perceptual, perceptual_weight, adversarial_weight, adversary_start, adversary_width, adversary_layers,
            adversary_adaptive,
        )  # fmt: skip

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        books = self.quantize.books
        return super().grid(height, width) + ((len(books),) if len(books) > 1 else ())

    def token_codebook(self, grid: tuple[int, ...] | None = None) -> Tensor:
        h, w = self.check_grid(grid)[:2]
        return torch.tensor(self.quantize.books).repeat(h * w)

    def encode(self, images: Tensor) -> Tensor:
        return self.quantize.encode(self.vectors(self._ranged(images))).flatten(1)  # [B, h*w*K]

    def decode(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        return self._unranged(self.pixels(self.embed(codes, grid), self.check_grid(grid))).clamp(0, 1).float()

    def embed(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        return self.quantize.vectors(codes.unflatten(1, (-1, len(self.quantize.books)))).to(self.dtype)  # [B, h*w, D]

    def vectors(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] in `pixel_range` -> float32 [B, h*w, D], before they are quantized."""
        z = self.encoder(images)
        z = z if self.quant_conv is None else self.quant_conv(z)
        return z.flatten(2).transpose(1, 2).float()

    def pixels(self, vectors: Tensor, grid: tuple[int, ...]) -> Tensor:
        """float [B, h*w, D] -> float [B, 3, H, W], about `pixel_range`."""
        z = vectors.transpose(1, 2).unflatten(2, grid[:2])
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def _ranged(self, images: Tensor) -> Tensor:
        return images * (self.white - self.black) + self.black

    def _unranged(self, images: Tensor) -> Tensor:
        return (images - self.black) / (self.white - self.black)

    def loss(self, batch: Mapping[str, Any], step: int, stage: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels + perceptual + quantizer + adversary, the latter weighed by the ratio of their gradients."""
        images = batch["images"]
        z = self.vectors(self._ranged(images))
        with torch.autocast(images.device.type, enabled=False):  # codes are chosen in float32
            chosen, codes, quantizing = self.quantize(z, step)
        made = self._unranged(self.pixels(chosen, self.grid(*images.shape[2:])).float())
        error = (made - images) * 2
        pixels = error.abs().mean() if self.pixel == "l1" else error.square().mean()
        rebuilt, further = self.picture_loss(made, images, pixels, step, self.decoder.conv_out.weight)
        used = [codes[..., k].unique().numel() / self.codebook_sizes[b] for k, b in enumerate(self.quantize.books)]
        parts = {"pixels": pixels, "quantizer": quantizing, **further, "psnr": psnr(error)}
        parts["codes_used"] = torch.tensor(sum(used) / len(used))
        return rebuilt + quantizing, {name: part.detach() for name, part in parts.items()}

    def critic(self) -> PatchCritic | None:
        return self.picture_loss.critic

    @classmethod
    def tiny(cls) -> VQGANTokenizer:
        return cls(
            image_size=16, channels=8, multipliers=(1, 2, 2), blocks=1, latent=8, attention=(2,), norm_groups=4,
            codebook_size=32, code_dim=4, adversarial_weight=0.1, adversary_width=8, adversary_layers=1,
        )  # fmt: skip
