"""What runs beside something else: in a process of its own where that pays, else when it is waited for."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from unitok.stages import beside


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes pay on CPUs")
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_two_processes_share_the_threads(threads):
    with beside(os.getpid) as pid:
        assert torch.get_num_threads() == 1
        assert pid() != os.getpid()
    assert torch.get_num_threads() == threads
    with beside(torch.get_num_threads) as own:
        assert own() == 1
    with pytest.raises(ValueError, match="invalid literal"), beside(partial(int, "x")) as broken:
        broken()
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("threads", [1], indirect=True)
def test_with_one_thread_it_waits_for_its_turn(threads):
    done = []
    with beside(partial(done.append, 1)) as later:
        assert not done
        later()
    assert done == [1] and torch.get_num_threads() == threads


KILLED = """
import multiprocessing, time, torch
from functools import partial
from unitok.stages import beside
torch.set_num_threads(2)
if __name__ == "__main__":
    with beside(partial(time.sleep, 600)):
        time.sleep(8)
        print(*(one.pid for one in multiprocessing.active_children()), flush=True)
        time.sleep(600)
"""


@pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux", reason="two processes pay on CPUs")
def test_it_ends_with_a_process_that_is_killed(tmp_path):
    (tmp_path / "run.py").write_text(KILLED)
    with subprocess.Popen([sys.executable, tmp_path / "run.py"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        [child] = map(int, parent.stdout.readline().split())
        parent.send_signal(signal.SIGKILL)
    for _ in range(100):
        if not os.path.exists(f"/proc/{child}") or "\nState:\tZ" in open(f"/proc/{child}/status").read():
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the process beside is still at work")
