"""The language model engine: LoRA or full training of any Hugging Face causal LM on packed documents.

    train(load_recipe("training/lora.yaml"))        # one process, torchrun or deepspeed; with or without DeepSpeed

A transformers Trainer drives the steps, so DeepSpeed, DDP and checkpoints are its own. What is ours: batches come from
arrays rendered once, the loss is an explicit weighted cross-entropy of labels that already stand where they are
predicted, and only those positions go through the output layer. One step is the same whatever the number of processes
and batches it is cut into: losses are divided by the weight of the whole step, which every process knows.

Writes `out`: an adapter folder (lora) or a model folder (full), `log.jsonl`, `tensorboard/`, `checkpoints/`.
Shapes: B rows, T ids a row, K positions that carry loss, V vocabulary rows.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from unitok.checkpoint import load_weights, open_folder, read_json, save_weights, write_atomic, write_json
from unitok.config import LanguageModelRecipe
from unitok.data.packing import IGNORE, PackedBatch, Store, Stream
from unitok.data.render import IMAGE, TEXT, Template
from unitok.lm.adapters import CONFIG as ADAPTER_CONFIG
from unitok.lm.adapters import add_adapter, is_adapter
from unitok.lm.expand import copy_image_parts, open_lm, unwrapped
from unitok.lm.text import copy_text_tokenizer, load_text_tokenizer
from unitok.manifest import FILE, Manifest
from unitok.training import attention
from unitok.training.launch import Processes
from unitok.training.mixture import read_mixture
from unitok.training.noise import Noise
from unitok.vocab import JointVocab

STREAM, STATE, RECIPE, LOG = "stream.json", "trainer_state.json", "recipe.json", "log.jsonl"
KEPT = 2  # checkpoints
AGREE_EVERY = 10  # steps after which several processes agree on whether to stop
LINE_EVERY_S = 15.0  # between lines where there is no terminal to draw a bar on
FREE = ("steps", "time_limit_s", "checkpoint_every", "log_every", "sample_every", "samples", "out", "kind", "deepspeed")

Sampler = Callable[[nn.Module, int, Any], None]


def train(
    recipe: LanguageModelRecipe, *, resume: bool = True, sampler: Sampler | None = None,
    log: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Run the recipe, or go on with it where its `out` folder left off, and return that folder.

    sampler: called as sampler(model, step, writer) every `sample_every` steps, in every process; writer is a
    TensorBoard SummaryWriter in the first and None in the others. It does not change the training.
    resume=False starts over. Ctrl-C saves a checkpoint, then raises KeyboardInterrupt; the time limit saves one,
    writes the folder as it stands, and a later call goes on.
    ValueError: shards, model and recipe that do not fit, a loss that is not finite.
    """
    torch.set_flush_denormal(True)  # before the first operation: moments that fade out would slow a CPU down
    with Processes(recipe.deepspeed) as processes:
        log = log if processes.main else _silent
        run = _Run(recipe, processes, log)
        if not resume and processes.main:
            shutil.rmtree(run.checkpoints, ignore_errors=True)
        checkpoint = run.last_checkpoint() if resume else None
        if checkpoint is None or checkpoint[0] < recipe.steps:
            run.train(checkpoint, sampler)
            checkpoint = run.last_checkpoint()
        assert checkpoint is not None
        if processes.main:
            run.finish(checkpoint[1])
        log(f"{'adapter' if recipe.method == 'lora' else 'model'} of step {checkpoint[0]} in {run.out}")
        return run.out


