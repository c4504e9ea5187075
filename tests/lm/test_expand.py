"""Expansion: old logits keep their exact values on any causal LM, new rows start sensibly, folders are complete."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.models.bert import BertConfig, BertForMaskedLM
from transformers.models.t5 import T5Config, T5ForConditionalGeneration

from unitok.checkpoint import load_weights, save_weights
from unitok.lm.expand import expand, expand_folder, new_rows, open_lm
from unitok.lm.text import text_tokenizer_hash
from unitok.manifest import Manifest
from unitok.vocab import JointVocab

FAMILIES = ("llama", "gpt2", "qwen3", "gemma3", "phi")
ONE_LINE = r"\A[^\n]+\Z"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_old_logits_are_exactly_equal(tiny, family, tied, text_tokenizer, tmp_path):
    lm, ids = tiny.lm(family, tied), tiny.ids(tiny.rows)
    before, generation = tiny.logits(lm, ids), lm.generation_config.to_dict()
    vocab = expand(lm, text_tokenizer, None, "scenes", tiny.section(1000))
    after = tiny.logits(lm, ids)
    assert torch.equal(after[..., : tiny.rows], before)
    assert after.shape[-1] == vocab.rows == lm.config.vocab_size == tiny.rows + 11 + 1000
    assert vocab.text_rows == tiny.rows  # padding rows belong to the base
    assert (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == tied
    assert lm.generation_config.to_dict() == generation

    lm.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    mixed = tiny.ids(vocab.rows)
    assert torch.equal(tiny.logits(stock, mixed), tiny.logits(lm, mixed))
    assert (stock.get_output_embeddings().weight is stock.get_input_embeddings().weight) == tied


def test_a_model_with_tables_of_its_own_goes_through_its_own_resize(tiny, text_tokenizer):
    class WithTable(LlamaForCausalLM):
        def resize_token_embeddings(self, rows=None, pad_to_multiple_of=None, mean_resizing=True):
            self.table = nn.Embedding(rows, 2)
            return super().resize_token_embeddings(rows, pad_to_multiple_of, mean_resizing)

    plain, own = tiny.lm("llama", False), WithTable(tiny.lm("llama", False).config)
    own.load_state_dict(plain.state_dict())
    vocab = expand(plain, text_tokenizer, None, "scenes", tiny.section(50))
    expand(own, text_tokenizer, None, "scenes", tiny.section(50))
    assert own.table.num_embeddings == vocab.rows
    ids = tiny.ids(vocab.rows)
    assert torch.equal(tiny.logits(own.eval(), ids), tiny.logits(plain, ids))


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_have_the_statistics_of_the_trained_text_rows(tiny, tied, text_tokenizer):
    lm, used = tiny.lm("llama", tied), len(text_tokenizer)
    with torch.no_grad():
        for end in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            end.weight.mul_(torch.linspace(0.5, 3, 32)).add_(torch.linspace(-1, 1, 32))
            end.weight[used:] = 1e3  # padding rows hold anything
    vocab = expand(lm, text_tokenizer, None, "scenes", tiny.section(20_000))
    for end in (lm.get_input_embeddings(), lm.get_output_embeddings()):
        old, new = end.weight[:used].detach(), end.weight[tiny.rows :].detach()
        assert torch.allclose(new.mean(0), old.mean(0), atol=0.05 * old.std(0).max().item())
        assert torch.allclose(new.std(0), old.std(0, correction=0), rtol=0.05)
    assert new_rows(vocab) == list(range(tiny.rows, vocab.rows)) == new_rows(vocab, "scenes")


def test_a_new_bias_is_the_mean_of_the_old(tiny, text_tokenizer):
    lm = tiny.lm("phi", False)
    old = lm.get_output_embeddings().bias.detach().clone()
    expand(lm, text_tokenizer, None, "scenes", tiny.section(50))
    new = lm.get_output_embeddings().bias.detach()
    assert torch.equal(new[: tiny.rows], old)
    assert torch.allclose(new[tiny.rows :], old[: len(text_tokenizer)].mean().expand(61))


def test_draws_depend_on_the_seed_and_not_on_threads(tiny, text_tokenizer):
    def rows(seed, threads):
        lm, before = tiny.lm("gpt2", False), torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            expand(lm, text_tokenizer, None, "scenes", tiny.section(3000), seed=seed)
        finally:
            torch.set_num_threads(before)
        return torch.stack(
            [lm.get_input_embeddings().weight[tiny.rows :], lm.get_output_embeddings().weight[tiny.rows :]]
        ).detach()

    first = rows(0, 1)
    assert torch.equal(first, rows(0, 3))
    assert not torch.equal(first, rows(1, 1))
    assert not torch.equal(first[0], first[1])  # the two ends do not share draws
    blocks = first[0][: 2 * 1024].split(1024)
    assert not torch.equal(*blocks)


@pytest.mark.parametrize("init, low, high", [("codebook", 0.8, 1), ("noise", -0.2, 0.2)])
def test_codebook_rows_keep_the_distances_of_the_codebook(tiny, init, low, high, text_tokenizer):
    vectors = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    lm = tiny.lm("llama", True)
    vocab = expand(lm, text_tokenizer, None, "s", tiny.section(200), init=init, codebook_vectors=[vectors])
    weight = lm.get_input_embeddings().weight.detach()
    rows = weight[torch.tensor(vocab.images["s"].codebooks[0].ids)]
    pairs = torch.stack([torch.pdist(vectors), torch.pdist(rows)])
    assert low < torch.corrcoef(pairs)[0, 1] < high
    assert torch.allclose(rows.std(0), weight[: len(text_tokenizer)].std(0), rtol=0.25)


def test_codebook_vectors_must_fit(tiny, text_tokenizer):
    for vectors in (None, [torch.zeros(3, 8)], [torch.zeros(200, 8), torch.zeros(200, 8)]):
        with pytest.raises(ValueError, match="codebook_vectors, one"):
            expand(
                tiny.lm("llama", True), None, None, "s", tiny.section(200), init="codebook", codebook_vectors=vectors
            )


@pytest.mark.parametrize("tied", [True, False])
def test_expanding_again_leaves_the_first_tokenizer_alone(tiny, tied, text_tokenizer):
    lm = tiny.lm("llama", tied)
    first = expand(lm, text_tokenizer, None, "a", tiny.section(100))
    ids = tiny.ids(first.rows)
    before = tiny.logits(lm, ids)
    second = expand(lm, text_tokenizer, first, "b", tiny.section(7, 9, grid=(2, 2, 2)))
    assert torch.equal(tiny.logits(lm, ids)[..., : first.rows], before)
    assert second.images["a"] == first.images["a"] and second.text_rows == tiny.rows
    assert new_rows(second, "b") == list(range(first.rows, second.rows))
    with pytest.raises(ValueError, match="'b'"):
        expand(lm, text_tokenizer, second, "b", tiny.section(10))
    with pytest.raises(ValueError, match="do not belong together"):
        expand(lm, text_tokenizer, first, "c", tiny.section(10))


def test_a_text_tokenizer_with_more_ids_than_rows_is_refused(tiny, text_tokenizer):
    lm = tiny.lm("llama", True)
    lm.resize_token_embeddings(20, mean_resizing=False)
    with pytest.raises(ValueError, match="only 20 rows"):
        expand(lm, text_tokenizer, None, "scenes", tiny.section(100))


def test_models_that_are_not_causal_are_refused_in_one_line(tiny, tmp_path, text_tokenizer):
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=tiny.rows,
            **{k: 32 for k in ("hidden_size", "intermediate_size")},
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=tiny.rows, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    )
    tokenizer = tiny.tokenizer_folder(tmp_path / "tokenizer")
    for name, model in {"bert": bert, "t5": t5}.items():
        model.save_pretrained(tmp_path / name)
        text_tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=ONE_LINE) as error:
            expand_folder(tmp_path / name, tokenizer, tmp_path / "out")
        assert "not a causal language model" in str(error.value) and name in str(error.value)
        assert not (tmp_path / "out").exists()


def test_missing_weights_are_not_replaced_by_random_ones(tiny, lm_folder):
    folder = lm_folder("llama", False)
    state = load_weights(folder / "model.safetensors")
    save_weights(folder / "model.safetensors", {k: v for k, v in state.items() if "layers.1." not in k})
    with pytest.raises(ValueError, match=r"lack model\.layers\.1\."):
        open_lm(folder)


@pytest.mark.parametrize("family, tied", [("llama", True), ("gpt2", False)])
def test_folder_holds_all_a_model_needs(tiny, family, tied, lm_folder, tmp_path, text_tokenizer):
    base, out = lm_folder(family, tied), tmp_path / "model"
    tokenizer = tiny.tokenizer_folder(tmp_path / "tokenizer")
    expand_folder(base, tokenizer, out, name="scenes", template={"question": "Q: {question} A:"})

    lm, ids = AutoModelForCausalLM.from_pretrained(out).eval(), tiny.ids(tiny.rows)
    assert torch.equal(tiny.logits(lm, ids)[..., : tiny.rows], tiny.logits(tiny.lm(family, tied), ids))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (base / file).read_bytes()
    manifest = Manifest.load(out)
    assert manifest.tokenizers == {"scenes": tiny.section(40)}
    assert JointVocab.from_dict(manifest.vocab).rows == lm.config.vocab_size
    assert manifest.text_tokenizer["hash"] == text_tokenizer_hash(AutoTokenizer.from_pretrained(out))
    assert manifest.template == {"question": "Q: {question} A:"} and manifest.licences == ["pictures: CC0"]
    copied = {p.relative_to(out / "image_tokenizers").as_posix() for p in (out / "image_tokenizers").rglob("*.*")}
    assert copied == {f"scenes/{f}" for f in ("config.json", "model.safetensors", "unitok.json", "assets/words.txt")}

    again = tmp_path / "again"
    expand_folder(out, tiny.tokenizer_folder(tmp_path / "other", grid=(2, 2)), again, name="other")
    both, more = Manifest.load(again), AutoModelForCausalLM.from_pretrained(again).eval()
    assert both.check(manifest) == [] and list(both.tokenizers) == ["scenes", "other"]
    ids = tiny.ids(lm.config.vocab_size)
    assert torch.equal(tiny.logits(more, ids)[..., : lm.config.vocab_size], tiny.logits(lm, ids))
    assert sorted(p.name for p in (again / "image_tokenizers").iterdir()) == ["other", "scenes"]

    for arguments, reason in (
        ((out, tokenizer, tmp_path / "x", "scenes"), "already has"),
        ((base, tokenizer, out), "not empty"),
    ):
        with pytest.raises(ValueError, match=reason):
            expand_folder(*arguments)


def test_same_seed_same_folder_and_another_base_another_hash(tiny, lm_folder, tmp_path):
    base, tokenizer = lm_folder(), tiny.tokenizer_folder(tmp_path / "tokenizer")
    folders = [expand_folder(base, tokenizer, tmp_path / f"m{i}", seed=3) for i in range(2)]
    first, second = (folder / "model.safetensors" for folder in folders)
    assert first.read_bytes() == second.read_bytes()
    other = tmp_path / "finetuned"
    lm = tiny.lm("llama", True, seed=1)
    lm.save_pretrained(other)
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    third = expand_folder(other, tokenizer, tmp_path / "m2")
    with pytest.raises(ValueError, match=r"base\.weight_hash"):
        Manifest.load(folders[0]).check(Manifest.load(third))


def test_the_checkpoints_own_dtype_is_kept(tiny, lm_folder, tmp_path):
    base = lm_folder()
    tiny.lm("llama", True).bfloat16().save_pretrained(base)
    out = expand_folder(base, tiny.tokenizer_folder(tmp_path / "tokenizer"), tmp_path / "model")
    assert {v.dtype for v in load_weights(out / "model.safetensors").values()} == {torch.bfloat16}


def test_a_tokenizer_that_speaks_in_words_adds_no_rows(tiny, lm_folder, tmp_path):
    tokenizer = tiny.tokenizer_folder(tmp_path / "tokenizer", name="words", vocabulary="text")
    out = expand_folder(lm_folder(), tokenizer, tmp_path / "model")
    manifest = Manifest.load(out)
    vocab = JointVocab.from_dict(manifest.vocab)
    assert "words" in manifest.tokenizers and vocab.rows == tiny.rows and not vocab.images
    assert new_rows(vocab) == []


def test_folders_that_are_something_else_are_refused_in_one_line(tiny, lm_folder, tmp_path):
    base, tokenizer = lm_folder(), tiny.tokenizer_folder(tmp_path / "tokenizer")
    empty = tmp_path / "empty"
    empty.mkdir()
    bare = tmp_path / "bare"
    tiny.lm("llama", True).save_pretrained(bare)
    for llm, image_tokenizer in (
        (tokenizer, tokenizer),
        (empty, tokenizer),
        (bare, tokenizer),
        (base, base),
        (base, empty),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=ONE_LINE):
            expand_folder(llm, image_tokenizer, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_hash_of_a_text_tokenizer_is_that_of_its_behaviour(tiny, text_tokenizer, tmp_path):
    text_tokenizer.save_pretrained(tmp_path)
    same = AutoTokenizer.from_pretrained(tmp_path)
    assert text_tokenizer_hash(same) == text_tokenizer_hash(text_tokenizer)
    same.add_tokens(["cats"])
    assert text_tokenizer_hash(same) != text_tokenizer_hash(text_tokenizer)


def test_a_real_model_writes_the_same_story(tiny, stories, tmp_path):
    out = expand_folder(stories, tiny.tokenizer_folder(tmp_path / "tokenizer"), tmp_path / "model")
    text = AutoTokenizer.from_pretrained(out)
    ids = text("Once upon a time", return_tensors="pt", add_special_tokens=False).input_ids
    start = torch.cat([torch.tensor([[1]]), ids], dim=1)
    stories_lm, lm = open_lm(stories), open_lm(out)
    assert torch.equal(tiny.logits(lm, start)[..., :512], tiny.logits(stories_lm, start))
    only_text = list(range(512, lm.config.vocab_size))
    told = lm.generate(start, max_new_tokens=20, do_sample=False, suppress_tokens=only_text)
    assert torch.equal(told, stories_lm.generate(start, max_new_tokens=20, do_sample=False))
    assert "there was a little girl" in text.decode(told[0])


def test_a_folder_made_by_a_real_image_tokenizer(tiny, lm_folder, tmp_path):
    from unitok.tokenizers.base import load_tokenizer
    from unitok.tokenizers.fsq import FSQTokenizer

    tokenizer = FSQTokenizer.tiny()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = expand_folder(lm_folder(), tmp_path / "tokenizer", tmp_path / "model")
    vocab = JointVocab.from_dict(Manifest.load(out).vocab)
    in_memory = expand(tiny.lm("llama", True), None, None, "fsq", tokenizer)
    assert vocab == in_memory
    loaded = load_tokenizer(out / "image_tokenizers" / "fsq")
    images = torch.rand(1, 3, loaded.image_size, loaded.image_size, generator=torch.Generator().manual_seed(0))
    codes = loaded.encode(images)
    assert torch.equal(codes, tokenizer.eval().encode(images))
    ids = vocab.to_ids(codes[0].numpy())
    assert ids.max() < open_lm(out).config.vocab_size
