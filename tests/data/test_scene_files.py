"""The folder of scenes: what is in it, and that no training file names a held-out pair or asks where none may."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import pytest

from unitok.checkpoint import open_folder
from unitok.data.render import Template, question_parts, render
from unitok.data.scene_files import BEHIND, write_readings, write_scenes
from unitok.data.scenes import COLOURS, HELD_OUT, MORE_COLOURS, SETTINGS, SHAPES
from unitok.data.schema import codes_part, parse_row
from unitok.lm.text import load_text_tokenizer

BASE = open_folder("builtin:scenes")
SPELLED = {f"{colour} {shape}" for shape, colour in HELD_OUT}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    return write_scenes(
        out, setting="base", pictures={"train": 80, "test": 4}, captions=2, shots=20, texts=60, rounds=2
    )


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_no_training_file_names_a_held_out_pair(folder):
    files = sorted(p.stem for p in folder.glob("train_*.jsonl"))
    names = "bindings captions choices describe draw facts findings places questions shots sides texts told truths"
    assert files == [f"train_{name}" for name in names.split()]
    for name in files:
        text = (folder / f"{name}.jsonl").read_text()
        assert text and not any(pair in text for pair in SPELLED), name
        assert ("?" in text) == (name in ("train_questions", "train_shots")), name
    assert any(pair in (folder / "test_prompts.jsonl").read_text() for pair in SPELLED)


def test_more_colours_are_those_of_training_pictures_alone(tmp_path):
    out = write_scenes(tmp_path, setting="placed", pictures={"train": 200, "validation": 60, "test": 60}, captions=2)
    told = {row["image"]: set(row["text"].split()) for row in rows(out, "train_captions")}
    assert 60 < sum(bool(words & set(MORE_COLOURS)) for words in told.values()) < 100
    for file in out.glob("*.jsonl"):
        text = file.read_text()
        assert any(colour in text for colour in MORE_COLOURS) == file.name.startswith("train_"), file.name
        assert file.name.startswith("train_") != any(pair in text for pair in SPELLED), file.name


def test_what_reads_a_picture_of_two_things_could_have_their_colours_exchanged(folder):
    seen = 0
    captions = {row["image"]: row["text"] for row in rows(folder, "train_captions")}
    for name in ("describe", "questions", "findings", "bindings"):
        found = rows(folder, f"train_{name}")
        for image in {row.get("image") or next(p["image"] for p in row["parts"] if "image" in p) for row in found}:
            words = captions[image].split()
            things = [(b, a) for a, b in itertools.pairwise(words) if a in COLOURS and b in SHAPES]
            if len(things) == 2:
                (a, x), (b, y) = things
                seen += 1
                assert not {(a, y), (b, x)} & HELD_OUT, (name, image)
    assert seen > 20


def test_at_fixed_places_things_are_found_in_one_order_of_words(folder, tmp_path):
    def said(where, name):
        return [row["parts"][2]["text"] for row in rows(where, f"train_{name}")]

    fixed = write_scenes(tmp_path, setting="beside", pictures={"train": 60}, rounds=1)
    for name, order in (("places", r"seen from .*"), ("bindings", r"the \w+( object)? is .*")):
        assert said(fixed, name) and all(re.fullmatch(order, text) for text in said(fixed, name))
        assert any(not re.fullmatch(order, text) for text in said(folder, name))
    seen = {text for text in said(fixed, "findings") if "seen from" in text}
    assert seen and all(text.startswith("seen from") for text in seen)


def test_what_is_given_is_not_learnt(folder):
    for name, given in (("draw", "text"), ("choices", "text"), ("facts", "image"), ("told", "text")):
        for row in rows(folder, f"train_{name}"):
            first, second = row["parts"]
            assert first["type"] == given and first["loss"] is False and second.get("loss", True)
    assert all(part.get("loss", True) for row in rows(folder, "train_describe") for part in row["parts"])
    for row in (r for n in ("findings", "places", "sides", "bindings", "truths") for r in rows(folder, f"train_{n}")):
        assert [(part["type"], part.get("loss", True)) for part in row["parts"]] == [
            ("image", False), ("text", False), ("text", True)
        ]  # fmt: skip


def test_choices_are_about_pictures_of_one_thing(folder):
    captions = {}
    for row in rows(folder, "train_captions"):
        captions.setdefault(row["image"], []).append(row["text"])
    found = rows(folder, "train_choices")
    assert found
    for row in found:
        text, image = row["parts"][0]["text"], row["parts"][1]["image"]
        options = [o.removeprefix("a ") for o in text.split(" or ")]
        said = " ".join(captions[image]).replace("small ", "").replace("large ", "")
        assert sum(option in said for option in options) == 1 and " and " not in said


def test_a_folder_made_otherwise_is_refused_and_the_same_is_left_alone(folder, monkeypatch):
    before = (folder / "train_told.jsonl").stat().st_mtime_ns
    same = {
        "setting": "base",
        "pictures": {"train": 80, "test": 4},
        "captions": 2,
        "shots": 20,
        "texts": 60,
        "rounds": 2,
    }
    assert write_scenes(folder, **same) == folder and (folder / "train_told.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="with texts = 60, not 5"):
        write_scenes(folder, **{**same, "texts": 5})
    with pytest.raises(ValueError, match="unknown setting 'cubes'"):
        write_scenes(folder / "x", setting="cubes")
    monkeypatch.setitem(SETTINGS, "base", replace(SETTINGS["base"], related=True))
    with pytest.raises(ValueError, match=r"with drawn = .*'related': False"):  # the name stands for something else now
        write_scenes(folder, **same)


def test_readings_are_the_questions_with_a_true_caption_where_words_of_a_picture_stand(tmp_path):
    write_scenes(tmp_path, pictures={"train": 30}, captions=2)
    write_readings(tmp_path)
    captions = {}
    for row in rows(tmp_path, "train_captions"):
        captions.setdefault(row["image"], []).append(row["text"])
    tables = [rows(tmp_path, f"train_{name}") for name in ("questions", "read", "blind")]
    words, template = load_text_tokenizer(BASE), Template(question="{question} ", image_suffix=BEHIND)
    for question, read, blind in zip(*tables, strict=True):
        told, asked = read["messages"][0]["content"].split(BEHIND)
        assert told in captions[question["image"]] and asked == blind["messages"][0]["content"] == question["question"]
        assert read["messages"][1] == blind["messages"][1] == {"role": "assistant", "content": question["answers"][0]}
        as_words = question_parts(asked, codes_part([0], (1,), "words", words=told), question["answers"][0])
        [document] = parse_row(read)
        ids, weights, _ = render(document.parts, None, words, template)
        expected = render(as_words, None, words, template)
        assert ids.tolist() == expected.ids.tolist() and weights.tolist() == expected.weights.tolist()