class _Run:
    """The files of one recipe: what it reads, its checkpoints, its result."""

    def __init__(self, recipe: LanguageModelRecipe, processes: Processes, log: Callable[[str], None]):
        self.recipe, self.processes, self.log = recipe, processes, log
        self.out = Path(recipe.out)
        self.checkpoints = self.out / "checkpoints"
        self.folder = open_folder(recipe.model)
        if is_adapter(self.folder):
            raise ValueError(f"{recipe.model} is an adapter; export it and train on the merged model")
        self.manifest = Manifest.load(self.folder) if (self.folder / FILE).is_file() else Manifest()
        template = (self.manifest.template or {}) | recipe.template
        self.template = Template.from_dict(template)
        self.manifest.template = self.template.to_dict()

    def last_checkpoint(self) -> tuple[int, Path] | None:
        """(step, folder) of the newest whole checkpoint."""
        whole = [p for p in self.checkpoints.glob("checkpoint-*") if (p / STATE).is_file()]
        found = [(int(p.name.rpartition("-")[2]), p) for p in whole]
        if found:
            self._same_recipe()
        return max(found, default=None)

    def _same_recipe(self) -> None:
        then, now = read_json(self.out / RECIPE), self.recipe.model_dump(mode="json")
        for key in now:
            if key not in FREE and then.get(key) != now[key]:
                raise ValueError(
                    f"{self.out} was begun with {key} {then.get(key)!r}, the recipe says {now[key]!r};"
                    " give another out, or start over with resume=False"
                )

    def train(self, checkpoint: tuple[int, Path] | None, sampler: Sampler | None) -> None:
        recipe, log = self.recipe, self.log
        if self.processes.main:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / RECIPE, recipe.model_dump(mode="json"))
        vocab = JointVocab.from_dict(self.manifest.vocab) if self.manifest.vocab else None
        words = load_text_tokenizer(self.folder)
        mixture = read_mixture(recipe, self.manifest, vocab, words, self.template, show=self.processes.main)
        log(mixture.summary())
        if mixture.refused and self.processes.main:
            lines = [json.dumps({"shards": s, "id": i, "reason": r}) for s, i, r in mixture.refused]
            write_atomic(self.out / "quarantine.jsonl", "\n".join(lines) + "\n")
            log(f"{len(lines)} documents left out, see {self.out / 'quarantine.jsonl'}; the first: {lines[0]}")

        model = self._model(vocab)
        state = read_json(checkpoint[1] / STREAM) if checkpoint else None
        stream = Stream(mixture.store.lengths, mixture.sources, recipe.length, recipe.seed, state=state)
        noise = Noise(mixture.store, vocab, recipe.image_noise, recipe.seed)
        batches = _Batches(mixture.store, stream, recipe, self.processes, noise)
        trainer = _Trainer(recipe, self.processes, model, batches, self.checkpoints)
        monitor = _Monitor(recipe, self.processes, trainer, sampler, log, self.out, checkpoint[0] if checkpoint else 0)
        trainer.monitor = monitor
        trainer.add_callback(monitor)
        trainer.remove_callback(PrinterCallback)
        if checkpoint:
            log(f"going on from step {checkpoint[0]} of {recipe.steps}")
        with monitor:
            trainer.train(resume_from_checkpoint=str(checkpoint[1]) if checkpoint else None)
        self.processes.wait()
        if monitor.interrupted:
            log(f"interrupted; step {trainer.state.global_step} of {recipe.steps} is saved, the same call goes on")
            raise KeyboardInterrupt

    def _model(self, vocab: JointVocab | None):
        recipe = self.recipe
        half = self.processes.half(recipe.dtype)
        frozen = recipe.method == "lora"
        model: Any = open_lm(self.folder, dtype=torch.bfloat16 if half and frozen else torch.float32)
        if recipe.gradient_checkpointing:
            checkpoint_activations(model)
        if not frozen:
            return model.train()
        if recipe.gradient_checkpointing:
            model.enable_input_require_grads()
        vocab = vocab or JointVocab(text_rows=model.get_input_embeddings().weight.shape[0])
        options = recipe.lora.model_dump()
        return add_adapter(model, vocab, seed=recipe.seed, **options).train()

    def finish(self, checkpoint: Path) -> None:
        """Write the result from a checkpoint, which holds the weights as Hugging Face and PEFT write them."""
        result = [f for f in checkpoint.iterdir() if f.name.startswith(("adapter_", "model", "config", "generation_"))]
        for file in result:
            shutil.copyfile(file, self.out / file.name)
        if self.recipe.method == "lora":
            config = read_json(self.out / ADAPTER_CONFIG)
            local = Path(self.recipe.model).exists()
            config["base_model_name_or_path"] = os.path.relpath(self.folder, self.out) if local else self.recipe.model
            write_json(self.out / ADAPTER_CONFIG, config)
        else:
            self._to_dtype_of_base()
            copy_text_tokenizer(load_text_tokenizer(self.folder), self.folder, self.out)
            copy_image_parts(self.folder, self.out)
        self.manifest.save(self.out)  # last: a folder with a manifest is whole

    def _to_dtype_of_base(self) -> None:
        """Full training keeps float32 weights; the result is as large as the model it came from."""
        base, config = (read_json(folder / "config.json") for folder in (self.folder, self.out))
        name = base.get("dtype") or base.get("torch_dtype") or config["dtype"]
        if name == config["dtype"]:
            return
        for file in self.out.glob("model*.safetensors"):
            save_weights(file, {key: value.to(getattr(torch, name)) for key, value in load_weights(file).items()})
        write_json(self.out / "config.json", config | {"dtype": name})


