"""UnifiedModel: a model folder opened for use. It draws, answers, describes and writes interleaved documents.

    model = unitok.load("builtin:scenes")
    model.images(["a red circle left of a blue square"], seed=0)[0].save("out.png")
    model.answer("picture.png", "how many objects are there?")

A folder holds a causal LM with image rows, its text tokenizer, `image_tokenizers/NAME/` and the manifest that says what
the numbers mean. An adapter folder opens with its base and is merged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unitok.checkpoint import open_folder
from unitok.data.render import IMAGE, TEXT, Template, null_parts, question_parts, render
from unitok.data.schema import Part, codes_part, image_part, text_part
from unitok.data.sources import read_image
from unitok.detokenizers.base import Detokenizer, load_detokenizer
from unitok.lm.adapters import adapter_base, is_adapter, load_adapter, merge
from unitok.lm.expand import open_lm
from unitok.lm.text import load_text_tokenizer, text_tokenizer_hash
from unitok.manifest import FILE, Manifest
from unitok.sampling.decode import generate_ids
from unitok.sampling.likelihood import log_likelihood
from unitok.tokenizers.base import ImageTokenizer, load_tokenizer, to_pil
from unitok.vocab import JointVocab

ANSWER_TOKENS = 24
TEXT_TOKENS = 64
BATCH = 256  # rows of one decode loop
LIKES_DRAWN = 0.6  # how much of a candidate's likelihood as a drawing counts beside its reading
PICTURES = 128  # pictures encoded or decoded at once


def load(
    path_or_hub_id: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None, *,
    tokenizer: str | None = None, template: Mapping[str, Any] | None = None,
) -> UnifiedModel:  # fmt: skip
    """Open a model folder, an adapter folder or `builtin:NAME` -> UnifiedModel in eval mode.

    dtype: of the LM; by default the checkpoint's own. tokenizer: the image tokenizer that reads and draws wherever none
    is named; only needed where there are several. template: changes to the folder's. ValueError naming the field where
    parts of the folder do not fit.
    """
    folder = open_folder(path_or_hub_id)
    if (folder / FILE).is_file() and (manifest := Manifest.load(folder)).vocab is None and manifest.tokenizers:
        raise ValueError(f"{path_or_hub_id} is an image tokenizer: `unitok expand` puts it into a language model")
    if is_adapter(folder):
        lm = merge(load_adapter(folder, device=device, dtype=dtype)).eval()
    else:
        lm = open_lm(folder, device=device, dtype=dtype)
    return around(lm, folder, tokenizer=tokenizer, template=template)


def around(
    lm: Any,
    folder: str | Path,
    *,
    template: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    tokenizer: str | None = None,
) -> UnifiedModel:
    """An LM in memory with the other parts of a model or adapter folder: a run in training looks at its own model.

    template: changes to the template of the folder. device: of the other parts; by default the LM's own. tokenizer: as
    `load` takes it.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder) if (folder / FILE).is_file() else Manifest()
    if manifest.vocab is None:
        raise ValueError(f"{folder} has no image vocabulary: add one with `unitok expand`")
    if template:
        manifest.template = (manifest.template or {}) | dict(template)
    base = adapter_base(folder) if is_adapter(folder) else folder
    device = device or lm.get_input_embeddings().weight.device
    tokenizers = {name: load_tokenizer(base / "image_tokenizers" / name, device) for name in manifest.tokenizers}
    for name, own in tokenizers.items():
        [section] = own.manifest().tokenizers.values()
        Manifest(tokenizers={name: section}).check(
            Manifest(tokenizers={name: manifest.tokenizers[name]}), what=(f"image_tokenizers/{name}", "model")
        )
    detokenizer = None
    if (base / "detokenizer").is_dir():
        detokenizer = load_detokenizer(base / "detokenizer", device)
        stated = {key: value for key, value in (manifest.detokenizer or {}).items() if key != "tokenizer"}
        detokenizer.manifest().check(Manifest(detokenizer=stated), what=("detokenizer", "model"))
    return UnifiedModel(lm, load_text_tokenizer(base), tokenizers, manifest, detokenizer, tokenizer)


