"""Token shards: documents whose pictures have become codes, as parquet, one row a document.

`tokenize` turns a source into a folder: shard-NNNNNN.parquet, unitok.json (what the codes mean), progress.jsonl and,
where rows could not be used, quarantine.jsonl. A shard is a fixed number of source rows and is renamed into place
when it is whole; progress.jsonl is appended to afterwards. Whatever instant a run is killed at, the next one goes on
from the last finished shard and ends with the same bytes.
"""

from __future__ import annotations

import json
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate, chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unitok.checkpoint import open_folder, replacing
from unitok.data.encoding import Encoder
from unitok.data.schema import Document, Part
from unitok.data.sources import find, fingerprint, read_source
from unitok.manifest import FILE, Manifest
from unitok.nn.codes import CodebookUse

if TYPE_CHECKING:
    from unitok.tokenizers.base import ImageTokenizer

FORMAT = 1
PROGRESS, QUARANTINE = "progress.jsonl", "quarantine.jsonl"
SHARD_ROWS = 1024  # source rows a shard


def tokenize(
    data: str | Path, tokenizer: str | Path | ImageTokenizer, out: str | Path, *,
    workers: int = 0, strict: bool = False, batch_size: int = 64, columns: Mapping[str, str] | None = None,
    name: str | None = None, limit: int | None = None, device: str = "cpu", shard_rows: int = SHARD_ROWS,
    native: bool = False, fast: str | None = None, report: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the token shards of a source into the folder `out`, or go on where an earlier run stopped.

    tokenizer: a folder, a Hub id, or a loaded tokenizer. name: what the shards call it (default: as its manifest
    does). workers: threads that read and resize pictures. limit: the first source rows only. strict: ValueError at
    the first row that cannot be used, instead of a line in quarantine.jsonl. report: called with the counts so far
    after each shard. native: pictures as large as they are, cut to multiples of the stride; each part has its own
    grid. fast: the encoder is compiled first, in "float32", "bfloat16" or "auto" (nn/compiled.py); None: it is not.
    Identical pictures are encoded once.

    Returns the counts (rows, documents, quarantined, images, distinct, tokens, shards), the census of the codebooks
    over distinct pictures (used, dead, entropy in bits, perplexity), and seconds.
    ValueError where `out` was begun with another source, tokenizer or setting, or no row can be used.
    """
    begun, out = time.perf_counter(), Path(out)
    _check_outside(out.resolve(), Path(data))
    own_name, section, licences = _identity(tokenizer)
    name = name or own_name.split(":")[-1]  # a class outside the registry is named module:Class
    job = {"format": FORMAT, "tokenizers": {name: section}, "source": fingerprint(data), "columns": dict(columns or {}),
           "limit": limit, "shard_rows": shard_rows, **({"native": True} if native else {}),
           **({"dtype": fast} if fast not in (None, "float32") else {})}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    with _Folder(out, job) as folder:
        resumed = folder.counts()["rows"]
        if folder.done is None:
            place = {"path": str(tokenizer)} if isinstance(tokenizer, str | Path) else {}  # for who wants to look
            Manifest(tokenizers={name: {**section, **place}}, licences=licences).save(out)
            encoder = Encoder(_open(tokenizer, device), name, batch_size, workers, strict, native, fast)
            for shard in folder.shards:
                encoder.absorb(_Columns(out / shard["file"]).pictures())
            rows = islice(read_source(data, columns), resumed, limit)
            with encoder:
                for first in rows:
                    folder.add(*encoder.shard(chain([first], islice(rows, shard_rows - 1))))
                    if report:
                        report(folder.counts())
            folder.finish(str(data), {"tokenizer": name, "distinct": encoder.distinct, "census": encoder.census()})
        summary = dict(folder.done or {})
    return summary | {"out": str(out), "resumed": resumed, "seconds": time.perf_counter() - begun}


def tokenize_each(
    jobs: Sequence[tuple[str | Path, str | Path]], tokenizer: str | Path, *, name: str | None = None
) -> Iterator[dict[str, Any]]:
    """`tokenize` of several (data, out), two at a time in processes of one thread each; the counts in their order."""
    with workers() as pool:
        for done in [pool.submit(tokenize, data, tokenizer, out, name=name) for data, out in jobs]:
            yield done.result()


def workers() -> ProcessPoolExecutor:
    """Two processes of one thread each."""
    return ProcessPoolExecutor(2, get_context("spawn"), begin_worker)


def begin_worker(threads: int = 1) -> None:
    """What a process of a pool does first: it takes so many threads, and ends with the process that wants its work."""
    import torch

    torch.set_num_threads(threads)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def summary_line(summary: Mapping[str, Any]) -> str:
    """The counts of `tokenize` in one line."""
    bad = f"{summary['quarantined']} rows in {QUARANTINE}" if summary["quarantined"] else "no row left out"
    return (f"{summary['documents']} documents from {summary['rows']} rows in {summary['shards']} shards, "
            f"{summary['images']} images ({summary['distinct']} distinct), {bad}")  # fmt: skip


def census_line(summary: Mapping[str, Any]) -> str:
    """The census of `tokenize` in one line: codes used and dead, and their entropy, over distinct pictures."""
    uses = [str(CodebookUse(book["size"], book["used"], book["entropy"])) for book in summary["census"]]
    if len(uses) > 1:
        uses = [f"codebook {number}: {use}" for number, use in enumerate(uses)]
    return "; ".join(uses)


def read_shards(path: str | Path) -> Shards:
    """All documents of a folder of token shards (or of one shard), as a sequence; nothing is checked."""
    return Shards(path)


# ---- the tokenizer


def _identity(tokenizer: str | Path | ImageTokenizer) -> tuple[str, dict[str, Any], list[str]]:
    """Name, manifest section and licences of a tokenizer; of a folder without loading its weights."""
    manifest = Manifest.load(open_folder(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer.manifest()
    if len(manifest.tokenizers) != 1:
        names = ", ".join(manifest.tokenizers) or "none"
        raise ValueError(f"{tokenizer}: expected the folder of one image tokenizer, its {FILE} has: {names}")
    [(name, section)] = manifest.tokenizers.items()
    return name, section, list(manifest.licences)


def _open(tokenizer: str | Path | ImageTokenizer, device: str) -> ImageTokenizer:
    if not isinstance(tokenizer, str | Path):
        return tokenizer.to(device).eval()
    from unitok.tokenizers.base import load_tokenizer

    return load_tokenizer(tokenizer, device)


# ---- the folder


class _Folder:
    """The output folder of one job: its finished shards, and who may go on with them."""

    def __init__(self, out: Path, job: dict[str, Any]):
        self.out, self.job = out, json.loads(json.dumps(job))
        self.shards: list[dict[str, Any]] = []
        self.done: dict[str, Any] | None = None

    def __enter__(self) -> _Folder:
        progress = self.out / PROGRESS
        if not progress.exists() and any(self.out.glob("*.parquet")):
            raise ValueError(f"{self.out} holds parquet files but no {PROGRESS}: give --out a folder of its own")
        self.file = open(progress, "a+b")
        try:
            _lock(self.file, self.out)
            self._take_up()
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _take_up(self) -> None:
        """Read what is finished; cut off whatever a killed run left beyond that."""
        self.file.seek(0)
        end, header = 0, None
        for line in self.file:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if entry is None:  # torn by a kill
                break
            if header is None:
                header = entry
                _same_job(header, self.job, self.out)
            elif "done" in entry:
                self.done = entry["done"]
            elif _size(self.out / entry["file"]) == entry["bytes"]:
                self.shards.append(entry)
            else:  # a shard that was removed is made again, with all after it
                break
            end += len(line)
        _cut(self.out / PROGRESS, end)
        for stray in self.out.glob(".*.tmp"):
            stray.unlink()
        _cut(self.out / QUARANTINE, self.shards[-1]["quarantine_bytes"] if self.shards else 0)
        if header is None:
            self._append(self.job)

    def add(self, documents: list[Document], bad: list[tuple[str, str]], rows: int) -> None:
        """Write one shard. The order makes a kill at any point harmless: what progress.jsonl lacks is done again."""
        name = f"shard-{len(self.shards):06d}.parquet"
        quarantine = self.out / QUARANTINE
        if bad:
            with open(quarantine, "ab") as file:
                for where, reason in bad:
                    source, _, line = where.rpartition(":")
                    file.write(_line({"file": source, "line": int(line), "reason": reason}))
        with replacing(self.out / name) as temporary:
            pq.write_table(_table(documents), temporary, compression="zstd")
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        images = [part.codes for document in documents for part in document.parts if part.codes is not None]
        entry = {"file": name, "bytes": _size(self.out / name), "rows": rows, "documents": len(documents),
                 "quarantined": len(bad), "images": len(images), "tokens": sum(map(len, images)),
                 "quarantine_bytes": _size(quarantine) or 0}  # fmt: skip
        self._append(entry)
        self.shards.append(entry)

    def counts(self) -> dict[str, Any]:
        keys = ("rows", "documents", "quarantined", "images", "tokens")
        return {key: sum(shard[key] for shard in self.shards) for key in keys} | {"shards": len(self.shards)}

    def finish(self, data: str, summary: dict[str, Any]) -> None:
        counts = self.counts()
        if not counts["rows"]:
            raise ValueError(f"{data}: there are no rows in it")
        if not counts["documents"]:
            with open(self.out / QUARANTINE, "rb") as file:
                first = json.loads(file.readline())
            raise ValueError(f"{data}: none of {counts['rows']} rows can be used; "
                             f"{first['file']}, line {first['line']}: {first['reason']}")  # fmt: skip
        self.done = counts | summary
        self._append({"done": self.done})

    def _append(self, entry: dict[str, Any]) -> None:
        self.file.write(_line(entry))
        self.file.flush()
        os.fsync(self.file.fileno())


def _same_job(then: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """ValueError naming what differs between the run that began the folder and this one."""
    advice = f"; give another --out, or delete {out}"
    if then.get("format") != now["format"]:
        raise ValueError(f"{out}: its {PROGRESS} has format {then.get('format')}, this is {now['format']}{advice}")
    if then["tokenizers"].keys() != now["tokenizers"].keys():
        raise ValueError(f"{out} was begun with tokenizer {_names(then)}, not {_names(now)}{advice}")
    try:
        begun, wanted = (Manifest(tokenizers=job["tokenizers"]) for job in (then, now))
        begun.check(wanted, what=(str(out), "this run"))
    except ValueError as error:
        raise ValueError(f"{out} was begun with another tokenizer: {error}{advice}") from None
    usual = {"native": False, "dtype": "float32"}
    for key in ("columns", "limit", "shard_rows", *usual):
        before, asked = (job.get(key, usual.get(key)) for job in (then, now))
        if before != asked:
            raise ValueError(f"{out} was begun with {key} {before}, not {asked}{advice}")
    old, new = ({name: rest for name, *rest in job["source"]} for job in (then, now))
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if changed:
        how = "changed" if changed[0] in old and changed[0] in new else "is gone" if changed[0] in old else "is new"
        raise ValueError(f"{out} was begun with another source: {changed[0]} {how}{advice}")


def _names(job: dict[str, Any]) -> str:
    return ", ".join(map(repr, job["tokenizers"]))


def _lock(file: Any, out: Path) -> None:
    """One run at a time; the lock goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{out}: another run is writing there") from None


def _check_outside(out: Path, data: Path) -> None:
    """Refuse a place where the next run would take the shards for data."""
    if data.is_dir() and out.is_relative_to(data.resolve()):
        if out == data.resolve() or all(file.parent != data for file in find(data).files):
            raise ValueError(f"{out} lies inside the data folder {data}: put the shards elsewhere")


def _cut(path: Path, size: int) -> None:
    if (_size(path) or 0) > size:
        os.truncate(path, size)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _line(entry: Any) -> bytes:
    return (json.dumps(entry) + "\n").encode()


# ---- the file format


_PART = {
    "type": pa.string(), "role": pa.string(), "loss": pa.bool_(), "text": pa.string(), "codes": pa.list_(pa.int32()),
    "grid": pa.list_(pa.int32()), "tokenizer": pa.string(), "words": pa.string(), "source": pa.string(),
    "sha256": pa.string(),
}  # fmt: skip


def _table(documents: list[Document]) -> pa.Table:
    """One row a document: id, kind, parts (a list of structs with one payload each), meta (JSON)."""
    parts = [part for document in documents for part in document.parts]
    columns = {
        "codes": _lists([part.codes for part in parts]),
        "grid": _lists([part.grid for part in parts]),
        "source": pa.array([_utf8(part.source) for part in parts], pa.string()),
    }
    arrays = [columns.get(key, None) or pa.array([getattr(part, key) for part in parts], kind)
              for key, kind in _PART.items()]  # fmt: skip
    offsets = list(accumulate((len(document.parts) for document in documents), initial=0))
    struct = pa.StructArray.from_arrays(arrays, fields=[pa.field(key, kind) for key, kind in _PART.items()])
    return pa.table({
        "id": pa.array([_utf8(document.id) for document in documents], pa.string()),
        "kind": pa.array([document.kind for document in documents], pa.string()),
        "parts": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), struct),
        "meta": pa.array([json.dumps(document.meta, default=_plain) for document in documents], pa.string()),
    })  # fmt: skip


