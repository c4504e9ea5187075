"""`unitok inspect`: what a model will see, before it is trained.

    inspect("training/scenes_lora.yaml")     documents as the run draws them, ids by modality, passes, memory
    inspect("tokenizers/fsq.yaml")           pictures as the tokenizer gets them, memory
    inspect("training/scene_clip.yaml")      pictures and their captions
    inspect("eval/scenes_vqa.yaml")          prompts with their exemplars
    inspect("shards/")                       documents with their codes
    inspect("model/")                        rows and template of a model; a test card as it becomes ids

Nothing is trained, and of a language model no weights are read: it is built without values to be counted.
Shapes: L ids a document, B rows a batch, T ids a row, K positions that carry loss.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from unitok.checkpoint import open_folder, write_atomic, write_json
from unitok.config import (
    ClipRecipe,
    DetokenizerRecipe,
    EvaluationRecipe,
    LanguageModelRecipe,
    TokenizerRecipe,
    load_recipe,
)
from unitok.data.packing import Stream
from unitok.data.render import CONTROL, IMAGE, TEXT, Rendered, Template, render
from unitok.data.schema import Part, image_part, text_part
from unitok.data.shards import Shards, read_shards
from unitok.data.sources import read_captioned, read_image, read_pictures
from unitok.eval.images import contact_sheet
from unitok.lm.adapters import adapter_base, is_adapter
from unitok.lm.expand import lm_without_values
from unitok.lm.text import load_text_tokenizer
from unitok.manifest import FILE, Manifest
from unitok.model import UnifiedModel, around, asked
from unitok.tokenizers.base import ImageTokenizer, load_tokenizer, to_pil
from unitok.vocab import JointVocab

SHOWN = 8  # ids of a stretch that are printed
WORDS = 60  # characters of its text
ROWS = 64  # packed rows that are drawn to see how full they are
DOCUMENTS, SHEET, FACTS = "documents.jsonl", "pictures.png", "inspection.json"
MODALITIES = {TEXT: "text", IMAGE: "image", CONTROL: "control"}
CARD = 96  # pixels of the test card

Echo = Callable[[str], None]


def inspect(target: str | Path, *, n: int = 3, out: str | Path | None = None, echo: Echo = print) -> dict[str, Any]:
    """Print what `target` is and its first `n` documents or pictures; -> the counts and sizes.

    out: a folder for the same as files: inspection.json, documents.jsonl (all ids), pictures.png.
    ValueError where it is no recipe, shards, model or tokenizer, or its parts do not fit.
    """
    path, look = Path(target), _Look(n, out is not None, echo)
    if path.suffix in (".yaml", ".yml"):
        recipe = load_recipe(path)
        kinds = {"tokenizer": _tokenizer_recipe, "language_model": _lm_recipe, "evaluation": _evaluation}
        kinds.get(recipe.kind, _picture_recipe)(look, recipe)
    elif path.suffix == ".parquet" or any(path.glob("shard-*.parquet")):
        _shards(look, path)
    else:
        folder = open_folder(target)
        if not (folder / FILE).is_file():
            raise ValueError(f"{target} is no recipe (.yaml), no token shards, and has no {FILE} as models have")
        _tokenizer(look, folder) if Manifest.load(folder).vocab is None else _model(look, folder)
    if out is not None:
        look.write(Path(out))
    return look.facts


@dataclass
class _Look:
    """What is found: said at once, kept for the files."""

    n: int
    pictures: bool  # whether pictures are wanted
    echo: Echo
    facts: dict[str, Any] = field(default_factory=dict)
    documents: list[dict[str, Any]] = field(default_factory=list)
    strips: dict[str, list[Any]] = field(default_factory=dict)

    def say(self, line: str, **facts: Any) -> None:
        self.facts |= facts
        self.echo(line)

    def document(self, title: str, one: Rendered, vocab: JointVocab | None, words: Any) -> None:
        self.echo("\n" + "\n".join(describe(title, one, vocab, words)))
        columns = {key: column.tolist() for key, column in one._asdict().items()}
        self.documents.append({"document": title, **columns})

    def write(self, out: Path) -> None:
        written = [out / FACTS]
        write_json(written[0], self.facts)
        if self.documents:
            written.append(out / DOCUMENTS)
            write_atomic(written[-1], "".join(json.dumps(line) + "\n" for line in self.documents))
        if self.strips:
            written.append(out / SHEET)
            contact_sheet(self.strips).save(written[-1])
        self.echo("\n" + "\n".join(map(str, written)))


# ---- one document ----------------------------------------------------------------------------------------------------


def describe(title: str, one: Rendered, vocab: JointVocab | None, words: Any) -> list[str]:
    """Lines of a document: every stretch of ids of one kind and loss weight, with where it starts."""
    carry = int((one.weights > 0).sum())
    lines = [f"{title}: {len(one.ids)} ids, {carry} carry loss", f"{'at':>6}{'ids':>6}{'loss':>6}  what"]
    names = _control_names(vocab)
    keys = [
        (int(modality), float(weight), names.get(int(index)) if modality == CONTROL else None)
        for index, weight, modality in zip(one.ids, one.weights, one.modality, strict=True)
    ]
    at = 0
    for (modality, weight, name), stretch in groupby(keys):
        count = len(list(stretch))
        ids = one.ids[at : at + count]
        shown = " ".join(map(str, ids[:SHOWN].tolist())) + (" ..." if count > SHOWN else "")
        coded = modality == IMAGE and vocab is not None and int(ids[0]) not in range(vocab.text_rows)
        what = f"[{name}]" if name else "[codes]" if coded else repr(_cut(words.decode(ids.tolist())))
        lines.append(f"{at:6}{count:6}{f'{weight:g}' if weight else '-':>6}  {what}  {shown}")
        at += count
    return lines


def _control_names(vocab: JointVocab | None) -> dict[int, str]:
    images = vocab.images.items() if vocab else ()
    return {index: f"{label} of {name}" for name, image in images for label, index in image.control.items()}


def _cut(text: str) -> str:
    return text if len(text) <= WORDS else text[: WORDS - 3] + "..."


# ---- recipes ---------------------------------------------------------------------------------------------------------


def _lm_recipe(look: _Look, recipe: LanguageModelRecipe) -> None:
    from unitok.training.memory import lm_memory
    from unitok.training.mixture import read_mixture

    folder = open_folder(recipe.model)
    manifest = Manifest.load(folder) if (folder / FILE).is_file() else Manifest()
    vocab = JointVocab.from_dict(manifest.vocab) if manifest.vocab else None
    words, template = load_text_tokenizer(folder), Template.from_dict((manifest.template or {}) | recipe.template)
    mixture = read_mixture(recipe, manifest, vocab, words, template, show=True)
    store = mixture.store
    look.say(mixture.summary(), documents=len(store), refused=len(mixture.refused))
    for shards, document, reason in mixture.refused[: look.n]:
        look.say(f"left out: {document} of {shards}: {reason}")
    if len(mixture.refused) > look.n:
        look.say(f"left out: {len(mixture.refused) - look.n} more")

    stream = Stream(store.lengths, mixture.sources, recipe.length, recipe.seed)
    rows = stream.take(ROWS)
    drawn = [number for row in rows for number in row]
    owner = np.zeros(len(store), np.int64)
    for s, source in enumerate(mixture.sources):
        owner[source.variants] = s
    batch = recipe.batch_size * recipe.accumulate
    total = len(drawn) / len(rows) * batch * recipe.steps  # documents
    weights = sum(mix.weight for mix in recipe.data)
    look.facts["sources"] = {}
    look.say(f"\n{'documents':>10}{'text ids':>10}{'codes':>10}{'control':>10}{'with loss':>10}{'passes':>8}  shards")
    for source, mix in zip(mixture.sources, recipe.data, strict=True):
        counts: dict[str, Any] = _count(store, source.variants[:, 0])
        counts["passes"] = round(total * mix.weight / weights / len(source.variants), 3)
        look.facts["sources"][mix.shards] = counts
        cells = "".join(f"{counts[key]:10}" for key in ("documents", "text", "image", "control", "with_loss"))
        look.say(f"{cells}{counts['passes']:8.2f}  {mix.shards}")
    full = store.lengths[drawn].sum() / (len(rows) * recipe.length)
    carry = int((store.batch(rows, recipe.length).weights > 0).sum())
    each = f"{len(drawn) / len(rows):.1f} documents and {carry / len(rows):.0f} ids with loss in each"
    look.say(f"{batch} rows of {recipe.length} a step, {full:.0%} full, {each}", full=round(float(full), 4))
    chosen = max(1, round(carry / len(rows) * recipe.batch_size))
    _say_memory(look, lm_memory(recipe, folder, vocab, chosen))

    one_by_one = [(number, _stored(store, number)) for number in _turn_about(drawn, owner)[: look.n]]
    for number, one in one_by_one:
        look.document(f"document {number} of {recipe.data[owner[number]].shards}", one, vocab, words)
    if look.pictures and vocab:
        tokenizers = {name: load_tokenizer(folder / "image_tokenizers" / name) for name in vocab.images}
        for number, one in one_by_one:
            blocks = [piece[1:] for piece in vocab.split(one.ids) if piece[0] == "image"]
            _decoded(look, f"document {number}", blocks, tokenizers)


def _turn_about(drawn: Sequence[int], owner: np.ndarray) -> list[int]:
    """The documents in the order in which they are drawn, but the first of every source first, then the second."""
    seen: Counter[int] = Counter()
    places: dict[int, int] = {}
    for number in drawn:
        if number not in places:
            places[number] = seen[owner[number]]
            seen[owner[number]] += 1
    return sorted(places, key=places.__getitem__)


def _count(store: Any, numbers: np.ndarray) -> dict[str, int]:
    """Ids by modality of these documents of a store."""
    starts, out = store.starts, {"documents": len(numbers)}
    for modality, name in MODALITIES.items():
        out[name] = int(np.add.reduceat(store.modality[:-1] == modality, starts, dtype=np.int64)[numbers].sum())
    out["with_loss"] = int(np.add.reduceat(store.weights[:-1] > 0, starts, dtype=np.int64)[numbers].sum())
    return out


def _stored(store: Any, number: int) -> Rendered:
    """A document of a store, its weights moved back to the ids that are predicted."""
    here = slice(store.starts[number], store.starts[number] + store.lengths[number])
    return Rendered(store.ids[here], np.append(np.float32(0), store.weights[here][:-1]), store.modality[here])


def _tokenizer_recipe(look: _Look, recipe: TokenizerRecipe) -> None:
    from unitok.training.memory import tokenizer_memory
    from unitok.training.tokenizer import build

    tokenizer = build(recipe)
    _say_tokenizer(look, recipe.tokenizer.name, tokenizer)
    if not recipe.steps:
        return look.say("no steps: it is written as it is")
    pictures = _pictures(look, recipe, tokenizer.preprocess, captioned=recipe.stage in tokenizer.text_stages)
    _say_memory(look, tokenizer_memory(recipe, tokenizer, torch.stack(pictures)))
    look.strips["as the tokenizer gets them"] = pictures


def _picture_recipe(look: _Look, recipe: DetokenizerRecipe | ClipRecipe) -> None:
    """Pictures as they are, and what is said of them; the networks are not opened."""
    captioned = isinstance(recipe, ClipRecipe) or recipe.texts
    look.strips["pictures"] = _pictures(look, recipe, lambda picture: picture, captioned=captioned)


def _pictures(look: _Look, recipe: Any, prepare: Callable[[Image.Image], Any], *, captioned: bool) -> list[Any]:
    """The first pictures of a recipe's data, prepared; all are counted, and captions are shown where there are any."""
    pictures: list[Any] = []
    counts: Counter[str] = Counter()
    bad: list[str] = []
    read = read_captioned if captioned else read_pictures
    for source in recipe.data:
        for where, picture, *captions in islice(read(source.path, source.columns), source.limit):
            counts[source.path] += 1
            try:
                if isinstance(picture, ValueError):
                    raise picture
                if len(pictures) < look.n:
                    pictures.append(prepare(read_image(picture)))
                    if captioned:
                        look.say(f"{where}: {' | '.join(captions[0])}")
            except ValueError as error:
                bad.append(f"{where}: {error}")
        look.say(f"{counts[source.path]} pictures in {source.path}")
    look.facts |= {"pictures": sum(counts.values()), "refused": len(bad)}
    for line in bad[: look.n]:
        look.say(f"left out: {line}")
    if not pictures:
        raise ValueError("the recipe's data hold no picture that can be read")
    times = recipe.steps * recipe.batch_size / sum(counts.values())
    look.say(f"{recipe.steps} steps of {recipe.batch_size}: every picture {times:.1f} times")
    return pictures


