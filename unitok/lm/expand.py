"""Give any Hugging Face causal LM the rows an image tokenizer needs.

    vocab = expand(model, text_tokenizer, None, "scenes", image_tokenizer)        # in place
    expand_folder("llm/", "image_tokenizer/", "model/")                           # from folder to folder

Codes become plain embedding rows behind the base's own, so ids are arithmetic and the text tokenizer is not touched.
Nothing here knows a model family: only `get_input_embeddings`, `get_output_embeddings` and, for models that need more
than those two matrices, their own `resize_token_embeddings`. Old rows keep their exact values, and with them the hidden
states and the logits of old ids (a larger matrix product may sum a float32 logit in another order: 1e-7).

New rows start at the mean of the base's text rows plus noise of their standard deviation per dimension. (The default of
`resize_token_embeddings` leaves all new rows within 1e-4 of that mean: nearly one token, and minutes to compute.)

Shapes: V rows, H hidden size, D width of a codebook vector.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from unitok.checkpoint import config_hash, open_folder, read_json, state_hash
from unitok.lm.text import copy_text_tokenizer, load_text_tokenizer, text_tokenizer_hash
from unitok.manifest import FILE, Manifest
from unitok.vocab import LAYOUT, JointVocab

LAYOUTS = {"codes": LAYOUT, "rows": ("begin", "size", "rows", "end")}  # `expand --layout`; rows: grids may vary
BLOCK = 1024  # rows drawn from one generator: the draws do not depend on the number of threads
PROBE_LENGTH = 3
FINGERPRINT_VALUES = 1024  # per tensor
NOT_CONFIG = ("_name_or_path", "transformers_version")  # change without the model changing


def expand(
    model: PreTrainedModel,
    text_tokenizer: PreTrainedTokenizerBase | None,
    vocab: JointVocab | None,
    name: str,
    tokenizer,
    *,
    seed: int = 0,
    layout: Sequence[str] = LAYOUT,
    init: str = "noise",
    codebook_vectors: Sequence[Tensor] | None = None,
) -> JointVocab:
    """Add the rows of image tokenizer `name` to `model`, in place, and return the joint vocabulary.

    vocab: None for a base as published, the model's own vocabulary where it was expanded before.
    tokenizer: an image tokenizer, or its section of a manifest. One that speaks in words needs no rows and adds none.
    layout: the block that stands for an image; grids that vary need one with "size" or "rows" (see `vocab.py`).
    init: "noise", or "codebook" with `codebook_vectors`, one float [size, D] per codebook: a random projection of
    them, so that codes near each other in the codebook start near each other here.
    ValueError: not a causal model, a name in use, a vocabulary or text tokenizer that does not fit the model's rows.
    """
    check_causal(model)
    rows = ends(model)[0].weight.shape[0]  # padding rows of the base included
    if vocab is None:
        vocab = JointVocab(text_rows=rows, images={})
    if vocab.rows != rows:
        raise ValueError(f"the vocabulary has {vocab.rows} rows but the model has {rows}: they do not belong together")
    text_rows = vocab.text_rows
    if text_tokenizer is not None:
        needed = max(text_tokenizer.get_vocab().values()) + 1
        if needed > rows:
            raise ValueError(
                f"the text tokenizer has ids up to {needed - 1} but the model only {rows} rows: "
                "resize the base to its tokenizer first"
            )
        text_rows = min(needed, text_rows)  # rows beyond were never trained and say nothing about the others

    sizes, grid, token_codebook = _describe(tokenizer)
    if not sizes:
        return vocab
    vectors = _check_vectors(init, codebook_vectors, sizes)
    grown = vocab.add(name, sizes, grid, token_codebook=token_codebook, layout=layout)
    with torch.no_grad(), _one_thread() as threads:
        _resize(model, grown.rows)
        embed, head = ends(model)
        for end, module in {"input": embed, "output": head}.items():
            if end == "output" and head.weight is embed.weight:
                break
            mean, std = _statistics(module.weight[:text_rows])
            _fill_noise(module.weight, rows, mean, std, f"{seed}:{end}", threads)
            for book, v in zip(grown.images[name].codebooks, vectors, strict=False):
                _fill_projected(module.weight, book.ids, v, mean, std, f"{seed}:{end}:codebook")
        if getattr(head, "bias", None) is not None:
            head.bias[rows:] = head.bias[:text_rows].float().mean()
    return grown


def ends(model: PreTrainedModel) -> tuple[Any, Any]:
    """Input embedding and output head; transformers types them as any module."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT one; itself where it is in none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def new_rows(vocab: JointVocab, name: str | None = None) -> list[int]:
    """Sorted ids of the rows that expansion added (controls, spares, codes); of one tokenizer where `name` is given."""
    ids: set[int] = set()
    for image in [vocab.images[vocab.resolve(name)]] if name else vocab.images.values():
        ids.update(image.control.values())
        for book in image.codebooks:
            ids.update(book.ids)
    return sorted(row for row in ids if row >= vocab.text_rows)  # published models may keep codes among the base's rows


