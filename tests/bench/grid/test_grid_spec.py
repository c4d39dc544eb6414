"""A grid is the product of its axes with its rows, and says what is wrong with it before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from grid_samples import PLANNED

from friends.bench.grid.spec import PRESETS, Cell, Grid, built_in, merged, parse_grid, read_grid
from friends.bench.record import CLEAN, UNDEFENDED

AXES = {
    "xi": {"8/255": {"attack": {"xi": "8/255"}}, "16/255": {}},
    "model": {"tiny": {}, "lenet": {"model": {"name": "lenet"}}},
}
ROWS = {"friends-b": {"name": "friends", "zeta": "16/255"}, "epic": {"name": "epic", "share": 0.1}}


def grid(**changes: object) -> Grid:
    return parse_grid({"trial": PLANNED, "axes": AXES, "defenses": ROWS, "seeds": 3, **changes}, "mine")


def test_every_point_has_every_row_for_every_seed() -> None:
    cells = grid().cells()
    assert len(cells) == 2 * 2 * 4 * 3
    places = {(c.labels["xi"], c.labels["model"], c.row.name, c.seed) for c in cells}
    assert len(places) == len(cells)
    assert {c.row.name for c in cells} == {UNDEFENDED, CLEAN, "friends-b", "epic"}
    (one,) = [c for c in cells if (c.labels, c.row.name, c.seed) == ({"xi": "8/255", "model": "lenet"}, "epic", 2)]
    assert one.trial.attack.xi == pytest.approx(8 / 255)  # type: ignore[attr-defined]
    assert (one.trial.model.name, one.trial.seed, one.trial.recipe.epochs) == ("lenet", 2, 2)
    assert next(repr(defense) for defense in one.arm.defenses).startswith("Epic(share=0.1")


def test_seeds_goals_and_victims_multiply() -> None:
    more = grid(seeds=[5, 9], victims=3, axes={}, trial={**PLANNED, "goals": {"count": 2}})
    assert len(more.cells()) == 4 * 2 * 2 * 3
    assert {(c.seed, c.goal, c.victim) for c in more.cells()} == {
        (s, g, v) for s in (5, 9) for g in (0, 1) for v in (0, 1, 2)
    }


def test_a_cell_is_itself_again_from_its_json() -> None:
    for cell in grid(scaled_down="small").cells():
        again = Cell.from_json(cell.to_json())
        assert (again.trial, again.recipe, again.arm) == (cell.trial, cell.recipe, cell.arm)
        assert again.to_json() == cell.to_json()


def test_a_row_may_stand_at_some_points_and_train_longer() -> None:
    row = {"defenses": [{"name": "abl"}], "recipe": {"epochs": 7}, "only": {"xi": ["8/255"]}}
    cells = [c for c in grid(defenses={**ROWS, "abl": row}).cells() if c.row.name == "abl"]
    assert {c.labels["xi"] for c in cells} == {"8/255"}
    assert {(c.recipe.epochs, c.trial.recipe.epochs) for c in cells} == {(7, 2)}  # surrogates train as ever


def test_an_axis_may_change_a_row() -> None:
    points = {mu: {"defenses": {"friends-b": {"mu": f"{mu}/255"}}} for mu in ("8", "32")}
    axes = {"mu": points}
    cells = [c for c in grid(axes=axes, seeds=1).cells() if c.row.name == "friends-b"]
    assert [round(255 * c.arm.defenses[0].mu) for c in cells] == [8, 32]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="changes the row 'nobody'"):
        grid(axes={"mu": {"8": {"defenses": {"nobody": {"mu": 0}}}}}).cells()


def test_a_place_leads_to_its_cell_and_no_other_place_does() -> None:
    axes = {**AXES, "share": {"0.3": {"defenses": {"epic": {"share": 0.3}}}}}
    mine = grid(axes=axes, defenses={**ROWS, "abl": {"defenses": [{"name": "abl"}], "only": {"xi": ["8/255"]}}})
    for cell in mine.cells():
        swapped = dict(reversed(cell.labels.items()))  # a file may have them in any order
        found = mine.cell_at(swapped, cell.row.name, cell.seed, cell.goal, cell.victim)
        assert found is not None
        assert found.to_json() == cell.to_json()
        assert list(found.labels) == ["xi", "model", "share"]
    at = {"xi": "16/255", "model": "tiny", "share": "0.3"}
    assert mine.cell_at(at, "epic", 77, 0, 0) is not None  # of whatever seed
    assert mine.cell_at(at, "abl", 0, 0, 0) is None
    assert mine.cell_at({**at, "xi": "4/255"}, "epic", 0, 0, 0) is None
    assert mine.cell_at({"xi": "16/255"}, "epic", 0, 0, 0) is None


@pytest.mark.usefixtures("unchecked")
def test_labels_of_a_bad_file_are_no_place() -> None:
    labels: dict[str, object] = {"xi": ["16/255"], "model": "tiny"}
    assert grid().cell_at(labels, "epic", 0, 0, 0) is None  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_what_is_not_defined_is_told_and_not_run() -> None:
    with_three = grid(axes={}, defenses={"cleanse": {"name": "neural-cleanse"}})
    assert {c.row.name for c in with_three.cells()} == {UNDEFENDED, CLEAN}
    ((labels, row, why),) = with_three.undefined()
    assert (labels, row) == ({}, "cleanse")
    assert why


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": 0}, "seeds is how many"),
        ({"seeds": [1, 1]}, "each once"),
        ({"victims": 0}, "victims is a number >= 1, not 0"),
        ({"typo": 1}, "unknown setting 'typo' of a grid"),
        ({"axes": {"xi": {}}}, "axis 'xi' has no point"),
        ({"axes": {"xi": {"a": {"attack": {"xi": "900/255"}}}}}, "xi = a: "),
        ({"axes": {"xi": {"a": {"atack": {}}}}}, "xi = a: .*atack"),
        ({"defenses": {"x": {"name": "nothing"}}}, "nothing"),
        ({"defenses": {"x": {"defenses": [], "onyl": {}}}}, "unknown setting 'onyl'"),
        ({"defenses": {"x": {"defenses": [{"name": "abl"}], "only": {"xi": ["9"]}}}}, "which is no point of the grid"),
        ({"trial": 3}, r"\[trial\] is a table, not 3"),
        ({"trial": {"include": "../secret.toml"}}, "include names a file beside the grid's"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        grid(**changes).cells()


def test_a_part_of_a_grid_keeps_what_its_rows_are_compared_with() -> None:
    part = grid().narrowed(only=["epic"], seeds=[1], at={"xi": ["16/255"]})
    assert {(c.row.name, c.seed, c.labels["xi"]) for c in part.cells()} == {
        (name, 1, "16/255") for name in (UNDEFENDED, CLEAN, "epic")
    }
    with pytest.raises(ValueError, match="has no row 'epik'; it has friends-b, epic"):
        grid().narrowed(only=["epik"])
    with pytest.raises(ValueError, match="no point xi = 4/255; the axes are xi: 8/255, 16/255"):
        grid().narrowed(at={"xi": ["4/255"]})


def test_leaving_a_row_out_leaves_its_changes_out() -> None:
    axes = {"mu": {"8": {"defenses": {"friends-b": {"mu": "8/255"}}}}}
    part = grid(axes=axes, seeds=1).narrowed(only=["epic"])
    assert {c.row.name for c in part.cells()} == {UNDEFENDED, CLEAN, "epic"}
    assert {c.row.name for c in read_grid("table3", "small").narrowed(only=["undefended"]).cells()} == {
        UNDEFENDED,
        CLEAN,
    }


def test_tables_are_laid_over_each_other() -> None:
    base = {"attack": {"name": "a", "xi": 1, "steps": 2}, "seed": 0}
    assert merged(base, {"attack": {"xi": 3}}) == {"attack": {"name": "a", "xi": 3, "steps": 2}, "seed": 0}
    assert merged(base, {"attack": {"name": "b", "xi": 3}})["attack"] == {"name": "b", "xi": 3}  # no settings of a
    assert base["attack"] == {"name": "a", "xi": 1, "steps": 2}


def test_data_may_lie_elsewhere() -> None:
    there = grid().with_source("/data/mine", "digits")
    assert {c.trial.data.source for c in there.cells()} == {"/data/mine"}
    assert {c.trial.data.source for c in grid().with_source("/data/mine", "cifar10").cells()} == {"digits"}


def test_a_file_of_ones_own_with_an_include(tmp_path: Path) -> None:
    (tmp_path / "_gm.toml").write_text('attack = { name = "gradient-matching", budget = 0.1 }\nscenario = "scratch"\n')
    (tmp_path / "mine.toml").write_text(
        'seeds = 2\ntrial = { include = "_gm.toml", goals = { count = 1 }, data = { source = "digits" } }\n'
        '[axes.xi]\n"8/255" = { attack = { xi = "8/255" } }\n[defenses]\nabl = { name = "abl" }\n'
    )
    found = read_grid(str(tmp_path / "mine.toml"))
    assert (found.name, found.preset, len(found.cells())) == ("mine", "", 2 * 3)
    with pytest.raises(ValueError, match="no built-in grid 'table9' of preset small; there are figure1"):
        read_grid("table9")
    with pytest.raises(ValueError, match="unknown preset 'huge'; choose one of smoke, small, paper"):
        read_grid("table1", "huge")
    with pytest.raises(FileNotFoundError):
        read_grid(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_built_in_grid_is_valid_and_of_its_size(preset: str) -> None:
    names = built_in(preset)
    papers = [f"table{i}" for i in range(1, 8)] + [f"figure{i}" for i in range(1, 6)]
    assert set(papers) <= set(names)
    assert names == built_in("smoke")
    for name in names:
        found = read_grid(name, preset)
        assert found.cells()
        assert {bool(c.scaled_down) for c in found.cells()} == {preset != "paper"}
        first = [c for c in found.cells() if c.seed == found.seeds[0] and c.row.name == UNDEFENDED]
        largest = max(c.trial.data.train or 50_000 for c in first)
        full = largest == 50_000 or first[0].trial.scenario == "transfer"
        assert full if preset == "paper" else largest <= 1000
