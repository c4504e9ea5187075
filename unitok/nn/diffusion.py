"""Diffusion as numbers: levels of noise, what a network predicts of them, samplers, the variational bound, guidance.

A noised picture is x_t = alpha_t x0 + sigma_t eps. Level t runs from 0, the least noise, to T - 1; -1 is the clean
picture. Shapes: B pictures of C channels, H x W pixels or latents; t is an int or int64 [B].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

PREDICTIONS = ("epsilon", "x0", "v", "flow")
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # by their names in diffusers
SAMPLERS = ("ddim", "ddpm", "flow")
HISTORY = 10  # losses a level that importance sampling remembers (Nichol and Dhariwal 2021)
UNIFORM = 0.001  # share of levels it draws without regard to their losses

Predict = Callable[[Tensor, Tensor | int], Tensor]  # (x_t [B, C, H, W], t) -> what is said of it [B, C or 2C, H, W]


class Process:
    """Levels of noise and what a network says of x_t.

    Args:
        prediction: "epsilon", "x0", "v" = alpha eps - sigma x0 (Salimans and Ho 2022) or "flow" = eps - x0 (Lipman et
            al. 2023), whose levels are alpha = 1 - sigma, sigma = (t + 1) / T whatever the schedule.
        schedule: "linear" (Ho et al. 2020; its range times 1000 / T) or "cosine" (Nichol and Dhariwal 2021).
        timesteps: T.
        betas: float [T] of another schedule, in place of the named one.
    """

    def __init__(
        self, prediction: str = "v", schedule: str = "cosine", timesteps: int = 1000, betas: Tensor | None = None
    ):
        for what, value, known in (("prediction", prediction, PREDICTIONS), ("schedule", schedule, SCHEDULES)):
            if value not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")
        if timesteps < 2:
            raise ValueError(f"timesteps must be 2 or more, got {timesteps}")
        if betas is not None and (prediction == "flow" or len(betas) != timesteps):
            raise ValueError(f"betas must be {timesteps}, one a timestep, and flow has none")
        self.prediction, self.schedule, self.timesteps = prediction, schedule, timesteps
        self.betas = None if betas is None else betas.tolist()
        with torch.device("cpu"):  # also where networks are laid out on the meta device
            self._tables()

    def _tables(self) -> None:
        if self.prediction == "flow":
            sigma = torch.arange(1, self.timesteps + 1, dtype=torch.float64) / self.timesteps
            alpha = 1 - sigma
        else:
            beta = self.ancestral().betas.double()
            kept = torch.cumprod(1 - beta, 0)
            before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
            alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
            least = beta * (1 - before) / (1 - kept)
            least[0] = least[1]  # it is 0 there, which has no logarithm; diffusers makes that -46
            self.log_beta, self.log_least = beta.log(), least.log()
            self.of_x0, self.of_x = beta * before.sqrt() / (1 - kept), (1 - beta).sqrt() * (1 - before) / (1 - kept)
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        self.alpha, self.sigma = torch.cat([alpha, one]), torch.cat([sigma, zero])  # [T + 1]; the last is level -1

    def ancestral(self, learned_variance: bool = False, clip: bool = False) -> Any:
        """diffusers' scheduler of ancestral steps, over levels from T - 1 to 0 at equal distances."""
        if self.prediction == "flow":
            raise ValueError("a model of flow has no ancestral steps: sample it with sampler flow")
        return DDPMScheduler(
            self.timesteps,
            beta_start=min(0.1 / self.timesteps, 0.999),
            beta_end=min(20 / self.timesteps, 0.999),
            beta_schedule=SCHEDULES[self.schedule],
            trained_betas=self.betas,
            variance_type="learned_range" if learned_variance else "fixed_small",
            prediction_type={"x0": "sample", "v": "v_prediction"}.get(self.prediction, "epsilon"),
            clip_sample=clip,
            # "leading" ends a few steps' sampling far from pure noise; "trailing" adds noise to what should be clean
            timestep_spacing="linspace",
        )

    def at(self, table: Tensor, t: Tensor | int, x: Tensor) -> Tensor | float:
        """The table's entry at t, to be multiplied with x."""
        if isinstance(t, int):
            return table[t].item()
        return table.to(x.dtype).to(x.device)[t].view(-1, 1, 1, 1)

    def levels(self, t: Tensor | int, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(alpha, sigma)."""
        return self.at(self.alpha, t, x), self.at(self.sigma, t, x)

    def noised(self, x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """A draw of q(x_t | x0)."""
        alpha, sigma = self.levels(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """What the network should say of x_t: [B, C, H, W]."""
        if self.prediction == "v":
            alpha, sigma = self.levels(t, x0)
            return alpha * noise - sigma * x0
        return {"epsilon": noise, "x0": x0}[self.prediction] if self.prediction != "flow" else noise - x0

    def split(self, output: Tensor, x: Tensor, t: Tensor | int, clip: bool = False) -> tuple[Tensor, Tensor]:
        """What the network said of x_t (channels beyond C aside) -> (x0, eps) that make x_t together.

        clip: cut x0 to [-1, 1] and let eps be what is left.
        """
        (alpha, sigma), output = self.levels(t, x), output[:, : x.shape[1]]
        if self.prediction == "epsilon":
            x0, eps = (x - sigma * output) / alpha, output
        elif self.prediction == "x0":
            x0, eps = output, (x - alpha * output) / sigma
        elif self.prediction == "v":
            x0, eps = alpha * x - sigma * output, sigma * x + alpha * output
        else:
            x0, eps = x - sigma * output, x + alpha * output
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x - alpha * x0) / sigma
        return x0, eps

    def step(self, output: Tensor, x: Tensor, t: Tensor | int, after: Tensor | int, clip: bool = False) -> Tensor:
        """x at level t and what the network said of it -> x at level `after`, without new noise.

        That is DDIM (Song et al. 2021, eta 0), and Euler's step where the prediction is flow. diffusers' DDIM takes
        T // steps for the distance of levels, which leaves the grid unless steps divides T, and one t a batch.
        """
        x0, eps = self.split(output, x, t, clip)
        alpha, sigma = self.levels(after, x)
        return alpha * x0 + sigma * eps

    def grid(self, steps: int) -> list[int]:
        """Levels of a deterministic sampler, falling from T - 1; after the last comes -1. Those of n are in 2n's."""
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps must be 1 to {self.timesteps}, the timesteps of the model, got {steps}")
        return [round(self.timesteps * k / steps) - 1 for k in range(steps, 0, -1)]

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2, float [B]."""
        return (self.alpha / self.sigma).square().float().to(t.device)[t]

    def min_snr_weight(self, t: Tensor, most: float, least: float = 0.0) -> Tensor:
        """[B]: what makes an error of the prediction count as min(SNR, most) times one of x0 (Hang et al. 2023, arXiv
        2303.09556), and never less than `least` times (Salimans and Ho 2022, arXiv 2202.00512, have 1).

        Errors of x0 alone, unweighted, hardly see the edges, which are drawn at high ratios. At low ones it is the
        condition that says what is there, and min(SNR, most) goes to 0."""
        snr, sigma = self.snr(t), self.sigma.float().to(t.device)[t]
        of_x0 = {"x0": torch.ones_like(snr), "epsilon": 1 / snr}.get(self.prediction, sigma.square())
        return snr.clamp(least, most) * of_x0

    def posterior(self, x0: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(x_{t-1} | x_t, x0), Ho et al. 2020, eq. 7; at t = 0 the variance of t = 1."""
        mean = self.at(self.of_x0, t, x) * x0 + self.at(self.of_x, t, x) * x
        return mean, torch.as_tensor(self.at(self.log_least, t, x)).expand_as(mean)

    def log_variance(self, output: Tensor, t: Tensor) -> Tensor:
        """The learned variance: -1 is the least one can be, 1 is beta (Nichol and Dhariwal 2021, eq. 15)."""
        share = (output + 1) / 2
        return share * self.at(self.log_beta, t, output) + (1 - share) * self.at(self.log_least, t, output)


# ---- sampling


def sample(
    process: Process,
    predict: Predict,
    noise: Tensor,
    *,
    sampler: str,
    steps: int,
    generators: Sequence[torch.Generator] | None = None,
    learned_variance: bool = False,
    clip: bool = False,
) -> Tensor:
    """Noise [B, C, H, W] -> x0. "ddpm" draws further noise, from one generator a picture; the others draw none."""
    if sampler == "ddpm":
        if steps < 2:
            raise ValueError("sampler ddpm needs 2 steps or more")
        process.grid(steps)  # refuses more steps than there are levels
        scheduler = process.ancestral(learned_variance, clip)
        scheduler.set_timesteps(steps)
        x = noise
        for t in scheduler.timesteps.tolist():
            output = predict(x, t)
            output = output if learned_variance else output[:, : x.shape[1]]
            x = scheduler.step(output, t, x, generator=generators, return_dict=False)[0]
        return x
    x = noise
    for t, after in pairwise([*process.grid(steps), -1]):
        x = process.step(predict(x, t), x, t, after, clip)
    return x


def invert(process: Process, predict: Predict, x0: Tensor, *, steps: int) -> Tensor:
    """x0 -> the noise from which `sample` without clipping comes near x0 again, nearer with more steps.

    DDIM backwards (Song et al. 2021, section 4.3): what the network says of x is taken for the next level's.
    """
    x = x0
    for t, after in pairwise([-1, *reversed(process.grid(steps))]):
        _, eps = process.split(predict(x, after), x, after)
        alpha, sigma = process.levels(t, x)
        higher, more = process.levels(after, x)
        x = higher * (x - sigma * eps) / alpha + more * eps
    return x


def guide(conditional: Tensor, null: Tensor, scale: Tensor | float, channels: int) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): null + scale (conditional - null) on the first channels.

    Learned variances, the channels after them, stay the conditional ones.
    """
    guided = torch.lerp(null[:, :channels], conditional[:, :channels], scale)
    return torch.cat([guided, conditional[:, channels:]], 1)


# ---- training


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) in nats, elementwise."""
    apart = (mean1 - mean2).square() * (-log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 - 1 + (log_variance1 - log_variance2).exp() + apart)


