"""Losses of the same pictures, levels and noises under several texts; and shape and colour of drawings."""

import numpy as np
import pytest
import torch

from unitok.data.scenes import BASE, Claim, Scene, Thing, random_caption, random_scene, render_scene
from unitok.eval import judge
from unitok.eval.denoising import CONTROLS, advantages, denoising_losses, grid, others, passes, with_controls
from unitok.eval.text_to_image import things_kept
from unitok.nn.text_to_image import TINY, new_text_to_image

IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TEXTS = ["a red circle", "a blue square", "red", "blue", "circle"]


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return new_text_to_image(TINY).eval()


@pytest.fixture(scope="module")
def reader():
    """Trained on squares whose colour the text says."""
    torch.manual_seed(0)
    pipeline = new_text_to_image(TINY).train()
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=3e-3)
    for _ in range(80):
        images, texts = coloured(8)
        loss = pipeline.denoising_loss(images, pipeline.encode(pipeline.ids(texts)), min_snr=5.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return pipeline


def coloured(count):
    images = torch.zeros(count, 3, 8, 8)
    images[::2, 0], images[1::2, 2] = 1, 1
    return images, ["red", "blue"] * (count // 2)


def test_a_loss_is_the_mean_over_the_grid_of_the_pipelines_own(untrained):
    found = denoising_losses(untrained, IMAGES, {"true": TEXTS}, levels=4)["true"]
    assert grid(1000, 4) == [125, 375, 625, 875] and grid(3, 3) == [0, 1, 2]
    assert found.shape == (5,) and found.dtype == torch.float32 and not found.requires_grad
    drawn = []
    real = untrained.denoising_loss

    def kept(images, states, t, noise):
        drawn.append((t, noise, real(images, states, t, noise)))
        return drawn[-1][2]

    untrained.denoising_loss = kept
    again = denoising_losses(untrained, IMAGES, {"true": TEXTS}, levels=4)["true"]
    del untrained.denoising_loss
    assert torch.equal(again, found)
    assert [t.unique().tolist() for t, *_ in drawn] == [[125], [375], [625], [875]]
    torch.testing.assert_close(torch.stack([loss for *_, loss in drawn]).mean(0), found)
    noises = torch.stack([noise for _, noise, _ in drawn]).flatten(2).flatten(0, 1)  # [20, 192]
    assert torch.corrcoef(noises).fill_diagonal_(0).abs().max() < 0.4  # every picture and level has one of its own


def test_texts_are_compared_under_the_same_levels_and_noise(untrained):
    first = untrained.ids(TEXTS)
    sets = {"true": TEXTS, "again": TEXTS, "ids": first, "empty": [""] * 5}
    found = denoising_losses(untrained, IMAGES, sets, levels=3)
    assert torch.equal(found["true"], found["again"]) and torch.equal(found["true"], found["ids"])
    assert not torch.equal(found["true"], found["empty"])
    alone = denoising_losses(untrained, IMAGES, {"empty": [""] * 5}, levels=3)["empty"]
    assert torch.equal(alone, found["empty"])
    assert not torch.equal(denoising_losses(untrained, IMAGES, sets, levels=3, seed=1)["true"], found["true"])


def test_batches_do_not_matter_nor_does_the_mode(untrained):
    whole = denoising_losses(untrained, IMAGES, {"true": TEXTS}, levels=3)["true"]
    parts = denoising_losses(untrained, IMAGES, {"true": TEXTS}, levels=3, batch_size=2)["true"]
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    untrained.train()
    assert torch.equal(denoising_losses(untrained, IMAGES, {"true": TEXTS}, levels=3)["true"], whole)
    assert untrained.training
    untrained.eval()


def test_a_generator_that_read_its_captions_passes_the_gate_and_one_that_did_not_fails(reader, untrained):
    images, texts = coloured(40)
    found = advantages(denoising_losses(reader, images, with_controls(texts), levels=5))
    assert set(found) == set(CONTROLS) and passes(found)
    assert all(a.clear and a.value > 0 and a.n == 40 and a.ours < a.other for a in found.values())
    assert not passes(advantages(denoising_losses(untrained, images, with_controls(texts), levels=5)))
    wrong = with_controls([*texts[1:], texts[0]])  # each picture's text is the other colour's
    assert not passes(advantages(denoising_losses(reader, images, wrong, levels=5)))


def test_advantages_are_differences_by_picture():
    base = torch.linspace(0, 100, 50)  # pictures differ by far more than texts do
    noise = torch.randn(50, generator=torch.Generator().manual_seed(0))
    losses = {"own": base, "shuffled": base + 1 + 0.1 * noise, "empty": base + 0.1 * noise - 0.1 * noise.mean()}
    found = advantages(losses, "own")
    assert found["shuffled"].value == pytest.approx(1 + 0.1 * noise.mean().item(), abs=1e-4)
    low, high = found["shuffled"].interval
    assert 0.9 < low < found["shuffled"].value < high < 1.1
    assert found["shuffled"].clear and not found["empty"].clear
    assert not passes(found) and passes(found, ["shuffled"])
    backwards = advantages(losses, "shuffled")["own"]
    assert backwards.value == pytest.approx(-found["shuffled"].value) and not backwards.clear


def test_shuffled_texts_are_those_of_another_picture_each_once():
    for count in (2, 3, 50):
        other = others(count)
        assert sorted(other) == list(range(count)) and all(i != j for i, j in enumerate(other))
    assert others(50) == others(50) != others(50, 1)
    made = with_controls(TEXTS, "own")
    assert list(made) == ["own", *CONTROLS] and made["empty"] == [""] * 5
    assert sorted(made["shuffled"]) == sorted(TEXTS) and all(
        a != b for a, b in zip(made["shuffled"], TEXTS, strict=True)
    )


def test_what_cannot_be_compared_is_said(untrained):
    with pytest.raises(ValueError, match="shuffled: 4 texts for 5 pictures"):
        denoising_losses(untrained, IMAGES, {"true": TEXTS, "shuffled": TEXTS[1:]})
    for levels in (0, 1001):
        with pytest.raises(ValueError, match=f"levels must be 1 to 1000, the timesteps of the model, got {levels}"):
            denoising_losses(untrained, IMAGES, {"true": TEXTS}, levels=levels)
    with pytest.raises(ValueError, match="two rows or more, got 1"):
        others(1)


# ---- shape and colour


def scene(*pairs):
    things = tuple(Thing(shape, colour, "small", 8 + 14 * i, 8) for i, (shape, colour) in enumerate(pairs))
    return Scene(things, "black")


def test_shape_and_colour_are_counted_together_and_each_thing_once():
    claim = Claim((("circle", "red", None), ("square", "blue", "large")))
    assert things_kept(claim, scene(("square", "blue"), ("circle", "red"))) == 1
    assert things_kept(claim, scene(("circle", "red"), ("circle", "green"), ("cross", "blue"))) == 0.5
    assert things_kept(claim, scene(("circle", "blue"), ("square", "red"))) == 0  # right words, wrong pairs
    assert things_kept(claim, None) == things_kept(claim, scene()) == 0
    twice = Claim((("circle", "red", None), ("circle", "red", None)))
    assert things_kept(twice, scene(("circle", "red"))) == 0.5
    assert things_kept(Claim((("circle", "red", None),)), scene(("circle", "red"), ("circle", "red"))) == 1


def test_the_judge_finds_what_captions_claim_and_rarely_what_those_of_others_do():
    rng, scenes, claims = np.random.default_rng(0), [], []
    for _ in range(60):
        scenes.append(random_scene(rng, BASE))
        claims.append(random_caption(scenes[-1], rng)[1])
    pictures = np.stack([render_scene(s) for s in scenes]).transpose(0, 3, 1, 2).astype(np.float32) / 255
    read = [drawing.scene for drawing in judge.draw(pictures)]
    assert all(things_kept(claim, found) == 1 for claim, found in zip(claims, read, strict=True))
    chance = np.mean([things_kept(claims[i], read[j]) for i, j in enumerate(others(60))])
    assert chance < 0.2
