"""The VQA metric against cases scored by the official evaluator."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from unitok.eval.vqa_metric import contractions, exact, normalise, row_mode, vqa_accuracy


@pytest.fixture(scope="module")
def vectors():
    root = os.environ.get("UNITOK_DATA")
    if not root:
        pytest.skip("UNITOK_DATA is not set: no vqa_vectors to compare with")
    text = Path(root, "vqa_vectors", "vqa_vectors.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_every_official_case_is_equal(vectors):
    assert len(vectors) == 108
    for case in vectors:
        said, answers = case["prediction"], case["answers"]
        assert normalise(said) == case["normalised_prediction"], case
        assert vqa_accuracy(said, answers) == pytest.approx(case["score"], abs=1e-9), case
        assert vqa_accuracy(said, answers, "always") == pytest.approx(case["score_always_normalise"], abs=1e-9), case
        if case["score_textvqa"] is None:
            with pytest.raises(ValueError, match="10 answers"):
                vqa_accuracy(said, answers, "textvqa")
        else:
            assert vqa_accuracy(said, answers, "textvqa") == pytest.approx(case["score_textvqa"], abs=1e-9), case


def test_the_modes_differ_where_the_protocols_do(vectors):
    assert sum(case["score"] != case["score_always_normalise"] for case in vectors) == 5


def test_the_shipped_table_equals_the_evaluators(vectors):
    table = Path(os.environ["UNITOK_DATA"], "vqa_vectors", "contractions.json").read_text(encoding="utf-8")
    assert contractions() == json.loads(table)["map"]


@pytest.mark.parametrize("matches, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_leave_one_out_over_ten_annotators(matches, score):
    answers = ["yes"] * matches + ["no"] * (10 - matches)
    assert vqa_accuracy("yes", answers) == pytest.approx(score)


@pytest.mark.parametrize(
    "said, answers, score",
    [
        ("Yes.", ["yes"], 1),
        ("two", ["2"], 1),
        ("the red bus", ["red bus", "bus"], 1),
        ("green", ["red"], 0),
        ("", ["red"], 0),
        ("A", ["a"], 1),
        ("", ["a"], 0),  # official normalisation empties both
        ("the", ["a"], 0),
    ],
)
def test_exact_scores_rows_with_few_answers(said, answers, score):
    assert row_mode(answers) == "exact"
    assert exact(said, answers) == vqa_accuracy(said, answers, "exact") == score


def test_three_answers_are_enough_for_the_official_rule():
    assert row_mode(["a", "b", "c"]) == "official"
    assert row_mode(["a"] * 10, "textvqa") == "textvqa"


@pytest.mark.parametrize(
    "answers, mode, word", [([], "official", "annotator"), ("yes", "official", "annotator"), (["x"], "mean", "mode")]
)
def test_bad_input_is_refused(answers, mode, word):
    with pytest.raises(ValueError, match=word):
        vqa_accuracy("yes", answers, mode)
