"""Score records: intervals that cover, files that come back equal, comparisons that pair."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console

from unitok.eval.results import (
    Score,
    bootstrap,
    compare,
    effective_rows,
    jackknife,
    paired_difference,
    read_results,
    summarise,
    table,
    wilson,
    write_results,
)


def test_wilson_equals_published_values():
    # Newcombe 1998, table I, method 3 (score, no continuity correction)
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0 and wilson(20, 20)[0] < 0.9


def test_leaving_one_out_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=30)
    low, high = jackknife(values.mean(), [(values.sum() - v) / 29 for v in values])
    half = 1.959964 * values.std(ddof=1) / 30**0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half))
    with pytest.raises(ValueError, match="at least two rows, got 1"):
        jackknife(1.0, [1.0])


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    drawn = rng.random((300, 60)) < 0.3
    assert np.mean([low <= 0.3 <= high for low, high in (wilson(int(d.sum()), 60) for d in drawn)]) > 0.9
    values = rng.gamma(2.0, 1.0, size=(200, 60))
    covered = np.mean(
        [low <= 2.0 <= high for low, high in (bootstrap(v, seed=i, resamples=500) for i, v in enumerate(values))]
    )
    assert 0.88 < covered <= 0.99


def test_bootstrap_is_seeded_and_resamples_whole_groups():
    values = [0.1, 0.4, 0.9, 0.3, 0.7, 0.6]
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3) != bootstrap(values, seed=4)
    repeated = [v for v in values for _ in range(50)]  # fifty copies of a picture's value tell nothing new
    groups = [i for i in range(len(values)) for _ in range(50)]
    assert bootstrap(repeated, groups=groups, seed=3) == pytest.approx(bootstrap(values, seed=3))
    low, high = bootstrap(repeated, seed=3)
    assert high - low < 0.3 * (bootstrap(values, seed=3)[1] - bootstrap(values, seed=3)[0])
    assert bootstrap([0.5]) == (0.5, 0.5)


def test_pairing_sees_a_difference_that_two_intervals_hide():
    rng = np.random.default_rng(1)
    a = rng.normal(10, 5, 100)
    b = a + 0.2 + rng.normal(0, 0.1, 100)
    value, (low, high) = paired_difference(a, b, seed=0)
    assert 0 < low < value < high and value == pytest.approx(0.2, abs=0.05)
    assert bootstrap(a)[1] > bootstrap(b)[0]
    with pytest.raises(ValueError, match="same rows"):
        paired_difference([1.0], [1.0, 2.0])


def test_rows_of_one_group_count_for_less():
    alone, twins = [1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert effective_rows(alone, None) == effective_rows(alone, list("abcd")) == 4
    both = effective_rows(twins, list("aabbccdd"))  # every second row says nothing new
    assert 3 <= both <= 4
    assert effective_rows([1.0] * 6, list("aabbcc")) == 3
    # coverage of wilson intervals with 20 pictures of 5 questions that are right or wrong together
    rng, inside, naive = np.random.default_rng(0), 0, 0
    groups = [i // 5 for i in range(100)]
    for _ in range(400):
        values = np.repeat(rng.random(20) < 0.7, 5).astype(float)
        n = effective_rows(values, groups)
        low, high = wilson(values.mean() * n, n)
        inside += low <= 0.7 <= high
        low, high = wilson(values.sum(), 100)
        naive += low <= 0.7 <= high
    assert inside / 400 > 0.92 > 0.75 > naive / 400


def test_summarise_takes_wilson_for_proportions_and_bootstrap_for_means():
    right = {str(i): float(i < 7) for i in range(10)}
    score = summarise(
        "acc", right, baselines={"blind": dict.fromkeys(right, 0.5), "chance": 0.25}, protocol={"shots": 4}
    )
    assert (score.value, score.n, score.interval) == (0.7, 10, wilson(7, 10))
    assert score.baselines == {"blind": 0.5, "chance": 0.25}
    assert score.protocol == {"shots": 4, "interval": "wilson 95%"}
    assert summarise("m", {"a": 0.3, "b": 0.6}).protocol["interval"] == "bootstrap 95%"
    assert summarise("m", right, proportion=False).interval == bootstrap(list(right.values()))
    with pytest.raises(ValueError, match="no rows"):
        summarise("none", {})


def _scores(shift=0.0, shots=0, names=("vqa", "vqa/kind=colour")):
    values = {str(i): 0.3 + 0.01 * i + shift for i in range(20)}
    return [summarise(name, values, baselines={"blind": 0.1}, protocol={"shots": shots, "seed": 0}) for name in names]


def test_results_file_has_the_agreed_keys_and_comes_back_equal(tmp_path):
    scores = _scores()
    path = write_results(tmp_path / "out", scores, {"evaluate": 1.5})
    record = json.loads(path.read_text())
    assert path == tmp_path / "out" / "results.json" and list(record) == ["seconds", "scores"]
    assert record["seconds"] == {"evaluate": 1.5}
    assert list(record["scores"][0]) == ["name", "value", "n", "interval", "baselines", "protocol"]
    back = read_results(path)
    assert back == scores and back[0].items == scores[0].items
    assert read_results(tmp_path / "out") == scores
    assert sorted(p.name for p in path.parent.iterdir()) == ["items.jsonl", "results.json"]


def test_items_of_an_older_run_do_not_stay_beside_new_scores(tmp_path):
    write_results(tmp_path, _scores())
    write_results(tmp_path, [Score("vqa", 0.5, 10, (0.4, 0.6))])
    assert read_results(tmp_path)[0].items is None


@pytest.mark.parametrize("value, interval", [(float("nan"), (0, 1)), (0.5, (0, float("inf")))])
def test_numbers_that_json_cannot_hold_are_refused(tmp_path, value, interval):
    with pytest.raises(ValueError, match="score bad"):
        write_results(tmp_path, [Score("bad", value, 1, interval)])
    assert not list(tmp_path.iterdir())


def test_two_scores_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must differ"):
        write_results(tmp_path, _scores(names=("vqa", "vqa")))


def test_compare_pairs_by_name_and_reports_protocol_mismatches(tmp_path):
    write_results(tmp_path / "a", _scores(names=("vqa", "only-here")))
    write_results(tmp_path / "b", _scores(shift=0.1, shots=4, names=("vqa", "only-there")))
    said = []
    result = compare(tmp_path / "a", tmp_path / "b", echo=said.append)
    (difference,) = result.differences
    assert (
        difference.paired
        and difference.value == pytest.approx(0.1)
        and difference.interval == pytest.approx((0.1, 0.1))
    )
    assert difference.mismatches == ("protocol.shots: 0 against 4",)
    assert (result.only_a, result.only_b) == (["only-here"], ["only-there"])
    assert any("shots: 0 against 4" in str(line) for line in said)
    assert compare(tmp_path / "a", tmp_path / "a", echo=said.append).differences[0].mismatches == ()


def test_compare_without_shared_rows_combines_the_intervals(tmp_path):
    for name, value, interval in [("a", 0.5, (0.4, 0.6)), ("b", 0.9, (0.8, 0.95))]:
        write_results(tmp_path / f"{name}.json", [Score("acc", value, 100, interval)])
    (difference,) = compare(tmp_path / "a.json", tmp_path / "b.json", echo=lambda _: None).differences
    assert not difference.paired and difference.interval == pytest.approx(
        (0.4 - 0.02**0.5, 0.4 + (0.05**2 + 0.1**2) ** 0.5)
    )


def test_compare_refuses_what_shares_nothing(tmp_path):
    write_results(tmp_path / "a", _scores(names=("x",)))
    write_results(tmp_path / "b", _scores(names=("y",)))
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="no results"):
        compare(tmp_path / "a", tmp_path / "missing")
    (tmp_path / "list.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="not a results file"):
        read_results(tmp_path / "list.json")


def test_the_table_shows_baselines_beside_values():
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(table([*_scores(), Score("[psnr]", 20.0, 5, (19.0, 21.0), {"block_mean": 15.0})], "run"))
    text = console.export_text()
    for word in ("vqa/kind=colour", "blind", "block mean", "15.0000", "[psnr]", "0.3950"):
        assert word in text
