"""Diffusion's numbers against closed forms: a Gaussian's, for which the best prediction is known, and diffusers'."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import scheduling_ddpm

from unitok.nn import diffusion
from unitok.nn.diffusion import ImportanceSampler, Process, draw_levels

MEAN, STD = 3.0, 0.4  # of the data: far from 0, where clipping would show
VP = ("epsilon", "x0", "v")


def levels(schedule: str, timesteps: int) -> np.ndarray:
    """Products of 1 - beta by the papers' formulas; the last entry is level -1."""
    if schedule == "linear":
        beta = np.linspace(0.1 / timesteps, 20 / timesteps, timesteps)
    else:
        f = [math.cos((i / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(timesteps + 1)]
        beta = np.array([min(1 - b / a, 0.999) for a, b in itertools.pairwise(f)])
    return np.append(np.cumprod(1 - beta), 1.0)


def expected(x, alpha, sigma):
    """(E[x0 | x_t], E[eps | x_t]) of data N(MEAN, STD^2)."""
    share = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    return MEAN + alpha * STD**2 * share, sigma * share


def gaussian(process: Process, variance: float | None = None):
    """The best prediction; with `variance` the second half of the channels says it."""

    def predict(x, t):
        x0, eps = expected(x, *process.levels(t, x))
        said = process.target(x0, t, eps)
        return said if variance is None else torch.cat([said, torch.full_like(said, variance)], 1)

    return predict


def responses(run, draws: int = 0):
    """Mean and variance of what an affine sampler makes of standard normal draws, exactly.

    run: noise [1, 1, 1, n] -> x0. Pixel 0 gets no noise at all, pixel 1 a 1 at the start, pixel 2 + k a 1 in draw k.
    """
    noise = torch.zeros(1, 1, 1, 2 + draws, dtype=torch.float64)
    noise[..., 1] = 1
    out = run(noise)[0, 0, 0]
    return out[0].item(), (out[1:] - out[0]).square().sum().item()


@pytest.fixture
def unit_noise(monkeypatch):
    """The draws of diffusers' ancestral steps: draw k is a 1 at pixel 2 + k."""
    count = itertools.count(2)

    def draw(shape, generator=None, device=None, dtype=None):
        noise = torch.zeros(shape, dtype=dtype)
        noise[..., next(count)] = 1
        return noise

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", draw)


def chain(grid, step):
    """Mean and variance after steps (t, after) -> (factor, offset, variance of the noise), from N(0, 1)."""
    mean, variance = 0.0, 1.0
    for t, after in itertools.pairwise([*grid, -1]):
        factor, offset, more = step(t, after)
        mean, variance = factor * mean + offset, factor**2 * variance + more
    return mean, variance


# ---- samplers


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", VP)
@pytest.mark.parametrize("steps", [7, 50])
def test_ancestral_sampling_has_the_moments_of_its_chain(unit_noise, schedule, prediction, steps):
    process, kept = Process(prediction, schedule, 1000), levels(schedule, 1000)

    def step(t, after):
        now, then = kept[t], kept[after]
        beta = 1 - now / then
        offset, factor = (expected(x, now**0.5, (1 - now) ** 0.5)[0] for x in (0.0, 1.0))
        of_x0, of_x = then**0.5 * beta / (1 - now), (now / then) ** 0.5 * (1 - then) / (1 - now)
        return of_x0 * (factor - offset) + of_x, of_x0 * offset, beta * (1 - then) / (1 - now)

    grid = np.linspace(0, 999, steps).round().astype(int)[::-1].tolist()
    found = responses(
        lambda noise: diffusion.sample(process, gaussian(process), noise, sampler="ddpm", steps=steps), steps
    )
    assert found == pytest.approx(chain(grid, step), abs=1e-3)


def deterministic(kept, flow):
    def step(t, after):
        (a, s), (a2, s2) = (((1 - s, s) if flow else (s**0.5, (1 - s) ** 0.5)) for s in (kept[t], kept[after]))
        ends = [a2 * x0 + s2 * eps for x0, eps in (expected(x, a, s) for x in (0.0, 1.0))]
        return ends[1] - ends[0], ends[0], 0.0

    return step


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", VP)
@pytest.mark.parametrize("steps", [7, 50])
def test_ddim_has_the_moments_of_its_chain(schedule, prediction, steps):
    process, kept = Process(prediction, schedule, 1000), levels(schedule, 1000)
    grid = [round(1000 * k / steps) - 1 for k in range(steps, 0, -1)]
    found = responses(lambda noise: diffusion.sample(process, gaussian(process), noise, sampler="ddim", steps=steps))
    assert found == pytest.approx(chain(grid, deterministic(kept, flow=False)), abs=1e-3)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_flow_has_the_moments_of_its_chain(steps):
    process, noise_levels = Process("flow", timesteps=1000), np.append(np.arange(1, 1001) / 1000, 0.0)
    grid = [round(1000 * k / steps) - 1 for k in range(steps, 0, -1)]
    found = responses(lambda noise: diffusion.sample(process, gaussian(process), noise, sampler="flow", steps=steps))
    assert found == pytest.approx(chain(grid, deterministic(noise_levels, flow=True)), abs=1e-3)


@pytest.mark.parametrize("prediction", VP)
def test_inversion_has_the_moments_of_its_chain(prediction):
    process, kept = Process(prediction, "cosine", 1000), levels("cosine", 1000)
    grid = [round(1000 * k / 50) - 1 for k in range(1, 51)]
    mean, spread = MEAN, STD
    for t, after in itertools.pairwise([-1, *grid]):
        a, s, a2, s2 = kept[t] ** 0.5, (1 - kept[t]) ** 0.5, kept[after] ** 0.5, (1 - kept[after]) ** 0.5
        ends = [a2 * (x - s * eps) / a + s2 * eps for x, (_, eps) in ((x, expected(x, a2, s2)) for x in (0.0, 1.0))]
        mean, spread = (ends[1] - ends[0]) * mean + ends[0], abs(ends[1] - ends[0]) * spread
    found = responses(lambda z: diffusion.invert(process, gaussian(process), MEAN + STD * z, steps=50))
    assert found == pytest.approx((mean, spread**2), abs=1e-3)
    finer = responses(lambda z: diffusion.invert(process, gaussian(process), MEAN + STD * z, steps=1000))
    assert abs(finer[0]) < 0.1 * abs(found[0]) and abs(finer[1] - 1) < 0.1 * abs(found[1] - 1)  # towards N(0, 1)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "flow"])
def test_all_steps_reach_the_data(unit_noise, sampler):
    process = Process("flow" if sampler == "flow" else "v", "cosine", 250)
    run = {"sampler": sampler, "steps": 250}
    mean, variance = responses(lambda noise: diffusion.sample(process, gaussian(process), noise, **run), 250)
    assert mean == pytest.approx(MEAN, abs=0.01) and variance == pytest.approx(STD**2, abs=0.01)


@pytest.mark.parametrize("prediction", VP)
def test_deterministic_steps_are_those_of_diffusers(prediction):
    process = Process(prediction, "linear", 1000)
    kind = {"x0": "sample", "v": "v_prediction"}.get(prediction, "epsilon")
    options = {"prediction_type": kind, "timestep_spacing": "trailing", "clip_sample": False}
    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs, there = DDIMScheduler(**options), noise
    theirs.set_timesteps(20)
    assert theirs.timesteps.tolist() == process.grid(20)
    for t in theirs.timesteps.tolist():
        there = theirs.step(gaussian(process)(there, t), t, there).prev_sample
    here = diffusion.sample(process, gaussian(process), noise, sampler="ddim", steps=20)
    torch.testing.assert_close(here, there, atol=1e-4, rtol=0)  # their levels are float32

    if prediction == "epsilon":  # theirs takes other predictions for those of the level it comes from
        back = DDIMInverseScheduler(**options)
        back.set_timesteps(20)
        for t in back.timesteps.tolist():
            there = back.step(gaussian(process)(there, t), t, there).prev_sample
        torch.testing.assert_close(
            diffusion.invert(process, gaussian(process), here, steps=20), there, atol=2e-3, rtol=0
        )


def test_flow_steps_are_those_of_diffusers():
    process = Process("flow", timesteps=1000)
    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs, there = FlowMatchEulerDiscreteScheduler(), noise
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20))
    for t in theirs.timesteps:
        there = theirs.step(gaussian(process)(there, round(t.item()) - 1), t, there).prev_sample
    here = diffusion.sample(process, gaussian(process), noise, sampler="flow", steps=20)
    torch.testing.assert_close(here, there, atol=1e-5, rtol=0)


