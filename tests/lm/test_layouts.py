"""`expand --layout rows`: pictures of several grids train and are drawn in one model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import unitok
from unitok.cli import main
from unitok.data.packing import collate, pack
from unitok.data.render import CONTROL, IMAGE, render
from unitok.data.shards import read_shards, tokenize
from unitok.tokenizers.fsq import FSQTokenizer
from unitok.tokenizers.titok import TiTokTokenizer

SIZES = {"a cat": (12, 8), "on a cat": (8, 16)}  # width and height, as PIL has them
GRIDS = {"a cat": (2, 3), "on a cat": (4, 2)}
LENGTH = 64


@pytest.fixture
def tokenizer(tmp_path):
    torch.manual_seed(0)
    FSQTokenizer.tiny().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def documents(tmp_path, tokenizer):
    """Token shards of captioned pictures of two sizes."""
    rng, rows = np.random.default_rng(0), []
    for number, (text, size) in enumerate(SIZES.items()):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.NEAREST).save(tmp_path / f"{number}.png")
        parts = [{"type": "text", "text": text, "loss": False}, {"type": "image", "image": f"{number}.png"}]
        rows.append(json.dumps({"parts": parts}))
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    tokenize(tmp_path / "data.jsonl", tokenizer, tmp_path / "shards", native=True)
    found = {d.parts[0].text: d for d in read_shards(tmp_path / "shards")}
    assert {text: d.parts[1].grid for text, d in found.items()} == GRIDS
    return found


def expanded(lm_folder, tokenizer, out, *arguments):
    assert main(["expand", str(lm_folder()), "--tokenizer", str(tokenizer), "--out", str(out), *arguments]) == 0
    return unitok.load(out)


def test_pictures_of_two_grids_train_and_are_drawn_in_one_model(lm_folder, tokenizer, documents, tmp_path):
    model = expanded(lm_folder, tokenizer, tmp_path / "model", "--layout", "rows")
    control = model.vocab.images["fsq"].control
    rendered = {}
    for text, document in documents.items():
        image, (rows, columns) = document.parts[1], GRIDS[text]
        rendered[text] = one = render(document.parts, model.vocab, model.text_tokenizer, model.template)
        [(_, name, codes, grid)] = [piece for piece in model.vocab.split(one.ids) if piece[0] == "image"]
        assert (name, codes.tolist(), grid) == ("fsq", list(image.codes), GRIDS[text])
        own = one.ids[one.modality != 0].tolist()
        digits = [control[f"digit_{rows}"], control["size_sep"], control[f"digit_{columns}"]]
        assert own[:4] == [control["begin"], *digits] and own[-2:] == [control["row_end"], control["end"]]
        assert own[4 + columns :: columns + 1][:rows] == [control["row_end"]] * rows
        assert (one.modality == IMAGE).sum() == rows * columns and (one.modality == CONTROL).sum() == 5 + rows
        assert (one.weights[one.modality != 0] == 1).all()

    [row] = pack(list(rendered.values()), LENGTH)
    batch = collate([row], LENGTH)
    assert (batch.document[0].unique() == torch.tensor([-1, 0, 1])).all()
    optimizer = torch.optim.Adam(model.lm.parameters(), 1e-2)
    for _ in range(60):
        logits = model.lm(**batch.inputs()).logits
        losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        optimizer.zero_grad()
        (losses * batch.weights.flatten()).sum().div(batch.weights.sum()).backward()
        optimizer.step()

    for text, document in documents.items():
        grids = {"fsq": GRIDS[text]}
        [drawn] = model.images([text], grids=grids, temperature=0.0)
        codes = torch.as_tensor(np.asarray(document.parts[1].codes, np.int64))[None]
        [learnt] = model.pictures([("fsq", codes[0].numpy(), GRIDS[text])])
        assert drawn.size == SIZES[text] and np.array_equal(np.asarray(drawn), np.asarray(learnt))
        for picture in model.images([text], n=3, grids=grids, temperature=50.0):  # any codes, and yet whole blocks
            assert picture.size == SIZES[text]
        other = GRIDS["a cat" if text != "a cat" else "on a cat"]
        assert model.images([text], grids={"fsq": other}, temperature=50.0)[0].size == (4 * other[1], 4 * other[0])


def test_the_usual_layout_carries_one_grid_and_says_what_does(lm_folder, tokenizer, documents, tmp_path):
    model = expanded(lm_folder, tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match=r"carries the grid \(4, 4\) only; .*expand --layout rows"):
        render(documents["a cat"].parts, model.vocab, model.text_tokenizer, model.template)


def test_codes_without_rows_have_no_such_layout(lm_folder, tmp_path, capsys):
    TiTokTokenizer.tiny().save_pretrained(tmp_path / "titok")
    asked = ["expand", str(lm_folder()), "--tokenizer", str(tmp_path / "titok"), "--out", str(tmp_path / "model")]
    assert main([*asked, "--layout", "rows"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "rows need a grid of two axes or more, got (12,)" in line and not (tmp_path / "model").exists()
    assert main([*asked, "--layout", "columns"]) == 2