# --- batches --------------------------------------------------------------------------------------------------------


def checkpoint_activations(model: Any) -> None:
    """Keep the inputs of the blocks only and compute the rest again, by whichever name transformers has for it."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()


class Step(NamedTuple):
    """One batch of one process, and the loss weight of the whole step it is part of."""

    batch: PackedBatch
    chosen: Tensor  # int64 [K], positions of the flattened batch that carry loss
    total: float

    def to(self, device) -> Step:
        return self if device.type == "cpu" else Step(self.batch.to(device), self.chosen.to(device), self.total)


class _Batches:
    """What the Trainer iterates: this process's batches, cut from rows that every process plans alike."""

    def __init__(self, store: Store, stream: Stream, recipe: LanguageModelRecipe, processes: Processes, noise: Noise):
        self.store, self.stream, self.recipe, self.processes, self.noise = store, stream, recipe, processes, noise
        self.weights = store.loss_weights()

    def __iter__(self) -> Iterator[Step]:
        size, world = self.recipe.batch_size, self.processes.world
        while True:
            key = self.stream.number, self.stream.row
            rows = self.stream.take(size * world * self.recipe.accumulate)
            total = float(sum(self.weights[row].sum() for row in rows))
            for part in range(self.processes.rank, world * self.recipe.accumulate, world):
                batch = self.store.batch(rows[part * size : (part + 1) * size], self.recipe.length)
                self.noise(batch, key, part * size)
                chosen = torch.nonzero(batch.labels.flatten() != IGNORE).flatten()
                yield Step(batch, chosen, total)


# --- loss -----------------------------------------------------------------------------------------------------------


class ChosenPositions:
    """Lets only chosen positions through the output layer of a model: logits become [1, K, V] while they are set."""

    def __init__(self, model: Any):
        self.chosen: Tensor | None = None
        unwrapped(model).get_output_embeddings().register_forward_pre_hook(self._select)

    def _select(self, module: nn.Module, args: tuple) -> tuple | None:
        if self.chosen is None:
            return None
        return (args[0].flatten(0, 1).index_select(0, self.chosen)[None], *args[1:])

    @contextlib.contextmanager
    def __call__(self, chosen: Tensor):
        self.chosen = chosen
        try:
            yield
        finally:
            self.chosen = None


