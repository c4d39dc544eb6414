"""The results of grids as a site of plain files: a leaderboard, and a page for every row with all of its runs.

It needs no server and asks for nothing from elsewhere: copied to a disk or behind any web server it is the same.
The table stands in the page itself; the script beside it only sorts, filters and copies.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import cast
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from friends._version import __version__
from friends.bench.grid.site_rows import RowView, facts_of_row, labels_text, run_views
from friends.bench.grid.site_sections import Section, sections
from friends.bench.grid.site_words import confidence_chart, loss_chart, settings_groups, size_text, slug
from friends.bench.report import in_255ths
from friends.data.files import write_text

PAGES = "pages"
MARKER = "made-by-friends-bench.txt"
"""A file in the folder of pages; what has no such file is not ours to replace."""
TITLE = "Defenses against poisoned training data"
PICTURES = (".svg", ".png", ".jpg", ".jpeg", ".webp")
ASSETS = ("site.css", "site.js")


@dataclass(frozen=True)
class Picture:
    """A figure or picture: its address beside the page, its words, and its files by kind."""

    source: str
    title: str
    alt: str
    caption: str
    files: tuple[tuple[str, str], ...]


def write_site(folders: Sequence[Path], out: Path, *, title: str = TITLE, mix: bool = False) -> Path:
    """Write ``index.html`` and the folder ``pages`` with everything that it needs.

    The pages are built beside their place and swapped in whole; the index comes last.

    Args:
        folders: the output folders of grids: ``records.jsonl``, and where they are there ``grid.json``, ``tables/``
            and ``figures/``. They are read only.
        out: where the site is to be; it may be one of the folders.
        title: the heading of the index.
        mix: as for :func:`friends.bench.grid.summary.summarise`.

    Returns:
        ``out / "index.html"``.

    Raises:
        ValueError: a folder has no records, or what it has cannot be read or averaged; the message names it.
        FileExistsError: ``out / "pages"`` is there and is not of a site.
    """
    found = sections(folders, mix=mix)
    pages = out / PAGES
    if pages.exists() and not (pages / MARKER).exists():
        raise FileExistsError(
            f"{pages} is there and was not made by friends bench: move it away or choose another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    fresh = out / f".{PAGES}.{os.getpid()}.half"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        index = _build(found, fresh, title)
        _swap(fresh, pages)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    write_text(out / "index.html", index)
    return out / "index.html"


def _swap(fresh: Path, pages: Path) -> None:
    """Put a finished folder in the place of the old one; after a crash in between, the next call repairs it."""
    old = pages.with_name(f".{pages.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    if pages.exists():
        os.replace(pages, old)
    os.replace(fresh, pages)
    for kind in ("old", "half"):  # a process that was killed may have left its own
        for left in pages.parent.glob(f".{pages.name}.*.{kind}"):
            shutil.rmtree(left, ignore_errors=True)


def _build(grids: Sequence[Section], fresh: Path, title: str) -> str:
    """Write everything but the index into a folder, and return the index."""
    fresh.mkdir(parents=True)
    for name in ASSETS:
        text = files("friends.bench.grid").joinpath(f"pages/{name}").read_text(encoding="utf-8")
        (fresh / name).write_text(text, encoding="utf-8")
    (fresh / MARKER).write_text("Whatever is in this folder is replaced when the site is written again.\n")
    shown: list[dict[str, object]] = []
    for section in grids:
        place = fresh / section.name
        place.mkdir()
        for row in section.rows:
            _write_row(section, row, place)
        figures = _pictures(section.folder / "figures", place / "figures", f"{PAGES}/{section.name}/figures")
        downloads = _downloads(section, place)
        shown.append({"section": section, "count": len(section.rows), "figures": figures, "downloads": downloads})
    values = _common(f"{PAGES}/")
    choices = _choices(grids)
    return _text("index.html.jinja", {**values, "title": title, "shown": shown, **choices})


def _choices(grids: Sequence[Section]) -> dict[str, object]:
    """What the filters offer: presets, defenses, and the labels of every axis."""
    axes: dict[str, dict[str, None]] = {}
    for section in grids:
        for row in section.rows:
            for axis, label in zip(section.axes, row.labels, strict=True):
                if label:
                    axes.setdefault(axis, {})[label] = None
    return {
        "presets": list(dict.fromkeys(section.preset for section in grids if section.preset)),
        "defenses": list(dict.fromkeys(row.name for section in grids for row in section.rows)),
        "choices": {axis: list(labels) for axis, labels in axes.items()},
    }


def _write_row(section: Section, row: RowView, place: Path) -> None:
    records = row.summary.records
    kinds = (("Confidence in the wanted class", confidence_chart), ("Training loss", loss_chart))
    charts = [(title, drawn) for title, chart in kinds if (drawn := chart(records, row.role)) is not None]
    source, address = section.folder / "pictures", "pictures"
    folders = {run.cell: slug(run.cell) for run in records}  # a key comes from a file that anybody may have written
    pictures = {
        cell: _pictures(source / name, place / address / name, f"{address}/{name}") for cell, name in folders.items()
    }
    values = {
        **_common("../"),
        "section": section,
        "row": row,
        "where": labels_text(row.summary.labels),
        "facts": facts_of_row(row.summary),
        "defenses": [in_255ths(defense) for defense in row.summary.defenses],
        "charts": charts if len(records) > 1 else [],
        "runs": run_views(row.summary),
        "settings": settings_groups(records),
        "pictures": pictures,
    }
    (place / f"{row.page}.html").write_text(_text("row.html.jinja", values), encoding="utf-8")


def _pictures(source: Path, target: Path, address: str) -> list[Picture]:
    """Copy the pictures of a folder, SVG before PNG of the same name, with the words of the JSON beside them."""
    if not source.is_dir():
        return []
    by_name: dict[str, list[Path]] = {}
    for path in sorted(source.iterdir()):
        if path.suffix.lower() in PICTURES and not path.name.startswith("."):
            by_name.setdefault(path.stem, []).append(path)
    found: list[Picture] = []
    for name, paths in by_name.items():
        best = min(paths, key=lambda path: PICTURES.index(path.suffix.lower()))
        numbers = source / f"{name}.json"
        paths = [*paths, *([numbers] if numbers.exists() else [])]
        target.mkdir(parents=True, exist_ok=True)
        for path in paths:
            shutil.copyfile(path, target / path.name)
        words = _words(numbers)
        title = str(words.get("title") or name.replace("-", " "))
        caption = str(words.get("caption") or "")
        kinds = tuple((f"{address}/{quote(path.name)}", path.suffix[1:].upper()) for path in paths)
        alt = str(words.get("alt") or caption or title)
        found.append(Picture(f"{address}/{quote(best.name)}", title, alt, caption, kinds))
    return found


def _words(path: Path) -> Mapping[str, object]:
    """The words about a figure; none if there are none, since a picture without words is better than no site."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}


def _downloads(section: Section, place: Path) -> list[tuple[str, str, str]]:
    """Copy the records and tables; their addresses, names and sizes."""
    tables = section.folder / "tables"
    paths = [section.folder / "records.jsonl", section.folder / "grid.json"]
    paths += sorted(p for p in tables.iterdir() if p.suffix in (".md", ".tex", ".csv")) if tables.is_dir() else []
    found: list[tuple[str, str, str]] = []
    for path in paths:
        if path.exists():
            shutil.copyfile(path, place / path.name)
            size = size_text(path.stat().st_size)
            found.append((f"{PAGES}/{section.name}/{quote(path.name)}", path.name, size))
    return found


def _common(root: str) -> dict[str, object]:
    return {"root": root, "version": __version__}


def _text(name: str, values: Mapping[str, object]) -> str:
    """A page; a lone surrogate, which JSON may hold but no file, becomes a question mark."""
    return _environment().get_template(name).render(values).encode("utf-8", "replace").decode("utf-8")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("friends.bench.grid", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
