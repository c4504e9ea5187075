"""Open-MAGVIT2 and Show-o's MAGVIT-v2 against what the published classes made of the same weights (fixtures/)."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unitok.convert import convert
from unitok.tokenizers.base import load_tokenizer
from unitok.tokenizers.magvit2 import MAGVIT2Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
TIE = 1e-5  # a signal this near 0 may fall to either side
GRID = (8, 12)

spec = importlib.util.spec_from_file_location("make_magvit2", FIXTURES / "make_magvit2.py")
make_magvit2 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_magvit2)


def fixture(name):
    """The tensors of a fixture, the shapes of the published file, and the seeds of its weights."""
    with safe_open(FIXTURES / name, "pt") as file:
        about = {key: json.loads(value) for key, value in file.metadata().items()}
    return load_file(FIXTURES / name), about["shapes"], about["seeds"]


OPEN, OPEN_SHAPES, OPEN_SEEDS = fixture("open_magvit2.safetensors")
SHOW_O, SHOW_O_SHAPES, SHOW_O_SEEDS = fixture("show_o.safetensors")


def open_magvit2_state(averages=True):
    """As Lightning saves it: live weights, the discriminator's, and averages under names without dots."""
    live = {name: shape for name, shape in OPEN_SHAPES.items() if not name.startswith("model_ema.")}
    state = make_magvit2.draw(live, OPEN_SEEDS["raw"])
    if averages:
        mean = make_magvit2.draw(live, OPEN_SEEDS["ema"])
        state |= {"model_ema." + name.replace(".", ""): tensor for name, tensor in mean.items()}
        assert {name for name in state} == set(OPEN_SHAPES)
        state |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(-1)}
    return state


def show_o_state():
    shapes = {name: shape for name, shape in SHOW_O_SHAPES.items() if not name.startswith("quantize.")}
    codes, places = torch.arange(2**13), torch.arange(12, -1, -1)
    tables = {"quantize.embedding": (codes[:, None] >> places & 1) * 2.0 - 1, "quantize.power_vals": 2**places}
    assert all(list(table.shape) == SHOW_O_SHAPES[name] for name, table in tables.items())
    return {**make_magvit2.draw(shapes, SHOW_O_SEEDS["raw"]), **tables}


def open_magvit2(folder, state, **options):
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 1e-4}}, folder / "imagenet_256_L.ckpt")
    return convert("open-magvit2", [folder / "imagenet_256_L.ckpt"], folder / "out", echo=lambda line: None, **options)


def show_o(
    folder, state, blocks=(make_magvit2.SHOW_O["num_res_blocks"], make_magvit2.SHOW_O_DECODER["num_res_blocks"])
):
    """With a config that says how deep each level is; none where `blocks` is None."""
    save_file(state, folder / "model.safetensors")
    config = folder / "config.json"
    if blocks:
        parts = zip(("encoder", "decoder"), blocks, strict=True)
        config.write_text(json.dumps({part: {"num_res_blocks": depths} for part, depths in parts}))
    return convert(
        "show-o", [folder / "model.safetensors"], folder / "out", config=config if blocks else None,
        echo=lambda line: None,
    )  # fmt: skip


def check(tokenizer, expected, signals, decoded, images):
    """Equal codes where no signal is a tie, equal pictures; expected: [B, n] or [B, n, K]."""
    codes = tokenizer.encode(images).view_as(expected)
    safe = (signals.abs() >= TIE).all(1).flatten(1)  # [B, n]
    ties = 1 - safe.float().mean().item()
    print(f"ties: {ties:.3%} of positions")
    assert ties < 0.001
    assert torch.equal(codes[safe], expected[safe])
    grid = (*GRID, *expected.shape[2:])
    torch.testing.assert_close(tokenizer.decode(expected.flatten(1), grid), decoded, atol=1e-4, rtol=0)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_open_magvit2_gives_the_published_codes_and_pictures(weights, tmp_path):
    tokenizer = open_magvit2(tmp_path, open_magvit2_state(weights == "ema"))
    assert tokenizer.codebook_sizes == (2**18,) and tokenizer.resize == "crop-bilinear"
    assert tokenizer.provenance["weights"] == weights
    parts = (OPEN[f"{weights}.{name}"] for name in ("codes", "signals", "decoded"))
    check(tokenizer, *parts, OPEN["images"])
    loaded = load_tokenizer(tmp_path / "out")
    assert torch.equal(loaded.encode(OPEN["images"]), tokenizer.encode(OPEN["images"]))
    assert loaded.provenance["weights"] == weights


def test_averages_and_raw_weights_differ():
    """Else the test above could not tell which were taken."""
    assert (OPEN["ema.codes"] != OPEN["raw.codes"]).float().mean() > 0.9