def expand_folder(
    llm: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    name: str | None = None,
    seed: int = 0,
    *,
    template: dict | None = None,
    layout: Sequence[str] = LAYOUT,
    init: str = "noise",
    codebook_vectors: Sequence[Tensor] | None = None,
    detokenizer: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a model folder: the LLM with new rows, its text tokenizer, the image tokenizer, and the manifest.

    llm: any causal LM, or a model folder, which is then expanded by one more image tokenizer.
    tokenizer: a tokenizer folder. name: what the model calls it; by default the name in its manifest.
    template: how documents become text around images, kept in the manifest; by default the model folder's own.
    detokenizer: the folder of one that draws this tokenizer's codes.
    """
    out = empty_folder(out)
    llm_folder, tokenizer_folder = open_folder(llm), open_folder(tokenizer)
    own_name, section, licences = _tokenizer_section(tokenizer_folder)
    name = name or own_name.split(":")[-1]  # a class outside the registry is named module:Class
    manifest = Manifest.load(llm_folder) if (llm_folder / FILE).is_file() else Manifest()
    if name in manifest.tokenizers:
        raise ValueError(f"{llm} already has an image tokenizer '{name}': give this one another --name")
    painter = manifest.detokenizer
    if detokenizer is not None:
        if painter is not None:
            raise ValueError(f"{llm} already has a detokenizer, and a model folder holds one: expand its base instead")
        painter = {**(Manifest.load(open_folder(detokenizer)).detokenizer or {}), "tokenizer": name}

    model = open_lm(llm_folder, trust_remote_code=trust_remote_code)
    text_tokenizer = load_text_tokenizer(llm_folder, trust_remote_code=trust_remote_code)
    base = manifest.base or {
        "id": str(llm),
        "config_hash": base_config_hash(llm_folder),
        "weight_hash": weight_fingerprint(model),
    }
    vocab = JointVocab.from_dict(manifest.vocab) if manifest.vocab else None
    vocab = expand(
        model,
        text_tokenizer,
        vocab,
        name,
        section,
        seed=seed,
        layout=layout,
        init=init,
        codebook_vectors=codebook_vectors,
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    copy_text_tokenizer(text_tokenizer, llm_folder, out)
    copy_image_parts(llm_folder, out)
    copy_folder(tokenizer_folder, out / "image_tokenizers" / name)
    if detokenizer is not None:
        copy_folder(open_folder(detokenizer), out / "detokenizer")
    replace(
        manifest,
        detokenizer=painter,
        tokenizers={**manifest.tokenizers, name: section},
        vocab=vocab.to_dict(),
        base=base,
        text_tokenizer=manifest.text_tokenizer or {"id": str(llm), "hash": text_tokenizer_hash(text_tokenizer)},
        template=template or manifest.template,
        licences=list(dict.fromkeys([*manifest.licences, *licences])),
    ).save(out)  # last: a folder with a manifest is whole
    return out


def open_lm(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal LM in a folder, in eval mode and, unless told otherwise, the checkpoint's own dtype."""
    folder = open_folder(folder)
    config = open_config(folder, trust_remote_code=trust_remote_code)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype or "auto", trust_remote_code=trust_remote_code, output_loading_info=True
    )
    model, report = loaded
    lacking = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lacking:  # transformers would go on with random weights
        raise ValueError(
            f"{folder}: its weights lack {lacking[0]} and {len(lacking) - 1} more of {type(model).__name__}"
        )
    return model.to(device).eval()


