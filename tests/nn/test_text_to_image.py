"""A text-to-image pipeline read part by part, beside transformers' encoders and diffusers' schedulers and pipelines."""

import copy
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from unitok import checkpoint
from unitok.config import load_recipe
from unitok.data.scenes import BASE, all_captions, random_scene
from unitok.nn.text_to_image import (
    TINY,
    TextToImage,
    new_text_to_image,
    open_text_to_image,
    word_tokenizer,
)
from unitok.nn.words import allowed_tokens, files_of
from unitok.training.clip import text_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = ["a red circle", "a blue square", ""]
VAE = {"block_out_channels": [8, 8], "norm_num_groups": 4, "down_block_types": ["DownEncoderBlock2D"] * 2,
       "up_block_types": ["UpDecoderBlock2D"] * 2, "scaling_factor": 0.7}  # fmt: skip
LATENT = {**TINY, "unet": {**TINY["unet"], "sample_size": 4, "in_channels": 4, "out_channels": 4}, "vae": VAE}


def t5_pipeline() -> TextToImage:
    """As DeepFloyd's: T5, pixels, a learned variance beside the prediction of the noise."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    words = T5Tokenizer(
        vocab=pieces + [(f"▁{word}", -2.0) for word in TINY["tokenizer"]["words"]], extra_ids=0, model_max_length=8
    )
    config = T5Config(vocab_size=16, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8)  # more rows than ids
    unet = diffusers.UNet2DConditionModel(**{**TINY["unet"], "out_channels": 6})
    return TextToImage(words, T5EncoderModel(config), unet, diffusers.DDPMScheduler())


@pytest.fixture(scope="module", params=["clip", "t5", "latent"])
def pipeline(request):
    torch.manual_seed(0)
    made = {"clip": lambda: new_text_to_image(TINY), "t5": t5_pipeline, "latent": lambda: new_text_to_image(LATENT)}
    return made[request.param]().eval()


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    new_text_to_image(LATENT).save(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def images_for(pipeline, count=3):
    return torch.rand(count, 3, pipeline.image_size, pipeline.image_size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()  # with gradients attention takes another kernel, which rounds otherwise
def drawn(pipeline, seeds=(1, 2, 3), texts=TEXTS, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    states, empty = (pipeline.encode(pipeline.ids(some)) for some in (texts, [""] * len(texts)))
    return pipeline.draw(states, empty, generators, steps=5, **options)


# ---- texts


def test_ids_are_those_of_the_tokenizer_and_frames_are_ids(pipeline):
    ids = pipeline.ids(TEXTS)
    assert ids.shape == (3, pipeline.length) and ids.dtype == torch.int64
    plain = pipeline.tokenizer(TEXTS[0]).input_ids
    assert ids[0, : len(plain)].tolist() == plain
    first = len(pipeline.start)
    assert pipeline.words == pipeline.length - first - 1
    assert torch.equal(pipeline.frame(ids[:2, first : first + 3]), ids[:2])
    most = torch.full((1, pipeline.words), plain[first])
    assert torch.equal(pipeline.frame(most), pipeline.ids(["a " * 99]))  # as what is cut off after as many
    with pytest.raises(ValueError, match=f"{pipeline.words + 1} ids is too long: {pipeline.words} fit"):
        pipeline.frame(torch.zeros(1, pipeline.words + 1, dtype=torch.int64))


@pytest.mark.parametrize("short", [0, 3])
def test_one_hot_soft_words_are_exactly_the_plain_encoder(pipeline, short):
    n = pipeline.words - short
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(len(pipeline.tokenizer), (4, n), generator=generator)
    codes[codes == pipeline.end] = pipeline.tokenizer("a").input_ids[-2]
    ids = pipeline.frame(codes)
    mask = None
    if pipeline.text_encoder.config.model_type == "t5":  # up to the end: what padding holds is not looked at
        mask = (torch.arange(pipeline.length) <= n).long().expand(4, -1)
    with torch.no_grad():
        plain = pipeline.text_encoder(ids, attention_mask=mask).last_hidden_state
        assert torch.equal(pipeline.encode(ids), plain)
        assert torch.equal(pipeline.encode(ids, F.one_hot(codes, pipeline.vocab_size).float()), plain)
        other = F.one_hot(codes.roll(1, 1), pipeline.vocab_size).float()
        assert not torch.allclose(pipeline.encode(ids, other), plain)
        assert torch.equal(pipeline.encode(ids, other), pipeline.encode(pipeline.frame(codes.roll(1, 1))))
        assert torch.equal(pipeline.encode(ids), plain)  # no hook is left behind


def test_soft_words_of_another_size_are_refused_and_leave_nothing_behind(pipeline):
    ids = pipeline.ids(TEXTS)
    before = pipeline.encode(ids)
    for shape in ((3, pipeline.words + 1, pipeline.vocab_size), (3, 2, pipeline.vocab_size + 1)):
        with pytest.raises(ValueError, match="soft words must be"):
            pipeline.encode(ids, torch.zeros(shape))
    assert torch.equal(pipeline.encode(ids), before)


def test_a_gradient_passes_and_what_is_frozen_stays(pipeline):
    frozen = copy.deepcopy(pipeline).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    images, ids = images_for(frozen), frozen.frame(torch.full((3, 4), frozen.end))
    logits = torch.zeros(3, 4, frozen.vocab_size, requires_grad=True)
    t, noise = torch.tensor([10, 300, 700]), torch.randn(3, frozen.unet.config.in_channels, frozen.side, frozen.side)
    optimizer, losses = torch.optim.Adam([logits], lr=0.3), []
    for _ in range(20):
        loss = frozen.denoising_loss(images, frozen.encode(ids, logits.softmax(-1)), t, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        assert logits.grad is not None and (logits.grad.abs().amax((1, 2)) > 0).all()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in frozen.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())


# ---- pictures


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", ["squaredcos_cap_v2", "scaled_linear"])
def test_the_loss_is_that_of_diffusers_own_training(kind, betas):
    torch.manual_seed(0)
    parts = {**TINY, "scheduler": {"beta_schedule": betas, "beta_start": 0.00085, "beta_end": 0.012,
                                   "prediction_type": kind}}  # fmt: skip
    pipeline = new_text_to_image(parts).eval()
    images, t, noise = images_for(pipeline), torch.tensor([0, 400, 999]), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        states = pipeline.text_encoder(pipeline.ids(TEXTS)).last_hidden_state
        x0 = images * 2 - 1
        noised = pipeline.scheduler.add_noise(x0, noise, t)
        said = pipeline.unet(noised, t, encoder_hidden_states=states).sample
        target = {"epsilon": noise, "sample": x0, "v_prediction": pipeline.scheduler.get_velocity(x0, noise, t)}[kind]
        found = pipeline.denoising_loss(images, states, t, noise)
        weighed = pipeline.denoising_loss(images, states, t, noise, min_snr=5.0)
    torch.testing.assert_close(found, (said - target).square().mean((1, 2, 3)), atol=1e-5, rtol=1e-4)
    kept = pipeline.scheduler.alphas_cumprod.double()[t]
    snr = kept / (1 - kept)
    weight = snr.clamp(max=5) / {"epsilon": snr, "sample": torch.ones(3), "v_prediction": snr + 1}[kind]
    torch.testing.assert_close(weighed, found * weight.float(), atol=1e-5, rtol=1e-3)


def test_levels_and_noise_are_drawn_from_torchs_generator(pipeline):
    images, states = images_for(pipeline), pipeline.encode(pipeline.ids(TEXTS))

    def loss(seed):
        torch.manual_seed(seed)
        return pipeline.denoising_loss(images, states)

    assert torch.equal(loss(1), loss(1)) and not torch.equal(loss(1), loss(2))


def test_a_picture_depends_on_its_own_seed_and_text_only(pipeline):
    pictures = drawn(pipeline, guidance=3.0)
    assert pictures.shape == (3, 3, pipeline.image_size, pipeline.image_size)
    assert pictures.min() >= 0 and pictures.max() <= 1
    # in double: batches round differently, and what epsilon says is divided by alpha, which is 1e-4 at the first step
    exact = copy.deepcopy(pipeline).double()
    alone, together = drawn(exact, [2], TEXTS[1:2], guidance=3.0), drawn(exact, guidance=3.0)
    torch.testing.assert_close(alone, together[1:2], atol=1e-5, rtol=0)
    assert not torch.equal(drawn(pipeline, (1, 2, 4), guidance=3.0)[2], pictures[2])
    # guidance 0 is the empty text, whatever is wanted
    torch.testing.assert_close(drawn(pipeline, guidance=0.0), drawn(pipeline, texts=[""] * 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_it_draws_what_ddim_of_diffusers_draws(kind, guidance):
    torch.manual_seed(0)
    scheduler = {"beta_schedule": "squaredcos_cap_v2" if kind == "v_prediction" else "scaled_linear",
                 "prediction_type": kind, "clip_sample": False, "timestep_spacing": "trailing"}  # fmt: skip
    pipeline = new_text_to_image({**TINY, "scheduler": scheduler}).eval()
    found = drawn(pipeline, guidance=guidance)
    theirs = diffusers.DDIMScheduler(**scheduler)
    theirs.set_timesteps(5)
    x = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)])
    with torch.no_grad():
        states, empty = (pipeline.text_encoder(pipeline.ids(some)).last_hidden_state for some in (TEXTS, [""] * 3))
        for t in theirs.timesteps:
            wanted, unwanted = (pipeline.unet(x, t, encoder_hidden_states=told).sample for told in (states, empty))
            x = theirs.step(unwanted + guidance * (wanted - unwanted), t, x).prev_sample
    torch.testing.assert_close(found, (x / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)
    assert found.std() > 0.1


# ---- latents


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_folder_with_a_vae_is_stable_diffusion_to_diffusers(guidance, tmp_path):
    torch.manual_seed(0)
    scheduler = {"beta_schedule": "scaled_linear", "clip_sample": True, "timestep_spacing": "trailing"}
    new_text_to_image({**LATENT, "scheduler": scheduler}).save(tmp_path)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    assert not theirs.scheduler.config.clip_sample  # it turns that off: latents are not made to lie in [-1, 1]
    ours = open_text_to_image(tmp_path)
    assert ours.image_size == 8 and ours.side == 4
    pictures = theirs(
        TEXTS, guidance_scale=guidance, num_inference_steps=5, output_type="pt", height=8, width=8,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2, 3)],
    ).images  # fmt: skip
    torch.testing.assert_close(drawn(ours, guidance=guidance), pictures, atol=1e-4, rtol=0)
    assert pictures.std() > 0.1


def test_the_loss_in_latents_is_of_scaled_latents():
    torch.manual_seed(0)
    pipeline = new_text_to_image(LATENT).eval()
    images, t, noise = images_for(pipeline), torch.tensor([0, 400, 999]), torch.randn(3, 4, 4, 4)
    states = pipeline.encode(pipeline.ids(TEXTS))
    with torch.no_grad():
        latents = pipeline.vae.encode(images * 2 - 1).latent_dist.mode() * 0.7
        said = pipeline.unet(pipeline.scheduler.add_noise(latents, noise, t), t, encoder_hidden_states=states).sample
        target = pipeline.scheduler.get_velocity(latents, noise, t)
        found = pipeline.denoising_loss(images, states, t, noise)
    torch.testing.assert_close(found, (said - target).square().mean((1, 2, 3)), atol=1e-5, rtol=1e-4)


# ---- folders


def test_saved_and_opened_again_it_is_the_same(pipeline, tmp_path):
    pipeline.save(tmp_path)
    again = open_text_to_image(tmp_path)
    assert not again.training and not list(tmp_path.rglob("*.bin"))
    assert checkpoint.state_hash(again.state_dict()) == checkpoint.state_hash(pipeline.state_dict())
    texts = [*TEXTS, "something else, (never) met!"]
    assert torch.equal(again.ids(texts), pipeline.ids(texts))
    assert (again.length, again.words, again.image_size) == (pipeline.length, pipeline.words, pipeline.image_size)
    assert torch.equal(drawn(again, guidance=2.0), drawn(pipeline, guidance=2.0))
    images, t = images_for(pipeline), torch.tensor([10, 300, 700])
    noise = torch.randn(3, pipeline.unet.config.in_channels, pipeline.side, pipeline.side)
    with torch.no_grad():
        losses = [p.denoising_loss(images, p.encode(p.ids(TEXTS)), t, noise) for p in (pipeline, again)]
    assert torch.equal(*losses)


def test_transformers_and_diffusers_open_its_parts(tmp_path):
    torch.manual_seed(0)
    pipeline = new_text_to_image(TINY)
    pipeline.save(tmp_path)
    assert not (tmp_path / "vae").exists()
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    words = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert type(words).__name__ == index["tokenizer"][1] and words.model_max_length == pipeline.length
    assert words(TEXTS).input_ids == pipeline.tokenizer(TEXTS).input_ids
    encoder = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    for part, own in ((encoder, pipeline.text_encoder), (unet, pipeline.unet)):
        assert checkpoint.state_hash(part.state_dict()) == checkpoint.state_hash(own.state_dict())
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_pipelines_of_another_kind_are_refused_in_a_line(folder, tmp_path):
    def copy(name):
        return shutil.copytree(folder, tmp_path / name)

    with pytest.raises(ValueError, match="some/diffusion: no such folder; of a Hub id the revision must be given too"):
        open_text_to_image("some/diffusion")
    for part in ("text_encoder_2", "transformer"):  # SDXL, SD3
        rewrite(copy(part) / "model_index.json", **{part: ["transformers", "Other"]})
        with pytest.raises(ValueError, match=f"a pipeline with {part} is not supported: one text encoder and a U-Net"):
            open_text_to_image(tmp_path / part)
    for part in ("unet", "text_encoder", "vae"):
        for path in (copy(f"no_{part}") / part).glob("*.safetensors"):
            path.rename(path.with_suffix(".bin"))
        with pytest.raises(FileNotFoundError, match=f"no weights in {part}/"):
            open_text_to_image(tmp_path / f"no_{part}")
    rewrite(copy("bert") / "text_encoder" / "config.json", model_type="bert")
    with pytest.raises(ValueError, match="its text encoder is of kind bert; supported are clip_text_model, t5"):
        open_text_to_image(tmp_path / "bert")
    shutil.rmtree(copy("flow") / "scheduler")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "flow" / "scheduler")
    with pytest.raises(ValueError, match="a scheduler FlowMatchEulerDiscreteScheduler .* is not supported"):
        open_text_to_image(tmp_path / "flow")


def test_parts_that_do_not_fit_are_refused():
    inpainting = {**LATENT, "unet": {**LATENT["unet"], "in_channels": 9}}
    with pytest.raises(ValueError, match="a U-Net of 9 channels .* it must be told by texts alone, of 4 channels"):
        new_text_to_image(inpainting)
    with pytest.raises(ValueError, match="the text tokenizer has 153 ids, its text encoder 100"):
        new_text_to_image({**TINY, "text_encoder": {**TINY["text_encoder"], "vocab_size": 100}})
    with pytest.raises(ValueError, match="components: unet and scheduler must be given too"):
        new_text_to_image({name: TINY[name] for name in ("tokenizer", "text_encoder")})


# ---- words


def test_words_are_one_id_each_and_other_texts_are_spelled():
    words = ["square", "squares", "red", "a"]
    tokenizer = word_tokenizer(words, 12)
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words)
    assert tokenizer.get_vocab() == word_tokenizer(words[::-1], 12).get_vocab()
    text = "a red squid (blue) 7!"
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    for bad in ("Red", "two words", "é", "a1"):
        with pytest.raises(ValueError, match="words must be of the letters a to z"):
            word_tokenizer([bad], 8)


def test_files_of_a_tokenizer_do_not_tell_of_its_use(tmp_path):
    tokenizer = word_tokenizer(["red"], 8)
    before = files_of(tokenizer)
    tokenizer(["red", "a red"], padding="max_length", truncation=True, max_length=8)
    assert files_of(tokenizer) == before
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("red é").input_ids == tokenizer("red é").input_ids and files_of(again) == before


def test_every_word_of_the_small_recipes_captions_is_one_word_of_its_text_encoder():
    """The generator's text encoder is that of the small CLIP, the words De-Diffusion chooses from are its captions'."""
    words = text_tokenizer(load_recipe(ROOT / "training" / "scene_clip.yaml").text_tokenizer)
    rng = np.random.default_rng(0)
    captions = sorted({text for _ in range(200) for text in all_captions(random_scene(rng, BASE))})
    for name in ("scenes_dediffusion", "scenes_dediffusion_scratch"):
        chosen = load_recipe(ROOT / "tokenizers" / f"{name}.yaml").tokenizer.arguments["words"]
        assert set(chosen) == {word for text in captions for word in text.split()}
        assert allowed_tokens(words, len(words), "word_final", chosen).sum() == len(chosen)


# ---- a text encoder that was trained


@pytest.fixture
def clip(tmp_path):
    words = word_tokenizer(TINY["tokenizer"]["words"], 8)
    text = {**TINY["text_encoder"], "vocab_size": len(words), "max_position_embeddings": 8,
            "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config={**TINY["text_encoder"], "image_size": 8, "patch_size": 4})
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    words.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_a_new_pipeline_takes_the_text_half_of_a_clip(clip, tmp_path):
    pipeline = new_text_to_image({**TINY, "text_encoder": str(clip)}).eval()
    ids = pipeline.ids(TEXTS)
    whole = CLIPModel.from_pretrained(clip).eval()
    assert torch.equal(pipeline.encode(ids), whole.text_model(ids).last_hidden_state)
    torn = {name: value for name, value in whole.state_dict().items() if "text_model.encoder.layers.1" not in name}
    checkpoint.save_weights(clip / "model.safetensors", torn)
    with pytest.raises(ValueError, match=r"no text encoder of a CLIP: encoder\.layers\.1.* is missing"):
        new_text_to_image({**TINY, "text_encoder": str(clip)})
    (clip / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be read|no file named"):
        new_text_to_image({**TINY, "text_encoder": str(clip)})
