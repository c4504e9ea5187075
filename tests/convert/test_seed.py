"""SEED against what the published classes made of the same weights (fixtures/make_seed.py), and its layout."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from unitok.convert import convert, formats, narrow
from unitok.convert.base import Source
from unitok.convert.seed import TOWER, arguments, seed, theirs
from unitok.tokenizers.base import load_tokenizer
from unitok.tokenizers.seed import SeedTokenizer

FIXTURES = Path(__file__).parent / "fixtures"
spec = importlib.util.spec_from_file_location("make_seed", FIXTURES / "make_seed.py")
make_seed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_seed)

MADE = load_file(FIXTURES / "seed.safetensors")
with safe_open(FIXTURES / "seed.safetensors", "pt") as file:
    ABOUT = {key: json.loads(value) for key, value in file.metadata().items()}
IMAGES = MADE["images"].float() / 255
HEADS = list(make_seed.HEADS)
PUBLISHED = {name: tuple(shape) for name, shape in ABOUT["published"].items()}
TIE = 1e-4  # relative difference of the two nearest distances: all decisions are clearer


def state_of(head):
    return make_seed.draw(ABOUT[head], make_seed.HEADS[head][0])


def files_of(state):
    """As published: (seed_quantizer.pt, eva_vit_g.pth), the tower's names without their beginning."""
    tower = {name.removeprefix(TOWER): tensor for name, tensor in state.items() if name.startswith(TOWER)}
    return {name: tensor for name, tensor in state.items() if not name.startswith(TOWER)}, tower


def converted_state(state):
    return seed(Source((state,)), None)


# ---- the same numbers


@pytest.mark.parametrize("head", HEADS)
def test_codes_are_those_of_the_published_class(converted, head):
    tokenizer, expected = converted("seed", *files_of(state_of(head))), MADE[f"{head}.codes"].long()
    print(f"{head}: {len(expected.unique())} codes, the closest decision {MADE[f'{head}.gap'].min():.1e}")
    assert len(expected.unique()) > 25 and len(expected.unique(dim=0)) == len(IMAGES)
    assert (MADE[f"{head}.gap"] > TIE).all()
    assert torch.equal(tokenizer.encode(IMAGES), expected)
    features, _ = tokenizer.vision(IMAGES)
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(tokenizer.ln_vision(features)[:1], MADE[f"{head}.features"], **close)
    torch.testing.assert_close(tokenizer.queries(IMAGES)[0][:2], MADE[f"{head}.queries"], **close)
    torch.testing.assert_close(tokenizer.embed(expected), MADE[f"{head}.embedding"].unsqueeze(1), **close)


def test_without_causality_they_are_others():
    tokenizer = converted_state(state_of("mlp"))
    tokenizer.qformer.causal = False
    same = (tokenizer.encode(IMAGES) == MADE["mlp.codes"]).float().mean().item()
    print(f"{same:.0%} of the codes are the same with queries that see all")
    assert same < 0.5


def test_the_order_of_the_files_and_one_whole_file(tmp_path):
    state = state_of("mlp")
    quantizer, tower = files_of(state)
    for number, files in enumerate([(tower, quantizer), (state,)]):
        paths = [tmp_path / f"{number}-{i}.pt" for i in range(len(files))]
        for path, content in zip(paths, files, strict=True):
            torch.save(content, path)
        convert("seed", paths, tmp_path / "out", echo=lambda line: None)
        assert torch.equal(load_tokenizer(tmp_path / "out").encode(IMAGES), MADE["mlp.codes"].long())


def test_a_tower_in_half_precision(converted):
    """eva_vit_g.pth is in float16; it is kept in float32."""
    quantizer, tower = files_of(state_of("mlp"))
    tokenizer = converted("seed", quantizer, {name: tensor.half() for name, tensor in tower.items()})
    assert {p.dtype for p in tokenizer.parameters()} == {torch.float32}
    kept = tokenizer.vision.tower.encoder.layers[2].mlp.fc1.weight
    assert torch.equal(kept, tower["blocks.2.mlp.fc1.weight"].half().float())


# ---- the layout


def test_the_published_size_has_every_published_tensor_and_no_other():
    tower = {name for name in PUBLISHED if name.startswith(TOWER)}
    rest = PUBLISHED.keys() - tower
    assert (len(tower), len(rest)) == (511, 370)
    assert sum(math.prod(PUBLISHED[name]) for name in rest) == 164_104_512  # 164.1 million
    told = arguments(PUBLISHED)
    with torch.device("meta"):
        tokenizer, default = SeedTokenizer(**told), SeedTokenizer(target_size=1024)
    ours = {theirs(name): tuple(tensor.shape) for name, tensor in tokenizer.own_state().items()}
    for n in range(39):
        ours[f"{TOWER}blocks.{n}.attn.q_bias"] = ours[f"{TOWER}blocks.{n}.attn.v_bias"] = (1408,)
        assert ours.pop(f"{TOWER}blocks.{n}.attn.qkv.bias") == (3 * 1408,)
    ours["Qformer.bert.embeddings.position_ids"] = (1, 512)
    assert ours == PUBLISHED
    shapes = [{k: v.shape for k, v in t.own_state().items()} for t in (tokenizer, default)]
    assert shapes[0] == shapes[1]  # the arguments' defaults are the published ones
    assert (tokenizer.image_size, tokenizer.grid(), tokenizer.codebook_sizes) == (224, (32,), (8192,))


