"""Success and accuracy over a setting: how they change with the poisons' number, their bound, or a noise's strength."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from friends.bench.grid.estimates import Estimate
from friends.bench.grid.figures.canvas import (
    COLOURS,
    GREY,
    LINES,
    MARKERS,
    bars,
    counted,
    page,
    percent,
    styled,
)
from friends.bench.grid.figures.sheet import Sheet
from friends.bench.grid.figures.source import MissingError, Source
from friends.bench.grid.spec import Grid
from friends.bench.grid.summary import Summary, summarise
from friends.bench.record import CLEAN, UNDEFENDED

PREFIX = "success-over-"
_NAMES = {
    "budget": "number of poisons (share of the training images)",
    "xi": "bound of the perturbation",
    "zeta": "bound of the friendly noise",
    "mu": "strength of the random noise",
}


def number(label: str) -> float | None:
    """The number that a label on an axis spells (``"0.05"``, ``"16/255"``); None if it spells none."""
    above, _, below = label.partition("/")
    try:
        return float(above) / (float(below) if below else 1.0)
    except (ValueError, ZeroDivisionError):
        return None


def numeric_axes(grid: Grid) -> list[str]:
    """The axes of a grid with two or more points, each of which is a number."""
    return [
        axis for axis, points in grid.axes.items() if len(points) > 1 and all(number(p) is not None for p in points)
    ]


def compute(source: Source) -> Sheet:
    """Success and accuracy of every row at every point of the grid's one numeric axis.

    Raises:
        MissingError: the grid has no such axis.
    """
    axes = numeric_axes(source.grid)
    if len(axes) != 1 or len(source.grid.axes) != 1:
        raise MissingError(f"grid {source.grid.name!r} has not exactly one axis, of numbers")
    (axis,) = axes
    found = {(s.labels[axis], s.defense): s for s in summarise(source.mine)}
    labels = sorted(source.grid.axes[axis], key=lambda label: number(label) or 0.0)
    rows = [row for row in source.rows if any(name == row for _, name in found)]
    curves = {row: _curve([found[label, row] for label in labels if (label, row) in found], axis) for row in rows}
    alike = len({tuple(r.pair for r in s.records) for s in found.values()}) == 1
    trials = sorted({point["success"]["n"] for curve in curves.values() for point in curve})
    between = f"{trials[0]} to {trials[-1]} goals" if len(trials) > 1 else counted(trials[0], "goal")
    kinds = sorted({s.success.kind for s in found.values()})
    title = f"Success over the {_name(axis).partition(' (')[0]}"
    return Sheet(
        name=f"{PREFIX}{axis}",
        title=title,
        caption=f"Left: attack success; right: clean test accuracy, over the {_name(axis)}; {between} a "
        f"point{', the same ones in all rows' if alike else ''}. Bars: 95 % intervals of each point by itself "
        f"(success: {', '.join(kinds)}; accuracy: t). "
        + (f"The row {CLEAN!r} was trained without poisons: how often the goal is misread anyway. " if CLEAN in rows
           else "")
        + _few(list(found.values())),
        alt=f"{title}. " + "; ".join(
            f"{row}: " + ", ".join(f"{p['success']['mean']:.0%} at {p['label']}" for p in curve)
            for row, curve in curves.items()) + ".",
        scaled_down=source.scaled_down,
        n={f"goals, {row} at {axis} = {p['label']}": p["success"]["n"] for row, curve in curves.items() for p in curve},
        settings={"axis": axis, "labels": labels},
        missing=source.gaps(),
        numbers={"axis": axis, "labels": labels, "places": [number(label) for label in labels], "curves": curves},
    )  # fmt: skip


def _name(axis: str) -> str:
    return _NAMES.get(axis, axis)


def _curve(summaries: Sequence[Summary], axis: str) -> list[dict[str, Any]]:
    """The points of a row: where they lie, success, accuracy."""
    return [
        {
            "label": s.labels[axis],
            "at": number(s.labels[axis]),
            "success": interval(s.success),
            "accuracy": interval(s.accuracy),
        }
        for s in summaries
    ]


def interval(estimate: Estimate) -> dict[str, Any]:
    """An estimate as plain values."""
    numbers = {name: round(float(getattr(estimate, name)), 6) for name in ("mean", "low", "high")}
    return {**numbers, "n": estimate.n, "kind": estimate.kind, "open": estimate.is_open}


def _few(summaries: Sequence[Summary]) -> str:
    """A sentence if there are too few trials."""
    told = {s.few for s in summaries if s.few}
    return "" if not told else f"Read with care: {min(told)}."


def paint(sheet: Sheet) -> Any:
    """Draw it."""
    curves: Mapping[str, list[dict[str, Any]]] = sheet.numbers["curves"]
    places = sheet.numbers["places"]
    with styled():
        drawn = page(sheet, 9.6, 4.1)
        left, right = drawn.panels(1, 2, bottom=0.35)
        for axes, what in ((left, "success"), (right, "accuracy")):
            for row, curve in curves.items():
                _draw(axes, row, curve, what, list(curves), min_gap(places))
            percent(axes.yaxis)
            axes.set_xlabel(_name(sheet.numbers["axis"]))
            _ticks(axes, sheet.numbers["labels"], places)
        left.set_ylim(-0.03, 1.03)
        left.set_title("(a) attack success")
        right.set_title("(b) clean test accuracy")
        handles, names = left.get_legend_handles_labels()
        drawn.legend(4.8, 0.1, handles, names, loc="lower center", ncols=min(5, len(names)))
        return drawn.figure


def min_gap(places: Sequence[float]) -> float:
    """The least distance between neighbours."""
    return min(b - a for a, b in itertools.pairwise(places))


def _draw(axes: Any, row: str, curve: list[dict[str, Any]], what: str, rows: list[str], gap: float) -> None:
    """One row; rows are moved apart a little, so that equal points and their bars can be seen."""
    colour, style, marker = look(row, rows)
    shift = 0.06 * gap * (rows.index(row) - (len(rows) - 1) / 2)
    means, low, high = ([p[what][key] for p in curve] for key in ("mean", "low", "high"))
    shown = bars(means, low, high)
    shown[:, [p[what]["open"] for p in curve]] = 0
    axes.errorbar([p["at"] + shift for p in curve], means, yerr=shown, color=colour, linestyle=style, marker=marker,
                  markersize=5, capsize=2.5, elinewidth=1, label=row)  # fmt: skip


def look(row: str, rows: Sequence[str]) -> tuple[str, str, str]:
    """Colour, line and marker of a row: undefended red, the control grey, each defense its own."""
    if row == UNDEFENDED:
        return COLOURS[0], "-", "o"
    if row == CLEAN:
        return GREY, ":", "x"
    place = [name for name in rows if name not in (UNDEFENDED, CLEAN)].index(row) + 1
    return COLOURS[place % len(COLOURS)], LINES[place % len(LINES)], MARKERS[place % len(MARKERS)]


def _ticks(axes: Any, labels: Sequence[str], places: Sequence[float]) -> None:
    if all(label.endswith("/255") for label in labels):
        axes.set_xticks(places, labels)
    elif max(places) <= 1:
        percent(axes.xaxis)
        axes.set_xticks(places)
    else:
        axes.set_xticks(places, labels)
