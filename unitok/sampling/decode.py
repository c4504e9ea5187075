"""The decode loop: ids for many prompts at once, under the grammar of a joint vocabulary.

One batched forward a step holds every row: rows in text and rows in images, and the guidance branches of those in
images. A row's ids depend on its own prompt and seed, never on its batch-mates. Ids that the layout forces are fed, not
drawn, and where all rows have some waiting they go together with the id before them.

B requests, R rows of the forward (a request's own, and its guidance branches), W ids fed at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from unitok.sampling.choose import Choice, choose, draw_keys
from unitok.sampling.grammar import TEXT, Cursor, Grammar
from unitok.sampling.guidance import BLIND, BRANCHES, branch_weights, habit, mix, plausible, text_weights
from unitok.sampling.rows import Rows
from unitok.vocab import JointVocab

Ids = Sequence[int] | np.ndarray

DROP_AT = 8  # rows that are done are dropped once they are one in eight: dropping copies the cache of the others


@torch.no_grad()
def generate_ids(
    lm: nn.Module,
    prompts: Sequence[Ids],
    vocab: JointVocab | None,
    *,
    text_size: int,
    eos_ids: Sequence[int] = (),
    max_new_tokens: int | Sequence[int],
    min_new_tokens: int = 0,
    max_images: int | Sequence[int] = 0,
    force_image: str | None | Sequence[str | None] = None,
    null_prompts: Sequence[Ids] | None = None,
    image_null_prompts: Sequence[Ids] | None = None,
    blind_prompts: Sequence[Ids] | None = None,
    guidance: float | tuple[float, float] | Sequence[float | tuple[float, float]] = 1.0,
    text_guidance: float | Sequence[float] = 1.0,
    temperature: float | tuple[float, float] = 1.0,
    top_k: int | tuple[int, int] = 0,
    top_p: float | tuple[float, float] = 1.0,
    seeds: Sequence[int] | None = None,
    tokenizers: Sequence[str] | None = None,
    grids: Mapping[str, tuple[int, ...]] | None = None,
) -> list[list[int]]:
    """New ids for each prompt: without the prompt, without the EOS.

    lm: a Hugging Face causal LM, or one inside a PEFT wrapper; attention models only.
    text_size: `len(text_tokenizer)`; text ids from there on are never emitted, and image ids only inside their blocks.
    max_new_tokens, max_images: for all rows, or one each. An image begins only where its whole block fits; a row also
        ends where the model has no position left.
    min_new_tokens: no row ends by an EOS before it has so many.
    force_image: the tokenizer whose block opens right after the prompt, for all rows or one each; it is given whatever
        max_images says, and counts. A prompt may also end inside a block, which is then completed.
    guidance: of image codes only. A number, a pair (text, image), or a list with one of these a row; 1 costs nothing.
        `null_prompts`, one a row, hold the prompt with everything dropped (or a negative prompt); `image_null_prompts`,
        for pairs, the prompt with its text dropped and its images kept. A branch sees its prompt and then the block of
        the current image.
    text_guidance: of text only, in rows that begin with text; for all rows or one each, 1 costs nothing.
        `blind_prompts`, one a row, hold the prompt with its images dropped.
    temperature (0: greedy), top_k (0: off), top_p (1: off): for all ids, or a pair (text, image codes).
    seeds: one a row; needed unless greedy.
    tokenizers: the names that may begin an image (default: all). grids: the grid of a name where it is not the default.
    """
    begun = [np.asarray(p, np.int64).reshape(-1) for p in prompts]
    count = len(begun)
    if not count:
        return []
    grammar = Grammar(vocab, text_size, eos_ids, tokenizers=tokenizers, grids=grids)
    forced = _per_row(force_image, count, "force_image")
    weights = np.stack([text_weights(text_guidance, count), np.zeros((count, BRANCHES), np.float32)])  # [2, B, 4]
    weights[1, :, :BLIND] = branch_weights(guidance if grammar.names else 1.0, count)
    texts_images = [_pair(x, name) for x, name in ((temperature, "temperature"), (top_k, "top_k"), (top_p, "top_p"))]
    choices = [Choice(*values) for values in zip(*texts_images, strict=True)]
    branches = _branches(weights, [null_prompts, image_null_prompts, blind_prompts], count)
    for row, prompt in enumerate(begun):
        if not len(prompt) and forced[row] is None:
            raise ValueError(f"prompt {row} is empty: give it at least one id (BOS), or force an image")
    positions, block = _positions(lm), int(grammar.length.max())
    _check_ids(begun, grammar.rows, positions, "prompt")
    _check_ids(branches[1], grammar.rows, positions - block, "null prompt")
    _check_ids(branches[2], grammar.rows, positions - block, "image null prompt")
    _check_ids(branches[BLIND], grammar.rows, positions, "blind prompt")
    if seeds is None and not all(choice.greedy for choice in choices):
        raise ValueError("seeds are needed, one a row, unless the temperature is 0")
    if seeds is not None and len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} prompts")

    room = np.array(_per_row(max_new_tokens, count, "max_new_tokens"), np.int64)
    longest = [max(map(len, own)) for own in zip(begun, branches[BLIND] or begun, strict=True)]
    room = np.minimum(room, positions - np.array(longest))
    budget = np.array(_per_row(max_images, count, "max_images"), np.int64)
    cursor, first = grammar.start(begun, room, budget, forced)

    training = lm.training
    lm.eval()
    try:
        return _Loop(lm, grammar, cursor, begun, first, weights, branches, choices, seeds, min_new_tokens).run()
    finally:
        lm.train(training)


class _Loop:
    """The state of one call. `rows` holds the prompts' rows first, in order, then guidance branches as they came."""

    def __init__(
        self,
        lm: nn.Module,
        grammar: Grammar,
        cursor: Cursor,
        prompts: Sequence[np.ndarray],
        first: np.ndarray,
        weights: np.ndarray,
        branches: Sequence[Sequence[np.ndarray]],
        choices: Sequence[Choice],
        seeds: Sequence[int] | None,
        least: int,
    ):
        count, width = len(prompts), max(int(cursor.room.max()) + first.shape[1], 0)
        self.grammar, self.cursor, self.prompts = grammar, cursor, prompts
        self.weights, self.branches, self.choices, self.least = weights, branches, choices, least
        self.rows = Rows(lm, grammar.kinds)
        self.keys = draw_keys([0] * count if seeds is None else seeds, width).numpy()  # [B, width]
        # The last id of the prompt, then the new ids; all but the first `fed` of `count` wait to be fed.
        self.ids = np.zeros((count, 1 + width), np.int64)
        self.ids[:, 0] = [p[-1] if len(p) else 0 for p in prompts]
        self.count = np.ones(count, np.int64)
        self.fed = np.zeros(count, np.int64)
        self._write(np.arange(count), first)
        self.owner = np.zeros(0, np.int64)  # [R] the request of each row
        self.branch = np.zeros(0, np.int64)  # [R] 0 the request itself, 1 to 3 its guidance branches
        self.alive = np.zeros(0, bool)  # [R]

    def run(self) -> list[list[int]]:
        cursor = self.cursor
        # A row that opens an image at once feeds its whole prompt first, so that its branches can begin with the image.
        inside = cursor.state != TEXT
        self.fed[inside & (cursor.carried == 0)] = 1
        prefixes = [prompt[: len(prompt) - 1 + fed] for prompt, fed in zip(self.prompts, self.fed, strict=True)]
        self._add(np.arange(len(prefixes)), 0, prefixes)
        self._add_branches(inside)
        self.weights[TEXT, inside] = text_weights(1.0, 1)  # the text behind its image has no blind branch
        blind = np.flatnonzero(self.weights[TEXT, :, BLIND])
        if len(blind):
            self._add(blind, BLIND, [self.branches[BLIND][row][:-1] for row in blind.tolist()])
        while not cursor.done.all():
            self._drop()
            live = ~cursor.done
            width = int((self.count - self.fed)[live].min())
            at = np.minimum(self.fed[self.owner, None] + np.arange(width), self.ids.shape[1] - 1)
            ids = self.ids[self.owner[:, None], at]
            for row in np.flatnonzero((self.branch == BLIND) & (self.fed[self.owner] == 0)).tolist():
                ids[row, 0] = self.branches[BLIND][self.owner[row]][-1]  # a prompt without images may end otherwise
            last = self.rows.feed(ids)
            self.fed[live] += width
            self._draw(last, live & (self.fed == self.count))
        return [ids[1:n].tolist() for ids, n in zip(self.ids, self.count, strict=True)]

    def _draw(self, last: torch.Tensor, ready: np.ndarray) -> None:
        """Draw the next id of every ready row, kind by kind; rows of one kind share their logits' columns."""
        was_text = self.cursor.state == TEXT
        kind = self.cursor.kind()
        for k in np.unique(kind[ready]).tolist():
            which = np.flatnonzero(ready & (kind == k))  # [n]
            logits = self._logits(last, which, k)
            choice = self.choices[k != TEXT]
            if k == TEXT and len(self.grammar.names):
                banned = torch.from_numpy(~self.cursor.begin_allowed(which)).to(logits.device)
                logits[:, -banned.shape[1] :].masked_fill_(banned, float("-inf"))
            early = self.count[which] - 1 < self.least
            if k == TEXT and early.any():
                ends = early[:, None] & self.grammar.is_eos[self.grammar.kinds[k]]
                logits.masked_fill_(torch.from_numpy(ends).to(logits.device), float("-inf"))
            keys = torch.from_numpy(self.keys[which, self.count[which] - 1]).to(logits.device)
            index = choose(logits, choice, keys).cpu().numpy()
            self._write(which, self.cursor.push(which, self.grammar.kinds[k][index]))
        self._add_branches(was_text & (self.cursor.state != TEXT))

    def _logits(self, last: torch.Tensor, which: np.ndarray, kind: int) -> torch.Tensor:
        """Logits [n, K] of the requests `which`, guided."""
        place = np.full(len(self.prompts), -1)
        place[which] = np.arange(len(which))
        at = np.full(len(self.prompts), -1)
        own = np.flatnonzero(self.branch == 0)
        at[self.owner[own]] = own
        weights = self.weights[int(kind != TEXT)]  # [B, 4]
        guiding = (self.branch > 0) & (weights[self.owner, self.branch] != 0)
        others = np.flatnonzero(self.alive & guiding & (place[self.owner] >= 0))
        index = np.concatenate([at[which], others])
        if len(index) < len(self.rows):
            last = last[torch.from_numpy(index).to(last.device)]
        logits = self.rows.logits(last, kind)
        if not len(others):
            return logits
        owner, branch, n = self.owner[others], self.branch[others], len(which)
        parts = (place[owner], weights[which, 0], weights[owner, branch])
        rows, scales, other_scales = (torch.from_numpy(part).to(logits.device) for part in parts)
        if kind != TEXT:
            return mix(logits[:n], logits[n:], rows, scales, other_scales)
        said = habit(logits[n:], other_scales)
        return plausible(logits[:n], mix(logits[:n], said, rows, scales, other_scales), scales)

    def _write(self, which: np.ndarray, new: np.ndarray) -> None:
        """Append the ids of each row of `new` [n, F], padded with -1."""
        row, column = np.nonzero(new >= 0)
        self.ids[which[row], self.count[which[row]] + column] = new[row, column]
        self.count[which] += (new >= 0).sum(1)

    def _add(self, requests: np.ndarray, branch: int, prefixes: Sequence[np.ndarray]) -> None:
        self.rows.add([prefix.tolist() for prefix in prefixes])
        self.owner = np.concatenate([self.owner, requests])
        self.branch = np.concatenate([self.branch, np.full(len(requests), branch)])
        self.alive = np.concatenate([self.alive, np.ones(len(requests), bool)])

    def _add_branches(self, opened: np.ndarray) -> None:
        """Rows for the branches that the requests whose block just opened need; the block itself is fed with theirs."""
        for branch in range(1, BLIND):
            requests = np.flatnonzero(opened & (self.weights[1, :, branch] != 0))
            prefixes = []
            for b in requests.tolist():
                block = self.prompts[b][len(self.prompts[b]) - self.cursor.carried[b] :]  # what the prompt has of it
                prefixes.append(np.concatenate([self.branches[branch][b], block[:-1]]))
            if len(requests):
                self._add(requests, branch, prefixes)
        self.cursor.carried[opened] = 0

    def _drop(self) -> None:
        """Forget rows that are done, and branches whose image is."""
        done, text = self.cursor.done[self.owner], self.cursor.state[self.owner] == TEXT
        of_image = (self.branch > 0) & (self.branch < BLIND)
        self.alive &= ~done & ~(of_image & text)
        dead = len(self.alive) - int(self.alive.sum())
        if dead * DROP_AT >= len(self.alive) and dead:
            keep = np.flatnonzero(self.alive)
            self.rows.keep(keep)
            self.owner, self.branch, self.alive = self.owner[keep], self.branch[keep], self.alive[keep]


