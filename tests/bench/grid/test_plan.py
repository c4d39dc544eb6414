"""A plan says what is there, what is left and in which order, and its tasks do all of it once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from grid_samples import run_here, tiny_grid

from friends.bench.grid import run
from friends.bench.grid.plan import plan, tasks_of
from friends.bench.grid.run import check_disk, look_ahead
from friends.bench.grid.spec import Grid, read_grid
from friends.bench.grid.stages import Workbench
from friends.data.artifacts import Artifacts

PAYLOAD = {"cache": "cache", "device": "cpu"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan-cache")


def small(*rows: str, seeds: int = 2) -> Grid:
    return read_grid("table1", "smoke").narrowed(only=rows or ["friends-b", "deep-knn", "ap-0.25"], seeds=range(seeds))


def test_the_most_valuable_come_first(cache: Path) -> None:
    made = plan(small(), Workbench(Artifacts(cache)))
    order = [(p.cell.seed, p.cell.row.name) for p in made.cells]
    rows = ["undefended", "clean", "friends-b", "ap-0.25", "deep-knn"]
    assert order == [(seed, row) for seed in (0, 1) for row in rows]  # what is finished is a table of fewer seeds
    assert len({p.key for p in made.cells}) == len(order)
    assert len(made.poisons) == 2
    assert not made.measured


def test_what_is_there_is_not_planned_again(tmp_path: Path) -> None:
    bench = Workbench(Artifacts(tmp_path))
    grid = small("friends-b", seeds=2)
    before = plan(grid, bench)
    assert [p.done for p in before.cells] == [False] * 6
    record = bench.record(next(c for c in grid.cells() if (c.seed, c.row.name) == (0, "undefended")))
    after = plan(grid, bench, [record])
    assert [(p.cell.seed, p.cell.row.name) for p in after.cells if p.done] == [(0, "undefended")]
    assert {p.cell.seed for p in after.cells if p.poisoned} == {0}
    assert len(after.poisons) == 1
    assert after.measured
    assert after.left[0].cell.row.name == "clean"
    assert after.seconds > 0
    assert after.bytes < before.bytes
    # what was measured for a row replaces its estimate, at any seed
    (other,) = [p for p in after.left if p.cell.row.name == "undefended"]
    assert other.seconds == pytest.approx(record.seconds["training"], abs=1e-6)
    # and scales the estimates of the others
    slow = replace(record, seconds={**record.seconds, "training": 1000 * record.seconds["training"]})
    (friends,) = [p for p in plan(grid, bench, [slow]).left if (p.cell.seed, p.cell.row.name) == (0, "friends-b")]
    (before_it,) = [p for p in after.left if (p.cell.seed, p.cell.row.name) == (0, "friends-b")]
    assert friends.seconds > 100 * before_it.seconds


def test_what_is_recorded_needs_nothing_even_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, out = tiny_grid(seeds=2).narrowed(only=["epic"], at={"xi": ["64/255"]}), tmp_path / "out"
    first = grid.narrowed(seeds=[0])
    run_here(first, tmp_path / "cache", out)
    bench = Workbench(Artifacts(tmp_path / "cache"))
    bench.artifacts.prune()
    assert {artifact.kind for artifact in bench.artifacts.list()} <= {"data"}
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: full)

    finished = look_ahead(grid, first, bench, out)
    assert (finished.left, finished.poisons, finished.seconds, finished.bytes) == ([], {}, 0, 0)
    check_disk(finished, tmp_path)

    half = look_ahead(grid, grid, bench, out)
    assert {planned.cell.seed for planned in half.left} == {1}
    assert list(half.poisons) == [half.left[0].poison]
    assert half.seconds == sum(planned.seconds for planned in half.left) + sum(half.poisons.values()) > 0
    assert half.bytes == sum(planned.bytes for planned in half.left) > 0
    with pytest.raises(OSError, match="the rest of the grid needs about"):
        check_disk(half, tmp_path)


def test_an_estimate_grows_with_the_work(cache: Path) -> None:
    bench = Workbench(Artifacts(cache))
    grid = small("friends-b", "ap-0.25")

    def seconds(row: str, **recipe: object) -> float:
        table = {**grid.trial, "recipe": {**grid.trial["recipe"], **recipe}}
        made = plan(replace(grid, trial=table), bench)
        return next(p.seconds for p in made.cells if p.cell.row.name == row)

    long = seconds("undefended", epochs=30_000)
    assert long > 5 * seconds("undefended", epochs=300)
    assert seconds("ap-0.25", epochs=30_000) > 3 * long  # attacks itself at every step


def test_tasks_make_poisons_once_and_before_their_cells(cache: Path) -> None:
    made = plan(small(), Workbench(Artifacts(cache)))
    tasks = tasks_of(made, PAYLOAD)
    names = [task.name for task in tasks]
    assert len(set(names)) == len(names) == 2 + 10
    poisons = [task for task in tasks if task.name.startswith("poison ")]
    cells = [task for task in tasks if task.name.startswith("cell ")]
    assert {need for task in cells for need in task.needs} == {task.name for task in poisons}
    for poison in poisons:
        of_it = [task for task in cells if task.needs == (poison.name,)]
        assert len(of_it) == 5
        assert poison.value > max(task.value for task in of_it)
    assert all(task.memory > 0 and task.payload["cache"] == "cache" for task in tasks)


def test_tasks_that_would_wait_for_each_other_say_so(cache: Path) -> None:
    """Filters share a probe: two of them at once would be one working and one waiting."""
    made = plan(small("deep-knn", "friends-b", seeds=1), Workbench(Artifacts(cache)))
    claims = {p.cell.row.name: t.claims for p, t in zip(made.cells, tasks_of(made, PAYLOAD)[1:], strict=True)}
    assert claims["deep-knn"]
    assert not claims["undefended"]
    both = read_grid("table2", "smoke").narrowed(only=["spectral-signatures", "activation-clustering"], seeds=[0])
    cells = tasks_of(plan(both, Workbench(Artifacts(cache))), PAYLOAD)
    filters = [t for t in cells if "spectral" in t.name or "activation" in t.name]
    assert len(filters) == 2
    assert filters[0].claims & filters[1].claims
