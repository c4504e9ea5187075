"""TiTok against what the published code made of the same weights (fixtures/make_titok.py)."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unitok.convert import convert
from unitok.convert.titok import arguments
from unitok.tokenizers.base import load_tokenizer
from unitok.tokenizers.titok import TiTokTokenizer

FIXTURES = Path(__file__).parent / "fixtures"
TIE = 1e-5

spec = importlib.util.spec_from_file_location("make_titok", FIXTURES / "make_titok.py")
make_titok = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_titok)

MADE = load_file(FIXTURES / "titok.safetensors")
with safe_open(FIXTURES / "titok.safetensors", "pt") as file:
    ABOUT = {key: json.loads(value) for key, value in file.metadata().items()}
IMAGES = MADE["images"].float() / 255
KINDS = list(make_titok.MODELS)


def state_of(kind):
    return make_titok.draw(ABOUT[kind], make_titok.MODELS[kind][0])


def config_of(kind):
    """The published config, but for the names of model sizes, which mean smaller ones here."""
    told = {k: v for k, v in make_titok.MODELS[kind][1].items() if "model_size" not in k}
    return make_titok.config({**told, "num_latent_tokens": make_titok.TOKENS}, make_titok.SIZE, make_titok.PATCH)


def converted(folder, state, config=None, lines=None, **options):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
        options["config"] = folder / "config.json"
    echo = (lambda line: None) if lines is None else lines.append
    return convert("titok", [folder / "model.safetensors"], folder / "out", echo=echo, **options)


def check(tokenizer, kind):
    expected, safe = MADE[f"{kind}.codes"], MADE[f"{kind}.gap"] >= TIE
    ties = 1 - safe.float().mean().item()
    print(f"{kind}: ties {ties:.3%} of tokens, {len(expected.unique())} codes")
    assert ties < 0.001 and len(expected.unique()) > 30 and len(expected.unique(dim=0)) == len(IMAGES)
    assert torch.equal(tokenizer.encode(IMAGES)[safe], expected[safe])
    torch.testing.assert_close(tokenizer.embed(expected), MADE[f"{kind}.vectors"], atol=1e-6, rtol=0)
    decoded = tokenizer.decode(expected)[:2]
    torch.testing.assert_close(decoded, MADE[f"{kind}.decoded"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_pictures_are_those_of_the_published_code(kind, tmp_path):
    tokenizer = converted(tmp_path, state_of(kind), config_of(kind))
    assert tokenizer.grid() == (make_titok.TOKENS,) and tokenizer.two_stage == (kind == "two_stage")
    check(tokenizer, kind)
    loaded = load_tokenizer(tmp_path / "out")
    check(loaded, kind)
    assert loaded.provenance["pixels"] == "[0, 1]"


@pytest.mark.parametrize("kind", KINDS)
def test_a_bin_file_without_a_config(kind, tmp_path):
    """What no tensor says is taken as published, and said."""
    torch.save(state_of(kind), tmp_path / "tokenizer_titok.bin")
    lines = []
    check(convert("titok", [tmp_path / "tokenizer_titok.bin"], tmp_path / "out", echo=lines.append), kind)
    assert any("looked up by " + {"two_stage": "angle", "single_stage": "distance"}[kind] in line for line in lines)


def test_the_config_decides_about_the_lookup(tmp_path):
    config = config_of("single_stage")
    config["model"]["vq_model"]["use_l2_norm"] = True
    lines = []
    tokenizer = converted(tmp_path, state_of("single_stage"), config, lines)
    assert tokenizer.config["normalize"] is True and not any("looked up" in line for line in lines)
    assert not torch.equal(tokenizer.encode(IMAGES), MADE["single_stage.codes"])


def test_the_quantizers_loss_is_the_published_one(tmp_path):
    tokenizer = converted(tmp_path, state_of("single_stage"), config_of("single_stage"))
    _, parts = tokenizer.loss({"images": IMAGES}, 0)
    torch.testing.assert_close(parts["quantizer"], MADE["single_stage.loss"], atol=0, rtol=1e-5)


def test_rows_and_columns_that_the_published_two_stage_models_mix_up(tmp_path):
    """Without it the codes are others."""
    tokenizer = converted(tmp_path, state_of("two_stage"))
    tokenizer.encoder.mixed = False
    assert (tokenizer.encode(IMAGES) == MADE["two_stage.codes"]).float().mean() < 0.5


PUBLISHED = {
    "l32": {},
    "s128": {"tokens": 128, "encoder_width": 512, "encoder_layers": 8, "decoder_width": 512, "decoder_layers": 8},
    "bl64_vq8k": {"tokens": 64, "encoder_width": 768, "encoder_layers": 12, "codebook_size": 8192, "code_dim": 64,
                  "normalize": False, "pixel_codes": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_the_published_sizes(name):
    with torch.device("meta"):
        tokenizer = TiTokTokenizer(**PUBLISHED[name])
    shapes = {key: tuple(tensor.shape) for key, tensor in tokenizer.state_dict().items()}
    assert make_titok.digest(shapes) == ABOUT["layouts"][name]
    with torch.device("meta"):
        again = TiTokTokenizer(**arguments(shapes)).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in again.items()} == shapes


def without(begin):
    return lambda state: {n: t for n, t in state.items() if not n.startswith(begin)}


def cut(name, *axes):
    return lambda state: {**state, name: state[name][axes]}


def renamed(old, new):
    return lambda state: {n.replace(old, new): t for n, t in state.items()}


def swapped(state):
    """The pixel decoder's levels from the lowest resolution up."""
    levels = [(n, int(n.split(".")[2])) for n in state if n.startswith("pixel_decoder.up.")]
    moved = {n.replace(f".up.{i}.", f".up.{3 - i}.", 1): state[n] for n, i in levels}
    return {**without("pixel_decoder.up.")(state), **moved}


