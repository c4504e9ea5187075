"""A text-to-image pipeline of diffusers, read part by part: text tokenizer, text encoder, U-Net, levels of noise, VAE.

Whatever draws with one, trains one or learns through one shares this. Shapes: B images, L ids (`length`), D width of
the text encoder, V rows of its vocabulary, H x W pixels.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from unitok import checkpoint
from unitok.nn import diffusion
from unitok.nn.diffusion import Process
from unitok.nn.latents import open_vae, to_images, to_latents

INDEX = "model_index.json"
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}  # by their names in diffusers
ENCODERS = {"clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}
BEYOND = ("text_encoder_2", "transformer", "prior")  # parts of pipelines of another kind
T5_LENGTH = 77  # T5 has no longest text; DeepFloyd's U-Nets, the ones told by it, were trained with as many ids as CLIP
END_OF_WORD = "</w>"


class TextToImage(nn.Module):
    """A U-Net told by attention to the last hidden states of one text encoder.

    Args:
        tokenizer: of transformers, with an end token.
        text_encoder: CLIPTextModel or T5EncoderModel.
        unet: UNet2DConditionModel; channels it says beyond its input's (a learned variance) are not used.
        scheduler: of diffusers, with betas and a prediction_type: levels of noise, in training and in drawing.
        vae: of diffusers; None: the U-Net works on pixels in [-1, 1].

    Attributes:
        length: ids of a text, start, end and padding included.
        words: of these, those that say something.
        vocab_size: rows of the text encoder's embedding.
        image_size: H = W.
        process: the levels of noise.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any, unet: Any, scheduler: Any, vae: Any = None):
        super().__init__()
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.text_encoder, self.unet, self.vae = text_encoder, unet, vae
        longest = getattr(text_encoder.config, "max_position_embeddings", T5_LENGTH)
        self.length = min(tokenizer.model_max_length, longest)
        *self.start, self.end = tokenizer("").input_ids
        self.words = self.length - len(self.start) - 1
        self.vocab_size = len(self.embedding)
        self.side = unet.config.sample_size
        self.image_size = self.side * (1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1))
        kind = scheduler.config.get("prediction_type", "epsilon")
        if not hasattr(scheduler, "betas") or kind not in PREDICTIONS:
            raise ValueError(
                f"a scheduler {type(scheduler).__name__} that predicts {kind} is not supported: it needs betas, and "
                f"prediction_type {', '.join(PREDICTIONS)}"
            )
        self.process = Process(PREDICTIONS[kind], timesteps=len(scheduler.betas), betas=scheduler.betas)
        self.clip = vae is None and bool(scheduler.config.get("clip_sample") or scheduler.config.get("thresholding"))
        channels = 3 if vae is None else vae.config.latent_channels
        if unet.config.in_channels != channels or unet.config.class_embed_type is not None:
            raise ValueError(
                f"a U-Net of {unet.config.in_channels} channels and class embedding {unet.config.class_embed_type} is "
                f"not supported: it must be told by texts alone, of {channels} channels"
            )
        if len(tokenizer) > self.vocab_size:
            raise ValueError(f"the text tokenizer has {len(tokenizer)} ids, its text encoder {self.vocab_size}")

    @property
    def embedding(self) -> Tensor:
        """[V, D], what the text encoder embeds ids as."""
        return self.text_encoder.get_input_embeddings().weight

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    # ---- texts

    def ids(self, texts: Sequence[str]) -> Tensor:
        """int64 [B, L] as the pipeline makes them: padded and truncated to L."""
        given = self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return given.input_ids.to(self.device)

    def frame(self, codes: Tensor) -> Tensor:
        """int64 [B, n], n <= words -> int64 [B, L]: start, codes, end, the tokenizer's padding."""
        count, n = codes.shape
        if n > self.words:
            raise ValueError(f"a text of {n} ids is too long: {self.words} fit between start and end")
        framed = codes.new_full((count, self.length), self.tokenizer.pad_token_id)
        first = len(self.start)
        framed[:, :first] = codes.new_tensor(self.start)
        framed[:, first : first + n] = codes
        framed[:, first + n] = self.end
        return framed

    def encode(self, ids: Tensor, soft: Tensor | None = None) -> Tensor:
        """int64 [B, L] -> last hidden states, float [B, L, D].

        soft: float [B, n, V], n <= words: distributions over the vocabulary in place of the n ids after the start;
        what the text encoder embeds there is their mean embedding, and a gradient passes. Rows that are one-hot give
        exactly the states of the ids they stand for.
        """
        mask, config = None, self.text_encoder.config
        if config.model_type == "t5" or getattr(config, "use_attention_mask", False):
            ends = (ids == self.end).long()
            mask = (ends.cumsum(1) - ends == 0).long()  # up to the first end
        with self._embedded(soft):
            return self.text_encoder(ids, attention_mask=mask).last_hidden_state

    @contextmanager
    def _embedded(self, soft: Tensor | None) -> Iterator[None]:
        """The text encoder embeds `soft` in place of its ids: it takes ids alone."""
        if soft is None:
            yield
            return
        first, n = len(self.start), soft.shape[1]
        if n > self.words or soft.shape[2] != self.vocab_size:
            raise ValueError(f"soft words must be [B, n <= {self.words}, {self.vocab_size}], got {tuple(soft.shape)}")
        mean = soft.to(self.embedding.dtype) @ self.embedding

        def embed(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return torch.cat([output[:, :first], mean, output[:, first + n :]], 1)

        tables = [m for m in self.text_encoder.modules() if getattr(m, "weight", None) is self.embedding]
        hooks = [m.register_forward_hook(embed) for m in tables]  # T5 has its one table under two names
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # ---- pictures

    def say(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """What the U-Net, in its own type, says of x_t [B, C, h, w] at levels int64 [B]: [B, C, h, w]."""
        own = self.unet.dtype
        return self.unet(x.to(own), t, encoder_hidden_states=states.to(own)).sample.to(x.dtype)[:, : x.shape[1]]

    def denoising_loss(
        self,
        images: Tensor,
        states: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        min_snr: float | None = None,
    ) -> Tensor:
        """float [B]: mean squared error of what the U-Net predicts, told of the states.

        Args:
            images: float [B, 3, H, W] in [0, 1].
            states: [B, L, D], of `encode`.
            t, noise: levels int64 [B] and noise [B, C, h, w], to compare texts by; else drawn from torch's global
                generator.
            min_snr: weigh levels as `Process.min_snr_weight`; None: all the same.
        """
        x0 = to_latents(self.vae, images)
        if t is None:
            t = diffusion.draw_levels(len(x0), self.process.timesteps, device=x0.device)
        if noise is None:
            noise = torch.randn_like(x0)
        said = self.say(self.process.noised(x0, t, noise), t, states)
        each = (said - self.process.target(x0, t, noise)).square().mean((1, 2, 3))
        return each if min_snr is None else each * self.process.min_snr_weight(t, min_snr)

    @torch.no_grad()
    def draw(
        self,
        states: Tensor,
        empty_states: Tensor,
        generators: Sequence[torch.Generator],
        guidance: float = 1.0,
        steps: int = 50,
    ) -> Tensor:
        """float [B, 3, H, W] in [0, 1], by DDIM; one CPU generator an image.

        Guidance is away from `empty_states`, those of "" or of what is not wanted; 1 runs `states` alone, 0 the other.
        """
        count, channels = len(states), self.unet.config.in_channels
        shape = (channels, self.side, self.side)
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)
        told = states if guidance == 1 else empty_states if guidance == 0 else torch.cat([states, empty_states])
        branches = len(told) // count

        def predict(x: Tensor, t: Tensor | int) -> Tensor:
            times = torch.as_tensor(t, device=x.device).expand(len(told))
            said = self.say(torch.cat([x] * branches), times, told)
            if branches == 1:
                return said
            wanted, unwanted = said.chunk(2)
            return diffusion.guide(wanted, unwanted, guidance, channels)

        return to_images(
            self.vae, diffusion.sample(self.process, predict, noise, sampler="ddim", steps=steps, clip=self.clip)
        )

    # ---- folders

    def save(self, folder: str | Path) -> None:
        """Write a folder of diffusers, with safetensors; `open_text_to_image` opens it, and so do its own classes."""
        parts = {name: getattr(self, name) for name in ("tokenizer", "text_encoder", "unet", "scheduler", "vae")}
        index: dict[str, Any] = {"_class_name": "DiffusionPipeline", "_diffusers_version": diffusers.__version__}
        if self.vae is not None:
            index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
            index |= {name: [None, None] for name in ("feature_extractor", "safety_checker")}
        for name, part in parts.items():
            if part is not None:
                with checkpoint.quiet():
                    part.save_pretrained(Path(folder) / name)
                library = "transformers" if name in ("tokenizer", "text_encoder") else "diffusers"
                index[name] = [library, type(part).__name__]
        checkpoint.write_json(Path(folder) / INDEX, index)


def open_text_to_image(source: str | Path, revision: str | None = None) -> TextToImage:
    """The pipeline of a folder or Hub id, in float32 and eval mode.

    ValueError or FileNotFoundError where it is of another kind, or a part is missing.
    """
    if revision is None and not Path(source).expanduser().is_dir():
        raise ValueError(f"{source}: no such folder; of a Hub id the revision must be given too, a commit")
    folder = checkpoint.open_folder(source, revision=revision)
    index = checkpoint.read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    if found := [name for name in BEYOND if index.get(name, [None])[0] or (folder / name).is_dir()]:
        raise ValueError(f"{source}: a pipeline with {found[0]} is not supported: one text encoder and a U-Net are")
    parts = ["text_encoder", "unet"] + ["vae"] * (folder / "vae").is_dir()
    for part in parts:
        if not any((folder / part).glob("*.safetensors")):
            raise FileNotFoundError(f"{source}: no weights in {part}/ (*.safetensors): the whole pipeline is needed")
    kind = checkpoint.read_json(folder / "text_encoder" / "config.json").get("model_type")
    if kind not in ENCODERS:
        raise ValueError(f"{source}: its text encoder is of kind {kind}; supported are {', '.join(ENCODERS)}")
    scheduler = checkpoint.read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    with checkpoint.quiet():
        return TextToImage(
            AutoTokenizer.from_pretrained(folder / "tokenizer"),
            getattr(transformers, ENCODERS[kind]).from_pretrained(
                folder / "text_encoder", dtype=torch.float32, use_safetensors=True
            ),
            diffusers.UNet2DConditionModel.from_pretrained(
                folder / "unet", torch_dtype=torch.float32, use_safetensors=True
            ),
            getattr(diffusers, str(scheduler)).from_pretrained(folder / "scheduler"),
            open_vae(str(folder / "vae")) if "vae" in parts else None,
        ).eval()


# ---- new ones


TINY: dict[str, dict[str, Any]] = {
    "tokenizer": {"words": ["a", "blue", "circle", "red", "square"], "length": 8},
    "text_encoder": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "unet": {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": [16, 32], "layers_per_block": 1,
        "norm_num_groups": 8, "attention_head_dim": 8, "cross_attention_dim": 16,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "scheduler": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
}  # fmt: skip


def new_text_to_image(components: Mapping[str, Any]) -> TextToImage:
    """An untrained pipeline with a CLIP text encoder; weights are drawn from torch's global generator.

    Args:
        components: arguments of `word_tokenizer` by "tokenizer", and of transformers' and diffusers' classes by
            "text_encoder", "unet", "scheduler" (DDIM) and, for diffusion in latents, "vae" (AutoencoderKL). Or by
            "text_encoder" the folder of a trained CLIP, whose text half and tokenizer are taken, and no "tokenizer".
    """
    given = components.get("text_encoder")
    if lacking := [
        name for name in TINY if name not in components and not (name == "tokenizer" and isinstance(given, str))
    ]:
        raise ValueError(f"components: {' and '.join(lacking)} must be given too")
    encoder: Any
    if isinstance(given, str):
        folder = checkpoint.open_folder(given)
        words, encoder = AutoTokenizer.from_pretrained(folder), open_text_encoder(folder)
    else:
        words = word_tokenizer(**components["tokenizer"])
        sizes = {"vocab_size": len(words), "max_position_embeddings": words.model_max_length}
        special = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        encoder = CLIPTextModel(CLIPTextConfig(**{**sizes, **special, **components["text_encoder"]}))
    unet: Any = diffusers.UNet2DConditionModel(**components["unet"])
    vae = diffusers.AutoencoderKL(**components["vae"]) if "vae" in components else None
    return TextToImage(words, encoder, unet, diffusers.DDIMScheduler(**components["scheduler"]), vae)


def open_text_encoder(folder: str | Path) -> Any:
    """The text half of a CLIP's folder. ValueError where it is not all there."""
    try:
        with checkpoint.quiet():
            found: Any = CLIPTextModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except OSError as error:
        raise ValueError(f"{folder}: no CLIP can be read from it ({str(error).splitlines()[0]})") from error
    encoder, told = found
    if told["missing_keys"]:
        raise ValueError(f"{folder}: no text encoder of a CLIP: {min(told['missing_keys'])} is missing")
    return encoder


def word_tokenizer(words: Sequence[str], length: int) -> Any:
    """A CLIPTokenizer of texts up to `length` ids in which each of these lower-case words is one id.

    Other texts of ASCII are told in pieces of these words and single characters. Byte-pair encoding (Sennrich et al.
    2016, arXiv 1508.07909) with ties broken by the alphabet, so that the same words give the same ids.
    """
    if bad := [word for word in words if not word.isascii() or not word.isalpha() or word != word.lower()]:
        raise ValueError(f"words must be of the letters a to z, got {bad[0]!r}")
    characters = sorted(set(string.printable.lower()) - set(string.whitespace))
    vocab = ["<|startoftext|>", "<|endoftext|>", *characters, *(c + END_OF_WORD for c in characters)]
    split = [[*word[:-1], word[-1] + END_OF_WORD] for word in sorted(set(words))]
    merges: Any = []  # pairs, which transformers' annotation does not know
    while counts := Counter(pair for pieces in split for pair in pairwise(pieces)):
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(pair)
        vocab.append("".join(pair))
        split = [_merged(pieces, pair) for pieces in split]
    return CLIPTokenizer(vocab={v: i for i, v in enumerate(vocab)}, merges=merges, model_max_length=length)


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out
