"""Safe loading and atomic saving: JSON, weights, hashes, folders.

Nothing here executes a pickle: weights are safetensors, or `torch.load(weights_only=True)`. Every error is one line
that names the file. torch is imported inside the functions that need it, so that plain commands start fast.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import pickle
import re
import secrets
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

NESTS = ("state_dict", "model", "module")  # where checkpoints of others keep their table of tensors
MAX_HEADER = 100_000_000  # bytes, of a safetensors file; torch files begin with what would be larger numbers
SHOWN = 3  # how many names an error lists

BUILTIN = "builtin:"
ASSETS = Path(__file__).parent / "assets"


# --- files ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it over `path` if the block succeeds, removes it if it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write the whole file or nothing; text as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, obj: Any) -> None:
    """Atomic strict JSON, indent 2; tuples, numpy scalars and arrays become JSON types; NaN is a ValueError."""
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False, default=_to_json)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be written as JSON: {error}") from error
    write_atomic(path, text + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; FileNotFoundError or ValueError naming the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def open_folder(path_or_hub_id: str | Path, *, revision: str | None = None) -> Path:
    """A local folder as it is, else a snapshot of the Hub repository of that name; FileNotFoundError where neither.

    `builtin:NAME` is the folder NAME of the package's assets.
    """
    name = str(path_or_hub_id)
    folder = Path(name).expanduser()
    if name.startswith(BUILTIN):
        folder = ASSETS / name[len(BUILTIN) :]
        if not folder.is_dir():
            there = ", ".join(sorted(BUILTIN + p.name for p in ASSETS.glob("*") if p.is_dir())) or "none"
            raise FileNotFoundError(f"{name}: no such builtin folder; there is: {there}")
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{name}: expected a folder, got a file")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):  # not the form of a Hub id: no request
        raise FileNotFoundError(f"no such folder: {name}")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision))
    except Exception as error:  # network, offline mode, no such repository, gated: one answer to the user
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FileNotFoundError(f"{name}: no such folder, and not to be had from the Hub ({reason})") from error


# --- hashes ---------------------------------------------------------------------------------------------------------


def file_sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON: the order of keys and tuple-or-list do not matter."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_to_json)
    return hashlib.sha256(text.encode()).hexdigest()


def state_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, in the order of their names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- weights --------------------------------------------------------------------------------------------------------


def load_weights(path: str | Path, *, key: str | None = None) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, from safetensors or a torch file, whatever it is called.

    A torch file may nest its table under `key` (default: the first of `NESTS` that is there). Objects other than
    tensors and plain containers are refused unread: ValueError.
    """
    path = Path(path)
    if container(path) == "safetensors":
        import safetensors
        from safetensors.torch import load_file

        try:
            return load_file(path, device="cpu")
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({_first_line(error)})") from error
    return _table(path, load_torch(path), key)


def container(path: str | Path) -> str:
    """What a file of weights is by its content: "safetensors", "torch" or "torchscript"; ValueError for neither."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:  # the length of the header, then itself
        return "safetensors"
    if head.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = {name.rpartition("/")[2] for name in archive.namelist()}
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise ValueError(f"{path}: not a whole torch file ({_first_line(error)})") from error
        return "torchscript" if "constants.pkl" in names else "torch"
    if head.startswith(b"\x80"):  # a pickle
        return "torch"
    raise ValueError(f"{path}: neither a safetensors nor a torch file, or not a whole one")


def load_torch(path: str | Path) -> Any:
    """What a torch file holds (tensors, containers, numbers), read with `weights_only=True`; ValueError otherwise."""
    import torch

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with Path(path).open("rb") as file:  # by its path, torch would take a name in .safetensors at its word
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        detail = f"the object {found[1]}" if found else "objects other than tensors, or is no torch file"
        raise ValueError(f"{path}: refused: it holds {detail}; save its tensors as .safetensors instead") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: not a whole torch file ({_first_line(error)})") from error


def save_weights(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Atomic .safetensors; tensors that share memory are written each in full."""
    from safetensors.torch import save_file

    plain, seen = {}, set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata={"format": "pt"})


def load_into(
    module: nn.Module, state: Mapping[str, Tensor], *, allow_missing: Sequence[str] = (), what: str = "weights"
) -> None:
    """Copy `state` into `module`, strictly; `allow_missing` holds names or patterns ("critic.*") that may be absent."""
    own = module.state_dict()
    missing = [n for n in own if n not in state and not any(fnmatch.fnmatchcase(n, p) for p in allow_missing)]
    unexpected = [n for n in state if n not in own]
    shapes = [
        f"{n} is {tuple(state[n].shape)}, expected {tuple(own[n].shape)}"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(faults.values()):
        lines = [f"{kind}: {_some(names)}" for kind, names in faults.items() if names]
        raise ValueError(f"{what} do not fit {type(module).__name__}: " + "; ".join(lines))
    module.load_state_dict(dict(state), strict=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars of transformers for every checkpoint, and no warnings of libraries about one another."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _table(path: Path, value: Any, key: str | None) -> dict[str, Tensor]:
    from torch import Tensor

    if key is not None:
        if not isinstance(value, dict) or key not in value:
            has = _some(list(value) if isinstance(value, dict) else [])
            raise ValueError(f"{path}: no {key!r} in it; it has {has}")
        value = value[key]
    while isinstance(value, dict) and not all(isinstance(v, Tensor) for v in value.values()):
        nest = next((n for n in NESTS if isinstance(value.get(n), dict)), None)
        if nest is None:
            break
        value = value[nest]
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{path}: expected a table of tensors, got {type(value).__name__}")
    for name, tensor in value.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: expected a table of tensors, but {name!r} is {type(tensor).__name__}")
    return {str(name): tensor.detach() for name, tensor in value.items()}


def _some(names: Sequence[str]) -> str:
    names = [str(n) for n in names]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _to_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON type")
