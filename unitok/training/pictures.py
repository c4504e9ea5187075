"""Pictures to train on: read once into memory as uint8 where they fit, else streamed from their files.

The order is a function of (seed, position) alone: an epoch is a permutation drawn from its own generator, and a step
takes the next batch_size positions, whatever the number of processes. So a position is all that resuming needs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unitok import checkpoint
from unitok.config import DataSource
from unitok.data.sources import read_captioned, read_image, read_pictures

IN_MEMORY = 2 << 30  # bytes of pictures that are kept in memory
HELD_OUT_SHARE = 10  # at most one picture in ten is held out


class _Item(NamedTuple):
    where: str
    picture: Any  # what `read_image` reads
    captions: tuple[str, ...]


class Order:
    """Which picture stands at which position: epoch after epoch, each a new permutation.

    Args:
        sizes: pictures in each source.
        weights: how often an epoch shows each picture of a source; 0.5 shows half of them, drawn anew each epoch.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        self.sizes, self.weights, self.seed = list(sizes), list(weights), seed
        self.length = len(self._draw(0))
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def take(self, first: int, count: int) -> np.ndarray:
        """int64 [count]: the pictures at positions first, first + 1, ..."""
        positions = np.arange(first, first + count)
        epochs, within = np.divmod(positions, self.length)
        out = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            if self._cached[0] != epoch:
                self._cached = (int(epoch), self._draw(int(epoch)))
            out[epochs == epoch] = self._cached[1][within[epochs == epoch]]
        return out

    def _draw(self, epoch: int) -> np.ndarray:
        rng, parts, start = np.random.default_rng([self.seed, epoch]), [], 0
        for size, weight in zip(self.sizes, self.weights, strict=True):
            whole, rest = int(weight), round((weight - int(weight)) * size)
            parts += [np.arange(start, start + size)] * whole + [start + rng.permutation(size)[:rest]]
            start += size
        drawn = np.concatenate(parts)
        if len(drawn) == 0:
            raise ValueError("an epoch holds no picture: raise the weights of the data")
        return rng.permutation(drawn)


