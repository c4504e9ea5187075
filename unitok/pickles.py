"""Reads whole modules out of torch pickles without executing anything of theirs, and without their libraries.

The old way to publish weights, `torch.save(module)`, stores objects of the author's classes beside the tensors. Here
names of known frameworks stand for empty classes that only keep what was stored in them, tensors are rebuilt by this
file, and any other name is refused. Both containers are read: zip archives and the older plain pickles. torch's own
loader is not used, since it lets a pickle of the older kind write files (a patch of the source it carries).
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INERT = ("dall_e.", "torch.nn.modules.", "pytorch_lightning.", "lightning.", "omegaconf.")  # kept, never called
DTYPES = {"FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
          "LongStorage": "int64", "IntStorage": "int32"}  # fmt: skip
PLAIN = {("collections", "OrderedDict"): OrderedDict, ("builtins", "set"): set, ("__builtin__", "set"): set,
         ("torch", "Size"): tuple}  # fmt: skip
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what the older container begins with


class Refused(ValueError):
    """A pickle names an object that is neither a tensor nor of a framework whose objects may stay empty."""


class Inert:
    """Stands for an object of somebody else's class: keeps its state and does nothing."""

    __slots__ = ("state",)

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:  # classes that derive from dict or list are filled like them
        pass

    def extend(self, values: Any) -> None:
        pass

    append = extend


class Storage:
    """Elements of one type; filled when their place in the file is reached, which may be after the objects."""

    def __init__(self, dtype: torch.dtype, length: int):
        self.dtype, self.length = dtype, length
        self.values: Tensor | None = None


class Later:
    """A tensor whose storage is not read yet."""

    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]):
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride

    def tensor(self) -> Tensor:
        """A contiguous copy. ValueError where it does not lie within its storage."""
        import torch

        reach = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) + 1
        values = torch.empty(0) if self.storage.values is None else self.storage.values
        sound = min((self.offset, *self.shape, *self.stride)) >= 0
        if not sound or max(math.prod(self.shape), reach if 0 not in self.shape else 0) > len(values):
            raise ValueError(f"a tensor of shape {self.shape} reaches beyond its storage")
        return values.as_strided(self.shape, self.stride, self.offset).clone().contiguous()


def load(path: str | Path) -> Any:
    """What a torch file holds: containers and numbers as they are, tensors as `Later`, other objects as `Inert`.

    ValueError naming the first object that is refused (`Refused`), or saying that the file is damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
            file.seek(0)
            return _zip(file) if zipped else _plain(file)
    except Refused as error:
        raise Refused(f"{path}: {error}") from None
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ValueError(f"{path}: not a whole torch file ({reason})") from error


def module_state(module: Inert) -> dict[str, Tensor]:
    """Parameters and buffers of a pickled module by their dotted names; ValueError where it is no module."""
    state: dict[str, Tensor] = {}
    _walk(module, "", state)
    return state


def is_module(value: Any) -> bool:
    return isinstance(value, Inert) and isinstance(value.state, dict) and "_modules" in value.state


def tensors(value: Any) -> Any:
    """`value` with every tensor of its tables and lists in place of its `Later`."""
    if isinstance(value, Later):
        return value.tensor()
    if isinstance(value, dict):
        return {key: tensors(item) for key, item in value.items()}
    return type(value)(map(tensors, value)) if type(value) in (list, tuple) else value


def _walk(module: Any, prefix: str, state: dict[str, Tensor]) -> None:
    if not is_module(module):
        raise ValueError(f"{prefix.rstrip('.') or 'the pickled object'} is no module")
    for group in ("_parameters", "_buffers"):
        for name, value in (module.state.get(group) or {}).items():
            if isinstance(value, Later):
                state[f"{prefix}{name}"] = value.tensor()
            elif value is not None:
                raise ValueError(f"{prefix}{name} is no tensor")
    for name, child in module.state["_modules"].items():
        if child is not None:
            _walk(child, f"{prefix}{name}.", state)


# ---- the two containers


def _zip(file: IO[bytes]) -> Any:
    with zipfile.ZipFile(file) as archive:
        [root] = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
        names = archive.namelist()
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        storages: dict[str, Storage] = {}
        with archive.open(f"{root}data.pkl") as pickled:
            value = _Unpickler(pickled, storages).load()
        for key, storage in storages.items():
            storage.values = _numbers(archive.read(f"{root}data/{key}"), storage)
    return value


def _plain(file: IO[bytes]) -> Any:
    """magic number, protocol, system, the objects, the keys of the storages; each storage: its length, its numbers."""
    storages: dict[str, Storage] = {}
    if [_Unpickler(file, {}).load() for _ in range(2)] != [MAGIC, PROTOCOL]:
        raise ValueError("it does not begin like one")
    _Unpickler(file, {}).load()
    value = _Unpickler(file, storages).load()
    for key in _Unpickler(file, {}).load():
        storage = storages[key]
        if int.from_bytes(file.read(8), "little") != storage.length:
            raise ValueError(f"storage {key} is of another length")
        storage.values = _numbers(file.read(storage.length * storage.dtype.itemsize), storage)
    return value


def _numbers(content: bytes, storage: Storage) -> Tensor:
    import torch

    if len(content) != storage.length * storage.dtype.itemsize:
        raise ValueError(f"a storage of {storage.length} numbers has {len(content)} bytes")
    if not content:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(bytearray(content), dtype=storage.dtype)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], storages: dict[str, Storage]):
        super().__init__(file)
        self.storages = storages
        self.classes: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if module == "torch" and name in DTYPES:
            import torch

            return getattr(torch, DTYPES[name])
        if (module, name) in REBUILD:
            return partial(REBUILD[module, name])  # a fresh object: what a pickle does to it ends with the pickle
        full = f"{module}.{name}"
        if full.startswith(INERT) or full == "torch.device":
            return self.classes.setdefault(full, type(name.rpartition(".")[2], (Inert,), {"__slots__": ()}))
        raise Refused(f"refused: it holds the object {full}")

    def persistent_load(self, saved: Any) -> Any:
        kind, *told = saved
        if kind == "module":  # a class, and the source it had: not looked at
            return told[0]
        if kind != "storage" or (len(told) > 4 and told[4] is not None):
            raise ValueError(f"it holds a reference of another kind: {kind!r}")
        dtype, key, _, length = told[:4]
        return self.storages.setdefault(str(key), Storage(dtype, int(length)))


def _tensor(storage: Storage, offset: int, shape: tuple, stride: tuple, *_: Any) -> Later:
    return Later(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


def _parameter(data: Later, *_: Any) -> Later:
    return data


REBUILD: Mapping[tuple[str, str], Callable[..., Later]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}
