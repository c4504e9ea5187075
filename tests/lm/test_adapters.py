"""Adapters: LoRA inside the blocks, full training of the new rows at both ends, and not a bit of any old row."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

from unitok.lm.adapters import add_adapter, load_adapter, merge, save_adapter
from unitok.lm.expand import expand, expand_folder
from unitok.manifest import Manifest
from unitok.vocab import JointVocab

CODES = 40


@pytest.fixture
def expanded(tiny):
    """Callable: (family, tied) -> (model, vocabulary)."""

    def make(family="llama", tied=True):
        lm = tiny.lm(family, tied)
        return lm, expand(lm, None, None, "scenes", tiny.section(CODES))

    return make


def train(peft_model, ids, steps=3, **forward):
    peft_model.train()
    optimiser = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        peft_model(input_ids=ids, labels=ids, **forward).loss.backward()
        optimiser.step()
    return peft_model.eval()


def ends(lm):
    return [lm.get_input_embeddings().weight.detach(), lm.get_output_embeddings().weight.detach()]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3", "phi"])
def test_training_moves_new_rows_at_both_ends_and_no_old_one(family, tied, tiny, expanded):
    lm, vocab = expanded(family, tied)
    before, ids = [end.clone() for end in ends(lm)], tiny.ids(vocab.rows)
    start = tiny.logits(lm, ids)
    peft_model = add_adapter(lm, vocab, rank=4, alpha=8)
    assert torch.equal(tiny.logits(peft_model, ids), start)  # the bias of phi's head included

    trained = tiny.logits(train(peft_model, ids), ids)
    assert not torch.allclose(trained, start, atol=1e-3)
    adapted = {name.split(".lora_A")[0] for name, _ in peft_model.named_parameters() if ".lora_A" in name}
    assert adapted and not any("lm_head" in name or "embed" in name or "wte" in name for name in adapted)

    merged = merge(peft_model)
    assert type(merged) is type(tiny.lm(family, tied))
    assert torch.allclose(tiny.logits(merged, ids), trained, atol=1e-5)
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    for old, new in zip(before, ends(merged), strict=True):
        assert torch.equal(new[: tiny.rows], old[: tiny.rows])
        assert (new[tiny.rows :] != old[tiny.rows :]).all(dim=1).sum() == vocab.rows - tiny.rows


def test_peft_alone_drops_the_bias_of_the_head(tiny, expanded):
    """The control arm of the test above: where this fails, `_restore_head_bias` can go."""
    lm, vocab = expanded("phi", False)
    ids = tiny.ids(vocab.rows)
    start = tiny.logits(lm, ids)
    peft_model = get_peft_model(
        lm, LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [tiny.rows]})
    )
    assert not torch.allclose(tiny.logits(peft_model, ids), start, atol=0.1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_saved_and_reloaded_it_is_the_same(family, tied, tiny, expanded, tmp_path):
    lm, vocab = expanded(family, tied)
    lm.save_pretrained(tmp_path / "model")
    manifest = Manifest(tokenizers={"scenes": tiny.section(CODES)}, vocab=vocab.to_dict())
    manifest.save(tmp_path / "model")
    ids = tiny.ids(vocab.rows)
    peft_model = train(add_adapter(lm, vocab, rank=4, alpha=8), ids)
    trained = tiny.logits(peft_model, ids)
    folder = save_adapter(peft_model, tmp_path / "adapter", manifest, base=tmp_path / "model")

    loaded = load_adapter(folder)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.allclose(tiny.logits(loaded, ids), trained, atol=1e-6)
    assert Manifest.load(folder) == manifest
    again = load_adapter(folder, tmp_path / "model", trainable=True)
    assert not torch.allclose(tiny.logits(train(again, ids, steps=1), ids), trained, atol=1e-4)
    if family != "phi":
        fresh = type(lm).from_pretrained(tmp_path / "model")
        assert torch.allclose(tiny.logits(PeftModel.from_pretrained(fresh, folder).eval(), ids), trained, atol=1e-6)

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    rows = {key: shape for key, shape in shapes.items() if "lora" not in key}
    assert list(rows.values()) == [[vocab.rows - tiny.rows, 32]] * (1 if tied else 2)
    assert all(4 in shape for key, shape in shapes.items() if "lora" in key)


def test_an_adapter_of_another_model_is_refused(tiny, lm_folder, tmp_path):
    model = expand_folder(lm_folder(), tiny.tokenizer_folder(tmp_path / "t"), tmp_path / "model", name="scenes")
    manifest = Manifest.load(model)
    vocab = JointVocab.from_dict(manifest.vocab)
    lm = tiny.lm("llama", True)
    expand(lm, None, None, "scenes", tiny.section(CODES))
    folder = save_adapter(add_adapter(lm, vocab), tmp_path / "adapter", manifest, base=model)
    load_adapter(folder)

    other_tokenizer = tiny.tokenizer_folder(tmp_path / "t2", weight_hash="x" * 64)
    other = expand_folder(lm_folder(), other_tokenizer, tmp_path / "other", name="scenes")
    with pytest.raises(ValueError, match=r"tokenizers\.scenes\.weight_hash is .* in adapter, .* in model"):
        load_adapter(folder, other)
    with pytest.raises(ValueError, match="has 128 rows"):
        load_adapter(folder, tiny.lm("llama", True))
    wider, _ = tiny.lm("gpt2", True), expand
    expand(wider, None, None, "scenes", tiny.section(CODES))
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        load_adapter(folder, wider)


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens", "v_proj"], r".*(q_proj|lm_head)"])
@pytest.mark.parametrize("rows", ["new", "none"])
def test_targets_may_not_take_in_the_ends(targets, rows, expanded):
    lm, vocab = expanded("llama", False)
    with pytest.raises(ValueError, match="whose text rows would move"):
        add_adapter(lm, vocab, targets=targets, rows=rows)


def test_named_targets_and_no_rows(tiny, expanded):
    lm, vocab = expanded("llama", False)
    before, ids = [end.clone() for end in ends(lm)], tiny.ids(vocab.rows)
    peft_model = train(add_adapter(lm, vocab, rank=2, targets=["q_proj", "v_proj"], rows="none"), ids)
    trainable = {name.split(".lora_")[0].split(".")[-1] for name, p in peft_model.named_parameters() if p.requires_grad}
    assert trainable == {"q_proj", "v_proj"}
    assert all(torch.equal(*pair) for pair in zip(before, ends(merge(peft_model)), strict=True))
    with pytest.raises(ValueError, match="'new' or 'none'"):
        add_adapter(lm, vocab, rows="all")
    with pytest.raises(ValueError, match="expand it first"):
        add_adapter(tiny.lm("llama", True), vocab)


def test_the_seed_decides_the_start_and_the_global_generator_is_left(expanded):
    def matrix(seed):
        torch.manual_seed(5)
        lm, vocab = expanded()
        torch.manual_seed(5)
        state = torch.get_rng_state()
        peft_model = add_adapter(lm, vocab, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return next(p.detach() for name, p in peft_model.named_parameters() if "lora_A" in name)

    assert torch.equal(matrix(0), matrix(0))
    assert not torch.equal(matrix(0), matrix(1))


@pytest.mark.parametrize("rows", ["new", "none"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(rows, reentrant, tiny, expanded):
    def gradients(checkpointing):
        lm, vocab = expanded("llama", False)
        if checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        peft_model = add_adapter(lm, vocab, rank=4, rows=rows).train()
        ids = tiny.ids(vocab.rows)
        peft_model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad}

    plain, saving = gradients(False), gradients(True)
    assert plain.keys() == saving.keys() and all(g is not None for g in plain.values())
    assert all(torch.allclose(plain[name], saving[name], atol=1e-7) for name in plain)


def test_half_precision_bases_train_in_full_precision_and_merge_into_their_own(tiny, expanded):
    lm, vocab = expanded("llama", True)
    lm.bfloat16()
    old, ids = ends(lm)[0].clone(), tiny.ids(vocab.rows)
    peft_model = add_adapter(lm, vocab, rank=4)
    assert {p.dtype for p in peft_model.parameters() if p.requires_grad} == {torch.float32}
    train(peft_model, ids)
    merged = merge(peft_model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(ends(merged)[0][: tiny.rows], old[: tiny.rows])


def test_adding_saving_and_merging_warn_of_nothing(tiny, expanded, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # between peft and transformers
        for family, tied in (("llama", True), ("gpt2", False)):
            lm, vocab = expanded(family, tied)
            peft_model = add_adapter(lm, vocab, rank=2)
            save_adapter(peft_model, tmp_path / family, Manifest(vocab=vocab.to_dict()))
            merge(peft_model)
