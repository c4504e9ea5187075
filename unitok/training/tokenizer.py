"""Trains an image tokenizer from a recipe.

The folder `out` becomes the finished tokenizer (averaged weights); `out/training/` holds what made it: checkpoint.pt,
TensorBoard logs, sample pictures (originals over reconstructions), quarantine.jsonl and report.json.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from unitok import checkpoint, tokenizers
from unitok.config import TokenizerRecipe
from unitok.nn.codes import CodebookUse, collapse_warning, count_codes
from unitok.tokenizers.base import ImageTokenizer, load_tokenizer, to_pil
from unitok.training.ema import Ema
from unitok.training.pictures import Pictures

SAMPLES = 8  # pictures shown
FREE = {"out", "checkpoint_every", "sample_every", "log_every", "workers"}  # may change when a run goes on


def train(recipe: TokenizerRecipe) -> Path:
    """Run the recipe, or go on where it stopped; returns the folder of the finished tokenizer.

    KeyboardInterrupt after SIGINT or SIGTERM, with a checkpoint written. ValueError where the recipe, the data or an
    older checkpoint do not fit, or the loss is no longer finite.
    """
    if recipe.flush_denormal:
        torch.set_flush_denormal(True)  # before the first operation: worker threads inherit it
    run = TokenizerRun(recipe)
    run.resume()
    with _signals(run):
        run.loop()
    return run.finish()


class TokenizerRun:
    """The state of one training run."""

    def __init__(self, recipe: TokenizerRecipe):
        self.recipe, self.out = recipe, Path(recipe.out)
        self.folder = self.out / "training"
        torch.manual_seed(recipe.seed)
        self.tokenizer = build(recipe)
        partly = len(self.tokenizer.stages) > 1  # a stage need not use every parameter
        self.accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=partly)])
        world = self.accelerator.num_processes
        if recipe.batch_size % world:
            raise ValueError(f"batch_size {recipe.batch_size} is not divisible by the {world} processes")
        self.pictures = Pictures(
            recipe.data,
            self.tokenizer.preprocess,
            self.tokenizer.image_size,
            seed=recipe.seed,
            eval_images=recipe.eval_images,
            workers=recipe.workers,
            quarantine=self.folder / "quarantine.jsonl" if self.accelerator.is_main_process else None,
        )
        self.critic = self.tokenizer.critic()
        self.tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self.tokenizer.to(self.accelerator.device)
        adversary = set(map(id, self.critic.parameters())) if self.critic else set()
        own = [p for p in self.tokenizer.parameters() if p.requires_grad and id(p) not in adversary]
        if not own:
            raise ValueError(f"{type(self.tokenizer).__name__} has nothing to train in stage {recipe.stage!r}")
        self.ema = Ema(self.tokenizer.own_state, recipe.ema) if recipe.ema else None
        self.step_loss, self.optimizer = self._prepare(_Loss(self.tokenizer, recipe.dtype, stage=recipe.stage), own)
        self.own = own
        if self.critic:
            self.critic_own = [p for p in self.critic.parameters() if p.requires_grad]
            self.critic_loss, self.critic_optimizer = self._prepare(_Loss(self.critic, recipe.dtype), self.critic_own)
        self.step, self.seconds, self.saved_at = 0, 0.0, -1
        self.untrained: dict[str, float] = {}
        self.stop = False
        self.window: dict[str, Tensor] = {}
        self.window_steps, self.window_start = 0, time.perf_counter()
        self._writer: Any = None

    def _prepare(self, module: nn.Module, parameters: list[nn.Parameter]) -> tuple[nn.Module, Any]:
        r = self.recipe
        optimizer = torch.optim.AdamW(parameters, lr=r.lr, betas=r.betas, weight_decay=r.weight_decay, fused=True)
        return self.accelerator.prepare(module, optimizer)

    # ---- the loop

    def loop(self) -> None:
        """Train up to the last step, with checkpoints; KeyboardInterrupt after a checkpoint where `stop` was set."""
        r, main = self.recipe, self.accelerator.is_main_process
        if main and self.step < r.steps:
            where = f"from step {self.step}" if self.step else "from the start"
            print(
                f"training {r.tokenizer.name} {where}: {self.pictures.count} pictures, "
                f"{len(self.pictures.held_out)} held out, {self.pictures.refused} refused",
                flush=True,
            )
        if main and self.step == 0:
            self.untrained = self.show()
        self.tokenizer.train()
        self.window_start = time.perf_counter()
        batches = self.pictures.batches(
            self.step, r.steps, r.batch_size, self.accelerator.process_index, self.accelerator.num_processes
        )
        for images in batches:
            self.train_step(images)
            if self.step % r.log_every == 0 or self.step == r.steps:
                self.log()
            if main and (self.step % r.sample_every == 0 or self.step == r.steps):
                self.show()
                self.tokenizer.train()
            stop = self._stop_everywhere()
            if self.step % r.checkpoint_every == 0 or self.step == r.steps or stop:
                self.save()
            if stop and self.step < r.steps:
                raise KeyboardInterrupt(f"stopped at step {self.step}; the same command goes on from there")

    def train_step(self, images: Tensor) -> None:
        r, start = self.recipe, time.perf_counter()
        seed = np.random.SeedSequence([r.seed, 2, self.step, self.accelerator.process_index]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        images = images.to(self.accelerator.device, non_blocking=True).float().div_(255)
        batch = {"images": images.contiguous(memory_format=torch.channels_last)}
        lr = r.lr * lr_factor(self.step, r.steps, r.warmup, r.schedule)
        parts = self._update(self.step_loss, self.optimizer, self.own, batch, lr)
        if self.critic:
            theirs = self._update(self.critic_loss, self.critic_optimizer, self.critic_own, batch, lr)
            parts |= {f"critic_{k}": v for k, v in theirs.items()}
        self.step += 1
        if self.ema:
            self.ema.update()
        for name, value in parts.items():
            self.window[name] = self.window.get(name, 0) + value.float()
        self.window_steps += 1
        self.seconds += time.perf_counter() - start

    def _update(
        self, module: nn.Module, optimizer: Any, parameters: list[nn.Parameter], batch: Mapping[str, Any], lr: float
    ) -> dict[str, Tensor]:
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
        left = int(each * (self.recipe.steps - self.step))
        shown = "  ".join(f"{k} {v:.4g}" for k, v in list(means.items())[:5])
        line = (
            f"step {self.step}/{self.recipe.steps}  {shown}  {each * 1000:.0f} ms a step  "
            f"{left // 60}:{left % 60:02d} left"
        )
        tty = sys.stdout.isatty() and self.step < self.recipe.steps
        print(f"\r{line:<100}" if tty else line, end="" if tty else "\n", flush=True)
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

    def show(self) -> dict[str, float]:
        """Score the held-out pictures with the averaged weights and write a sheet of samples; the scores by name."""
        self.tokenizer.eval()
        held = self.pictures.held_out
        with self.ema.applied() if self.ema else _nothing():
            shown = held[:SAMPLES] if len(held) else next(self.pictures.batches(0, 1, self.recipe.batch_size))[:SAMPLES]
            try:
                sheet = self._sheet(shown)
            except (ValueError, NotImplementedError) as error:
                if self.step == 0:
                    print(f"no sample pictures: {error}", flush=True)
                return {}
            scores, warning = score(self.tokenizer, held, self.recipe.batch_size) if len(held) else ({}, None)
        if warning:
            print(warning, flush=True)
        buffer = BytesIO()
        to_pil(sheet).save(buffer, "png")
        checkpoint.write_atomic(self.folder / "samples" / f"step-{self.step:07d}.png", buffer.getvalue())
        self.writer.add_image("originals over reconstructions", sheet, self.step)
        for name, value in scores.items():
            self.writer.add_scalar(f"held_out/{name}", value, self.step)
        return scores

    def _sheet(self, images: Tensor) -> Tensor:
        """float [3, 2 S, n S]: originals over reconstructions."""
        originals = images.to(self.accelerator.device).float() / 255
        decoded = self.tokenizer.decode(self.tokenizer.encode(originals))
        return torch.cat([torch.cat(list(row), dim=2) for row in (originals, decoded)], dim=1).cpu()

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
                "tokenizer": self.tokenizer.own_state(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict() if self.ema else None,
                "critic": self.critic.state_dict() if self.critic else None,
                "critic_optimizer": self.critic_optimizer.state_dict() if self.critic else None,
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
        then, now = json.loads(state["recipe"]), self._decides()
        for key in now:
            if then.get(key) != now[key]:
                raise ValueError(
                    f"{path} was made with {key} = {then.get(key)}, the recipe says {now[key]}; "
                    "restore the recipe, or choose another out"
                )
        if (state["fingerprint"], state["count"]) != (self.pictures.fingerprint, self.pictures.count):
            raise ValueError(
                f"{path} was made from other pictures ({state['count']} then, {self.pictures.count} now); "
                "restore the data, or choose another out"
            )
        self.tokenizer.load_own_state(state["tokenizer"], what=str(path))
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.critic:
            self.critic.load_state_dict(state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.step, self.seconds, self.untrained = state["step"], state["seconds"], state["untrained"]
        self.saved_at = self.step
        return True

    def _decides(self) -> dict[str, Any]:
        """What of the recipe must stay the same when a run goes on; where the data lie may change."""
        recipe = self.recipe.model_dump(mode="json", exclude=FREE)
        return {**recipe, "data": [{k: v for k, v in d.items() if k != "path"} for d in recipe["data"]]}

    def finish(self) -> Path:
        """Write the tokenizer with averaged weights, and the report."""
        if self.accelerator.is_main_process:
            self.tokenizer.eval()
            with self.ema.applied() if self.ema else _nothing():
                self.tokenizer.save_pretrained(self.out)
                report = self._report()
            checkpoint.write_json(self.folder / "report.json", report)
            for s in report["scores"]:
                baselines = ", ".join(f"{k} {v:.4g}" for k, v in s["baselines"].items())
                print(f"{s['name']} {s['value']:.4g} on {s['n']} held-out pictures ({baselines})")
            print(f"tokenizer written to {self.out}", flush=True)
            if self._writer is not None:
                self._writer.close()
        self.accelerator.wait_for_everyone()
        return self.out

    def _report(self) -> dict[str, Any]:
        held, scores = self.pictures.held_out, []
        if len(held) and self.untrained:
            found, _ = score(self.tokenizer, held, self.recipe.batch_size)
            flat = held.float().div(255)
            mean_colour = psnr(flat.mean(dim=(2, 3), keepdim=True).expand_as(flat), flat).mean().item()
            margin = 1.96 * found.pop("psnr_error")
            value = found.pop("psnr")
            scores = [
                {
                    "name": "psnr",
                    "value": value,
                    "n": len(held),
                    "interval": [value - margin, value + margin],
                    "baselines": {"untrained": self.untrained["psnr"], "mean colour": mean_colour},
                    "protocol": {
                        "unit": "dB",
                        "pictures": "held out of the training data",
                        "resize": self.tokenizer.resize,
                        "image_size": self.tokenizer.image_size,
                        "steps": self.step,
                        **found,
                    },
                }
            ]
        return {"seconds": {"train": self.seconds}, "scores": scores, "refused": self.pictures.refused}


class _Loss(nn.Module):
    """`loss` as a forward pass, which is what data-parallel wrappers synchronise."""

    def __init__(self, module: Any, dtype: str, **fixed: Any):
        super().__init__()
        self.module, self.autocast, self.fixed = module, dtype == "bfloat16", fixed

    def forward(self, batch: Mapping[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(batch["images"].device.type, torch.bfloat16, enabled=self.autocast):
            return self.module.loss(batch, step, **self.fixed)


def build(recipe: TokenizerRecipe) -> ImageTokenizer:
    """The recipe's tokenizer, new or from `init_from`. ValueError for a wrong name, argument or stage."""
    cls, arguments = tokenizers.get(recipe.tokenizer.name), recipe.tokenizer.arguments
    known = [n for n in inspect.signature(cls.__init__).parameters if n != "self"]
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}"
            raise ValueError(f"tokenizer {recipe.tokenizer.name!r} has no argument {name!r} ({hint})")
    tokenizer = cls(**arguments)
    if recipe.stage not in tokenizer.stages:
        raise ValueError(
            f"tokenizer {recipe.tokenizer.name!r} has no stage {recipe.stage!r}; it has {', '.join(tokenizer.stages)}"
        )
    if recipe.init_from:
        tokenizer.load_own_state(load_tokenizer(recipe.init_from).own_state(), what=recipe.init_from)
    return tokenizer


