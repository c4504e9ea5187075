"""The language model engine: its loss, its results, and that stopping, processes and batches do not change it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, set_seed

sys.path.insert(0, str(Path(__file__).parent))

from lm_fixture import documents, losses, model_folder, recipe, text_tokenizer, write_shards

from unitok.checkpoint import file_sha256, load_weights, read_json
from unitok.data.packing import IGNORE, collate
from unitok.data.render import Rendered, Template, null_parts, render
from unitok.data.schema import Document, codes_part, text_part
from unitok.data.shards import read_shards
from unitok.lm.adapters import add_adapter, load_adapter
from unitok.lm.expand import open_lm
from unitok.manifest import Manifest
from unitok.training.language_model import ChosenPositions, Step, lr_factor, step_loss, train
from unitok.training.mixture import read_mixture
from unitok.vocab import JointVocab

REPO = Path(__file__).parents[2]
QUIET = {"log": lambda line: None}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model_folder(folder / "model")
    write_shards(folder / "shards", documents(60))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """Model and shards, with an empty place for results."""
    for name in ("model", "shards"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def run(folder, changes, *more, launcher=(), **environment):
    fixture = str(Path(__file__).parent / "lm_fixture.py")
    program = [sys.executable, *launcher, fixture, str(folder), json.dumps(changes)]
    environment = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")}
    return subprocess.run([*program, *more], env=kept | environment, capture_output=True, text=True, timeout=300)


# --- the loss


def rendered(length, seed):
    rng = np.random.default_rng(seed)
    weights = rng.choice([0, 0, 1, 2.5], length).astype(np.float32)
    return Rendered(rng.integers(3, 60, length), weights, rng.integers(0, 3, length).astype(np.int8))


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gemma2": Gemma2Config(**SIZES, final_logit_softcapping=2.0),  # changes logits after the output layer
    "lora": LlamaConfig(**SIZES, tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_of_chosen_positions_is_the_full_loss_and_has_its_gradient(name):
    set_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager").eval()
    if name == "lora":
        model = add_adapter(model, JointVocab(text_rows=41).add("toy", [12], (2, 2)), rank=4)
    batch = collate([[rendered(9, 1), rendered(6, 2)], [rendered(14, 3)]], 16)
    chosen = torch.nonzero(batch.labels.flatten() != IGNORE).flatten()
    step = Step(batch, chosen, total=float(batch.weights.sum()))
    assert 0 < len(chosen) < 20
    trained = [p for p in model.parameters() if p.requires_grad]

    log_p = F.log_softmax(model(**batch.inputs()).logits, -1)  # [B, T, V]
    expected = total = 0.0
    for b, t in torch.nonzero(batch.weights).tolist():
        expected = expected - batch.weights[b, t] * log_p[b, t, batch.ids[b, t + 1]]
        total += float(batch.weights[b, t])
    expected = expected / total
    wanted = torch.autograd.grad(expected, trained, allow_unused=True)

    select = ChosenPositions(model)
    with select(chosen):
        logits = model(**batch.inputs()).logits
    assert logits.shape == (1, len(chosen), 64)
    loss, _, modality = step_loss(logits[0], step)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    assert modality.tolist() == batch.label_modality.flatten()[chosen].tolist()
    for mine, theirs in zip(torch.autograd.grad(loss, trained, allow_unused=True), wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
    assert model(**batch.inputs()).logits.shape == (2, 16, 64)  # sampling in between sees the whole model


def test_lr_factor():
    linear, cosine = lr_factor("linear", 100, 10), lr_factor("cosine", 100, 0)
    assert [round(linear(s), 3) for s in (0, 9, 10, 55, 100)] == [round(1 / 11, 3), round(10 / 11, 3), 1.0, 0.5, 0.0]
    assert [round(cosine(s), 3) for s in (0, 50, 100)] == [1.0, 0.5, 0.0]
    assert lr_factor("constant", 100, 2)(99) == 1.0


# --- the data of a recipe


def test_a_document_is_drawn_in_every_form_the_recipe_asks_for(folder):
    manifest, words, template = Manifest.load(folder / "model"), text_tokenizer(), Template(null="it")
    vocab = JointVocab.from_dict(manifest.vocab)
    mixture = read_mixture(recipe(folder), manifest, vocab, words, template)

    def ids(number):
        start = mixture.store.starts[number]
        return mixture.store.ids[start : start + mixture.store.lengths[number]].tolist()

    for n, document in enumerate(read_shards(folder / "shards")):
        plain, dropped, flipped, both = (ids(d) for d in mixture.sources[0].variants[n])
        whole = render(document.parts, vocab, words, template).ids.tolist()
        assert plain == whole
        if document.kind == "caption":
            assert dropped == render(null_parts(document.parts, template), vocab, words, template).ids.tolist()
            assert flipped == both == render(document.parts[::-1], vocab, words, template).ids.tolist()
            assert len({tuple(plain), tuple(dropped), tuple(flipped)}) == 3
        else:
            assert plain == dropped == flipped == both


def test_unusable_documents_are_left_out_with_their_reason(folder):
    shutil.rmtree(folder / "shards")
    bad = [Document("long", (text_part("a " * 60), codes_part([1, 2, 3, 4], (2, 2), "toy")), "caption"),
           Document("high", (codes_part([1, 2, 3, 16], (2, 2), "toy"),)),
           Document("other", (codes_part([1, 2, 3, 4], (2, 2), "nobody"),)),
           Document("prose", (text_part("it is a circle " * 40),))]  # fmt: skip
    write_shards(folder / "shards", documents(6) + bad)
    lines = []
    train(recipe(folder, steps=2), log=lines.append)
    left = [json.loads(line) for line in (folder / "out/quarantine.jsonl").read_text().splitlines()]
    assert [row["id"] for row in left] == ["long", "high", "other"]
    assert "68 ids do not fit a packed row of 48" in left[0]["reason"]
    assert "code 16 is out of range" in left[1]["reason"]
    assert any(line.startswith("3 documents left out") for line in lines)
    assert any(line.startswith("10 documents") for line in lines)  # 6, and the long text as 4


# --- results


def test_lora_learns_leaves_the_text_alone_and_opens_as_an_adapter(folder):
    before = {p.name: file_sha256(p) for p in (folder / "model").iterdir()}
    out = train(recipe(folder, steps=60, lr=1e-2, batch_size=8, log_every=5, checkpoint_every=30), **QUIET)
    assert before == {p.name: file_sha256(p) for p in (folder / "model").iterdir()}
    logged = losses(out)
    assert list(logged) == list(range(5, 61, 5)) and logged[60] < 0.75 * logged[5]
    record = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert {"loss_text", "loss_image", "lr", "grad_norm", "seconds"} <= record.keys()

    base = load_weights(folder / "model/model.safetensors")["model.embed_tokens.weight"]
    merged = load_adapter(out).merge_and_unload()
    rows = merged.get_input_embeddings().weight
    assert torch.equal(rows[:32], base[:32]) and not torch.equal(rows[32:], base[32:])
    assert Manifest.load(out).template == Template().to_dict()
    moved = folder.parent / (folder.name + "-moved")
    shutil.move(folder, moved)  # model and adapter together: the adapter names its model by the way to it
    try:
        assert load_adapter(moved / "out").get_base_model().config.vocab_size == len(base)
    finally:
        shutil.move(moved, folder)


def test_full_training_writes_a_plain_checkpoint(folder):
    out = train(recipe(folder, method="full", steps=40, batch_size=8, log_every=10, template={"null": "it"}), **QUIET)
    assert losses(out)[40] < losses(out)[10]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    kept = load_weights(out / "checkpoints/checkpoint-40/model.safetensors")
    assert torch.equal(kept["model.norm.weight"], model.model.norm.weight)
    manifest = Manifest.load(out)
    assert manifest.template["null"] == "it" and manifest.vocab == Manifest.load(folder / "model").vocab
    assert (out / "tokenizer.json").read_bytes() == (folder / "model/tokenizer.json").read_bytes()


def test_a_bfloat16_model_comes_back_as_one(folder):
    open_lm(folder / "model", dtype=torch.bfloat16).save_pretrained(folder / "model")
    out = train(recipe(folder, method="full", steps=2), **QUIET)
    assert {t.dtype for t in load_weights(out / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    held = load_weights(out / "checkpoints/checkpoint-2/model.safetensors")
    assert {t.dtype for t in held.values()} == {torch.float32}  # training itself goes on in full precision


def test_scalars_and_samples_reach_tensorboard_and_samples_change_nothing(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = []

    def sampler(model, step, writer):
        assert not model.training and not torch.is_grad_enabled()
        seen.append((step, tuple(model(input_ids=torch.tensor([[1, 4, 5]])).logits.shape)))
        writer.add_text("answer", str(torch.rand(3)), step)
        writer.add_image("picture", torch.rand(3, 8, 8), step)

    lora = {"rank": 4, "alpha": 8, "dropout": 0.3}
    plain = train(recipe(folder, lora=lora, sample_every=4), **QUIET)
    sampled = train(recipe(folder, lora=lora, sample_every=4, out=str(folder / "sampled")), sampler=sampler, **QUIET)
    assert seen == [(4, (1, 3, 59)), (8, (1, 3, 59)), (12, (1, 3, 59))]
    assert losses(sampled) == losses(plain)
    events = EventAccumulator(str(sampled / "tensorboard"))
    events.Reload()
    assert {"loss", "loss_text", "loss_image", "lr", "grad_norm"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 13))
    assert [e.step for e in events.Images("picture")] == [4, 8, 12]


# --- stopping and going on


DROPOUT = {
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.3}, "image_noise": 0.5, "sample_every": 1, "checkpoint_every": 4,
}  # fmt: skip


def test_a_killed_run_goes_on_in_another_process_with_the_same_losses(folder):
    whole = train(recipe(folder, **DROPOUT, out=str(folder / "whole")), **QUIET)
    killed = run(folder, DROPOUT, "7")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert max(losses(folder / "out")) == 6 and not (folder / "out/unitok.json").exists()
    (folder / "out/checkpoints/checkpoint-5").mkdir()  # and one more that was being written
    out = train(recipe(folder, **DROPOUT), **QUIET)
    assert losses(out) == losses(whole)
    assert file_sha256(out / "adapter_model.safetensors") == file_sha256(whole / "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_ctrl_c_saves_and_the_same_call_goes_on(folder, method):
    def interrupt(model, step, writer):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    handler, lines = signal.getsignal(signal.SIGINT), []
    whole = train(recipe(folder, **DROPOUT, method=method, out=str(folder / "whole")), **QUIET)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(folder, **DROPOUT, method=method), sampler=interrupt, log=lines.append)
    assert signal.getsignal(signal.SIGINT) is handler and "step 6 of 12 is saved" in lines[-1]
    out = train(recipe(folder, **DROPOUT, method=method), **QUIET)
    assert losses(out) == losses(whole)


def test_the_time_limit_stops_writes_the_folder_and_more_time_goes_on(folder):
    lines = []
    slow = recipe(folder, sample_every=1, time_limit_s=1)
    out = train(slow, sampler=lambda model, step, writer: time.sleep(0.3), log=lines.append)
    stopped = max(losses(out))
    assert stopped < 12 and f"time limit of 1 s reached at step {stopped} of 12" in lines
    assert load_adapter(out) and (out / "unitok.json").exists()
    assert max(losses(train(recipe(folder), **QUIET))) == 12


def test_a_finished_run_is_not_trained_again_but_may_be_prolonged_or_started_over(folder):
    out = train(recipe(folder), **QUIET)
    first, weights = losses(out), file_sha256(out / "adapter_model.safetensors")
    os.remove(out / "adapter_model.safetensors")
    train(recipe(folder), **QUIET)
    assert file_sha256(out / "adapter_model.safetensors") == weights and losses(out) == first
    assert max(losses(train(recipe(folder, steps=14), **QUIET))) == 14
    assert losses(train(recipe(folder), resume=False, **QUIET)) == first


def test_what_does_not_fit_is_refused_in_one_line(folder):
    out = train(recipe(folder, steps=2), **QUIET)
    with pytest.raises(ValueError, match="was begun with lr 0.003, the recipe says 0.1; give another out"):
        train(recipe(folder, steps=4, lr=0.1), **QUIET)
    with pytest.raises(ValueError, match="is an adapter; export it"):
        train(recipe(folder, model=str(out), out=str(folder / "more")), **QUIET)
    with pytest.raises(ValueError, match="the loss is (nan|inf) at step [0-9]+: lower lr"):
        train(recipe(folder, method="full", lr=1e30, clip=None, out=str(folder / "wild")), **QUIET)
    assert not (folder / "wild/checkpoints/checkpoint-6").exists()
    manifest = Manifest.load(folder / "shards")
    manifest.tokenizers["toy"] = manifest.tokenizers["toy"] | {"image_size": 16}
    manifest.save(folder / "shards")
    with pytest.raises(ValueError, match="tokenizers.toy.image_size is 8 in model, 16 in shards"):
        train(recipe(folder, out=str(folder / "other")), **QUIET)


# --- batches and processes


def test_accumulated_batches_make_the_step_of_one_large_batch(folder):
    one = train(recipe(folder, batch_size=4, image_noise=0.5), **QUIET)
    two = train(recipe(folder, batch_size=1, accumulate=4, image_noise=0.5, out=str(folder / "two")), **QUIET)
    np.testing.assert_allclose(list(losses(two).values()), list(losses(one).values()), rtol=1e-5)
    changes = {"gradient_checkpointing": True, "image_noise": 0.5}
    less_memory = train(recipe(folder, **changes, out=str(folder / "three")), **QUIET)
    np.testing.assert_allclose(list(losses(less_memory).values()), list(losses(one).values()), rtol=1e-5)
    without = train(recipe(folder, out=str(folder / "four")), **QUIET)
    assert losses(without)[12] != losses(one)[12]


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is for Linux")
def test_deepspeed_trains_the_same_without_a_compiler(folder):
    """ZeRO-3 in one process, killed and gone on with; then a plain run."""
    deep = {"deepspeed": str(REPO / "training/deepspeed/zero3.json"), "sample_every": 1, "checkpoint_every": 4}
    assert run(folder, deep, "7", PATH="/nonexistent").returncode == -signal.SIGKILL
    done = run(folder, deep, PATH="/nonexistent")
    assert done.returncode == 0, done.stderr
    plain = train(recipe(folder, out=str(folder / "plain")), **QUIET)
    np.testing.assert_allclose(list(losses(folder / "out").values()), list(losses(plain).values()), rtol=1e-5)
    mine, theirs = (load_weights(folder / name / "adapter_model.safetensors") for name in ("out", "plain"))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is for Linux")
@pytest.mark.parametrize("stage", [None, 2])
def test_two_processes_train_as_one(folder, stage):
    changes = {"batch_size": 2, "method": "full" if stage is None else "lora", "image_noise": 0.5}
    deep = {"deepspeed": str(REPO / f"training/deepspeed/zero{stage}.json")} if stage else {}
    two = run(folder, changes | deep, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
    assert two.returncode == 0, two.stderr
    one = train(recipe(folder, **changes | {"batch_size": 4, "out": str(folder / "one")}), **QUIET)
    np.testing.assert_allclose(list(losses(folder / "out").values()), list(losses(one).values()), rtol=1e-5)
    assert read_json(folder / "out/checkpoints/checkpoint-12/stream.json") == read_json(
        one / "checkpoints/checkpoint-12/stream.json"
    )
