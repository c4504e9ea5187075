"""The manifest: every field that decides is refused by name with both values; ids, paths and licences only inform."""

from __future__ import annotations

import copy
import json

import pytest

from unitok.manifest import FILE, Manifest
from unitok.vocab import Codebook, JointVocab


def tokenizer(**changes) -> dict:
    return {
        "class": "fsq",
        "config_hash": "c0ffee",
        "weight_hash": "abc123",
        "image_size": 32,
        "resize": "squash-bicubic",
        "pixels": "float01",
        "codebook_sizes": [1000],
        "grid": [8, 8],
        "vocabulary": "codes",
        "path": "runs/fsq",
        "frozen": {"vit": {"id": "some/vit", "revision": "main", "hash": "f1"}},
        **changes,
    }


def manifest() -> Manifest:
    vocab = JointVocab(64).add("scenes", (6, 4), (2, 2, 2))
    table = Codebook(6, table=(75, 76, 77, 78, 80, 79))
    books = [{"size": 6, "table": list(table.ids)}, vocab.to_dict()["images"]["scenes"]["codebooks"][1]]
    d = vocab.to_dict()
    d["images"]["scenes"]["codebooks"] = books
    return Manifest(
        tokenizers={"scenes": tokenizer()},
        vocab=JointVocab.from_dict(d).to_dict(),
        base={"id": "org/base", "config_hash": "b1", "weight_hash": "b2"},
        text_tokenizer={"id": "org/base", "hash": "t1"},
        template={
            "chat": "plain",
            "bos": True,
            "question": "Q: {question}\n",
            "null": "",
            "path": "part of the wording",
        },
        detokenizer={"id": "org/detok", "class": "rectified_flow", "weight_hash": "d1", "takes": ["codes"]},
        licences=["MIT (scenes)"],
    )


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    else:
        yield path


def edited(d: dict, path: tuple, value) -> dict:
    d = copy.deepcopy(d)
    place = d
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return d


INFORMING = {
    "tokenizers.scenes.path",
    "tokenizers.scenes.frozen.vit.id",
    "tokenizers.scenes.frozen.vit.revision",
    "base.id",
    "text_tokenizer.id",
    "detokenizer.id",
    "licences.0",
}
FIELDS = [path for path in leaves(manifest().to_dict()) if path != ("format",)]


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_every_field_decides_or_informs(path):
    """The edit of any field: refused by name with both values, or noted where it only informs."""
    one, name = manifest(), ".".join(map(str, path))
    value = one.to_dict()
    for key in path:
        value = value[key]
    other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else f"{value}?"
    two = Manifest.from_dict(edited(one.to_dict(), path, other))
    line = f"{name} is {json.dumps(value)} in model, {json.dumps(other)} in shards"
    if name in INFORMING:
        assert one.check(two) == [line]
    else:
        with pytest.raises(ValueError) as error:
            one.check(two)
        assert str(error.value) == f"manifest mismatch: {line}"
        with pytest.raises(ValueError, match="in adapter"):
            two.check(one, what=("adapter", "model"))


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_a_field_that_is_gone_is_a_difference(path):
    one = manifest()
    d = copy.deepcopy(one.to_dict())
    place = d
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    name, two = ".".join(map(str, path)), Manifest.from_dict(d)
    if name in INFORMING or name == "base.weight_hash":
        one.check(two)
    else:
        with pytest.raises(ValueError, match="manifest mismatch"):
            one.check(two)


def test_equal_manifests_fit(tmp_path):
    one = manifest()
    one.save(tmp_path)
    assert Manifest.load(tmp_path) == one == Manifest.load(tmp_path / FILE)
    assert one.check(Manifest.load(tmp_path)) == []
    assert one["template"]["chat"] == "plain"


def test_tuples_in_memory_equal_lists_on_disk():
    one = manifest()
    two = copy.deepcopy(one)
    two.tokenizers["scenes"]["grid"] = (8, 8)
    assert one.check(two) == []


def test_only_sections_both_have_are_compared():
    shards = Manifest(tokenizers=manifest().tokenizers)
    assert manifest().check(shards) == []
    assert Manifest(base={"config_hash": "x"}).check(shards) == []


def test_one_side_may_have_more_tokenizers():
    """A model with two tokenizers takes the shards of one, and an adapter from before the second was added."""
    first = manifest()
    vocab = JointVocab.from_dict(first.vocab).add("photos", (16,), (4, 4))
    both = copy.deepcopy(first)
    both.tokenizers["photos"] = tokenizer(weight_hash="other")
    both.vocab = vocab.to_dict()
    assert both.check(first) == first.check(both) == []

    moved = copy.deepcopy(both)
    moved.vocab["images"]["scenes"]["control"]["begin"] += 1
    with pytest.raises(ValueError, match="vocab.images.scenes.control.begin is 64 in model, 65 in shards"):
        first.check(moved)


def test_tokenizers_of_which_neither_side_has_all():
    one, two = Manifest(tokenizers={"a": tokenizer()}), Manifest(tokenizers={"b": tokenizer()})
    with pytest.raises(ValueError, match=r'tokenizers is \["a"\] in model, \["b"\] in shards'):
        one.check(two)


def test_a_tokenizer_may_have_any_name():
    one, two = Manifest(tokenizers={"id": tokenizer()}), Manifest(tokenizers={"id": tokenizer(resize="crop-lanczos")})
    with pytest.raises(ValueError, match="tokenizers.id.resize"):
        one.check(two)


def test_long_values_are_cut():
    one = Manifest(template={"question": "x" * 500})
    with pytest.raises(ValueError) as error:
        one.check(Manifest(template={"question": "y" * 500}))
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": 2}, "unknown manifest format 2; this unitok reads format 1"),
        ({"tokenizers": {}}, "unknown manifest format None"),
        ({"format": 1, "tokenisers": {}}, "unknown section 'tokenisers'"),
        ({"format": 1, "vocab": 3}, "section 'vocab' must be a JSON object"),
        ({"format": 1, "licences": {}}, "section 'licences' must be a JSON array"),
    ],
)
def test_manifests_that_are_not_read(tmp_path, content, message):
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        Manifest.load(tmp_path)
    assert str(tmp_path / FILE) in str(error.value)


def test_a_folder_without_a_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match="no unitok.json in it"):
        Manifest.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no unitok.json in it"):
        Manifest.load(tmp_path / "none")
