"""Attention document by document beside the same rows under one mask: equal logits, equal gradients."""

import contextlib

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

from unitok.data.packing import collate, share_prefixes
from unitok.data.render import IMAGE, TEXT, Rendered
from unitok.training import attention

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
WINDOWED = {
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
}


def document(length, seed, codes=0):
    rng = np.random.default_rng(seed)
    modality = np.array([IMAGE] * codes + [TEXT] * (length - codes), np.int8)
    return Rendered(rng.integers(3, 60, length), (modality == TEXT).astype(np.float32), modality)


def packed():
    """Two rows: documents with and without branches, of one id, and padding."""
    [branched] = share_prefixes(asked(), 40)
    assert len(branched.ids) == 16
    return collate([[document(9, 3), branched, document(1, 4)], [document(7, 5), document(14, 6)]], 30)


def asked():
    """Two questions about one picture."""
    first, second = document(12, 1, codes=6), document(10, 2, codes=6)
    first.weights[6] = second.weights[6] = 0
    return first, Rendered(np.append(first.ids[:6], second.ids[6:]), second.weights, second.modality)


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_one_mask_computes(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="sdpa").eval()
    batch = packed()
    real = batch.document >= 0
    parameters = list(model.parameters())
    wanted = model(**batch.inputs()).logits[real]
    gradients = torch.autograd.grad(wanted.square().sum(), parameters)

    assert attention.use(model)
    torch.testing.assert_close(model(**batch.inputs()).logits[real], wanted)  # with its mask, as before
    with attention.documents(batch):
        mine = model(**batch.inputs(masked=False)).logits[real]
        own = torch.autograd.grad(mine.square().sum(), parameters)
    torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=1e-5)
    for one, other in zip(own, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    leaking = model(**batch.inputs(masked=False)).logits[real]  # outside nobody keeps the branches apart
    assert (leaking - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("by_document", [True, False])
@pytest.mark.parametrize("name", WINDOWED)
def test_documents_longer_than_the_window_of_a_model_get_what_they_get_alone(name, by_document):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(WINDOWED[name], attn_implementation="sdpa").eval()
    batch, (first, second) = packed(), asked()
    with torch.no_grad():
        alone = [model(input_ids=torch.from_numpy(d.ids)[None]).logits[0] for d in (document(9, 3), first, second)]
        if by_document:
            assert attention.use(model)
        with attention.documents(batch) if by_document else contextlib.nullcontext():
            row = model(**batch.inputs(not by_document, attention.windows(model))).logits[0]
            far = model(**batch.inputs()).logits[0]
    torch.testing.assert_close(row[:9], alone[0])
    torch.testing.assert_close(row[9:21], alone[1])
    torch.testing.assert_close(row[21:25], alone[2][6:])
    assert (far - row)[9:25].abs().max() > 1e-3  # a mask that says nothing of the window


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_see_all_have_no_window(name):
    assert attention.windows(AutoModelForCausalLM.from_config(MODELS[name])) == {"": None}


def test_it_ends_where_an_exception_leaves_it():
    model = AutoModelForCausalLM.from_config(MODELS["llama"], attn_implementation="sdpa").eval()
    assert attention.use(model)
    alone = torch.arange(5)[None]
    with torch.no_grad():
        before = model(input_ids=alone).logits
        with pytest.raises(ZeroDivisionError), attention.documents(packed()):
            raise ZeroDivisionError
        torch.testing.assert_close(model(input_ids=alone).logits, before)


def test_a_model_that_does_not_use_sdpa_is_left_alone():
    model = AutoModelForCausalLM.from_config(MODELS["llama"], attn_implementation="eager")
    assert not attention.use(model)
    assert model.config._attn_implementation == "eager"
