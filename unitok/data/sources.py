"""Where documents come from: JSON lines, image folders, WebDataset tars and parquet, read row by row.

A path may be a file (.jsonl, .json, .parquet, .tar, a picture), a pattern of such files ("data/*.tar"), or a folder
that holds metadata.jsonl, *.jsonl, *.parquet or *.tar, or else is itself a folder of pictures.

A row that cannot be read is handed on as the exception that says why; `schema.parse_row` raises it.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from unitok.data.schema import check_columns, map_columns, parse_row

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
METADATA = "metadata.jsonl"

_BATCH = 64  # parquet rows held in memory at once
_HASH_WHOLE = 64 << 20  # bytes of a source that are hashed in full; of larger files both ends, size and time
_HASH_END = 1 << 20


class Row(NamedTuple):
    where: str  # "file:line", the file relative to the source, the line (or row, or sample) from 1
    row: Any  # a dict, or the ValueError that says why there is none
    base: Path  # the folder that relative image paths start from


@dataclass(frozen=True)
class Slice:
    """A picture inside an uncompressed tar: read when it is needed, by whichever worker needs it."""

    file: str
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise ValueError("the tar ends early")
        return data


def read_source(path: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """All rows of a source, in a fixed order, as (where, row, base).

    columns: {ours: theirs}, applied here, so not again in parse_row. FileNotFoundError or ValueError at once where
    the path holds nothing readable or the mapping names an unknown column.
    """
    check_columns(columns or {})
    source = find(path)
    return _rows(source, dict(columns or {}))


def read_pictures(path: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[tuple[str, Any]]:
    """(where, picture) for every picture of a source, whether or not its row has texts: pass it to `read_image`.

    A row that has none, or cannot be read, gives (where, ValueError).
    """
    for where, row, base in read_source(path, columns):
        try:
            if isinstance(row, Mapping) and {"image", "images"} & set(row):
                items = row.get("image", row.get("images"))
                items = items if isinstance(items, list) else [items]
                row = {"parts": [{"type": "image", "image": item} for item in items]}
            found = [p.image for d in parse_row(row, where=where, base=base) for p in d.parts if p.type == "image"]
            if not found:
                raise ValueError("the row has no picture")
        except ValueError as error:
            found = [error]
        yield from ((where, image) for image in found)


def read_captioned(path: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[tuple[str, Any, list[str]]]:
    """(where, picture, captions) for every picture of a source whose rows are {"image", "text" or "captions"}.

    Rows of one picture file count as one, at its first place, with the captions of all of them. A row that has no
    caption, or cannot be read, gives (where, ValueError, []).
    """
    found: dict[Any, tuple[str, Any, list[str]]] = {}
    for where, row, base in read_source(path, columns):
        try:
            documents = parse_row(row, where=where, base=base)
            if documents[0].kind != "caption":
                raise ValueError("the row has no caption: columns image and text (or captions) are needed")
        except ValueError as error:
            found[where] = (where, error, [])
            continue
        images = [p.image for p in documents[0].parts if p.type == "image"]
        texts = [p.text for d in documents for p in d.parts if p.text is not None]
        key = images[0] if isinstance(images[0], Path | Slice) else where
        found.setdefault(key, (where, images[0], []))[2].extend(texts)
    yield from found.values()


def read_bytes(image: Any) -> bytes:
    """The file behind a Part.image: a path, bytes, or a Slice. ValueError with one line where it cannot be read."""
    if isinstance(image, bytes):
        return image
    try:
        return image.read() if isinstance(image, Slice) else Path(image).read_bytes()
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None


def decode_image(data: bytes) -> Image.Image:
    """The bytes of a picture file as an upright RGB picture. ValueError with one line where they are none."""
    from unitok.tokenizers.base import to_rgb

    if not data:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError("not a picture in a known format") from None
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise ValueError(f"cannot be read as a picture ({(str(error) or repr(error)).splitlines()[0]})") from None


def read_image(image: Any) -> Image.Image:
    """A Part.image (also a PIL image) as an upright RGB picture. ValueError with one line where it cannot be read."""
    if isinstance(image, Image.Image):
        from unitok.tokenizers.base import to_rgb

        return to_rgb(image)
    try:
        return decode_image(read_bytes(image))
    except ValueError as error:
        name = image.name if isinstance(image, Slice) else "picture" if isinstance(image, bytes) else image
        raise ValueError(f"{name}: {error}") from None


# ---- what a path holds


class Source(NamedTuple):
    kind: str  # "lines" | "parquet" | "tar" | "pictures"
    root: Path  # names in `where` are relative to it
    files: list[Path]


_KINDS = {".jsonl": "lines", ".json": "lines", ".parquet": "parquet", ".tar": "tar"}
_KINDS |= dict.fromkeys(PICTURES, "pictures")


def find(path: str | Path) -> Source:
    """The files of a source and how they are read."""
    path = Path(path)
    if path.is_file():
        return _of_one_kind(path.parent, [path], path)
    if path.is_dir():
        below = _files(path, "**/*")
        pictures = [f for f in below if f.suffix.lower() in PICTURES]
        for files in ([f for f in below if f.parent == path], below):
            data = [f for f in files if f.suffix in (".jsonl", ".parquet", ".tar")]
            if data:
                return _of_one_kind(path, [f for f in data if f.name == METADATA] or data, path)
            if any(f.suffix.lower() in PICTURES for f in files):
                return Source("pictures", path, pictures)
        raise ValueError(f"{path}: no {METADATA}, *.jsonl, *.parquet, *.tar or pictures in this folder")
    matches = sorted(Path(p) for p in glob.glob(str(path)) if Path(p).is_file())
    if matches:
        return _of_one_kind(path.parent, matches, path)
    raise FileNotFoundError(f"{path}: no such file or folder")


def _files(folder: Path, pattern: str) -> list[Path]:
    found = (f for f in folder.glob(pattern) if not any(p.startswith(".") for p in f.relative_to(folder).parts))
    return sorted(f for f in found if f.is_file())


def _of_one_kind(root: Path, files: list[Path], path: Path) -> Source:
    kinds = {_KINDS.get(f.suffix.lower(), f.suffix or f.name) for f in files}
    if len(kinds) > 1:
        raise ValueError(f"{path}: files of several kinds ({', '.join(sorted(kinds))}); name one file or a pattern")
    kind = kinds.pop()
    if kind not in _KINDS.values():
        raise ValueError(f"{path}: cannot read {kind} files; give .jsonl, .json, .parquet, .tar or pictures")
    root = next((p for p in [root, *root.parents] if all(f.is_relative_to(p) for f in files)), root)
    return Source(kind, root, files)


def fingerprint(path: str | Path) -> list[list[Any]]:
    """[name, size, hash] of every file of a source, to tell whether it changed; fast whatever its size.

    Pictures are one entry, by their names and sizes. Other files are hashed in full up to 64 MiB together; beyond
    that, both ends and the time of the last change stand for a file.
    """
    kind, root, files = find(path)
    if kind == "pictures":
        listing = "\n".join(f"{file.relative_to(root).as_posix()}\t{file.stat().st_size}" for file in files)
        return [["pictures", len(files), hashlib.sha256(os.fsencode(listing)).hexdigest()]]
    budget = _HASH_WHOLE
    found: list[list[Any]] = []
    for file in files:
        status = file.stat()
        digest = hashlib.sha256()
        with open(file, "rb") as opened:
            if status.st_size <= budget:
                budget -= status.st_size
                digest.update(opened.read())
            else:
                digest.update(opened.read(_HASH_END))
                opened.seek(max(0, status.st_size - _HASH_END))
                digest.update(opened.read(_HASH_END) + str(status.st_mtime_ns).encode())
        found.append([file.relative_to(root).as_posix(), status.st_size, digest.hexdigest()])
    return found


# ---- readers, one a kind


def _rows(source: Source, columns: dict[str, str]) -> Iterator[Row]:
    read = {"lines": _read_lines, "parquet": _read_parquet, "tar": _read_tar, "pictures": _read_picture}[source.kind]
    for file in source.files:
        name = file.relative_to(source.root).as_posix()
        for number, row in read(file):
            if isinstance(row, dict):
                row = _prepare(row, columns, imagefolder=file.name == METADATA)
            yield Row(f"{name}:{number}", row, file.parent)


def _prepare(row: dict[str, Any], columns: dict[str, str], *, imagefolder: bool) -> dict[str, Any] | ValueError:
    try:
        row = map_columns(row, columns) if columns else row
    except ValueError as error:
        return error
    if imagefolder and "image" not in row and "file_name" in row:
        row["image"] = row.pop("file_name")
    return row


def _read_picture(file: Path) -> Iterator[tuple[int, Any]]:
    yield 1, {"parts": [{"type": "image", "image": file.name}]}


def _read_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """JSON lines, or one JSON list (the LLaVA files)."""
    with open(file, "rb") as opened:
        if file.suffix.lower() == ".json" and opened.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            opened.seek(0)
            rows = _loads(opened.read())
            yield from enumerate(rows, 1) if isinstance(rows, list) else [(1, rows)]
            return
        opened.seek(0)
        for number, line in enumerate(opened, 1):
            if line.strip():
                yield number, _loads(line)


def _loads(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8: {error.reason} at byte {error.start}")
    except ValueError as error:  # also numbers of thousands of digits
        return ValueError(f"not JSON: {error}")
    except RecursionError:
        return ValueError("not JSON that can be read: nested too deeply")


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a parquet file; pictures are {"bytes", "path"} (the `datasets` form), plain bytes, or paths."""
    import pyarrow
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        yield number + 1, ValueError(f"the parquet file cannot be read on: {str(error).splitlines()[0]}")


