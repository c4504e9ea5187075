from __future__ import annotations

import io
import json
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unitok.data.schema import parse_row
from unitok.data.sources import fingerprint, read_image, read_pictures, read_source

needs_data = pytest.mark.skipif("UNITOK_DATA" not in os.environ, reason="UNITOK_DATA is not set")


def png(colour, size=(4, 4)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tar(path: Path, members) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def captions(path, columns=None):
    """[(caption, colour of the first pixel)] of a source, as read and decoded."""
    found = []
    for where, row, base in read_source(path, columns):
        for document in parse_row(row, where=where, base=base):
            text = next((p.text for p in document.parts if p.type == "text"), None)
            image = next(p.image for p in document.parts if p.type == "image")
            found.append((text, read_image(image).getpixel((0, 0))))
    return found


COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}
EXPECTED = list(COLOURS.items())


@pytest.fixture
def forms(tmp_path):
    """The same three captioned pictures in every form that is read."""
    pictures = {name: png(colour) for name, colour in COLOURS.items()}
    for folder in ("lines/im", "folder", "nested/train", "list"):
        (tmp_path / folder).mkdir(parents=True)
        for name, data in pictures.items():
            (tmp_path / folder / f"{name}.png").write_bytes(data)
    jsonl(tmp_path / "lines/rows.jsonl", [{"image": f"im/{n}.png", "text": n} for n in COLOURS])
    for folder in ("folder", "nested/train"):
        jsonl(tmp_path / folder / "metadata.jsonl", [{"file_name": f"{n}.png", "text": n} for n in COLOURS])
    (tmp_path / "list/rows.json").write_text(json.dumps([{"image": f"{n}.png", "text": n} for n in COLOURS], indent=1))
    tar(tmp_path / "a.tar", [(f"d/{n}.{e}", d) for n, p in pictures.items()
                             for e, d in (("png", p), ("txt", n.encode()))])  # fmt: skip
    tar(tmp_path / "b.tar", [(f"{n}.{e}", d) for n, p in pictures.items()
                             for e, d in (("json", json.dumps({"text": n}).encode()), ("png", p))])  # fmt: skip
    table = pa.table({"image": [{"bytes": p, "path": None} for p in pictures.values()], "text": list(pictures)})
    pq.write_table(table, tmp_path / "hf.parquet")
    pq.write_table(pa.table({"image": list(pictures.values()), "text": list(pictures)}), tmp_path / "bytes.parquet")
    return tmp_path


@pytest.mark.parametrize("path", ["lines/rows.jsonl", "lines", "folder", "folder/metadata.jsonl", "nested",
                                  "list/rows.json", "a.tar", "b.tar", "hf.parquet", "bytes.parquet"])  # fmt: skip
def test_every_form_reads_the_same_documents(forms, path):
    assert captions(forms / path) == EXPECTED


def test_pattern_reads_its_files_in_order(forms):
    assert captions(forms / "?.tar") == EXPECTED * 2


def test_plain_folder_gives_pictures_alone_in_sorted_order(forms):
    assert captions(forms / "lines/im") == [(None, COLOURS[n]) for n in sorted(COLOURS)]


def test_where_names_file_and_line_relative_to_the_source(forms):
    (forms / "lines/rows.jsonl").write_text('{"image": "a", "text": "t"}\n\n{"image": "b", "text": "t"}\n')
    assert [r.where for r in read_source(forms / "lines")] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert [r.where for r in read_source(forms / "nested")][0] == "train/metadata.jsonl:1"
    assert [r.where for r in read_source(forms / "a.tar")] == ["a.tar:1", "a.tar:2", "a.tar:3"]


def test_columns_are_mapped_and_missing_ones_named(forms):
    jsonl(forms / "lines/rows.jsonl", [{"file": "im/red.png", "name": "red"}, {"file": "im/red.png"}])
    rows = list(read_source(forms / "lines", {"image": "file", "text": "name"}))
    assert rows[0].row == {"image": "im/red.png", "text": "red"}
    with pytest.raises(ValueError, match="no column 'name'; columns present: file"):
        parse_row(rows[1].row)
    with pytest.raises(ValueError, match="unknown column 'caption'"):
        read_source(forms / "lines", {"caption": "name"})


def test_a_bad_line_does_not_end_the_file(tmp_path):
    good = b'{"image": "a.png", "text": "t"}'
    deep = b"[" * 200_000
    lines = [good, b"{", b'"\xff"', deep, b"[1]", b"1" * 9999, good]
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    outcomes = []
    for where, row, _ in read_source(tmp_path / "x.jsonl"):
        try:
            outcomes.append(parse_row(row, where=where)[0].id)
        except ValueError as error:
            outcomes.append(str(error)[:9])
    assert outcomes[0] == "x.jsonl:1" and outcomes[-1] == "x.jsonl:7" and len(outcomes) == 7
    assert outcomes[1:4] == ["not JSON:", "not UTF-8", "not JSON "]


@pytest.mark.parametrize(("end", "whole"), [(8, 1), (8.2, 1), (9, 2), (9.1, 2), (10, 2), (10.5, 2), (11, 2), (12, 2)])
def test_a_cut_tar_gives_the_samples_known_to_be_whole_and_a_reason(forms, end, whole):
    data = (forms / "a.tar").read_bytes()
    (forms / "cut.tar").write_bytes(data[: int(512 * end)])  # a sample has 4 blocks
    rows = list(read_source(forms / "cut.tar"))
    assert [r.row["text"] for r in rows[:-1]] == ["red", "lime"][:whole]
    assert isinstance(rows[-1].row, ValueError) and "cannot be read on" in str(rows[-1].row)


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
@pytest.mark.parametrize("data", [b"", b"nonsense" * 200])
def test_a_file_that_is_none_is_a_bad_row(tmp_path, suffix, data):
    (tmp_path / f"x.{suffix}").write_bytes(data)
    [row] = read_source(tmp_path / f"x.{suffix}")
    assert row.where == f"x.{suffix}:1" and isinstance(row.row, ValueError) and "\n" not in str(row.row)


