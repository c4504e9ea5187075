"""Bodies and conditions of diffusion models: what they say untrained, what reaches them, and what a null is."""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from unitok.nn.denoisers import Conditioner, DiT, Hints, Sana, UNet

WIDTH, SIDE = 32, 16
ROUTES = {
    "codes as patches": {"codebook_sizes": [8], "grid": [4, 4]},
    "finer codes": {"codebook_sizes": [8], "grid": [8, 8]},
    "coarser codes": {"codebook_sizes": [8, 5], "grid": [2, 2, 2]},
    "codes as context": {"codebook_sizes": [8], "grid": [6], "codes_as": "context"},
    "one vector": {"vector_size": 7},
    "one vector as patches": {"vector_size": 7, "vectors_as": "patches", "places": [4, 4]},
    "codes and a vector as patches": {
        "codebook_sizes": [8],
        "grid": [8, 8],
        "vector_size": 7,
        "vectors_as": "patches",
        "places": [4, 4],
    },
    "vectors as context": {"vector_size": 7, "vectors_as": "context"},
    "texts": {"text_size": 9},
    "everything": {"codebook_sizes": [8], "grid": [4, 4], "vector_size": 7, "text_size": 9},
    "two to attend to": {"vector_size": 7, "vectors_as": "context", "text_size": 9},
}


def body_for(kind: str, conditioner: Conditioner, out: int = 3) -> nn.Module:
    c = conditioner
    if kind == "dit":
        return DiT(3, out, SIDE, 4, WIDTH, 2, 2, c.places if c.has_patches else None, c.has_context)
    return UNet(
        3, out, SIDE, [16, 32], [False, True], 1, 8, WIDTH, c.has_patches, c.has_vector, c.has_context
    )  # fmt: skip


