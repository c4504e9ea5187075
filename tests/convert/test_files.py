"""Published files: told apart by what is in them, unwrapped, and refused in one line where they are not sound."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from unitok import checkpoint
from unitok.convert.base import agree, setting, unit_rows
from unitok.convert.files import read, read_config


@pytest.fixture
def state():
    return {"encoder.weight": torch.randn(3, 4), "loss.weight": torch.zeros(2)}


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_the_container_is_told_by_its_content(state, tmp_path):
    """Under names that lie."""
    save_file(state, tmp_path / "a.pt")
    torch.save({"state_dict": state}, tmp_path / "b.safetensors")
    torch.save(state, tmp_path / "c.json", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "b.safetensors", "c.json"):
        [table] = read([tmp_path / name]).tables
        assert table.keys() == state.keys() and torch.equal(table["encoder.weight"], state["encoder.weight"])
    for length in range(1, 40):  # among the lengths of headers are those that begin like a pickle
        save_file({"w" * length: torch.zeros(1)}, tmp_path / "f")
        assert read([tmp_path / "f"]).state.keys() == {"w" * length}
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "d.safetensors")
    assert checkpoint.container(tmp_path / "d.safetensors") == "torchscript"
    with pytest.raises(ValueError, match="d.safetensors: refused: it is a TorchScript archive"):
        read([tmp_path / "d.safetensors"])
    (tmp_path / "e.safetensors").write_bytes(b"\x93NUMPY and so on")
    with pytest.raises(ValueError, match="neither a safetensors nor a torch file"):
        read([tmp_path / "e.safetensors"])
    with pytest.raises(FileNotFoundError, match="no such file: .*none.pt"):
        read([tmp_path / "none.pt"])


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("whole_module", [False, True], ids=["tensors", "module"])
def test_a_truncated_file_says_so(tmp_path, kind, whole_module):
    module = nn.Linear(64, 64)
    if kind == "safetensors":
        save_file(module.state_dict(), tmp_path / "w")
    else:
        saved = module if whole_module else {"model": module.state_dict()}
        torch.save(saved, tmp_path / "w", _use_new_zipfile_serialization=kind == "zip")
    content = (tmp_path / "w").read_bytes()
    for end in (0, 5, 60, len(content) // 2, len(content) - 100):
        (tmp_path / "w").write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"w: (not a whole|neither)") as error:
            read([tmp_path / "w"])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_hostile_pickle_is_refused_by_the_name_of_what_it_calls(state, tmp_path, legacy):
    trace = tmp_path / "trace"
    content = {"state_dict": state, "hyper_parameters": Payload(f"touch {trace}")}
    torch.save(content, tmp_path / "w.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"w.ckpt: refused: it holds the object (posix|nt).system"):
        read([tmp_path / "w.ckpt"])
    assert not trace.exists()


@pytest.mark.parametrize("damage", [[torch.zeros(1)], {"state_dict": {"a": 3}}, {}, {"hello": 1}, torch.zeros(1)])
def test_what_is_no_table_of_tensors(tmp_path, damage):
    torch.save(damage, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="w.pt: expected a table of tensors"):
        read([tmp_path / "w.pt"])


def test_nested_modules_tables_and_wrappers(state, tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    cases = {
        "module": ({"epoch": 3, "model": module}, module.state_dict()),
        "parallel": ({"model": {f"module.{n}": t for n, t in state.items()}}, state),
        "compiled": ({f"_orig_mod.module.{n}": t for n, t in state.items()}, state),
        "partly": ({"encoder._orig_mod.weight": state["encoder.weight"]}, {"encoder.weight": state["encoder.weight"]}),
        "own": ({**state, "module.w": torch.zeros(1)}, {**state, "module.w": torch.zeros(1)}),
    }
    for content, expected in cases.values():
        torch.save(content, tmp_path / "w.pt")
        source = read([tmp_path / "w.pt"])
        assert source.state.keys() == expected.keys() and source.weights == "raw"
        assert all(torch.equal(source.state[name], expected[name]) for name in expected)


def test_averages_must_belong_to_tensors(tmp_path):
    torch.save({"a.b": torch.zeros(1), "model_ema.ab": torch.ones(1), "model_ema.cd": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="w.pt: model_ema.cd is the average of no tensor"):
        read([tmp_path / "w.pt"])
    torch.save(
        {"a.b": torch.zeros(1), "model_ema.ab": torch.ones(1), "model_ema.lossd": torch.ones(1)}, tmp_path / "w.pt"
    )
    assert read([tmp_path / "w.pt"]).state == {"a.b": torch.ones(1)}  # the discriminator itself was left out
    torch.save({"a.b": torch.zeros(1), "ab": torch.zeros(1), "model_ema.ab": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="w.pt: model_ema.ab may be the average of"):
        read([tmp_path / "w.pt"])


def test_a_folder_of_shards_with_its_config(state, tmp_path):
    for number, (name, tensor) in enumerate(state.items()):
        save_file({name: tensor}, tmp_path / f"part-{number}.safetensors")
    index = {"weight_map": {name: f"part-{number}.safetensors" for number, name in enumerate(state)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"n_embed": 8}')
    source = read([tmp_path])
    assert source.state.keys() == state.keys() and source.config == {"n_embed": 8} and len(source.files) == 2
    assert source.files["part-0.safetensors"] == checkpoint.file_sha256(tmp_path / "part-0.safetensors")
    with pytest.raises(FileNotFoundError, match="no .safetensors or .bin file in it"):
        (tmp_path / "empty").mkdir()
        read([tmp_path / "empty"])


def test_configs(tmp_path):
    for name, text in (("a.json", "{"), ("b.yaml", "a: [1"), ("c.yaml", "- 1")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            read_config(tmp_path / name)
    config = {"model": {"params": {"n_embed": 4, "ddconfig": {"ch": 8, "ch_mult": [1, 2]}}}}
    agree(config, n_embed=4, ddconfig__ch=8, ch_mult=(1, 2), other=3)
    with pytest.raises(ValueError, match=r"the config says model.params.ddconfig.ch = 8, the tensors say 16"):
        agree(config, ddconfig__ch=16)
    assert setting(config, "ddconfig.ch") == 8 and setting(config, "loss.ch", "none") == "none"


def test_unit_rows_records_what_it_found():
    notes: list[str] = []
    table = unit_rows(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), notes)
    assert table.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 1]]
    assert unit_rows(table, notes).tolist() == table.tolist()
    assert notes == ["codebook rows have lengths 2 to 5: normalised here",
                     "codebook rows have lengths 1 to 1: as they should"]  # fmt: skip
