"""What is MAGVIT-v2's own: bits and codes, tokens of several sizes, its layers. Published weights: tests/convert."""

import itertools

import pytest
import torch

from unitok.tokenizers.base import load_tokenizer
from unitok.tokenizers.magvit2 import MAGVIT2Tokenizer, _AdaptiveNorm, _Upsample


def small(**options):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "channels": 32, "multipliers": (1, 1), "blocks": (1, 1)}
    return MAGVIT2Tokenizer(**{**sizes, **options}).eval()


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("lsb_first", [True, False])
@pytest.mark.parametrize("bits", [(13,), (14,), (18,), (9, 9), (6, 12)])
def test_code_to_vector_to_code_is_exact(bits, lsb_first):
    """All codes of each token, or 10^5 drawn; a vector is a signal that already has its signs."""
    tokenizer = small(bits=bits, lsb_first=lsb_first)
    drawn = torch.Generator().manual_seed(0)
    number = max(2**b if 2**b < 100_000 else 100_000 for b in bits)
    number += -number % 64
    codes = torch.stack([torch.randint(2**b, (number,), generator=drawn) for b in bits], -1)
    for token, b in enumerate(bits):
        if 2**b <= number:
            codes[: 2**b, token] = torch.arange(2**b)
    flat = codes.view(number // 64, -1)  # as many pictures of 8 x 8 positions
    vectors = tokenizer.embed(flat)
    assert vectors.shape == (number // 64, 64, sum(bits)) and set(vectors.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(tokenizer.quantizer.encode(vectors).flatten(1), flat)
    assert torch.equal(tokenizer.quantizer.encode(vectors * 0.001).flatten(1), flat)  # the sign alone counts


def test_index_1_is_the_first_channel_or_the_last():
    ones = {
        order: small(bits=(18,), lsb_first=order).embed(torch.ones(1, 64, dtype=torch.long)) for order in (True, False)
    }
    assert not torch.equal(ones[True], ones[False])
    assert torch.equal(ones[True], ones[False].flip(-1))
    assert (ones[True][0, 0] > 0).nonzero().tolist() == [[0]]


@pytest.mark.parametrize("lsb_first", [True, False])
def test_factors_are_the_same_bits_in_several_tokens(lsb_first, images):
    """The first factor holds the first channels: the low bits of the whole code, or the high ones."""
    whole, split = (small(bits=bits, lsb_first=lsb_first) for bits in ((18,), (6, 12)))
    split.load_state_dict(whole.state_dict())
    code, (first, second) = whole.encode(images), split.encode(images).view(2, -1, 2).unbind(-1)
    assert torch.equal(code, first + (second << 6) if lsb_first else (first << 12) + second)
    assert split.grid() == (8, 8, 2) and split.grid(16, 32) == (8, 16, 2)
    assert split.token_codebook((1, 2, 2)).tolist() == [0, 1, 0, 1]
    assert torch.equal(split.decode(split.encode(images)), whole.decode(code))


def test_no_position_holds_a_codebook_or_anything_but_layers():
    assert {name.split(".")[0] for name in small().state_dict()} == {"encoder", "decoder"}


@pytest.mark.parametrize("bits", [(5,), (3, 4)])
def test_the_layout_of_show_o_keeps_the_contract_too(bits, images, tmp_path):
    """test_contract.py runs the other layout."""
    tokenizer = small(
        layout="show-o", multipliers=(1, 1, 2), blocks=(2, 1, 1), decoder_multipliers=(1, 2, 2),
        decoder_blocks=(1, 1, 3), bits=bits, lsb_first=False,
    )  # fmt: skip
    assert [len(level.block) for level in tokenizer.encoder.down] == [2, 1, 1]
    assert [len(level.block) for level in tokenizer.decoder.up] == [1, 1, 3]
    codes = tokenizer.encode(images)
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape and not torch.equal(decoded[0], decoded[1])
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert torch.equal(loaded.encode(images), codes) and torch.equal(loaded.decode(codes), decoded)
    wide = torch.cat([images, images], 3)
    assert tokenizer.decode(tokenizer.encode(wide), tokenizer.grid(16, 32)).shape == wide.shape


@pytest.mark.parametrize("layout", ["open-magvit2", "show-o"])
def test_gradients_pass_the_signs(layout, images):
    """With no terms of the quantizer's own, what trains the encoder comes from the pixels, through the signs."""
    tokenizer = small(layout=layout, bits=(4,), entropy_weight=0.0, beta=0.0).train()
    loss, parts = tokenizer.loss({"images": images}, 0)
    assert parts["quantizer"] == 0
    loss.backward()
    for name, parameter in tokenizer.named_parameters():
        # an attention's key biases and what a normalisation takes away again have none
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0


def test_entropy_terms_spread_the_codes():
    """Signals on one side of the border, all of one code: with the terms they spread over all 16; without, nothing."""
    used = {}
    for weight in (0.0, 1.0):
        tokenizer = small(bits=(4,), entropy_weight=weight, beta=0.0).train()
        torch.manual_seed(0)
        signals = torch.nn.Parameter(0.006 + 0.001 * torch.randn(1, 64, 4))
        optimizer = torch.optim.Adam([signals], lr=0.001)
        for step in range(60):
            _, _, loss = tokenizer.quantizer(signals, step)
            optimizer.zero_grad()
            (loss + 0 * signals.sum()).backward()
            optimizer.step()
        used[weight] = len(tokenizer.quantizer.encode(signals.detach()).unique())
    assert used[0.0] == 1 and used[1.0] == 16


def test_upsampling_puts_the_corner_before_the_channel():
    """ONNX's DepthToSpace in mode DCR, which the published weights were trained for; torch's PixelShuffle is CRD."""
    layer = _Upsample(32)
    x = torch.randn(1, 32, 3, 4)
    flat, found = layer.conv1(x), layer(x)
    for channel, row, column in itertools.product((0, 5, 31), range(6), range(8)):
        source = flat[0, (row % 2 * 2 + column % 2) * 32 + channel, row // 2, column // 2]
        assert found[0, channel, row, column] == source


def test_the_adaptive_normalisation_takes_mean_and_deviation_of_the_codes():
    layer = _AdaptiveNorm(5, 32)
    x, code = torch.randn(2, 32, 3, 4), torch.randn(2, 5, 3, 4).sign()
    normed = torch.nn.functional.group_norm(x, 32, eps=1e-6)
    scale, shift = layer.gamma(torch.sqrt(code.flatten(2).var(2) + 1e-6)), layer.beta(code.flatten(2).mean(2))
    torch.testing.assert_close(layer(x, code), scale[..., None, None] * normed + shift[..., None, None])


def test_a_picture_of_one_position_has_no_spread():
    tokenizer = small(image_size=2, channels=64)  # torch refuses to normalise a single number
    picture = tokenizer.decode(tokenizer.encode(torch.rand(1, 3, 2, 2)))
    assert picture.shape == (1, 3, 2, 2) and torch.isfinite(picture).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "magvit"}, "layout = magvit"),
        ({"channels": 48}, "channels = 48"),
        ({"blocks": (1,)}, r"blocks = \(1,\)"),
        ({"decoder_blocks": (1, 0)}, r"decoder_blocks = \(1, 0\)"),
        ({"decoder_multipliers": (1, 2, 2)}, r"decoder_multipliers = \(1, 2, 2\)"),
        ({"multipliers": ()}, r"multipliers = \(\)"),
        ({"image_size": 17}, "image_size = 17"),
        ({"bits": ()}, r"bits.*got \(\)"),
        ({"bits": (0, 4)}, r"bits.*got \(0, 4\)"),
        ({"pixel": "l3"}, "pixel = l3"),
        ({"resize": "stretch"}, "unknown resize rule"),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
