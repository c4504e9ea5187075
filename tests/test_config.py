"""Recipes: what is read, what is refused and in which words."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from unitok import config
from unitok.config import EvaluationRecipe, LanguageModelRecipe, TokenizerRecipe, load_recipe, make_recipe

TOKENIZER = """\
kind: tokenizer
tokenizer: {name: fsq, levels: [8, 5, 5, 5], width: 96, commitment: 1e-2}
data: [{path: "${UNITOK_DATA}/pictures", columns: {text: caption}}]
out: runs/fsq
steps: 100
batch_size: 8
lr: 1e-4
"""
LANGUAGE_MODEL = """\
kind: language_model
model: models/base
data: [{shards: shards/a, weight: 2, flip: 0.5, caption_drop: 0.1}]
out: runs/lora
lora: {rank: 8}
length: 512
batch_size: 4
steps: 10
lr: 3e-4
"""
DETOKENIZER = """\
kind: detokenizer
distill: {teacher: runs/decoder, start: 64, stop: 8}
tokenizer: runs/fsq
data: pictures
out: runs/few
steps: 10
batch_size: 4
lr: 3e-4
"""
CLIP = """\
kind: clip
vision: {image_size: 32, patch_size: 4}
text: {hidden_size: 32}
projection_size: 16
text_tokenizer: builtin:scenes
data: captions.jsonl
out: runs/clip
steps: 0
batch_size: 4
lr: 3e-4
"""
EVALUATION = """\
kind: evaluation
task: vqa
data: data/easy_vqa
guidance: [3, 1.5]
options: {protocol: strict}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """recipe(text, *overrides) -> the loaded model."""
    monkeypatch.setenv("UNITOK_DATA", "/pictures of/mine")

    def load(text: str, *overrides: str):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return load_recipe(path, overrides)

    return load


def test_kinds(recipe):
    one, two, three = recipe(TOKENIZER), recipe(LANGUAGE_MODEL), recipe(EVALUATION)
    assert (type(one), type(two), type(three)) == (TokenizerRecipe, LanguageModelRecipe, EvaluationRecipe)
    assert one.tokenizer.name == "fsq"
    assert one.tokenizer.arguments == {"levels": [8, 5, 5, 5], "width": 96, "commitment": 0.01}
    assert (one.lr, one.betas, one.stage, one.data[0].columns) == (1e-4, (0.9, 0.99), "main", {"text": "caption"})
    assert (two.lora.rank, two.lora.alpha, two.lora.rows, two.method, two.clip) == (8, 64, "new", "lora", 1.0)
    assert (two.data[0].weight, two.data[0].flip, two.data[0].loss) == (2, 0.5, "default")
    four, five = recipe(DETOKENIZER), recipe(CLIP)
    assert (four.kind, four.distill.halvings, five.kind, five.gallery_size) == ("detokenizer", 3, "clip", 256)
    assert (three.data[0].path, three.guidance, three.options) == ("data/easy_vqa", (3, 1.5), {"protocol": "strict"})


@pytest.mark.parametrize("text", [TOKENIZER, DETOKENIZER, LANGUAGE_MODEL, CLIP, EVALUATION])
def test_a_recipe_written_out_reads_back(recipe, text):
    whole = recipe(text)
    assert make_recipe(yaml.safe_load(yaml.safe_dump(whole.model_dump(mode="json")))) == whole


def test_the_data_variable(recipe, monkeypatch):
    assert recipe(TOKENIZER).data[0].path == "/pictures of/mine/pictures"
    assert recipe(TOKENIZER, "out=${UNITOK_DATA}/x").out == "/pictures of/mine/x"
    with pytest.raises(ValueError, match=r"\$\{HOME\} is not expanded; \$\{UNITOK_DATA\} is the one variable"):
        recipe(TOKENIZER, "out=${HOME}/x")
    monkeypatch.delenv("UNITOK_DATA")
    with pytest.raises(ValueError, match="needs the environment variable UNITOK_DATA, which is not set"):
        recipe(TOKENIZER)
    assert recipe(TOKENIZER, "data.0.path=here").data[0].path == "here"


