"""What made pictures cost beside their pixels: a perceptual distance, and an adversary (Esser et al. 2021, eq. 5 to 7).

Shapes: B images, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unitok.nn.adversary import PatchCritic, adaptive_weight
from unitok.nn.perceptual import Perceptual


class PictureLoss:
    """Pixels + perceptual + adversary, the latter weighed by the ratio of their gradients.

    Not a module: neither network is part of the tokenizer that holds it, and its folder does not hold them.

    Args:
        perceptual: a network for nn/perceptual.py, read when training begins; none is shipped.
        adversarial_weight: 0 trains without adversary; it joins after `start` steps.
        adaptive: weigh it by the ratio of gradients at the decoder's last layer.
        width, layers: of the adversary, as in nn/adversary.py.
    """

    def __init__(
        self,
        perceptual: str | None = None,
        perceptual_weight: float = 1.0,
        adversarial_weight: float = 0.0,
        start: int = 0,
        width: int = 64,
        layers: int = 3,
        adaptive: bool = True,
    ):
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.adversarial_weight, self.adaptive = adversarial_weight, adaptive
        self.critic = PatchCritic(width, layers, start) if adversarial_weight else None
        self._network: nn.Module | None = None

    def __call__(
        self, made: Tensor, images: Tensor, pixels: Tensor, step: int, last: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """float [B, 3, H, W] about [0, 1] and in it, their scalar pixel loss -> (scalar, the terms that were added).

        `last` is the weight of the decoder's last layer. The critic is left what it is to judge.
        """
        made, total, parts = made.float(), pixels, {}
        if self.perceptual:
            self._network = self._network or Perceptual.open(self.perceptual).to(images.device)
            parts["perceptual"] = self._network(made, images).mean()
            total = total + self.perceptual_weight * parts["perceptual"]
        if self.critic is not None:
            seen = made * 2 - 1
            self.critic.made = seen.detach()
            if step >= self.critic.start:
                fooled = -self.critic(seen).mean()
                weight = torch.tensor(self.adversarial_weight, device=total.device)
                if self.adaptive and torch.is_grad_enabled():
                    weight = weight * adaptive_weight(total, fooled, last)
                total = total + weight * fooled
                parts |= {"adversarial": fooled, "adversarial_weight": weight}
        return total, parts
