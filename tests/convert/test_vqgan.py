"""The VQGAN family: codes and pictures of the original implementations, through the layouts they are published in."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import AmusedImg2ImgPipeline, VQModel
from torch import nn
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, JanusVQVAE, JanusVQVAEConfig

from unitok.convert import convert
from unitok.manifest import Manifest

WIDTHS, LATENT, CODES, DIM = [32, 32, 64], 16, 128, 8
DDCONFIG = {"double_z": False, "z_channels": LATENT, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
            "ch_mult": [1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [16], "dropout": 0.0}  # fmt: skip
CONFIG = {"model": {"params": {"embed_dim": DIM, "n_embed": CODES, "ddconfig": DDCONFIG}}}


def vq_model(attention: bool, randomise, **options) -> VQModel:
    own = "Attn" if attention else ""
    model = VQModel(
        block_out_channels=WIDTHS, layers_per_block=1, latent_channels=LATENT, vq_embed_dim=DIM,
        num_vq_embeddings=CODES, down_block_types=["DownEncoderBlock2D"] * 2 + [f"{own}DownEncoderBlock2D"],
        up_block_types=[f"{own}UpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 2, **options,
    ).eval()  # fmt: skip
    randomise(model)
    return model


def centred(model, encode, pixels):
    """With vectors that are spread like the codes, so that many codes are used."""
    with torch.no_grad():
        z = encode(pixels).transpose(0, 1).flatten(1)  # [D, B*h*w]
        last = model.quant_conv
        last.bias.copy_((last.bias - z.mean(1)) / z.std(1))
        last.weight /= z.std(1)[:, None, None, None]
    return model


@pytest.fixture(scope="module")
def original(randomise, pictures):
    model = vq_model(True, randomise)
    return centred(model, lambda x: model.encode(x).latents, pictures * 2 - 1)


@torch.no_grad()
def run(model: VQModel, pictures, black=-1):
    """Codes, distances and pictures [0, 1] of diffusers' VQModel, whose pixels go from `black` to 1."""
    z = model.encode(pictures * (1 - black) + black).latents
    codes = model.quantize(z)[2][2].view(len(z), -1)
    shape = (len(z), *z.shape[2:], DIM)
    given = codes if model.config.lookup_from_codebook else model.quantize.get_codebook_entry(codes.flatten(), shape)
    images = model.decode(given, force_not_quantize=True, shape=shape).sample
    return codes, distances(z, model.quantize.embedding.weight), ((images - black) / (1 - black)).clamp(0, 1)


def distances(z, table):
    """[B, D, h, w], [V, D] -> squared ones [B, h*w, V], in double precision."""
    return torch.cdist(z.flatten(2).transpose(1, 2).double(), table.double().expand(len(z), -1, -1)).square()


def to_taming(state, levels=3):
    """Names of diffusers -> taming's, and matrices of attention -> 1 x 1 convolutions."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in (
            ("down_blocks", "down"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
            ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"), ("resnets", "block"), ("attentions", "attn"),
            ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"),
            ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"),
        ):  # fmt: skip
            name = name.replace(old, new)
        name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
        renamed[name] = tensor[:, :, None, None] if tensor.ndim == 2 and "attn" in name else tensor
    return renamed


def turned(state, levels=3):
    """The decoder's levels counted from the other end."""
    return {re.sub(r"up\.(\d)", lambda f: f"up.{levels - 1 - int(f[1])}", n): t for n, t in state.items()}


