"""What the tests of converters share: files to convert, and the comparison with the original implementation."""

from __future__ import annotations

import pytest
import torch

from unitok.convert import convert
from unitok.tokenizers.base import load_tokenizer

TIE = 1e-5  # relative difference of the two nearest distances, below which either code is right
MAX_TIES = 1e-3
MAX_ERROR = 1e-4


@pytest.fixture(scope="session")
def pictures():
    """Noise around a colour of its own in every 8 x 8 square: [4, 3, 64, 64] in [0, 1]."""
    draw = torch.Generator().manual_seed(0)
    squares = torch.rand(4, 3, 8, 8, generator=draw).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return 0.7 * squares + 0.3 * torch.rand(4, 3, 64, 64, generator=draw)


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights that keep the spread of what goes through them; no biases, which would give one code everywhere."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            std = (2 / parameter[0].numel()) ** 0.5
            parameter.data = torch.randn(parameter.shape, generator=draw) * std
        else:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1


@pytest.fixture(scope="session", name="randomise")
def randomise_fixture():
    return randomise


@pytest.fixture
def converted(tmp_path):
    """(format, *what each file holds, options) -> the tokenizer, loaded from the folder that `convert` wrote."""

    def run(name, *contents, legacy=False, **options):
        files = []
        for number, content in enumerate(contents):
            if isinstance(content, (str, type(tmp_path))):
                files.append(content)
                continue
            files.append(tmp_path / f"file{number}.bin")  # no suffix says what it is
            torch.save(content, files[-1], _use_new_zipfile_serialization=not legacy)
        convert(name, files, tmp_path / "out", **options)
        return load_tokenizer(tmp_path / "out")

    return run


@pytest.fixture
def same():
    """Codes [B, N] equal but for ties of distances [B, N, V], whose share is printed; pictures within MAX_ERROR."""

    def check(codes, expected, distances, images=None, expected_images=None):
        first, second = distances.topk(2, dim=-1, largest=False).values.unbind(-1)
        ties = (second - first) < TIE * second.abs()
        print(f"ties: {ties.float().mean():.4%} of {ties.numel()} codes")
        assert ties.float().mean() < MAX_TIES
        assert ((codes == expected.reshape(codes.shape)) | ties.reshape(codes.shape)).all()
        assert codes.unique().numel() > distances.shape[-1] / 8, "a comparison of few codes says little"
        if images is not None:
            assert (images - expected_images).abs().max() < MAX_ERROR
            assert images.std() > 0.01

    return check
