"""JointVocab: every id of the joint vocabulary, and how an image's codes become a block of ids and back.

All id arithmetic of the project is here and nowhere else. Shapes: N codes an image (the product of its grid,
sub-tokens last, position-major), L ids a block. Everything is numpy int64.

A layout is a list of items, each a control id by its name except three:
    codes   the N code tokens
    rows    the code tokens, `row_end` after each row (each step of the grid's first axis)
    size    the grid's first two axes as decimal digits, `size_sep` between them
`begin codes end` says nothing about the grid, so it carries the default grid only; `size` and `rows` carry any.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

LAYOUT = ("begin", "codes", "end")
CONTROLS = ("begin", "end", "mask")
SPARES = tuple(f"spare_{i}" for i in range(8))
DIGITS = tuple(f"digit_{i}" for i in range(10))
SIZE_SEP = "size_sep"
ROW_END = "row_end"
SPECIAL = {"codes": (), "rows": (ROW_END,), "size": (*DIGITS, SIZE_SEP)}  # items that are no control id; what they need


@dataclass(frozen=True)
class Codebook:
    """The ids of codes 0 .. size-1: an offset, or a table of ids where a published model permutes them."""

    size: int
    offset: int | None = None
    table: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"codebook size must be at least 1, got {self.size}")
        if (self.offset is None) == (self.table is None):
            raise ValueError("a codebook needs an offset or a table of ids, and not both")
        if self.table is not None:
            object.__setattr__(self, "table", tuple(int(i) for i in self.table))
            if len(self.table) != self.size or len(set(self.table)) != self.size:
                raise ValueError(f"codebook table: expected {self.size} different ids, got {len(set(self.table))}")
        if self.span[0] < 0:
            raise ValueError(f"codebook ids must not be negative, got {self.span[0]}")

    @property
    def ids(self) -> Sequence[int]:
        """All ids, in the order of their codes."""
        if self.table is not None:
            return self.table
        assert self.offset is not None
        return range(self.offset, self.offset + self.size)

    @property
    def span(self) -> tuple[int, int]:
        """Lowest and highest id."""
        return (self.ids[0], self.ids[-1]) if self.table is None else (min(self.table), max(self.table))

    def to_ids(self, codes: np.ndarray) -> np.ndarray:
        codes = _integers(codes, "codes")
        bad = (codes < 0) | (codes >= self.size)
        if bad.any():
            raise ValueError(f"code {codes[bad][0]} is out of range: expected 0 <= code < {self.size}")
        return codes + self.offset if self.table is None else self._lookup[0][codes]

    def to_codes(self, ids: np.ndarray) -> np.ndarray:
        ids = _integers(ids, "ids")
        found = self.contains(ids)
        if not found.all():
            raise ValueError(f"id {ids[~found][0]} is not a code of this codebook ({self})")
        if self.table is None:
            return ids - self.offset
        _, codes, ordered = self._lookup
        return codes[np.searchsorted(ordered, ids)]

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """bool, of the shape of `ids`."""
        ids = np.asarray(ids)
        if self.offset is not None:
            return (ids >= self.offset) & (ids < self.offset + self.size)
        ordered = self._lookup[2]
        return ordered[np.minimum(np.searchsorted(ordered, ids), self.size - 1)] == ids

    @cached_property
    def _lookup(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The table, the codes in the order of their ids, the ids in order."""
        table = np.asarray(self.table, dtype=np.int64)
        codes = np.argsort(table)
        return table, codes, table[codes]

    def __str__(self) -> str:
        return "ids {}..{}".format(*self.span) + ("" if self.table is None else " by table")


