"""De-Diffusion: what its gradient reaches, what stays frozen, its words, and its folder without the pipeline."""

import gzip
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer, Dinov2Config, Dinov2Model, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from unitok import checkpoint
from unitok.nn.text_to_image import TINY, new_text_to_image, open_text_to_image
from unitok.nn.vision import scaled
from unitok.nn.words import allowed_tokens, texts_of
from unitok.tokenizers.base import load_tokenizer
from unitok.tokenizers.dediffusion import DeDiffusionTokenizer

TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
         "initializer_range": 0.2, "use_mask_token": False}  # fmt: skip
SMALL = {"tokens": 6, "width": 32, "depth": 2, "heads": 2, "anneal_steps": 100}


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    DeDiffusionTokenizer.tiny().pipeline().save(folder)
    return folder


def latent_pipeline():
    """One that works on 4 x 4 latents of 8 x 8 pixels."""
    vae = {"block_out_channels": [8, 8], "norm_num_groups": 4, "down_block_types": ["DownEncoderBlock2D"] * 2,
           "up_block_types": ["UpDecoderBlock2D"] * 2}  # fmt: skip
    unet = {**TINY["unet"], "sample_size": 4, "in_channels": 4, "out_channels": 4}
    return new_text_to_image({**TINY, "unet": unet, "vae": vae})


@pytest.fixture
def images():
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tower_folder(tmp_path):
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**TOWER)).save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


def make(pipeline, **arguments):
    torch.manual_seed(0)
    backbone = {"model_type": "dinov2", **TOWER}
    return DeDiffusionTokenizer(**{"backbone": backbone, "pipeline": str(pipeline), **SMALL, **arguments})


