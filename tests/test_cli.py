"""The command line as a user meets it: the main job verb by verb, exit codes, one plain line for what goes wrong."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import unitok.model
from unitok import cli
from unitok.checkpoint import read_json, write_json
from unitok.data import shards
from unitok.data.schema import Document, codes_part, text_part
from unitok.data.shards import read_shards
from unitok.detokenizers.base import Detokenizer
from unitok.eval.images import block_mean, psnr
from unitok.manifest import Manifest
from unitok.model import load
from unitok.tokenizers.base import load_tokenizer, to_tensor
from unitok.tokenizers.fsq import FSQTokenizer

PACKAGE = Path(unitok.__file__).parent
VERBS = (
    "demo", "list", "inspect", "convert", "tokenize", "expand", "train", "export", "reconstruct", "sample", "ask",
    "evaluate",
)  # fmt: skip
PICTURES = 6


def yaml(values: dict) -> str:
    return json.dumps(values)  # JSON is YAML


@pytest.fixture(scope="module", autouse=True)
def environment():
    """The program keeps libraries quiet through the environment; other tests get it back as it was."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PYTHONWARNINGS", "TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM"):
            patch.setenv(name, os.environ.get(name, ""))
            del os.environ[name]
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory, scene_model) -> SimpleNamespace:
    """Pictures, documents, and what the first verbs make of them."""
    folder = tmp_path_factory.mktemp("world")
    data = folder / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for n in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((24, 20), Image.Resampling.BICUBIC).save(data / f"{n}.png")
    captions = [{"image": f"{n}.png", "title": "a red circle"} for n in range(PICTURES)]
    questions = [
        {"image": f"{n}.png", "question": f"is it {word}?", "answers": ["yes"]}
        for n, word in enumerate(("red", "blue", "green", "small", "large", "left"))
    ]
    for name, rows in (("captions", captions), ("questions", questions)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "kind": "language_model", "model": str(folder / "model"), "out": str(folder / "adapter"), "length": 96,
        "data": [{"shards": str(folder / "captions"), "caption_drop": 0.2}, {"shards": str(folder / "questions")}],
        "batch_size": 2, "steps": 4, "lr": 1e-2, "dtype": "float32", "lora": {"rank": 2}, "sample_every": 2,
        "log_every": 1,
        "samples": {"prompts": ["a red circle"], "questions": [{"question": "is it red?", "image": str(data / "1.png")},
                                                               "how many?"]},
    }  # fmt: skip
    scored = {
        "kind": "evaluation", "version": 3, "task": "vqa", "model": str(folder / "model"), "n": 4, "shots": 1,
        "data": str(data / "questions.jsonl"), "train": str(data / "questions.jsonl"), "out": str(folder / "scores"),
    }  # fmt: skip
    (folder / "lora.yaml").write_text(yaml(recipe))
    (folder / "vqa.yaml").write_text("# Questions about noise.\n" + yaml(scored))
    tokenizer, llm = scene_model.parent / "tokenizer", scene_model.parent / "llm"
    made = SimpleNamespace(folder=folder, data=data, tokenizer=tokenizer, llm=llm, model=folder / "model",
                           captions=folder / "captions", lora=folder / "lora.yaml", vqa=folder / "vqa.yaml",
                           adapter=folder / "adapter")  # fmt: skip
    good("expand", llm, "--tokenizer", tokenizer, "--out", made.model)
    good(
        "tokenize", data / "captions.jsonl", "--tokenizer", tokenizer, "--out", made.captions, "--column", "text=title"
    )
    good("tokenize", data / "questions.jsonl", "--tokenizer", tokenizer, "--out", folder / "questions")
    return made


def good(*args) -> None:
    assert cli.main([str(arg) for arg in args]) == 0


def printed(capsys, *args) -> str:
    capsys.readouterr()
    good(*args)
    return capsys.readouterr().out


def refused(capsys, *args, code: int = 1) -> str:
    """The one line on stderr of a command that fails."""
    capsys.readouterr()
    assert cli.main([str(arg) for arg in args]) == code
    out = capsys.readouterr()
    [line] = out.err.splitlines()
    return line


