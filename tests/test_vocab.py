"""JointVocab: round trips and invariants over random vocabularies, literal ids of published forms, pointed errors."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unitok.vocab import DIGITS, SPARES, Codebook, ImageVocab, JointVocab

FIXED = [("begin", "codes", "end"), ("begin", "codes", "image_end", "end")]
SIZED = [("begin", "size", "codes", "end"), ("begin", "size", "image", "codes", "end")]
ROWED = [("begin", "rows", "end"), ("begin", "size", "rows", "image_end", "end")]
axes = st.integers(1, 4)
steady = settings(deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
thorough = settings(steady, max_examples=300)


@st.composite
def vocabs(draw) -> JointVocab:
    """One to three tokenizers: several codebooks, sub-tokens, offsets and tables, every layout."""
    vocab = JointVocab(draw(st.integers(1, 40)))
    for name in draw(st.sampled_from([("a",), ("a", "b"), ("scenes", "b-2", "c.d")])):
        sizes = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
        grid = tuple(draw(st.lists(axes, min_size=1, max_size=3)))
        order = None
        if len(sizes) > 1 and draw(st.booleans()):
            grid = (*grid, len(sizes))  # factors of a position
        elif len(sizes) > 1:
            count = math.prod(grid)
            order = draw(st.lists(st.integers(0, len(sizes) - 1), min_size=count, max_size=count))
        layout = draw(st.sampled_from(FIXED + SIZED + (ROWED if len(grid) > 1 else [])))
        vocab = vocab.add(name, sizes, grid, token_codebook=order, layout=layout)
        if draw(st.booleans()):  # the same rows, permuted as a published model may have them
            image = vocab.images[name]
            books = [Codebook(b.size, table=tuple(draw(st.permutations(b.ids)))) for b in image.codebooks]
            vocab = replace(vocab, images={**vocab.images, name: replace(image, codebooks=tuple(books))})
    return vocab


@st.composite
def pictures(draw, vocab: JointVocab):
    """(name, codes [N], grid) that the vocabulary can write."""
    name = draw(st.sampled_from(sorted(vocab.images)))
    image = vocab.images[name]
    grid = image.grid
    if image.variable and image.token_codebook is None:
        free = min(2, len(grid)) - (len(image.codebooks) > 1 and len(grid) <= 2)
        grid = (*(draw(st.integers(1, 11)) for _ in range(free)), *grid[free:])
    sizes = [image.codebooks[k].size for k in image.codebook_of(grid)]
    codes = [draw(st.integers(0, size - 1)) for size in sizes]
    return name, np.array(codes, dtype=np.int64), grid


def naive_block(vocab: JointVocab, name: str, codes: np.ndarray, grid: tuple[int, ...]) -> list[int]:
    """The block, one id after the other, from the words of the module's docstring."""
    image, order = vocab.images[name], vocab.images[name].codebook_of(grid)
    ids = [image.codebooks[k].ids[int(c)] for k, c in zip(order, codes, strict=True)]
    out: list[int] = []
    for item in image.layout:
        if item == "codes":
            out += ids
        elif item == "rows":
            width = len(ids) // grid[0]
            for row in range(grid[0]):
                out += [*ids[row * width : (row + 1) * width], image.control["row_end"]]
        elif item == "size":
            words = ["size_sep" if c == "x" else f"digit_{c}" for c in "x".join(map(str, grid[:2]))]
            out += [image.control[w] for w in words]
        else:
            out.append(image.control[item])
    return out


# --- round trips ----------------------------------------------------------------------------------------------------


@steady
@given(st.data())
def test_block_round_trip(data):
    vocab = data.draw(vocabs())
    name, codes, grid = data.draw(pictures(vocab))
    ids = vocab.to_ids(codes, grid, name)
    assert ids.dtype == np.int64 and ids.tolist() == naive_block(vocab, name, codes, grid)
    assert vocab.to_ids(codes.reshape(grid).astype(np.int32), grid, name).tolist() == ids.tolist()
    back = vocab.from_ids(ids)
    assert back[0] == name and back[1].tolist() == codes.tolist() and back[2] == grid


@steady
@given(st.data())
def test_slots_and_allowed_describe_the_block(data):
    vocab = data.draw(vocabs())
    name, codes, grid = data.draw(pictures(vocab))
    ids, slots = vocab.to_ids(codes, grid, name), vocab.slots(name, grid)
    assert len(ids) == len(slots) == vocab.block_length(name, grid)
    assert (slots[slots >= 0] == ids[slots >= 0]).all()
    books = vocab.images[name].codebooks
    assert (slots < 0).sum() == len(codes)
    for j, (slot, i) in enumerate(zip(slots[slots < 0], ids[slots < 0], strict=True)):
        allowed = vocab.allowed(name, j, grid)
        assert i in allowed and allowed == books[-1 - slot].ids


