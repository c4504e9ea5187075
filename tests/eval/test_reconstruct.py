"""`unitok reconstruct` and `unitok tokenize` as commands: the table, the census, pictures of any size."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unitok import cli
from unitok.checkpoint import read_json
from unitok.data.shards import read_shards
from unitok.tokenizers import get
from unitok.tokenizers.base import load_tokenizer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for n in range(6):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((24, 20), Image.Resampling.BICUBIC).save(folder / f"{n}.png")
    lines = [json.dumps({"image": f"{n}.png", "text": "noise"}) + "\n" for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    get("fsq").tiny().save_pretrained(folder := tmp_path_factory.mktemp("tokenizer"))
    return folder


def run(capsys, *args, code: int = 0) -> str:
    """What a command prints: a result on stdout, or the line of an error."""
    capsys.readouterr()
    assert cli.main([str(arg) for arg in args]) == code
    out = capsys.readouterr()
    return out.err if code else out.out


def test_the_table_of_the_embedded_tokenizer(capsys, pictures, tmp_path, monkeypatch):
    """Pictures beside block means, both codebooks beside even use, bits."""
    monkeypatch.setitem(sys.modules, "a_network", SimpleNamespace(maps=lambda images: [images - 0.5]))
    out = tmp_path / "out"
    table = run(capsys, "reconstruct", "builtin:scenes", pictures, "--out", out, "--perceptual", "a_network:maps")
    found = {score["name"]: score for score in read_json(out / "results.json")["scores"]}
    books = [f"{name}/codebook={book}" for book in (0, 1) for name in ("codes_used", "perplexity")]
    assert list(found) == ["psnr", "ssim", "perceptual", *books, "bits_per_image", "bits_per_pixel"]
    titles = ("score", "value", "95% interval", "n", "block mean", "one colour", "even")
    assert all(word in table for word in (*titles, *found, str(out / "reconstructions.png")))
    assert set(found["perceptual"]["baselines"]) == {"block_mean", "one_colour"}
    assert found["perceptual"]["protocol"]["network"] == "a_network:maps"
    tokenizer = load_tokenizer("builtin:scenes")
    cost = sum(math.log2(tokenizer.codebook_sizes[book]) for book in tokenizer.token_codebook().tolist())
    assert found["bits_per_image"]["value"] == pytest.approx(cost)
    assert found["bits_per_pixel"]["value"] == pytest.approx(cost / tokenizer.image_size**2)


def test_pictures_as_large_as_they_are(capsys, pictures, tokenizer, tmp_path):
    run(capsys, "reconstruct", tokenizer, pictures, "--out", tmp_path / "out", "--native")
    assert {Image.open(file).size for file in (tmp_path / "out" / "pictures").iterdir()} == {(24, 20)}
    line = run(
        capsys, "reconstruct", "builtin:scenes", pictures, "--out", tmp_path / "no", "--native", code=1
    ).splitlines()
    assert line[-1].startswith("error: native sizes need a fully convolutional tokenizer; SplitFSQTokenizer takes")


def test_a_network_that_is_none_is_refused(capsys, pictures, tokenizer, tmp_path):
    asked = ("reconstruct", tokenizer, pictures, "--out", tmp_path / "out", "--perceptual")
    assert "not a known perceptual network" in run(capsys, *asked, tokenizer / "model.safetensors", code=1)
    assert "no such file: gone.safetensors" in run(capsys, *asked, "gone.safetensors", code=1)


def test_tokenize_ends_with_the_census(capsys, pictures, tokenizer, tmp_path):
    asked = ("tokenize", pictures / "rows.jsonl", "--tokenizer", tokenizer, "--out", tmp_path / "out", "--native")
    first, again = run(capsys, *asked).splitlines(), run(capsys, *asked).splitlines()
    assert first == again and len(first) == 2
    use = re.fullmatch(r"(\d+) of 36 codes used, (\d+) dead, \d\.\d\d of 5\.17 bits \(perplexity \d+\.\d\)", first[1])
    parts = [part for document in read_shards(tmp_path / "out") for part in document.parts if part.type == "image"]
    met = len(set(np.concatenate([part.codes for part in parts]).tolist()))
    assert use and (int(use[1]), int(use[2])) == (met, 36 - met)
    assert {part.grid for part in parts} == {(5, 6)}


def test_documents_without_pictures_have_no_census(capsys, tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"parts": [{"type": "text", "text": "words"}]}\n')
    lines = run(capsys, "tokenize", tmp_path / "rows.jsonl", "--tokenizer", tokenizer, "--out", tmp_path / "out")
    assert lines.count("\n") == 1
