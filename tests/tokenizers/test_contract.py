"""Every registered tokenizer keeps the contract: this one test file runs over all of them, through `tiny()`."""

import inspect
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from unitok import tokenizers
from unitok.checkpoint import config_hash
from unitok.manifest import Manifest
from unitok.tokenizers.base import (
    ImageTokenizer,
    fit,
    load_tokenizer,
    open_image,
    to_pil,
    to_rgb,
    to_tensor,
    tokenizer_section,
)


@pytest.fixture(scope="module", params=tokenizers.names())
def tokenizer(request) -> ImageTokenizer:
    torch.manual_seed(0)
    return tokenizers.get(request.param).tiny().eval()


@pytest.fixture(scope="module")
def images(tokenizer) -> torch.Tensor:
    return torch.rand(3, 3, tokenizer.image_size, tokenizer.image_size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def codes(tokenizer, images) -> torch.Tensor:
    return tokenizer.encode(images)


def decode(tokenizer, codes, grid=None) -> torch.Tensor:
    """The decoded images; skips where the tokenizer says that a detokenizer is needed."""
    try:
        return tokenizer.decode(codes, grid)
    except NotImplementedError as error:
        assert "detokenizer" in str(error)
        pytest.skip(str(error))


def test_attributes(tokenizer):
    assert isinstance(tokenizer.image_size, int)
    assert all(isinstance(n, int) and n > 1 for n in tokenizer.codebook_sizes)
    assert tokenizer.vocabulary in ("codes", "text")
    assert isinstance(tokenizer.stages, tuple)
    assert tokenizer.stages or not any(p.requires_grad for p in tokenizer.parameters())  # nothing to train
    assert all(isinstance(n, int) and n > 0 for n in tokenizer.grid())


def test_encode_gives_one_code_a_position_of_its_own_codebook(tokenizer, codes):
    n = math.prod(tokenizer.grid())
    assert codes.dtype == torch.int64 and codes.shape == (3, n)
    books = tokenizer.token_codebook()
    assert books.dtype == torch.int64 and books.shape == (n,)
    assert set(books.tolist()) == set(range(len(tokenizer.codebook_sizes)))  # none unused
    sizes = torch.tensor(tokenizer.codebook_sizes)[books]
    assert (codes >= 0).all() and (codes < sizes).all()


def test_encode_tells_pictures_apart(tokenizer, images):
    ramp = torch.linspace(0, 1, tokenizer.image_size).expand(1, 3, tokenizer.image_size, -1)
    pictures = torch.cat([images[:1], ramp, ramp.flip(3), ramp.transpose(2, 3)])
    assert len(tokenizer.encode(pictures).unique(dim=0)) > 1


def test_eval_mode_is_deterministic_and_independent_of_the_batch(tokenizer, images, codes):
    assert torch.equal(tokenizer.encode(images), codes)
    assert torch.equal(torch.cat([tokenizer.encode(image[None]) for image in images]), codes)
    decoded = decode(tokenizer, codes)
    assert torch.equal(decode(tokenizer, codes), decoded)
    torch.testing.assert_close(decode(tokenizer, codes[1:2]), decoded[1:2], atol=1e-4, rtol=0)


def test_decode_gives_images(tokenizer, images, codes):
    decoded = decode(tokenizer, codes)
    assert decoded.shape == images.shape and decoded.is_floating_point()
    assert torch.isfinite(decoded).all() and decoded.min() >= 0 and decoded.max() <= 1


def test_images_depend_on_their_codes(tokenizer, codes):
    sizes = torch.tensor(tokenizer.codebook_sizes)[tokenizer.token_codebook()]
    assert not torch.equal(decode(tokenizer, codes), decode(tokenizer, (codes + 1) % sizes))


def test_embed_gives_vectors_that_tell_codes_apart(tokenizer, codes):
    vectors = tokenizer.embed(codes)
    assert vectors.ndim == 3 and vectors.shape[0] == 3 and vectors.is_floating_point()
    sizes = torch.tensor(tokenizer.codebook_sizes)[tokenizer.token_codebook()]
    assert not torch.equal(vectors, tokenizer.embed((codes + 1) % sizes))


def test_other_grids(tokenizer, images):
    if not tokenizer.fully_convolutional:
        with pytest.raises(ValueError, match="grid"):
            tokenizer.check_grid(tuple(n + 1 for n in tokenizer.grid()))
        return
    wide = torch.cat([images, images], dim=3)
    grid = tokenizer.grid(*wide.shape[2:])
    codes = tokenizer.encode(wide)
    assert codes.shape[1] == math.prod(grid) == tokenizer.token_codebook(grid).shape[0]
    assert decode(tokenizer, codes, grid).shape == wide.shape
    with pytest.raises(ValueError, match="grid"):
        tokenizer.decode(codes)  # the grid is not the default one and must be said


def test_texts(tokenizer, codes):
    if tokenizer.vocabulary == "text":
        texts = tokenizer.to_text(codes)
        assert len(texts) == 3 and all(isinstance(t, str) for t in texts)
    else:
        with pytest.raises(ValueError, match="codes, not words"):
            tokenizer.to_text(codes)


def test_saved_and_loaded_it_is_the_same(tokenizer, images, codes, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "unitok.json"} <= {p.name for p in tmp_path.iterdir()}
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer) and not loaded.training
    assert torch.equal(loaded.encode(images), codes)
    assert torch.equal(loaded.embed(codes), tokenizer.embed(codes))
    assert loaded.config == tokenizer.config == json.loads((tmp_path / "config.json").read_text())
    assert tokenizer_section(loaded) == tokenizer_section(tokenizer)
    Manifest.load(tmp_path).check(tokenizer.manifest())
    torch.testing.assert_close(decode(loaded, codes), decode(tokenizer, codes), atol=0, rtol=0)


