"""Small trainings of every quantizer on CIFAR-10, scored beside the block-mean picture at the same grid.

    UNITOK_DATA=... python benchmarks/tokenizers.py [NAME ...]      5 minutes a run on one CPU core

Trains on rows 0 to 17,999 of cifar10_jpg and scores the hard codes on rows 18,000 to 19,999: 8 x 8 positions, at most
1,024 bits a picture, no perceptual loss, no adversary. A finished training is not run again. `ours` and `peer` are PSNR
in dB (mean of per-picture values); `ratio` is the block mean's error over ours. Prints a line a run and a table.

`collapsed` begins with 512 codes that are all equal and trains 500 steps: the log warns, and its use must come back.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path

# a script's folder comes first on sys.path: without this, and the like in its neighbours, `import tokenizers` of
# transformers would find this file
sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]

import pyarrow.parquet as pq
from PIL import Image

from unitok.config import load_recipe
from unitok.eval.images import evaluate
from unitok.tokenizers.base import load_tokenizer
from unitok.training.tokenizer import build

VQGAN, DVAE = "tokenizers/cifar10_vqgan.yaml", "tokenizers/cifar10_dvae.yaml"
FIRST = 18_000  # of the scored rows
ENTROPY = {"tokenizer.entropy_weight": 0.03, "tokenizer.entropy_temperature": 0.1, "tokenizer.beta": 0.1}
SETTINGS: dict[str, tuple[str, dict[str, object]]] = {
    "vq": (VQGAN, {}),
    "vq-s1": (VQGAN, {"seed": 1}),
    "vq-s2": (VQGAN, {"seed": 2}),
    "fsq": (VQGAN, {"tokenizer.quantizer": "fsq", "tokenizer.levels": [8, 5, 5, 5]}),
    "fsq-s1": (VQGAN, {"tokenizer.quantizer": "fsq", "tokenizer.levels": [8, 5, 5, 5], "seed": 1}),
    "fsq-s2": (VQGAN, {"tokenizer.quantizer": "fsq", "tokenizer.levels": [8, 5, 5, 5], "seed": 2}),
    "dvae": (DVAE, {}),
    "lfq": (VQGAN, {"tokenizer.quantizer": "lfq", "tokenizer.bits": [8, 8], **ENTROPY, "steps": 2500}),
    "bsq": (VQGAN, {"tokenizer.quantizer": "bsq", "tokenizer.bits": [8, 8], **ENTROPY}),
    "ema": (VQGAN, {"tokenizer.quantizer": "ema", "tokenizer.revive": 0.1, "steps": 1000}),
    "simvq": (VQGAN, {"tokenizer.quantizer": "simvq", "steps": 1000}),
    "rvq": (VQGAN, {"tokenizer.quantizer": "rvq", "tokenizer.codebook_size": 256, "tokenizer.depth": 2,
                    "tokenizer.revive": 0.1, "steps": 1000}),
    "gumbel": (VQGAN, {"tokenizer.quantizer": "gumbel", "tokenizer.code_dim": 64,
                       "tokenizer.temperature_steps": 800, "steps": 1000}),
    "fsq-long": (VQGAN, {"tokenizer.quantizer": "fsq", "tokenizer.levels": [8, 5, 5, 5], "steps": 4000}),
    "collapsed": (VQGAN, {"tokenizer.codebook_size": 512, "tokenizer.normalize": False, "steps": 500}),
}  # fmt: skip
COLUMNS = {
    "bits": ("bits_per_image", ".0f"), "PSNR": ("ours", ".2f"), "block mean": ("peer", ".2f"), "SSIM": ("ssim", ".3f"),
    "codes used": ("codes_used", ".1%"), "perplexity": ("perplexity", ".1f"), "minutes": ("minutes", ".1f"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SETTINGS))
    parser.add_argument("--out", type=Path, default=Path("out/cifar10"))
    arguments = parser.parse_args()
    data = Path(os.environ.get("UNITOK_DATA", "")) / "cifar10_jpg" / "train.parquet"
    if not data.is_file():
        raise SystemExit("set UNITOK_DATA to the folder that holds cifar10_jpg")
    column = pq.read_table(data, columns=["image"])["image"].slice(FIRST).to_pylist()
    pictures = [Image.open(io.BytesIO(cell["bytes"])) for cell in column]
    rows = [{"id": str(FIRST + i), "image": picture} for i, picture in enumerate(pictures)]
    lines = [row(name, arguments.out / name, rows) for name in arguments.names or SETTINGS]
    print(f"{'':10}" + "".join(f"{title:>12}" for title in COLUMNS))
    for line in lines:
        print(f"{line['name'][10:]:10}" + "".join(f"{line[key]:12{form}}" for key, form in COLUMNS.values()))


def row(name: str, out: Path, rows: list[dict]) -> dict:
    recipe, changes = SETTINGS[name]
    if not (out / "unitok.json").is_file():
        changes = {**changes, "out": str(out)}
        if name == "collapsed":
            changes["init_from"] = str(all_equal(out.with_name("all_equal"), recipe, changes))
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        subprocess.run([sys.executable, "-m", "unitok", "train", recipe, *overrides], check=True, stdout=sys.stderr)
    scores = {s.name: s for s in evaluate(load_tokenizer(out), rows, batch_size=100, sheet=out / "scored.png")}
    psnr, flat = scores["psnr"].value, scores["psnr"].baselines["block_mean"]
    used = [s for key, s in scores.items() if key.startswith("codes_used")]
    perplexity = [s for key, s in scores.items() if key.startswith("perplexity")]
    line = {
        "name": f"tokenizer_{name}", "ratio": round(10 ** ((psnr - flat) / 10), 3), "ours": round(psnr, 3),
        "peer": round(flat, 3), "unit": "dB", "runs": 1, "spread": 0.0,
        "bits_per_image": round(scores["bits_per_image"].value, 1), "ssim": round(scores["ssim"].value, 4),
        "codes_used": min(s.value for s in used), "perplexity": min(s.value for s in perplexity),
        "minutes": round(json.loads((out / "training" / "report.json").read_text())["seconds"]["train"] / 60, 1),
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    return line


def all_equal(folder: Path, recipe: str, changes: dict[str, object]) -> Path:
    """The recipe's tokenizer before training, with one vector for all of its codes."""
    plan = load_recipe(recipe, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    tokenizer = build(plan)
    tokenizer.quantize.embedding.weight.data.fill_(0.1)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