@steady
@given(st.data())
def test_stream_round_trip(data):
    vocab = data.draw(vocabs())
    text = st.lists(st.integers(0, vocab.text_rows - 1), max_size=4)
    stream, expected = [], []
    for _ in range(data.draw(st.integers(0, 4))):
        words = data.draw(text)
        name, codes, grid = data.draw(pictures(vocab))
        stream += [*words, *vocab.to_ids(codes, grid, name)]
        expected += [("text", words)] * bool(words) + [("image", name, codes.tolist(), grid)]
    tail = data.draw(text)
    found = vocab.split(np.array(stream + tail, dtype=np.int64))
    plain = [("text", p[1].tolist()) if p[0] == "text" else (*p[:2], p[2].tolist(), p[3]) for p in found]
    assert plain == expected + [("text", tail)] * bool(tail)


@steady
@given(st.data())
def test_json_round_trip(data):
    vocab = data.draw(vocabs())
    back = JointVocab.from_dict(json.loads(json.dumps(vocab.to_dict())))
    assert back == vocab and back.rows == vocab.rows and back.to_dict() == vocab.to_dict()
    name, codes, grid = data.draw(pictures(vocab))
    assert back.to_ids(codes, grid, name).tolist() == vocab.to_ids(codes, grid, name).tolist()
    assert pickle.loads(pickle.dumps(back)) == vocab  # data workers


# --- invariants -----------------------------------------------------------------------------------------------------


@steady
@given(vocabs())
def test_every_row_has_one_meaning(vocab):
    owned = list(range(vocab.text_rows))
    for image in vocab.images.values():
        owned += image.control.values()
        for book in image.codebooks:
            owned += book.ids
    assert sorted(owned) == list(range(vocab.rows))


@steady
@given(vocabs())
def test_adding_moves_nothing(vocab):
    more = vocab.add("another", (5, 3), (2, 2))
    assert {name: more.images[name] for name in vocab.images} == vocab.images
    assert min(more.images["another"].control.values()) == vocab.rows
    assert set(SPARES) < set(more.images["another"].control)
    assert more.rows == vocab.rows + 3 + 8 + 5 + 3
    assert "another" not in vocab.images


@thorough
@given(st.data())
def test_a_damaged_block_is_refused_or_is_another_whole_block(data):
    """No two meanings: whatever from_ids accepts, to_ids writes back id for id."""
    vocab = data.draw(vocabs())
    name, codes, grid = data.draw(pictures(vocab))
    ids = vocab.to_ids(codes, grid, name).tolist()
    at = data.draw(st.integers(0, len(ids) - 1))
    change = data.draw(st.sampled_from(["replace", "insert", "drop", "cut"]))
    new = data.draw(st.sampled_from([*ids, *range(vocab.rows)]))
    damaged = {
        "replace": [*ids[:at], new, *ids[at + 1 :]],
        "insert": [*ids[:at], new, *ids[at:]],
        "drop": [*ids[:at], *ids[at + 1 :]],
        "cut": ids[:at],
    }[change]
    try:
        found = vocab.from_ids(damaged)
    except ValueError as error:
        assert "position" in str(error) and "expected" in str(error) and "\n" not in str(error)
    else:
        assert change != "cut"
        assert vocab.to_ids(found[1], found[2], found[0]).tolist() == damaged


@thorough
@given(st.data())
def test_a_split_stream_is_whole(data):
    """Whatever split accepts, its pieces put together are the stream."""
    vocab = data.draw(vocabs())
    stream: list[int] = []
    for _ in range(data.draw(st.integers(1, 3))):
        name, codes, grid = data.draw(pictures(vocab))
        block = vocab.to_ids(codes, grid, name).tolist()
        stream += block[: data.draw(st.sampled_from([len(block), len(block), len(block) - 1, 1]))]
        stream += data.draw(st.lists(st.integers(0, vocab.rows - 1), max_size=1))
    try:
        pieces = vocab.split(stream)
    except ValueError:
        return
    whole = [p[1].tolist() if p[0] == "text" else vocab.to_ids(p[2], p[3], p[1]).tolist() for p in pieces]
    assert sum(whole, []) == stream


