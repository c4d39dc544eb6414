"""Every table and figure of the paper by one command each, at smoke size: the numbers mean nothing, but all runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from friends.bench.grid.figures import figures_of
from friends.bench.grid.record import read
from friends.bench.grid.spec import built_in, read_grid
from friends.cli import app

NAMES = [*(f"table{i}" for i in range(1, 8)), *(f"figure{i}" for i in range(1, 6))]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all, as a user would have it."""
    return tmp_path_factory.mktemp("smoke") / "cache"


@pytest.mark.parametrize("name", [*NAMES, *sorted(set(built_in("smoke")) - set(NAMES))])
def test_it_is_made_by_one_command(name: str, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--preset", "smoke", "--cache", str(cache), "--out", str(out), "--device", "cpu"]
    result = CliRunner().invoke(app, ["bench", "run", name, *given])
    assert result.exit_code == 0, result.output + str(result.exception)
    grid, records = read_grid(name, "smoke"), read(out / "records.jsonl")
    assert len(records) == len(grid.cells())
    outcomes = {(tuple(r.labels.values()), round(r.confidence, 6), r.accuracy, r.removed) for r in records}
    assert len(outcomes) > len(records) / 2  # the rows did something
    table = (out / "tables" / f"{name}.md").read_text()
    assert all(row.name in table for row in grid.rows)
    assert "not run" not in table
    figures = sorted(path.stem for path in (out / "figures").glob("*.png"))
    assert figures == sorted(path.stem for path in (out / "figures").glob("*.svg"))
    assert figures == figures_of(grid)
    for figure in figures:
        assert not json.loads((out / "figures" / f"{figure}.json").read_text())["missing"]
    page = (out / "site" / "index.html").read_text()
    assert grid.title in page
    assert "smoke test" in page  # the warning that its numbers mean nothing
