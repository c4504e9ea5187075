"""CLIP Interrogator (pharmapsychotic/clip-interrogator): a picture as a caption and phrases that a frozen CLIP finds.

    captioner   describes the picture, or there is none and the text starts empty
    chain       of all phrases the one that, behind the text so far, is nearest to the picture for CLIP, again and again

Nothing is trained. It is the baseline of tokenizers that learn to write. The text is chosen by CLIP's similarity, so
compare it by what readers and generators make of it, never by a CLIP score.

A code is an id of CLIP's text tokenizer, not the number of a phrase: so a caption has codes too, and the codes are what
CLIP compared with the picture, ended and padded by its end token.

Shapes: B images, N tokens, P phrases, D size of CLIP's embeddings.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase

from unitok import checkpoint
from unitok.nn.frozen import FILE, Frozen
from unitok.nn.vision import CLIP_MEAN, CLIP_STD, pixel_statistics, scaled
from unitok.nn.words import files_of, read_files
from unitok.tokenizers.base import ImageTokenizer, parse_resize

PHRASES = "phrases.txt"  # the asset: all tables as one, a phrase a line
OLD_END = 2  # CLIPs that give this as their end token pool at the highest id, which is their text tokenizer's end token
TEXTS = 2048  # read by CLIP at once
KEPT = 1 << 16  # embeddings of texts that are kept, since pictures begin with the same phrases


class InterrogatorTokenizer(Frozen, ImageTokenizer):
    """Args:
    clip: folder or Hub id of a CLIPModel with its text tokenizer; or the configuration of one, for random weights or
        those of a saved folder.
    revision: commit of a Hub id.
    copy_clip: keep CLIP's weights in the saved folder; else they are read from `clip` again, and must be the same.
    captioner: folder or Hub id of a model of transformers that describes pictures (BLIP, BLIP-2, GIT); None: the text
        starts empty.
    captioner_revision: commit of a Hub id.
    caption_tokens: of a caption, at most.
    phrases: text files with a phrase a line; kept in the saved folder.
    forced: phrases that are added even where the similarity falls; the text is the best that was met on the way.
    most: phrases in all.
    shortlist: of all phrases so many are tried, those that are nearest to the picture by themselves.
    join: what stands between two phrases.
    text_tokenizer: folder or Hub id; default: that of `clip`. Kept in the saved folder.
    mean, std: for the normalisation of pixels; default: what the folder of `clip` says.
    """

    vocabulary = "text"
    stages = ()  # nothing is trained
    token_order = "causal"
    phrase_vectors: Tensor  # [P, D], unit vectors

    def __init__(
        self,
        clip: str | Mapping[str, Any],
        revision: str | None = None,
        copy_clip: bool = False,
        captioner: str | None = None,
        captioner_revision: str | None = None,
        caption_tokens: int = 32,
        phrases: str | Sequence[str] | None = None,
        forced: int = 8,
        most: int = 32,
        shortlist: int = 2048,
        join: str = ", ",
        text_tokenizer: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        resize: str = "crop-bicubic",
    ):
        super().__init__()
        parse_resize(resize)
        for name, value in (("caption_tokens", caption_tokens), ("most", most), ("shortlist", shortlist)):
            if value < 1:
                raise ValueError(f"interrogator needs {name} of at least 1, got {value}")
        self.forced, self.most, self.shortlist, self.caption_tokens = forced, most, shortlist, caption_tokens
        self.join, self.resize = join, resize
        folder = checkpoint.open_folder(clip, revision=revision) if isinstance(clip, str) else None
        self.clip: Any = _open_clip(folder) if folder else _new_clip(clip)
        said = pixel_statistics(folder) if folder else (CLIP_MEAN, CLIP_STD)
        self._statistics = {"clip": (list(mean or said[0]), list(std or said[1]))}
        self.image_size = self.clip.config.vision_config.image_size
        frozen = ["clip"] if folder and not copy_clip else []
        self.clip.requires_grad_(False).eval()
        self.captioner: Any = None
        if captioner:
            place = checkpoint.open_folder(captioner, revision=captioner_revision)
            self.captioner, self._caption_words = _open_captioner(place)
            self._statistics["captioner"] = pixel_statistics(place)
            self.image_size = max(self.image_size, self.captioner.config.vision_config.image_size)
            frozen.append("captioner")
        self.freeze(*frozen)

        self._known: dict[tuple[int, ...], Tensor] = {}
        self._phrases: list[str] = []
        self._words: Any = None
        self._word_files: dict[str, bytes] = {}
        self.register_buffer("phrase_vectors", torch.empty(0, self.clip.config.projection_dim))
        if text_tokenizer or (folder and (folder / "tokenizer_config.json").is_file()):
            words = _open_words(checkpoint.open_folder(text_tokenizer) if text_tokenizer else folder)
            self._take_words(words, files_of(words))
        self.codebook_sizes = (self.clip.config.text_config.vocab_size,)
        if phrases:
            self._phrases = _read_phrases([phrases] if isinstance(phrases, str) else phrases)
            self.phrase_vectors = self.text_vectors(self._phrases)
        copied = {} if frozen[:1] == ["clip"] else {"clip": _plain(self.clip.config), "copy_clip": True}
        mean, std = self._statistics["clip"]
        self.record(**copied, text_tokenizer=None, phrases=None, mean=mean, std=std)

    def encode(self, images: Tensor) -> Tensor:
        if not self._phrases and self.captioner is None:
            raise ValueError("this interrogator has nothing to say: give it phrases, a captioner, or both")
        seen = self.image_vectors(images)
        starts = self.captions(images) if self.captioner is not None else [""] * len(images)
        rows = []
        for vector, start in zip(seen, starts, strict=True):
            best, _ = max(self.chain(vector, start), key=lambda step: step[1])
            rows.append(self._ids([best])[0])
        return torch.tensor([row + [self._end] * (self.tokens - len(row)) for row in rows], device=images.device)

    def embed(self, codes: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """CLIP's embedding of the text, a unit vector: [B, 1, D]."""
        return self._read([row.tolist() for row in codes])[:, None]

    def to_text(self, codes: Tensor) -> list[str]:
        self.check_codes(codes)
        texts = self._words.batch_decode([self._upto_end(row.tolist()) for row in codes], skip_special_tokens=True)
        return [" ".join(text.replace(" ,", ",").split()) for text in texts]

    # ---- the chain

    @torch.no_grad()
    def chain(self, vector: Tensor, start: str = "") -> list[tuple[str, float]]:
        """A picture's unit vector [D] and the text it starts from -> the text after every step, and its cosine.

        The first step is the start itself, where there is one. A phrase is added where the cosine rises, and among the
        first `forced` ones in any case. It ends where none does, at `most` phrases, or where none fits into the text.
        """
        steps: list[tuple[str, float]] = []
        if start:
            start = self._words.decode(self._ids([start])[0][: self.tokens], skip_special_tokens=True)
            steps.append((start, (self.text_vectors([start])[0] @ vector).item()))
        near = (self.phrase_vectors @ vector).topk(min(self.shortlist, len(self._phrases))).indices
        left = [self._phrases[i] for i in near.sort().values.tolist()]
        for number in range(self.most):
            texts = [steps[-1][0] + self.join + phrase if steps else phrase for phrase in left]
            rows = self._ids(texts) if texts else []
            fits = [i for i, row in enumerate(rows) if len(row) <= self.tokens]
            if not fits:
                break
            found = self._vectors([rows[i] for i in fits]) @ vector
            best = int(found.argmax())
            similarity = found[best].item()
            if steps and number >= self.forced and similarity <= steps[-1][1]:
                break
            steps.append((texts[fits[best]], similarity))
            del left[fits[best]]
        return steps

    @torch.no_grad()
    def image_vectors(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] in [0, 1] -> unit vectors [B, D]."""
        pixels = self._pixels(images, "clip")
        return F.normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    @torch.no_grad()
    def text_vectors(self, texts: Sequence[str]) -> Tensor:
        """Texts, of which CLIP reads the first N tokens -> unit vectors [B, D]."""
        return self._vectors([row[: self.tokens] for row in self._ids(texts)])

    @torch.no_grad()
    def captions(self, images: Tensor) -> list[str]:
        """float [B, 3, H, W] in [0, 1] -> what the captioner says, greedily."""
        pixels = self._pixels(images, "captioner")
        made = self.captioner.generate(pixel_values=pixels, max_new_tokens=self.caption_tokens, do_sample=False)
        return [text.strip() for text in self._caption_words.batch_decode(made, skip_special_tokens=True)]

    def _pixels(self, images: Tensor, network: str) -> Tensor:
        size = getattr(self, network).config.vision_config.image_size
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in self._statistics[network])
        return (scaled(images, size) - mean) / std

    def _vectors(self, rows: Sequence[Sequence[int]]) -> Tensor:
        keys = [tuple(row) for row in rows]
        if len(self._known) > KEPT:
            self._known.clear()
        fresh = [key for key in dict.fromkeys(keys) if key not in self._known]
        for start in range(0, len(fresh), TEXTS):
            some = fresh[start : start + TEXTS]
            self._known.update(zip(some, self._read(some), strict=True))
        return torch.stack([self._known[key] for key in keys])

    def _read(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of at most N codes -> unit vectors [B, D]."""
        length = max(map(len, rows)) + 1
        ids = [[*self._start, *row, *[self._end] * (length - len(row))] for row in rows]
        read = self.clip.get_text_features(input_ids=torch.tensor(ids, device=self.device)).pooler_output
        return F.normalize(read, dim=-1)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._known.clear()  # they lie where the weights lay
        return super()._apply(fn, recurse)

    # ---- texts and their ids

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if self._words is None:
            raise ValueError("interrogator needs text_tokenizer where clip is no folder that has one")
        found = self._words(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [self._upto_end(row) for row in found]

    def _upto_end(self, row: list[int]) -> list[int]:
        return row[: row.index(self._end)] if self._end in row else row

    def _take_words(self, words: PreTrainedTokenizerBase, files: dict[str, bytes]) -> None:
        """The text tokenizer; what CLIP's text model has before and behind a text."""
        self._words, self._word_files = words, files
        self._start = [words.bos_token_id] if words("a")["input_ids"][:1] == [words.bos_token_id] else []
        self.tokens = self.clip.config.text_config.max_position_embeddings - len(self._start) - 1  # beside its end
        end = self.clip.config.text_config.eos_token_id
        self._end = words.eos_token_id if end == OLD_END else end

    # ---- the folder

    def assets(self) -> dict[str, bytes]:
        return {**super().assets(), **self._word_files, PHRASES: "\n".join(self._phrases).encode()}

    def load_assets(self, folder: Path) -> None:
        super().load_assets(folder)
        files = {name: content for name, content in read_files(folder).items() if name not in (FILE, PHRASES)}
        self._take_words(_open_words(folder), files)
        self._phrases = _read_phrases([folder / PHRASES])
        self.phrase_vectors = torch.empty(len(self._phrases), self.clip.config.projection_dim)

    @classmethod
    def tiny(cls) -> InterrogatorTokenizer:
        words = 461  # one more than the text tokenizer has: the end
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = {**sizes, "vocab_size": words, "bos_token_id": 1, "eos_token_id": words - 1}
        text["max_position_embeddings"] = 24
        vision = {**sizes, "image_size": 16, "patch_size": 4}
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / PHRASES
            table.write_text("\n".join(f"{c} {s}" for c in ("red", "green", "blue") for s in ("circle", "square")))
            return cls(
                clip={"text_config": text, "vision_config": vision, "projection_dim": 24},
                text_tokenizer="builtin:scenes", phrases=str(table), forced=2, most=4,
            )  # fmt: skip


def _new_clip(config: Any) -> Any:
    return CLIPModel(CLIPConfig(**config))


def _open_clip(folder: Path) -> Any:
    try:
        with checkpoint.quiet():
            found: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: no CLIP can be read from it ({str(error).splitlines()[0]})") from error
    clip, told = found
    if told["missing_keys"]:
        raise ValueError(f"{folder}: it is no whole CLIP: {min(told['missing_keys'])} is missing")
    return clip


def _open_captioner(folder: Path) -> tuple[Any, Any]:
    try:
        with checkpoint.quiet():
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: no captioner can be read from it ({str(error).splitlines()[0]})") from error
    return model.requires_grad_(False).eval(), _open_words(folder)


def _open_words(folder: Any) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: no text tokenizer could be loaded ({str(error).splitlines()[0]})") from error


def _read_phrases(files: Sequence[str | Path]) -> list[str]:
    """The phrases of all tables in their order, each once."""
    lines: list[str] = []
    for file in files:
        try:
            lines += Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: cannot be read as a table of phrases ({error})") from error
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _plain(config: CLIPConfig) -> dict[str, Any]:
    """What CLIPConfig makes the same configuration from."""
    return {key: config.to_dict()[key] for key in ("text_config", "vision_config", "projection_dim")}