@steady
@given(st.lists(st.integers(0, 99), min_size=1, max_size=20, unique=True), st.lists(st.integers(0, 99)))
def test_a_table_is_a_permuted_offset(table, ids):
    book = Codebook(len(table), table=tuple(table))
    codes = np.arange(len(table))
    assert book.to_ids(codes).tolist() == table and book.to_codes(table).tolist() == codes.tolist()
    assert book.contains(ids).tolist() == [i in table for i in ids]


# --- literal ids ----------------------------------------------------------------------------------------------------


def test_ids_of_the_plain_layout():
    vocab = JointVocab(100).add("scenes", (10,), (2, 2))
    assert vocab.images["scenes"].control == {
        "begin": 100, "end": 101, "mask": 102, **{f"spare_{i}": 103 + i for i in range(8)}
    }  # fmt: skip
    assert vocab.to_ids([0, 1, 2, 9]).tolist() == [100, 111, 112, 113, 120, 101]
    assert vocab.slots().tolist() == [100, -1, -1, -1, -1, 101]
    assert vocab.allowed("scenes", 3) == range(111, 121) and vocab.rows == 121


def test_factors_are_position_major_one_id_each():
    vocab = JointVocab(0).add("two", (4, 3), (1, 2, 2), controls=("begin", "end"))
    assert vocab.slots("two").tolist() == [0, -1, -2, -1, -2, 1]
    assert vocab.to_ids([3, 2, 0, 1]).tolist() == [0, 13, 16, 10, 15, 1]


def test_global_then_local_codes():
    """One codebook for the first token, another for the rest: the order comes with the tokenizer."""
    vocab = JointVocab(7).add("g", (2, 5), (4,), token_codebook=(0, 1, 1, 1))
    first, rest = (book.offset for book in vocab.images["g"].codebooks)
    assert vocab.to_ids([1, 4, 0, 2])[1:-1].tolist() == [first + 1, rest + 4, rest, rest + 2]


def test_a_published_layout_with_its_size_in_text_digits():
    """`begin "2*3" image, rows each closed, end-of-codes, end`: the digits are the text tokenizer's own."""
    digits = {name: 15 + i for i, name in enumerate(DIGITS)}
    control = {"begin": 50, "image": 51, "row_end": 52, "image_end": 53, "end": 54, "size_sep": 9, **digits}
    layout = ("begin", "size", "image", "rows", "image_end", "end")
    vocab = JointVocab(60 + 8, {"emu": ImageVocab((Codebook(8, offset=60),), (2, 2), control, layout)})
    ids = vocab.to_ids([0, 1, 2, 3, 4, 5], (2, 3))
    assert ids.tolist() == [50, 17, 9, 18, 51, 60, 61, 62, 52, 63, 64, 65, 52, 53, 54]
    assert vocab.rows == 68
    pieces = vocab.split([17, 9, *ids, 18])  # the same digits are text outside a block
    assert [p[0] for p in pieces] == ["text", "image", "text"] and pieces[1][3] == (2, 3)


def test_images_of_different_widths_side_by_side():
    """A row end of the second image stands where the first would have its next one."""
    vocab = JointVocab(5).add("r", (4,), (2, 3), layout=("begin", "rows", "end"))
    stream = np.concatenate([vocab.to_ids([0, 1, 2], (1, 3)), vocab.to_ids([3, 3], (2, 1))])
    assert [piece[3] for piece in vocab.split(stream)] == [(1, 3), (2, 1)]


def test_a_name_may_be_left_out_only_where_there_is_one():
    one = JointVocab(3).add("a", (4,), (1,))
    assert one.to_ids([2]).tolist() == one.to_ids([2], name="a").tolist()
    with pytest.raises(ValueError, match="several image tokenizers, name one; this vocabulary has: a, b"):
        one.add("b", (4,), (1,)).to_ids([2])


# --- errors ---------------------------------------------------------------------------------------------------------