def _read_tar(file: Path) -> Iterator[tuple[int, Any]]:
    """WebDataset samples: consecutive members that share a name up to the first dot; columns by extension."""
    number, key = 0, None
    members: dict[str, Slice] = {}
    try:
        with tarfile.open(file, "r:") as tar, open(file, "rb") as opened:
            for member in tar:
                path = PurePosixPath(member.name)
                stem, _, extension = path.name.partition(".")
                if not member.isfile() or not stem:
                    continue
                if (path.parent, stem) != key and members:
                    number += 1
                    yield number, _sample(members, opened)
                    members = {}
                key = (path.parent, stem)
                members[extension.lower()] = Slice(str(file), member.offset_data, member.size, member.name)
            opened.seek(tar.offset)
            if opened.read(512) != bytes(512):  # tarfile takes a cut or broken header for the end
                raise tarfile.ReadError(f"it breaks off at byte {tar.offset}")
            if members:
                yield number + 1, _sample(members, opened)
    except (tarfile.TarError, OSError) as error:
        yield number + 1, ValueError(f"the tar cannot be read on: {error}")


def _sample(members: dict[str, Slice], tar: IO[bytes]) -> dict[str, Any] | ValueError:
    """.json gives columns, .txt the column `text`, a picture the column `image`; the rest is not read."""

    def read(extension: str) -> bytes:
        tar.seek(members[extension].offset)
        return tar.read(members[extension].size)

    row = _loads(read("json")) if "json" in members else {}
    if isinstance(row, ValueError):
        return row
    if not isinstance(row, dict):
        return ValueError(f".json: expected an object, got {type(row).__name__}")
    if "txt" in members:
        try:
            row["text"] = read("txt").decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            return ValueError(f".txt: not UTF-8: {error.reason} at byte {error.start}")
    pictures = [extension for extension in members if "." + extension in PICTURES]
    if len(pictures) > 1:
        return ValueError(f"a sample with {len(pictures)} pictures: {', '.join(members[p].name for p in pictures)}")
    if pictures:
        row["image"] = members[pictures[0]]
    return row