def lr_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """What the learning rate is multiplied by at a step: a linear warm-up, then the schedule down to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] twice -> dB [B], at most 100."""
    return 10 * torch.log10(1 / (images - targets).square().mean(dim=(1, 2, 3)).clamp_min(1e-10))


@torch.no_grad()
def score(tokenizer: ImageTokenizer, images: Tensor, batch_size: int) -> tuple[dict[str, float], str | None]:
    """uint8 [n, 3, S, S] -> scores, and a line of warning where a codebook has collapsed.

    PSNR in dB (mean over pictures, and its standard error); of the codes the share in use and the perplexity, named
    NAME/codebook=K where there are several codebooks.
    """
    psnrs, codes = [], []
    for chunk in images.split(batch_size):
        originals = chunk.to(tokenizer.device).float() / 255
        found = tokenizer.encode(originals)
        psnrs.append(psnr(tokenizer.decode(found), originals).cpu())
        codes.append(found.cpu())
    values, books = torch.cat(psnrs), tokenizer.token_codebook().numpy()
    counts = count_codes(torch.cat(codes).numpy(), books, tokenizer.codebook_sizes)
    scores = {
        "psnr": values.mean().item(),
        "psnr_error": (values.std(unbiased=False) / math.sqrt(len(values))).item(),
    }
    for book, use in enumerate(map(CodebookUse.of, counts)):
        suffix = f"/codebook={book}" if len(counts) > 1 else ""
        scores |= {f"codes_used{suffix}": use.share, f"perplexity{suffix}": use.perplexity}
    return scores, collapse_warning(counts)


@contextmanager
def _signals(run: TokenizerRun) -> Iterator[None]:
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


@contextmanager
def _nothing() -> Iterator[None]:
    yield
