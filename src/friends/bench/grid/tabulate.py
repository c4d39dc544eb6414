"""Tables of a grid, beside the paper's numbers: what was run, what is still to run, and what is not defined.

A table of one axis and one or two defenses has the paper's form of Tables 3 and 5: a row for each point of the axis,
columns for each defense. Every other has a row for each defense, and a column for each axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from friends.bench.grid.site_words import p_text
from friends.bench.grid.spec import Grid
from friends.bench.grid.summary import Estimate, Summary
from friends.bench.grid.table import Column, Entry, Table
from friends.bench.grid.table_lines import Line, clean_last, data_of, line_of, planned_lines
from friends.bench.grid.table_notes import notes_of
from friends.bench.grid.table_pairs import pairs_table
from friends.bench.record import CLEAN, UNDEFENDED
from friends.data.files import write_text

__all__ = ["Column", "Entry", "Table", "tables", "write"]

NONE = "\u2013"
NOT_RUN = "not run"
NOT_DEFINED = "n/a"
LEAST_P = 1e-4
"""The least p-value that a table spells out: tables are quoted, and pages, which stop at 0.001, are read."""
_WIDE = 2
"""Up to how many defenses have columns of their own."""


def tables(grid: Grid | None, summaries: Sequence[Summary]) -> list[Table]:
    """A table for every grid that the summaries are of; with ``grid``, for this one, complete, and one of its pairs.

    Args:
        grid: says which rows there should be, so that those without records are "not run" and those that are not
            defined "n/a"; without one, only what was run is shown.
        summaries: of :func:`friends.bench.grid.summary.summarise`.

    Raises:
        ValueError: a summary is of another grid than ``grid``, or summaries of one grid are of two presets.
    """
    if grid is not None:
        other = [s for s in summaries if (s.grid, s.preset) != (grid.name, grid.preset)]
        if other:
            theirs, ours = f"{other[0].grid} {other[0].preset}".strip(), f"{grid.name} {grid.preset}".strip()
            raise ValueError(f"a row is of grid {theirs!r} (cell {other[0].records[0].cell}), not of {ours!r}")
        pairs = pairs_table(grid, summaries)
        return [_table(grid.name, grid.title or grid.name, planned_lines(grid, summaries)), *([pairs] if pairs else [])]
    found: dict[str, list[Summary]] = {}
    for summary in summaries:
        some = found.setdefault(summary.grid, [summary])
        if some[0].preset != summary.preset:
            raise ValueError(f"grid {summary.grid!r} has cell {some[0].records[0].cell} of preset {some[0].preset!r} "
                             f"and {summary.records[0].cell} of {summary.preset!r}: make a table of each")  # fmt: skip
        if some[-1] is not summary:
            some.append(summary)
    return [_table(name, name, [line_of(s) for s in clean_last(some)]) for name, some in found.items()]


def write(tables: Sequence[Table], folder: Path) -> list[Path]:
    """Write ``NAME.md``, ``NAME.tex`` and ``NAME.csv`` of each table; a file is never half written.

    Raises:
        ValueError: two tables have one name, or a name is no plain file name.
    """
    names = [table.name for table in tables]
    for name in names:
        if names.count(name) > 1 or not name or name.startswith(".") or Path(name).name != name or "\\" in name:
            raise ValueError(f"every table needs a plain file name of its own, not {name!r}")
    found: list[Path] = []
    for table in tables:
        for ending, text in ((".md", table.markdown()), (".tex", table.latex()), (".csv", table.csv())):
            found.append(folder / f"{table.name}{ending}")
            write_text(found[-1], text)
    return found


def _table(name: str, title: str, lines: Sequence[Line]) -> Table:
    axes = list({axis: None for line in lines for axis in line.labels})
    varying = [axis for axis in axes if len({line.labels.get(axis, "") for line in lines}) > 1]
    defenses = list({line.defense: None for line in lines if line.defense not in (UNDEFENDED, CLEAN)})
    wide = len(axes) == len(varying) == 1 and 0 < len(defenses) <= _WIDE
    head, rows = _by_point(axes[0], defenses, lines) if wide else _by_defense(axes, lines)
    return Table(
        name, title, head, rows, notes_of(lines, seconds=not wide), tuple(data_of(line, axes) for line in lines)
    )


def _by_defense(axes: Sequence[str], lines: Sequence[Line]) -> tuple[tuple[Column, ...], tuple[tuple[Entry, ...], ...]]:
    """A row for each defense and point."""
    columns = _columns(lines)
    head = (*(Column(axis, number=False) for axis in axes), Column("defense", number=False))
    rows: list[tuple[Entry, ...]] = []
    for line in lines:
        place = (Entry(line.labels.get(axis, NONE)) for axis in axes)
        rows.append((*place, Entry(line.defense), *(_entry(line, column) for column in columns)))
    return (*head, *(Column(column) for column in columns)), tuple(rows)


def _by_point(
    axis: str, defenses: Sequence[str], lines: Sequence[Line]
) -> tuple[tuple[Column, ...], tuple[tuple[Entry, ...], ...]]:
    """A row for each point, with columns for each defense; one column for n where it is the same all over a point."""
    at = {(line.labels[axis], line.defense): line for line in lines}
    labels = list(dict.fromkeys(label for label, _ in at))
    counts = {label: {_entry(line, N).text for line in lines if line.labels[axis] == label} for label in labels}
    once = all(len(some - {NONE}) < 2 for some in counts.values())
    groups = [(name, _columns_of_group(name, lines, once)) for name in (UNDEFENDED, *defenses)]
    if any(line.defense == CLEAN for line in lines):
        groups.append((CLEAN, [SUCCESS, ACCURACY]))
    head = [Column(axis, number=False), *([Column(N)] if once else [])]
    head += [Column(title, name) for name, titles in groups for title in titles]
    rows: list[tuple[Entry, ...]] = []
    for label in labels:
        n = [Entry(max(counts[label] - {NONE}, default=NONE))] if once else []
        of_row = [(at.get((label, name)), title) for name, titles in groups for title in titles]
        rows.append((Entry(label), *n, *(_entry(line, title) if line else Entry(NONE) for line, title in of_row)))
    return tuple(head), tuple(rows)


def _columns_of_group(name: str, lines: Sequence[Line], n_once: bool) -> list[str]:
    """The columns of one defense beside others: the paper's two numbers share one."""
    columns = [column for column in _columns([line for line in lines if line.defense == name]) if column != SECONDS]
    columns = [PAPER_BOTH if column == PAPER else column for column in columns if column != PAPER_ACCURACY]
    return [column for column in columns if column != N or not n_once]


