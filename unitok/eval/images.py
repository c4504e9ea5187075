"""Reconstruction: how much of a picture a tokenizer's codes keep. PSNR and SSIM beside the block-mean picture.

Shapes: images float [B, 3, H, W] in [0, 1]; h, w token grid.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unitok.data.sources import read_image
from unitok.eval.progress import batches
from unitok.eval.results import Score, summarise
from unitok.eval.rows import load_rows, rows_hash, subset
from unitok.tokenizers.base import to_pil

SHEET = "reconstructions.png"
PSNR_CAP = 100.0  # dB given to equal pictures, whose PSNR is infinite
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


def run(model, recipe) -> list[Score]:
    """PSNR (dB) and SSIM of encode -> decode; baselines: block means at the token grid, and one colour a picture.

    `model` is an ImageTokenizer, or anything with one as `.image_tokenizer`. Writes a contact sheet into `recipe.out`.
    """
    tokenizer = getattr(model, "image_tokenizer", model)
    out = Path(recipe.out) if recipe.out else None
    rows = subset(load_rows(recipe.data, "picture", out=out), recipe.n, recipe.seed)
    sheet = out / SHEET if out else None
    return evaluate(tokenizer, rows, batch_size=recipe.batch_size, seed=recipe.seed, sheet=sheet)


@torch.no_grad()
def evaluate(
    tokenizer,
    rows: Sequence[Mapping],
    *,
    batch_size: int = 32,
    seed: int = 0,
    sheet: Path | None = None,
    decode: Callable[[Tensor, tuple[int, ...]], Tensor] | None = None,
    keep: Callable[[str, Tensor], None] | None = None,
) -> list[Score]:
    """Scores over `rows` ({"id", "image"}); the reference is each picture as the tokenizer's preprocessing fits it.

    decode: codes, grid -> pictures, in place of the tokenizer's own. keep: called with each id and reconstruction.
    Pictures that cannot be read are left out and counted on stderr; ValueError where none can.
    """
    decode = tokenizer.decode if decode is None else decode
    device = next(tokenizer.parameters(), torch.empty(0)).device
    was_training = tokenizer.training
    tokenizer.eval()
    arms = ("codes", "block_mean", "one_colour")
    psnrs: dict[str, dict[str, float]] = {arm: {} for arm in arms}
    ssims: dict[str, dict[str, float]] = {arm: {} for arm in arms}
    grids: dict[tuple[int, ...], int] = {}
    shown: dict[str, Tensor] | None = None
    bad: list[ValueError] = []
    for asked in batches(rows, batch_size, "reconstruct"):
        read = [(row, _read(tokenizer, row)) for row in asked]
        bad += [fault for _, fault in read if isinstance(fault, ValueError)]
        batch = [row for row, image in read if isinstance(image, Tensor)]
        if not batch:
            continue
        images = torch.stack([image for _, image in read if isinstance(image, Tensor)])  # [B, 3, H, W]
        grid = tuple(tokenizer.grid(*images.shape[-2:]))
        grids[grid] = grids.get(grid, 0) + len(batch)
        made = decode(tokenizer.encode(images.to(device)), grid).float().cpu()
        if keep is not None:
            for row, picture in zip(batch, made, strict=True):
                keep(row["id"], picture)
        pictures = {"codes": made, "block_mean": block_mean(images, grid), "one_colour": block_mean(images, (1, 1))}
        for arm, picture in pictures.items():
            for table, metric in ((psnrs, psnr), (ssims, ssim)):
                table[arm].update(zip((row["id"] for row in batch), metric(picture, images).tolist(), strict=True))
        if shown is None:
            shown = {"original": images, "codes": made, "block mean": pictures["block_mean"]}
    tokenizer.train(was_training)
    if bad and len(bad) == len(rows):
        raise ValueError(f"none of {len(rows)} pictures can be read; the first: {bad[0]}")
    if bad:
        print(f"{len(bad)} of {len(rows)} pictures cannot be read; the first: {bad[0]}", file=sys.stderr)
        rows = [row for row in rows if row["id"] in psnrs["codes"]]
    if sheet is not None and shown is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet({name: images[:12] for name, images in shown.items()}).save(sheet)

    protocol = {
        "data_hash": rows_hash(rows),
        "image_size": tokenizer.image_size,
        "resize": tokenizer.resize,
        "grid": [list(grid) for grid in grids],
        "tokens": [math.prod(grid) for grid in grids],
        "codebook_sizes": list(tokenizer.codebook_sizes),
        "mean": "per image",
    }
    out = []
    for name, unit, values in (("psnr", "dB", psnrs), ("ssim", "1", ssims)):
        beside = {arm: values[arm] for arm in arms[1:]}
        note = {**protocol, "unit": unit}
        out.append(summarise(name, values["codes"], baselines=beside, protocol=note, proportion=False, seed=seed))
    return out


def _read(tokenizer, row: Mapping) -> Tensor | ValueError:
    """float [3, H, W], or why there is none."""
    try:
        return tokenizer.preprocess(read_image(row["image"]))
    except ValueError as error:
        return error


# ---- metrics ---------------------------------------------------------------------------------------------------------


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """PSNR of each image in dB, peak 1 -> float64 [B]. Average these: pooling the errors first gives another number."""
    _check_pair(images, reference)
    error = (images.double() - reference.double()).square().mean(dim=(1, 2, 3))  # [B]
    return (-10 * error.clamp_min(10 ** (-PSNR_CAP / 10)).log10()).clamp_max(PSNR_CAP)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """SSIM of each image -> float64 [B]: Gaussian window 11, sigma 1.5, peak 1, population covariance (Wang 2004)."""
    _check_pair(images, reference)
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {SSIM_WINDOW} pixels a side, got {tuple(images.shape[-2:])}")
    x, y = images.double(), reference.double()
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    line = (line / line.sum()).to(x.device)

    def blur(z: Tensor) -> Tensor:
        z = z.reshape(-1, 1, *z.shape[-2:])
        return F.conv2d(F.conv2d(z, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1)).view(len(images), -1)

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return index.mean(1)


def block_mean(images: Tensor, grid: Sequence[int]) -> Tensor:
    """The picture one colour a token keeps: means over the cells of the token grid, drawn back at full size.

    `grid` is (h, w) or (h, w, sub-tokens); a grid without rows, (n,), counts as the largest square of at most n cells.
    """
    h, w = grid[:2] if len(grid) > 1 else (max(1, math.isqrt(grid[0])),) * 2
    height, width = images.shape[-2:]
    if h > height or w > width:
        return images.clone()
    return F.interpolate(F.adaptive_avg_pool2d(images, (h, w)), size=(height, width), mode="nearest-exact")


def _check_pair(images: Tensor, reference: Tensor) -> None:
    a, b = tuple(images.shape), tuple(reference.shape)
    if len(a) != 4 or a != b:
        raise ValueError(f"expected two [B, 3, H, W] of one shape, got {a} and {b}")


# ---- contact sheet ---------------------------------------------------------------------------------------------------


def contact_sheet(strips: Mapping[str, Any], *, cell: int | None = None, gap: int = 2) -> Image.Image:
    """One labelled strip of pictures a name, pictures ([3, H, W] in [0, 1], or PIL) side by side; pixels stay crisp.

    `cell` is the longest side of a shown picture; by default small pictures are enlarged by a whole factor to 96 or so.
    """
    shown = {label: [p if isinstance(p, Image.Image) else to_pil(p) for p in strip] for label, strip in strips.items()}
    sides = [max(picture.size) for strip in shown.values() for picture in strip]
    if not sides:
        raise ValueError("a contact sheet needs at least one picture")
    cell = cell or max(sides) * max(1, 96 // max(sides))
    font = ImageFont.load_default()
    label_height = 14
    columns = max(len(strip) for strip in shown.values())
    size = (gap + columns * (cell + gap), len(shown) * (label_height + cell + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    top = gap
    for label, strip in shown.items():
        draw.text((gap, top), label, fill="black", font=font)
        for i, picture in enumerate(strip):
            scale = cell / max(picture.size)
            new = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
            sheet.paste(picture.resize(new, resample), (gap + i * (cell + gap), top + label_height))
        top += label_height + cell + gap
    return sheet
