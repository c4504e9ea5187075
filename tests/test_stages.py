"""What runs beside something else: in a process of its own where that pays, else when it is waited for."""

import os
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