def to_llamagen(state):
    """Names of Janus in transformers -> LlamaGen's."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"coder\.(down|up)\.(\d)\.block", r"coder.conv_blocks.\2.res", name)
        name = re.sub(r"coder\.(down|up)\.(\d)", r"coder.conv_blocks.\2", name)
        for old, new in (("mid.block_1", "mid.0"), ("mid.attn_1", "mid.1"), ("mid.block_2", "mid.2")):
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def lightning(state, **others):
    """As a training framework leaves it: losses beside the model, counters, an optimizer."""
    losses = {"loss.perceptual_loss.net.weight": torch.zeros(2, 2), "loss.discriminator.main.0.weight": torch.zeros(2)}
    return {"epoch": 7, "state_dict": {**state, **losses, **others}, "optimizer_states": [{"lr": 0.1}]}


# ---- equal to the originals


def test_diffusers_folder(original, converted, same, pictures, tmp_path):
    original.save_pretrained(tmp_path / "vqvae")
    ours = converted("diffusers", tmp_path / "vqvae", image_size=64)
    codes, far, images = run(original, pictures)
    same(ours.encode(pictures), codes, far, ours.decode(codes), images)
    assert list(ours.provenance["files"]) == ["diffusion_pytorch_model.safetensors"]


def test_diffusers_with_the_names_of_its_first_releases(original, converted, pictures):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = original.state_dict()
    for new, before in old.items():
        state = {name.replace(f".{new}.", f".{before}."): tensor for name, tensor in state.items()}
    assert torch.equal(converted("diffusers", state, image_size=64).encode(pictures), run(original, pictures)[0])


def test_amused_takes_pixels_as_they_are(converted, same, pictures, randomise, tmp_path):
    """Its pipelines give the encoder [0, 1] and clip what the decoder makes to it."""
    theirs = vq_model(False, randomise, mid_block_add_attention=False, lookup_from_codebook=True, force_upcast=True)
    centred(theirs, lambda x: theirs.encode(x).latents, pictures)
    processor = AmusedImg2ImgPipeline(theirs, None, None, None, None).image_processor
    assert not processor.config.do_normalize
    theirs.save_pretrained(tmp_path / "vqvae")
    ours = converted("amused", tmp_path / "vqvae", image_size=64)
    codes, far, images = run(theirs, pictures, black=0)
    same(ours.encode(pictures), codes, far, ours.decode(codes), images)
    assert (run(theirs, pictures)[0] != codes).float().mean() > 0.1  # else the range would not be tested
    assert ours.provenance["pixels"] == "[0, 1]" and ours.provenance["licence"].startswith("openrail++")
    assert torch.equal(converted("amused", theirs.state_dict(), image_size=64).encode(pictures), ours.encode(pictures))


def test_what_diffusers_does_not_say_of_its_pixels_is_told(converted, randomise, capsys, tmp_path):
    plain = vq_model(False, randomise, mid_block_add_attention=False)
    assert converted("diffusers", plain.state_dict(), image_size=64).provenance["pixels"] == "[-1, 1]"
    assert "pixels are taken as [-1, 1]" in capsys.readouterr().out
    plain.save_pretrained(tmp_path / "vqvae")
    assert "notes" not in converted("diffusers", tmp_path / "vqvae", image_size=64).provenance
    with pytest.raises(ValueError, match="no lookup_from_codebook = true.*: take the format diffusers"):
        converted("amused", tmp_path / "vqvae", image_size=64)


@pytest.mark.parametrize("name", ["taming", "ldm"])
def test_taming_checkpoint_with_its_config(original, converted, same, pictures, tmp_path, name):
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(CONFIG))
    state = to_taming(original.state_dict())
    if name == "ldm":  # within the whole model
        state = {**{f"first_stage_model.{n}": t for n, t in state.items()}, "model.diffusion_model.w": torch.zeros(1)}
    ours = converted(name, lightning(state), config=tmp_path / "model.yaml")
    codes, far, images = run(original, pictures)
    same(ours.encode(pictures), codes, far, ours.decode(codes), images)
    assert ours.image_size == 64 and ours.grid() == (16, 16)
    assert ours.provenance["weights"] == "raw"


def test_averaged_weights_are_taken_by_their_dotless_names(original, converted, pictures, capsys):
    state = to_taming(original.state_dict())
    averages = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in state.items()}
    counters = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(3)}
    live = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    ours = converted("taming", lightning(live, **averages, **counters), image_size=64)
    assert torch.equal(ours.encode(pictures), run(original, pictures)[0])
    assert ours.provenance["weights"] == "ema" and "averaged weights (ema) taken" in capsys.readouterr().out


def test_wrappers_around_names_are_stripped(original, converted, pictures):
    state = {f"module._orig_mod.{name}": tensor for name, tensor in to_taming(original.state_dict()).items()}
    ours = converted("taming", {"model": state}, image_size=64)
    assert torch.equal(ours.encode(pictures), run(original, pictures)[0])


def test_gumbel_takes_the_likeliest_code(original, converted, same, pictures):
    draw = torch.Generator().manual_seed(1)
    proj, embed = torch.randn(CODES, DIM, 1, 1, generator=draw), torch.randn(CODES, DIM, generator=draw)
    state = {n: t for n, t in to_taming(original.state_dict()).items() if not n.startswith("quantize")}
    state |= {"quantize.proj.weight": proj, "quantize.proj.bias": torch.zeros(CODES), "quantize.embed.weight": embed}
    ours = converted("gumbel-f8", lightning(state), image_size=64)
    with torch.no_grad():
        logits = F.conv2d(original.encode(pictures * 2 - 1).latents, proj)
        codes = logits.argmax(1)
        images = original.decode(F.embedding(codes, embed).permute(0, 3, 1, 2), force_not_quantize=True).sample
    images = ((images + 1) / 2).clamp(0, 1)
    same(ours.encode(pictures), codes, -logits.flatten(2).transpose(1, 2), ours.decode(codes.flatten(1)), images)


@pytest.mark.parametrize("prefix", ["", "model.vqmodel."], ids=["alone", "within-the-model"])
def test_chameleon_with_its_decoder(converted, same, pictures, randomise, capsys, prefix, tmp_path):
    decoder = vq_model(False, randomise)
    state = to_taming(decoder.state_dict())
    sizes = {"embed_dim": DIM, "num_embeddings": CODES, "latent_channels": LATENT, "base_channels": 32,
             "channel_multiplier": [1, 1, 2], "num_res_blocks": 1, "resolution": 64,
             "attn_resolutions": None}  # fmt: skip
    theirs = ChameleonVQVAE(ChameleonVQVAEConfig(**sizes)).eval()
    lost, extra = theirs.load_state_dict(state, strict=False)
    assert not lost and all(name.startswith("decoder.") for name in extra)

    def vectors(x):
        return theirs.quant_conv(theirs.encoder(x))

    centred(theirs, vectors, pictures * 2 - 1)
    decoder.quant_conv.load_state_dict(theirs.quant_conv.state_dict())
    state = to_taming(decoder.state_dict())
    beside = {"lm_head.weight": torch.zeros(3)} if prefix else {}
    (tmp_path / "config.json").write_text(json.dumps({"vq_config": sizes, "hidden_size": 3} if prefix else sizes))
    content = {"state_dict": {**{prefix + n: t for n, t in state.items()}, **beside}}
    ours = converted("chameleon", content, config=tmp_path / "config.json")
    with torch.no_grad():
        z = vectors(pictures * 2 - 1)
        codes = theirs.encode(pictures * 2 - 1).image_tokens.view(len(pictures), -1)
    images = run(decoder, pictures)[2]
    same(ours.encode(pictures), codes, distances(z, theirs.quantize.embedding.weight), ours.decode(codes), images)
    assert "licence: Chameleon Research License" in capsys.readouterr().out
    assert "no commercial use" in Manifest.load(tmp_path / "out").licences[0]


@pytest.fixture(scope="module")
def janus(randomise, pictures):
    config = JanusVQVAEConfig(
        embed_dim=DIM, num_embeddings=CODES, latent_channels=LATENT, base_channels=32, channel_multiplier=[1, 1, 2],
        num_res_blocks=1, num_patches=16,
    )  # fmt: skip
    model = JanusVQVAE(config).eval()
    randomise(model)
    return centred(model, lambda x: model.quant_conv(model.encoder(x)), pictures * 2 - 1)


@torch.no_grad()
def run_janus(model, pictures):
    """Codes, distances and pictures, with the table normalised as its decoder and LlamaGen's encoder do."""
    model = copy.deepcopy(model)
    model.quantize.embedding.weight.data = F.normalize(model.quantize.embedding.weight.data, dim=-1)
    codes = model.encode(pictures * 2 - 1).image_tokens.view(len(pictures), -1)
    z = model.quant_conv(model.encoder(pictures * 2 - 1))
    images = (model.decode(codes).clamp(-1, 1) + 1) / 2
    return codes, distances(F.normalize(z, dim=1), model.quantize.embedding.weight), images


