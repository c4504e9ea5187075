"""Token shards of pictures as large as they are: grids of their own, and memory that many shapes do not fill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unitok.data import encoding
from unitok.data.shards import census_line, read_shards, tokenize
from unitok.tokenizers import get
from unitok.tokenizers.base import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    get("fsq").tiny().save_pretrained(folder := tmp_path_factory.mktemp("tokenizer"))
    return folder


def test_native_pictures_have_grids_of_their_own(tokenizer, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rng, loaded = np.random.default_rng(0), load_tokenizer(tokenizer)
    sizes = {"a": (20, 24), "b": (33, 18), "c": (24, 20), "d": (20, 24), "e": (20, 24), "f": (3, 30)}
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(data / f"{name}.png")
    summary = tokenize(data, tokenizer, tmp_path / "out", native=True, shard_rows=4, batch_size=2)
    assert summary["quarantined"] == 1 and summary["tokens"] == 30 * 4 + 32
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert "picture of 30 x 3 pixels, expected at least 4 a side" in lines
    parts = {p.source: p for d in read_shards(tmp_path / "out") for p in d.parts if p.type == "image"}
    assert [parts[f"{n}.png"].grid for n in "abcde"] == [(5, 6), (8, 4), (6, 5), (5, 6), (5, 6)]
    pixels = np.array(Image.open(data / "b.png"))[:32, 1:17]
    codes = loaded.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0]
    assert parts["b.png"].codes.tolist() == codes.tolist()
    assert census_line(summary).startswith(f"{len(set(np.concatenate([p.codes for p in parts.values()])))} of 36")
    with pytest.raises(ValueError, match="was begun with native True, not False"):
        tokenize(data, tokenizer, tmp_path / "out", shard_rows=4, batch_size=2)
    with pytest.raises(ValueError, match="native sizes need a fully convolutional tokenizer; SplitFSQTokenizer"):
        tokenize(data, get("fsq_split").tiny(), tmp_path / "split", native=True)


def test_pictures_of_many_shapes_do_not_pile_up(tokenizer, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    rng, loaded, encoded = np.random.default_rng(0), load_tokenizer(tokenizer), []
    for n in range(40):
        height, width = rng.integers(4, 12, 2) * 4
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(data / f"{n:02d}.png")
    encode, alive = loaded.encode, []
    load = encoding.Encoder._load
    monkeypatch.setattr(loaded, "encode", lambda images: encoded.append(len(images)) or encode(images), raising=False)

    def counted(self, image):
        alive.append(sum(encoded))
        return load(self, image)

    monkeypatch.setattr(encoding.Encoder, "_load", counted)
    tokenize(data, loaded, tmp_path / "free", native=True, batch_size=8)
    monkeypatch.setattr(encoding, "_WAITING_BYTES", 5 * 48 * 48 * 3 * 4)
    assert alive[-1] < 20 and sum(encoded) == 40  # without a bound few are encoded before the last is read
    encoded.clear(), alive.clear()
    tokenize(data, loaded, tmp_path / "bound", native=True, batch_size=8)
    assert sum(encoded) == 40 and max(n - done for n, done in enumerate(alive)) < 20
    assert list(read_shards(tmp_path / "bound")) == list(read_shards(tmp_path / "free"))