def test_inversion_error_falls_with_steps():
    """A mixture of two Gaussians; clipping inside the sampler would lose most of it."""
    process = Process("epsilon", "linear", 1000)

    def predict(x, t):
        alpha, sigma = process.levels(t, x)
        variance = alpha**2 * 0.3**2 + sigma**2
        centres = torch.tensor([-0.8, 0.8], dtype=x.dtype)
        apart = x.unsqueeze(-1) - alpha * centres
        weight = torch.softmax(-apart.square() / (2 * variance), -1)
        return sigma * (weight * apart).sum(-1) / variance

    g = torch.Generator().manual_seed(0)
    x0 = (torch.rand(1, 1, 16, 16, generator=g) > 0.5).double() * 1.6 - 0.8
    x0 = x0 + 0.3 * torch.randn(x0.shape, generator=g, dtype=torch.float64)

    def error(steps, clip=False):
        noise = diffusion.invert(process, predict, x0, steps=steps)
        back = diffusion.sample(process, predict, noise, sampler="ddim", steps=steps, clip=clip)
        return (back - x0).square().mean().sqrt().item()

    errors = [error(steps) for steps in (20, 50, 250, 1000)]
    assert all(b < 0.6 * a for a, b in itertools.pairwise(errors)) and errors[0] < 0.2 and errors[-1] < 5e-3
    assert error(1000, clip=True) > 5 * errors[-1]


