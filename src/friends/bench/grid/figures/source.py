"""Where figures come from: the records of a grid, and the models, poisons and noises that its cells left behind.

Nothing is trained for a figure: what was not run, or is no longer in the cache, is said to be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from torch import Tensor, nn

from friends.bench.grid.record import Record
from friends.bench.grid.spec import Cell, Grid
from friends.bench.grid.stages import Workbench
from friends.bench.lab import Lab
from friends.bench.record import CLEAN, UNDEFENDED
from friends.data.poisoned import PoisonedDataset
from friends.types import Progress, Streams, silent

T = TypeVar("T")
Place = tuple[tuple[tuple[str, str], ...], str, int, int, int]


class MissingError(ValueError):
    """What a figure needs is not there; the message names it and the way to get it."""


@dataclass(frozen=True)
class Source:
    """A grid, what it found, and what it left behind.

    Args:
        grid: which cells there should be.
        records: of the cells that were run; those of other grids are passed over.
        bench: finds models, poisons and noises in the cache; without one only records can be drawn.
        progress: told how far every step is.

    Raises:
        MissingError: no cell of the grid was run.
    """

    grid: Grid
    records: Sequence[Record]
    bench: Workbench | None = None
    progress: Progress = silent

    def __post_init__(self) -> None:
        if not self.mine:
            raise MissingError(f"no cell of grid {self.grid.name!r} is among the {len(self.records)} records: run it "
                               "first")  # fmt: skip

    @cached_property
    def mine(self) -> list[Record]:
        """The records of this grid, in the order of its cells."""
        order = {_place_of(cell): number for number, cell in enumerate(self.grid.cells())}
        here = self.grid.name, self.grid.preset
        found = [r for r in self.records if (r.grid, r.preset) == here and _place(r) in order]
        return sorted(found, key=lambda r: order[_place(r)])

    def of(self, row: str) -> list[Record]:
        """The records of a row, in the order of their pairs."""
        return sorted((r for r in self.mine if r.defense == row), key=lambda r: r.pair)

    @property
    def rows(self) -> list[str]:
        """The names of the rows: undefended, the control if there is one, then the defenses."""
        return [UNDEFENDED, *([CLEAN] if self.grid.control else []), *(row.name for row in self.grid.rows)]

    @property
    def scaled_down(self) -> str:
        """How the runs are smaller than the published ones."""
        return "; ".join(dict.fromkeys(r.scaled_down for r in self.mine if r.scaled_down))

    @property
    def streams(self) -> Streams:
        """The random streams of a figure: the same for each drawing."""
        return Streams(self.grid.seeds[0]).child("figure", self.grid.name)

    @cached_property
    def place(self) -> tuple[dict[str, str], int, int, int]:
        """Labels, seed, goal and victim number of the models that are looked at closely: those with most rows."""
        count: dict[object, int] = {}
        for r in self.mine:
            count[_place(r)[0], r.pair] = count.get((_place(r)[0], r.pair), 0) + 1
        best = max((_place_of(cell) for cell in self.grid.cells()), key=lambda p: count.get((p[0], p[2:]), 0))
        return dict(best[0]), *best[2:]

    def cell(self, row: str) -> Cell:
        """The cell of a row at :attr:`place`, so that what is compared shares its data, poisons and initial weights.

        Raises:
            MissingError: it was not run.
        """
        labels, *pair = self.place
        sought = (tuple(sorted(labels.items())), row, *pair)
        if sought not in {_place(r) for r in self.mine}:
            raise MissingError(f"{row} was not run with seed {pair[0]}, goal {pair[1] + 1}")
        return next(cell for cell in self.grid.cells() if _place_of(cell) == sought)

    def gaps(self) -> dict[str, str]:
        """What of the grid is not there, in a few words each, and why."""
        done = {_place(r) for r in self.mine}
        cells: dict[tuple[str, str], list[bool]] = {}
        for cell in self.grid.cells():
            where = ", ".join(f"{axis} = {label}" for axis, label in cell.labels.items())
            cells.setdefault((cell.row.name, where), []).append(_place_of(cell) in done)
        empty = [f"{row} at {where}" if where else row for (row, where), some in cells.items() if not any(some)]
        rest = [here for some in cells.values() if any(some) for here in some]
        gaps: dict[str, str] = {}
        for _, row, why in self.grid.undefined():
            gaps[row] = f"it is not defined here: {why}"
        if empty:
            gaps[_listed(empty)] = "not run"
        if not all(rest):
            gaps[f"{rest.count(False)} of {len(rest)} models of the other rows" if empty else
                 f"{rest.count(False)} of {len(rest)} models"] = "not run"  # fmt: skip
        return gaps

    def model(self, cell: Cell) -> nn.Module:
        """The victim of a cell.

        Raises:
            MissingError: its weights are not in the cache.
        """
        bench = self._bench()
        identity = {**bench.victim_identity(cell), "weights": True}
        if bench.artifacts.find("victim", identity) is None:
            raise MissingError(f"the weights of {cell} are not in the cache: run the grid again with keep_models")
        return self._found(lambda: bench.victim_model(cell), f"the weights of {cell}")

    def poisoned(self, cell: Cell) -> PoisonedDataset:
        """The poisoned training set of a cell. Raises :class:`MissingError` if it is not in the cache."""
        bench = self._bench()
        if bench.artifacts.find("poison", bench.poison_identity(cell)) is None:
            raise MissingError(f"the poisons of {cell} are not in the cache: run the grid again")
        return bench.poisoned(cell)

    def friendly(self, cell: Cell) -> Tensor:
        """The friendly noise of a cell, ``(n, c, h, w)`` int8 in grey levels. Raises :class:`MissingError`."""
        bench = self._bench()
        self.model(cell)
        noise = bench.noise_of(cell)
        if noise is None:
            raise MissingError(f"{cell} made no friendly noise, or it is no longer in the cache")
        return noise

    def lab(self, cell: Cell) -> Lab:
        """The data and networks of a cell."""
        return self._bench().lab(cell)

    def _bench(self) -> Workbench:
        if self.bench is None:
            raise MissingError(f"figures of {self.grid.name} need the models and poisons of its cells: name the cache "
                               "in which they were made")  # fmt: skip
        return self.bench

    def _found(self, find: Callable[[], nn.Module], what: str) -> nn.Module:
        try:
            return find()
        except RuntimeError as error:  # a defense that replaces layers
            raise MissingError(f"{what} do not fit the network of the grid: {error}") from None


def attempt(make: Callable[[], T], missing: dict[str, str], part: str) -> T | None:
    """What ``make`` makes; None where it cannot, and then ``missing`` says why the part is not here."""
    try:
        return make()
    except MissingError as error:
        missing[part] = str(error)
        return None


def _listed(names: Sequence[str], most: int = 4) -> str:
    """Some names and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _place(r: Record) -> Place:
    return tuple(sorted(r.labels.items())), r.defense, r.seed, r.goal, r.victim


def _place_of(cell: Cell) -> Place:
    return tuple(sorted(cell.labels.items())), cell.row.name, cell.seed, cell.goal, cell.victim