PLAIN = JointVocab(100).add("a", (10,), (2, 2))
ROWS = JointVocab(100).add("a", (10,), (2, 2), layout=("begin", "size", "rows", "end"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PLAIN.to_ids([0, 1, 2, 10]), "code 10 is out of range: expected 0 <= code < 10"),
        (lambda: PLAIN.to_ids([0, 1, 2, -1]), "code -1 is out of range"),
        (lambda: PLAIN.to_ids([0, 1, 2]), r"expected 4 for the grid \(2, 2\), got \(3,\)"),
        (lambda: PLAIN.to_ids([0.0] * 4), "codes: expected integers, got float64"),
        (lambda: PLAIN.to_ids([0] * 6, (2, 3)), "carries the grid .2, 2. only"),
        (lambda: PLAIN.to_ids([0] * 4, name="b"), "no image tokenizer 'b'; this vocabulary has: a"),
        (lambda: PLAIN.allowed("a", 4), "code token 4 is out of range: expected 0 <= j < 4"),
        (lambda: PLAIN.from_ids([]), "position 0: expected the begin of an image, got nothing"),
        (lambda: PLAIN.from_ids([100, 111, 112]), "position 3: expected a code of 'a' .ids 111..120., got nothing"),
        (lambda: PLAIN.from_ids([100, 111, 5, 112, 113, 101]), "position 2: expected a code of 'a'.*, got id 5"),
        (lambda: PLAIN.from_ids([100, *[111] * 4, 102]), "position 5: expected 'end' of 'a' .id 101., got id 102"),
        (lambda: PLAIN.from_ids([100, *[111] * 4, 101, 3]), "position 6: expected the end of the ids, got id 3"),
        (lambda: PLAIN.split([1, 2, 115]), "position 2: expected the begin of an image, got id 115"),
        (lambda: ROWS.split([1, ROWS.images["a"].control["digit_3"]]), "position 1: expected the begin of an image"),
        (lambda: PLAIN.split([1, 121]), "position 1: expected 0 <= id < 121, got id 121"),
        (lambda: PLAIN.add("a", (3,), (1,)), "already has an image tokenizer 'a'"),
        (lambda: PLAIN.add("../a", (3,), (1,)), "name '../a'"),
        (lambda: PLAIN.add("b", (3, 4), (2, 3)), "token_codebook must say which token has which"),
        (lambda: PLAIN.add("b", (3, 4), (2,), token_codebook=(0, 2)), "token_codebook: expected 2 numbers of 0..1"),
        (lambda: PLAIN.add("b", (3,), (0, 4)), "axes of at least 1"),
        (lambda: PLAIN.add("b", (0,), (4,)), "codebook size must be at least 1"),
        (lambda: PLAIN.add("b", (3,), (4,), layout=("begin", "rows", "end")), "rows need a grid of two axes"),
        (lambda: PLAIN.add("b", (3,), (4,), layout=("codes", "end")), "expected 'begin' first"),
        (lambda: PLAIN.add("b", (3,), (4,), layout=("begin", "codes", "size", "end")), "a 'size' before it"),
        (lambda: PLAIN.add("b", (2,), (1,), tables=[(115, 300)]), "id 115 is both a.codebooks.0 and b.codebooks.0"),
        (lambda: ROWS.to_ids([0] * 8, (2, 2, 2)), r"expected the axes of \(2, 2\)"),
        (lambda: Codebook(3), "an offset or a table"),
        (lambda: Codebook(3, table=(1, 2, 2)), "expected 3 different ids, got 2"),
        (lambda: ImageVocab((Codebook(2, 0),), (1,), {"begin": 5, "end": 5}), "control ids must be different"),
        (lambda: ImageVocab((Codebook(2, 0),), (1,), {"begin": 5}), "no control id 'end'"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_size_header_is_not_believed():
    """A sampled header may ask for any size; nothing of that size is built."""
    control = ROWS.images["a"].control
    nine = [control["digit_9"]] * 12
    for header in (nine, [*nine, control["size_sep"], *nine], [control["digit_0"], control["size_sep"], nine[0]]):
        with pytest.raises(ValueError, match="position"):
            ROWS.from_ids([control["begin"], *header, *range(111, 121)])
    with pytest.raises(ValueError, match="more ids of 'a' with grid"):
        ROWS.from_ids([control["begin"], *nine[:1], control["size_sep"], *nine[:1], 111])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(rows=d["rows"] + 1), "rows is 122, but its ids need 121"),
        (lambda d: d.update(spare=1), "unknown key 'spare'"),
        (lambda d: d.pop("text_rows"), "missing key 'text_rows'"),
        (lambda d: d["images"]["a"].update(stride=2), "unknown key 'stride'"),
        (lambda d: d["images"]["a"]["codebooks"][0].update(offset=100), "id 100 is both"),
        (lambda d: d["images"]["a"].update(grid=None), "another type"),
    ],
)
def test_edited_json_is_refused(edit, message):
    d = PLAIN.to_dict()
    edit(d)
    with pytest.raises(ValueError, match=message):
        JointVocab.from_dict(d)
