"""The perceptual distance against its definition, and two published networks against other ways to compute them."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from unitok.checkpoint import load_weights, save_weights
from unitok.nn.perceptual import MobileNetV2, Perceptual, SqueezeNet
from unitok.tokenizers.base import fit, to_tensor

FILES = {"SqueezeNet": "squeezenet_v1_0_dc_fp16.safetensors", "MobileNetV2": "mobilenet_v2_224_folded_fp16.safetensors"}
SIZES = {"SqueezeNet": 227, "MobileNetV2": 224}
OBJECTS = {  # class numbers of ImageNet that one would say of an object of COCO
    "zebra": [340], "elephant": [101, 385, 386], "pizza": [963], "banana": [954], "broccoli": [937],
    "laptop": [620, 681], "stop sign": [919], "umbrella": [879], "bear": [294, 295, 296, 297], "toilet": [861],
    "traffic light": [920], "bus": [654, 779, 874], "train": [466, 547, 820], "sheep": [348, 349], "orange": [950],
    "teddy bear": [850], "microwave": [651], "refrigerator": [760], "parking meter": [704],
    "cat": [281, 282, 283, 284, 285], "dog": list(range(151, 269)), "airplane": [404, 895], "motorcycle": [665, 670],
    "bicycle": [444, 671], "clock": [409, 530, 892], "vase": [883], "truck": [555, 569, 717, 864, 867],
}  # fmt: skip


def weights(name: str) -> Path:
    if "UNITOK_DATA" not in os.environ:
        pytest.skip("UNITOK_DATA is not set")
    path = Path(os.environ["UNITOK_DATA"]) / "weights_imagenet_small" / FILES[name]
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


def photos(n=2, size=80):
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 6, 6, generator=g)
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)


def random_file(folder: Path, kind: type[nn.Module], head: str) -> Path:
    torch.manual_seed(0)
    state = {**kind().state_dict(), f"{head}.weight": torch.rand(3, 4), f"{head}.bias": torch.rand(3)}
    save_weights(folder / f"{kind.__name__}.safetensors", {k: v.half() for k, v in state.items()})
    return folder / f"{kind.__name__}.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Files of both layouts with random weights."""
    folder = tmp_path_factory.mktemp("networks")
    return {"SqueezeNet": random_file(folder, SqueezeNet, "conv_final"),
            "MobileNetV2": random_file(folder, MobileNetV2, "classifier")}  # fmt: skip


# ---- the distance


def two_maps(images):
    return [images, F.avg_pool2d(images, 4).flip(1) - 0.5]


def test_the_distance_is_its_definition_position_by_position():
    a, b = torch.rand(2, 2, 3, 64, 72).unbind()
    expected = np.zeros(2)
    for x, y in zip(two_maps(a), two_maps(b), strict=True):
        x, y = x.double().numpy(), y.double().numpy()
        for n in range(2):
            values = []
            for i in range(x.shape[2]):
                for j in range(x.shape[3]):
                    p, q = x[n, :, i, j], y[n, :, i, j]
                    values.append(((p / np.linalg.norm(p) - q / np.linalg.norm(q)) ** 2).sum())
            expected[n] += np.mean(values)
    distance = Perceptual(two_maps)
    assert distance(a, b).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert distance(b, a).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert distance(a, a).tolist() == [0, 0] and distance(a, b).dtype == torch.float32


def test_small_pictures_are_enlarged_and_others_are_not():
    seen = []
    distance = Perceptual(lambda images: seen.append(tuple(images.shape[2:])) or [images])
    for size in [(32, 32), (32, 48), (63, 200), (64, 64), (256, 96)]:
        distance.features(torch.rand(1, 3, *size))
    assert seen == [(64, 64), (64, 96), (64, 203), (64, 64), (256, 96)]


@pytest.mark.parametrize("name", FILES)
def test_it_trains_what_makes_the_pictures_and_stays_as_it_is(files, name):
    distance = Perceptual.open(files[name])
    before = {k: v.clone() for k, v in distance.state_dict().items()}
    reference = photos(2, 32)
    images = (reference + 0.2 * torch.randn_like(reference)).clamp(0, 1).requires_grad_()
    distance.train()
    assert not distance.training and not any(p.requires_grad for p in distance.parameters())
    optimizer, found = torch.optim.Adam([images], lr=0.01), []
    for _ in range(12):
        loss = distance(images, reference).mean()
        optimizer.zero_grad()
        loss.backward()
        assert images.grad.isfinite().all()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.7 * found[0]
    assert all(torch.equal(v, before[k]) for k, v in distance.state_dict().items())


def test_where_all_channels_are_0_the_gradient_is_finite():
    images = torch.zeros(1, 3, 64, 64, requires_grad=True)
    distance = Perceptual(lambda x: [F.relu(x)])
    distance(images, torch.rand(1, 3, 64, 64)).sum().backward()
    assert images.grad.isfinite().all()


