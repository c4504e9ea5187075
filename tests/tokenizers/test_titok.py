"""TiTok's own properties; tests/convert/test_titok.py compares it with the published code."""

import pytest
import torch

from unitok.tokenizers.titok import TiTokTokenizer

TWO_STAGE = {
    "image_size": 16, "patch": 4, "tokens": 12, "encoder_width": 32, "encoder_layers": 1, "decoder_width": 32,
    "decoder_layers": 1, "head_width": 16, "codebook_size": 64, "code_dim": 8, "pixel_codes": 24, "pixel_dim": 16,
    "pixel_channels": 32, "pixel_multipliers": (1, 1, 2), "pixel_blocks": 1,
}  # fmt: skip


@pytest.fixture
def images():
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def step(tokenizer, images):
    """The losses before and after 20 steps, and which parameters moved."""
    before = {name: p.detach().clone() for name, p in tokenizer.named_parameters()}
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3, weight_decay=0)
    losses = []
    for _ in range(20):
        loss, _ = tokenizer.loss({"images": images}, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    moved = {name for name, p in tokenizer.named_parameters() if not torch.equal(p, before[name])}
    return losses, moved


def test_a_single_stage_trains_every_part(images):
    torch.manual_seed(0)
    tokenizer = TiTokTokenizer.tiny().train()
    losses, moved = step(tokenizer, images)
    assert losses[-1] < losses[0]
    assert moved == {name for name, _ in tokenizer.named_parameters()}


def test_a_second_stage_leaves_the_codes_alone(images):
    torch.manual_seed(0)
    tokenizer = TiTokTokenizer(**TWO_STAGE).train()
    codes = tokenizer.encode(images)
    losses, moved = step(tokenizer, images)
    assert losses[-1] < losses[0]
    assert {name.split(".")[0] for name in moved} == {"decoder", "pixel_quantize", "pixel_decoder"}
    assert torch.equal(tokenizer.encode(images), codes)


def test_a_folder_of_a_two_stage_model(images, tmp_path):
    torch.manual_seed(0)
    tokenizer = TiTokTokenizer(**TWO_STAGE).eval()
    tokenizer.save_pretrained(tmp_path)
    loaded = TiTokTokenizer.from_pretrained(tmp_path)
    codes = loaded.encode(images)
    assert codes.shape == (4, 12) and torch.equal(codes, tokenizer.encode(images))
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


def test_every_code_is_the_nearest_to_its_vector():
    torch.manual_seed(0)
    for tokenizer in (TiTokTokenizer(**TWO_STAGE).eval(), TiTokTokenizer.tiny().eval()):
        codes = torch.arange(tokenizer.codebook_sizes[0])
        vectors = tokenizer.embed(codes.expand(1, -1).unflatten(1, (-1, 1)).expand(-1, -1, 12)[0])[:, 0]  # [V, D]
        assert torch.equal(tokenizer.quantize.encode(vectors[None])[0, :, 0], codes)


def test_the_picture_stands_in_no_raster(images):
    """A token is of no place: changing one changes pixels in every quarter of the picture."""
    torch.manual_seed(0)
    tokenizer = TiTokTokenizer.tiny().eval()
    assert tokenizer.token_order == "latent" and tokenizer.grid() == (12,)
    codes = tokenizer.encode(images)
    other = codes.clone()
    other[:, 0] = (other[:, 0] + 1) % 256
    changed = (tokenizer.decode(codes) - tokenizer.decode(other)).abs().amax((0, 1)) > 0
    assert all(quarter.any() for half in changed.chunk(2) for quarter in half.chunk(2, dim=1))


def test_other_sizes_are_refused():
    tokenizer = TiTokTokenizer.tiny()
    with pytest.raises(ValueError, match="image height and width must be 16, got 16 x 24"):
        tokenizer.encode(torch.rand(1, 3, 16, 24))


@pytest.mark.parametrize(
    "arguments",
    [{"image_size": 250}, {"encoder_width": 96}, {"pixel_multipliers": [1, 2]}, {"pixel_channels": 48}, {"tokens": 0}],
)
def test_sizes_that_cannot_be(arguments):
    [(name, value)] = arguments.items()
    with pytest.raises(ValueError, match=rf"titok cannot have {name} = "):
        TiTokTokenizer(**arguments)
