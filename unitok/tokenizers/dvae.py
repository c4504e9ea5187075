"""The discrete VAE of DALL-E (Ramesh et al. 2021, arXiv 2102.12092; openai/DALL-E).

    encoder   7 x 7 convolution, groups of bottleneck blocks with 2 x 2 max-pooling between them, 1 x 1 to logits
    codes     the highest logit; in training a softmax over logits and Gumbel noise at a falling temperature, soft in
              both passes
    decoder   a 1 x 1 convolution of the (soft) one-hot codes, which is the codebook; the groups backwards with
              nearest-neighbour upsampling; six channels: location and log scale of each colour
    loss      logit-Laplace likelihood of the pixels, and the divergence of the codes' distribution from the uniform one

Shapes: B images, H x W pixels, V codes, h x w positions (H and W over the stride 2**(groups - 1)), C channels.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.tokenizers.base import ImageTokenizer, parse_resize

MARGIN = 0.1  # pixels are squeezed into [MARGIN, 1 - MARGIN], where the logit is tame


class DVAETokenizer(ImageTokenizer):
    """The published model is the default; a small one has a smaller `width` and `vocab_size`.

    Args:
        image_size: pixels a side, a multiple of the stride; other multiples can be encoded too.
        width: channels of the first group; each further group of the encoder doubles them. A multiple of 4.
        groups, blocks: groups of blocks in encoder and decoder, and blocks in each; the stride is 2**(groups - 1).
        code_width: size of a code's vector, where the decoder begins.
        decoder: False where published weights have none: codes can be made, and a code's vector is its row of the
            encoder's last layer, but nothing can be decoded or trained.
        kl_weight: what the divergence reaches after `kl_warmup` steps; with the division by pixels in `loss` it is
            the paper's beta (6.6, which is beta / 192 between means of 256-pixel images).
        temperature: of the Gumbel softmax, first and last; it falls on a cosine over `temperature_steps`.
    """

    fully_convolutional = True
    exact = ("encoder.output",)

    def __init__(
        self,
        image_size: int = 256,
        width: int = 256,
        groups: int = 4,
        blocks: int = 2,
        vocab_size: int = 8192,
        code_width: int = 128,
        kl_weight: float = 6.6,
        kl_warmup: int = 5000,
        temperature: Sequence[float] = (1.0, 1 / 16),
        temperature_steps: int = 150_000,
        resize: str = "crop-lanczos",
        decoder: bool = True,
    ):
        super().__init__()
        parse_resize(resize)
        self.stride = 2 ** (groups - 1)
        for name, value, fits in (
            ("groups", groups, groups >= 1),
            ("blocks", blocks, blocks >= 1),
            ("width", width, width >= 4 and width % 4 == 0),
            ("vocab_size", vocab_size, vocab_size >= 2),
            ("image_size", image_size, image_size >= self.stride and image_size % self.stride == 0),
            ("temperature", temperature, len(temperature) == 2 and min(temperature) > 0),
        ):
            if not fits:
                raise ValueError(f"dvae cannot have {name} = {value}; see the arguments of {type(self).__name__}")
        self.image_size, self.resize = image_size, resize
        self.kl_weight, self.kl_warmup = kl_weight, kl_warmup
        self.temperature, self.temperature_steps = tuple(temperature), temperature_steps
        self.codebook_sizes = (vocab_size,)
        widths = [width << g for g in range(groups)]
        self.encoder = _encoder(widths, blocks, vocab_size)
        self.decoder = _decoder(widths[::-1], blocks, vocab_size, code_width) if decoder else None

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(squeeze(images)).argmax(1).flatten(1)  # [B, h*w]

    def decode(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        if self.decoder is None:
            raise NotImplementedError("this dVAE has an encoder only, so its codes need a detokenizer")
        vectors = self.embed(codes, grid).transpose(1, 2).unflatten(2, self.check_grid(grid))  # [B, C, h, w]
        location = self.decoder[1:](vectors)[:, :3]
        return unsqueeze(location.float().sigmoid())

    def embed(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        if self.decoder is None:
            last: Any = self.encoder.output
            return F.embedding(codes, last.conv.weight[:, :, 0, 0])  # [B, h*w, C]
        book: Any = self.decoder.input
        return F.embedding(codes, book.weight[:, :, 0, 0].T) + book.bias  # [B, h*w, C]

    def loss(self, batch: Mapping[str, Any], step: int, stage: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """(-ln p summed over pixels and colours + weight * divergence summed over positions), a pixel and colour."""
        if self.decoder is None:
            raise ValueError("this dVAE has an encoder only: it cannot be trained")
        pixels = squeeze(batch["images"])
        logits = self.encoder(pixels).float()  # [B, V, h, w]
        tau, weight = self.schedules(step)
        soft = F.gumbel_softmax(logits, tau=tau, hard=False, dim=1)
        location, log_scale = self.decoder(soft).float().chunk(2, dim=1)  # [B, 3, H, W] each
        likelihood = -log_logit_laplace(pixels, location, log_scale).mean()
        divergence = kl_to_uniform(logits)  # [B, h, w]
        kl = divergence.sum() / pixels.numel()
        error = unsqueeze(location.detach().sigmoid()) - batch["images"]
        parts = {"nll": likelihood, "kl": divergence.mean(), "psnr": -10 * error.square().mean().log10(),
                 "temperature": torch.tensor(tau), "kl_weight": torch.tensor(weight)}  # fmt: skip
        return likelihood + weight * kl, {name: part.detach() for name, part in parts.items()}

    def schedules(self, step: int) -> tuple[float, float]:
        """(temperature, weight of the divergence) at a step."""
        first, last = self.temperature
        tau = last + (first - last) * (1 - _risen(step, self.temperature_steps))
        return tau, self.kl_weight * _risen(step, self.kl_warmup)

    @classmethod
    def tiny(cls) -> DVAETokenizer:
        return cls(image_size=16, width=8, groups=3, blocks=1, vocab_size=32, code_width=8)


# ---- numbers


def squeeze(images: Tensor) -> Tensor:
    """[0, 1] -> [MARGIN, 1 - MARGIN] (`map_pixels` of openai/DALL-E)."""
    return (1 - 2 * MARGIN) * images + MARGIN


def unsqueeze(pixels: Tensor) -> Tensor:
    """The inverse of `squeeze`, cut to [0, 1]."""
    return ((pixels - MARGIN) / (1 - 2 * MARGIN)).clamp(0, 1)


def log_logit_laplace(x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
    """ln of the density of x in (0, 1) whose logit is Laplace distributed (paper, appendix A.3); any equal shapes."""
    distance = (x.logit() - location).abs() * (-log_scale).exp()
    return -distance - log_scale - math.log(2) - x.log() - (1 - x).log()


def kl_to_uniform(logits: Tensor) -> Tensor:
    """Divergence in nats of softmax(logits) from the uniform distribution: [B, V, h, w] -> [B, h, w]."""
    logp = logits.log_softmax(1)
    return math.log(logits.shape[1]) + (logp.exp() * logp).sum(1)


def _risen(step: int, steps: int) -> float:
    """From 0 at step 0 to 1 at `steps`, half a cosine."""
    return (1 - math.cos(math.pi * min(1.0, step / max(1, steps)))) / 2


# ---- layers


class _Block(nn.Module):
    """x + res(x) / layers^2: four convolutions on a quarter of the channels, each behind a ReLU."""

    def __init__(self, channels: int, out: int, kernels: Sequence[int], gain: float):
        super().__init__()
        hidden = out // 4
        sizes = [channels, hidden, hidden, hidden, out]
        self.id_path = nn.Identity() if channels == out else _conv(channels, out, 1)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            layers[f"relu_{i + 1}"] = nn.ReLU()
            layers[f"conv_{i + 1}"] = _conv(sizes[i], sizes[i + 1], kernel)
        self.res_path, self.gain = nn.Sequential(layers), gain

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


def _encoder(widths: Sequence[int], blocks: int, vocab_size: int) -> nn.Sequential:
    first, output = _conv(3, widths[0], 7), _conv(widths[-1], vocab_size, 1)
    return nn.Sequential(_groups(first, widths, blocks, (3, 3, 3, 1), nn.MaxPool2d(2), output))


def _decoder(widths: Sequence[int], blocks: int, vocab_size: int, code_width: int) -> nn.Sequential:
    first, output = _conv(vocab_size, code_width, 1), _conv(widths[-1], 6, 1)
    return nn.Sequential(_groups(first, widths, blocks, (1, 3, 3, 3), nn.Upsample(scale_factor=2), output))


def _groups(
    first: nn.Conv2d, widths: Sequence[int], blocks: int, kernels: Sequence[int], between: nn.Module, output: nn.Conv2d
) -> OrderedDict[str, nn.Module]:
    """The layers by the names of openai/DALL-E: input, group_1 (block_1, ...), ..., output."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(input=first)
    channels = first.out_channels
    gain = 1 / (len(widths) * blocks) ** 2
    for g, width in enumerate(widths):
        group: OrderedDict[str, nn.Module] = OrderedDict()
        for b in range(blocks):
            group[f"block_{b + 1}"] = _Block(channels, width, kernels, gain)
            channels = width
        if g < len(widths) - 1:
            group["scale"] = between
        layers[f"group_{g + 1}"] = nn.Sequential(group)
    layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=output))
    return layers


def _conv(channels: int, out: int, kernel: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out, kernel, padding=(kernel - 1) // 2)
    nn.init.normal_(conv.weight, std=1 / math.sqrt(channels * kernel**2))
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
