"""The VQA task with models made up for the purpose: an oracle, a blind one, one that copies its shots."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from PIL import Image

from unitok.config import make_recipe
from unitok.eval import get, names
from unitok.eval.progress import ReplyLog, decoding
from unitok.eval.rows import image_keys, load_rows, subset
from unitok.eval.vqa import BASELINES, ShotSampler, TextPrior, evaluate

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def make_rows(n, seed, prefix):
    """Pictures of one colour; what colour is it, and is it red (a question whose prior is strong)."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        colour = rng.choice(sorted(COLOURS))
        image = Image.new("RGB", (4, 4), COLOURS[colour])
        image.putpixel((0, 0), (i % 256, i // 256, seed))  # no two pictures are equal
        reply = "yes" if colour == "red" else "no"
        rows += [
            {"id": f"{prefix}{i}c", "image": image, "question": "what colour?", "answers": [colour], "kind": "colour"},
            {"id": f"{prefix}{i}r", "image": image, "question": "is it red?", "answers": [reply], "kind": "yes/no"},
        ]
    return rows


ROWS, TRAIN = make_rows(60, 1, "e"), make_rows(80, 2, "t")


def see(image):
    pixel = image.getpixel((3, 3))
    return next(name for name, value in COLOURS.items() if value == pixel)


class Oracle:
    """Looks at the picture; without one says nothing."""

    def answers(self, rows, *, shots, temperature):
        assert all(set(row) == {"id", "image", "question"} for row in rows), "a model must never see the answers"
        return [self.answer(row) for row in rows]

    def answer(self, row):
        if row["image"] is None:
            return "unknown"
        colour = see(row["image"])
        return colour if row["question"] == "what colour?" else ("yes" if colour == "red" else "no")


class Blind:
    def answers(self, rows, *, shots, temperature):
        return ["no" if row["question"] == "is it red?" else "red" for row in rows]


class Copier:
    """Says what its last shot of the same question and the same colour was answered: in-context learning alone."""

    def answers(self, rows, *, shots, temperature):
        def look(row):
            return row["question"], row["image"] is not None and see(row["image"])

        return [
            next((s["answers"][0] for s in reversed(own) if look(s) == look(row)), "?")
            for row, own in zip(rows, shots, strict=True)
        ]


def named(scores):
    return {score.name: score for score in scores}


def test_an_oracle_wins_and_every_control_arm_loses():
    scores = named(evaluate(Oracle(), ROWS, TRAIN, shots=2))
    overall = scores["vqa"]
    assert overall.value == 1.0 and overall.n == 120 and overall.interval[0] > 0.93  # of 60 pictures
    assert set(overall.baselines) == set(BASELINES)
    assert overall.baselines["no_image"] == 0.0
    # permuted shots do not bother a model that ignores shots; all other controls take the picture away
    assert overall.baselines["permuted_shots"] == 1.0
    for arm in ("blind", "blind_prefix", "majority", "no_image", "shuffled_images"):
        assert overall.baselines[arm] < 0.75
        assert scores[f"vqa/over/{arm}"].interval[0] > 0.1
    assert overall.baselines["majority"] < overall.baselines["blind"]
    assert scores["vqa/over/permuted_shots"].value == 0.0


def test_a_blind_model_is_no_better_than_the_blind_baseline():
    overall = named(evaluate(Blind(), ROWS, TRAIN))["vqa"]
    assert overall.value <= overall.baselines["blind"] + 0.05
    assert overall.value == overall.baselines["no_image"] == overall.baselines["shuffled_images"]
    assert "permuted_shots" not in overall.baselines


def test_a_model_that_copies_shots_falls_when_they_are_permuted():
    scores = named(evaluate(Copier(), ROWS, TRAIN, shots=24))
    overall = scores["vqa"]
    assert overall.value > 0.9
    assert overall.baselines["permuted_shots"] < 0.7
    assert scores["vqa/over/permuted_shots"].interval[0] > 0.2


def test_one_shot_is_permuted_with_another_answer():
    sampler = ShotSampler(TRAIN, 1, seed=0)
    for row in ROWS[:20]:
        (shot,), (other,) = sampler.draw(row), sampler.permuted(row)
        assert shot["answers"] != other["answers"] and {**shot, "answers": 0} == {**other, "answers": 0}


def test_breakdown_parts_sum_to_the_whole():
    scores = named(evaluate(Blind(), ROWS, TRAIN, breakdown=["kind", "kind+question"]))
    parts = [scores["vqa/kind=colour"], scores["vqa/kind=yes/no"]]
    assert [p.n for p in parts] == [60, 60]
    assert sum(p.value * p.n for p in parts) / 120 == pytest.approx(scores["vqa"].value)
    for arm in ("blind", "shuffled_images"):
        whole = scores["vqa"].baselines[arm]
        assert sum(p.baselines[arm] * p.n for p in parts) / 120 == pytest.approx(whole)
    assert scores["vqa/kind=colour+question=what colour?"].value == parts[0].value
    with pytest.raises(ValueError, match="no row has it"):
        evaluate(Blind(), ROWS, breakdown=["colour"])


def test_draws_depend_on_the_row_alone():
    drawn = {row["id"]: ShotSampler(TRAIN, 4, 7).draw(row) for row in ROWS}
    some = random.Random(0).sample(ROWS, 13)
    again = ShotSampler(TRAIN, 4, 7)
    assert all(again.draw(row) == drawn[row["id"]] for row in some)
    assert ShotSampler(TRAIN, 4, 8).draw(ROWS[0]) != drawn[ROWS[0]["id"]]
    assert len({json.dumps([s["id"] for s in shots]) for shots in drawn.values()}) > 100
    a = named(evaluate(Copier(), ROWS, TRAIN, shots=4, batch_size=7))
    b = named(evaluate(Copier(), ROWS[::-1], TRAIN, shots=4, batch_size=120, baselines=["permuted_shots"]))
    assert a["vqa"].items == b["vqa"].items
    assert a["vqa/over/permuted_shots"].items == b["vqa/over/permuted_shots"].items


def test_smaller_subsets_are_parts_of_larger_ones():
    small, large = subset(ROWS, 10, 3), subset(ROWS, 40, 3)
    assert [row for row in large if row in small] == small and len(large) == 40
    assert subset(ROWS[::-1], 10, 3) == small[::-1]


def test_shots_never_show_the_rows_picture(tmp_path):
    for copy in ("a", "b"):
        Image.new("RGB", (2, 2), "red").save(tmp_path / f"{copy}.png")  # one picture under two names
    Image.new("RGB", (2, 2), "blue").save(tmp_path / "c.png")
    row = {"id": "q", "image": tmp_path / "a.png", "question": "?", "answers": ["x"]}
    train = [{**row, "id": str(i), "image": tmp_path / f"{n}.png"} for i, n in enumerate("abababc" * 3)]
    shots = ShotSampler(train, 3, 0).draw(row)
    assert {shot["image"].name for shot in shots} == {"c.png"} and len({shot["id"] for shot in shots}) == 3
    with pytest.raises(ValueError, match="only 3 training rows"):
        ShotSampler(train, 4, 0).draw(row)
    assert image_keys({"image": [tmp_path / "a.png", tmp_path / "c.png"]}) > image_keys(row)
    assert image_keys({"image": None}) == frozenset()


def test_the_shuffled_arm_shows_another_picture():
    seen = []

    class Watcher(Blind):
        def answers(self, rows, *, shots, temperature):
            seen.extend(rows)
            return super().answers(rows, shots=shots, temperature=temperature)

    evaluate(Watcher(), ROWS, baselines=["shuffled_images"])
    own, shuffled = seen[:120], seen[120:]
    assert all(a["id"] == b["id"] and image_keys(a) != image_keys(b) for a, b in zip(own, shuffled, strict=True))
    same = [{**row, "image": ROWS[0]["image"]} for row in ROWS]
    assert named(evaluate(Blind(), same))["vqa"].baselines.keys() == {"no_image"}
    with pytest.raises(ValueError, match="picture differs"):
        evaluate(Blind(), same, baselines=["shuffled_images"])


def test_text_baselines_go_from_the_question_to_what_it_begins_with():
    def row(question, answer):
        return {"id": "", "image": None, "question": question, "answers": [answer]}

    prior = TextPrior([row("what colour is the cat?", "black"), row("what colour is the sky?", "blue"),
                       row("what colour is the sky?", "blue"), *[row("is it?", "no")] * 4])  # fmt: skip
    assert prior.majority() == prior.blind("what colour is the dog?") == "no"
    assert prior.blind("what colour is the cat?") == "black"
    assert prior.blind_prefix("what colour is the dog?") == "blue"
    assert prior.blind_prefix("who?") == "no"


def test_ten_answers_are_scored_officially_and_few_exactly():
    class Says:
        def answers(self, rows, *, shots, temperature):
            return ["\n two\nQuestion: what next? three"] * len(rows)

    rows = [
        {"id": "a", "image": None, "question": "how many?", "answers": ["2", "two", *["3"] * 8]},
        {"id": "b", "image": None, "question": "how many?", "answers": ["2"]},
    ]
    score = evaluate(Says(), rows, baselines=[])[0]
    assert score.items == {"a": pytest.approx(0.6), "b": 1.0} and score.protocol["metric"] == "exact+official"
    with pytest.raises(ValueError, match="10 answers"):
        evaluate(Says(), [{**rows[0], "answers": ["2", "2", "2"]}], mode="textvqa")


def test_sampled_replies_get_a_seed_a_row():
    class Seeded:
        said = {}

        def answers(self, rows, *, shots, temperature, top_k, top_p, seeds):
            self.said = {**self.said, **{row["id"]: seed for row, seed in zip(rows, seeds, strict=True)}}
            return [str(seed) for seed in seeds]

    decode = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    replies = {}
    for size in (7, 50):
        model = Seeded()
        evaluate(model, ROWS, baselines=[], decode=decode, batch_size=size)
        replies[size] = model.said
    assert replies[7] == replies[50] and len(set(replies[7].values())) == 120


@pytest.mark.parametrize(
    "change, word",
    [
        ({"rows": []}, "no rows"),
        ({"rows": [ROWS[0], ROWS[0]]}, "two rows have the id 'e0c'"),
        ({"shots": 2, "train": []}, "need training rows"),
        ({"baselines": ["blnd"]}, "unknown baseline 'blnd'"),
        ({"baselines": ["permuted_shots"]}, "needs shots"),
        ({"mode": "strict"}, "unknown VQA mode"),
    ],
)
def test_what_cannot_be_scored_is_refused(change, word):
    arguments = {"rows": ROWS, "train": TRAIN, **change}
    with pytest.raises(ValueError, match=word):
        evaluate(Blind(), **arguments)


def test_a_model_that_drops_a_row_is_refused():
    class Short:
        def answers(self, rows, **_):
            return ["yes"] * (len(rows) - 1)

    with pytest.raises(ValueError, match="one string a row: 16 rows"):
        evaluate(Short(), ROWS)


def test_an_interrupted_run_goes_on_and_a_finished_one_starts_anew(tmp_path):
    file = tmp_path / "out" / "replies.jsonl"

    class Stops(Oracle):
        def __init__(self, after):
            self.left, self.asked = after, 0

        def answers(self, rows, **kw):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left, self.asked = self.left - 1, self.asked + len(rows)
            return super().answers(rows, **kw)

    with pytest.raises(KeyboardInterrupt):
        evaluate(Stops(3), ROWS, TRAIN, replies=file, stamp="m1")
    with file.open("a") as torn:
        torn.write('{"arm": "model", "id": "e5')
    rest = Stops(-1)
    scores = evaluate(rest, ROWS, TRAIN, replies=file, stamp="m1")
    assert rest.asked == 3 * 120 - 48  # model, no_image, shuffled_images, less three batches of sixteen
    assert scores == evaluate(Oracle(), ROWS, TRAIN)
    again = Stops(-1)
    evaluate(again, ROWS, TRAIN, replies=file, stamp="m1")
    assert again.asked == 360
    with pytest.raises(KeyboardInterrupt):
        evaluate(Stops(3), ROWS, TRAIN, replies=file, stamp="m1")
    protocol = json.loads(file.read_text().splitlines()[0])["header"]["protocol"]
    assert len(ReplyLog(file, {"model": "m1", "protocol": protocol}).replies) == 48
    assert not ReplyLog(file, {"model": "m2", "protocol": protocol}).replies  # another model: none of the old replies


def test_a_recipe_over_files(tmp_path, capsys):
    for split, rows in (("eval", ROWS), ("train", TRAIN)):
        lines = []
        for row in rows:
            name = f"{split}-{row['id'].rstrip('cr')}.png"
            row["image"].save(tmp_path / name)
            lines.append(json.dumps({**row, "image": name}))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    with (tmp_path / "eval.jsonl").open("a") as file:
        file.write('{"image": "missing.png", "question": "what?", "answers": ["x"]}\nnot json\n')

    class FromFiles(Oracle):
        def answers(self, rows, *, shots, temperature):
            opened = [{**row, "image": row["image"] and Image.open(row["image"])} for row in rows]
            return super().answers(opened, shots=shots, temperature=temperature)

    recipe = make_recipe(
        {
            "kind": "evaluation",
            "task": "vqa",
            "data": str(tmp_path / "eval.jsonl"),
            "train": str(tmp_path / "train.jsonl"),
            "shots": 2,
            "n": 50,
            "out": str(tmp_path / "out"),
        }
    )
    scores = named(get("vqa").run(FromFiles(), recipe))
    assert scores["vqa"].value == 1.0 and scores["vqa"].n == 50 and scores["vqa"].baselines["blind"] < 0.8
    bad = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["line"] for row in bad] == [121, 122] and "no such file" in bad[0]["reason"]
    assert "2 of 122 rows cannot be used" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown option 'mod'"):
        get("vqa").run(FromFiles(), recipe.model_copy(update={"options": {"mod": "official"}}))


def test_guidance_of_a_recipe_reaches_the_model_as_one_scale():
    def of(**given):
        return decoding(make_recipe({"kind": "evaluation", "task": "vqa", **given}, "a recipe"))

    assert of() == {"temperature": 0.0} and of(guidance=2) == {"temperature": 0.0, "guidance": 2.0}
    assert of(guidance=2, temperature=0.5) == {"temperature": 0.5, "top_k": 0, "top_p": 1.0, "guidance": 2.0}
    with pytest.raises(ValueError, match=r"task vqa is guided by one scale, not by the pair \(3.0, 1.5\)"):
        of(guidance=[3, 1.5])


def test_the_folder_is_the_registry():
    assert {"vqa", "captions", "images"} <= set(names()) and not {"results", "rows", "vqa_metric"} & set(names())
    with pytest.raises(ValueError, match="did you mean 'captions'"):
        get("caption")
    with pytest.raises(ValueError, match="no run"):
        get("unitok.eval.results:Score")
    assert get("unitok.eval.vqa") is get("vqa")


def test_real_annotations_are_scored_with_leave_one_out():
    root = os.environ.get("UNITOK_DATA")
    if not root:
        pytest.skip("UNITOK_DATA is not set: no coco_mini to score")
    file = str(Path(root, "coco_mini", "vqa_v2_dev.jsonl"))
    rows = load_rows(make_recipe({"kind": "evaluation", "task": "vqa", "data": file}).data, "question")

    class No:
        def answers(self, rows, **_):
            return ["no"] * len(rows)

    scores = named(evaluate(No(), rows))
    assert scores["vqa"].n == 105 and round(scores["vqa"].value, 3) == 0.221
    shortcut = [min(1, row["answers"].count("no") / 3) for row in rows]  # what the official rule is often taken for
    assert round(sum(shortcut) / 105, 3) == 0.225
    assert scores["vqa"].protocol["metric"] == "official" and "vqa/answer_type=yes/no" in scores


def test_a_blind_reader_is_asked_without_pictures():
    seen = []

    class Watcher(Blind):
        def answers(self, rows, *, shots, temperature):
            seen.extend(rows)
            return super().answers(rows, shots=shots, temperature=temperature)

    [score, *_] = evaluate(Watcher(), ROWS, TRAIN, pictures=False, baselines=["blind"])
    assert len(seen) == len(ROWS) and all(row["image"] is None for row in seen)
    assert score.protocol["pictures"] is False and score.baselines.keys() == {"blind"}
    with pytest.raises(ValueError, match="without pictures have no baseline of other pictures"):
        evaluate(Watcher(), ROWS, TRAIN, pictures=False)