def test_a_fortieth_block_of_the_tower_is_not_used():
    more = {name.replace(".38.", ".39."): shape for name, shape in PUBLISHED.items() if ".38." in name}
    assert arguments({**PUBLISHED, **more})["vision"]["num_hidden_layers"] == 39


def test_what_else_the_files_hold_is_listed_and_left_out(tmp_path):
    quantizer, tower = files_of(state_of("mlp"))
    quantizer |= {f"Qformer.bert.encoder.layer.{n}.output.dense.weight": torch.zeros(3) for n in range(4)}
    quantizer |= {"text_proj.weight": torch.zeros(2, 2)}
    tower |= {"head.weight": torch.zeros(2, 2)}
    lines = []
    for name, content in (("q.pt", quantizer), ("e.pth", tower)):
        torch.save(content, tmp_path / name)
    made = convert("seed", [tmp_path / "q.pt", tmp_path / "e.pth"], tmp_path / "out", echo=lines.append)
    listed = "Qformer.bert.encoder.layer.*.output.dense.weight (4), text_proj.weight, visual_encoder.head.weight"
    assert lines[0] == f"6 tensors are no part of the tokenizer and were left out: {listed}"
    assert made.provenance["notes"] == lines[:1] and "Apache-2.0" in made.provenance["licence"]
    assert torch.equal(made.encode(IMAGES), MADE["mlp.codes"].long())


SAMPLE = [
    "ln_vision.bias", "query_tokens", "quantize.embedding.weight", "pos_embed", "pos_embed_image",
    "encode_task_layer.2.bias", "decode_task_layer.0.weight", "blocks.1.attn.qkv.bias", "blocks_image.0.mlp.fc2.weight",
    "image_down.4.weight", "distill_image_proj.bias", "Qformer.bert.embeddings.position_ids",
    "Qformer.bert.embeddings.LayerNorm.weight", "Qformer.bert.encoder.layer.3.attention.self.key.weight",
    "Qformer.bert.encoder.layer.2.crossattention.self.value.weight",
    "Qformer.bert.encoder.layer.1.output_query.LayerNorm.bias",
    *(TOWER + name for name in (
        "cls_token", "pos_embed", "patch_embed.proj.bias", "blocks.0.norm1.weight", "blocks.1.attn.q_bias",
        "blocks.2.attn.v_bias", "blocks.1.attn.qkv.weight", "blocks.2.mlp.fc1.bias")),
]  # fmt: skip


TELLING = ("query_tokens", "quantize.embedding.weight")


@pytest.mark.parametrize("fault", ["dropped", "renamed", "of another shape"])
@pytest.mark.parametrize("name", SAMPLE)
def test_a_tensor_that_does_not_fit_is_refused_by_name(name, fault):
    state = state_of("mlp")
    tensor = state.pop(name)
    if fault == "renamed":
        state[name + "_"] = tensor
    if fault == "of another shape":
        state[name] = torch.cat([tensor, tensor], dim=-1)
    # the sizes of these are the sizes of others, which then do not fit
    named = "of another shape" if fault == "of another shape" and name in TELLING else name.replace(".", r"\.")
    with pytest.raises(ValueError, match=named):
        converted_state(state)


@pytest.mark.parametrize("lost", [TOWER + "blocks.1.", "Qformer.bert.encoder.layer.1.", "blocks.0.", "blocks_image.1."])
def test_a_lost_layer_is_refused(lost):
    state = {name: tensor for name, tensor in state_of("mlp").items() if not name.startswith(lost)}
    with pytest.raises(ValueError, match="missing: .*" + lost.replace(".", r"\.")):
        converted_state(state)


def test_without_its_tower_it_is_refused(converted):
    with pytest.raises(ValueError, match=r"give eva_vit_g\.pth too"):
        converted("seed", files_of(state_of("mlp"))[0])


def test_another_image_size_is_refused(converted):
    with pytest.raises(ValueError, match="its image size is 28, no other"):
        converted("seed", *files_of(state_of("mlp")), image_size=56)


def test_no_other_format_takes_it_for_its_own(converted):
    source = Source((state_of("mlp"),))
    assert [f.name for f in formats().values() if f.detect(narrow(source, f).shapes)] == ["seed"]
    with pytest.raises(ValueError, match="they look like seed"):
        converted("taming", *files_of(state_of("mlp")))
