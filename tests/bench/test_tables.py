"""Pooled tables: counted over all targets, and only over runs that differ in nothing but their seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from friends.bench.record import Arm, Report
from friends.bench.statistics import mcnemar_exact, wilson
from friends.bench.tables import overview, page, pooled_table, portable, read_records


def arm(name: str, succeeded: tuple[bool, ...], accuracy: float) -> Arm:
    return Arm(
        name=name,
        defenses=(),
        successes=sum(succeeded),
        n=len(succeeded),
        accuracy=accuracy,
        accuracies=(accuracy,),
        seconds=2.0,
        confidence=tuple(0.75 if hit else 0.25 for hit in succeeded),
        succeeded=succeeded,
    )


def report(seed: int, undefended: tuple[bool, ...], friends: tuple[bool, ...], accuracy: float = 0.9) -> Report:
    return Report(
        name=f"run-{seed}",
        key="k",
        trial={"seed": seed, "attack": {"xi": 0.1}},
        seed=seed,
        scenario="scratch",
        scaled_down="small",
        data={"name": "digits", "train": 10, "classes": ["a", "b"]},
        model={"name": "tiny", "parameters": 1234},
        attack={"name": "GradientMatching", "xi": 16 / 255, "budget": 0.01, "poisons": 5},
        goals=tuple({"name": f"g{i}", "y_true": "a", "y_wanted": "b"} for i in range(len(undefended))),
        arms=(arm("friends-b", friends, accuracy), arm("undefended", undefended, 0.95)),
        versions={"torch": "2"},
        commit="abc",
        device="CPU",
        threads=1,
        started="2022-11-28T09:00:00+00:00",
        seconds={},
    )


def test_counts_intervals_and_paired_test_are_over_all_targets() -> None:
    runs = [report(0, (True, True, True), (False, True, False), 0.8), report(1, (True, True, False), (False,) * 3, 0.9)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in pooled_table(runs).splitlines()]
    assert rows[2][:2] == ["undefended", "5/6"]
    assert rows[3][:2] == ["friends-b", "1/6"]
    low, high = wilson(1, 6)
    assert rows[3][2] == f"{100 * low:.0f}\u2013{100 * high:.0f} %"
    assert rows[3][3] == f"{mcnemar_exact([True] * 5 + [False], [False, True, False, False, False, False]):.2g}"
    assert rows[3][4:6] == ["85.0 %", "7.1"]
    assert rows[3][6] == f"{(0.75 + 5 * 0.25) / 6:.2f}"
    text = page(runs)
    assert "2 seeds (0, 1), 3 targets each" in text
    assert "xi = 16/255" in text


def test_runs_that_differ_in_more_than_the_seed_are_refused() -> None:
    a, b = report(0, (True,), (False,)), report(1, (True,), (False,))
    with pytest.raises(ValueError, match="more than the seed"):
        pooled_table([a, replace(b, trial={"seed": 1, "attack": {"xi": 0.2}})])
    with pytest.raises(ValueError, match="comes twice"):
        pooled_table([a, a])
    with pytest.raises(ValueError, match="no run"):
        pooled_table([])


def test_the_overview_has_a_row_a_trial_with_what_its_own_table_says() -> None:
    first = [report(0, (True, True), (False, True)), report(1, (True, False), (False, False))]
    backdoor = replace(first[0].arms[1], successes=150, n=200, rates=(0.9, 0.6), succeeded=(True, True), history=())
    second = [replace(first[0], name="other-0", arms=(backdoor,), attack={**first[0].attack, "xi": None})]
    text = overview([first, second])
    lines = text.splitlines()
    assert len(lines) == 4
    assert lines[0].index("undefended") < lines[0].index("friends-b")
    low, high = wilson(3, 4)
    assert f"| run | scratch | 16/255 | 5 | 3/4, {100 * low:.0f}\u2013{100 * high:.0f} % | 1/4, " in lines[2]
    assert lines[2].endswith("| 95.0 \u2192 90.0 % |")
    assert "| other | scratch | \u2013 | 5 | 75.0 % of 2 \u00d7 100, " in lines[3]
    with pytest.raises(ValueError, match="not pooled"):
        overview([[first[0], replace(first[1], trial={"seed": 1, "attack": {"xi": 0.2}})]])


def test_records_that_are_published_do_not_say_where_the_data_were() -> None:
    run = report(0, (True,), (False,))
    away = replace(run, trial={**run.trial, "data": {"source": "/home/someone/cifar-10", "train": 10}})
    assert portable(away).trial["data"] == {"source": "cifar-10", "train": 10}
    assert portable(away).key == run.key
    assert portable(run) == run
    named = replace(run, trial={**run.trial, "data": {"source": "digits"}})
    assert portable(named) == named


def test_result_files_are_read_back_line_by_line(tmp_path: Path) -> None:
    runs = [report(seed, (True,), (False,)) for seed in range(2)]
    file = tmp_path / "runs.jsonl"
    file.write_text("".join(run.as_line() + "\n" for run in runs))
    assert read_records(file) == runs
    file.write_text(runs[0].as_line() + "\n{}\n")
    with pytest.raises(ValueError, match="line 2"):
        read_records(file)
