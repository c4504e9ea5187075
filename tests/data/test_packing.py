"""Packed rows: documents stay apart, labels stand where they are predicted, nothing is lost or cut."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, Qwen3Config

from unitok.data.packing import IGNORE, Source, Store, Stream, collate, pack, plan, share_prefixes, split_long
from unitok.data.render import CONTROL, IMAGE, TEXT, Rendered

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gemma": GemmaConfig(**SIZES, head_dim=8),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


def text(length, seed=0, weight=1.0):
    ids = np.random.default_rng(seed).integers(1, 97, length)
    return Rendered(ids, np.full(length, weight, np.float32), np.zeros(length, np.int8))


def captioned(words, codes, seed=0):
    one = text(words + codes + 2, seed)
    one.modality[words:] = IMAGE
    one.modality[[words, -1]] = CONTROL
    return one


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_get_the_logits_they_get_alone(name, attention):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation=attention).eval()
    rows = [[text(9, 1), text(5, 2), text(1, 3), text(7, 4)], [text(12, 5), text(6, 6)], [text(24, 7)]]
    batch = collate(rows, 24)
    with torch.no_grad():
        packed = model(**batch.inputs()).logits
        for b, row in enumerate(rows):
            for number, one in enumerate(row):
                alone = model(input_ids=torch.from_numpy(one.ids)[None]).logits[0]
                there = packed[b][batch.document[b] == number]
                torch.testing.assert_close(there, alone, atol=1e-5, rtol=0)


def questions(*words, codes=6, seed=0):
    """Questions about one picture: the picture and the question carry no loss, the last word does."""
    picture = captioned(1, codes, seed)
    out = []
    for n, count in enumerate(words):
        own = text(count, seed=100 * seed + n)
        weights = np.zeros(len(picture.ids) + count, np.float32)
        weights[-1] = 1
        out.append(
            Rendered(np.concatenate([picture.ids, own.ids]), weights, np.concatenate([picture.modality, own.modality]))
        )
    return out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_branches_get_the_logits_they_get_alone(name, attention):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation=attention).eval()
    asked = questions(4, 2, 5) + questions(3, 3, seed=1)
    shared = share_prefixes(asked, 40)
    assert [len(one.ids) for one in shared] == [9 + 4 + 2 + 5, 9 + 3 + 3]
    batch = collate([[shared[0], text(6, 3)], [shared[1]]], 30)
    with torch.no_grad():
        logits = model(**batch.inputs()).logits
        for b, own in ((0, asked[:3]), (1, asked[3:])):
            for number, one in enumerate(own, 1):
                alone = model(input_ids=torch.from_numpy(one.ids)[None]).logits[0]
                mine = (batch.document[b] == 0) & ((batch.branch[b] == 0) | (batch.branch[b] == number))
                torch.testing.assert_close(logits[b][mine], alone, atol=1e-5, rtol=0)
                assert batch.labels[b][mine].tolist() == collate([[one]]).labels[0, : len(one.ids)].tolist()
        after = model(input_ids=torch.from_numpy(text(6, 3).ids)[None]).logits[0]
        torch.testing.assert_close(logits[0][batch.document[0] == 1], after, atol=1e-5, rtol=0)


def test_only_what_can_be_shared_is_shared():
    asked = questions(4, 2, 5)
    assert [len(one.ids) for one in share_prefixes(asked, 9 + 4 + 2)] == [15, 14]  # a row has no room for the third
    said = [captioned(0, 6), captioned(0, 6)]  # the text behind the picture is learnt from its first word
    said = [
        Rendered(np.append(d.ids, [5, 6]), np.append(d.weights * 0, [1, 1]), np.append(d.modality, [0, 0]))
        for d in said
    ]
    texts = [text(4), text(4)]
    for documents in (said, texts):
        out = share_prefixes(documents, 99)
        assert len(out) == 2 and all(a is b for a, b in zip(out, documents, strict=True))


def test_a_cache_would_let_documents_see_each_other():
    """Why inputs() switches the cache off: the control arm that must lose."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS["llama"]).eval()
    inputs = collate([[text(9, 1), text(9, 2)]]).inputs()
    with torch.no_grad():
        apart, leaking = model(**inputs).logits, model(**inputs | {"use_cache": True}).logits
    assert (apart - leaking)[0, 9:].abs().max() > 1e-3


def test_labels_stand_at_the_position_that_predicts_them():
    first, second = captioned(3, 4, seed=1), text(5, seed=2)
    first.weights[:2] = 0
    second.weights[3] = 0
    batch = collate([[first, second]], 20)
    labels, weights = batch.labels[0].tolist(), batch.weights[0].tolist()
    assert labels[:9] == [IGNORE, *first.ids[2:].tolist(), IGNORE]  # ids[2] is the first with weight
    assert labels[9:14] == [*second.ids[1:3].tolist(), IGNORE, int(second.ids[4]), IGNORE]
    assert [w > 0 for w in weights] == [label != IGNORE for label in labels]
    assert labels[14:] == [IGNORE] * 6 and batch.document[0, 14:].tolist() == [-1] * 6
    assert batch.positions[0].tolist() == [*range(9), *range(5), *range(6)]
    predicts = batch.label_modality[0, :8].tolist()
    assert predicts == first.modality[1:].tolist() and predicts[2] == CONTROL and predicts[3] == IMAGE


