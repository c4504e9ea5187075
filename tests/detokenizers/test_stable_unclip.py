"""Stable unCLIP against diffusers' own pipeline, on a tiny one with random weights."""

import json
import shutil

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from unitok.detokenizers.base import Condition, load_detokenizer
from unitok.detokenizers.stable_unclip import TINY, StableUnclipDetokenizer

SIZE = 8  # of the image embedding


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "a": 3}
    normalizer = StableUnCLIPImageNormalizer(SIZE)
    torch.nn.init.normal_(normalizer.mean)
    torch.nn.init.uniform_(normalizer.std, 0.5, 2)
    pipe = diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(size=8, crop_size=8),
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=SIZE)
        ),
        image_normalizer=normalizer,
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=CLIPTokenizer(vocab=vocab, merges=[], model_max_length=6),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(**sizes, vocab_size=4, max_position_embeddings=6, bos_token_id=0, eos_token_id=1)
        ),
        unet=diffusers.UNet2DConditionModel(**TINY["unet"]),
        scheduler=diffusers.DDIMScheduler(**TINY["scheduler"]),
        vae=diffusers.AutoencoderKL(**TINY["vae"]),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(path)
    return path


@pytest.fixture
def condition():
    return Condition(vectors=torch.randn(2, 1, SIZE, generator=torch.Generator().manual_seed(1)))


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("noise_level", [0, 300])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler"])
def test_it_draws_what_the_pipeline_of_diffusers_draws(
    pipeline, folder, tmp_path, condition, guidance, noise_level, scheduler
):
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    pipeline.scheduler.save_pretrained(shutil.copytree(folder, tmp_path / "pipe") / "scheduler")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", scheduler]}))
    detokenizer = StableUnclipDetokenizer(str(tmp_path / "pipe"), noise_level=noise_level, steps=5).eval()
    assert type(detokenizer.scheduler).__name__ == scheduler and detokenizer.image_size == 16
    found = detokenizer.generate(condition, seeds=[3, 4], guidance=guidance)
    theirs = pipeline(
        image_embeds=condition.vectors[:, 0], prompt=["", ""], guidance_scale=guidance, num_inference_steps=5,
        noise_level=noise_level, generator=detokenizer.generators([3, 4]), output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(found, theirs, atol=1e-4, rtol=0)


def test_a_negative_condition_takes_the_place_of_zeros(folder, condition):
    detokenizer = StableUnclipDetokenizer(str(folder), steps=4).eval()
    calls = []
    detokenizer.unet.register_forward_hook(lambda _, inputs, out: calls.append(len(inputs[0])))

    def draw(**options):
        calls.clear()
        return detokenizer.generate(condition, seeds=[3, 4], **options)

    alone = draw()
    assert calls == [2] * 4  # the conditional branch alone
    assert torch.equal(draw(guidance=1.0, negative=Condition(vectors=-condition.vectors)), alone)
    zeros = draw(guidance=5.0)
    assert calls == [4] * 4
    assert (zeros - alone).abs().max() > 1e-4
    other = Condition(vectors=condition.vectors.flip(0))
    assert (draw(guidance=5.0, negative=other) - zeros).abs().max() > 1e-4
    torch.testing.assert_close(draw(guidance=5.0, negative=condition), alone, atol=1e-5, rtol=0)
    # guidance 0 is the negative alone
    unwanted = draw(guidance=0.0, negative=other)
    assert calls == [2] * 4
    torch.testing.assert_close(unwanted, detokenizer.generate(other, seeds=[3, 4]), atol=1e-6, rtol=0)


def test_the_folder_names_the_pipeline_and_knows_it_again(folder, tmp_path, condition):
    torch.manual_seed(0)
    for trained in (False, True):
        detokenizer = StableUnclipDetokenizer(str(folder), trained=trained, steps=2).eval()
        moved = [p for p in detokenizer.parameters() if p.requires_grad]
        assert bool(moved) is trained
        if trained:
            with torch.no_grad():
                moved[0].add_(1)
        saved = tmp_path / str(trained)
        detokenizer.save_pretrained(saved)
        assert {key.partition(".")[0] for key in detokenizer.own_state()} == ({"unet"} if trained else set())
        loaded = load_detokenizer(saved)
        pictures = [d.generate(condition, seeds=[1, 2], guidance=3.0) for d in (detokenizer, loaded)]
        assert torch.equal(*pictures)

    other = shutil.copytree(folder, tmp_path / "other")
    torch.manual_seed(9)
    diffusers.AutoencoderKL(**TINY["vae"]).save_pretrained(other / "vae")
    with pytest.raises(ValueError, match="its vae is not the one it was made with"):
        StableUnclipDetokenizer.from_pretrained(tmp_path / "False", pipeline=str(other))


def test_it_learns_what_to_draw(condition):
    torch.manual_seed(0)
    detokenizer = StableUnclipDetokenizer.tiny().train()
    own = [p for p in detokenizer.parameters() if p.requires_grad]
    assert {id(p) for p in own} == {id(p) for p in detokenizer.unet.parameters()}
    optimizer = torch.optim.AdamW(own, lr=3e-3)
    images, losses = torch.rand(2, 3, 16, 16), []
    for step in range(60):
        loss, _ = detokenizer.loss(images, condition, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_what_is_absent_or_wrong_is_said_in_a_line(folder, tmp_path):
    with pytest.raises(ValueError, match="some/unclip: no such folder; of a Hub id the revision must be given too"):
        StableUnclipDetokenizer("some/unclip")
    with pytest.raises(FileNotFoundError, match="some/unclip: no such folder, and not to be had from the Hub"):
        StableUnclipDetokenizer("some/unclip", revision="0" * 40)
    with pytest.raises(ValueError, match="not a Stable unCLIP pipeline of diffusers: its model_index.json names None"):
        StableUnclipDetokenizer(str(tmp_path))
    half = shutil.copytree(folder, tmp_path / "half")
    for path in (half / "unet").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no weights in unet/"):
        StableUnclipDetokenizer(str(half))
    with pytest.raises(ValueError, match="give the pipeline of a StableUnCLIPImg2ImgPipeline, or components"):
        StableUnclipDetokenizer()
    with pytest.raises(ValueError, match="noise_level must be 0 to 999, got 1000"):
        StableUnclipDetokenizer(noise_level=1000, components=TINY)
    wrong = {**TINY, "unet": {**TINY["unet"], "class_embed_type": None}}
    with pytest.raises(ValueError, match='needs class_embed_type "projection"'):
        StableUnclipDetokenizer(components=wrong)
    detokenizer = StableUnclipDetokenizer(str(folder))
    for vectors in (torch.zeros(2, 4, SIZE), torch.zeros(2, 1, 768)):
        with pytest.raises(ValueError, match=r"must be \[B, 1, 8\], the image embedding of this pipeline"):
            detokenizer.generate(Condition(vectors=vectors), seeds=[0, 1])
