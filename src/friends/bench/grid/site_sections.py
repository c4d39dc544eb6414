"""The grids of a site: read from their folders, summarised, and put into words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from friends.bench.grid.record import Record, read
from friends.bench.grid.site_rows import NONE, RowView, row_views
from friends.bench.grid.site_words import slug
from friends.bench.grid.summary import summarise
from friends.bench.report import duration


@dataclass(frozen=True, kw_only=True)
class Section:
    """One grid of the site.

    Args:
        name: of its folder under ``pages``, and of its table.
        folder: the output folder of the grid.
        grid, preset, title, scaled_down: as in its records and ``grid.json``.
        axes: names of the axes, in the order of the grid.
        rows: of its table.
        records: how many models there are.
        notes: what a reader must know before believing it.
    """

    name: str
    folder: Path
    grid: str
    preset: str
    title: str
    scaled_down: str
    axes: tuple[str, ...]
    rows: list[RowView]
    records: int
    facts: list[str]
    notes: list[str]

    @property
    def has_paper(self) -> bool:
        """Whether the paper has a number for any of the rows."""
        return any(row.paper.text != NONE.text for row in self.rows)


def sections(folders: Sequence[Path], *, mix: bool) -> list[Section]:
    """A section for every grid and preset of every folder, in the order given.

    Raises:
        ValueError: a folder has no records, or what it has cannot be read or averaged; the message names it.
    """
    if not folders:
        raise ValueError("no folder to make a site of: name the output folder of a grid")
    found: list[Section] = []
    for folder in folders:
        records = read(folder / "records.jsonl")
        if not records:
            raise ValueError(f"{folder} has no records: run a grid into it first (no lines in records.jsonl)")
        kinds: dict[tuple[str, str], list[Record]] = {}
        for record in records:
            kinds.setdefault((record.grid, record.preset), []).append(record)
        for some in kinds.values():
            found.append(_section(folder, some, {section.name for section in found}, mix=mix))
    return found


def _section(folder: Path, records: Sequence[Record], taken: set[str], *, mix: bool) -> Section:
    first, grid = records[0], _grid_json(folder)
    if grid.get("name") != first.grid:
        grid = {}
    try:
        summaries = summarise(records, mix=mix)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    named = cast("dict[str, object]", grid["axes"]) if isinstance(grid.get("axes"), dict) else {}
    axes = tuple(dict.fromkeys([*named, *(axis for record in records for axis in record.labels)]))
    downs = dict.fromkeys(record.scaled_down for record in records if record.scaled_down)
    base = slug(f"{first.grid}-{first.preset}")
    name = next(name for i in range(len(taken) + 1) if (name := f"{base}-{i + 1}" if i else base) not in taken)
    return Section(
        name=name,
        folder=folder,
        grid=first.grid,
        preset=first.preset,
        title=str(grid.get("title") or first.grid),
        scaled_down="; ".join(downs),
        axes=axes,
        rows=row_views(summaries, axes),
        records=len(records),
        facts=_facts(records),
        notes=_notes(records, mix=mix),
    )


def _grid_json(folder: Path) -> dict[str, object]:
    path = folder / "grid.json"
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no grid: a JSON object is expected, not {type(value).__name__}")
    return cast("dict[str, object]", value)


def _facts(records: Sequence[Record]) -> list[str]:
    """One line about the runs: how many, on what, when, how long."""
    seeds, devices = {r.seed for r in records}, dict.fromkeys(r.device for r in records)
    days = sorted({r.started[:10] for r in records})
    seconds = sum(r.seconds.get("training", 0.0) for r in records)
    return [
        f"{len(records):,} {'model' if len(records) == 1 else 'models'}",
        f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}",
        ", ".join(devices),
        days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
        f"{duration(seconds)} of training",
    ]


def _notes(records: Sequence[Record], *, mix: bool) -> list[str]:
    """What a reader must know that no single row says."""
    codes = {r.code for r in records if r.code}
    devices = {r.device for r in records}
    found: list[str] = []
    if mix and len({(r.row, r.code) for r in records}) > len({r.row for r in records}):
        found.append(f"Runs of {len(codes)} versions of the code are averaged together.")
    if len(devices) > 1:
        found.append(f"Run on {len(devices)} kinds of devices: compare times with care.")
    return found