class Pictures:
    """The training and the held-out pictures of a recipe's data.

    Args:
        captioned: rows have captions, and those of one picture file are one picture.

    Attributes:
        held_out: uint8 [E, 3, S, S], never trained on.
        held_out_captions: of each of them every caption; empty unless captioned.
        fingerprint: changes when the list of pictures, or of captions, does.
        refused: how many pictures could not be used; each is a line of the quarantine file.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        fit: Callable[[Any], Tensor],
        image_size: int,
        *,
        seed: int,
        eval_images: int = 0,
        workers: int = 0,
        quarantine: Path | None = None,
        in_memory: int = IN_MEMORY,
        captioned: bool = False,
    ):
        self.fit, self.workers, self.quarantine, self.captioned = fit, workers, quarantine, captioned
        self.seed = seed
        self._bad: dict[str, str] = {}
        digest = hashlib.sha256()
        listed = [self._list(source, digest) for source in sources]
        items = [item for source in listed for item in source]
        if not items:
            raise ValueError(
                f"no usable picture in {', '.join(s.path for s in sources)}"
                + (f"; {self.refused} refused, see {quarantine}" if self._bad else "")
            )
        self.fingerprint = digest.hexdigest()
        # which pictures are held out depends on the listing alone, before any of them is read
        chosen = np.random.default_rng([seed, 1, 0]).permutation(len(items))
        held = set(chosen[: min(eval_images, len(items) // HELD_OUT_SHARE)].tolist())
        kept, start = [], 0
        for source in listed:
            kept.append([item for i, item in enumerate(source, start) if i not in held])
            start += len(source)
        good, self.held_out = self._read([items[i] for i in sorted(held)])
        self.held_out_captions = [items[i].captions for i, is_good in zip(sorted(held), good, strict=True) if is_good]
        self.cache: Tensor | None = None
        self.items = [item for source in kept for item in source]
        if len(self.items) * 3 * image_size**2 <= in_memory:
            good, self.cache = self._read(self.items)
            ends = np.cumsum([0, *map(len, kept)])
            sizes = [int(good[a:b].sum()) for a, b in zip(ends, ends[1:], strict=False)]
            self.items = [item for item, is_good in zip(self.items, good, strict=True) if is_good]
        else:
            sizes = [len(source) for source in kept]
        if sum(sizes) == 0:
            raise ValueError(f"no picture could be read; {self.refused} refused, see {quarantine}")
        self.order = Order(sizes, [s.weight for s in sources], seed)
        self.count = sum(sizes)
        self._write_quarantine()

    @property
    def refused(self) -> int:
        return len(self._bad)

    def batches(
        self, first_step: int, last_step: int, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[Tensor]:
        """uint8 [batch_size / world, 3, S, S] for each step of first_step ... last_step - 1."""
        yield from (images for _, images in self.indexed_batches(first_step, last_step, batch_size, rank, world))

    def indexed_batches(
        self, first_step: int, last_step: int, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, each behind the int64 [batch_size / world] of the pictures in it."""
        share = batch_size // world
        wanted = (self.order.take(s * batch_size + rank * share, share) for s in range(first_step, last_step))
        if self.cache is not None:
            for index in map(torch.from_numpy, wanted):
                yield index, self.cache[index]
            return
        stream = DataLoader(
            _Stream(self.items, self.fit),
            batch_size=None,
            sampler=list(wanted),
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
        )
        for index, images, bad in stream:
            if bad:
                self._bad.update(bad)
                self._write_quarantine()
            yield index, images

    def texts(self, index: Tensor, step: int) -> list[str]:
        """A caption of each of these pictures, drawn by (seed, step)."""
        rng = np.random.default_rng([self.seed, 3, step])
        drawn = rng.random(len(index))
        captions = [self.items[i].captions for i in index.tolist()]
        return [options[int(share * len(options))] for options, share in zip(captions, drawn, strict=True)]

    def _list(self, source: DataSource, digest: Any) -> list[_Item]:
        items: list[_Item] = []
        read = read_captioned if self.captioned else read_pictures
        for where, picture, *captions in read(source.path, source.columns):
            if source.limit is not None and len(items) >= source.limit:
                break
            if isinstance(picture, ValueError):
                self._bad[f"{source.path}: {where}"] = str(picture)
            else:
                item = _Item(f"{source.path}: {where}", picture, tuple(captions[0]) if captions else ())
                digest.update("\n".join((where, *item.captions, "")).encode())
                items.append(item)
        return items

    def _read(self, items: list[_Item]) -> tuple[np.ndarray, Tensor]:
        """(which of them could be read, uint8 [n, 3, S, S] of those)."""
        with ThreadPoolExecutor(max(1, self.workers)) as pool:  # decoding and resizing release the lock
            read = list(pool.map(lambda item: _try(item, self.fit), items))
        good = np.array([isinstance(r, Tensor) for r in read], bool)
        pairs = zip(items, read, strict=True)
        self._bad.update((item.where, str(r)) for item, r in pairs if isinstance(r, ValueError))
        tensors = [r for r in read if isinstance(r, Tensor)]
        return good, torch.stack(tensors) if tensors else torch.empty(0, 3, 0, 0, dtype=torch.uint8)

    def _write_quarantine(self) -> None:
        if self.quarantine is not None and self._bad:
            lines = [json.dumps({"source": where, "reason": why}) for where, why in sorted(self._bad.items())]
            checkpoint.write_atomic(self.quarantine, "\n".join(lines) + "\n")


class _Stream(Dataset):
    """A picture that cannot be read is replaced by the next one that can, so that the order stays what it is."""

    def __init__(self, items: list[_Item], fit: Callable[[Any], Tensor]):
        self.items, self.fit = items, fit

    def __getitem__(self, indices: np.ndarray) -> tuple[Tensor, Tensor, dict[str, str]]:
        """(which pictures they are, uint8 [b, 3, S, S], why others could not be read)."""
        shown, images, bad = [], [], {}
        for index in indices.tolist():
            for i in range(index, index + len(self.items)):
                item = self.items[i % len(self.items)]
                image = _try(item, self.fit)
                if isinstance(image, Tensor):
                    shown.append(i % len(self.items))
                    images.append(image)
                    break
                bad[item.where] = str(image)
            else:
                raise ValueError(f"no picture can be read any more, the last one because: {image}")
        return torch.tensor(shown), torch.stack(images), bad


def _try(item: _Item, fit: Callable[[Any], Tensor]) -> Tensor | ValueError:
    """uint8 [3, S, S], or why there is none."""
    try:
        return (fit(read_image(item.picture)) * 255).round().to(torch.uint8)
    except ValueError as error:
        return error
