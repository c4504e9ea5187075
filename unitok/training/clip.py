"""Trains a small CLIP on captioned pictures: what a project without pretrained towers freezes, hashes and builds on.

The folder `out` becomes an ordinary transformers CLIPModel with its text tokenizer and preprocessor_config.json;
`out/training/` holds checkpoints, TensorBoard logs, quarantine.jsonl and report.json. Radford et al. 2021 (arXiv
2103.00020), by transformers' own model, loss and Trainer.

Two pictures of one batch may share a caption, and the loss would take the true match for a false one. So the captions
of a batch are drawn such that none is also listed for another picture of it; a picture with no such caption is left out
of the batch. (A caption that is true of another picture, but not listed for it, cannot be told.)

A run that was stopped or killed goes on from its last checkpoint: the data and every draw of step n depend on (seed, n)
alone.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from unitok.checkpoint import open_folder, read_json, write_json
from unitok.config import ClipRecipe, DataSource
from unitok.lm.text import load_text_tokenizer
from unitok.tokenizers.base import fit, to_tensor
from unitok.training.launch import Processes
from unitok.training.pictures import Pictures
from unitok.training.run import check_arguments, check_same, lr_factor, print_progress, signals

END = "<|endoftext|>"  # CLIP's end token: the text model pools there
OLD_END = 2  # transformers' CLIP pools at the highest id, not at the end token, where the end token is this id
RESIZE = "squash-bicubic"
RECIPE, REPORT = "recipe.json", "report.json"
STATE = "trainer_state.json"
FREE = {"out", "checkpoint_every", "log_every", "workers"}  # may change when a run goes on


def train(recipe: ClipRecipe) -> Path:
    """Run the recipe, or go on where it stopped; returns the folder of the CLIPModel.

    KeyboardInterrupt after SIGINT or SIGTERM, with a checkpoint written. ValueError where recipe, data or an older
    checkpoint do not fit, or the loss is no longer finite.
    """
    with Processes() as processes:
        if processes.world > 1:
            raise ValueError("a clip recipe runs in one process: its loss compares the pictures of a whole batch")
        out = Path(recipe.out)
        words = text_tokenizer(recipe.text_tokenizer)
        model = build(recipe, words)
        vision: Any = model.config.vision_config

        def read(sources: Sequence[DataSource]) -> Pictures:
            return Pictures(
                sources,
                lambda image: to_tensor(fit(image, vision.image_size, RESIZE)),
                vision.image_size,
                seed=recipe.seed,
                workers=recipe.workers,
                quarantine=out / "training" / "quarantine.jsonl",
                captioned=True,
            )

        shown = gallery(read(recipe.gallery), recipe.gallery_size) if recipe.gallery else None
        untrained = retrieval(model, words, *shown) if shown else {}
        seconds, refused = 0.0, 0
        if recipe.steps:
            pictures = read(recipe.data)
            seconds, refused = _fit(recipe, model, words, pictures, out / "training"), pictures.refused
        model.eval()
        model.save_pretrained(out)
        words.save_pretrained(out)
        write_json(out / "preprocessor_config.json", preprocessor(vision.image_size))
        found = retrieval(model, words, *shown) if shown else {}
        scores = [_score(name, value, untrained[name], recipe) for name, value in found.items()]
        write_json(out / "training" / REPORT, {"seconds": {"train": seconds}, "scores": scores, "refused": refused})
        for s in scores:
            beside = ", ".join(f"{k} {v:.4f}" for k, v in s["baselines"].items())
            print(f"{s['name']} {s['value']:.4f} in a gallery of {s['n']} ({beside})")
        print(f"CLIP written to {out}", flush=True)
        return out


def text_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The text tokenizer of a folder, with the end token that CLIP's text model pools at behind every text.

    One that ends its texts already stays as it is; another gets `<|endoftext|>` as a new id, which also pads.
    """
    words = load_text_tokenizer(open_folder(name))
    if words.eos_token_id not in (None, OLD_END) and words("a")["input_ids"][-1] == words.eos_token_id:
        if words.pad_token is None:
            words.pad_token = words.eos_token
        return words
    words.add_special_tokens({"eos_token": END, "pad_token": END})
    assert words.eos_token_id != OLD_END
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, words.eos_token_id)]
    )
    return words


