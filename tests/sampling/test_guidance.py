"""Guidance against its formula, alone and in the loop against separate forwards."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unitok.sampling.decode import generate_ids
from unitok.sampling.guidance import IMPLAUSIBLE, LIKELY, branch_weights, habit, mix, plausible, text_weights
from unitok.vocab import JointVocab

VOCAB = JointVocab(40).add("a", [24, 8], (3, 2))
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]
NULLS = [[5, 30], [5], [5, 31, 32, 33, 34, 35, 36, 37]]  # shorter and longer than their prompts
IMAGES = [[5, 33, 34], [5, 35], [5, 36, 37]]
COMMON = {"text_size": 37, "eos_ids": [1], "force_image": "a", "max_new_tokens": 8}


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB.rows, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def by_hand(lm, branches, combine):
    """Greedy codes from one uncached forward a branch and step."""
    block = []
    for slot in VOCAB.slots("a").tolist():
        if slot < 0:
            with torch.no_grad():
                logits = [lm(torch.tensor([branch + block])).logits[0, -1].double() for branch in branches]
            ids = torch.tensor(list(VOCAB.images["a"].codebooks[-1 - slot].ids))
            slot = ids[combine(*logits)[ids].argmax()].item()
        block.append(slot)
    return block


def test_weights():
    assert branch_weights(3.0, 2).tolist() == [[3, -2, 0]] * 2
    assert branch_weights((5.0, 2.0), 1).tolist() == [[5, -1, -3]]
    assert branch_weights([1, (4.0, 4.0), (3.0, 1.0)], 3).tolist() == [[1, 0, 0], [4, -3, 0], [3, 0, -2]]
    assert np.allclose(branch_weights(np.random.default_rng(0).normal(size=(50, 2)).tolist(), 50).sum(1), 1, atol=1e-5)
    for bad in ([1.0], (1.0, 2.0, 3.0), float("nan")):
        with pytest.raises(ValueError, match="guidance"):
            branch_weights(bad, 2)


def test_mix_is_the_formula():
    c, n, i = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0))
    text, image = 3.0, 1.5
    w = torch.from_numpy(branch_weights((text, image), 4))
    others, owner = torch.cat([n, i]), torch.arange(4).repeat(2)
    mixed = mix(c, others, owner, w[:, 0], torch.cat([w[:, 1], w[:, 2]]))
    assert torch.allclose(mixed, n + image * (i - n) + text * (c - i), atol=1e-5)
    # Two equal scales are one scale, and mixing logits is mixing log-probabilities.
    single = mix(c, n, torch.arange(4), torch.full((4,), 3.0), torch.full((4,), -2.0))
    assert torch.allclose(single, n + 3 * (c - n), atol=1e-5)
    log_mixed = n.log_softmax(1) + 3 * (c.log_softmax(1) - n.log_softmax(1))
    assert torch.allclose(single.softmax(1), log_mixed.softmax(1), atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_single_guidance_is_two_forwards(lm, scale):
    got = generate_ids(lm, PROMPTS, VOCAB, null_prompts=NULLS, guidance=scale, temperature=0, **COMMON)
    for ids, prompt, null in zip(got, PROMPTS, NULLS, strict=True):
        assert ids == by_hand(lm, [prompt, null], lambda c, n: n + scale * (c - n))


def test_double_guidance_is_three_forwards(lm):
    given = {"null_prompts": NULLS, "image_null_prompts": IMAGES, "temperature": 0, **COMMON}
    got = generate_ids(lm, PROMPTS, VOCAB, guidance=(4.0, 1.5), **given)
    for ids, *branches in zip(got, PROMPTS, NULLS, IMAGES, strict=True):
        assert ids == by_hand(lm, branches, lambda c, n, i: n + 1.5 * (i - n) + 4 * (c - i))
    same = generate_ids(lm, PROMPTS, VOCAB, guidance=(3.0, 3.0), **given)
    assert same == generate_ids(lm, PROMPTS, VOCAB, guidance=3.0, **given)
    mixed = generate_ids(lm, PROMPTS, VOCAB, guidance=[3.0, (4.0, 1.5), (4.0, 1.0)], **given)
    assert mixed[:2] == [same[0], got[1]]
    assert mixed[2] == by_hand(lm, [PROMPTS[2], IMAGES[2]], lambda c, i: i + 4 * (c - i))


def test_scale_one_is_no_guidance(lm):
    given = {"seeds": [1, 2, 3], **COMMON}
    plain = generate_ids(lm, PROMPTS, VOCAB, **given)
    assert generate_ids(lm, PROMPTS, VOCAB, null_prompts=NULLS, guidance=1.0, **given) == plain
    assert generate_ids(lm, PROMPTS, VOCAB, null_prompts=NULLS, guidance=(1.0, 1.0), **given) == plain
    guided = generate_ids(lm, PROMPTS, VOCAB, null_prompts=NULLS, guidance=6.0, **given)
    assert all(a != b for a, b in zip(guided, plain, strict=True))  # and guidance does something
    # An unguided row among guided ones stays as it was.
    mixed = generate_ids(lm, PROMPTS, VOCAB, null_prompts=NULLS, guidance=[6.0, 1.0, 6.0], **given)
    assert mixed == [guided[0], plain[1], guided[2]]


def test_guidance_to_itself_changes_nothing(lm):
    given = {"seeds": [1, 2, 3], **COMMON}
    same = generate_ids(lm, PROMPTS, VOCAB, null_prompts=PROMPTS, guidance=5.0, **given)
    assert same == generate_ids(lm, PROMPTS, VOCAB, **given)


def test_text_is_not_guided(lm):
    """Text before and after an image: as without guidance, given the same codes."""
    given = {"text_size": 37, "max_new_tokens": 30, "temperature": 0}
    prompt = [5, 6, 7, 8]
    ids = generate_ids(lm, [prompt], VOCAB, force_image="a", null_prompts=[[5]], guidance=4.0, **given)[0]
    block, after = ids[:8], ids[8:]
    assert block == by_hand(lm, [prompt, [5]], lambda c, n: n + 4 * (c - n))
    assert len(after) == 22
    assert after == generate_ids(lm, [prompt + block], VOCAB, **{**given, "max_new_tokens": 22})[0]


BLIND = [p[-1:] for p in PROMPTS[:-1]] + [[9, 9]]  # one ends otherwise than its prompt


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_text_guidance_is_two_forwards(lm, scale):
    given = {"text_size": 37, "max_new_tokens": 9, "temperature": 0}
    got = generate_ids(lm, PROMPTS, VOCAB, blind_prompts=BLIND, text_guidance=scale, **given)
    assert got != generate_ids(lm, PROMPTS, VOCAB, **given)
    for ids, prompt, blind in zip(got, PROMPTS, BLIND, strict=True):
        rows, want = [list(prompt), list(blind)], []
        for _ in ids:
            logits = [lm(torch.tensor([row])).logits[0, -1, :37] for row in rows]
            said = logits[1].clamp(max=logits[1].max() + math.log(LIKELY)) if scale > 1 else logits[1]
            mixed = said + scale * (logits[0] - said)
            mixed[logits[0].softmax(0) < IMPLAUSIBLE * logits[0].softmax(0).max()] = -torch.inf
            want.append(int(mixed.argmax()))
            rows = [[*row, want[-1]] for row in rows]
        assert ids == want


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_no_row_ends_before_its_least(lm, scale):
    """Each row would end at once: its first id is an EOS."""
    given = {"text_size": 37, "max_new_tokens": 4, "temperature": 0, "blind_prompts": BLIND, "text_guidance": scale}
    first = [ids[0] for ids in generate_ids(lm, PROMPTS, VOCAB, **given)]
    assert not any(generate_ids(lm, PROMPTS, VOCAB, eos_ids=first, **given))
    for least in (1, 3):
        got = generate_ids(lm, PROMPTS, VOCAB, eos_ids=first, min_new_tokens=least, **given)
        assert all(len(ids) >= least and not set(ids) & set(first) for ids in got)


def test_a_row_without_text_guidance_is_as_it_would_be_alone(lm):
    """Among guided rows, sampled: neither its logits nor what it may draw changes."""
    given = {"text_size": 37, "max_new_tokens": 20, "seeds": [1, 2, 3], "temperature": 3.0}
    plain = generate_ids(lm, PROMPTS, VOCAB, **given)
    mixed = generate_ids(lm, PROMPTS, VOCAB, blind_prompts=BLIND, text_guidance=[2.0, 1.0, 2.0], **given)
    assert mixed[1] == plain[1] and mixed[0] != plain[0] and mixed[2] != plain[2]
    cond, guided = torch.tensor([[5.0, 0.0]] * 2), torch.tensor([[1.0, 2.0]] * 2)
    kept = plausible(cond, guided, torch.from_numpy(text_weights([1.0, 3.0], 2)[:, 0]))
    assert kept.tolist() == [[1, 2], [1, -torch.inf]]


def test_what_the_words_alone_make_likely_is_not_chosen_among():
    """Two of three ids are likely without the images: between these the images' own order stays at any scale."""
    blind, cond = torch.tensor([[0.6, 0.39, 0.01]]).log(), torch.tensor([[0.5, 0.3, 0.2]]).log()
    for scale in (1.5, 4.0, 100.0):
        guided = cond * scale + (1 - scale) * habit(blind, torch.tensor([1 - scale]))
        assert guided[0, 0] > guided[0, 1]
    assert torch.equal(habit(blind, torch.tensor([0.5])), blind)
    assert guided.argmax() == 2  # never said without the images, and plausible with them


