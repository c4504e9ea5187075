"""`unitok inspect` shows what training and evaluation really use: the same ids, masks, counts and sizes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PhiConfig

from unitok.checkpoint import read_json
from unitok.config import load_recipe, make_recipe
from unitok.data.packing import Store
from unitok.data.render import render
from unitok.data.shards import read_shards, tokenize
from unitok.inspection import describe, inspect
from unitok.lm.adapters import add_adapter
from unitok.lm.expand import open_lm
from unitok.lm.text import load_text_tokenizer
from unitok.manifest import Manifest
from unitok.model import load
from unitok.tokenizers.base import load_tokenizer
from unitok.tokenizers.fsq import FSQTokenizer
from unitok.training.language_model import ChosenPositions
from unitok.training.memory import lm_memory, tokenizer_memory
from unitok.vocab import JointVocab

PICTURES = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory, scene_model) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for n in range(PICTURES):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    captions = [{"image": f"{n}.png", "text": "a red circle"} for n in range(PICTURES)]
    captions += [{"parts": [{"type": "text", "text": "there is a small blue cross"}]}]
    questions = [{"image": f"{n}.png", "question": "is it red?", "answers": ["yes"]} for n in range(PICTURES)]
    for name, rows in (("captions", captions), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = scene_model.parent / "tokenizer"
        tokenize(folder / f"{name}.jsonl", tokenizer, folder / name, name="scenes")
    recipe = {
        "kind": "language_model", "model": str(scene_model), "out": str(folder / "run"), "length": 64, "batch_size": 2,
        "data": [{"shards": str(folder / "captions"), "weight": 3}, {"shards": str(folder / "questions")}],
        "steps": 10, "lr": 1e-3, "dtype": "float32", "image_weight": 0.5, "lora": {"rank": 2},
    }  # fmt: skip
    (folder / "lm.yaml").write_text(json.dumps(recipe))
    return SimpleNamespace(folder=folder, model=scene_model, recipe=recipe, lm=folder / "lm.yaml", tokenizer=tokenizer)


def seen(target, **options) -> tuple[dict, list[str]]:
    lines: list[str] = []
    facts = inspect(target, echo=lambda text: lines.extend(text.splitlines()), **options)
    return facts, lines


def documents(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "documents.jsonl").read_text().splitlines()]


# ---- documents -------------------------------------------------------------------------------------------------------


def test_a_recipe_shows_the_ids_and_loss_that_its_training_uses(world, tmp_path):
    facts, lines = seen(world.lm, n=4, out=tmp_path)
    model = load(world.model)
    expected = {}
    for name in ("captions", "questions"):
        for document in read_shards(world.folder / name):
            one = render(document.parts, model.vocab, model.text_tokenizer, model.template)
            expected[tuple(one.ids.tolist())] = one
    shown = documents(tmp_path)
    assert len(shown) == 4
    assert [
        str(world.folder / name) in one["document"] for one, name in zip(shown, ("captions", "questions"), strict=False)
    ]
    for one in shown:
        truth = expected[tuple(one["ids"])]
        weights = np.where(truth.modality == 0, 1.0, 0.5) * truth.weights
        weights[0] = 0  # nothing predicts the first id
        assert one["weights"] == weights.tolist() and one["modality"] == truth.modality.tolist()
    captions = facts["sources"][str(world.folder / "captions")]
    assert captions["documents"] == PICTURES + 1 and captions["image"] == PICTURES * 16
    assert captions["control"] == PICTURES * 2
    questions = facts["sources"][str(world.folder / "questions")]
    answer = len(model.text_tokenizer.encode("a yes", add_special_tokens=False)) - len(
        model.text_tokenizer.encode("a", add_special_tokens=False)
    )
    assert questions["with_loss"] == PICTURES * (answer + 1)  # the answer and the end of text
    ids = sum(source[key] for source in facts["sources"].values() for key in ("text", "image", "control"))
    assert ids == Store(expected_all(world, model)).lengths.sum()
    assert any("passes" in line for line in lines)
    sheet = Image.open(tmp_path / "pictures.png")
    assert sheet.height > 3 * 96  # a picture of each document that has one


def expected_all(world, model):
    for name in ("captions", "questions"):
        for document in read_shards(world.folder / name):
            yield render(document.parts, model.vocab, model.text_tokenizer, model.template)


def test_passes_are_what_the_stream_draws(world):
    facts, _ = seen(world.lm)
    captions, questions = (facts["sources"][str(world.folder / name)] for name in ("captions", "questions"))
    drawn = captions["passes"] * captions["documents"], questions["passes"] * questions["documents"]
    assert drawn[0] / drawn[1] == pytest.approx(3, rel=0.01)  # their weights


def test_stretches_cover_the_document_and_name_the_borders(world):
    model = load(world.model)
    document = read_shards(world.folder / "captions")[0]
    one = render(document.parts, model.vocab, model.text_tokenizer, model.template)
    title, _, *lines = describe("one", one, model.vocab, model.text_tokenizer)
    assert title == f"one: {len(one.ids)} ids, {int((one.weights > 0).sum())} carry loss"
    counts = [int(line.split()[1]) for line in lines]
    assert (
        sum(counts) == len(one.ids)
        and [int(line.split()[0]) for line in lines] == np.cumsum([0, *counts])[:-1].tolist()
    )
    what = [line.split(maxsplit=3)[3] for line in lines]
    begin = next(i for i, text in enumerate(what) if text.startswith("[begin of scenes]"))
    assert what[begin + 1].startswith("[codes]") and counts[begin + 1] == 16
    assert what[begin + 2].startswith("[end of scenes]")


def test_an_evaluation_shows_the_prompts_that_the_model_is_given(world, tmp_path, monkeypatch):
    import unitok.model

    questions = str(world.folder / "questions.jsonl")
    recipe = {"kind": "evaluation", "task": "vqa", "model": str(world.model), "data": questions, "train": questions,
              "shots": 2, "n": 3, "options": {"baselines": []}}  # fmt: skip
    (tmp_path / "vqa.yaml").write_text(json.dumps(recipe))
    facts, _ = seen(tmp_path / "vqa.yaml", n=3, out=tmp_path)
    assert facts["rows"] == 3
    given, generate = [], unitok.model.generate_ids
    monkeypatch.setattr(
        unitok.model,
        "generate_ids",
        lambda lm, prompts, *a, **k: given.extend(prompts) or generate(lm, prompts, *a, **k),
    )
    from unitok.eval import vqa

    vqa.run(load(world.model), load_recipe(tmp_path / "vqa.yaml"))
    assert sorted(map(list, given)) == sorted(one["ids"] for one in documents(tmp_path))
    for task, data in (("captions", "captions.jsonl"), ("images", "captions.jsonl")):
        changed = {**recipe, "task": task, "data": str(world.folder / data), "shots": 0, "train": []}
        (tmp_path / "other.yaml").write_text(json.dumps(changed))
        assert seen(tmp_path / "other.yaml", out=tmp_path / task)[0]["rows"] == 3


def test_shards_are_decoded_by_the_tokenizer_that_made_them(world, tmp_path):
    facts, lines = seen(world.folder / "captions", n=1, out=tmp_path)
    assert facts["documents"] == PICTURES + 1 and facts["images"] == PICTURES and facts["codes"] == PICTURES * 16
    [document] = documents(tmp_path)
    assert document["parts"][1]["codes"] == read_shards(world.folder / "captions")[0].parts[1].codes.tolist()
    sheet = np.asarray(Image.open(tmp_path / "pictures.png"))
    tokenizer = load_tokenizer(world.tokenizer)
    made = tokenizer.decode(torch.tensor(document["parts"][1]["codes"])[None])[0]
    assert np.array_equal(sheet[16 + 3, 2 + 3], (made[:, 0, 0] * 255).round().numpy())  # the first pixel, enlarged by 6
    assert any("[16 codes of scenes, 4x4]" in line and line.endswith("0.png") for line in lines)


def test_shards_of_a_tokenizer_that_has_changed_are_not_decoded(world, tmp_path):
    torch.manual_seed(3)
    FSQTokenizer.tiny().save_pretrained(tmp_path / "tokenizer")
    tokenize(world.folder / "captions.jsonl", tmp_path / "tokenizer", tmp_path / "shards")
    torch.manual_seed(4)
    FSQTokenizer.tiny().save_pretrained(tmp_path / "tokenizer")
    _, lines = seen(tmp_path / "shards", n=1, out=tmp_path / "out")
    assert any("no pictures of fsq: manifest mismatch: tokenizers.fsq.weight_hash" in line for line in lines)
    assert not (tmp_path / "out" / "pictures.png").exists()


def test_a_model_shows_its_rows_and_a_test_card(world, tmp_path):
    facts, lines = seen(world.model, n=3, out=tmp_path)
    model = load(world.model)
    assert facts["rows"] == model.vocab.rows and facts["text_rows"] == model.vocab.text_rows
    assert facts["parameters"] == sum(p.numel() for p in model.lm.parameters())
    shown = documents(tmp_path)
    assert [one["document"] for one in shown] == ["caption to picture", "picture to caption", "question"]
    pieces = [piece[0] for piece in model.vocab.split(np.array(shown[2]["ids"]))]
    assert pieces.count("image") == 2  # one shot before the question
    loss = [index for index, weight in zip(shown[2]["ids"], shown[2]["weights"], strict=True) if weight]
    assert model.text_tokenizer.decode(loss, skip_special_tokens=True).strip() == "a test card"
    assert any(line.startswith("template: ") and '"separator"' in line for line in lines)
    assert seen(world.tokenizer)[0]["tokenizers"]["fsq"]["grid"] == [4, 4]


# ---- memory ----------------------------------------------------------------------------------------------------------

CONFIGS = {
    "llama": LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "phi": PhiConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_memory_is_that_of_the_real_model(family, method, tmp_path, world):
    vocab = JointVocab(text_rows=64).add("scenes", [36], (4, 4))
    config = CONFIGS[family]
    config.vocab_size, config.tie_word_embeddings = vocab.rows, family == "llama"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    recipe = make_recipe({**world.recipe, "method": method, "lora": {"rank": 4}})
    estimate = lm_memory(recipe, tmp_path, vocab, chosen=40)

    lm = open_lm(tmp_path)
    if method == "lora":
        lm = add_adapter(lm, vocab, **recipe.lora.model_dump())
    assert estimate["parameters"] == sum(p.numel() for p in lm.parameters())
    assert estimate["trained"] == sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert estimate["weights_bytes"] == 4 * estimate["parameters"]

    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.arange(64).repeat(2, 1)
    positions = torch.cat([torch.arange(40), torch.arange(24)]).repeat(2, 1)  # two documents a row
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), ChosenPositions(lm)(torch.arange(40)):
        logits = lm.train()(input_ids=ids, position_ids=positions, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0].float(), torch.zeros(40, dtype=torch.int64))
    real = sum(storage.nbytes() for address, storage in kept.items() if address not in own)
    assert estimate["activations_bytes"] == pytest.approx(real, rel=0.02)


def test_memory_of_half_precision_and_of_a_larger_batch(world):
    vocab = JointVocab.from_dict(Manifest.load(world.model).vocab)
    values = {**world.recipe, "model": str(world.model)}
    small = lm_memory(make_recipe(values), world.model, vocab, 40)
    large = lm_memory(make_recipe({**values, "batch_size": 4}), world.model, vocab, 80)
    assert 1.5 < large["activations_bytes"] / small["activations_bytes"] <= 2
    half = lm_memory(make_recipe({**values, "dtype": "bfloat16", "method": "full"}), world.model, vocab, 40)
    whole = lm_memory(make_recipe({**values, "method": "full"}), world.model, vocab, 40)
    assert half["weights_bytes"] == whole["weights_bytes"] and half["activations_bytes"] < whole["activations_bytes"]
    frugal = lm_memory(make_recipe({**values, "gradient_checkpointing": True}), world.model, vocab, 40)
    assert frugal["activations_bytes"] < small["activations_bytes"] / 2


def test_a_tokenizer_recipe_shows_its_pictures_and_memory(world, tmp_path):
    (world.folder / "broken.jsonl").write_text('{"image": "0.png"}\n{"image": "captions.jsonl"}\n{"image": "1.png"}\n')
    recipe = {"kind": "tokenizer", "tokenizer": {"name": "fsq", "image_size": 16, "width": 16, "levels": [4, 3, 3]},
              "data": str(world.folder / "broken.jsonl"), "out": str(tmp_path / "run"), "steps": 6, "batch_size": 4,
              "lr": 1e-3}  # fmt: skip
    (tmp_path / "fsq.yaml").write_text(json.dumps(recipe))
    facts, lines = seen(tmp_path / "fsq.yaml", n=2, out=tmp_path / "out")
    assert (facts["pictures"], facts["refused"]) == (3, 1)
    assert any("captions.jsonl: not a picture in a known format" in line for line in lines)
    assert any("6 steps of 4: every picture 8.0 times" in line for line in lines)
    tokenizer = FSQTokenizer(image_size=16, width=16, levels=(4, 3, 3))
    assert facts["memory"]["trained"] == sum(p.numel() for p in tokenizer.parameters())
    assert read_json(tmp_path / "out" / "inspection.json")["memory"] == facts["memory"]
    pixels = np.asarray(Image.open(world.folder / "0.png"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "pictures.png"))[16 + 3, 2 + 3], pixels[0, 0])

    assert not (tmp_path / "run").exists()  # nothing is trained
    several = tokenizer_memory(make_recipe({**recipe, "batch_size": 8}), tokenizer, torch.rand(2, 3, 16, 16))
    assert several["activations_bytes"] > 1.5 * facts["memory"]["activations_bytes"]


@pytest.mark.parametrize("kind", ["clip", "detokenizer"])
def test_a_recipe_with_captions_shows_them(world, tmp_path, kind):
    own = {"clip": {"vision": {}, "text": {}, "projection_size": 4, "text_tokenizer": "builtin:scenes"},
           "detokenizer": {"detokenizer": {"name": "diffusion"}, "texts": True}}[kind]  # fmt: skip
    recipe = {"kind": kind, **own, "data": str(world.folder / "captions.jsonl"), "out": str(tmp_path / "run"),
              "steps": 5, "batch_size": 2, "lr": 1e-3}  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    facts, lines = seen(tmp_path / "r.yaml", n=2, out=tmp_path / "out")
    assert (facts["pictures"], facts["refused"]) == (PICTURES + 1, 1)  # a row of text alone
    assert [line for line in lines if "a red circle" in line] == [f"captions.jsonl:{n}: a red circle" for n in (1, 2)]
    assert (tmp_path / "out" / "pictures.png").is_file() and not (tmp_path / "run").exists()


def test_a_text_tokenizer_alone_describes_plain_documents(world):
    words = load_text_tokenizer(world.model)
    document = read_shards(world.folder / "captions")[PICTURES]
    lines = describe("text", render(document.parts, None, words), None, words)
    assert "there is a small blue cross" in lines[-2] or "there is a small blue cross" in lines[-1]
