"""Rows -> documents whose pictures are codes: parse, read and resize in threads, encode in batches.

Shapes: B pictures, H x W pixels, N tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from unitok.data.schema import Document, parse_row
from unitok.data.sources import Row, decode_image, read_bytes
from unitok.nn.codes import CodebookUse, count_codes

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from unitok.tokenizers.base import ImageTokenizer

_CACHE_BYTES = 512 << 20  # codes of earlier pictures kept, so that a picture met again is not encoded again
_WAITING_BYTES = 256 << 20  # pixels that wait for others of their shape


class Picture(NamedTuple):
    codes: np.ndarray  # int32 [N]
    grid: tuple[int, ...]
    words: str | None


def as_pixels(tokenizer: ImageTokenizer, image: Image.Image, native: bool = False) -> Tensor:
    """A picture as the tokenizer takes it, float [3, H, W] in [0, 1]: fitted to its size, or as large as it is.

    native: unscaled, its centre cut to the largest multiples of the stride. ValueError where it is smaller than that.
    """
    if not native:
        return tokenizer.preprocess(image)
    from unitok.tokenizers.base import to_rgb, to_tensor

    image, stride = to_rgb(image), tokenizer.stride
    width, height = (side // stride * stride for side in image.size)
    if not (width and height):
        raise ValueError(f"picture of {image.width} x {image.height} pixels, expected at least {stride} a side")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return to_tensor(image.crop((left, top, left + width, top + height)))


def check_native(tokenizer: ImageTokenizer) -> None:
    """ValueError unless the tokenizer encodes pictures of any size."""
    if not tokenizer.fully_convolutional:
        raise ValueError(f"native sizes need a fully convolutional tokenizer; {type(tokenizer).__name__} takes "
                         f"pictures of {tokenizer.image_size} pixels a side only")  # fmt: skip


class Encoder:
    """Rows -> documents with codes. A shard depends on its rows and on the shards before it, on nothing else."""

    def __init__(
        self, tokenizer: ImageTokenizer, name: str, batch_size: int, workers: int, strict: bool, native: bool = False,
        fast: str | None = None,
    ):  # fmt: skip
        if native:
            check_native(tokenizer)
        self.tokenizer, self.name, self.batch_size, self.strict = tokenizer, name, batch_size, strict
        self.native, self.fast = native, None
        if fast is not None:
            from unitok.nn.compiled import Compiled

            self.fast = Compiled(tokenizer, fast, batch_size=batch_size)
        self.cache: dict[str, Picture] = {}  # by sha256, oldest first
        self.cached_bytes = self.distinct = 0
        self.books: dict[tuple[int, ...], np.ndarray] = {}
        self.counts = [np.zeros(size, dtype=np.int64) for size in tokenizer.codebook_sizes]
        self.executor = ThreadPoolExecutor(workers) if workers else None
        self.ahead = batch_size + 2 * workers  # pictures read before they are asked for

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self.executor:
            self.executor.shutdown(cancel_futures=True)

    def shard(self, rows: Iterable[Row]) -> tuple[list[Document], list[tuple[str, str]], int]:
        """-> documents, (where, reason) of unusable rows, number of rows."""
        drafts: list[tuple[str, list[Document] | str]] = []  # a row's documents (Part.image is a slot), or the reason
        slots: list[str | ValueError] = []  # sha256 of each picture, or why it cannot be used
        fresh: dict[str, Picture] = {}
        waiting: dict[tuple[int, ...], dict[str, Any]] = {}  # by shape: pictures are batched as they come
        held = 0  # bytes of those

        for slot, found in self._read(self._draft(rows, drafts, slots)):
            if isinstance(found, ValueError):
                slots[slot] = found
                continue
            sha256, pixels = found
            slots[slot] = sha256
            if pixels is None or sha256 in fresh:
                continue
            batch = waiting.setdefault(tuple(pixels.shape), {})
            batch[sha256] = pixels
            held += pixels.nbytes
            if len(batch) == self.batch_size:
                full = tuple(pixels.shape)
            elif held > _WAITING_BYTES and len(waiting) > 1:  # many shapes, each of few pictures
                full = max(waiting, key=lambda shape: len(waiting[shape]) * math.prod(shape))
            else:
                continue
            held -= sum(picture.nbytes for picture in waiting[full].values())
            fresh |= self._encode(waiting.pop(full))
        for batch in waiting.values():
            fresh |= self._encode(batch)

        documents, bad = [], []
        for where, draft in drafts:
            try:
                if isinstance(draft, str):
                    raise ValueError(draft)
                finished = [self._fill(document, slots, fresh) for document in draft]
            except ValueError as error:
                if self.strict:
                    raise ValueError(f"{where}: {error}") from None
                bad.append((where, str(error)))
            else:
                documents += finished
        self.absorb((p.sha256, p.codes, p.grid, p.words) for d in documents for p in d.parts if p.codes is not None)
        return documents, bad, len(drafts)

    def _draft(self, rows: Iterable[Row], drafts: list, slots: list) -> Iterator[tuple[int, Any]]:
        """Parse rows into `drafts` and hand out each picture once: (slot, picture)."""
        known: dict[Any, int] = {}
        for where, row, base in rows:
            try:
                parsed = parse_row(row, where=where, base=base)
            except ValueError as error:
                drafts.append((where, str(error)))
                if self.strict:  # nothing after the first bad row matters
                    return
                continue
            documents: list[Document] = []
            handed: list[tuple[int, Any]] = []
            for document in parsed:
                parts = []
                for part in document.parts:
                    if part.type == "image":
                        key = len(slots) if isinstance(part.image, bytes) else part.image  # bytes are not kept
                        slot = known.setdefault(key, len(slots))
                        if slot == len(slots):
                            slots.append("")
                            handed.append((slot, part.image))
                        part = replace(part, image=slot)
                    parts.append(part)
                documents.append(replace(document, parts=tuple(parts)))
            drafts.append((where, documents))
            yield from handed

    def _read(self, pictures: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """(slot, picture) -> (slot, (sha256, pixels or None if known) or ValueError), in order."""
        if self.executor is None:
            yield from ((slot, self._load(image)) for slot, image in pictures)
            return
        queue: deque = deque()
        for slot, image in pictures:
            queue.append((slot, self.executor.submit(self._load, image)))
            if len(queue) > self.ahead:
                slot, future = queue.popleft()
                yield slot, future.result()
        yield from ((slot, future.result()) for slot, future in queue)

    def _load(self, image: Any) -> tuple[str, Any] | ValueError:
        try:
            data = read_bytes(image)
            sha256 = hashlib.sha256(data).hexdigest()
            return sha256, None if sha256 in self.cache else as_pixels(self.tokenizer, decode_image(data), self.native)
        except ValueError as error:
            return error

    def _encode(self, batch: dict[str, Any]) -> dict[str, Picture]:
        import torch

        images = torch.stack(list(batch.values()))  # [B, 3, H, W]
        grid = tuple(self.tokenizer.grid(*images.shape[2:]))
        codes = (self.fast or self.tokenizer).encode(images).cpu()  # [B, N]
        words = self.tokenizer.to_text(codes) if self.tokenizer.vocabulary == "text" else [None] * len(codes)
        rows = codes.numpy().astype(np.int32)
        return {sha256: Picture(row, grid, text) for sha256, row, text in zip(batch, rows, words, strict=True)}

    def _fill(self, document: Document, slots: list[str | ValueError], fresh: dict[str, Picture]) -> Document:
        parts = []
        for part in document.parts:
            if part.type == "image":
                sha256 = slots[part.image]
                if isinstance(sha256, ValueError):
                    raise ValueError(f"image {part.source!r}: {sha256}" if part.source else f"image: {sha256}")
                codes, grid, words = fresh.get(sha256) or self.cache[sha256]
                part = replace(part, image=None, codes=codes, grid=grid, words=words, tokenizer=self.name,
                               sha256=sha256)  # fmt: skip
            parts.append(part)
        return replace(document, parts=tuple(parts))

    def absorb(self, pictures: Iterable[tuple[Any, Any, Any, str | None]]) -> None:
        """Remember a finished shard's pictures (sha256, codes, grid, words), count their codes; so after a restart."""
        fresh: dict[tuple[int, ...], list[np.ndarray]] = {}  # by grid
        for sha256, codes, grid, words in pictures:
            if sha256 not in self.cache:
                self.cache[sha256] = Picture(codes, grid, words)
                self.cached_bytes += codes.nbytes
                self.distinct += 1
                fresh.setdefault(tuple(grid), []).append(codes)
        for grid, met in fresh.items():
            found = count_codes(np.stack(met), self._books(grid), self.tokenizer.codebook_sizes)
            for counts, more in zip(self.counts, found, strict=True):
                counts += more
        while self.cached_bytes > _CACHE_BYTES:
            self.cached_bytes -= self.cache.pop(next(iter(self.cache))).codes.nbytes

    def _books(self, grid: tuple[int, ...]) -> np.ndarray:
        """int64 [N]: the codebook of each token."""
        if grid not in self.books:
            self.books[grid] = self.tokenizer.token_codebook(grid).numpy()
        return self.books[grid]

    def census(self) -> list[dict[str, Any]]:
        """Of each codebook over distinct pictures: its size, codes used and dead, entropy (bits), perplexity."""
        uses = map(CodebookUse.of, self.counts)
        return [{"codebook": book, "size": use.size, "used": use.used, "dead": use.dead,
                 "entropy": round(use.entropy, 6), "perplexity": round(use.perplexity, 6)}
                for book, use in enumerate(uses)]  # fmt: skip