# ---- traps of the schedulers


def test_ddims_own_grid_starts_at_noise_and_ends_clean():
    process = Process("v", "cosine", 20)
    for steps in range(1, 21):
        grid = process.grid(steps)
        assert grid[0] == 19 and len(set(grid)) == steps == len(grid) and grid == sorted(grid, reverse=True)
        if steps <= 10:
            assert process.grid(2 * steps)[::2] == grid  # which distillation needs
    theirs = DDIMScheduler(20)  # the default starts well below the noise it is given
    theirs.set_timesteps(3)
    assert theirs.timesteps[0] == 12
    with pytest.raises(ValueError, match="steps must be 1 to 20"):
        process.grid(21)


def test_clipping_is_off_unless_asked_for(unit_noise):
    process = Process("epsilon", "linear", 1000)
    run = {"sampler": "ddpm", "steps": 20}
    clipped, _ = responses(lambda noise: diffusion.sample(process, gaussian(process), noise, clip=True, **run), 20)
    assert clipped == pytest.approx(1.0) and DDPMScheduler().config.clip_sample
    assert not process.ancestral().config.clip_sample


@pytest.mark.parametrize("said", [-1.0, 0.0, 1.0])
def test_the_last_ancestral_step_adds_no_noise(unit_noise, said):
    """With a learned variance diffusers' "trailing" levels leave noise of the last step's size in the picture."""
    process = Process("v", "cosine", 1000)
    predict = gaussian(process, said)
    run = {"sampler": "ddpm", "steps": 10, "learned_variance": True}
    noise = torch.zeros(1, 1, 1, 12, dtype=torch.float64)
    out = diffusion.sample(process, predict, noise, **run)[0, 0, 0]
    assert (out[10] - out[0]).abs() > 1e-4 and out[11] == out[0]  # the ninth draw shows, there is no tenth


def test_the_least_variance_at_level_0_is_that_of_level_1():
    process = Process("epsilon", "cosine", 1000)
    t, said = torch.arange(1000), -torch.ones(1000, 1, 1, 1, dtype=torch.float64)
    found = process.log_variance(said, t).flatten()
    kept = levels("cosine", 1000)
    now, before = kept[1:-1], kept[:-2]
    least = np.log((1 - now / before) * (1 - before) / (1 - now))
    torch.testing.assert_close(found[1:], torch.from_numpy(least), atol=1e-2, rtol=0)  # their betas are float32
    assert found[0] == found[1] and found[0].item() == pytest.approx(-10.7, abs=0.05)
    scheduler = process.ancestral(learned_variance=True)
    assert scheduler._get_variance(0, torch.tensor(-1.0)) < -40  # theirs
    torch.testing.assert_close(
        process.log_variance(-said, t).flatten()[1:].exp(), torch.from_numpy(1 - now / before), atol=1e-6, rtol=1e-3
    )