def test_janus_with_its_table_normalised(janus, converted, same, pictures, capsys):
    state = {f"model.vqmodel.{name}": tensor for name, tensor in janus.state_dict().items()}
    ours = converted("janus", {**state, "lm_head.weight": torch.zeros(2)}, image_size=64)
    codes, far, images = run_janus(janus, pictures)
    same(ours.encode(pictures), codes, far, ours.decode(codes), images)
    table = ours.quantize.embedding.weight
    assert torch.allclose(table.norm(dim=1), torch.ones(CODES)) and not torch.equal(
        table, janus.quantize.embedding.weight
    )
    lengths = janus.quantize.embedding.weight.norm(dim=1)
    [note] = ours.provenance["notes"]
    assert f"lengths {lengths.min():.4g} to {lengths.max():.4g}: normalised here" in note
    assert note in capsys.readouterr().out
    as_stored = janus.encode(pictures * 2 - 1).image_tokens.view(len(pictures), -1)
    assert (as_stored == codes).float().mean() < 0.9  # else the normalisation would not be tested


@pytest.mark.parametrize("nest", ["model", "ema"])
def test_llamagen_layout(janus, converted, same, pictures, nest):
    state = to_llamagen(janus.state_dict())
    assert {"encoder.conv_blocks.2.attn.0.q.weight", "decoder.mid.1.k.bias", "decoder.conv_blocks.0.upsample.conv.bias",
            "encoder.conv_blocks.0.res.0.norm1.weight"} <= state.keys()  # fmt: skip
    content = {"model": {**state, "quantize.codebook_used": torch.zeros(65536)}}
    if nest == "ema":
        content = {"ema": content["model"], "model": {n: torch.zeros_like(t) for n, t in state.items()}, "steps": 3}
    ours = converted("llamagen", content, image_size=64)
    codes, far, images = run_janus(janus, pictures)
    same(ours.encode(pictures), codes, far, ours.decode(codes), images)
    assert ours.provenance["weights"] == {"model": "raw", "ema": "ema"}[nest]


