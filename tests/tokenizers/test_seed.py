"""SEED: causality, its losses against their definitions, what stays frozen, and learning; the published class is in
tests/convert/test_seed.py."""

import json
import math
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
)

from unitok.nn.qformer import causal_mask, make_qformer
from unitok.nn.vision import FrozenVision, open_tower
from unitok.tokenizers.base import load_tokenizer
from unitok.tokenizers.seed import SMOOTHING, SeedTokenizer

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGHT = {**TOWER, "image_size": 16, "patch_size": 4}
SMALL = {
    "image_size": 16, "tokens": 8, "width": 32, "layers": 4, "heads": 2, "codebook_size": 64, "code_dim": 8, "depth": 1,
    "head_sizes": (16, 8), "text_tokenizer": "builtin:scenes", "embedding": 16,
}  # fmt: skip
TEXTS = ["a red circle", "two blue squares", "a red circle", "nothing"]
COLOURS = ["red", "green", "blue", "white", "yellow", "purple", "black", "gray"]


def clip(seed=0, projection=24):
    torch.manual_seed(seed)
    text = {**TOWER, "vocab_size": 460, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=SIGHT, projection_dim=projection)).eval()


@pytest.fixture
def folder(tmp_path):
    clip().save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def images():
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def seed():
    torch.manual_seed(0)
    return SeedTokenizer.tiny()


# ---- causality


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_query_sees_a_later_one(attention):
    torch.manual_seed(0)
    qformer = make_qformer(24, 4, 3, 10, causal=True).eval()
    qformer.set_attn_implementation(attention)
    queries, features = torch.randn(6, 24, requires_grad=True), torch.randn(1, 5, 10)
    jacobian = torch.autograd.functional.jacobian(lambda q: qformer.read(q, features)[0], queries)
    reach = jacobian.abs().amax(dim=(1, 3))  # [output, query]
    print(f"{attention}: the least that is seen {reach[torch.ones(6, 6).tril().bool()].min():.1e}, of what is later 0")
    assert (reach.triu(1) == 0).all() and (reach.tril() > 0).sum() == 21
    qformer.causal = False
    jacobian = torch.autograd.functional.jacobian(lambda q: qformer.read(q, features)[0], queries)
    assert (jacobian.abs().amax(dim=(1, 3)) > 0).all()  # the control


def test_a_boolean_mask_would_leak():
    """Why the mask is one of numbers: transformers' eager attention adds a boolean one to the scores."""
    qformer = make_qformer(24, 1, 3, 10).eval()
    qformer.set_attn_implementation("eager")
    mask, queries, features = causal_mask(6, torch.zeros(())), torch.randn(1, 6, 24), torch.randn(1, 5, 10)
    assert mask.dtype == torch.float32

    def first(mask, queries):
        return qformer(query_embeds=queries, attention_mask=mask, encoder_hidden_states=features)[0][:, 0]

    other = torch.cat([queries[:, :1], torch.randn(1, 5, 24)], 1)
    assert torch.equal(first(mask, queries), first(mask, other))
    assert not torch.equal(first(mask == 0, queries), first(mask == 0, other))


def test_codes_do_not_depend_on_later_queries(seed, images):
    codes = seed.encode(images)
    with torch.no_grad():
        seed.query_tokens[:, 5:] += torch.randn(3, 32)
    again = seed.encode(images)
    assert torch.equal(again[:, :5], codes[:, :5]) and not torch.equal(again, codes)


# ---- frozen parts