def test_a_folder_from_before_an_argument_existed_keeps_its_hash(tokenizer, tmp_path):
    """A class may gain an argument with a default: folders that lack it still fit the models and shards they made."""
    tokenizer.save_pretrained(tmp_path)
    config, manifest = (json.loads((tmp_path / name).read_text()) for name in ("config.json", "unitok.json"))
    defaults = {k: p.default for k, p in inspect.signature(type(tokenizer).__init__).parameters.items()}
    newest = next((k for k in reversed(config) if config[k] == json.loads(json.dumps(defaults[k], default=str))), None)
    if newest is None:
        pytest.skip("its tiny form has no argument at its default")
    del config[newest]
    [section] = manifest["tokenizers"].values()
    section["config_hash"] = config_hash(config)
    for name, value in (("config.json", config), ("unitok.json", manifest)):
        (tmp_path / name).write_text(json.dumps(value))
    loaded = load_tokenizer(tmp_path)
    assert loaded.manifest().to_dict() == manifest
    loaded.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").config == config


def test_a_folder_whose_files_do_not_fit_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "image_size": 8 * tokenizer.image_size}))
    with pytest.raises(ValueError, match=r"config\.json is damaged, changed or from another model"):
        load_tokenizer(tmp_path)
    config.write_text(before)
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # one bit of the last tensor
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged, changed or from another model"):
        load_tokenizer(tmp_path)
    (tmp_path / "unitok.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"unitok\.json"):
        load_tokenizer(tmp_path)


BAD_IMAGES = {
    "no tensor": (lambda x: x.numpy(), "torch tensor"),
    "rank 3": (lambda x: x[0], r"4 axes \[B, 3, H, W\]"),
    "one channel": (lambda x: x[:, :1], "3 channels"),
    "channels last": (lambda x: x.permute(0, 2, 3, 1), "3 channels"),
    "uint8": (lambda x: (x * 255).to(torch.uint8), "floating point"),
    "int64": (lambda x: x.long(), "floating point"),
    "below 0": (lambda x: x * 2 - 1, r"lie in \[0, 1\]"),
    "above 1": (lambda x: x * 255, r"lie in \[0, 1\]"),
    "NaN": (lambda x: x.where(x != x.max(), torch.tensor(float("nan"))), "finite"),
    "infinity": (lambda x: x.where(x != x.max(), torch.tensor(float("inf"))), "finite"),
    "odd size": (lambda x: x[..., :-1, :-1], "height|width|size|pixels"),
    "one pixel": (lambda x: x[..., :1, :1], "height|width|size|pixels"),
    "no image": (lambda x: x[:0], "at least one"),
}


@pytest.mark.parametrize("fault", BAD_IMAGES)
def test_encode_refuses(tokenizer, images, fault):
    spoil, message = BAD_IMAGES[fault]
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(spoil(images))


def with_last(codes, value):
    return torch.cat([codes[:, :-1], torch.full_like(codes[:, :1], value)], dim=1)


BAD_CODES = {
    "no tensor": (lambda c, size: c.numpy(), "torch tensor"),
    "rank 1": (lambda c, size: c[0], "2 axes"),
    "rank 3": (lambda c, size: c[None], "2 axes"),
    "float": (lambda c, size: c.float(), "int64"),
    "int32": (lambda c, size: c.int(), "int64"),
    "too few": (lambda c, size: c[:, :-1], "shape"),
    "too many": (lambda c, size: torch.cat([c, c[:, :1]], 1), "shape"),
    "negative": (lambda c, size: with_last(c, -1), "out of range: -1 at image 0"),
    "too large": (lambda c, size: with_last(c, size), "out of range"),
}


@pytest.mark.parametrize("fault", BAD_CODES)
@pytest.mark.parametrize("method", ["decode", "embed"])
def test_decode_and_embed_refuse(tokenizer, codes, method, fault):
    spoil, message = BAD_CODES[fault]
    size = tokenizer.codebook_sizes[tokenizer.token_codebook()[-1]]  # the first code too large for the last token
    with pytest.raises(ValueError, match=message):
        getattr(tokenizer, method)(spoil(codes, size))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_preprocess_takes_any_picture(tokenizer, mode):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 90, 3), np.uint8))
    picture = picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode)
    out = tokenizer.preprocess(picture)
    assert out.dtype == torch.float32 and out.shape == (3, tokenizer.image_size, tokenizer.image_size)
    tokenizer.check_images(out[None])