def _branches(weights: np.ndarray, given: Sequence, count: int) -> list[list[np.ndarray]]:
    """[nothing, null, image null, blind prompts], each with one array a row, or empty where no row needs it."""
    out: list[list[np.ndarray]] = [[]]
    names = ("null_prompts", "image_null_prompts", "blind_prompts")
    for branch, (name, prompts) in enumerate(zip(names, given, strict=True), start=1):
        if not weights[:, :, branch].any():
            out.append([])
        elif prompts is None:
            raise ValueError(f"this guidance needs {name}, one a row (guidance 1 needs none)")
        elif len(prompts) != count:
            raise ValueError(f"{len(prompts)} {name} for {count} prompts")
        elif branch == BLIND and not all(map(len, prompts)):
            raise ValueError("each of blind_prompts needs at least one id (BOS)")
        else:
            out.append([np.asarray(p, np.int64).reshape(-1) for p in prompts])
    return out


def _check_ids(prompts: Sequence[np.ndarray], rows: int, longest: int, what: str) -> None:
    for row, ids in enumerate(prompts):
        if len(ids) and not (0 <= ids.min() and ids.max() < rows):
            raise ValueError(f"{what} {row} has ids from {ids.min()} to {ids.max()}; expected 0 to {rows - 1}")
        if len(ids) > longest:
            raise ValueError(f"{what} {row} has {len(ids)} ids; the model has room for {longest} of them")


def _positions(lm: Any) -> int:
    """How many positions the model has; a large number where it does not say."""
    limit = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit and limit > 0 else 2**31


def _per_row(value, count: int, name: str) -> list:
    if value is None or isinstance(value, (int, str, np.integer)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries for {count} prompts")
    return list(value)


def _pair(value, name: str) -> tuple:
    """(for text, for image codes)."""
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name} is {value!r}; expected one number or a pair (text, image codes)")
    return tuple(value)
