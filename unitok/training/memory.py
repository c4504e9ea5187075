"""The memory that training takes, roughly, before it is begun: weights, gradients, optimizer, activations.

A language model is built without values (on torch's meta device), wrapped as for training, and run once forward, so
that its parameters are counted exactly and no weights are read.
Shapes: B rows a batch, T ids a row, K positions that carry loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unitok.config import LanguageModelRecipe, TokenizerRecipe
from unitok.lm.adapters import add_adapter
from unitok.lm.expand import lm_without_values
from unitok.tokenizers.base import ImageTokenizer
from unitok.training.language_model import ChosenPositions, checkpoint_activations
from unitok.training.launch import Processes
from unitok.vocab import JointVocab


def lm_memory(recipe: LanguageModelRecipe, folder: Path, vocab: JointVocab | None, chosen: int) -> dict[str, int]:
    """Parameters and bytes that training takes in one process; activations by a forward pass without values.

    chosen: K, positions of a batch that carry loss.
    """
    half, frozen = Processes.half(recipe.dtype), recipe.method == "lora"
    lm: Any = lm_without_values(folder, torch.bfloat16 if half else torch.float32)
    if recipe.gradient_checkpointing:
        checkpoint_activations(lm)
        lm.enable_input_require_grads()
    if frozen:
        vocab = vocab or JointVocab(text_rows=lm.get_input_embeddings().weight.shape[0])
        with torch.device("meta"):
            lm = add_adapter(lm, vocab, **recipe.lora.model_dump())
    only = ChosenPositions(lm)

    def forward() -> torch.Tensor:
        ids, positions = torch.zeros(2, recipe.batch_size, recipe.length, dtype=torch.int64)  # [B, T] each
        labels = torch.zeros(chosen, dtype=torch.int64)
        with only(labels):
            out = lm.train()(input_ids=ids, position_ids=positions, use_cache=False)
        return nn.functional.cross_entropy(out.logits[0].float(), labels)

    bytes_each = 4 if half and not frozen else None  # full training keeps float32 weights beside half activations
    return _memory([lm], _kept_bytes(forward, lm), bytes_each)


def tokenizer_memory(recipe: TokenizerRecipe, tokenizer: ImageTokenizer, images: torch.Tensor) -> dict[str, int]:
    """The same for a tokenizer and its critic; activations by the loss of a few pictures, float [n, 3, H, W]."""
    critic: Any = tokenizer.critic()
    modules = [tokenizer] if critic is None else [tokenizer, critic]
    batch = {"images": images}

    def forward() -> torch.Tensor:
        loss, _ = tokenizer.train().loss(batch, 0, recipe.stage)
        return loss if critic is None else loss + critic.train().loss(batch, 0)[0]

    kept = _kept_bytes(forward, *modules)
    scaled = None if kept is None else kept * recipe.batch_size // len(images)
    return _memory(modules, scaled)


def _memory(modules: Sequence[nn.Module], activations: int | None, bytes_each: int | None = None) -> dict[str, int]:
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    found = {
        "parameters": sum(p.numel() for p in parameters),
        "trained": trained,
        "weights_bytes": sum(p.numel() * (bytes_each or p.element_size()) for p in parameters),
        "gradients_bytes": 4 * trained,
        "optimizer_bytes": 8 * trained,  # Adam: two float32 moments
    }
    return found if activations is None else {**found, "activations_bytes": activations}


def _kept_bytes(forward: Callable[[], torch.Tensor], *modules: nn.Module) -> int | None:
    """Bytes that autograd keeps of a forward pass, each storage once, parameters aside. None where it cannot be had."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no later storage takes its place
        return tensor

    try:
        with _values_made_up(modules), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward()
            own = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
    except Exception:  # a model may do what cannot be done without values, a stage may need texts
        return None
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


@contextmanager
def _values_made_up(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules of the meta device run as if on the CPU, by torch's fake tensors: kernels of meta keep other things."""
    if not any(p.is_meta for module in modules for p in module.parameters()):
        yield
        return
    from torch._subclasses.fake_tensor import FakeTensorMode  # not public

    made: dict[int, torch.Tensor] = {}  # tied stays tied
    with FakeTensorMode():
        parts = [part for module in modules for part in module.modules()]
        tables: list[dict[str, Any]] = [t for part in parts for t in (part._parameters, part._buffers)]
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in made:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                    trained = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if trained else fake
                table[name] = None if tensor is None else made[id(tensor)]
        yield
