"""Visual question answering, zero-shot or with shots, beside every baseline that could explain the score.

A row is {"id", "image", "question", "answers": one per annotator, ...}; its other columns can be reported apart.
The model is any object with

    answers(rows, *, shots, **decode) -> list[str]

rows: {"id", "image", "question"} (never the answers; image None in the no_image arm); shots: for every row its list of
{"id", "image", "question", "answers": [one]}, in prompt order; an image is a path, a PIL image or a list of them;
decode: max_new_tokens and guidance (of the reply, against the same prompt without its pictures) where the recipe gives
them, temperature (0: greedy) and, above 0, top_k, top_p, seeds (one a row).

Baselines
    blind            the most frequent training answer of the very same question, else of all questions
    blind_prefix     ... of the questions that begin with the most words in common
    majority         the most frequent training answer
    no_image         the model, asked without the picture
    shuffled_images  the model, asked about another row's picture
    permuted_shots   the model, with the answers of its shots exchanged
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unitok.eval.progress import ReplyLog, cut_reply, decoding, model_stamp, row_rng, seeded
from unitok.eval.results import Score, paired_difference, summarise
from unitok.eval.rows import can_shuffle, image_keys, load_rows, other_row, rows_hash, subset, with_picture
from unitok.eval.vqa_metric import MODES, row_mode, vqa_accuracy

FROM_TEXT = ("blind", "blind_prefix", "majority")
FROM_MODEL = ("no_image", "shuffled_images", "permuted_shots")
BASELINES = FROM_TEXT + FROM_MODEL
BREAKDOWN = ("kind", "group", "answer_type", "question_type")
REPLIES = "replies.jsonl"

Row = Mapping[str, Any]


def run(model, recipe) -> list[Score]:
    """The scores of one recipe; replies go to `recipe.out`/replies.jsonl, from where an interrupted run goes on.

    `recipe.train`: sources of shots and text baselines. `recipe.options`: mode, baselines, breakdown, cut,
    max_new_tokens, name, text_shots, pictures. Decoding is greedy unless the recipe gives a temperature.
    """
    options = dict(recipe.options)
    known = {"mode", "baselines", "breakdown", "cut", "max_new_tokens", "name", "text_shots", "pictures"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"vqa: unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")
    out = Path(recipe.out) if recipe.out else None
    rows = subset(load_rows(recipe.data, "question", out=out), recipe.n, recipe.seed)
    train = load_rows(recipe.train, "question")
    decode = decoding(recipe)
    if "max_new_tokens" in options:
        decode["max_new_tokens"] = options.pop("max_new_tokens")
    return evaluate(
        model,
        rows,
        train,
        shots=recipe.shots,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        decode=decode,
        replies=None if out is None else out / REPLIES,
        stamp=model_stamp(recipe),
        **options,
    )


def evaluate(
    model,
    rows: Sequence[Row],
    train: Sequence[Row] = (),
    *,
    shots: int = 0,
    text_shots: int = 0,
    pictures: bool = True,
    seed: int = 0,
    mode: str = "official",
    baselines: Sequence[str] | None = None,
    breakdown: Sequence[str] | None = None,
    batch_size: int = 16,
    cut: Sequence[str] = ("\n",),
    decode: Mapping[str, Any] | None = None,
    replies: Path | None = None,
    stamp: Any = None,
    name: str = "vqa",
) -> list[Score]:
    """[overall, one a breakdown value, one difference a baseline].

    Args:
        train: rows that shots are drawn from and text baselines are counted on.
        text_shots: so many more in front of them, without their pictures: they show the form of an answer alone. A
            model that was never asked before gets them in place of no shots (Flamingo, De-Diffusion).
        pictures: False asks every question without its picture: a reader that was taught without any.
        mode: one of vqa_metric.MODES; rows with fewer than three answers are scored by `exact`.
        baselines: a choice of BASELINES; None: all that these rows, training rows and shots allow.
        breakdown: row columns to report apart; "a+b" crosses two. None: those of BREAKDOWN that the rows have.
        cut: a reply ends before the first of these texts.
        replies, stamp: file of the replies, and what tells this model from another when going on from it.

    Raises:
        ValueError: no rows, two rows of one id, too few training rows for the shots, or a baseline that cannot be had.
    """
    if not rows:
        raise ValueError("vqa: no rows to score")
    if mode not in MODES:
        raise ValueError(f"unknown VQA mode {mode!r}: one of {', '.join(MODES)}")
    by_id = {row["id"]: row for row in rows}
    if len(by_id) != len(rows):
        twice = next(i for i, count in Counter(row["id"] for row in rows).items() if count > 1)
        raise ValueError(f"vqa: two rows have the id {twice!r}")
    sampler = ShotSampler(train, shots, seed, text_shots)
    decode = {"temperature": 0.0, **(decode or {})}
    shown = {row["id"]: image_keys(row) for row in rows}
    arms = _arms(baselines, shown, train, shots + text_shots)
    if not pictures and {"no_image", "shuffled_images"} & set(arms):
        raise ValueError("questions without pictures have no baseline of other pictures: give baselines without them")
    protocol = {
        "metric": "+".join(sorted({row_mode(row["answers"], mode) for row in rows})),
        "shots": shots,
        **({"text_shots": text_shots} if text_shots else {}),
        **({} if pictures else {"pictures": False}),
        "shot_choice": "random" if shots + text_shots else "none",
        "seed": seed,
        "cut": list(cut),
        "decode": decode,
        "data_hash": rows_hash(rows),
        "train_hash": rows_hash(train, pictures=False) if train else None,
        "train_n": len(train),
    }
    log = ReplyLog(replies, {"model": stamp, "protocol": protocol})

    def scored(answers: Mapping[str, str]) -> dict[str, float]:
        return {i: vqa_accuracy(answers[i], r["answers"], row_mode(r["answers"], mode)) for i, r in by_id.items()}

    def asked(arm: str) -> dict[str, float]:
        prompts = _prompts(rows, arm if pictures else "no_image", sampler, shown, seed)

        def ask(ids: Sequence[str]) -> list[str]:
            shots = [[with_picture(shot) for shot in prompts[i][1]] for i in ids]
            return model.answers([with_picture(prompts[i][0]) for i in ids], shots=shots, **seeded(decode, seed, ids))

        replied = log.collect(arm, list(prompts), batch_size, ask)
        return scored({i: cut_reply(text, cut) for i, text in replied.items()})

    prior = TextPrior(train)
    values = asked("model")
    beside: dict[str, dict[str, float]] = {}
    for arm in arms:
        if arm in FROM_TEXT:
            beside[arm] = scored({i: getattr(prior, arm)(row["question"]) for i, row in by_id.items()})
        else:
            beside[arm] = asked(arm)
    log.finish()
    groups = {i: tuple(sorted(keys)) or i for i, keys in shown.items()}
    out = [summarise(name, values, baselines=beside, protocol=protocol, groups=groups, seed=seed)]
    for label, ids in _parts(rows, breakdown):
        part = {arm: {i: table[i] for i in ids} for arm, table in beside.items()}
        mine = {i: values[i] for i in ids}
        note = {**protocol, "data_hash": rows_hash([by_id[i] for i in ids])}
        out.append(summarise(f"{name}/{label}", mine, baselines=part, protocol=note, groups=groups, seed=seed))
    for arm, table in beside.items():
        out.append(_margin(f"{name}/over/{arm}", values, table, groups, protocol, seed))
    return out


# ---- questions and shots ---------------------------------------------------------------------------------------------


class ShotSampler:
    """Random shots for a row, drawn by a generator of the row's own id: the same whatever is asked beside it.

    A shot never shows the row's picture: pictures are compared by content, not by name.
    """

    def __init__(self, train: Sequence[Row], shots: int, seed: int, text_shots: int = 0):
        if min(shots, text_shots) < 0:
            raise ValueError(f"shots must be at least 0, got {min(shots, text_shots)}")
        k = shots + text_shots
        if k and not train:
            raise ValueError(f"{k} shots need training rows: give the recipe train")
        self.train, self.k, self.seed, self.text_shots = train, k, seed, text_shots
        self._keys: dict[int, frozenset[str]] = {}

    def draw(self, row: Row) -> list[dict[str, Any]]:
        """Shots {"id", "image", "question", "answers": [its most given answer]}, different rows, in prompt order.

        The first `text_shots` have no image.
        """
        rng, shown = row_rng(self.seed, "shots", row["id"]), image_keys(row)
        chosen: list[int] = []
        allowed = 10 * self.k + 100  # draws before the training rows are searched one by one
        while len(chosen) < self.k and allowed > 0:
            i, allowed = rng.randrange(len(self.train)), allowed - 1
            if i not in chosen and shown.isdisjoint(self._shown(i)):
                chosen.append(i)
        if len(chosen) < self.k:
            rest = [i for i in range(len(self.train)) if i not in chosen and shown.isdisjoint(self._shown(i))]
            if len(chosen) + len(rest) < self.k:
                have = len(chosen) + len(rest)
                raise ValueError(f"{self.k} shots for {row['id']}: only {have} training rows show another picture")
            chosen += rng.sample(rest, self.k - len(chosen))
        shots = [_shot(self.train[i]) for i in chosen]
        return [{**shot, "image": None} if j < self.text_shots else shot for j, shot in enumerate(shots)]

    def permuted(self, row: Row) -> list[dict[str, Any]]:
        """The same shots with answers moved round by one or more places; a single shot gets another row's answer."""
        shots, rng = self.draw(row), row_rng(self.seed, "permuted", row["id"])
        if len(shots) == 1:
            wrong = [a for a in sorted({consensus(r["answers"]) for r in self.train}) if [a] != shots[0]["answers"]]
            return [{**shots[0], "answers": [rng.choice(wrong)]}] if wrong else shots
        move = rng.randrange(1, len(shots)) if shots else 0
        return [{**shot, "answers": shots[(j + move) % len(shots)]["answers"]} for j, shot in enumerate(shots)]

    def _shown(self, i: int) -> frozenset[str]:
        if i not in self._keys:
            self._keys[i] = image_keys(self.train[i])
        return self._keys[i]


