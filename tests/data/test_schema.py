from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unitok.data.schema import Part, codes_part, image_part, parse_row, text_part


def shape(document):
    """(type, payload, role, loss) of every part."""
    return [(p.type, p.text if p.type == "text" else p.image, p.role, p.loss) for p in document.parts]


def test_document_row_keeps_order_loss_and_other_columns():
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": "x.jpg", "loss": False},
             {"type": "text", "text": ""}, {"type": "text", "text": "b"}]  # fmt: skip
    [document] = parse_row({"id": 7, "title": "t", "parts": parts}, where="f:1")
    assert shape(document) == [("text", "a", "plain", True), ("image", "x.jpg", "plain", False),
                               ("text", "b", "plain", True)]  # fmt: skip
    assert (document.id, document.kind, document.meta) == ("7", "document", {"title": "t"})


def test_messages_carry_loss_on_assistant_turns_only():
    asked = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "what?"}]
    answered = [{"type": "text", "text": "this:"}, {"type": "image", "image": "b.jpg"}]
    [document] = parse_row({"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": asked},
                                         {"role": "assistant", "content": answered}]})  # fmt: skip
    assert shape(document) == [("text", "be kind", "system", False), ("image", "a.jpg", "user", False),
                               ("text", "what?", "user", False), ("text", "this:", "assistant", True),
                               ("image", "b.jpg", "assistant", True)]  # fmt: skip


def test_llava_conversations_equal_the_messages_they_stand_for():
    llava = {"id": "1", "image": "a.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Ears."}]}  # fmt: skip
    messages = {"id": "1", "messages": [
        {"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Ears."}]}  # fmt: skip
    assert parse_row(llava) == parse_row(messages)


def test_images_column_fills_placeholders_in_order():
    row = {"images": ["1.png", "2.png"], "messages": [{"role": "user", "content": "Compare <image> and <image>."},
                                                      {"role": "assistant", "content": "Same."}]}  # fmt: skip
    assert [p.text or p.image for p in parse_row(row)[0].parts] == ["Compare ", "1.png", " and ", "2.png", ".", "Same."]
    row["images"] = ["1.png", "2.png", "3.png"]
    with pytest.raises(ValueError, match="3 images in the row, but only 2 places"):
        parse_row(row)
    row["images"] = ["1.png"]
    with pytest.raises(ValueError, match="no image is left"):
        parse_row(row)


def test_placeholder_without_pictures_in_the_row_is_text_in_messages():
    [document] = parse_row({"messages": [{"role": "user", "content": "the <image> tag"}]})
    assert document.parts[0].text == "the <image> tag"


def test_question_row_learns_the_most_given_answer_and_keeps_all():
    row = {"image": "a.jpg", "question": "How many?", "answers": ["3", "two", "two", "3", "two"], "question_id": 5}
    [document] = parse_row(row, where="q:1")
    assert shape(document) == [("image", "a.jpg", "plain", False), ("text", "How many?", "question", False),
                               ("text", "two", "answer", True)]  # fmt: skip
    assert document.meta == {"question": "How many?", "answers": row["answers"], "question_id": 5}
    assert parse_row(row | {"answers": ["b", "a"]})[0].parts[-1].text == "b"  # the first of equals
    assert parse_row(row | {"answer": "both, here"})[0].parts[-1].text == "both, here"
    assert parse_row(row | {"answers": [{"answer": 2, "answer_id": 1}]})[0].parts[-1].text == "2"


def test_captions_give_a_document_each_text_first():
    documents = parse_row({"image": "a.jpg", "captions": ["one", "two"]}, where="c:9")
    assert [d.id for d in documents] == ["c:9#0", "c:9#1"]
    assert shape(documents[1]) == [("text", "two", "plain", True), ("image", "a.jpg", "plain", True)]
    assert shape(parse_row({"image": "a.jpg", "text": "two"})[0]) == shape(documents[1])


def test_columns_are_renamed_and_may_be_swapped():
    [document] = parse_row({"path": "a.jpg", "image": "a caption", "n": 1}, columns={"image": "path", "text": "image"})
    assert [p.text or p.image for p in document.parts] == ["a caption", "a.jpg"]
    assert document.meta == {"n": 1}


