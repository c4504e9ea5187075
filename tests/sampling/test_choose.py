"""Draws follow the distribution they should, and belong to their row."""

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from unitok.sampling.choose import Choice, choose, draw_keys, exponential, warp


def logits(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [0, 1, 7, 500])
@pytest.mark.parametrize("p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("t", [0.5, 1.0, 1.7])
def test_warp_is_hugging_face_s(t, k, p):
    x = logits(20, 60)
    reference = TemperatureLogitsWarper(t)(None, x)
    reference = TopKLogitsWarper(k)(None, reference) if k else reference
    reference = TopPLogitsWarper(p)(None, reference) if p < 1 else reference
    assert torch.allclose(warp(x, Choice(t, k, p)).softmax(1), reference.softmax(1), atol=1e-6)


@pytest.mark.parametrize("choice", [Choice(), Choice(0.5), Choice(1.0, 5), Choice(2.0, 0, 0.7)])
def test_frequencies(choice):
    """Chi-square against the warped softmax, 100,000 draws of one seed stream."""
    n, x = 100_000, logits(1, 23)
    drawn = choose(x.expand(n, -1), choice, draw_keys([5], n)[0])
    expected = n * warp(x, choice).softmax(1)[0].double()
    counts = torch.bincount(drawn, minlength=23).double()
    inside = expected > 0
    assert counts[~inside].sum() == 0
    freedom = int(inside.sum()) - 1
    chi = ((counts - expected)[inside] ** 2 / expected[inside]).sum().item()
    assert chi < freedom + 4 * np.sqrt(2 * freedom)


def test_greedy():
    x = logits(9, 30)
    for choice in (Choice(0), Choice(1.0, 1)):
        assert torch.equal(choose(x, choice, draw_keys(range(9), 1)[:, 0]), x.argmax(1))


def test_noise():
    keys = draw_keys(range(400), 5)
    noise = exponential(keys.reshape(-1), 501)
    assert noise.shape == (2000, 501)
    assert noise.min() > 0 and noise.isfinite().all()
    assert abs(noise.mean().item() - 1) < 0.01 and abs(noise.var().item() - 1) < 0.02
    # No relation between neighbours in width, between halves of a word, between draws of a row, or between seeds.
    by_seed = noise.reshape(400, 5, 501)
    for a, b in (
        (noise[:, 1:], noise[:, :-1]),
        (noise[:, 0:500:2], noise[:, 1:501:2]),
        (by_seed[:, 1:], by_seed[:, :-1]),
        (by_seed[1:], by_seed[:-1]),
    ):
        correlation = torch.corrcoef(torch.stack([a.reshape(-1), b.reshape(-1)]))[0, 1].item()
        assert abs(correlation) < 5 / np.sqrt(a.numel())
    # A row's noise is its own, and its first ids' noise does not depend on how many there are.
    assert torch.equal(exponential(keys[7:8, 2], 501)[0], by_seed[7, 2])
    assert torch.equal(exponential(keys[7:8, 2], 90)[0], by_seed[7, 2, :90])


def test_noise_is_splitmix64():
    """Against the published algorithm in plain Python integers."""
    mask, state = 2**64 - 1, 123456789
    words = []
    for _ in range(4):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        words.append(z ^ (z >> 31))
    halves = [half & 0x7FFFFFFF for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
    expected = [-np.log1p(-(half + 0.5) / 2**31) for half in halves]
    got = exponential(torch.tensor([123456789]), 8)[0].double()
    assert np.allclose(got, expected, rtol=1e-4)


def test_keys_are_the_seed_s():
    keys = draw_keys([3, 9, 3], 40)
    assert torch.equal(keys[0], keys[2]) and not torch.equal(keys[0], keys[1])
    assert torch.equal(draw_keys([9], 7)[0], keys[1, :7])
    assert keys.unique().numel() == 80
