"""A diffusion decoder of codes, vectors and texts: trained here on any tokenizer, in pixels or in a VAE's latents.

Bodies, predictions and samplers are chosen by argument. Shapes: B images, N tokens, M vectors of size D, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unitok import checkpoint
from unitok.detokenizers.base import Condition, Detokenizer
from unitok.nn import diffusion
from unitok.nn.denoisers import Conditioner, DiT, Hints, Sana, UNet
from unitok.nn.diffusion import ImportanceSampler, Predict, Process
from unitok.nn.frozen import Frozen
from unitok.nn.latents import open_vae, to_images, to_latents
from unitok.nn.text_to_image import open_text_encoder

BODIES = ("dit", "unet", "sana")


class DiffusionDetokenizer(Frozen, Detokenizer):
    """Draws a picture from noise in `steps` steps, told of codes, one or more vectors, texts, or none of a part.

    It takes what is configured: "codes" with codebook_sizes, "vectors" with vector_size, "texts" with text_model.
    Whatever a condition lacks is replaced by that part's learned null, as in training, which drops each part of each
    picture with probability `drop`.

    Args:
        image_size: H = W.
        body: "dit" (width, depth, heads, patch_size, local; a width below the numbers of a patch, channels times
            patch_size^2, cannot tell all of its noise; local: see `DiT`), "unet" (unet_channels, unet_attention,
            unet_layers, and width for the features of conditions, width // heads for those of a head) or "sana" (as
            dit, for pictures of 512 pixels and more in the latents of a VAE; told by attention alone).
        prediction: "epsilon", "x0", "v" or "flow".
        schedule: "linear" or "cosine"; flow has none.
        timesteps: levels of noise T.
        learned_variance: predict the variance of ancestral steps as well: L_simple + 0.001 L_vlb.
        timestep_sampling: of the levels in training, "uniform" or "importance".
        min_snr: weigh them in the loss by the signal-to-noise ratio up to this one (published: 5); None: all the same.
        least_snr: with min_snr, and down to this one: 1 where the condition says most of what is drawn.
        sampler: "ddim", "ddpm", or "flow", which flow alone can have; None: ddim or flow.
        steps: of sampling.
        guidance: the scale to use unless told otherwise; for callers, who pass it to `generate`.
        guidance_interval: from and to which share of the noise levels guidance acts; the rest is conditional alone.
        clip_sample: cut what a sampler takes for the clean picture to [-1, 1]; never done in latents.
        drop: see above.
        codebook_sizes, grid: of the codes: positions, then sub-tokens.
        codes_as: "patches" (aligned with the picture) or "context" (attended to; the one way for 1-D grids).
        vector_size: D.
        vectors_as: "time" (M = 1), "patches" (M = 1: in the time and spread over the picture) or "context".
        text_model: folder or Hub id of a CLIPTextModel with its tokenizer.
        text_trained: train it too, and keep it in the folder; else it stays frozen, by name.
        vae: folder or Hub id of a diffusers VAE, frozen: diffusion runs in its latents.
        text_revision, vae_revision: of Hub ids.
    """

    def __init__(
        self,
        image_size: int = 32,
        body: str = "dit",
        width: int = 192,
        depth: int = 6,
        heads: int = 6,
        patch_size: int = 4,
        local: bool = False,
        unet_channels: Sequence[int] = (64, 128, 192),
        unet_attention: Sequence[bool] = (False, True, True),
        unet_layers: int = 2,
        prediction: str = "v",
        schedule: str = "cosine",
        timesteps: int = 1000,
        learned_variance: bool = False,
        timestep_sampling: str = "uniform",
        min_snr: float | None = None,
        least_snr: float = 0.0,
        sampler: str | None = None,
        steps: int = 50,
        guidance: float = 1.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        clip_sample: bool = True,
        drop: float = 0.1,
        codebook_sizes: Sequence[int] | None = None,
        grid: Sequence[int] | None = None,
        codes_as: str = "patches",
        vector_size: int | None = None,
        vectors_as: str = "time",
        text_model: str | None = None,
        text_trained: bool = False,
        text_revision: str | None = None,
        vae: str | None = None,
        vae_revision: str | None = None,
    ):
        super().__init__()
        self.process = Process(prediction, schedule, timesteps)
        sampler = sampler or ("flow" if prediction == "flow" else "ddim")
        self.learned_variance, self.min_snr, self.least_snr = learned_variance, min_snr, least_snr
        self._check_choices(body, sampler, timestep_sampling, codes_as, vectors_as, guidance_interval, drop)
        self._check_codes(codebook_sizes, grid, codes_as)
        self.process.grid(steps)
        self.image_size, self.sampler, self.steps, self.drop = image_size, sampler, steps, drop
        self.guidance, self.guidance_interval = guidance, tuple(guidance_interval)
        self.code_grid = tuple(grid) if codebook_sizes is not None and grid is not None else None
        self.vector_size, self.vectors_as = vector_size, vectors_as

        text_size, frozen = None, []
        if text_model is not None:
            text_encoder, self.text_tokenizer = open_text_model(text_model, text_revision)
            text_size = text_encoder.config.hidden_size
        vae_model = None if vae is None else open_vae(vae, vae_revision)
        with torch.no_grad():
            self.shape = tuple(to_latents(vae_model, torch.zeros(1, 3, image_size, image_size)).shape[1:])  # C, H, W
        channels, side = self.shape[0], self.shape[1]
        coarse = side // (2 ** (len(unet_channels) - 1) if body == "unet" else patch_size)
        self.conditioner = Conditioner(
            width, codebook_sizes, grid, codes_as, vector_size, vectors_as, text_size, (coarse, coarse)
        )
        if not self.conditioner.parts:
            raise ValueError("a diffusion detokenizer needs codebook_sizes and grid, vector_size or text_model")
        self.takes = frozenset(self.conditioner.parts)
        if text_model is not None:
            self.text_encoder = text_encoder
            frozen += [] if text_trained else ["text_encoder"]
        self.vae = vae_model
        self.freeze(*frozen, *([] if vae is None else ["vae"]))
        self.clip = clip_sample and self.vae is None
        sizes = (channels, channels * (1 + learned_variance), side)
        c = self.conditioner
        places = c.places if c.has_patches else None
        self.body: nn.Module
        if body == "dit":
            self.body = DiT(*sizes, patch_size, width, depth, heads, places, c.has_context, local)
        elif body == "sana":
            if c.has_patches or c.has_vector:
                raise ValueError("body sana is told by attention alone: use codes_as: context and vectors_as: context")
            self.body = Sana(*sizes, patch_size, width, depth, heads)
        else:
            self.body = UNet(
                *sizes, unet_channels, unet_attention, unet_layers, width // heads, width, c.has_patches, c.has_vector,
                c.has_context,
            )  # fmt: skip
        self.importance = ImportanceSampler(timesteps) if timestep_sampling == "importance" else None

    def _check_choices(
        self,
        body: str,
        sampler: str,
        times: str,
        codes_as: str,
        vectors_as: str,
        interval: Sequence[float],
        drop: float,
    ) -> None:
        choices = {
            "body": (body, BODIES),
            "sampler": (sampler, ("flow",) if self.process.prediction == "flow" else ("ddim", "ddpm")),
            "timestep_sampling": (times, ("uniform", "importance")),
            "codes_as": (codes_as, ("patches", "context")),
            "vectors_as": (vectors_as, ("time", "patches", "context")),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}")
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"guidance_interval must be two rising numbers of 0 to 1, got {list(interval)}")
        if self.learned_variance and self.process.prediction == "flow":
            raise ValueError("flow has no variance to learn: its samplers draw no noise")
        if self.min_snr is not None and not self.min_snr > 0:
            raise ValueError(f"min_snr must be above 0, got {self.min_snr}")
        if not 0 <= self.least_snr <= (self.min_snr or 0):
            raise ValueError(f"least_snr must be 0 to min_snr, {self.min_snr}, got {self.least_snr}")
        if not 0 <= drop < 1:
            raise ValueError(f"drop must be 0 or more and below 1, got {drop}")

    @staticmethod
    def _check_codes(sizes: Sequence[int] | None, grid: Sequence[int] | None, codes_as: str) -> None:
        if sizes is None:
            return
        if grid is None:
            raise ValueError("codebook_sizes needs a grid")
        if codes_as == "patches" and len(grid) < 2:
            raise ValueError(f"codes of grid {tuple(grid)} stand at no place of the picture: use codes_as: context")
        if len(sizes) not in (1, math.prod(grid[2:])):
            raise ValueError(
                f"{len(sizes)} codebooks do not fit grid {tuple(grid)}: one, or one a sub-token, is expected"
            )

    # ---- conditions

    def check_condition(self, condition: Condition) -> None:
        super().check_condition(condition)
        codes, vectors = condition.codes, condition.vectors
        if "codes" in self.takes and codes is not None:
            assert self.code_grid is not None
            if condition.grid is not None and tuple(condition.grid) != self.code_grid:
                raise ValueError(f"condition codes have grid {tuple(condition.grid)}, expected {self.code_grid}")
            if codes.shape[1] != math.prod(self.code_grid):
                raise ValueError(f"condition codes of grid {self.code_grid} must be {math.prod(self.code_grid)} an "
                                 f"image, got {codes.shape[1]}")  # fmt: skip
            each = torch.tensor(self.conditioner.sizes, device=codes.device)
            if ((codes < 0) | (codes.unflatten(1, (-1, len(each))) >= each).flatten(1)).any():
                raise ValueError(f"condition codes must be 0 or more and below {self.conditioner.sizes}")
        if "vectors" in self.takes and vectors is not None:
            count = vectors.shape[1] if self.vectors_as == "context" else 1
            if vectors.shape[1:] != (count, self.vector_size):
                many = "M" if self.vectors_as == "context" else "1"
                raise ValueError(f"condition vectors must be [B, {many}, {self.vector_size}], got "
                                 f"{tuple(vectors.shape)}")  # fmt: skip

    def _hints(self, condition: Condition, dropped: dict[str, Tensor] | None = None) -> Hints:
        parts = {part: getattr(condition, part) for part in condition.parts() & self.takes}
        if "vectors" in parts:
            parts["vectors"] = parts["vectors"].to(self.dtype)
        if "texts" in parts:
            parts["texts"] = self._texts(parts["texts"])
        return self.conditioner(len(condition), **parts, dropped=dropped)

    def _texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """Last hidden states [B, L, D] and which of them count, bool [B, L]; None where no text has a token."""
        longest = self.text_encoder.config.max_position_embeddings
        ids = self.text_tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        if not ids.input_ids.numel():
            return None
        ids = ids.to(self.device)
        mask = ids.attention_mask.bool()
        seen = mask.clone()
        seen[:, 0] = True  # to attend to nothing at all would be NaN
        with torch.set_grad_enabled(torch.is_grad_enabled() and "text_encoder" not in self.frozen):
            states = self.text_encoder(ids.input_ids, attention_mask=seen).last_hidden_state
        return states, mask

    def fit_vectors(self, vectors: Tensor) -> None:
        """Take the mean and deviation by which vectors are normalised from these, [n, M, D]; loss() at step 0 does it
        from its batch where nobody has."""
        self.conditioner.fit(vectors)

    # ---- generation

    def _run(self, x: Tensor, t: Tensor, hints: Hints) -> Tensor:
        """The body in its own type, at levels int64 [B], which it knows as numbers of 1000."""
        return self.body(x.to(self.dtype), t * (1000 / self.process.timesteps), hints).to(x.dtype)

    def _predict(self, condition: Condition, guidance: float = 1.0, negative: Condition | None = None) -> Predict:
        """(x_t, t) -> what the guided body says; branches that are not needed do not run."""
        count, channels = len(condition), self.shape[0]
        wanted = self._hints(condition) if guidance != 0 else None
        if guidance == 1:
            null = None
        elif negative is not None:
            null = self._hints(negative)
        else:
            everyone = torch.ones(count, dtype=torch.bool, device=self.device)
            null = self._hints(condition, dict.fromkeys(self.takes, everyone))
        both = Hints.cat(wanted, null) if wanted is not None and null is not None else None
        low, high = self.guidance_interval

        def predict(x: Tensor, t: Tensor | int) -> Tensor:
            times = torch.as_tensor(t, device=x.device).expand(count)
            noise = (times + 1) / self.process.timesteps
            inside = (low <= noise) & (noise <= high)
            if both is None or not inside.any():
                return self._run(x, times, null if wanted is None else wanted)  # type: ignore[arg-type]
            said, unsaid = self._run(torch.cat([x, x]), torch.cat([times, times]), both).chunk(2)
            scale = torch.where(inside, guidance, 1.0).to(x.dtype).view(-1, 1, 1, 1)
            return diffusion.guide(said, unsaid, scale, channels)

        return predict

    def generate(
        self,
        condition: Condition,
        *,
        seeds: Sequence[int],
        guidance: float = 1.0,
        steps: int | None = None,
        negative: Condition | None = None,
    ) -> Tensor:
        """One seed an image -> float [B, 3, H, W] in [0, 1].

        Guidance 1 is the condition alone, 0 the null alone; `negative` takes the place of the null.
        """
        generators = self.generators(seeds)
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in generators]).to(self.device)
        return self.draw(noise, condition, generators, guidance, steps, negative)

    def draw(
        self,
        noise: Tensor,
        condition: Condition,
        generators: list[torch.Generator] | None = None,
        guidance: float = 1.0,
        steps: int | None = None,
        negative: Condition | None = None,
    ) -> Tensor:
        """Pictures from this noise [B, C, H, W], as of `invert`; else as `generate`, without its checks."""
        x = diffusion.sample(
            self.process,
            self._predict(condition, guidance, negative),
            noise,
            sampler=self.sampler,
            steps=self.steps if steps is None else steps,
            generators=generators,
            learned_variance=self.learned_variance,
            clip=self.clip,
        )
        return to_images(self.vae, x)

    @torch.no_grad()
    def invert(self, images: Tensor, condition: Condition, steps: int | None = None) -> Tensor:
        """float [B, 3, H, W] in [0, 1] -> the noise [B, C, H, W] they come from, by DDIM backwards, unguided."""
        self.check_condition(condition)
        x0 = to_latents(self.vae, images.to(self.device))
        predict = self._predict(condition.to(self.device))
        return diffusion.invert(self.process, predict, x0, steps=self.steps if steps is None else steps)

    # ---- training

    def loss(self, images: Tensor, condition: Condition, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the prediction, and 0.001 of the variational bound where the variance is learned.

        Levels, noise and dropping are drawn from torch's global generator.
        """
        self.check_condition(condition)
        if step == 0 and self.training and condition.vectors is not None and "vectors" in self.takes:
            if not self.conditioner.fitted:
                self.fit_vectors(condition.vectors)
        x0, count, device = to_latents(self.vae, images), len(images), images.device
        weights: Tensor | float
        if self.importance is None:
            t, weights = torch.randint(self.process.timesteps, (count,), device=device), 1.0
        else:
            t, weights = self.importance.draw(count)
        noise = torch.randn_like(x0)
        x = self.process.noised(x0, t, noise)
        output = self._run(x, t, self._hints(condition, self._drops(count)))
        each = (output[:, : x.shape[1]] - self.process.target(x0, t, noise)).square().mean((1, 2, 3))
        parts = {"mse": each.detach().mean()}
        if self.min_snr is not None:
            each = each * self.process.min_snr_weight(t, self.min_snr, self.least_snr)
        if self.learned_variance:
            bound = diffusion.variational_bound(self.process, x0, x, t, output)
            parts["bits"] = (weights * bound).detach().mean() * self.process.timesteps
            each = each + 0.001 * self.process.timesteps * bound  # L_vlb is the sum over all levels
        if self.importance is not None and self.training:
            self.importance.update(t, each.detach())
        return (weights * each).mean(), parts

    def _drops(self, count: int) -> dict[str, Tensor] | None:
        """Which pictures go without a part."""
        if not self.drop:
            return None
        return {part: torch.rand(count, device=self.device) < self.drop for part in sorted(self.takes)}

    def distill_loss(
        self, teacher: DiffusionDetokenizer, images: Tensor, condition: Condition, step: int, sampling_steps: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One DDIM step of this one, on the grid of `sampling_steps`, is to do what two of the teacher do.

        Progressive distillation (Salimans and Ho 2022, arXiv 2202.00512), on x0 with weight max(SNR, 1). The teacher
        is guided by its own `guidance`, so that the student needs none. Both must have one process.
        """
        self.check_condition(condition)
        mine, theirs = self.process, teacher.process
        if not torch.equal(mine.alpha, theirs.alpha) or self.shape != teacher.shape:
            raise ValueError("student and teacher must have the same levels of noise and size of picture")
        # every other level of the teacher's grid is one of the student's
        grid = torch.tensor([*mine.grid(2 * sampling_steps), -1], device=images.device)
        x0, count = to_latents(self.vae, images), len(images)
        place = 2 * torch.randint(sampling_steps, (count,), device=images.device)
        t = grid[place]
        x = mine.noised(x0, t, torch.randn_like(x0))
        with torch.no_grad():
            predict = teacher._predict(condition, teacher.guidance)
            levels = (t, grid[place + 1], grid[place + 2])
            target = diffusion.two_step_target(theirs, predict, x, levels, teacher.clip)
        said, _ = mine.split(self._run(x, t, self._hints(condition)), x, t)
        each = (said - target).square().mean((1, 2, 3))
        loss = (mine.snr(t).clamp_min(1) * each).mean()
        return loss, {"mse": each.detach().mean()}

    @classmethod
    def tiny(cls) -> DiffusionDetokenizer:
        return cls(
            image_size=16, width=32, depth=2, heads=2, patch_size=4, timesteps=100, steps=4, codebook_sizes=(16,),
            grid=(2, 2),
        )  # fmt: skip


def open_text_model(source: str, revision: str | None = None) -> tuple[Any, Any]:
    """A CLIPTextModel and its tokenizer, from a folder or the Hub."""
    from transformers import AutoTokenizer

    folder = checkpoint.open_folder(source, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked, so that any will do
    return open_text_encoder(folder), tokenizer
