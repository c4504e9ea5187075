"""The judge against what it must read and what it must refuse. Degradations come from benchmarks/judge.py."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from unitok.data.scenes import (
    DEMO,
    FULL,
    HELD_OUT,
    PAIRS,
    SETTINGS,
    Scene,
    Setting,
    Thing,
    random_scene,
    render_scene,
)
from unitok.eval import judge

_SPEC = importlib.util.spec_from_file_location("benchmark_judge", Path(__file__).parents[2] / "benchmarks" / "judge.py")
bench = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bench)

LIMIT = 0.05


def share_exact(images, scenes, within=1.0):
    return np.mean([bench.exact(f, s, within) for f, s in zip(judge.read(images), scenes, strict=True)])


@pytest.mark.parametrize("blur, noise", [(0, 0), (0.5, 0.03), (1.0, 0), (1.0, 0.06)])
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_reads_renders(setting, blur, noise):
    scenes = bench.scenes_of(setting, 500, 11)
    assert share_exact(bench.degrade(bench.pictures(scenes), blur, noise, 0), scenes, within=0) >= 0.995


def test_reads_held_out_pairs_and_noise_down_to_22_db():
    rng = np.random.default_rng(12)
    scenes = [random_scene(rng, DEMO, must=HELD_OUT) for _ in range(400)]
    clean = bench.pictures(scenes)
    degraded = bench.degrade(clean, 1.0, 0.08, 0)
    psnr = -10 * (degraded - clean).square().mean((1, 2, 3)).log10()
    assert psnr.mean() < 22.6
    assert share_exact(degraded, scenes) >= 0.99


def test_every_thing_reads_as_itself():
    things = [Thing(shape, colour, size, 16, 17) for shape, colour in PAIRS for size in ("small", "large")]
    scenes = [Scene((thing,), ground, 32) for thing in things for ground in ("black", "white", "gray")]
    assert judge.read(bench.pictures(scenes)) == scenes


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_a_clean_reading_drawn_again_is_the_picture(setting):
    scenes = bench.scenes_of(setting, 200, 13)
    for scene, found in zip(scenes, judge.read(bench.pictures(scenes)), strict=True):
        assert np.array_equal(render_scene(found), render_scene(scene))
        assert list(found.things) == sorted(scene.things, key=lambda t: (t.y, t.x))


@pytest.mark.parametrize("image_size", [48, 64])
def test_other_sizes(image_size):
    scenes = bench.scenes_of("full", 80, 14, image_size)
    images = bench.degrade(bench.pictures(scenes), 0.5 * image_size / 32, 0.03, 0)
    assert share_exact(images, scenes, within=0) == 1
    assert bench.accepted((images[:40] + images[40:]) / 2) <= LIMIT


def test_tolerates_jitter_and_wobbly_edges():
    """Things a pixel off, so that gaps and margins of the language break; edges that move by up to a pixel."""
    rng = np.random.default_rng(15)
    scenes = []
    for scene in bench.scenes_of("full", 400, 16):
        things = (replace(t, x=t.x + int(rng.integers(-1, 2)), y=t.y + int(rng.integers(-1, 2))) for t in scene.things)
        scenes.append(replace(scene, things=tuple(things)))
    assert share_exact(bench.pictures(scenes), scenes) >= 0.995
    scenes = bench.scenes_of("demo", 400, 17)
    assert share_exact(bench.wobble(bench.pictures(scenes), 1.0, 0), scenes) >= 0.98


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_refuses_what_shows_no_scene(setting):
    for family, images in bench.no_scenes(setting, 400, 18):
        assert len(images) > 80, family
        # with its own background as the fill, a cut large triangle is a small triangle: 4 % of very many, fewer here
        assert bench.accepted(images) < (0.08 if family == "half_masked/background" else LIMIT), family


def test_refuses_blank_pictures_four_things_and_wrong_colours():
    assert judge.read(torch.stack([torch.full((3, 32, 32), v) for v in (0.0, 12 / 255, 0.5, 1.0)])) == [None] * 4
    corners = [Thing("circle", "red", "small", x, y) for x in (7, 25) for y in (7, 25)]
    four, three = Scene(tuple(corners), "white"), Scene(tuple(corners[:3]), "white")
    assert [found is None for found in judge.read(bench.pictures([four, three]))] == [True, False]
    images = bench.pictures([three])
    assert judge.read(images[:, [1, 0, 2]])[0].things[0].colour == "green"  # red and green exchanged: a near colour
    weight = (1 - images[:, 1:2]) / (1 - images[:, 1:2]).amax()  # where the circles are
    for colour in ((0.5, 0.5, 0.5), (0.0, 0.0, 0.0), (1.0, 0.7, 0.8)):
        other = images * (1 - weight) + torch.tensor(colour)[:, None, None] * weight
        assert judge.read(other) == [None], colour


def test_half_masks_are_what_they_say():
    scenes = bench.scenes_of("demo", 200, 19)
    whole = bench.pictures(scenes)
    masked, broken = bench.half_masked(scenes, "background", 0)
    changed = (masked != whole).any(1).flatten(1).any(1).numpy()
    assert broken.any() and not broken.all() and changed[broken].all()
    found = judge.read(masked[torch.from_numpy(changed & ~broken)])
    assert any(scene is not None for scene in found)  # what remains may be a proper picture: not in the family


def test_a_reading_depends_on_its_picture_alone():
    images = bench.degrade(bench.pictures(bench.scenes_of("full", 70, 20)), 0.5, 0.05, 0)
    images = torch.cat([images, torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))])
    together = judge.read(images)
    assert together == [judge.read(image[None])[0] for image in images]
    assert together == judge.read(images.double().numpy())
    assert judge.read(images[:0]) == []


def test_the_limits_follow_from_renders():
    for name, limit in bench.calibrate(1600, seed=3).items():
        assert limit == pytest.approx(judge.LIMITS[name], rel=0.08), name


@pytest.mark.parametrize(
    "bad, words",
    [
        (torch.zeros(3, 32, 32), r"\[B, 3, n, n\]"),
        (torch.zeros(1, 1, 32, 32), r"\[B, 3, n, n\]"),
        (torch.zeros(1, 3, 32, 16), r"\[B, 3, n, n\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 32, 32), 1.5), r"\[0, 1\]"),
        (torch.full((1, 3, 32, 32), -0.5), r"\[0, 1\]"),
        (torch.full((1, 3, 32, 32), float("nan")), "NaN"),
    ],
)
def test_bad_pictures_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        judge.read(bad)


def test_settings_with_more_backgrounds_are_read_too():
    rng = np.random.default_rng(21)
    gray = Setting(FULL.counts, ("gray",))
    scenes = [random_scene(rng, gray) for _ in range(100)]
    assert share_exact(bench.pictures(scenes), scenes, within=0) == 1