# ---- the surface -----------------------------------------------------------------------------------------------------


def test_help_lists_the_verbs_and_loads_no_framework():
    code = (
        "import sys; from unitok.cli import main; assert main(['--help']) == 0;"
        "print(sorted({'torch', 'transformers', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    *text, loaded = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).splitlines()
    assert loaded == "[]"
    listed = [line.split()[0] for line in text[text.index("Commands:") + 1 :]]
    assert sorted(listed) == sorted(VERBS)


def commands() -> dict[str, ast.FunctionDef]:
    """The functions behind the verbs and the program's own options."""
    tree = ast.parse((PACKAGE / "cli.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name.strip("_"): f for f in functions if any(ast.unparse(d).startswith("app.") for d in f.decorator_list)}


def test_every_option_of_every_command_is_read():
    found = commands()
    assert set(found) == {*VERBS, "program"}
    for name, function in found.items():
        loads = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        for argument in function.args.args:
            assert argument.arg in loads, f"{name} takes {argument.arg} and does nothing with it"


def test_list_names_what_there_is(capsys, monkeypatch, world, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "recipes           none in ./tokenizers, ./training, ./eval" in printed(capsys, "list")
    (tmp_path / "eval").mkdir()
    shutil.copy(world.vqa, tmp_path / "eval")
    lines = printed(capsys, "list").splitlines()
    known = "dediffusion, dvae, emu3, fsq, fsq_split, interrogator, magvit2, seed, titok, vqgan"
    assert lines[0].split(maxsplit=2)[2] == known
    assert "vqa" in lines[2] and "text_to_image" in lines[2]
    assert lines[-1].split() == ["eval/vqa.yaml", "no", "kind", "Questions", "about", "noise."]


def test_the_program_as_a_module_says_only_what_it_was_asked(world, tmp_path):
    """No warning of a library on stderr, no bar of transformers; the deepspeed launcher's option is taken."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [
        sys.executable,
        "-m",
        "unitok",
        "--local_rank=0",
        "sample",
        str(world.model),
        "a",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / '000-a-000.png'}\n"


def test_the_rank_of_a_launcher_is_kept(monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    good("--local_rank=3", "list")
    assert os.environ.pop("LOCAL_RANK") == "3"


# ---- the main job ----------------------------------------------------------------------------------------------------


def test_tokenize_names_columns_and_the_tokenizer(capsys, world, tmp_path):
    document = read_shards(world.captions)[0]
    pixels = load_tokenizer(world.tokenizer).preprocess(Image.open(world.data / "0.png"))
    codes = load_tokenizer(world.tokenizer).encode(pixels[None])[0]
    assert document.parts[0].text == "a red circle" and document.parts[1].codes.tolist() == codes.tolist()
    rows = [{"image": "0.png", "text": "a"}, {"image": "gone.png", "text": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(world.data / "0.png", tmp_path)
    asked = ("tokenize", tmp_path / "rows.jsonl", "--tokenizer", world.tokenizer, "--name", "noise", "--workers", 2)
    assert "1 rows in quarantine.jsonl" in printed(capsys, *asked, "--out", tmp_path / "loose")
    assert read_shards(tmp_path / "loose")[0].parts[1].tokenizer == "noise"
    assert "gone.png" in refused(capsys, *asked, "--strict", "--out", tmp_path / "strict")


@pytest.fixture(scope="module")
def trained(world) -> Path:
    good("train", world.lora)
    return world.adapter


def test_train_shows_samples_and_is_not_changed_by_them(world, trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    drawn = events.Images("drawn: a red circle")
    assert [image.step for image in drawn] == [2, 4] and drawn[0].width == 4 * 16
    said = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("answers/text_summary")]
    assert all("1.png: is it red?" in text and "how many?" in text for text in said)
    alone = world.folder / "alone"
    good("train", world.lora, "samples={}", f"out={alone}")
    steps = [[json.loads(line)["loss"] for line in (out / "log.jsonl").open()] for out in (trained, alone)]
    assert steps[0] == steps[1] and len(steps[0]) == 4


def test_the_live_model_draws_and_answers_as_the_saved_one(world, trained):
    """What TensorBoard shows at the last step is what the finished adapter does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    model = load(trained)
    last = events.Tensors("answers/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert model.answer(world.data / "1.png", "is it red?") in last
    pictures = model.images(["a red circle"], n=4)
    shown = np.asarray(
        Image.open(__import__("io").BytesIO(events.Images("drawn: a red circle")[-1].encoded_image_string))
    )
    wanted = np.concatenate([np.asarray(picture) for picture in pictures], axis=1)
    assert np.abs(shown.astype(int) - wanted).max() <= 1  # TensorBoard cuts off where to_pil rounds


def test_an_exported_adapter_draws_the_same_pictures(capsys, world, trained, tmp_path):
    good("export", trained, "--out", tmp_path / "plain")
    asked = ("a red circle", "a blue square", "--n", 2, "--seed", 5, "--top-k", 20, "--temperature", 0.9)
    for name, model in (("adapter", trained), ("plain", tmp_path / "plain")):
        files = printed(capsys, "sample", model, *asked, "--out", tmp_path / name).splitlines()
        assert [Path(file).name for file in files] == [
            "000-a-red-circle-000.png", "000-a-red-circle-001.png", "001-a-blue-square-000.png",
            "001-a-blue-square-001.png"]  # fmt: skip
    for file in (tmp_path / "plain").glob("0*.png"):
        assert file.read_bytes() == (tmp_path / "adapter" / file.name).read_bytes()
    good("export", trained, "--out", tmp_path / "strings", "--token-strings")
    assert "<fsq_0>" in (tmp_path / "strings" / "tokenizer.json").read_text()


def test_sample_draws_what_the_model_draws(capsys, world, tmp_path):
    image, options = world.data / "2.png", {"guidance": 2.0, "temperature": 0.8, "top_p": 0.9, "seed": 3}
    flags = [str(x) for key, value in options.items() for x in (f"--{key.replace('_', '-')}", value)]
    good("sample", world.model, "like this", "--image", image, *flags, "--out", tmp_path)
    from unitok.data.schema import image_part

    [wanted] = load(world.model).images([[image_part(image, loss=False), text_part("like this")]], **options)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "000-like-this-000.png")), np.asarray(wanted))


def test_ask_puts_shots_before_the_question(capsys, world, monkeypatch):
    asked, model = (world.data / "3.png", "is it small?"), load(world.model)
    for guidance in (1, 4):
        said = printed(capsys, "ask", world.model, *asked, "--guidance", guidance).rstrip("\n")
        assert said == model.answer(*asked, guidance=guidance)
    row = {"image": "1.png", "question": "is it blue?", "answers": ["no", "yes", "yes"]}  # the most given one is shown
    (world.data / "shots.jsonl").write_text(json.dumps(row) + "\n")
    given, generate = [], unitok.model.generate_ids
    monkeypatch.setattr(
        unitok.model,
        "generate_ids",
        lambda lm, prompts, *a, **k: given.append(prompts) or generate(lm, prompts, *a, **k),
    )
    shown = printed(capsys, "ask", world.model, *asked, "--shots", world.data / "shots.jsonl").rstrip("\n")
    shot = {"image": world.data / "1.png", "question": "is it blue?", "answers": ["yes"]}
    assert shown == model.answer(*asked, [shot])
    assert [ids.tolist() for ids in given[0]] == [ids.tolist() for ids in given[1]]
    words = model.text_tokenizer.decode([i for i in given[0][0] if i < model.vocab.text_rows])
    assert words.split() == "<s> Q: is it blue? A: yes Q: is it small? A:".split()


def test_evaluate_writes_results_and_compares_them(capsys, world):
    text = printed(capsys, "evaluate", world.vqa)
    assert "blind" in text and text.splitlines()[-1] == str(world.folder / "scores" / "results.json")
    scores = {score["name"]: score for score in read_json(world.folder / "scores" / "results.json")["scores"]}
    assert scores["vqa"]["n"] == 4 and {"blind", "majority", "no_image"} <= set(scores["vqa"]["baselines"])
    protocol = scores["vqa"]["protocol"]
    assert (protocol["task"], protocol["version"], protocol["model"]) == ("vqa", 3, str(world.model))
    good("evaluate", world.vqa, "shots=0", f"out={world.folder / 'blind'}")
    compared = printed(capsys, "evaluate", "--compare", world.folder / "scores", world.folder / "blind")
    assert "paired" in compared and "shots: 1 against 0" in compared
    assert "nothing is written" in printed(capsys, "evaluate", world.vqa, "out=null", "shots=0")
    alone = (f"model={world.tokenizer}", "task=images", f"data={world.data / 'captions.jsonl'}", "out=null", "shots=0")
    assert "block mean" in printed(capsys, "evaluate", world.vqa, *alone)


# ---- reconstruct -----------------------------------------------------------------------------------------------------


def test_reconstruct_scores_each_picture_and_leaves_out_what_is_none(capsys, world, tmp_path):
    shutil.copytree(world.data, tmp_path / "pictures", ignore=shutil.ignore_patterns("*.jsonl"))
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    capsys.readouterr()
    good("reconstruct", world.tokenizer, tmp_path / "pictures", "--out", tmp_path / "out")
    out = capsys.readouterr()
    assert "1 of 7 pictures cannot be read; the first: " in out.err and "broken.png" in out.err
    assert out.out.splitlines()[-2:] == [
        str(tmp_path / "out" / name) for name in ("reconstructions.png", "results.json")
    ]
    tokenizer = load_tokenizer(world.tokenizer)
    images = torch.stack([tokenizer.preprocess(Image.open(world.data / f"{n}.png")) for n in range(PICTURES)])
    made = tokenizer.decode(tokenizer.encode(images))
    score = read_json(tmp_path / "out" / "results.json")["scores"][0]
    assert (score["name"], score["n"]) == ("psnr", PICTURES)
    assert score["value"] == pytest.approx(psnr(made, images).mean().item())
    assert score["baselines"]["block_mean"] == pytest.approx(psnr(block_mean(images, (4, 4)), images).mean().item())
    kept = [to_tensor(Image.open(file)) for file in sorted((tmp_path / "out" / "pictures").iterdir())]
    assert torch.stack(kept).sub(made).abs().max() < 0.5 / 255 + 1e-6


class Means(Detokenizer):
    """Draws a flat picture, twice as large as the tokenizer's, of a colour that the vectors say."""

    takes = frozenset({"vectors"})

    def __init__(self, image_size: int = 32):
        super().__init__()
        self.image_size = image_size
        self.level = torch.nn.Parameter(torch.tensor(0.25))

    def generate(self, condition, *, seeds, guidance=1.0, steps=None, negative=None):
        flat = self.level + condition.vectors.mean(dim=(1, 2), keepdim=True)[..., None] * 0.01  # [B, 1, 1, 1]
        return flat.expand(-1, 3, self.image_size, self.image_size)


def test_reconstruct_through_a_detokenizer(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "a_detokenizer", SimpleNamespace(Means=Means))
    monkeypatch.setattr(Means, "__module__", "a_detokenizer")
    Means().save_pretrained(tmp_path / "detokenizer")
    asked = ("reconstruct", world.tokenizer, *sorted(world.data.glob("[0-3].png")))
    good(*asked, "--out", tmp_path / "out", "--detokenizer", tmp_path / "detokenizer")
    files = sorted((tmp_path / "out" / "pictures").iterdir())
    assert len(files) == 4
    for file in files:
        picture = np.asarray(Image.open(file))
        assert picture.shape == (16, 16, 3) and np.ptp(picture) == 0 and abs(int(picture[0, 0, 0]) - 64) < 5


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_wrong_usage_ends_with_2(capsys, world):
    for args in (["sing"], ["train"], ["list", "--loud"], ["sample", world.model, "a"], ["evaluate"],
                 ["evaluate", world.vqa, "--compare", "a", "b"], ["inspect", world.model, "--n", "0"],
                 ["tokenize", "a", "--tokenizer", "b", "--out", "c", "--column", "text"]):  # fmt: skip
        assert cli.main([str(arg) for arg in args]) == 2, args
        assert "Usage: unitok" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("train nothing.yaml", "no such recipe: nothing.yaml"),
        ("train {lora} lora.rnak=8", "unknown key 'lora.rnak' (did you mean 'rank'?)"),
        ("train {lora} samples.questions.0.imge=a.png", "'samples.questions.0.imge' (did you mean 'image'?)"),
        ("train {lora} samples.questions.0.image=gone.png", "gone.png: no such file"),
        ("train {lora} model={tokenizer} out={new}", "no text tokenizer could be loaded"),
        ("train {vqa}", "is an evaluation: run it with `unitok evaluate`"),
        ("evaluate {lora}", "is a language_model: run it with `unitok train`"),
        ("evaluate {vqa} task=vqb", "unknown task 'vqb' (did you mean 'vqa'?)"),
        ("evaluate {vqa} model=null", "task vqa needs a model"),
        ("evaluate {vqa} model={tokenizer}", "is an image tokenizer"),
        ("evaluate {vqa} options.mod=exact", "unknown option 'mod'"),
        ("evaluate --compare {data} {data}", "no results at"),
        ("sample {llm} a --out {new}", "has no image vocabulary: add one with `unitok expand`"),
        ("sample {data}/nothing a --out {new}", "no such folder"),
        ("sample builtin:nothing a --out {new}", "no such builtin folder"),
        ("sample {model} a --out {new} --image {data}/captions.jsonl", "not a picture in a known format"),
        ("sample {model} a --out {new} --top-p 0", "expected 0 < top_p <= 1"),
        ("ask {model} {data}/gone.png what", "gone.png: no such file"),
        ("ask {model} {data}/1.png what --shots {data}/gone.jsonl", "no such file or folder"),
        ("ask {model} {data}/1.png what --shots {data}/captions.jsonl", "no usable question row"),
        ("expand {llm} --tokenizer {llm} --out {new}", "no unitok.json in it"),
        ("expand {model} --tokenizer {tokenizer} --out {new}", "give this one another --name"),
        ("expand {llm} --tokenizer {tokenizer} --out {data}", "is not empty"),
        ("tokenize {data}/gone.jsonl --tokenizer {tokenizer} --out {new}", "no such file or folder"),
        ("tokenize {data}/captions.jsonl --tokenizer {tokenizer} --out {new}", "none of 6 rows can be used"),
        ("reconstruct {tokenizer} {data}/gone.png --out {new}", "no such file or folder"),
        ("reconstruct {model}/image_tokenizers {data}/1.png --out {new}", "no unitok.json in it"),
        ("inspect {data}", "is no recipe (.yaml), no token shards"),
        ("export {llm} --out {new}", "no unitok.json in it"),
        ("demo --tokenizer nothing --out {new}", "no recipe for the image tokenizer 'nothing'"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_plain_line(capsys, world, tmp_path, args, said):
    line = refused(capsys, *args.format(**vars(world), new=tmp_path / "new").split())
    assert line.startswith("error: ") and said in line and "not foreseen" not in line


def test_a_picture_size_that_the_tokenizer_cannot_have(capsys, world, tmp_path):
    recipe = {
        "kind": "tokenizer", "tokenizer": {"name": "fsq", "image_size": 30}, "data": str(world.data / "captions.jsonl"),
        "out": str(tmp_path / "out"), "steps": 1, "batch_size": 2, "lr": 1e-3,
    }  # fmt: skip
    (tmp_path / "fsq.yaml").write_text(yaml(recipe))
    assert "image_size must be a multiple of" in refused(capsys, "train", tmp_path / "fsq.yaml")
    assert "has no argument 'widht' (did you mean 'width'?)" in refused(
        capsys, "train", tmp_path / "fsq.yaml", "tokenizer={name: fsq, widht: 8}"
    )


def test_a_code_that_the_codebook_does_not_have(capsys, world, tmp_path):
    bad = Document("d0", (text_part("a"), codes_part([999] * 16, (4, 4), "fsq")), "caption")
    (tmp_path / "bad").mkdir()
    pq.write_table(shards._table([bad]), tmp_path / "bad" / "shard-000000.parquet")
    Manifest(tokenizers=Manifest.load(world.captions).tokenizers).save(tmp_path / "bad")
    line = refused(capsys, "train", world.lora, f"data=[{{shards: {tmp_path / 'bad'}}}]", f"out={tmp_path / 'out'}")
    assert "no document can be used; d0: code 999 is out of range: expected 0 <= code < 36" in line


def test_shards_of_another_tokenizer_are_refused_by_field(capsys, world, tmp_path):
    torch.manual_seed(1)
    FSQTokenizer.tiny().save_pretrained(tmp_path / "other")
    good("tokenize", world.data / "questions.jsonl", "--tokenizer", tmp_path / "other", "--out", tmp_path / "shards")
    asked = ("train", world.lora, f"data=[{{shards: {tmp_path / 'shards'}}}]", f"out={tmp_path / 'out'}")
    assert "manifest mismatch: tokenizers.fsq.weight_hash is " in refused(capsys, *asked)
    shutil.copytree(world.model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "image_tokenizers" / "fsq")
    shutil.copytree(tmp_path / "other", tmp_path / "model" / "image_tokenizers" / "fsq")
    line = refused(capsys, "sample", tmp_path / "model", "a", "--out", tmp_path / "out")
    assert "manifest mismatch: tokenizers.fsq.weight_hash is " in line and "image_tokenizers/fsq" in line


def test_a_base_that_is_not_causal(capsys, world, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    shutil.copy(world.llm / "tokenizer.json", tmp_path / "bert")
    line = refused(capsys, "expand", tmp_path / "bert", "--tokenizer", world.tokenizer, "--out", tmp_path / "out")
    assert "BertForMaskedLM (bert) is not a causal language model" in line


def test_a_damaged_folder_is_named(capsys, world, tmp_path):
    shutil.copytree(world.tokenizer, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "model.safetensors: not a whole safetensors file" in refused(
        capsys, "reconstruct", tmp_path / "cut", world.data, "--out", tmp_path / "out"
    )
    manifest = read_json(world.captions / "unitok.json")
    shutil.copytree(world.captions, tmp_path / "shards")
    write_json(tmp_path / "shards" / "unitok.json", {**manifest, "format": 99})
    line = refused(capsys, "train", world.lora, f"data=[{{shards: {tmp_path / 'shards'}}}]", f"out={tmp_path / 'new'}")
    assert "unknown manifest format 99" in line


def test_debug_shows_the_traceback_wherever_it_stands(capsys, world):
    for args in (["--debug", "train", "gone.yaml"], ["train", "gone.yaml", "--debug"]):
        assert cli.main(args) == 1
        err = capsys.readouterr().err
        assert "Traceback" in err and err.splitlines()[-1] == "error: no such recipe: gone.yaml"
    assert refused(capsys, "train", "--", "--debug") == "error: no such recipe: --debug"


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (KeyboardInterrupt("stopped at step 3; the same command goes on"), "interrupted: stopped at step 3; ", 130),
        (KeyboardInterrupt(), "interrupted", 130),
        (PermissionError(13, "Permission denied", "/x"), "error: /x: Permission denied", 1),
        (ValueError("two\n  lines"), "error: two lines", 1),
        (KeyError("weight"), "error: KeyError: 'weight' (not foreseen; --debug shows where)", 1),
        (torch.OutOfMemoryError("out of memory"), "error: out of memory", 1),
    ],
)
def test_every_end_has_its_code_and_line(capsys, monkeypatch, error, line, code):
    from unitok import tokenizers

    def fails():
        raise error

    monkeypatch.setattr(tokenizers, "names", fails)
    assert refused(capsys, "list", code=code).startswith(line)


def test_the_foreign_distribution_is_pointed_out(capsys, monkeypatch, tmp_path):
    theirs = tmp_path / "unitok-4.3.1.dist-info"
    theirs.mkdir()
    (theirs / "METADATA").write_text("Metadata-Version: 2.1\nName: unitok\nVersion: 4.3.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    capsys.readouterr()
    good("list")
    [line] = capsys.readouterr().err.splitlines()
    assert "unrelated package 'unitok' 4.3.1" in line