def test_both_guidances_around_an_image(lm):
    """Text, an image that the model itself begins, text: each guided by its own branches, as in separate forwards."""
    begin = VOCAB.images["a"].control["begin"]
    given = {"text_size": 37, "max_images": 1, "max_new_tokens": 24, "temperature": 0}
    found = 0
    for first in range(2, 30):
        prompt, null, blind = [first, 9, 20], [first], [first, 20]
        ids = generate_ids(lm, [prompt], VOCAB, blind_prompts=[blind], text_guidance=2.0, null_prompts=[null],
                           guidance=3.0, **given)[0]  # fmt: skip
        if begin not in ids:
            continue
        at, found = ids.index(begin), found + 1
        block = by_hand(lm, [prompt + ids[:at], null], lambda c, n: n + 3 * (c - n))
        assert ids[at : at + len(block)] == block
        for i in [*range(at + 1), *range(at + len(block), len(ids))]:
            cond, other = (lm(torch.tensor([row + ids[:i]])).logits[0, -1] for row in (prompt, blind))
            allowed = [*range(37), *([begin] if i <= at and i + len(block) <= 24 else [])]
            cond, other = cond[allowed], other[allowed].clamp(max=other[allowed].max() + math.log(LIKELY))
            mixed = (other + 2 * (cond - other)).masked_fill(
                cond.softmax(0) < IMPLAUSIBLE * cond.softmax(0).max(), -torch.inf
            )
            assert ids[i] == allowed[int(mixed.argmax())]
    assert found