def discretized_nll(x0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """-log of what N(mean, std) gives to the 1/127.5 wide interval around x0, elementwise, in nats.

    x0 is of 256 values from -1 to 1, the outermost of which reach to infinity (Ho et al. 2020, eq. 13).
    """
    inverse, half = (-log_std).exp(), 1 / 255
    above, below = (inverse * (x0 - mean + half)), (inverse * (x0 - mean - half))
    # of the two pairs of tails the smaller: a difference of numbers near 1 has no digits left
    mirrored = below > 0
    upper, lower = torch.where(mirrored, -below, above), torch.where(mirrored, -above, below)
    middle = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    likelihood = middle.clamp_min(1e-12).log()
    likelihood = torch.where(x0 < -0.999, torch.special.log_ndtr(above), likelihood)
    return -torch.where(x0 > 0.999, torch.special.log_ndtr(-below), likelihood)


def variational_bound(process: Process, x0: Tensor, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
    """L_t of the bound on -log p(x0) in bits per dimension, [B]; output [B, 2C, H, W].

    Only the variance (the second C channels) gets a gradient (Nichol and Dhariwal 2021, section 3.1).
    """
    said, variance = output.chunk(2, 1)
    mean, _ = process.posterior(process.split(said.detach(), x, t)[0], x, t)
    log_variance = process.log_variance(variance, t)
    kl = gaussian_kl(*process.posterior(x0, x, t), mean, log_variance).mean((1, 2, 3))
    nll = discretized_nll(x0, mean, 0.5 * log_variance).mean((1, 2, 3))
    return torch.where(t == 0, nll, kl) / math.log(2)


def two_step_target(
    process: Process,
    predict: Predict,
    x: Tensor,
    levels: tuple[Tensor, Tensor, Tensor],
    clip: bool = False,
) -> Tensor:
    """The x0 that takes a student from x in one DDIM step to where the teacher comes in two: [B, C, H, W].

    Progressive distillation (Salimans and Ho 2022, appendix G). levels: int64 [B] each, where x is, where the teacher
    stops over, and the end.
    """
    start, middle, end = levels
    there = process.step(predict(x, start), x, start, middle, clip)
    there = process.step(predict(there, middle), there, middle, end, clip)
    (alpha, sigma), (alpha_end, sigma_end) = process.levels(start, x), process.levels(end, x)
    ratio = sigma_end / sigma
    return (there - ratio * x) / (alpha_end - ratio * alpha)


def draw_levels(
    count: int, timesteps: int, shift: float = 1.0, span: Sequence[float] = (0.0, 1.0), device: Any = None
) -> Tensor:
    """int64 [count] of torch's global generator, noisy ones more often the higher the shift; 1: all alike.

    A share u of the levels becomes shift u / (1 + (shift - 1) u) (Esser et al. 2024, arXiv 2403.03206, eq. 23), and
    then lies in the span, of all levels the part from the first share to the second.
    """
    share = torch.rand(count, device=device)
    share = shift * share / (1 + (shift - 1) * share)
    share = span[0] + (span[1] - span[0]) * share
    return (share * timesteps).long().clamp(max=timesteps - 1)


class ImportanceSampler(nn.Module):
    """Draws levels in proportion to the root mean square of their last losses (Nichol and Dhariwal 2021, section 3.3).

    Uniform until every level has had enough. The losses are buffers: a run that goes on knows them.
    """

    losses: Tensor
    seen: Tensor

    def __init__(self, timesteps: int):
        super().__init__()
        self.register_buffer("losses", torch.zeros(timesteps, HISTORY, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(timesteps, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """float64 [T]."""
        count = len(self.seen)
        if (self.seen < HISTORY).any():
            return torch.full_like(self.losses[:, 0], 1 / count)
        size = self.losses.square().mean(1).sqrt()
        return (1 - UNIFORM) * size / size.sum() + UNIFORM / count

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Levels int64 [B] and what their losses are multiplied by, float32 [B]: the mean stays that of all levels."""
        chance = self.probabilities()
        t = torch.multinomial(chance, count, replacement=True)
        return t, (1 / (len(chance) * chance[t])).float()

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember losses [B] of levels [B], before they are multiplied."""
        for level, loss in zip(t.tolist(), losses.double(), strict=True):
            self.losses[level, self.seen[level] % HISTORY] = loss
            self.seen[level] += 1
