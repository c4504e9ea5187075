"""What the engines for image tokenizers and detokenizers share: one module, its average and its optimiser.

The folder `out` becomes the finished module (averaged weights); `out/training/` holds what made it: checkpoint.pt,
TensorBoard logs, sample pictures, quarantine.jsonl and report.json.

A run that was stopped or killed goes on from its last checkpoint, and ends as it would have without the stop: the data
and every random draw of step n depend on (seed, n) alone.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from PIL import Image
from torch import Tensor, nn

from unitok import checkpoint
from unitok.config import PicturesRecipe
from unitok.nn.pretrained import Pretrained, lacking
from unitok.tokenizers.base import to_pil
from unitok.training.ema import Ema
from unitok.training.launch import leave_group_at_exit
from unitok.training.pictures import Pictures

SAMPLES = 8  # pictures shown
FREE = {"out", "checkpoint_every", "sample_every", "log_every", "workers"}  # may change when a run goes on

LossFunction = Callable[[Mapping[str, Any], int], tuple[Tensor, dict[str, Tensor]]]


class TrainingRun:
    """The state of one run. A subclass says what is trained (`begin`), how it is shown (`sheet`) and scored (`scores`).

    Args:
        module: what is trained and saved.
        name: what the user calls it.
        preprocess: a PIL picture -> float [3, S, S] in [0, 1]; image_size: S.
        captioned: the pictures have captions.
        partly: a step need not use every parameter.
    """

    kind: str  # of module: its key in a checkpoint
    shown: str  # what a sheet of samples shows

    def __init__(
        self,
        recipe: PicturesRecipe,
        module: Pretrained,
        name: str,
        preprocess: Callable[[Image.Image], Tensor],
        image_size: int,
        *,
        captioned: bool = False,
        partly: bool = False,
    ):
        self.recipe: Any = recipe  # a subclass reads the fields of its own kind
        self.module, self.name, self.out = module, name, Path(recipe.out)
        self.folder = self.out / "training"
        self.accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=partly)])
        world = self.accelerator.num_processes
        if recipe.batch_size % world:
            raise ValueError(f"batch_size {recipe.batch_size} is not divisible by the {world} processes")
        self.pictures = Pictures(
            recipe.data,
            preprocess,
            image_size,
            seed=recipe.seed,
            eval_images=recipe.eval_images,
            workers=recipe.workers,
            quarantine=self.folder / "quarantine.jsonl" if self.accelerator.is_main_process else None,
            captioned=captioned,
        )
        self.step, self.seconds, self.saved_at = 0, 0.0, -1
        self.untrained: dict[str, float] = {}
        self.latest: tuple[int, dict[str, float]] = (-1, {})  # the step of the last scores, and those
        self.stop = False
        self.window: dict[str, Tensor] = {}
        self.window_steps, self.window_start = 0, time.perf_counter()
        self._writer: Any = None

    def begin(self, own: list[nn.Parameter], loss: LossFunction) -> None:
        """Move the module to its device and make its average and optimiser; own: the parameters that are trained."""
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self.module.to(self.accelerator.device)
        self.ema = Ema(self.module.own_state, self.recipe.ema) if self.recipe.ema else None
        self.step_loss, self.optimizer = self.prepare(self.module, own, loss)
        self.own = own

    def prepare(self, module: nn.Module, parameters: list[nn.Parameter], loss: LossFunction) -> tuple[nn.Module, Any]:
        r = self.recipe
        optimizer = torch.optim.AdamW(parameters, lr=r.lr, betas=r.betas, weight_decay=r.weight_decay, fused=True)
        return self.accelerator.prepare(_Loss(module, loss, r.dtype), optimizer)

    # ---- for subclasses

    def sheet(self, images: Tensor) -> Tensor:
        """uint8 [n, 3, S, S] -> float [3, H, W]: samples beside the originals."""
        raise lacking(self, "sheet")

    def scores(self, images: Tensor) -> tuple[dict[str, float], str | None]:
        """uint8 [n, 3, S, S] held out -> scores by name, and a line of warning."""
        raise lacking(self, "scores")

    def report(self, found: dict[str, float]) -> list[dict[str, Any]]:
        """The scores of the finished module, which `scores` found, as records of report.json."""
        raise lacking(self, "report")

    def batch(self, index: Tensor, images: Tensor) -> dict[str, Any]:
        """What the loss of a step is given. index: int64 [B], of the pictures; images: uint8 [B, 3, S, S]."""
        return {"images": self.floats(images).contiguous(memory_format=torch.channels_last)}

    def update(self, batch: Mapping[str, Any], lr: float) -> dict[str, Tensor]:
        """One step of every optimiser -> what is logged."""
        return self.descend(self.step_loss, self.optimizer, self.own, batch, lr)

    def lr(self) -> float:
        r = self.recipe
        return r.lr * lr_factor(self.step, r.steps, r.warmup, r.schedule)

    def after_step(self) -> None:
        """Called when a step is counted and averaged."""

    def more_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the module, its optimiser and its average."""
        return {}

    def load_more(self, state: Mapping[str, Any]) -> None:
        """Take back what `more_state` gave."""

    # ---- the loop

    def run(self) -> Path:
        """From the last checkpoint, if there is one, to the finished folder."""
        self.resume()
        with signals(self):
            self.loop()
        return self.finish()

    def loop(self) -> None:
        """Train up to the last step, with checkpoints; KeyboardInterrupt after a checkpoint where `stop` was set."""
        r, main = self.recipe, self.accelerator.is_main_process
        if main and self.step < r.steps:
            where = f"from step {self.step}" if self.step else "from the start"
            print(
                f"training {self.name} {where}: {self.pictures.count} pictures, "
                f"{len(self.pictures.held_out)} held out, {self.pictures.refused} refused",
                flush=True,
            )
        if main and self.step == 0:
            self.untrained = self.show()
        self.module.train()
        self.window_start = time.perf_counter()
        batches = self.pictures.indexed_batches(
            self.step, r.steps, r.batch_size, self.accelerator.process_index, self.accelerator.num_processes
        )
        for index, images in batches:
            self.train_step(index, images)
            if self.step % r.log_every == 0 or self.step == r.steps:
                self.log()
            if main and (self.step % r.sample_every == 0 or self.step == r.steps):
                self.show()
                self.module.train()
            stop = self._stop_everywhere()
            if self.step % r.checkpoint_every == 0 or self.step == r.steps or stop:
                self.save()
            if stop and self.step < r.steps:
                raise KeyboardInterrupt(f"stopped at step {self.step}; the same command goes on from there")

    def train_step(self, index: Tensor, images: Tensor) -> None:
        r, start = self.recipe, time.perf_counter()
        seed = np.random.SeedSequence([r.seed, 2, self.step, self.accelerator.process_index]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        parts = self.update(self.batch(index, images), self.lr())
        self.step += 1
        if self.ema:
            self.ema.update()
        self.after_step()
        for name, value in parts.items():
            self.window[name] = self.window.get(name, 0) + value.float()
        self.window_steps += 1
        self.seconds += time.perf_counter() - start

    def floats(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float in [0, 1], on the device."""
        return images.to(self.accelerator.device, non_blocking=True).float().div_(255)

    def descend(
        self, module: nn.Module, optimizer: Any, parameters: list[nn.Parameter], batch: Mapping[str, Any], lr: float
    ) -> dict[str, Tensor]:
        """One step of one optimiser."""
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss, parts = module(batch, self.step)
        self.accelerator.backward(loss)
        if self.recipe.grad_clip:
            self.accelerator.clip_grad_norm_(parameters, self.recipe.grad_clip)
        optimizer.step()
        return {"loss": loss.detach(), **parts}

    def _stop_everywhere(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.stop
        flag = torch.tensor(int(self.stop), device=self.accelerator.device)
        return self.accelerator.reduce(flag, "sum").item() > 0

    # ---- what the user sees

    def log(self) -> None:
        means = self._window_means()
        if not self.accelerator.is_main_process or not means:
            return
        now = time.perf_counter()
        each = (now - self.window_start) / self.window_steps
        shown = "  ".join(f"{k} {v:.4g}" for k, v in list(means.items())[:5])
        print_progress(self.step, self.recipe.steps, shown, each)
        for name, value in means.items():
            self.writer.add_scalar(f"train/{name}", value, self.step)
        self.window, self.window_steps, self.window_start = {}, 0, now

    def _window_means(self) -> dict[str, float]:
        means = {k: (v / self.window_steps).item() for k, v in self.window.items()}
        for name, value in means.items():
            if not math.isfinite(value):
                last = f"the last checkpoint is of step {self.saved_at}" if self.saved_at >= 0 else "no checkpoint yet"
                raise ValueError(f"{name} became {value} before step {self.step} ({last}); try a lower lr")
        return means

    def averaged(self) -> Any:
        """A context in which the module has its averaged weights."""
        return self.ema.applied() if self.ema else nullcontext()

    def show(self) -> dict[str, float]:
        """Score the held-out pictures with the averaged weights and write a sheet of samples; the scores by name."""
        self.module.eval()
        held = self.pictures.held_out
        with self.averaged():
            shown = held[:SAMPLES] if len(held) else next(self.pictures.batches(0, 1, self.recipe.batch_size))[:SAMPLES]
            sheet = None
            try:
                sheet = self.sheet(shown)
            except (ValueError, NotImplementedError) as error:
                if self.step == 0:
                    print(f"no sample pictures: {error}", flush=True)
            scores, warning = self.scores(held) if len(held) else ({}, None)
        self.latest = (self.step, scores)
        if warning:
            print(warning, flush=True)
        if sheet is not None:
            buffer = BytesIO()
            to_pil(sheet).save(buffer, "png")
            checkpoint.write_atomic(self.folder / "samples" / f"step-{self.step:07d}.png", buffer.getvalue())
            self.writer.add_image(self.shown, sheet, self.step)
        for name, value in scores.items():
            self.writer.add_scalar(f"held_out/{name}", value, self.step)
        return scores

    @property
    def writer(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "logs"), purge_step=self.step or None)
        return self._writer

    # ---- checkpoints

    def save(self) -> None:
        self._window_means()  # never keep a state whose loss is not finite
        if self.accelerator.is_main_process:
            state = {
                "recipe": json.dumps(self._decides()),
                "fingerprint": self.pictures.fingerprint,
                "count": self.pictures.count,
                "step": self.step,  # also the position in the data and in the random draws
                "seconds": self.seconds,
                "untrained": self.untrained,
                self.kind: self.module.own_state(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict() if self.ema else None,
                **self.more_state(),
            }
            with checkpoint.replacing(self.folder / "checkpoint.pt") as temporary:
                torch.save(state, temporary)
            self.writer.flush()
        self.saved_at = self.step

    def resume(self) -> bool:
        """Load the checkpoint in `out`, if there is one. ValueError where it belongs to another recipe or data."""
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return False
        state = checkpoint.load_torch(path)
        check_same(json.loads(state["recipe"]), self._decides(), path)
        if (state["fingerprint"], state["count"]) != (self.pictures.fingerprint, self.pictures.count):
            raise ValueError(
                f"{path} was made from other pictures ({state['count']} then, {self.pictures.count} now); "
                "restore the data, or choose another out"
            )
        self.module.load_own_state(state[self.kind], what=str(path))
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.load_more(state)
        self.step, self.seconds, self.untrained = state["step"], state["seconds"], state["untrained"]
        self.saved_at = self.step
        return True

    def _decides(self) -> dict[str, Any]:
        """What of the recipe must stay the same when a run goes on; where the data lie may change."""
        recipe = self.recipe.model_dump(mode="json", exclude=FREE)
        return {**recipe, "data": [{k: v for k, v in d.items() if k != "path"} for d in recipe["data"]]}

    def finish(self) -> Path:
        """Write the module with averaged weights, and the report."""
        if self.accelerator.is_main_process:
            self.module.eval()
            held, (step, found) = self.pictures.held_out, self.latest
            with self.averaged():
                self.module.save_pretrained(self.out)
                if len(held) and step != self.step:  # the run went on behind its last step
                    found, _ = self.scores(held)
            scores = self.report(found) if len(held) and self.untrained else []
            seconds = {"train": self.seconds}
            report = {"seconds": seconds, "scores": scores, "refused": self.pictures.refused}
            checkpoint.write_json(self.folder / "report.json", report)
            for s in scores:
                baselines = ", ".join(f"{k} {v:.4g}" for k, v in s["baselines"].items())
                print(f"{s['name']} {s['value']:.4g} on {s['n']} held-out pictures ({baselines})")
            print(f"{self.kind} written to {self.out}", flush=True)
            if self._writer is not None:
                self._writer.close()
        self.accelerator.wait_for_everyone()
        leave_group_at_exit()
        return self.out


class _Loss(nn.Module):
    """A loss as a forward pass of its module, which is what data-parallel wrappers synchronise."""

    def __init__(self, module: nn.Module, loss: LossFunction, dtype: str):
        super().__init__()
        self.module, self.loss, self.autocast = module, loss, dtype == "bfloat16"

    def forward(self, batch: Mapping[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(batch["images"].device.type, torch.bfloat16, enabled=self.autocast):
            return self.loss(batch, step)


class Stoppable(Protocol):
    stop: bool


@contextmanager
def signals(run: Stoppable) -> Iterator[None]:
    """SIGINT and SIGTERM stop the run after its current step, with a checkpoint; the second one at once."""

    def ask(number: int, frame: Any) -> None:
        if run.stop:
            raise KeyboardInterrupt
        run.stop = True

    numbers, previous = (signal.SIGINT, signal.SIGTERM), {}
    try:
        for number in numbers:
            previous[number] = signal.signal(number, ask)
    except ValueError:  # not the main thread: signals are someone else's
        previous = {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_arguments(what: str, arguments: Iterable[str], known: Iterable[str]) -> None:
    """ValueError naming the first argument that is not known; `what` is whose they are."""
    known = list(known)
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}"
            raise ValueError(f"{what} has no argument {name!r} ({hint})")


def constructor_arguments(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]  # type: ignore[misc]


def check_same(then: Mapping[str, Any], now: Mapping[str, Any], path: Any) -> None:
    """ValueError where a run that goes on from `path` was made by a recipe that differs in a key of `now`."""
    for key in now:
        if then.get(key) != now[key]:
            raise ValueError(
                f"{path} was made with {key} = {then.get(key)}, the recipe says {now[key]}; "
                "restore the recipe, or choose another out"
            )


def lr_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """What the learning rate is multiplied by at a step: a linear warm-up, then the schedule down to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]


def print_progress(step: int, steps: int, shown: str, seconds: float) -> None:
    """A line of a run, which on a terminal replaces the line before; seconds: of a step."""
    left = int(seconds * (steps - step))
    line = f"step {step}/{steps}  {shown}  {seconds * 1000:.0f} ms a step  {left // 60}:{left % 60:02d} left"
    tty = sys.stdout.isatty() and step < steps
    print(f"\r{line:<100}" if tty else line, end="" if tty else "\n", flush=True)


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] twice -> dB [B], at most 100."""
    return 10 * torch.log10(1 / (images - targets).square().mean(dim=(1, 2, 3)).clamp_min(1e-10))


def rows_of(*rows: Tensor) -> Tensor:
    """[n, 3, S, S] each -> [3, rows * S, n * S]: pictures side by side, one row over the other."""
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
