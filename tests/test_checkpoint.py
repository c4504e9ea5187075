"""Weights, JSON and hashes: round trips, nothing half-written, nothing executed, errors that name the file."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from unitok import checkpoint


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=generator),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 2),
    }


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nest", [None, "state_dict", "model", "generator"])
def test_torch_files_flat_and_nested(tmp_path, state, nest):
    path = tmp_path / "weights.pt"
    torch.save(state if nest is None else {nest: OrderedDict(state), "epoch": 3, "lr": [0.1]}, path)
    assert same(checkpoint.load_weights(path, key="generator" if nest == "generator" else None), state)


def test_safetensors_round_trip(tmp_path, state):
    path = tmp_path / "new" / "model.safetensors"
    checkpoint.save_weights(path, state)
    assert same(checkpoint.load_weights(path), state)
    assert os.listdir(path.parent) == [path.name]


def test_shared_and_strided_tensors_are_written_in_full(tmp_path):
    matrix = torch.arange(12.0).reshape(3, 4)
    tied = {"embed": matrix, "head": matrix, "row": matrix[1], "turned": matrix.T, "param": nn.Parameter(matrix)}
    checkpoint.save_weights(tmp_path / "m.safetensors", tied)
    assert same(checkpoint.load_weights(tmp_path / "m.safetensors"), {k: v.detach() for k, v in tied.items()})


class Hostile:
    """Unpickling it would create the file it names."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch '{self.path}'",))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path, legacy):
    sign = tmp_path / "executed"
    torch.save({"w": torch.zeros(2), "x": Hostile(sign)}, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"w.pt: refused: it holds the object \w+.system") as error:
        checkpoint.load_weights(tmp_path / "w.pt")
    assert not sign.exists() and "\n" not in str(error.value)
    with open(tmp_path / "plain.pt", "wb") as file:
        pickle.dump(Hostile(sign), file, protocol=2)
    with pytest.raises(ValueError, match="plain.pt: refused"):
        checkpoint.load_weights(tmp_path / "plain.pt")
    assert not sign.exists()


def test_a_pickled_module_is_refused_by_its_name(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    with pytest.raises(ValueError, match="refused: it holds the object torch.nn.modules.linear.Linear; save its"):
        checkpoint.load_weights(tmp_path / "m.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.ckpt"])
@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_damaged_files_are_one_line(tmp_path, state, name, damage):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "noise": b"\x93noise" * 40}[damage])
    with pytest.raises(ValueError, match=name) as error:
        checkpoint.load_weights(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [{"w": torch.zeros(1), "note": "hello"}, [torch.zeros(1)], {}, torch.zeros(2)])
def test_a_torch_file_that_is_no_table_of_tensors(tmp_path, damage):
    torch.save(damage, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="w.pt: expected a table of tensors"):
        checkpoint.load_weights(tmp_path / "w.pt")


def test_missing_files_and_keys(tmp_path, state):
    for name in ("no.pt", "no.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"no such file: .*{name}"):
            checkpoint.load_weights(tmp_path / name)
    torch.save({"ema": state}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="no 'generator' in it; it has ema"):
        checkpoint.load_weights(tmp_path / "w.pt", key="generator")


# --- load_into ------------------------------------------------------------------------------------------------------


def test_load_into_copies_and_is_strict():
    source, target = (
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)),
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)),
    )
    checkpoint.load_into(target, source.state_dict())
    assert same(target.state_dict(), source.state_dict())

    before = {k: v.clone() for k, v in target.state_dict().items()}
    state = {k: v + 1 for k, v in source.state_dict().items()}
    state["0.weight"] = torch.zeros(3, 5)
    state["extra"] = state.pop("0.bias")
    with pytest.raises(
        ValueError,
        match=r"weights of f.pt do not fit Sequential: missing: 0.bias; unexpected: extra; "
        r"of another shape: 0.weight is \(3, 5\), expected \(3, 2\)",
    ):
        checkpoint.load_into(target, state, what="weights of f.pt")
    assert same(target.state_dict(), before)  # refused before anything was copied


