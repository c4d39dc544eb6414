"""A grid of many tiny cells, for tests that run it whole; and the trial of grids that are not run."""

from __future__ import annotations

from pathlib import Path

from friends.bench.grid.engines import Inline
from friends.bench.grid.record import Record
from friends.bench.grid.run import look_ahead, run_grid
from friends.bench.grid.spec import Grid, parse_grid
from friends.bench.grid.stages import Workbench
from friends.data.artifacts import Artifacts

TRIAL = {
    "scenario": "scratch",
    "data": {"source": "digits", "classes": ["4", "9"], "train": 80, "test": 40},
    "model": {"name": "tiny", "width": 4},
    "goals": {"count": 1},
    "attack": {"name": "gradient-matching", "xi": "64/255", "budget": 0.1, "steps": 2, "restarts": 1, "augment": False},
    "recipe": {"epochs": 2, "batch": 40, "lr": 0.05, "augment": False},
}
PLANNED = {
    "scenario": "scratch",
    "data": {"source": "digits", "classes": ["4", "9"], "train": 100, "test": 50},
    "model": {"name": "tiny"},
    "goals": {"count": 1},
    "attack": {"name": "gradient-matching", "xi": "16/255", "budget": 0.1},
    "recipe": {"epochs": 2},
}
"""A trial of grids that are planned, checked or drawn, but never run."""
AXES = {"xi": {"32/255": {"attack": {"xi": "32/255"}}, "64/255": {}}}
ROWS = {
    "friends-b": {"name": "friends", "zeta": "16/255", "mu": "16/255", "def_epoch": 1, "settings": {"steps": 3}},
    "epic": {"name": "epic", "share": 0.1, "start": 1, "interval": 1},
    "deep-knn": {"name": "deep-knn", "budget": 0.1, "k": 5},
    "dp-sgd": {"name": "dp-sgd"},
}


def tiny_grid(seeds: int = 5) -> Grid:
    """``2 x 6 x seeds`` cells of a fraction of a second each; attacks of one seed share their surrogate."""
    return parse_grid({"trial": TRIAL, "axes": AXES, "defenses": ROWS, "seeds": seeds}, "tiny")


def run_here(grid: Grid, cache: Path, out: Path, *, minutes: float | None = None) -> list[Record]:
    """Run what is left of a grid in this process, and return what was recorded now."""
    bench = Workbench(Artifacts(cache))
    outlook = look_ahead(grid, grid, bench, out)
    found: list[Record] = []
    payload = {"cache": str(cache), "device": "cpu"}
    with Inline() as engine:
        driven = run_grid(outlook, out, engine, payload, finished=found.append, minutes=minutes)
    assert not driven.failed, driven.failed[0].error
    return found
