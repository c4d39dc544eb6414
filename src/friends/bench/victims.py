"""The stages of a trial that leave files: poisons, victims, and what the pictures show. Each is done once."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from friends import models
from friends.attacks.base import ManyGoals, Surrogate, bound_of, poison_count
from friends.bench.exhibit import Exhibit
from friends.bench.lab import Lab
from friends.bench.trial import ArmSpec
from friends.data.files import write_json
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.defenses.friends import Friends
from friends.models.saved import save
from friends.noise.random import RandomNoise, random_noise
from friends.training.evaluate import Removal, accuracy, confidence, removal, success, verdict
from friends.training.fit import Fitted

SHOWN = 6
"""How many poisons the report shows."""


def poisons(lab: Lab, goals: Sequence[Goal], wanted: Sequence[int] | None = None) -> Iterator[PoisonedDataset]:
    """The poisoned training sets of some goals, one after the other: made or read, and checked against the claims.

    Args:
        goals: all goals of the trial.
        wanted: which of them; all by default. An attack that can craft for many goals in one batch does, unless
            every goal has surrogates of its own.
    """
    places = range(len(goals)) if wanted is None else wanted
    missing = [g for g in places if not _poison_file(lab, g).exists()]
    if isinstance(lab.trial.attack, ManyGoals) and not lab.trial.own_surrogates and len(missing) > 1:
        _craft(lab, goals, missing)
    for g in places:
        if not _poison_file(lab, g).exists():
            _craft(lab, goals, [g])
        yield _checked(lab, PoisonedDataset.load(_poison_file(lab, g), lab.data[0]))


class _Stopwatch:
    """A surrogate function that measures its own time, which is not that of the crafting."""

    def __init__(self, surrogate: Surrogate) -> None:
        self.surrogate = surrogate
        self.seconds = 0.0

    def __call__(
        self,
        data: LabeledImages,
        *,
        index: int = 0,
        epochs: int | None = None,
        start: nn.Module | None = None,
        noise: tuple[RandomNoise, float] | None = None,
    ) -> nn.Module:
        clock = time.perf_counter()
        model = self.surrogate(data, index=index, epochs=epochs, start=start, noise=noise)
        self.seconds += time.perf_counter() - clock
        return model


def _poison_file(lab: Lab, g: int) -> Path:
    return lab.out / "poisons" / f"goal-{g:03d}.safetensors"


def _craft(lab: Lab, goals: Sequence[Goal], some: Sequence[int]) -> None:
    """Make and write the poisons of some goals; what is half done is kept in ``work/`` meanwhile."""
    half = lab.out / "work" / f"crafting-{some[0]:03d}"
    made, seconds = craft(lab, goals, some, half)
    for g, poisoned in zip(some, made, strict=True):
        lab.took(f"crafting {g:03d}", seconds)
        poisoned.save(_poison_file(lab, g), clean=lab.data[0], key=lab.trial.key())
    shutil.rmtree(half, ignore_errors=True)


def craft(lab: Lab, goals: Sequence[Goal], some: Sequence[int], half: Path) -> tuple[list[PoisonedDataset], float]:
    """Make the poisons of some goals, checked against what the attack claims.

    Args:
        half: folder for what is half done, which a later call goes on with.

    Returns:
        The poisoned sets, and the seconds of crafting one, without those of training surrogates.
    """
    train, attack = lab.data[0], lab.trial.attack
    watch = _Stopwatch(lab.surrogate_of(some[0]))
    clock = time.perf_counter()
    streams = [lab.streams.child("attack", g) for g in some]
    if isinstance(attack, ManyGoals) and len(some) > 1:
        theirs = [goals[g] for g in some]
        made = attack.many(train, theirs, surrogate=watch, streams=streams, checkpoint=half, progress=lab.progress)
    else:
        one = goals[some[0]]
        made = [attack(train, one, surrogate=watch, streams=streams[0], checkpoint=half, progress=lab.progress)]
    seconds = (time.perf_counter() - clock - watch.seconds) / len(some)
    return [_checked(lab, poisoned) for poisoned in made], seconds


def _checked(lab: Lab, poisoned: PoisonedDataset) -> PoisonedDataset:
    """The same set; refuses one that breaks the bound, the budget or the labels that its attack claims."""
    train, attack = lab.data[0], lab.trial.attack
    budget = getattr(attack, "budget", None)
    count = None if budget is None else poison_count(budget, len(train))
    poisoned.check(train, xi=bound_of(attack), budget=count, clean_label=attack.about.clean_label)
    return poisoned


def victim(lab: Lab, g: int, v: int, arm: ArmSpec, poisoned: PoisonedDataset) -> dict[str, Any]:
    """Train one victim on the poisons of one goal, or read what became of it.

    The ``v``-th victims of a goal share initial weights, batch order and augmentation: their differences are paired.
    """
    name = f"goal-{g:03d}-{arm.name}" + (f"-victim-{v}" if v else "")
    file = lab.out / "victims" / f"{name}.json"
    if file.exists():
        return _read(file)
    fitted = lab.fit(
        poisoned.train,
        lab.make_victim,
        name,
        lab.trial.recipe,
        lab.streams.child("victim", g, v) if v else lab.streams.child("victim", g),
        defenses=arm.defenses,
        watch=watching(lab, poisoned.goal, accuracy_too=g == 0),
        checkpoint=lab.out / "work" / name,
    )
    if g == 0 and v == 0:
        _keep_model(lab, fitted.model, arm.name)
        _keep_exhibit(lab, poisoned, arm, fitted)
    return _judge(lab, file, name, fitted, [poisoned.goal], removal(fitted.removed, poisoned.poison_idx))


def control(lab: Lab, c: int, goals: Sequence[Goal]) -> dict[str, Any]:
    """Train one model on clean data, as the undefended victim of goal ``c`` was, and ask it about its goals."""
    name = f"control-{c:03d}"
    file = lab.out / "victims" / f"{name}.json"
    if file.exists():
        return _read(file)
    watch = watching(lab, goals[0], accuracy_too=c == 0)
    streams, half = lab.streams.child("victim", c), lab.out / "work" / name
    fitted = lab.fit(lab.data[0], lab.make_victim, name, lab.trial.recipe, streams, watch=watch, checkpoint=half)
    if c == 0:
        _keep_model(lab, fitted.model, "clean")
    return _judge(lab, file, name, fitted, goals, None)


def _read(file: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(file.read_text(encoding="utf-8")))


def _judge(
    lab: Lab, file: Path, name: str, fitted: Fitted, goals: Sequence[Goal], removed: Removal | None
) -> dict[str, Any]:
    """Write down how a model fares; from then on its checkpoint is not needed."""
    write_json(file, outcome_of(lab, fitted, goals, removed))
    shutil.rmtree(lab.out / "work" / name, ignore_errors=True)
    return _read(file)


def outcome_of(lab: Lab, fitted: Fitted, goals: Sequence[Goal], removed: Removal | None) -> dict[str, Any]:
    """How a model fares on the test images and on some goals, as plain values."""
    clean = accuracy(fitted.predictor, lab.data[1])
    verdicts = [verdict(fitted.predictor, goal, lab.device) for goal in goals]
    return {
        "hits": [int(hit.sum()) for hit, _ in verdicts],
        "refused": [int(refused.sum()) for _, refused in verdicts],
        "images": [len(goal) for goal in goals],
        "confidence": [float(confidence(fitted.model, goal, lab.device).mean()) for goal in goals],
        "accuracy": clean.strict,
        "selective": clean.selective,
        "abstained": clean.abstained,
        "removed": None if removed is None else [removed.removed, removed.caught, removed.poisons],
        "seconds": fitted.seconds + fitted.shared_seconds,
        "shared": fitted.shared_seconds,
        "history": [{what: float(f"{value:.6g}") for what, value in line.items()} for line in fitted.history],
    }


def watching(lab: Lab, goal: Goal, *, accuracy_too: bool) -> Callable[[nn.Module, int], dict[str, float]]:
    """What is written down after every epoch; accuracy only where asked, since it takes longest."""
    test = lab.data[1]

    def watch(model: nn.Module, epoch: int) -> dict[str, float]:
        won = success(lambda x: model(x).argmax(1), goal, lab.device)
        seen = {"confidence": float(confidence(model, goal, lab.device).mean()), "success": float(won.float().mean())}
        if accuracy_too:
            seen["accuracy"] = accuracy(lambda x: model(x).argmax(1), test).strict
        return seen

    return watch


def _keep_model(lab: Lab, model: nn.Module, name: str) -> None:
    if model.state_dict().keys() != lab.build(torch.Generator()).state_dict().keys():
        return  # a defense replaced layers: the name of the architecture no longer says how to build it
    spec, classes = lab.trial.model, lab.data[0].classes
    file = lab.out / "models" / f"{name}.safetensors"
    save(cast(models.Classifier, model), file, name=spec.name, width=spec.width, classes=classes)


def _keep_exhibit(lab: Lab, poisoned: PoisonedDataset, arm: ArmSpec, fitted: Fitted) -> None:
    """Keep what the pictures show: of the first goal, and of the first arm that has friendly noise."""
    file = lab.out / "exhibit.safetensors"
    place = next((i for i, d in enumerate(arm.defenses) if isinstance(d, Friends)), None)
    if file.exists() and (place is None or Exhibit.load(file).friendly is not None):
        return
    if lab.data[0].shape[0] not in (1, 3):
        return  # there is no picture of other numbers of channels
    rows = poisoned.poison_idx[:SHOWN].cpu()
    friendly: Tensor | None = None
    histogram: Tensor | None = None
    random: Tensor | None = None
    zeta = mu = 0.0
    if place is not None:
        defense = cast(Friends, arm.defenses[place])
        zeta, mu = defense.zeta, defense.mu
        whole = fitted.memory[place].get("friendly")
        if whole is not None:
            friendly = whole[rows.to(whole.device)].cpu()
            parts = [torch.bincount(part.flatten().cpu().int() + 255, minlength=511) for part in whole.split(4096)]
            histogram = torch.stack(parts).sum(0)
        draw = random_noise(
            poisoned.train.x[rows.to(lab.device)].cpu() / 255, defense.random, mu, lab.streams("exhibit")
        )
        random = (draw * 255).round().clamp(-127, 127).to(torch.int8)
    Exhibit(
        target=(poisoned.goal.x[0] * 255).round().to(torch.uint8).cpu(),
        bases=lab.data[0].x[rows.to(lab.device)].cpu(),
        poisons=poisoned.train.x[rows.to(lab.device)].cpu(),
        friendly=friendly,
        random=random,
        histogram=histogram,
        zeta=zeta,
        mu=mu,
    ).save(file)
