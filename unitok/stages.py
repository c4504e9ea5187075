"""A long job as stages that exchange files: each is done once, and a second run goes on behind the last."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from unitok.checkpoint import read_json, write_json

FILE = "stages.json"

Stage = Callable[[], Any]


def run_stages(out: Path, stages: Mapping[str, Stage], asked: str, seconds: dict[str, float], console: Console) -> None:
    """Run the stages that `out` does not hold yet; `seconds` takes what each took, this time or earlier.

    asked: a hash of all that decides the result. ValueError where `out` was made by something else.
    """
    state, width = out / FILE, max(map(len, stages))
    done = read_json(state) if state.is_file() else {}
    if done.get("asked", asked) != asked:
        raise ValueError(f"{out} holds a demo made by another version or setting: choose another --out")
    for name, stage in stages.items():
        if name in done:
            seconds[name] = done[name]
            console.print(f"[dim]{name:{width}} reused ({done[name]:.0f} s)[/dim]")
            continue
        console.print(f"[bold]{name}[/bold]")
        begun = time.perf_counter()
        stage()
        seconds[name] = done[name] = round(time.perf_counter() - begun, 1)
        write_json(state, {**done, "asked": asked})
        console.print(f"[dim]{name:{width}} {done[name]:.0f} s[/dim]")
