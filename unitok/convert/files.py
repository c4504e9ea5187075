"""Reads published files: any container, any nesting -> flat tables of tensors, and which set of weights they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from unitok import checkpoint, pickles
from unitok.convert.base import Source

NESTS = ("ema", "state_dict", "model", "module")  # where files keep their table; averaged weights before others
WRAPPERS = ("module.", "_orig_mod.")  # left in front of names by several GPUs and by compilers
AVERAGED = "model_ema."  # averages beside the live weights, under their names without dots
COUNTERS = (AVERAGED + "decay", AVERAGED + "num_updates")
CRITICS = "loss"  # averages of perceptual networks and discriminators may outlive them
CONFIGS = (".json", ".yaml", ".yml")


def read(paths: Sequence[str | Path], config: str | Path | None = None) -> Source:
    """Files, or a folder of config.json and weights, as a Source. ValueError or FileNotFoundError naming the file."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += _weights_in(path)
            config = path / "config.json" if config is None and (path / "config.json").is_file() else config
        else:
            files.append(path)
    tables: list[dict[str, Tensor]] = []
    notes: list[str] = []
    weights = "raw"
    for file in files:
        table, averaged = _table(file, notes)
        tables.append(table)
        weights = "ema" if averaged else weights
    names = {str(file): checkpoint.file_sha256(file) for file in files}
    digests = {Path(name).name: digest for name, digest in names.items()}
    told = read_config(config) if config is not None else {}
    return Source(tuple(tables), told, digests if len(digests) == len(names) else names, weights, notes)


def read_config(path: str | Path) -> dict[str, Any]:
    """A JSON or YAML table; ValueError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8")
        told = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: neither JSON nor YAML ({' '.join(str(error).split())})") from None
    if not isinstance(told, dict):
        raise ValueError(f"{path}: expected a table of fields, got {type(told).__name__}")
    return told


def _weights_in(folder: Path) -> list[Path]:
    """The weight files of a folder: the shards of an index, or the only file; ValueError where that is unclear."""
    for index in sorted(folder.glob("*.index.json")):
        return [folder / name for name in sorted(set(checkpoint.read_json(index).get("weight_map", {}).values()))]
    for kind in ("*.safetensors", "*.bin"):
        found = sorted(folder.glob(kind))
        if len(found) > 1:
            listed = ", ".join(path.name for path in found)
            raise ValueError(f"{folder} holds several files of weights, {listed}: name one, and its --config")
        if found:
            return found
    raise FileNotFoundError(f"{folder}: no .safetensors or .bin file in it")


def _table(path: Path, notes: list[str]) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a file by name, and whether they are averages."""
    kind = checkpoint.container(path)
    if kind == "torchscript":
        raise ValueError(f"{path}: refused: it is a TorchScript archive, which is code; save its tensors instead")
    if kind == "safetensors":
        value: Any = checkpoint.load_weights(path)
    else:
        try:
            value = checkpoint.load_torch(path)
        except ValueError:  # objects of somebody's classes beside the tensors, or damaged: this one says which
            value = pickles.load(path)
    way = []
    while not pickles.is_module(value) and isinstance(value, dict) and (nest := _nest(value)):
        way.append(nest)
        value = value[nest]
    table = pickles.module_state(value) if pickles.is_module(value) else pickles.tensors(value)
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path}: expected a table of tensors, got {type(value).__name__}")
    for name, tensor in table.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: expected a table of tensors, but {name!r} is {type(tensor).__name__}")
    table = {_bare(str(name), table): tensor.detach() for name, tensor in table.items()}
    table, averaged = _averages(path, table)
    averaged = averaged or "ema" in way
    if averaged:
        notes.append(f"{path.name}: averaged weights (ema) taken, not the raw ones")
    return table, averaged


def _nest(value: dict) -> str | None:
    if all(isinstance(item, Tensor | pickles.Later) for item in value.values()):
        return None
    return next((n for n in NESTS if isinstance(value.get(n), dict) or pickles.is_module(value.get(n))), None)


def _bare(name: str, table: dict) -> str:
    """The name without what wrappers put in front of all names, and compilers in front of some part of one."""
    while any(name.startswith(w) and all(str(n).startswith(w) for n in table) for w in WRAPPERS):
        for wrapper in WRAPPERS:
            name = name.removeprefix(wrapper)
        table = dict.fromkeys([name])
    return name.replace("_orig_mod.", "")


def _averages(path: Path, table: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Averages in place of the live weights that they belong to."""
    live = {name: tensor for name, tensor in table.items() if not name.startswith(AVERAGED)}
    average = {
        name.removeprefix(AVERAGED): tensor
        for name, tensor in table.items()
        if name.startswith(AVERAGED) and name not in COUNTERS
    }
    dotless: dict[str, str] = {}
    for name in live:
        for short in {name.replace(".", ""), name.removeprefix("model.").replace(".", "")} & average.keys():
            if dotless.setdefault(short, name) != name:
                raise ValueError(f"{path}: {AVERAGED}{short} may be the average of {dotless[short]} or {name}")
    if lost := sorted(name for name in average.keys() - dotless.keys() if not name.startswith(CRITICS)):
        raise ValueError(f"{path}: {AVERAGED}{lost[0]} is the average of no tensor of the file")
    return {**live, **{name: average[short] for short, name in dotless.items()}}, bool(dotless)
