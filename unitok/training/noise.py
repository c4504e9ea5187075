"""Noise in the pictures a model draws from: some of the codes it sees behind it are not those of the picture.

A model that draws sees its own codes, and some of them will be wrong; in training it sees the right ones only, and
learns to trust them more than the text. So of the picture ids that a document learns, a share between 0 and `most`,
another one for each document, is exchanged for others drawn from all documents. What is to be predicted stays, and
pictures that are only read stay as they are.
"""

from __future__ import annotations

import numpy as np

from unitok.data.packing import PackedBatch, Store
from unitok.data.render import IMAGE
from unitok.vocab import JointVocab

POOL = 1 << 18  # ids of a codebook that others are drawn from


class Noise:
    def __init__(self, store: Store, vocab: JointVocab | None, most: float, seed: int):
        self.most, self.seed = most, seed
        if not most:
            return
        self.book = np.full(int(store.ids.max()) + 1, -1)  # of each id: its codebook, numbered over all tokenizers
        books = [book for image in (vocab.images if vocab else {}).values() for book in image.codebooks]
        for number, book in enumerate(books):
            known = np.array(book.ids, np.int64)
            self.book[known[known < len(self.book)]] = number
        learnt = store.ids[1:][(store.modality[1:] == IMAGE) & (store.weights[:-1] > 0)]
        rng = np.random.default_rng([seed, 2])
        self.pools = {}
        for number in np.unique(self.book[learnt]):
            pool = learnt[self.book[learnt] == number]
            self.pools[int(number)] = rng.choice(pool, POOL) if len(pool) > POOL else pool

    def __call__(self, batch: PackedBatch, key: tuple[int, int], first: int) -> None:
        """Exchange ids of the batch, in place. A row's noise depends on `key` and its number, `first` for the first."""
        if not self.most:
            return
        ids, document = batch.ids.numpy(), batch.document.numpy()
        learnt = np.zeros(ids.shape, bool)
        learnt[:, 1:] = (batch.modality.numpy()[:, 1:] == IMAGE) & (batch.weights.numpy()[:, :-1] > 0)
        for b in range(len(ids)):
            rng = np.random.default_rng([self.seed, 3, *key, first + b])
            share = rng.uniform(0, self.most, document[b].max() + 2)[document[b]]  # [T]
            (places,) = np.nonzero(learnt[b] & (rng.random(len(share)) < share))
            own = self.book[ids[b, places]]
            for number in np.unique(own):
                mine = places[own == number]
                ids[b, mine] = rng.choice(self.pools[int(number)], len(mine))
