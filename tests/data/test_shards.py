from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from unitok.data import encoding
from unitok.data.schema import parse_row
from unitok.data.shards import census_line, read_shards, summary_line, tokenize, tokenize_each
from unitok.data.sources import read_image, read_source
from unitok.manifest import FILE, Manifest
from unitok.tokenizers import get
from unitok.tokenizers.base import load_tokenizer, tokenizer_section

needs_data = pytest.mark.skipif("UNITOK_DATA" not in os.environ, reason="UNITOK_DATA is not set")


def make_tokenizer(folder: Path, seed: int) -> Path:
    """A tiny tokenizer whose codes vary: its normalisation has seen pictures."""
    torch.manual_seed(seed)
    tokenizer = get("fsq").tiny().train()
    for _ in range(20):
        tokenizer.loss({"images": torch.rand(16, 3, 16, 16)}, 0)
    tokenizer.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), seed=0)


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """41 rows over 13 pictures (some of them copies), with unusable rows of several kinds among them."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for n in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    shutil.copy(folder / "3.png", folder / "copy.png")
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:200])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no picture")
    rows: list = []
    for n in range(34):
        image = f"{n % 12}.png" if n % 9 else "copy.png"
        parts = [{"type": "text", "text": "x"}, {"type": "image", "image": image, "loss": False},
                 {"type": "text", "text": "y"}, {"type": "image", "image": f"{(n + 5) % 12}.png"}]  # fmt: skip
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
        rows.append(
            [
                {"image": image, "text": f"picture {n}", "extra": {"n": n}},
                {"image": image, "question": f"what is {n}?", "answers": ["a", "b", "b"]},
                {"image": image, "captions": ["one", "two"]},
                {"parts": parts},
                {"messages": turns},
            ][n % 5]
        )
    # pictures 7 and 8 are met first in rows that cannot be used
    rows.insert(2, {"parts": [{"type": "image", "image": "7.png"}, {"type": "image", "image": "cut.png"}]})
    rows.insert(3, {"image": "cut.png", "captions": ["a", "b"]})
    rows.insert(9, {"image": "empty.png", "text": "t"})
    rows.insert(10, {"image": "http://example.org/a.png", "text": "t"})
    rows.insert(15, {"image": "text.png", "text": "t"})
    rows.insert(20, {"image": "absent.png", "text": "t"})
    lines = [json.dumps(row) for row in rows]
    lines.insert(30, "{")
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(source, tokenizer, out, **options):
    return tokenize(source / "rows.jsonl", tokenizer, out, **{"shard_rows": 7, "batch_size": 4} | options)


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file, but for the tokenizer's path in the manifest: it informs, and a loaded one has none."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    found[FILE] = re.sub(rb',\s*"path": "[^"]*"', b"", found[FILE])
    return found


@pytest.fixture(scope="session")
def finished(source, tokenizer, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    run(source, tokenizer, out)
    return out


def test_shards_hold_what_the_tokenizer_says_of_each_row(source, tokenizer, finished):
    loaded = load_tokenizer(tokenizer)
    documents = iter(read_shards(finished))
    for where, row, base in read_source(source / "rows.jsonl"):
        try:
            expected = parse_row(row, where=where, base=base)
            pictures = {p.image: read_image(p.image) for d in expected for p in d.parts if p.type == "image"}
        except ValueError:
            continue
        for document in expected:
            found = next(documents)
            assert (found.id, found.kind, found.meta) == (document.id, document.kind, document.meta)
            for a, b in zip(found.parts, document.parts, strict=True):
                assert (a.type, a.text, a.role, a.loss, a.source) == (b.type, b.text, b.role, b.loss, b.source)
                if b.type == "image":
                    codes = loaded.encode(loaded.preprocess(pictures[b.image])[None])[0]
                    assert a.codes.tolist() == codes.tolist()
                    assert (a.codes.dtype, a.grid, a.tokenizer, a.words) == (np.int32, (4, 4), "fsq", None)
    assert next(documents, None) is None


def test_manifest_is_the_tokenizers(tokenizer, finished):
    section = tokenizer_section(load_tokenizer(tokenizer))
    section["path"] = str(tokenizer)  # informs only
    assert Manifest.load(finished).tokenizers == {"fsq": json.loads(json.dumps(section))}
    Manifest.load(finished).check(Manifest.load(tokenizer))


def test_quarantine_names_file_line_and_reason(source, finished):
    entries = [json.loads(line) for line in open(finished / "quarantine.jsonl")]
    assert [entry["line"] for entry in entries] == [3, 4, 10, 11, 16, 21, 31]
    assert {entry["file"] for entry in entries} == {"rows.jsonl"}
    reasons = ["image 'cut.png': cannot be read as a picture", "image 'cut.png': ", "image 'empty.png': the file is",
               "is a URL", "image 'text.png': not a picture", "image 'absent.png': no such file",
               "not JSON"]  # fmt: skip
    for entry, reason in zip(entries, reasons, strict=True):
        assert reason in entry["reason"] and str(source) not in entry["reason"]


def test_strict_raises_at_the_first_bad_row(source, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"^rows\.jsonl:3: image 'cut\.png': "):
        run(source, tokenizer, tmp_path / "out", strict=True)
    with pytest.raises(ValueError, match=r"^rows\.jsonl:3: "):
        run(source, tokenizer, tmp_path / "one", strict=True, shard_rows=1)
    assert len(read_shards(tmp_path / "one")) == 2


def test_counts_add_up(source, tokenizer, finished, tmp_path):
    summary = run(source, tokenizer, tmp_path)
    documents = list(read_shards(tmp_path))
    images = [p for d in documents for p in d.parts if p.type == "image"]
    assert summary["rows"] == 41 and summary["quarantined"] == 7 and summary["shards"] == 6
    assert summary["documents"] == len(documents) and summary["images"] == len(images)
    assert summary["tokens"] == 16 * len(images)
    distinct = {p.sha256: p.codes for p in images}
    assert summary["distinct"] == len(distinct) == 12  # the copy is no picture of its own
    counts = np.bincount(np.concatenate(list(distinct.values())), minlength=36)
    shares = counts[counts > 0] / counts.sum()
    [census] = summary["census"]
    assert (census["used"], census["dead"], census["size"]) == ((counts > 0).sum(), (counts == 0).sum(), 36)
    assert census["entropy"] == pytest.approx(-(shares * np.log2(shares)).sum(), abs=1e-6) and census["used"] > 3
    assert census["perplexity"] == pytest.approx(np.prod(shares**-shares), abs=1e-5)
    line = (
        f"{census['used']} of 36 codes used, {census['dead']} dead, {census['entropy']:.2f} of 5.17 bits (perplexity "
    )
    assert census_line(summary).startswith(line)
    assert "7 rows in quarantine.jsonl" in summary_line(summary)


def test_each_distinct_picture_is_encoded_once(source, tokenizer, tmp_path, monkeypatch):
    loaded, encoded = load_tokenizer(tokenizer), []
    encode = loaded.encode
    monkeypatch.setattr(loaded, "encode", lambda images: encoded.append(len(images)) or encode(images), raising=False)
    summary = run(source, loaded, tmp_path, shard_rows=1000)
    assert sum(encoded) == summary["distinct"] == 12


def test_documents_do_not_depend_on_the_size_of_shards(source, tokenizer, finished, tmp_path):
    run(source, tokenizer, tmp_path, shard_rows=1)  # also shards of texts alone, and of no document
    assert list(read_shards(tmp_path)) == list(read_shards(finished))
    assert 0 in {pq.read_metadata(file).num_rows for file in tmp_path.glob("*.parquet")}


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_a_byte(source, tokenizer, finished, tmp_path, workers):
    run(source, tokenizer, tmp_path, workers=workers)
    assert contents(tmp_path) == contents(finished)


def test_a_fast_run_gives_the_same_bytes_and_goes_on_with_a_plain_one(
    source, tokenizer, finished, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)  # tests/nn/test_compiled.py compiles
    run(source, tokenizer, tmp_path, fast="float32")
    assert contents(tmp_path) == contents(finished)
    run(source, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="begun with dtype float32, not bfloat16"):
        run(source, tokenizer, tmp_path, fast="bfloat16")


def test_a_loaded_tokenizer_gives_the_same_as_its_folder(source, tokenizer, finished, tmp_path):
    run(source, load_tokenizer(tokenizer), tmp_path)
    assert contents(tmp_path) == contents(finished)


def test_two_at_a_time_give_the_same_and_keep_their_order(source, tokenizer, tmp_path):
    jobs = [(source / "rows.jsonl", tmp_path / name) for name in "ab"]
    first, second = tokenize_each(jobs, tokenizer)
    tokenize(source / "rows.jsonl", tokenizer, tmp_path / "alone")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "alone")
    assert [Path(done["out"]).name for done in (first, second)] == ["a", "b"]


def test_a_second_run_does_nothing_and_says_the_same(source, tokenizer, tmp_path):
    first = run(source, tokenizer, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    began = time.perf_counter()
    second = run(source, tokenizer, tmp_path)
    assert time.perf_counter() - began < 0.5
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert second["resumed"] == 41
    assert {k: v for k, v in first.items() if k not in ("seconds", "resumed")} == {
        k: v for k, v in second.items() if k not in ("seconds", "resumed")
    }


def test_a_finished_folder_is_known_without_torch(source, tokenizer, finished):
    code = ("import sys; from unitok.data.shards import tokenize; "
            f"tokenize({str(source / 'rows.jsonl')!r}, {str(tokenizer)!r}, {str(finished)!r}, shard_rows=7); "
            "assert 'torch' not in sys.modules")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- killed and resumed


# Imports once, then forks a run for every point to die at: just before or after a file system call of its k-th use.
KILLER = """
import os, shutil, signal, sys
import pyarrow.parquet as pq
import torch
from unitok.data.shards import tokenize
from unitok.tokenizers.base import load_tokenizer
source, tokenizer, out = sys.argv[1:]
torch.set_num_threads(1)
tokenizer = load_tokenizer(tokenizer)

