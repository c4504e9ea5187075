"""The diffusion detokenizer: guidance, dropping, folders, inversion, learning and distillation, in every configuration.

Its numbers are tested in tests/nn/test_diffusion.py, its bodies in tests/nn/test_denoisers.py.
"""

import copy
import os
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from unitok import checkpoint
from unitok.detokenizers.base import Condition, load_detokenizer
from unitok.detokenizers.diffusion import DiffusionDetokenizer
from unitok.nn.latents import to_images, to_latents

SMALL = {"image_size": 16, "width": 32, "depth": 1, "heads": 2, "timesteps": 100, "steps": 4}
CODES = {"codebook_sizes": [16], "grid": [2, 2]}
UNET = {"body": "unet", "unet_channels": [16, 32], "unet_attention": [False, True], "unet_layers": 1}
KINDS = {
    "epsilon, ancestral": {**CODES, "prediction": "epsilon", "schedule": "linear", "sampler": "ddpm"},
    "x0": {**CODES, "prediction": "x0"},
    "v, learned variance": {**CODES, "learned_variance": True, "sampler": "ddpm", "timestep_sampling": "importance"},
    "flow": {**CODES, "prediction": "flow"},
    "U-Net": {**CODES, **UNET, "learned_variance": True},
    "codes in context": {"codebook_sizes": [16], "grid": [4], "codes_as": "context"},
    "one vector": {"vector_size": 5},
    "one vector as patches": {"vector_size": 5, "vectors_as": "patches"},
    "U-Net, codes in context, a vector as patches": {
        **UNET,
        "codebook_sizes": [16],
        "grid": [4],
        "codes_as": "context",
        "vector_size": 5,
        "vectors_as": "patches",
    },
    "vectors": {**UNET, "vector_size": 5, "vectors_as": "context"},
    "codes and a vector": {**CODES, "vector_size": 5},
    "texts": {"text_model": "text"},
    "latents": {**CODES, "vae": "kl", "patch_size": 2},
    "SANA": {"body": "sana", "vector_size": 5, "vectors_as": "context", "patch_size": 2},
    "tiny latents": {**UNET, **CODES, "vae": "tiny"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random networks of others: a text encoder, two VAEs with latents at half the size."""
    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(checkpoint.open_folder("builtin:scenes"))
    words.save_pretrained(root / "text")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=12, eos_token_id=words.eos_token_id,
        )
    ).save_pretrained(root / "text")  # fmt: skip
    diffusers.AutoencoderKL(
        block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=4,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, scaling_factor=0.5, shift_factor=0.1,
    ).save_pretrained(root / "kl")  # fmt: skip
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=[8, 8], decoder_block_out_channels=[8, 8], num_encoder_blocks=[1, 1],
        num_decoder_blocks=[1, 1], latent_channels=6,
    ).save_pretrained(root / "tiny")  # fmt: skip
    return root


@pytest.fixture(params=KINDS, ids=str)
def detokenizer(request, folders):
    return build(KINDS[request.param], folders)


def build(arguments, folders=None, randomise=True):
    arguments = {k: str(folders / v) if k in ("vae", "text_model") else v for k, v in arguments.items()}
    torch.manual_seed(1)
    made = DiffusionDetokenizer(**{**SMALL, **arguments}).eval()
    if randomise:  # a new one says nothing, whatever it is told
        with torch.no_grad():
            for parameter in [*made.body.parameters(), *made.conditioner.parameters()]:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return made


def condition_for(detokenizer, seed=0):
    g = torch.Generator().manual_seed(seed)
    condition = Condition()
    if "codes" in detokenizer.takes:
        condition.codes, condition.grid = torch.randint(16, (3, 4), generator=g), detokenizer.code_grid
    if "vectors" in detokenizer.takes:
        condition.vectors = torch.randn(3, 4 if detokenizer.vectors_as == "context" else 1, 5, generator=g)
    if "texts" in detokenizer.takes:
        words = [["a red circle", "two squares", ""], ["a blue circle on the left", "one square", "a star"]]
        condition.texts = words[seed]
    return condition


def counted(detokenizer):
    calls = []
    detokenizer.body.register_forward_hook(lambda _, inputs, out: calls.append(len(inputs[0])))
    return calls


SEEDS = [7, 8, 9]


def test_a_picture_is_of_its_own_seed_and_condition(detokenizer):
    condition, others = condition_for(detokenizer), condition_for(detokenizer, seed=1)
    for options in ({}, {"guidance": 2.5}, {"guidance": 2.0, "negative": others}):
        images = detokenizer.generate(condition, seeds=SEEDS, **options)
        assert images.shape == (3, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
        assert torch.equal(detokenizer.generate(condition, seeds=SEEDS, **options), images)
        row = {**options, **({"negative": others.rows([2])} if "negative" in options else {})}
        alone = detokenizer.generate(condition.rows([2]), seeds=[9], **row)
        torch.testing.assert_close(alone, images[2:], atol=1e-5, rtol=0)
    assert (detokenizer.generate(others, seeds=SEEDS) - detokenizer.generate(condition, seeds=SEEDS)).abs().max() > 1e-4


def test_guidance_runs_the_branches_it_needs(detokenizer):
    condition, others, calls = condition_for(detokenizer), condition_for(detokenizer, seed=1), counted(detokenizer)
    steps = detokenizer.steps
    alone = detokenizer.generate(condition, seeds=SEEDS, guidance=1.0)
    assert calls == [3] * steps
    assert torch.equal(detokenizer.generate(condition, seeds=SEEDS, guidance=1.0, negative=others), alone)
    calls.clear()
    nothing = detokenizer.generate(condition, seeds=SEEDS, guidance=0.0)
    assert calls == [3] * steps
    assert torch.equal(detokenizer.generate(others, seeds=SEEDS, guidance=0.0), nothing)  # whatever the condition
    calls.clear()
    guided = detokenizer.generate(condition, seeds=SEEDS, guidance=3.0)
    assert calls == [6] * steps and (guided - alone).abs().max() > 1e-4
    # a negative condition that is the condition itself takes nothing away
    same = detokenizer.generate(condition, seeds=SEEDS, guidance=3.0, negative=condition)
    torch.testing.assert_close(same, alone, atol=1e-5, rtol=0)
    only = detokenizer.generate(condition, seeds=SEEDS, guidance=0.0, negative=others)
    torch.testing.assert_close(only, detokenizer.generate(others, seeds=SEEDS), atol=1e-6, rtol=0)


def test_guidance_acts_in_its_interval():
    whole, half, none = (build({**CODES, "guidance_interval": i}) for i in ([0, 1], [0, 0.5], [0, 0]))
    condition, calls = condition_for(whole), counted(half)
    pictures = [d.generate(condition, seeds=SEEDS, guidance=3.0) for d in (whole, half, none)]
    assert calls == [3, 3, 6, 6]  # from pure noise down
    assert torch.equal(pictures[2], whole.generate(condition, seeds=SEEDS))
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[1], pictures[2])


def test_dropped_conditions_are_the_null_path(folders):
    """All parts dropped are what guidance 0 runs; a part that is missing is that part dropped."""
    detokenizer = build(KINDS["codes and a vector"])
    condition = condition_for(detokenizer)
    x = torch.randn(3, *detokenizer.shape)
    everyone = torch.ones(3, dtype=torch.bool)
    dropped = detokenizer._hints(condition, {"codes": everyone, "vectors": everyone})
    t = torch.full((3,), 40)
    assert torch.equal(detokenizer._run(x, t, dropped), detokenizer._predict(condition, 0.0)(x, 40))
    bare = Condition(codes=condition.codes, grid=condition.grid)
    missing = detokenizer._predict(bare)(x, 40)
    one = detokenizer._hints(condition, {"codes": ~everyone, "vectors": everyone})
    torch.testing.assert_close(detokenizer._run(x, t, one), missing)
    torch.manual_seed(0)
    detokenizer.drop = 0.3
    drops = [detokenizer._drops(1000) for _ in range(20)]
    for part in ("codes", "vectors"):
        assert torch.cat([d[part] for d in drops]).float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_folders_hold_what_is_ours(detokenizer, tmp_path):
    condition = condition_for(detokenizer)
    detokenizer.save_pretrained(tmp_path)
    assert not any(key.startswith(("vae.", "text_encoder.")) for key in detokenizer.own_state())
    loaded = load_detokenizer(tmp_path)
    for options in ({}, {"guidance": 2.0, "steps": 3}):
        pictures = [d.generate(condition, seeds=SEEDS, **options) for d in (detokenizer, loaded)]
        assert torch.equal(*pictures)


def test_in_half_precision_it_draws_nearly_the_same(detokenizer):
    condition = condition_for(detokenizer)
    whole = detokenizer.generate(condition, seeds=SEEDS, guidance=2.0)
    half = copy.deepcopy(detokenizer).to(torch.bfloat16).generate(condition, seeds=SEEDS, guidance=2.0)
    assert half.dtype == torch.float32 and (half - whole).abs().mean() < 0.02


def test_a_folder_knows_its_frozen_networks_again(folders, tmp_path):
    build(KINDS["latents"], folders).save_pretrained(tmp_path / "ours")
    vae = diffusers.AutoencoderKL.from_pretrained(folders / "kl")
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(2)
    vae.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="its vae is not the one it was made with"):
        DiffusionDetokenizer.from_pretrained(tmp_path / "ours", vae=str(tmp_path / "other"))


def test_it_trains_what_is_its_own(detokenizer):
    condition, images = condition_for(detokenizer), torch.rand(3, 3, 16, 16)
    detokenizer.train()
    torch.manual_seed(0)
    loss, parts = detokenizer.loss(images, condition, 0)
    loss.backward()
    assert loss.isfinite() and all(not v.requires_grad for v in parts.values())
    assert ("bits" in parts) == detokenizer.learned_variance
    torch.manual_seed(0)
    again, _ = detokenizer.loss(images, condition, 1)  # the same draws
    if detokenizer.vector_size is None:  # at step 0 vectors are first normalised
        assert torch.equal(again, loss)
    for name, parameter in detokenizer.named_parameters():
        if name.startswith(("vae.", "text_encoder.")):
            assert not parameter.requires_grad
        elif not name.startswith("conditioner.null"):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert not any(m.training for n in detokenizer.frozen for m in detokenizer.get_submodule(n).modules())


def test_a_text_encoder_can_be_trained_too(folders, tmp_path):
    detokenizer = build({"text_model": "text", "text_trained": True}, folders).train()
    loss, _ = detokenizer.loss(torch.rand(3, 3, 16, 16), condition_for(detokenizer), 0)
    loss.backward()
    assert detokenizer.text_encoder.get_input_embeddings().weight.grad.abs().max() > 0
    with torch.no_grad():
        detokenizer.text_encoder.get_input_embeddings().weight.add_(0.5)
    detokenizer.eval().save_pretrained(tmp_path)
    condition = condition_for(detokenizer)
    pictures = [d.generate(condition, seeds=SEEDS) for d in (detokenizer, load_detokenizer(tmp_path))]
    assert torch.equal(*pictures)


def test_vectors_are_normalised_from_the_first_batch():
    detokenizer = build({"vector_size": 5}).train()
    vectors = torch.randn(64, 1, 5) * 3 + 7
    images = torch.rand(64, 3, 16, 16)
    detokenizer.loss(images, Condition(vectors=vectors), 0)
    torch.testing.assert_close(detokenizer.conditioner.mean, vectors.mean((0, 1)))
    detokenizer.loss(images, Condition(vectors=vectors + 9), 0)  # not again
    torch.testing.assert_close(detokenizer.conditioner.mean, vectors.mean((0, 1)))


def test_inverted_and_drawn_again_a_picture_comes_back():
    detokenizer = build({**CODES, "timesteps": 1000, "clip_sample": False})
    condition = condition_for(detokenizer)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(4)) * 0.5 + 0.25
    errors = []
    for steps in (20, 100, 500):
        noise = detokenizer.invert(images, condition, steps=steps)
        back = detokenizer.draw(noise, condition, steps=steps)
        errors.append((back - images).square().mean().sqrt().item())
    assert errors[2] < 0.5 * errors[1] < 0.25 * errors[0] and errors[2] < 0.02


# ---- what it learns


@pytest.fixture(scope="module")
def taught():
    """One trained for a moment to paint four squares in the colours its codes say."""
    torch.manual_seed(0)
    detokenizer = DiffusionDetokenizer(**{**SMALL, **CODES, "width": 64, "steps": 16}).train()
    optimizer = torch.optim.AdamW(detokenizer.parameters(), lr=3e-3)
    for step in range(250):
        codes, images = batch(step)
        loss, _ = detokenizer.loss(images, Condition(codes=codes, grid=(2, 2)), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return detokenizer.eval()


def batch(seed, count=32):
    g = torch.Generator().manual_seed(seed)
    colours = torch.rand(16, 3, generator=torch.Generator().manual_seed(99))
    codes = torch.randint(16, (count, 4), generator=g)
    squares = colours[codes].transpose(1, 2).unflatten(2, (2, 2))  # [B, 3, 2, 2]
    return codes, squares.repeat_interleave(8, 2).repeat_interleave(8, 3)


def test_it_draws_what_its_codes_say(taught):
    codes, images = batch(10_000)

    def psnr(codes, **options):
        drawn = taught.generate(Condition(codes=codes, grid=(2, 2)), seeds=range(32), **options)
        return (-10 * (drawn - images).square().mean().log10()).item()

    real = psnr(codes)
    assert real > psnr(codes.roll(1, 0)) + 6
    assert real > psnr(codes, guidance=0.0) + 6
    assert psnr(codes, guidance=2.0) > 15


def test_distillation_halves_the_steps(taught):
    """The student draws in 2 steps what the teacher draws in 4; untaught it is further off."""
    codes, _ = batch(10_000)
    held = Condition(codes=codes, grid=(2, 2))
    torch.manual_seed(0)
    student = copy.deepcopy(taught).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for step in range(120):
        codes, images = batch(step)
        loss, _ = student.distill_loss(taught, images, Condition(codes=codes, grid=(2, 2)), step, 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    student.eval()
    wanted = taught.generate(held, seeds=range(32), steps=4)
    errors = [(d.generate(held, seeds=range(32), steps=2) - wanted).square().mean().item() for d in (student, taught)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(
    "kind", [{"prediction": p} for p in ("epsilon", "x0", "v", "flow")], ids=lambda k: k["prediction"]
)
def test_a_student_that_does_two_steps_in_one_loses_nothing(kind, monkeypatch):
    """A Gaussian teacher: what it says is linear in x_t, and so is the student that matches it."""
    arguments = {**CODES, **kind, "clip_sample": False, "guidance": 1.0}
    teacher, student = build(arguments), build(arguments)
    process, mean, std = teacher.process, 0.3, 0.5

    def x0_of(x, t):
        alpha, sigma = process.levels(t, x)
        return mean + alpha * std**2 * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    def say(x0, x, t):
        alpha, sigma = process.levels(t, x)
        return process.target(x0, t, (x - alpha * x0) / sigma)

    def matching(x, t, hints):
        """By the closed form of one step: the deviation of x_t from its mean shrinks by the same factor."""
        grid = torch.tensor([*process.grid(8), -1])
        place = (grid[None] == t[:, None]).int().argmax(1)
        there, at = x, t
        for n in (1, 2):
            after = grid[place + n]
            x0 = x0_of(there, at)
            (a, s), (a2, s2) = process.levels(at, x), process.levels(after, x)
            there, at = a2 * x0 + s2 * (there - a * x0) / s, after
        (a, s), (a2, s2) = process.levels(t, x), process.levels(at, x)
        return say((there - s2 / s * x) / (a2 - s2 / s * a), x, t)

    monkeypatch.setattr(teacher, "_run", lambda x, t, hints: say(x0_of(x, t), x, t))
    condition, images = condition_for(teacher), torch.rand(3, 3, 16, 16)
    monkeypatch.setattr(student, "_run", matching)
    assert max(student.distill_loss(teacher, images, condition, 0, 4)[0].item() for _ in range(10)) < 1e-6
    monkeypatch.setattr(student, "_run", lambda x, t, hints: say(x0_of(x, t), x, t))  # the teacher itself does not
    assert max(student.distill_loss(teacher, images, condition, 0, 4)[0].item() for _ in range(10)) > 1e-4


def test_a_student_learns_the_guided_teacher():
    teacher = build({**CODES, "guidance": 3.0})
    plain, student = build(CODES), build(CODES)
    condition, images = condition_for(teacher), torch.rand(3, 3, 16, 16)
    losses = []
    for other in (teacher, plain):
        torch.manual_seed(0)
        losses.append(student.distill_loss(other, images, condition, 0, 4)[0].item())
    assert losses[0] > losses[1]
    with pytest.raises(ValueError, match="same levels of noise and size"):
        student.distill_loss(build({**CODES, "timesteps": 50}), images, condition, 0, 4)


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs codebook_sizes and grid, vector_size or text_model"),
        ({"codebook_sizes": [16]}, "codebook_sizes needs a grid"),
        ({"codebook_sizes": [16], "grid": [4]}, "stand at no place of the picture: use codes_as: context"),
        ({"codebook_sizes": [16, 16, 16], "grid": [2, 2, 2]}, "3 codebooks do not fit grid"),
        ({**CODES, "body": "mlp"}, "body must be dit or unet"),
        ({**CODES, "body": "sana"}, "body sana is told by attention alone"),
        ({**CODES, "sampler": "flow"}, "sampler must be ddim or ddpm, got 'flow'"),
        ({**CODES, "prediction": "flow", "sampler": "ddpm"}, "sampler must be flow, got 'ddpm'"),
        ({**CODES, "prediction": "flow", "learned_variance": True}, "flow has no variance to learn"),
        ({**CODES, "steps": 101}, "steps must be 1 to 100"),
        ({**CODES, "guidance_interval": [0.5, 0.2]}, "guidance_interval must be two rising numbers"),
        ({**CODES, "drop": 1.0}, "drop must be"),
        ({**CODES, "min_snr": 0}, "min_snr must be above 0"),
        ({**CODES, "least_snr": 1.0}, "least_snr must be 0 to min_snr"),
        ({**CODES, "min_snr": 5.0, "least_snr": 6.0}, "least_snr must be 0 to min_snr"),
    ],
)
def test_choices_that_do_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiffusionDetokenizer(**{**SMALL, **arguments})


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"codes": torch.zeros(3, 9, dtype=torch.int64)}, "must be 4 an image, got 9"),
        ({"codes": torch.zeros(3, 4, dtype=torch.int64), "grid": (4, 1)}, "have grid .4, 1., expected .2, 2."),
        ({"codes": torch.full((3, 4), 16)}, "0 or more and below .16."),
        ({"codes": torch.full((3, 4), -1)}, "0 or more and below .16."),
        ({"vectors": torch.zeros(3, 2, 5)}, r"must be \[B, 1, 5\], got .3, 2, 5."),
        ({"vectors": torch.zeros(3, 1, 6)}, r"must be \[B, 1, 5\], got .3, 1, 6."),
    ],
)
def test_conditions_that_do_not_fit(condition, message):
    detokenizer = build(KINDS["codes and a vector"])
    with pytest.raises(ValueError, match=message):
        detokenizer.generate(Condition(**condition), seeds=SEEDS)
    with pytest.raises(ValueError, match=message):
        detokenizer.loss(torch.rand(3, 3, 16, 16), Condition(**condition), 0)


def test_too_few_or_many_steps_are_refused(folders):
    for kind, steps in (("flow", 101), ("epsilon, ancestral", 101), ("epsilon, ancestral", 1)):
        detokenizer = build(KINDS[kind])
        with pytest.raises(ValueError, match="steps"):
            detokenizer.generate(condition_for(detokenizer), seeds=SEEDS, steps=steps)


def test_a_folder_that_is_no_vae(folders):
    with pytest.raises(ValueError, match="not the folder of a diffusers VAE: its config.json names the class None"):
        build({**CODES, "vae": "text"}, folders)


# ---- a real latent space


class GroupBlock(AutoencoderTinyBlock):
    """TAEF2's block, with the branch that diffusers' has not."""

    def __init__(self, width):
        super().__init__(width, width, "relu")
        wide = 4 * width
        self.pool = nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False),
            nn.GroupNorm(4, wide),
            nn.ReLU(),
            nn.Conv2d(wide, width, 1, bias=False),
        )

    def forward(self, x):
        return super().forward(x + self.pool(x))


@pytest.fixture
def taef2(tmp_path):
    if "UNITOK_DATA" not in os.environ:
        pytest.skip("UNITOK_DATA is not set")
    data = Path(os.environ["UNITOK_DATA"])
    if not (data / "taef2").is_dir():
        pytest.skip("no taef2 in UNITOK_DATA")
    diffusers.AutoencoderTiny(latent_channels=32).save_pretrained(tmp_path)
    detokenizer = DiffusionDetokenizer(
        image_size=128, width=64, depth=2, heads=2, patch_size=2, steps=4, vae=str(tmp_path), codebook_sizes=[16],
        grid=[8, 8],
    )  # fmt: skip
    for name, shift in (("encoder", 0), ("decoder", 1)):
        layers = getattr(detokenizer.vae, name).layers
        state = checkpoint.load_weights(data / "taef2" / f"taef2_{name}.pth")
        state = {f"{int(k.partition('.')[0]) - shift}.{k.partition('.')[2]}": v.float() for k, v in state.items()}
        for place in sorted({int(k.split(".")[0]) for k in state if ".pool." in k}):
            layers[place] = GroupBlock(64)
        checkpoint.load_into(layers, state)
    return detokenizer, data


def test_latents_of_a_real_vae(taef2):
    detokenizer, data = taef2
    names = sorted((data / "coco_mini" / "images").rglob("*.jpg"))[:4]
    pictures = [np.asarray(Image.open(name).convert("RGB").resize((128, 128))) for name in names]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        latents = to_latents(detokenizer.vae, images)
        assert latents.shape == (4, 32, 16, 16) == (4, *detokenizer.shape)
        error = (to_images(detokenizer.vae, latents) - images).square().mean((1, 2, 3))
    assert (-10 * error.log10()).mean() > 20
    condition = Condition(codes=torch.randint(16, (4, 64)), grid=(8, 8))
    loss, _ = detokenizer.train().loss(images, condition, 0)
    loss.backward()
    assert loss.isfinite() and detokenizer.body.out.weight.grad.abs().max() > 0
    drawn = detokenizer.eval().generate(condition, seeds=range(4))
    assert drawn.shape == (4, 3, 128, 128)