def trained(seed, images, stage, steps=3):
    """Names of the parameters and buffers that some steps changed, with weight decay."""
    before = {name: tensor.clone() for name, tensor in seed.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in seed.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    seed.train()
    for n in range(steps):
        loss, _ = seed.loss({"images": images, "texts": TEXTS}, n, stage)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name for name, tensor in seed.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("head", ["mlp", "reverse"])
def test_each_stage_trains_its_parts_and_no_other(images, head):
    torch.manual_seed(0)
    seed = SeedTokenizer(vision={"model_type": "clip_vision_model", **SIGHT, "projection_dim": 24}, **SMALL, head=head)
    reader = {name for name, _ in seed.named_parameters() if not name.startswith("vision.")}
    codes = {"quantize", "encode_task_layer", "decode_task_layer", "pos_embed", "blocks", "pos_embed_image",
             "blocks_image", "image_down", "distill_image_proj", "reverse_tokens", "reverse_qformer"}  # fmt: skip
    second = {name for name in reader if name.split(".")[0] in codes}
    # a key's bias moves all scores of a query alike; words and heads that are not there have no gradient
    still = {name for name in reader if name.endswith("key.bias")}
    assert trained(seed, images, "contrastive") - still == reader - second - still
    # what only queries or only one vector see of each other: a lone query's own attention is 1 whatever its weights
    alone = {n for n in second if n.startswith("reverse_qformer") and ".attention.attention." in n and "value" not in n}
    assert trained(seed, images, "codes") - still - alone == second - still - alone


def test_the_tower_takes_no_gradient_and_stays_in_eval_mode(seed, images):
    seed.train()
    assert seed.training and seed.qformer.training and not any(m.training for m in seed.vision.modules())
    features, image = seed.vision(images)
    assert not features.requires_grad and not image.requires_grad
    assert not any(p.requires_grad for p in seed.vision.parameters())


def test_dropout_is_off_where_the_qformer_is_frozen(images):
    torch.manual_seed(0)
    seed = SeedTokenizer(
        vision={"model_type": "clip_vision_model", **SIGHT, "projection_dim": 24}, **SMALL, dropout=0.5
    ).train()
    batch = {"images": images, "texts": TEXTS}
    values = [seed.loss(batch, 0, stage)[0].item() for stage in ("codes", "codes", "contrastive", "contrastive")]
    assert values[0] == values[1] and values[2] != values[3]


# ---- losses


def test_pictures_of_one_caption_share_their_label(seed, images):
    loss, parts = seed.loss({"images": images, "texts": TEXTS}, 0, "contrastive")
    scores = seed.contrastive(images=images) @ seed.text_embedding(TEXTS).T / 0.07
    expected = 0.0
    for logits in (scores, scores.T):
        for i, row in enumerate(logits.log_softmax(1)):
            same = [j for j, text in enumerate(TEXTS) if text == TEXTS[i]]
            expected -= (1 - SMOOTHING) * sum(row[j] for j in same) / len(same) + SMOOTHING * row.mean()
    torch.testing.assert_close(loss, expected / 8)
    torch.testing.assert_close(parts["temperature"], torch.tensor(0.07))
    different = [f"{text} {i}" for i, text in enumerate(["red", "blue", "green", "white"])]
    loss, _ = seed.loss({"images": images, "texts": different}, 0, "contrastive")
    scores = seed.contrastive(images=images) @ seed.text_embedding(different).T / 0.07
    plain = [F.cross_entropy(s, torch.arange(4), label_smoothing=0.1) for s in (scores, scores.T)]
    torch.testing.assert_close(loss, sum(plain) / 2)


def test_the_losses_of_the_codes(seed, images):
    loss, parts = seed.loss({"images": images}, 0, "codes")
    with torch.no_grad():
        out, image = seed.queries(images)
        z = seed.encode_task_layer(out)
        chosen = seed.quantize.embedding.weight[seed.encode(images)]
        legacy = (z - chosen).square().mean() * 1.25  # commitment 1, codebook 0.25: equal numbers, other gradients
        cosine = 1 - F.cosine_similarity(seed.rebuilt(chosen), out, dim=-1).mean()
        regression = (seed.embed(seed.encode(images))[:, 0] - image).square().mean()
    torch.testing.assert_close(parts["quantizer"], legacy)
    torch.testing.assert_close(parts["cosine"], cosine)
    torch.testing.assert_close(parts["image"], regression)
    torch.testing.assert_close(loss.detach(), 5 * legacy + 2 * cosine + 0.5 * regression)
    vector = torch.zeros_like(z, requires_grad=True)
    seed.quantize(vector, 0)[2].backward()
    codes = seed.quantize.embedding.weight
    assert vector.grad.norm() > 0 and codes.grad.norm() > 0
    count = torch.zeros(64).index_add(0, seed.quantize.encode(vector).flatten(), torch.ones(z[..., 0].numel()))
    n = count.argmax()
    torch.testing.assert_close(codes.grad[n] / count[n], 0.25 * 2 * codes[n].detach() / z.numel())
    torch.testing.assert_close(
        vector.grad[0, 0], -2 * codes[seed.quantize.encode(vector)[0, 0, 0]].detach() / z.numel()
    )


def test_the_target_is_the_image_embedding_of_a_clip(folder, images, tmp_path):
    """The tower's own, or that of another folder, which no saved folder holds."""
    other = clip(seed=5, projection=12)
    other.save_pretrained(tmp_path / "other")
    for target, model, size in ((None, clip(), 24), (str(tmp_path / "other"), other, 12)):
        seed = SeedTokenizer(vision=str(folder), target=target, target_size=None if target is None else size, **SMALL)
        _, parts = seed.loss({"images": images}, 0, "codes")
        with torch.no_grad():
            goal = model.get_image_features(pixel_values=images * 2 - 1).pooler_output
            expected = (seed.embed(seed.encode(images))[:, 0] - goal).square().mean()
        assert seed.embed(seed.encode(images)).shape == (4, 1, size) and goal.norm(dim=1).sub(1).abs().min() > 1e-3
        torch.testing.assert_close(parts["image"], expected)
        assert len(seed.own_state()) == len(seed.state_dict()) and not any("target" in n for n in seed.state_dict())
    seed = SeedTokenizer(vision=str(folder), target=str(tmp_path / "other"), **SMALL)
    with pytest.raises(ValueError, match="its image embedding has size 12, expected 24"):
        seed.loss({"images": images}, 0, "codes")


# ---- texts


def test_a_caption_is_read_alone_whatever_stands_beside_it(seed):
    short, long = "a red circle", "a red circle above a blue square left of three green triangles"
    together = seed.text_embedding([short, long])
    torch.testing.assert_close(together[:1], seed.text_embedding([short]), atol=1e-6, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-3
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))
    ids, there = seed._ids([short, long])
    assert there.sum(1).tolist()[0] == 5 and ids[0, 0] == ids[1, 0] == 1 and ids[0, 4] == 2  # <s> ... </s>
    ids, _ = seed._ids(["red " * 100])
    assert ids.shape == (1, 32) and ids[0, -1] == 2


