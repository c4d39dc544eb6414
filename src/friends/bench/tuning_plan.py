"""Before a tuning: its data and its attack made ready, its trainings counted, its time and room estimated."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from friends.bench.tuning_attack import LADDER, hold_out
from friends.bench.tuning_grid import Rung
from friends.bench.tuning_ground import Ground
from friends.bench.tuning_settings import Plan, Tuning
from friends.data import sources
from friends.data.artifacts import Artifacts
from friends.training.fit import fit
from friends.types import Progress, Streams, silent

AGAIN = 5
"""Trainings with new seeds, or more: with fewer even a fall from every image to none could be chance."""
FRIENDLY_STEP = 0.7
"""What a step of friendly noise costs, in training steps on the same image: no gradient of the weights is needed."""


def prepare(
    settings: Tuning,
    artifacts: Artifacts,
    device: str = "cpu",
    *,
    download: bool = False,
    progress: Progress = silent,
) -> Ground:
    """The data of a tuning, both parts from the training set, and the attack on them; the test set is dropped at once.

    Raises:
        ValueError: the data or the model do not fit.
    """
    train = sources.load(settings.source, size=settings.size, download=download, progress=progress)[0]
    train, held_out = hold_out(train, settings.held_out, settings.seed)
    return Ground(
        train,
        held_out,
        model=settings.model,
        recipe=settings.recipe,
        repeats=max(2, settings.seeds + (max(AGAIN, settings.seeds) if settings.confirm else 0)),
        seed=settings.seed,
        artifacts=artifacts,
        device=device,
        progress=progress,
    )


def plan(settings: Tuning, *, device: str = "cpu", download: bool = False, progress: Progress = silent) -> Plan:
    """What a tuning is going to do; trains for a moment on a few images to see how fast that is.

    Raises:
        ValueError: the data or the model do not fit.
    """
    with tempfile.TemporaryDirectory() as unused:
        ground = prepare(settings, Artifacts(Path(unused) / "cache"), device, download=download, progress=progress)
        per_image, needed = _speed(ground), room(settings, ground)
    images = len(ground.train)
    rungs = settings.ladder(images)
    cost = 0.0
    for rung in [*rungs, *([again(settings, rungs)] if settings.confirm else [])]:
        friendly = rung.images * 20 * FRIENDLY_STEP
        cost += rung.repeats * (rung.images * rung.epochs * (rung.candidates + 2) + friendly * rung.candidates)
    half = images * max(1, settings.recipe.epochs // 2)
    cost += half * (1 + ground.repeats) + 4 * rungs[0].images * rungs[0].epochs  # the attacker's, and one attack's test
    return Plan(
        candidates=tuple(settings.first()),
        rungs=tuple(rungs),
        trainings=most_trainings(settings, rungs),
        seconds=cost * per_image,
        bytes=needed,
    )


def again(settings: Tuning, rungs: list[Rung]) -> Rung:
    """How the chosen settings are trained once more: as at the last rung, with seeds and goals of their own."""
    return replace(rungs[-1], candidates=1, repeats=max(AGAIN, settings.seeds), first=rungs[-1].repeats)


def most_trainings(settings: Tuning, rungs: list[Rung]) -> int:
    """How many victims are trained if every attack has to be tried."""
    played = [*rungs, *([again(settings, rungs)] if settings.confirm else [])]
    tried = len(LADDER) * 2 * min(2, settings.seeds)
    return tried + sum(rung.repeats * (rung.candidates + 2) for rung in played)


def room(settings: Tuning, ground: Ground) -> int:
    """The bytes that a tuning writes at most, roughly: poisons, a surrogate, and one training in progress."""
    network = ground.lab.build(torch.Generator())
    weights = 4 * sum(p.numel() for p in network.parameters())
    image = math.prod(ground.train.shape)
    most = max(mock.share for mock in LADDER) * int(torch.bincount(ground.train.y.cpu()).min())
    goal = int(most) * image + 4 * 1000 * image  # the goal's own images are kept in full precision
    goals = ground.repeats + 2 * (len(LADDER) - 1)
    return goals * goal + 8 * weights + 2 * len(ground.train) * image + 50_000_000


def _speed(ground: Ground) -> float:
    """Seconds that a training takes for each image and epoch, from a moment's training on a few of them."""
    batch = ground.recipe.batch if ground.device.type == "cuda" else min(ground.recipe.batch, 32)
    data = ground.lab.data[0]
    few = data.rows(torch.arange(min(len(data), 4 * batch), device=data.device))
    recipe = replace(ground.recipe, epochs=2, batch=batch)
    fitted = fit(few, cast(Any, ground.lab.make_victim), recipe=recipe, streams=Streams(0))
    return fitted.history[-1]["seconds"] / len(few)
