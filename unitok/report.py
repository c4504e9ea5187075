"""The demo's report: report.html (one file, pictures inside) and report.json.

Reads what the stages wrote: scores before and after, the training log, pictures and replies; draws the grids anew.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unitok.checkpoint import read_json, write_atomic, write_json

GRID_PROMPTS = 8
SHOWN_QUESTIONS = 12
SHOTS_MATTER = 0.03  # of the score, lost with permuted answers
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1040px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.6em } h2 { margin-top: 2em; font-size: 1.2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } td, th { padding: .25em .7em; text-align: left; vertical-align: top }
tr + tr { border-top: 1px solid #eee } td.n { text-align: right; font-variant-numeric: tabular-nums }
img { image-rendering: pixelated; background: #eee; margin: 1px } .pix { width: 64px; height: 64px }
.wrong { color: #b00 } .right { color: #070 } small { color: #666 }
"""


def write_report(out: Path, seconds: dict[str, float]) -> Path:
    """report.json and report.html in `out`, from the files of the stages; returns the page."""
    from unitok.demo import named_scores

    before, after = (read_json(out / label / "scores.json")["scores"] for label in ("before", "after"))
    scores = named_scores(before, after)
    write_json(out / "report.json", {"seconds": seconds, "scores": scores})
    log = [json.loads(line) for line in (out / "adapter" / "log.jsonl").read_text().splitlines()]
    sections = [
        _score_table(scores),
        _reconstructions(out),
        _drawings(out),
        _answers(out),
        _curves(log),
        _seconds(seconds),
    ]
    page = out / "report.html"
    head = f"<!doctype html><meta charset=utf-8><title>unitok demo</title><style>{STYLE}</style>"
    write_atomic(page, "\n".join([head, _intro(), *sections]))
    return page


def _intro() -> str:
    from unitok.data.scenes import HELD_OUT, PAIRS

    pairs = ", ".join(f"{colour} {shape}" for shape, colour in sorted(HELD_OUT))
    return (
        "<h1>unitok demo</h1><p>A picture becomes codes, an ordinary language model reads and writes them beside text, "
        "and pictures come back. The base model was trained on captions both ways and on statements, never on a "
        "question; this run tuned it by LoRA and its image rows.</p>"
        f"<p>{len(HELD_OUT)} of {len(PAIRS)} (shape, colour) pairs are held out of everything a language model is "
        f"trained on: {pairs}. Every scored picture holds one of them. The image tokenizer and the judge have seen "
        "pictures of every pair: they are the eyes and the instrument.</p>"
    )


# ---- sections


def _score_table(scores: Sequence[dict]) -> str:
    rows = []
    for score in scores:
        low, high = score["interval"]
        unit = score["protocol"].get("unit")
        beside = ", ".join(f"{name} {_number(value, unit)}" for name, value in score["baselines"].items())
        rows.append(
            f"<tr><td>{html.escape(score['name'])}<td class=n><b>{_number(score['value'], unit)}</b>"
            f"<td class=n><small>{_number(low, unit)} to {_number(high, unit)}</small><td class=n>{score['n']}"
            f"<td>{html.escape(beside)}"
        )
    head = "<tr><th>score<th>value<th>95 % interval<th>n<th>beside it"
    return f"<h2>Scores</h2><table>{head}{''.join(rows)}</table><p>{html.escape(_shots_line(scores))}</p>"


def _shots_line(scores: Sequence[dict]) -> str:
    """One line on whether shots matter."""
    by_name = {score["name"]: score for score in scores}
    zero, four = by_name["vqa_0shot"], by_name["vqa_4shot"]
    permuted = four["baselines"]["permuted_shots"]
    gain, loss = four["value"] - zero["value"], four["value"] - permuted
    verdict = "matters" if loss >= SHOTS_MATTER else "does not matter"
    return (
        f"What shots say {verdict}: giving four of them the answers of one another changes the score by "
        f"{-100 * loss:+.1f} points; having them at all, by {100 * gain:+.1f} points "
        f"({four['n']} questions with shots, {zero['n']} without)."
    )


def _reconstructions(out: Path) -> str:
    sheet = out / "after" / "reconstructions.png"
    return f"<h2>Reconstructions</h2><p>Original, codes, block mean.</p><img src={_data(sheet.read_bytes())}>"


def _drawings(out: Path) -> str:
    """Prompts by guidance scales, drawn with one seed."""
    from unitok.demo import CANDIDATES, DRAW, SCALES
    from unitok.model import load

    lines = (out / "data" / "test_prompts.jsonl").read_text().splitlines()[:GRID_PROMPTS]
    prompts = [json.loads(line)["prompt"] for line in lines]
    model = load(out / "model")
    columns = {
        f"guidance {scale:g}": model.images(prompts, guidance=scale, temperature=DRAW["temperature"], seed=0)
        for scale in SCALES
    }
    head = "".join(f"<th>{name}" for name in columns)
    rows = "".join(
        f"<tr><td>{html.escape(prompt)}{''.join(f'<td>{_img(pictures[i])}' for pictures in columns.values())}"
        for i, prompt in enumerate(prompts)
    )
    wrong = _misread(out)
    return (
        f"<h2>Prompts to pictures</h2><p>Scored with guidance {DRAW['guidance']:g}, temperature "
        f"{DRAW['temperature']:g}, the likeliest of {CANDIDATES}; here one drawing each."
        f"</p><table><tr><th>prompt{head}{rows}</table>{wrong}"
    )