def test_a_table_of_unit_vectors_is_left_alone(janus, converted):
    state = dict(janus.state_dict())
    state["quantize.embedding.weight"] = F.normalize(state["quantize.embedding.weight"], dim=-1)
    ours = converted("janus", state, image_size=64)
    assert ours.provenance["notes"][0].endswith("as they should")
    state["quantize.embedding.weight"][5] = 0
    with pytest.raises(ValueError, match="row 5 of the codebook is zero"):
        converted("janus", state, image_size=64)


# ---- refused


@pytest.fixture(scope="module")
def published(original, janus):
    """(format -> tensors of a good file) for every layout of the family."""
    taming = to_taming(original.state_dict())
    gumbel = {n: t for n, t in taming.items() if not n.startswith("quantize")}
    gumbel |= {"quantize.proj.weight": torch.zeros(CODES, DIM, 1, 1), "quantize.proj.bias": torch.zeros(CODES),
               "quantize.embed.weight": torch.zeros(CODES, DIM)}  # fmt: skip
    return {"taming": taming, "ldm": taming, "chameleon": taming, "gumbel-f8": gumbel, "janus": janus.state_dict(),
            "llamagen": to_llamagen(janus.state_dict()), "diffusers": original.state_dict()}  # fmt: skip


every = pytest.mark.parametrize("name", ["taming", "ldm", "chameleon", "gumbel-f8", "janus", "llamagen", "diffusers"])