def consensus(answers: Sequence[str]) -> str:
    """The most given answer, the first of equals."""
    return Counter(answers).most_common(1)[0][0]


def _shot(row: Row) -> dict[str, Any]:
    return {"id": row["id"], "image": row["image"], "question": row["question"], "answers": [consensus(row["answers"])]}


def _prompts(rows: Sequence[Row], arm: str, sampler: ShotSampler, shown: Mapping, seed: int) -> dict[str, tuple]:
    """id -> (what is asked, its shots) in one arm."""
    out = {}
    for row in rows:
        image = row["image"]
        if arm == "no_image":
            image = None
        elif arm == "shuffled_images":
            image = other_row(row, rows, shown, seed)["image"]
        shots = sampler.permuted(row) if arm == "permuted_shots" else sampler.draw(row)
        out[row["id"]] = {"id": row["id"], "image": image, "question": row["question"]}, shots
    return out


# ---- baselines and parts ---------------------------------------------------------------------------------------------


class TextPrior:
    """Answers counted on training rows, one vote a row, looked up by the question's words alone."""

    def __init__(self, train: Sequence[Row]):
        self.by_question: dict[str, Counter] = defaultdict(Counter)
        self.by_prefix: dict[tuple[str, ...], Counter] = defaultdict(Counter)
        for row in train:
            answer, words = consensus(row["answers"]), row["question"].lower().split()
            self.by_question[row["question"].strip()][answer] += 1
            for length in range(len(words) + 1):
                self.by_prefix[tuple(words[:length])][answer] += 1

    def majority(self, question: str = "") -> str:
        return self.by_prefix[()].most_common(1)[0][0]

    def blind(self, question: str) -> str:
        counts = self.by_question.get(question.strip())
        return counts.most_common(1)[0][0] if counts else self.majority()

    def blind_prefix(self, question: str) -> str:
        words = question.lower().split()
        known = next(n for n in range(len(words), -1, -1) if tuple(words[:n]) in self.by_prefix)
        return self.by_prefix[tuple(words[:known])].most_common(1)[0][0]