def build(recipe: ClipRecipe, words: PreTrainedTokenizerBase) -> CLIPModel:
    """The untrained model of a recipe. ValueError for an argument that transformers does not know."""
    for what, cls, given in (("vision", CLIPVisionConfig, recipe.vision), ("text", CLIPTextConfig, recipe.text)):
        check_arguments(f"the {what} tower", given, [field.name for field in dataclasses.fields(cls)])
    ids = {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    size = recipe.projection_size
    text = CLIPTextConfig(**{**recipe.text, **ids, "bos_token_id": words.bos_token_id, "projection_dim": size})
    vision = CLIPVisionConfig(**{**recipe.vision, "projection_dim": size})
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=size)
    words.model_max_length = text.max_position_embeddings
    torch.manual_seed(recipe.seed)
    return CLIPModel(config)


def preprocessor(image_size: int) -> dict[str, Any]:
    """preprocessor_config.json: pictures squashed to the size, and [0, 1] mapped to [-1, 1]."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "resample": 3,  # bicubic
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }


def pixel_values(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> float [B, 3, S, S] in [-1, 1]."""
    return images.float() / 127.5 - 1


# ---- batches


class _Batches:
    """What the Trainer iterates: the batches of the steps that are left."""

    def __init__(self, recipe: ClipRecipe, pictures: Pictures, words: PreTrainedTokenizerBase, first: int):
        self.recipe, self.pictures, self.words, self.first = recipe, pictures, words, first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        r = self.recipe
        batches = self.pictures.indexed_batches(self.first, r.steps, r.batch_size)
        for step, (index, images) in enumerate(batches, self.first):
            options = [self.pictures.items[i].captions for i in index.tolist()]
            rows, texts = distinct(options, np.random.default_rng([r.seed, 4, step]))
            yield {
                "pixel_values": pixel_values(images[rows]),
                **self.words(texts, padding=True, truncation=True, return_tensors="pt"),
                "return_loss": True,
            }


def distinct(options: Sequence[Sequence[str]], rng: np.random.Generator) -> tuple[list[int], list[str]]:
    """Captions of each picture of a batch -> (which pictures stay, the caption drawn for each).

    No caption that is drawn is listed for another picture that stays.
    """
    rows: list[int] = []
    texts: list[str] = []
    listed: set[str] = set()
    for row, captions in enumerate(options):
        free = [text for text in captions if text not in listed]
        if free and not set(texts) & set(captions):
            rows.append(row)
            texts.append(free[int(rng.integers(len(free)))])
            listed.update(captions)
    return rows, texts


# ---- retrieval


def gallery(pictures: Pictures, size: int) -> tuple[Tensor, list[str]]:
    """(uint8 [n, 3, S, S], n captions): n <= size pictures, each with a caption listed for no other picture at hand.

    Pictures that look alike, which have the same captions, are one.
    """
    found: dict[frozenset[str], int] = {}
    for row, item in enumerate(pictures.items):
        found.setdefault(frozenset(item.captions), row)
    count = Counter(text for captions in found for text in captions)
    own = {row: sorted(text for text in captions if count[text] == 1) for captions, row in found.items()}
    rows = [row for row, texts in own.items() if texts][:size]
    if len(rows) < size:
        raise ValueError(f"the gallery has {len(rows)} pictures with a caption of their own; it needs {size}")
    index, images = next(pictures.indexed_batches(0, 1, len(pictures.items)))
    at = {i: place for place, i in enumerate(index.tolist())}
    rng = np.random.default_rng(pictures.seed)
    texts = [own[row][int(rng.integers(len(own[row])))] for row in rows]
    return images[[at[row] for row in rows]], texts


@torch.no_grad()
def retrieval(
    model: CLIPModel, words: PreTrainedTokenizerBase, images: Tensor, texts: Sequence[str], batch_size: int = 128
) -> dict[str, float]:
    """R@1 both ways: the share of pictures whose own caption is the nearest of all by cosine, and of captions."""
    was_training, device = model.training, model.device
    model.eval()
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(0, len(texts), batch_size):
        some = list(texts[start : start + batch_size])
        ids = words(some, padding=True, truncation=True, return_tensors="pt").to(device)
        pixels = pixel_values(images[start : start + batch_size]).to(device)
        sides[0].append(model.get_image_features(pixel_values=pixels).pooler_output)
        sides[1].append(model.get_text_features(**ids).pooler_output)
    model.train(was_training)
    image, text = (torch.nn.functional.normalize(torch.cat(side), dim=-1) for side in sides)
    similarity = image @ text.T
    right = torch.arange(len(texts), device=device)
    return {
        "image_to_text": (similarity.argmax(dim=1) == right).float().mean().item(),
        "text_to_image": (similarity.argmax(dim=0) == right).float().mean().item(),
    }


