"""Interrogator: the chain by CLIP's own numbers, planted phrases in a CLIP made by hand, captions, the folder."""

import itertools
import json
import shutil

import pytest
import torch
from transformers import BlipConfig, BlipForConditionalGeneration, CLIPModel

from unitok import load_tokenizer
from unitok.tokenizers.interrogator import InterrogatorTokenizer
from unitok.training.clip import preprocessor, text_tokenizer

WORDS = ("red", "green", "blue", "yellow", "purple", "cyan", "circle", "square", "triangle", "cross", "black", "white")


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(WORDS))
    return str(path)


@pytest.fixture
def pictures():
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def words(tmp_path):
    """A folder with the text tokenizer of scenes, as a CLIP has it: every text has an end."""
    text_tokenizer("builtin:scenes").save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


@pytest.fixture
def small(words):
    """tiny() with other arguments; its own phrases are gone with the file they came from."""

    def make(**more):
        torch.manual_seed(0)
        config = InterrogatorTokenizer.tiny().config
        torch.manual_seed(0)
        return InterrogatorTokenizer(**{**config, "text_tokenizer": words, **more}).eval()

    return make


@pytest.fixture
def words_of(words):
    """An interrogator whose CLIP embeds a text as the mean of its words' own directions, none of them like another."""
    size = 461
    text = {"vocab_size": size, "eos_token_id": size - 1, "bos_token_id": 1, "max_position_embeddings": 16}
    text |= {"hidden_size": 2 * size, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1}
    arguments = {"clip": {"text_config": text, "vision_config": vision, "projection_dim": size}}

    def make(**more):
        torch.manual_seed(0)
        made = InterrogatorTokenizer(**arguments, text_tokenizer=words, **more)
        for name, tensor in made.clip.text_model.named_parameters():
            is_scale = "layer_norm" in name and name.endswith("weight")
            tensor.data.fill_(1.0 if is_scale else 0.0)  # no queries: the end looks at all words alike
        # a word and its opposite: the mean over the two halves is 0, so that layer norms keep directions
        made.clip.text_model.embeddings.token_embedding.weight.data = torch.cat([torch.eye(size), -torch.eye(size)], 1)
        attention = made.clip.text_model.encoder.layers[0].self_attn
        attention.v_proj.weight.data = attention.out_proj.weight.data = torch.eye(2 * size)
        made.clip.text_projection.weight.data = torch.eye(size, 2 * size)
        made._phrases = list(WORDS)
        made.phrase_vectors = made.text_vectors(WORDS)
        return made.eval()

    return make