@dataclass(frozen=True)
class ImageVocab:
    """One image tokenizer's ids: codebooks, control ids by name, default grid and layout."""

    codebooks: tuple[Codebook, ...]
    grid: tuple[int, ...]
    control: Mapping[str, int]
    layout: tuple[str, ...] = LAYOUT
    token_codebook: tuple[int, ...] | None = None  # [N] of the default grid; None: all 0, or 0..k-1 over the last axis

    def __post_init__(self) -> None:
        for name in ("codebooks", "layout"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "grid", _grid(self.grid))
        object.__setattr__(self, "control", {str(k): int(v) for k, v in self.control.items()})
        if not self.codebooks:
            raise ValueError("an image tokenizer needs at least one codebook")
        if min(self.control.values(), default=0) < 0 or len(set(self.control.values())) != len(self.control):
            raise ValueError(f"control ids must be different and not negative, got {self.control}")
        self._check_layout()
        books, count, order = len(self.codebooks), math.prod(self.grid), self.token_codebook
        usual = _usual_order(books, self.grid)
        if order is None and usual is None:
            raise ValueError(
                f"{books} codebooks on the grid {self.grid}: token_codebook must say which token has which"
            )
        if order is not None:
            order = tuple(int(k) for k in order)
            if len(order) != count or not set(order) <= set(range(books)):
                raise ValueError(
                    f"token_codebook: expected {count} numbers of 0..{books - 1}, got {len(order)}: {order}"
                )
            object.__setattr__(self, "token_codebook", None if usual is not None and order == tuple(usual) else order)

    def _check_layout(self) -> None:
        text = " ".join(self.layout)
        if not self.layout or self.layout[0] != "begin" or self.layout[-1] in ("begin", *SPECIAL):
            raise ValueError(f"layout {text!r}: expected 'begin' first and a control id last")
        specials = [item for item in self.layout if item in SPECIAL]
        if specials[-1:] not in (["codes"], ["rows"]) or specials[:-1] not in ([], ["size"]):
            raise ValueError(f"layout {text!r}: expected 'codes' or 'rows' once, and no more than a 'size' before it")
        if len(set(self.layout)) != len(self.layout) or ROW_END in self.layout:
            raise ValueError(f"layout {text!r}: expected every item once, and '{ROW_END}' by way of 'rows' only")
        if "rows" in self.layout and len(self.grid) < 2:
            raise ValueError(f"layout {text!r}: rows need a grid of two axes or more, got {self.grid}")
        for name in needed_controls(self.layout):
            if name not in self.control:
                raise ValueError(f"layout {text!r}: no control id {name!r}")

    @property
    def variable(self) -> bool:
        """Whether the layout carries the grid, so that it may differ from image to image."""
        return "size" in self.layout or "rows" in self.layout

    def codebook_of(self, grid: Sequence[int] | None = None) -> np.ndarray:
        """int64 [N]: the codebook each code token is drawn from; ValueError where the layout cannot carry the grid."""
        grid = self.grid if grid is None else _grid(grid)
        if grid == self.grid:
            if self.token_codebook is not None:
                return np.asarray(self.token_codebook, dtype=np.int64)
        elif not self.variable:
            raise ValueError(
                f"grid {grid}: the layout '{' '.join(self.layout)}' carries the grid {self.grid} only;"
                " add the tokenizer with a layout that has 'size' or 'rows' (expand --layout rows)"
            )
        elif self.token_codebook is not None:
            raise ValueError(f"grid {grid}: token_codebook is given for the grid {self.grid} only")
        sub_tokens = grid[-1] == self.grid[-1] or len(self.codebooks) == 1
        if len(grid) != len(self.grid) or grid[2:] != self.grid[2:] or not sub_tokens:
            raise ValueError(f"grid {grid}: expected the axes of {self.grid}, of which only positions may differ")
        order = _usual_order(len(self.codebooks), grid)
        assert order is not None  # __post_init__ has seen to it
        return order

    def length(self, grid: Sequence[int] | None = None) -> int:
        """L, without building the block."""
        grid = self.grid if grid is None else _grid(grid)
        header = len(self._header(grid)) if "size" in self.layout else 0
        rows = grid[0] if "rows" in self.layout else 0
        return math.prod(grid) + rows + header + sum(item not in SPECIAL for item in self.layout)

    def slots(self, grid: tuple[int, ...] | None = None) -> np.ndarray:
        """int64 [L]: an id that is forced, or -1-k for any code of codebook k."""
        grid = self.grid if grid is None else _grid(grid)
        codes = -1 - self.codebook_of(grid)
        out: list[np.ndarray | list[int]] = []
        for item in self.layout:
            if item == "codes":
                out.append(codes)
            elif item == "rows":
                rows = codes.reshape(grid[0], -1)
                ends = np.full((grid[0], 1), self.control[ROW_END])
                out.append(np.concatenate([rows, ends], axis=1).reshape(-1))
            elif item == "size":
                out.append(self._header(grid))
            else:
                out.append([self.control[item]])
        return np.concatenate(out).astype(np.int64)

    def _header(self, grid: tuple[int, ...]) -> list[int]:
        words = [[self.control[DIGITS[int(d)]] for d in str(axis)] for axis in grid[:2]]
        return words[0] if len(words) == 1 else [*words[0], self.control[SIZE_SEP], *words[1]]

    def grid_at(self, ids: np.ndarray, start: int) -> tuple[int, ...]:
        """The grid of the block that begins at ids[start], read from its header or its first row."""
        if "size" in self.layout:
            return self._grid_from_header(ids, start + self.layout.index("size"))
        if "rows" in self.layout:
            return self._grid_from_rows(ids, start + self.layout.index("rows"))
        return self.grid

    def _grid_from_header(self, ids: np.ndarray, at: int) -> tuple[int, ...]:
        digit = {self.control[name]: str(i) for i, name in enumerate(DIGITS)}
        text, stop = "", at
        longest = len(str(len(ids))) * 2 + 1  # no side can be longer than the ids that are there
        while stop < len(ids) and stop - at <= longest and (ids[stop] in digit or ids[stop] == self.control[SIZE_SEP]):
            text, stop = text + digit.get(int(ids[stop]), "x"), stop + 1
        axes = min(2, len(self.grid))
        if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (axes - 1), text):
            raise ValueError(f"position {at}: expected the size of an image ({axes} numbers), got {text!r}")
        return (*(int(side) for side in text.split("x")), *self.grid[2:])

    def _grid_from_rows(self, ids: np.ndarray, at: int) -> tuple[int, ...]:
        after = self.layout[self.layout.index("rows") + 1]
        stop = np.flatnonzero(ids[at:] == self.control[after])
        if len(stop) == 0:
            raise ValueError(f"position {len(ids)}: expected {after!r} after the rows of an image, got nothing")
        rows, inner = ids[at : at + stop[0]], math.prod(self.grid[2:])
        step = int(np.argmax(rows == self.control[ROW_END])) + 1 if len(rows) else 1
        if step == 1 or (step - 1) % inner:
            raise ValueError(f"position {at}: expected rows of codes (a multiple of {inner}), each closed by 'row_end'")
        return (len(rows) // step, (step - 1) // inner, *self.grid[2:])

    def to_dict(self) -> dict[str, Any]:
        books = [
            {"size": b.size, "offset": b.offset} if b.table is None else {"size": b.size, "table": list(b.table)}
            for b in self.codebooks
        ]
        return {
            "codebooks": books,
            "grid": list(self.grid),
            "control": dict(self.control),
            "layout": " ".join(self.layout),
            "token_codebook": None if self.token_codebook is None else list(self.token_codebook),
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> ImageVocab:
        d = _known(d, ("codebooks", "grid", "control", "layout", "token_codebook"), ("codebooks", "grid", "control"))
        books = tuple(Codebook(**_known(b, ("size", "offset", "table"), ("size",))) for b in d["codebooks"])
        layout = tuple(d.get("layout", " ".join(LAYOUT)).split())
        return cls(books, tuple(d["grid"]), d["control"], layout, d.get("token_codebook"))


@dataclass(frozen=True)
class JointVocab:
    """Text rows, then what image tokenizers added. Frozen; `add` returns a new one."""

    text_rows: int  # rows of the base's embedding, padding rows included
    images: Mapping[str, ImageVocab] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.text_rows < 0:
            raise ValueError(f"text_rows must not be negative, got {self.text_rows}")
        object.__setattr__(self, "images", dict(self.images))
        for name in self.images:
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):  # it also names a folder
                raise ValueError(f"image tokenizer name {name!r}: expected letters, digits, '_', '-' and '.'")
        taken = np.sort(np.concatenate([ids for _, ids in self._owned()] or [np.zeros(0, np.int64)]))
        twice = taken[1:][taken[1:] == taken[:-1]]
        if len(twice):
            owners = [label for label, ids in self._owned() if twice[0] in ids]
            raise ValueError(f"id {twice[0]} is both {owners[0]} and {owners[-1]}")

    def _owned(self) -> Iterator[tuple[str, np.ndarray]]:
        """(label, ids) of all that is no text. A size may be written in ordinary text digits, which stay text."""
        for name, image in self.images.items():
            for label, i in image.control.items():
                if i >= self.text_rows or label not in (*DIGITS, SIZE_SEP):
                    yield f"{name}.{label}", np.asarray([i])
            for k, book in enumerate(image.codebooks):
                yield f"{name}.codebooks.{k}", np.asarray(book.ids, dtype=np.int64)

    @cached_property
    def rows(self) -> int:
        """All rows of the embedding: 1 + the highest id used, at least the text rows."""
        used = [book.span[1] for image in self.images.values() for book in image.codebooks]
        used += [i for image in self.images.values() for i in image.control.values()]
        return max([self.text_rows, *(i + 1 for i in used)])

    @cached_property
    def _kinds(self) -> np.ndarray:
        """int8 [rows]: 0 text, 1 belongs inside a block, 2 begins one."""
        kinds = np.zeros(self.rows, dtype=np.int8)
        for _, ids in self._owned():
            kinds[ids] = 1
        kinds[list(self._begins)] = 2
        return kinds

    @cached_property
    def _begins(self) -> dict[int, str]:
        return {image.control["begin"]: name for name, image in self.images.items()}

    @cached_property
    def _plans(self) -> dict[tuple[str, tuple[int, ...]], np.ndarray]:
        return {}

    def resolve(self, name: str | None) -> str:
        """The name itself, or the only one where None; ValueError listing the names."""
        if name is None and len(self.images) == 1:
            return next(iter(self.images))
        if name is None or name not in self.images:
            asked = "several image tokenizers, name one" if name is None else f"no image tokenizer {name!r}"
            raise ValueError(f"{asked}; this vocabulary has: {', '.join(self.images) or 'none'}")
        return name

    def add(
        self,
        name: str,
        codebook_sizes: Sequence[int],
        grid: Sequence[int],
        *,
        token_codebook: Sequence[int] | None = None,
        controls: Sequence[str] = CONTROLS,
        layout: Sequence[str] = LAYOUT,
        tables: Sequence[Sequence[int] | None] | None = None,
    ) -> JointVocab:
        """A vocabulary with one more image tokenizer: its controls, eight spares, then its codebooks, after all rows.

        `controls` gains what `layout` needs; `tables[k]` (absolute ids) takes the place of new rows for codebook k.
        """
        if name in self.images:
            raise ValueError(f"this vocabulary already has an image tokenizer {name!r}; give it another name")
        names = list(dict.fromkeys([*controls, *needed_controls(layout), *SPARES]))
        control = {label: self.rows + i for i, label in enumerate(names)}
        at, books = self.rows + len(names), []
        for k, size in enumerate(codebook_sizes):
            table = None if tables is None else tables[k]
            if table is not None:
                books.append(Codebook(int(size), table=tuple(table)))
            else:
                books.append(Codebook(int(size), offset=at))
                at += int(size)
        order = None if token_codebook is None else tuple(token_codebook)
        image = ImageVocab(tuple(books), tuple(grid), control, tuple(layout), order)
        return replace(self, images={**self.images, name: image})

    def slots(self, name: str | None = None, grid: Sequence[int] | None = None) -> np.ndarray:
        """int64 [L], read-only: the block as a plan; an id that is forced, or -1-k for any code of codebook k."""
        name = self.resolve(name)
        key = (name, self.images[name].grid if grid is None else _grid(grid))
        if key not in self._plans:
            plan = self.images[name].slots(key[1])
            plan.setflags(write=False)
            self._plans[key] = plan
        return self._plans[key]

    def block_length(self, name: str | None = None, grid: Sequence[int] | None = None) -> int:
        return self.images[self.resolve(name)].length(grid)

    def allowed(self, name: str | None, j: int, grid: Sequence[int] | None = None) -> Sequence[int]:
        """The ids that may stand at code token j, 0 <= j < N."""
        image = self.images[self.resolve(name)]
        order = image.codebook_of(grid)
        if not 0 <= j < len(order):
            raise ValueError(f"code token {j} is out of range: expected 0 <= j < {len(order)}")
        return image.codebooks[order[j]].ids

    def to_ids(self, codes: np.ndarray, grid: Sequence[int] | None = None, name: str | None = None) -> np.ndarray:
        """Codes, int [N] or in the shape of the grid -> the whole block, int64 [L]."""
        name = self.resolve(name)
        image = self.images[name]
        codes = _integers(codes, "codes")
        shape = image.grid if grid is None else _grid(grid)
        if codes.shape not in ((math.prod(shape),), shape):
            raise ValueError(f"codes of {name!r}: expected {math.prod(shape)} for the grid {shape}, got {codes.shape}")
        out = self.slots(name, shape).copy()
        places, codes = np.flatnonzero(out < 0), codes.reshape(-1)
        order = -1 - out[places]
        for k, book in enumerate(image.codebooks):
            mine = order == k
            out[places[mine]] = book.to_ids(codes[mine])
        return out

    def from_ids(self, ids: np.ndarray) -> tuple[str, np.ndarray, tuple[int, ...]]:
        """A whole block -> (name, codes int64 [N], grid); ValueError naming the position and what was expected."""
        ids = self._checked(ids)
        name, codes, grid, stop = self._block_at(ids, 0)
        if stop != len(ids):
            raise ValueError(f"position {stop}: expected the end of the ids, got id {ids[stop]}")
        return name, codes, grid

    def split(self, ids: np.ndarray) -> list[tuple]:
        """A stream -> [("text", ids), ("image", name, codes, grid), ...] in order; ValueError on a malformed one."""
        ids = self._checked(ids)
        pieces: list[tuple] = []
        marks, at = np.flatnonzero(self._kinds[ids]), 0
        while at < len(ids):
            after = np.searchsorted(marks, at)
            stop = int(marks[after]) if after < len(marks) else len(ids)
            if stop > at:
                pieces.append(("text", ids[at:stop]))
            if stop == len(ids):
                break
            name, codes, grid, at = self._block_at(ids, stop)
            pieces.append(("image", name, codes, grid))
        return pieces

    def _block_at(self, ids: np.ndarray, start: int) -> tuple[str, np.ndarray, tuple[int, ...], int]:
        if start >= len(ids) or int(ids[start]) not in self._begins:
            got = f"id {ids[start]}" if start < len(ids) else "nothing"
            raise ValueError(f"position {start}: expected the begin of an image, got {got}")
        name = self._begins[int(ids[start])]
        image = self.images[name]
        grid = image.grid_at(ids, start)
        stop = start + image.length(grid)
        # A header may ask for more than there is: look at no more than that, and build no plan for it.
        if stop > len(ids) and grid != image.grid:
            raise ValueError(f"position {len(ids)}: expected {stop - len(ids)} more ids of {name!r} with grid {grid}")
        try:
            plan = self.slots(name, grid)
        except ValueError as error:
            raise ValueError(f"position {start}: expected an image of {name!r}, got another {error}") from None
        block = ids[start:stop]
        codes = np.full(len(plan), -1, dtype=np.int64)
        good = plan[: len(block)] == block
        for k, book in enumerate(image.codebooks):
            mine = np.flatnonzero((plan[: len(block)] == -1 - k) & book.contains(block))
            codes[mine] = book.to_codes(block[mine])
            good[mine] = True
        if not good.all() or len(block) < len(plan):
            j = len(block) if good.all() else int(np.argmin(good))
            got = f"id {block[j]}" if j < len(block) else "nothing"
            raise ValueError(f"position {start + j}: expected {self._expected(name, int(plan[j]))}, got {got}")
        return name, codes[plan < 0], grid, stop

    def _expected(self, name: str, slot: int) -> str:
        image = self.images[name]
        if slot < 0:
            return f"a code of {name!r} ({image.codebooks[-1 - slot]})"
        labels = [label for label, i in image.control.items() if i == slot]
        return f"{labels[0]!r} of {name!r} (id {slot})"

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        ids = _integers(ids, "ids").reshape(-1)
        bad = np.flatnonzero((ids < 0) | (ids >= self.rows))
        if len(bad):
            raise ValueError(f"position {bad[0]}: expected 0 <= id < {self.rows}, got id {ids[bad[0]]}")
        return ids

    def to_dict(self) -> dict[str, Any]:
        images = {name: image.to_dict() for name, image in self.images.items()}
        return {"text_rows": self.text_rows, "rows": self.rows, "images": images}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> JointVocab:
        d = _known(d, ("text_rows", "rows", "images"), ("text_rows",))
        try:
            images = {name: ImageVocab.from_dict(image) for name, image in d.get("images", {}).items()}
            vocab = cls(int(d["text_rows"]), images)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"vocab: a value of another type than expected ({error})") from error
        if d.get("rows", vocab.rows) != vocab.rows:
            raise ValueError(f"vocab: rows is {d['rows']}, but its ids need {vocab.rows}")
        return vocab


