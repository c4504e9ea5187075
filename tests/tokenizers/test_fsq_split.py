import pytest
import torch

from unitok.manifest import Manifest
from unitok.nn.blocks import fit_batch_norm
from unitok.tokenizers.base import load_tokenizer, tokenizer_section
from unitok.tokenizers.fsq_split import SplitFSQTokenizer, grey_structure, spread_colour


def make(**arguments) -> SplitFSQTokenizer:
    torch.manual_seed(0)
    return SplitFSQTokenizer(**{"image_size": 16, "width": 16, "levels": (3, 3), "colour_levels": (4, 3), **arguments})


def squares(colour: tuple[float, float, float], ground: float = 0.0) -> torch.Tensor:
    """[1, 3, 16, 16]: a square of one colour on a grey ground."""
    images = torch.full((1, 3, 16, 16), ground)
    images[:, :, 4:11, 6:13] = torch.tensor(colour)[:, None, None]
    return images


def test_the_grey_picture_is_the_same_for_every_colour():
    red, blue = grey_structure(squares((0.9, 0.1, 0.1))), grey_structure(squares((0.1, 0.2, 0.8), ground=0.95))
    torch.testing.assert_close(red, blue)
    assert red.shape == (1, 1, 16, 16) and red.unique().tolist() == [-1.0, 1.0]


def test_a_colour_spreads_over_what_is_near_and_stops_there():
    spread = (spread_colour(squares((0.9, 0.1, 0.1), ground=0.5)) + 1) / 2
    red = torch.tensor([0.9, 0.1, 0.1])[:, None, None].expand(3, 9, 9)
    torch.testing.assert_close(spread[0, :, 3:12, 5:14], red)
    assert (spread[0, :, :3] == 0.5).all() and (spread[0, :, 12:] == 0.5).all() and (spread[0, :, :, :5] == 0.5).all()


def test_faint_noise_is_not_blown_up():
    images = 0.5 + 0.01 * torch.rand(1, 3, 16, 16)
    assert grey_structure(images).max() < -0.8


def test_structure_codes_do_not_see_colour_and_colour_codes_do():
    tokenizer = SplitFSQTokenizer.tiny().eval()
    red, blue = tokenizer.encode(squares((0.9, 0.1, 0.1))), tokenizer.encode(squares((0.1, 0.2, 0.8)))
    assert torch.equal(red[:, 4:], blue[:, 4:])
    assert not torch.equal(red[:, :4], blue[:, :4])


def test_what_stands_elsewhere_does_not_change_the_codes_of_a_thing():
    tokenizer = make(image_size=32).eval()
    noise = torch.rand(16, 3, 32, 32)
    fit_batch_norm(tokenizer.encoder, grey_structure(noise))
    fit_batch_norm(tokenizer.colour_encoder, spread_colour(noise))
    one, two = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    one[:, :, 8:16, 8:16] = two[:, :, 8:16, 8:16] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    two[:, :, 18:26, 8:16] = 1.0  # brighter, two pixels below
    codes = tokenizer.encode(torch.cat([one, two]))  # colours, then the structure of each block's upper left, and so on
    for turn in codes.view(2, 5, 4, 4).unbind(1):
        above, below = turn.chunk(2, dim=1)
        assert torch.equal(above[0], above[1]) and not torch.equal(below[0], below[1])
        assert len(above.unique()) > 1  # the thing is there


def test_structure_stands_at_a_constant_distance_behind_its_colour():
    tokenizer = make(image_size=32).eval()
    codes = torch.zeros(1, 80, dtype=torch.int64)
    codes[0, 16 + 5] = codes[0, 64 + 5] = 4  # upper left and lower right of the block in row 1, column 1
    structure, colours = tokenizer._vectors(codes)
    changed = (structure != structure[..., :1, :1]).any(1)[0].nonzero().tolist()
    assert changed == [[2, 2], [3, 3]] and colours.shape == (1, 2, 4, 4)


def test_every_code_has_a_vector_of_its_own():
    tokenizer = make().eval()
    structure = torch.arange(16).remainder(9)
    codes = torch.cat([torch.tensor([0, 5, 10, 11]), structure])[None]
    vectors = tokenizer.embed(codes)  # [1, 20, 4]
    assert torch.equal(tokenizer.quantizer.codes_to_indices(vectors[0, 4:, :2]).long(), structure)
    assert torch.equal(tokenizer.colour_quantizer.codes_to_indices(vectors[0, :4, 2:]).long(), codes[0, :4])
    assert not vectors[0, 4:, 2:].any() and not vectors[0, :4, :2].any()


def test_what_the_decoder_is_trained_on_is_what_decode_gives_it():
    tokenizer = make().eval()
    images = torch.rand(3, 3, 16, 16)
    structure, _ = tokenizer.quantizer(tokenizer.encoder(grey_structure(images)))
    colour, _ = tokenizer.colour_quantizer(tokenizer.colour_encoder(spread_colour(images)))
    rebuilt = ((tokenizer._pixels(structure, colour) + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(images)), rebuilt, atol=1e-5, rtol=0)


def test_gradients_reach_every_parameter_and_smoothness_sets_in_late():
    tokenizer = make().train()
    images = torch.rand(4, 3, 16, 16)
    late, parts = tokenizer.loss({"images": images}, 10_000)
    early, _ = tokenizer.loss({"images": images}, 0)
    late.backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    rough = tokenizer.smoothness * parts["variation"] + tokenizer.colour_smoothness * parts["colour_variation"]
    torch.testing.assert_close(late - early, rough, atol=1e-3, rtol=0)


def test_the_manifest_says_which_token_has_which_codebook():
    section = tokenizer_section(make())
    assert section["grid"] == [20] and section["codebook_sizes"] == [9, 12]
    assert section["token_codebook"] == [1] * 4 + [0] * 16


@pytest.mark.parametrize("said", [{}, {"token_order": "by blocks"}])
def test_codes_of_another_order_are_refused(tmp_path, said):
    SplitFSQTokenizer.tiny().save_pretrained(tmp_path)
    older = Manifest.load(tmp_path)
    section = older.tokenizers["fsq_split"]
    assert section.pop("token_order") == SplitFSQTokenizer.token_order
    section.update(said)
    with pytest.raises(ValueError, match=r"mismatch: tokenizers\.fsq_split\.token_order"):
        Manifest.load(tmp_path).check(older)
    older.save(tmp_path)
    with pytest.raises(ValueError, match="codes stand in the order .* use the version of unitok that made it"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_size": 20}, "multiple of 8"),
        ({"levels": (2, 3)}, "levels must be integers of 3 or more"),
        ({"colour_levels": ()}, "colour_levels must be"),
        ({"levels": (300, 300)}, "at most 2\\*\\*16"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="image height and width must be 16, got"):
        make().grid(32, 32)
