"""Processes of a training run: how they find each other, and how they end."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from lm_fixture import documents, losses, model_folder, recipe, write_shards

from unitok.training.language_model import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo processes")

FIXTURE = Path(__file__).parent / "lm_fixture.py"
PROGRAM = """
import sys
import torch
import torch.distributed as dist
from unitok.training.launch import Processes

torch.set_num_threads(1)
with Processes():
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
for _ in range(5000):
    dist.all_reduce(torch.ones(2000), async_op=True)
"""
PAIR = """
import os, sys, torch
from unitok.training.launch import second_process, two_pay
torch.set_num_threads(2)
assert two_pay()
with second_process(sys.argv[1:]):
    assert torch.get_num_threads() == 1
    {inside}
assert torch.get_num_threads() == 2 and "RANK" not in os.environ
"""
LEAVES = """import torch.distributed as dist
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    os._exit(9)"""
WAITS = """
import sys, pathlib, torch, torch.distributed as dist
dist.init_process_group("gloo")
try:
    for _ in range(2):
        dist.all_reduce(torch.ones(1))
except RuntimeError:
    pathlib.Path(sys.argv[1]).touch()
"""


def test_no_thread_of_a_process_group_outlives_python(tmp_path):
    """Threads that still held a tensor when Python shut down ended every such process in abort()."""
    command = [sys.executable, "-c", PROGRAM]
    both = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
            for rank in (0, 1)]  # fmt: skip
    for one in both:
        said = one.communicate(timeout=120)[1]
        assert one.returncode == 0, said


def pair(inside, *second):
    program = [sys.executable, "-c", PAIR.format(inside=inside)]
    return subprocess.run([*program, *second], capture_output=True, text=True, timeout=240)


def test_a_process_that_starts_the_second_trains_as_one_alone(tmp_path):
    model_folder(tmp_path / "model")
    write_shards(tmp_path / "shards", documents(60))
    changes = {"batch_size": 2}
    told = [str(tmp_path), json.dumps(changes)]
    inside = f"import runpy; sys.argv = ['', *{told!r}]; runpy.run_path({str(FIXTURE)!r}, run_name='__main__')"
    two = pair(inside, sys.executable, str(FIXTURE), *told)
    assert two.returncode == 0, two.stderr
    one = train(recipe(tmp_path, batch_size=4, out=str(tmp_path / "one")), log=lambda line: None)
    np.testing.assert_allclose(list(losses(tmp_path / "out").values()), list(losses(one).values()), rtol=1e-5)


def test_the_second_process_ends_with_a_first_that_is_killed(tmp_path):
    gone = tmp_path / "gone"
    first = pair(LEAVES, sys.executable, "-c", WAITS, str(gone))
    assert first.returncode == 9, first.stderr
    until = time.monotonic() + 60
    while not gone.exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert gone.exists()


def test_a_second_process_that_fails_is_told():
    failed = pair("pass", sys.executable, "-c", "raise SystemExit('no such recipe')")
    assert failed.returncode == 1 and "no such recipe" in failed.stderr
    assert "ValueError: the second process of the training failed" in failed.stderr