def needed_controls(layout: Sequence[str]) -> list[str]:
    """The control ids, by name, that a layout writes."""
    return [name for item in layout for name in SPECIAL.get(item, (item,))]


def _usual_order(books: int, grid: tuple[int, ...]) -> np.ndarray | None:
    """The usual order of codebooks: all 0, or 0..k-1 over the last axis; None where the grid has no such axis."""
    count = math.prod(grid)
    if books == 1:
        return np.zeros(count, dtype=np.int64)
    return np.tile(np.arange(books), count // books) if grid[-1] == books else None


def _grid(grid: Sequence[int]) -> tuple[int, ...]:
    axes = tuple(int(axis) for axis in grid)
    if not axes or min(axes) < 1:
        raise ValueError(f"grid: expected one or more axes of at least 1, got {axes}")
    return axes


def _integers(values: Any, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{what}: expected integers, got {array.dtype}")
    return array.astype(np.int64)


def _known(d: Mapping[str, Any], keys: Sequence[str], required: Sequence[str]) -> Mapping[str, Any]:
    wrong = [f"unknown key {k!r}" for k in d if k not in keys] + [f"missing key {k!r}" for k in required if k not in d]
    if wrong:
        raise ValueError(f"vocab: {wrong[0]}; expected {', '.join(keys)}")
    return d
