"""Pairs of rows, goal by goal: a table that a grid asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import record_samples as samples
from test_tabulate import GRID, mine

from friends.bench.grid.spec import grid_of, parse_grid
from friends.bench.grid.summary import summarise
from friends.bench.grid.tabulate import tables
from friends.bench.statistics import difference_interval, mcnemar_exact

PAIRED = replace(GRID, seeds=tuple(range(8)), compare={"friends-b": ("strip", "undefended")})


def test_a_pair_is_compared_goal_by_goal() -> None:
    records = mine({"friends-b": "...x...x", "strip": "xxxxxx.x", "undefended": "xxxxxxxx"})
    _, pairs = tables(PAIRED, summarise(records))
    first, second = pairs.data
    assert (first["row"], first["against"], first["goals"]) == ("friends-b", "strip", 8)
    ours, theirs = ([float(mark == "x") for mark in marks] for marks in ("...x...x", "xxxxxx.x"))
    assert first["difference"] == pytest.approx(2 / 8 - 7 / 8)
    assert (first["low"], first["high"]) == pytest.approx(difference_interval(theirs, ours))
    assert first["p"] == pytest.approx(mcnemar_exact([x > 0 for x in theirs], [x > 0 for x in ours]))
    assert first["p"] == pytest.approx(2 / 2**5)  # five goals differ, all to one side
    assert second["difference"] == pytest.approx(-6 / 8) and second["p"] == pytest.approx(2 / 2**6)
    assert [row["p_holm"] for row in (second, first)] == pytest.approx([2 * 2 / 2**6, 2 / 2**5])


def test_accuracies_are_compared_on_the_same_goals_with_their_interval() -> None:
    ours = [samples.record("friends-b", grid="mine", preset="", seed=i, accuracy=0.80 + 0.01 * i) for i in range(4)]
    theirs = [samples.record("strip", grid="mine", preset="", seed=i, accuracy=0.85 - 0.02 * i) for i in range(4)]
    (data,) = (row for row in tables(PAIRED, summarise(ours + theirs))[1].data if row["against"] == "strip")
    differences = [(0.80 + 0.01 * i) - (0.85 - 0.02 * i) for i in range(4)]
    assert data["accuracy_difference"] == pytest.approx(sum(differences) / 4)
    low, high = difference_interval([r.accuracy for r in theirs], [r.accuracy for r in ours])
    assert (data["accuracy_low"], data["accuracy_high"]) == pytest.approx((low, high))
    assert low < sum(differences) / 4 < high


def test_a_pair_without_common_goals_is_left_out_and_so_is_a_table_without_pairs() -> None:
    only = mine({"friends-b": "...x", "undefended": "xxxx"})
    _, pairs = tables(PAIRED, summarise(only))
    assert [row["against"] for row in pairs.data] == ["undefended"]
    assert len(tables(PAIRED, summarise(mine({"undefended": "xxxx"})))) == 1
    assert len(tables(GRID, summarise(only))) == 1


def test_pairs_stand_in_the_file_of_the_grid_and_go_with_its_rows(tmp_path: Path) -> None:
    PAIRED.write(tmp_path)
    assert grid_of(tmp_path).compare == PAIRED.compare
    assert PAIRED.narrowed(only=["friends-b"]).compare == {"friends-b": ("undefended",)}
    assert PAIRED.narrowed(only=["strip"]).compare == {}
    assert "compare" not in GRID.to_json()


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        (
            {"friends-b": ["stripe"]},
            "compares row 'stripe', which it does not have; it has undefended, clean, friends-b",
        ),
        ({"frinds": ["strip"]}, "compares row 'frinds'"),
        ({"friends-b": "strip"}, "a list of rows to compare 'friends-b' with, not 'strip'"),
        (["strip"], r"\[compare\] is a table"),
    ],
)
def test_impossible_pairs_are_refused(compare: object, message: str) -> None:
    rows = {row.name: row.defenses[0] for row in GRID.rows}
    with pytest.raises(ValueError, match=message):
        parse_grid({"seeds": 2, "trial": GRID.trial, "defenses": rows, "compare": compare}, "mine")