def randomised(module: nn.Module) -> nn.Module:
    """With no weight at 0, as after training."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return module.eval()


def parts_for(conditioner: Conditioner, seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    parts = {}
    if "codes" in conditioner.parts:
        sizes, places = conditioner.sizes, int(torch.tensor(conditioner.positions).prod())
        codes = [torch.randint(size, (2, places), generator=g) for size in sizes]
        parts["codes"] = torch.stack(codes, 2).flatten(1)
    if "vectors" in conditioner.parts:
        parts["vectors"] = torch.randn(2, 1 if conditioner.has_vector else 3, 7, generator=g)
    if "texts" in conditioner.parts:
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        parts["texts"] = (torch.randn(2, 5, 9, generator=g), mask)
    return parts


@pytest.fixture(params=ROUTES, ids=str)
def conditioner(request):
    torch.manual_seed(0)
    return Conditioner(WIDTH, **ROUTES[request.param])


@pytest.fixture(params=["dit", "unet"])
def body(request, conditioner):
    torch.manual_seed(1)
    return body_for(request.param, conditioner)


@pytest.fixture
def x():
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


T = torch.tensor([3.0, 700.0])


def test_untrained_they_say_nothing_and_pass_on_what_comes_in(body, conditioner, x):
    hints = conditioner(2, **parts_for(conditioner))
    assert body(x, T, hints).abs().max() == 0
    if isinstance(body, DiT):
        tokens, time = torch.randn(2, 16, WIDTH), torch.randn(2, WIDTH)
        for block in body.blocks:
            assert torch.equal(block(tokens, time, hints.context, None), tokens)


def test_diffusers_own_dit_does_say_something_untrained():
    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=3, out_channels=3, num_layers=2, sample_size=SIDE,
        patch_size=4, num_embeds_ada_norm=10,
    )  # fmt: skip
    out = theirs(torch.randn(2, 3, SIDE, SIDE), timestep=T.long(), class_labels=torch.tensor([1, 2])).sample
    assert out.std() > 0.1


def test_every_part_of_a_condition_reaches_the_picture(body, conditioner, x):
    randomised(body), randomised(conditioner)
    parts, others = parts_for(conditioner), parts_for(conditioner, seed=1)
    out = body(x, T, conditioner(2, **parts))
    assert (body(x, T + 20, conditioner(2, **parts)) - out).abs().max() > 1e-4
    for part in parts:
        changed = body(x, T, conditioner(2, **{**parts, part: others[part]}))
        assert (changed - out).abs().amax((1, 2, 3)).min() > 1e-5


def test_dropped_is_missing(body, conditioner, x):
    """A dropped part of a picture gives what a condition without it gives, and leaves the other picture alone."""
    randomised(body), randomised(conditioner)
    parts = parts_for(conditioner)
    whole = body(x, T, conditioner(2, **parts))
    for part in parts:
        dropped = {name: torch.tensor([name == part, False]) for name in parts}
        out = body(x, T, conditioner(2, **parts, dropped=dropped))
        without = {name: value for name, value in parts.items() if name != part}
        torch.testing.assert_close(out[0], body(x, T, conditioner(2, **without))[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(out[1], whole[1], atol=1e-5, rtol=0)
        assert (out[0] - whole[0]).abs().max() > 1e-5


def test_what_a_mask_hides_has_no_effect(x):
    conditioner = randomised(Conditioner(WIDTH, text_size=9))
    for kind in ("dit", "unet"):
        body = randomised(body_for(kind, conditioner))
        states, mask = parts_for(conditioner)["texts"]
        out = body(x, T, conditioner(2, texts=(states, mask)))
        hidden = states.clone()
        hidden[1, 3:] += 5
        torch.testing.assert_close(body(x, T, conditioner(2, texts=(hidden, mask))), out, atol=1e-6, rtol=0)
        shorter = body(x[1:], T[1:], conditioner(1, texts=(states[1:, :3], mask[1:, :3])))
        torch.testing.assert_close(shorter, out[1:], atol=1e-5, rtol=0)


def test_a_text_of_no_tokens_is_no_text(x):
    conditioner = randomised(Conditioner(WIDTH, text_size=9))
    body = randomised(body_for("dit", conditioner))
    states, mask = parts_for(conditioner)["texts"]
    out = body(x, T, conditioner(2, texts=(states, mask & torch.tensor([[True], [False]]))))
    torch.testing.assert_close(out[0], body(x, T, conditioner(2, texts=(states, mask)))[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[1], body(x, T, conditioner(2))[1], atol=1e-5, rtol=0)


def test_two_batches_of_hints_are_one(body, conditioner, x):
    randomised(body), randomised(conditioner)
    first, second = conditioner(2, **parts_for(conditioner)), conditioner(2)
    both = body(torch.cat([x, x]), torch.cat([T, T]), Hints.cat(first, second))
    for found, hints in zip(both.split(2), (first, second), strict=True):
        torch.testing.assert_close(found, body(x, T, hints), atol=1e-5, rtol=0)


def test_codes_stand_where_they_belong():
    """At the input of a DiT a code changes the patches it covers, and no others."""
    for grid in ([4, 4], [8, 8], [2, 2]):
        conditioner = randomised(Conditioner(WIDTH, [8], grid))
        dit = randomised(DiT(3, 3, SIDE, 4, WIDTH, 0, 2, tuple(grid)))
        codes = torch.zeros(1, grid[0] * grid[1], dtype=torch.int64)
        other = codes.clone()
        other[0, grid[1] - 1] = 5  # the right upper corner
        x = torch.zeros(1, 3, SIDE, SIDE)
        changed = dit(x, T[:1], conditioner(1, codes)) - dit(x, T[:1], conditioner(1, other))
        side = SIDE // min(grid[0], 4)
        corner = changed[..., :side, -side:].abs().amax().item()
        changed[..., :side, -side:] = 0
        assert corner > 1e-4 and changed.abs().max() == 0


def test_sub_tokens_have_tables_of_their_own():
    conditioner = Conditioner(WIDTH, [8], [2, 2, 2])  # one codebook, two sub-tokens
    a, b = (conditioner(1, torch.tensor([codes] * 4).view(1, 8)).patches for codes in ([1, 2], [2, 1]))
    assert (a - b).abs().max() > 0.1


def test_vectors_are_normalised():
    conditioner = Conditioner(WIDTH, vector_size=7)
    assert not conditioner.fitted
    vectors = torch.randn(50, 1, 7) * 9 + 100
    conditioner.fit(vectors)
    plain = Conditioner(WIDTH, vector_size=7)
    plain.load_state_dict({**conditioner.state_dict(), "mean": torch.zeros(7), "std": torch.ones(7)})
    scaled = (vectors - vectors.mean(0)) / vectors.std(0, unbiased=False)
    torch.testing.assert_close(conditioner(50, vectors=vectors).vector, plain(50, vectors=scaled).vector)
    assert conditioner.fitted


def test_published_sizes_have_their_shapes():
    """SANA 1.6B on 32-channel latents of 1024 x 1024 pixels, DiT-XL/2 on 4-channel ones of 256 x 256; no memory."""
    for width, channels, side, make in (
        (2240, 32, 32, lambda: Sana(32, 32, 32, 1, 2240, 20, 20)),
        (1152, 4, 32, lambda: DiT(4, 8, 32, 2, 1152, 28, 16, context=True)),
    ):
        with torch.device("meta"):
            conditioner = Conditioner(width, vector_size=256, vectors_as="context")
            body = make()
            out = body(
                torch.empty(2, channels, side, side), torch.empty(2), conditioner(2, vectors=torch.empty(2, 80, 256))
            )
        assert out.shape == (2, channels * (1 + (channels == 4)), side, side) and out.is_meta
        count = sum(p.numel() for p in body.parameters())
        assert count == pytest.approx(1.6e9 if channels == 32 else 0.675e9 + 28 * 4 * 1152**2, rel=0.02)


def test_sana_says_nothing_untrained_and_hears_its_context(x):
    conditioner = Conditioner(WIDTH, vector_size=7, vectors_as="context", text_size=9)
    body, parts = Sana(3, 3, SIDE, 2, WIDTH, 2, 2), parts_for(conditioner)
    assert body(x, T, conditioner(2, **parts)).abs().max() == 0
    randomised(body), randomised(conditioner)
    out = body(x, T, conditioner(2, **parts))
    states, mask = parts["texts"]
    hidden = states + 5 * ~mask[..., None]
    torch.testing.assert_close(
        body(x, T, conditioner(2, vectors=parts["vectors"], texts=(hidden, mask))), out, atol=1e-5, rtol=0
    )
    for part, other in parts_for(conditioner, seed=1).items():
        assert (body(x, T, conditioner(2, **{**parts, part: other})) - out).abs().amax((1, 2, 3)).min() > 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiT(3, 3, 16, 5, 32, 1, 2), "patch_size 5 must divide the picture's 16"),
        (lambda: DiT(3, 3, 16, 4, 32, 1, 2, (3, 3)), "codes of grid .3, 3. do not fit 4 x 4 patches"),
        (lambda: DiT(3, 3, 16, 4, 32, 1, 2, (4, 2)), "codes of grid .4, 2. do not fit"),
        (lambda: Sana(3, 3, 16, 2, 48, 1, 2), "heads 2 and 32 the width 48"),
        (lambda: UNet(3, 3, 18, [16, 16, 16], [False] * 3, 1, 8, 32), "a side divisible by 4, got 18"),
        (lambda: UNet(3, 3, 16, [16, 16], [False], 1, 8, 32), "as many values of unet_attention, got 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_local_convolutions_change_nothing_at_first_and_then_see_the_patches_beside(x):
    torch.manual_seed(0)
    local = DiT(3, 3, SIDE, 4, WIDTH, 1, 2, local=True)
    plain = DiT(3, 3, SIDE, 4, WIDTH, 1, 2)
    state = randomised(plain).state_dict()
    missing, unexpected = local.load_state_dict(state, strict=False)
    assert missing == ["blocks.0.local.weight", "blocks.0.local.bias"] and not unexpected
    assert torch.equal(local(x, T, Hints()), plain(x, T, Hints()))

    block = local.blocks[0]
    torch.nn.init.normal_(block.local.weight)
    torch.nn.init.zeros_(block.modulation.weight)  # neither attention nor MLP: what is left are the convolutions
    torch.nn.init.zeros_(block.modulation.bias)
    changed = x.clone()
    changed[:, :, 4:8, 8:12] += 1  # the patch in row 1, column 2
    moved = (local(changed, T, Hints()) - local(x, T, Hints())).abs().amax((0, 1)) > 1e-6
    rows, columns = (moved.view(4, 4, 4, 4).amax((1, 3)) > 0).nonzero(as_tuple=True)
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == {(r, c) for r in (0, 1, 2) for c in (1, 2, 3)}
