"""Attention of packed rows document by document, for CPUs.

Under one mask a row of T ids costs T x T whatever it holds. Cut where its documents end, it costs the sum of their
squares and mostly needs no mask: five documents of 100 ids cost a fifth, and a tenth where the kernel skips what comes
later. The computing itself stays with transformers' own `sdpa` attention, which is called once a document. On a GPU one
masked call is faster than many small ones.

Shapes: B rows, T ids a row, H heads, D head size, L ids of a document.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from unitok.data.packing import PackedBatch, additive, near, seen
from unitok.lm.expand import unwrapped

NAME = "unitok_documents"
SLIDING = "sliding_attention"  # transformers' name of a layer with a window


class Cuts(NamedTuple):
    """Where the documents of flattened rows lie."""

    lengths: list[int]  # of all documents of the batch, in order; padding is one too
    positions: list[Tensor]  # [L], of the ids of each
    masks: list[Tensor | None]  # [1, 1, L, L] of a document with branches, to add to scores; None: causal


_cuts: Cuts | None = None  # of the batch that is being computed; attention has no other way to hear of it


def use(model: Any) -> bool:
    """Have a model compute packed rows under `documents`; False, and nothing changed, where it cannot or should not.

    Everything else it computes as before.
    """
    base = unwrapped(model)
    if base.config._attn_implementation != "sdpa" or base.get_input_embeddings().weight.device.type != "cpu":
        return False
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    base.set_attn_implementation(NAME)
    return bool(base.config._attn_implementation == NAME)


def windows(model: Any) -> dict[str, int | None]:
    """How many ids the layers of a model see, None: all; by their kind as transformers names it, "" where it is one."""
    config = unwrapped(model).config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [SLIDING])
    if window is None or SLIDING not in kinds:
        return {"": None}
    return {kind: window if kind == SLIDING else None for kind in kinds} if len(kinds) > 1 else {"": window}


@contextlib.contextmanager
def documents(batch: PackedBatch) -> Iterator[None]:
    """A model made ready by `use` takes `batch.inputs(masked=False)`; its forward and backward lie inside."""
    global _cuts
    _cuts = cut(batch)
    try:
        yield
    finally:
        _cuts = None


def cut(batch: PackedBatch) -> Cuts:
    document = batch.document
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    begins = torch.nonzero(starts.flatten()).flatten().tolist()
    lengths = [end - begin for begin, end in zip(begins, [*begins[1:], document.numel()], strict=True)]
    positions, branches = (column.flatten().split(lengths) for column in (batch.positions, batch.branch))
    masks = [additive(seen(branch))[None, None] if branch.any() else None for branch in branches]
    return Cuts(lengths, list(positions), masks)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **kwargs) if _cuts is None else None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query, key, value [B, H, T, D] -> [B, T, H, D]."""
    if _cuts is None or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = [x.transpose(1, 2).flatten(0, 1).split(_cuts.lengths) for x in (query, key, value)]  # [L, H, D] each
    window = kwargs.get("sliding_window")
    out = []
    for mask, positions, *parts in zip(_cuts.masks, _cuts.positions, *rows, strict=True):
        q, k, v = (part.transpose(0, 1)[None] for part in parts)  # [1, H, L, D]
        if window is not None and len(positions) > window:
            mask = _within(window, positions, mask)
        given = None if mask is None else mask.to(q.dtype)
        out.append(sdpa_attention_forward(module, q, k, v, given, **kwargs)[0][0])  # [L, H, D]
    return torch.cat(out).unflatten(0, (query.shape[0], query.shape[2])), None


def _within(window: int, positions: Tensor, mask: Tensor | None) -> Tensor:
    """The mask of a document of which an id sees itself and window - 1 before it."""
    if mask is None:
        mask = additive(seen(torch.zeros_like(positions)))[None, None]
    return torch.minimum(mask, additive(near(positions, window)))