def test_open_magvit2_in_two_tokens_a_position(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "model:\n  init_args:\n    first_stage_config:\n      params:\n        n_embed: 262144\n"
        "        token_factorization: True\n        factorized_bits: [6, 12]\n"
        "        ddconfig: {ch: 32, ch_mult: [1, 2, 2], num_res_blocks: 2, z_channels: 18}\n"
    )
    tokenizer = open_magvit2(tmp_path, open_magvit2_state(), config=config, image_size=32)
    assert tokenizer.codebook_sizes == (64, 4096) and tokenizer.grid() == (8, 8, 2)
    check(tokenizer, *(OPEN[f"ema.{name}"] for name in ("split_codes", "signals", "decoded")), OPEN["images"])


def test_show_o_gives_the_published_codes_and_pictures(tmp_path):
    tokenizer = show_o(tmp_path, show_o_state())
    assert tokenizer.codebook_sizes == (2**13,) and tokenizer.resize == "crop-bicubic"
    check(tokenizer, *(SHOW_O[name] for name in ("codes", "signals", "decoded", "images")))


def test_the_two_conventions_number_codes_from_opposite_ends(tmp_path):
    """Code 1 sets the first channel of Open-MAGVIT2's vectors and the last of Show-o's; each as published."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours = {
        "open": open_magvit2(tmp_path / "a", open_magvit2_state()),
        "show-o": show_o(tmp_path / "b", show_o_state()),
    }
    vectors = {name: tokenizer.embed(torch.arange(8)[None], (2, 4))[0] for name, tokenizer in ours.items()}
    assert torch.equal(vectors["open"], OPEN["vectors"]) and torch.equal(vectors["show-o"], SHOW_O["vectors"])
    assert (vectors["open"][1] > 0).nonzero().tolist() == [[0]]
    assert (vectors["show-o"][1] > 0).nonzero().tolist() == [[12]]


# ---- refusals

RENAME = {"encoder.down.1.block.0.norm1.weight": "encoder.down.1.block.0.norm.weight"}


def without(state, name):
    return {n: t for n, t in state.items() if n != name}


def swapped(state):
    """The decoder's levels counted from the other end, as LlamaGen and diffusers count them."""
    last = max(int(n.split(".")[2]) for n in state if n.startswith("decoder.up."))

    def other(name):
        parts = name.split(".")
        if name.startswith("decoder.up."):
            parts[2] = str(last - int(parts[2]))
        return ".".join(parts)

    return {other(n): t for n, t in state.items()}


COMMON = {
    "missing": (lambda s: without(s, "encoder.conv_out.bias"), "missing: encoder.conv_out.bias"),
    "extra": (lambda s: {**s, "decoder.more.weight": torch.ones(1)}, "unexpected: decoder.more.weight"),
    "renamed": (lambda s: {RENAME.get(n, n): t for n, t in s.items()}, "missing: encoder.down.1.block.0.norm1.weight"),
    "mis-shaped": (
        lambda s: {**s, "decoder.conv_out.weight": s["decoder.conv_out.weight"][:, :16]},
        r"decoder.conv_out.weight is \(3, 16, 3, 3\), expected \(3, 32, 3, 3\)",
    ),
    "odd width": (
        lambda s: {**s, "encoder.down.1.block.0.conv1.weight": torch.ones(33, 32, 3, 3)},
        r"encoder.down.1.block.0.conv1.weight is \(33, 32, 3, 3\), expected a multiple of 32",
    ),
    "other channels": (
        lambda s: {**s, "encoder.conv_in.weight": torch.ones(24, 3, 3, 3)},
        r"encoder.conv_in.weight is \(24, 3, 3, 3\), expected a multiple of 32",
    ),
    "no decoder": (lambda s: {n: t for n, t in s.items() if not n.startswith("decoder.up")}, "missing: decoder.up.0"),
}
OF_OPEN = {
    "swapped decoder": (swapped, "decoder.up.0.upsample.conv1.weight"),
    "missing block": (
        lambda s: {n: t for n, t in s.items() if not n.startswith("decoder.up.1.block.1.")},
        "missing: decoder.up.1.block.1.norm1.weight",
    ),
    "missing adaptation": (
        lambda s: without(s, "decoder.adaptive.2.beta.bias"),
        "missing: decoder.adaptive.2.beta.bias",
    ),
    "wrong vocabulary": (
        lambda s: {**s, "encoder.conv_out.weight": torch.ones(14, 64, 1, 1)},
        r"encoder.conv_out.bias is \(18,\), expected \(14,\)",
    ),
}
OF_SHOW_O = {
    "swapped decoder": (swapped, "missing: decoder.up.0.block.0.nin_shortcut.weight"),
    "missing block": (
        lambda s: {n: t for n, t in s.items() if not n.startswith("encoder.down.2.block.1.")},
        "missing: encoder.down.2.block.1.norm1.weight",
    ),
    "missing level": (
        lambda s: {n: t for n, t in s.items() if not n.startswith("decoder.up.2.")},
        "missing: decoder.up.2.block.0.conv1.weight",
    ),
    "no codebook": (lambda s: without(s, "quantize.embedding"), "missing: quantize.embedding"),
    "wrong vocabulary": (
        lambda s: {**s, "quantize.embedding": s["quantize.embedding"][:4096]},
        r"quantize.embedding is \(4096, 13\), expected \(8192, 13\)",
    ),
    "the other bit order": (
        lambda s: {**s, "quantize.power_vals": s["quantize.power_vals"].flip(0)},
        "quantize.power_vals holds other values",
    ),
    "a table of its own": (
        lambda s: {**s, "quantize.embedding": s["quantize.embedding"].flip(1)},
        "quantize.embedding holds other values",
    ),
}