def _evaluation(look: _Look, recipe: EvaluationRecipe) -> None:
    """The prompts of the tasks that are built in; other tasks keep theirs to themselves."""
    if recipe.model is None:
        raise ValueError("the recipe names no model, so its prompts have no ids: write model: DIR into it")
    prompts, count = _prompts(recipe, look.n)
    look.say(f"{recipe.task}: {count} rows to score, {recipe.shots} shots", rows=count)
    if recipe.task == "images":
        look.strips["pictures"] = [read_image(parts[0].image) for _, parts in prompts]
        return
    model = _without_weights(open_folder(recipe.model), recipe.tokenizer, recipe.template)
    for title, parts in _show(look, model, prompts, prompt=True):
        blocks = [(part.tokenizer, part.codes, part.grid) for part in parts if part.codes is not None]
        if look.pictures:
            _decoded(look, title, blocks, model.image_tokenizers)


def _prompts(recipe: EvaluationRecipe, n: int) -> tuple[list[tuple[str, list[Part]]], int]:
    """(id, parts) of the first n prompts of a task, and how many there are."""
    from unitok.eval.rows import load_rows, subset, with_picture
    from unitok.eval.text_to_image import load_prompts
    from unitok.eval.vqa import ShotSampler

    kinds = {"vqa": "question", "captions": "caption", "images": "picture"}
    if recipe.task != "text_to_image" and recipe.task not in kinds:
        raise ValueError(f"prompts of {', '.join([*kinds, 'text_to_image'])} can be shown, not those of {recipe.task}")
    if recipe.task == "text_to_image":
        rows = subset(load_prompts(recipe.data), recipe.n, recipe.seed)
        return [(row["id"], [text_part(row["prompt"])]) for row in rows[:n]], len(rows)
    rows = subset(load_rows(recipe.data, kinds[recipe.task]), recipe.n, recipe.seed)
    shown = [with_picture(row) for row in rows[:n]]
    if recipe.task != "vqa":
        return [(row["id"], [image_part(row["image"])]) for row in shown], len(rows)
    more = recipe.options.get("text_shots", 0)
    train = load_rows(recipe.train, "question") if recipe.shots or more else ()
    sampler = ShotSampler(train, recipe.shots, recipe.seed, more)
    shots = [[with_picture(shot) for shot in sampler.draw(row)] for row in shown]
    return [(row["id"], asked(row, before)) for row, before in zip(shown, shots, strict=True)], len(rows)