def test_similarity_is_clips_own_and_never_falls_after_the_forced_steps(pictures, table, small):
    made = small(phrases=table, forced=3, most=8)
    vectors = made.image_vectors(pictures)
    fell = False
    for vector in vectors:
        steps = made.chain(vector)
        found = [similarity for _, similarity in steps]
        assert 3 <= len(steps) <= 8
        assert all(b > a for a, b in itertools.pairwise(found[2:]))
        fell |= any(b <= a for a, b in itertools.pairwise(found[:3]))
        assert all(b.startswith(a + ", ") for (a, _), (b, _) in itertools.pairwise(steps))
        for text, similarity in steps:  # a plain CLIPModel says the same
            ids = made._words(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                read = made.clip.get_text_features(input_ids=ids).pooler_output[0]
            assert similarity == pytest.approx(torch.cosine_similarity(read, vector, dim=0).item(), abs=1e-5)
    assert fell  # forced steps are what can let it fall
    texts = made.to_text(made.encode(pictures))
    for text, vector in zip(texts, vectors, strict=True):  # the best text on the way is what is kept
        assert text == max(made.chain(vector), key=lambda step: step[1])[0]


def test_every_step_takes_the_best_of_all_phrases(pictures, table):
    made = InterrogatorTokenizer.tiny().eval()
    vector = made.image_vectors(pictures)[0]
    text = ""
    for step, similarity in made.chain(vector):
        tried = [f"{text}, {p}" if text else p for p in made._phrases if p not in text.split(", ")]
        assert similarity == pytest.approx((made.text_vectors(tried) @ vector).max().item(), abs=1e-6)
        assert step in tried
        text = step


def test_planted_phrases_are_recovered(words_of):
    made = words_of(forced=0, most=8)
    for planted in itertools.islice(itertools.combinations(WORDS, 3), 0, 220, 20):
        vector = made.text_vectors([", ".join(planted)])[0]
        text, similarity = made.chain(vector)[-1]
        assert sorted(text.split(", ")) == sorted(planted) and similarity == pytest.approx(1, abs=1e-4)
        shuffled = made.chain(vector.roll(1))  # another vector: nothing of the table is in it, or other words are
        assert not shuffled or sorted(shuffled[-1][0].split(", ")) != sorted(planted)


def test_a_shortlist_leaves_out_what_is_far(words_of):
    made = words_of(forced=3, most=8, shortlist=2)
    text, _ = made.chain(made.text_vectors(["red, circle"])[0])[-1]
    assert sorted(text.split(", ")) == ["circle", "red"]


def test_the_text_ends_where_clip_stops_reading(words_of):
    made = words_of(forced=12, most=12)
    assert made.tokens == 15
    steps = made.chain(made.text_vectors(["red"])[0])
    assert len(steps) == 8  # eight words and seven commas
    codes = torch.tensor([made._ids([steps[-1][0]])[0]])
    assert codes.shape == (1, 15) and made.to_text(codes) == [steps[-1][0]]
    long = made.chain(made.text_vectors(["red"])[0], " ".join(["circle"] * 40))
    assert long == [(" ".join(["circle"] * 15), long[0][1])]  # cut, and nothing fits behind it


def test_codes_are_what_clip_compares(words_of):
    made = words_of(forced=0, most=8)
    rows = made._ids(["red, circle", "blue"])
    codes = torch.tensor([row + [made._end] * (made.tokens - len(row)) for row in rows])
    assert made.to_text(codes) == ["red, circle", "blue"]
    torch.testing.assert_close(made.embed(codes)[:, 0], made.text_vectors(["red, circle", "blue"]))
    with pytest.raises(NotImplementedError, match="detokenizer"):
        made.decode(codes)


@pytest.fixture
def captioner(tmp_path):
    """A small BLIP of random weights that says words of scenes."""
    words = text_tokenizer("builtin:scenes")
    words.save_pretrained(tmp_path / "blip")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = words.eos_token_id
    text = {**sizes, "vocab_size": len(words), "encoder_hidden_size": 32, "bos_token_id": 1, "sep_token_id": end}
    vision = {**sizes, "image_size": 24, "patch_size": 8}
    torch.manual_seed(0)
    config = BlipConfig(text_config={**text, "pad_token_id": end, "eos_token_id": end}, vision_config=vision)
    BlipForConditionalGeneration(config).save_pretrained(tmp_path / "blip")
    return str(tmp_path / "blip")


def test_a_captioner_begins_the_text_and_is_never_made_worse(captioner, small, table):
    made = small(captioner=captioner, caption_tokens=4, phrases=table)
    assert made.image_size == 24  # the larger of the two: neither sees fewer pixels than it knows
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    captions = made.captions(images)
    codes = made.encode(images)
    assert all(captions) and torch.equal(made.encode(images[1:2]), codes[1:2])
    own = made.text_vectors(captions)
    vectors, texts = made.image_vectors(images), made.to_text(codes)
    assert all(text.startswith(caption) for text, caption in zip(texts, captions, strict=True))
    chosen = (made.embed(codes)[:, 0] * vectors).sum(1)
    assert (chosen >= (own * vectors).sum(1) - 1e-6).all()


def test_with_a_captioner_alone_the_text_is_the_caption(captioner, small):
    made = small(captioner=captioner, caption_tokens=4)
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    assert made.to_text(made.encode(images)) == made.captions(images)


def test_a_folder_keeps_phrases_and_names_the_clip(pictures, table, small, tmp_path):
    clip = tmp_path / "clip"
    small().clip.save_pretrained(clip)
    text_tokenizer("builtin:scenes").save_pretrained(clip)
    (clip / "preprocessor_config.json").write_text(json.dumps(preprocessor(16)))
    arguments = {"clip": str(clip), "phrases": [table], "forced": 1, "most": 3}
    made = InterrogatorTokenizer(**arguments).eval()
    codes = made.encode(pictures)
    made.save_pretrained(tmp_path / "saved")
    InterrogatorTokenizer(**arguments, copy_clip=True).eval().save_pretrained(tmp_path / "whole")
    kept = {path.name for path in (tmp_path / "saved" / "assets").iterdir()}
    assert kept >= {"phrases.txt", "frozen.json", "tokenizer.json"}
    assert set(made.own_state()) == {"phrase_vectors"}
    (tmp_path / "words.txt").unlink()  # the user's file need not be there any more
    loaded = load_tokenizer(tmp_path / "saved")
    assert torch.equal(loaded.encode(pictures), codes) and loaded.to_text(codes) == made.to_text(codes)
    CLIPModel(made.clip.config).save_pretrained(clip)  # another one under the same name
    with pytest.raises(ValueError, match="its clip is not the one it was made with"):
        load_tokenizer(tmp_path / "saved")
    shutil.rmtree(clip)
    assert torch.equal(load_tokenizer(tmp_path / "whole").encode(pictures), codes)


def test_what_does_not_fit_is_said(tmp_path, table, small, pictures):
    with pytest.raises(ValueError, match="nothing to say"):
        small().encode(pictures)
    with pytest.raises(ValueError, match="needs text_tokenizer"):
        small(text_tokenizer=None, phrases=table)
    with pytest.raises(ValueError, match=r"gone\.txt: cannot be read as a table of phrases"):
        small(phrases="gone.txt")
    with pytest.raises(ValueError, match="most of at least 1, got 0"):
        small(most=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no CLIP can be read"):
        InterrogatorTokenizer(clip=str(tmp_path / "empty"))