def train(tokenizer, images, steps=3):
    """Names of the tensors that some steps changed, with weight decay."""
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in tokenizer.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    tokenizer.train()
    for step in range(steps):
        loss, _ = tokenizer.loss({"images": images}, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokenizer.eval()
    return {name for name, tensor in tokenizer.state_dict().items() if not torch.equal(tensor, before[name])}


# ---- gradients, and what is frozen


@pytest.mark.parametrize("straight_through", [False, True])
def test_the_gradient_goes_through_the_frozen_models_to_every_part(pipeline_folder, images, straight_through):
    tokenizer = make(pipeline_folder, train_backbone=True, straight_through=straight_through).train()
    loss, _ = tokenizer.loss({"images": images}, 0)
    loss.backward()
    sizes = {name: 0 if p.grad is None else p.grad.norm().item() for name, p in tokenizer.named_parameters()}
    print({name: f"{size:.1e}" for name, size in sizes.items() if "queries" in name or "head" in name})
    assert {name for name, size in sizes.items() if size == 0} == set()
    assert all(p.grad is None for p in tokenizer.pipeline().parameters())


def test_it_trains_through_a_pipeline_of_latents(images, tmp_path):
    latent_pipeline().save(tmp_path)
    tokenizer = make(tmp_path)
    loss, _ = tokenizer.loss({"images": images}, 0)
    loss.backward()
    assert tokenizer.pooler.queries.grad.abs().sum() > 0
    assert all(p.grad is None for p in tokenizer.pipeline().parameters())


def test_the_gradient_points_to_other_words_and_not_to_forbidden_ones(pipeline_folder, images):
    """Of every position's logits: words that were not drawn get a gradient too, each its own."""
    tokenizer = make(pipeline_folder)
    seen = []
    tokenizer.head.register_full_backward_hook(lambda module, into, out: seen.append(out[0]))
    tokenizer.loss({"images": images}, 0)[0].backward()
    gradient = seen[0][..., tokenizer.allowed]  # [B, N, allowed]
    assert (gradient != 0).all() and gradient.flatten(0, 1).std(1).min() > 0
    assert (seen[0][..., ~tokenizer.allowed] == 0).all()


def test_it_trains_on_levels_of_its_span_alone(pipeline_folder, images, monkeypatch):
    tokenizer, seen = make(pipeline_folder, span=[0.5, 0.6]), []
    pipeline = tokenizer.pipeline()
    real = pipeline.say
    monkeypatch.setattr(pipeline, "say", lambda x, t, states: seen.append(t) or real(x, t, states))
    for step in range(5):
        tokenizer.loss({"images": images}, step)
    levels, timesteps = torch.cat(seen), pipeline.process.timesteps
    assert levels.min() >= 0.5 * timesteps and levels.max() < 0.6 * timesteps and len(levels.unique()) > 3


@pytest.mark.parametrize("trained", [False, True])
def test_frozen_tensors_are_bit_identical_after_training(pipeline_folder, tower_folder, images, trained):
    tokenizer = make(pipeline_folder, backbone=str(tower_folder), train_backbone=trained)
    pipeline = tokenizer.pipeline()
    before = checkpoint.state_hash(pipeline.state_dict())
    changed = train(tokenizer, images)
    assert not pipeline.training and not any(module.training for module in pipeline.modules())
    assert checkpoint.state_hash(pipeline.state_dict()) == before
    own = {name for name, _ in tokenizer.named_parameters() if trained or not name.startswith("backbone.")}
    still = {name for name in own if name.endswith("key.bias")}  # it moves all scores of a query alike
    assert changed - still == own - still
    assert tokenizer.backbone.training is False


def test_one_hot_words_are_the_plain_text_encoder(pipeline_folder):
    pipeline = open_text_to_image(str(pipeline_folder))
    codes = torch.randint(pipeline.vocab_size - 2, (4, 6), generator=torch.Generator().manual_seed(0))
    ids = pipeline.frame(codes)
    one_hot = torch.nn.functional.one_hot(codes, pipeline.vocab_size).float()
    with torch.no_grad():
        plain = pipeline.encode(ids)
        assert torch.equal(pipeline.encode(ids, one_hot), plain)
        assert torch.equal(pipeline.encode(ids.clone().index_fill_(1, torch.arange(1, 7), 0), one_hot), plain)
        assert torch.equal(pipeline.encode(ids), plain)  # no hook is left
        assert not torch.equal(pipeline.encode(ids, one_hot.roll(1, 2)), plain)


def test_the_loss_is_the_pipelines_own(pipeline_folder, images):
    """With words that are certain, soft words are the codes, and both differences vanish."""
    tokenizer = make(pipeline_folder, vocab="word_final")
    with torch.no_grad():
        tokenizer.head.bias.copy_(200 * torch.randn(len(tokenizer.head.bias)))
        tokenizer.head.weight.zero_()
    torch.manual_seed(3)
    loss, parts = tokenizer.loss({"images": images}, 100)
    assert parts["gap"].abs() < 1e-6 and parts["rounding"].abs() < 1e-6
    pipeline = tokenizer.pipeline()
    states = pipeline.encode(pipeline.ids(tokenizer.to_text(tokenizer.encode(images))))
    torch.manual_seed(3)
    soft = torch.nn.functional.gumbel_softmax(tokenizer.logits(images), tau=0.3)
    assert soft.amax(-1).min() > 0.999
    small = scaled(images, pipeline.image_size)
    torch.testing.assert_close(loss, pipeline.denoising_loss(small, states).mean(), rtol=1e-4, atol=0)


# ---- learning

COLOURS = {"red": (1, 0, 0), "blue": (0, 0, 1), "green": (0, 1, 0), "yellow": (1, 1, 0)}
FLAT = {
    **TINY,
    "tokenizer": {"words": ["a", "thing", *COLOURS], "length": 8},
    "text_encoder": {**TINY["text_encoder"], "num_hidden_layers": 1},
    "unet": {**TINY["unet"], "sample_size": 4, "block_out_channels": [16], "norm_num_groups": 4,
             "down_block_types": ["CrossAttnDownBlock2D"], "mid_block_type": None,
             "up_block_types": ["CrossAttnUpBlock2D"]},
}  # fmt: skip


def flat(count, seed):
    """Pictures of one colour each, and its name."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(COLOURS), (count,), generator=generator)
    light = 0.8 + 0.2 * torch.rand(count, 1, 1, 1, generator=generator)
    images = light * torch.tensor(list(COLOURS.values()))[index].float()[:, :, None, None].expand(-1, -1, 4, 4)
    return images, [list(COLOURS)[i] for i in index]


def descend(module, loss, steps, lr):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr)
    module.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    return module.eval()


def painter(steps):
    """A pipeline that has learnt to draw from captions for so many steps."""
    torch.manual_seed(0)
    pipeline = new_text_to_image(FLAT)

    def loss(step):
        images, names = flat(16, step)
        texts = [("a {}", "{}", "a {} thing")[i % 3].format(name) for i, name in enumerate(names)]
        return pipeline.denoising_loss(images, pipeline.encode(pipeline.ids(texts))).mean()

    return descend(pipeline, loss, steps, 4e-3)


def described(pipeline, steps=100):
    """Pictures never trained on, their names, and a tokenizer that learnt from other pictures alone."""
    torch.manual_seed(0)
    backbone = {"model_type": "dinov2", **TOWER, "image_size": 4, "patch_size": 2, "num_hidden_layers": 1}
    tokenizer = DeDiffusionTokenizer(
        backbone=backbone, train_backbone=True, rows=pipeline.vocab_size, tokens=2, width=32, depth=1, heads=2,
        vocab="word_final", words=["a", "thing", *COLOURS], anneal_steps=steps, image_size=4,
    )  # fmt: skip
    tokenizer.take_pipeline(pipeline)
    descend(tokenizer, lambda step: tokenizer.loss({"images": flat(16, 1000 + step)[0]}, step)[0], steps, 3e-3)
    return (*flat(128, 5000), tokenizer)


def test_pictures_alone_teach_it_the_words_that_the_generator_knows():
    """The loss under its words is below that under another picture's, and the words are those of captions it never
    saw; through an untrained generator neither holds."""
    found = {}
    for arm, steps in (("trained", 150), ("untrained", 0)):
        pipeline = painter(steps)
        images, names, tokenizer = described(pipeline)
        texts = tokenizer.to_text(tokenizer.encode(images))
        generator = torch.Generator().manual_seed(0)
        t = torch.randint(1000, (128,), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        arms = {"true": names, "own": texts, "shuffled": texts[1:] + texts[:1], "empty": [""] * 128}
        with torch.no_grad():
            losses = {
                name: pipeline.denoising_loss(images, pipeline.encode(pipeline.ids(some)), t, noise).mean().item()
                for name, some in arms.items()
            }
        hits = sum(name in text.split() for name, text in zip(names, texts, strict=True)) / 128
        others = sum(name in text.split() for name, text in zip(names, texts[1:] + texts[:1], strict=True)) / 128
        found[arm] = (losses, hits, others)
        print(arm, {k: round(v, 3) for k, v in losses.items()}, f"named {hits:.0%}, of another {others:.0%}", texts[:4])
    losses, hits, others = found["trained"]
    assert losses["own"] < 0.5 * min(losses["shuffled"], losses["empty"])
    assert hits > others + 0.3
    losses, hits, others = found["untrained"]
    assert losses["own"] > 0.95 * losses["shuffled"] and hits < others + 0.15


# ---- words


def data(*parts):
    if "UNITOK_DATA" not in os.environ:
        pytest.skip("UNITOK_DATA is not set: no real text tokenizers")
    return Path(os.environ["UNITOK_DATA"], "tokenizers", *parts)


def clip_words():
    """OpenAI's table of merges as a tokenizer of transformers: bytes, bytes at the end of a word, merges, specials."""
    packed = data("clip_bpe", "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{c}</w>" for c in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=77)


def rate(words, vocab, count=1000, length=75):
    """Of random texts of allowed tokens the share that is read as the same ids again."""
    pool = allowed_tokens(words, len(words), vocab).nonzero().flatten()
    drawn = pool[torch.randint(len(pool), (count, length), generator=torch.Generator().manual_seed(0))].tolist()
    read = words(texts_of(drawn, words), add_special_tokens=False, verbose=False)["input_ids"]
    return sum(a == b for a, b in zip(drawn, read, strict=True)) / count


def test_whole_words_of_clip_are_read_as_they_were_written():
    words = clip_words()
    counts = {vocab: int(allowed_tokens(words, len(words), vocab).sum()) for vocab in ("paper", "word_final")}
    paper, final = rate(words, "paper"), rate(words, "word_final")
    print(f"CLIP: {counts} of {len(words)}; texts read as the same ids: paper {paper:.1%}, word_final {final:.1%}")
    assert final == 1 and paper < 0.1
    assert 0.94 < counts["paper"] / len(words) < 0.96  # 4.9 % of the tokens have neither letter nor digit
    ids = {token: i for token, i in words.get_vocab().items() if token.endswith("</w>") and token[:-4].isascii()}
    # every word of letters, but for capitals, which the tokenizer makes small
    letters = {i for token, i in ids.items() if token[:-4].isalpha() and token.islower()}
    assert len(letters) == 32_875 and allowed_tokens(words, len(words), "word_final")[sorted(letters)].all()


def test_whole_words_of_sentencepiece_are_read_as_they_were_written(tmp_path):
    """T5's kind of text tokenizer, where a word begins with its space; its table has more rows than it has tokens."""
    shutil.copy(data("spm_torchtune_unigram", "sentencepiece.model"), tmp_path / "spiece.model")
    words = T5Tokenizer.from_pretrained(tmp_path, extra_ids=0)
    assert not allowed_tokens(words, 32128, "paper")[len(words) :].any()
    paper, final = rate(words, "paper"), rate(words, "word_final")
    print(f"unigram: texts read as the same ids: paper {paper:.1%}, word_final {final:.1%}")
    assert final == 1 and paper < 0.9


def test_words_of_the_generator_are_read_as_they_were_written(pipeline_folder):
    tokenizer = make(pipeline_folder, vocab="word_final")
    words = tokenizer.pipeline().tokenizer
    paper, final = rate(words, "paper", length=6), rate(words, "word_final", length=6)
    print(f"small BPE: texts read as the same ids: paper {paper:.1%}, word_final {final:.1%}")
    assert final == 1 and paper < 0.5
    assert tokenizer.retokenizes and not make(pipeline_folder, vocab="paper").retokenizes


@pytest.mark.parametrize("vocab", ["paper", "word_final"])
def test_forbidden_words_never_come_out(pipeline_folder, images, vocab):
    tokenizer = make(pipeline_folder, vocab=vocab)
    words = tokenizer.pipeline().tokenizer
    assert not tokenizer.allowed[words.all_special_ids].any() and 0 < tokenizer.allowed.sum() < len(tokenizer.allowed)
    with torch.no_grad():
        tokenizer.head.bias.copy_(torch.where(tokenizer.allowed, 0.0, 100.0))  # it wants nothing else
    codes = tokenizer.encode(images)
    assert tokenizer.allowed[codes].all()
    assert all(c.isalnum() for text in tokenizer.to_text(codes) for c in text.replace(" ", ""))
    train(tokenizer, images, 1)
    assert tokenizer.allowed[tokenizer.encode(images)].all()


def test_texts_are_read_as_their_codes(pipeline_folder, images):
    tokenizer = make(pipeline_folder, vocab="word_final")
    codes = tokenizer.encode(images)
    texts = tokenizer.to_text(codes)
    assert tokenizer.from_text(texts) == codes.tolist()
    assert tokenizer.to_text(torch.tensor(tokenizer.from_text(texts))) == texts
    pipeline = tokenizer.pipeline()
    assert torch.equal(pipeline.ids(texts), pipeline.frame(codes).cpu())


# ---- temperature


def test_the_temperature_falls_exponentially_and_stays(pipeline_folder, images):
    tokenizer = make(pipeline_folder, temperature=(2.0, 0.3), anneal_steps=100)
    assert [tokenizer.tau(s) for s in (0, 50, 100, 200)] == pytest.approx([2, 2 * 0.15**0.5, 0.3, 0.3])
    assert tokenizer.loss({"images": images}, 50)[1]["temperature"].item() == pytest.approx(tokenizer.tau(50))


def test_the_gap_is_between_words_and_soft_words_at_the_same_levels_and_noise(pipeline_folder, images, monkeypatch):
    tokenizer = make(pipeline_folder)
    pipeline, calls = tokenizer.pipeline(), []
    plain = pipeline.denoising_loss

    def recorded(*given):
        calls.append((given, plain(*given)))
        return calls[-1][1]

    monkeypatch.setattr(pipeline, "denoising_loss", recorded)
    loss, parts = tokenizer.loss({"images": images}, 0)
    ((pixels, _, t, noise, _), soft), ((pixels2, states, t2, noise2, _), hard) = calls
    assert torch.equal(loss, soft.mean()) and len(hard) == 2
    for one, two in ((pixels, pixels2), (t, t2), (noise, noise2)):
        assert torch.equal(one[[0, 0]], two)
    with torch.no_grad():
        assert torch.equal(states[:1], pipeline.encode(pipeline.frame(tokenizer.encode(images[:1]))))
    assert torch.equal(parts["gap"], hard[0] - soft[0]) and torch.equal(parts["rounding"], hard[1] - soft[0])
    assert parts["gap"].abs() > 1e-5  # it is there while the words are soft


# ---- the folder


def test_a_saved_folder_needs_no_pipeline(pipeline_folder, images, tmp_path):
    shutil.copytree(pipeline_folder, tmp_path / "pipeline")
    tokenizer = make(tmp_path / "pipeline").eval()
    tokenizer.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "pipeline")
    loaded = load_tokenizer(tmp_path / "saved")
    codes = tokenizer.encode(images)
    assert torch.equal(loaded.encode(images), codes) and loaded.to_text(codes) == tokenizer.to_text(codes)
    assert loaded.from_text(loaded.to_text(codes)) == tokenizer.from_text(tokenizer.to_text(codes))
    with pytest.raises(ValueError, match="no such folder"):
        loaded.loss({"images": images}, 0)
    shutil.copytree(pipeline_folder, tmp_path / "pipeline")
    torch.manual_seed(0)
    loss, _ = loaded.loss({"images": images}, 0)
    torch.manual_seed(0)
    assert torch.equal(loss, tokenizer.loss({"images": images}, 0)[0])


