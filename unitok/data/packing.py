"""Documents packed into rows of one length, and the endless seeded stream of such rows that training reads.

Documents of a row do not see each other: positions start at 0 in each, and transformers keeps such documents apart
when it gets `position_ids`, no attention mask and no cache (`PackedBatch.inputs` is just that). Padding at the end of
a row is a document of its own and never carries loss.

Documents that begin with the same pictures may share them (`share_prefixes`): a trunk that all see, and branches that
see the trunk and themselves, at the positions they would have alone. Ten questions then cost one picture.

Shapes: B rows, T ids a row, L ids a document, D documents, S ids of all documents.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unitok.data.render import TEXT, Rendered

IGNORE = -100  # label of a position that predicts nothing
WINDOW = 1024  # documents that are packed together


@dataclass
class PackedBatch:
    """One batch of packed rows. `labels[b, t]` is what position t predicts: nobody shifts logits later."""

    ids: Tensor  # int64 [B, T]
    positions: Tensor  # int64 [B, T], from 0 in each document
    document: Tensor  # int64 [B, T], number within the row; -1 padding
    modality: Tensor  # int64 [B, T], of the id: render.TEXT, IMAGE, CONTROL
    labels: Tensor  # int64 [B, T], IGNORE where nothing is predicted
    weights: Tensor  # float32 [B, T], loss weight of the label; 0 where there is none
    label_modality: Tensor  # int64 [B, T], of the label
    branch: Tensor  # int64 [B, T], 0: what every branch of the document sees

    def to(self, device) -> PackedBatch:
        return PackedBatch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def inputs(self, masked: bool = True, windows: Mapping[str, int | None] | None = None) -> dict[str, object]:
        """Arguments of a Hugging Face causal LM under which no document sees another, and no branch another.

        masked=False: of one whose attention keeps branches apart without a mask. windows: how far each kind of layer
        sees (`attention.windows`), default all: a given mask replaces the one in which transformers would say so.
        """
        inputs: dict[str, object] = {"input_ids": self.ids, "position_ids": self.positions, "use_cache": False}
        if masked and self.branch.any():
            masks = {kind: self.mask(window) for kind, window in (windows or {"": None}).items()}
            inputs["attention_mask"] = masks.get("", masks)
        return inputs

    def mask(self, window: int | None = None) -> Tensor:
        """float32 [B, 1, T, T] to add to attention scores: eager attention takes no boolean one."""
        same = self.document[:, :, None] == self.document[:, None, :]  # [B, T, T]
        allowed = same & seen(self.branch)
        if window is not None:
            allowed &= near(self.positions, window)
        return additive(allowed)[:, None]


def seen(branch: Tensor) -> Tensor:
    """int64 [..., L], the branches of one document -> bool [..., L, L], what each of its ids sees."""
    return ((branch[..., None, :] == 0) | (branch[..., :, None] == branch[..., None, :])).tril()


def near(positions: Tensor, window: int) -> Tensor:
    """int64 [..., L], positions in a document -> bool [..., L, L]: less than `window` before, or behind."""
    return positions[..., :, None] - positions[..., None, :] < window


def additive(allowed: Tensor) -> Tensor:
    """bool mask -> float32 of its shape, to add to attention scores."""
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, torch.finfo(torch.float32).min)


class Branched(NamedTuple):
    """Several documents with one beginning; the columns of Rendered, and of each id its branch and position."""

    ids: np.ndarray  # int64 [L]
    weights: np.ndarray  # float32 [L]
    modality: np.ndarray  # int8 [L]
    branch: np.ndarray  # int16 [L], 0: the trunk
    positions: np.ndarray  # int32 [L]


def share_prefixes(documents: Sequence[Rendered], length: int) -> list[Rendered | Branched]:
    """Neighbours that begin with the same pictures become one Branched of at most `length` ids; others stay."""
    out: list[Rendered | Branched] = []
    for trunk, own in groupby(documents, lambda one: one.ids[: _trunk(one)].tobytes()):
        stem = len(trunk) // documents[0].ids.itemsize
        group: list[Rendered] = []
        for one in own:
            used = stem + sum(len(d.ids) - stem for d in group)
            if group and (stem == 0 or used + len(one.ids) - stem > length):
                out.append(_join(group, stem))
                group = []
            group.append(one)
        out.append(_join(group, stem))
    return out


def _trunk(one: Rendered) -> int:
    """Ids up to the last picture before anything is learnt; 0 where a branch would begin with something learnt."""
    learnt = np.flatnonzero(one.weights)
    first = int(learnt[0]) if len(learnt) else len(one.ids)
    pictures = np.flatnonzero(one.modality[:first] != TEXT)
    stem = int(pictures[-1]) + 1 if len(pictures) else 0
    return stem if stem < first else 0  # the trunk's last id can predict the first id of one branch only


def _join(group: Sequence[Rendered], stem: int) -> Rendered | Branched:
    if len(group) == 1:
        return group[0]
    tails = [len(one.ids) - stem for one in group]
    ids, weights, modality = (
        np.concatenate([getattr(group[0], name)[:stem], *(getattr(one, name)[stem:] for one in group)])
        for name in Rendered._fields
    )
    branch = np.concatenate([np.zeros(stem, np.int16), np.repeat(np.arange(1, len(group) + 1, dtype=np.int16), tails)])
    positions = np.concatenate([np.arange(stem), *(np.arange(stem, stem + tail) for tail in tails)])
    return Branched(ids, weights, modality, branch, positions.astype(np.int32))


class Store:
    """Rendered documents in flat arrays, 15 bytes an id; `batch` makes a PackedBatch of rows of document numbers."""

    def __init__(self, documents: Iterable[Rendered | Branched]):
        documents = list(documents)
        self.lengths = np.array([len(d.ids) for d in documents], np.int64)  # [D]
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])[:-1]  # [D]
        none = Rendered(np.zeros(1, np.int64), np.zeros(1, np.float32), np.zeros(1, np.int8))  # what padding reads
        self.ids, weights, self.modality = (
            np.concatenate([getattr(d, name) for d in (*documents, none)]) for name in Rendered._fields
        )
        self.branch, self.positions = np.zeros(len(self.ids), np.int16), np.zeros(len(self.ids), np.int32)  # [S + 1]
        for start, d in zip(self.starts, documents, strict=True):
            stop = start + len(d.ids)
            self.positions[start:stop] = d.positions if isinstance(d, Branched) else np.arange(len(d.ids))
            if isinstance(d, Branched):
                self.branch[start:stop] = d.branch
        self.ids = self.ids.astype(np.int32)  # [S + 1]
        self.weights = np.append(weights[1:], np.float32(0))  # [S + 1], of what each position predicts
        self.weights[self.starts + self.lengths - 1] = 0  # the last id of a document predicts nothing

    def __len__(self) -> int:
        return len(self.lengths)

    def weigh(self, text: float, image: float) -> None:
        """Multiply loss weights by the modality of what is predicted."""
        predicted = np.append(self.modality[1:], np.int8(TEXT))
        self.weights *= np.where(predicted == TEXT, np.float32(text), np.float32(image))

    def loss_weights(self) -> np.ndarray:
        """float64 [D]: the sum of each document's loss weights."""
        sums = np.append(0, np.cumsum(self.weights, dtype=np.float64))
        return sums[self.starts + self.lengths] - sums[self.starts]

    def batch(self, rows: Sequence[Sequence[int]], length: int, pad_id: int = 0) -> PackedBatch:
        shape = (len(rows), length)
        at = np.full(shape, len(self.ids) - 1, np.int64)  # where each position reads
        document, positions = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        for b, row in enumerate(rows):
            lengths = self.lengths[row]
            used = int(lengths.sum())
            if used > length:
                raise ValueError(f"a row has {used} ids, rows hold {length}")
            ends = np.cumsum(lengths)
            within = np.arange(used) - np.repeat(ends - lengths, lengths)
            document[b, :used] = np.repeat(np.arange(len(row)), lengths)
            at[b, :used] = np.repeat(self.starts[row], lengths) + within
            positions[b, :used], positions[b, used:] = self.positions[at[b, :used]], np.arange(length - used)
        weights = self.weights[at]
        predicted = np.minimum(at + 1, len(self.ids) - 1)
        labels = np.where(weights > 0, self.ids[predicted], IGNORE).astype(np.int64)
        label_modality = np.where(weights > 0, self.modality[predicted], TEXT).astype(np.int64)
        ids = np.where(document >= 0, self.ids[at], pad_id).astype(np.int64)
        branch, modality = (column[at].astype(np.int64) for column in (self.branch, self.modality))
        columns = (ids, positions, document, modality, labels, weights, label_modality, branch)
        return PackedBatch(*map(torch.from_numpy, columns))


