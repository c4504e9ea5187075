"""Text-to-image pipelines as detokenizers: what is trained, what is kept, and the folder that others open."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from unitok.checkpoint import state_hash
from unitok.config import DetokenizerRecipe
from unitok.detokenizers.base import Condition, load_detokenizer
from unitok.detokenizers.text_to_image import PIPELINE, TextToImageDetokenizer
from unitok.nn.text_to_image import TINY, new_text_to_image, open_text_to_image
from unitok.tokenizers.dediffusion import DeDiffusionTokenizer
from unitok.training.detokenizer import train

VAE = {"block_out_channels": [8, 8], "norm_num_groups": 4, "down_block_types": ["DownEncoderBlock2D"] * 2,
       "up_block_types": ["UpDecoderBlock2D"] * 2}  # fmt: skip
LATENT = {**TINY, "unet": {**TINY["unet"], "sample_size": 4, "in_channels": 4, "out_channels": 4}, "vae": VAE}
CONDITION = Condition(texts=["a red circle", "a blue square"])


@pytest.fixture(params=[TINY, LATENT], ids=["pixels", "latents"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    new_text_to_image(request.param).save(tmp_path / "given")
    return tmp_path / "given"


def trained_parts(detokenizer):
    return {name.split(".")[1] for name, p in detokenizer.named_parameters() if p.requires_grad}


def move(detokenizer):
    with torch.no_grad():
        for p in detokenizer.parameters():
            p.add_(0.01 * p.requires_grad)


def test_it_draws_what_its_pipeline_draws(folder):
    detokenizer = TextToImageDetokenizer(str(folder), steps=4).eval()
    # frozen alike: linear layers and attention round otherwise where a gradient is, or may be, asked for
    pipeline = open_text_to_image(folder).requires_grad_(False)
    with torch.no_grad():
        told = [pipeline.encode(pipeline.ids(texts)) for texts in (CONDITION.texts, ["", ""], ["a cross", "red"])]
    states, empty, other = told
    for guidance in (1.0, 3.0):
        theirs = pipeline.draw(states, empty, detokenizer.generators([3, 4]), guidance, 4)
        assert torch.equal(detokenizer.generate(CONDITION, seeds=[3, 4], guidance=guidance), theirs)
    negative = Condition(texts=["a cross", "red"])
    away = detokenizer.generate(CONDITION, seeds=[3, 4], guidance=3.0, negative=negative)
    assert torch.equal(away, pipeline.draw(states, other, detokenizer.generators([3, 4]), 3.0, 4))
    assert not torch.equal(away, theirs)
    fewer = detokenizer.generate(CONDITION, seeds=[3, 4], guidance=3.0, steps=2)
    assert torch.equal(fewer, pipeline.draw(states, empty, detokenizer.generators([3, 4]), 3.0, 2))


def test_a_named_pipeline_stays_frozen_by_name_and_is_known_again(folder, tmp_path):
    detokenizer = TextToImageDetokenizer(str(folder), steps=2).eval()
    assert not trained_parts(detokenizer) and not detokenizer.own_state()
    detokenizer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / PIPELINE).exists()
    loaded = load_detokenizer(tmp_path / "saved")
    pictures = [d.generate(CONDITION, seeds=[1, 2], guidance=2.0) for d in (detokenizer, loaded)]
    assert torch.equal(*pictures)
    changed = open_text_to_image(folder)
    with torch.no_grad():
        changed.unet.conv_out.bias.add_(1)
    changed.save(folder)
    with pytest.raises(ValueError, match="its pipeline is not the one it was made with"):
        load_detokenizer(tmp_path / "saved")


def test_a_named_pipeline_can_be_trained_and_is_written_whole(folder, tmp_path):
    detokenizer = TextToImageDetokenizer(str(folder), trained=True, steps=2).eval()
    assert trained_parts(detokenizer) == {"unet", "text_encoder"}
    move(detokenizer)
    detokenizer.save_pretrained(tmp_path / "saved")
    assert not any("vae" in name for name in detokenizer.own_state())
    loaded = load_detokenizer(tmp_path / "saved")
    again = TextToImageDetokenizer(str(tmp_path / "saved" / PIPELINE), steps=2).eval()
    made = [d.generate(CONDITION, seeds=[1, 2], guidance=2.0) for d in (detokenizer, loaded, again)]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    before = TextToImageDetokenizer(str(folder), steps=2).eval().generate(CONDITION, seeds=[1, 2], guidance=2.0)
    assert not torch.allclose(before, made[0])


@pytest.mark.parametrize("components", [TINY, LATENT], ids=["pixels", "latents"])
def test_a_new_one_keeps_all_of_itself(components, tmp_path):
    torch.manual_seed(0)
    detokenizer = TextToImageDetokenizer(components=components, steps=2).eval()
    assert trained_parts(detokenizer) == {"unet", "text_encoder"}
    detokenizer.save_pretrained(tmp_path)
    loaded = load_detokenizer(tmp_path)
    assert state_hash(loaded.pipeline.state_dict()) == state_hash(detokenizer.pipeline.state_dict())
    pipeline = open_text_to_image(tmp_path / PIPELINE)
    assert state_hash(pipeline.state_dict()) == state_hash(detokenizer.pipeline.state_dict())
    assert torch.equal(pipeline.ids(CONDITION.texts), loaded.pipeline.ids(CONDITION.texts))


def test_it_learns_to_draw_what_texts_say():
    torch.manual_seed(0)
    detokenizer = TextToImageDetokenizer(components=TINY, min_snr=5.0, drop=0.0).train()
    optimizer = torch.optim.AdamW([p for p in detokenizer.parameters() if p.requires_grad], lr=3e-3)
    images = torch.zeros(8, 3, 8, 8)
    images[::2, 0], images[1::2, 2] = 1, 1
    texts = ["red", "blue"] * 4
    for step in range(80):
        loss, _ = detokenizer.loss(images, Condition(texts=texts), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made = detokenizer.eval().generate(Condition(texts=["red", "blue", "red"]), seeds=[1, 2, 3], steps=20)
    assert (made[:, 0] - made[:, 2]).mean((1, 2)).sign().tolist() == [1, -1, 1]


def test_dropped_texts_are_empty_ones():
    images = torch.rand(2, 3, 8, 8)

    def loss(drop, texts):
        torch.manual_seed(0)
        detokenizer = TextToImageDetokenizer(components=TINY, drop=drop)
        torch.manual_seed(1)
        return detokenizer.loss(images, Condition(texts=texts), 0)[0]

    assert torch.equal(loss(1.0, CONDITION.texts), loss(0.0, ["", ""]))
    assert not torch.equal(loss(0.0, CONDITION.texts), loss(0.0, ["", ""]))


def test_codes_of_a_tokenizer_of_words_reach_it_as_texts():
    torch.manual_seed(0)
    tokenizer = DeDiffusionTokenizer.tiny().eval()
    detokenizer = TextToImageDetokenizer(components=TINY, steps=2).eval()
    codes = tokenizer.encode(torch.rand(2, 3, tokenizer.image_size, tokenizer.image_size))
    condition = detokenizer.condition_of(tokenizer, codes)
    assert condition.texts == tokenizer.to_text(codes)
    alone = Condition(texts=tokenizer.to_text(codes))
    assert torch.equal(*(detokenizer.generate(c, seeds=[1, 2]) for c in (condition, alone)))


def test_a_run_leaves_the_pipeline_of_its_averaged_weights(tmp_path):
    rows = []
    for i, (word, colour) in enumerate([("red", (255, 0, 0)), ("blue", (0, 0, 255))] * 8):
        Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": f"a {word} square"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"steps": 3, "batch_size": 4, "lr": 1e-3, "warmup": 1, "ema": 0.9, "checkpoint_every": 2,
              "sample_every": 100, "log_every": 2, "eval_images": 2}  # fmt: skip
    recipe = DetokenizerRecipe(
        kind="detokenizer", detokenizer={"name": "text_to_image", "components": TINY, "steps": 2}, texts=True,
        data=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "out"), **values,
    )  # fmt: skip
    out = train(recipe)
    made, pipeline = load_detokenizer(out), open_text_to_image(out / PIPELINE)
    assert state_hash(pipeline.state_dict()) == state_hash(made.pipeline.state_dict())


def test_what_cannot_be_is_said(folder):
    for arguments in ({}, {"pipeline": str(folder), "components": TINY}):
        with pytest.raises(ValueError, match="give the pipeline of a text-to-image model, or components to make"):
            TextToImageDetokenizer(**arguments)
    with pytest.raises(ValueError, match="min_snr must be above 0, got 0"):
        TextToImageDetokenizer(components=TINY, min_snr=0)
    with pytest.raises(ValueError, match="steps must be 1 to 1000"):
        TextToImageDetokenizer(components=TINY, steps=1001)
    detokenizer = TextToImageDetokenizer(components=TINY)
    with pytest.raises(ValueError, match="takes texts; the condition has codes"):
        detokenizer.generate(Condition(codes=torch.zeros(1, 4, dtype=torch.int64)), seeds=[0])


def test_a_text_encoder_from_a_folder_stays_as_it_is(tmp_path):
    torch.manual_seed(0)
    given = new_text_to_image(TINY)
    for part, name in ((given.text_encoder, "clip"), (given.tokenizer, "clip")):
        part.save_pretrained(tmp_path / name)
    components = {**TINY, "text_encoder": str(tmp_path / "clip")}
    detokenizer = TextToImageDetokenizer(components=components, steps=2).eval()
    assert trained_parts(detokenizer) == {"unet"}
    move(detokenizer)
    detokenizer.save_pretrained(tmp_path / "kept")
    assert not any("text_encoder" in name for name in detokenizer.own_state())
    expected = detokenizer.generate(CONDITION, seeds=[1, 2])
    assert torch.equal(load_detokenizer(tmp_path / "kept").generate(CONDITION, seeds=[1, 2]), expected)
    whole = TextToImageDetokenizer(str(tmp_path / "kept" / PIPELINE), steps=2).eval()
    assert torch.allclose(whole.generate(CONDITION, seeds=[1, 2]), expected, atol=1e-6)
    new_text_to_image(TINY).text_encoder.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="its pipeline.text_encoder is not the one it was made with"):
        load_detokenizer(tmp_path / "kept")
