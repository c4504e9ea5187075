"""Published checkpoints of others -> tokenizer folders of ours. The folder is the registry: any file may hold formats.

A new format is a `Format` (base.py) in the tuple `FORMATS` of a file here. Nothing is imported until asked for.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unitok.convert.base import Format, Source
    from unitok.tokenizers.base import ImageTokenizer


def formats() -> dict[str, Format]:
    """All formats by name, sorted; imports every file of the folder."""
    found: list[Format] = []
    for module in pkgutil.iter_modules(__path__):
        found += getattr(importlib.import_module(f"{__name__}.{module.name}"), "FORMATS", ())
    return {format.name: format for format in sorted(found, key=lambda format: format.name)}


def convert(
    name: str,
    files: Sequence[str | Path],
    out: str | Path,
    *,
    config: str | Path | None = None,
    image_size: int | None = None,
    echo: Callable[[str], None] = print,
) -> ImageTokenizer:
    """Write the files of a published tokenizer to `out` as a folder of ours; returns the tokenizer in eval mode.

    ValueError in one line where the files are of another format, or a tensor or a field of `config` does not fit.
    """
    from unitok.convert.files import read

    known = formats()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown format {name!r}{hint}; known: {', '.join(known)}")
    chosen, source = known[name], read(files, config)
    taken = narrow(source, chosen)
    if not chosen.detect(taken.shapes):
        alike = [other.name for other in known.values() if other.detect(narrow(source, other).shapes)]
        looks = f"they look like {' or '.join(alike)}" if alike else "they look like no known format"
        first = next(iter(source.shapes), "none")
        raise ValueError(f"{', '.join(source.files)}: these tensors are not of format {name}; {looks} (one is {first})")
    try:
        tokenizer = chosen.convert(taken, image_size).eval()
    except ValueError as error:
        raise ValueError(f"{', '.join(source.files)} as {name}: {error}") from error
    tokenizer.provenance = {
        "format": name, "files": source.files, "weights": source.weights, "pixels": chosen.pixels,
        **({"licence": chosen.licence} if chosen.licence else {}), **({"notes": source.notes} if source.notes else {}),
    }  # fmt: skip
    tokenizer.save_pretrained(out)
    for line in source.notes:
        echo(line)
    if chosen.licence and chosen.non_commercial:
        echo(f"licence: {chosen.licence}")
    grid, sizes = (" x ".join(map(str, numbers)) for numbers in (tokenizer.grid(), tokenizer.codebook_sizes))
    echo(f"{out}: {sizes} codes, a grid of {grid} at {tokenizer.image_size} pixels, {source.weights} weights")
    return tokenizer


def narrow(source: Source, format: Format) -> Source:
    """Only the tensors of the tokenizer: out of the larger model it may lie in, without what the format drops."""
    from dataclasses import replace

    tables = source.tables
    for prefix in format.prefixes:
        inside = [{n.removeprefix(prefix): t for n, t in table.items() if n.startswith(prefix)} for table in tables]
        if any(inside):  # a shard of the larger model may hold nothing of it
            tables = tuple(inside)
    kept = ({n: t for n, t in table.items() if not n.startswith(format.drops)} for table in tables)
    return replace(source, tables=tuple(kept))
