"""The manifest `unitok.json`: what the numbers of a tokenizer, shard, adapter or model folder mean.

Two folders fit if every field that decides is equal in the sections both have. Hashes, sizes, offsets, layout,
template and resize rule decide; ids, paths and licences inform.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from unitok.checkpoint import read_json, write_json

FILE = "unitok.json"
FORMAT = 1

# Keys that only inform: where a thing came from. In `vocab` and `template` every key decides.
INFORM = frozenset({"id", "path", "revision", "source", "url", "licence"})
OPTIONAL = frozenset({("base", "weight_hash")})  # compared only where both sides have it
SHOWN = 80  # characters of a value that an error shows
_ABSENT = object()


@dataclass
class Manifest:
    """Sections as plain JSON values; a folder's manifest holds those that apply to it."""

    tokenizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    vocab: dict[str, Any] | None = None  # JointVocab.to_dict()
    base: dict[str, Any] | None = None  # the language model before any expansion
    text_tokenizer: dict[str, Any] | None = None
    template: dict[str, Any] | None = None
    detokenizer: dict[str, Any] | None = None
    licences: list[str] = field(default_factory=list)

    def __getitem__(self, section: str) -> Any:
        if section not in {f.name for f in fields(self)}:
            raise KeyError(section)
        return getattr(self, section)

    def to_dict(self) -> dict[str, Any]:
        """JSON: the format version, then the sections that are there."""
        return {"format": FORMAT, **{f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}}

    @classmethod
    def from_dict(cls, d: dict[str, Any], where: str = FILE) -> Manifest:
        if d.get("format") != FORMAT:
            raise ValueError(f"{where}: unknown manifest format {d.get('format')!r}; this unitok reads format {FORMAT}")
        sections = {key: value for key, value in d.items() if key != "format"}
        for f in fields(cls):
            kind = list if f.name == "licences" else dict
            if f.name in sections and not isinstance(sections[f.name], (kind, type(None))):
                raise ValueError(f"{where}: section {f.name!r} must be a JSON {'array' if kind is list else 'object'}")
        unknown = sorted(set(sections) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"{where}: unknown section {unknown[0]!r}")
        return cls(**{key: value for key, value in sections.items() if value is not None})

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """From a folder, or from the file itself."""
        path = Path(folder)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: no {FILE} in it, so what its numbers mean is unknown")
        return cls.from_dict(read_json(path), str(path))

    def save(self, folder: str | Path) -> Path:
        path = Path(folder) / FILE
        write_json(path, self.to_dict())
        return path

    def differences(self, other: Manifest) -> Iterator[tuple[str, Any, Any, bool]]:
        """(field, own value, other's value, whether it decides) over the sections both have."""
        mine, theirs = _plain(self.to_dict()), _plain(other.to_dict())
        for section in mine:
            if section in theirs and section != "format":
                yield from _walk((section,), mine[section], theirs[section])

    def check(self, other: Manifest, *, what: tuple[str, str] = ("model", "shards")) -> list[str]:
        """Refuse (ValueError naming the field and both values) unless both fit; returns the differences that inform."""
        notes = []
        for name, mine, theirs, decides in self.differences(other):
            line = f"{name} is {_show(mine)} in {what[0]}, {_show(theirs)} in {what[1]}"
            if decides:
                raise ValueError(f"manifest mismatch: {line}")
            notes.append(line)
        return notes


def _walk(path: tuple[str, ...], mine: Any, theirs: Any) -> Iterator[tuple[str, Any, Any, bool]]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        named = path in (("tokenizers",), ("vocab", "images"))  # several by name: one side may have more of them
        if named and not (mine.keys() <= theirs.keys() or theirs.keys() <= mine.keys()):
            yield ".".join(path), sorted(mine), sorted(theirs), True
        more = path == ("vocab",) and (mine.get("images") or {}).keys() != (theirs.get("images") or {}).keys()
        for key in [*mine, *(k for k in theirs if k not in mine)]:
            left, right = mine.get(key, _ABSENT), theirs.get(key, _ABSENT)
            one_sided = left is _ABSENT or right is _ABSENT
            if one_sided and (named or (*path, key) in OPTIONAL):
                continue
            if key == "rows" and more:  # the side with more tokenizers has more rows
                continue
            yield from _walk((*path, key), left, right)
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for i, (left, right) in enumerate(zip(mine, theirs, strict=True)):
            yield from _walk((*path, str(i)), left, right)
    elif mine is _ABSENT or theirs is _ABSENT or mine != theirs or isinstance(mine, bool) != isinstance(theirs, bool):
        yield ".".join(path), mine, theirs, not _informs(path)


def _informs(path: tuple[str, ...]) -> bool:
    if path[0] in ("base", "text_tokenizer", "detokenizer"):
        return any(key in INFORM for key in path[1:])
    return path[0] == "licences" or (path[0] == "tokenizers" and any(key in INFORM for key in path[2:]))


def _plain(value: Any) -> Any:
    """As it comes back from JSON: tuples are lists, keys are strings."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _show(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
