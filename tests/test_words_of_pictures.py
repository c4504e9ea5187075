"""A tokenizer that writes words, from its folder to an answer: no new rows, and the words stand where codes would."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import unitok
from unitok.cli import app
from unitok.data.render import CONTROL, IMAGE, TEXT, Template, question_parts, render
from unitok.data.schema import codes_part
from unitok.data.shards import read_shards
from unitok.eval.vqa import ShotSampler
from unitok.lm.expand import expand_folder, open_lm
from unitok.tokenizers.interrogator import InterrogatorTokenizer

PAPER = {  # De-Diffusion, arXiv 2311.00618
    "header": "Answer the question given the context.\n",
    "image_prefix": "Image context: ",
    "image_suffix": " ",
    "question": "Image question: {question} Short answer: ",
    "answer": "{answer}$",
}


def run(*arguments) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def world(tmp_path_factory, scene_model):
    """Pictures, questions about them, a tokenizer that writes words, and an LM that has no idea of pictures."""
    folder, rng = tmp_path_factory.mktemp("words"), np.random.default_rng(0)
    torch.manual_seed(0)
    InterrogatorTokenizer.tiny().save_pretrained(folder / "tokenizer")
    rows = []
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
        rows.append(
            {"image": f"{i}.png", "question": "what colour is the circle?", "answers": [("red", "blue")[i % 2]]}
        )
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = run("expand", scene_model.parent / "llm", "--tokenizer", folder / "tokenizer", "--out", folder / "model")
    assert told.endswith("460 rows, none new\n")
    return folder


def test_expansion_leaves_the_model_as_it_was(world, scene_model):
    before, after = (open_lm(f).state_dict() for f in (scene_model.parent / "llm", world / "model"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    model = unitok.load(world / "model")
    assert model.vocab.rows == model.vocab.text_rows and not model.vocab.images
    assert model.image_tokenizer.vocabulary == "text"


def test_beside_another_tokenizer_it_goes_by_its_name(world, scene_model, tmp_path):
    expand_folder(scene_model, world / "tokenizer", tmp_path / "both", "words")
    model = unitok.load(tmp_path / "both", tokenizer="words")
    assert set(model.image_tokenizers) == {"scenes", "words"} and set(model.vocab.images) == {"scenes"}
    [part] = model.encode([world / "0.png"])
    assert part.words == model.image_tokenizer.to_text(torch.tensor(part.codes[None]).long())[0]
    assert isinstance(model.answer(world / "0.png", "what colour is the circle?"), str)


def test_words_go_through_shards_training_and_evaluation(world, tmp_path):
    run("tokenize", world / "questions.jsonl", "--tokenizer", world / "tokenizer", "--out", tmp_path / "shards")
    documents = read_shards(tmp_path / "shards")
    own = unitok.load_tokenizer(world / "tokenizer")
    for document in documents:
        picture = document.parts[0]
        assert picture.words == own.to_text(torch.tensor(picture.codes[None]).long())[0] != ""
    assert repr(documents[0].parts[0].words) in run("inspect", tmp_path / "shards")

    recipe = {
        "kind": "language_model", "model": str(world / "model"), "out": str(tmp_path / "adapter"), "method": "lora",
        "lora": {"rank": 2, "rows": "none"}, "data": [{"shards": str(tmp_path / "shards"), "share_prefix": True}],
        "length": 128, "batch_size": 2, "steps": 8, "lr": 1e-2, "dtype": "float32", "log_every": 1,
        "template": {"image_suffix": ": "},
    }  # fmt: skip
    (tmp_path / "reader.yaml").write_text(json.dumps(recipe))
    run("train", tmp_path / "reader.yaml")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "adapter" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]

    model = unitok.load(tmp_path / "adapter")
    assert model.template.image_suffix == ": "  # what it was trained with, not what its base says
    [part] = model.encode([world / "0.png"])
    asked = question_parts("what colour is the circle?", part)
    shown = render(asked, model.vocab, model.text_tokenizer, model.template, prompt=True)
    trained = render(documents[0].parts, model.vocab, model.text_tokenizer, model.template)
    assert trained.ids[: len(shown.ids)].tolist() == shown.ids.tolist()
    assert model.text_tokenizer.decode(shown.ids[shown.modality == IMAGE]).strip() == part.words
    assert {TEXT, IMAGE, CONTROL} == set(shown.modality.tolist())

    evaluation = {
        "kind": "evaluation", "task": "vqa", "model": str(tmp_path / "adapter"), "out": str(tmp_path / "scores"),
        "data": str(world / "questions.jsonl"), "train": str(world / "questions.jsonl"), "shots": 1, "template": PAPER,
        "options": {"mode": "exact", "text_shots": 1, "max_new_tokens": 2, "baselines": ["no_image", "permuted_shots"]},
    }  # fmt: skip
    (tmp_path / "vqa.yaml").write_text(json.dumps(evaluation))
    run("evaluate", tmp_path / "vqa.yaml")
    [score, *_] = json.loads((tmp_path / "scores" / "results.json").read_text())["scores"]
    assert score["protocol"]["template"] == PAPER and score["protocol"]["text_shots"] == 1 and score["n"] == 8
    assert isinstance(run("ask", tmp_path / "adapter", world / "0.png", "what colour is the circle?"), str)


def test_the_few_shot_prompt_of_the_paper(world):
    model = unitok.load(world / "model", template={**PAPER, "shot_separator": "\n", "bos": False})
    context = codes_part([0], (1,), "words", words="a red circle")
    other = codes_part([0], (1,), "words", words="two blue crosses")
    parts = question_parts(
        "what shape is it?", context, shots=[((), "how many?", "one"), (other, "what colour?", "blue")]
    )
    ids = render(parts, model.vocab, model.text_tokenizer, model.template, prompt=True).ids
    assert model.text_tokenizer.decode(ids) == (
        "Answer the question given the context.\n"
        "Image question: how many? Short answer: one$\n"
        "Image context: two blue crosses Image question: what colour? Short answer: blue$\n"
        "Image context: a red circle Image question: what shape is it? Short answer:"
    )
    without = render([context], model.vocab, model.text_tokenizer, model.template).ids
    assert "Answer the question" not in model.text_tokenizer.decode(without)  # no question, no header


def test_a_reply_ends_where_that_of_a_shot_ends(world, monkeypatch):
    model = unitok.load(world / "model", template=PAPER)
    said = model.text_tokenizer.encode(" red$ and more", add_special_tokens=False)
    monkeypatch.setattr("unitok.model.generate_ids", lambda lm, prompts, *a, **k: [said] * len(prompts))
    assert model.answer(world / "0.png", "what colour?") == "red"
    model.template = Template()
    assert model.answer(world / "0.png", "what colour?") == "red$ and more"


def test_text_shots_are_more_shots_without_pictures():
    rows = [{"id": str(i), "image": f"{i}.png", "question": "?", "answers": [str(i)]} for i in range(20)]
    both = ShotSampler(rows, 2, 0, 3).draw(rows[0])
    plain = ShotSampler(rows, 5, 0).draw(rows[0])
    assert [shot["image"] for shot in both] == [None] * 3 + [shot["image"] for shot in plain[3:]]
    assert [shot["answers"] for shot in both] == [shot["answers"] for shot in plain]
    with pytest.raises(ValueError, match="at least 0, got -1"):
        ShotSampler(rows, 2, 0, -1)
