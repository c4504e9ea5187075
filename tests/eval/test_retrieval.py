"""Retrieval: the gallery has no caption twice, R@1 on small exact cases, and codes that say nothing lose."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from unitok.eval import retrieval
from unitok.eval.retrieval import first_is_own, gallery


def test_the_nearest_must_be_the_own_one():
    seen, read = torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, 0.6, 0.8]])
    assert first_is_own(seen, read, from_texts=False) == [True, False, False]
    assert first_is_own(seen, read, from_texts=True) == [True, False, True]


def test_a_gallery_has_no_caption_of_two_of_its_pictures():
    captions = [["a", "b"], ["b", "c"], ["d"], ["d", "e"], ["f", "a"], ["g"]]
    rows = [{"id": str(i), "captions": some} for i, some in enumerate(captions)]
    for seed in range(20):
        chosen = gallery(rows, 3, seed)
        for row in chosen:
            assert row["caption"] in row["captions"]
            assert all(row["caption"] not in other["captions"] for other in chosen if other is not row)
    assert gallery(rows, 3, 1) == gallery(rows, 3, 1)
    with pytest.raises(ValueError, match="a gallery of 6 pictures with different captions needs more rows"):
        gallery(rows, 6)


class Colours:
    """Its code is the brightness in four steps; texts name it."""

    device = torch.device("cpu")

    def __init__(self, steps: int):
        self.steps = steps

    def eval(self):
        return self

    def preprocess(self, image):
        return torch.full((3, 8, 8), image.getpixel((0, 0))[0] / 255)

    def encode(self, images):
        return (images[:, 0, 0, :1] * self.steps).long().clamp(max=self.steps - 1)

    def contrastive(self, *, images=None, codes=None):
        index = self.encode(images) if codes is None else codes * (4 // self.steps)
        return F.one_hot(index[:, 0], 4).float()

    def text_embedding(self, texts):
        return F.one_hot(torch.tensor([int(text) for text in texts]), 4).float()


def test_codes_that_tell_pictures_apart_find_them_and_others_do_not(tmp_path):
    rows = []
    for i in range(4):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (8, 8), (32 + 64 * i,) * 3).save(path)
        rows.append({"id": str(i), "image": path, "captions": [str(i)], "caption": str(i)})
    for score in retrieval.evaluate(Colours(4), rows):
        assert score.value == 1 and score.baselines["shuffled"] == 0 and score.baselines["chance"] == 0.25
    forward, back = retrieval.evaluate(Colours(1), rows)  # one code for all
    assert forward.value == back.value == 0.25
    with pytest.raises(ValueError, match="has no text beside its codes"):
        retrieval.evaluate(torch.nn.Linear(1, 1), rows)
