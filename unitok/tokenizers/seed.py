"""SEED (Ge et al. 2023, arXiv 2307.08041, 2310.01218; AILab-CVC/SEED): codes with a meaning, from left to right.

    vision     a frozen ViT; its features are all that is seen of the picture
    Q-Former   N queries, each of which sees those before it, and all features in every second layer
    codes      a small MLP down to a nearest-code lookup, and one up again
    blocks     rebuild the Q-Former's output from the codes
    head       the image embedding of a frozen CLIP from the codes, which a generator is conditioned on

Stage "contrastive" trains the Q-Former: its last output and the caption, read by the same Q-Former, find each other in
the batch. Stage "codes" freezes it and trains the rest. Pixels come from a detokenizer.

Shapes: B images, N queries and codes, C width, E size of the contrastive embedding, D size of the image embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from transformers import AutoTokenizer, Blip2QFormerConfig, PreTrainedTokenizerBase
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from unitok import checkpoint
from unitok.nn.qformer import ViTBlock, make_qformer
from unitok.nn.quantizers import VQ
from unitok.nn.vision import CLIP_MEAN, CLIP_STD, EVA_G, FrozenVision, build_tower, open_tower, pixel_statistics
from unitok.nn.words import files_of, read_files
from unitok.tokenizers.base import ImageTokenizer, parse_resize

QUANTIZER, RECONSTRUCTION, IMAGE = 5.0, 2.0, 0.5  # weights of the losses of stage "codes"
SMOOTHING = 0.1  # of the contrastive labels
TEMPERATURE, COLDEST = 0.07, 0.01  # of the contrastive logits, at the start and at least


class SeedTokenizer(ImageTokenizer):
    """The published SEED-2 is the default, but for its vision tower's weights.

    Args:
        image_size: pixels a side, that of the vision tower.
        vision: folder or Hub id of a CLIP, a BLIP-2 or a plain vision model of transformers; or the configuration of
            one, for random weights or those of a saved folder; default EVA-CLIP-g's.
        copy_vision: keep the tower's weights with this tokenizer's, so that a saved folder needs no other; else they
            are read from `vision` again, and must be the same by `vision_hash`.
        vision_hash: filled in.
        mean, std: for the normalisation of pixels; default: what the folder of `vision` says, else CLIP's.
        target: folder or Hub id of the CLIP whose projected image embedding the head learns, read in training alone;
            default: `vision`, which then is a CLIP.
        target_size: D; default: that of `vision`.
        tokens: N.
        width, layers, heads, cross_every, causal, dropout: of the Q-Former.
        codebook_size, code_dim: codes, and the size of their vectors.
        beta: weight of the codebook's term; the commitment's is 1, as in taming's released code.
        revive_after: a code that so many steps did not use becomes a vector of the batch; 0, as published: never.
        depth: blocks of either stack.
        head: "mlp" (as released) or "reverse" (a small Q-Former with one query, as trained).
        head_sizes: channels of the mlp head.
        reverse_layers: of the reverse head.
        text_tokenizer: folder or Hub id of the text tokenizer for captions; kept in the saved folder.
        words: its size; filled in. 0: no captions, and no stage "contrastive".
        text_length: words of a caption that are read.
        embedding: E.
    """

    stages = ("contrastive", "codes")
    text_stages: tuple[str, ...] = ("contrastive",)
    token_order = "causal"

    def __init__(
        self,
        image_size: int = 224,
        vision: str | Mapping[str, Any] | None = None,
        copy_vision: bool = True,
        vision_hash: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        target: str | None = None,
        target_size: int | None = None,
        tokens: int = 32,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        cross_every: int = 2,
        causal: bool = True,
        dropout: float = 0.0,
        codebook_size: int = 8192,
        code_dim: int = 32,
        beta: float = 0.25,
        revive_after: int = 0,
        depth: int = 4,
        head: str = "mlp",
        head_sizes: Sequence[int] = (256, 128, 32),
        reverse_layers: int = 4,
        text_tokenizer: str | None = None,
        words: int = 0,
        text_length: int = 32,
        embedding: int = 256,
        resize: str = "squash-bicubic",
    ):
        super().__init__()
        parse_resize(resize)
        for name, value, fits in (
            ("tokens", tokens, tokens >= 1),
            ("width", width, width >= heads and width % heads == 0),
            ("codebook_size", codebook_size, codebook_size >= 2),
            ("text_length", text_length, text_length >= 3),
            ("head", head, head in ("mlp", "reverse")),
        ):
            if not fits:
                raise ValueError(f"seed cannot have {name} = {value}; see the arguments of {type(self).__name__}")
        self.image_size, self.resize, self.codebook_sizes = image_size, resize, (codebook_size,)
        self.tokens, self.text_length, self.target = tokens, text_length, target
        self.vision = self._open_vision(vision, copy_vision, vision_hash, mean, std)
        self._words: PreTrainedTokenizerBase | None = None
        self._word_files: dict[str, bytes] = {}
        if text_tokenizer:
            self._words, self._word_files = _open_words(text_tokenizer)
        words = len(self._words) if self._words else words
        size = target_size or self.vision.projected
        if not size:
            raise ValueError(f"seed needs target_size, of the embedding its head learns: {vision} has none of its own")
        self._targets: list[FrozenVision] = []  # opened when first needed; a list hides it, so that no folder holds it
        self.record(text_tokenizer=None, words=words, target_size=size)

        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.qformer = make_qformer(
            width, layers, heads, self.vision.width, cross_every=cross_every, dropout=dropout, words=words > 0,
            causal=causal,
        )  # fmt: skip
        if words:
            config = Blip2QFormerConfig(
                vocab_size=words, hidden_size=width, max_position_embeddings=max(512, text_length)
            )
            self.text_embeddings = Blip2TextEmbeddings(config)
            nn.init.normal_(self.text_embeddings.word_embeddings.weight, std=0.02)
            nn.init.normal_(self.text_embeddings.position_embeddings.weight, std=0.02)
            self.vision_proj, self.text_proj = nn.Linear(width, embedding), nn.Linear(width, embedding)
            self.log_temperature = nn.Parameter(torch.tensor(math.log(TEMPERATURE)))
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_dim))
        self.quantize = VQ(codebook_size, code_dim, beta=beta, legacy=True, revive_after=revive_after)
        self.decode_task_layer = nn.Sequential(nn.Linear(code_dim, code_dim), nn.Tanh(), nn.Linear(code_dim, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList(ViTBlock(width, heads) for _ in range(depth))
        self.pos_embed_image = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks_image = nn.ModuleList(ViTBlock(width, heads) for _ in range(depth))
        self.reverse = head == "reverse"
        if self.reverse:
            self.reverse_tokens = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.reverse_qformer = make_qformer(width, reverse_layers, heads, width, dropout=dropout)
            self.distill_image_proj = nn.Linear(width, size)
        else:
            self.image_down = _narrowing(width, head_sizes)
            self.distill_image_proj = nn.Linear(tokens * head_sizes[-1], size)

    def _open_vision(
        self, vision: Any, copy: bool, expected: str | None, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> FrozenVision:
        """The tower; what was found out about it goes into the configuration."""
        named = isinstance(vision, str)
        tower = open_tower(vision) if named else build_tower(vision or EVA_G)
        said = pixel_statistics(vision) if named else (CLIP_MEAN, CLIP_STD)
        mean, std = list(mean or said[0]), list(std or said[1])
        frozen = FrozenVision(tower, mean, std)
        self.ln_vision = frozen.take_norm()
        pixels = frozen.tower.config.image_size
        if pixels != self.image_size:
            raise ValueError(f"image_size is {self.image_size}, but the vision tower's is {pixels}: give that one")
        if copy:
            self.record(vision=frozen.config)
        else:
            self.not_saved = ("vision.tower.",)
            found = checkpoint.state_hash(frozen.tower.state_dict())
            if expected not in (None, found):
                raise ValueError(f"{vision}: its weights are not those that this tokenizer saw in training")
            self.record(vision_hash=found)
        self.record(mean=mean, std=std)
        return frozen

    def encode(self, images: Tensor) -> Tensor:
        return self.quantize.encode(self.encode_task_layer(self.queries(images)[0])).squeeze(-1)  # [B, N]

    def embed(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        return self.image_embedding(self.quantize.vectors(codes.unsqueeze(-1))).unsqueeze(1)  # [B, 1, D]

    # ---- the parts

    def queries(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """float [B, 3, H, W] in [0, 1] -> the Q-Former's output [B, N, C], and `vision`'s image embedding [B, D]."""
        features, image = self.vision(images)
        return self.qformer.read(self.query_tokens, self.ln_vision(features)), image

    def rebuilt(self, vectors: Tensor) -> Tensor:
        """Vectors of codes [B, N, code_dim] -> the Q-Former's output as they tell it [B, N, C]."""
        x = self.decode_task_layer(vectors) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x

    def image_embedding(self, vectors: Tensor) -> Tensor:
        """Vectors of codes [B, N, code_dim] -> the target's image embedding, not normalised [B, D]."""
        x = self.decode_task_layer(vectors) + self.pos_embed_image
        for block in self.blocks_image:
            x = block(x)
        if self.reverse:
            return self.distill_image_proj(self.reverse_qformer.read(self.reverse_tokens, x)[:, 0])
        return self.distill_image_proj(self.image_down(x).flatten(1))

    def contrastive(self, *, images: Tensor | None = None, codes: Tensor | None = None) -> Tensor:
        """Of pictures [B, 3, H, W] or of codes [B, N], what `text_embedding` is compared with: unit vectors [B, E].

        From codes it is the last position of what `rebuilt` makes of them. Gradients flow; use no_grad to evaluate.
        """
        self._needs_words()
        if codes is not None and images is None:
            self.check_codes(codes)
            out = self.rebuilt(self.quantize.vectors(codes.to(self.device).unsqueeze(-1)))
        elif images is not None and codes is None:
            self.check_images(images)
            out = self.queries(images.to(self.device, self.dtype))[0]
        else:
            raise ValueError("give either images or codes")
        return F.normalize(self.vision_proj(out[:, -1]), dim=-1)

    def text_embedding(self, texts: Sequence[str]) -> Tensor:
        """B texts -> unit vectors [B, E]: the first word, [CLS], after the Q-Former has read them all."""
        self._needs_words()
        ids, there = self._ids(texts)
        out = self.qformer.read_words(self.text_embeddings(ids), there)
        return F.normalize(self.text_proj(out[:, 0]), dim=-1)

    def _needs_words(self) -> None:
        if self._words is None:
            raise ValueError("this seed tokenizer reads no captions: train it with text_tokenizer")

    def _ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """int64 and bool [B, L]: [CLS], words, [SEP] (or what a text begins and ends with), then padding."""
        words: Any = self._words
        first, last = (_first(words, *names) for names in (("cls", "bos"), ("sep", "eos")))
        found = words(list(texts), add_special_tokens=False)["input_ids"]
        rows = [torch.tensor([first, *row[: self.text_length - 2], last]) for row in found]
        there = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool()
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device), there.to(self.device)

    # ---- training

    def loss(self, batch: Mapping[str, Any], step: int, stage: str = "main") -> tuple[Tensor, dict[str, Tensor]]:
        """Stage "contrastive" takes batch["texts"]: a caption a picture. Pictures of one caption are all right for
        it, and share the label."""
        if stage == "contrastive":
            self.qformer.train(self.training)
            return self._contrastive_loss(batch["images"], batch["texts"])
        if stage == "codes":
            self.qformer.eval()
            return self._codes_loss(batch["images"], step)
        raise ValueError(f"seed has the stages {', '.join(self.stages)}, not {stage!r}")

    def _contrastive_loss(self, images: Tensor, texts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        seen, read = self.contrastive(images=images), self.text_embedding(texts)
        all_seen, all_read, all_texts = _gathered(seen), _gathered(read), _gathered_texts(texts)
        number = {text: i for i, text in enumerate(dict.fromkeys(all_texts))}
        mine, others = (torch.tensor([number[t] for t in some], device=seen.device) for some in (texts, all_texts))
        same = mine[:, None] == others  # [B, all]
        labels = same / same.sum(1, keepdim=True)
        temperature = self.log_temperature.clamp(min=math.log(COLDEST)).exp()
        losses, right = [], []
        for own, others in ((seen, all_read), (read, all_seen)):
            logits = own @ others.T / temperature  # [B, all]
            losses.append(F.cross_entropy(logits, labels, label_smoothing=SMOOTHING))
            right.append(same.gather(1, logits.argmax(1, keepdim=True)).float().mean())
        parts = {"to_texts": right[0], "to_images": right[1], "temperature": temperature}
        return (losses[0] + losses[1]) / 2, {name: part.detach() for name, part in parts.items()}

    def _codes_loss(self, images: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            out, image = self.queries(images)
            goal = self._target_embedding(images, self.target) if self.target else image
        if goal is None:
            raise ValueError("the vision tower has no image embedding to learn: name a CLIP as target")
        chosen, codes, quantizer = self.quantize(self.encode_task_layer(out), step)
        rebuilt = 1 - F.cosine_similarity(self.rebuilt(chosen), out, dim=-1).mean()
        regression = F.mse_loss(self.image_embedding(chosen), goal)
        total = QUANTIZER * quantizer + RECONSTRUCTION * rebuilt + IMAGE * regression
        used = codes.unique().numel() / codes.numel()
        parts = {"quantizer": quantizer, "cosine": rebuilt, "image": regression, "distinct": total.new_tensor(used)}
        return total, {name: part.detach() for name, part in parts.items()}

    def _target_embedding(self, images: Tensor, folder: str) -> Tensor | None:
        """[B, D], not normalised, of the CLIP named `target`; on the pixels that the vision tower sees."""
        if not self._targets:
            mean, std = (statistic.flatten().tolist() for statistic in (self.vision.mean, self.vision.std))
            target, size = FrozenVision(open_tower(folder), mean, std), self.distill_image_proj.out_features
            if target.projected != size:
                raise ValueError(f"{folder}: its image embedding has size {target.projected}, expected {size}")
            self._targets.append(target)
        return self._targets[0].to(images.device)(images)[1]

    # ---- the text tokenizer, in the folder

    def assets(self) -> dict[str, bytes]:
        return self._word_files

    def load_assets(self, folder: Path) -> None:
        if folder.is_dir():
            self._words = AutoTokenizer.from_pretrained(folder)
            self._word_files = read_files(folder)

    @classmethod
    def tiny(cls) -> SeedTokenizer:
        vision = {
            "model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, "hidden_size": 32,
            "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 24,
        }  # fmt: skip
        return cls(
            image_size=16, vision=vision, tokens=8, width=32, layers=2, heads=2, codebook_size=64, code_dim=8, depth=1,
            head_sizes=(16, 8), text_tokenizer="builtin:scenes", embedding=16,
        )  # fmt: skip


def _narrowing(width: int, sizes: Sequence[int]) -> nn.Sequential:
    """Linear maps without biases, ReLUs between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip([width, *sizes], sizes, strict=False):
        layers += [nn.Linear(fan_in, fan_out, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


# ---- texts


def _open_words(name: str) -> tuple[PreTrainedTokenizerBase, dict[str, bytes]]:
    """A text tokenizer by folder or Hub id, and its files."""
    local = name.startswith(checkpoint.BUILTIN) or Path(name).is_dir()
    try:
        words = AutoTokenizer.from_pretrained(checkpoint.open_folder(name) if local else name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name}: no text tokenizer could be loaded ({str(error).splitlines()[0]})") from error
    for names in (("cls", "bos"), ("sep", "eos")):
        _first(words, *names)
    return words, files_of(words)


def _first(words: PreTrainedTokenizerBase, *names: str) -> int:
    """The id of the first of these special tokens that there is."""
    for name in names:
        if (found := getattr(words, f"{name}_token_id")) is not None:
            return found
    raise ValueError(f"the text tokenizer has no special token of the kinds {', '.join(names)}: seed needs one")


# ---- several processes


def _gathered(rows: Tensor) -> Tensor:
    """The rows of every process, with gradients."""
    return torch.cat(list(all_gather(rows))) if _together() else rows


def _gathered_texts(texts: Sequence[str]) -> list[str]:
    if not _together():
        return list(texts)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, list(texts))
    return [text for some in found for text in some]


def _together() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