# ---- folders ---------------------------------------------------------------------------------------------------------


def _shards(look: _Look, path: Path) -> None:
    documents = read_shards(path)
    parts = [part for document in documents for part in document.parts]
    kinds = Counter(document.kind for document in documents)
    texts = [part.text for part in parts if part.type == "text"]
    coded = [part for part in parts if part.codes is not None]
    by_kind = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    look.say(f"{len(documents)} documents: {by_kind}", documents=len(documents), kinds=dict(kinds))
    codes, characters = sum(len(part.codes) for part in coded), sum(map(len, texts))
    names = ", ".join(sorted({str(part.tokenizer) for part in coded})) or "no tokenizer"
    look.say(f"{len(coded)} images of {codes} codes by {names}", images=len(coded), codes=codes)
    look.say(f"{len(texts)} texts of {characters} characters", texts=len(texts), characters=characters)
    shown = documents[: look.n]
    for document in shown:
        look.say(f"\n{document.id} ({document.kind})\n" + "\n".join(_part_line(part) for part in document.parts))
        columns = [_part_columns(part) for part in document.parts]
        look.documents.append({"document": document.id, "kind": document.kind, "parts": columns})
    if look.pictures:
        tokenizers = _tokenizers_of(look, documents, path)
        for document in shown:
            blocks = [(part.tokenizer, part.codes, part.grid) for part in document.parts if part.codes is not None]
            _decoded(look, document.id, blocks, tokenizers)