def open_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of the causal LM in a folder; ValueError where it is none."""
    if not (folder / "config.json").is_file():
        hint = ": it is an adapter, export it first" if (folder / "adapter_config.json").is_file() else ""
        raise FileNotFoundError(f"{folder}: no config.json, so no language model{hint}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{folder}: transformers cannot read its config.json ({reason})") from error
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if getattr(config, "is_encoder_decoder", False) or not (remote or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise ValueError(_not_causal(config))
    return config


def lm_without_values(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal LM of a folder on the meta device: its modules and shapes, nothing of its weights is read."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(open_config(folder), dtype=dtype)


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """ValueError unless the model predicts over its own rows and no position sees a later one."""
    embed, head = ends(model)
    if getattr(model.config, "is_encoder_decoder", False) or embed is None or head is None:
        raise ValueError(_not_causal(model.config))
    rows = embed.weight.shape[0]
    if head.weight.shape[0] != rows:
        raise ValueError(
            f"the base reads {rows} ids but predicts {head.weight.shape[0]}: "
            "only models of one vocabulary can be expanded"
        )
    ids = torch.zeros(2, PROBE_LENGTH, dtype=torch.long, device=embed.weight.device)
    ids[1, 1:] = rows - 1
    training = model.training
    with _one_thread():
        first, second = model.eval().base_model(input_ids=ids)[0][:, 0].float()  # each [H], after the first position
    model.train(training)
    tolerance = 1e-3 if embed.weight.dtype == torch.float32 else 5e-2  # expert routing rounds differently
    if (first - second).abs().max() > tolerance * first.std():
        raise ValueError(_not_causal(model.config))


def base_config_hash(folder: Path) -> str:
    """Hex hash of a checkpoint's config.json without what may change while the model does not."""
    config = read_json(Path(folder) / "config.json")
    return config_hash({key: value for key, value in config.items() if key not in NOT_CONFIG})


def weight_fingerprint(model: nn.Module) -> str:
    """Hex hash of the first values of every parameter: tells bases apart without reading gigabytes."""
    return state_hash({name: p.detach().flatten()[:FINGERPRINT_VALUES].cpu() for name, p in model.named_parameters()})


