"""Emu3's tokenizer through BAAI's layout and through that of transformers, against transformers' Emu3VQVAE."""

import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from unitok.convert import convert
from unitok.tokenizers.base import load_tokenizer
from unitok.tokenizers.emu3 import Emu3Tokenizer

SIZE, GRID = (16, 24), (4, 6)
CONFIG = {"codebook_size": 64, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "num_res_blocks": 1,
          "channel_multiplier": [1, 1, 2], "attn_resolutions": [2], "hidden_size": 64,
          "temporal_downsample_factor": 4}  # fmt: skip
RAW_CONFIG = {"model_type": "Emu3VisionVQ", "codebook_size": 64, "embed_dim": 4, "z_channels": 4, "double_z": False,
              "in_channels": 3, "out_channels": 3, "temporal_downsample_factor": 4, "ch": 32, "ch_mult": [1, 1, 2],
              "num_res_blocks": 1, "attn_resolutions": [2], "dropout": 0.0}  # fmt: skip
# sha256 of names and shapes of Emu3VisionVQModel in baaivision/Emu3, at its default sizes
PUBLISHED = "00786b5f460f10d7cac1a37d024c1468823c03c21cf0c2f86a9218705fb325b8"


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    model = Emu3VQVAE(Emu3VQVAEConfig(**CONFIG))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):  # as training leaves them: fresh ones do nothing
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def raw(state):
    """transformers' names and shapes -> BAAI's: attention by 1 x 1 convolutions, and its norm within it."""
    found = {}
    for name, tensor in state.items():
        old = re.sub(r"(en|de)coder\.(down|up)_block\.", r"\1coder.", name)
        old = re.sub(r"\.attn_norms\.(\d)\.", r".attn.\1.norm.", old)
        old = old.replace("middle_block.attn_norm.", "mid.attn_1.norm.").replace("middle_block.", "mid.")
        projection = re.search(r"\.(q_proj|k_proj|v_proj|out_proj)\.", old)
        if projection:
            their = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "proj_out"}[projection[1]]
            old = old.replace(projection[1], their)
            tensor = tensor[:, :, None, None] if name.endswith("weight") else tensor
        found[old] = tensor
    return found


def within(prefix):
    """As it lies within the language model, whose other tensors do not matter."""
    return lambda state: {
        "model.text_model.embed_tokens.weight": torch.zeros(3, 2),
        **{prefix + name: tensor for name, tensor in state.items()},
    }


LAYOUTS = {
    "raw": (raw, RAW_CONFIG),
    "transformers": (dict, {"model_type": "emu3_vqgan", **CONFIG}),
    "whole model": (
        within("model.vqmodel."),
        {"model_type": "emu3", "vq_config": CONFIG, "text_config": {"hidden_size": 4096, "num_attention_heads": 32}},
    ),
    "whole model, before": (within("vqmodel."), {"model_type": "emu3", "vq_config": CONFIG}),
}


