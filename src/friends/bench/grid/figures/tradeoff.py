"""Success against accuracy over the strengths of a defense: which choices no other one beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from friends.bench.grid.figures.canvas import (
    BLACK,
    COLOURS,
    GREY,
    MARKERS,
    RED,
    Page,
    bars,
    counted,
    handle,
    page,
    percent,
    styled,
)
from friends.bench.grid.figures.curves import interval, number
from friends.bench.grid.figures.sheet import Sheet
from friends.bench.grid.figures.source import MissingError, Source
from friends.bench.grid.spec import Grid
from friends.bench.grid.summary import Summary, summarise
from friends.bench.record import CLEAN, UNDEFENDED

NAME = "trade-off"
_MARKS = {UNDEFENDED: (RED, "*", 18), CLEAN: (GREY, "X", 11)}
_STEP = 0.006
"""Points are drawn this far apart sideways, since many have the same success."""


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other one beats: lower success of the attack (first) and higher accuracy (second) are better.

    A point is beaten by one that is no worse in both and better in one; of equal points none beats the other.

    Returns:
        The places of the others, by ascending success.
    """

    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] <= a[0] and b[1] >= a[1] and b != a for b in points)

    return sorted((i for i, point in enumerate(points) if not beaten(point)), key=lambda i: points[i])


def compute(source: Source) -> Sheet:
    """One point for each row and point of the grid's axes; the undefended models and the control once each.

    Raises:
        MissingError: no defense was run.
    """
    summaries = summarise(source.mine)
    rows = [s for s in summaries if s.defense not in (UNDEFENDED, CLEAN)]
    if not rows:
        raise MissingError(f"no defense of grid {source.grid.name!r} was run")
    points = [_point(s) for s in rows]
    front = pareto([(p["success"]["mean"], p["accuracy"]["mean"]) for p in points])
    marks = {s.defense: _point(s) for s in reversed(summaries) if s.defense in (UNDEFENDED, CLEAN)}
    names = [_name(points[i]) for i in front]
    return Sheet(
        name=NAME,
        title="Attack success against clean accuracy",
        caption=f"Each point is one choice of {' and '.join(source.grid.axes)}, over {_goals(points)}; further "
        "left is better protected, further up more accurate. Black rings and line: choices that no other one beats in "
        "both by their means (the Pareto front); the intervals, 95 % of each point by itself, say how far that can be "
        f"trusted. Points are drawn a little apart sideways, as many have the same success. The "
        f"front: {'; '.join(names)}.",
        alt="Scatter of attack success and clean accuracy. "
        + "; ".join(f"{_name(p)}: success {p['success']['mean']:.0%}, accuracy {p['accuracy']['mean']:.1%}"
                    for p in [*points, *marks.values()]) + f". Pareto front: {'; '.join(names)}.",
        scaled_down=source.scaled_down,
        n={_name(p): p["success"]["n"] for p in points},
        settings={"axes": {axis: list(some) for axis, some in source.grid.axes.items()}},
        missing=source.gaps(),
        numbers={"points": points, "front": front, "marks": marks},
    )  # fmt: skip


def _point(s: Summary) -> dict[str, Any]:
    labels = s.labels if s.defense not in (UNDEFENDED, CLEAN) else {}
    return {
        "defense": s.defense,
        "labels": dict(labels),
        "success": interval(s.success),
        "accuracy": interval(s.accuracy),
    }


def _name(point: dict[str, Any]) -> str:
    place = ", ".join(f"{axis} {label}" for axis, label in point["labels"].items())
    return f"{point['defense']} ({place})" if place else str(point["defense"])


def _goals(points: Sequence[dict[str, Any]]) -> str:
    counts = sorted({p["success"]["n"] for p in points})
    return counted(counts[0], "goal") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} goals"


def paint(sheet: Sheet) -> Any:
    """Draw it: the first axis of the grid is the colour, the second the marker."""
    points, front, marks = (sheet.numbers[name] for name in ("points", "front", "marks"))
    axes_of = sheet.settings["axes"]
    with styled():
        drawn = page(sheet, 8.6, 5.4)
        (axes,) = drawn.panels(1, 1, right=1.5)
        for name, (colour, marker, size) in _MARKS.items():
            if name in marks:
                _cross(axes, marks[name], colour, marker, size, 0.0)
        shifts = [_STEP * (place - (len(points) - 1) / 2) for place in range(len(points))]
        for place, (point, shift) in enumerate(zip(points, shifts, strict=True)):
            colour, marker = _look(point["labels"], axes_of)
            _cross(axes, point, colour, marker, 8, shift, BLACK if place in front else colour)
        line = [(points[i]["success"]["mean"] + shifts[i], points[i]["accuracy"]["mean"]) for i in front]
        axes.plot(*zip(*line, strict=True), color=BLACK, linewidth=1, linestyle="--", zorder=1, label="Pareto front")
        axes.set_xlabel("attack success (lower is better)")
        axes.set_ylabel("clean test accuracy (higher is better)")
        axes.set_xlim(-0.07, 1.07)
        percent(axes.xaxis)
        percent(axes.yaxis)
        _legend(drawn, axes, axes_of, [name for name in _MARKS if name in marks])
        return drawn.figure


def _look(labels: dict[str, str], axes_of: dict[str, list[str]]) -> tuple[str, str]:
    """Colour by the first axis, marker by the second; further axes are told by neither."""
    places = [sorted(some, key=lambda t: number(t) or 0.0).index(labels[axis]) for axis, some in axes_of.items()]
    colours = COLOURS[1:]
    first, second = (*places, 0, 0)[:2]
    return colours[first % len(colours)], MARKERS[second % len(MARKERS)]


def _cross(
    axes: Any, point: dict[str, Any], colour: str, marker: str, size: float, shift: float, edge: str | None = None
) -> None:
    """A point with its intervals both ways; one on the front has a black edge."""
    x, y = point["success"], point["accuracy"]
    across, up = (bars([v["mean"]], [v["low"]], [v["high"]]) * (not v["open"]) for v in (x, y))
    axes.errorbar([x["mean"] + shift], [y["mean"]], xerr=across, yerr=up, color=colour, marker=marker, markersize=size,
                  markeredgecolor=edge or colour, markeredgewidth=1.6 if edge == BLACK else 0.5, elinewidth=0.8,
                  capsize=2, linestyle="none", ecolor=colour, alpha=0.9)  # fmt: skip


def of_defenses(grid: Grid) -> bool:
    """Whether a grid has two axes or more, and all they change is the defenses."""
    points = [part for some in grid.axes.values() for part in some.values()]
    return len(grid.axes) > 1 and all(part.keys() <= {"defenses"} for part in points)


def _legend(drawn: Page, axes: Any, axes_of: dict[str, list[str]], marks: list[str]) -> None:
    handles, names = axes.get_legend_handles_labels()
    handles += [handle(_MARKS[name][0], _MARKS[name][1], 9) for name in marks]
    names += marks
    for place, (axis, some) in enumerate(list(axes_of.items())[:2]):
        for label in sorted(some, key=lambda t: number(t) or 0.0):
            others = {other: others[0] for other, others in axes_of.items()}
            colour, marker = _look({**others, axis: label}, axes_of)
            handles.append(handle(colour, "s") if place == 0 else handle(GREY, marker))
            names.append(f"{axis} = {label}")
    drawn.legend(7.05, 5.0, handles, names, loc="upper left")