def test_tar_sample_of_two_pictures_or_none_is_refused(tmp_path):
    tar(tmp_path / "x.tar", [("a.png", png("red")), ("a.jpg", b""), ("a.txt", b"t"), ("b.txt", b"t")])
    rows = [r.row for r in read_source(tmp_path / "x.tar")]
    assert "2 pictures" in str(rows[0])
    with pytest.raises(ValueError, match="no column 'image'"):
        parse_row(rows[1])


def test_paths_that_hold_nothing_readable(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_source(tmp_path / "absent")
    with pytest.raises(ValueError, match="in this folder"):
        read_source(tmp_path)
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match="cannot read .csv files"):
        read_source(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").touch(), (tmp_path / "a.tar").touch()
    with pytest.raises(ValueError, match="several kinds"):
        read_source(tmp_path)


def test_pictures_of_any_source_without_their_texts(forms):
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": "im/blue.png"}]
    jsonl(forms / "lines/rows.jsonl", [{"image": "im/red.png", "name": "x"}, {"name": "y"}, {"parts": parts}])
    found = [image for _, image in read_pictures(forms / "lines")]
    assert read_image(found[0]).getpixel((0, 0)) == COLOURS["red"]
    assert isinstance(found[1], ValueError)
    assert read_image(found[2]).getpixel((0, 0)) == COLOURS["blue"]


def save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def test_every_mode_becomes_the_same_upright_rgb(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    grey = rgb.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    half = rgb.convert("RGBA")
    half.putalpha(0)
    palette = rgb.quantize(16)
    same = [
        (save(tmp_path / "a.png", rgb.convert("RGBA")), rgb),
        (save(tmp_path / "b.png", half), Image.new("RGB", rgb.size, "white")),
        (save(tmp_path / "c.png", palette), palette.convert("RGB")),
        (save(tmp_path / "d.png", grey), grey.convert("RGB")),
        (save(tmp_path / "e.png", wide), grey.convert("RGB")),
        (save(tmp_path / "f.tif", rgb.convert("CMYK")), rgb.convert("CMYK").convert("RGB")),
        (save(tmp_path / "g.png", rgb, exif=exif), rgb.transpose(Image.Transpose.ROTATE_270)),
        (save(tmp_path / "h.png", grey.convert("1")), grey.convert("1").convert("RGB")),
        (save(tmp_path / "i.gif", palette), palette.convert("RGB")),
        (save(tmp_path / "j.png", Image.merge("LA", [grey, Image.new("L", rgb.size, 255)])), grey.convert("RGB")),
    ]
    for file, expected in same:
        found = read_image(file)
        assert found.mode == "RGB" and np.array_equal(np.asarray(found), np.asarray(expected)), file.name


def test_broken_pictures_say_why(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    for name, data in {"empty": b"", "text": b"hello", "cut": whole.getvalue()[:-600], "png": png("red")[:40]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError) as error:
            read_image(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no such file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(tmp_path)


@pytest.mark.parametrize("path", ["lines", "folder", "a.tar", "hf.parquet", "lines/im"])
def test_fingerprint_changes_with_the_source_alone(forms, path):
    before = fingerprint(forms / path)
    files = [forms / path] if (forms / path).is_file() else list((forms / path).rglob("*.*"))
    for file in files:
        os.utime(file, (1, 1))
    assert fingerprint(forms / path) == before
    target = next(f for f in files if f.suffix != ".png" or path == "lines/im")
    data = bytearray(target.read_bytes())
    if path == "lines/im":
        data += b"\0"
    else:
        data[len(data) // 2] ^= 1
    target.write_bytes(data)
    assert fingerprint(forms / path) != before


def test_fingerprint_of_a_large_file_is_fast_and_sees_a_changed_time(tmp_path):
    with open(tmp_path / "x.tar", "wb") as file:
        file.truncate(20 << 30)  # sparse
    began = time.perf_counter()
    before = fingerprint(tmp_path / "x.tar")
    assert time.perf_counter() - began < 1
    os.utime(tmp_path / "x.tar", (1, 1))
    assert fingerprint(tmp_path / "x.tar") != before


@needs_data
@pytest.mark.parametrize(("path", "columns", "rows"), [
    ("emoji_noto", {"text": "name"}, 1561), ("recipes_interleaved", None, 278), ("daquar", None, 6795),
    ("cifar10_jpg", {"text": "label_name"}, 20000),
])  # fmt: skip
def test_real_sources_are_read_whole(path, columns, rows):
    documents = 0
    for where, row, base in read_source(Path(os.environ["UNITOK_DATA"]) / path, columns):
        documents += len(parse_row(row, where=where, base=base))
    assert documents == rows


@needs_data
def test_real_pictures_open():
    root = Path(os.environ["UNITOK_DATA"])
    for path in ("emoji_noto", "coco_mini/captions_dev.jsonl", "cifar10_jpg"):
        for _, (_, image) in zip(range(5), read_pictures(root / path), strict=False):
            assert read_image(image).mode == "RGB"