def test_embeddings_from_codes_and_from_pictures(seed, images):
    codes = seed.encode(images)
    with torch.no_grad():
        found = seed.contrastive(codes=codes)
        rebuilt = seed.rebuilt(seed.quantize.vectors(codes.unsqueeze(-1)))
        torch.testing.assert_close(found, F.normalize(seed.vision_proj(rebuilt[:, -1]), dim=-1))
        torch.testing.assert_close(found[:1], seed.contrastive(codes=codes[:1]))
        last = F.normalize(seed.vision_proj(seed.queries(images)[0][:, -1]), dim=-1)
        torch.testing.assert_close(seed.contrastive(images=images), last)
    for wrong in ({}, {"images": images, "codes": codes}):
        with pytest.raises(ValueError, match="give either images or codes"):
            seed.contrastive(**wrong)


def test_codes_come_to_find_their_captions():
    """Eight colours, from nothing: both stages in seconds, against the untrained one and captions of other pictures."""
    torch.manual_seed(0)
    seed = SeedTokenizer.tiny()
    pictures = torch.rand(8, 3, 1, 1).round().expand(8, 3, 16, 16)
    pictures = torch.stack([torch.tensor([(i >> b) & 1 for b in range(3)]).float() for i in range(8)])
    pictures = (0.1 + 0.8 * pictures)[:, :, None, None].expand(8, 3, 16, 16)
    texts = [f"a {colour} circle" for colour in COLOURS]

    def right():
        seed.eval()
        with torch.no_grad():
            scores = seed.contrastive(codes=seed.encode(pictures)) @ seed.text_embedding(texts).T
        return [(s.argmax(1) == torch.arange(8)).float().mean().item() for s in (scores, scores.T)]

    untrained = right()
    for stage, steps in (("contrastive", 100), ("codes", 150)):
        seed.train()
        optimizer = torch.optim.AdamW([p for p in seed.parameters() if p.requires_grad], lr=3e-3)
        for n in range(steps):
            noisy = (pictures + 0.05 * torch.randn(8, 3, 16, 16)).clamp(0, 1)
            loss, _ = seed.loss({"images": noisy, "texts": texts}, n, stage)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = right()
    print(f"R@1 from codes among 8: {found}, untrained {untrained}")
    assert min(found) >= 0.75 and max(untrained) <= 0.25


# ---- where the tower comes from


def test_a_saved_folder_needs_no_other(folder, images, tmp_path):
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.3] * 3}))
    seed = SeedTokenizer(vision=str(folder), **SMALL).eval()
    expected = clip().vision_model((images - 0.4) / 0.3).last_hidden_state
    torch.testing.assert_close(seed.vision(images)[0], expected)
    seed.save_pretrained(tmp_path / "seed")
    shutil.rmtree(folder)
    loaded = load_tokenizer(tmp_path / "seed")
    assert torch.equal(loaded.encode(images), seed.encode(images)) and loaded.config == seed.config
    with torch.no_grad():
        assert torch.equal(loaded.text_embedding(TEXTS), seed.text_embedding(TEXTS))
    assert loaded.config["vision"]["model_type"] == "clip_vision_model" and loaded.config["mean"] == [0.4] * 3
    loaded.loss({"images": images}, 0, "codes")  # its own tower gives the target


