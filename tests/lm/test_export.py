"""Export: stock transformers loads the folder with no code of ours; strings have the ids of their rows."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unitok.checkpoint import save_weights, write_json
from unitok.lm.adapters import add_adapter, load_adapter, save_adapter
from unitok.lm.expand import expand_folder, open_lm
from unitok.lm.export import add_token_strings, export
from unitok.lm.text import text_tokenizer_hash
from unitok.manifest import FILE, Manifest
from unitok.vocab import JointVocab

# Runs elsewhere, where `import unitok` is an error: the largest logit difference of every folder.
LOADER = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "unitok":
            raise ImportError("unitok is not here")
sys.meta_path.insert(0, Blocked())
try:
    import unitok
except ImportError:
    pass
else:
    sys.exit("unitok was imported")
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in sys.argv[1:]:
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    probe = load_file(folder + ".probe.safetensors")
    with torch.no_grad():
        difference = (lm(input_ids=probe["ids"]).logits - probe["logits"]).abs().max().item()
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    found[folder] = [difference, tied, len(AutoTokenizer.from_pretrained(folder)), type(lm).__module__.split(".")[0]]
print(json.dumps(found))
"""


@pytest.fixture
def model_folder(tiny, lm_folder, tmp_path):
    """Callable: (family, tied) -> a model folder, its vocabulary."""

    def make(family="llama", tied=True, name="scenes"):
        tokenizer = tiny.tokenizer_folder(tmp_path / f"tokenizer_{family}_{tied}")
        folder = expand_folder(lm_folder(family, tied), tokenizer, tmp_path / f"model_{family}_{tied}", name=name)
        return folder, JointVocab.from_dict(Manifest.load(folder).vocab)

    return make


def adapter_folder(model, vocab, out):
    """An adapter with every weight moved."""
    peft_model = add_adapter(open_lm(model), vocab, rank=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty(parameter.shape).normal_(generator=generator), alpha=0.1)
    return save_adapter(peft_model, out, Manifest.load(model), base=model)


def test_stock_transformers_loads_every_export_without_unitok(tiny, model_folder, tmp_path):
    expected = {}
    for family, tied in (("llama", True), ("llama", False), ("gpt2", True), ("phi", False)):
        model, vocab = model_folder(family, tied)
        adapter = adapter_folder(model, vocab, tmp_path / f"adapter_{family}_{tied}")
        ids = tiny.ids(vocab.rows)
        plain, adapted = tiny.logits(open_lm(model), ids), tiny.logits(load_adapter(adapter), ids)
        assert not torch.allclose(plain, adapted, atol=0.1)
        for source, strings, logits in ((model, False, plain), (adapter, True, adapted)):
            out = export(source, tmp_path / "out" / source.name, token_strings=strings)
            save_weights(f"{out}.probe.safetensors", {"ids": ids, "logits": logits})
            expected[str(out)] = (tied, vocab.rows if strings else 51)

    command = [sys.executable, "-c", LOADER, *expected]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found.keys() == expected.keys()
    for out, (difference, tied, length, origin) in found.items():
        assert difference < 1e-5
        assert (tied, length) == expected[out]
        assert origin == "transformers"


def test_the_text_tokenizer_and_the_manifest_stay_as_they_were(model_folder, tmp_path):
    model, _ = model_folder()
    out = export(model, tmp_path / "out")
    for file in ("tokenizer.json", "tokenizer_config.json", FILE):
        assert (out / file).read_bytes() == (model / file).read_bytes()
    assert (out / "image_tokenizers").is_dir()  # unitok.load opens an export as well
    with pytest.raises(ValueError, match="not empty"):
        export(model, out)


def test_token_strings_have_the_ids_of_their_rows(tiny, model_folder, tmp_path):
    model, vocab = model_folder()
    out = export(model, tmp_path / "out", token_strings=True)
    before, after = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(out)
    assert len(after) == vocab.rows == AutoModelForCausalLM.from_pretrained(out).config.vocab_size

    codes = torch.arange(16).numpy() * 2
    block = vocab.to_ids(codes)
    image = "<scenes_begin>" + "".join(f"<scenes_{c}>" for c in codes) + "<scenes_end>"
    text = "a cat on 1, 2."
    plain = {"add_special_tokens": False}
    assert after(text, **plain).input_ids == before(text, **plain).input_ids
    assert after(text + image, **plain).input_ids == before(text, **plain).input_ids + block.tolist()
    assert after.decode(block, skip_special_tokens=True).replace(" ", "") == image[14:-12]
    assert after.decode(block).replace(" ", "") == image
    assert after.convert_ids_to_tokens([60, vocab.rows - 1]) == ["<unused_60>", "<scenes_39>"]
    special = {row for row, token in after.added_tokens_decoder.items() if token.special and row >= 51}
    assert special == set(range(51, vocab.rows)) - set(vocab.images["scenes"].codebooks[0].ids)

    manifest = Manifest.load(out)
    assert manifest.text_tokenizer["hash"] == text_tokenizer_hash(after) != Manifest.load(model).text_tokenizer["hash"]


def test_several_tokenizers_and_codebooks_have_names_of_their_own(text_tokenizer, tmp_path):
    text_tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    vocab = JointVocab(text_rows=60, images={}).add("a", [5], (2, 2)).add("b", [3, 4], (2, 2, 2))
    add_token_strings(tokenizer, vocab)
    assert len(tokenizer) == vocab.rows
    for string, row in {
        "<a_4>": vocab.images["a"].codebooks[0].ids[4],
        "<b_0_2>": vocab.images["b"].codebooks[0].ids[2],
        "<b_1_0>": vocab.images["b"].codebooks[1].ids[0],
        "<b_mask>": vocab.images["b"].control["mask"],
    }.items():
        assert tokenizer.convert_tokens_to_ids(string) == row
    ambiguous = JointVocab(text_rows=vocab.rows, images={}).add("c", [3, 4], (2, 2, 2)).add("c_0", [3], (2, 2))
    for again in (JointVocab(text_rows=vocab.rows, images={}).add("a", [5], (2, 2)), ambiguous):
        with pytest.raises(ValueError, match="there is already a token"):
            add_token_strings(tokenizer, again)


def test_a_real_model_can_be_exported_with_strings(tiny, stories, tmp_path):
    model = expand_folder(stories, tiny.tokenizer_folder(tmp_path / "tokenizer"), tmp_path / "model", name="scenes")
    out = export(model, tmp_path / "out", token_strings=True)
    before, after = AutoTokenizer.from_pretrained(stories), AutoTokenizer.from_pretrained(out)
    rows = JointVocab.from_dict(Manifest.load(model).vocab)
    assert len(after) == rows.rows
    story = "Once upon a time, there was a café with 3 dogs.\n"
    plain = {"add_special_tokens": False}
    assert after(story, **plain).input_ids == before(story, **plain).input_ids
    first = rows.images["scenes"].codebooks[0].ids[0]
    assert after("<scenes_0><scenes_1><scenes_2>", **plain).input_ids == [first, first + 1, first + 2]


def test_what_is_no_model_folder_is_refused_in_one_line(tiny, lm_folder, tmp_path):
    tokenizer, damaged = tiny.tokenizer_folder(tmp_path / "tokenizer"), tmp_path / "damaged"
    damaged.mkdir()
    write_json(damaged / "config.json", {"model_type": "no_such_model"})
    for folder in (lm_folder(), tokenizer, damaged, tmp_path / "nowhere"):
        with pytest.raises((ValueError, FileNotFoundError), match=r"\A[^\n]+\Z"):
            export(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
