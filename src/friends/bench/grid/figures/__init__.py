"""The figures of a grid: numbers are computed (``compute``), written down, and drawn (``paint``) from nothing else.

``figure1`` to ``figure5`` are those of the paper, of the grids of these names; ``success-over-AXIS`` of a grid with one
axis, of numbers; ``trade-off`` of one whose axes change the strengths of defenses; ``cost`` of every other grid with
defenses. See docs/figures.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from friends.bench.grid.figures import cost, curves, figure1, figure2, figure3, figure4, figure5, tradeoff
from friends.bench.grid.figures.canvas import save
from friends.bench.grid.figures.sheet import Sheet
from friends.bench.grid.figures.source import MissingError, Source
from friends.bench.grid.record import Record
from friends.bench.grid.spec import Grid
from friends.bench.grid.stages import Workbench
from friends.types import Progress, silent

__all__ = ["MissingError", "Sheet", "Source", "draw", "figures_of"]

Ways = tuple[Callable[[Source], Sheet], Callable[[Sheet], Any]]
PAPER: dict[str, Ways] = {
    "figure1": (figure1.compute, figure1.paint),
    "figure2": (figure2.compute, figure2.paint),
    "figure3": (figure3.compute, figure3.paint),
    "figure4": (figure4.compute, figure4.paint),
    "figure5": (figure5.compute, figure5.paint),
}


def figures_of(grid: Grid) -> list[str]:
    """The names of the figures that a grid has."""
    return list(_figures(grid))


def _figures(grid: Grid) -> dict[str, Ways]:
    """The figures of a grid, and how each is computed and drawn."""
    if grid.name in PAPER:
        return {grid.name: PAPER[grid.name]}
    axes = curves.numeric_axes(grid)
    if len(axes) == len(grid.axes) == 1:
        return {curves.PREFIX + axes[0]: (curves.compute, curves.paint)}
    if grid.rows and tradeoff.of_defenses(grid):
        return {tradeoff.NAME: (tradeoff.compute, tradeoff.paint)}
    return {cost.NAME: (cost.compute, cost.paint)} if grid.rows else {}


def draw(
    grid: Grid,
    records: Sequence[Record],
    bench: Workbench | None,
    out: Path,
    *,
    only: Collection[str] = (),
    progress: Progress = silent,
) -> list[Path]:
    """Compute, write and draw the figures of a grid: ``OUT/figures/NAME.png``, ``.svg`` and ``.json``.

    Nothing is trained but surrogates that are no longer in the cache. Equal records and models give equal files.

    Args:
        records: of the grid's cells; others are passed over.
        bench: finds the models and poisons of cells; None is enough for what only needs records.
        only: names of figures; all by default.

    Returns:
        The files, figure by figure.

    Raises:
        MissingError: a figure has nothing to show; a part that is missing is named in the picture instead.
        ValueError: the grid has no such figure, or its records must not be put together.
    """
    figures = _figures(grid)
    unknown = [name for name in only if name not in figures]
    if unknown:
        raise ValueError(f"grid {grid.name!r} has no figure {unknown[0]!r}; it has {', '.join(figures) or 'none'}")
    chosen = [name for name in figures if not only or name in only]
    if not chosen:
        return []
    source = Source(grid, records, bench, progress)
    written: list[Path] = []
    for place, name in enumerate(chosen):
        progress("drawing", place, len(chosen), name)
        compute, paint = figures[name]
        sheet = compute(source)
        folder = out / "figures"
        written += [*save(paint(sheet), sheet, folder), sheet.write(folder / f"{name}.json")]
    progress("drawing", len(chosen), len(chosen))
    return written
