"""What figures of records compute: fronts, curves, costs, histograms, success by epoch; and how it is written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid_samples import PLANNED

from friends.bench.grid.figures import cost, curves, draw, figure1, figures_of, tradeoff
from friends.bench.grid.figures.figure4 import REACH, histogram, magnitude
from friends.bench.grid.figures.figure5 import error_by_epoch, success_by_epoch
from friends.bench.grid.figures.sheet import Sheet, levels, packed, plain, unpacked
from friends.bench.grid.figures.source import MissingError, Source
from friends.bench.grid.record import Record
from friends.bench.grid.spec import Grid, built_in, parse_grid, read_grid
from friends.bench.statistics import clopper_pearson
from friends.types import Streams

FRIENDS = {"friends-b": {"name": "friends", "zeta": "16/255", "def_epoch": 1}}


def grid(**changes: Any) -> Grid:
    return parse_grid({"trial": PLANNED, "defenses": FRIENDS, "seeds": 2, **changes}, "mine")


def record(cell: Any, hits: int = 0, accuracy: float = 0.9, seconds: float = 1.0, **changes: Any) -> Record:
    """A record of a cell of a grid, of one image."""
    values: dict[str, Any] = {
        "grid": cell.grid, "preset": cell.preset, "cell": str(cell), "labels": dict(cell.labels),
        "defense": cell.row.name, "seed": cell.seed, "goal": cell.goal, "settings": {}, "goal_name": "a",
        "y_true": "4", "y_wanted": "9", "code": "c", "hits": hits, "images": 1, "confidence": 0.5,
        "accuracy": accuracy, "selective": accuracy, "poisons": 10, "parameters": 5, "train": 100,
        "seconds": {"training": seconds}, "versions": {}, "commit": "", "device": "cpu", "threads": 1, "started": "",
    }  # fmt: skip
    return Record(**(values | changes))


def by_epoch(records: Sequence[Record], values: Sequence[Sequence[float]], what: str = "success") -> list[Record]:
    lines = [tuple({"epoch": float(e), what: v} for e, v in enumerate(line)) for line in values]
    fields = [{**r.__dict__, "history": line} for r, line in zip(records, lines, strict=True)]
    return [Record(**each) for each in fields]


def test_the_front_of_known_points() -> None:
    points = [(0.5, 0.9), (0.0, 0.7), (0.2, 0.8), (0.2, 0.75), (0.6, 0.9), (1.0, 0.95), (0.3, 0.8)]
    assert tradeoff.pareto(points) == [1, 2, 0, 5]


def test_equal_points_are_both_on_the_front() -> None:
    assert tradeoff.pareto([(0.1, 0.9), (0.1, 0.9), (0.2, 0.9)]) == [0, 1]
    assert tradeoff.pareto([]) == []


def test_histograms_count_every_value_at_its_grey_level() -> None:
    noise = torch.tensor([-127, -3, -3, 0, 5, 127], dtype=torch.int8).reshape(1, 1, 2, 3)
    counts = histogram(noise, "bernoulli", 0.0, Streams(0))
    assert {level - REACH: int(counts[level]) for level in counts.nonzero()[:, 0].tolist()} == {
        -127: 1, -3: 2, 0: 1, 5: 1, 127: 1}  # fmt: skip
    assert magnitude(counts) == pytest.approx((127 + 3 + 3 + 5 + 127) / 6, rel=1e-5)


def test_random_noise_moves_the_counts_by_its_strength() -> None:
    noise = torch.full((50, 1, 10, 10), 4, dtype=torch.int8)
    counts = histogram(noise, "bernoulli", 16 / 255, Streams(0))
    assert set((counts.nonzero()[:, 0] - REACH).tolist()) == {-12, 20}
    assert abs(int(counts[20 + REACH]) - 2500) < 4 * (5000 * 0.25) ** 0.5
    wide = histogram(torch.zeros(50, 1, 10, 10, dtype=torch.int8), "gaussian", 16 / 255, Streams(0))
    spread = ((torch.arange(2 * REACH + 1) - REACH).double().square() * wide).sum() / wide.sum()
    assert float(spread) ** 0.5 == pytest.approx(16, rel=0.05)
    assert torch.equal(wide, histogram(torch.zeros(50, 1, 10, 10, dtype=torch.int8), "gaussian", 16 / 255, Streams(0)))


def test_success_by_epoch_with_exact_intervals() -> None:
    cells = [cell for cell in grid(seeds=4).cells() if cell.row.name == "undefended"]
    records = by_epoch([record(cell) for cell in cells], [(0, 0, 1), (0, 1, 1), (0, 1, 1), (0, 0, 0)])
    found = success_by_epoch(records)
    assert found["share"] == [0, 0.5, 0.75]
    assert (found["epochs"], found["n"]) == ([1, 2, 3], 4)
    for epoch, won in enumerate((0, 2, 3)):
        low, high = clopper_pearson(won, 4)
        assert (found["low"][epoch], found["high"][epoch]) == (
            pytest.approx(low, abs=1e-5),
            pytest.approx(high, abs=1e-5),
        )


def test_trainings_of_other_lengths_are_compared_as_far_as_both_go() -> None:
    cells = [cell for cell in grid().cells() if cell.row.name == "undefended"]
    found = success_by_epoch(by_epoch([record(cell) for cell in cells], [(1, 0, 1), (1, 1)]))
    assert found["share"] == [1, 0.5]


def test_test_error_only_of_models_that_told_it() -> None:
    cells = [cell for cell in grid(seeds=3).cells() if cell.row.name == "undefended"]
    told = by_epoch([record(cell) for cell in cells[:2]], [(0.5, 0.75), (0.75, 1.0)], "accuracy")
    found = error_by_epoch([*told, record(cells[2])])
    assert found == {"epochs": [1, 2], "mean": [0.375, 0.125], "lowest": [0.25, 0.0], "highest": [0.5, 0.25], "n": 2}
    assert error_by_epoch([record(cells[2])]) is None


def test_a_curve_has_every_point_in_the_order_of_its_numbers() -> None:
    axes = {"xi": {"32/255": {"attack": {"xi": "32/255"}}, "8/255": {"attack": {"xi": "8/255"}}}}
    swept = grid(axes=axes)
    records = [record(c, hits=int(c.row.name == "undefended" and c.labels["xi"] == "32/255")) for c in swept.cells()]
    sheet = curves.compute(Source(swept, records))
    assert sheet.name == "success-over-xi"
    assert sheet.numbers["labels"] == ["8/255", "32/255"]
    assert [p["success"]["mean"] for p in sheet.numbers["curves"]["undefended"]] == [0, 1]
    assert sheet.numbers["curves"]["friends-b"][1]["success"]["high"] == pytest.approx(
        clopper_pearson(0, 2)[1], abs=1e-5
    )
    assert not sheet.missing
    assert "2 goals a point" in sheet.caption


def test_what_was_not_run_is_named() -> None:
    axes = {"xi": {"8/255": {"attack": {"xi": "8/255"}}, "32/255": {"attack": {"xi": "32/255"}}}}
    swept = grid(axes=axes)
    some = [c for c in swept.cells() if c.row.name != "clean" and not (c.labels["xi"] == "32/255" and c.seed == 1)]
    some = [c for c in some if (c.row.name, c.labels["xi"]) != ("friends-b", "8/255")]
    sheet = curves.compute(Source(swept, [record(c) for c in some]))
    assert sheet.missing == {
        "clean at xi = 8/255, friends-b at xi = 8/255, clean at xi = 32/255": "not run",
        "2 of 6 models of the other rows": "not run",
    }
    assert [p["label"] for p in sheet.numbers["curves"]["friends-b"]] == ["32/255"]


def test_records_of_other_grids_are_none() -> None:
    records = [record(c, preset="paper") for c in grid().cells()] + [record(c, grid="other") for c in grid().cells()]
    with pytest.raises(MissingError, match="no cell of grid 'mine' is among the 12 records"):
        Source(grid(), records)


def test_the_models_looked_at_closely_share_seed_and_goal() -> None:
    cells = [c for c in grid().cells() if (c.row.name, c.seed) != ("friends-b", 0)]
    source = Source(grid(), [record(c) for c in cells])
    assert source.place == ({}, 1, 0, 0)
    assert [source.cell(row).seed for row in ("undefended", "friends-b")] == [1, 1]
    first = Source(grid(), [record(c) for c in grid().cells() if c.seed == 0 and c.row.name == "undefended"])
    with pytest.raises(MissingError, match="friends-b was not run with seed 0, goal 1"):
        first.cell("friends-b")


def test_a_trade_off_marks_its_front() -> None:
    axes = {
        "zeta": {z: {"defenses": {"friends-b": {"zeta": z}}} for z in ("0/255", "32/255")},
        "mu": {m: {"defenses": {"friends-b": {"mu": m}}} for m in ("0/255", "64/255")},
    }
    swept = grid(axes=axes)
    good = {"zeta": "32/255", "mu": "64/255"}
    records = [
        record(c, hits=int(dict(c.labels) != good and c.row.name != "clean"),
               accuracy=0.8 if dict(c.labels) == good else 0.7 if c.labels["mu"] == "64/255" else 0.9)
        for c in swept.cells()
    ]  # fmt: skip
    sheet = tradeoff.compute(Source(swept, records))
    points = sheet.numbers["points"]
    assert len(points) == 4
    assert [points[i]["labels"] for i in sheet.numbers["front"]] == [
        good, {"zeta": "0/255", "mu": "0/255"}, {"zeta": "32/255", "mu": "0/255"}]  # fmt: skip
    assert sheet.numbers["marks"]["undefended"]["success"]["mean"] == 1


def test_cost_is_the_median_time_and_protection_what_the_attack_missed() -> None:
    cells = grid(seeds=3).cells()
    times = {("undefended", s): 2.0 for s in range(3)} | {("friends-b", s): (4.0, 5.0, 30.0)[s] for s in range(3)}
    wins = [int(c.row.name == "undefended" or c.seed == 0) for c in cells]
    records = [record(c, hits=won, seconds=times.get((c.row.name, c.seed), 1.0))
               for c, won in zip(cells, wins, strict=True)]  # fmt: skip
    sheet = cost.compute(Source(grid(seeds=3), records))
    undefended, friends = sheet.numbers["panels"][""]
    assert (undefended["seconds"], friends["seconds"]) == (2, 5)
    assert friends["protection"]["mean"] == pytest.approx(2 / 3, abs=1e-5)
    low, high = clopper_pearson(1, 3)
    assert (friends["protection"]["low"], friends["protection"]["high"]) == (
        pytest.approx(1 - high, abs=1e-5), pytest.approx(1 - low, abs=1e-5))  # fmt: skip


@pytest.mark.parametrize("preset", ["smoke", "small", "paper"])
def test_every_built_in_grid_has_a_figure(preset: str) -> None:
    expected = {f"figure{i}": [f"figure{i}"] for i in range(1, 6)} | {f"table{i}": ["cost"] for i in range(1, 8)}
    expected |= {name: [name] for name in ("success-over-budget", "success-over-xi", "trade-off")}
    expected["friendliness"] = ["cost"]
    assert {name: figures_of(read_grid(name, preset)) for name in built_in(preset) if name in expected} == expected


def test_a_grid_without_defenses_or_numbers_has_none() -> None:
    assert figures_of(grid(defenses={})) == []
    assert figures_of(grid(axes={"model": {"tiny": {}, "lenet": {"model": {"name": "lenet"}}}})) == ["cost"]
    assert curves.number("16/255") == pytest.approx(16 / 255)
    assert [curves.number(text) for text in ("0.05", "tiny", "1/0", "")] == [0.05, None, None, None]


@pytest.mark.parametrize(
    ("axes", "name"),
    [
        ({"budget": {b: {"attack": {"budget": float(b)}} for b in ("0.02", "0.1")}}, "success-over-budget"),
        ({axis: {s: {"defenses": {"friends-b": {axis: s}}} for s in ("0/255", "8/255")} for axis in ("zeta", "mu")},
         "trade-off"),
        ({"model": {"tiny": {}, "lenet": {"model": {"name": "lenet"}}}}, "cost"),
    ],
)  # fmt: skip
def test_figures_of_records_are_drawn_without_a_bench(axes: Any, name: str, tmp_path: Path) -> None:
    swept = grid(axes=axes)
    records = [record(c, hits=c.seed, accuracy=0.8 + 0.01 * c.seed, seconds=1.0 + c.seed) for c in swept.cells()]
    first = draw(swept, records[:-1], None, tmp_path / "a")
    assert [path.name for path in first] == [f"{name}.png", f"{name}.svg", f"{name}.json"]
    second = draw(swept, records[:-1][::-1], None, tmp_path / "b")  # the order of records says nothing
    assert [a.name for a, b in zip(first, second, strict=True) if a.read_bytes() != b.read_bytes()] == []
    sheet = Sheet.read(first[2])
    assert sheet.missing
    assert sheet.alt
    assert "1 of" in next(iter(sheet.missing))


def test_pictures_lie_side_by_side_with_white_between_them() -> None:
    images = np.stack([np.zeros((3, 4, 20)), np.full((3, 4, 20), 0.5)])
    row = figure1.side_by_side(images)
    assert row.shape == (4, 42, 3)
    assert (row[:, :20] == 0).all()
    assert (row[:, 20:22] == 1).all()
    assert (row[:, 22:] == 0.5).all()
    assert figure1.side_by_side(images[:, :1]).shape == (4, 42)


def test_a_sheet_survives_its_file(tmp_path: Path) -> None:
    sheet = Sheet(name="a", title="t", caption="c", alt="d", n={"goals": 2}, missing={"x": "not run"},
                  numbers={"line": [0.1, 2], "empty": {}})  # fmt: skip
    path = sheet.write(tmp_path / "a.json")
    assert Sheet.read(path) == sheet
    assert json.loads(path.read_text())["format"] == "friends-figure-1"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds no numbers of a figure"):
        Sheet.read(path)


def test_pictures_and_numbers_in_text(unchecked: None) -> None:
    image = torch.arange(-6, 6, dtype=torch.int8).reshape(1, 3, 2, 2)
    assert unpacked(json.loads(json.dumps(packed(image)))).tolist() == image.tolist()
    with pytest.raises(TypeError, match="packed as bytes"):
        packed(image.float())
    assert plain(torch.tensor([1 / 3, 1e-9, 12345678.0])) == [0.333333, 1e-09, 12345700.0]
    assert plain(torch.tensor([[1, 2]])) == [[1, 2]]
    assert levels(16 / 255) == "16/255"
