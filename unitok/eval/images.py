"""Reconstruction: how much of a picture a tokenizer's codes keep, beside the block-mean picture, and at what price.

Shapes: images float [B, 3, H, W] in [0, 1]; h, w token grid; N tokens, V codes of a codebook.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unitok.config import DataSource
from unitok.data.encoding import as_pixels, check_native
from unitok.data.sources import read_image
from unitok.detokenizers.base import load_detokenizer
from unitok.eval.progress import batches
from unitok.eval.results import Score, jackknife, summarise, write_results
from unitok.eval.rows import load_rows, rows_hash, subset
from unitok.nn.codes import CodebookUse, bits, leave_one_out
from unitok.nn.perceptual import Perceptual
from unitok.tokenizers.base import load_tokenizer, to_pil

SHEET = "reconstructions.png"
SHOWN = 12  # pictures on it
NATIVE_CELL = 256  # pixels on it of a picture of any size
ARMS = ("codes", "block_mean", "one_colour")
PSNR_CAP = 100.0  # dB given to equal pictures, whose PSNR is infinite
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


def run(model, recipe) -> list[Score]:
    """The scores of `evaluate` for one recipe. `recipe.options`: perceptual (what `Perceptual.open` takes), native.

    `model` is an ImageTokenizer, or anything with one as `.image_tokenizer`. Writes a contact sheet into `recipe.out`.
    """
    options = dict(recipe.options)
    if unknown := sorted(set(options) - {"perceptual", "native"}):
        raise ValueError(f"task images: unknown option {unknown[0]!r}; known: native, perceptual")
    tokenizer = getattr(model, "image_tokenizer", model)
    network = Perceptual.open(options["perceptual"]) if options.get("perceptual") else None
    out = Path(recipe.out) if recipe.out else None
    rows = subset(load_rows(recipe.data, "picture", out=out), recipe.n, recipe.seed)
    return evaluate(
        tokenizer, rows, batch_size=recipe.batch_size, seed=recipe.seed, sheet=out / SHEET if out else None,
        decode=None if tokenizer is model else getattr(model, "decode", None), perceptual=network,
        native=bool(options.get("native", False)),
    )  # fmt: skip


def reconstruct(
    tokenizer: str | Path, sources: Sequence[str], out: Path, *, detokenizer: str | None = None,
    perceptual: str | None = None, native: bool = False, device: str = "cpu",
) -> tuple[list[Score], list[Path]]:  # fmt: skip
    """The scores of a saved tokenizer on the pictures of `sources`, and the files written: the sheet, results.json.

    Every reconstruction goes into `out`/pictures. detokenizer: draws in place of the tokenizer's decoder.
    perceptual: what `Perceptual.open` takes.
    """
    begun = time.perf_counter()
    own = load_tokenizer(tokenizer, device)
    decode = detokenize(own, load_detokenizer(detokenizer, device)) if detokenizer else None
    network = Perceptual.open(perceptual) if perceptual else None
    rows = load_rows([DataSource(path=path) for path in sources], "picture", out=out)
    pictures = out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    names = {row["id"]: f"{number:05d}.png" for number, row in enumerate(rows)}
    scores = evaluate(
        own, rows, sheet=out / SHEET, decode=decode, perceptual=network, native=native,
        keep=lambda row_id, picture: to_pil(picture).save(pictures / names[row_id]),
    )  # fmt: skip
    return scores, [out / SHEET, write_results(out, scores, {"reconstruct": time.perf_counter() - begun})]


def detokenize(tokenizer, detokenizer) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    """Codes, grid -> pictures of a detokenizer, at the size that the tokenizer decodes this grid to."""

    def decode(codes: Tensor, grid: tuple[int, ...]) -> Tensor:
        condition = detokenizer.condition_of(tokenizer, codes, grid)
        drawn = detokenizer.generate(condition, seeds=[0] * len(codes), guidance=detokenizer.guidance)
        size = (tokenizer.image_size,) * 2
        if tokenizer.fully_convolutional:
            size = (grid[0] * tokenizer.stride, grid[1] * tokenizer.stride)
        same = tuple(drawn.shape[-2:]) == size
        return drawn if same else F.interpolate(drawn, size, mode="bicubic", antialias=True).clamp(0, 1)

    return decode


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
    perceptual: Perceptual | None = None,
    native: bool = False,
) -> list[Score]:
    """Scores over `rows` ({"id", "image"}); the reference is each picture as the tokenizer's preprocessing fits it.

    Of the pictures: psnr (dB, the mean of each one's), ssim and, with a network, perceptual; baselines: block means at
    the token grid, and one colour a picture. Of each codebook over all codes: codes_used (a share) and perplexity, each
    beside what as many codes drawn evenly would have. bits_per_image: log2 of its codebook's size for every token.

    decode: codes, grid -> pictures, in place of the tokenizer's own. keep: called with each id and reconstruction.
    native: pictures as large as they are, cut to multiples of the stride. Pictures that cannot be read are left out and
    counted on stderr; ValueError where none can.
    """
    if native:
        check_native(tokenizer)
    decode = tokenizer.decode if decode is None else decode
    device = next(tokenizer.parameters(), torch.empty(0)).device
    was_training = tokenizer.training
    tokenizer.eval()
    metrics: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
    if perceptual is not None:
        network = perceptual.to(device)
        metrics["perceptual"] = lambda made, images: network(made.to(device), images.to(device)).cpu()
    values: dict[str, dict[str, dict[str, float]]] = {name: {arm: {} for arm in ARMS} for name in metrics}
    sizes = tuple(tokenizer.codebook_sizes)
    drawn: list[list[np.ndarray]] = [[] for _ in sizes]  # of each codebook, every picture's codes
    spent: dict[str, dict[str, float]] = {"bits_per_image": {}, "bits_per_pixel": {}}
    grids: list[tuple[int, ...]] = []
    shown: dict[str, list[Tensor]] = {"original": [], "codes": [], "block mean": []}
    bad: list[ValueError] = []
    for asked in batches(rows, batch_size, "reconstruct"):
        shapes: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
        for row in asked:
            try:
                image = as_pixels(tokenizer, read_image(row["image"]), native)
                _check_size(image)
            except ValueError as error:
                bad.append(error)
            else:
                shapes.setdefault(tuple(image.shape), []).append((row["id"], image))
        for batch in shapes.values():
            ids = [row_id for row_id, _ in batch]
            images = torch.stack([image for _, image in batch])  # [B, 3, H, W]
            grid = tuple(tokenizer.grid(*images.shape[-2:]))
            grids += [grid] if grid not in grids else []
            codes = tokenizer.encode(images.to(device))  # [B, N]
            made = decode(codes, grid).float().cpu()
            if keep is not None:
                for row_id, picture in zip(ids, made, strict=True):
                    keep(row_id, picture)
            pictures = {"codes": made, "block_mean": block_mean(images, grid), "one_colour": block_mean(images, (1, 1))}
            for name, metric in metrics.items():
                for arm in ARMS:
                    values[name][arm].update(zip(ids, metric(pictures[arm], images).tolist(), strict=True))
            books = tokenizer.token_codebook(grid).numpy()
            for book, pile in enumerate(drawn):
                pile += list(codes.cpu().numpy()[:, books == book].astype(np.int32))
            cost = bits(books, sizes)
            spent["bits_per_image"].update(dict.fromkeys(ids, cost))
            spent["bits_per_pixel"].update(dict.fromkeys(ids, cost / math.prod(images.shape[-2:])))
            for label, strip in zip(shown, (images, made, pictures["block_mean"]), strict=True):
                shown[label] += list(strip[: SHOWN - len(shown[label])])
    tokenizer.train(was_training)
    if bad and len(bad) == len(rows):
        raise ValueError(f"none of {len(rows)} pictures can be read; the first: {bad[0]}")
    if bad:
        print(f"{len(bad)} of {len(rows)} pictures cannot be read; the first: {bad[0]}", file=sys.stderr)
        rows = [row for row in rows if row["id"] in values["psnr"]["codes"]]
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(shown, cell=NATIVE_CELL if native else None).save(sheet)

    protocol = {
        "data_hash": rows_hash(rows),
        "image_size": None if native else tokenizer.image_size,
        "resize": "native" if native else tokenizer.resize,
        "grid": [list(grid) for grid in grids],
        "tokens": [math.prod(grid) for grid in grids],
        "codebook_sizes": list(sizes),
        "mean": "per image",
    }
    notes: dict[str, dict[str, Any]] = {"psnr": {"unit": "dB"}, "ssim": {"unit": "1"}}
    if perceptual is not None:
        notes["perceptual"] = {"unit": "1", "network": perceptual.name, "smallest": perceptual.smallest}
    out = []
    for name, note in notes.items():
        beside = {arm: values[name][arm] for arm in ARMS[1:]}
        out.append(summarise(name, values[name]["codes"], baselines=beside, protocol={**protocol, **note},
                             proportion=False, seed=seed))  # fmt: skip
    out += code_scores(drawn, sizes, protocol)
    out += [summarise(name, each, protocol={**protocol, "unit": "bits"}, proportion=False, seed=seed)
            for name, each in spent.items()]  # fmt: skip
    return out


def code_scores(
    drawn: Sequence[Sequence[np.ndarray]], sizes: Sequence[int], protocol: Mapping[str, Any]
) -> list[Score]:
    """codes_used and perplexity of each codebook, from every picture's codes, int [N]; named NAME/codebook=K where
    there are several.

    They are of the whole run. Interval: what as many other pictures of this kind would give, by leaving each out in
    turn; all that is possible where there is one picture. The baseline `even` is even use by as many codes: the share
    that even draws would meet on average, of few codes not all; the perplexity at most.
    """
    out = []
    for book, (pictures, size) in enumerate(zip(drawn, sizes, strict=True)):
        counts = np.bincount(np.concatenate(pictures), minlength=size)
        use, n, several = CodebookUse.of(counts), int(counts.sum()), len(pictures) > 1
        suffix = f"/codebook={book}" if len(sizes) > 1 else ""
        told = {**protocol, "mean": "over all codes", "codes": n, "size": use.size, "used": use.used, "dead": use.dead,
                "entropy": use.entropy, "interval": "jackknife 95%" if several else "none: one picture"}  # fmt: skip
        most = min(size, n)
        without = leave_one_out(counts, pictures)
        used = jackknife(use.used, [each.used for each in without]) if several else (1, most)
        entropy = jackknife(use.entropy, [each.entropy for each in without]) if several else (0, math.log2(most))
        share = (max(used[0], 1) / size, min(used[1], most) / size)
        perplexity = (2 ** max(entropy[0], 0), min(2 ** entropy[1], most))
        even = 1 - (1 - 1 / size) ** n
        out.append(Score(f"codes_used{suffix}", use.share, len(pictures), share, {"even": even}, told))
        out.append(Score(f"perplexity{suffix}", use.perplexity, len(pictures), perplexity, {"even": most}, told))
    return out


# ---- metrics ---------------------------------------------------------------------------------------------------------


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """PSNR of each image in dB, peak 1 -> float64 [B]. Average these: pooling the errors first gives another number."""
    _check_pair(images, reference)
    error = (images.double() - reference.double()).square().mean(dim=(1, 2, 3))  # [B]
    return (-10 * error.clamp_min(10 ** (-PSNR_CAP / 10)).log10()).clamp_max(PSNR_CAP)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """SSIM of each image -> float64 [B]: Gaussian window 11, sigma 1.5, peak 1, population covariance (Wang 2004)."""
    _check_pair(images, reference)
    _check_size(images)
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


def _check_size(images: Tensor) -> None:
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {SSIM_WINDOW} pixels a side, got {tuple(images.shape[-2:])}")


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
