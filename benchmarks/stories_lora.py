"""LoRA + new rows learn on a frozen real LLM: stories260k, which has only read stories, learns captions -> codes.

    UNITOK_DATA=... python benchmarks/stories_lora.py [--tokenizer T] [--out DIR] [key=value ...]

Expands the LLM, tokenizes scenes, runs training/stories_lora.yaml through `deepspeed --module unitok train` (ZeRO-2,
two CPU processes of one thread), then scores held-out test pictures: each holds a (shape, colour) pair that is in no
training picture and no training caption. key=value changes the recipe. Bound: 10 minutes in all. Exit code 1 where the
claim fails.

The score is the cross-entropy of the codes behind their prompt, in nats per code; begin and end of the image do not
count, and the model's probabilities are over all its rows, text included. JSON lines, ratio = peer / ours:

    stories_lora/unigram            peer: the frequencies of codes at each position of the training pictures, smoothed
                                    (additive, chosen on validation pictures)
    stories_lora/unigram_entropy    peer: the entropy of each position over the scored pictures themselves; no table of
                                    frequencies does better on them, wherever it comes from
    stories_lora/shuffled_captions  peer: the same model behind the prompt of another scored picture
    stories_lora/untrained          peer: the expanded model before training
    stories_lora/frozen             ours: values of the base that are bit for bit those published; peer: how many it has
    stories_lora/seconds            peer: the bound

`difference` is ours - peer over the same pictures, `interval` its 95 % bootstrap interval over whole pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # see tokenizers.py

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers.utils import logging

from unitok.checkpoint import load_weights, open_folder
from unitok.data.packing import collate
from unitok.data.render import IMAGE, render
from unitok.data.scene_files import write_scenes
from unitok.data.schema import Part, text_part
from unitok.data.shards import read_shards, summary_line, tokenize
from unitok.eval.results import paired_difference
from unitok.lm.adapters import load_adapter, merge
from unitok.lm.expand import empty_folder, expand_folder, new_rows
from unitok.manifest import Manifest
from unitok.model import UnifiedModel, load
from unitok.tokenizers.base import tokenizer_folder
from unitok.vocab import JointVocab

RECIPE = Path(__file__).parents[1] / "training/stories_lora.yaml"
NAME = "scenes"
PICTURES = {"train": 12_000, "validation": 300, "test": 500}
CAPTIONS = 3  # of each training picture
PROCESSES = 2
BOUND_S = 600
SMOOTHING = (0.01, 0.03, 0.1, 0.3, 1.0)  # counts added to every code
BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default=None, help="default: $UNITOK_DATA/stories260k/hf")
    parser.add_argument("--tokenizer", default="builtin:scenes", help="an image tokenizer, or a model folder with one")
    parser.add_argument("--out", type=Path, default=Path("out/stories_lora"), help="a folder that nothing is in yet")
    parser.add_argument("--seed", type=int, default=3, help="of the scenes")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="settings: on validation")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes of the recipe")
    args = parser.parse_args()
    if args.llm is None and not os.environ.get("UNITOK_DATA"):
        parser.error("UNITOK_DATA is not set: give --llm")
    begun, out = time.perf_counter(), empty_folder(args.out)
    llm = open_folder(args.llm or Path(os.environ["UNITOK_DATA"]) / "stories260k/hf")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    stages = {}

    def done(stage: str) -> None:
        stages[stage] = round(time.perf_counter() - begun - sum(stages.values()), 1)
        print(f"{stage}: {stages[stage]:.0f} s", file=sys.stderr)

    prepare(llm, args.tokenizer, out, args.seed)
    model = load(out / "model")
    prompts, pictures = scored(model, out, args.split)
    untrained = code_losses(model, prompts, pictures)
    done("prepare")
    train(out, args.changes)
    done("train")
    tuned = load(out / "adapter")
    ours = code_losses(tuned, prompts, pictures)
    peers = {
        "unigram": unigram_losses(model, out, pictures),
        "unigram_entropy": table_losses(frequencies(model, pictures, 0.0), pictures),
        "shuffled_captions": code_losses(tuned, others(prompts), pictures),
        "untrained": untrained,
    }
    kept, values = frozen(llm, out)
    done("score")

    differences = {name: compare(name, ours, peer) for name, peer in peers.items()}
    row("frozen", kept / values, kept, values, "values of the base")
    seconds = sum(stages.values())
    row("seconds", BOUND_S / seconds, seconds, BOUND_S, "s", stages=stages, training=last_record(out))
    failed = [name for name, (_, (_, high)) in differences.items() if high >= 0]
    failed += ["frozen"] * (kept != values) + ["seconds"] * (seconds > BOUND_S)
    beside = ", ".join(f"{name} {peer.mean():.3f}" for name, peer in peers.items())
    print(
        f"{ours.mean():.3f} nats per code on {len(pictures)} {args.split} pictures; {beside};"
        f" {kept} of {values} values of the base as published; {seconds:.0f} s",
        file=sys.stderr,
    )
    if failed:
        sys.exit(f"the claim does not hold: {', '.join(failed)}")


# ---- stages


def prepare(llm: Path, tokenizer: str, out: Path, seed: int) -> None:
    """out/data, out/model (expanded), out/shards."""
    eyes = tokenizer_folder(open_folder(tokenizer))
    write_scenes(out / "data", pictures=PICTURES, captions=CAPTIONS, seed=seed)
    expand_folder(llm, eyes, out / "model", NAME)
    summary = tokenize(out / "data/train_draw.jsonl", eyes, out / "shards", name=NAME)
    print(summary_line(summary), file=sys.stderr)


def train(out: Path, changes: Sequence[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipe = [f"model={out / 'model'}", f"data.0.shards={out / 'shards'}", f"out={out / 'adapter'}"]
    recipe += [f"deepspeed={RECIPE.parent / 'deepspeed/zero2.json'}", *changes]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(PROCESSES)]  # gpus: processes
    command += ["--master_port", str(port), "--log_level", "warning"]
    command += ["--module", "unitok", "train", str(RECIPE), *recipe]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, stdout=sys.stderr, check=True)


def scored(model: UnifiedModel, out: Path, split: str) -> tuple[list[str], list[Part]]:
    """Prompts, and the codes of their pictures."""
    lines = (out / f"data/{split}_prompts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [r["prompt"] for r in rows], model.encode([out / "data" / r["image"] for r in rows])


def last_record(out: Path) -> dict:
    return json.loads((out / "adapter/log.jsonl").read_text().splitlines()[-1])


# ---- losses: float64 [P, N] nats, pictures and codes


@torch.no_grad()
def code_losses(model: UnifiedModel, prompts: Sequence[str], pictures: Sequence[Part]) -> np.ndarray:
    out = []
    for start in range(0, len(prompts), BATCH):
        pairs = zip(prompts[start : start + BATCH], pictures[start : start + BATCH], strict=True)
        documents = [
            render([text_part(prompt, loss=False), picture], model.vocab, model.text_tokenizer, model.template)
            for prompt, picture in pairs
        ]
        batch = collate([[one] for one in documents])
        logits = model.lm(**batch.inputs()).logits
        losses = F.cross_entropy(logits.flatten(0, 1).double(), batch.labels.flatten(), reduction="none")  # [B T]
        of_codes = (batch.label_modality == IMAGE).flatten()
        out.append(losses[of_codes].view(len(documents), -1).numpy())
    return np.concatenate(out)


def others(prompts: Sequence[str], seed: int = 0) -> list[str]:
    """For each picture the prompt of another one, with other words."""
    order, out = np.random.default_rng(seed).permutation(len(prompts)), list(prompts)
    for i, own in enumerate(order):
        following = (prompts[order[(i + k) % len(order)]] for k in range(1, len(order)))
        out[own] = next(text for text in following if text != prompts[own])
    return out


def frequencies(model: UnifiedModel, pictures: Sequence[Part], smoothing: float) -> np.ndarray:
    """float64 [N, K]: share of each code at each position, `smoothing` added to the count of every code there is."""
    codes = np.stack([p.codes for p in pictures])  # [P, N]
    tokenizer = model.image_tokenizer
    sizes = np.array(tokenizer.codebook_sizes)[tokenizer.token_codebook().numpy()]  # [N]
    counts = np.where(np.arange(sizes.max()) < sizes[:, None], smoothing, 0.0)  # [N, K]
    np.add.at(counts, (np.arange(codes.shape[1]), codes), 1)
    return counts / counts.sum(1, keepdims=True)


def table_losses(table: np.ndarray, pictures: Sequence[Part]) -> np.ndarray:
    codes = np.stack([p.codes for p in pictures])  # [P, N]
    return -np.log(table[np.arange(codes.shape[1]), codes])


def unigram_losses(model: UnifiedModel, out: Path, pictures: Sequence[Part]) -> np.ndarray:
    seen = [part for document in read_shards(out / "shards") for part in document.parts if part.codes is not None]
    _, validation = scored(model, out, "validation")
    tables = [frequencies(model, seen, smoothing) for smoothing in SMOOTHING]
    best = min(tables, key=lambda table: table_losses(table, validation).mean())
    return table_losses(best, pictures)


# ---- the base


def frozen(llm: Path, out: Path) -> tuple[int, int]:
    """(values of the base that the tuned model still has bit for bit as published, all of them).

    Under LoRA a weight counts as the matrix that LoRA adds to, elsewhere as what the merged model computes with: its
    text rows, its norms. ValueError where the adapter holds anything but LoRA and new rows.
    """
    adapter = load_adapter(out / "adapter")
    vocab = JointVocab.from_dict(Manifest.load(out / "model").vocab)
    trained = [name for name in load_weights(out / "adapter/adapter_model.safetensors")]
    if unknown := [n for n in trained if not re.search(r"\.lora_[AB]\.|\.trainable_tokens_delta$", n)]:
        raise ValueError(f"the adapter holds {unknown[0]}")
    if set(_trained_rows(adapter)) - set(new_rows(vocab)):
        raise ValueError("the adapter holds rows of text")
    under = {re.sub(r"^base_model\.model\.|\.(base_layer|token_adapter)(?=\.)", "", n): p
             for n, p in adapter.state_dict().items()}  # fmt: skip
    under = {name: value.clone() for name, value in under.items()}
    merged = merge(adapter).state_dict()
    kept = values = 0
    for file in sorted(llm.glob("*.safetensors")):
        for name, published in load_weights(file).items():
            sides = [under[name]]
            if f"base_model.model.{name.removesuffix('weight')}lora_A.weight" not in trained:
                sides.append(merged[name])
            same = [side[: len(published)] == published for side in sides]  # the rows of a matrix before the new ones
            kept += int(torch.stack(same).all(0).sum())
            values += published.numel()
    return kept, values


def _trained_rows(adapter: PeftModel) -> list[int]:
    indices = adapter.peft_config[adapter.active_adapter].trainable_token_indices
    return [row for ids in (indices.values() if isinstance(indices, dict) else [indices]) for row in ids]


# ---- rows


def compare(name: str, ours: np.ndarray, peer: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Print the row of a peer -> (ours - peer, its interval)."""
    a, b = peer.mean(1), ours.mean(1)  # [P] each
    difference, interval = paired_difference(a.tolist(), b.tolist())
    more = {"difference": round(difference, 4), "interval": [round(x, 4) for x in interval], "n": len(b)}
    row(name, a.mean() / b.mean(), b.mean(), a.mean(), "nats per code", **more)
    return difference, interval


def row(name: str, ratio: float, ours: float, peer: float, unit: str, **more) -> None:
    numbers = {"ratio": round(float(ratio), 4), "ours": round(float(ours), 4), "peer": round(float(peer), 4)}
    print(json.dumps({"name": f"stories_lora/{name}", **numbers, "unit": unit, "runs": 1, "spread": 0.0, **more}),
          flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
