"""The loop against references: uncached forwards, Hugging Face's generate, each row alone."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from unitok.sampling.decode import generate_ids
from unitok.sampling.grammar import Grammar
from unitok.sampling.rows import Rows
from unitok.vocab import Codebook, ImageVocab, JointVocab

TEXT_SIZE, EOS = 50, 1
VOCAB = JointVocab(56).add("a", [40], (3, 3)).add("b", [12, 6], (2, 2), layout=("begin", "size", "rows", "end"))
SMALL = {"vocab_size": VOCAB.rows, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160, "initializer_range": 0.3,
         "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}  # fmt: skip
HEAD = {"head_dim": 8}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB.rows,
            n_positions=160,
            n_embd=32,
            n_layer=3,
            n_head=4,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    ),  # fmt: skip
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, **HEAD)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, **HEAD, **WINDOW, query_pre_attn_scalar=8, final_logit_softcapping=2.0)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **HEAD, **WINDOW, query_pre_attn_scalar=8)),
}


@pytest.fixture(scope="module")
def models():
    built = {}

    def get(name: str):
        if name not in built:
            torch.manual_seed(0)
            built[name] = ARCHITECTURES[name]().eval()
        return built[name]

    return get


def prompts(count: int, seed: int = 0, longest: int = 14) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, TEXT_SIZE, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


# --- the forward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cached_equals_uncached(models, name):
    """Rows added, realigned and dropped in the middle see what an uncached forward of each alone sees."""
    lm = models(name)
    grammar = Grammar(VOCAB, VOCAB.rows)
    everything = np.arange(VOCAB.rows)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        rows = Rows(lm, [everything, *grammar.kinds[1:]])
        streams = prompts(4)
        rows.add(streams)
        for step in range(12):
            new = rng.integers(0, VOCAB.rows, (len(streams), 1 + step % 2))
            streams = [stream + ids for stream, ids in zip(streams, new.tolist(), strict=True)]
            last = rows.feed(new)
            alone = torch.stack([lm(torch.tensor([stream])).logits[0, -1] for stream in streams])
            assert torch.allclose(rows.logits(last, 0), alone, atol=2e-4)
            if step == 3:  # longer than all that is there, shorter, empty, and one twice
                more = [*prompts(2, seed=5), rng.integers(3, 50, 40).tolist(), [], streams[0][:2], streams[0][:2]]
                rows.add(more)
                streams = streams + more
            if step == 7:
                rows.keep(np.array([1, 4, 6, 7, 9]))
                streams = [streams[i] for i in (1, 4, 6, 7, 9)]


def softmax_of_masked(logits: torch.Tensor, ids: np.ndarray) -> torch.Tensor:
    mask = torch.full_like(logits, float("-inf"))
    mask[:, ids] = 0
    return (logits + mask).softmax(1)[:, ids]


@pytest.mark.parametrize("variant", [*ARCHITECTURES, "bias", "table", "lora", "scaled"])
def test_slice_equals_mask(models, variant):
    lm, vocab = models(variant if variant in ARCHITECTURES else "llama"), VOCAB
    if variant == "bias":
        lm = copy.deepcopy(lm)
        lm.lm_head = nn.Linear(32, VOCAB.rows)
    elif variant == "table":
        ids = np.random.default_rng(0).permutation(np.arange(5, 45))
        image = ImageVocab((Codebook(40, table=tuple(ids.tolist())),), (3, 3), {"begin": 3, "end": 4})
        vocab = JointVocab(56, {"t": image})
    elif variant == "lora":
        lm = with_lora(lm)
    elif variant == "scaled":
        lm = Scaled(lm.config).eval()
    grammar = Grammar(vocab, TEXT_SIZE, [EOS])
    streams = prompts(5)
    with torch.no_grad():
        rows = Rows(lm, grammar.kinds)
        assert (rows.head is None) == (variant in ("gemma2", "lora", "scaled"))
        rows.add([stream[:-1] for stream in streams])
        last = rows.feed(np.array([stream[-1:] for stream in streams]))
        full = torch.stack([lm(input_ids=torch.tensor([stream])).logits[0, -1] for stream in streams])
        for kind, ids in enumerate(grammar.kinds):
            sliced = rows.logits(last, kind).softmax(1)
            assert torch.allclose(sliced, softmax_of_masked(full, ids), atol=1e-5)


class Scaled(LlamaForCausalLM):
    """A head that is more than its linear map, and says so nowhere."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / 3
        return out


def with_lora(lm):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    new = list(range(56, VOCAB.rows))
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False,
                        trainable_token_indices={"embed_tokens": new, "lm_head": new})  # fmt: skip
    wrapped = get_peft_model(copy.deepcopy(lm), config).eval()
    for name, parameter in wrapped.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return wrapped