def test_float32_under_autocast_and_another_type_where_asked_for(files):
    a, b = photos(4).chunk(2)
    distance = Perceptual.open(files["MobileNetV2"])
    exact = distance(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(a.bfloat16().float(), b), distance(a.bfloat16(), b))
        assert torch.equal(distance(a, b), exact)
    rough = distance.to(torch.bfloat16)(a, b)
    assert rough.dtype == torch.float32 and 0 < (rough / exact - 1).abs().max() < 0.2


# ---- where networks come from


@pytest.mark.parametrize("name", FILES)
def test_opening_draws_no_random_numbers(files, name):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert Perceptual.open(files[name]).name.startswith(name)
    assert torch.equal(torch.rand(3), expected)


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        return [self.conv(images)]


def test_a_network_of_the_users(monkeypatch):
    wrong = SimpleNamespace(maps=two_maps, Halves=Halves, one=lambda images: images, number=3)
    monkeypatch.setitem(sys.modules, "a_network", wrong)
    a, b = torch.rand(2, 1, 3, 64, 64).unbind()
    assert torch.equal(Perceptual.open("a_network:maps")(a, b), Perceptual(two_maps)(a, b))
    made = Perceptual.open("a_network:Halves")
    assert made.name == "a_network:Halves" and len(list(made.parameters())) == 2
    assert not any(p.requires_grad for p in made.parameters())
    with pytest.raises(ValueError, match="a_network:one: expected a list of feature maps"):
        Perceptual.open("a_network:one")(a, b)
    with pytest.raises(ValueError, match="module 'a_network' has no function or class 'number'"):
        Perceptual.open("a_network:number")
    with pytest.raises(ValueError, match="no module 'no_such_module' to import, and no such file"):
        Perceptual.open("no_such_module:x")


def test_files_that_do_not_fit_are_refused(files, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        Perceptual.open(tmp_path / "gone.safetensors")
    save_weights(tmp_path / "other.safetensors", {"conv.weight": torch.rand(3)})
    with pytest.raises(ValueError, match=r"other.safetensors: not a known perceptual network: .*fire2.squeeze.weight"):
        Perceptual.open(tmp_path / "other.safetensors")
    state = load_weights(files["SqueezeNet"])
    lacks = {k: v for k, v in state.items() if k != "fire7.squeeze.bias"}
    save_weights(tmp_path / "lacks.safetensors", lacks)
    with pytest.raises(ValueError, match=r"lacks.safetensors do not fit SqueezeNet: missing: fire7.squeeze.bias"):
        Perceptual.open(tmp_path / "lacks.safetensors")
    save_weights(tmp_path / "shape.safetensors", {**state, "conv1.bias": torch.rand(64)})
    with pytest.raises(ValueError, match=r"conv1.bias is \(64,\), expected \(96,\)"):
        Perceptual.open(tmp_path / "shape.safetensors")
    with pytest.raises(ValueError, match="of one shape"):
        Perceptual(two_maps)(torch.rand(1, 3, 64, 64), torch.rand(2, 3, 64, 64))


# ---- the networks


def test_squeezenet_is_its_layers_one_by_one(files):
    w = {k: v.float() for k, v in load_weights(files["SqueezeNet"]).items()}
    images = photos(1, 97)
    blue, green, red = images[:, 2] * 255 - 104, images[:, 1] * 255 - 117, images[:, 0] * 255 - 123

    def conv(x, name, **options):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options).relu()

    x = conv(torch.stack([blue, green, red], 1), "conv1", stride=2)
    expected = [x]
    for n in range(2, 10):
        if n in (2, 5, 9):
            x = F.pad(x, (0, 2, 0, 2), value=-math.inf).unfold(2, 3, 2).unfold(3, 3, 2).amax((-2, -1))
            side = -(-(expected[-1].shape[-1] - 3) // 2) + 1  # the last window may hang over the border
            x = x[..., :side, :side]
        s = conv(x, f"fire{n}.squeeze")
        x = torch.cat([conv(s, f"fire{n}.expand1x1"), conv(s, f"fire{n}.expand3x3", padding=1)], 1)
        if n > 3:
            expected.append(x)
    found = Perceptual.open(files["SqueezeNet"]).features(images)
    assert [m.shape for m in found] == [m.shape for m in expected]
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(mine, other, atol=1e-4 * other.abs().max())


@pytest.mark.parametrize("size", [(64, 64), (75, 98)])  # even and odd sides have their borders elsewhere
def test_mobilenet_is_its_layers_one_by_one(files, size):
    w = {k: v.float() for k, v in load_weights(files["MobileNetV2"]).items()}
    images = torch.rand(1, 3, *size)

    def same(x, weight, bias, stride, groups=1):
        """TensorFlow's SAME, from its definition: output n is ceil(size / stride), padding split, the odd one last."""
        outs = [math.ceil(n / stride) for n in x.shape[2:]]
        total = [max((o - 1) * stride + weight.shape[2] - n, 0) for o, n in zip(outs, x.shape[2:], strict=True)]
        padded = torch.zeros(*x.shape[:2], *(n + t for n, t in zip(x.shape[2:], total, strict=True)))
        top, left = total[0] // 2, total[1] // 2
        padded[:, :, top : top + x.shape[2], left : left + x.shape[3]] = x
        return F.conv2d(padded, weight, bias, stride=stride, groups=groups)

    def layer(x, name, stride=1, groups=1):
        return same(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, groups)

    x, expected = layer(images * 2 - 1, "features.0.conv", 2).clamp(0, 6), []
    for n in range(1, 18):
        y = layer(x, f"features.{n}.expand").clamp(0, 6) if n > 1 else x
        y = layer(y, f"features.{n}.depthwise", 2 if n in (2, 4, 7, 14) else 1, y.shape[1]).clamp(0, 6)
        y = layer(y, f"features.{n}.project")
        x = x + y if n in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16) else y
        expected += [x] if n in (1, 3, 6, 13) else []
    expected.append(layer(x, "features.18.conv").clamp(0, 6))
    found = Perceptual.open(files["MobileNetV2"]).features(images)
    assert [m.shape for m in found] == [m.shape for m in expected]
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(mine, other, atol=1e-4 * other.abs().max())


