"""Documents and their parts, and the row forms they are read from.

A row is one JSON object (or one parquet row, one WebDataset sample). `parse_row` reads:

    {"parts": [{"type": "text", "text": ...}, {"type": "image", "image": ..., "loss": false}, ...]}     kind "document"
    {"messages": [{"role": "user", "content": [...] or "..."}, ...]}                                    kind "messages"
    {"conversations": [{"from": "human", "value": "<image>\\n..."}, ...], "image": ...}                 kind "messages"
    {"image": ..., "question": ..., "answers": [...] and/or "answer": ...}                              kind "question"
    {"image": ..., "text": ...} or {"image": ..., "captions": [...]}                                    kind "caption"

Loss: every part of a document or caption, assistant turns only in messages, the answer only in question rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

ROLES = ("plain", "question", "answer", "user", "assistant", "system")
KINDS = ("document", "messages", "caption", "question")
COLUMNS = ("id", "parts", "messages", "conversations", "image", "images", "question", "answers", "answer", "text",
           "captions")  # fmt: skip

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_URL = re.compile(r"^(?:[a-zA-Z][a-zA-Z0-9+.-]+://|data:)")
_PLACEHOLDER = re.compile(r"\n?<image>\n?")  # LLaVA writes the placeholder on a line of its own


@dataclass(frozen=True, eq=False)
class Part:
    """One piece of a document: a text, a picture, or a picture already turned into codes (exactly one of the three)."""

    type: str  # "text" | "image"
    text: str | None = None
    image: Any = None  # a path, bytes, a PIL image, or a slice of a file: what sources.read_image opens
    codes: np.ndarray | None = None  # int32 [N]
    grid: tuple[int, ...] | None = None  # prod(grid) == N
    tokenizer: str | None = None  # name of the image tokenizer that made the codes
    words: str | None = None  # the codes as text, for a tokenizer whose vocabulary is text
    loss: bool = True
    role: str = "plain"  # one of ROLES; wording is the template's business
    source: str | None = None  # where the picture came from, as written in the row
    sha256: str | None = None  # of the picture's file

    def __post_init__(self) -> None:
        payloads = (self.text is not None) + (self.image is not None) + (self.codes is not None)
        if payloads != 1 or (self.type == "text") != (self.text is not None) or self.type not in ("text", "image"):
            raise ValueError(f"a {self.type!r} part with {payloads} payloads; it holds one: text, image or codes")
        if self.role not in ROLES:
            raise ValueError(f"unknown role {self.role!r}; one of {', '.join(ROLES)}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Part):
            return NotImplemented
        same = all(getattr(self, f.name) == getattr(other, f.name) for f in fields(self) if f.name != "codes")
        if self.codes is None or other.codes is None:
            return same and self.codes is other.codes
        return same and np.array_equal(self.codes, other.codes)

    __hash__ = None  # type: ignore[assignment]


def text_part(text: str, *, loss: bool = True, role: str = "plain") -> Part:
    return Part("text", text=text, loss=loss, role=role)


def image_part(image: Any, *, loss: bool = True, role: str = "plain", source: str | None = None) -> Part:
    """A picture not yet tokenised: a path, bytes, {"bytes", "path"} or a PIL image."""
    return Part("image", image=image, loss=loss, role=role, source=source)


def codes_part(
    codes: Any, grid: Sequence[int] | None = None, tokenizer: str | None = None, *, words: str | None = None,
    loss: bool = True, role: str = "plain", source: str | None = None, sha256: str | None = None,
) -> Part:  # fmt: skip
    """A tokenised picture. codes: integers [N] (any shape is flattened, position-major); grid defaults to (N,)."""
    codes = np.asarray(codes)
    if not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"codes must be integers, got {codes.dtype}")
    codes = codes.astype(np.int32).reshape(-1)
    grid = (len(codes),) if grid is None else tuple(int(n) for n in grid)
    if int(np.prod(grid)) != len(codes):
        raise ValueError(f"grid {grid} needs {int(np.prod(grid))} codes, got {len(codes)}")
    return Part("image", codes=codes, grid=grid, tokenizer=tokenizer, words=words, loss=loss, role=role,
                source=source, sha256=sha256)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """An ordered list of parts. `meta` keeps the row's other columns (and question and answers of a question row)."""

    id: str
    parts: tuple[Part, ...]
    kind: str = "document"  # one of KINDS
    meta: dict[str, Any] = field(default_factory=dict)


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse a mapping to a column that no row form has."""
    for ours in columns:
        if ours not in COLUMNS:
            raise ValueError(f"columns: unknown column {ours!r}; a row may have {', '.join(COLUMNS)}")


def map_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Rename columns, `{ours: theirs}`; ValueError naming a missing one and the columns present."""
    check_columns(columns)
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise ValueError(f"no column {missing[0]!r}; columns present: {_names(row)}")
    theirs = set(columns.values())
    renamed = {key: value for key, value in row.items() if key not in theirs}
    return renamed | {ours: row[name] for ours, name in columns.items()}