def test_adapter_equals_merged(models):
    wrapped = with_lora(models("llama"))
    given = {"text_size": TEXT_SIZE, "force_image": ["a", "b", None], "max_new_tokens": 20, "seeds": [1, 2, 3]}
    ids = generate_ids(wrapped, prompts(3), VOCAB, **given)
    base = generate_ids(models("llama"), prompts(3), VOCAB, **given)
    merged = wrapped.merge_and_unload()
    assert ids == generate_ids(merged, prompts(3), VOCAB, **given) != base


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_text_is_hugging_face_s(models, name):
    lm, given = models(name), prompts(6, seed=3)
    got = generate_ids(lm, given, None, text_size=VOCAB.rows, eos_ids=[EOS], max_new_tokens=24, temperature=0)
    for ids, prompt in zip(got, given, strict=True):
        out = lm.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=EOS, pad_token_id=2)
        assert ids == [i for i in out[0, len(prompt) :].tolist() if i != EOS]


def test_rows_between_tokenizer_and_embedding_are_never_emitted(models):
    lm = copy.deepcopy(models("llama"))
    lm.lm_head = nn.Linear(32, VOCAB.rows)
    lm.lm_head.bias.data[TEXT_SIZE:] = 50  # all that is no text is wanted most
    given = {"text_size": TEXT_SIZE, "max_new_tokens": 40, "seeds": range(20)}
    got = generate_ids(lm, prompts(20), VOCAB, **given)
    assert all(len(ids) == 40 and max(ids) < TEXT_SIZE for ids in got)
    # With a budget, images come at once, as many as allowed and as fit.
    pieces = [VOCAB.split(ids) for ids in generate_ids(lm, prompts(20), VOCAB, max_images=3, **given)]
    assert all([piece[0] for piece in row] == ["image"] * 3 + ["text"] for row in pieces)
    given["max_new_tokens"] = 15
    pieces = [VOCAB.split(ids) for ids in generate_ids(lm, prompts(20), VOCAB, max_images=3, **given)]
    assert all([piece[0] for piece in row] == ["image", "text"] for row in pieces)


def test_eos_ends_a_row_and_is_not_returned(models):
    lm = copy.deepcopy(models("llama"))
    lm.lm_head = nn.Linear(32, VOCAB.rows)
    lm.lm_head.bias.data[EOS] = 2
    got = generate_ids(lm, prompts(40), VOCAB, text_size=TEXT_SIZE, eos_ids=[EOS], max_new_tokens=30, seeds=range(40))
    assert not any(EOS in ids for ids in got)
    assert len({len(ids) for ids in got}) > 5


# --- a row is its own -----------------------------------------------------------------------------------------------


def mixed_batch(count: int):
    """Rows in every state: text, a block at once, a block left open by the prompt, any scale and budget."""
    rng = np.random.default_rng(7)
    given = prompts(count, seed=7)
    forced: list = []
    for row in range(count):
        sort = row % 4
        forced.append({1: "a", 2: "b"}.get(sort))
        if sort == 3:
            block = VOCAB.to_ids(rng.integers(0, 40, 9), name="a")
            given[row] = given[row] + block[: rng.integers(1, 11)].tolist()
    return given, {
        "force_image": forced,
        "max_new_tokens": rng.integers(16, 50, count).tolist(),
        "max_images": rng.integers(0, 4, count).tolist(),
        "null_prompts": prompts(count, seed=8, longest=20),
        "image_null_prompts": prompts(count, seed=9),
        "guidance": [[1.0, 3.0, (4.0, 2.0), (2.0, 1.0), 0.5][i] for i in rng.integers(0, 5, count)],
        "seeds": rng.integers(0, 1000, count).tolist(),
    }


PER_ROW = ("force_image", "max_new_tokens", "max_images", "null_prompts", "image_null_prompts", "guidance", "seeds")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "gemma3", "mistral-window"])
@pytest.mark.parametrize("temperature", [0.0, (0.7, 1.0)])
def test_mixed_batch_equals_each_row_alone(models, name, temperature):
    lm = copy.deepcopy(models(name))
    begins = [image.control["begin"] for image in VOCAB.images.values()]
    with torch.no_grad():  # images in the middle of text, too
        lm.get_output_embeddings().weight[begins] *= 6
    given, options = mixed_batch(24)
    fixed = {"text_size": TEXT_SIZE, "eos_ids": [EOS], "temperature": temperature}
    fixed |= {"top_k": (20, 0), "top_p": (0.9, 0.8)}
    together = generate_ids(lm, given, VOCAB, **options, **fixed)
    alone = []
    for row in range(24):
        alone += generate_ids(lm, [given[row]], VOCAB, **{k: [options[k][row]] for k in PER_ROW}, **fixed)
    assert together == alone
    streams = [VOCAB.split(np.array(p + ids)) for p, ids in zip(given, together, strict=True)]
    begun = sum(piece[0] == "image" for stream in streams for piece in stream) - 18
    assert begun > 5  # images that rows in text began themselves


