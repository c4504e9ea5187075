"""Makes the embedded default again: `make weights`, or `python -m unitok.weights --out DIR [--only STAGE ...]`.

    eyes         pictures of every pair
    tokenizer    tokenizers/scenes_split.yaml on them
    llm          a SentencePiece text tokenizer of the scene language around an untrained Llama, `unitok expand`ed
    documents    captions both ways and sentences, no held-out pair, never a question; tokenized
    base         full training of that model on them, in the order of RECIPES, each on the model of the step before
    scores       what both reach, beside the shipped ones

Every stage resumes and is skipped where it stands. `--install` copies the result over the shipped folder.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unitok.checkpoint import ASSETS, read_json, write_json
from unitok.config import DataSource, LanguageModelRecipe, TokenizerRecipe, load_recipe
from unitok.data.scene_files import vocabulary_text, write_scenes

NAME = "scenes"  # builtin:scenes, and the image tokenizer's name in it
EYES = 30_000
DOCUMENTS: dict[str, dict[str, Any]] = {  # how scenes are written, by folder; pictures: of training
    "lattice": {"setting": "lattice", "pictures": 20_000, "texts": 20_000, "seed": 2},
    "base": {"setting": "base", "pictures": 60_000, "texts": 20_000, "seed": 2},
    "beside": {"setting": "beside", "pictures": 8_000, "ordered": 0.8, "rounds": 3, "seed": 3},
    "ordered": {"setting": "base", "pictures": 24_000, "texts": 20_000, "ordered": 0.8, "rounds": 3, "seed": 4},
}
SCORED = 400  # validation pictures
TEXT_ROWS = 460
LLAMA: dict[str, Any] = {  # 1 M parameters; a width of 192 was worse at equal seconds, see benchmarks/NOTES.md
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 1024, "tie_word_embeddings": True,
    "initializer_range": 0.06, "rope_theta": 500.0,  # for 128 channels and 200 positions: defaults are for large models
}  # fmt: skip
TEMPLATE: dict[str, Any] = {"question": "{question} ", "answer": "{answer}", "shot_separator": "\n", "separator": "\n"}
README = """# builtin:scenes

A small image tokenizer and a small base LLM, which stand for the trained tokenizer and the base model that one
downloads in real life. Made by `make weights`: `tokenizers/scenes_split.yaml`, then, each on the model of the last,
{steps}.
The base has seen pictures with captions and statements and read sentences, never a
question, and never a held-out (shape, colour) pair; the tokenizer has seen pictures of every pair.
`log.jsonl` is the log of the base's last step, `tokenizer_report.json` the tokenizer's.

Seconds on 2 CPU cores, by stage: {seconds}

Scores on validation scenes, each of which holds a held-out pair:

| score | value | n |
| --- | --- | --- |
{scores}
"""
STEPS = ("_words", "_lattice", "_free", "_beside", "_ordered", "_read", "_places", "_found", "_drawn", "_true",
         "_sides", "_bound", "_seen", "_worded", "")  # fmt: skip
RECIPES = tuple(f"training/scenes_base{step}.yaml" for step in STEPS)
HERE = Path("out/weights")  # where the recipes have everything


def make_eyes(out: Path) -> None:
    write_scenes(out / "eyes", pictures={"eyes": EYES}, seed=0)


def make_tokenizer(out: Path) -> None:
    from unitok.training.tokenizer import train

    overrides = [f"data={out / 'eyes' / 'eyes.jsonl'}", f"out={out / 'tokenizer'}"]
    recipe = load_recipe("tokenizers/scenes_split.yaml", overrides)
    assert isinstance(recipe, TokenizerRecipe)
    train(recipe)


def make_llm(out: Path) -> None:
    from unitok.data.render import Template
    from unitok.lm.expand import expand_folder

    if not (out / "llm" / "model.safetensors").is_file():
        write_llm(out / "llm")
    shutil.rmtree(out / "expanded", ignore_errors=True)
    expand_folder(out / "llm", out / "tokenizer", out / "expanded", NAME, template=Template(**TEMPLATE).to_dict())


def write_llm(out: Path, seed: int = 0) -> None:
    """An untrained Llama with a text tokenizer that knows the words of the scene language, as Hugging Face files."""
    import sentencepiece
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spm = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(vocabulary_text()), model_writer=spm, model_type="bpe", vocab_size=TEXT_ROWS,
        hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        pad_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(spm.getvalue())
    config = LlamaConfig(vocab_size=TEXT_ROWS, bos_token_id=1, eos_token_id=2, **LLAMA)
    config.save_pretrained(out)
    words = AutoTokenizer.from_pretrained(out)
    words.save_pretrained(out)
    (out / "tokenizer.model").unlink()  # tokenizer.json says the same to every loader
    config.vocab_size = len(words)
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(out)


def make_documents(out: Path) -> None:
    from unitok.data.shards import summary_line, tokenize_each, workers

    write_scenes(out / "data", pictures={"validation": SCORED}, seed=1)
    with workers() as pool:
        largest_first = sorted(DOCUMENTS, key=lambda folder: -DOCUMENTS[folder]["pictures"])
        list(pool.map(_write_documents, (out / "documents" / folder for folder in largest_first)))
    wanted = sorted({shards for recipe in map(_recipe, RECIPES) for shards in _shards(recipe, out)})
    jobs = [(out / "documents" / shards.parent.name / f"{shards.name}.jsonl", shards) for shards in wanted]
    for shards, summary in zip(wanted, tokenize_each(jobs, out / "tokenizer", name=NAME), strict=True):
        print(f"{shards.parent.name} {shards.name}: {summary_line(summary)}")


def _write_documents(folder: Path) -> None:
    asked = DOCUMENTS[folder.name]
    write_scenes(folder, **{**asked, "pictures": {"train": asked["pictures"]}}, captions=2)


def make_base(out: Path) -> None:
    """Two processes of one thread each: a fifth faster than one of two threads on two cores."""
    for file in RECIPES:
        recipe = _recipe(file)
        changes = [f"model={_moved(recipe.model, out)}", f"out={_moved(recipe.out, out)}"]
        changes += [f"data.{i}.shards={shards}" for i, shards in enumerate(_shards(recipe, out))]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["-m", "unitok", "train", file, *changes]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _recipe(file: str) -> LanguageModelRecipe:
    recipe = load_recipe(file)
    assert isinstance(recipe, LanguageModelRecipe)
    return recipe


def _shards(recipe: LanguageModelRecipe, out: Path) -> list[Path]:
    return [_moved(source.shards, out) for source in recipe.data]


def _moved(path: Any, out: Path) -> Path:
    return out / Path(path).relative_to(HERE)


STAGES: dict[str, Callable[[Path], None]] = {
    "eyes": make_eyes,
    "tokenizer": make_tokenizer,
    "llm": make_llm,
    "documents": make_documents,
    "base": make_base,
}


def scores(out: Path) -> list[dict]:
    """Scores of the base in `out` and, where there is one, of the shipped base, on the same validation scenes."""
    from unitok.demo import DRAW
    from unitok.eval import captions, text_to_image
    from unitok.eval.rows import load_rows
    from unitok.model import load

    def source(name: str) -> list[DataSource]:
        return [DataSource(path=str(out / "data" / name))]

    found = []
    prompts = text_to_image.load_prompts(source("validation_prompts.jsonl"))
    shown = load_rows(source("validation_captions.jsonl"), "caption")
    for label, folder in (("new", out / "base"), ("shipped", ASSETS / NAME)):
        if (folder / "unitok.json").is_file():
            model = load(folder)
            both = text_to_image.evaluate(model, prompts, decode=DRAW, batch_size=256)
            both += captions.evaluate(model, shown, batch_size=256)
            found += [{"model": label, **score.to_dict()} for score in both]
    return found


def install(out: Path) -> Path:
    """Copy the base over the shipped folder: what inference needs, the logs that made it, and what it reached."""
    target, base = ASSETS / NAME, out / "base"
    found = read_json(out / "scores.json")["scores"]
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in sorted(base.iterdir()):
        if file.is_file():
            shutil.copyfile(file, target / file.name)
    shutil.copytree(base / "image_tokenizers", target / "image_tokenizers")
    shutil.copyfile(out / "tokenizer" / "training" / "report.json", target / "tokenizer_report.json")
    seconds = {stage: read_json(out / f"{stage}.done")["seconds"] for stage in STAGES}
    lines = [f"| {one['name']} | {one['value']:.4f} | {one['n']} |" for one in found if one["model"] == "new"]
    steps = textwrap.fill(", ".join(f"`{file}`" for file in RECIPES), 118, break_on_hyphens=False)
    text = README.format(steps=steps, seconds=json.dumps(seconds), scores="\n".join(lines))
    (target / "README.md").write_text(text)
    return target


def make(out: Path, only: list[str] | None = None) -> dict[str, float]:
    """Run the stages that are not done yet -> their seconds."""
    seconds = {}
    for name, stage in STAGES.items():
        done = out / f"{name}.done"
        if done.exists() or (only is not None and name not in only):
            continue
        print(f"--- {name}", flush=True)
        begun = time.time()
        stage(out)
        seconds[name] = round(time.time() - begun, 1)
        write_json(done, {"seconds": seconds[name]})
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded tokenizer and base LLM again.")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--only", nargs="*", choices=[*STAGES, "scores"], help="these stages only")
    parser.add_argument("--install", action="store_true", help="make the result the shipped default")
    args = parser.parse_args()
    seconds = make(args.out, args.only)
    print(json.dumps({"seconds": seconds}))
    if args.only is None or "scores" in args.only:
        found = scores(args.out)
        write_json(args.out / "scores.json", {"scores": found})
        for score in found:
            print(f"{score['model']:8} {score['name']:32} {score['value']:.4f}  n {score['n']}")
    if args.install:
        print(install(args.out))


if __name__ == "__main__":
    main()