# ---- predictions


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_predictions_say_what_the_picture_is_made_of(prediction):
    process = Process(prediction, "cosine", 100)
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 99, 2, 4, 4, generator=g, dtype=torch.float64)
    t = torch.arange(99)  # at the last one epsilon says nothing of x0
    x = process.noised(x0, t, noise)
    found = process.split(process.target(x0, t, noise), x, t)
    for value, wanted in zip(found, (x0, noise), strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-9, rtol=0)
    cut, left = process.split(process.target(x0, t, noise), x, t, clip=True)
    alpha, sigma = process.levels(t, x)
    assert cut.abs().max() <= 1
    torch.testing.assert_close(alpha * cut + sigma * left, x)
    one = process.split(process.target(x0[:1], 7, noise[:1]), process.noised(x0[:1], 7, noise[:1]), 7)
    torch.testing.assert_close(one[0], x0[:1])


def test_wrong_choices_are_refused():
    for arguments in ({"prediction": "score"}, {"schedule": "sigmoid"}, {"timesteps": 1}):
        with pytest.raises(ValueError, match="must be"):
            Process(**arguments)
    with pytest.raises(ValueError, match="flow has no ancestral steps"):
        Process("flow").ancestral()


# ---- learned variance


@pytest.mark.parametrize("prediction", VP)
def test_the_bound_is_the_closed_form_on_a_gaussian(prediction):
    """Data N(0, 1), the best mean and any variance. L_t is quadratic in (x0, eps), and the four points of +-1 have the
    second moments of the normal distribution: their mean is the expectation, exactly."""
    process, said = Process(prediction, "linear", 1000), 0.3
    x0 = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64).view(1, 1, 2, 2)
    noise = torch.tensor([[1.0, -1.0], [1.0, -1.0]], dtype=torch.float64).view(1, 1, 2, 2)
    kept = np.cumprod(1 - process.ancestral().betas.double().numpy())
    for t in (1, 10, 500, 999):
        now, before = kept[t], kept[t - 1]
        beta = 1 - now / before
        least = beta * (1 - before) / (1 - now)
        variance = math.exp((said + 1) / 2 * math.log(beta) + (1 - said) / 2 * math.log(least))
        unknown = 1 - now  # Var(x0 | x_t), of data of variance 1
        of_x0 = before**0.5 * beta / (1 - now)
        wanted = 0.5 * (math.log(variance / least) - 1 + (least + of_x0**2 * unknown) / variance) / math.log(2)

        times = torch.tensor([t])
        x = process.noised(x0, times, noise)
        best = process.target(now**0.5 * x, times, (1 - now) ** 0.5 * x)
        output = torch.cat([best, torch.full_like(best, said)], 1)
        found = diffusion.variational_bound(process, x0, x, times, output)
        assert found.item() == pytest.approx(wanted, abs=1e-6)


def test_the_bound_at_level_0_is_the_likelihood_of_a_pixel():
    process = Process("x0", "cosine", 1000)
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    x0, t = values.view(1, 1, 16, 16), torch.tensor([0])
    x = process.noised(x0, t, torch.zeros_like(x0))
    output = torch.cat([x0 + 0.01, torch.zeros_like(x0)], 1)
    mean, _ = process.posterior(x0 + 0.01, x, t)
    std = (0.5 * process.log_variance(torch.zeros_like(x0), t)).exp()
    normal = torch.distributions.Normal(mean, std)
    above, below = normal.cdf(x0 + 1 / 255), normal.cdf(x0 - 1 / 255)
    above[..., -1, -1], below[..., 0, 0] = 1, 0
    wanted = -(above - below).log2().mean()
    assert diffusion.variational_bound(process, x0, x, t, output).item() == pytest.approx(wanted.item(), abs=1e-6)
    # all values share the whole probability, whatever the distribution
    for centre, log_std in ((0.3, -3.0), (-0.95, -1.0), (0.0, 1.0)):
        nll = diffusion.discretized_nll(values, torch.full_like(values, centre), torch.full_like(values, log_std))
        assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_the_bound_trains_the_variance_alone():
    process = Process("epsilon", "cosine", 100)
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.rand(4, 3, 4, 4, generator=g) * 2 - 1, torch.randn(4, 3, 4, 4, generator=g)
    t = torch.tensor([0, 1, 50, 99])
    output = torch.randn(4, 6, 4, 4, generator=g).requires_grad_()
    diffusion.variational_bound(process, x0, process.noised(x0, t, noise), t, output).sum().backward()
    assert output.grad[:, :3].abs().max() == 0 and (output.grad[:, 3:].abs().amax((1, 2, 3)) > 0).all()


