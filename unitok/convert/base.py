"""What a published format is, and what its converter works with: the tensors of its files, and a few helpers.

A format is a `Format` in the tuple `FORMATS` of a file of this folder; nothing is registered by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from unitok import checkpoint
from unitok.tokenizers.base import ImageTokenizer

Shapes = Mapping[str, tuple[int, ...]]

SHOWN = 3  # how many names an error lists
UNIT = 1e-3  # how far a row's norm may be off 1 in a table of unit vectors


@dataclass(frozen=True)
class Source:
    """What the files hold, unwrapped.

    Args:
        tables: tensors by name, one table a file, in the order of the files.
        config: what --config (or the config.json of a folder) says; empty where there is none.
        files: sha256 by file name.
        weights: "raw" or "ema": which set of weights was taken, where a file has both.
        notes: lines for the user and the manifest; a converter may add some.
    """

    tables: tuple[dict[str, Tensor], ...]
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    weights: str = "raw"
    notes: list[str] = field(default_factory=list)

    @property
    def state(self) -> dict[str, Tensor]:
        """All tables as one; ValueError where two files hold a tensor of one name."""
        state: dict[str, Tensor] = {}
        for table in self.tables:
            if twice := sorted(state.keys() & table.keys()):
                raise ValueError(f"two of the files hold {twice[0]}: give one file of a kind")
            state |= table
        return state

    @property
    def shapes(self) -> Shapes:
        return {name: tuple(tensor.shape) for table in self.tables for name, tensor in table.items()}


@dataclass(frozen=True)
class Format:
    """One published layout.

    Args:
        name: as on the command line.
        about: a line on what it is and which files it takes.
        detect: whether tensors of these names and shapes are of this layout; several formats may share one.
        convert: (source, image size or None) -> tokenizer with the weights in it; ValueError naming what does not fit.
        pixels: the range the original network takes; recorded.
        licence: what the weights may be used for, where that is known; `non_commercial` ones are printed.
        drops: prefixes of tensors that are no part of the tokenizer (perceptual networks, discriminators, counters).
        prefixes: in front of every name where the tokenizer lies inside a larger model; what lies beside it is dropped.
    """

    name: str
    about: str
    detect: Callable[[Shapes], bool]
    convert: Callable[[Source, int | None], ImageTokenizer]
    pixels: str = "[-1, 1]"
    licence: str | None = None
    non_commercial: bool = False
    drops: tuple[str, ...] = ("loss.",)
    prefixes: tuple[str, ...] = ()


# ---- for converters: names, shapes, configurations, tables


def fill(
    tokenizer: ImageTokenizer,
    state: Mapping[str, Tensor],
    theirs: Callable[[str], str] = str,
    allow_missing: Sequence[str] = (),
) -> ImageTokenizer:
    """Copy the tensors in, strictly; returns the tokenizer in eval mode.

    `theirs` gives the published name of each of ours, so that errors name the tensors as the files do. Axes of
    length 1 may differ (a 1 x 1 convolution stored as a matrix). `allow_missing` holds names of ours.
    """
    own = {name: tensor for name, tensor in tokenizer.own_state().items()}
    names = {name: theirs(name) for name in own}
    lost = [their for name, their in names.items() if their not in state and name not in allow_missing]
    extra = sorted(set(state) - set(names.values()))
    wrong = [
        f"{names[name]} is {tuple(state[names[name]].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if names[name] in state and not _same_but_ones(state[names[name]], tensor)
    ]
    faults = {"missing": lost, "unexpected": extra, "of another shape": wrong}
    if any(faults.values()):
        lines = [f"{kind}: {some(found)}" for kind, found in faults.items() if found]
        raise ValueError("the tensors do not fit: " + "; ".join(lines))
    ours = {name: state[their].reshape(own[name].shape) for name, their in names.items() if their in state}
    checkpoint.load_into(tokenizer, ours, allow_missing=[*allow_missing, *(p + "*" for p in tokenizer.not_saved)])
    return tokenizer.eval()


def size(shapes: Shapes, name: str, axis: int = 0) -> int:
    """One side of a tensor; ValueError naming it where it is missing or has too few axes."""
    if name not in shapes:
        raise ValueError(f"the tensors do not fit: missing: {name}")
    if not 0 <= axis < len(shapes[name]):
        raise ValueError(f"the tensors do not fit: {name} is {shapes[name]}, expected at least {axis + 1} axes")
    return shapes[name][axis]


def count(shapes: Shapes, pattern: str, start: int = 0) -> int:
    """How many n = start, start + 1, ... have a tensor whose name begins with pattern.format(n)."""
    n = start
    while any(name.startswith(pattern.format(n)) for name in shapes):
        n += 1
    return n - start


def agree(config: Mapping[str, Any], **fields: Any) -> None:
    """ValueError naming the field and both values where a config says otherwise than the tensors.

    A field is the end of a path: `n_embed` or, with __ for a dot, `ddconfig__ch`. Fields it does not have are passed.
    """
    for name, value in fields.items():
        path = tuple(name.split("__"))
        for where, said in _leaves(config):
            if where[-len(path) :] == path and _plain(said) != _plain(value):
                raise ValueError(f"the config says {'.'.join(where)} = {said!r}, the tensors say {value!r}")


def setting(config: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """What a config says of a field (the end of a path, dots between), for what no tensor tells."""
    path = tuple(name.split("."))
    return next((said for where, said in _leaves(config) if where[-len(path) :] == path), default)


def unit_rows(table: Tensor, notes: list[str]) -> Tensor:
    """A codebook with rows of length 1, for families that compare directions; the lengths found go into `notes`."""
    norms = table.float().norm(dim=1)
    low, high = norms.min().item(), norms.max().item()
    if low == 0:
        raise ValueError(f"row {int(norms.argmin())} of the codebook is zero: it has no direction")
    done = "as they should" if max(1 - low, high - 1) < UNIT else "normalised here"
    notes.append(f"codebook rows have lengths {low:.4g} to {high:.4g}: {done}")
    return table.float() / norms[:, None]


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _same_but_ones(found: Tensor, expected: Tensor) -> bool:
    if found.shape == expected.shape:
        return True
    return found.ndim != expected.ndim and [n for n in found.shape if n > 1] == [n for n in expected.shape if n > 1]


def _leaves(config: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    """Every field with its path, tables and lists too."""
    for key, value in config.items() if isinstance(config, Mapping) else ():
        yield (*path, str(key)), value
        yield from _leaves(value, (*path, str(key)))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