def _misread(out: Path, most: int = 12) -> str:
    """Scored pictures that did not show their prompt."""
    from unitok.config import DataSource
    from unitok.data.scenes import Claim, Scene, satisfies
    from unitok.eval.text_to_image import PICTURES, READINGS, load_prompts

    rows = {r["id"]: r for r in load_prompts([DataSource(path=str(out / "data" / "test_prompts.jsonl"))])}
    read = _replies(out / "after" / "images" / READINGS)
    cells = []
    for number, text in read.items():
        scene, claim = json.loads(text)[0], Claim.from_dict(rows[number]["claim"])
        if scene and satisfies(Scene.from_dict(scene), claim):
            continue
        picture = out / "after" / "images" / PICTURES / f"{_file_name(number)}.png"
        if picture.is_file():
            cells.append(f"<td>{_img(picture)}<br><small>{html.escape(rows[number]['prompt'])}</small>")
    if not cells:
        return "<p>No scored picture was misread.</p>"
    table = "".join(f"<tr>{''.join(cells[i : i + 6])}" for i in range(0, min(len(cells), most), 6))
    told = f"{len(cells)} of {len(read)} scored pictures do not show their prompt; some of them:"
    return f"<p>{told}</p><table>{table}</table>"


def _answers(out: Path) -> str:
    from unitok.config import DataSource
    from unitok.demo import ANSWER
    from unitok.eval.rows import load_rows
    from unitok.eval.vqa_metric import vqa_accuracy

    rows = {r["id"]: r for r in load_rows([DataSource(path=str(out / "data" / "test_questions.jsonl"))], "question")}
    cells = []
    for number, said in _replies(out / "after" / "vqa_0shot.jsonl").items():
        row = rows[number]
        right = vqa_accuracy(said, row["answers"], "exact") == 1
        mark = f"<span class=right>{html.escape(said)}</span>" if right else (
            f"<span class=wrong>{html.escape(said)}</span> <small>({html.escape(row['answers'][0])})</small>"
        )  # fmt: skip
        cells.append((right, f"<tr><td>{_img(row['image'])}<td>{html.escape(row['question'])}<td>{mark}"))
    wrong = [cell for right, cell in cells if not right]
    first = "".join(cell for _, cell in cells[:SHOWN_QUESTIONS])
    more = f"<p>Some that were answered wrong:</p><table>{''.join(wrong[:SHOWN_QUESTIONS])}</table>" if wrong else ""
    guided = f"<p>Answers and captions of the tuned model are guided against no picture by {ANSWER['guidance']:g}.</p>"
    return f"<h2>Questions</h2>{guided}<table>{first}</table>{more}"


def _curves(log: Sequence[dict]) -> str:
    """Loss of text and image ids over the steps of the tuning, as an inline SVG."""
    width, height = 640, 200
    steps = [record["step"] for record in log]
    drawn = []
    for name, colour in (("loss_text", "#07c"), ("loss_image", "#c50")):
        points = [(r["step"], r[name]) for r in log if name in r]
        top = max(value for _, value in points)
        path = " ".join(f"{width * s / max(steps):.1f},{height - height * v / top:.1f}" for s, v in points)
        drawn.append(f'<polyline fill="none" stroke="{colour}" points="{path}"/>')
        drawn.append(
            f'<text x="{width - 200}" y="{14 * (1 + len(drawn) // 2)}" fill="{colour}" font-size="12">'
            f"{name[5:]} ids: {points[0][1]:.2f} to {points[-1][1]:.2f}</text>"
        )
    picture = f'<svg width="{width}" height="{height}">{"".join(drawn)}</svg>'
    return f"<h2>Training</h2><p>Loss over {steps[-1]} steps, each scaled to its highest.</p>{picture}"


def _seconds(seconds: dict[str, float]) -> str:
    rows = "".join(f"<tr><td>{name}<td class=n>{value:.1f}" for name, value in seconds.items())
    return f"<h2>Seconds</h2><table>{rows}<tr><td><b>all</b><td class=n><b>{sum(seconds.values()):.1f}</b></table>"


# ---- small things


def _replies(path: Path) -> dict[str, str]:
    """Replies of the model arm by row id."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["id"]: line["reply"] for line in lines if line.get("arm") == "model"}


def _file_name(number: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", number)


def _img(picture: Any) -> str:
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return f"<img class=pix src={_data(buffer.getvalue())}>"
    return f"<img class=pix src={_data(Path(picture).read_bytes())}>"


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _number(value: float, unit: str | None) -> str:
    return f"{value:.1f} {unit}" if unit == "dB" else f"{100 * value:.1f} %"