def _part_line(part: Part) -> str:
    loss = "loss" if part.loss else "-"
    if part.type == "text":
        return f"  {loss:>4}  {part.role:9}  {_cut(part.text)!r}"
    shown = " ".join(map(str, part.codes[:SHOWN].tolist())) + (" ..." if len(part.codes) > SHOWN else "")
    shown = shown if part.words is None else repr(_cut(part.words))
    size = f"{len(part.codes)} codes of {part.tokenizer}, {'x'.join(map(str, part.grid))}"
    return f"  {loss:>4}  {part.role:9}  [{size}]  {shown}  {part.source}"


def _part_columns(part: Part) -> dict[str, Any]:
    names = ("type", "role", "loss", "text", "words", "tokenizer", "grid", "source")
    columns = {name: getattr(part, name) for name in names}
    codes = None if part.codes is None else part.codes.tolist()
    return {key: value for key, value in {**columns, "codes": codes}.items() if value is not None}


def _tokenizers_of(look: _Look, documents: Shards, path: Path) -> dict[str, ImageTokenizer]:
    """The tokenizers that made the shards, where they still are where they were and what they were."""
    folder = documents.files[0].parent
    found: dict[str, ImageTokenizer] = {}
    if not (folder / FILE).is_file():
        look.say(f"no pictures: {path} has no {FILE}")
        return found
    for name, section in Manifest.load(folder).tokenizers.items():
        if "path" not in section:
            look.say(f"no pictures of {name}: the shards do not say where it is")
            continue
        try:
            own = load_tokenizer(section["path"])
            [now] = own.manifest().tokenizers.values()
            Manifest(tokenizers={name: section}).check(Manifest(tokenizers={name: now}), what=("shards", "tokenizer"))
            found[name] = own
        except (ValueError, OSError) as error:
            look.say(f"no pictures of {name}: {error}")
    return found


