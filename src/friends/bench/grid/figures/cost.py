"""Cost against protection: what a defense adds to the time of a training, and what it keeps the attack from."""

from __future__ import annotations

from typing import Any

from friends.bench.grid.figures.canvas import COLOURS, absent, bars, counted, handle, page, percent, seconds, styled
from friends.bench.grid.figures.curves import interval
from friends.bench.grid.figures.sheet import Sheet
from friends.bench.grid.figures.source import MissingError, Source
from friends.bench.grid.summary import Summary, summarise
from friends.bench.record import CLEAN

NAME = "cost"
TRAINING = "training"
"""The stage whose time counts: one model with everything that its defense does."""


def compute(source: Source) -> Sheet:
    """For each row and point of the grid: median seconds of a training, and 1 - success with its interval.

    Raises:
        MissingError: no poisoned model was run.
    """
    summaries = [s for s in summarise(source.mine) if s.defense != CLEAN]
    if not summaries:
        raise MissingError(f"no poisoned model of grid {source.grid.name!r} was run")
    panels: dict[str, list[dict[str, Any]]] = {}
    for s in summaries:
        panels.setdefault(_place(s), []).append(_point(s))
    machines = sorted({f"{r.device}, {counted(r.threads, 'thread')}" for s in summaries for r in s.records})
    found = {s.defense for s in summaries}
    missing = {part: why for part, why in source.gaps().items() if part != CLEAN}
    return Sheet(
        name=NAME,
        title="Cost of a training against protection",
        caption="Median seconds of training one model, with everything that its defense does, on a logarithmic scale, "
        "against the share of goals that the attack did not reach, with 95 % intervals of each row by itself. Up and "
        f"left is better. Times are of {'; '.join(machines)}; other work on the machine lengthens them.",
        alt="Scatter of seconds and protection. " + " ".join(
            f"{panel + ': ' if panel else ''}" + "; ".join(
                f"{p['defense']} {p['seconds']:.3g} s, {p['protection']['mean']:.0%} protected" for p in points) + "."
            for panel, points in panels.items()),
        scaled_down=source.scaled_down,
        n={f"{panel + ', ' if panel else ''}{p['defense']}": p["protection"]["n"]
           for panel, points in panels.items() for p in points},
        settings={"time": "median over models", "stage": TRAINING, "machines": machines},
        missing=missing,
        numbers={"panels": panels, "rows": [row for row in source.rows if row in found]},
    )  # fmt: skip


def _place(s: Summary) -> str:
    return ", ".join(f"{axis} = {label}" for axis, label in s.labels.items())


def _point(s: Summary) -> dict[str, Any]:
    won = interval(s.success)
    kept = {"mean": 1 - won["mean"], "low": 1 - won["high"], "high": 1 - won["low"]}
    rounded = {name: round(value, 6) for name, value in kept.items()}
    seconds = float(f"{s.seconds.get(TRAINING, 0.0):.6g}")
    return {"defense": s.defense, "seconds": seconds, "protection": {**won, **rounded}}


def paint(sheet: Sheet) -> Any:
    """Draw it: a panel for each point of the axes."""
    panels, rows = sheet.numbers["panels"], sheet.numbers["rows"]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    with styled():
        drawn = page(sheet, 3.6 * columns + (5.0 if columns == 1 else 1.9), max(4.2, 3.1 * lines))
        grid = drawn.panels(lines, columns, right=1.75)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for place, (axes, (title, points)) in enumerate(zip(grid, panels.items(), strict=False)):
            axes.set_title(title, fontsize=9)
            _panel(axes, points, rows, _reach(panels))
            axes.set_xlabel("seconds of one training" if place + columns >= len(panels) else "")
            axes.set_ylabel("protection (1 \N{MINUS SIGN} success)" if place % columns == 0 else "")
        names = [f"{place}  {row}" for place, row in enumerate(rows, 1)]
        handles = [handle(_look(row, rows)[0], "o", 8) for row in rows]
        drawn.legend(drawn.width - 1.75, drawn.height - 0.4, handles, names, loc="upper left")
        return drawn.figure


def _reach(panels: dict[str, list[dict[str, Any]]]) -> tuple[float, float]:
    """From which to which time all panels go."""
    times = [p["seconds"] for points in panels.values() for p in points if p["seconds"] > 0] or [1.0]
    return min(times) / 1.25, max(times) * 1.25


def _look(row: str, rows: list[str]) -> tuple[str, str]:
    """Colour of a row, and the number that stands in its marker: there are more rows than colours."""
    return COLOURS[rows.index(row) % len(COLOURS)], f"${rows.index(row) + 1}$"


def _panel(axes: Any, points: list[dict[str, Any]], rows: list[str], reach: tuple[float, float]) -> None:
    timed = [p for p in points if p["seconds"] > 0]
    if not timed:
        absent(axes, "no time was written down")
        return
    for point in timed:
        colour, text = _look(point["defense"], rows)
        kept = point["protection"]
        spans = bars([kept["mean"]], [kept["low"]], [kept["high"]]) * (not kept["open"])
        x, y = [point["seconds"]], [kept["mean"]]
        axes.errorbar(x, y, yerr=spans, color=colour, marker="o", markersize=12, elinewidth=0.9, capsize=2.5,
                      linestyle="none", zorder=3)  # fmt: skip
        axes.plot(x, y, marker=text, color="white", markersize=5 if len(text) < 4 else 7.5, markeredgewidth=0.3,
                  linestyle="none", zorder=4)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(*reach)
    seconds(axes.xaxis)
    axes.set_ylim(-0.06, 1.06)
    percent(axes.yaxis)
