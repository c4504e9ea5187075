"""Processes and devices of a training run: alone, under torchrun, or under the deepspeed launcher."""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from unitok.checkpoint import quiet

ENDING_S = 60.0  # for which the first process waits for the second

_deepspeed_used = False


class Processes:
    """Who this process is. Entering it prepares DeepSpeed where a JSON file is given.

    DeepSpeed in a single process needs the variables a launcher would set: they are set, with a free port, and taken
    back on leaving.
    """

    def __init__(self, deepspeed: str | None = None):
        self.deepspeed = deepspeed

    def __enter__(self) -> Processes:
        with ExitStack() as stack:
            if not torch.cuda.is_available():
                torch.set_flush_denormal(True)  # denormals make CPU steps several times slower
                self._default(stack, {"DS_ACCELERATOR": "cpu"})  # transformers imports DeepSpeed to save anything
            if self.deepspeed:
                _check(self.deepspeed)
                if "RANK" not in os.environ:
                    self._default(stack, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "RANK": "0",
                                          "LOCAL_RANK": "0", "WORLD_SIZE": "1"})  # fmt: skip
                _prepare_deepspeed()
            stack.enter_context(quiet())
            self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
            self.main = self.rank == 0
            self.leave = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.leave.close()
        if kind is None:
            leave_group_at_exit()

    def _default(self, stack: ExitStack, variables: dict[str, str]) -> None:
        for name, value in variables.items():
            if name not in os.environ:
                os.environ[name] = value
                stack.callback(os.environ.pop, name, None)

    @staticmethod
    def half(dtype: str) -> bool:
        """Whether to compute in bfloat16: as told, or where a GPU can."""
        if dtype == "auto":
            return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return dtype == "bfloat16"

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true in all processes if it is in one."""
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        seen = torch.tensor([float(flag) for flag in flags], device=device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        return tuple(bool(flag) for flag in seen.tolist())

    def wait(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.barrier()


def two_pay() -> bool:
    """Whether two processes are faster than this one: on CPU, where small matrices gain little by its threads."""
    return not torch.cuda.is_available() and torch.get_num_threads() > 1


@contextmanager
def second_process(command: Sequence[str]) -> Iterator[None]:
    """This process is the first of two inside, of half its threads each; `command` is what the second runs.

    The second ends with this one, even with one that is killed: what it waits for is gone.
    ValueError where it fails.
    """
    port, threads = str(_free_port()), torch.get_num_threads()
    ours, its = ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
                 for rank in "01")  # fmt: skip
    before = {name: os.environ.get(name) for name in ours}
    other = subprocess.Popen(command, env={**os.environ, **its, "OMP_NUM_THREADS": str(threads // 2)})
    try:
        os.environ.update(ours)
        torch.set_num_threads(threads // 2)
        yield
        if other.wait(ENDING_S):
            raise ValueError("the second process of the training failed, and says why above")
    except KeyboardInterrupt:
        with suppress(subprocess.TimeoutExpired):
            other.wait(ENDING_S)  # both have agreed to stop
        raise
    finally:
        other.kill()
        other.wait()
        torch.set_num_threads(threads)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        _leave_group()


def leave_group_at_exit() -> None:
    """Have the threads of a process group joined before Python shuts down: one that still holds a tensor then ends the
    process in abort(). For work that is done; after an error a thread may wait for a process that is gone."""
    if dist.is_available() and dist.is_initialized():
        atexit.register(_leave_group)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _check(path: str) -> None:
    """ValueError for a JSON file under which no whole weights could be saved."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"deepspeed: {path} cannot be read as JSON: {error}") from error
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(f"deepspeed: {path}: stage 3 needs stage3_gather_16bit_weights_on_model_save: true")


def _prepare_deepspeed() -> None:
    global _deepspeed_used
    if _deepspeed_used:
        raise ValueError("DeepSpeed trains once a process; start a new one")
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError("the recipe names a deepspeed file, but deepspeed is not installed (Linux only)") from error
    _deepspeed_used = True
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # It would be compiled now, which needs ninja and a C++ compiler, and only speeds up inference. Not public.
        compatible = getattr(getattr(deepspeed, "ops", None), "__compatible_ops__", None)
        if isinstance(compatible, dict):
            compatible["deepspeed_shm_comm"] = False


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
