"""A grid that is killed again and again ends as if nothing had been; two at once do nothing twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from grid_samples import run_here, tiny_grid

from friends.bench.grid.record import read
from friends.bench.grid.spec import Grid
from friends.data.artifacts import Artifacts

KILLS = 10


def started(grid: Grid, cache: Path, out: Path, log: Path | None = None) -> multiprocessing.process.BaseProcess:
    """A process that runs a grid; a fork, so that it begins at once."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(grid, cache, out, log))
    process.start()
    return process


def _run(grid: Grid, cache: Path, out: Path, log: Path | None) -> None:
    made = Artifacts._make

    def noted(self: Artifacts, kind: str, key: str, *rest: object) -> None:
        made(self, kind, key, *rest)  # type: ignore[arg-type]
        if log is not None:
            with open(log, "a") as file:
                file.write(f"{kind} {key}\n")

    Artifacts._make = noted  # type: ignore[method-assign]
    run_here(grid, cache, out)


@pytest.mark.timeout(600)
def test_a_grid_killed_at_ten_moments_has_the_records_of_an_undisturbed_one(tmp_path: Path) -> None:
    grid = tiny_grid()
    assert len(grid.cells()) >= 60

    clock = time.monotonic()
    run_here(grid, tmp_path / "quiet", tmp_path / "undisturbed")
    whole = time.monotonic() - clock
    expected = {(r.cell, r.defense): r.essence() for r in read(tmp_path / "undisturbed" / "records.jsonl")}
    assert len(expected) == len(grid.cells())

    chance, killed = random.Random(2024), 0
    while killed < KILLS:
        process = started(grid, tmp_path / "cache", tmp_path / "killed")
        process.join(timeout=chance.uniform(0.02, 1.2) * whole / KILLS)
        if process.exitcode is not None:
            break
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        killed += 1
    assert killed == KILLS
    before = len(read(tmp_path / "killed" / "records.jsonl"))
    assert 0 < before < len(expected)
    now = run_here(grid, tmp_path / "cache", tmp_path / "killed")
    assert len(now) == len(expected) - before  # what had been recorded was not done again
    lines = (tmp_path / "killed" / "records.jsonl").read_text().splitlines()
    found = {(r.cell, r.defense): r.essence() for r in read(tmp_path / "killed" / "records.jsonl")}
    assert len(lines) == len(found) == len(expected)
    assert found == expected
    cache = Artifacts(tmp_path / "cache")
    assert cache.check() == []
    assert run_here(grid, tmp_path / "cache", tmp_path / "killed") == []


def test_two_processes_on_one_cache_do_nothing_twice(tmp_path: Path) -> None:
    grid, log = tiny_grid(seeds=2), tmp_path / "log"
    pair = [started(grid, tmp_path / "cache", tmp_path / name, log) for name in ("one", "other")]
    for process in pair:
        process.join(timeout=300)
    assert [process.exitcode for process in pair] == [0, 0]
    one, other = (read(tmp_path / name / "records.jsonl") for name in ("one", "other"))
    assert len(one) == len(grid.cells())
    key = {(r.cell, r.defense): r.essence() for r in one}
    assert {(r.cell, r.defense): r.essence() for r in other} == key
    made = Counter(log.read_text().splitlines())
    assert max(made.values()) == 1
    assert sum(line.startswith("victim ") for line in made) == len(key)
    assert sum(line.startswith("poison ") for line in made) == 4
    assert Artifacts(tmp_path / "cache").check() == []


def test_two_processes_cannot_write_into_one_folder(tmp_path: Path) -> None:
    grid = tiny_grid(seeds=1)
    first = started(grid, tmp_path / "cache", tmp_path / "out")
    while not (tmp_path / "out" / "records.jsonl").exists():
        assert first.exitcode is None
    with pytest.raises((ValueError, OSError), match="out"):
        run_here(grid, tmp_path / "cache", tmp_path / "out")
    first.join(timeout=120)
    assert first.exitcode == 0


def test_minutes_that_are_over_leave_a_part_that_can_be_gone_on_with(tmp_path: Path) -> None:
    grid = tiny_grid(seeds=2)
    some = run_here(grid, tmp_path / "cache", tmp_path / "out", minutes=0.03)
    rest = run_here(grid, tmp_path / "cache", tmp_path / "out")
    assert len(some) + len(rest) == len(grid.cells())
    assert len(some) < len(grid.cells())
    assert {record.defense for record in some[:4]} == {"undefended", "clean"}  # the most valuable first