def test_importance_sampling_is_unbiased_and_resumes():
    sampler = ImportanceSampler(5)
    torch.testing.assert_close(sampler.probabilities(), torch.full((5,), 0.2, dtype=torch.float64))
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    for n in range(12):
        if n < 10:
            assert sampler.probabilities().max() == sampler.probabilities().min()
        sampler.update(torch.arange(5), losses * (100 if n < 2 else 1))  # the oldest two are forgotten
    wanted = 0.999 * losses / losses.sum() + 0.001 / 5
    torch.testing.assert_close(sampler.probabilities().float(), wanted)
    torch.manual_seed(0)
    t, weights = sampler.draw(20000)
    torch.testing.assert_close(t.bincount(minlength=5) / 20000, wanted, atol=0.02, rtol=0)
    torch.testing.assert_close((wanted * (1 / (5 * wanted)) * losses).sum(), losses.mean())
    assert (weights * losses[t]).mean().item() == pytest.approx(losses.mean().item(), rel=0.01)
    assert (weights * losses[t]).std() < 0.2 * (losses[torch.randint(5, (20000,))]).std()
    other = ImportanceSampler(5)
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(other.probabilities(), sampler.probabilities())


@pytest.mark.parametrize(("shift", "mean"), [(1.0, 0.5), (3.0, 3 * (0.5 - math.log(3) / 4))])
def test_levels_are_drawn_as_the_shift_says(shift, mean):
    torch.manual_seed(0)
    levels = draw_levels(100_000, 100, shift)
    assert levels.dtype == torch.int64 and levels.min() == 0 and levels.max() == 99
    assert abs((levels.float().mean() + 0.5) / 100 - mean) < 0.004


def test_levels_are_drawn_from_their_span():
    torch.manual_seed(0)
    assert draw_levels(10_000, 1000, 3.0, (0.4, 0.93)).unique().tolist() == list(range(400, 930))


# ---- guidance and distillation


def test_guidance_leaves_the_variance_to_the_condition():
    g = torch.Generator().manual_seed(0)
    conditional, null = torch.randn(2, 2, 6, 4, 4, generator=g)
    guided = diffusion.guide(conditional, null, 3.0, 3)
    torch.testing.assert_close(guided[:, :3], null[:, :3] + 3 * (conditional - null)[:, :3])
    assert torch.equal(guided[:, 3:], conditional[:, 3:])
    assert torch.equal(diffusion.guide(conditional, null, 1.0, 3), conditional)


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_a_students_step_to_its_target_is_two_of_the_teacher(prediction):
    process = Process(prediction, "cosine", 100)
    g = torch.Generator().manual_seed(0)
    x, grid = torch.randn(5, 1, 4, 4, generator=g, dtype=torch.float64), torch.tensor([*process.grid(10), -1])
    start, middle, end = (grid[i : i + 10 : 2] for i in range(3))
    predict = gaussian(process)
    target = diffusion.two_step_target(process, predict, x, (start, middle, end))
    alpha, sigma = process.levels(start, x)
    said = process.target(target, start, (x - alpha * target) / sigma)
    once = process.step(said, x, start, end)
    twice = process.step(predict(x, start), x, start, middle)
    twice = process.step(predict(twice, middle), twice, middle, end)
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "flow"])
def test_weighted_by_ratio_every_prediction_has_the_same_loss(prediction):
    process, g = Process(prediction, "cosine", 100), torch.Generator().manual_seed(0)
    x0, noise, guess = (torch.randn(20, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    t = torch.arange(0, 100, 5)
    x = process.noised(x0, t, noise)
    alpha, sigma = process.levels(t, x)
    meant = process.target(guess, t, (x - alpha * guess) / sigma)  # the prediction that says x0 is the guess
    error = (meant - process.target(x0, t, noise)).square().mean((1, 2, 3))
    ratio = (alpha / sigma).square().flatten()
    of_x0 = (guess - x0).square().mean((1, 2, 3))
    for least in (0.0, 1.0):
        expected = ratio.clamp(least, 5) * of_x0
        assert torch.allclose(process.min_snr_weight(t, 5.0, least).double() * error, expected, rtol=1e-4)
    assert ratio.max() > 5 > ratio.min()
