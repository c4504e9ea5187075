"""VQA accuracy as the official evaluator computes it (GT-Vision-Lab/VQA), and the variants others use.

Modes:
    official   normalise prediction and answers only where the answers are not all identical
    always     normalise always (OpenFlamingo, lmms-eval, VLMEvalKit)
    textvqa    MMF's extra word step, then as `always`; needs ten answers
    exact      for rows with fewer than three answers: equality with one of them after the official normalisation
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files

MODES = ("official", "always", "textvqa", "exact")

_MARKS = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # the evaluator passes re.UNICODE (32) where sub() takes a count
_NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))
_NUMBERS["none"] = "0"
_ARTICLES = {"a", "an", "the"}


@lru_cache(maxsize=1)
def contractions() -> dict[str, str]:
    """Lower-case word -> its written-out contraction ("dont" -> "don't"): the evaluator's table."""
    return json.loads((files("unitok.eval") / "contractions.json").read_text(encoding="utf-8"))["map"]


def strip(text: str) -> str:
    """Newlines and tabs to spaces, ends trimmed: what every mode does first."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise(text: str) -> str:
    """The official normalisation: marks, periods, lower case, number words, articles, contractions."""
    return _words(_punctuation(strip(text)))


def normalise_textvqa(text: str) -> str:
    """MMF's normalisation: its word step, then the official one."""
    return normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def vqa_accuracy(prediction: str, answers: Sequence[str], mode: str = "official") -> float:
    """Score in [0, 1]: the mean over annotators of min(1, matches among the *other* annotators / 3).

    Raises ValueError for an unknown mode, no answers, or a `textvqa` row without exactly ten answers.
    """
    if mode not in MODES:
        raise ValueError(f"unknown VQA mode {mode!r}: one of {', '.join(MODES)}")
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers must be a list with one answer per annotator, got {answers!r}")
    if mode == "exact":
        return exact(prediction, answers)
    if mode == "textvqa" and len(answers) != 10:
        raise ValueError(f"textvqa accuracy needs 10 answers, got {len(answers)}: use official or exact")

    said, truth = strip(prediction), [strip(a) for a in answers]
    if mode == "textvqa":
        said, truth = normalise_textvqa(said), [normalise_textvqa(a) for a in truth]
    elif mode == "always" or len(set(truth)) > 1:
        said, truth = normalise(said), [normalise(a) for a in truth]

    matches = sum(a == said for a in truth)
    # left out by index: an annotator who agrees sees one match fewer than one who does not
    agree, differ = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * agree + (len(truth) - matches) * differ) / len(truth)


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction equals one of the answers after the official normalisation, else 0.0.

    An answer that the normalisation empties ("a", "the") is compared lower-cased instead, so silence never matches it.
    """
    said = normalise(prediction)
    for answer in answers:
        wanted = normalise(answer)
        if (said == wanted) if wanted else (strip(prediction).lower() == strip(answer).lower()):
            return 1.0
    return 0.0


def row_mode(answers: Sequence[str], mode: str = "official") -> str:
    """The mode that scores this row: `exact` where fewer than three answers leave nothing to agree with."""
    return "exact" if len(answers) < 3 else mode


def _punctuation(text: str) -> str:
    out = text
    delete_all = _DIGIT_COMMA.search(text) is not None
    for mark in _MARKS:
        # both conditions look at the original text, so one mark beside a space decides for all of its kind
        delete = delete_all or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if delete else " ")
    return _PERIOD.sub("", out, count=_PERIODS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    table = contractions()
    return " ".join(table.get(word, word) for word in words if word not in _ARTICLES)