def test_a_tower_that_is_not_copied_must_be_the_same_again(folder, images, tmp_path):
    seed = SeedTokenizer(vision=str(folder), copy_vision=False, **SMALL).eval()
    assert not any(name.startswith("vision.") for name in seed.own_state())
    seed.save_pretrained(tmp_path / "seed")
    assert torch.equal(load_tokenizer(tmp_path / "seed").encode(images), seed.encode(images))
    clip(seed=1).save_pretrained(folder)
    with pytest.raises(ValueError, match="its weights are not those that this tokenizer saw"):
        load_tokenizer(tmp_path / "seed")


def test_towers_of_other_kinds(images, tmp_path):
    torch.manual_seed(0)
    blip = Blip2ForImageTextRetrieval(Blip2Config(
        vision_config={**SIGHT, "initializer_range": 0.1},
        qformer_config={**TOWER, "encoder_hidden_size": 32, "vocab_size": 9, "use_qformer_text_input": True},
    )).eval()  # fmt: skip
    torch.nn.init.normal_(blip.vision_model.post_layernorm.bias)
    siglip = SiglipModel(SiglipConfig(text_config={**TOWER, "vocab_size": 9}, vision_config=SIGHT)).eval()
    dino = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                                    patch_size=4)).eval()  # fmt: skip
    pixels = images * 2 - 1
    for name, model, tower in (("blip", blip, blip.vision_model), ("siglip", siglip, siglip.vision_model),
                               ("dino", dino, dino)):  # fmt: skip
        model.save_pretrained(tmp_path / name)
        found = FrozenVision(open_tower(tmp_path / name), [0.5] * 3, [0.5] * 3)
        norm = found.take_norm()
        features, image = found(images)
        with torch.no_grad():
            seen = norm(features) if name == "blip" else features  # BLIP-2 norms its features: SEED does it, and trains
            torch.testing.assert_close(seen, tower(pixels).last_hidden_state, atol=2e-4, rtol=0)
        assert image is None and found.projected == 0
        seed = SeedTokenizer(vision=str(tmp_path / name), target_size=5, **SMALL)
        seed.save_pretrained(tmp_path / "seed")
        assert torch.equal(load_tokenizer(tmp_path / "seed").encode(images), seed.eval().encode(images))
        with pytest.raises(ValueError, match="has no image embedding to learn: name a CLIP as target"):
            seed.loss({"images": images}, 0, "codes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "linear"}, "seed cannot have head = linear"),
        ({"width": 33}, "seed cannot have width = 33"),
        ({"image_size": 32}, "image_size is 32, but the vision tower's is 16"),
        ({"vision": "nowhere/else/at all"}, "no such folder"),
        ({"vision": "builtin:scenes"}, "no vision tower can be read from it"),
        ({"text_tokenizer": "nowhere/else/at all"}, "no text tokenizer could be loaded"),
        ({"vision": {"model_type": "blip_2_vision_model", **SIGHT}}, "seed needs target_size"),
    ],
)
def test_what_cannot_be_is_refused(folder, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        SeedTokenizer(**{"vision": str(folder), **SMALL, **change})


def test_without_captions_there_is_no_contrastive_stage(folder, images):
    seed = SeedTokenizer(vision=str(folder), **{**SMALL, "text_tokenizer": None})
    assert not any("text" in name for name in seed.state_dict())
    for call in (
        lambda: seed.text_embedding(["x"]),
        lambda: seed.loss({"images": images, "texts": TEXTS}, 0, "contrastive"),
    ):
        with pytest.raises(ValueError, match="reads no captions: train it with text_tokenizer"):
            call()
    with pytest.raises(ValueError, match="seed has the stages contrastive, codes, not 'main'"):
        seed.loss({"images": images}, 0)


def test_bfloat16_autocast_trains(seed, images):
    for stage in seed.stages:
        batch = {"images": images, "texts": TEXTS}
        exact = seed.loss(batch, 0, stage)[0].item()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = seed.loss(batch, 0, stage)
        loss.backward()
        assert math.isclose(loss.item(), exact, rel_tol=0.05)


# ---- several processes


def _worker(rank, port, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    loss, gradient = _loss_of(slice(2 * rank, 2 * rank + 2))
    for tensor in (loss, gradient):
        dist.all_reduce(tensor)
    torch.save((loss / 2, gradient / 2), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def _loss_of(rows):
    torch.manual_seed(0)
    seed = SeedTokenizer.tiny().double()  # single precision sums in an order of each machine's own
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    loss, _ = seed.loss({"images": images[rows], "texts": TEXTS[rows]}, 0, "contrastive")
    loss.backward()
    return loss.detach(), seed.query_tokens.grad


def test_two_processes_see_each_other_s_negatives(tmp_path):
    """Their mean loss and gradient are those of one process with all pictures."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (port, str(tmp_path)), nprocs=2)
    expected = _loss_of(slice(0, 4))
    for rank in range(2):
        for found, one in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, one, atol=1e-12, rtol=1e-9)