SUCCESS, ACCURACY, SECONDS = "success % (95 % interval)", "accuracy %", "seconds"
N, P, DIFFERENCE = "n", "p (Holm)", "difference"
PAPER, PAPER_ACCURACY, PAPER_BOTH = "paper success %", "paper accuracy %", "paper's success, accuracy %"


def _columns(lines: Sequence[Line]) -> list[str]:
    """What is worth a column: p where something was compared, the paper where it has a number."""
    columns = [SUCCESS, N, ACCURACY]
    if any(line.summary and line.summary.versus for line in lines):
        columns.append(P)
    columns.append(SECONDS)
    if any(line.paper for line in lines):
        columns += [PAPER, *([DIFFERENCE] if any(line.comparable for line in lines) else []), PAPER_ACCURACY]
    return columns


def _entry(line: Line, column: str) -> Entry:
    """What stands in one column of a line."""
    paper, summary = line.paper, line.summary
    if column == PAPER:
        return Entry(f"{paper.success:.2f}" if paper else NONE, mark=line.outside)
    if column == PAPER_BOTH:
        return Entry(f"{paper.success:.2f}, {paper.accuracy:.2f}" if paper else NONE, mark=line.outside)
    if column == PAPER_ACCURACY:
        return Entry(f"{paper.accuracy:.2f}" if paper else NONE)
    if column == DIFFERENCE:
        return Entry(NONE if line.difference is None else _signed(line.difference))
    if summary is None:
        return Entry((NOT_DEFINED if line.reason else NOT_RUN) if column == SUCCESS else NONE)
    if column == SUCCESS:
        return Entry(_with_interval(summary.success))
    if column == N:
        whole = line.planned <= summary.trials
        return Entry(str(summary.success.n) if whole else f"{summary.trials} of {line.planned}")
    if column == ACCURACY:
        answered = f" ({100 * summary.selective.mean:.1f} of those answered)" if summary.abstained else ""
        return Entry(f"{100 * summary.accuracy.mean:.1f}{answered}")
    if column == P:
        return Entry(p_text(summary.versus.p_holm, LEAST_P) if summary.versus else NONE)
    return Entry(NONE if math.isnan(summary.seconds_of_training) else f"{summary.seconds_of_training:.1f}")


def _with_interval(estimate: Estimate) -> str:
    """Such as 12.5 (0.3-52.7), percent."""
    if estimate.is_open:
        return f"{100 * estimate.mean:.1f} (no interval)"
    return f"{100 * estimate.mean:.1f} ({100 * estimate.low:.1f}\u2013{100 * estimate.high:.1f})"


def _signed(points: float) -> str:
    return f"{round(points, 1) + 0.0:+.1f}".replace("-", "\u2212")  # + 0.0: no minus before 0.0
