"""Perceptual distance and adversary, in every tokenizer that trains with them."""

from __future__ import annotations

import json

import pytest
import torch

from unitok.checkpoint import config_hash
from unitok.nn.adversary import hinge
from unitok.nn.perceptual import Perceptual
from unitok.tokenizers.base import load_tokenizer
from unitok.tokenizers.magvit2 import MAGVIT2Tokenizer
from unitok.tokenizers.titok import TiTokTokenizer
from unitok.tokenizers.vqgan import VQGANTokenizer

TITOK = {"image_size": 16, "patch": 4, "tokens": 12, "encoder_width": 32, "encoder_layers": 1, "decoder_width": 32,
         "decoder_layers": 1, "head_width": 16, "codebook_size": 64, "code_dim": 8, "pixel_dim": 16,
         "pixel_channels": 32, "pixel_multipliers": (1, 1, 2), "pixel_blocks": 1}  # fmt: skip
MAGVIT2 = {"image_size": 16, "channels": 32, "multipliers": (1, 1), "blocks": (1, 1), "bits": (5,)}
KINDS = {
    "vqgan": (VQGANTokenizer, {"image_size": 16, "channels": 8, "multipliers": (1, 2), "blocks": 1, "latent": 8,
                               "attention": (), "norm_groups": 4, "codebook_size": 32, "code_dim": 4}),
    "open-magvit2": (MAGVIT2Tokenizer, MAGVIT2),
    "show-o": (MAGVIT2Tokenizer, {**MAGVIT2, "layout": "show-o"}),
    "titok": (TiTokTokenizer, {**TITOK, "pixel_codes": 0}),
    "titok, two stages": (TiTokTokenizer, {**TITOK, "pixel_codes": 24}),
}  # fmt: skip
ADVERSARY = {"adversarial_weight": 0.5, "adversary_start": 10, "adversary_width": 8, "adversary_layers": 1}
STUB = "def maps(images):\n    return [images * 2 + 0.1, images[..., ::2, ::2].square()]\n"

every = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def batch():
    return {"images": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def make(kind, **options):
    torch.manual_seed(0)
    cls, sizes = KINDS[kind]
    return cls(**sizes, **options).train()


def last_weight(tokenizer):
    return (tokenizer.pixel_decoder if hasattr(tokenizer, "pixel_decoder") else tokenizer.decoder).conv_out.weight


@every
def test_the_adversary_joins_at_its_step_and_is_no_part_of_the_tokenizer(kind, batch):
    tokenizer = make(kind, **ADVERSARY)
    critic = tokenizer.critic()
    before, parts = tokenizer.loss(batch, 9)
    assert "adversarial" not in parts and critic.made.shape == batch["images"].shape
    loss, _ = critic.loss(batch, 9)
    loss.backward()
    assert loss.item() == 0 and all(p.grad.abs().sum() == 0 for p in critic.parameters())
    after, parts = tokenizer.loss(batch, 10)
    assert after.item() == pytest.approx((before + parts["adversarial_weight"] * parts["adversarial"]).item(), rel=1e-4)
    assert critic.loss(batch, 10)[0].item() == pytest.approx(
        hinge(critic(batch["images"] * 2 - 1), critic(critic.made)).item()
    )
    assert not any("critic" in name or "picture_loss" in name for name in tokenizer.state_dict())
    assert make(kind).critic() is None


@every
def test_the_adversary_weighs_as_much_as_the_pixels_at_the_last_layer(kind, batch):
    """Adaptive: gradients of one length there, times its weight; fixed: its weight."""
    tokenizer = make(kind, **ADVERSARY)
    total, parts = tokenizer.loss(batch, 10)
    last = last_weight(tokenizer)
    [without] = torch.autograd.grad(tokenizer.loss(batch, 9)[0], last)
    [gradient] = torch.autograd.grad(total, last)
    assert (gradient - without).norm().item() == pytest.approx(0.5 * without.norm().item(), rel=0.01)
    fixed = make(kind, **ADVERSARY, adversary_adaptive=False).loss(batch, 10)[1]
    assert fixed["adversarial_weight"] == 0.5 and parts["adversarial_weight"] != 0.5
    with torch.no_grad():
        assert tokenizer.loss(batch, 10)[1]["adversarial_weight"] == 0.5


@every
def test_the_perceptual_distance_is_added_and_trains(kind, batch, tmp_path, monkeypatch):
    (tmp_path / "stub_network.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    plain, seen = make(kind), make(kind, perceptual="stub_network:maps", perceptual_weight=3.0, **ADVERSARY)
    expected, _ = plain.loss(batch, 0)
    seen.load_state_dict(plain.state_dict())
    total, parts = seen.loss(batch, 0)
    assert total.item() == pytest.approx((expected + 3 * parts["perceptual"]).item(), rel=1e-5)
    made = seen.critic().made / 2 + 0.5  # left there for the adversary, which has not joined yet
    distance = Perceptual.open("stub_network:maps")(made, batch["images"]).mean()
    assert parts["perceptual"].item() == pytest.approx(distance.item(), rel=1e-4)
    total.backward()
    assert last_weight(seen).grad.abs().sum() > 0


@every
def test_folders_from_before_these_arguments_open(kind, batch, tmp_path):
    tokenizer = make(kind).eval()
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in [n for n in config if n.startswith(("perceptual", "advers")) or n == "pixel_range"]:
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    manifest = json.loads((tmp_path / "unitok.json").read_text())
    [section] = manifest["tokenizers"].values()
    section["config_hash"] = config_hash(config)
    (tmp_path / "unitok.json").write_text(json.dumps(manifest))
    loaded = load_tokenizer(tmp_path)
    assert torch.equal(loaded.encode(batch["images"]), tokenizer.encode(batch["images"]))
    assert loaded.hashes()["config_hash"] == section["config_hash"] and loaded.critic() is None
