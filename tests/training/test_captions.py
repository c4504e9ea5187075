"""Captions beside pictures: whose they are, who gets them, and that the draw depends on (seed, step) alone."""

import json

import numpy as np
import pytest
from PIL import Image

from unitok.config import DataSource, TokenizerRecipe
from unitok.data.sources import read_captioned
from unitok.tokenizers.base import to_tensor
from unitok.tokenizers.fsq import FSQTokenizer
from unitok.training.pictures import Pictures
from unitok.training.tokenizer import train

SEEN: list[dict] = []


class Reader(FSQTokenizer):
    """Reads captions in one of its two stages."""

    stages, text_stages = ("read", "look"), ("read",)

    def loss(self, batch, step, stage="main"):
        SEEN.append(batch)
        return super().loss(batch, step)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """30 grey pictures, each a shade of its own, with a row a caption, in turns; a row without, and one unreadable."""
    folder = tmp_path_factory.mktemp("rows")
    for i in range(30):
        Image.fromarray(np.full((16, 16, 3), 8 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "bad.png").write_text("no picture")
    said = [{"image": f"{i}.png", "text": f"{i} {word}"} for word in ("first", "second", "third") for i in range(30)]
    said[5:5] = [{"image": "0.png"}, {"image": "bad.png", "text": "0 bad"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    return folder / "rows.jsonl"


def read(rows, **arguments) -> Pictures:
    return Pictures([DataSource(path=str(rows))], lambda i: to_tensor(i.resize((8, 8))), 8, seed=0, captioned=True,
                    **arguments)  # fmt: skip


def test_rows_of_one_file_are_one_picture(rows):
    found = list(read_captioned(rows))
    assert len(found) == 32  # 30 pictures, the unreadable one, and the row without a caption
    where, image, captions = found[3]
    assert where == "rows.jsonl:4" and image.name == "3.png" and captions == ["3 first", "3 second", "3 third"]
    (refused,) = [error for _, error, _ in found if isinstance(error, ValueError)]
    assert "no column 'text'" in str(refused)


def test_every_caption_of_a_row_is_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "captions": ["x", "y"]}\n{"parts": []}\n')
    (_, _, captions), (_, error, none) = read_captioned(tmp_path / "a.jsonl")
    assert captions == ["x", "y"] and isinstance(error, ValueError) and none == []


@pytest.mark.parametrize("in_memory", [1 << 20, 0])
def test_texts_are_captions_of_their_pictures_and_depend_on_the_step_alone(rows, in_memory):
    """Also where pictures are streamed, and one that cannot be read is replaced by the next."""
    first, second = read(rows, in_memory=in_memory), read(rows, in_memory=in_memory)
    drawn = set()
    for step, (index, images) in enumerate(first.indexed_batches(0, 20, 8)):
        texts = first.texts(index, step)
        assert [int(text.split()[0]) for text in texts] == [round(float(i.float().mean()) / 8) for i in images]
        assert second.texts(index, step) == texts
        drawn |= set(texts)
    assert len(drawn) > 60 and first.refused == 2  # of 90 captions


def test_held_out_pictures_keep_theirs(rows):
    found = read(rows, eval_images=3)
    assert len(found.held_out) == len(found.held_out_captions) == 3
    for image, captions in zip(found.held_out, found.held_out_captions, strict=True):
        assert {int(text.split()[0]) for text in captions} == {round(float(image.float().mean()) / 8)}


def test_other_captions_are_other_data(rows, tmp_path):
    changed = rows.read_text().replace("7 third", "7 fourth")
    (rows.parent / "changed.jsonl").write_text(changed)
    assert read(rows.parent / "changed.jsonl").fingerprint != read(rows).fingerprint


def test_a_tokenizer_gets_texts_in_the_stages_it_names(rows, tmp_path):
    for stage in Reader.stages:
        SEEN.clear()
        train(
            TokenizerRecipe(
                kind="tokenizer",
                tokenizer={"name": f"{__name__}:Reader", "image_size": 16, "width": 8, "min_width": 8, "levels": [3]},
                data=str(rows),
                out=str(tmp_path / stage),
                stage=stage,
                steps=2,
                batch_size=4,
                lr=1e-3,
                eval_images=0,
            )
        )
        for batch in SEEN:
            assert ("texts" in batch) == (stage == "read")
        if stage == "read":
            shades = [round(float(image.mean()) * 255 / 8) for image in SEEN[0]["images"]]
            assert [int(text.split()[0]) for text in SEEN[0]["texts"]] == shades