def _arms(wanted: Sequence[str] | None, shown: Mapping[str, frozenset], train: Sequence[Row], shots: int) -> list[str]:
    """The baselines to compute; ValueError for one that is asked for by name and cannot be had."""
    lacks: dict[str, str] = {}
    if not train:
        lacks |= dict.fromkeys(FROM_TEXT, "needs training rows: give the recipe train")
    if not shots:
        lacks["permuted_shots"] = "needs shots"
    if not can_shuffle(shown):
        lacks["shuffled_images"] = "needs for every row another row whose picture differs"
    for arm in wanted or ():
        if arm not in BASELINES:
            raise ValueError(f"unknown baseline {arm!r}: one of {', '.join(BASELINES)}")
        if arm in lacks:
            raise ValueError(f"baseline {arm} {lacks[arm]}")
    return [arm for arm in BASELINES if (arm not in lacks if wanted is None else arm in wanted)]


def _parts(rows: Sequence[Row], breakdown: Sequence[str] | None) -> list[tuple[str, list[str]]]:
    """("kind=colour", ids) for every value of every column; "group+kind" gives "group=two+kind=colour"."""
    if breakdown is None:
        breakdown = [column for column in BREAKDOWN if any(row.get(column) is not None for row in rows)]
    out = []
    for spec in breakdown:
        columns, ids = spec.split("+"), defaultdict(list)
        for row in rows:
            if all(row.get(column) is not None for column in columns):
                ids["+".join(f"{column}={row[column]}" for column in columns)].append(row["id"])
        if not ids:
            raise ValueError(f"breakdown {spec!r}: no row has it")
        out += sorted(ids.items())
    return out


def _margin(name: str, values: Mapping, baseline: Mapping, groups: Mapping, protocol: Mapping, seed: int) -> Score:
    """How far the model is above a baseline, over the same rows."""
    ids = list(values)
    a, b = [baseline[i] for i in ids], [values[i] for i in ids]
    value, interval = paired_difference(a, b, groups=[groups[i] for i in ids], seed=seed)
    note = {**protocol, "interval": "paired bootstrap 95%"}
    items = {i: y - x for i, x, y in zip(ids, a, b, strict=True)}
    return Score(name, value, len(ids), interval, {}, note, items)