def test_no_document_is_lost_or_cut_and_little_is_wasted():
    rng = np.random.default_rng(0)
    documents = [captioned(int(rng.integers(5, 30)), 36, seed=i) for i in range(400)]
    documents += [text(int(rng.integers(4, 60)), seed=i) for i in range(400)]
    rows = pack(documents, 128, seed=1)
    got = sorted(d.ids.tobytes() for row in rows for d in row)
    assert got == sorted(d.ids.tobytes() for d in documents)
    used = sum(len(d.ids) for d in documents) / (128 * len(rows))
    assert used > 0.97
    in_order = [0]  # what taking documents as they come needs
    for i in np.random.default_rng(1).permutation(len(documents)):
        in_order.append(0) if in_order[-1] + len(documents[i].ids) > 128 else None
        in_order[-1] += len(documents[i].ids)
    assert len(rows) < len(in_order)


def test_the_seed_decides_the_rows():
    documents = [text(int(n), seed=i) for i, n in enumerate(np.random.default_rng(0).integers(3, 40, 60))]

    def order(seed):
        return [d.ids.tobytes() for row in pack(documents, 64, seed=seed) for d in row]

    assert order(3) == order(3) != order(4)


def test_long_documents():
    long_text, long_image = text(25), captioned(5, 20)
    assert [len(d.ids) for d in split_long(long_text, 10)] == [10, 10, 5]
    assert np.concatenate([d.ids for d in split_long(long_text, 10)]).tolist() == long_text.ids.tolist()
    refused = []
    rows = pack([long_text, long_image, text(4)], 10, refused=refused)
    assert refused == [1] and not any((d.modality != TEXT).any() for row in rows for d in row)
    with pytest.raises(ValueError, match="document 1 has 27 ids with an image; rows hold 10"):
        pack([long_text, long_image], 10)


def test_plan_takes_the_fullest_row_with_room():
    assert plan([3, 7, 5, 4, 1], 10) == [[1, 0], [2, 3, 4]]
    assert plan([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]


def drawn(n=40, *, seed=0, state=None, take=(10,) * 4, **source):
    lengths = np.random.default_rng(5).integers(4, 20, 4 * n)
    numbers = np.arange(4 * n).reshape(n, 4)
    mix = [Source(numbers[:10], 3.0, **source), Source(numbers[10:], 1.0, **source)]
    stream = Stream(lengths, mix, 32, seed, window=64, state=state)
    return [stream.take(k) for k in take], stream


def test_a_stream_goes_on_exactly_where_it_stopped():
    whole, _ = drawn(take=(7, 7, 7, 7, 7, 7), flip=0.5, drop=0.3)
    for steps in range(1, 6):
        first, stopped = drawn(take=(7,) * steps, flip=0.5, drop=0.3)
        rest, _ = drawn(take=(7,) * (6 - steps), state=stopped.state(), flip=0.5, drop=0.3)
        assert first + rest == whole
    assert drawn(seed=1)[0] != drawn(seed=0)[0]


def test_the_mix_and_its_flips_have_the_shares_asked_for():
    rows = [row for part in drawn(take=(2000,), flip=0.5, drop=0.1)[0] for row in part]
    numbers = np.array([d for row in rows for d in row])
    assert abs((numbers < 40).mean() - 0.75) < 0.01
    assert abs((numbers % 4 >= 2).mean() - 0.5) < 0.03 and abs((numbers % 2).mean() - 0.1) < 0.02


def test_every_document_comes_once_an_epoch_and_draws_do_not_follow_the_mix():
    """The flip of (seed, epoch, document) is the same whatever else is in the mix."""
    lengths = np.full(400, 8)
    numbers = np.arange(400).reshape(100, 4)
    one = Source(numbers[:50], flip=0.5, drop=0.5)
    alone = Stream(lengths, [one], 32, 3, window=50).take(26)[:13]
    mixed = Stream(lengths, [one, Source(numbers[50:])], 32, 3, window=100).take(25)
    assert sorted(d // 4 for row in alone for d in row) == list(range(50))
    assert {d for row in alone for d in row} == {d for row in mixed for d in row if d < 200}


def test_weights_by_modality():
    store = Store([captioned(3, 4, seed=1), text(5, seed=2)])
    store.weigh(text=2.0, image=0.5)
    batch = store.batch([[0, 1]], 16)
    assert batch.weights[0, :8].tolist() == [2, 2, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert store.loss_weights().tolist() == [7.0, 8.0]
    store.weigh(text=1.0, image=0.0)
    assert (store.batch([[0]], 9).labels[0, 2:] == IGNORE).all()
