"""De-Diffusion (Wei et al. 2023, arXiv 2311.00618): a picture as a text that a text-to-image model draws it from.

    backbone   a vision model of transformers, frozen; or trained along
    pooler     N queries, one a word: blocks of self-attention, cross-attention to the backbone's features and an MLP
    head       a linear layer to the vocabulary of the pipeline's text encoder; only words are allowed
    training   softmax over logits and Gumbel noise at a falling temperature; these soft words times the text encoder's
               table of embeddings, the frozen text encoder, and the frozen U-Net's own denoising loss on the picture
    codes      the ids of the highest logits

Pixels come from any text-to-image model: a detokenizer that takes texts. No code of the authors is public; where the
paper is silent (widths, which tokens are punctuation), this is not theirs.

Shapes: B images, H x W pixels, N words, V rows of the text encoder's vocabulary, M positions of the features, C width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from unitok import checkpoint
from unitok.nn.diffusion import draw_levels
from unitok.nn.frozen import FILE, Frozen
from unitok.nn.text_to_image import TINY, TextToImage, new_text_to_image, open_text_to_image
from unitok.nn.vision import FrozenVision, Vision, build_tower, open_tower, pixel_statistics, scaled
from unitok.nn.words import VOCABULARIES, allowed_tokens, files_of, read_files, texts_of
from unitok.tokenizers.base import ImageTokenizer, parse_resize

COMPARED = 8  # of the pictures of a step, one in so many is denoised again under argmax words


class DeDiffusionTokenizer(Frozen, ImageTokenizer):
    """Codes are ids of the pipeline's text tokenizer, which is kept in the saved folder.

    The pipeline itself is needed for training alone: a saved folder opens without it.

    Args:
        backbone: folder or Hub id of a CLIP or a plain vision model of transformers; or the configuration of one with
            its model_type, for random weights or those of a saved folder.
        backbone_revision: of a Hub id.
        train_backbone: train it along with the pooler, and keep it in the folder.
        copy_backbone: keep a frozen one in the folder too; else it is opened by its name again and must be the same.
        mean, std: for the normalisation of pixels; default: what the folder of `backbone` says, else 0.5.
        pipeline: folder or Hub id of a text-to-image pipeline of diffusers.
        pipeline_revision: of a Hub id.
        pipeline_hash: filled in.
        rows: V; filled in.
        image_size: pixels a side; default: the larger one of backbone and pipeline, which both see it scaled to theirs.
        tokens: N, at most what the text encoder takes.
        width, depth, heads: of the pooler.
        vocab: "paper" or "word_final", as in nn/words.py.
        words: those to choose from; default: all of the vocabulary. A word that the text encoder never met in training
            is a vector like any other to this one, and may get a meaning that no reader shares.
        temperature: of the Gumbel softmax, first and last; it falls exponentially over `anneal_steps`.
        straight_through: in training the text encoder sees the most likely word of each draw, with the gradient of the
            soft one. Not in the paper.
        min_snr: weight of a noise level, as in nn/diffusion.py; by default the plain mean squared error.
        span: the part of the levels that training draws from, 0 the clean and 1 the noisy end. At the noisy end only
            what all of a picture has in common can be told, and that much louder: it drowns the rest. Not in the paper.
    """

    vocabulary = "text"
    token_order = "words"
    exact = ("head",)
    allowed: Tensor  # bool [V]

    def __init__(
        self,
        backbone: str | Mapping[str, Any],
        backbone_revision: str | None = None,
        train_backbone: bool = False,
        copy_backbone: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pipeline: str | None = None,
        pipeline_revision: str | None = None,
        pipeline_hash: str | None = None,
        rows: int = 0,
        image_size: int | None = None,
        tokens: int = 75,
        width: int = 1024,
        depth: int = 5,
        heads: int = 16,
        vocab: str = "paper",
        words: Sequence[str] | None = None,
        temperature: Sequence[float] = (2.0, 0.3),
        anneal_steps: int = 500_000,
        straight_through: bool = False,
        min_snr: float | None = None,
        span: Sequence[float] = (0.0, 1.0),
        resize: str = "squash-bicubic",
    ):
        super().__init__()
        parse_resize(resize)
        for name, value, fits in (
            ("tokens", tokens, tokens >= 1),
            ("width", width, width >= heads and width % heads == 0),
            ("depth", depth, depth >= 1),
            ("vocab", vocab, vocab in VOCABULARIES),
            ("temperature", temperature, len(temperature) == 2 and min(temperature) > 0),
            ("pipeline", pipeline, pipeline is not None or rows > 0),
            ("span", span, len(span) == 2 and 0 <= span[0] < span[1] <= 1),
        ):
            if not fits:
                raise ValueError(f"dediffusion cannot have {name} = {value}: see the arguments of its class")
        self.resize, self.tokens, self.vocab, self.words = resize, tokens, vocab, words
        self.temperature, self.anneal_steps = tuple(temperature), anneal_steps
        self.straight_through, self.min_snr, self.span = straight_through, min_snr, tuple(span)
        self._pipeline_name, self._pipeline_hash = (pipeline, pipeline_revision), pipeline_hash
        self._pipelines: list[TextToImage] = []  # a list hides it from the module: no folder or optimiser holds it
        self._words: PreTrainedTokenizerBase | None = None
        self._word_files: dict[str, bytes] = {}
        opened = None if pipeline is None or rows else open_text_to_image(pipeline, pipeline_revision)
        self.codebook_sizes = (opened.vocab_size if opened else rows,)
        self.backbone = self._open_backbone(backbone, backbone_revision, train_backbone, copy_backbone, mean, std)
        self.sight = self.backbone.tower.config.image_size
        self.image_size = image_size or max(self.sight, opened.image_size if opened else 0)
        self.norm = self.backbone.take_norm()
        self.pooler = _Pooler(tokens, width, depth, heads, self.backbone.width)
        self.head = nn.Linear(width, self.codebook_sizes[0])
        self.register_buffer("allowed", torch.zeros(self.codebook_sizes[0], dtype=torch.bool))
        self.record(rows=self.codebook_sizes[0], image_size=self.image_size)
        if opened:
            self.take_pipeline(opened)
        if isinstance(backbone, str) and not (train_backbone or copy_backbone):
            self.freeze("backbone")

    def _open_backbone(
        self, backbone: Any, revision: str | None, train: bool, copy: bool, mean: Any, std: Any
    ) -> Vision:
        """What was found out about it goes into the configuration."""
        if isinstance(backbone, str):
            folder = checkpoint.open_folder(backbone, revision=revision)
            tower, said = open_tower(folder), pixel_statistics(folder)
        else:
            tower, said = build_tower(backbone), ([0.5] * 3, [0.5] * 3)
        mean, std = list(mean or said[0]), list(std or said[1])
        vision = (Vision if train else FrozenVision)(tower, mean, std)
        self.record(mean=mean, std=std)
        if isinstance(backbone, str) and (train or copy):
            self.record(backbone=vision.config, backbone_revision=None)
        return vision

    def encode(self, images: Tensor) -> Tensor:
        return self.logits(images).argmax(-1)  # [B, N]

    def embed(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        return F.embedding(codes, self.head.weight)  # [B, N, C]; the text encoder's own table may not be here

    def logits(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] in [0, 1] -> [B, N, V], -infinity where a token is not allowed. Gradients flow."""
        features = self.norm(self.backbone(scaled(images, self.sight))[0])  # [B, M, C']
        return self.head(self.pooler(features)).masked_fill(~self.allowed, -torch.inf)

    # ---- words

    @property
    def retokenizes(self) -> bool:
        """Whether the text tokenizer reads every text of `to_text` as the codes it was made of."""
        return self.vocab == "word_final"

    def to_text(self, codes: Tensor) -> list[str]:
        self.check_codes(codes)
        return texts_of(codes.tolist(), self._text_tokenizer())

    def from_text(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text without start and end; of a text of `to_text` its codes, where it `retokenizes`."""
        return self._text_tokenizer()(list(texts), add_special_tokens=False)["input_ids"]

    def _text_tokenizer(self) -> Any:
        if self._words is None:
            raise ValueError("this dediffusion tokenizer has no words yet: load its folder, or give it a pipeline")
        return self._words

    def assets(self) -> dict[str, bytes]:
        return {**super().assets(), **self._word_files}

    def load_assets(self, folder: Path) -> None:
        super().load_assets(folder)
        self._words = AutoTokenizer.from_pretrained(folder)
        self._word_files = {name: content for name, content in read_files(folder).items() if name != FILE}

    # ---- training

    def take_pipeline(self, pipeline: TextToImage) -> None:
        """Train through this one, which is frozen. ValueError where it is not the one of before, or does not fit."""
        if (pipeline.vocab_size,) != self.codebook_sizes or self.tokens > pipeline.words:
            raise ValueError(
                f"the pipeline takes {pipeline.words} words of {pipeline.vocab_size} rows, this dediffusion tokenizer "
                f"has tokens = {self.tokens} and {self.codebook_sizes[0]} rows"
            )
        found = checkpoint.state_hash(pipeline.state_dict())
        if self._pipeline_hash not in (None, found):
            raise ValueError(f"{self._pipeline_name[0]}: not the pipeline that this tokenizer saw in training")
        self._pipeline_hash = found
        self.record(pipeline_hash=found)
        self._pipelines = [pipeline.requires_grad_(False).eval()]
        if self._words is None:
            self._words, self._word_files = pipeline.tokenizer, files_of(pipeline.tokenizer)
            self.allowed.copy_(allowed_tokens(pipeline.tokenizer, pipeline.vocab_size, self.vocab, self.words))

    def pipeline(self) -> TextToImage:
        """The frozen text-to-image model, opened where it is not yet. ValueError or FileNotFoundError without one."""
        if not self._pipelines:
            name, revision = self._pipeline_name
            if name is None:
                raise ValueError("this dediffusion tokenizer has no pipeline to train through: give one")
            self.take_pipeline(open_text_to_image(name, revision))
        return self._pipelines[0].to(self.device)

    def tau(self, step: int) -> float:
        """The temperature at a step."""
        first, last = self.temperature
        return first * (last / first) ** min(1.0, step / max(1, self.anneal_steps))

    def loss(self, batch: Mapping[str, Any], step: int, stage: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """The pipeline's denoising loss under soft words.

        Of some pictures two differences from it are told, at the same levels and noise: `gap`, of the loss under the
        codes, and `rounding`, of the loss under each draw's most likely words.
        """
        pipeline, tau = self.pipeline(), self.tau(step)
        images = scaled(batch["images"], pipeline.image_size)
        logits = self.logits(batch["images"]).float()  # [B, N, V]
        soft = F.gumbel_softmax(logits, tau=tau, hard=self.straight_through)
        codes, drawn = logits.detach().argmax(-1), soft.detach().argmax(-1)
        t = draw_levels(len(images), pipeline.process.timesteps, span=self.span, device=images.device)
        noise = torch.randn(len(images), pipeline.unet.config.in_channels, pipeline.side, pipeline.side).to(images)
        losses = pipeline.denoising_loss(images, pipeline.encode(pipeline.frame(codes), soft), t, noise, self.min_snr)
        few = -(-len(images) // COMPARED)
        with torch.no_grad():
            hard = pipeline.encode(pipeline.frame(torch.cat([codes[:few], drawn[:few]])))
            images, noise = (x[:few].repeat(2, 1, 1, 1) for x in (images, noise))
            rounded = pipeline.denoising_loss(images, hard, t[:few].repeat(2), noise, self.min_snr)  # [2 few]
            gap, rounding = (rounded.view(2, few) - losses[:few]).mean(1)
            sure = logits.softmax(-1).amax(-1).mean()
            used = codes.unique().numel() / codes.numel()
        parts = {"gap": gap, "rounding": rounding, "sure": sure, "temperature": torch.tensor(tau),
                 "distinct": torch.tensor(used)}  # fmt: skip
        return losses.mean(), parts

    @classmethod
    def tiny(cls) -> DeDiffusionTokenizer:
        pipeline = new_text_to_image(TINY)
        backbone = {
            "model_type": "dinov2", "image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "initializer_range": 0.2, "use_mask_token": False,
        }  # fmt: skip
        tokenizer = cls(
            backbone=backbone, rows=pipeline.vocab_size, tokens=6, width=32, depth=2, heads=2, vocab="word_final",
            anneal_steps=100,
        )  # fmt: skip
        tokenizer.take_pipeline(pipeline)
        return tokenizer


# ---- the pooler


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, seen: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.cross_attn = nn.MultiheadAttention(width, heads, kdim=seen, vdim=seen, batch_first=True)
        self.ln_3 = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        x = x + self.cross_attn(self.ln_2(x), features, features, need_weights=False)[0]
        return x + self.mlp(self.ln_3(x))


class _Pooler(nn.Module):
    """Args: seen: width of the features."""

    def __init__(self, tokens: int, width: int, depth: int, heads: int, seen: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, width))
        self.blocks = nn.ModuleList(_Block(width, heads, seen) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """[B, M, C'] -> [B, N, C]."""
        x = self.queries.expand(len(features), -1, -1)
        for block in self.blocks:
            x = block(x, features)
        return self.ln_post(x)
