"""Writes easy-VQA as an ordinary folder, once: PNG pictures, and questions as JSON lines, which every verb reads.

    python benchmarks/prepare_easy_vqa.py [--source $UNITOK_DATA/easy_vqa] [--out out/easy_vqa] [--seed 0]

Only the training part of easy-VQA is at hand (4,000 pictures, 38,575 questions), so the split is made here, by picture:
a test picture is in no training question and not among the pictures of the tokenizer. A row is
{"image", "question", "answers": [one], "kind"}; kind: colour, shape, present ("is there a red shape?") or absent ("is
there not a red shape?"), the last two answered by yes and no.

    out/easy_vqa/images/SPLIT/000123.png     out/easy_vqa/SPLIT.jsonl     SPLIT: train, validation, test
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from unitok.checkpoint import write_atomic, write_json

SHARES = {"validation": 400, "test": 600}  # pictures; the others are training pictures
DONE = "split.json"  # written last


def prepare(source: Path, out: Path, seed: int = 0) -> dict[str, dict[str, int]]:
    """Write the folder, or nothing where it stands -> pictures, questions and kinds of every split."""
    if (out / DONE).is_file():
        made = json.loads((out / DONE).read_text())
        if made["seed"] != seed:
            raise ValueError(f"{out} was split with seed {made['seed']}, not {seed}: choose another folder")
        return made["counts"]
    pictures = np.load(source / "images_train.npz")["images"]  # uint8 [P, 64, 64, 3]
    asked = defaultdict(list)
    for question, answer, picture in json.loads((source / "questions_train.json").read_text()):
        asked[picture].append((question, answer))

    counts, order, start = {}, np.random.default_rng(seed).permutation(len(pictures)), 0
    for split in ("validation", "test", "train"):
        size = SHARES.get(split, len(order) - start)
        chosen, start, rows = sorted(order[start : start + size].tolist()), start + size, []
        (out / "images" / split).mkdir(parents=True, exist_ok=True)
        for picture in chosen:
            name = f"images/{split}/{picture:06d}.png"
            Image.fromarray(pictures[picture]).save(out / name)
            for question, answer in asked[picture]:
                rows.append({"image": name, "question": question, "answers": [answer], "kind": kind(question, answer)})
        write_atomic(out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        kinds = Counter(row["kind"] for row in rows)
        counts[split] = {"pictures": len(chosen), "questions": len(rows), **dict(sorted(kinds.items()))}
    write_json(out / DONE, {"seed": seed, "counts": counts})
    return counts


def kind(question: str, answer: str) -> str:
    words = question.rstrip("?").split()
    if answer in ("yes", "no"):
        return "absent" if {"not", "no"} & set(words) else "present"
    return "colour" if "color" in words else "shape"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write easy-VQA as PNG pictures and JSON lines.")
    parser.add_argument("--source", type=Path, default=None, help="default: $UNITOK_DATA/easy_vqa")
    parser.add_argument("--out", type=Path, default=Path("out/easy_vqa"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.source is None and not os.environ.get("UNITOK_DATA"):
        parser.error("UNITOK_DATA is not set: give --source")
    source = args.source or Path(os.environ["UNITOK_DATA"]) / "easy_vqa"
    if not (source / "images_train.npz").is_file():
        parser.error(f"{source} holds no images_train.npz")
    for split, numbers in prepare(source, args.out, args.seed).items():
        print(json.dumps({"split": split, **numbers}))


if __name__ == "__main__":
    main()
