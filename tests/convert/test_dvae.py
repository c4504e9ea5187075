"""DALL-E's pickled modules and FLAVA's copy of the encoder: the same codes and pictures as the originals give."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from unitok.manifest import Manifest

SIZES = {"n_hid": 32, "n_blk_per_group": 1, "vocab_size": 64}


@pytest.fixture(scope="module")
def originals(pictures, randomise):
    pytest.importorskip("dall_e", reason="make oracles")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dall_e.decoder import Decoder
        from dall_e.encoder import Encoder

        parts = Encoder(**SIZES), Decoder(n_init=16, **SIZES)
    for part in parts:
        randomise(part)
    centre(parts[0], parts[0].blocks.output.conv.b, pictures)
    return parts


def centre(encoder, bias, pictures):
    """Random weights prefer one code everywhere; now all are as likely."""
    with torch.no_grad():
        bias -= encoder(0.8 * pictures + 0.1).mean((0, 2, 3))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("order", [1, -1], ids=["encoder-first", "decoder-first"])
def test_openai_modules_pickled_whole(originals, converted, same, pictures, legacy, order):
    from dall_e.utils import map_pixels, unmap_pixels

    encoder, decoder = originals
    ours = converted("openai-dvae", *originals[::order], legacy=legacy, image_size=64)
    with torch.no_grad():
        logits = encoder(map_pixels(pictures))
        expected = logits.argmax(1)
        drawn = decoder(torch.nn.functional.one_hot(expected, 64).permute(0, 3, 1, 2).float())
        images = unmap_pixels(torch.sigmoid(drawn[:, :3]))
    codes = ours.encode(pictures)
    same(codes, expected, -logits.flatten(2).transpose(1, 2), ours.decode(expected.flatten(1)), images)
    assert ours.grid() == (8, 8) and ours.resize == "crop-lanczos"


def test_one_module_alone_or_twice_is_refused(originals, converted):
    encoder, decoder = originals
    with pytest.raises(ValueError, match="the decoder is missing"):
        converted("openai-dvae", encoder)
    with pytest.raises(ValueError, match="two files hold the decoder"):
        converted("openai-dvae", decoder, decoder)


def test_modules_of_different_vocabularies_are_refused(originals, converted):
    from dall_e.decoder import Decoder

    with pytest.raises(ValueError, match=r"decoder.blocks.input.w is \(16, 32, 1, 1\), expected \(16, 64, 1, 1\)"):
        converted("openai-dvae", originals[0], Decoder(n_init=16, **{**SIZES, "vocab_size": 32}))


def test_flava_encodes_and_says_that_it_cannot_decode(converted, same, pictures, randomise):
    codebook = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=32, num_blocks_per_group=1, vocab_size=64))
    randomise(codebook)
    centre(codebook.blocks, codebook.blocks.output.conv.bias, pictures)
    state = {f"image_codebook.{name}": tensor for name, tensor in codebook.state_dict().items()}
    ours = converted("flava", {**state, "text_model.weight": torch.zeros(2)})
    with torch.no_grad():
        logits = codebook.blocks(0.8 * pictures + 0.1)
    expected = codebook.get_codebook_indices(0.8 * pictures + 0.1)
    codes = ours.encode(pictures)
    same(codes, expected, -logits.flatten(2).transpose(1, 2))
    assert ours.grid() == (14, 14)
    assert ours.embed(codes, (8, 8)).shape == (4, 64, 256)
    with pytest.raises(NotImplementedError, match="need a detokenizer"):
        ours.decode(codes, (8, 8))


def test_the_folder_says_where_the_weights_came_from(originals, converted, tmp_path):
    ours = converted("openai-dvae", *originals)
    manifest = Manifest.load(tmp_path / "out")
    source = manifest.tokenizers["dvae"]["source"]
    assert source["format"] == "openai-dvae" and source["pixels"] == "[0.1, 0.9]" and source["weights"] == "raw"
    assert list(source["files"]) == ["file0.bin", "file1.bin"]
    assert {len(digest) for digest in source["files"].values()} == {64}
    assert ours.provenance == source and manifest.licences == [source["licence"]]
    other = Manifest.from_dict(manifest.to_dict())
    other.tokenizers = {"dvae": {**manifest.tokenizers["dvae"], "source": {"files": {}}}}
    assert manifest.check(other)  # it informs
    ours.save_pretrained(tmp_path / "again")
    assert Manifest.load(tmp_path / "again").to_dict() == manifest.to_dict()


@pytest.mark.parametrize("name", ["openai-dvae", "flava"])
def test_a_key_missing_added_renamed_or_of_another_shape_is_named(originals, converted, name):
    if name == "flava":
        files = [FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=32, vocab_size=64)).state_dict()]
    else:
        files = [part.state_dict() for part in originals]
    converted(name, *files)
    for number, good in enumerate(files):
        for key in list(good)[3::9]:
            less = {n: t for n, t in good.items() if n != key}
            for changed, named in (
                (less, key),
                ({**less, f"{key}_renamed": good[key]}, key),
                ({**good, key: torch.cat([good[key]] * 2, dim=-1)}, key),
                ({**good, "blocks.further": torch.zeros(1)}, "blocks.further"),
            ):
                with pytest.raises(ValueError, match=re.escape(named)):
                    converted(name, *files[:number], changed, *files[number + 1 :])
