"""Use of codebooks against counting by hand, and closed forms."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from unitok.nn.codes import CodebookUse, bits, collapse_warning, count_codes, leave_one_out


def test_closed_forms():
    even = CodebookUse.of(np.full(512, 7))
    assert (even.used, even.dead, even.share) == (512, 0, 1.0)
    assert even.entropy == pytest.approx(9) and even.perplexity == pytest.approx(512)
    one = CodebookUse.of(np.eye(512, dtype=np.int64)[3] * 1000)
    assert (one.used, one.dead, one.share, one.entropy, one.perplexity) == (1, 511, 1 / 512, 0.0, 1.0)
    assert math.copysign(1, one.entropy) == 1
    half = CodebookUse.of(np.array([2, 1, 1, 0]))
    assert half.entropy == pytest.approx(1.5) and half.perplexity == pytest.approx(2**1.5)
    none = CodebookUse.of(np.zeros(4, dtype=np.int64))
    assert (none.used, none.entropy) == (0, 0.0)


def test_counts_and_perplexity_equal_those_by_hand_for_each_codebook():
    rng, sizes = np.random.default_rng(0), (40, 7)
    books = rng.integers(0, 2, 12)
    codes = rng.integers(0, np.array(sizes)[books], (30, 12)) ** 2 % np.array(sizes)[books]
    for book, counts in enumerate(count_codes(codes, books, sizes)):
        met = Counter(codes[b, j] for b in range(30) for j in range(12) if books[j] == book)
        assert counts.tolist() == [met[code] for code in range(sizes[book])]
        shares = [n / sum(met.values()) for n in met.values()]
        use = CodebookUse.of(counts)
        assert use.used == len(met) and use.perplexity == pytest.approx(math.prod(s**-s for s in shares))
    assert count_codes(codes[0], books, sizes)[1].sum() == (books == 1).sum()  # one picture


def test_leaving_one_picture_out_is_counting_the_others():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 40, n) ** 2 % 40 for n in (1, 5, 12, 12)]
    found = leave_one_out(np.bincount(np.concatenate(pictures), minlength=40), pictures)
    for out, use in enumerate(found):
        rest = np.concatenate([codes for i, codes in enumerate(pictures) if i != out])
        counted = CodebookUse.of(np.bincount(rest, minlength=40))
        assert (use.size, use.used) == (counted.size, counted.used)
        assert use.entropy == pytest.approx(counted.entropy, abs=1e-12)
    alone = np.arange(3)
    assert leave_one_out(np.bincount(alone), [alone]) == [CodebookUse(3, 0, 0.0)]


def test_bits_sum_over_tokens():
    assert bits(np.zeros(256, dtype=np.int64), (1024,)) == 2560
    assert bits(np.array([0, 1, 1]), (8, 5)) == pytest.approx(3 + 2 * math.log2(5))


def test_a_collapsed_codebook_is_named_and_a_used_one_is_not():
    good, bad = np.ones(512), np.zeros(512)
    bad[7] = 100
    assert collapse_warning([good]) is None
    line = collapse_warning([bad])
    assert line.startswith("warning: 1 of 512 codes in use (perplexity 1.0): the codebook has collapsed;")
    assert "1 of 512 codes of codebook 1 in use" in collapse_warning([good, bad])
    few = np.zeros(512)
    few[:40] = 1  # of 40 codes met no more can differ
    assert collapse_warning([few]) is None and collapse_warning([few * 100]).startswith("warning: 40 of 512")