def test_seeds(models):
    lm, prompt = models("llama"), prompts(1)[0]
    given = {"text_size": TEXT_SIZE, "force_image": "a", "max_new_tokens": 20}
    first = generate_ids(lm, [prompt] * 6, VOCAB, seeds=[0, 1, 2, 3, 4, 0], **given)
    assert first[0] == first[5]
    assert len({tuple(ids) for ids in first}) == 5
    assert generate_ids(lm, [prompt] * 2, VOCAB, seeds=[3, 1], **given) == [first[3], first[1]]
    longer = generate_ids(lm, [prompt], VOCAB, seeds=[2], **{**given, "max_new_tokens": 31})
    assert longer[0][:20] == first[2]


def test_nothing_of_the_caller_s_changes(models):
    lm = models("llama").train()
    given = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    nulls = [torch.tensor([5]), torch.tensor([9, 10])]
    copies = copy.deepcopy((given, nulls))
    state = copy.deepcopy(lm.state_dict())
    options = {"text_size": TEXT_SIZE, "force_image": "a", "max_new_tokens": 20, "seeds": [1, 2], "guidance": 2.0}
    got = generate_ids(lm, given, VOCAB, null_prompts=nulls, **options)
    assert all(torch.equal(a, b) for a, b in zip((*given, *nulls), (*copies[0], *copies[1]), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(lm.state_dict().values(), state.values(), strict=True))
    assert lm.training
    lists = [[x.tolist() for x in group] for group in (given, nulls)]
    assert got == generate_ids(lm.eval(), lists[0], VOCAB, null_prompts=lists[1], **options)


def test_the_model_s_positions_bound_a_row(models):
    lm = models("gpt2")  # 160 learned positions
    long = [int(i) for i in np.random.default_rng(0).integers(3, 50, 150)]
    got = generate_ids(lm, [long, [5]], VOCAB, text_size=TEXT_SIZE, max_new_tokens=400, max_images=9, temperature=0)
    assert [len(ids) for ids in got] == [10, 159]
    with pytest.raises(ValueError, match="room for 10 new ids.*needs 11"):
        generate_ids(lm, [long], VOCAB, text_size=TEXT_SIZE, max_new_tokens=400, force_image="a", temperature=0)
    with pytest.raises(ValueError, match="prompt 0 has 161 ids"):
        generate_ids(lm, [[5] * 161], VOCAB, text_size=TEXT_SIZE, max_new_tokens=4, temperature=0)


def test_nothing_to_do(models):
    lm = models("llama")
    assert generate_ids(lm, [], VOCAB, text_size=TEXT_SIZE, max_new_tokens=4, temperature=0) == []
    assert generate_ids(lm, [[5]], VOCAB, text_size=TEXT_SIZE, max_new_tokens=0, temperature=0) == [[]]
    only = generate_ids(lm, [[]], VOCAB, text_size=TEXT_SIZE, force_image="a", max_new_tokens=11, temperature=0)
    assert [piece[0] for piece in VOCAB.split(only[0])] == ["image"]


def test_errors(models):
    lm, given = models("llama"), {"text_size": TEXT_SIZE, "max_new_tokens": 20}
    for options, message in (
        ({}, "seeds are needed"),
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"seeds": [1], "temperature": -1}, "temperature is -1"),
        ({"seeds": [1], "top_p": 0.0}, "top_p is 0"),
        ({"seeds": [1], "top_k": (1, 2, 3)}, "top_k is"),
        ({"seeds": [1], "max_images": [1, 2]}, "max_images has 2 entries"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_ids(lm, [[5]], VOCAB, **given, **options)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate_ids(lm, [[5], []], VOCAB, temperature=0, **given)
    with pytest.raises(ValueError, match=f"expected 0 to {VOCAB.rows - 1}"):
        generate_ids(lm, [[5, VOCAB.rows]], VOCAB, temperature=0, **given)


def test_models_with_another_state_are_refused():
    from transformers import MambaConfig, MambaForCausalLM

    lm = MambaForCausalLM(MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ValueError, match="cannot sample from 'mamba'"):
        generate_ids(lm, [[5]], None, text_size=60, max_new_tokens=2, temperature=0)
