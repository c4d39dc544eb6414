"""The stages of cells: made once, shared where they may be, and never where they must not be."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from friends.bench.grid.record import Record
from friends.bench.grid.spec import Cell, Grid, read_grid
from friends.bench.grid.stages import Workbench, perform_cell, perform_poison
from friends.data.artifacts import Artifacts
from friends.data.images import LabeledImages
from friends.types import silent
from interrupting import Stop, stop_at_call


def smoke(name: str = "table1", *rows: str) -> Grid:
    return read_grid(name, "smoke").narrowed(only=rows or ["friends-b"])


def cell_of(grid: Grid, row: str) -> Cell:
    return next(cell for cell in grid.cells() if cell.row.name == row)


def kinds(cache: Path) -> list[str]:
    return sorted(artifact.kind for artifact in Artifacts(cache).list())


def test_rows_share_one_poisoning_and_its_surrogates(tmp_path: Path) -> None:
    bench = Workbench(Artifacts(tmp_path))
    grid = smoke("table1", "friends-b", "friends-u", "deep-knn")
    records = {cell.row.name: bench.record(cell) for cell in grid.cells()}
    assert len({record.keys["poison"] for record in records.values()}) == 1
    assert len({record.keys["victim"] for record in records.values()}) == len(records) == 5
    made = kinds(tmp_path)
    assert made.count("poison") == 1
    assert made.count("victim") == 5
    assert made.count("noise") == 2
    assert made.count("probe") == 1
    assert {record.cell for record in records.values()} != {records["clean"].cell}
    assert records["clean"].poisons == 0
    assert records["undefended"].poisons == 12  # a tenth of 120
    assert records["deep-knn"].removed
    assert records["undefended"].removed == ()
    assert records["friends-b"].defenses[0].startswith("Friends(zeta=")
    assert {record.code for record in records.values()} != {records["clean"].code}


def test_a_record_is_the_same_from_a_cache_and_from_work(tmp_path: Path) -> None:
    cell = cell_of(smoke(), "friends-b")
    first = Workbench(Artifacts(tmp_path / "a")).record(cell)
    assert Workbench(Artifacts(tmp_path / "a")).record(cell) == first
    assert Workbench(Artifacts(tmp_path / "b")).record(cell).essence() == first.essence()


def test_two_grids_share_what_is_the_same(tmp_path: Path) -> None:
    bench = Workbench(Artifacts(tmp_path))
    one, other = (bench.record(cell_of(smoke(name), "undefended")) for name in ("table1", "table4"))
    assert (one.grid, other.grid) == ("table1", "table4")
    assert (one.cell, one.keys) == (other.cell, other.keys)


def changed(cell: Cell, **parts: object) -> Cell:
    return replace(cell, table={**cell.table, **{k: {**cell.table[k], **v} for k, v in parts.items()}})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("parts", "poison", "victim"),
    [
        ({"attack": {"xi": "32/255"}}, True, True),
        ({"recipe": {"lr": 0.01}}, True, True),
        ({"data": {"train": 100}}, True, True),
        ({"model": {"width": 8}}, True, True),
        ({"goals": {"count": 3}}, False, False),
    ],
)
def test_what_changes_an_outcome_changes_its_name(
    tmp_path: Path, parts: dict[str, dict[str, object]], poison: bool, victim: bool
) -> None:
    bench = Workbench(Artifacts(tmp_path))
    cell = cell_of(smoke(), "friends-b")
    other = changed(cell, **parts)
    assert (bench.poison_identity(cell) != bench.poison_identity(other)) == poison
    assert (bench.victim_identity(cell) != bench.victim_identity(other)) == victim
    assert (bench.cell_key(cell) != bench.cell_key(other)) == victim


def test_places_and_rows_have_names_of_their_own(tmp_path: Path) -> None:
    bench = Workbench(Artifacts(tmp_path))
    cell = cell_of(smoke(), "friends-b")
    others = [replace(cell, seed=1), replace(cell, victim=1), cell_of(smoke(), "undefended"), cell_of(smoke(), "clean")]
    assert len({bench.cell_key(c) for c in (cell, *others)}) == 5
    same = [replace(cell, grid="other"), replace(cell, labels={"xi": "8/255"}), replace(cell, scaled_down="")]
    assert {bench.cell_key(c) for c in same} == {bench.cell_key(cell)}


def test_a_row_with_its_own_recipe_depends_on_the_trials_too(tmp_path: Path) -> None:
    """Surrogates are trained by the trial's, victims by the row's."""
    bench = Workbench(Artifacts(tmp_path))
    cell = cell_of(smoke(), "friends-b")
    own = replace(cell, row=replace(cell.row, recipe={"epochs": 6}))
    other = changed(own, recipe={"epochs": 4})
    assert own.recipe.epochs == other.recipe.epochs == 6
    assert bench.cell_key(own) != bench.cell_key(other)
    assert bench.victim_identity(own) != bench.victim_identity(other)


def test_points_with_more_goals_do_not_share_a_lab_of_fewer(tmp_path: Path) -> None:
    bench = Workbench(Artifacts(tmp_path))
    one = cell_of(smoke(), "undefended")
    three = changed(one, goals={"count": 3})
    assert [len(bench.lab(cell).goals) for cell in (one, three)] == [1, 3]


def test_code_that_cannot_matter_does_not_count(tmp_path: Path) -> None:
    bench = Workbench(Artifacts(tmp_path))
    grid = smoke("table1", "friends-b", "deep-knn")
    friends, knn = cell_of(grid, "friends-b"), cell_of(grid, "deep-knn")
    assert bench.poison_identity(friends) == bench.poison_identity(knn)
    assert bench.code(friends) != bench.code(knn)


def test_a_killed_cell_goes_on_inside_and_comes_out_the_same(tmp_path: Path) -> None:
    cell = cell_of(smoke(), "friends-b")
    undisturbed = Workbench(Artifacts(tmp_path / "a")).record(cell)
    stopped = 0
    for count in (3, 12, 20, 27, 33):  # one after the other: each goes on where the one before was stopped
        bench = Workbench(Artifacts(tmp_path / "b"), progress=stop_at_call(count))
        with contextlib.suppress(Stop):
            bench.record(cell)
            break
        stopped += 1
    assert stopped >= 3
    again = Workbench(Artifacts(tmp_path / "b")).record(cell)
    assert again.essence() == undisturbed.essence()
    assert Artifacts(tmp_path / "b").check() == []


def test_moved_data_are_the_same_data_and_changed_data_are_not(tmp_path: Path, digits: LabeledImages) -> None:
    """The path of a data set is in no name; its images are."""

    def at(name: str, x: np.ndarray[Any, Any]) -> str:
        path = tmp_path / name / "mine.npz"
        path.parent.mkdir()
        np.savez(path, x_train=x, y_train=y, x_test=x[:60], y_test=y[:60])
        cell = smoke().with_source(str(path)).narrowed(only=["friends-b"]).cells()[0]
        return Workbench(Artifacts(tmp_path / "cache")).cell_key(cell)

    x, y = digits.x[:600].permute(0, 2, 3, 1).numpy(), digits.y[:600].numpy()
    first = at("here", x)
    assert at("there", x) == first
    darker = x.copy()
    darker[7, 14, 14] ^= 1
    assert at("elsewhere", darker) != first


def test_kept_models_are_the_ones_that_were_judged(tmp_path: Path) -> None:
    bench = Workbench(Artifacts(tmp_path))
    cell = cell_of(smoke(), "friends-b")
    record = bench.record(cell, keep_model=True)
    model = bench.victim_model(cell)
    test = bench.lab(cell).data[1]
    with torch.no_grad():
        right = (model(test.pixels()).argmax(1) == test.y).double().mean()
    assert float(right) == pytest.approx(record.accuracy, abs=1e-6)
    noise = bench.noise_of(cell)
    assert noise is not None
    assert 0 < int(noise.abs().max()) <= 16
    assert bench.noise_of(cell_of(smoke(), "undefended")) is None


def test_tasks_do_the_same_in_plain_values(tmp_path: Path) -> None:
    cell = cell_of(smoke(), "undefended")
    payload = {"cache": str(tmp_path), "device": "cpu", "cell": cell.to_json()}
    key = perform_poison(payload, silent)["key"]
    made = perform_cell(payload, silent)
    assert made["keys"]["poison"] == key
    expected = Workbench(Artifacts(tmp_path)).record(cell)
    assert Record(**{**made, **{n: tuple(made[n]) for n in ("defenses", "removed", "history")}}) == expected
