"""How likely a language model finds ids that are given.

Shapes: B rows, L ids, V rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

BATCH = 128


@torch.no_grad()
def log_likelihood(lm: Any, rows: Sequence[tuple[np.ndarray, np.ndarray]], batch_size: int = BATCH) -> np.ndarray:
    """The sum over the chosen ids of ln p(id | ids before it), in nats -> float64 [rows].

    rows: (ids int [L], which of them count bool [L]); the first id of a row has nothing before it and never counts.
    """
    device = lm.get_input_embeddings().weight.device
    out = np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # little padding
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        longest = max(len(rows[i][0]) for i in some)
        ids = torch.zeros(len(some), longest, dtype=torch.int64)  # what follows a row's end changes nothing before it
        counts = torch.zeros(len(some), longest, dtype=torch.bool)
        for b, i in enumerate(some):
            ids[b, : len(rows[i][0])] = torch.from_numpy(np.asarray(rows[i][0], np.int64))
            counts[b, : len(rows[i][1])] = torch.from_numpy(np.asarray(rows[i][1], bool))
        ids, counts = ids.to(device), counts.to(device)
        logits = lm(input_ids=ids).logits[:, :-1].float()  # [B, L - 1, V]
        found = logits.gather(2, ids[:, 1:, None]).squeeze(2) - logits.logsumexp(2)  # [B, L - 1]
        out[some] = torch.where(counts[:, 1:], found, 0.0).double().sum(1).cpu().numpy()
    return out
