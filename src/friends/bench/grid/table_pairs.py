"""Two defenses beside each other, goal by goal: what a table of rows beside ``undefended`` leaves open.

Which pairs is a setting of the grid, so that they are chosen before there are results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from friends.bench.grid.estimates import Comparison, by_goal, compare
from friends.bench.grid.record import Record
from friends.bench.grid.site_words import p_text
from friends.bench.grid.spec import Grid
from friends.bench.grid.summary import Summary
from friends.bench.grid.table import Column, Entry, Table
from friends.bench.statistics import difference_interval, holm

LEAST_P = 1e-4
NOTES = (
    "Differences are of the first row minus the second, in points, on the same goals, poisons and initial weights, "
    "with 95 % intervals: of Bonett and Price where goals are won or lost, of Student's t otherwise, as for accuracy.",
    "p: two-sided exact McNemar or sign-flip test of success, adjusted by Holm over all pairs of this table.",
)


@dataclass(frozen=True)
class Pair:
    """Two rows at one point.

    Args:
        labels: the point.
        row, against: the names of the two.
        success: of ``row`` minus that of ``against``.
        accuracy: likewise, its mean and interval.
    """

    labels: dict[str, str]
    row: str
    against: str
    success: Comparison
    accuracy: tuple[float, float, float]


def pairs_table(grid: Grid, summaries: Sequence[Summary]) -> Table | None:
    """The table of all pairs that the grid asks for and that have goals in common; none if there are none."""
    pairs = [pair for labels, _ in grid.points() for pair in _pairs_at(grid, labels, summaries)]
    if not pairs:
        return None
    axes = list(grid.axes)
    names = [*axes, "row", "against", "n", "success", "p (Holm)", "accuracy"]
    head = tuple(Column(name, number=name not in (*axes, "row", "against")) for name in names)
    adjusted = holm([pair.success.p for pair in pairs])
    rows = tuple(_entries(pair, axes, p) for pair, p in zip(pairs, adjusted, strict=True))
    data = tuple(_data(pair, axes, p) for pair, p in zip(pairs, adjusted, strict=True))
    return Table(f"{grid.name}-pairs", f"{grid.title or grid.name}: pairs", head, rows, NOTES, data)


def _pairs_at(grid: Grid, labels: dict[str, str], summaries: Sequence[Summary]) -> list[Pair]:
    records = {s.defense: s.records for s in summaries if s.labels == labels}
    wanted = [(row, other) for row, others in grid.compare.items() for other in others]
    found = [_pair(labels, row, other, records.get(row, ()), records.get(other, ())) for row, other in wanted]
    return [pair for pair in found if pair is not None]


def _pair(
    labels: dict[str, str], row: str, against: str, ours: Sequence[Record], theirs: Sequence[Record]
) -> Pair | None:
    success = compare(theirs, ours)
    if success is None:
        return None
    partners = {record.pair: record for record in theirs}
    shared = [(partners[record.pair], record) for record in ours if record.pair in partners]
    before, after = (by_goal((pair[i] for pair in shared), "accuracy") for i in (0, 1))
    mean = math.fsum(after) / len(after) - math.fsum(before) / len(before)
    return Pair(labels, row, against, success, (mean, *difference_interval(before, after)))


def _entries(pair: Pair, axes: Sequence[str], p: float) -> tuple[Entry, ...]:
    success = pair.success
    texts = [
        *(pair.labels[axis] for axis in axes), pair.row, pair.against, str(success.goals),
        _points(success.difference, success.low, success.high), p_text(p, LEAST_P), _points(*pair.accuracy),
    ]  # fmt: skip
    return tuple(Entry(text) for text in texts)


def _data(pair: Pair, axes: Sequence[str], p: float) -> dict[str, str | int | float | None]:
    success, accuracy = pair.success, pair.accuracy
    return {
        **{axis: pair.labels[axis] for axis in axes},
        "row": pair.row,
        "against": pair.against,
        "goals": success.goals,
        "difference": success.difference,
        "low": success.low,
        "high": success.high,
        "p": success.p,
        "p_holm": p,
        "accuracy_difference": accuracy[0],
        "accuracy_low": accuracy[1],
        "accuracy_high": accuracy[2],
    }


def _points(mean: float, low: float, high: float) -> str:
    """Such as −5.0 (−11.2 to +1.2)."""
    one, least, most = (f"{round(100 * share, 1) + 0.0:+.1f}".replace("-", "\u2212") for share in (mean, low, high))
    return f"{one} ({least} to {most})"
