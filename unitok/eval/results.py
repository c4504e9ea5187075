"""Scores: one number with its sample count, interval, baselines and protocol; files, tables and comparisons of them.

`results.json` is {"seconds": {stage: s}, "scores": [{"name", "value", "n", "interval", "baselines", "protocol"}]}.
Values of single rows go to `items.jsonl` beside it, so that two runs over the same rows are compared in pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from unitok.checkpoint import read_json, write_atomic, write_json

FILE = "results.json"
ITEMS = "items.jsonl"
RESAMPLES = 2000
INFORMS = {"model", "interval"}  # protocol keys that say what was measured, not how


@dataclass(frozen=True)
class Score:
    """One reported number. `items` (row id -> value) stays out of results.json."""

    name: str
    value: float
    n: int
    interval: tuple[float, float]
    baselines: Mapping[str, float] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    items: Mapping[str, float] | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The record of results.json; ValueError where a number is not finite."""
        numbers = {"value": self.value, "interval low": self.interval[0], "interval high": self.interval[1]}
        numbers |= {f"baseline {k}": v for k, v in self.baselines.items()}
        for what, number in numbers.items():
            if not math.isfinite(number):
                raise ValueError(f"score {self.name}: {what} is {number}, which no results file can hold")
        return {
            "name": self.name,
            "value": float(self.value),
            "n": int(self.n),
            "interval": [float(x) for x in self.interval],
            "baselines": {k: float(v) for k, v in self.baselines.items()},
            "protocol": dict(self.protocol),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Score:
        try:
            low, high = record["interval"]
            return cls(
                record["name"],
                record["value"],
                record["n"],
                (low, high),
                record.get("baselines", {}),
                record.get("protocol", {}),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a score record ({error!r}): {dict(record)}") from None


def summarise(
    name: str,
    values: Mapping[str, float],
    *,
    baselines: Mapping[str, Mapping[str, float] | float] | None = None,
    protocol: Mapping[str, Any] | None = None,
    groups: Mapping[str, Hashable] | None = None,
    proportion: bool | None = None,
    seed: int = 0,
) -> Score:
    """The score of `values` (row id -> value).

    Interval: Wilson for proportions (`proportion`; by default where every value is 0 or 1), of the effective number of
    rows where several share one of `groups` (row id -> group, say its picture); else a seeded bootstrap that resamples
    whole groups. Baselines are numbers or values of the same rows.
    """
    if not values:
        raise ValueError(f"score {name}: no rows to score")
    numbers = list(values.values())
    if proportion is None:
        proportion = all(v in (0, 1) for v in numbers)
    members = None if groups is None else [groups[i] for i in values]
    if proportion:
        n = effective_rows(numbers, members)
        interval = wilson(mean(numbers) * n, n)
    else:
        interval = bootstrap(numbers, groups=members, seed=seed)
    means = {k: v if isinstance(v, (int, float)) else mean(v[i] for i in values) for k, v in (baselines or {}).items()}
    protocol = {**(protocol or {}), "interval": "wilson 95%" if proportion else "bootstrap 95%"}
    return Score(name, mean(numbers), len(numbers), interval, means, protocol, dict(values))


# ---- intervals -------------------------------------------------------------------------------------------------------


def mean(values: Iterable[float]) -> float:
    """The mean, summed without rounding error."""
    values = list(values)
    return math.fsum(values) / len(values)


def wilson(successes: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; never empty at 0 or 1."""
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"a proportion needs 0 <= successes <= n and n > 0, got {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p, zz = successes / n, z * z / n
    centre = (p + zz / 2) / (1 + zz)
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz)
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def effective_rows(values: Sequence[float], groups: Sequence[Hashable] | None) -> float:
    """Independent rows that would tell as much of a proportion as these: n over the design effect of the groups.

    Variance by linearisation of the ratio mean (Kish, Survey Sampling, 1965); where it is 0, the number of groups.
    """
    sums, counts = _by_group(values, groups)  # [G] [G]
    n, g = float(counts.sum()), len(sums)
    p = float(sums.sum()) / n
    if g == n or g == 1 or p in (0.0, 1.0):
        return float(g)
    clustered = float(np.square(sums - p * counts).sum()) * g / (g - 1) / n**2
    return n / max(1.0, clustered / (p * (1 - p) / n))


def bootstrap(
    values: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of the mean over rows drawn with replacement (or over whole groups of rows)."""
    if not len(values):
        raise ValueError("an interval needs at least one value")
    sums, counts = _by_group(values, groups)  # [G] [G]
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, 4_000_000 // len(sums))  # bounds the index matrix at 32 MB
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        drawn = rng.integers(0, len(sums), size=(stop - start, len(sums)))
        means[start:stop] = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def jackknife(value: float, without: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Normal interval of a number of the whole set, from what it is without each row in turn (Tukey 1958).

    For numbers that are no mean of the rows' own, such as distinct things met: rows drawn with replacement repeat, and
    would meet fewer. The variance is at least the true one on average (Efron & Stein 1981).
    """
    n = len(without)
    if n < 2:
        raise ValueError(f"an interval by leaving one out needs at least two rows, got {n}")
    centre = mean(without)
    error = math.sqrt((n - 1) / n * math.fsum((x - centre) ** 2 for x in without))
    half = NormalDist().inv_cdf(0.5 + level / 2) * error
    return value - half, value + half


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, groups: Sequence[Hashable] | None = None, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """(mean of b - a, its bootstrap interval) over the same rows."""
    if len(a) != len(b):
        raise ValueError(f"a paired difference needs the same rows, got {len(a)} and {len(b)}")
    differences = [y - x for x, y in zip(a, b, strict=True)]
    return mean(differences), bootstrap(differences, groups=groups, seed=seed)


def _by_group(values: Sequence[float], groups: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    array = np.asarray(values, dtype=np.float64)
    if groups is None:
        return array, np.ones_like(array)
    index: dict[Hashable, int] = {}
    member = np.array([index.setdefault(g, len(index)) for g in groups])
    return np.bincount(member, weights=array), np.bincount(member).astype(np.float64)


# ---- files -----------------------------------------------------------------------------------------------------------


def write_results(path: str | Path, scores: Sequence[Score], seconds: Mapping[str, float] | None = None) -> Path:
    """Write results.json, and items.jsonl beside it, atomically; `path` is a folder or a .json file. -> the file."""
    path = _file(path)
    names = [score.name for score in scores]
    if len(set(names)) != len(names):
        raise ValueError(f"score names must differ, got {', '.join(names)}")
    record = {"seconds": {k: float(v) for k, v in (seconds or {}).items()}, "scores": [s.to_dict() for s in scores]}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"name": s.name, "id": i, "value": v}) for s in scores for i, v in (s.items or {}).items()]
    if lines:
        write_atomic(path.with_name(ITEMS), "\n".join(lines) + "\n")
    else:
        path.with_name(ITEMS).unlink(missing_ok=True)  # items of an older run would pair with these scores
    write_json(path, record)
    return path


def read_results(path: str | Path) -> list[Score]:
    """The scores of a results.json (or the demo's report.json), with their items where items.jsonl lies beside it."""
    path = _file(path)
    if not path.is_file():
        raise FileNotFoundError(f"no results at {path}: give a folder with {FILE}, or the file")
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("scores"), list):
        raise ValueError(f"{path} is not a results file: it has no list 'scores'")
    items: dict[str, dict[str, float]] = {}
    if path.name == FILE and path.with_name(ITEMS).is_file():
        for line in path.with_name(ITEMS).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            items.setdefault(row["name"], {})[row["id"]] = row["value"]
    scores = (Score.from_dict(r) for r in record["scores"])
    return [Score(s.name, s.value, s.n, s.interval, s.baselines, s.protocol, items.get(s.name)) for s in scores]


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / FILE


# ---- comparison ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """b - a for one score name. `paired`: over the same rows; otherwise the two intervals were combined."""

    name: str
    a: float
    b: float
    n: tuple[int, int]
    value: float
    interval: tuple[float, float]
    paired: bool
    mismatches: tuple[str, ...]  # "protocol.shots: 0 against 4"


@dataclass(frozen=True)
class Comparison:
    differences: list[Difference]
    only_a: list[str]
    only_b: list[str]


def compare(a: str | Path, b: str | Path, *, seed: int = 0, echo: Callable[[Any], None] | None = None) -> Comparison:
    """Pair the scores of two results files by name; prints a table through `echo` (default: a rich console)."""
    left = {s.name: s for s in read_results(a)}
    right = {s.name: s for s in read_results(b)}
    shared = [_difference(left[name], right[name], seed) for name in left if name in right]
    if not shared:
        raise ValueError(f"nothing to compare: no score of {a} has the name of one in {b}")
    result = Comparison(shared, [n for n in left if n not in right], [n for n in right if n not in left])
    _print_comparison(result, str(a), str(b), echo or _console().print)
    return result


def _difference(a: Score, b: Score, seed: int) -> Difference:
    mine, other = a.items or {}, b.items or {}
    paired = a.items is not None and b.items is not None and set(mine) == set(other)
    if paired:
        rows = sorted(mine)
        value, interval = paired_difference([mine[i] for i in rows], [other[i] for i in rows], seed=seed)
    else:
        value = b.value - a.value
        # Newcombe's hybrid: each end joins the halves that point to it
        low = value - math.hypot(b.value - b.interval[0], a.interval[1] - a.value)
        high = value + math.hypot(b.interval[1] - b.value, a.value - a.interval[0])
        interval = (low, high)
    return Difference(a.name, a.value, b.value, (a.n, b.n), value, interval, paired, tuple(_mismatches(a, b)))


def _mismatches(a: Score, b: Score) -> Iterable[str]:
    for key in sorted((set(a.protocol) | set(b.protocol)) - INFORMS):
        left, right = a.protocol.get(key, "missing"), b.protocol.get(key, "missing")
        if left != right:
            yield f"protocol.{key}: {left} against {right}"


def _print_comparison(result: Comparison, a: str, b: str, echo: Callable[[Any], None]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"A = {escape(a)}\nB = {escape(b)}", title_justify="left")
    table.add_column("score", overflow="fold")
    for column in ("A", "B", "B - A", "95% interval", "n", "rows"):
        table.add_column(column, justify="right")
    for d in result.differences:
        n = str(d.n[0]) if d.n[0] == d.n[1] else f"{d.n[0]} / {d.n[1]}"
        ends = f"{d.interval[0]:+.4f} .. {d.interval[1]:+.4f}"
        rows = "paired" if d.paired else "unpaired"
        table.add_row(escape(d.name), f"{d.a:.4f}", f"{d.b:.4f}", f"{d.value:+.4f}", ends, n, rows)
    echo(table)
    by_text: dict[str, list[str]] = {}
    for d in result.differences:
        for text in d.mismatches:
            by_text.setdefault(text, []).append(d.name)
    for text, names in by_text.items():
        where = "every score" if len(names) == len(result.differences) else ", ".join(names)
        echo(escape(f"protocol mismatch ({where}): {text.removeprefix('protocol.')}"))
    for side, names in (("A", result.only_a), ("B", result.only_b)):
        if names:
            echo(escape(f"only in {side}: {', '.join(names)}"))


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(scores: Sequence[Score], title: str | None = None):
    """A rich table: score, interval, count, and every baseline beside it."""
    from rich.markup import escape
    from rich.table import Table

    names = list(dict.fromkeys(name for score in scores for name in score.baselines))
    out = Table(title=None if title is None else escape(title), title_justify="left")
    out.add_column("score", overflow="fold")
    for column in ("value", "95% interval", "n", *names):
        out.add_column(column.replace("_", " "), justify="right")
    for s in scores:
        beside = [f"{s.baselines[n]:.4f}" if n in s.baselines else "-" for n in names]
        out.add_row(escape(s.name), f"{s.value:.4f}", f"{s.interval[0]:.4f} .. {s.interval[1]:.4f}", str(s.n), *beside)
    return out


def _console():
    from rich.console import Console

    return Console()
