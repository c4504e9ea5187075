"""Seconds to add codes to a language model, beside the default of transformers.

    python benchmarks/expand.py                        about a minute on 2 cores
    python benchmarks/expand.py --peer-codes 65536     the peer at full size too: several minutes more

A GPT-2 of 12 layers, width 768 and 50,257 tied rows, random weights; loading and saving are not timed. Ours is `expand`
with all its checks and the fingerprint of the base; the peer is `resize_token_embeddings(rows)`, whose default
(mean_resizing=True) draws each new row from a multivariate normal. Its time grows with the number of codes, so it is
timed on fewer. Two rows: both sides at --peer-codes; ours at --codes against the peer at --peer-codes, which
understates the ratio.
`ours` and `peer` are medians; `spread` is (max - min) / median of ours.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # see tokenizers.py

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from unitok.lm.expand import expand, weight_fingerprint

GRID = (16, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=65_536)
    parser.add_argument("--peer-codes", type=int, default=4_096)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer-runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    rows = model.config.vocab_size

    def ours(codes: int) -> Callable:
        section = {"codebook_sizes": [codes], "grid": GRID, "vocabulary": "codes"}
        return lambda lm: (weight_fingerprint(lm), expand(lm, None, None, "images", section))

    peer = seconds(lambda lm: lm.resize_token_embeddings(rows + arguments.peer_codes), model, arguments.peer_runs)
    for codes in dict.fromkeys((arguments.peer_codes, arguments.codes)):
        report(codes, arguments.peer_codes, seconds(ours(codes), model, arguments.runs), peer)


def seconds(work: Callable, model: GPT2LMHeadModel, runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        lm = copy.deepcopy(model)
        start = time.perf_counter()
        work(lm)
        times.append(time.perf_counter() - start)
    return times


def report(codes: int, peer_codes: int, ours: list[float], peer: list[float]) -> None:
    mine, theirs = statistics.median(ours), statistics.median(peer)
    row = {
        "name": f"expand_{codes}_codes",
        "ratio": round(theirs / mine, 2),
        "ours": round(mine, 3),
        "peer": round(theirs, 3),
        "unit": "s",
        "runs": len(ours),
        "spread": round((max(ours) - min(ours)) / mine, 3),
        "note": f"peer: resize_token_embeddings, mean_resizing=True, {peer_codes} codes, {len(peer)} runs",
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