def test_another_pipeline_under_the_same_name_is_refused(pipeline_folder, images, tmp_path):
    shutil.copytree(pipeline_folder, tmp_path / "pipeline")
    make(tmp_path / "pipeline").save_pretrained(tmp_path / "saved")
    other = open_text_to_image(str(pipeline_folder))
    with torch.no_grad():
        next(other.parameters()).add_(1)
    shutil.rmtree(tmp_path / "pipeline")
    other.save(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="not the pipeline that this tokenizer saw in training"):
        load_tokenizer(tmp_path / "saved").loss({"images": images}, 0)


def test_a_backbone_is_kept_by_name_and_hash_or_copied(pipeline_folder, tower_folder, images, tmp_path):
    by_name = make(pipeline_folder, backbone=str(tower_folder)).eval()
    copied = make(pipeline_folder, backbone=str(tower_folder), copy_backbone=True).eval()
    codes = by_name.encode(images)
    assert torch.equal(copied.encode(images), codes)
    by_name.save_pretrained(tmp_path / "named")
    copied.save_pretrained(tmp_path / "copied")
    assert torch.equal(load_tokenizer(tmp_path / "named").encode(images), codes)
    Dinov2Model(Dinov2Config(**TOWER)).save_pretrained(tower_folder)
    with pytest.raises(ValueError, match="its backbone is not the one it was made with"):
        load_tokenizer(tmp_path / "named")
    shutil.rmtree(tower_folder)
    loaded = load_tokenizer(tmp_path / "copied")
    assert torch.equal(loaded.encode(images), codes)
    assert not any(p.requires_grad for p in loaded.backbone.parameters())


def test_what_cannot_be_is_said(pipeline_folder):
    with pytest.raises(ValueError, match="cannot have pipeline = None"):
        DeDiffusionTokenizer(backbone={"model_type": "dinov2", **TOWER})
    for name, value in (("vocab", "all"), ("temperature", (1.0,)), ("heads", 5), ("tokens", 0), ("span", (0.9, 0.4))):
        with pytest.raises(ValueError, match="dediffusion cannot have"):
            make(pipeline_folder, **{name: value})
    with pytest.raises(ValueError, match="'purple' is not one token of the paper vocabulary"):
        make(pipeline_folder, words=["red", "purple"])
    with pytest.raises(ValueError, match="words of .* rows, this dediffusion tokenizer has tokens = 1000"):
        make(pipeline_folder, tokens=1000)