def plan(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Rows of document numbers, longest first into the fullest row that has room; no document exceeds `length`."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        found = bisect_left(room, (lengths[i], -1))
        if found < len(room):
            free, row = room.pop(found)
        else:
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(i)
        insort(room, (free - lengths[i], row))
    return rows


def pack(
    rendered: Iterable[Rendered], length: int, *, seed: int = 0, window: int = WINDOW, refused: list[int] | None = None
) -> list[list[Rendered]]:
    """Shuffle documents, pack them window by window, shuffle the rows of a window.

    A text longer than `length` becomes several documents. A document with an image cannot be cut: its number goes to
    `refused`, or ValueError where that is None.
    """
    documents, rng = [], np.random.default_rng(seed)
    for number, one in enumerate(rendered):
        fitting = split_long(one, length)
        if not fitting:
            if refused is None:
                raise ValueError(f"document {number} has {len(one.ids)} ids with an image; rows hold {length}")
            refused.append(number)
        documents += fitting
    order, rows = rng.permutation(len(documents)), []
    for start in range(0, len(order), window):
        some = order[start : start + window]
        planned = plan([len(documents[i].ids) for i in some], length)
        rows += [[documents[some[i]] for i in planned[r]] for r in rng.permutation(len(planned))]
    return rows


def split_long(one: Rendered, length: int) -> list[Rendered]:
    """The document itself where it fits; a text in stretches of `length`; [] where an image would be cut off."""
    if len(one.ids) <= length:
        return [one]
    if (one.modality != TEXT).any():
        return []
    return [Rendered(*(column[at : at + length] for column in one)) for at in range(0, len(one.ids), length)]


def collate(rows: Sequence[Sequence[Rendered]], length: int | None = None, pad_id: int = 0) -> PackedBatch:
    """Rows of documents -> PackedBatch. length: T, by default that of the longest row."""
    store, numbers, at = Store(d for row in rows for d in row), [], 0
    for row in rows:
        numbers.append(list(range(at, at + len(row))))
        at += len(row)
    return store.batch(numbers, length or max(int(store.lengths[row].sum()) for row in numbers), pad_id)


@dataclass
class Source:
    """Documents of one part of a mix, by their numbers in a store.

    variants[d, 2 * flipped + dropped] is document d as it is, with its caption dropped, with caption and image in the
    other order, and both. weight: share of the documents drawn. flip, drop: probabilities.
    """

    variants: np.ndarray  # int64 [D, 4]
    weight: float = 1.0
    flip: float = 0.0
    drop: float = 0.0


class Stream:
    """Endless packed rows of a mix, the same for a seed whatever the number of processes.

    Every source is shuffled anew each time it has been through; flips and drops depend on (seed, epoch, document).
    `state()` after any row is all that `Stream(..., state=...)` needs to go on with the next.
    """

    def __init__(
        self, lengths: np.ndarray, sources: Sequence[Source], length: int, seed: int = 0,
        *, window: int = WINDOW, state: dict | None = None,
    ):  # fmt: skip
        if not sources or any(len(source.variants) == 0 for source in sources):
            raise ValueError("every source of the mix needs at least one document")
        self.lengths, self.sources, self.length, self.seed, self.window = lengths, sources, length, seed, window
        state = state or {"window": 0, "row": 0, "drawn": [0] * len(sources)}
        if len(state["drawn"]) != len(sources):
            raise ValueError(f"the saved position is one of {len(state['drawn'])} sources, the mix has {len(sources)}")
        self.number, self.row, self.drawn = state["window"], state["row"], list(state["drawn"])
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}
        self._rows, self._after = self._packed()

    def state(self) -> dict:
        return {"window": self.number, "row": self.row, "drawn": list(self.drawn)}

    def take(self, n: int) -> list[list[int]]:
        """The next n rows, as lists of document numbers."""
        out: list[list[int]] = []
        while len(out) < n:
            if self.row == len(self._rows):
                self.number, self.row, self.drawn = self.number + 1, 0, self._after
                self._rows, self._after = self._packed()
            more = self._rows[self.row : self.row + n - len(out)]
            self.row += len(more)
            out += more
        return out

    def _packed(self) -> tuple[list[list[int]], list[int]]:
        """Rows of the window that starts where `drawn` stands, and where the next one starts."""
        drawn, documents = list(self.drawn), []
        share = np.array([source.weight for source in self.sources]) / sum(s.weight for s in self.sources)
        for _ in range(self.window):
            s = int(np.argmax(share * (sum(drawn) + 1) - drawn)) if len(drawn) > 1 else 0
            documents.append(self._document(s, drawn[s]))
            drawn[s] += 1
        planned = plan(self.lengths[documents].tolist(), self.length)
        order = np.random.default_rng([self.seed, 0, self.number]).permutation(len(planned))
        return [[documents[i] for i in planned[r]] for r in order], drawn

    def _document(self, s: int, n: int) -> int:
        """What the n-th draw from source s is."""
        epoch, at = divmod(n, len(self.sources[s].variants))
        if self._epochs.get(s, (-1,))[0] != epoch:
            source = self.sources[s]
            rng = np.random.default_rng([self.seed, 1, s, epoch])
            order = rng.permutation(len(source.variants))
            flipped, dropped = rng.random((2, len(order))) < [[source.flip], [source.drop]]
            self._epochs[s] = epoch, source.variants[order, (2 * flipped + dropped)[order]]
        return int(self._epochs[s][1][at])