def step_loss(logits: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy of logits [K, V] over the weight of the whole step; (scalar, losses [K], modality [K])."""
    labels = step.batch.labels.flatten()[step.chosen]
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    weights = step.batch.weights.flatten()[step.chosen]
    modality = step.batch.label_modality.flatten()[step.chosen]
    return (losses * weights).sum() / max(step.total, 1e-9), losses.detach(), modality


# --- the trainer ----------------------------------------------------------------------------------------------------


class _Trainer(Trainer):
    """transformers' Trainer with our batches, loss, optimiser and log, and without its work per step we do not need."""

    def __init__(self, recipe: LanguageModelRecipe, processes: Processes, model, batches: _Batches, folder: Path):
        cuda = torch.cuda.is_available()
        args = TrainingArguments(
            output_dir=str(folder),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            gradient_accumulation_steps=recipe.accumulate,
            learning_rate=recipe.lr,
            max_grad_norm=recipe.clip or 0.0,
            logging_steps=recipe.log_every,
            logging_nan_inf_filter=False,
            save_steps=recipe.checkpoint_every,
            save_total_limit=KEPT,
            ignore_data_skip=True,  # the stream has its own position
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            seed=recipe.seed,
            use_cpu=not cuda,
            bf16=processes.half(recipe.dtype),
            ddp_backend="gloo" if processes.world > 1 and not cuda else None,
            ddp_find_unused_parameters=False,
            deepspeed=recipe.deepspeed,
        )
        self.recipe, self.processes, self.batches = recipe, processes, batches
        self.chosen = ChosenPositions(model)
        self.by_document, self.windows = attention.use(model), attention.windows(model)
        self.monitor: Any = None  # a _Monitor, from when training begins
        super().__init__(model=model, args=args)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.sums = torch.zeros(3, 2, device=args.device)  # loss and count by modality, since the last log

    def get_train_dataloader(self) -> _Batches:  # type: ignore[override]
        return self.batches

    def get_batch_samples(self, epoch_iterator, num_batches: int, device=None):
        return [next(epoch_iterator) for _ in range(num_batches)], None

    def floating_point_ops(self, inputs) -> int:
        return 0

    def create_optimizer(self, model=None):
        if self.optimizer is None:  # else DeepSpeed's own, from its JSON file
            matrices = [p for p in self.trained if p.ndim > 1]
            vectors = [p for p in self.trained if p.ndim <= 1]
            groups = [{"params": matrices, "weight_decay": self.recipe.weight_decay},
                      {"params": vectors, "weight_decay": 0.0}]  # fmt: skip
            groups = [group for group in groups if group["params"]]
            self.optimizer = torch.optim.AdamW(groups, lr=self.recipe.lr, betas=self.recipe.betas, fused=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None):
        if self.lr_scheduler is None:
            factor = lr_factor(self.recipe.schedule, self.recipe.steps, self.recipe.warmup)
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return self.lr_scheduler

    def training_step(self, model, inputs: Step, num_items_in_batch=None) -> Tensor:  # type: ignore[override]
        if not model.training:
            model.train()
        inputs = inputs.to(self.args.device)
        with attention.documents(inputs.batch) if self.by_document else contextlib.nullcontext():
            loss = self.compute_loss(model, inputs)
            self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
        if loss.device.type == "cpu":  # elsewhere the log looks, and nothing waits in between
            self._check_finite(loss.item())
        return loss.detach()

    def compute_loss(self, model, inputs: Any, return_outputs: bool = False, num_items_in_batch=None):  # inputs: a Step
        with self.chosen(inputs.chosen):
            outputs = model(**inputs.batch.inputs(not self.by_document, self.windows))
        loss, losses, modality = step_loss(outputs.logits[0], inputs)
        self.sums.index_add_(0, modality, torch.stack([losses, torch.ones_like(losses)], dim=1))
        loss = loss * self.processes.world  # gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self.state.global_step + 1}: lower lr, or look at the data with"
                " `unitok inspect`"
            )

    def _clip_grad_norm(self, model):
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        return nn.utils.clip_grad_norm_(self.trained, self.args.max_grad_norm, foreach=True)

    def _get_grad_norm(self, model, grad_norm=None):
        return None if grad_norm is None else super()._get_grad_norm(model, grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" not in logs:  # the Trainer's summary at the end
            return
        self._check_finite(logs["loss"])
        sums = self.accelerator.reduce(self.sums, "sum").tolist()
        self.sums.zero_()
        record = {"step": self.state.global_step, "loss": logs["loss"]}
        record |= {f"loss_{name}": sums[m][0] / sums[m][1] for name, m in MODALITIES.items() if sums[m][1]}
        record |= {"lr": logs["learning_rate"]}
        record |= {"grad_norm": logs["grad_norm"]} if "grad_norm" in logs else {}
        self.monitor.record(record)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if not self.args.should_save:
            return
        # PEFT's "auto" would ask the hub about the base, and add whole embedding matrices
        rows = {"save_embedding_layers": False} if self.recipe.method == "lora" else {}
        sharded = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        model: Any = self.model
        folder = output_dir or str(self.args.output_dir)
        model.save_pretrained(folder, state_dict=state_dict if sharded else None, **rows)
        write_json(Path(folder) / STREAM, self.batches.stream.state())


MODALITIES = {"text": TEXT, "image": IMAGE}  # control ids are nearly free to predict and would flatter either


def lr_factor(schedule: str, steps: int, warmup: int) -> Callable[[int], float]:
    """Share of the learning rate at a step: linear warm-up, then "linear" or "cosine" to zero, or "constant"."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return factor


# --- what happens beside the steps ----------------------------------------------------------------------------------


class _Monitor(TrainerCallback):
    """Progress, log, samples; stops on Ctrl-C and at the time limit, with a checkpoint."""

    def __init__(self, recipe, processes: Processes, trainer: _Trainer, sampler, log, out: Path, start: int):
        self.recipe, self.processes, self.trainer, self.sampler, self.say = recipe, processes, trainer, sampler, log
        self.out, self.start, self.interrupted, self.late = out, start, False, False
        self.began = self.spoke = time.monotonic()
        self.writer: Any = None
        self.file: Any = None
        self.bar: Any = None
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Monitor:
        if self.processes.main:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.start + 1)
            self.file = open(self.out / LOG, "a+", encoding="utf-8")
            self._forget_after(self.start)
            self.bar = tqdm(total=self.recipe.steps, initial=self.start, unit="step", mininterval=0.5,
                            disable=not sys.stderr.isatty())  # fmt: skip
        if threading.current_thread() is threading.main_thread():
            self.previous = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        for thing in (self.bar, self.file, self.writer):
            if thing is not None:
                thing.close()

    def _forget_after(self, step: int) -> None:
        """Drop records of steps that a killed run took after its last checkpoint."""
        self.file.seek(0)
        kept = [line for line in self.file if line.endswith("\n") and json.loads(line)["step"] <= step]
        self.file.seek(0)
        self.file.truncate()
        self.file.writelines(kept)

    def _interrupt(self, number, frame) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self.say("stopping after this step; once more to stop at once, without a checkpoint")

    def on_step_end(self, args, state, control, **_):
        step = state.global_step
        if self.bar is not None:
            self.bar.update()
        limit = self.recipe.time_limit_s
        self.late = self.late or (limit is not None and time.monotonic() - self.began > limit)
        if self.processes.world > 1 and step % AGREE_EVERY == 0:
            self.interrupted, self.late = self.processes.any(self.interrupted, self.late)
        if (self.interrupted or self.late) and (self.processes.world == 1 or step % AGREE_EVERY == 0):
            control.should_training_stop = control.should_save = True
            if self.late and step < self.recipe.steps:
                self.say(f"time limit of {limit} s reached at step {step} of {self.recipe.steps}")
        control.should_log = control.should_log or control.should_save  # a loss that is not finite is never saved
        if self.sampler and step % self.recipe.sample_every == 0:
            self._sample(step)
        return control

    def _sample(self, step: int) -> None:
        model: Any = self.trainer.model
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            self.sampler(model, step, self.writer)
        model.train()

    def record(self, record: dict[str, float]) -> None:
        if not self.processes.main:
            return
        seconds = time.monotonic() - self.began
        record["seconds"] = round(seconds, 3)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name, value in record.items():
            if name not in ("step", "seconds"):
                self.writer.add_scalar(name, value, record["step"])
        losses = ", ".join(f"{k} {v:.3f}" for k, v in record.items() if k.startswith("loss"))
        self.bar.set_postfix_str(losses, refresh=False)
        if self.bar.disable and time.monotonic() - self.spoke > LINE_EVERY_S:
            self.spoke = time.monotonic()
            rate = (record["step"] - self.start) / seconds
            self.say(f"step {record['step']} of {self.recipe.steps}: {losses}; {rate:.1f} steps/s")


def _silent(line: str) -> None:
    pass