POSITIONS, CODES = "encoder.positional_embedding", "quantize.embedding.weight"
FAULTS = {
    "missing": (without("encoder.ln_post.bias"), "missing: encoder.ln_post.bias"),
    "no codes": (without("quantize."), f"missing: {CODES}; .*has no codes"),
    "first stage alone": (without("pixel_"), "pixel_quantize.embedding.weight and pixel_decoder are missing"),
    "half a pixel decoder": (without("pixel_decoder.up.0."), r"missing: pixel_decoder\.up\.0\.block\.0\.conv1\.weight"),
    "a layer gone": (without("decoder.transformer.1."), r"unexpected: decoder\.transformer\.2\."),
    "extra": (lambda s: {**s, "decoder.text_guidance_proj.bias": torch.zeros(1)}, "unexpected: decoder.text_guidance"),
    "renamed": (renamed("decoder.mask_token", "decoder.mask"), "missing: decoder.mask_token; unexpected: decoder.mask"),
    "mis-shaped": (cut("decoder.decoder_embed.bias", slice(7)), r"decoder_embed\.bias is \(7,\), expected \(192,\)"),
    "other positions": (cut(POSITIONS, slice(14)), rf"{POSITIONS} is \(14, 128\), expected \(10, 128\)"),
    "other vectors": (cut(CODES, slice(None), slice(9)), r"encoder\.conv_out\.bias is \(12,\), expected \(9,\)"),
    "swapped levels": (swapped, r"missing: pixel_decoder\.up\.1\.block\.0\.nin_shortcut\.weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit_are_named(fault, tmp_path):
    spoil, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message) as error:
        converted(tmp_path, spoil(state_of("two_stage")))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("codebook_size", 4096), ("token_size", 16), ("num_latent_tokens", 32), ("vit_enc_patch_size", 16),
     ("vit_dec_model_size", "large"), ("finetune_decoder", False), ("quantize_mode", "vae")],
)  # fmt: skip
def test_a_config_that_says_otherwise(field, value, tmp_path):
    config = config_of("two_stage")
    config["model"]["vq_model"][field] = value
    with pytest.raises(ValueError, match=rf"the config says model\.vq_model\.{field} = .*, the tensors say"):
        converted(tmp_path, state_of("two_stage"), config)


def test_another_size_is_refused(tmp_path):
    state = state_of("single_stage")
    assert converted(tmp_path, state, image_size=32).image_size == 32
    with pytest.raises(ValueError, match="its image size is 32, no other"):
        converted(tmp_path, state, image_size=64)


def test_cut_off_files(tmp_path):
    torch.save(state_of("single_stage"), tmp_path / "whole.bin")
    data = (tmp_path / "whole.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.bin"):
        convert("titok", [tmp_path / "cut.bin"], tmp_path / "none")
