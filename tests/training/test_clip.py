"""The small CLIP: it learns, goes on where it was stopped, pools at its end token, and meets no false negatives."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

sys.path.insert(0, str(Path(__file__).parent))
from lm_fixture import text_tokenizer as plain_tokenizer

from unitok import checkpoint
from unitok.config import ClipRecipe, DataSource
from unitok.tokenizers.base import to_tensor
from unitok.training import clip
from unitok.training.pictures import Pictures

COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255)}
SIZES = {"small": 4, "big": 12}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Squares of 3 colours and 2 sizes at random places; captions {colour}, {size}, both; a row a caption in training.

    The text tokenizer ends no text, and its end token has the id 2: the case that CLIP's text model gets wrong.
    """
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    plain_tokenizer().save_pretrained(folder / "words")
    for name in ("train", "gallery"):
        lines = []
        for i in range(60 if name == "train" else 24):
            colour, size = list(COLOURS)[i % 3], list(SIZES)[i // 3 % 2]
            picture = np.zeros((16, 16, 3), np.uint8)
            x, y = rng.integers(0, 16 - SIZES[size], 2)
            picture[y : y + SIZES[size], x : x + SIZES[size]] = COLOURS[colour]
            Image.fromarray(picture).save(folder / f"{name}{i}.png")
            captions = [f"a {colour} square", f"a {size} square", f"a {size} {colour} square"]
            if name == "train":
                lines += [{"image": f"{name}{i}.png", "text": text} for text in captions]
            else:
                lines.append({"image": f"{name}{i}.png", "captions": [captions[2]]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def recipe(data, out, **changes) -> ClipRecipe:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    values = {
        "kind": "clip",
        "vision": {"image_size": 16, "patch_size": 4, **sizes},
        "text": {"max_position_embeddings": 8, **sizes},
        "projection_size": 16,
        "text_tokenizer": str(data / "words"),
        "data": str(data / "train.jsonl"),
        "gallery": str(data / "gallery.jsonl"),
        "gallery_size": 6,
        "out": str(out),
        "steps": 8,
        "batch_size": 12,
        "lr": 2e-3,
        "checkpoint_every": 3,
        "log_every": 2,
    }
    return ClipRecipe(**{**values, **changes})


def weights(out) -> str:
    return checkpoint.state_hash(CLIPModel.from_pretrained(out).state_dict())


def test_it_learns_and_the_untrained_does_not(data, tmp_path):
    """Six different pictures with six captions of their own: all found, both ways."""
    out = clip.train(recipe(data, tmp_path / "out", steps=150))
    scores = json.loads((out / "training" / "report.json").read_text())["scores"]
    assert [s["name"] for s in scores] == ["image_to_text", "text_to_image"]
    for s in scores:
        assert s["n"] == 6 and s["value"] == 1 and s["baselines"]["untrained"] <= 0.5
    assert list((out / "training" / "logs").glob("events.*"))


def test_no_steps_write_the_untrained_model(data, tmp_path):
    random = recipe(data, tmp_path / "out", steps=0)
    clip.train(random)
    words = clip.text_tokenizer(random.text_tokenizer)
    assert weights(tmp_path / "out") == checkpoint.state_hash(clip.build(random, words).state_dict())
    for s in json.loads((tmp_path / "out" / "training" / "report.json").read_text())["scores"]:
        assert s["value"] == s["baselines"]["untrained"]


def test_ctrl_c_saves_and_the_next_run_ends_the_same(data, tmp_path, monkeypatch):
    whole = weights(clip.train(recipe(data, tmp_path / "whole")))
    assert weights(clip.train(recipe(data, tmp_path / "whole"))) == whole  # a finished run changes nothing
    draw, before = clip.distinct, signal.getsignal(signal.SIGINT)

    def interrupted(options, rng):
        drawn.append(1)
        if len(drawn) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(options, rng)

    drawn: list[int] = []
    monkeypatch.setattr(clip, "distinct", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped at step"):
        clip.train(recipe(data, tmp_path / "out"))
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "out" / "config.json").exists()  # not finished
    assert weights(clip.train(recipe(data, tmp_path / "out"))) == whole
    assert len(drawn) < 8 + 5  # it went on, not from the start
    with pytest.raises(ValueError, match=r"lr = 0.002, the recipe says 0.003"):
        clip.train(recipe(data, tmp_path / "out", lr=3e-3))


def test_the_folder_is_an_ordinary_clip(data, tmp_path):
    """Opened by transformers alone: texts end with the end token, also cut ones, and the text is pooled there."""
    clip.train(recipe(data, tmp_path, steps=0))
    model, words = CLIPModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    end = words.eos_token_id
    ids = words(["a red square", "a red square a red square a red square a"], padding=True, truncation=True)[
        "input_ids"
    ]
    assert end not in (0, 1, 2) and len(ids[0]) == 8
    assert ids[0][3:] == [end] * 5 and ids[1][-1] == end and end not in ids[1][:-1]
    found = model.text_model(torch.tensor(ids))
    for row, place in enumerate((3, 7)):
        assert torch.equal(found.pooler_output[row], found.last_hidden_state[row, place])
    # what follows the end token changes nothing
    alone = model.get_text_features(torch.tensor([ids[0][:4]])).pooler_output
    torch.testing.assert_close(model.get_text_features(torch.tensor(ids)).pooler_output[:1], alone)
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    image = torch.tensor([0, 255], dtype=torch.uint8)
    mapped = (image * processor["rescale_factor"] - processor["image_mean"][0]) / processor["image_std"][0]
    torch.testing.assert_close(clip.pixel_values(image), mapped)


def test_a_text_tokenizer_that_ends_its_texts_is_kept(data, tmp_path):
    once = clip.text_tokenizer(str(data / "words"))
    once.save_pretrained(tmp_path)
    assert clip.text_tokenizer(str(tmp_path)).get_vocab() == once.get_vocab()


def test_no_caption_of_a_batch_is_listed_for_another_picture():
    options = [("a", "b"), ("a", "c"), ("a",), ("c", "d"), ("e",)]
    for seed in range(50):
        rows, texts = clip.distinct(options, np.random.default_rng(seed))
        assert 0 in rows and 4 in rows and 2 not in rows  # picture 2 has no caption but picture 0's
        for row, text in zip(rows, texts, strict=True):
            assert text in options[row]
            assert not any(text in options[other] for other in rows if other != row)
    assert clip.distinct([("a",)] * 3, np.random.default_rng(0)) == ([0], ["a"])


def test_the_gallery_has_different_pictures_with_captions_of_their_own(data):
    def squash(image):
        return to_tensor(image.resize((8, 8)))

    pictures = Pictures([DataSource(path=str(data / "gallery.jsonl"))], squash, 8, seed=0, captioned=True)
    images, texts = clip.gallery(pictures, 6)
    assert images.shape == (6, 3, 8, 8) and len(set(texts)) == 6
    for image, text in zip(images, texts, strict=True):
        _, size, colour, _ = text.split()
        assert (image.flatten(1).amax(dim=1) > 100).tolist() == [c == colour for c in COLOURS], (size, text)
    with pytest.raises(ValueError, match="has 6 pictures with a caption of their own; it needs 7"):
        clip.gallery(pictures, 7)


@pytest.mark.parametrize("name", ["vision", "text"])
def test_an_argument_that_transformers_does_not_know(data, tmp_path, name):
    values = recipe(data, tmp_path).model_dump()
    values[name]["hiden_size"] = 8
    with pytest.raises(ValueError, match="no argument 'hiden_size' .did you mean 'hidden_size'"):
        clip.train(ClipRecipe(**values))
