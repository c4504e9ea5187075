"""A perceptual distance between pictures: that of a frozen network's feature maps (Zhang et al., CVPR 2018).

No network is shipped. `Perceptual.open` reads the weights of two from a file, or takes any function of the user's.

Shapes: B pictures, H x W pixels; a feature map has C channels at h x w positions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok import checkpoint

EPSILON = 1e-10  # under the root of a vector's length: where all channels are 0, the gradient stays finite
SMALLEST = 64  # pixels; the distance was introduced on patches of this size


class Perceptual(nn.Module):
    """Distance of pictures as a network sees them.

    At every position of every feature map the channels are scaled to length 1; the squared differences are summed over
    channels, averaged over positions and summed over maps. Without learned weights of the channels ("baseline" of the
    paper), so its values are not those of LPIPS.

    Pictures whose shorter side has less than `smallest` pixels are enlarged to it (bilinear, keeping their shape): at
    32 pixels the deeper maps of a network would be a single position. Others are taken as they are.

    Frozen: no parameter has a gradient, and train() leaves it in eval mode. It computes in the type of its parameters,
    float32 unless moved, and outside autocast; lengths and distances are always float32.

    Args:
        network: float [B, 3, H, W] in [0, 1] -> a list of feature maps [B, C, h, w].
        name: what results call it.
        smallest: the shorter side in pixels up to which pictures are enlarged.
    """

    def __init__(self, network: Callable[[Tensor], Sequence[Tensor]], name: str = "", smallest: int = SMALLEST):
        super().__init__()
        self.network = network  # a module is registered as one
        self.name, self.smallest = name or getattr(network, "__name__", type(network).__name__), smallest
        self.requires_grad_(False)
        self.train(False)

    @classmethod
    def open(cls, source: str | Path) -> Perceptual:
        """From weights in a file (safetensors, or tensors in a torch file), or "module:attribute".

        Files: SqueezeNet 1.0 and MobileNetV2 1.0, known by the names of their tensors (`SqueezeNet`, `MobileNetV2`).
        An attribute is a function from pictures to feature maps, a module, or a class of such that takes no argument.
        ValueError or FileNotFoundError where it is none of these.
        """
        module_name, _, attribute = str(source).partition(":")
        if attribute and not Path(source).is_file():
            found = _attribute(module_name, attribute)
            return cls(found() if isinstance(found, type) else found, str(source))
        state = checkpoint.load_weights(source)
        kind = next((kind for kind in (SqueezeNet, MobileNetV2) if kind.mark in state), None)
        if kind is None:
            raise ValueError(f"{source}: not a known perceptual network: expected SqueezeNet 1.0 (with a tensor "
                             f"{SqueezeNet.mark}) or MobileNetV2 ({MobileNetV2.mark})")  # fmt: skip
        with torch.device("meta"):  # draws no random numbers
            network = kind()
        network.to_empty(device="cpu")
        own = {key: tensor for key, tensor in state.items() if not key.startswith(kind.head)}
        checkpoint.load_into(network, own, what=str(source))
        return cls(network, f"{kind.__name__} {checkpoint.state_hash(state)[:12]}")

    def train(self, mode: bool = True) -> Perceptual:
        """Stays in eval mode, whatever is asked for."""
        return super().train(False)

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """float [B, 3, H, W] in [0, 1] twice -> float32 [B], 0 for equal pictures; differentiable in both."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape != reference.shape:
            raise ValueError(f"expected two [B, 3, H, W] of one shape, got {tuple(images.shape)} and "
                             f"{tuple(reference.shape)}")  # fmt: skip
        distance = torch.zeros(len(images), device=images.device)
        for a, b in zip(self.features(images), self.features(reference), strict=True):
            distance = distance + (_unit(a) - _unit(b)).square().sum(1).mean((1, 2))
        return distance

    def features(self, images: Tensor) -> list[Tensor]:
        """float [B, 3, H, W] in [0, 1] -> feature maps [B, C, h, w], of small pictures after they were enlarged."""
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
        with torch.autocast(images.device.type, enabled=False):
            images = images.to(dtype)
            height, width = images.shape[-2:]
            if (side := min(height, width)) < self.smallest:
                size = [round(n * self.smallest / side) for n in (height, width)]
                images = F.interpolate(images, size, mode="bilinear", antialias=False)
            maps = self.network(images)
        right = isinstance(maps, list | tuple) and all(isinstance(m, Tensor) and m.ndim == 4 for m in maps)
        if not right or not maps:
            raise ValueError(f"perceptual network {self.name}: expected a list of feature maps [B, C, h, w]")
        return list(maps)


