"""A grid that is killed again and again ends as if nothing had been; two at once do nothing twice."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from grid_samples import run_here, tiny_grid

from friends.bench.grid import run
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


def recorded(out: Path) -> int:
    """How many cells are in the records."""
    path = out / "records.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_cells(out: Path, cells: int) -> None:
    """Wait until so many cells are recorded."""
    while recorded(out) < cells:
        time.sleep(0.002)


@pytest.mark.timeout(600)
def test_a_grid_killed_at_ten_moments_has_the_records_of_an_undisturbed_one(tmp_path: Path) -> None:
    grid = tiny_grid()
    assert len(grid.cells()) >= 60

    run_here(grid, tmp_path / "quiet", tmp_path / "undisturbed")
    expected = {(r.cell, r.defense): r.essence() for r in read(tmp_path / "undisturbed" / "records.jsonl")}
    assert len(expected) == len(grid.cells())

    chance = random.Random(2024)
    for _ in range(KILLS):
        process = started(grid, tmp_path / "cache", tmp_path / "killed")
        more = chance.choice((0, 1, 2, 4))  # however fast the machine is, ten kills come before the last cell
        wait_for_cells(tmp_path / "killed", recorded(tmp_path / "killed") + more)
        time.sleep(chance.uniform(0, 0.04))
        assert process.exitcode is None
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
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
    wait_for_cells(tmp_path / "out", 1)
    os.kill(first.pid or 0, signal.SIGSTOP)  # it holds the folder for as long as this takes
    try:
        with pytest.raises((ValueError, OSError), match="out"):
            run_here(grid, tmp_path / "cache", tmp_path / "out")
    finally:
        os.kill(first.pid or 0, signal.SIGCONT)
    first.join(timeout=120)
    assert first.exitcode == 0


def test_minutes_that_are_over_leave_a_part_that_can_be_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, now = tiny_grid(seeds=2), itertools.count()
    with monkeypatch.context() as patched:  # a clock that goes on by a minute whenever somebody looks at it
        patched.setattr(run, "drive", functools.partial(run.drive, clock=lambda: 60.0 * next(now)))
        some = run_here(grid, tmp_path / "cache", tmp_path / "out", minutes=60)
    rest = run_here(grid, tmp_path / "cache", tmp_path / "out")
    assert len(some) + len(rest) == len(grid.cells())
    assert 4 <= len(some) < len(grid.cells())
    assert {record.defense for record in some[:4]} == {"undefended", "clean"}  # the most valuable first
