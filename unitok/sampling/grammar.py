"""Which ids may follow: text, exactly the right codes after a begin-of-image, never anything else.

A row is (state, offset): state 0 is text, state i > 0 is the block of the i-th image tokenizer, and offset counts the
ids of that block already there. Blocks come from `JointVocab.slots`, so every layout it knows works here. The state of
a row moves by table look-ups over all rows at once (numpy; nothing scans the ids), and ids that the layout forces are
handed out, never drawn.

B rows, S states, L ids in the longest block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unitok.vocab import DIGITS, SIZE_SEP, JointVocab

TEXT = 0  # the state, and the kind, of text


class Grammar:
    """Tables for one vocabulary.

    `kinds[0]` holds the ids that may stand in text (the rows below `text_size` that are no image's, the `eos_ids`, and
    last the begin ids, one an image tokenizer in the order of `names`); `kinds[k]`, k > 0, the ids of one codebook.
    `vocab=None` is a model without images. `tokenizers` names those that may begin an image (default: all), `grids`
    the grid of a name where it is not the default.
    """

    def __init__(
        self,
        vocab: JointVocab | None,
        text_size: int,
        eos_ids: Sequence[int] = (),
        *,
        tokenizers: Sequence[str] | None = None,
        grids: Mapping[str, tuple[int, ...]] | None = None,
    ):
        vocab = JointVocab(max(text_size, 0)) if vocab is None else vocab
        images = vocab.images
        for name in (*(tokenizers or ()), *(grids or ())):
            if name not in images:
                raise ValueError(f"no image tokenizer {name!r} in this vocabulary; it has {sorted(images)}")
        self.names = tuple(images)
        self.rows = vocab.rows
        if not 0 < text_size <= self.rows:
            raise ValueError(f"text_size is {text_size}; expected 1 to {self.rows}, the rows of the vocabulary")
        if any(not 0 <= eos < self.rows for eos in eos_ids):
            raise ValueError(f"eos_ids {list(eos_ids)} do not all lie in 0 to {self.rows - 1}")

        plans = [np.asarray(vocab.slots(name, (grids or {}).get(name)), np.int64) for name in self.names]
        self.begins = np.array([plan[0] for plan in plans], np.int64)  # [S - 1]
        self.may_begin = np.array([tokenizers is None or name in tokenizers for name in self.names], bool)
        self.length = np.array([0, *map(len, plans)], np.int64)  # [S]

        # One more column than ids: offset == length is where a row leaves the block.
        shape = (len(plans) + 1, int(self.length.max()) + 1)
        self.forced = np.full(shape, -1, np.int64)  # [S, L + 1] the id the layout forces, or -1
        self.kind = np.zeros(shape, np.int64)  # [S, L + 1] what is drawn there: 0 text, k > 0 a codebook
        self.run = np.zeros(shape, np.int64)  # [S, L + 1] forced ids in a row from here on
        self.kinds: list[np.ndarray] = [np.empty(0, np.int64)]
        taken: list = []
        for s, (name, plan) in enumerate(zip(self.names, plans, strict=True), start=1):
            codebooks = images[name].codebooks
            self.forced[s, : len(plan)] = np.where(plan >= 0, plan, -1)
            self.kind[s, : len(plan)] = np.where(plan >= 0, -1, len(self.kinds) - 1 - plan)
            for j in range(len(plan) - 1, -1, -1):
                self.run[s, j] = self.run[s, j + 1] + 1 if plan[j] >= 0 else 0
            self.kinds += [np.asarray(codebook.ids, np.int64) for codebook in codebooks]
            controls = images[name].control.items()
            taken += self.kinds[-len(codebooks) :]
            # Size headers may be written in ordinary text digits, which stay text.
            taken += [i for label, i in controls if i >= vocab.text_rows or label not in (*DIGITS, SIZE_SEP)]

        text = np.zeros(self.rows, bool)
        text[:text_size] = True
        for ids in taken:  # published vocabularies keep codes among the text rows
            text[ids] = False
        text[list(eos_ids)] = True
        self.kinds[TEXT] = np.concatenate([np.flatnonzero(text), self.begins])
        self.is_eos = np.zeros(self.rows, bool)
        self.is_eos[list(eos_ids)] = True
        self.begin_state = np.zeros(self.rows, np.int64)  # id -> the state it opens, 0 for none
        self.begin_state[self.begins] = np.arange(1, len(plans) + 1)

    def state_of(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"no image tokenizer {name!r} in this vocabulary; it has {sorted(self.names)}")
        return self.names.index(name) + 1

    def open_block(self, ids: np.ndarray) -> tuple[int, int]:
        """(state, offset) after a prompt: (0, 0) in text, or inside the block that the prompt leaves open."""
        begins = np.flatnonzero(self.begin_state[ids])
        if not len(begins):
            return TEXT, 0
        tail = ids[begins[-1] :]
        s = int(self.begin_state[tail[0]])
        length = int(self.length[s])
        if (tail == self.forced[s, length - 1]).any():
            return TEXT, 0
        if len(tail) > length:
            raise ValueError(f"the prompt ends inside an image of {self.names[s - 1]!r} longer than its {length} ids")
        for j, i in enumerate(tail.tolist()):
            forced, kind = self.forced[s, j], self.kind[s, j]
            if i != forced if forced >= 0 else i not in self.kinds[kind]:
                expected = f"id {forced}" if forced >= 0 else f"one of {len(self.kinds[kind])} codes"
                raise ValueError(
                    f"the prompt ends inside an image of {self.names[s - 1]!r}: its position {j} holds id {i}, "
                    f"expected {expected}"
                )
        return s, len(tail)

    def start(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: np.ndarray,
        max_images: np.ndarray,
        force_image: Sequence[str | None],
    ) -> tuple[Cursor, np.ndarray]:
        """A cursor for each prompt, and the forced ids that follow at once, [B, F] padded with -1."""
        n = len(prompts)
        cursor = Cursor(
            grammar=self,
            state=np.zeros(n, np.int64),
            offset=np.zeros(n, np.int64),
            room=np.array(max_new_tokens, np.int64),
            images=np.array(max_images, np.int64),
            done=np.zeros(n, bool),
            carried=np.zeros(n, np.int64),
        )
        for row, (prompt, name) in enumerate(zip(prompts, force_image, strict=True)):
            cursor.state[row], cursor.offset[row] = self.open_block(prompt)
            cursor.carried[row] = cursor.offset[row]
            if name is not None:
                if cursor.state[row]:
                    raise ValueError(f"prompt {row} ends inside an image, so no other can be opened there")
                cursor.state[row] = self.state_of(name)
                cursor.images[row] -= 1
            need = self.length[cursor.state[row]] - cursor.offset[row]
            if cursor.room[row] < need:
                raise ValueError(
                    f"row {row} has room for {max(cursor.room[row], 0)} new ids (max_new_tokens, and the positions "
                    f"of the model after a prompt of {len(prompt)}); its image needs {need}"
                )
        return cursor, cursor._force(np.arange(n))


@dataclass
class Cursor:
    """Where every row stands. After each call a row stands at text or at a code, never at a forced id."""

    grammar: Grammar
    state: np.ndarray  # int64 [B]
    offset: np.ndarray  # int64 [B]
    room: np.ndarray  # int64 [B] ids that may still come
    images: np.ndarray  # int64 [B] images that may still begin
    done: np.ndarray  # bool [B]
    carried: np.ndarray  # int64 [B] ids of an open block that the prompt held

    def kind(self) -> np.ndarray:
        """int64 [B]: which of `grammar.kinds` the next id of each row is drawn from."""
        return self.grammar.kind[self.state, self.offset]

    def begin_allowed(self, rows: np.ndarray) -> np.ndarray:
        """bool [n, S - 1]: whether each image tokenizer may begin here: allowed, within budget, and the block fits."""
        fits = self.room[rows, None] >= self.grammar.length[None, 1:]
        return fits & (self.images[rows, None] > 0) & self.grammar.may_begin

    def push(self, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Take the id drawn for each of `rows` [n]; return all that this emits, int64 [n, 1 + F], padded with -1.

        The drawn id stands first (-1 where it was an EOS), the ids it forces after it.
        """
        g = self.grammar
        in_text = self.state[rows] == TEXT
        opens = np.where(in_text, g.begin_state[ids], 0)
        ends = in_text & g.is_eos[ids]
        self.state[rows] = np.where(in_text, opens, self.state[rows])
        self.offset[rows] = np.where(in_text, opens > 0, self.offset[rows] + 1)
        self.images[rows] -= opens > 0
        self.room[rows] -= ~ends
        self.done[rows] |= ends
        return np.concatenate([np.where(ends, -1, ids)[:, None], self._force(rows)], axis=1)

    def _force(self, rows: np.ndarray) -> np.ndarray:
        """Move `rows` over the forced ids at their offset; return these, int64 [n, F], padded with -1."""
        g = self.grammar
        state, offset = self.state[rows], self.offset[rows]
        run = g.run[state, offset]
        span = np.arange(run.max(initial=0))
        column = np.minimum(offset[:, None] + span, g.forced.shape[1] - 1)
        out = np.where(span < run[:, None], g.forced[state[:, None], column], -1)
        offset = offset + run
        leaves = offset == g.length[state]  # text has length 0 and offset 0: it "leaves" to itself
        self.state[rows] = np.where(leaves, TEXT, state)
        self.offset[rows] = np.where(leaves, 0, offset)
        self.room[rows] -= run
        self.done[rows] |= self.room[rows] <= 0
        return out
