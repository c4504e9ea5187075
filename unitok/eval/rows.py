"""Rows to score: read from any source `unitok.data` reads, with ids, and pictures told apart by content."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from unitok.checkpoint import config_hash, write_atomic
from unitok.data.schema import Document, parse_row
from unitok.data.sources import Slice, read_image, read_pictures, read_source
from unitok.eval.progress import row_rng, row_seed

QUARANTINE = "quarantine.jsonl"
KINDS = ("question", "caption", "picture")

Row = Mapping[str, Any]


def load_rows(sources: Sequence[Any], kind: str, *, out: Path | None = None) -> list[dict[str, Any]]:
    """Rows of recipe sources (path, columns, limit), each with a unique "id" and an "image".

    kind: "question" rows have question and answers (and the file's other columns), "caption" rows captions, a list;
    a "picture" row is any picture. Unusable rows go to `out`/quarantine.jsonl and are counted on stderr.

    Raises:
        ValueError: no usable row. FileNotFoundError: no such source.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of rows {kind!r}: one of {', '.join(KINDS)}")
    read = {"question": _questions, "caption": _captions, "picture": _pictures}[kind]
    rows, bad = [], []
    for source in sources:
        for number, (where, row) in enumerate(read(source.path, source.columns)):
            if source.limit is not None and number >= source.limit:
                break
            if isinstance(row, ValueError):
                file, _, line = where.rpartition(":")
                bad.append({"file": str(Path(source.path) / file), "line": int(line), "reason": str(row)})
            else:
                rows.append(row)
    if bad:
        where = f"; see {out / QUARANTINE}" if out else ""
        first = bad[0]
        if not rows:
            raise ValueError(f"no usable {kind} row; the first: {first['file']}:{first['line']}: {first['reason']}")
        print(f"{len(bad)} of {len(bad) + len(rows)} rows cannot be used{where}", file=sys.stderr)
        if out:
            out.mkdir(parents=True, exist_ok=True)
            write_atomic(out / QUARANTINE, "".join(json.dumps(line) + "\n" for line in bad))
    return _with_ids(rows)


def subset(rows: Sequence[Row], n: int | None, seed: int) -> list[Row]:
    """n rows in file order, chosen by seed and id: a smaller n takes a part of a larger one's. None: all."""
    if n is None or n >= len(rows):
        return list(rows)
    chosen = {id(row) for row in sorted(rows, key=lambda row: row_seed(seed, "subset", row["id"]))[:n]}
    return [row for row in rows if id(row) in chosen]


def image_keys(row: Row) -> frozenset[str]:
    """What tells the row's picture (or pictures) from others: a hash of the content, so that copies count as one."""
    image = row["image"]
    return frozenset(_key(one) for one in (image if isinstance(image, list | tuple) else [image]) if one is not None)


def other_row(row: Row, rows: Sequence[Row], shown: Mapping[str, frozenset[str]], seed: int) -> Row:
    """The first row, from a place drawn for this one, that shows no picture of this one; `shown`: image_keys by id."""
    start = row_rng(seed, "shuffled", row["id"]).randrange(len(rows))
    turn = (rows[(start + step) % len(rows)] for step in range(len(rows)))
    return next(other for other in turn if shown[other["id"]].isdisjoint(shown[row["id"]]))


def can_shuffle(shown: Mapping[str, frozenset[str]]) -> bool:
    """Whether every row has another row whose pictures differ."""
    pictures = set(shown.values())
    return all(any(keys.isdisjoint(other) for other in pictures) for keys in pictures)


def with_picture(row: Row) -> dict[str, Any]:
    """The row with every picture as a model takes it: a path, or a PIL image where it lies inside another file."""

    def opened(image: Any) -> Any:
        return read_image(image) if isinstance(image, bytes | Slice) else image

    image = row["image"]
    return {**row, "image": [opened(one) for one in image] if isinstance(image, list | tuple) else opened(image)}


def rows_hash(rows: Sequence[Row], *, pictures: bool = True) -> str:
    """Twelve hex digits over ids, pictures, questions, answers and captions: equal where the same rows are meant."""
    texts = ("id", "question", "answers", "captions")
    content = [[[row.get(key) for key in texts], sorted(image_keys(row)) if pictures else []] for row in rows]
    return config_hash({"rows": content})[:12]


# ---- readers: (where, row or ValueError) -----------------------------------------------------------------------------


def _questions(path: str, columns: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for where, documents in _documents(path, columns, "question"):
        yield where, documents if isinstance(documents, ValueError) else _question(documents[0])


def _question(document: Document) -> dict[str, Any]:
    return {**document.meta, "id": document.id, "image": _image(document)}


def _captions(path: str, columns: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for where, documents in _documents(path, columns, "caption"):
        if isinstance(documents, ValueError):
            yield where, documents
            continue
        texts = [part.text for document in documents for part in document.parts if part.type == "text"]
        first = documents[0]
        row_id = first.id.rpartition("#")[0] if first.id.endswith("#0") else first.id
        yield where, {**first.meta, "id": row_id, "image": _image(first), "captions": texts}


def _pictures(path: str, columns: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for where, image in read_pictures(path, columns):
        fault = image if isinstance(image, ValueError) else _fault(image)
        yield where, fault or {"id": where, "image": image}


def _documents(path: str, columns: Mapping[str, str], kind: str) -> Iterator[tuple[str, list[Document] | ValueError]]:
    for where, row, base in read_source(path, columns):
        try:
            documents = parse_row(row, where=where, base=base)
            if documents[0].kind != kind:
                raise ValueError(f"expected a {kind} row, this is a {documents[0].kind}")
            fault = next((f for p in documents[0].parts if p.type == "image" and (f := _fault(p.image))), None)
            yield where, fault or documents
        except ValueError as error:
            yield where, error


def _image(document: Document) -> Any:
    images = [part.image for part in document.parts if part.type == "image"]
    return images[0] if len(images) == 1 else images


def _fault(image: Any) -> ValueError | None:
    missing = isinstance(image, str | Path) and not Path(image).is_file()
    return ValueError(f"{image}: no such file") if missing else None


def _with_ids(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ids from the first of question_id, id and place that tells all rows apart."""
    for key in ("question_id", "id"):
        ids = [str(row.get(key)) for row in rows]
        if len(set(ids)) == len(rows):
            return [{**row, "id": i} for row, i in zip(rows, ids, strict=True)]
    return [{**row, "id": f"{row['id']}@{number}"} for number, row in enumerate(rows)]


# ---- pictures --------------------------------------------------------------------------------------------------------


def _key(image: Any) -> str:
    if isinstance(image, str | Path):
        return _file_key(str(image))
    if isinstance(image, bytes | Slice):
        return hashlib.sha256(image if isinstance(image, bytes) else image.read()).hexdigest()
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()


@lru_cache(maxsize=1 << 17)
def _file_key(path: str) -> str:
    """Of the file's bytes; of the name where there is no such file (rows made in memory)."""
    return hashlib.sha256(Path(path).read_bytes() if Path(path).is_file() else path.encode()).hexdigest()
