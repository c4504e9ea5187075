"""Seconds until `unitok --help` has been printed, beside `import torch`.

    python benchmarks/startup.py                       half a minute on 2 cores

Each run starts both as new processes, one after the other, so that a busy machine slows both alike; one run of each is
thrown away, which leaves their files in the page cache. `ours` and `peer` are medians over the runs, `ratio` the median
of the ratios of a run, `spread` is (max - min) / median of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

OURS = [sys.executable, "-m", "unitok", "--help"]
PEER = [sys.executable, "-c", "import torch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    pairs = [(seconds(OURS), seconds(PEER)) for _ in range(runs + 1)][1:]
    ours, peer = (statistics.median(times) for times in zip(*pairs, strict=True))
    own = [mine for mine, _ in pairs]
    row = {
        "name": "startup_help",
        "ratio": round(statistics.median(theirs / mine for mine, theirs in pairs), 2),
        "ours": round(ours, 3),
        "peer": round(peer, 3),
        "unit": "s",
        "runs": runs,
        "spread": round((max(own) - min(own)) / ours, 3),
        "note": "peer: import torch",
    }
    print(json.dumps(row))


def seconds(command: list[str]) -> float:
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path})
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