def empty_folder(out: str | Path) -> Path:
    """`out`, which nothing is in yet; ValueError otherwise."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: choose another --out or remove it")
    return out


def copy_image_parts(source: Path, out: Path) -> None:
    """Carry the image tokenizers and the detokenizer of a model folder over."""
    for kept in ("image_tokenizers", "detokenizer"):
        if (source / kept).is_dir():
            shutil.copytree(source / kept, out / kept, dirs_exist_ok=True)


def copy_folder(source: Path, out: Path) -> None:
    """Copy a tokenizer or detokenizer folder: its files and `assets/`, without training checkpoints and samples."""
    source, out = Path(source), Path(out)

    def other_folders(folder: str, names: list[str]) -> list[str]:
        at_root = Path(folder) == source
        return [n for n in names if at_root and n != "assets" and (source / n).is_dir()]

    shutil.copytree(source, out, ignore=other_folders)


def _not_causal(config: PretrainedConfig) -> str:
    kind = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    return f"{kind} ({config.model_type}) is not a causal language model: choose a base that AutoModelForCausalLM loads"


def _tokenizer_section(folder: Path) -> tuple[str, dict, list[str]]:
    manifest = Manifest.load(folder)
    if len(manifest.tokenizers) != 1:
        raise ValueError(
            f"{folder}: expected the folder of one image tokenizer, its {FILE} names {len(manifest.tokenizers)}"
        )
    [(name, section)] = manifest.tokenizers.items()
    return name, section, list(manifest.licences)


def _describe(tokenizer) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
    """(codebook sizes, grid, codebook of each token or None) of a tokenizer or a manifest section."""
    if isinstance(tokenizer, Mapping):
        words, sizes, grid = tokenizer.get("vocabulary"), tokenizer["codebook_sizes"], tokenizer["grid"]
        books = tokenizer.get("token_codebook")
    else:
        words, sizes, grid = tokenizer.vocabulary, tokenizer.codebook_sizes, tokenizer.grid()
        books = tokenizer.token_codebook() if len(sizes) > 1 else None
    if words == "text":
        return (), (), None
    return tuple(sizes), tuple(grid), None if books is None else tuple(int(b) for b in books)


def _check_vectors(init: str, vectors: Sequence[Tensor] | None, sizes: tuple[int, ...]) -> list[Tensor]:
    if init not in ("noise", "codebook"):
        raise ValueError(f"init is '{init}', expected 'noise' or 'codebook'")
    if init == "noise":
        return []
    if vectors is None or [v.ndim == 2 and v.shape[0] for v in vectors] != list(sizes):
        found = None if vectors is None else [tuple(v.shape) for v in vectors]
        raise ValueError(f"init='codebook' needs codebook_vectors, one [size, D] per codebook of {sizes}, got {found}")
    return list(vectors)


def _resize(model: PreTrainedModel, rows: int) -> None:
    """Make room for `rows` rows at both ends; the values of the new ones are undefined."""
    embed, head = ends(model)
    stock = all(
        getattr(type(model), method) is getattr(PreTrainedModel, method)
        for method in ("resize_token_embeddings", "_resize_token_embeddings")
    )
    if not (stock and isinstance(embed, nn.Embedding) and isinstance(head, nn.Linear)):
        model.resize_token_embeddings(rows, mean_resizing=False)
        return
    # The same, without drawing two whole random matrices first.
    tied = head.weight is embed.weight
    embed.weight = _grown(embed.weight, rows)
    embed.num_embeddings = rows
    head.weight = embed.weight if tied else _grown(head.weight, rows)
    head.out_features = rows
    if head.bias is not None:
        head.bias = _grown(head.bias, rows)
    model.config.get_text_config().vocab_size = rows
    model.vocab_size = rows
    model.tie_weights()


@contextmanager
def _one_thread() -> Iterator[int]:
    """Yields the number of threads torch had, and leaves it one: on a busy machine its threads wait for each other for
    longer than this work takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _grown(old: Tensor, rows: int) -> nn.Parameter:
    grown = old.new_empty(rows, *old.shape[1:])
    grown[: old.shape[0]] = old
    return nn.Parameter(grown, requires_grad=old.requires_grad)


def _statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per dimension, float32 [H] each."""
    mean = rows.mean(0, dtype=torch.float32)
    square = sum((block - mean).square_().sum(0) for block in rows.split(BLOCK))  # float32: bfloat16 - float32
    return mean, (square / rows.shape[0]).sqrt()


def _fill_noise(weight: Tensor, start: int, mean: Tensor, std: Tensor, seed: str, threads: int) -> None:
    weight = weight.detach()  # grad mode belongs to the thread

    def fill(block: int) -> None:
        rows = weight[block : block + BLOCK]  # [<= BLOCK, H]
        draws = torch.empty(rows.shape).normal_(generator=_generator(f"{seed}:{block - start}"))
        rows.copy_(draws.to(std.device).mul_(std).add_(mean))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, range(start, weight.shape[0], BLOCK)))


def _fill_projected(weight: Tensor, ids: Sequence[int], vectors: Tensor, mean: Tensor, std: Tensor, seed: str) -> None:
    vectors = vectors.detach().float().cpu()
    spread = vectors.std(0, correction=0)
    vectors = (vectors - vectors.mean(0)) / spread.where(spread > 0, 1)  # [size, D], unit variance
    projection = torch.empty(vectors.shape[1], weight.shape[1]).normal_(generator=_generator(seed))  # [D, H]
    rows = vectors @ (projection / projection.norm(dim=0))  # unit variance where the D dimensions are uncorrelated
    rows = rows / rows.std(0, correction=0).clamp_min(1e-6)
    weight[torch.as_tensor(ids, device=weight.device)] = (rows.to(std.device) * std + mean).to(weight.dtype)


def _generator(seed: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1)