@pytest.mark.parametrize("fault", COMMON | OF_OPEN)
def test_open_magvit2_refuses(fault, tmp_path):
    spoil, message = (COMMON | OF_OPEN)[fault]
    with pytest.raises(ValueError, match=message):
        open_magvit2(tmp_path, spoil(open_magvit2_state(False)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", COMMON | OF_SHOW_O)
def test_show_o_refuses(fault, tmp_path):
    spoil, message = (COMMON | OF_SHOW_O)[fault]
    with pytest.raises(ValueError, match=message):
        show_o(tmp_path, {n: t.contiguous() for n, t in spoil(show_o_state()).items()})
    assert not (tmp_path / "out").exists()


PUBLISHED = {
    "image_size": 32, "layout": "show-o", "channels": 32, "multipliers": (1,) * 5, "blocks": (4, 3, 4, 3, 4),
    "decoder_blocks": (4, 4, 3, 4, 3), "bits": (13,), "lsb_first": False,
}  # fmt: skip


@pytest.mark.parametrize("options", [PUBLISHED, {**PUBLISHED, "multipliers": (1, 1), "blocks": (2, 2),
                                                 "decoder_blocks": (3, 3)}], ids=["as published", "even"])  # fmt: skip
def test_show_o_without_a_config_has_the_published_depths_or_even_ones(options, tmp_path):
    """A level without its last block is refused, whichever it is, by the name of what it lacks."""
    torch.manual_seed(0)
    tokenizer = MAGVIT2Tokenizer(**options).eval()
    state = {**tokenizer.state_dict(), **{n: t for n, t in show_o_state().items() if n.startswith("quantize.")}}
    converted = show_o(tmp_path, state, None)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(converted.encode(images), tokenizer.encode(images))
    with pytest.raises(ValueError, match="unexpected: decoder.up.0.block.1."):
        show_o(tmp_path, state, (1, 1))
    for part, depths in (("encoder.down", options["blocks"]), ("decoder.up", options["decoder_blocks"])):
        for level, depth in enumerate(depths):
            last = f"{part}.{level}.block.{depth - 1}."
            with pytest.raises(ValueError, match=f"missing: {last}norm1.weight"):
                show_o(tmp_path, {n: t for n, t in state.items() if not n.startswith(last)}, None)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"n_embed": 16384}, r"n_embed = 16384, the tensors say 262144"),
        ({"ddconfig": {"ch_mult": [1, 1, 2]}}, r"ddconfig.ch_mult = \[1, 1, 2\], the tensors say \[1, 2, 2\]"),
        ({"token_factorization": True, "factorized_bits": [6, 8]}, r"factorized_bits = \[6, 8\], the tensors have 18"),
    ],
)
def test_a_config_that_says_otherwise_is_refused(said, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=message):
        open_magvit2(tmp_path, open_magvit2_state(False), config=tmp_path / "config.json")


def test_an_average_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model_ema.encoderconv_inweight"):
        open_magvit2(tmp_path, without(open_magvit2_state(), "encoder.conv_in.weight"))


@pytest.mark.parametrize(("make", "state"), [(open_magvit2, open_magvit2_state), (show_o, show_o_state)])
def test_the_formats_are_told_apart(make, state, tmp_path):
    (tmp_path / "file").mkdir()
    make(tmp_path / "file", state())
    [file] = (p for p in (tmp_path / "file").iterdir() if p.suffix in (".ckpt", ".safetensors"))
    other, looks = ("show-o", "open-magvit2") if make is open_magvit2 else ("open-magvit2", "show-o")
    with pytest.raises(ValueError, match=f"not of format {other}; they look like {looks} "):
        convert(other, [file], tmp_path / "out")
