"""The judge: reads a picture back into its scene by drawing. Computed, not trained.

    picture -> background (median colour) -> candidate things (gain of every stamp at every position, greedy)
            -> refined (shape, colour, size; half pixels and blur allowed) -> drawn again -> accepted only where it fits

The gain of a thing is the squared error that drawing it removes. With d the picture less its background, a the stamp
and c the colour less the background, gain = 2 <d, a c> - |a|^2 |c|^2. Things of a scene never overlap, so the gains of
things that stand apart add up, and taking the largest again and again is a search for the best drawing.

Shapes: B pictures, n pixels a side, S = 8 stamps (2 sizes x 4 shapes), C = 6 colours, T things of all pictures,
K refined templates in windows of w x w pixels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unitok.data.scenes import BACKGROUNDS, COLOURS, REFERENCE_SIZE, SHAPES, SIZES, Scene, Thing, radius, stamp

# Misfits above these make a picture unreadable (see `Drawing`). Each is 1.2 times the 99.9 % quantile over 8,000
# renders (half demo, half full setting) with blur sigma U(0, 1.2) px and noise sigma U(0, 0.08), clipped to [0, 1]:
# `python benchmarks/judge.py --calibrate` computes them again. No reconstruction or sample was looked at.
LIMITS = {"rms": 0.095, "detail": 0.302, "tone": 0.0378}

MOST = 3  # things in a scene
WORTH = 0.2  # a candidate must remove this share of its own energy
FLOOR = 0.6  # contrast that `detail` is measured against where nothing was drawn; things have 0.45 to 1.5
STAMPS = tuple(itertools.product(SIZES, SHAPES))  # size-major

# Pixels of a 32-pixel picture
DETECTION_BLUR = 0.5
BLURS = (0.0, 0.5, 0.8, 1.1)
# Pixels of any picture
OFFSETS = (-1.0, -0.5, 0.0, 0.5, 1.0)
FINE = 8  # stamps are moved on a grid this much finer

BATCH = 32  # pictures at once: what stays in the cache is fastest; changes no reading

_PALETTE = torch.tensor(list(COLOURS.values())) / 255  # [C, 3]
_GROUNDS = torch.tensor(list(BACKGROUNDS.values())) / 255  # [3, 3]


@dataclass(frozen=True)
class Drawing:
    """The best drawing of a picture and what it misses.

    rms: root of the mean squared residual. detail: the largest residual averaged over a patch of 3 x 3 pixels (of 32),
    as a share of the contrast of the thing there. tone: the largest error of a background channel averaged over a
    window of half the picture's side.
    """

    scene: Scene
    misfits: dict[str, float]

    @property
    def readable(self) -> bool:
        return bool(self.scene.things) and all(self.misfits[name] <= limit for name, limit in LIMITS.items())


def read(images: np.ndarray | Tensor) -> list[Scene | None]:
    """Scenes of float pictures [B, 3, n, n] in [0, 1], things sorted by (y, x); None: unreadable, or no thing."""
    return [drawing.scene if drawing.readable else None for drawing in draw(images)]


@torch.no_grad()
def draw(images: np.ndarray | Tensor) -> list[Drawing]:
    """The best drawing of each picture [B, 3, n, n], readable or not."""
    images = _checked(images)
    return [drawing for batch in images.split(BATCH) for drawing in _draw(batch)] if len(images) else []


def _checked(images: np.ndarray | Tensor) -> Tensor:
    x = torch.as_tensor(images)
    if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] != x.shape[3] or not x.is_floating_point():
        raise ValueError(f"the judge reads float pictures [B, 3, n, n], got {x.dtype} {list(x.shape)}")
    if x.numel() and not (x.min() >= -1e-4 and x.max() <= 1 + 1e-4):  # false for NaN too
        raise ValueError("the judge reads pictures in [0, 1], got values outside or NaN")
    return x.detach().float().cpu()


# ---- templates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bank:
    """What depends on the picture size alone."""

    spectra: Tensor  # [S, n, n // 2 + 1] complex: conjugate spectra of the stamps, for detection
    energies: Tensor  # [S] their |a|^2
    allowed: Tensor  # [2, n, n] bool: where the middle of a thing of each size may be
    radii: Tensor  # [2]
    templates: Tensor  # [K, w * w] stamps blurred and moved, for refinement
    squares: Tensor  # [K] their |a|^2
    stamps: Tensor  # [K] int64: which stamp
    offsets: Tensor  # [K, 2] dy, dx in pixels
    half: int  # w = 2 * half


@lru_cache(maxsize=8)
def _bank(n: int) -> _Bank:
    scale = n / REFERENCE_SIZE
    half = int(np.ceil(radius("large", n))) + 3  # room for a pixel of movement and most of the blur
    around = torch.arange(-half, half) % n
    placed = torch.zeros(len(STAMPS), n, n)
    for a, which in zip(placed, STAMPS, strict=True):
        template = _template(which, n, half, 0, 0, DETECTION_BLUR * scale)
        a.index_put_((around[:, None], around), template, accumulate=True)
    allowed = torch.zeros(len(SIZES), n, n, dtype=torch.bool)
    for a, size in zip(allowed, SIZES, strict=True):
        edge = int(np.ceil(radius(size, n))) + 1
        a[edge : n - edge + 1, edge : n - edge + 1] = True
    grid = list(itertools.product(range(len(STAMPS)), BLURS, OFFSETS, OFFSETS))
    windows = [_template(STAMPS[s], n, half, dy, dx, blur * scale) for s, blur, dy, dx in grid]
    templates = torch.stack(windows).flatten(1)
    return _Bank(
        spectra=torch.fft.rfft2(placed).conj(),
        energies=placed.square().sum((1, 2)),
        allowed=allowed,
        radii=torch.tensor([radius(size, n) for size in SIZES]),
        templates=templates,
        squares=templates.square().sum(1),
        stamps=torch.tensor([s for s, *_ in grid]),
        offsets=torch.tensor([(dy, dx) for *_, dy, dx in grid]),
        half=half,
    )


def _template(which: tuple[str, str], n: int, half: int, dy: float, dx: float, blur: float) -> Tensor:
    """Coverage [2 half, 2 half] of a stamp whose centre is (dy, dx) pixels off the middle, Gaussian-blurred."""
    size, shape = which
    fine = stamp(shape, size, n * FINE, 1)
    m, w = len(fine) // 2, 2 * half
    top, left = (half * FINE + round(v * FINE) - m for v in (dy, dx))
    canvas = np.zeros((w * FINE, w * FINE), np.float32)
    canvas[top : top + 2 * m, left : left + 2 * m] = fine
    a = canvas.reshape(w, FINE, w, FINE).mean((1, 3))
    if blur:
        line = np.arange(-w, w + 1)
        kernel = np.exp(-(line**2) / (2 * blur**2))
        smear = (kernel / kernel.sum())[w + np.arange(w)[:, None] - np.arange(w)]  # [w, w]
        a = smear @ a @ smear.T
    return torch.from_numpy(a.astype(np.float32))


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Things:
    """Things of a batch, one a row; y, x: where their windows are centred."""

    picture: Tensor  # [T] int64
    y: Tensor
    x: Tensor

    def index(self, n: int, half: int) -> Tensor:
        """Flat indices [T, w, w] of their windows in pictures [B, n + 2 half, n + 2 half], which have a rim of half."""
        side, span = n + 2 * half, torch.arange(2 * half)
        rows, columns = self.y[:, None] + span, self.x[:, None] + span  # the rim cancels the half
        return (self.picture[:, None, None] * side + rows[:, :, None]) * side + columns[:, None, :]


def _draw(x: Tensor) -> list[Drawing]:
    batch, _, n, _ = x.shape
    bank = _bank(n)
    ground = torch.cdist(x.flatten(2).median(2).values, _GROUNDS).argmin(1)  # [B]
    d = x - _GROUNDS[ground][:, :, None, None]  # [B, 3, n, n]
    contrast = _PALETTE - _GROUNDS[ground][:, None]  # [B, C, 3]
    things = _detect(d, contrast, bank)
    colour, k, moved = _refine(d, contrast, things, bank)

    paint = contrast[things.picture, colour]  # [T, 3]
    coverage = bank.templates[k].view(-1, 2 * bank.half, 2 * bank.half)  # [T, w, w]
    misfits = _misfits(d, paint, coverage, things, bank)
    found: list[list[Thing]] = [[] for _ in range(batch)]
    names = list(COLOURS)
    place = torch.stack([things.y, things.x], 1) + moved
    for b, s, c, (y, x_) in zip(*(v.tolist() for v in (things.picture, bank.stamps[k], colour, place)), strict=True):
        size, shape = STAMPS[s]
        found[b].append(Thing(shape, names[c], size, x_, y))
    out = []
    for b, g in enumerate(ground.tolist()):
        ordered = tuple(sorted(found[b], key=lambda t: (t.y, t.x)))
        scene = Scene(ordered, list(BACKGROUNDS)[g], n)
        out.append(Drawing(scene, {name: float(values[b]) for name, values in misfits.items()}))
    return out


def _detect(d: Tensor, contrast: Tensor, bank: _Bank) -> _Things:
    """Up to `MOST` things a picture that stand apart, by gain at whole pixels."""
    batch, _, n, _ = d.shape
    corr = torch.fft.irfft2(torch.fft.rfft2(d)[:, :, None] * bank.spectra, s=(n, n))  # [B, 3, S, n, n]
    energy = contrast.square().sum(2)[:, :, None] * bank.energies  # [B, C, S]
    gain = torch.bmm(2 * contrast, corr.flatten(2)).view(batch, len(COLOURS), len(STAMPS), n * n)
    gain = torch.threshold_(gain.div_(energy[..., None]).sub_(1), WORTH, 0).mul_(energy[..., None])
    gain = gain.amax(1).view(batch, len(SIZES), len(SHAPES), n, n).amax(2)  # [B, 2, n, n]
    gain *= bank.allowed
    line, everyone = torch.arange(n), torch.arange(batch)
    taken = []
    for _ in range(MOST):
        most, at = gain.flatten(1).max(1)  # [B]
        size, y, x = at // (n * n), at // n % n, at % n
        taken.append(torch.stack([everyone, y, x])[:, most > 0])
        reach = bank.radii[size][:, None] + bank.radii  # [B, 2]
        across = torch.maximum((line - y[:, None]).abs()[:, :, None], (line - x[:, None]).abs()[:, None])  # [B, n, n]
        gain = gain * (across[:, None] >= reach[:, :, None, None])
    return _Things(*torch.cat(taken, 1))


def _refine(d: Tensor, contrast: Tensor, things: _Things, bank: _Bank) -> tuple[Tensor, Tensor, Tensor]:
    """-> colour [T], template [T], and (dy, dx) [T, 2] to the best whole pixel for that colour and stamp."""
    half, each = bank.half, torch.arange(len(things.picture))
    rimmed = F.pad(d, (half,) * 4).transpose(0, 1).flatten(1)  # [3, B * side * side]
    crops = rimmed[:, things.index(d.shape[-1], half).flatten(1)]  # [3, T, w * w]
    corr = (crops @ bank.templates.T).transpose(0, 1)  # [T, 3, K]
    paints = contrast[things.picture]  # [T, C, 3]
    gain = torch.bmm(2 * paints, corr) - paints.square().sum(2)[:, :, None] * bank.squares  # [T, C, K]
    best = gain.flatten(1).argmax(1)
    colour, k = best // len(bank.squares), best % len(bank.squares)
    whole = (bank.offsets == bank.offsets.round()).all(1) & (bank.stamps == bank.stamps[k][:, None])  # [T, K]
    moved = bank.offsets[gain[each, colour].masked_fill(~whole, -torch.inf).argmax(1)]
    return colour, k, moved.long()


def _misfits(d: Tensor, paint: Tensor, coverage: Tensor, things: _Things, bank: _Bank) -> dict[str, Tensor]:
    """See `Drawing`; paint [T, 3], coverage [T, w, w] -> {name: [B]}."""
    batch, _, n, _ = d.shape
    half, side = bank.half, n + 2 * bank.half
    index = things.index(n, half).flatten()
    inner = slice(half, side - half)
    drawn = torch.zeros(3, batch * side * side)
    drawn.index_add_(1, index, (paint.T[:, :, None, None] * coverage).flatten(1))
    residual = d - drawn.view(3, batch, side, side)[..., inner, inner].transpose(0, 1)
    near = F.max_pool2d(coverage[:, None], 3, 1, 1)[:, 0] > 0.05
    strength = torch.zeros(batch * side * side)  # contrast of the thing at or beside a pixel, else 0
    strength.scatter_reduce_(0, index, (near * paint.norm(dim=1)[:, None, None]).flatten(), "amax")
    strength = strength.view(batch, 1, side, side)[..., inner, inner]  # [B, 1, n, n]

    patch = max(1, round(3 * n / REFERENCE_SIZE))
    local = F.avg_pool2d(residual, patch, 1).norm(dim=1, keepdim=True)
    against = F.max_pool2d(strength, patch, 1)
    detail = local / torch.where(against > 0, against, FLOOR)

    spread = 2 * round(2 * n / REFERENCE_SIZE) + 1  # blur reaches this far beyond `near`
    bare = (F.max_pool2d(strength, spread, 1, spread // 2) == 0).float()
    window, step = n // 2, max(1, n // 8)
    share = F.avg_pool2d(bare, window, step)
    tone = F.avg_pool2d(residual * bare, window, step).abs().amax(1, keepdim=True) / share.clamp_min(0.4)
    return {
        "rms": residual.square().mean((1, 2, 3)).sqrt(),
        "detail": detail.amax((1, 2, 3)),
        "tone": tone.amax((1, 2, 3)),
    }