def test_load_into_allows_what_it_was_told():
    target = nn.ModuleDict({"body": nn.Linear(2, 2), "critic": nn.Linear(2, 1)})
    state = {k: v + 1 for k, v in target.state_dict().items() if k.startswith("body")}
    with pytest.raises(ValueError, match="missing: critic.weight, critic.bias"):
        checkpoint.load_into(target, state)
    checkpoint.load_into(target, state, allow_missing=("critic.*",))
    assert torch.equal(target["body"].weight, state["body.weight"])


def test_load_into_names_a_few_of_many():
    with pytest.raises(ValueError, match="missing: 0.weight, 0.bias, 1.weight and 5 more"):
        checkpoint.load_into(nn.Sequential(*[nn.Linear(1, 1) for _ in range(4)]), {})


# --- hashes ---------------------------------------------------------------------------------------------------------


def test_state_hash_sees_names_types_shapes_and_bytes(state):
    h = checkpoint.state_hash(state)
    assert h == checkpoint.state_hash(dict(reversed(state.items())))
    weight = state["a.weight"]
    changed = [
        {**state, "a.weight": weight.reshape(4, 3)},
        {**state, "a.weight": weight.double()},
        {**state, "a.weight": weight + 1e-6},
        {**state, "half": state["half"].view(torch.int16)},
        {"b" if k == "half" else k: v for k, v in state.items()},
        {k: v for k, v in state.items() if k != "empty"},
    ]
    assert len({h, *map(checkpoint.state_hash, changed)}) == 1 + len(changed)
    assert checkpoint.state_hash({"a": weight.T.contiguous().T}) == checkpoint.state_hash({"a": weight})


def test_state_hash_survives_saving(tmp_path, state):
    checkpoint.save_weights(tmp_path / "a.safetensors", state)
    assert checkpoint.state_hash(checkpoint.load_weights(tmp_path / "a.safetensors")) == checkpoint.state_hash(state)


def test_config_hash_is_of_the_meaning(tmp_path):
    config = {"levels": (8, 5), "width": 96, "path": "ä"}
    same_config = json.loads(json.dumps({"path": "ä", "width": 96, "levels": [8, 5]}))
    assert checkpoint.config_hash(config) == checkpoint.config_hash(same_config)
    assert checkpoint.config_hash(config) != checkpoint.config_hash({**config, "width": 97})


def test_file_sha256_is_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert checkpoint.file_sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- files ----------------------------------------------------------------------------------------------------------


def test_json_round_trip(tmp_path):
    path = tmp_path / "deep" / "x.json"
    checkpoint.write_json(path, {"n": np.int64(3), "v": np.arange(2), "p": Path("a"), "t": (1, 2), "s": "ü"})
    assert checkpoint.read_json(path) == {"n": 3, "v": [0, 1], "p": "a", "t": [1, 2], "s": "ü"}
    assert "ü" in path.read_text(encoding="utf-8") and path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": object()}])
def test_a_failed_write_leaves_the_old_file(tmp_path, bad):
    path = tmp_path / "x.json"
    checkpoint.write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="x.json: cannot be written as JSON"):
        checkpoint.write_json(path, bad)
    with pytest.raises(TypeError):
        checkpoint.write_atomic(path, 3)
    with pytest.raises(RuntimeError), checkpoint.replacing(path) as temporary:
        temporary.write_text("half of")
        raise RuntimeError
    assert checkpoint.read_json(path) == {"old": 1} and os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_json_errors_name_the_file(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="x.json: "):
        checkpoint.read_json(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match="no such file: .*y.json"):
        checkpoint.read_json(tmp_path / "y.json")


def test_open_folder(tmp_path, monkeypatch):
    assert checkpoint.open_folder(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a folder, got a file"):
        checkpoint.open_folder(tmp_path / "file")
    for path in (tmp_path / "none", "./none", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such folder: "):
            checkpoint.open_folder(path)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match="nobody/nothing: no such folder, and not to be had from the Hub"
    ) as error:
        checkpoint.open_folder("nobody/nothing")
    assert "\n" not in str(error.value)


def test_layer_0_needs_no_torch():
    code = "import sys, unitok, unitok.checkpoint, unitok.vocab, unitok.manifest, unitok.config; unitok.JointVocab;"
    code += "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    root = str(Path(checkpoint.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "[]"
