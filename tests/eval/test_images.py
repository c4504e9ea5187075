"""Reconstruction metrics against their definitions, and a tokenizer that keeps nothing but block means."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unitok.config import make_recipe
from unitok.eval.images import block_mean, code_scores, contact_sheet, evaluate, psnr, run, ssim
from unitok.nn.perceptual import Perceptual
from unitok.tokenizers import get


def pictures(n=4, size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 8, 8, generator=g)
    fine = torch.rand(n, 3, size, size, generator=g)
    return 0.7 * nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") + 0.3 * fine


def test_psnr_is_the_mean_of_per_image_values():
    reference = torch.full((2, 3, 8, 8), 0.5)
    made = reference.clone()
    made[0] += 0.1
    made[1] += 0.001
    assert psnr(made, reference).tolist() == pytest.approx([20.0, 60.0], abs=1e-3)
    pooled = -10 * math.log10((made - reference).square().mean())
    assert psnr(made, reference).mean() > pooled + 10
    assert psnr(reference, reference).tolist() == [100.0, 100.0]


def test_ssim_equals_its_definition_pixel_by_pixel():
    a, b = pictures(1, 16, 0), pictures(1, 16, 1)
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    values = []
    for channel in range(3):
        x, y = a[0, channel].double().numpy(), b[0, channel].double().numpy()
        for top in range(6):
            for left in range(6):
                p, q = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                cov = (weights * (p - mp) * (q - mq)).sum()
                above = (2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
                values.append(above / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert ssim(a, b).item() == pytest.approx(np.mean(values), abs=1e-9)
    assert ssim(a, a).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least 11"):
        ssim(a[..., :8], b[..., :8])


def test_block_means_are_the_best_picture_of_one_colour_a_cell():
    images = pictures()
    blocks = block_mean(images, (8, 8))
    cells = images.reshape(4, 3, 8, 4, 8, 4).mean((3, 5))
    assert torch.allclose(blocks, cells.repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert torch.allclose(block_mean(blocks, (8, 8)), blocks)
    worse = [psnr(block_mean(images, grid), images).mean() for grid in [(1, 1), (4, 4), (8, 8), (16, 16)]]
    assert worse == sorted(worse)
    assert torch.equal(block_mean(images, (8, 8, 2)), blocks)
    assert torch.equal(block_mean(images, (75,)), blocks)  # a grid without rows: 8 x 8 cells fit into 75
    assert torch.equal(block_mean(images, (64, 64)), images)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        psnr(pictures(2), pictures(4))


class Blocks(nn.Module):
    """A stand-in tokenizer: `levels` grey values a cell and channel, so large `levels` keep the block means exactly."""

    image_size, resize, codebook_sizes = 32, "squash-bicubic", (256,)

    def __init__(self, cells):
        super().__init__()
        self.cells = cells

    def grid(self, height=None, width=None):
        return (self.cells, self.cells, 3)

    def token_codebook(self, grid=None):
        return torch.zeros(math.prod(grid), dtype=torch.int64)

    def preprocess(self, image):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255

    def encode(self, images):
        cells = nn.functional.adaptive_avg_pool2d(images, self.cells)
        return (cells.permute(0, 2, 3, 1).flatten(1) * 255).round().long()

    def decode(self, codes, grid=None):
        cells = codes.view(-1, *grid).permute(0, 3, 1, 2) / 255
        return nn.functional.interpolate(cells, size=(32, 32), mode="nearest")


def test_a_block_mean_tokenizer_is_no_better_than_the_baseline(tmp_path):
    (tmp_path / "in").mkdir()
    for i, image in enumerate(pictures(10)):
        Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(
            tmp_path / "in" / f"{i}.png"
        )
    values = {
        "kind": "evaluation",
        "task": "images",
        "data": str(tmp_path / "in"),
        "batch_size": 4,
        "out": str(tmp_path / "out"),
    }
    scores = {s.name: s for s in run(Blocks(8), make_recipe(values))}
    assert scores["psnr"].n == 10 and scores["psnr"].protocol["grid"] == [[8, 8, 3]]
    assert scores["psnr"].value == pytest.approx(scores["psnr"].baselines["block_mean"], abs=0.05)
    assert scores["psnr"].baselines["one_colour"] < scores["psnr"].value - 3
    assert scores["ssim"].baselines["one_colour"] < scores["ssim"].value
    sheet = Image.open(tmp_path / "out" / "reconstructions.png")
    assert sheet.width > 4 * 96 and sheet.height > 3 * 96

    model = SimpleNamespace(image_tokenizer=Blocks(32), encode=None)  # a model has an `encode` too, of another kind
    exact = {s.name: s for s in run(model, make_recipe({**values, "out": None}))}
    assert exact["psnr"].value == 100 and exact["ssim"].value == pytest.approx(1)


# ---- codes, bits, distance, native sizes


def rows_of(images) -> list[dict]:
    """Rows as `evaluate` takes them; pictures as PIL, rounded to 8 bits."""
    return [
        {"id": str(i), "image": Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))}
        for i, image in enumerate(images)
    ]


class Factors(Blocks):
    """The same with two codebooks: 256 values for red, green and 200 for blue (which is cut off there)."""

    codebook_sizes = (256, 200)

    def token_codebook(self, grid=None):
        return (torch.arange(math.prod(grid)) % 3 == 2).long()

    def encode(self, images):
        codes = super().encode(images)
        return torch.where(self.token_codebook(self.grid()) == 1, codes.clamp(max=199), codes)


def test_use_of_each_codebook_and_bits_equal_those_counted_by_hand():
    tokenizer, rows = Factors(8), rows_of(pictures(5))
    scores = {s.name: s for s in evaluate(tokenizer, rows, batch_size=2)}
    codes = tokenizer.encode(torch.stack([tokenizer.preprocess(row["image"]) for row in rows]))
    for book, (size, met) in enumerate([(256, codes.unflatten(1, (-1, 3))[..., :2]), (200, codes[:, 2::3])]):
        _, counts = met.unique(return_counts=True)
        shares = counts / counts.sum()
        used, perplexity = (scores[f"{name}/codebook={book}"] for name in ("codes_used", "perplexity"))
        assert used.value == pytest.approx(len(counts) / size)
        assert perplexity.value == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-5)
        even = np.bincount(np.random.default_rng(0).integers(0, size, met.numel()), minlength=size)
        assert used.baselines["even"] == pytest.approx((even > 0).mean(), abs=0.05)
        assert used.protocol["dead"] == size - len(counts) and used.protocol["codes"] == met.numel()
    cost = 64 * (2 * 8 + math.log2(200))
    assert scores["bits_per_image"].value == pytest.approx(cost) and scores["bits_per_image"].n == 5
    assert scores["bits_per_pixel"].value == pytest.approx(cost / 32**2)


def test_a_tokenizer_of_one_code_uses_one_code():
    tokenizer = Blocks(8)
    tokenizer.encode = lambda images: torch.full((len(images), 192), 77)
    scores = {s.name: s for s in evaluate(tokenizer, rows_of(pictures(3)))}
    assert scores["codes_used"].value == 1 / 256 and scores["perplexity"].value == 1.0
    assert scores["codes_used"].baselines["even"] > 0.8 and scores["perplexity"].baselines["even"] == 256
    assert scores["psnr"].value < scores["psnr"].baselines["one_colour"]


@pytest.mark.parametrize("tastes", [False, True], ids=["even pictures", "pictures of few codes"])
def test_intervals_of_codes_cover_what_other_pictures_give(tastes):
    """95 % of the time, about; an interval by drawing pictures with replacement, which repeat, would not."""
    rng, size = np.random.default_rng(0), 128
    shares = 1 / np.arange(1, size + 1) ** 1.2
    shares /= shares.sum()

    def some():
        if tastes:
            return [rng.choice(rng.choice(size, 4, p=shares), 16) for _ in range(40)]
        return list(rng.choice(size, (40, 16), p=shares))

    runs = [(pictures, code_scores([pictures], (size,), {})) for pictures in (some() for _ in range(200))]
    for which in (0, 1):
        truth = np.mean([scores[which].value for _, scores in runs])
        inside = [scores[which].interval[0] <= truth <= scores[which].interval[1] for _, scores in runs]
        assert 0.9 < np.mean(inside)
        wide = np.mean([np.diff(scores[which].interval) for _, scores in runs])
        assert wide < 1.5 * 2 * 1.96 * np.std([scores[which].value for _, scores in runs])
    truth, inside = np.mean([scores[0].value for _, scores in runs]), []
    for pictures, _ in runs[:20]:
        drawn = [np.concatenate([pictures[i] for i in rng.integers(0, 40, 40)]) for _ in range(200)]
        low, high = np.quantile([len(np.unique(codes)) / size for codes in drawn], [0.025, 0.975])
        inside.append(low <= truth <= high)
    assert np.mean(inside) < 0.2


def test_one_picture_says_nothing_of_others():
    used, perplexity = code_scores([[np.array([3, 3, 5, 5])]], (16,), {})
    assert used.value == 2 / 16 and used.interval == (1 / 16, 4 / 16)
    assert perplexity.value == 2.0 and perplexity.interval == (1.0, 4.0)
    assert used.protocol["interval"] == "none: one picture"
    used, perplexity = code_scores([[np.array([0, 1])] * 2], (2,), {})
    assert used.interval == (1.0, 1.0) and perplexity.interval == (2.0, 2.0)  # no more is possible


def test_the_distance_of_a_network_stands_beside_that_of_block_means():
    network = Perceptual(lambda x: [x, nn.functional.avg_pool2d(x, 2)], name="two scales")
    rows = rows_of(pictures(5))
    score = next(s for s in evaluate(Blocks(16), rows, batch_size=2, perceptual=network) if s.name == "perceptual")
    images = torch.stack([Blocks(16).preprocess(row["image"]) for row in rows])
    made = Blocks(16).decode(Blocks(16).encode(images), (16, 16, 3))
    assert score.value == pytest.approx(network(made, images).mean().item(), rel=1e-5)
    assert score.baselines["one_colour"] == pytest.approx(
        network(images.mean((2, 3), keepdim=True).expand_as(images), images).mean().item(), rel=1e-5
    )
    assert score.value < score.baselines["one_colour"] and score.protocol["network"] == "two scales"
    assert "perceptual" not in {s.name for s in evaluate(Blocks(16), rows)}


def test_native_pictures_keep_their_pixels(tmp_path):
    tokenizer = get("fsq").tiny().eval()  # stride 4
    sizes = [(20, 24), (24, 20), (37, 30), (20, 24), (9, 40), (3, 40)]  # the last two are too small for SSIM or a code
    rows = [{"id": str(n), "image": Image.effect_noise((width, height), 90).convert("RGB")}
            for n, (height, width) in enumerate(sizes)]  # fmt: skip
    kept = {}
    asked = {"native": True, "batch_size": 4, "sheet": tmp_path / "sheet.png", "keep": kept.__setitem__}
    scores = {s.name: s for s in evaluate(tokenizer, rows, **asked)}
    assert scores["psnr"].n == 4 and scores["psnr"].protocol["resize"] == "native"
    assert sorted(scores["psnr"].protocol["grid"]) == [[5, 6], [6, 5], [9, 7]]
    assert [tuple(kept[str(n)].shape) for n in range(4)] == [(3, 20, 24), (3, 24, 20), (3, 36, 28), (3, 20, 24)]
    pixels = torch.from_numpy(np.array(rows[2]["image"])).permute(2, 0, 1)[None, :, :36, 1:29] / 255
    made = tokenizer.decode(tokenizer.encode(pixels), (9, 7))
    assert scores["psnr"].items["2"] == pytest.approx(psnr(made, pixels).item())
    bits = math.log2(tokenizer.codebook_sizes[0])
    assert scores["bits_per_image"].value == pytest.approx(bits * (30 + 30 + 63 + 30) / 4)
    assert scores["bits_per_pixel"].value == pytest.approx(bits / 16)
    assert Image.open(tmp_path / "sheet.png").width > 4 * 200
    with pytest.raises(ValueError, match=r"SplitFSQTokenizer takes pictures of 16 pixels a side only"):
        evaluate(get("fsq_split").tiny(), rows, native=True)


def test_unknown_options_of_the_task_are_refused():
    values = {"kind": "evaluation", "task": "images", "data": "x", "options": {"perceptua": "y"}}
    with pytest.raises(ValueError, match="unknown option 'perceptua'; known: native, perceptual"):
        run(Blocks(8), make_recipe(values))


def test_the_contact_sheet_shows_pixels_as_they_are():
    images = torch.zeros(2, 3, 8, 8)
    images[1, 0] = 1.0
    sheet = contact_sheet({"one": images, "two": [Image.new("RGB", (16, 8), "blue")]}, cell=16, gap=2)
    assert sheet.size == (2 + 2 * 18, 2 + 2 * 32)
    assert sheet.getpixel((10, 20)) == (0, 0, 0) and sheet.getpixel((28, 20)) == (255, 0, 0)
    assert sheet.getpixel((10, 52)) == (0, 0, 255)
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet({"none": []})