def _score(name: str, value: float, untrained: float, recipe: ClipRecipe) -> dict[str, Any]:
    n = recipe.gallery_size
    margin = 1.96 * math.sqrt(value * (1 - value) / n)
    return {
        "name": name,
        "value": value,
        "n": n,
        "interval": [max(0.0, value - margin), min(1.0, value + margin)],
        "baselines": {"untrained": untrained, "chance": 1 / n},
        "protocol": {"metric": "R@1", "gallery": [s.path for s in recipe.gallery], "steps": recipe.steps},
    }


# ---- the trainer


def _fit(
    recipe: ClipRecipe, model: CLIPModel, words: PreTrainedTokenizerBase, pictures: Pictures, folder: Path
) -> float:
    """Train the model in place, from the last checkpoint where there is one; the seconds of all its runs."""
    checkpoints = folder / "checkpoints"
    whole = [p for p in checkpoints.glob("checkpoint-*") if (p / STATE).is_file()]
    last = max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
    decides = {**recipe.model_dump(mode="json", exclude=FREE), "fingerprint": pictures.fingerprint}
    for key in ("data", "gallery"):  # where they lie may change
        decides[key] = [{k: v for k, v in source.items() if k != "path"} for source in decides[key]]
    if last:
        check_same(read_json(folder / RECIPE), decides, folder)
    else:
        shutil.rmtree(checkpoints, ignore_errors=True)
        write_json(folder / RECIPE, decides)
    first = int(last.name.rpartition("-")[2]) if last else 0
    trainer = _Trainer(recipe, model, _Batches(recipe, pictures, words, first), checkpoints)
    monitor = _Monitor(recipe, folder, first)
    trainer.add_callback(monitor)
    trainer.remove_callback(PrinterCallback)
    start = f"from step {first}" if first else "from the start"
    print(f"training clip {start}: {pictures.count} pictures, {pictures.refused} refused", flush=True)
    with signals(monitor):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    monitor.close()
    step = trainer.state.global_step
    if monitor.stop and step < recipe.steps:
        raise KeyboardInterrupt(f"stopped at step {step}; the same command goes on from there")
    return sum(record["seconds"] for record in trainer.state.log_history if "seconds" in record)


class _Trainer(Trainer):
    """transformers' Trainer with our batches and learning rate."""

    def __init__(self, recipe: ClipRecipe, model: CLIPModel, batches: _Batches, folder: Path):
        self.recipe, self.batches = recipe, batches
        cuda = torch.cuda.is_available()
        args = TrainingArguments(
            output_dir=str(folder),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.lr,
            adam_beta1=recipe.betas[0],
            adam_beta2=recipe.betas[1],
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.grad_clip or 0.0,
            logging_steps=recipe.log_every,
            logging_nan_inf_filter=False,
            save_steps=recipe.checkpoint_every,
            save_total_limit=2,
            ignore_data_skip=True,  # the batches begin at the step themselves
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            seed=recipe.seed,
            use_cpu=not cuda,
            bf16=recipe.dtype == "bfloat16",
        )
        super().__init__(model=model, args=args)

    def get_train_dataloader(self) -> _Batches:  # type: ignore[override]
        return self.batches

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None):
        if self.lr_scheduler is None:
            r = self.recipe
            given: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                given, lambda step: lr_factor(step, r.steps, r.warmup, r.schedule)
            )
        return self.lr_scheduler


class _Monitor(TrainerCallback):
    """Progress and log; saves and stops where `stop` was set."""

    def __init__(self, recipe: ClipRecipe, folder: Path, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.recipe, self.first, self.stop = recipe, first, False
        self.writer = SummaryWriter(str(folder / "logs"), purge_step=first or None)
        self.at, self.since = first, time.perf_counter()

    def on_train_begin(self, args, state, control, **_):
        self.since = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if self.stop:
            control.should_training_stop = control.should_save = True
        control.should_log = control.should_log or control.should_save  # a loss that is not finite is never saved
        return control

    def on_log(self, args, state, control, logs, **_):
        if "loss" not in logs:  # the Trainer's summary at the end
            return
        loss, step, now = logs["loss"], state.global_step, time.perf_counter()
        if not math.isfinite(loss):
            raise ValueError(f"the loss became {loss} before step {step}; try a lower lr")
        seconds, each = now - self.since, (now - self.since) / max(1, step - self.at)
        state.log_history[-1]["seconds"] = seconds
        self.at, self.since = step, now
        print_progress(step, self.recipe.steps, f"loss {loss:.4g}", each)
        self.writer.add_scalar("train/loss", loss, step)
        self.writer.add_scalar("train/lr", logs["learning_rate"], step)

    def close(self) -> None:
        self.writer.close()
