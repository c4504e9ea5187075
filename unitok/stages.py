"""A long job as stages that exchange files: each is done once, and a second run goes on behind the last."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from unitok.checkpoint import read_json, write_json

FILE = "stages.json"

Stage = Callable[[], Any]
T = TypeVar("T")


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


@contextmanager
def beside(call: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """Begin `call`, a module's function or a `partial` of one, beside what stands inside; what is given waits for it.

    In a process of its own where two processes pay, each of half the threads; else only when it is waited for. It draws
    no bars: those of what stands inside have the terminal.
    """
    import torch

    from unitok.training.launch import two_pay

    if not two_pay():
        yield call
        return
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, get_context("spawn"), _begin, (threads // 2,)) as pool:
        made = pool.submit(call)
        torch.set_num_threads(threads // 2)
        try:
            yield made.result
        finally:
            torch.set_num_threads(threads)


def _begin(threads: int) -> None:
    from unitok.data.shards import begin_worker

    begin_worker(threads)
    sys.stderr = open(os.devnull, "w")  # errors come back by themselves
