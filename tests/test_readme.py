"""The README tells the truth: its Python runs, and its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from unitok.checkpoint import ASSETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not (ASSETS / "scenes" / "unitok.json").is_file(), reason="the embedded default is not here")
def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    exec(compile(code, "README.md", "exec"), names := {})
    assert (tmp_path / "drawn.png").is_file() and names["codes"].shape == (1, 80)


def test_the_commands_exist():
    verbs = set(re.findall(r"^unitok (\w+) ", "".join(README.split("```")[1::2]), re.MULTILINE))
    assert len(verbs) > 8
    shown = subprocess.check_output([sys.executable, "-m", "unitok", "--help"], text=True)
    assert verbs - set(re.findall(r"\w+", shown)) == set()