def test_preprocess_refuses_what_is_no_picture(tokenizer):
    with pytest.raises(ValueError, match="PIL image"):
        tokenizer.preprocess(np.zeros((8, 8, 3), np.uint8))


def test_every_stage_trains(tokenizer, images):
    """A step of gradient descent along the loss lowers it: the gradients reach the parameters and point downhill."""
    cls = type(tokenizer)
    for stage in tokenizer.stages:
        torch.manual_seed(0)
        fresh = cls.tiny().train()
        batch = {"images": images, "texts": ["a red circle", "two squares", "nothing"]}
        optimizer = torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(10):
            torch.manual_seed(0)  # the same noise in every step, where there is noise
            loss, parts = fresh.loss(batch, 0, stage)
            assert loss.ndim == 0 and torch.isfinite(loss)
            assert all(v.ndim == 0 and not v.requires_grad for v in parts.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert min(losses[5:]) < losses[0]
        critic = fresh.critic()
        if critic is not None:
            loss, parts = critic.loss(batch, 0)
            loss.backward()
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.parameters())


# ---- fitting pictures, the same for all


@pytest.mark.parametrize("name", ["bicubic", "lanczos", "bilinear", "nearest"])
def test_crop_is_scaling_the_shorter_side_and_cutting_the_centre_out(name):
    """As openai/DALL-E's usage notebook does it, whose tokenizer needs these very pixels."""
    rng = np.random.default_rng(0)
    for width, height, size in [(90, 37, 16), (37, 90, 24), (16, 100, 16), (300, 200, 256), (33, 33, 8), (5, 70, 31)]:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        ratio = size / min(width, height)
        scaled = picture.resize((round(ratio * width), round(ratio * height)), Image.Resampling[name.upper()])
        left, top = (round((n - size) / 2) for n in scaled.size)
        expected = scaled.crop((left, top, left + size, top + size))
        assert fit(picture, size, f"crop-{name}").tobytes() == expected.tobytes()


def test_a_long_strip_is_fitted_without_becoming_huge():
    strip = Image.new("RGB", (20_000, 3), "red")
    strip.paste("blue", (9_990, 0, 10_010, 3))
    assert fit(strip, 256, "crop-bicubic").getcolors() == [(256 * 256, (0, 0, 255))]
    assert fit(strip, 8, "squash-box").size == (8, 8)


def test_squash_is_one_resize():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 90, 3), np.uint8))
    expected = picture.resize((16, 16), Image.Resampling.BICUBIC)
    assert fit(picture, 16, "squash-bicubic").tobytes() == expected.tobytes()


@pytest.mark.parametrize("rule", ["", "squash", "stretch-bicubic", "crop-sharp", None])
def test_unknown_rules_are_refused(rule):
    with pytest.raises(ValueError, match=r"unknown resize rule .*: expected FIT-FILTER"):
        fit(Image.new("RGB", (4, 4)), 2, rule)


def test_colours_that_a_plain_conversion_gets_wrong():
    clear = Image.new("RGBA", (2, 2), (200, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)  # what one sees is the paper
    keyed = Image.new("RGB", (2, 2), (200, 0, 0))
    keyed.info["transparency"] = (200, 0, 0)  # as PNG's tRNS gives it: this colour is clear
    assert to_rgb(keyed).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((2, 2), 0x8000, np.uint16))
    assert to_rgb(deep).getpixel((0, 0)) == (128, 128, 128)
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x0112] = 6  # orientation: turn by 90 degrees
    assert to_rgb(turned).size == (2, 4)
    with pytest.raises(ValueError, match="mode 'F'"):
        to_rgb(Image.new("F", (2, 2)))


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.png: no such file"):
        open_image(tmp_path / "a.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"b\.png: cannot be read as a picture"):
        open_image(tmp_path / "b.png")


def test_pixels_survive_the_way_to_a_tensor_and_back():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    assert to_pil(to_tensor(picture)).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    "call",
    ["grid()", "encode(torch.zeros(1, 3, 8, 8))", "embed(torch.zeros(1, 4))", "loss({}, 0)", "tiny()"],
)
def test_what_a_tokenizer_lacks_is_named(call):
    class Bare(ImageTokenizer):
        pass

    with pytest.raises(NotImplementedError, match=rf"Bare does not define {call.partition('(')[0]}\(\)"):
        eval(f"bare.{call}", {"bare": Bare(), "torch": torch})

    class Undecoded(Bare):
        image_size, tokens, codebook_sizes = 8, 4, (2,)

    with pytest.raises(NotImplementedError, match="Undecoded has no decode.* detokenizer"):
        Undecoded().decode(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="code out of range: 2"):  # before it says what else is missing
        Undecoded().decode(torch.full((1, 4), 2))
    with pytest.raises(ValueError, match="image height and width must be 8, got 8 x 16"):
        Undecoded().grid(8, 16)
