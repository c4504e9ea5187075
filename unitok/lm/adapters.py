"""LoRA on the linear layers of an expanded LM, beside full training of its new rows, in PEFT's own format.

    peft_model = add_adapter(model, vocab, rank=32)
    save_adapter(peft_model, "adapter/", manifest)
    model = merge(load_adapter("adapter/"))

New rows are trained through PEFT's `trainable_token_indices`, at both ends of an untied model and once on a tied one,
which stays tied: text rows cannot move, and the file grows with the rank and the new rows only.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unitok.checkpoint import open_folder, read_json
from unitok.lm.expand import ends, new_rows, open_lm
from unitok.manifest import FILE, Manifest
from unitok.vocab import JointVocab

CONFIG = "adapter_config.json"


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def add_adapter(
    model: PreTrainedModel,
    vocab: JointVocab,
    *,
    rank: int = 32,
    alpha: float = 64,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
    rows: str = "new",
    seed: int = 0,
) -> PeftModel:
    """Wrap `model` for training: LoRA on `targets`, and the rows of the image vocabulary unless rows="none".

    targets: "all-linear" (every linear layer but the output layer), names of modules, or a pattern, as PEFT takes them.
    ValueError where they would take in the embedding or output layer: their text rows would move.
    """
    if rows not in ("new", "none"):
        raise ValueError(f"rows is '{rows}', expected 'new' or 'none'")
    embed, head = ends(model)
    if vocab.rows != embed.weight.shape[0]:
        raise ValueError(
            f"the vocabulary has {vocab.rows} rows but the model has {embed.weight.shape[0]}: expand it first"
        )
    names = {module: name for name, module in model.named_modules()}
    ids = new_rows(vocab)
    trainable = None
    if rows == "new" and ids:
        trained_ends = [embed] if head.weight is embed.weight else [embed, head]
        trainable = {names[end]: ids for end in trained_ends}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number divides by the rank
        lora_dropout=dropout,
        target_modules=targets,
        trainable_token_indices=trainable,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in names),
    )
    taken = [names[end] for end in (embed, head) if check_target_module_exists(config, names[end])]
    if taken:
        raise ValueError(
            f"targets take in {taken[0]}, whose text rows would move: name linear layers inside the blocks"
        )
    with torch.random.fork_rng(
        range(torch.cuda.device_count())
    ):  # LoRA's A matrices are drawn from the global generator
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config)
    trained = {module.base_layer for module in peft_model.modules() if isinstance(module, TrainableTokensLayer)}
    if trainable and not {embed, head} <= trained:
        raise ValueError(
            "only one end got trainable rows: this model ties its weights in a way that peft does not follow"
        )
    _restore_head_bias(peft_model)
    return peft_model


def merge(peft_model: PeftModel) -> PreTrainedModel:
    """The plain model with the adapter in its weights; ValueError where the adapter holds NaN or infinities."""
    model = peft_model.merge_and_unload(safe_merge=True)
    model.tie_weights()
    return model


def save_adapter(
    peft_model: PeftModel, folder: str | Path, manifest: Manifest, *, base: str | Path | None = None
) -> Path:
    """Write PEFT's adapter folder with the model's manifest beside it. base: where `load_adapter` finds the model."""
    folder = Path(folder)
    if base is not None:
        peft_model.peft_config[peft_model.active_adapter].base_model_name_or_path = str(base)
    # The rows are in the adapter: "auto" would add both whole matrices wherever the base on the hub is smaller.
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    manifest.save(folder)
    return folder


def load_adapter(
    folder: str | Path,
    base: PreTrainedModel | str | Path | None = None,
    *,
    trainable: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
) -> PeftModel:
    """Open an adapter folder on its base: the one it names, another folder, or an expanded model in memory.

    ValueError naming the field where the manifests of adapter and base do not fit.
    """
    folder = open_folder(folder)
    if not isinstance(base, PreTrainedModel):
        base_folder = adapter_base(folder, base)
        if (base_folder / FILE).is_file() and (folder / FILE).is_file():
            own = replace(Manifest.load(folder), template=None)  # a recipe may have changed the model's
            own.check(Manifest.load(base_folder), what=("adapter", "model"))
        base = open_lm(base_folder, device=device, dtype=dtype)
    needed = max((max(ids) for ids in _token_indices(folder).values() if ids), default=-1)
    rows = ends(base)[0].weight.shape[0]
    if needed >= rows:
        raise ValueError(
            f"the adapter trains row {needed} but the model has {rows} rows: it was made for another model"
        )
    try:
        peft_model = PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    except RuntimeError as error:  # torch lists every tensor
        raise ValueError(
            f"{folder}: the adapter does not fit this model ({str(error).splitlines()[1].strip()})"
        ) from error
    _restore_head_bias(peft_model)
    return peft_model if trainable else peft_model.eval()


def adapter_base(folder: Path, base: str | Path | None = None) -> Path:
    """The folder of an adapter's model: `base`, else what its config names, as given or beside the adapter."""
    named = base or read_json(Path(folder) / CONFIG).get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{folder}: the adapter does not name its model: say which with base=")
    beside = Path(folder) / str(named)
    return beside if base is None and not Path(named).exists() and beside.is_dir() else open_folder(named)


def _token_indices(folder: Path) -> dict[str, list[int]]:
    found = read_json(folder / CONFIG).get("trainable_token_indices") or {}
    return found if isinstance(found, dict) else {"": found}


def _restore_head_bias(peft_model: PeftModel) -> None:
    """PEFT's row layer drops the bias of a linear layer it wraps; put it back into the forward pass."""
    for module in peft_model.modules():
        if not isinstance(module, TrainableTokensLayer):
            continue
        layer: Any = module.base_layer
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if bias is None:
            continue
        if weight.is_meta:  # no values: it is only counted
            continue
        with torch.no_grad():
            at_zero = module(weight.new_zeros(1, weight.shape[1]))
        if not torch.equal(at_zero[0], bias):
            module.register_forward_hook(_add_bias)


def _add_bias(module: Any, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    # Merged or switched off, the layer calls its base layer, which adds the bias itself.
    dropped = module.active_adapters and not module.disable_adapters and not module.merged
    return output + module.base_layer.bias if dropped else output
