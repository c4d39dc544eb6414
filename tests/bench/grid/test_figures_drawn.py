"""Figures of real, tiny runs: what they show is what was run; equal runs give equal files; nothing is half written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from PIL import Image

from friends.attacks.gradient_matching import GradientMatching, matching_objective
from friends.bench.grid.figures import MissingError, Source, draw, figure2, figure3, figure4
from friends.bench.grid.figures.canvas import save
from friends.bench.grid.figures.figure2 import surrogates
from friends.bench.grid.figures.sheet import Sheet, unpacked
from friends.bench.grid.record import Record
from friends.bench.grid.spec import Grid, read_grid
from friends.bench.grid.stages import Workbench
from friends.data.artifacts import Artifacts
from friends.modules import still
from friends.types import silent

NAMES = [name for name in matplotlib.rcParams if name != "backend"]  # asking for that one would choose one


@pytest.fixture(autouse=True)
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coarse landscapes, and no pyplot at all."""
    monkeypatch.setattr(figure2, "POINTS", 5)
    monkeypatch.setattr(figure3, "POINTS", 5)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(Artifacts(tmp_path_factory.mktemp("cache")))


def ran(bench: Workbench, name: str) -> tuple[Grid, list[Record]]:
    grid = read_grid(name, "smoke")
    return grid, [bench.record(cell, keep_model=True) for cell in grid.cells()]


def numbers(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / "figures" / f"{name}.json").read_text())["numbers"]


def test_figure_1_shows_poisons_and_the_noise_that_was_trained_with(bench: Workbench, tmp_path: Path) -> None:
    grid, records = ran(bench, "figure1")
    written = draw(grid, records, bench, tmp_path)
    assert [path.name for path in written] == ["figure1.png", "figure1.svg", "figure1.json"]
    shown = {
        name: unpacked(part).astype(int) for name, part in numbers(tmp_path, "figure1").items() if "base64" in part
    }
    assert (shown["poisons"] - shown["images"] == shown["perturbations"]).all()
    assert 0 < abs(shown["perturbations"]).max() <= 64
    assert 0 < abs(shown["friendly"]).max() <= 16
    assert set(abs(shown["random"]).flatten()) == {16}
    sums = (shown["poisons"] + shown["friendly"]).clip(0, 255) + shown["random"]
    assert (sums.clip(0, 255) == shown["seen"]).all()
    with Image.open(written[0]) as image:
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert "Description" in image.info


def test_figure_2_is_the_loss_of_the_attack_at_the_poison(bench: Workbench, tmp_path: Path) -> None:
    grid, records = ran(bench, "figure2")
    draw(grid, records, bench, tmp_path)
    sheet = Sheet.read(tmp_path / "figures" / "figure2.json")
    plane = torch.tensor(sheet.numbers["matching loss on the plane"])
    cell = grid.cells()[0]
    lab, poisoned, attack = bench.lab(cell), bench.poisoned(cell), cell.trial.attack
    assert isinstance(attack, GradientMatching)
    (model,) = surrogates(attack, lab.data[0], lab.surrogate_of(0))
    with still([model], freeze=False):
        objective = matching_objective(model, poisoned.goal, int(poisoned.goal.y_wanted[0]))
        losses = [float(objective(x[None]).detach()) for x in poisoned.train.pixels(poisoned.poison_idx)]
    assert float(plane[2, 2]) == pytest.approx(min(losses), rel=1e-4)
    assert sheet.settings["row of the training set"] == int(poisoned.poison_idx[losses.index(min(losses))])
    line = dict(
        zip(sheet.numbers["shares of the perturbation"], sheet.numbers["matching loss on the line"], strict=True)
    )
    assert line[1.0] == pytest.approx(min(losses), rel=1e-4)
    assert sheet.scaled_down
    assert "victim loss on the line" in sheet.numbers


def test_equal_runs_are_equal_files_whatever_the_users_style(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, records = ran(bench, "figure3")
    first = draw(grid, records, bench, tmp_path / "a")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"font.size": 20.0, "svg.hashsalt": "mine", "axes.facecolor": "black"}.items():
            patch.setitem(matplotlib.rcParams, name, value)
        before = {name: matplotlib.rcParams[name] for name in NAMES}
        state = torch.random.get_rng_state()
        second = draw(grid, records, bench, tmp_path / "b")
        assert {name: matplotlib.rcParams[name] for name in NAMES} == before
        assert torch.equal(torch.random.get_rng_state(), state)
    assert [a.name for a, b in zip(first, second, strict=True) if a.read_bytes() != b.read_bytes()] == []


