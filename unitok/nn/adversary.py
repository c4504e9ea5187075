"""The adversary of VQGAN: a patch discriminator with the hinge loss (Isola et al. 2017; Esser et al. 2021).

Shapes: B images, 3 channels in [-1, 1], H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRONGEST = 1e4  # bound of the adaptive weight
WIDEST = 8  # the width stops doubling at so many times the first


class PatchCritic(nn.Module):
    """Scores of overlapping patches. It judges the pictures that its tokenizer made last, left in `made`.

    Args:
        width: channels of the first convolution. layers: convolutions of stride 2.
        start: steps before which nothing is judged: the loss is 0, and so are its gradients.
    """

    def __init__(self, width: int = 64, layers: int = 3, start: int = 0):
        super().__init__()
        self.start = start
        self.made: Tensor | None = None
        net: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        before = width
        for i in range(1, layers + 1):
            after = width * min(2**i, WIDEST)
            net += [nn.Conv2d(before, after, 4, 2 if i < layers else 1, 1, bias=False), nn.BatchNorm2d(after)]
            net += [nn.LeakyReLU(0.2)]
            before = after
        self.net = nn.Sequential(*net, nn.Conv2d(before, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)  # [B, 1, h, w]

    def loss(self, batch: Mapping[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Hinge loss of batch["images"] (in [0, 1]) against `made`."""
        real = batch["images"] * 2 - 1
        if step < self.start:
            return sum(p.sum() for p in self.parameters()) * 0.0, {}  # type: ignore[return-value]
        fake = torch.zeros_like(real) if self.made is None else self.made
        on_real, on_fake = self(real), self(fake)
        loss = hinge(on_real, on_fake)
        return loss, {"real": on_real.mean().detach(), "fake": on_fake.mean().detach()}


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """0.5 (relu(1 - D(x)) + relu(1 + D(x^))), a scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """|gradient of reconstruction| / |gradient of adversarial| at the decoder's last weight: a scalar without gradient.

    Esser et al. 2021, eq. 7; both losses are scalars whose graphs stay.
    """
    ours = torch.autograd.grad(reconstruction, last, retain_graph=True)[0]
    theirs = torch.autograd.grad(adversarial, last, retain_graph=True)[0]
    return (ours.norm() / (theirs.norm() + 1e-4)).clamp(0, STRONGEST).detach()
