"""VQGAN: published sizes, sub-tokens, losses and the adversary against their definitions, learning, revival."""

import math

import pytest
import torch
import torch.nn.functional as F

from unitok.nn.adversary import PatchCritic, adaptive_weight, hinge
from unitok.tokenizers.vqgan import VQGANTokenizer

SMALL = dict(image_size=16, channels=8, multipliers=(1, 2), blocks=1, latent=8, attention=(), norm_groups=4)
QUANTIZERS = {
    "vq": dict(codebook_size=32, code_dim=4),
    "ema": dict(codebook_size=32, code_dim=4),
    "simvq": dict(codebook_size=32, code_dim=4),
    "rvq": dict(codebook_size=8, code_dim=4, depth=3),
    "gumbel": dict(codebook_size=32, code_dim=4, temperature_steps=100),
    "fsq": dict(levels=(4, 3, 3)),
    "lfq": dict(bits=(3, 2)),
    "bsq": dict(bits=(5,)),
}


@pytest.mark.parametrize(
    ("arguments", "millions"),
    [
        ({}, 72.14),
        ({"codebook_size": 16384}, 76.07),
        (dict(multipliers=(1, 1, 2, 4), attention=(3,), quantizer="gumbel", codebook_size=8192), 69.00),
        (dict(multipliers=(1, 2, 4), latent=3, code_dim=3, codebook_size=8192, attention=()), 55.32),
        (dict(multipliers=(1, 2, 2, 4), latent=4, code_dim=4, codebook_size=16384, attention=(3,)), 67.72),
        (dict(latent=8, code_dim=8, codebook_size=16384), 69.59),
        (dict(code_dim=8, codebook_size=16384, normalize=True), 71.88),
        (dict(multipliers=(1, 2, 2, 4), code_dim=8, codebook_size=16384, normalize=True, attention=(3,)), 70.11),
        (dict(image_size=512, codebook_size=8192, attention=()), 68.72),
        (dict(multipliers=(1, 2, 2, 4, 6), latent=64, code_dim=64, codebook_size=8192, attention=(),
              middle_attention=False), 146.24),
    ],
    ids=["f16-1024", "f16-16384", "gumbel-f8", "vq-f4", "vq-f8", "vq-f16", "llamagen-16", "llamagen-8", "chameleon",
         "amused"],
)  # fmt: skip
def test_published_sizes(arguments, millions):
    with torch.device("meta"):
        tokenizer = VQGANTokenizer(**arguments)
    assert sum(p.numel() for p in tokenizer.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantizer_learns(quantizer):
    """Blocks of two colours: hard codes tell far more than the mean colour does, and than before."""
    torch.manual_seed(0)
    tokenizer = VQGANTokenizer(**SMALL, quantizer=quantizer, pixel="l2", **QUANTIZERS[quantizer])
    blocks = torch.randint(2, (16, 1, 4, 4)).float()
    images = F.interpolate(blocks, 8) * torch.tensor([0.8, 0.2, 0.5])[:, None, None] + 0.1
    optimizer = torch.optim.Adam(tokenizer.parameters(), 5e-3)

    def error():
        tokenizer.eval()
        return (tokenizer.decode(tokenizer.encode(images), tokenizer.grid(8, 8)) - images).square().mean()

    before = error()
    for step in range(120):
        optimizer.zero_grad()
        tokenizer.train().loss({"images": images}, step)[0].backward()
        optimizer.step()
    flat = (images - images.mean((2, 3), keepdim=True)).square().mean()
    assert error() < 0.3 * flat and error() < 0.3 * before


def test_sub_tokens_stand_position_by_position():
    torch.manual_seed(0)
    tokenizer = VQGANTokenizer(**SMALL, quantizer="lfq", bits=(3, 2)).eval()
    assert tokenizer.codebook_sizes == (8, 4) and tokenizer.grid() == (8, 8, 2)
    assert tokenizer.token_codebook().tolist() == [0, 1] * 64
    images = torch.rand(2, 3, 16, 16)
    z = tokenizer.vectors(images * 2 - 1)
    codes = tokenizer.encode(images).unflatten(1, (64, 2))
    weights = [torch.tensor([4, 2, 1]), torch.tensor([2, 1])]
    for k, part in enumerate(z.split((3, 2), -1)):
        assert torch.equal(codes[..., k], ((part > 0).long() * weights[k]).sum(-1))
    assert torch.equal(tokenizer.embed(tokenizer.encode(images)), torch.where(z > 0, 1.0, -1.0))


def test_a_patch_is_a_stride_before_the_first_level():
    tokenizer = VQGANTokenizer(**{**SMALL, "image_size": 32}, patch=2, codebook_size=32, code_dim=4).eval()
    assert tokenizer.stride == 4 and tokenizer.grid(8, 12) == (2, 3)
    codes = tokenizer.encode(torch.rand(1, 3, 8, 12))
    assert tokenizer.decode(codes, (2, 3)).shape == (1, 3, 8, 12)


def test_the_adaptive_weight_is_the_ratio_of_gradients():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    found = adaptive_weight((3 * weight).sum(), (weight * torch.tensor([0.0, 4.0])).sum(), weight)
    assert found.item() == pytest.approx(math.sqrt(18) / (4 + 1e-4)) and not found.requires_grad
    assert adaptive_weight((3 * weight).sum(), (0 * weight).sum(), weight).item() == 1e4


def test_hinge():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))


def test_the_critic_has_the_published_size_and_judges_what_was_made():
    critic = PatchCritic()
    assert sum(p.numel() for p in critic.parameters()) == pytest.approx(2.77e6, abs=5e3)
    assert critic(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    torch.manual_seed(0)
    tokenizer = VQGANTokenizer.tiny()
    critic, batch = tokenizer.critic(), {"images": torch.rand(8, 3, 16, 16)}
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    tokenizer.loss(batch, 0)
    for _ in range(30):
        optimizer.zero_grad()
        loss, parts = critic.loss(batch, 0)
        loss.backward()
        optimizer.step()
    assert loss < 0.5 and parts["real"] > parts["fake"]


@pytest.mark.parametrize("pixel", ["l1", "l2"])
def test_the_loss_is_the_sum_of_its_parts(pixel):
    torch.manual_seed(0)
    tokenizer = VQGANTokenizer(**SMALL, codebook_size=32, code_dim=4, pixel=pixel).eval()
    images = torch.rand(2, 3, 16, 16)
    loss, parts = tokenizer.loss({"images": images}, 0)
    with torch.no_grad():
        made = tokenizer.pixels(tokenizer.embed(tokenizer.encode(images)), (8, 8))
    error = made - (images * 2 - 1)
    assert parts["pixels"].item() == pytest.approx((error.abs() if pixel == "l1" else error**2).mean().item(), rel=1e-4)
    assert loss.item() == pytest.approx((parts["pixels"] + parts["quantizer"]).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"image_size": 20, "multipliers": (1, 2, 2, 2)}, "image_size = 20"),
        ({"attention": (5,)}, "attention"),
        ({"norm_groups": 3}, "norm_groups = 3"),
        ({"pixel": "l3"}, "pixel = l3"),
        ({"pixel_range": (1, 0)}, r"pixel_range = \(1, 0\)"),
        ({"quantizer": "pq"}, "unknown quantizer 'pq'"),
        ({"pointwise": False, "code_dim": 5}, "latent = 5"),
    ],
)
def test_impossible_arguments(arguments, named):
    with pytest.raises(ValueError, match=named):
        VQGANTokenizer(**{**SMALL, "codebook_size": 32, "code_dim": 4, **arguments})