def test_a_picture_follows_from_its_numbers_alone(bench: Workbench, tmp_path: Path) -> None:
    grid, records = ran(bench, "figure4")
    png, _, path = draw(grid, records, bench, tmp_path)
    assert png.name == "figure4.png"
    sheet = Sheet.read(path)
    (again, _) = save(figure4.paint(sheet), sheet, tmp_path / "again")
    assert again.read_bytes() == png.read_bytes()
    noise = bench.noise_of(next(c for c in grid.cells() if c.row.name == "friends-b"))
    assert noise is not None
    counts = sheet.numbers["noises"]["friends-b"]["friendly"]
    assert sum(counts) == sheet.n["values"] == noise.numel()
    assert counts[127] == int((noise == 0).sum())
    assert len(counts) == 255


def test_figure_5_without_models_says_what_is_missing(bench: Workbench, tmp_path: Path) -> None:
    grid, records = ran(bench, "figure5")
    draw(grid, records, None, tmp_path)
    sheet = Sheet.read(tmp_path / "figures" / "figure5.json")
    assert set(sheet.missing) == {"the standard deviation of KL"}
    assert "name the cache" in sheet.missing["the standard deviation of KL"]
    assert len(sheet.numbers["success"]["undefended"]["share"]) == 3
    draw(grid, records, bench, tmp_path)
    whole = Sheet.read(tmp_path / "figures" / "figure5.json")
    assert not whole.missing
    for part in whole.numbers["spread"].values():
        for line in part["lines"].values():
            assert line["mean"][0] == 0
            assert line["mean"][-1] > line["mean"][1] > 0


def test_a_row_that_was_not_run_leaves_its_panel_empty(bench: Workbench, tmp_path: Path) -> None:
    grid, records = ran(bench, "figure3")
    draw(grid, [r for r in records if r.defense != "noise-bernoulli"], bench, tmp_path)
    sheet = Sheet.read(tmp_path / "figures" / "figure3.json")
    assert sheet.missing == {"noise-bernoulli": "noise-bernoulli was not run with seed 0, goal 1"}
    assert list(sheet.numbers["surfaces"]) == ["undefended", "friendly-noise"]
    surface = sheet.numbers["surfaces"]["undefended"]
    assert sheet.numbers["roughness"]["undefended"]["centre"] == pytest.approx(surface[2][2], rel=1e-4)


def test_nothing_is_trained_for_a_figure(bench: Workbench, tmp_path: Path) -> None:
    grid, records = ran(bench, "figure1")
    empty = Workbench(Artifacts(tmp_path / "cache"))
    with pytest.raises(MissingError, match=r"poisons of .* are not in the cache"):
        draw(grid, records, empty, tmp_path)
    assert empty.artifacts.list(["poison", "surrogate", "victim"]) == []
    cell = grid.cells()[0]
    empty.victim(cell, keep_model=False)
    with pytest.raises(MissingError, match="keep_models"):
        Source(grid, records, empty, silent).model(cell)


def test_what_cannot_be_drawn_is_refused(bench: Workbench, tmp_path: Path) -> None:
    grid, records = ran(bench, "figure1")
    with pytest.raises(MissingError, match="name the cache"):
        draw(grid, records, None, tmp_path)
    with pytest.raises(MissingError, match="run it first"):
        draw(grid, [], bench, tmp_path)
    with pytest.raises(ValueError, match="no figure 'figure2'; it has figure1"):
        draw(grid, records, bench, tmp_path, only=["figure2"])
    undefended = [r for r in records if r.defense == "undefended"]
    with pytest.raises(MissingError, match="no row of grid 'figure1' with friendly noise"):
        draw(grid, undefended, bench, tmp_path)
    assert not (tmp_path / "figures").exists()


def test_a_failed_write_leaves_the_old_file(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, records = ran(bench, "figure5")
    old = tmp_path / "figures" / "figure5.png"
    old.parent.mkdir()
    old.write_text("old")

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        draw(grid, records, None, tmp_path)
    assert old.read_text() == "old"
    assert list(old.parent.iterdir()) == [old]