def _model(look: _Look, folder: Path) -> None:
    model = _without_weights(folder)
    vocab, lm = model.vocab, model.lm
    look.facts |= {"parameters": _size(lm), "rows": vocab.rows, "text_rows": vocab.text_rows}
    rows = f"{vocab.rows} rows, of which {vocab.text_rows} are text"
    look.say(f"{type(lm).__name__}, {_millions(_size(lm))} parameters, {rows}")
    for name, tokenizer in model.image_tokenizers.items():
        if image := vocab.images.get(name):  # one that writes words has no rows
            books = ", ".join(f"{book.size} codes at {book}" for book in image.codebooks)
            grid, block = "x".join(map(str, image.grid)), " ".join(image.layout)
            look.say(f"{name}: grid {grid}, {vocab.block_length(name)} ids a picture ({block}), {books}")
        _say_tokenizer(look, name, tokenizer)
    look.say("template: " + json.dumps(model.template.to_dict(), ensure_ascii=False))
    card, question = test_card(), "what is in the picture?"
    if look.pictures:
        _reconstructed(look, card, model.image_tokenizers)
    caption = text_part("a test card")
    shot = {"image": card, "question": question, "answers": ["a test card"]}
    examples = [
        ("caption to picture", [caption, image_part(card)]),
        ("picture to caption", [image_part(card), caption]),
        ("question", [*asked({"image": card, "question": question}, [shot]), text_part("a test card", role="answer")]),
    ]
    _show(look, model, examples[: look.n])


