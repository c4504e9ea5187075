"""Whatever the logits say, a stream is text and whole images."""

import numpy as np
import pytest

from unitok.sampling.grammar import TEXT, Grammar
from unitok.vocab import Codebook, ImageVocab, JointVocab

TEXT_SIZE, EOS = 37, 1  # text rows go on to 40: padding rows


def published() -> JointVocab:
    """Codes and controls among the text rows, by a permuted table, as Chameleon has them."""
    table = tuple(np.random.default_rng(0).permutation(np.arange(8, 28)).tolist())
    control = {"begin": 3, "end": 4}
    return JointVocab(40, {"old": ImageVocab((Codebook(20, table=table),), (3, 3), control)})


def text_digits() -> JointVocab:
    """Emu3's layout: a size in ordinary text digits, and row ends."""
    control = {"begin": 40, "end": 41, "row_end": 42, "size_sep": 30, **{f"digit_{i}": 20 + i for i in range(10)}}
    image = ImageVocab((Codebook(16, offset=43),), (2, 3), control, ("begin", "size", "rows", "end"))
    return JointVocab(40, {"emu": image})


VOCABULARIES = {
    "one": JointVocab(40).add("a", [50], (3, 4)),
    "several": JointVocab(40).add("a", [50], (3, 4)).add("b", [9], (5,)).add("c", [8, 4], (2, 2, 2)),
    "factors": JointVocab(40).add("f", [16, 5], (3, 2, 2)),
    "levels": JointVocab(40).add("l", [6, 7], (5,), token_codebook=(0, 0, 1, 1, 0)),
    "rows": JointVocab(40).add("r", [12], (4, 3), layout=("begin", "size", "rows", "end")),
    "table": published(),
    "digits": text_digits(),
}


def run(grammar, rng, rows, room, budget, force, bias=0.0):
    """Draw from random logits until all rows are done; `bias` favours begins. -> a list of ids a row."""
    cursor, first = grammar.start([np.array([5])] * rows, np.full(rows, room), budget, force)
    streams = [[i for i in ids if i >= 0] for ids in first.tolist()]
    for _ in range(room + 1):
        kind = cursor.kind()
        if cursor.done.all():
            break
        for k in np.unique(kind[~cursor.done]):
            which = np.flatnonzero(~cursor.done & (kind == k))
            logits = rng.normal(size=(len(which), len(grammar.kinds[k])))
            if k == TEXT:
                allowed = cursor.begin_allowed(which)
                logits[:, -allowed.shape[1] :] = np.where(allowed, logits[:, -allowed.shape[1] :] + bias, -np.inf)
            for row, ids in zip(which, cursor.push(which, grammar.kinds[k][logits.argmax(1)]).tolist(), strict=True):
                streams[row] += [i for i in ids if i >= 0]
    assert cursor.done.all()
    return streams


@pytest.mark.parametrize("name", VOCABULARIES)
def test_fuzz(name):
    vocab, rows, room = VOCABULARIES[name], 1500, 70  # 10,500 samples over all
    rng = np.random.default_rng(0)
    budget = rng.integers(0, 4, rows)
    force = [rng.choice(list(vocab.images)) if rng.random() < 0.3 else None for _ in range(rows)]
    streams = run(Grammar(vocab, TEXT_SIZE, [EOS]), rng, rows, room, budget, force, bias=2.0)
    seen = set()
    for ids, most, forced in zip(streams, budget, force, strict=True):
        pieces = vocab.split(np.array(ids, np.int64))  # raises on a malformed stream
        images = [piece for piece in pieces if piece[0] == "image"]
        assert len(ids) <= room
        assert len(images) <= max(most, forced is not None)
        assert all(len(codes) == np.prod(grid) for _, _, codes, grid in images)
        assert forced is None or pieces[0][:2] == ("image", forced)
        assert all(piece[1].max() < TEXT_SIZE and EOS not in piece[1] for piece in pieces if piece[0] == "text")
        seen.update(image[1] for image in images)
    assert seen == set(vocab.images)
    assert max(len(ids) for ids in streams) == room  # some rows do use all their room


def test_fuzz_control():
    """The same draws without the grammar do not split: the check can fail."""
    vocab = VOCABULARIES["several"]
    rng = np.random.default_rng(0)
    bad = 0
    for _ in range(200):
        try:
            vocab.split(rng.integers(0, vocab.rows, 40))
        except ValueError:
            bad += 1
    assert bad == 200


def test_allowed_ids_are_the_vocabulary_s_at_every_token():
    for vocab in VOCABULARIES.values():
        grammar = Grammar(vocab, TEXT_SIZE, [EOS])
        for name, image in vocab.images.items():
            s = grammar.state_of(name)
            kinds = grammar.kind[s, : grammar.length[s]]
            codes = kinds[kinds >= 0]
            assert len(codes) == np.prod(image.grid)
            for j, k in enumerate(codes):
                assert grammar.kinds[k].tolist() == list(vocab.allowed(name, j))


