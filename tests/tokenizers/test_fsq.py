import pytest
import torch

from unitok.nn.blocks import contrast_weight
from unitok.tokenizers.fsq import FSQTokenizer


def make(**arguments) -> FSQTokenizer:
    torch.manual_seed(0)
    return FSQTokenizer(**{"image_size": 16, "width": 16, "min_width": 8, **arguments})


@pytest.mark.parametrize(
    "levels", [(8, 5, 5, 5), (8, 8, 8, 6, 5), (3,), (4, 3, 3), (7, 5, 5, 5, 5), (8, 8, 8, 5, 5, 5), (1000, 1000)]
)
def test_every_code_has_a_vector_that_gives_the_code_back(levels):
    tokenizer = make(levels=levels).eval()
    size = tokenizer.codebook_sizes[0]
    codes = torch.arange(size + -size % 16).clamp(max=size - 1).view(-1, 16)
    vectors = tokenizer.embed(codes)
    assert torch.equal(tokenizer.quantizer.codes_to_indices(vectors).long(), codes)
    assert len(vectors.flatten(0, 1).unique(dim=0)) == size
    assert vectors.abs().max() <= 1


def test_vectors_must_not_go_through_the_quantizer_again():
    """Its forward is not idempotent, so decoding by it would change most codes: the reason that `embed` is a lookup."""
    tokenizer = make(levels=(8, 5, 5, 5)).eval()
    codes = torch.arange(1000).view(-1, 1).expand(-1, 16).contiguous()
    vectors = tokenizer.embed(codes)
    _, again = tokenizer.quantizer(vectors)
    assert (again == codes).float().mean() < 0.8


def test_encode_and_the_training_forward_agree():
    """What the decoder is trained on is what `decode` gives it."""
    tokenizer = make().eval()
    images = torch.rand(4, 3, 16, 16)
    quantized, indices = tokenizer.quantizer(tokenizer.encoder(images * 2 - 1))
    codes = tokenizer.encode(images)
    assert torch.equal(codes, indices.flatten(1).long())
    torch.testing.assert_close(tokenizer.embed(codes), quantized.flatten(2).transpose(1, 2), atol=1e-6, rtol=0)
    rebuilt = ((tokenizer.decoder(quantized) + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(codes), rebuilt, atol=1e-5, rtol=0)


def test_gradients_reach_every_parameter():
    tokenizer = make().train()
    loss, _ = tokenizer.loss({"images": torch.rand(4, 3, 16, 16)}, 0)
    loss.backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_batch_norm_spreads_codes_over_the_codebook():
    """The control arm, the same new encoder without its BatchNorm, gives nearly every position the same code."""
    tokenizer = make(levels=(4, 3, 3)).train()
    images = torch.rand(32, 3, 16, 16)
    squeezed = tokenizer.encoder[:-1](images * 2 - 1)
    with_norm = tokenizer.quantizer(tokenizer.encoder[-1](squeezed))[1].unique()
    without = tokenizer.quantizer(squeezed)[1].unique()
    assert len(with_norm) >= 18 > 4 >= len(without)


def test_image_size_is_an_argument_and_sizes_follow_the_stride():
    tokenizer = make(image_size=24, downsample=3)
    assert tokenizer.grid() == (3, 3) and tokenizer.grid(16, 40) == (2, 5)
    with pytest.raises(ValueError, match="multiples of 8, got 16 x 20"):
        tokenizer.grid(16, 20)
    with pytest.raises(ValueError, match="image_size must be a multiple"):
        make(image_size=30)


@pytest.mark.parametrize("levels", [(), (2, 5), (8, 5.5), (1001, 1001, 1001)])
def test_impossible_levels_are_refused(levels):
    with pytest.raises(ValueError, match="levels"):
        make(levels=levels)


def test_contrast_weight_is_heavy_at_edges_only():
    images = torch.full((1, 3, 16, 16), -1.0)
    images[..., 8:] = 1
    weight = contrast_weight(images, 4.0)
    assert weight.shape == (1, 1, 16, 16)
    assert (weight[..., :6] == 1).all() and (weight[..., 6:10] == 4).all() and (weight[..., 10:] == 1).all()


def test_bfloat16_keeps_most_codes_and_decodes():
    tokenizer = make().eval()
    images = torch.rand(4, 3, 16, 16)
    codes = tokenizer.encode(images)
    half = make().eval().to(torch.bfloat16)
    assert half.encode(images).shape == codes.shape
    decoded = half.decode(codes)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, tokenizer.decode(codes), atol=0.05, rtol=0)
