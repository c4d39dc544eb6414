"""Records of cells for the tests of tables, figures and pages: plausible, every part adjustable, no model trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from friends.bench.grid.record import Record

SETTINGS: dict[str, object] = {
    "scenario": "scratch",
    "data": {"is": "DataSpec", "source": "cifar10", "train": None},
    "attack": {"is": "GradientMatching", "xi": 16 / 255, "budget": 0.01},
    "recipe": {"is": "Recipe", "epochs": 80},
}
SECONDS = {"surrogates": 40.0, "crafting": 120.0, "training": 60.0, "shared": 0.0}


def history(epochs: int = 4, confidence: float = 0.5, *, accuracy: float | None = None) -> tuple[dict[str, float], ...]:
    """A training that ends at a confidence, and, where given, at an accuracy."""
    lines: list[dict[str, float]] = []
    for e in range(epochs):
        done = (e + 1) / epochs
        line = {"epoch": e + 1.0, "loss": 2.3 - 2 * done, "lr": 0.1, "seconds": 0.5, "confidence": confidence * done}
        lines.append(line | ({} if accuracy is None else {"accuracy": accuracy * (0.5 + done / 2)}))
    return tuple(lines)


def record(defense: str = "undefended", *, seed: int = 0, goal: int = 0, victim: int = 0, **changes: Any) -> Record:
    """One cell. Its key follows from grid, place, row, seed, goal and victim, as long as ``cell`` is not given."""
    labels: Mapping[str, str] = changes.get("labels", {})
    grid = changes.get("grid", "table1")
    place = f"{grid} {sorted(labels.items())} {defense} {seed} {goal} {victim}"
    hit = int(changes.get("hits", 1 if defense == "undefended" else 0))
    values: dict[str, Any] = {
        "grid": grid,
        "preset": "paper",
        "cell": hashlib.sha256(place.encode()).hexdigest()[:16],
        "labels": dict(labels),
        "defense": defense,
        "defenses": () if defense in ("undefended", "clean") else (f"{defense}()",),
        "seed": seed,
        "goal": goal,
        "victim": victim,
        "settings": {**SETTINGS, "seed": seed},
        "goal_name": f"test image {17 * seed + goal + 4}",
        "y_true": "dog",
        "y_wanted": "frog",
        "code": "c0de",
        "keys": {"poison": f"poison {sorted(labels.items())} {seed} {goal}"},
        "hits": hit,
        "images": 1,
        "confidence": 0.9 if hit else 0.1,
        "accuracy": 0.93,
        "selective": changes.get("accuracy", 0.93),
        "poisons": 0 if defense == "clean" else 500,
        "parameters": 11_173_962,
        "train": 50_000,
        "history": history(confidence=0.9 if hit else 0.1),
        "seconds": dict(SECONDS),
        "versions": {"friends": "0.3", "torch": "2.13"},
        "commit": "abc1234",
        "device": "CPU",
        "threads": 1,
        "started": "2022-11-28T09:00:00+00:00",
    }
    unknown = sorted(changes.keys() - {f.name for f in fields(Record)})
    if unknown:
        raise TypeError(f"a record has no {unknown[0]}")
    return Record(**values | changes)


def row(defense: str, hits: str, *, accuracy: float = 0.93, **changes: Any) -> list[Record]:
    """The records of a row, one seed each, from a string of goals such as ``"xx.x"``, x being one that was won.

    The accuracies of the models lie 0.1 percentage points below and above the given one in turn.
    """
    found: list[Record] = []
    for seed, mark in enumerate(hits):
        value = accuracy + (-1) ** (seed + 1) * 0.001
        found.append(record(defense, seed=seed, hits=int(mark == "x"), accuracy=value, **changes))
    return found


def backdoor_row(defense: str, rates: Sequence[float], *, images: int = 1000, **changes: Any) -> list[Record]:
    """The records of a row against a backdoor, one seed each, from the share of images that were won."""
    attack = {"attack": {"is": "SleeperAgent", "xi": 16 / 255, "budget": 0.01}}
    found: list[Record] = []
    for seed, rate in enumerate(rates):
        values: dict[str, Any] = {"settings": {**SETTINGS, **attack, "seed": seed}, "grid": "table2", **changes}
        found.append(record(defense, seed=seed, hits=round(rate * images), images=images, confidence=rate, **values))
    return found


def table1(seeds: int = 8, **changes: Any) -> list[Record]:
    """A small Table 1: undefended and clean models, two defenses that help and one that does not."""
    marks = ("xxxxxx.x" * seeds)[:seeds]
    return [
        *row("undefended", marks, accuracy=0.935, **changes),
        *row("clean", "." * seeds, accuracy=0.936, **changes),
        *row("friends-b", ("......x." * seeds)[:seeds], accuracy=0.915, **changes),
        *row("deep-knn", marks, accuracy=0.937, removed=(700, 10, 500), **changes),
        *row("epic-0.1", "." * seeds, accuracy=0.900, removed=(9000, 480, 500), **changes),
    ]


def table2(**changes: Any) -> list[Record]:
    """A small Table 2: rates over many images."""
    return [
        *backdoor_row("undefended", (0.9, 0.8, 0.7, 0.95), accuracy=0.916, **changes),
        *backdoor_row("clean", (0.01, 0.0, 0.02, 0.01), accuracy=0.917, **changes),
        *backdoor_row("friends-b", (0.2, 0.3, 0.1, 0.25), accuracy=0.898, **changes),
        *backdoor_row(
            "strip", (0.6, 0.5, 0.7, 0.65), accuracy=0.80, selective=0.92, abstained=1200, refused=5, **changes
        ),
    ]


def table3(seeds: int = 4, **changes: Any) -> list[Record]:
    """A small Table 3: one defense along an axis of attacks."""
    found: list[Record] = []
    for attack in ("gradient-matching-8", "gradient-matching-16"):
        place: dict[str, Any] = {"grid": "table3", "labels": {"attack": attack}, **changes}
        found += [*row("undefended", ("xxx." * seeds)[:seeds], **place), *row("friends-b", "." * seeds, **place)]
    return found
