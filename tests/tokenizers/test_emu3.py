"""Emu3's tokenizer of stills against transformers' Emu3VQVAE, whose module it holds."""

import pytest
import torch
from torch import nn

from unitok.tokenizers.emu3 import Emu3Tokenizer

SIZE = (16, 24)


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    tokenizer = Emu3Tokenizer.tiny()
    for module in tokenizer.modules():
        if isinstance(module, nn.BatchNorm3d):  # as training leaves them: fresh ones do nothing
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return tokenizer.eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_codes_and_pictures_are_those_of_transformers(tokenizer, images):
    """Which repeats the picture `frames` times and decodes as many frames."""
    found = tokenizer.model.encode(2 * images - 1, image_sizes=torch.tensor([SIZE] * 5))
    expected = torch.stack(found.image_tokens).flatten(1)
    codes = tokenizer.encode(images)
    assert len(expected.unique()) > 8
    assert torch.equal(codes, expected)
    grid = tokenizer.grid(*SIZE)
    pictures = (tokenizer.model.decode(expected.unflatten(1, grid)) + 1) / 2
    assert pictures.min() < 0 and pictures.max() > 1  # clamped by ours
    torch.testing.assert_close(tokenizer.decode(codes, grid), pictures.clamp(0, 1), atol=1e-5, rtol=0)


def test_frames_are_one_while_training_too(images):
    """Batch statistics over equal frames are those over one: the latents do not depend on the short cut."""
    torch.manual_seed(0)
    tokenizer = Emu3Tokenizer.tiny().train()
    model, pixels = tokenizer.model, 2 * images - 1
    hidden = model.encoder(pixels.unsqueeze(1).repeat(1, tokenizer.frames, 1, 1, 1))  # [B, 1, D, h, w]
    expected = model.quant_conv(hidden.transpose(1, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokenizer.latent(images), expected, atol=1e-5, rtol=0)


def test_the_loss_reaches_encoder_codes_and_decoder(images):
    torch.manual_seed(0)
    tokenizer = Emu3Tokenizer.tiny().train()
    loss, parts = tokenizer.loss({"images": images}, 0)
    loss.backward()
    assert set(parts) == {"pixel", "quantizer", "psnr"}
    for part in ("encoder.conv_in", "quant_conv.conv", "quantize.embedding", "decoder.conv_in", "decoder.conv_out"):
        assert tokenizer.model.get_submodule(part).weight.grad.abs().sum() > 0, part


@torch.no_grad()
def test_the_grid_tells_the_shape_of_the_picture(tokenizer, images):
    """A picture of another shape with the same number of codes is another picture."""
    codes = tokenizer.encode(images)
    assert tokenizer.decode(codes, (6, 4)).shape == (5, 3, 24, 16)
    with pytest.raises(ValueError, match=r"shape \[B, 16\] for grid \(4, 4\)"):
        tokenizer.decode(codes)


def test_the_published_one():
    with torch.device("meta"):
        tokenizer = Emu3Tokenizer()
    assert sum(p.numel() for p in tokenizer.parameters()) == pytest.approx(270.74e6, abs=0.005e6)
    assert len(tokenizer.state_dict()) == 495
    assert tokenizer.grid(256, 320) == (32, 40) and tokenizer.grid() == (64, 64)
    assert tokenizer.codebook_sizes == (32768,)


@pytest.mark.parametrize(
    "arguments",
    [{"channels": 48}, {"attention": [4]}, {"frames": 3}, {"image_size": 100}, {"multipliers": []}, {"blocks": 0}],
)
def test_sizes_that_cannot_be(arguments):
    [(name, value)] = arguments.items()
    with pytest.raises(ValueError, match=rf"emu3 cannot have {name} = "):
        Emu3Tokenizer(**arguments)
