"""Whole modules out of torch pickles: the tensors as they were saved, and nothing of anybody else's executed."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import struct
import sys
import types
import zipfile

import pytest
import torch
from torch import nn

from unitok import pickles


class Lightning:
    """Stands for a callback that a training framework leaves in its checkpoints."""


Lightning.__module__, Lightning.__qualname__ = "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"


class Call:
    """Pickles as a call of a function of the standard library."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def module():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    whole = nn.Sequential(collections.OrderedDict(first=inner, second=nn.Linear(4, 5, bias=False), none=nn.Identity()))
    whole.second.weight.data = torch.randn(4, 5).T  # a stride that is not the usual one
    whole.first[0].half()
    return whole


def save(value, path, legacy):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


both = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


@both
def test_a_module_comes_back_bit_for_bit(module, tmp_path, legacy):
    state = pickles.module_state(pickles.load(save(module, tmp_path / "m.pkl", legacy)))
    assert state.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor) and state[name].is_contiguous()


@both
def test_tables_beside_leftovers_of_a_training_framework(module, tmp_path, legacy, monkeypatch):
    with monkeypatch.context() as patch:
        home = Lightning.__module__
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", home):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[home].ModelCheckpoint = Lightning
        shared = torch.arange(6.0)
        content = {"state_dict": {"a": shared[:3], "b": shared[3:]}, "callbacks": {Lightning: Lightning()}, "epoch": 3}
        save(content, tmp_path / "m.ckpt", legacy)
    value = pickles.load(tmp_path / "m.ckpt")
    table = pickles.tensors(value["state_dict"])
    assert table["a"].tolist() == [0, 1, 2] and table["b"].tolist() == [3, 4, 5] and value["epoch"] == 3
    [(kind, callback)] = value["callbacks"].items()
    assert issubclass(kind, pickles.Inert) and isinstance(callback, pickles.Inert)


@both
@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, getattr, print], ids=lambda f: f.__name__)
def test_a_pickle_that_calls_something_is_refused_by_its_name(module, tmp_path, legacy, function):
    trace = tmp_path / "trace"
    save({"module": module, "payload": Call(function, f"touch {trace}")}, tmp_path / "m.pkl", legacy)
    name = rf"(posix|nt|__builtin__)\.{function.__name__}"
    with pytest.raises(pickles.Refused, match=f"m.pkl: refused: it holds the object {name}"):
        pickles.load(tmp_path / "m.pkl")
    assert not trace.exists()


def test_a_call_before_the_objects_of_the_older_container_is_refused(tmp_path):
    trace = tmp_path / "trace"
    for place in range(3):  # magic number, protocol, system
        parts = [pickle.dumps(part, 2) for part in (pickles.MAGIC, pickles.PROTOCOL, {}, {}, [])]
        parts[place] = pickle.dumps(Call(os.system, f"touch {trace}"), 2)
        (tmp_path / "m.pkl").write_bytes(b"".join(parts))
        with pytest.raises(pickles.Refused, match="posix.system|nt.system"):
            pickles.load(tmp_path / "m.pkl")
    assert not trace.exists()


def test_names_that_merely_begin_like_allowed_ones_are_refused(tmp_path):
    for name in ("torch.serialization load", "torch._utils _import_dotted_name", "collections namedtuple",
                 "dall_evil x", "torch.nn.functional relu", "torch.nn.modulesx X", "builtins setattr"):  # fmt: skip
        module, attribute = name.split()
        parts = [pickle.dumps(part, 2) for part in (pickles.MAGIC, pickles.PROTOCOL, {})]
        (tmp_path / "m.pkl").write_bytes(b"".join(parts) + b"\x80\x02c" + f"{module}\n{attribute}\n.".encode())
        with pytest.raises(pickles.Refused, match=f"{module}.{attribute}"):
            pickles.load(tmp_path / "m.pkl")


def test_the_source_that_the_older_container_carries_is_not_looked_at(tmp_path, monkeypatch):
    """torch's loader compares it with that of the object beside it, and writes a patch under the object's name.

    Even with an unpickler that allows only tensors, a pickle can rename one of the functions that rebuild them.
    """
    monkeypatch.chdir(tmp_path)
    parts = [pickle.dumps(part, 2) for part in (pickles.MAGIC, pickles.PROTOCOL, {})]
    function = b"ctorch._utils\n_rebuild_tensor_v2\n"
    changes = b"}(" + text("dump_patches") + b"\x88u}(" + text("__name__") + text(str(tmp_path / "written")) + b"u\x86b"
    for change in (b"", changes):
        content = text("module") + function + change + text("file.py") + text("source of another hand")
        (tmp_path / "m.pkl").write_bytes(b"".join(parts) + b"\x80\x02(" + content + b"tQ." + pickle.dumps([], 2))
        with contextlib.suppress(ValueError):
            pickles.load(tmp_path / "m.pkl")
        assert os.listdir(tmp_path) == ["m.pkl"] and torch._utils._rebuild_tensor_v2.__name__ == "_rebuild_tensor_v2"


def text(value):
    """A string as a pickle writes it."""
    return b"X" + struct.pack("<i", len(value)) + value.encode()


@both
def test_damaged_files_say_so_in_one_line(module, tmp_path, legacy):
    path = save(module, tmp_path / "m.pkl", legacy)
    whole = path.read_bytes()
    for end in (0, 1, 10, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="m.pkl: not a whole torch file") as error:
            pickles.load(path)
        assert "\n" not in str(error.value)


def test_a_tensor_beyond_its_storage_is_refused():
    storage = pickles.Storage(torch.float32, 6)
    storage.values = torch.arange(6.0)
    assert pickles.Later(storage, 1, (2, 2), (1, 2)).tensor().tolist() == [[1, 3], [2, 4]]
    for offset, shape, stride in (
        (0, (7,), (1,)),
        (5, (2,), (1,)),
        (-1, (2,), (1,)),
        (0, (9**9,), (0,)),
        (0, (2,), (-1,)),
    ):
        with pytest.raises(ValueError, match="beyond its storage"):
            pickles.Later(storage, offset, shape, stride).tensor()


def test_numbers_that_are_not_there_are_refused(module, tmp_path):
    with zipfile.ZipFile(save(module, tmp_path / "m.pkl", False)) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    for change in ({"m/byteorder": b"big"}, {"m/data/0": b"\0"}):
        with zipfile.ZipFile(tmp_path / "changed.pkl", "w") as archive:
            for name, data in {**content, **change}.items():
                archive.writestr(name, data)
        with pytest.raises(ValueError, match="changed.pkl: not a whole torch file"):
            pickles.load(tmp_path / "changed.pkl")
    whole = save(torch.zeros(3), tmp_path / "t.pkl", True).read_bytes()
    (tmp_path / "t.pkl").write_bytes(whole.replace(struct.pack("<q", 3), struct.pack("<q", 4)))
    with pytest.raises(ValueError, match="storage .* is of another length"):
        pickles.load(tmp_path / "t.pkl")
