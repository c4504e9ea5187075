"""Processes of a training run: how they end."""

import subprocess
import sys

import pytest

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


@pytest.mark.skipif(sys.platform != "linux", reason="gloo processes")
def test_no_thread_of_a_process_group_outlives_python(tmp_path):
    """Threads that still held a tensor when Python shut down ended every such process in abort()."""
    command = [sys.executable, "-c", PROGRAM]
    both = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
            for rank in (0, 1)]  # fmt: skip
    for one in both:
        said = one.communicate(timeout=120)[1]
        assert one.returncode == 0, said
