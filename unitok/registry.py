"""A folder is a registry: every file of a package is a system, and its file name is the system's name.

`names()` lists files without importing them; `get(name)` imports one file and returns the single public class in it.
Installed packages add systems through an entry point group; recipes may also name any class as "module:Class".
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import Any


class Registry:
    """Systems of one kind.

    Args:
        package: the package whose files are the systems, also the entry point group ("unitok.tokenizers").
        base: "module:Class" of the contract that every system implements.
        kind: the word for one system in messages.
        skip: prefixes of files that hold no system of this kind.
    """

    def __init__(self, package: str, base: str, kind: str, skip: tuple[str, ...] = ()):
        self.package, self.base, self.kind = package, base, kind
        self.skip = ("base", "_", *skip)

    def names(self) -> list[str]:
        """Sorted names of all registered systems; imports none of them."""
        return sorted(self._files() | self._entry_points().keys())

    def get(self, name: str) -> type[Any]:
        """The class called `name` (a file, an entry point or "module:Class"). ValueError if there is none."""
        files, plugins = self._files(), self._entry_points()
        if ":" in name:
            return self._check(_load(name, self.kind), name)
        if name in files and name in plugins:
            raise ValueError(
                f"two {self.kind}s are called {name!r}: unitok's own and {plugins[name].value}; "
                "name one of them as module:Class"
            )
        if name in plugins:
            return self._check(plugins[name].load(), name)
        if name in files:
            return self._class_in(f"{self.package}.{name}")
        close = difflib.get_close_matches(name, self.names(), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"unknown {self.kind} {name!r}{hint}; known: {', '.join(self.names()) or 'none'}; or give module:Class"
        )

    def name_of(self, cls: type) -> str:
        """The name under which `get` finds `cls`: its file name, its entry point, or "module:Class"."""
        package, _, stem = cls.__module__.rpartition(".")
        if package == self.package and stem in self._files() and not cls.__name__.startswith("_"):
            return stem
        path = f"{cls.__module__}:{cls.__qualname__}"
        for name, entry in self._entry_points().items():
            if entry.value.replace(" ", "") == path:
                return name
        return path

    def _files(self) -> set[str]:
        paths = importlib.import_module(self.package).__path__
        return {m.name for m in pkgutil.iter_modules(paths) if not m.ispkg and not m.name.startswith(self.skip)}

    def _entry_points(self) -> dict:
        return {e.name: e for e in entry_points(group=self.package)}

    def _class_in(self, module_name: str) -> type:
        base, module = _load(self.base, self.kind), importlib.import_module(module_name)
        found = [
            v
            for k, v in vars(module).items()
            if isinstance(v, type) and issubclass(v, base) and v.__module__ == module_name and not k.startswith("_")
        ]
        if len(found) != 1:
            listed = ", ".join(c.__name__ for c in found) or "none"
            raise ValueError(f"{module_name} must hold exactly one public {self.kind} class, found {listed}")
        return found[0]

    def _check(self, cls: object, name: str) -> type:
        base = _load(self.base, self.kind)
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise ValueError(f"{name!r} is not a {self.kind}: it must be a subclass of {self.base.replace(':', '.')}")
        return cls


def _load(path: str, kind: str) -> Any:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise  # the module is there, something it needs is not
        raise ValueError(f"{kind} {path!r}: there is no module {module_name!r} to import") from None
    if not attribute.isidentifier() or not hasattr(module, attribute):
        raise ValueError(f"{kind} {path!r}: module {module_name!r} has no class {attribute!r}")
    return getattr(module, attribute)
