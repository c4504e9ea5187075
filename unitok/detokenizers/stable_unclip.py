"""Stable unCLIP: a picture from one CLIP image embedding, by a Stable Diffusion whose U-Net is told of it.

The pipeline is the user's: a folder or a pinned Hub id of diffusers' StableUnCLIPImg2ImgPipeline, which is also what
SEED draws with. Shapes: B images, D image embedding, h x w latents.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import Tensor

from unitok import checkpoint
from unitok.detokenizers.base import Condition, Detokenizer
from unitok.nn.diffusion import guide
from unitok.nn.frozen import Frozen

PARTS = ("unet", "vae", "image_normalizer")
WEIGHTS = "*.safetensors"


class StableUnclipDetokenizer(Frozen, Detokenizer):
    """Takes vectors [B, 1, D] as image embeddings.

    The prompt is empty. Guidance is away from the embedding of a negative condition, such as that of codes a model
    wrote without a prompt, as SEED does; without one away from zeros, as stock diffusers does.

    Args:
        pipeline: folder or Hub id. None: new components, by `components`.
        revision: commit of a Hub id, which must be given.
        trained: train the U-Net and keep it in the folder; else it stays frozen, by name, like the rest.
        noise_level: of the embedding; at 0 it is still slightly noisy.
        steps: of sampling.
        guidance: the scale to use unless told otherwise; for callers, who pass it to `generate`.
        drop: probability of zeros for the embedding in training.
        components: without a pipeline, the arguments of diffusers' classes by "unet", "vae" and "scheduler".
    """

    prompt: Tensor

    def __init__(
        self,
        pipeline: str | None = None,
        revision: str | None = None,
        trained: bool = False,
        noise_level: int = 0,
        steps: int = 20,
        guidance: float = 10.0,
        drop: float = 0.1,
        components: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        super().__init__()
        if (pipeline is None) == (components is None):
            raise ValueError("give the pipeline of a StableUnCLIPImg2ImgPipeline, or components to make a new one")
        self.noise_level, self.steps, self.guidance, self.drop = noise_level, steps, guidance, drop
        parts = _open(pipeline, revision) if pipeline is not None else _new(components or {})
        self.unet, self.vae, self.image_normalizer = (parts[name] for name in PARTS)
        self.scheduler, self.image_noising_scheduler = parts["scheduler"], parts["image_noising_scheduler"]
        self.register_buffer("prompt", parts["prompt"], persistent=pipeline is None)  # [1, L, C]
        levels = self.image_noising_scheduler.config.num_train_timesteps
        if not 0 <= noise_level < levels:
            raise ValueError(f"noise_level must be 0 to {levels - 1}, got {noise_level}")
        self.vae.requires_grad_(False)
        self.image_normalizer.requires_grad_(False)
        if pipeline is not None:
            self.freeze(*(name for name in PARTS if name != "unet" or not trained))
        self.takes = frozenset({"vectors"})
        self.side = self.unet.config.sample_size
        self.image_size = self.side * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.vector_size = self.image_normalizer.config.embedding_dim

    def check_condition(self, condition: Condition) -> None:
        super().check_condition(condition)
        if condition.vectors is not None and condition.vectors.shape[1:] != (1, self.vector_size):
            raise ValueError(
                f"condition vectors must be [B, 1, {self.vector_size}], the image embedding of this pipeline, got "
                f"{tuple(condition.vectors.shape)}"
            )

    def generate(
        self,
        condition: Condition,
        *,
        seeds: Sequence[int],
        guidance: float = 1.0,
        steps: int | None = None,
        negative: Condition | None = None,
    ) -> Tensor:
        """One seed an image -> float [B, 3, H, W] in [0, 1]."""
        generators = self.generators(seeds)
        count, channels = len(seeds), self.unet.config.in_channels
        noise = self._noise(generators, self.vector_size)
        latents = self._noise(generators, channels, self.side, self.side) * self.scheduler.init_noise_sigma
        assert condition.vectors is not None
        told = self._labels(condition.vectors, noise)
        untold = torch.zeros_like(told)
        if negative is not None and negative.vectors is not None:
            untold = self._labels(negative.vectors, noise)
        labels = told if guidance == 1 else untold if guidance == 0 else torch.cat([told, untold])
        branches = len(labels) // count
        prompts = self.prompt.expand(len(labels), -1, -1)

        self.scheduler.set_timesteps(self.steps if steps is None else steps, device=self.device)
        accepted = inspect.signature(self.scheduler.step).parameters
        options: dict[str, Any] = {"generator": generators} if "generator" in accepted else {}
        for t in self.scheduler.timesteps:
            x = self.scheduler.scale_model_input(torch.cat([latents] * branches), t)
            said = self._unet(x, t, prompts, labels)
            if branches == 2:
                wanted, unwanted = said.chunk(2)
                said = guide(wanted, unwanted, guidance, channels)
            latents = self.scheduler.step(said, t, latents, **options, return_dict=False)[0]
        images = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        return ((images + 1) / 2).clamp(0, 1).float()

    def _noise(self, generators: Sequence[torch.Generator], *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

    def _labels(self, vectors: Tensor, noise: Tensor) -> Tensor:
        """[B, 1, D] -> [B, 2D]: the embedding, noised where it is normalised, and the level of its noise."""
        mean, std = self.image_normalizer.mean, self.image_normalizer.std
        level = torch.full((len(vectors),), self.noise_level, device=vectors.device)
        noised = self.image_noising_scheduler.add_noise((vectors[:, 0] - mean) / std, noise, level) * std + mean
        waves = get_timestep_embedding(level, self.vector_size, flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([noised, waves.to(noised.dtype)], 1)

    def _unet(self, x: Tensor, t: Tensor, prompts: Tensor, labels: Tensor) -> Tensor:
        own = self.unet.dtype
        said = self.unet(x.to(own), t, encoder_hidden_states=prompts.to(own), class_labels=labels.to(own))
        return said.sample.to(x.dtype)

    def loss(self, images: Tensor, condition: Condition, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of what the pipeline's U-Net predicts, of latents of the images at the pipeline's levels.

        Levels, noise and dropping are drawn from torch's global generator.
        """
        self.check_condition(condition)
        assert condition.vectors is not None
        count, device, scheduler = len(images), images.device, self.scheduler
        with torch.no_grad():
            latents = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist.mode()
            latents = latents.to(images.dtype) * self.vae.config.scaling_factor
            labels = self._labels(condition.vectors, torch.randn(count, self.vector_size, device=device))
            labels = torch.where(torch.rand(count, 1, device=device) < self.drop, 0, labels)
        t = torch.randint(scheduler.config.num_train_timesteps, (count,), device=device)
        noise = torch.randn_like(latents)
        level = scheduler.alphas_cumprod.to(device)[t].view(-1, 1, 1, 1)
        x = level.sqrt() * latents + (1 - level).sqrt() * noise
        kind = scheduler.config.prediction_type
        velocity = level.sqrt() * noise - (1 - level).sqrt() * latents
        target = {"epsilon": noise, "sample": latents, "v_prediction": velocity}[kind]
        error = (self._unet(x, t, self.prompt.expand(count, -1, -1), labels) - target).square().mean()
        return error, {"mse": error.detach()}

    @classmethod
    def tiny(cls) -> StableUnclipDetokenizer:
        return cls(steps=3, components=TINY)

    def example_condition(self) -> Condition:
        """Three random embeddings of the size it takes."""
        return Condition(vectors=torch.randn(3, 1, self.vector_size, generator=torch.Generator().manual_seed(1)))


TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 8, "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8,
        "cross_attention_dim": 16, "attention_head_dim": 8, "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 16, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "vae": {"block_out_channels": [16, 16], "layers_per_block": 1, "norm_num_groups": 8, "down_block_types":
            ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
    "scheduler": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
                  "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction"},
}  # fmt: skip


def _new(components: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    unet: Any = diffusers.UNet2DConditionModel(**components.get("unet", {}))
    labels = unet.config.projection_class_embeddings_input_dim
    if unet.config.class_embed_type != "projection" or not labels:
        raise ValueError('components: the unet needs class_embed_type "projection" and '
                         "projection_class_embeddings_input_dim, twice the size of the embedding")  # fmt: skip
    return {
        "unet": unet,
        "vae": diffusers.AutoencoderKL(**components.get("vae", {})),
        "image_normalizer": StableUnCLIPImageNormalizer(labels // 2),
        "scheduler": diffusers.DDIMScheduler(**components.get("scheduler", {})),
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "prompt": torch.zeros(1, 1, unet.config.cross_attention_dim),
    }


def _open(source: str, revision: str | None) -> dict[str, Any]:
    """The parts of a pipeline, and its text encoder's states of the empty prompt: the encoder itself is let go."""
    if revision is None and not Path(source).expanduser().is_dir():
        raise ValueError(f"{source}: no such folder; of a Hub id the revision must be given too, a commit")
    folder = checkpoint.open_folder(source, revision=revision)
    index = folder / "model_index.json"
    name = checkpoint.read_json(index).get("_class_name") if index.is_file() else None
    if name not in ("StableUnCLIPImg2ImgPipeline", "StableUnCLIPPipeline"):
        raise ValueError(f"{source}: not a Stable unCLIP pipeline of diffusers: its model_index.json names {name}")
    for part in (*PARTS, "text_encoder"):
        if not any((folder / part).glob(WEIGHTS)):
            raise FileNotFoundError(f"{source}: no weights in {part}/ ({WEIGHTS}): the whole pipeline is needed")
    pipe: Any = diffusers.StableUnCLIPImg2ImgPipeline.from_pretrained(
        folder, feature_extractor=None, image_encoder=None, use_safetensors=True, local_files_only=True
    )
    with torch.no_grad():
        prompt, _ = pipe.encode_prompt("", "cpu", 1, False)
    names = (*PARTS, "scheduler", "image_noising_scheduler")
    return {**{part: getattr(pipe, part) for part in names}, "prompt": prompt}