def run(kill_at):
    count = 0
    def point():
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    def wrap(module, name):
        call = getattr(module, name)
        def wrapped(*args, **kwargs):
            point()
            result = call(*args, **kwargs)
            point()
            return result
        setattr(module, name, wrapped)
    for module, name in ((os, "replace"), (os, "fsync"), (pq, "write_table"), (type(tokenizer), "encode")):
        wrap(module, name)
    tokenize(source, tokenizer, f"{out}/{kill_at}", shard_rows=7, batch_size=4, limit=21)

for kill_at in range(1, 1000):
    child = os.fork()
    if child == 0:
        run(kill_at)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        print(kill_at - 1)
        sys.exit()
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
"""


def test_killed_at_any_point_and_rerun_gives_the_same_bytes(source, tokenizer, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLER, source / "rows.jsonl", tokenizer, tmp_path],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    points = int(done.stdout)
    assert points > 35
    partial = 0
    loaded = load_tokenizer(tokenizer)
    run(source, loaded, tmp_path / "whole", limit=21)
    for point in range(1, points + 1):
        out = tmp_path / str(point)
        partial += run(source, loaded, out, limit=21)["resumed"] > 0
        assert contents(out) == contents(tmp_path / "whole"), f"killed at point {point}"
    assert partial > points / 3


def test_killed_at_any_time_and_rerun_gives_the_same_bytes(source, tokenizer, finished, tmp_path):
    code = ("import sys; from unitok.data.shards import tokenize; "
            "tokenize(sys.argv[1], sys.argv[2], sys.argv[3], shard_rows=7, batch_size=4)")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code, source / "rows.jsonl", tokenizer, tmp_path])
    while len(list(tmp_path.glob("shard-*"))) < 2 and process.poll() is None:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(source, tokenizer, tmp_path)
    assert contents(tmp_path) == contents(finished)


def test_a_torn_line_anywhere_is_cut_off_and_done_again(source, tokenizer, finished, tmp_path):
    loaded = load_tokenizer(tokenizer)
    progress = (finished / "progress.jsonl").read_bytes()
    ends = [n for n in range(len(progress)) if progress[n : n + 1] == b"\n"]
    for end in sorted({0, 1, ends[0], *(n + d for n in ends for d in (1, 9)), len(progress) - 1}):
        out = tmp_path / str(end)
        shutil.copytree(finished, out)
        (out / "progress.jsonl").write_bytes(progress[:end])
        (out / ".shard-000001.parquet.1-a.tmp").write_bytes(b"half")
        with open(out / "quarantine.jsonl", "ab") as file:
            file.write(b'{"file": "ro')
        run(source, loaded, out)
        assert contents(out) == contents(finished), f"cut at byte {end}"


def test_a_removed_shard_is_made_again(source, tokenizer, finished, tmp_path):
    for lost in ("shard-000000.parquet", "shard-000003.parquet", "shard-000005.parquet"):
        out = tmp_path / lost
        shutil.copytree(finished, out)
        (out / lost).unlink()
        run(source, tokenizer, out)
        assert contents(out) == contents(finished)


def test_a_bounded_memory_of_pictures_does_not_change_resuming(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_CACHE_BYTES", 5 * 16 * 4)  # five pictures
    loaded = load_tokenizer(tokenizer)
    run(source, loaded, tmp_path / "whole")
    for shards in range(1, 6):
        out = tmp_path / str(shards)
        shutil.copytree(tmp_path / "whole", out)
        (out / f"shard-{shards:06d}.parquet").unlink()
        run(source, loaded, out)
        assert contents(out) == contents(tmp_path / "whole")


def test_the_census_after_a_stop_is_of_the_whole_run(source, tokenizer, finished, tmp_path):
    whole, stopped = run(source, tokenizer, finished)["census"], []
    for kept in range(6):
        out = tmp_path / str(kept)
        shutil.copytree(finished, out)
        (out / f"shard-{kept:06d}.parquet").unlink()
        summary = run(source, tokenizer, out)
        stopped.append(summary["resumed"])
        counts = np.zeros(36, dtype=int)
        for codes in {p.sha256: p.codes for d in read_shards(out) for p in d.parts if p.type == "image"}.values():
            np.add.at(counts, codes, 1)
        assert summary["census"] == whole and summary["census"][0]["used"] == (counts > 0).sum()
    assert stopped == [0, 7, 14, 21, 28, 35]


# ---- refused


def test_another_tokenizer_source_or_setting_is_refused(source, tokenizer, finished, tmp_path):
    before = contents(finished)
    other = make_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"another tokenizer.*tokenizers\.fsq\.weight_hash") as error:
        run(source, other, finished)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="begun with tokenizer 'fsq', not 'other'"):
        run(source, tokenizer, finished, name="other")
    for option, value in {"limit": 3, "columns": {"text": "text"}, "shard_rows": 8}.items():
        with pytest.raises(ValueError, match=f"begun with {option} "):
            run(source, tokenizer, finished, **{option: value})
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    with open(changed / "rows.jsonl", "a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match=r"another source: rows\.jsonl changed") as error:
        run(changed, tokenizer, finished)
    assert "\n" not in str(error.value)
    assert contents(finished) == before


def test_folders_that_shards_must_not_go_to(source, tokenizer, finished, tmp_path):
    with pytest.raises(ValueError, match="inside the data folder"):
        tokenize(source, tokenizer, source)
    (tmp_path / "classes/a").mkdir(parents=True)
    shutil.copy(source / "1.png", tmp_path / "classes/a")
    with pytest.raises(ValueError, match="inside the data folder"):  # found by searching the folders inside
        tokenize(tmp_path / "classes", tokenizer, tmp_path / "classes/out")
    shutil.copy(source / "1.png", tmp_path / "classes")
    for _ in range(2):
        assert tokenize(tmp_path / "classes", tokenizer, tmp_path / "classes/out")["documents"] == 2
    tmp_path = tmp_path / "foreign"
    tmp_path.mkdir()
    shutil.copy(next(finished.glob("*.parquet")), tmp_path / "mine.parquet")
    with pytest.raises(ValueError, match="no progress.jsonl"):
        run(source, tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.parquet"]


def test_two_runs_at_once_are_refused(source, tokenizer, tmp_path):
    def second(_):
        with pytest.raises(ValueError, match="another run is writing there"):
            run(source, tokenizer, tmp_path)

    run(source, tokenizer, tmp_path, report=second)


def test_nothing_usable_is_an_error_with_the_first_reason(source, tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "name": "x"}\n' * 3)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none of 3 rows can be used; rows.jsonl, line 1: no column 'text'.*name"):
            run(tmp_path, tokenizer, tmp_path / "out")
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        run(tmp_path, tokenizer, tmp_path / "empty")


# ---- reading, other tokenizers, real data


def test_shards_are_a_sequence(finished):
    shards = read_shards(finished)
    listed = list(shards)
    assert len(shards) == len(listed)
    assert [shards[n] for n in range(len(shards))] == listed and shards[-1] == listed[-1] and shards[3:9] == listed[3:9]
    with pytest.raises(IndexError):
        shards[len(shards)]
    with pytest.raises(FileNotFoundError, match="no token shards"):
        read_shards(finished.parent)


def test_shards_are_plain_parquet(finished):
    table = pq.read_table(sorted(finished.glob("*.parquet"))[0])
    assert table.column_names == ["id", "kind", "parts", "meta"]
    for row in table.to_pylist():
        json.loads(row["meta"])
        for part in row["parts"]:
            assert (part["text"] is None) != (part["codes"] is None)
            assert part["codes"] is None or (part["grid"] == [4, 4] and len(part["sha256"]) == 64)


class Words(get("fsq")):
    """Factorised and wordy: two codebooks, and its codes are texts."""

    vocabulary = "text"

    def token_codebook(self, grid=None):
        return torch.arange(16) % 2

    def to_text(self, codes):
        return [" ".join(map(str, row.tolist())) for row in codes]


def test_words_of_a_text_tokenizer_and_a_census_of_each_codebook(source, tmp_path):
    torch.manual_seed(0)
    words = Words(image_size=16, width=16, levels=(4, 3, 3), downsample=2, min_width=8).train()
    for _ in range(20):
        words.loss({"images": torch.rand(16, 3, 16, 16)}, 0)
    words.eval().codebook_sizes = (36, 36)
    summary = run(source, words, tmp_path)
    assert summary["tokenizer"] == "Words"
    parts = {p.sha256: p for d in read_shards(tmp_path) for p in d.parts if p.type == "image"}
    assert all(part.words == " ".join(map(str, part.codes)) for part in parts.values())
    for book, census in enumerate(summary["census"]):
        assert census["codebook"] == book
        assert census["used"] == len({code for part in parts.values() for code in part.codes[book::2]})


@needs_data
@pytest.mark.parametrize(("path", "columns", "limit", "documents", "distinct"), [
    ("emoji_noto", {"text": "name"}, 200, 200, 200), ("recipes_interleaved/docs.jsonl", None, None, 278, 105),
    ("coco_mini/captions_dev.jsonl", None, 40, 200, 40), ("coco_mini/vqa_v2_dev.jsonl", None, None, 105, None),
    ("daquar/qa_train.jsonl", None, 400, 400, None),
    ("cifar10_jpg/train.parquet", {"text": "label_name"}, 300, 300, 300),
])  # fmt: skip
def test_real_data(tokenizer, tmp_path, path, columns, limit, documents, distinct):
    source = Path(os.environ["UNITOK_DATA"]) / path
    summary = tokenize(source, tokenizer, tmp_path, columns=columns, limit=limit, shard_rows=100, workers=2)
    assert summary["documents"] == len(read_shards(tmp_path)) == documents and not summary["quarantined"]
    images = {p.sha256 for d in read_shards(tmp_path) for p in d.parts if p.type == "image"}
    assert summary["distinct"] == len(images) == (distinct or len(images))
