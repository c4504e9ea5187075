"""`unitok convert`: the registry of formats and the command."""

from __future__ import annotations

import pytest
import torch

from unitok.cli import main
from unitok.convert import convert, formats, narrow
from unitok.convert.base import Source
from unitok.tokenizers.base import load_tokenizer
from unitok.tokenizers.vqgan import VQGANTokenizer


@pytest.fixture
def published():
    """Tensors of a small file in taming's layout, which is that of our own."""
    torch.manual_seed(0)
    return VQGANTokenizer(32, 32, (1, 2), 1, 8, (), codebook_size=16, code_dim=4).state_dict()


def test_every_format_says_what_it_is(capsys):
    for name, format in formats().items():
        assert format.name == name and len(format.about) > 10
    assert main(["convert", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in formats()), "the help of the command lists the formats"


def test_the_command_converts_and_says_what_it_made(published, tmp_path, capsys):
    torch.save({"state_dict": published}, tmp_path / "last.ckpt")
    out = tmp_path / "out"
    assert main(["convert", "taming", str(tmp_path / "last.ckpt"), "--out", str(out), "--image-size", "32"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: 16 codes, a grid of 16 x 16 at 32 pixels, raw weights"
    tokenizer = load_tokenizer(out)
    assert all(torch.equal(tensor, published[name]) for name, tensor in tokenizer.state_dict().items())
    assert tokenizer.provenance["files"].keys() == {"last.ckpt"}


def test_the_command_fails_with_one_plain_line(published, tmp_path, capsys):
    torch.save(published, tmp_path / "last.ckpt")
    out = str(tmp_path / "out")
    for arguments, line in (
        (["tamming", str(tmp_path / "last.ckpt")], "unknown format 'tamming' (did you mean 'taming'?)"),
        (["llamagen", str(tmp_path / "last.ckpt")], "not of format llamagen; they look like chameleon or janus"),
        (["taming", str(tmp_path / "none.ckpt")], "no such file"),
        (["taming", str(tmp_path / "last.ckpt"), "--image-size", "31"], "image_size = 31"),
    ):
        assert main(["convert", *arguments, "--out", out]) == 1
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1 and line in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_folder_that_was_converted_can_be_converted_again(published, tmp_path):
    torch.save(published, tmp_path / "last.ckpt")
    first = convert("taming", [tmp_path / "last.ckpt"], tmp_path / "out")
    again = convert("taming", [tmp_path / "last.ckpt"], tmp_path / "out")
    assert first.hashes() == again.hashes() == load_tokenizer(tmp_path / "out").hashes()


def test_a_shard_of_a_larger_model_may_hold_nothing_of_its_tokenizer():
    zero, [prefix, *_] = torch.zeros(1), formats()["emu3"].prefixes
    source = Source(({"model.text.a": zero}, {f"{prefix}encoder.a": zero, "model.text.b": zero}))
    assert [list(table) for table in narrow(source, formats()["emu3"]).tables] == [[], ["encoder.a"]]
    alone = Source(({"encoder.a": zero},))
    assert narrow(alone, formats()["emu3"]).shapes == alone.shapes
