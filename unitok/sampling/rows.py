"""The rows of one batched forward over any Hugging Face causal LM, with their keys and values.

Rows are right-aligned in one buffer, so a row's ids are contiguous: padding stands only on the left, hidden by the
attention mask, and positions count from each row's own first id. That is what one row alone would see, also for models
with sliding windows. Rows can be added in the middle of generation (a guidance branch that starts at its image) and
dropped.

R rows, W new ids, T columns, H key-value heads, D head size, E hidden size, K ids of a kind.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64  # columns allocated ahead


class GrowingLayer(DynamicLayer):
    """Keys and values in a buffer with room ahead: a step writes one column, where the stock layer copies all of them.

    Sliding layers keep all columns too, the model's mask hides the old ones: then rows can be realigned at will.
    """

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if not self.is_initialized or new > self._buffers[0].shape[-2]:
            held = self._held()
            self._set(_room(held[0], old, key_states), _room(held[1], old, value_states), old)
        keys, values = self._buffers
        keys[:, :, old:new], values[:, :, old:new] = key_states, value_states
        self._set(keys, values, new)
        return self.keys, self.values

    def select(self, index: torch.Tensor) -> None:
        """Keep the rows `index`, in its order; an index may repeat."""
        if self.is_initialized:
            keys, values = (x.index_select(0, index) for x in self._held())
            self._set(keys, values, self.get_seq_length())

    def append(self, added: int, columns: int, other: GrowingLayer, source: torch.Tensor, place: torch.Tensor) -> None:
        """Add `added` rows and right-align all at `columns`; the new row place[i] is the row source[i] of `other`."""
        held = []
        for mine, theirs in zip(self._held(), other._held(), strict=True):
            like = theirs if mine is None else mine
            if like is None:  # nothing anywhere yet
                return
            rows = 0 if mine is None else len(mine)
            out = like.new_zeros(rows + added, like.shape[1], columns, like.shape[3])
            if mine is not None:
                out[:rows, :, columns - mine.shape[2] :] = mine
            if theirs is not None:
                out[rows + place, :, columns - theirs.shape[2] :] = theirs[source]
            held.append(out)
        self._set(held[0], held[1], columns)

    def _held(self) -> tuple:
        return (self.keys, self.values) if self.is_initialized else (None, None)

    def _set(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        self._buffers = keys, values
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True


def _room(held: torch.Tensor | None, old: int, new: torch.Tensor) -> torch.Tensor:
    out = new.new_empty(*new.shape[:2], old + new.shape[2] + ROOM, new.shape[3])
    if held is not None:
        out[:, :, :old] = held
    return out


class Rows:
    """R rows fed together, starting with none."""

    def __init__(self, lm: Any, kinds: Sequence[np.ndarray]):
        """`kinds`: the ids of each kind of logits that will be asked for; kind 0 is text, and the largest."""
        self.lm = lm
        self.model = lm.get_base_model() if hasattr(lm, "get_base_model") else lm  # inside a PEFT wrapper
        self.device = self.model.get_input_embeddings().weight.device
        self.cache = new_cache(self.model.config)
        self.columns = 0
        self.start = np.zeros(0, np.int64)  # [R] the column of each row's first id
        accepts = inspect.signature(self.model.base_model.forward).parameters
        self._cache_name = "cache" if "cache" in accepts else "past_key_values"  # renamed in transformers 5.24
        self._positions = "position_ids" in accepts  # not where attention alone places the ids (ALiBi)
        self._last_only = {}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            self._last_only = {"logits_to_keep": 1}
        self._kinds = [_columns(ids, self.device) for ids in kinds]
        self.head = self._plain_head()
        self._weights: dict[int, tuple] = {}

    def __len__(self) -> int:
        return len(self.start)

    def add(self, prefixes: Sequence[Sequence[int]]) -> None:
        """Append a row for each prefix (it may be empty). Equal prefixes are computed once."""
        unique = {p: i for i, p in enumerate(dict.fromkeys(tuple(p) for p in prefixes if len(p)))}
        cache, width = new_cache(self.model.config), max(map(len, unique), default=0)
        if unique:
            starts = np.array([width - len(p) for p in unique])
            ids = np.zeros((len(unique), width), np.int64)
            for row, prefix in enumerate(unique):
                ids[row, starts[row] :] = prefix
            self._forward(ids, cache, starts, 0)
        columns = max(self.columns, width)
        kept = [(unique[tuple(p)], i) for i, p in enumerate(prefixes) if len(p)]
        source, place = torch.tensor(kept, dtype=torch.int64, device=self.device).reshape(-1, 2).unbind(1)
        for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
            if isinstance(mine, GrowingLayer) and isinstance(theirs, GrowingLayer):
                mine.append(len(prefixes), columns, theirs, source, place)
        new = [columns - len(p) for p in prefixes]
        self.start = np.concatenate([self.start + columns - self.columns, np.array(new, np.int64)])
        self.columns = columns

    def keep(self, index: np.ndarray) -> None:
        """Drop all rows but `index`."""
        self.start = self.start[index]
        rows = torch.from_numpy(index).to(self.device)
        for layer in self.cache.layers:
            if isinstance(layer, GrowingLayer):
                layer.select(rows)

    def feed(self, ids: np.ndarray) -> torch.Tensor:
        """Feed int64 [R, W]; returns what `logits` takes, [R, E or K]: the last hidden state, or all logits."""
        out = self._forward(ids, self.cache, self.start, self.columns)
        self.columns += ids.shape[1]
        return out

    def logits(self, last: torch.Tensor, kind: int) -> torch.Tensor:
        """Logits of the ids of a kind, float32 [n, K], from rows of what `feed` returned."""
        columns = self._kinds[kind]
        if self.head is None:
            return _take(last, columns, dim=1).float()
        if kind == 0:  # most of the head: multiply by all of it
            return _take(F.linear(last, self.head.weight, self.head.bias), columns, dim=1).float()
        if kind not in self._weights:
            bias = self.head.bias
            self._weights[kind] = _take(self.head.weight, columns, 0), None if bias is None else _take(bias, columns, 0)
        return F.linear(last, *self._weights[kind]).float()

    def _forward(self, ids: np.ndarray, cache: DynamicCache, start: np.ndarray, columns: int) -> torch.Tensor:
        fed = torch.from_numpy(ids).to(self.device)
        kwargs: dict[str, Any] = {self._cache_name: cache, "use_cache": True}
        first = torch.from_numpy(start).to(self.device)[:, None]
        column = torch.arange(columns + fed.shape[1], device=self.device)
        if start.any():
            kwargs["attention_mask"] = (column >= first).long()  # [R, T]
        if self._positions:
            kwargs["position_ids"] = (column[columns:] - first).clamp_(min=0)  # [R, W]
        if self.head is None:
            return self.lm(input_ids=fed, **kwargs, **self._last_only).logits[:, -1]
        return self.model.base_model(input_ids=fed, **kwargs).last_hidden_state[:, -1]

    def _plain_head(self) -> nn.Linear | None:
        """The output head where the logits are just this linear map of the last hidden state, else None.

        Wrapped heads (adapters, quantisation), soft-capped and scaled logits are not: there the whole model is asked.
        """
        model, head = self.model, self.model.get_output_embeddings()
        hooked = type(head) is nn.Linear and (head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
        if type(head) is not nn.Linear or hooked or model.base_model is model:
            return None
        if getattr(model.config.get_text_config(), "final_logit_softcapping", None):
            return None  # named, for on small logits the probe might not see it
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        same = torch.equal(self.lm(input_ids=ids, use_cache=False).logits, F.linear(hidden, head.weight, head.bias))
        return head if same else None


def new_cache(config) -> DynamicCache:
    """An empty cache whose attention layers all grow in place."""
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            cache.layers[i] = GrowingLayer()
        elif type(layer).__name__ != "DummyLayer":  # a layer that keeps nothing
            raise ValueError(
                f"cannot sample from {config.model_type!r}: its {type(layer).__name__} keeps more than keys and "
                "values; use an attention-only model"
            )
    return cache


def _columns(ids: np.ndarray, device: torch.device) -> slice | torch.Tensor:
    """A slice where the ids are consecutive, so that taking them is a view."""
    if len(ids) and (np.diff(ids) == 1).all():
        return slice(int(ids[0]), int(ids[-1]) + 1)
    return torch.from_numpy(ids).to(device)


def _take(x: torch.Tensor, columns: slice | torch.Tensor, dim: int) -> torch.Tensor:
    if isinstance(columns, slice):
        return x.narrow(dim, columns.start, columns.stop - columns.start)
    return x.index_select(dim, columns)
