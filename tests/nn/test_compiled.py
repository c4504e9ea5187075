"""Compiled tokenizers give the codes of the plain ones, padded, in either type, and where nothing can be compiled."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from unitok import tokenizers
from unitok.checkpoint import state_hash
from unitok.nn import compiled
from unitok.nn.compiled import Compiled, GroupNorm, UpsampledConv, choose_dtype
from unitok.nn.taming import Upsample

needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="there is no C++ compiler")
NAMES = tokenizers.names()


def make(name, **sizes):
    """A tiny tokenizer of this name whose codes vary, and pictures with flat and with busy places."""
    torch.manual_seed(0)
    tokenizer = (tokenizers.get(name)(image_size=16, **sizes) if sizes else tokenizers.get(name).tiny()).eval()
    side = tokenizer.image_size
    squares = torch.rand(5, 3, side // 4, side // 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = 0.7 * squares + 0.3 * torch.rand(5, 3, side, side)
    if name == "vqgan":  # codes among the vectors, not all in one place
        met = tokenizer.vectors(images * 2 - 1).flatten(0, 1)
        tokenizer.quantize.embedding.weight.data = met[torch.randperm(len(met))[:32]].detach()
    return tokenizer, images


@pytest.fixture
def uncompiled(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("nothing is compiled here\nwith a second line")

    monkeypatch.setattr(torch, "compile", fail)


# ---- layers


def test_group_norm_is_that_of_torch_far_from_zero_too():
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(4, 32)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    for centre in (0, 1000):
        x = torch.randn(3, 32, 13, 17) * 2 + centre + torch.arange(3)[:, None, None, None]
        with torch.no_grad():
            expected = torch.nn.functional.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), norm.eps)
            assert (GroupNorm(norm)(x) - expected).abs().max() < 1e-4
    naive = (x.square().mean() - x.mean().square()).sqrt()  # what the moments about zero would give
    assert (naive - 2).abs() > 0.01


@pytest.mark.parametrize("size", [(1, 1), (5, 7)])
def test_upsampling_within_the_convolution(size):
    torch.manual_seed(0)
    plain = Upsample(16)
    x = torch.randn(2, 16, *size)
    with torch.no_grad():
        made, expected = UpsampledConv(plain.conv)(x), plain(x)
    assert made.shape == expected.shape
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


# ---- what every tokenizer gives


@pytest.mark.parametrize("name", NAMES)
def test_uncompiled_it_still_gives_the_codes_and_says_so(name, uncompiled):
    tokenizer, images = make(name)
    before, lines = state_hash(tokenizer.own_state()), []
    fast = Compiled(tokenizer, batch_size=2, say=lines.append)
    codes = tokenizer.encode(images)
    assert torch.equal(fast.encode(images), codes)  # five pictures: the last call has one, and one of padding
    assert torch.equal(fast.encode(images[:1]), codes[:1])
    side = tokenizer.image_size
    assert lines == [
        f"encode is not compiled for {side} x {side} pixels in float32, and slower: nothing is compiled here"
    ]
    try:
        expected = tokenizer.decode(codes)
    except NotImplementedError as error:  # it says what is needed instead, and so does the fast one
        with pytest.raises(NotImplementedError, match=re.escape(str(error))):
            fast.decode(codes)
    else:
        assert (fast.decode(codes) - expected).abs().max() < 1e-4
    assert state_hash(tokenizer.own_state()) == before and tokenizer.dtype == torch.float32
    if tokenizer.fully_convolutional:
        wide = torch.cat([images, images.flip(3)], 3)
        assert torch.equal(fast.encode(wide), tokenizer.encode(wide))
    with pytest.raises(ValueError, match="images must lie in"):
        fast.encode(images + 1)
    with pytest.raises(ValueError, match="code out of range"):
        fast.decode(codes + max(tokenizer.codebook_sizes))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_moves_few_codes_or_is_refused(name, uncompiled):
    tokenizer, images = make(name)
    if tokenizer.exact is None:
        with pytest.raises(ValueError, match=f"{type(tokenizer).__name__} computes in float32 only"):
            Compiled(tokenizer, "bfloat16")
        return
    fast = Compiled(tokenizer, "bfloat16", batch_size=2, say=lambda line: None)
    codes, expected = fast.encode(images), tokenizer.encode(images)
    assert codes.dtype == torch.int64
    assert 0.9 < (codes == expected).float().mean()
    with suppress(NotImplementedError):  # its codes need a detokenizer
        assert (fast.decode(expected).float() - tokenizer.decode(expected)).abs().max() < 0.05
    kept = {
        inner for name, module in fast.plain.named_modules() if name in tokenizer.exact for inner in module.modules()
    }
    types = {kind: {p.dtype for m in fast.plain.modules() if (m in kept) == kind for p in m.parameters(recurse=False)}
             for kind in (True, False)}  # fmt: skip
    assert kept and types[True] <= {torch.float32} and types[False] == {torch.bfloat16}
    assert tokenizer.dtype == torch.float32


# ---- the type


@pytest.mark.parametrize(("speed", "chosen"), [(2.0, "bfloat16"), (0.5, "float32")])
def test_auto_takes_the_faster_type_and_says_so(monkeypatch, speed, chosen):
    lines: list[str] = []
    monkeypatch.setattr(compiled, "bfloat16_speed", lambda device: speed)
    tokenizer = tokenizers.get("fsq").tiny()
    assert choose_dtype("auto", tokenizer, lines.append) == getattr(torch, chosen)
    assert lines == [f"{chosen}: bfloat16 convolutions are {speed:.2g} times as fast as float32 here"]


def test_auto_measures_in_a_moment_and_other_names_are_refused():
    assert 0.01 < compiled.bfloat16_speed(torch.device("cpu"), runs=1) < 100
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, auto, got 'half'"):
        choose_dtype("half", tokenizers.get("fsq").tiny())
    lines: list[str] = []
    assert choose_dtype("auto", tokenizers.get("emu3").tiny(), lines.append) == torch.float32
    assert lines == ["Emu3Tokenizer computes in float32 only"]


# ---- compiled


def test_without_a_compiler_one_line_says_so():
    import torch._inductor.config as inductor

    tokenizer, images = make("fsq")
    lines: list[str] = []
    with inductor.patch({"cpp.cxx": ("/nowhere/g++",)}):
        assert torch.equal(Compiled(tokenizer, say=lines.append).encode(images), tokenizer.encode(images))
    assert len(lines) == 1 and lines[0].startswith("encode is not compiled for 16 x 16 pixels") and "\n" not in lines[0]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqgan", "dvae"])
def test_compiled_it_gives_the_codes_of_the_plain_one(name):
    small = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "latent": 8, "attention": (), "norm_groups": 4,
             "codebook_size": 32, "code_dim": 4}  # fmt: skip
    tokenizer, images = make(name, **(small if name == "vqgan" else {"width": 8, "groups": 2, "blocks": 1}))
    lines: list[str] = []
    codes = tokenizer.encode(images)
    # each network is compiled once, with or without gradients around, and as many as there are in a process
    with torch._dynamo.config.patch(error_on_recompile=True, recompile_limit=1):
        fast = Compiled(tokenizer, batch_size=2, say=lines.append)
        assert torch.equal(fast.encode(images), codes) and codes.unique().numel() > 4
        assert (fast.decode(codes) - tokenizer.decode(codes)).abs().max() < 1e-5
        with torch.no_grad():
            assert torch.equal(fast.encode(images[3:]), codes[3:])
    said = "\n".join(lines)
    assert re.fullmatch(r"encode compiled for 16 x 16 .* s\ndecode compiled for 16 x 16 .* s", said), said


def test_the_benchmark_knows_ties():
    """Of codes that differ between two encoders it says whether the two nearest are equally near."""
    path = Path(__file__).parents[2] / "benchmarks" / "encode.py"
    spec = importlib.util.spec_from_file_location("benchmark_encode", path)
    spec.loader.exec_module(benchmark := importlib.util.module_from_spec(spec))
    tokenizer, images = make("vqgan")
    table = tokenizer.quantize.embedding.weight.data
    table += 0.1 * table.std() * torch.randn(table.shape)  # else the nearest are at no distance at all
    met = tokenizer.encode(images).flatten().bincount(minlength=len(table))
    first, *_, unused = met.argsort(descending=True).tolist()
    table[unused] = table[first]
    codes = tokenizer.encode(images)
    benchmark.STATE.update(tokenizer=tokenizer, images=images)
    with torch.no_grad():
        gaps = benchmark.distance_gaps()
        vectors = torch.cat([tokenizer.vectors(image * 2 - 1) for image in images.split(1)]).double()
    far = torch.cdist(vectors, table[None].double()).square().sort(-1).values
    assert gaps.shape == codes.shape and torch.equal(gaps < benchmark.TIE, (codes == first) | (codes == unused))
    torch.testing.assert_close(gaps, (far[..., 1] - far[..., 0]) / far[..., 1])
