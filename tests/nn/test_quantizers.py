"""Every quantizer: code -> vector -> code over all codes, training forward against encode, gradients, dead codes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from unitok.nn import quantizers
from unitok.nn.quantizers import VQ, Quantizer, bits_to_codes, codes_to_bits, make, nearest

SETTINGS = {
    "vq": dict(size=512, dim=6),
    "vq by angle": dict(size=512, dim=6, normalize=True),
    "ema": dict(size=512, dim=6),
    "ema by angle": dict(size=512, dim=6, normalize=True),
    "simvq": dict(size=512, dim=6),
    "rvq": dict(size=64, dim=6, depth=3),
    "gumbel": dict(size=64, dim=6),
    "fsq": dict(size=0, dim=0, levels=(8, 5, 5, 5)),
    "lfq": dict(size=0, dim=0, bits=(9, 9)),
    "lfq, low bit first": dict(size=0, dim=0, bits=(6, 12), lsb_first=True),
    "bsq": dict(size=0, dim=0, bits=(9, 9)),
    "bsq, one code": dict(size=0, dim=0, bits=(18,)),
}


@pytest.fixture(params=SETTINGS)
def quantizer(request):
    torch.manual_seed(0)
    return make(request.param.replace(",", "").split()[0], **SETTINGS[request.param])


def all_codes(quantizer) -> torch.Tensor:
    """int64 [1, n, K]: every combination, or 100,000 of them."""
    sizes = [quantizer.sizes[book] for book in quantizer.books]
    if math.prod(sizes) <= 2**18:
        return torch.tensor(list(itertools.product(*map(range, sizes)))).unsqueeze(0)
    return torch.stack([torch.randint(size, (1, 100_000)) for size in sizes], -1)


def test_code_to_vector_to_code_is_exact(quantizer):
    quantizer.eval()
    codes = all_codes(quantizer)
    with torch.no_grad():
        vectors = quantizer.vectors(codes)
        if isinstance(quantizer, quantizers.RVQ):
            pytest.skip("a sum of codes may lie nearer to another first code; its round trip is over decoded vectors")
        if isinstance(quantizer, quantizers.Gumbel):
            vectors = F.one_hot(codes.squeeze(-1), 64).float()
            found = (vectors @ torch.eye(64)).argmax(-1, keepdim=True)
        elif isinstance(quantizer, quantizers.Finite):
            found = quantizer.layer.codes_to_indices(vectors).long().unsqueeze(-1)
        else:
            found = quantizer.encode(vectors)
    assert torch.equal(found, codes)


def test_training_chooses_the_codes_of_encode_and_gives_their_vectors(quantizer):
    z = torch.randn(2, 40, quantizer.dim)
    expected = quantizer.eval().encode(z)
    before = quantizer.vectors(expected).detach()
    chosen, codes, loss = quantizer.train()(z, 0)
    assert codes.dtype == torch.int64 and torch.equal(codes, expected)
    assert loss.ndim == 0 and torch.isfinite(loss)
    if not isinstance(quantizer, quantizers.Gumbel):  # soft in training
        torch.testing.assert_close(chosen, before, atol=1e-5, rtol=0)


def test_gradients_reach_what_comes_in(quantizer):
    z = torch.randn(2, 40, quantizer.dim, requires_grad=True)
    chosen, _, loss = quantizer.train()(z, 0)
    (chosen.square().sum() + loss).backward()
    assert z.grad is not None and (z.grad.abs().sum(-1) > 0).all()


def test_nearest_is_the_least_distance_in_chunks_as_at_once():
    z, table = torch.randn(3, 1001, 16), torch.randn(300, 16)
    expected = torch.cdist(z.double(), table.double().expand(3, -1, -1)).argmin(-1)
    assert torch.equal(nearest(z, table), expected)


def test_taming_s_legacy_weights_stand_on_the_other_term():
    torch.manual_seed(0)
    z = torch.randn(1, 50, 4, requires_grad=True)
    plain, legacy = VQ(32, 4), VQ(32, 4, legacy=True)
    legacy.load_state_dict(plain.state_dict())
    sizes = {}
    for name, vq in (("plain", plain), ("legacy", legacy)):
        loss = vq(z, 0)[2]
        to_vectors, to_codes = torch.autograd.grad(loss, [z, vq.embedding.weight])
        sizes[name] = (to_vectors.norm(), to_codes.norm())
    assert sizes["legacy"][0] / sizes["plain"][0] == pytest.approx(4, rel=1e-4)
    assert sizes["legacy"][1] / sizes["plain"][1] == pytest.approx(1 / 4, rel=1e-4)


def test_codes_that_nothing_uses_become_vectors_of_the_batch():
    torch.manual_seed(0)
    vq = VQ(64, 4, revive_after=3).train()
    vq.embedding.weight.data.fill_(0.1)  # collapsed: every vector falls to one code
    used = []
    for step in range(8):
        z = torch.randn(4, 100, 4)
        used.append(vq(z, step)[1].unique().numel())
    assert used[0] == 1 and used[-1] > 48
    kept = VQ(64, 4).train()
    kept.embedding.weight.data.fill_(0.1)
    assert [kept(torch.randn(4, 100, 4), step)[1].unique().numel() for step in range(8)] == [1] * 8


@pytest.mark.parametrize("sizes", [(3,), (2, 5), (9, 9)])
def test_bits_and_the_order_of_codes(sizes):
    bits = torch.rand(5, sum(sizes)) > 0.5
    for lsb_first in (False, True):
        assert torch.equal(codes_to_bits(bits_to_codes(bits, sizes, lsb_first), sizes, lsb_first), bits)
    one = torch.zeros(1, sum(sizes), dtype=torch.bool)
    one[0, 0] = True  # the first channel
    assert (
        bits_to_codes(one, sizes)[0, 0] == 2 ** (sizes[0] - 1) and bits_to_codes(one, sizes, lsb_first=True)[0, 0] == 1
    )


def test_vqp_agrees_about_the_order_of_bits():
    lfq = make("lfq", size=0, dim=0, bits=(9,)).eval()
    z = torch.randn(2, 50, 9)
    _, theirs, _ = lfq.layers[0](z)
    assert torch.equal(lfq.encode(z).squeeze(-1), theirs.long())
    torch.testing.assert_close(lfq.vectors(lfq.encode(z)), lfq.layers[0].indices_to_codes(theirs))


def test_residual_codes_are_vqp_s():
    torch.manual_seed(0)
    rvq = make("rvq", size=64, dim=6, depth=3).eval()
    z = torch.randn(2, 50, 6) / 64
    chosen, theirs, _ = rvq.layer(z)
    assert torch.equal(rvq.encode(z), theirs)
    torch.testing.assert_close(rvq.vectors(theirs), chosen)
    assert torch.equal(rvq.encode(rvq.vectors(theirs)), rvq.encode(chosen))


def test_entropy_terms_prefer_sure_and_varied_codes():
    lfq = make("lfq", size=0, dim=0, bits=(6,), beta=0.0).train()
    varied = torch.where(torch.rand(1, 500, 6) > 0.5, 1.0, -1.0)
    losses = [lfq(z, 0)[2].item() for z in (varied, torch.ones(1, 500, 6), torch.randn(1, 500, 6) * 1e-3)]
    assert losses[0] < losses[1] and losses[0] < losses[2]
    assert losses[0] == pytest.approx(-0.1 * 6 * math.log(2), rel=0.05)  # all 64 codes, each for sure


def test_the_gumbel_temperature_falls_geometrically():
    gumbel = make("gumbel", size=8, dim=2, temperature=(1.0, 1 / 16), temperature_steps=100)
    assert [gumbel.tau(s) for s in (0, 50, 100, 1000)] == pytest.approx([1, 1 / 4, 1 / 16, 1 / 16])


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("pq", {}, "unknown quantizer 'pq'; known: vq"),
        ("fsq", {"levels": (8, 2)}, "levels, integers of 3 or more"),
        ("fsq", {"levels": ()}, "needs levels"),
        ("lfq", {"bits": ()}, "needs bits"),
        ("bsq", {"bits": (9, 0)}, "needs bits"),
        ("rvq", {"depth": 0}, "depth >= 1"),
    ],
)
def test_impossible_sizes(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        make(name, size=8, dim=2, **sizes)


@pytest.mark.parametrize("call", ["forward(x, 0)", "encode(x)", "vectors(x)"])
def test_a_quantizer_that_lacks_a_method_says_which(call):
    class Bare(Quantizer):
        pass

    with pytest.raises(NotImplementedError, match=rf"Bare does not define {call.partition('(')[0]}\(\)"):
        eval(f"bare.{call}", {"bare": Bare(), "x": torch.zeros(1, 1, 1)})