def converted(folder, state, config=None, **options):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
        options["config"] = folder / "config.json"
    return convert("emu3", [folder / "model.safetensors"], folder / "out", echo=lambda line: None, **options)


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_and_pictures_are_those_of_transformers(layout, reference, tmp_path):
    rename, config = LAYOUTS[layout]
    tokenizer = converted(tmp_path, rename(reference.state_dict()), config, image_size=32)
    images = torch.rand(16, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    found = reference.encode(2 * images - 1, image_sizes=torch.tensor([SIZE] * 16))
    expected = torch.stack(found.image_tokens).flatten(1)
    codes = tokenizer.encode(images)
    ties = tied(reference, images)
    print(f"ties: {ties.float().mean():.3%}")
    assert ties.float().mean() < 0.001 and len(expected.unique()) > 8
    assert torch.equal(codes[~ties], expected[~ties])
    pictures = ((reference.decode(expected.unflatten(1, GRID)) + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(expected, GRID), pictures, atol=1e-4, rtol=0)
    loaded = load_tokenizer(tmp_path / "out")
    assert torch.equal(loaded.encode(images), codes)
    assert loaded.image_size == 32 and loaded.grid() == (8, 8) and loaded.provenance["licence"] == "Apache-2.0"


def tied(reference, images):
    """bool [B, h*w]: whether the two nearest codes are less than 1e-5 apart, relative to the distance."""
    hidden = reference.encoder((2 * images - 1).unsqueeze(1).repeat(1, 4, 1, 1, 1))
    z = reference.quant_conv(hidden.transpose(1, 2)).flatten(2).transpose(1, 2)
    near = torch.cdist(z, reference.quantize.embedding.weight.expand(len(z), -1, -1)).topk(2, largest=False).values
    return near[..., 1] - near[..., 0] < 1e-5 * near[..., 1]


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        state = {n.removeprefix("model."): tensor for n, tensor in Emu3Tokenizer().state_dict().items()}
    theirs = raw(state)
    text = json.dumps(sorted((name, list(tensor.shape)) for name, tensor in theirs.items()))
    assert hashlib.sha256(text.encode()).hexdigest() == PUBLISHED
    assert len(theirs) == 495 and len(set(theirs) - set(state)) == 410


def test_weights_of_half_precision_and_sizes_without_a_config(reference, tmp_path):
    state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in reference.state_dict().items()}
    tokenizer = converted(tmp_path, state)
    assert tokenizer.image_size == 512 and tokenizer.dtype == torch.float32
    assert tokenizer.config == {**Emu3Tokenizer.tiny().config, "image_size": 512}


def without(name):
    return lambda state: {n: t for n, t in state.items() if n != name}


def reshaped(name, cut):
    return lambda state: {**state, name: cut(state[name])}


def renamed(old, new):
    return lambda state: {n.replace(old, new): t for n, t in state.items()}


def swapped(state):
    """The decoder's levels from the lowest resolution up, as some families count them."""
    flip = {"decoder.up.0.": "decoder.up.2.", "decoder.up.2.": "decoder.up.0."}
    return {n.replace(n[:13], flip.get(n[:13], n[:13])): t for n, t in state.items()}


BOOK, NORM, Q = "quantize.embedding.weight", "encoder.mid.attn_1.norm.bias", "decoder.up.2.attn.1.q.weight"
FAULTS = {
    "missing": (without(NORM), f"missing: {NORM}"),
    "no codebook": (without(BOOK), f"missing: {BOOK}"),
    "no first convolution": (without("encoder.conv_in.weight"), "missing: encoder.conv_in.weight"),
    "a level gone": (without("encoder.down.1.block.0.conv1.weight"), r"encoder\.down\.1\.block\.0\.conv1\.weight"),
    "extra": (lambda s: {**s, "encoder.extra": torch.zeros(1)}, "unexpected: encoder.extra"),
    "renamed": (renamed("decoder.conv_out", "decoder.out"), "missing: decoder.conv_out.weight, .*decoder.out.weight"),
    "mis-shaped": (reshaped(Q, lambda t: t[:5]), rf"{Q} is \(5, 64, 1, 1\), expected \(64, 64\)"),
    "codebook of other vectors": (
        reshaped(BOOK, lambda t: t[:, :3]),
        r"encoder\.conv_out\.bias is \(4,\), expected \(3,\)",
    ),
    "vector for a codebook": (reshaped(BOOK, lambda t: t[:, 0]), rf"{BOOK} is \(64,\), expected at least 2 axes"),
    "swapped levels": (swapped, r"missing: decoder\.up\.2\.attn\.0\.k\.weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit_are_named(fault, reference, tmp_path):
    spoil, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message) as error:
        converted(tmp_path, spoil(raw(reference.state_dict())))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("codebook_size", 32768), ("ch", 256), ("ch_mult", [1, 2, 2, 4]), ("z_channels", 8), ("attn_resolutions", [1]),
     ("temporal_downsample_factor", 2), ("double_z", True), ("num_res_blocks", 2)],
)  # fmt: skip
def test_a_config_that_says_otherwise(field, value, reference, tmp_path):
    with pytest.raises(ValueError, match=rf"the config says {field} = .*, the tensors say"):
        converted(tmp_path, raw(reference.state_dict()), {**RAW_CONFIG, field: value})


def test_a_vocabulary_that_another_codebook_has(reference, tmp_path):
    state = raw(reference.state_dict())
    with pytest.raises(ValueError, match="codebook_size = 64, the tensors say 48"):
        converted(tmp_path, {**state, BOOK: state[BOOK][:48]}, RAW_CONFIG)


def test_cut_off_files(reference, tmp_path):
    converted(tmp_path, raw(reference.state_dict()))
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.safetensors"):
        convert("emu3", [tmp_path / "cut.safetensors"], tmp_path / "none")


def test_another_size_must_fit_the_stride(reference, tmp_path):
    with pytest.raises(ValueError, match="emu3 cannot have image_size = 30"):
        converted(tmp_path, reference.state_dict(), image_size=30)