def _tokenizer(look: _Look, folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    [name] = tokenizer.manifest().tokenizers
    _say_tokenizer(look, name, tokenizer)
    if look.pictures:
        _reconstructed(look, test_card(), {name: tokenizer})


def test_card() -> Image.Image:
    """A picture with what codes tend to lose: gradients, thin lines, small shapes, saturated colours."""
    across = np.linspace(0, 255, CARD, dtype=np.uint8)
    pixels = np.stack([np.tile(across, (CARD, 1)), np.tile(across[:, None], (1, CARD)), np.full((CARD, CARD), 128)], 2)
    card = Image.fromarray(pixels.astype(np.uint8))
    draw, third = ImageDraw.Draw(card), CARD // 3
    draw.ellipse((8, 8, 8 + third, 8 + third), fill="red")
    draw.rectangle((CARD - 8 - third, 8, CARD - 8, 8 + third), fill="white", outline="black")
    for step in range(8):
        draw.line((8 + 4 * step, CARD - 40, 8 + 4 * step, CARD - 8), fill="black")
    draw.text((CARD // 2, CARD - 32), "card", fill="yellow")
    return card


def _without_weights(folder: Path, tokenizer: str | None = None, template: Any = None) -> UnifiedModel:
    """The model with everything but the values of its LM."""
    base = adapter_base(folder) if is_adapter(folder) else folder
    return around(lm_without_values(base), folder, device="cpu", tokenizer=tokenizer, template=template)


def _show(
    look: _Look, model: UnifiedModel, documents: Sequence[tuple[str, list[Part]]], prompt: bool = False
) -> list[tuple[str, list[Part]]]:
    """Say each (title, parts) as ids; the same with codes in place of pictures."""
    model.encode_parts(coded := [list(parts) for _, parts in documents])
    shown = [(title, parts) for (title, _), parts in zip(documents, coded, strict=True)]
    for title, parts in shown:
        one = render(parts, model.vocab, model.text_tokenizer, model.template, prompt=prompt)
        look.document(title, one, model.vocab, model.text_tokenizer)
    return shown


# ---- pictures --------------------------------------------------------------------------------------------------------


def _decoded(look: _Look, title: str, blocks: Sequence[tuple], tokenizers: dict[str, ImageTokenizer]) -> None:
    """Keep the pictures of (tokenizer, codes, grid) as one strip."""
    codes = [(tokenizers[name], torch.as_tensor(np.asarray(c, np.int64))[None], tuple(grid))
             for name, c, grid in blocks if name in tokenizers]  # fmt: skip
    with suppress(NotImplementedError):  # they need a detokenizer
        if drawn := [to_pil(own.decode(one, grid)[0]) for own, one, grid in codes]:
            look.strips[title] = drawn


def _reconstructed(look: _Look, card: Image.Image, tokenizers: dict[str, ImageTokenizer]) -> None:
    look.strips["test card"] = [card]
    for name, tokenizer in tokenizers.items():
        pixels = tokenizer.preprocess(card)[None]  # [1, 3, H, W]
        grid = tuple(tokenizer.grid(*pixels.shape[-2:]))
        with suppress(NotImplementedError):
            look.strips[f"through {name}"] = [to_pil(tokenizer.decode(tokenizer.encode(pixels), grid)[0])]


# ---- sizes ----------------------------------------------------------------------------------------------------------


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _say_tokenizer(look: _Look, name: str, tokenizer: ImageTokenizer) -> None:
    grid = "x".join(map(str, tokenizer.grid()))
    sizes = ", ".join(map(str, tokenizer.codebook_sizes))
    pixels = f"{tokenizer.image_size} pixels a side ({tokenizer.resize})"
    codes = f"{grid} of {sizes} {tokenizer.vocabulary}"
    look.say(f"{name}: {type(tokenizer).__name__}, {pixels} to {codes}, {_millions(_size(tokenizer))} parameters")
    look.facts.setdefault("tokenizers", {})[name] = {"parameters": _size(tokenizer), "grid": list(tokenizer.grid())}


def _say_memory(look: _Look, found: dict[str, int]) -> None:
    sizes = {key.removesuffix("_bytes"): value for key, value in found.items() if key.endswith("_bytes")}
    total = sum(sizes.values())
    look.facts["memory"] = {**found, "total_bytes": total}
    parts = ", ".join(f"{_megabytes(value)} {name}" for name, value in sizes.items())
    unknown = "" if "activations" in sizes else "; activations are not known for this one"
    what = f"training {_millions(found['trained'])} of {_millions(found['parameters'])} parameters"
    look.say(f"{what} takes about {_megabytes(total)} in one process: {parts}{unknown}")


def _megabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else str(count)