def _unit(features: Tensor) -> Tensor:
    """Length 1 over channels, float32; positions where all channels are 0 stay 0."""
    features = features.float()
    return features * (features.square().sum(1, keepdim=True) + EPSILON).rsqrt()


def _attribute(module_name: str, attribute: str) -> Any:
    what = f"perceptual network {f'{module_name}:{attribute}'!r}"
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise  # the module is there, something it needs is not
        raise ValueError(f"{what}: there is no module {module_name!r} to import, and no such file") from None
    if not callable(found):
        raise ValueError(f"{what}: module {module_name!r} has no function or class {attribute!r}")
    return found


# ---- networks: the layouts of their published files; heads (for ImageNet classes) stay unread -----------------------


class SqueezeNet(nn.Module):
    """SqueezeNet 1.0 (Iandola et al., 2016), 7 maps: conv1, fire4, and every module from fire5 to fire9.

    float [B, 3, H, W] in [0, 1] -> maps after ReLU at 1/2, 1/4, 4 times 1/8 and 1/16 of the resolution, less borders.
    """

    mark, head = "fire2.squeeze.weight", "conv_final."
    WIDTHS = {2: (16, 64), 3: (16, 64), 4: (32, 128), 5: (32, 128), 6: (48, 192), 7: (48, 192), 8: (64, 256),
              9: (64, 256)}  # fmt: skip  # module -> squeezed channels, channels of each half
    MEANS = (104.0, 117.0, 123.0)
    MAPS = (4, 5, 6, 7, 8, 9)
    POOLED = (4, 8)  # modules before a pooling

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 7, stride=2)
        width = 96
        for number, (squeezed, half) in self.WIDTHS.items():
            self.add_module(f"fire{number}", Fire(width, squeezed, half))
            width = 2 * half

    def forward(self, images: Tensor) -> list[Tensor]:
        # the published network takes blue, green, red from 0 to 255 less these means
        x = F.relu(self.conv1(images.flip(1) * 255 - images.new_tensor(self.MEANS).view(1, 3, 1, 1)))
        maps = [x]
        x = _pool(x)
        for number in self.WIDTHS:
            x = self.get_submodule(f"fire{number}")(x)
            if number in self.MAPS:
                maps.append(x)
            if number in self.POOLED:
                x = _pool(x)
        return maps


class Fire(nn.Module):
    def __init__(self, width: int, squeezed: int, half: int):
        super().__init__()
        self.squeeze = nn.Conv2d(width, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, half, 1)
        self.expand3x3 = nn.Conv2d(squeezed, half, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


def _pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, ceil_mode=True)


class MobileNetV2(nn.Module):
    """MobileNetV2 1.0 with its normalisations folded in (Sandler et al., 2018), 5 maps: blocks 1, 3, 6, 13 and 18.

    float [B, 3, H, W] in [0, 1] -> the last map at each of 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution. Blocks 1 to
    17 end without an activation, 18 with ReLU6. Borders as TensorFlow's "SAME".
    """

    mark, head = "features.1.depthwise.weight", "classifier."
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    MAPS = (1, 3, 6, 13, 18)

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [Ends(3, 32, 3, 2)]
        width = 32
        for expansion, out, count, stride in self.STAGES:
            for n in range(count):
                blocks.append(Inverted(width, out, expansion, stride if n == 0 else 1))
                width = out
        self.features = nn.ModuleList([*blocks, Ends(width, 1280, 1, 1)])

    def forward(self, images: Tensor) -> list[Tensor]:
        x, maps = images * 2 - 1, []
        for number, block in enumerate(self.features):
            x = block(x)
            if number in self.MAPS:
                maps.append(x)
        return maps


class Ends(nn.Module):
    """The first and the last convolution."""

    def __init__(self, width: int, out: int, kernel: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.conv(_same(x, self.conv)))


class Inverted(nn.Module):
    """Wide inside, narrow at its ends; the input is added where the shapes agree."""

    def __init__(self, width: int, out: int, expansion: int, stride: int):
        super().__init__()
        inner = width * expansion
        self.expand = nn.Conv2d(width, inner, 1) if expansion > 1 else None
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, groups=inner)
        self.project = nn.Conv2d(inner, out, 1)
        self.adds = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(_same(y, self.depthwise))))
        return x + y if self.adds else y


def _same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Zeros around x, so that conv gives ceil(n / stride) positions a side; the odd one goes to the right or below."""
    pads = []
    for n, kernel, stride in zip(x.shape[:1:-1], conv.kernel_size[::-1], conv.stride[::-1], strict=True):  # W, then H
        total = max(0, (-(-n // stride) - 1) * stride + kernel - n)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads) if any(pads) else x
