"""Recipes: YAML files that a verb runs, as pydantic models. An unknown key is an error that names it.

`load_recipe("tokenizers/fsq.yaml", ["steps=100", "data.0.path=pictures"])`. Relative paths are relative to the current
folder; `${UNITOK_DATA}` is the one variable that is expanded.
"""

from __future__ import annotations

import difflib
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

VARIABLE = "UNITOK_DATA"

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Schedule = Literal["linear", "cosine", "constant"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


# --- parts of recipes -----------------------------------------------------------------------------------------------


class DataSource(Section):
    path: str
    columns: dict[str, str] = {}  # our name -> the file's
    weight: float = Field(1.0, gt=0)
    limit: Count | None = None


class ShardSource(Section):
    shards: str
    weight: float = Field(1.0, gt=0)
    flip: Fraction = 0.0  # share of documents whose caption and image change places
    caption_drop: Fraction = 0.0  # share of captions replaced by the template's null prompt
    loss: Literal["default", "all"] = "default"
    share_prefix: bool = False  # neighbouring documents that begin with the same pictures share them

    @model_validator(mode="after")
    def _one_form(self) -> ShardSource:
        if self.share_prefix and (self.flip or self.caption_drop):
            raise ValueError("share_prefix goes with neither flip nor caption_drop")
        return self


class TokenizerArguments(BaseModel):
    """The registry name or `module:Class`, and the class's own arguments."""

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Distill(Section):
    """Progressive distillation: at every halving the student becomes the teacher."""

    teacher: str  # a saved detokenizer
    start: Count = 64  # steps the teacher takes
    stop: Count = 8  # steps the last student takes

    @model_validator(mode="after")
    def _halves(self) -> Distill:
        if 2**self.halvings * self.stop != self.start or self.start == self.stop:
            raise ValueError(f"start must be stop times 2, 4, 8 ...; got {self.start} and {self.stop}")
        return self

    @property
    def halvings(self) -> int:
        return (self.start // self.stop).bit_length() - 1


class Lora(Section):
    rank: Count = 32
    alpha: float = Field(64, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"
    rows: Literal["new", "none"] = "new"  # train the rows of codes and controls


class SampleQuestion(Section):
    question: str
    image: str | None = None  # a picture file; a question without one is asked without one


def _as_questions(value: Any) -> Any:
    return (
        [{"question": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
    )


class Samples(Section):
    """What a language model draws and answers while it trains; looked at in TensorBoard, scored nowhere."""

    prompts: list[str] = []
    questions: Annotated[list[SampleQuestion], BeforeValidator(_as_questions)] = []
    tokenizer: str | None = None  # which image tokenizer, where the model has several
    guidance: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, ge=0)


def _as_list(value: Any) -> Any:
    """`data: folder` is short for `data: [{path: folder}]`."""
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


DataSources = Annotated[list[DataSource], BeforeValidator(_as_list)]


# --- recipes --------------------------------------------------------------------------------------------------------


class PicturesRecipe(Section):
    """What every engine that trains on pictures takes (training/run.py)."""

    data: DataSources = Field(min_length=1)
    out: str
    init_from: str | None = None  # a saved folder to start from
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast, weights stay float32
    steps: Count
    batch_size: Count  # pictures a step, over all processes
    lr: float = Field(gt=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0)  # steps
    schedule: Schedule = "cosine"
    ema: Fraction | None = None
    grad_clip: float | None = Field(1.0, gt=0)
    flush_denormal: bool = True
    checkpoint_every: Count = 500
    sample_every: Count = 500
    log_every: Count = 20
    workers: int = Field(0, ge=0)
    eval_images: int = Field(256, ge=0)


class TokenizerRecipe(PicturesRecipe):
    """With steps: 0, the tokenizer is written as it is: one with nothing to train, or a control."""

    kind: Literal["tokenizer"]
    tokenizer: TokenizerArguments
    stage: str = "main"
    data: DataSources = []
    steps: int = Field(ge=0)
    batch_size: Count = 1
    lr: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _whole(self) -> TokenizerRecipe:
        for key in ("data", "batch_size", "lr"):
            if self.steps and (key not in self.model_fields_set or not getattr(self, key)):
                raise ValueError(f"missing key {key!r}, which training needs")
        return self


class DetokenizerRecipe(PicturesRecipe):
    """A detokenizer of one tokenizer's codes and embeddings, or of one CLIP's image embeddings, and of captions.

    With distill, steps are those of all halvings, and warmup is of each.
    """

    kind: Literal["detokenizer"]
    detokenizer: TokenizerArguments | None = None  # the one that is distilled has the teacher's
    tokenizer: str | None = None  # a saved image tokenizer
    clip: str | None = None  # or the folder of a transformers CLIPModel
    texts: bool = False  # captions are part of the condition
    distill: Distill | None = None
    ema: Fraction | None = 0.999
    sample_every: Count = 1000
    eval_images: int = Field(64, ge=0)

    @model_validator(mode="after")
    def _whole(self) -> DetokenizerRecipe:
        if (self.detokenizer is None) == (self.distill is None):
            raise ValueError("give detokenizer, or distill, which takes the teacher's")
        if self.distill and self.init_from:
            raise ValueError("distill starts from the teacher: it goes with no init_from")
        if self.distill and self.steps < self.distill.halvings:
            raise ValueError(f"{self.distill.halvings} halvings need as many steps or more, got {self.steps}")
        if self.tokenizer is not None and self.clip is not None:
            raise ValueError("a detokenizer draws from one tokenizer or one clip, not both")
        if not (self.tokenizer or self.clip or self.texts):
            raise ValueError("give tokenizer, clip or texts: what pictures are drawn from")
        return self


class LanguageModelRecipe(Section):
    kind: Literal["language_model"]
    model: str
    data: list[ShardSource] = Field(min_length=1)
    out: str
    seed: int = 0
    method: Literal["lora", "full"] = "lora"
    lora: Lora = Lora()
    length: Count  # ids of a packed row
    batch_size: Count  # packed rows a process takes at once
    accumulate: Count = 1  # such batches a step
    steps: Count
    lr: float = Field(gt=0)
    schedule: Schedule = "cosine"
    warmup: int = Field(0, ge=0)  # steps
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    clip: float | None = Field(1.0, gt=0)
    template: dict[str, Any] = {}  # changes to the model's template, kept in the result's manifest
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    deepspeed: str | None = None  # a DeepSpeed JSON file
    time_limit_s: Count | None = None
    checkpoint_every: Count = 500
    log_every: Count = 20
    sample_every: Count = 500
    samples: Samples = Samples()
    image_weight: float = Field(1.0, ge=0)
    text_weight: float = Field(1.0, ge=0)
    image_noise: float = Field(0.0, ge=0, le=1)  # up to this share of what is seen of a learnt picture is not its own


class ClipRecipe(Section):
    """A small CLIP; the other parts of the project take its frozen towers."""

    kind: Literal["clip"]
    vision: dict[str, Any]  # arguments of transformers' CLIPVisionConfig
    text: dict[str, Any]  # arguments of its CLIPTextConfig; what follows from the text tokenizer is filled in
    projection_size: Count
    text_tokenizer: str  # a folder or Hub id with a text tokenizer, or builtin:NAME
    data: DataSources = Field(min_length=1)  # captioned pictures to train on
    gallery: DataSources = []  # captioned pictures of which retrieval is measured, never trained on
    gallery_size: Count = 256
    out: str
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    steps: int = Field(ge=0)  # 0 writes the untrained model, a control
    batch_size: Count
    lr: float = Field(gt=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0)  # steps
    schedule: Schedule = "cosine"
    grad_clip: float | None = Field(1.0, gt=0)
    checkpoint_every: Count = 200
    log_every: Count = 20
    workers: int = Field(0, ge=0)


class EvaluationRecipe(Section):
    kind: Literal["evaluation"]
    version: int = 1  # raised when a change of the recipe makes scores incomparable
    task: str
    model: str | None = None
    tokenizer: str | None = None  # which of the model's image tokenizers, where it has several
    template: dict[str, Any] = {}  # changes to the model's template
    data: DataSources = []
    train: DataSources = []  # where shots and text baselines come from; never scored
    n: Count | None = None  # rows scored; None: all
    seed: int = 0
    shots: int = Field(0, ge=0)
    batch_size: Count = 16
    guidance: float | tuple[float, float] = 1.0  # one scale; or, of pictures, (text, image)
    candidates: Count = 1  # drawings of a prompt, of which the model keeps the one it likes best
    temperature: float | None = Field(None, ge=0)  # None: the task's own; questions and captions are greedy
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    out: str | None = None
    options: dict[str, Any] = {}  # the task's own


Recipe = TokenizerRecipe | DetokenizerRecipe | LanguageModelRecipe | ClipRecipe | EvaluationRecipe
KINDS: dict[str, Any] = {get_args(cls.model_fields["kind"].annotation)[0]: cls for cls in get_args(Recipe)}


# --- loading --------------------------------------------------------------------------------------------------------


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file with `a.b=c` overrides (values are YAML; list items by number); errors are one line."""
    where = f"recipe {path}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"no such recipe: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: cannot be read as text: {error}") from error
    values = _parse(text, where)
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected keys and values, got {type(values).__name__}")
    for override in overrides:
        _override(values, override, where)
    return make_recipe(_expand(values, where), where)


def make_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """The model of a recipe given as plain values; ValueError of one line, starting with `where`."""
    kind = values.get("kind")
    if kind not in KINDS:
        raise ValueError(f"{where}: kind must be one of {', '.join(KINDS)}; got {kind!r}")
    try:
        return KINDS[kind].model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: {_explain(KINDS[kind], error)}") from error


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number and no, off, y as words (YAML 1.2), and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
for _letter in "yYnNoO":
    _resolvers = _Loader.yaml_implicit_resolvers.get(_letter, [])
    _Loader.yaml_implicit_resolvers[_letter] = [r for r in _resolvers if r[0] != "tag:yaml.org,2002:bool"]


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{where}: not YAML{line}: {getattr(error, 'problem', None) or error}") from error


def _override(values: dict[str, Any], override: str, where: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"{where}: override {override!r} must have the form key=value or key.key=value")
    value, place = _parse(text, f"{where}: override {override!r}"), values
    for i, key in enumerate(keys):
        here = ".".join(keys[:i])
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise ValueError(f"{where}: override {override!r}: {here!r} has items 0..{len(place) - 1}, not {key!r}")
            key = int(key)
        elif not isinstance(place, dict):
            raise ValueError(f"{where}: override {override!r}: {here!r} is a plain value, it has no {key!r}")
        if i == len(keys) - 1:
            place[key] = value
        elif isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        place = place[key]


def _expand(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, where) for item in value]
    if not isinstance(value, str):
        return value
    for name in re.findall(r"\$\{(\w+)\}", value):
        if name != VARIABLE:
            raise ValueError(f"{where}: ${{{name}}} is not expanded; ${{{VARIABLE}}} is the one variable of recipes")
        if not os.environ.get(VARIABLE):
            raise ValueError(f"{where}: {value!r} needs the environment variable {VARIABLE}, which is not set")
    return value.replace(f"${{{VARIABLE}}}", os.environ.get(VARIABLE, ""))


def _explain(model: type[Section], error: ValidationError) -> str:
    """The first fault as one line; unknown keys come first, since they often explain the missing ones."""
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    name = ".".join(str(part) for part in fault["loc"])
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        known = _fields_at(model, fault["loc"][:-1])
        close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"
        return f"unknown key {name!r}{hint}{more}"
    if fault["type"] == "missing":
        return f"missing key {name!r}{more}"
    got = textwrap.shorten(repr(fault["input"]), 60, placeholder=" ...")
    return f"{name}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {got}{more}"


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the section at `loc`, by walking annotations."""
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = _section_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_in(arg))), None)