def test_overrides(recipe):
    changed = recipe(
        TOKENIZER, "steps=7", "lr=3e-5", "tokenizer.width=8", "tokenizer.levels=[4, 4]", "tokenizer.act=relu",
        "data.0.limit=10", "ema=null", "betas=[0, 0.5]", "data.0.columns.image=file", "flush_denormal=false",
    )  # fmt: skip
    assert (changed.steps, changed.lr, changed.data[0].limit, changed.ema) == (7, 3e-5, 10, None)
    assert changed.tokenizer.arguments == {"levels": [4, 4], "width": 8, "commitment": 0.01, "act": "relu"}
    assert changed.betas == (0, 0.5) and changed.flush_denormal is False
    assert changed.data[0].columns == {"text": "caption", "image": "file"}
    assert recipe(LANGUAGE_MODEL, "samples.prompts=[a red circle]").samples.prompts == ["a red circle"]
    assert recipe(EVALUATION, "options.a.b=1").options == {"protocol": "strict", "a": {"b": 1}}
    assert recipe(EVALUATION, "task=a=b").task == "a=b"
    assert recipe(EVALUATION, "model=").model is None


def test_answers_stay_words(recipe):
    """YAML 1.1 reads no, on and 1e-4 as something else."""
    options = recipe(EVALUATION, "options.words=[yes, no, on, Off, y]", "options.n=[1e-4, 2.5E+3, true, 12]").options
    assert options["words"] == ["yes", "no", "on", "Off", "y"] and options["n"] == [1e-4, 2500.0, True, 12]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (TOKENIZER, ["stpes=3"], r"unknown key 'stpes' \(did you mean 'steps'\?\)"),
        (LANGUAGE_MODEL, ["lora.rnak=3"], r"unknown key 'lora.rnak' \(did you mean 'rank'\?\)"),
        (LANGUAGE_MODEL, ["data.0.shard=3"], r"unknown key 'data.0.shard' \(did you mean 'shards'\?\)"),
        (EVALUATION, ["data={pth: x}"], r"unknown key 'data.0.pth' \(did you mean 'path'\?\) \(and 1 more\)"),
        (LANGUAGE_MODEL, ["samples.zzz=3"], r"unknown key 'samples.zzz' \(known: prompts, questions, "),
        (LANGUAGE_MODEL.replace("steps: 10\n", ""), [], "missing key 'steps'"),
        (TOKENIZER, ["tokenizer={width: 3}"], "missing key 'tokenizer.name'"),
        (TOKENIZER, ["steps=many"], "steps: input should be a valid integer.*, got 'many'"),
        (TOKENIZER, ["steps=-1"], "steps: input should be greater than or equal to 0, got -1"),
        (TOKENIZER.replace("lr: ", "# "), [], "missing key 'lr', which training needs"),
        (LANGUAGE_MODEL, ["data.0.flip=1.5"], "data.0.flip: input should be less than or equal to 1, got 1.5"),
        (LANGUAGE_MODEL, ["dtype=float16"], "dtype: input should be 'float32', 'bfloat16' or 'auto', got 'float16'"),
        (
            TOKENIZER,
            ["kind=tokeniser"],
            "kind must be one of tokenizer, detokenizer, language_model, clip, evaluation; got 'toke",
        ),
        (TOKENIZER, ["steps"], "override 'steps' must have the form key=value"),
        (TOKENIZER, ["a..b=1"], "override 'a..b=1' must have the form"),
        (TOKENIZER, ["data.3.path=x"], "'data' has items 0..0, not '3'"),
        (TOKENIZER, ["steps.x=1"], "'steps' is a plain value, it has no 'x'"),
        (TOKENIZER, ["betas=[1"], "not YAML in line 1"),
        ("kind: [", [], "not YAML in line"),
        ("- a", [], "expected keys and values, got list"),
        ("", [], "expected keys and values, got NoneType"),
        (TOKENIZER + "lr: 2\n", [], "key 'lr' is given twice"),
        ("a: !!python/object/apply:os.getcwd []", [], "not YAML"),
    ],
)
def test_errors_are_one_line_and_name_the_key(recipe, text, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        recipe(text, *overrides)
    assert str(error.value).startswith("recipe ") and "r.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such recipe: .*none.yaml"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="cannot be read as text"):
        load_recipe(tmp_path)


def test_every_key_of_every_recipe_is_read():
    read = set(config.Lora.model_fields)  # handed on as keywords
    for path in Path(config.__file__).parent.rglob("*.py"):
        if path.name != "config.py":
            read |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    for cls in vars(config).values():
        if isinstance(cls, type) and issubclass(cls, config.Section):
            for field in set(cls.model_fields) - {"kind"}:
                assert field in read, f"{cls.__name__}.{field} is read nowhere"
