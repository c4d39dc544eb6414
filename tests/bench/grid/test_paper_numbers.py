"""The paper's numbers: under the names of our grids, and consistent where the paper is."""

from __future__ import annotations

import pytest

from friends.bench.grid.paper import (
    BINOMIAL,
    EMPIRICAL,
    EXTRA,
    PUBLISHED,
    TRIALS,
    VARIANCE,
    Published,
    published,
)
from friends.bench.grid.spec import read_grid
from friends.bench.statistics import standard_error, variance_over_root_n

TABLES = [f"table{i}" for i in range(1, 8)]
Place = tuple[tuple[tuple[str, str], ...], str]


def ours(table: str, preset: str = "paper") -> set[Place]:
    """The rows of a built-in grid, with those that are not defined somewhere."""
    grid = read_grid(table, preset)
    rows = {(tuple(sorted(cell.labels.items())), cell.row.name) for cell in grid.cells()}
    return rows | {(tuple(sorted(labels.items())), name) for labels, name, _ in grid.undefined()}


def theirs(table: str) -> list[Place]:
    return [(tuple(sorted(row.labels.items())), row.defense) for row in PUBLISHED if row.table == table]


@pytest.mark.parametrize("table", TABLES)
def test_every_row_of_the_paper_is_one_of_ours_and_ours_are_theirs_or_said_to_be_extra(table: str) -> None:
    found = theirs(table)
    assert len(found) == len(set(found))
    assert set(found) <= ours(table)
    rest = {name for _, name in ours(table) - set(found)}
    assert rest == {"clean", *EXTRA.get(table, ())}


@pytest.mark.parametrize("table", TABLES)
def test_small_grids_have_the_same_rows_so_that_the_paper_is_beside_them(table: str) -> None:
    assert set(theirs(table)) <= ours(table, "small")


def by(spread: str) -> list[Published]:
    return [row for row in PUBLISHED if row.spread == spread]


def test_what_follows_the_plus_minus_of_table_1_is_a_variance_over_root_n() -> None:
    assert len(by(VARIANCE)) == 12
    for row in by(VARIANCE):
        p = row.success / 100
        expected = variance_over_root_n(p if 0 < p < 1 else 0.5, TRIALS["table1"])
        assert row.success_spread == pytest.approx(100 * expected, abs=0.0051), row.name


def test_what_follows_that_of_the_papers_own_rows_of_tables_2_and_5_is_a_standard_error() -> None:
    assert len(by(BINOMIAL)) == 4 + 6
    for row in by(BINOMIAL):
        assert row.success_spread == pytest.approx(100 * standard_error(row.success / 100, 24), abs=0.006), row.name


def test_the_other_spreads_of_table_2_are_neither() -> None:
    assert len(by(EMPIRICAL)) == 9
    for row in by(EMPIRICAL):
        for formula in (standard_error, variance_over_root_n):
            assert abs((row.success_spread or 0) - 100 * formula(row.success / 100, 24)) > 0.1, row.name
        assert row.doubts


def test_numbers_that_stand_in_two_tables_are_the_same() -> None:
    gm = published("table3", {"attack": "gradient-matching-16"}, "friends-b")
    one = [published(t, {}, "friends-b") for t in ("table1", "table4", "table6")] + [
        gm,
        published("table7", {}, "friends-b-l2"),
    ]
    assert {(row.success, row.accuracy) for row in one if row} == {(0.0, 91.52)}
    assert all(row for row in one)
    two = [published("table2", {}, "friends-b"), published("table5", {"attack": "sleeper-agent"}, "friends-b")]
    assert {(row.success, row.success_spread, row.accuracy) for row in two if row} == {(21.52, 8.39, 89.76)}
    for name in ("friendly-noise", "friends-u", "friends-g"):
        first, second = published("table1", {}, name), published("table4", {}, name)
        assert first
        assert second
        assert (first.success, first.accuracy) == (second.success, second.accuracy)


def test_success_over_twenty_data_sets_is_a_multiple_of_five_percent() -> None:
    for row in PUBLISHED:
        if TRIALS.get(row.table) == 20:
            assert row.success % 5 == 0, row.name


def test_what_the_paper_contradicts_itself_in_is_marked() -> None:
    marked = {(row.table, row.defense) for row in PUBLISHED if row.doubts}
    assert {("table2", "strip"), ("table2", "neural-cleanse"), ("table2", "epic-0.1"), ("table2", "epic-0.2")} <= marked
    assert ("table2", "friends-b") not in marked
    undefended = published("table2", {}, "undefended")
    assert undefended
    for name in ("strip", "neural-cleanse"):
        row = published("table2", {}, name)
        assert row
        assert row.accuracy > undefended.accuracy  # which no retraining defense does
    sleeper = published("table3", {"attack": "sleeper-agent"}, "undefended")
    assert sleeper
    assert "40 epochs" in sleeper.doubts[0]


def test_a_row_that_the_paper_does_not_have_has_no_number() -> None:
    assert published("table1", {}, "clean") is None
    assert published("table1", {"attack": "x"}, "friends-b") is None
    assert published("table3", {}, "friends-b") is None
    assert published("mine", {}, "friends-b") is None
