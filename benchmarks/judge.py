"""What the judge reads right, what it refuses, and how fast: JSON lines, beside the bounds they must meet.

    python benchmarks/judge.py [--n 2000] [--image-size 32] [--seed 1]
    python benchmarks/judge.py --calibrate          computes the limits in unitok/eval/judge.py again

Rows `judge_read/...`: share of renders whose reading is exact (count, every shape, colour and size, background, every
position within 1 pixel of 32), by blur sigma (pixels of 32) and noise sigma; `wobble`: edges moved by up to so many
pixels, differently every few pixels; peer: the bound 0.995, which was set for blur up to 1 and noise up to 0.06.
Rows `judge_accepts/...`: share of pictures accepted that show no scene; peer: the bound 0.05, ratio = peer / ours.

Half-masked: one half of the picture (top, bottom, left or right) is overwritten by black (0), gray (0.5), white (1) or
uniform noise. `half_masked` counts the pictures that this makes into no scene: the fill differs from the background, or
it cuts a thing (20 % to 80 % of it covered). `half_masked_any` counts all of them, with those where whole things vanish
into a background of their colour, which leaves a proper picture of what remains. `half_masked/background`, the hardest,
fills with the picture's own background, so that nothing but cuts gives it away; most of what is
accepted there are tops of large triangles, which are small triangles.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # see tokenizers.py

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unitok.data.scenes import BACKGROUNDS, SETTINGS, Scene, Setting, Thing, random_scene, render_scene
from unitok.eval.judge import LIMITS, draw, read

BLURS, NOISES = (0.0, 0.5, 1.0), (0.0, 0.03, 0.06, 0.08)
WOBBLES = (0.5, 1.0)
FILLS = ("black", "gray", "white", "noise")
SLACK, QUANTILE = 1.2, 0.999
CUT = (0.2, 0.8)


# ---- pictures --------------------------------------------------------------------------------------------------------


def scenes_of(setting: Setting | str, n: int, seed: int, image_size: int = 32) -> list[Scene]:
    base = SETTINGS[setting] if isinstance(setting, str) else setting
    rng = np.random.default_rng(seed)
    return [random_scene(rng, Setting(base.counts, base.backgrounds, image_size)) for _ in range(n)]


def pictures(scenes: Sequence[Scene]) -> Tensor:
    """float [B, 3, n, n] in [0, 1]."""
    return torch.from_numpy(np.stack([render_scene(s) for s in scenes])).permute(0, 3, 1, 2).float() / 255


def degrade(images: Tensor, blur: float | Tensor, noise: float | Tensor, seed: int) -> Tensor:
    """Gaussian blur (sigma in pixels), then noise, then clipping; sigmas may be one a picture."""
    batch, _, n, _ = images.shape
    blur, noise = (torch.as_tensor(v).expand(batch) for v in (blur, noise))
    t = torch.arange(-n, 2 * n)  # replicated edges: positions outside count for the edge pixel
    kernel = torch.exp(-((torch.arange(n)[:, None] - t) ** 2) / (2 * blur.clamp_min(1e-3)[:, None, None] ** 2))
    kernel = kernel / kernel.sum(2, keepdim=True)  # [B, n, 3 n]
    edge = F.one_hot(t.clamp(0, n - 1), n).float()  # [3 n, n]
    smear = (kernel @ edge)[:, None]  # [B, 1, n, n]
    out = smear @ images @ smear.transpose(2, 3)
    draws = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (out + noise[:, None, None, None] * draws).clamp(0, 1)


def wobble(images: Tensor, amplitude: float, seed: int) -> Tensor:
    """Every point moved by a smooth random field whose largest step, a picture, is `amplitude` pixels of 32."""
    batch, _, n, _ = images.shape
    field = torch.randn(batch, 2, 12, 12, generator=torch.Generator().manual_seed(seed))
    field = F.interpolate(field, size=(n, n), mode="bicubic", align_corners=True)
    field = field / field.abs().amax((1, 2, 3), keepdim=True) * amplitude * 2 / 32  # in halves of the picture
    line = (2 * torch.arange(n) + 1) / n - 1
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1) + field.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def half_masked(scenes: Sequence[Scene], fill: str, seed: int) -> tuple[Tensor, np.ndarray]:
    """Pictures with one half overwritten, and which of them show no scene any more, bool [B]."""
    rng, images = np.random.default_rng(seed), pictures(scenes)
    broken = np.zeros(len(scenes), bool)
    for i, scene in enumerate(scenes):
        n = scene.image_size
        first, rest = slice(0, n // 2), slice(n // 2, n)
        half = [(first, slice(None)), (rest, slice(None)), (slice(None), first), (slice(None), rest)][rng.integers(4)]
        part = images[i][(slice(None), *half)]
        ground = BACKGROUNDS[scene.background][0] / 255
        value = {"black": 0.0, "gray": 0.5, "white": 1.0, "background": ground}.get(fill)
        part[:] = torch.from_numpy(rng.random(part.shape, np.float32)) if value is None else value
        conflict = value is None or abs(value - ground) > 0.1
        broken[i] = conflict or any(CUT[0] < _covered(t, scene, half) < CUT[1] for t in scene.things)
    return images, broken


def _covered(thing: Thing, scene: Scene, half: tuple[slice, slice]) -> float:
    """Share of a thing that lies in the half."""
    alone = render_scene(Scene((thing,), scene.background, scene.image_size)).astype(float)
    there = np.abs(alone - BACKGROUNDS[scene.background]).sum(2)
    return float(there[half].sum() / there.sum())


def no_scenes(setting: str, n: int, seed: int, image_size: int = 32) -> Iterator[tuple[str, Tensor]]:
    """(family, pictures) that the judge must refuse."""
    rng = np.random.default_rng(seed)
    shape = (n, 3, image_size, image_size)
    yield "uniform_noise", torch.from_numpy(rng.random(shape, np.float32))
    spread = rng.uniform(0.1, 0.4, (n, 1, 1, 1))
    gaussian = rng.uniform(0, 1, (n, 1, 1, 1)) + spread * rng.standard_normal(shape)
    yield "gaussian_noise", torch.from_numpy(gaussian.clip(0, 1).astype(np.float32))
    scenes, others = (scenes_of(setting, n, seed + k, image_size) for k in (1, 2))
    yield "averages", (pictures(scenes) + pictures(others)) / 2
    masked = [half_masked(scenes, fill, seed + 3) for fill in FILLS]
    for fill, (images, broken) in zip(FILLS, masked, strict=True):
        yield f"half_masked/{fill}", images[torch.from_numpy(broken)]
    yield "half_masked_any", torch.cat([images for images, _ in masked])
    images, broken = half_masked(scenes, "background", seed + 3)
    yield "half_masked/background", images[torch.from_numpy(broken)]


# ---- scores ----------------------------------------------------------------------------------------------------------


def exact(found: Scene | None, scene: Scene, within: float = 1.0) -> bool:
    """Count, shapes, colours, sizes and background equal, positions within so many pixels of 32."""
    if found is None or found.background != scene.background or len(found.things) != len(scene.things):
        return False
    mine = {t.pair: t for t in found.things}  # the pairs of a scene differ
    reach = within * scene.image_size / 32
    return all(
        t.pair in mine
        and mine[t.pair].size == t.size
        and max(abs(mine[t.pair].x - t.x), abs(mine[t.pair].y - t.y)) <= reach
        for t in scene.things
    )


def accepted(images: Tensor) -> float:
    return float(np.mean([scene is not None for scene in read(images)]))


def calibrate(n: int, seed: int = 0) -> dict[str, float]:
    """The limits: SLACK times a quantile of each misfit over n renders with noise and blur, as many of each setting.

    Those whose things stand anywhere: fixed places show little of what may happen to an outline.
    """
    generator = torch.Generator().manual_seed(seed)
    drawings = []
    anywhere = [name for name, setting in SETTINGS.items() if not setting.beside]
    for k, setting in enumerate(anywhere):
        images = pictures(scenes_of(setting, n // len(anywhere), seed + 10 + k))
        blur, noise = (high * torch.rand(len(images), generator=generator) for high in (1.2, 0.08))
        for start in range(0, len(images), 500):
            part = slice(start, start + 500)
            drawings += draw(degrade(images[part], blur[part], noise[part], seed + start + k))
    return {name: float(SLACK * np.quantile([d.misfits[name] for d in drawings], QUANTILE)) for name in LIMITS}


def row(name: str, ratio: float, ours: float, peer: float, unit: str, runs=1, spread=0.0, **more) -> None:
    record = {"name": name, "ratio": ratio, "ours": ours, "peer": peer, "unit": unit, "runs": runs, "spread": spread}
    record = {key: round(v, 4) if isinstance(v, float) else v for key, v in (record | more).items()}
    print(json.dumps(record), flush=True)


def read_row(name: str, images: Tensor, clean: Tensor, scenes: Sequence[Scene]) -> None:
    found = read(images)
    share = float(np.mean([exact(f, s) for f, s in zip(found, scenes, strict=True)]))
    psnr = float(-10 * (images - clean).square().mean((1, 2, 3)).clamp_min(1e-10).log10().mean())
    refused = float(np.mean([f is None for f in found]))
    row(f"judge_read/{name}", share / 0.995, share, 0.995, "share", n=len(scenes), psnr=psnr, unreadable=refused)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000, help="pictures a row")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calibrate", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.calibrate:
        for name, limit in calibrate(8000).items():
            row(f"judge_limit/{name}", LIMITS[name] / limit, LIMITS[name], limit, "misfit", n=8000)
        return

    n, size, seed = args.n, args.image_size, args.seed
    for setting in SETTINGS:
        scenes = scenes_of(setting, n, seed * 1000, size)
        clean = pictures(scenes)
        for blur in BLURS:
            for noise in NOISES:
                degraded = degrade(clean, blur * size / 32, noise, seed)
                read_row(f"{setting}/blur_{blur}/noise_{noise}", degraded, clean, scenes)
        for amplitude in WOBBLES:
            read_row(f"{setting}/wobble_{amplitude}", wobble(clean, amplitude, seed), clean, scenes)
        for family, images in no_scenes(setting, n, seed * 1000 + 500, size):
            share = accepted(images)
            ratio = 0.05 / max(share, 1 / len(images))
            row(f"judge_accepts/{setting}/{family}", ratio, share, 0.05, "share", n=len(images))
    images = pictures(scenes_of("full", 512, 7, size))
    read(images[:64])  # templates are made once
    speeds = []
    for _ in range(5):
        start = time.process_time()
        read(images)
        speeds.append(len(images) / (time.process_time() - start))
    median, spread = float(np.median(speeds)), (max(speeds) - min(speeds)) / float(np.median(speeds))
    row("judge_speed", median / 500, median, 500.0, "pictures/s of one core", len(speeds), spread, image_size=size)


if __name__ == "__main__":
    main()
