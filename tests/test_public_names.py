"""`import unitok`: the public names are there, are lazy, and the unrelated package of the same name is pointed out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import unitok


@pytest.mark.parametrize("name", unitok.__all__)
def test_every_public_name_resolves(name):
    assert name in dir(unitok)
    value = getattr(unitok, name)
    assert name == "__version__" or getattr(value, "__name__", name) == name


def test_import_and_the_registries_load_no_framework():
    code = "import sys, unitok; assert 'fsq' in unitok.tokenizers.names()\n"
    code += "print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(unitok.__file__).parents[1])}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'unitok' has no attribute 'loda'"):
        unitok.loda  # noqa: B018


def test_the_foreign_distribution_is_named(tmp_path, monkeypatch):
    ours = tmp_path / "unitok_mm-0.1.0.dist-info"
    ours.mkdir()
    (ours / "METADATA").write_text("Metadata-Version: 2.1\nName: unitok-mm\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert unitok.foreign_distribution_line() is None
    theirs = tmp_path / "unitok-4.3.1.dist-info"
    theirs.mkdir()
    (theirs / "METADATA").write_text("Metadata-Version: 2.1\nName: unitok\nVersion: 4.3.1\n")
    line = unitok.foreign_distribution_line()
    assert "unrelated package 'unitok' 4.3.1" in line and "unitok-mm" in line and "\n" not in line