def large_objects() -> list[tuple[Path, list[int]]]:
    """Photos whose largest object fills a quarter of them, and the classes it may be called."""
    folder = Path(os.environ["UNITOK_DATA"]) / "coco_mini"
    if not (folder / "images_dev.jsonl").is_file():
        pytest.skip(f"no {folder}")
    found = []
    for row in map(json.loads, open(folder / "images_dev.jsonl")):
        sizes = [(o["bbox_xywh"][2] * o["bbox_xywh"][3], o["category"]) for o in row["objects"] or ()]
        area, category = max(sizes, default=(0, ""))
        if category in OBJECTS and area > 0.25 * row["width"] * row["height"]:
            found.append((folder / row["image"], OBJECTS[category]))
    return found


@pytest.mark.parametrize(("name", "first", "five"), [("SqueezeNet", 0.45, 0.65), ("MobileNetV2", 0.6, 0.85)])
def test_the_published_weights_know_objects_by_the_last_map(name, first, five):
    path = weights(name)
    state, network = {k: v.float() for k, v in load_weights(path).items()}, Perceptual.open(path)
    shown = large_objects()
    images = torch.stack([to_tensor(fit(Image.open(file), SIZES[name], "crop-bicubic")) for file, _ in shown])

    def right(images):
        """Shares of photos whose object is first, and among the first five."""
        with torch.no_grad():
            features = torch.cat([network.features(part)[-1] for part in images.split(8)])
        if name == "SqueezeNet":
            maps = F.conv2d(features, state["conv_final.weight"], state["conv_final.bias"], padding=1).relu()
            logits = maps.mean((2, 3))
        else:
            logits = F.linear(features.mean((2, 3)), state["classifier.weight"], state["classifier.bias"])[:, 1:]
        hits = [
            [c in classes for c in top] for top, (_, classes) in zip(logits.topk(5)[1].tolist(), shown, strict=True)
        ]
        return np.mean([h[0] for h in hits]), np.mean([any(h) for h in hits])

    top1, top5 = right(images)
    assert len(shown) > 30 and top1 > first and top5 > five
    swapped, _ = right(images.flip(1))  # blue for red
    assert swapped < top1 - 0.1


@pytest.mark.parametrize("name", FILES)
def test_blur_is_farther_than_equal_error_in_brightness(name):
    """What a perceptual distance is for: of two pictures with the same squared error the blurred one looks worse."""
    distance = Perceptual.open(weights(name))
    pictures = torch.stack([to_tensor(fit(Image.open(file), 96, "crop-bicubic")) for file, _ in large_objects()[:8]])
    blurred = F.avg_pool2d(F.pad(pictures, (3, 3, 3, 3), mode="reflect"), 7, 1)
    error = (blurred - pictures).square().mean((1, 2, 3), keepdim=True).sqrt()
    darker = (pictures * 0.8 + 0.1 - error).clamp(0, 1)
    assert ((darker - pictures * 0.8 - 0.1).square().mean((1, 2, 3)).sqrt() > 0.8 * error.flatten()).all()
    assert (distance(blurred, pictures) > 1.5 * distance(darker, pictures * 0.8 + 0.1)).all()
    less = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="reflect"), 3, 1)
    assert (distance(less, pictures) < distance(blurred, pictures)).all()
