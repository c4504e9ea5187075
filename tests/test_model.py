"""A model folder opened: what it draws and says depends on seed and prompt alone, and its parts must fit."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import unitok
from unitok import weights
from unitok.checkpoint import read_json, write_json
from unitok.data.render import IMAGE, TEXT, render
from unitok.data.scenes import random_scene, render_scene
from unitok.data.schema import codes_part, text_part
from unitok.lm.expand import expand_folder
from unitok.manifest import FILE
from unitok.tokenizers.fsq import FSQTokenizer


@pytest.fixture(scope="module")
def model(scene_model):
    return unitok.load(scene_model)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(4)]
    for path in paths:
        Image.fromarray(render_scene(random_scene(rng))).save(path)
    return paths


def pixels(images):
    return [np.asarray(image).tolist() for image in images]


def test_a_picture_depends_on_its_prompt_and_seed_alone(model):
    prompts = ["a red circle", "there is a small blue cross left of a large red square", "a red circle"]
    many = pixels(model.images(prompts, n=2, seed=3, guidance=2.0))
    alone = pixels(model.images(prompts[1:2], n=2, seed=3, guidance=2.0, batch_size=1))
    assert many[2:4] == alone and many[0:2] == many[4:6]
    assert alone[0] != alone[1]
    assert pixels(model.images(prompts[1:2], seed=4, guidance=2.0)) != alone[:1]
    assert pixels(model.images(prompts[:2], seed=[3, 3], guidance=2.0)) == [many[0], many[2]]


def test_guidance_and_negative_text_change_the_picture(model):
    plain = pixels(model.images(["a red circle"], seed=1))
    assert pixels(model.images(["a red circle"], seed=1, guidance=1.0)) == plain
    guided = pixels(model.images(["a red circle"], seed=1, guidance=500.0))
    assert guided != plain
    assert pixels(model.images(["a red circle"], seed=1, guidance=500.0, negative="a blue cross")) != guided


def test_answers_do_not_depend_on_the_batch(model, pictures):
    shots = [{"image": pictures[3], "question": "what shape is the red object?", "answers": ["cross"]}]
    rows = [{"image": p, "question": q} for p in pictures[:3] for q in ("what colour is the cross?", "is it so?")]
    given = [shots if i % 2 else [] for i in range(len(rows))]
    together = model.answers(rows, shots=given, temperature=1.0, seeds=range(len(rows)))
    for i, row in enumerate(rows):
        assert model.answers([row], shots=[given[i]], temperature=1.0, seeds=[i]) == together[i : i + 1]
    assert model.answer(pictures[0], "what colour is the cross?") == model.answers(rows[:1])[0]
    assert model.answers([{"image": None, "question": "what colour is the cross?"}])  # the arm without a picture


def test_text_guidance_is_against_the_prompt_without_its_pictures(model, pictures, monkeypatch):
    rows = [{"image": image, "question": "what colour is the cross?"} for image in (pictures[0], None)]
    given, generate = {}, unitok.model.generate_ids

    def watched(lm, prompts, *more, **named):
        given.update(named, prompts=prompts)
        return generate(lm, prompts, *more, **named)

    monkeypatch.setattr(unitok.model, "generate_ids", watched)
    guided = model.answers(rows, guidance=3.0)
    by_length = sorted(range(2), key=lambda i: -len(given["prompts"][i]))
    with_picture, without = (given["prompts"][i].tolist() for i in by_length)
    assert [given["blind_prompts"][i].tolist() for i in by_length] == [without, without] and without != with_picture
    assert [given["text_guidance"][i] for i in by_length] == [3.0, 1.0]  # nothing to guide where there is no picture
    assert guided[1:] == model.answers(rows[1:])
    assert model.answers(rows, guidance=1.0) == model.answers(rows)
    assert given["blind_prompts"] is None


def test_the_prompt_of_a_question_is_the_prefix_of_its_training_document(model, pictures):
    from unitok.data.render import render
    from unitok.data.schema import parse_row
    from unitok.model import asked

    row = {"image": str(pictures[0]), "question": "what colour is the cross?", "answers": ["red"]}
    content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["question"]}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    prompt = [asked(row)]
    model.encode_parts(prompt)
    open_ids = render(prompt[0], model.vocab, model.text_tokenizer, model.template, prompt=True).ids
    for training in (row, {"messages": turns}):
        [document] = parse_row(training)
        parts = [list(document.parts)]
        model.encode_parts(parts)
        closed = render(parts[0], model.vocab, model.text_tokenizer, model.template)
        assert closed.ids[: len(open_ids)].tolist() == open_ids.tolist()
        assert closed.weights[: len(open_ids)].sum() == 0 and closed.weights[len(open_ids)] == 1


def test_captions_look_at_the_picture_in_the_file(model, pictures):
    said = model.captions([str(p) for p in pictures[:2]])
    assert said == model.captions([Image.open(p) for p in pictures[:2]])
    with pytest.raises(ValueError, match="no such picture"):
        model.captions(["no such picture"])


def test_documents_go_on_with_text_and_pictures(model, pictures):
    made = model.generate([text_part("a red circle"), pictures[0]], n=3, seed=5, max_images=1, max_new_tokens=80)
    assert len(made) == 3
    assert all(part.type in ("text", "image") for parts in made for part in parts)
    assert all(sum(part.type == "image" for part in parts) <= 1 for parts in made)
    again = model.generate([text_part("a red circle"), pictures[0]], n=1, seed=5, max_images=1, max_new_tokens=80)
    assert [p.text for p in again[0]] == [p.text for p in made[0]]


def test_parts_that_do_not_fit_are_refused(scene_model, tmp_path):
    broken = shutil.copytree(scene_model, tmp_path / "model")
    manifest = read_json(broken / FILE)
    manifest["tokenizers"]["scenes"]["weight_hash"] = "0" * 64
    write_json(broken / FILE, manifest)
    with pytest.raises(ValueError, match=r"tokenizers\.scenes\.weight_hash"):
        unitok.load(broken)
    manifest = read_json(scene_model / FILE)
    manifest["text_tokenizer"]["hash"] = "0" * 64
    write_json(broken / FILE, manifest)
    with pytest.raises(ValueError, match="text tokenizer is another"):
        unitok.load(broken)
    with pytest.raises(FileNotFoundError, match="no such builtin"):
        unitok.load("builtin:nothing")


def test_bad_calls_are_one_line(model, tmp_path):
    with pytest.raises(ValueError, match="no image tokenizer 'other'"):
        model.images(["a red circle"], tokenizer="other")
    with pytest.raises(ValueError, match="3 seeds for 1 pictures"):
        model.images(["a red circle"], seed=[1, 2, 3])
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match="torn.png"):
        model.answer(tmp_path / "torn.png", "what colour is the cross?")


def test_of_several_candidates_the_one_that_is_liked_best_is_kept(model):
    prompts = ["a red circle", "there is a small blue cross left of a large red square"]
    offered = model.candidates(prompts, 3, seeds=[5, 6], guidance=2.0)
    likes = np.array([[like for _, like in of_one] for of_one in offered])  # [2, 3]
    assert likes.shape == (2, 3) and (likes < 0).all() and len(np.unique(likes)) == 6
    best = [of_one[k][0] for of_one, k in zip(offered, likes.argmax(1), strict=True)]
    kept = model.images(prompts, candidates=3, seed=[5, 6], guidance=2.0)
    assert pixels(kept) == pixels(best)
    assert pixels(model.images(prompts, seed=[5, 6], guidance=2.0)) == pixels([of_one[0][0] for of_one in offered])
    with pytest.raises(ValueError, match="candidates .* text alone"):
        model.images([["what is it?", kept[0]]], candidates=2)
    with pytest.raises(ValueError, match="candidates must be 1 or more, got 0"):
        model.images(prompts, candidates=0)


def test_a_candidate_is_liked_by_its_reading_and_by_its_drawing(model):
    blocks, likes = model._drawn(["a red circle"], [3], 2, weights.NAME)
    for (name, codes, grid), like in zip(blocks, likes[0], strict=True):
        picture, text = codes_part(codes.astype(np.int32), grid, name), text_part("a red circle")
        sums = []
        for parts, modality in (([picture, text], TEXT), ([text, picture], IMAGE)):
            rendered = render(parts, model.vocab, model.text_tokenizer, model.template)
            ids = torch.from_numpy(np.asarray(rendered.ids)).long()
            with torch.no_grad():
                logp = model.lm(ids[None]).logits[0, :-1].log_softmax(-1)
            counts = torch.from_numpy(rendered.modality == modality)[1:]
            sums.append(logp.gather(1, ids[1:, None])[counts].sum().item())
        assert like == pytest.approx(sums[0] + unitok.model.LIKES_DRAWN * sums[1], abs=1e-3)


def test_of_several_image_tokenizers_one_serves(scene_model, tmp_path, pictures):
    """An expanded model of two: nothing is drawn or read by a guess, and the one that was named at opening serves."""
    FSQTokenizer(image_size=24, width=16, levels=(4, 3, 3), min_width=8).save_pretrained(tmp_path / "tiny")
    expanded = expand_folder(scene_model, tmp_path / "tiny", tmp_path / "two", "tiny")
    both = unitok.load(expanded)
    with pytest.raises(ValueError, match="several image tokenizers, name one of them: .*tiny"):
        both.images(["a red circle"])
    with pytest.raises(ValueError, match="no image tokenizer 'other'"):
        unitok.load(expanded, tokenizer="other")
    tiny = unitok.load(expanded, tokenizer="tiny")
    assert tiny.image_tokenizer.image_size == 24
    assert [picture.size for picture in tiny.images(["a red circle"])] == [(24, 24)]
    assert [picture.size for picture in tiny.images(["a red circle"], tokenizer=weights.NAME)] == [(16, 16)]
    assert isinstance(tiny.answer(pictures[0], "what shape is it?"), str)
