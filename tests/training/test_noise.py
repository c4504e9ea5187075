"""Noise in learnt pictures: what is exchanged, for what, and that it does not depend on how rows are cut."""

import numpy as np
import torch

from unitok.data.packing import Store
from unitok.data.render import IMAGE, TEXT, Rendered
from unitok.training.noise import Noise
from unitok.vocab import JointVocab

VOCAB = JointVocab(text_rows=20).add("toy", [8, 50], (20,), token_codebook=[0] * 10 + [1] * 10)
FIRST, SECOND = (np.array(book.ids) for book in VOCAB.images["toy"].codebooks)


def picture(seed, learnt=True):
    rng = np.random.default_rng(seed)
    ids = np.concatenate([rng.integers(3, 20, 4), rng.choice(FIRST, 10), rng.choice(SECOND, 10)])
    modality = np.array([TEXT] * 4 + [IMAGE] * 20, np.int8)
    return Rendered(ids, np.where((modality == IMAGE) == learnt, 1, 0).astype(np.float32), modality)


def test_only_learnt_codes_are_exchanged_for_codes_of_their_codebook():
    documents = [picture(n, learnt=n % 2 == 0) for n in range(40)]
    store = Store(documents)
    rows = [[n, n + 1] for n in range(0, 40, 2)]
    clean, batch = store.batch(rows, 50), store.batch(rows, 50)
    Noise(store, VOCAB, 0.5, seed=0)(batch, (3, 7), first=0)
    changed = batch.ids != clean.ids
    assert not changed[:, :4].any() and not changed[:, 24:].any()  # text, a picture that is read, padding
    share = changed[:, 4:24].float().mean(1)
    assert 0.1 < share.mean() < 0.3 and share.std() > 0.05  # each its own, half of 0.5 on average
    assert np.isin(batch.ids[:, 4:14], FIRST).all() and np.isin(batch.ids[:, 14:24], SECOND).all()
    for name in ("labels", "weights", "positions", "modality", "document"):
        assert torch.equal(getattr(batch, name), getattr(clean, name))


def test_a_row_has_its_noise_however_the_step_is_cut():
    store = Store([picture(n) for n in range(6)])
    noise = Noise(store, VOCAB, 1.0, seed=1)
    whole = store.batch([[n] for n in range(6)], 24)
    noise(whole, (0, 0), first=0)
    for first in (0, 3):
        half = store.batch([[n] for n in range(first, first + 3)], 24)
        noise(half, (0, 0), first)
        assert torch.equal(half.ids, whole.ids[first : first + 3])
    later = store.batch([[n] for n in range(6)], 24)
    noise(later, (0, 6), first=0)
    assert not torch.equal(later.ids, whole.ids)


def test_without_noise_nothing_changes():
    store = Store([picture(0)])
    clean, batch = store.batch([[0]], 24), store.batch([[0]], 24)
    Noise(store, VOCAB, 0.0, seed=0)(batch, (0, 0), first=0)
    assert torch.equal(batch.ids, clean.ids)
