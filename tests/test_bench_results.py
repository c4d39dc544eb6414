"""What is committed of the benchmark is what its records say, and the page that lists it says no more."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from friends.bench.grid.record import read
from friends.bench.grid.spec import built_in, grid_of, read_grid
from friends.bench.grid.summary import summarise
from friends.bench.grid.tabulate import tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "bench"
FOLDERS = sorted(path.parent for path in RESULTS.glob("*/records.jsonl"))
PAPERS = [*(f"table{i}" for i in range(1, 8)), *(f"figure{i}" for i in range(1, 6))]


def test_every_table_and_figure_of_the_paper_has_records() -> None:
    assert {f"{name}-small" for name in PAPERS} <= {folder.name for folder in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_its_files_follow_from_its_records(folder: Path) -> None:
    grid, records = grid_of(folder), read(folder / "records.jsonl")
    assert folder.name == f"{grid.name}-{grid.preset}"
    assert grid.to_json()["trial"] == json.loads((folder / "grid.json").read_text())["trial"]
    for made in tables(grid, summarise(records)):
        assert (folder / "tables" / f"{made.name}.md").read_text(encoding="utf-8") == made.markdown()
        assert (folder / "tables" / f"{made.name}.csv").read_text(encoding="utf-8") == made.csv()
        assert (folder / "tables" / f"{made.name}.tex").read_text(encoding="utf-8") == made.latex()
    pictures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert pictures >= {path.stem for path in (folder / "figures").glob("*.json")}
    assert folder.name.startswith("table") or pictures
    assert len({record.code for record in records}) <= 2 * len({record.row for record in records})
    assert all(record.scaled_down for record in records) == (grid.preset != "paper")
    assert all(record.commit and record.device and record.versions for record in records)
    assert not re.search(r"/(home|root|work|tmp)/", (folder / "records.jsonl").read_text(encoding="utf-8"))


def test_the_page_counts_what_is_there() -> None:
    page = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    for name in built_in("paper"):
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        folder = RESULTS / f"{name}-small"
        recorded = len(read(folder / "records.jsonl")) if folder.is_dir() else 0
        planned = len(read_grid(name, "small").cells())
        assert cells[1].replace(",", "") == str(len(read_grid(name, "paper").cells())), name
        assert f"{recorded} of {planned}" in cells[3], name


def test_the_page_on_cost_quotes_the_pairs_as_they_are() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    pairs = (RESULTS / "friendliness-small" / "tables" / "friendliness-pairs.md").read_text(encoding="utf-8")
    points = r"[+\u2212][\d.]+ \([^)]+\)"
    quoted = re.findall(rf"^\| (\S+) \| (\S+) \| ({points}) \| ({points}) \|$", page, flags=re.MULTILINE)
    assert len(quoted) >= 8
    for row, against, success, accuracy in quoted:
        line = rf"\| sleeper-agent \| {row} \| {against} \| 20 \| {re.escape(success)} \|.*\| {re.escape(accuracy)} \|"
        assert re.search(line, pairs), (row, against)


def test_no_data_or_weights_are_in_it() -> None:
    kept = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} <= {".json", ".jsonl", ".md", ".csv", ".tex", ".png"}