def test_missing_columns_are_named_with_those_present():
    with pytest.raises(ValueError, match=r"no column 'nmae'; columns present: image, name$"):
        parse_row({"image": "a.jpg", "name": "x"}, columns={"text": "nmae"})
    with pytest.raises(ValueError, match=r"no column 'text'.*columns present: image, name$"):
        parse_row({"image": "a.jpg", "name": "x"})
    with pytest.raises(ValueError, match=r"no column 'image'; columns present: file, text$"):
        parse_row({"file": "a.jpg", "text": "x"})
    with pytest.raises(ValueError, match=r"unknown column 'txet'"):
        parse_row({"image": "a.jpg"}, columns={"txet": "name"})
    with pytest.raises(ValueError, match=r"no column 'answers'"):
        parse_row({"image": "a.jpg", "question": "q", "answers": []})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "expected a JSON object, got list"),
        ({"image": "https://x.org/a.jpg", "text": "t"}, "is a URL"),
        ({"image": {"path": "s3://b/a.jpg", "bytes": None}, "text": "t"}, "is a URL"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "s3://a"}}]}]}, "URL"),
        ({"image": "", "text": "t"}, "image path is empty"),
        ({"image": 3, "text": "t"}, "a path or bytes, got int"),
        ({"image": "a.jpg", "text": " "}, "caption is empty"),
        ({"image": "a.jpg", "text": 5}, "must be a string, got int"),
        ({"image": "a.jpg", "text": "\ud800"}, "lone surrogate"),
        ({"image": "a.jpg", "captions": []}, "'captions' is empty"),
        ({"image": "a.jpg", "question": "q", "answers": [True]}, "must be a string, got bool"),
        ({"parts": []}, "has no parts"),
        ({"parts": "x"}, "expected a list, got str"),
        ({"parts": [{"type": "video"}]}, "unknown type 'video'"),
        ({"parts": [{"type": "image"}]}, "an image without a file"),
        ({"parts": [{"type": "text", "text": "a", "loss": 1}]}, "loss must be true or false"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
        ({"conversations": [{"from": "human", "value": "<image> x"}]}, "no image is left"),
    ],
)
def test_an_unusable_row_says_why_in_one_line(row, reason):
    with pytest.raises(ValueError, match=reason) as error:
        parse_row(row)
    assert "\n" not in str(error.value)


def test_base_resolves_paths_and_source_keeps_them_as_written():
    [document] = parse_row({"image": "im/a.jpg", "text": "t"}, base="/data")
    assert (document.parts[1].image, document.parts[1].source) == (Path("/data/im/a.jpg"), "im/a.jpg")


def test_pictures_in_memory_are_taken_as_they_are():
    picture = Image.new("RGB", (2, 2))
    assert parse_row({"image": picture, "text": "t"})[0].parts[1].image is picture
    part = parse_row({"image": {"bytes": b"123", "path": "a.jpg"}, "text": "t"})[0].parts[1]
    assert (part.image, part.source) == (b"123", "a.jpg")


def test_parquet_nulls_are_absent_columns():
    row = {"parts": None, "messages": None, "image": "a.jpg", "text": "t", "captions": None}
    assert parse_row(row)[0].kind == "caption"


def test_a_part_holds_exactly_one_payload():
    for payloads in ({}, {"text": "a", "image": "b"}, {"image": "b", "codes": np.zeros(1, np.int32)}):
        with pytest.raises(ValueError, match="holds one"):
            Part("image", **payloads)
    with pytest.raises(ValueError, match="unknown role"):
        text_part("a", role="poet")


def test_codes_part_flattens_and_checks_its_grid():
    part = codes_part(np.arange(8).reshape(2, 2, 2), (2, 2, 2), "fsq")
    assert part.codes.dtype == np.int32 and part.codes.tolist() == list(range(8))
    assert part == codes_part(list(range(8)), [2, 2, 2], "fsq") != codes_part([0] * 8, [2, 2, 2], "fsq")
    assert codes_part([1, 2]).grid == (2,)
    with pytest.raises(ValueError, match=r"grid \(3, 3\) needs 9 codes, got 8"):
        codes_part(range(8), (3, 3))
    with pytest.raises(ValueError, match="integers"):
        codes_part([0.5])
    assert image_part("a.jpg") != text_part("a.jpg")


@pytest.mark.skipif("UNITOK_DATA" not in os.environ, reason="UNITOK_DATA is not set")
@pytest.mark.parametrize(("file", "columns", "documents"), [
    ("emoji_noto/emoji.jsonl", {"text": "name"}, 1), ("coco_mini/captions_dev.jsonl", {}, 5),
    ("coco_mini/vqa_v2_dev.jsonl", {}, 1), ("coco_mini/vqa_single_dev.jsonl", {}, 1),
    ("daquar/qa_train.jsonl", {}, 1), ("recipes_interleaved/docs.jsonl", {}, 1),
])  # fmt: skip
def test_every_real_row_is_read(file, columns, documents):
    with open(Path(os.environ["UNITOK_DATA"]) / file) as lines:
        for line in lines:
            row = json.loads(line)
            found = parse_row(row, columns=columns)
            assert len(found) == (1 if documents == 1 else len(row["captions"]))
            if "parts" in row:
                expected = [p.get("text") or p["image"] for p in row["parts"]]
                assert [p.text or p.image for p in found[0].parts] == expected