def _lists(values: Sequence[Any]) -> pa.Array:
    """list<int32>, null where a value is None."""
    lengths = [0 if value is None else len(value) for value in values]
    starts = list(accumulate(lengths, initial=0))
    offsets = pa.array([None if value is None else start for value, start in zip(values, starts, strict=False)]
                       + starts[-1:], pa.int32())  # fmt: skip
    flat = [np.asarray(value, dtype=np.int32) for value in values if value is not None]
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(flat) if flat else [], pa.int32()))


def _utf8(text: str | None) -> str | None:
    """File names that are no Unicode, escaped."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def _plain(value: Any) -> Any:
    """Columns of no use to JSON, as far as they can be kept: arrays as lists, other pictures not at all."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return None if isinstance(value, bytes) else str(value)


class _Columns:
    """One shard in memory, as columns."""

    def __init__(self, file: Path):
        table = pq.read_table(file).combine_chunks()
        lists = table["parts"].chunk(0) if len(table) else pa.array([], table.schema.field("parts").type)
        column = {key: lists.values.field(key) for key in _PART}
        self.ids, self.kinds, self.metas = (table[key].chunk(0) if len(table) else [] for key in ("id", "kind", "meta"))
        self.offsets = lists.offsets.tolist()
        self.text, self.words, self.source, self.sha256 = (column[k] for k in ("text", "words", "source", "sha256"))
        self.loss, self.role, self.tokenizer = (column[k].to_pylist() for k in ("loss", "role", "tokenizer"))
        self.codes, self.code_offsets = column["codes"].values.to_numpy(), column["codes"].offsets.tolist()
        self.grids, self.grid_offsets = column["grid"].values.tolist(), column["grid"].offsets.tolist()

    def document(self, n: int) -> Document:
        parts = tuple(self._part(p) for p in range(self.offsets[n], self.offsets[n + 1]))
        return Document(self.ids[n].as_py(), parts, self.kinds[n].as_py(), json.loads(self.metas[n].as_py()))

    def pictures(self) -> Iterator[tuple[Any, Any, Any, str | None]]:
        parts = (self._part(p) for p in range(len(self.text)))
        yield from ((part.sha256, part.codes, part.grid, part.words) for part in parts if part.codes is not None)

    def _part(self, p: int) -> Part:
        loss, role, text = self.loss[p], self.role[p], self.text[p].as_py()
        if text is not None:
            return Part("text", text=text, loss=loss, role=role)
        codes = self.codes[self.code_offsets[p] : self.code_offsets[p + 1]]
        grid = tuple(self.grids[self.grid_offsets[p] : self.grid_offsets[p + 1]])
        return Part("image", codes=codes, grid=grid, tokenizer=self.tokenizer[p], words=self.words[p].as_py(),
                    loss=loss, role=role, source=self.source[p].as_py(), sha256=self.sha256[p].as_py())  # fmt: skip


class Shards(Sequence[Document]):
    """The documents of a folder of shards; a shard is read when it is first needed, a document built when asked for."""

    def __init__(self, path: str | Path):
        path = Path(path)
        self.files = [path] if path.is_file() else sorted(path.glob("shard-*.parquet"))
        if not self.files:
            raise FileNotFoundError(f"{path}: no token shards (shard-*.parquet) there")
        self._ends = list(accumulate(pq.read_metadata(file).num_rows for file in self.files))
        self._columns: dict[int, _Columns] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, n: int) -> Document: ...
    @overload
    def __getitem__(self, n: slice) -> list[Document]: ...
    def __getitem__(self, n: int | slice) -> Document | list[Document]:
        if isinstance(n, slice):
            return [self[i] for i in range(*n.indices(len(self)))]
        n = n + len(self) if n < 0 else n
        if not 0 <= n < len(self):
            raise IndexError(f"document {n} of {len(self)}")
        shard = bisect_right(self._ends, n)
        if shard not in self._columns:
            self._columns[shard] = _Columns(self.files[shard])
        return self._columns[shard].document(n - (self._ends[shard - 1] if shard else 0))
