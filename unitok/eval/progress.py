"""Long evaluations: seeded draws a row, batches with a progress bar, and replies kept so that a run goes on."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from unitok.checkpoint import write_atomic

T = TypeVar("T")


def row_rng(seed: int, purpose: str, row_id: str) -> random.Random:
    """A generator of one row's own: its draws depend on neither batch, order nor world size."""
    return random.Random(row_seed(seed, purpose, row_id))


def row_seed(seed: int, purpose: str, row_id: str) -> int:
    """0 <= seed < 2**63 of one row."""
    digest = hashlib.sha256(json.dumps([seed, purpose, row_id]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def batches(rows: Sequence[T], size: int, title: str) -> Iterator[Sequence[T]]:
    """`rows` in order, at most `size` at a time, under a progress bar where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    if size < 1:
        raise ValueError(f"batch size must be at least 1, got {size}")
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=len(rows))
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            yield batch
            bar.advance(task, len(batch))


def decoding(recipe) -> dict[str, Any]:
    """Decoding arguments of a recipe whose task is text, greedy by default and guided only where it says so."""
    if not isinstance(recipe.guidance, int | float):
        raise ValueError(f"task {recipe.task} is guided by one scale, not by the pair {recipe.guidance}")
    guided = {} if recipe.guidance == 1 else {"guidance": float(recipe.guidance)}
    if not recipe.temperature:
        return {"temperature": 0.0, **guided}
    return {"temperature": recipe.temperature, "top_k": recipe.top_k, "top_p": recipe.top_p, **guided}


def seeded(decode: Mapping[str, Any], seed: int, ids: Sequence[str]) -> dict[str, Any]:
    """`decode`, with one seed a row where replies are sampled."""
    return {**decode, "seeds": [row_seed(seed, "decode", i) for i in ids]} if decode["temperature"] else dict(decode)


def cut_reply(text: str, cut: Sequence[str]) -> str:
    """The reply up to the first of the `cut` texts, trimmed; blank lines before it do not count."""
    text = text.strip()
    ends = [at for mark in cut if (at := text.find(mark)) >= 0]
    return text[: min(ends, default=len(text))].strip()


class ReplyLog:
    """Replies by (arm, row id), appended to a file as they come.

    An interrupted run with the same `header` (model, protocol) goes on from them; a finished one, another header, or a
    model that is None, starts anew. Without a path they are kept in memory only.
    """

    def __init__(self, path: str | Path | None, header: Mapping[str, Any]):
        self.path = None if path is None else Path(path)
        self.replies: dict[tuple[str, str], str] = {}
        if self.path is None:
            return
        lines = [{"header": dict(header)}, *self._kept(self.path, header)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in lines))  # drops a torn last line

    def _kept(self, path: Path, header: Mapping[str, Any]) -> list[dict[str, str]]:
        if not path.is_file() or header.get("model") is None:
            return []
        lines = []
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break  # torn by a kill: everything before it counts
        same = bool(lines) and lines[0].get("header") == json.loads(json.dumps(dict(header)))
        if not same or lines[-1].get("done"):
            return []
        self.replies = {(line["arm"], line["id"]): line["reply"] for line in lines[1:]}
        return lines[1:]

    def collect(
        self, arm: str, ids: Sequence[str], size: int, ask: Callable[[Sequence[str]], Sequence[str]]
    ) -> dict[str, str]:
        """Replies by id, in order; `ask` is called with at most `size` of the ids that have none yet."""
        for batch in batches([i for i in ids if (arm, i) not in self.replies], size, arm):
            replies = ask(batch)
            if len(replies) != len(batch) or not all(isinstance(reply, str) for reply in replies):
                raise ValueError(f"the model must reply with one string a row: {len(batch)} rows, got {replies!r:.200}")
            self.replies |= {(arm, i): reply for i, reply in zip(batch, replies, strict=True)}
            self._append({"arm": arm, "id": i, "reply": reply} for i, reply in zip(batch, replies, strict=True))
        return {i: self.replies[arm, i] for i in ids}

    def finish(self) -> None:
        """Mark the run as finished."""
        self._append([{"done": True}])

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


def model_stamp(recipe) -> Any:
    """What tells the model of a recipe from another: the state of its folder, and its wording where that is changed."""
    stamp = _folder_stamp(recipe.model)
    return [stamp, recipe.template] if recipe.template else stamp


def _folder_stamp(folder: str | None) -> Any:
    """Names, sizes and times of its files; the name itself for what is no local folder; None for None."""
    if folder is None or not Path(folder).is_dir():
        return folder
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json", ".bin"))
    return [[str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