def parse_row(
    row: Any, *, columns: Mapping[str, str] | None = None, where: str = "", base: str | Path | None = None
) -> list[Document]:
    """Read one row into documents (one; a row of `captions` gives one a caption).

    row: a mapping, or the exception a source met instead of one, which is raised here. where: "file:line", the id of
    a row that has none. base: folder that relative image paths start from; None leaves them as written.
    ValueError says in one line why a row cannot be used.
    """
    if isinstance(row, Exception):
        raise row
    if not isinstance(row, Mapping):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    row = map_columns(row, columns) if columns else row
    row = {key: value for key, value in row.items() if value is not None}  # parquet fills absent columns with nulls
    reader = _Reader(row, str(row.get("id", where)), base)
    for column in ("parts", "messages", "conversations", "question", "captions", "text"):
        if column in row:
            return getattr(reader, column)()
    pictures = {"image", "images"} & set(row)
    wanted = "'text' (or 'captions', 'question')" if pictures else "'parts', 'messages' or 'image'"
    raise ValueError(f"no column {wanted}; columns present: {_names(row)}")


class _Reader:
    """The row forms of one row."""

    def __init__(self, row: dict[str, Any], id: str, base: str | Path | None):
        self.row, self.id, self.base = row, id, base

    def parts(self) -> list[Document]:
        parts = []
        for n, item in enumerate(_sequence(self.row["parts"], "parts")):
            parts += self._item(item, f"part {n}", role="plain", loss=True, pending=None)
        return [self._document(parts, "document", used=("parts",))]

    def messages(self) -> list[Document]:
        turns = self._turn_list("messages")
        return self._turns([(t, t.get("role"), t.get("content")) for t in turns], used="messages")

    def conversations(self) -> list[Document]:
        """LLaVA and ShareGPT: `from` and `value`, with <image> where each picture stands."""
        turns = self._turn_list("conversations")
        return self._turns(
            [(t, t.get("from", t.get("role")), t.get("value", t.get("content"))) for t in turns], used="conversations"
        )

    def question(self) -> list[Document]:
        row = self.row
        question = _text(row["question"], "question")
        answers = [_answer(a) for a in _sequence(row.get("answers", ()), "answers")]
        if "answer" not in row and not answers:
            raise ValueError(f"no column 'answers' (or 'answer'), or it is empty; columns present: {_names(row)}")
        # One answer per annotator: the most given one is learnt, the first of equals; all stay in meta for scoring.
        answer = _answer(row["answer"]) if "answer" in row else Counter(answers).most_common(1)[0][0]
        parts = [self._image(image, loss=False) for image in self._images(required=True)]
        parts += [text_part(question, loss=False, role="question"), text_part(answer, role="answer")]
        extra = {"question": question, "answers": answers or [answer]}
        return [self._document(parts, "question", used=("image", "images", "question", "answers"), extra=extra)]

    def text(self) -> list[Document]:
        return self.captions()

    def captions(self) -> list[Document]:
        """The text first, then the picture; recipes that caption turn the order round."""
        row = self.row
        many = "captions" in row
        texts = [_text(t, "caption") for t in (_sequence(row["captions"], "captions") if many else [row["text"]])]
        if not texts:
            raise ValueError("column 'captions' is empty")
        images = [self._image(image, loss=True) for image in self._images(required=True)]
        used = ("image", "images", "captions" if many else "text")
        ids = [f"{self.id}#{n}" for n in range(len(texts))] if many else [self.id]
        return [self._document([text_part(text), *images], "caption", used=used, id=id)
                for id, text in zip(ids, texts, strict=True)]  # fmt: skip

    def _turn_list(self, column: str) -> list[Mapping[str, Any]]:
        turns = _sequence(self.row[column], column)
        for n, turn in enumerate(turns):
            if not isinstance(turn, Mapping):
                raise ValueError(f"{column}[{n}]: expected an object, got {type(turn).__name__}")
        return turns

    def _turns(self, turns: list[tuple[Mapping[str, Any], Any, Any]], used: str) -> list[Document]:
        pending = self._images(required=False)  # pictures of the row, taken in order by placeholders
        count = len(pending)
        parts = []
        for n, (turn, speaker, content) in enumerate(turns):
            role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
            if role is None:
                raise ValueError(f"{used}[{n}]: unknown role {speaker!r}; one of {', '.join(_SPEAKERS)}")
            loss = _flag(turn.get("loss", role == "assistant"), f"{used}[{n}]")
            if isinstance(content, str):
                placeholders = used == "conversations" or count > 0
                content = _split_placeholders(content) if placeholders else [{"type": "text", "text": content}]
            for item in _sequence(content, f"{used}[{n}].content"):
                parts += self._item(item, f"{used}[{n}]", role=role, loss=loss, pending=pending)
        if pending:
            raise ValueError(f"{count} images in the row, but only {count - len(pending)} places for one in {used}")
        return [self._document(parts, "messages", used=("image", "images", used))]

    def _item(self, item: Any, at: str, *, role: str, loss: bool, pending: list[Any] | None) -> list[Part]:
        """One {"type": "text" | "image", ...}; an empty text gives no part."""
        if not isinstance(item, Mapping):
            raise ValueError(f"{at}: expected an object with 'type', got {type(item).__name__}")
        item = {key: value for key, value in item.items() if value is not None}
        loss = _flag(item.get("loss", loss), at)
        if item.get("type") == "text":
            text = _text(item.get("text"), f"{at}: text", empty=True)
            return [text_part(text, loss=loss, role=role)] if text else []
        if item.get("type") in ("image", "image_url"):
            image = next((item[key] for key in ("image", "path", "url", "image_url") if key in item), None)
            if image is None:
                listed = pending is not None
                if not pending:
                    why = "a place for an image, but no image is left" if listed else "an image without a file"
                    raise ValueError(f"{at}: {why}")
                image = pending.pop(0)
            return [self._image(image, loss=loss, role=role)]
        raise ValueError(f"{at}: unknown type {item.get('type')!r}; text or image")

    def _images(self, *, required: bool) -> list[Any]:
        """The row's `image` (one, or a list) or `images`."""
        value = self.row.get("image", self.row.get("images"))
        if value is None and required:
            raise ValueError(f"no column 'image'; columns present: {_names(self.row)}")
        images = list(value) if isinstance(value, list | tuple | np.ndarray) else [] if value is None else [value]
        if required and not images:
            raise ValueError("column 'image' is empty")
        return images

    def _image(self, image: Any, *, loss: bool, role: str = "plain") -> Part:
        if isinstance(image, Mapping) and "url" in image and "bytes" not in image:  # the OpenAI form {"url": ...}
            image = image["url"]
        if isinstance(image, Mapping):  # the `datasets` form {"bytes": ..., "path": ...}
            name, data = image.get("path"), image.get("bytes")
            if data is not None:
                return image_part(bytes(data), loss=loss, role=role, source=name)
            image = name
        if isinstance(image, str | Path):
            name = str(image)
            if not name.strip():
                raise ValueError("an image path is empty")
            if _URL.match(name):
                raise ValueError(f"image {name[:100]!r} is a URL; download it and give the file")
            path = name if self.base is None else Path(self.base) / name
            return image_part(path, loss=loss, role=role, source=name)
        if image is None or isinstance(image, bool | int | float | list):
            raise ValueError(f"an image is a path or bytes, got {type(image).__name__}")
        return image_part(image, loss=loss, role=role, source=getattr(image, "name", None))

    def _document(
        self, parts: list[Part], kind: str, used: Sequence[str], extra: dict | None = None, id: str | None = None
    ) -> Document:
        if not parts:
            raise ValueError("the row has no parts")
        meta = {key: value for key, value in self.row.items() if key not in (*used, "id")}
        return Document(self.id if id is None else id, tuple(parts), kind, meta | (extra or {}))


def _split_placeholders(text: str) -> list[dict[str, Any]]:
    """'<image>\\nWhat?' -> an image item and the text items around it."""
    pieces = _PLACEHOLDER.split(text)
    items: list[dict[str, Any]] = [{"type": "text", "text": pieces[0]}]
    for piece in pieces[1:]:
        items += [{"type": "image"}, {"type": "text", "text": piece}]
    return items


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, row))) or "none"


def _sequence(value: Any, what: str) -> list[Any]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{what}: expected a list, got {type(value).__name__}")
    return list(value)


def _text(value: Any, what: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string, got {type(value).__name__}")
    if not empty and not value.strip():
        raise ValueError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid Unicode: a lone surrogate at character {error.start}") from None
    return value


def _answer(value: Any) -> str:
    if isinstance(value, Mapping):  # the VQA v2 form {"answer": ..., "answer_id": ...}
        value = value.get("answer")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    return _text(value, "answer")


def _flag(value: Any, at: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{at}: loss must be true or false, got {value!r}")
    return value