class UnifiedModel:
    """lm, text_tokenizer, image_tokenizers by name, detokenizer or None, vocab, template, manifest.

    tokenizer: the name of the image tokenizer that serves where a call names none.
    """

    def __init__(
        self,
        lm: Any,  # a Hugging Face causal LM
        text_tokenizer: Any,
        image_tokenizers: Mapping[str, ImageTokenizer],
        manifest: Manifest,
        detokenizer: Detokenizer | None = None,
        tokenizer: str | None = None,
    ):
        self.lm, self.text_tokenizer, self.detokenizer, self.manifest = lm, text_tokenizer, detokenizer, manifest
        self.image_tokenizers = dict(image_tokenizers)
        self._serves = tokenizer if tokenizer is None else self._name(tokenizer)
        self.vocab = JointVocab.from_dict(manifest.vocab or {})
        self.template = Template.from_dict(manifest.template)
        rows = lm.get_input_embeddings().weight.shape[0]
        if rows < self.vocab.rows:
            raise ValueError(f"the model has {rows} rows, its vocabulary needs {self.vocab.rows}")
        stated = (manifest.text_tokenizer or {}).get("hash")
        if stated and stated != text_tokenizer_hash(text_tokenizer):
            raise ValueError(f"text_tokenizer.hash is {stated} in the manifest, but the text tokenizer is another one")

    @property
    def image_tokenizer(self) -> ImageTokenizer:
        return self.image_tokenizers[self._name(None)]

    @property
    def device(self) -> torch.device:
        return self.lm.get_input_embeddings().weight.device

    # ---- verbs

    def generate(
        self,
        parts: Sequence[Part | str | Image.Image | Path],
        *,
        max_images: int = 1,
        max_new_tokens: int | None = None,
        guidance: float | tuple[float, float] = 1.0,
        negative: str | None = None,
        temperature: float | tuple[float, float] = 1.0,
        top_k: int | tuple[int, int] = 0,
        top_p: float | tuple[float, float] = 1.0,
        seed: int = 0,
        n: int = 1,
    ) -> list[list[Part]]:
        """Continue a document n times -> n lists of new parts, texts and PIL pictures in their order.

        parts: Parts, texts, PIL pictures or picture files. guidance: see `images`. temperature, top_k, top_p: one
        value, or (text, image). max_new_tokens: by default some text and room for `max_images` blocks.
        """
        given = [_part(p) for p in parts]
        self.encode_parts([given])
        if max_new_tokens is None:
            blocks = [self.vocab.block_length(name) for name in self._coded()]
            max_new_tokens = TEXT_TOKENS + max_images * max(blocks, default=0)
        made = self._run(
            [given] * n, [_seed(seed, j) for j in range(n)], max_new_tokens=max_new_tokens, max_images=max_images,
            guidance=guidance, negative=negative, temperature=temperature, top_k=top_k, top_p=top_p,
        )  # fmt: skip
        return [self._parts(ids) for ids in made]

    def images(
        self,
        prompts: Sequence[str | Sequence[Part]],
        *,
        n: int = 1,
        candidates: int = 1,
        guidance: float | tuple[float, float] = 1.0,
        negative: str | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        tokenizer: str | None = None,
        grids: Mapping[str, tuple[int, ...]] | None = None,
        batch_size: int = BATCH,
    ) -> list[Image.Image]:
        """n pictures of every prompt, prompt-major.

        candidates: draw so many for each picture and keep the one that the model itself likes best, see `candidates`;
        the first of them is the picture that is drawn without. guidance: classifier-free guidance scale (1: none), or
        (text, image) for prompts that hold pictures. negative: a text in place of the null prompt. seed: one number, or
        one a picture; a picture depends on its own prompt and seed only. tokenizer: which one draws, where there are
        several. grids: by tokenizer, where they may vary (`unitok expand --layout rows`); default: that at image_size.
        """
        asked_for = [p for p in prompts for _ in range(n)]
        if isinstance(seed, int | np.integer):
            seeds = [_seed(int(seed), j) for _ in prompts for j in range(n)]
        elif len(seed) == len(asked_for):
            seeds = [_seed(int(s), 0) for s in seed]
        else:
            raise ValueError(f"{len(seed)} seeds for {len(asked_for)} pictures: give one number, or one a picture")
        blocks, likes = self._drawn(
            asked_for, seeds, candidates, self._name(tokenizer), guidance=guidance, negative=negative,
            temperature=temperature, top_k=top_k, top_p=top_p, grids=grids, batch_size=batch_size,
        )  # fmt: skip
        best = [row * candidates + k for row, k in enumerate(likes.argmax(1))]
        return self.pictures([blocks[i] for i in best], seeds=seeds)

    def candidates(
        self, prompts: Sequence[str], count: int, *, seeds: Sequence[int], tokenizer: str | None = None, **decode: Any
    ) -> list[list[tuple[Image.Image, float]]]:
        """`count` pictures of every prompt, each with how well the model likes it; seeds: one a prompt.

        The measure is ln p(prompt | picture) + LIKES_DRAWN ln p(picture | prompt), in nats: what the picture says when
        the model reads it, and less of how it was drawn. It needs no other network. decode: as `images` takes it.
        """
        blocks, likes = self._drawn(prompts, [_seed(int(s), 0) for s in seeds], count, self._name(tokenizer), **decode)
        drawn = self.pictures(blocks, seeds=[s for s in seeds for _ in range(count)])
        return [
            [(drawn[row * count + k], float(like)) for k, like in enumerate(of_row)] for row, of_row in enumerate(likes)
        ]

    def _drawn(
        self,
        prompts: Sequence[str | Sequence[Part]],
        seeds: Sequence[int],
        count: int,
        name: str,
        *,
        batch_size: int = BATCH,
        **decode: Any,
    ) -> tuple[list[tuple[str, np.ndarray, tuple]], np.ndarray]:
        """(name, codes, grid) of `count` pictures a prompt, and how well they are liked, float [prompts, count]."""
        documents = [[text_part(p)] if isinstance(p, str) else [_part(q) for q in p] for p in prompts]
        if count < 1:
            raise ValueError(f"candidates must be 1 or more, got {count}")
        if count > 1 and any(part.type != "text" for document in documents for part in document):
            raise ValueError("candidates are compared as readings of their prompt: it must be text alone")
        self.encode_parts(documents)
        documents = [d for d in documents for _ in range(count)]
        made = self._run(
            documents, [_seed(s, k) for s in seeds for k in range(count)], force_image=name, batch_size=batch_size,
            max_new_tokens=self.vocab.block_length(name, (decode.get("grids") or {}).get(name)), **decode,
        )  # fmt: skip
        blocks = [self.vocab.from_ids(np.asarray(ids)) for ids in made]
        if count == 1:
            return blocks, np.zeros((len(blocks), 1))
        pictures = [codes_part(codes.astype(np.int32), grid, name) for name, codes, grid in blocks]
        read = self._likelihood([[p, *d] for p, d in zip(pictures, documents, strict=True)], TEXT)
        drawn = self._likelihood([[*d, p] for p, d in zip(pictures, documents, strict=True)], IMAGE)
        return blocks, (read + LIKES_DRAWN * drawn).reshape(-1, count)

    def _likelihood(self, documents: Sequence[Sequence[Part]], modality: int) -> np.ndarray:
        """ln p of the ids of one modality, in nats, float [documents]."""
        rendered = [render(d, self.vocab, self.text_tokenizer, self.template) for d in documents]
        return log_likelihood(self.lm, [(r.ids, r.modality == modality) for r in rendered])

    def answer(self, image_or_images: Any, question: str, shots: Sequence[Mapping[str, Any]] = (), **decode) -> str:
        """The answer to a question about one or several pictures; shots: rows {"image", "question", "answers"}."""
        return self.answers([{"image": image_or_images, "question": question}], shots=[list(shots)], **decode)[0]

    def answers(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        shots: Sequence[Sequence[Mapping[str, Any]]] | None = None,
        max_new_tokens: int = ANSWER_TOKENS,
        guidance: float = 1.0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        batch_size: int = BATCH,
    ) -> list[str]:
        """Batch form of `answer`. rows: {"image", "question"}; image: a file, a PIL picture, a list of them, or None.

        shots: for each row the exemplars before it. Greedy by default. A reply ends where that of a shot would end.
        guidance: scale of the reply against the same prompt without its pictures (1: none; see `sampling/guidance.py`).
        """
        documents = [asked(row, shots[i] if shots else ()) for i, row in enumerate(rows)]
        end = self.template.around("answer")[1].strip()
        self.encode_parts(documents)
        made = self._run(
            documents, self._text_seeds(seeds, len(documents)), max_new_tokens=max_new_tokens, batch_size=batch_size,
            text_guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p,
            stop=end or self.template.shot_separator,
        )  # fmt: skip
        return [self._text(ids, end) for ids in made]

    def captions(
        self,
        images: Sequence[Any],
        *,
        max_new_tokens: int = TEXT_TOKENS,
        guidance: float = 1.0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        batch_size: int = BATCH,
    ) -> list[str]:
        """The text that follows a picture, for each picture, never none; greedy by default. guidance: see `answers`."""
        documents = [_pictures(image) for image in images]
        self.encode_parts(documents)
        made = self._run(
            documents, self._text_seeds(seeds, len(documents)), max_new_tokens=max_new_tokens, batch_size=batch_size,
            min_new_tokens=1, text_guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p,
        )  # fmt: skip
        return [self._text(ids) for ids in made]

    def decode(
        self,
        codes: torch.Tensor,
        grid: tuple[int, ...] | None = None,
        name: str | None = None,
        seeds: Sequence[int] = (),
    ) -> torch.Tensor:
        """int64 [B, N] -> float [B, 3, H, W] in [0, 1]: by the detokenizer, where the model has one that draws the
        codes of this tokenizer; else by the tokenizer itself. seeds: of the detokenizer, one a picture; default 0."""
        name = self._name(name)
        tokenizer, painter = self.image_tokenizers[name], self.detokenizer
        if painter is None or (self.manifest.detokenizer or {}).get("tokenizer", name) != name:
            return tokenizer.decode(codes, grid)
        condition = painter.condition_of(tokenizer, codes, grid)
        return painter.generate(condition, seeds=list(seeds) or [0] * len(codes), guidance=painter.guidance)

    @torch.no_grad()
    def pictures(self, blocks: Sequence[tuple[str, np.ndarray, tuple]], seeds: Sequence[int] = ()) -> list[Image.Image]:
        """(tokenizer, codes [N], grid) of each picture -> PIL pictures, by the detokenizer where the model has one."""
        out: list[Image.Image | None] = [None] * len(blocks)
        for (name, grid), own in _grouped([(name, tuple(grid)) for name, _, grid in blocks]).items():
            for start in range(0, len(own), PICTURES):
                some = own[start : start + PICTURES]
                codes = torch.from_numpy(np.stack([blocks[i][1] for i in some])).long()  # [B, N]
                own_seeds = [int(seeds[i]) for i in some] if len(seeds) else []
                pixels = self.decode(codes, grid, name, own_seeds)
                for i, picture in zip(some, pixels, strict=True):
                    out[i] = to_pil(picture)
        return out  # type: ignore[return-value]

    @torch.no_grad()
    def encode(self, images: Sequence[Any], tokenizer: str | None = None) -> list[Part]:
        """Pictures (files, bytes, PIL) -> parts with codes; a tokenizer of words gives its words too."""
        name = self._name(tokenizer)
        own = self.image_tokenizers[name]
        out = []
        for start in range(0, len(images), PICTURES):
            some = [own.preprocess(read_image(i)) for i in images[start : start + PICTURES]]
            codes = own.encode(torch.stack(some)).cpu()  # [B, N]
            words = own.to_text(codes) if own.vocabulary == "text" else [None] * len(codes)
            out += [
                codes_part(c.numpy().astype(np.int32), own.grid(*some[0].shape[1:]), name, words=w)
                for c, w in zip(codes, words, strict=True)
            ]
        return out

    # ---- parts and ids

    def encode_parts(self, documents: list[list[Part]]) -> None:
        """Replace pictures by their codes in place, each distinct picture once."""
        slots = [(d, p) for d in range(len(documents)) for p, part in enumerate(documents[d]) if part.image is not None]
        distinct: dict[Any, Any] = {}
        for d, p in slots:
            distinct.setdefault(_key(documents[d][p].image), documents[d][p].image)
        made = dict(zip(distinct, self.encode(list(distinct.values())), strict=True)) if distinct else {}
        for d, p in slots:
            part = documents[d][p]
            coded = made[_key(part.image)]
            documents[d][p] = codes_part(
                coded.codes, coded.grid, coded.tokenizer, words=coded.words, loss=part.loss, role=part.role
            )

    def _run(
        self,
        documents: Sequence[Sequence[Part]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        max_images: int = 0,
        force_image: str | None = None,
        guidance: float | tuple[float, float] = 1.0,
        negative: str | None = None,
        text_guidance: float = 1.0,
        stop: str = "",
        batch_size: int = BATCH,
        **choice: Any,
    ) -> list[list[int]]:
        """Ids after each document, in batches of documents of like length; identical for any batch."""

        def ids(parts: Sequence[Part]) -> np.ndarray:
            return render(parts, self.vocab, self.text_tokenizer, self.template, prompt=True).ids

        prompts = [ids(d) for d in documents]
        guided = guidance not in (1.0, (1.0, 1.0)) and (force_image is not None or max_images > 0)
        nulls = image_nulls = None
        if guided:
            template = self.template
            nulls = [ids(null_parts(d, template, prompt=True, images=False)) for d in documents]
            image_nulls = [ids(null_parts(d, template, prompt=True)) for d in documents]
            if negative is not None:
                nulls = [ids([text_part(negative)])] * len(documents)
        blinds, scales = None, [1.0] * len(documents)
        if text_guidance != 1:
            blinds = [ids([p for p in d if p.type != "image"]) for d in documents]
            scales = [text_guidance if len(b) < len(p) else 1.0 for b, p in zip(blinds, prompts, strict=True)]
        # draws depend on the prompt, not on its place among the others
        seeds = [_mix(seed, prompt) for seed, prompt in zip(seeds, prompts, strict=True)]
        out: list[list[int]] = [[]] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            made = generate_ids(
                self.lm, [prompts[i] for i in some], self.vocab, text_size=len(self.text_tokenizer),
                eos_ids=self._eos(stop), max_new_tokens=max_new_tokens, max_images=max_images, force_image=force_image,
                null_prompts=[nulls[i] for i in some] if nulls else None,
                image_null_prompts=[image_nulls[i] for i in some] if image_nulls else None,
                blind_prompts=[blinds[i] for i in some] if blinds else None,
                text_guidance=[scales[i] for i in some],
                guidance=guidance, seeds=[seeds[i] for i in some], tokenizers=self._coded(), **choice,
            )  # fmt: skip
            for i, new in zip(some, made, strict=True):
                out[i] = new
        return out

    def _eos(self, stop: str) -> list[int]:
        """End of text, and the one id that is `stop` where the text tokenizer has it."""
        ends = [] if self.text_tokenizer.eos_token_id is None else [self.text_tokenizer.eos_token_id]
        if stop:
            encoded = self.text_tokenizer.encode("a" + stop, add_special_tokens=False)
            if encoded and self.text_tokenizer.decode(encoded[-1:]) == stop:
                ends.append(encoded[-1])
        return ends

    def _coded(self) -> list[str]:
        return [name for name, own in self.image_tokenizers.items() if own.vocabulary == "codes"]

    def _name(self, name: str | None) -> str:
        names = list(self.image_tokenizers)
        if name is None:
            if self._serves is None and len(names) > 1:
                raise ValueError(f"this model has several image tokenizers, name one of them: {', '.join(names)}")
            return self._serves or names[0]
        if name not in names:
            raise ValueError(f"no image tokenizer {name!r} in this model; it has: {', '.join(names)}")
        return name

    def _text(self, ids: Sequence[int], end: str = "") -> str:
        text = self.text_tokenizer.decode(list(ids), skip_special_tokens=True)
        return (text.partition(end)[0] if end else text).strip()

    def _parts(self, ids: Sequence[int]) -> list[Part]:
        pieces = self.vocab.split(np.asarray(ids, np.int64))
        drawn = iter(self.pictures([piece[1:] for piece in pieces if piece[0] == "image"]))
        parts = [text_part(self._text(piece[1])) if piece[0] == "text" else image_part(next(drawn)) for piece in pieces]
        return [part for part in parts if part.type == "image" or part.text]

    @staticmethod
    def _text_seeds(seeds: Sequence[int] | None, count: int) -> list[int]:
        return [0] * count if seeds is None else [int(s) for s in seeds]


def asked(row: Mapping[str, Any], shots: Sequence[Mapping[str, Any]] = ()) -> list[Part]:
    """The prompt of a question {"image", "question"} behind its exemplars {"image", "question", "answers"}."""
    before = [(_pictures(s["image"]), s["question"], _first(s["answers"])) for s in shots]
    return question_parts(row["question"], _pictures(row["image"]), shots=before)


def _part(value: Part | str | Image.Image | Path) -> Part:
    """A text is a text; a PIL picture, bytes or a Path is a picture."""
    if isinstance(value, Part):
        return value
    return text_part(value) if isinstance(value, str) else image_part(value)


def _pictures(images: Any) -> list[Part]:
    """None, one picture or several -> image parts; here a string is a file name."""
    if images is None:
        return []
    several = images if isinstance(images, list | tuple) else [images]
    return [image if isinstance(image, Part) else image_part(image, loss=False) for image in several]


def _first(answers: Any) -> str:
    return answers if isinstance(answers, str) else answers[0]


def _key(image: Any) -> Any:
    return str(image) if isinstance(image, str | Path) else id(image)


def _seed(seed: int, sample: int) -> int:
    return seed if sample == 0 else _mix(seed, np.array([sample]))


def _mix(seed: int, ids: np.ndarray) -> int:
    """A seed of its own for every (seed, ids)."""
    digest = hashlib.blake2b(np.int64(seed).tobytes() + np.asarray(ids, np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _grouped(keys: Sequence[Any]) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return groups
