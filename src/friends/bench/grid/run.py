"""Running a grid into its folder: look at what is there, plan, work, write a line for every finished cell."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from friends.bench.grid.drive import Driven, drive
from friends.bench.grid.plan import Plan, Planned, plan, tasks_of
from friends.bench.grid.record import FORMAT, Record, append, merge, read
from friends.bench.grid.spec import Grid
from friends.bench.grid.stages import Workbench
from friends.bench.grid.tasks import Done, Engine
from friends.data.files import owned, write_text
from friends.types import Progress, silent

RECORDS = "records.jsonl"
Place = tuple[tuple[tuple[str, str], ...], str]


@dataclass(frozen=True)
class Sorted:
    """The records of a folder: those of the grid as it is now, and others.

    Args:
        current: of this grid's settings, on these data, by this code; of any seed.
        others: all the rest, each with the reason in words.
    """

    current: tuple[Record, ...]
    others: tuple[tuple[Record, str], ...]

    def reasons(self) -> str:
        """How many are there of each kind, in words."""
        counts = Counter(reason for _, reason in self.others)
        return "; ".join(f"{count} {reason}" for reason, count in counts.most_common(3))


def sort_records(records: Sequence[Record], grid: Grid, bench: Workbench) -> Sorted:
    """Tell records of the grid as it is now from those of other settings, data or code."""
    current: list[Record] = []
    others: list[tuple[Record, str]] = []
    for record in records:
        cell = grid.cell_at(record.labels, record.defense, record.seed, record.goal, record.victim)
        if record.grid != grid.name or record.preset != grid.preset:
            others.append((record, f"of {record.grid} {record.preset}".strip()))
        elif cell is None:
            others.append((record, f"of a row that the grid does not have ({record.defense})"))
        elif bench.cell_key(cell) != record.cell:
            others.append((record, "made with other settings or data"))
        elif bench.code(cell) != record.code:
            others.append((record, "made by other code"))
        else:
            current.append(record)
    return Sorted(tuple(current), tuple(others))


def set_aside(path: Path, found: Sorted) -> Path:
    """Move the records that do not belong to the grid as it is now into a file beside the others; return its path."""
    number = 1
    while (aside := path.with_name(f"{path.stem}-old-{number}{path.suffix}")).exists():
        number += 1
    append(aside, [record for record, _ in found.others])
    write_text(path, "".join(record.as_line() + "\n" for record in found.current))
    return aside


def current_records(grid: Grid, bench: Workbench, out: Path, *, aside: bool = False) -> list[Record]:
    """The finished cells in a folder.

    Args:
        aside: move records of other settings or code out of the way instead of raising.

    Raises:
        ValueError: the folder holds such records; they are never mixed in.
    """
    path = out / RECORDS
    found = sort_records(read(path), grid, bench)
    if found.others and not aside:
        raise ValueError(f"{path} holds records that do not belong to this grid: {found.reasons()}. Choose another "
                         "folder (--out), or move them out of the way (--set-aside)")  # fmt: skip
    if found.others:
        with owned(out):
            found = sort_records(read(path), grid, bench)  # another may have written meanwhile
            set_aside(path, found)
    return list(found.current)


@dataclass(frozen=True)
class Outlook:
    """What a run of a grid will do.

    Args:
        plan: its cells, with what is in the cache.
        finished: keys, places and rows of the cells that have their record.
    """

    plan: Plan
    finished: frozenset[tuple[str, Place]]

    def has(self, planned: Planned) -> bool:
        """Whether a cell has its record."""
        place = tuple(sorted(planned.cell.labels.items())), planned.cell.row.name
        return (planned.key, place) in self.finished  # points of a grid may share a model, and each has its record

    @property
    def left(self) -> list[Planned]:
        """The cells without a record, the most valuable first; those that are in the cache take no time."""
        return list(self._rest.cells)

    @property
    def poisons(self) -> Mapping[str, float]:
        """Estimated seconds of crafting by key of the poisons, of those that what is left has to make."""
        return self._rest.poisons

    @property
    def seconds(self) -> float:
        """Estimate for all that is left, on one worker."""
        return self._rest.seconds

    @property
    def bytes(self) -> int:
        """Estimate of the disk that what is left needs."""
        return self._rest.bytes

    @cached_property
    def _rest(self) -> Plan:
        """The plan of the cells without a record: one that has its record needs nothing, even with the cache gone."""
        cells = tuple(planned for planned in self.plan.cells if not self.has(planned))
        needed = {planned.poison for planned in cells}
        poisons = {key: seconds for key, seconds in self.plan.poisons.items() if key in needed}
        return replace(self.plan, cells=cells, poisons=poisons)


def look_ahead(grid: Grid, part: Grid, bench: Workbench, out: Path, *, aside: bool = False) -> Outlook:
    """Plan a grid against what its folder and the cache hold.

    Args:
        grid: the whole grid, whose folder it is.
        part: what of it shall be run: the same grid, or some of its rows, points or seeds.
        bench: the cache.
        out: the folder.
        aside: as of :func:`current_records`.

    Raises:
        ValueError: as :func:`current_records` and :meth:`Grid.cells`.
    """
    records = current_records(grid, bench, out, aside=aside)
    planned = plan(part, bench, records)
    return Outlook(planned, frozenset((record.cell, record.row) for record in records))


def run_grid(
    outlook: Outlook,
    out: Path,
    engine: Engine,
    payload: Mapping[str, Any],
    *,
    grid: Grid | None = None,
    minutes: float | None = None,
    gpus: float = 0.0,
    finished: Callable[[Record], None] = lambda record: None,
    failed: Callable[[Done], None] = lambda done: None,
    progress: Progress = silent,
) -> Driven:
    """Do what is left of a grid; every finished cell is a line in ``OUT/records.jsonl`` at once.

    Args:
        outlook: from :func:`look_ahead`.
        out: the folder; only one process at a time writes into it.
        engine: where the tasks run.
        payload: what every task is told beside its cell: ``cache``, ``device``, ``download``, ``remote``.
        grid: the whole grid, to be described in ``grid.json``; without it the planned part is.
        minutes: stop when they are over, having chosen cells that fit.
        gpus: fraction of a GPU that a task takes.
        finished, failed: told of every cell with its record, and of every task that failed.
        progress: told how many cells are done.
    """
    total, count = len(outlook.plan.cells), 0

    def ended(done: Done) -> None:
        nonlocal count
        if done.error:
            failed(done)
        elif done.task.name.startswith("cell "):
            record = record_of(done)
            append(out / RECORDS, [record])
            count += 1
            progress("cells", count, total)
            finished(record)

    with owned(_made(out)):
        (grid or outlook.plan.grid).write(out)
        known = frozenset((record.cell, record.row) for record in read(out / RECORDS))  # also of who was here just now
        left = Outlook(outlook.plan, outlook.finished | known).left
        count = total - len(left)
        progress("cells", count, total)
        return drive(
            tasks_of(outlook.plan, payload, left=left, gpus=gpus),
            engine,
            minutes=minutes,
            finished=ended,
            progress=progress,
        )


def record_of(done: Done) -> Record:
    """The record that a task returned as plain values."""
    return Record.from_line(json.dumps({"format": FORMAT, **done.value}))


def check_disk(outlook: Outlook, folder: Path) -> None:
    """Raise ``OSError`` if what is left will not fit on the disk, with a tenth to spare."""
    here = folder
    while not here.exists():
        here = here.parent
    free, needed = shutil.disk_usage(here).free, outlook.bytes
    if needed * 1.1 > free:
        raise OSError(f"the rest of the grid needs about {needed / 1e9:.3g} GB, and {folder} has {free / 1e9:.3g} GB "
                      "free: prune the cache (friends bench cache prune) or choose another (--cache)")  # fmt: skip


def merge_folders(parts: Sequence[Path], out: Path) -> int:
    """Join the records of a grid that several machines ran; return how many cells there are.

    Args:
        parts: folders of the grid, or files of records.
        out: the folder of the whole; it may be one of the parts.

    Raises:
        FileNotFoundError: a part is not there.
        ValueError: the parts are of several grids, contradict each other, or were made by other code.
    """
    paths = [part / RECORDS if part.is_dir() else part for part in parts]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"there are no records at {path}")
    read_in = [read(path) for path in paths]
    grids = {(record.grid, record.preset) for part in read_in for record in part}
    if len(grids) != 1:
        names = ", ".join(" ".join(grid).strip() for grid in sorted(grids)) or "nothing"
        raise ValueError(f"only records of one grid are merged; these are of {names}")
    described = next((path.parent / "grid.json" for path in paths if (path.parent / "grid.json").is_file()), None)
    merge(read_in)  # refuse before anything is made
    with owned(_made(out)):
        if (out / RECORDS).is_file() and (out / RECORDS).resolve() not in {path.resolve() for path in paths}:
            read_in.insert(0, read(out / RECORDS))  # what is there stays
        merged = merge(read_in)
        if described is not None and not (out / "grid.json").exists():
            write_text(out / "grid.json", described.read_text(encoding="utf-8"))
        write_text(out / RECORDS, "".join(record.as_line() + "\n" for record in merged))
    return len(merged)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
