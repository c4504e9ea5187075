"""Evaluation tasks, one a file: a file here with a function `run(model, recipe) -> list[Score]` is a task of its name.

The other files are metrics and tools. Installed packages add tasks through the entry point group `unitok.eval`, and
recipes may name any object with such a `run` as "module" or "module:attribute". Nothing is imported until asked for.
"""

from __future__ import annotations

import difflib
import importlib
import re
from importlib.metadata import entry_points
from importlib.resources import files

__all__ = ["get", "names"]

_RUN = re.compile(r"^def run\(", re.MULTILINE)


def names() -> list[str]:
    """Sorted names of all tasks; imports none of them."""
    return sorted(_files() | _entry_points().keys())


def get(name: str):
    """The task called `name`: an object with `run(model, recipe) -> list[Score]`. ValueError where there is none."""
    own, plugins = _files(), _entry_points()
    if name in own and name in plugins:
        other = plugins[name].value
        raise ValueError(f"two tasks are called {name!r}: unitok's own and {other}; give module:attribute")
    if name in own:
        return importlib.import_module(f"{__name__}.{name}")
    if name in plugins:
        task = plugins[name].load()
    elif ":" in name or "." in name:
        task = _load(name)
    else:
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown task {name!r}{hint}; known: {', '.join(names())}; or give module:attribute")
    if not callable(getattr(task, "run", None)):
        raise ValueError(f"{name!r} is not a task: it has no run(model, recipe)")
    return task() if isinstance(task, type) else task


def _load(path: str):
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise  # the module is there, something it needs is not
        raise ValueError(f"task {path!r}: there is no module {module_name!r} to import") from None
    if attribute and not hasattr(module, attribute):
        raise ValueError(f"task {path!r}: module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute) if attribute else module


def _files() -> set[str]:
    found = (entry for entry in files(__name__).iterdir() if entry.name.endswith(".py"))
    return {entry.name.removesuffix(".py") for entry in found if _RUN.search(entry.read_text(encoding="utf-8"))}


def _entry_points() -> dict:
    return {entry.name: entry for entry in entry_points(group=__name__)}
