"""The dVAE against FLAVA's copy of the published encoder, its numbers against their definitions, and learning."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from unitok.tokenizers.dvae import DVAETokenizer, kl_to_uniform, log_logit_laplace, squeeze, unsqueeze


def flava_name(name: str) -> str:
    """A name of our encoder in transformers' copy."""
    parts = name.split(".")
    if parts[0].startswith("group"):
        parts.insert(1, "group")
        if "res_path" in parts:
            parts.insert(parts.index("res_path") + 1, "path")
    return ".".join(["blocks", *parts])


def test_the_published_size():
    with torch.device("meta"):
        tokenizer = DVAETokenizer()
    count = [sum(p.numel() for p in half.parameters()) for half in (tokenizer.encoder, tokenizer.decoder)]
    assert count == [53_786_240, 43_829_766]
    assert tokenizer.grid() == (32, 32) and tokenizer.encoder.group_1.block_1.gain == 1 / 64


def test_codes_are_flava_s():
    torch.manual_seed(0)
    ours = DVAETokenizer(image_size=64, width=16, vocab_size=128).eval()
    theirs = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=16, vocab_size=128)).eval()
    theirs.load_state_dict({flava_name(k): v for k, v in ours.encoder.state_dict().items()})
    images = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        logits, expected = ours.encoder(squeeze(images)), theirs(squeeze(images))
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.equal(ours.encode(images), theirs.get_codebook_indices(squeeze(images)).flatten(1))


def test_decoding_codes_is_decoding_their_one_hot_maps():
    torch.manual_seed(0)
    tokenizer = DVAETokenizer.tiny().eval()
    codes = torch.randint(32, (2, 6))
    one_hot = F.one_hot(codes, 32).float().transpose(1, 2).unflatten(2, (2, 3))
    with torch.no_grad():
        location = tokenizer.decoder(one_hot)[:, :3]
    assert torch.allclose(tokenizer.decode(codes, (2, 3)), unsqueeze(location.sigmoid()), atol=1e-6)


def test_squeezing_turns_back():
    x = torch.linspace(0, 1, 101)
    assert torch.allclose(unsqueeze(squeeze(x)), x, atol=1e-6)
    assert squeeze(x).aminmax() == (pytest.approx(0.1), pytest.approx(0.9))


@pytest.mark.parametrize(("location", "scale"), [(0.0, 1.0), (1.5, 0.3), (-2.0, 2.0)])
def test_the_density_integrates_to_one_and_its_median_is_the_decoded_pixel(location, scale):
    z = torch.linspace(-60, 60, 400_001, dtype=torch.float64)  # logits: dx = x (1 - x) dz
    x = z.sigmoid()
    inside = (x > 0) & (x < 1)
    place, log_scale = torch.tensor(location, dtype=torch.float64), torch.tensor(math.log(scale), dtype=torch.float64)
    mass = torch.where(inside, log_logit_laplace(x, place, log_scale).exp() * x * (1 - x), 0.0) * (z[1] - z[0])
    assert mass.nan_to_num().sum().item() == pytest.approx(1, abs=1e-4)
    assert mass.nan_to_num()[z <= location].sum().item() == pytest.approx(0.5, abs=1e-3)


def test_divergence_from_uniform():
    logits = torch.zeros(2, 16, 3, 3)
    assert torch.allclose(kl_to_uniform(logits), torch.zeros(2, 3, 3), atol=1e-6)
    logits[:, 5] = 200
    assert torch.allclose(kl_to_uniform(logits), torch.full((2, 3, 3), math.log(16)))


def test_schedules():
    tokenizer = DVAETokenizer(image_size=16, width=8, groups=2, blocks=1, vocab_size=8)
    taus = [tokenizer.schedules(step)[0] for step in (0, 37_500, 75_000, 112_500, 150_000, 10**6)]
    assert taus == pytest.approx([1, 0.8627, 0.53125, 0.1998, 0.0625, 0.0625], abs=1e-4)
    assert [tokenizer.schedules(step)[1] for step in (0, 2500, 5000, 10**6)] == pytest.approx([0, 3.3, 6.6, 6.6])


def test_the_loss_is_the_paper_s_sum_over_pixels():
    torch.manual_seed(0)
    tokenizer = DVAETokenizer.tiny()
    images = torch.rand(2, 3, 16, 16)
    torch.manual_seed(1)
    loss, parts = tokenizer.loss({"images": images}, 2500)
    positions = math.prod(tokenizer.grid())
    expected = parts["nll"] + 3.3 * parts["kl"] * positions / (3 * 16 * 16)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tokenizer.parameters())  # soft in both passes


def test_it_learns():
    """Hard codes of blocks of two colours tell more than the mean colour, and more than before."""
    torch.manual_seed(0)
    tokenizer = DVAETokenizer(image_size=8, width=16, groups=2, blocks=1, vocab_size=16, code_width=16, kl_warmup=100,
                              kl_weight=0.05, temperature_steps=60)  # fmt: skip
    blocks = torch.randint(2, (64, 1, 4, 4)).float()
    images = F.interpolate(blocks, 8) * torch.tensor([0.8, 0.2, 0.5])[:, None, None] + 0.1
    optimizer = torch.optim.Adam(tokenizer.parameters(), 1e-2)
    before = (tokenizer.decode(tokenizer.encode(images)) - images).square().mean()
    for step in range(200):
        optimizer.zero_grad()
        tokenizer.loss({"images": images}, step)[0].backward()
        optimizer.step()
    after = (tokenizer.decode(tokenizer.encode(images)) - images).square().mean()
    flat = (images - images.mean((2, 3), keepdim=True)).square().mean()
    assert after < 0.2 * flat and after < 0.2 * before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"width": 6}, "width = 6"),
        ({"image_size": 20}, "image_size = 20"),
        ({"temperature": [1.0, 0.0]}, "temperature"),
    ],
)
def test_impossible_arguments(arguments, named):
    with pytest.raises(ValueError, match=named):
        DVAETokenizer(**arguments)
