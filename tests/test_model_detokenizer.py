"""A model folder with a detokenizer: it draws the codes of its own image tokenizer, and must be the one it was."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from unitok import load, tokenizers
from unitok.cli import main
from unitok.detokenizers.diffusion import DiffusionDetokenizer
from unitok.tokenizers.base import to_pil


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """An image tokenizer, a detokenizer of its codes, and the embedded model with both."""
    root = tmp_path_factory.mktemp("painted")
    torch.manual_seed(0)
    tokenizer = tokenizers.get("fsq").tiny().eval()
    painter = DiffusionDetokenizer(
        image_size=16, width=32, depth=1, heads=2, timesteps=100, steps=3, guidance=2.0,
        codebook_sizes=tokenizer.codebook_sizes, grid=tokenizer.grid(),
    )  # fmt: skip
    for weight in painter.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    tokenizer.save_pretrained(root / "tokenizer")
    painter.eval().save_pretrained(root / "painter")
    command = [
        "expand",
        "builtin:scenes",
        "--tokenizer",
        root / "tokenizer",
        "--name",
        "small",
        "--out",
        root / "model",
    ]
    assert main([str(x) for x in [*command, "--out", root / "model", "--detokenizer", root / "painter"]]) == 0
    return root, tokenizer, painter


def test_it_draws_the_codes_of_its_own_tokenizer_alone(parts):
    root, tokenizer, painter = parts
    model = load(root / "model", tokenizer="small")
    size, count = tokenizer.codebook_sizes[0], int(np.prod(tokenizer.grid()))
    codes = torch.arange(2 * count).view(2, count) % size
    condition = painter.condition_of(tokenizer, codes, tokenizer.grid())
    drawn = painter.generate(condition, seeds=[5, 6], guidance=2.0)
    assert torch.allclose(model.decode(codes, tokenizer.grid(), "small", [5, 6]), drawn, atol=1e-6)
    assert (drawn - tokenizer.decode(codes, tokenizer.grid())).abs().max() > 0.05
    shown = model.pictures([("small", row.numpy(), tokenizer.grid()) for row in codes], [5, 6])
    assert [np.asarray(a).tolist() for a in shown] == [np.asarray(to_pil(b)).tolist() for b in drawn]

    scenes = model.image_tokenizers["scenes"]
    codes = torch.zeros(1, int(np.prod(scenes.grid())), dtype=torch.int64)
    assert torch.equal(model.decode(codes, name="scenes"), scenes.decode(codes))
    assert np.asarray(model.images(["a red circle"], seed=3)[0]).shape == (16, 16, 3)


def test_another_detokenizer_in_its_place_is_refused(parts, tmp_path):
    root, _, painter = parts
    shutil.copytree(root / "model", tmp_path / "model")
    other = DiffusionDetokenizer(**painter.config)
    other.save_pretrained(tmp_path / "model" / "detokenizer")
    with pytest.raises(ValueError, match="manifest mismatch: detokenizer.weight_hash"):
        load(tmp_path / "model", tokenizer="small")


def test_a_model_has_one_detokenizer(parts, capsys, tmp_path):
    root, _, _ = parts
    command = ["expand", root / "model", "--tokenizer", root / "tokenizer", "--name", "more", "--out", tmp_path / "out"]
    assert main([str(x) for x in [*command, "--detokenizer", root / "painter"]]) == 1
    assert "already has a detokenizer" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_reconstruct_takes_it(parts, tmp_path, capsys):
    root, _, _ = parts
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        to_pil(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i))).save(pictures / f"{i}.png")
    command = [
        "reconstruct",
        root / "tokenizer",
        pictures,
        "--detokenizer",
        root / "painter",
        "--out",
        tmp_path / "out",
    ]
    assert main([str(x) for x in [*command, "--out", tmp_path / "out"]]) == 0, capsys.readouterr().err
    names = [score["name"] for score in json.loads((tmp_path / "out" / "results.json").read_text())["scores"]]
    assert "psnr" in names and len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 3