def test_text_ids():
    for vocab in VOCABULARIES.values():
        ids = Grammar(vocab, TEXT_SIZE, [EOS]).kinds[TEXT]
        begins = [image.control["begin"] for image in vocab.images.values()]
        assert ids[-len(begins) :].tolist() == begins
        assert ids[: -len(begins)].max() < TEXT_SIZE
        for image in vocab.images.values():
            assert not any(book.contains(ids).any() for book in image.codebooks)
            assert image.control["end"] not in ids
    assert Grammar(JointVocab(40), TEXT_SIZE).kinds[TEXT].tolist() == list(range(TEXT_SIZE))
    assert Grammar(None, TEXT_SIZE).kinds[TEXT].tolist() == list(range(TEXT_SIZE))
    digits = Grammar(VOCABULARIES["digits"], TEXT_SIZE).kinds[TEXT]
    assert set(range(20, 31)) <= set(digits.tolist())  # a size header's text digits stay text


def test_begin_needs_room_and_budget():
    vocab = VOCABULARIES["several"]
    grammar = Grammar(vocab, TEXT_SIZE, [EOS])
    lengths = [vocab.block_length(name) for name in vocab.images]
    assert lengths == [14, 7, 10]
    room = np.array([14, 13, 10, 9, 7, 6, 14])
    budget = np.array([1, 1, 1, 1, 1, 1, 0])
    cursor, _ = grammar.start([np.array([5])] * 7, room, budget, [None] * 7)
    expected = (room[:, None] >= np.array(lengths)) & (budget[:, None] > 0)
    assert (cursor.begin_allowed(np.arange(7)) == expected).all()
    only_b = Grammar(vocab, TEXT_SIZE, tokenizers=["b"]).start([np.array([5])], room[:1], budget[:1], [None])[0]
    assert only_b.begin_allowed(np.arange(1)).tolist() == [[False, True, False]]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_prompt_cut_anywhere_is_completed(name):
    vocab = VOCABULARIES[name]
    grammar = Grammar(vocab, TEXT_SIZE, [EOS])
    rng = np.random.default_rng(0)
    for image_name, image in vocab.images.items():
        sizes = [image.codebooks[k].size for k in image.codebook_of()]
        block = vocab.to_ids(rng.integers(0, sizes), name=image_name)
        before = np.concatenate([[5, 6], block, [7]])  # a finished image does not count
        for cut in range(1, len(block) + 1):
            prompt, room = np.concatenate([before, block[:cut]]), len(block) - cut
            cursor, first = grammar.start([prompt], np.array([room]), np.array([0]), [None])
            stream = first[0].tolist()
            while not cursor.done[0]:
                ids = grammar.kinds[cursor.kind()[0]]
                stream += cursor.push(np.array([0]), rng.choice(ids, 1))[0].tolist()
            whole = np.concatenate([prompt, np.array(stream, np.int64)])
            assert [piece[0] for piece in vocab.split(whole)] == ["text", "image", "text", "image"]
            assert len(stream) == room


def test_other_grids():
    vocab = VOCABULARIES["rows"]
    grammar = Grammar(vocab, TEXT_SIZE, [EOS], grids={"r": (2, 5)})
    streams = run(grammar, np.random.default_rng(0), 20, 30, np.ones(20, int), ["r"] * 20)
    assert all(vocab.split(ids)[0][3] == (2, 5) for ids in streams)


def test_errors():
    vocab = VOCABULARIES["one"]
    grammar = Grammar(vocab, TEXT_SIZE, [EOS])
    begin = vocab.images["a"].control["begin"]
    one = np.array([1])
    with pytest.raises(ValueError, match="room for 13 new ids.*needs 14"):
        grammar.start([np.array([5])], np.array([13]), one, ["a"])
    with pytest.raises(ValueError, match="no image tokenizer 'x'"):
        grammar.start([np.array([5])], np.array([20]), one, ["x"])
    with pytest.raises(ValueError, match="position 1 holds id 5, expected one of 50 codes"):
        grammar.start([np.array([begin, 5])], np.array([20]), one, [None])
    with pytest.raises(ValueError, match="inside an image, so no other"):
        grammar.start([np.array([begin])], np.array([20]), one, ["a"])
    with pytest.raises(ValueError, match="text_size is 1000"):
        Grammar(vocab, 1000)
    with pytest.raises(ValueError, match="no image tokenizer 'x'"):
        Grammar(vocab, TEXT_SIZE, tokenizers=["x"])
    with pytest.raises(ValueError, match="eos_ids"):
        Grammar(vocab, TEXT_SIZE, [10_000])