@every
def test_a_key_missing_added_renamed_or_of_another_shape_is_named(published, converted, name):
    good = published[name]
    converted(name, good)
    for key in list(good)[:: max(1, len(good) // 6)] + [key for key in good if key.startswith("quant")]:
        less = {n: t for n, t in good.items() if n != key}
        with pytest.raises(ValueError, match=re.escape(key)):
            converted(name, less)
        with pytest.raises(ValueError, match=re.escape(key)):
            converted(name, {**less, f"{key}_renamed": good[key]})
        with pytest.raises(ValueError, match=re.escape(key)):
            converted(name, {**good, key: torch.cat([good[key]] * 2, dim=-1)})
    with pytest.raises(ValueError, match="unexpected: decoder.further.weight"):
        converted(name, {**good, "decoder.further.weight": torch.zeros(1)})


@every
def test_a_decoder_in_the_other_order_is_refused(published, converted, name):
    swap = {"llamagen": r"(decoder\.conv_blocks)\.(\d)", "diffusers": r"(decoder\.up_blocks)\.(\d)"}
    pattern = swap.get(name, r"(decoder\.up)\.(\d)")
    other = {re.sub(pattern, lambda f: f"{f[1]}.{2 - int(f[2])}", n): t for n, t in published[name].items()}
    with pytest.raises(ValueError, match=r"missing: decoder\.\w+\.\d\.(attn|attentions|block|res|resnets|up)"):
        converted(name, other)


@every
def test_another_vocabulary_than_the_config_says_is_refused(published, converted, tmp_path, name):
    field = {"chameleon": "num_embeddings", "janus": "num_embeddings", "llamagen": "codebook_size",
             "diffusers": "num_vq_embeddings"}.get(name, "n_embed")  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"params": {field: CODES * 2}}))
    with pytest.raises(ValueError, match=f"config says params.{field} = {CODES * 2}, the tensors say {CODES}"):
        converted(name, published[name], config=tmp_path / "config.json")


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"ch": 64}, "ddconfig.ch = 64, the tensors say 32"),
        ({"ch_mult": [1, 2, 2]}, "ddconfig.ch_mult = [1, 2, 2], the tensors say [1, 1, 2]"),
        ({"num_res_blocks": 2}, "ddconfig.num_res_blocks = 2, the tensors say 1"),
        ({"z_channels": 8}, "ddconfig.z_channels = 8, the tensors say 16"),
        ({"attn_resolutions": [32]}, "attn_resolutions = [32], the tensors say [16]"),
        ({"attn_type": "none"}, "attn_type = 'none', the tensors say 'vanilla'"),
        ({"double_z": True}, "ddconfig.double_z = True, the tensors say False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_says_otherwise_is_refused_by_its_field(published, converted, tmp_path, changes, line):
    config = {"model": {"params": {**CONFIG["model"]["params"], "ddconfig": {**DDCONFIG, **changes}}}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=re.escape(line)):
        converted("taming", published["taming"], config=tmp_path / "model.yaml")


def test_the_format_that_the_files_look_like_is_named(published, converted):
    with pytest.raises(ValueError, match="not of format taming; they look like llamagen"):
        converted("taming", published["llamagen"])
    with pytest.raises(ValueError, match="not of format llamagen; they look like diffusers"):
        converted("llamagen", published["diffusers"])
    with pytest.raises(ValueError, match="not of format taming; they look like gumbel-f8"):
        converted("taming", published["gumbel-f8"])
    with pytest.raises(ValueError, match="they look like chameleon or janus or ldm or taming"):
        converted("openai-dvae", published["taming"])
    with pytest.raises(ValueError, match="they look like no known format"):
        converted("taming", nn.Linear(2, 2).state_dict())


def test_what_no_tokenizer_can_be_made_of(original, published, converted, randomise, tmp_path):
    spatial = VQModel(block_out_channels=WIDTHS, layers_per_block=1, latent_channels=4, norm_type="spatial",
                      down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3)  # fmt: skip
    with pytest.raises(ValueError, match="spatial norm .MoVQ., which is not supported: decoder"):
        converted("diffusers", spatial.state_dict())
    (tmp_path / "config.json").write_text('{"lookup_from_codebook": true}')
    with pytest.raises(ValueError, match="aMUSEd's VQModel, whose pixels are .0, 1.: take the format amused$"):
        converted("diffusers", published["diffusers"], config=tmp_path / "config.json")
    with pytest.raises(ValueError, match="not of format amused; they look like diffusers "):
        converted("amused", published["diffusers"])
    (tmp_path / "config.json").write_text('{"norm_type": "spatial"}')
    with pytest.raises(ValueError, match="spatial norm .MoVQ., which is not supported: norm_type"):
        converted("diffusers", published["diffusers"], config=tmp_path / "config.json")
    encoder = {n: t for n, t in published["chameleon"].items() if not n.startswith("decoder.")}
    with pytest.raises(ValueError, match="decoder.conv_in.weight .*missing: take vqgan.ckpt"):
        converted("chameleon", encoder)
    with pytest.raises(ValueError, match="image_size = 130"):
        converted("taming", published["taming"], image_size=130)


def test_two_files_of_one_tensor_and_a_folder_of_several(published, converted, tmp_path):
    state = published["taming"]
    half = dict(list(state.items())[:40])
    with pytest.raises(ValueError, match="two of the files hold encoder"):
        converted("taming", state, half)
    rest = {name: tensor for name, tensor in state.items() if name not in half}
    assert converted("taming", half, rest, image_size=64).grid() == (16, 16)  # shards
    for name in ("a.bin", "b.bin"):
        torch.save(state, tmp_path / name)
    with pytest.raises(ValueError, match="holds several files of weights, .*a.bin, .*b.bin"):
        convert("diffusers", [tmp_path], tmp_path / "out")