def test_text_guidance_leaves_images_alone(lm):
    """A row that opens an image at once has nothing to be blind to."""
    given = {"text_size": 37, "max_images": 1, "max_new_tokens": 24, "temperature": 0}
    prompt, blind = [5, 6, 7, VOCAB.images["a"].control["begin"]], [5, VOCAB.images["a"].control["begin"]]
    plain = generate_ids(lm, [prompt], VOCAB, **given)[0]
    guided = generate_ids(lm, [prompt], VOCAB, blind_prompts=[blind], text_guidance=4.0, **given)[0]
    assert plain == guided


def test_missing_blind_prompts(lm):
    bad = {
        "this guidance needs blind_prompts": None,
        "2 blind_prompts for 3": BLIND[:2],
        "at least one id": [[5], [6], []],
    }
    for message, given in bad.items():
        with pytest.raises(ValueError, match=message):
            generate_ids(lm, PROMPTS, VOCAB, blind_prompts=given, text_guidance=2.0, temperature=0, **COMMON)
    for scale in (float("nan"), [1.0, 2.0]):
        with pytest.raises(ValueError, match="expected a finite number, or one for each of 3 rows"):
            text_weights(scale, 3)


def test_missing_null_prompts(lm):
    with pytest.raises(ValueError, match="needs null_prompts"):
        generate_ids(lm, PROMPTS, VOCAB, guidance=2.0, temperature=0, **COMMON)
    with pytest.raises(ValueError, match="needs image_null_prompts"):
        generate_ids(lm, PROMPTS, VOCAB, guidance=(2.0, 3.0), null_prompts=NULLS, temperature=0, **COMMON)
    with pytest.raises(ValueError, match="2 null_prompts for 3 prompts"):
        generate_ids(lm, PROMPTS, VOCAB, guidance=2.0, null_prompts=NULLS[:2], temperature=0, **COMMON)
