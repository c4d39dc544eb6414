"""What a tuning is asked for, plans and finds, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from friends.bench.trial import ModelSpec
from friends.bench.tuning_attack import Mock
from friends.bench.tuning_grid import Candidate, Rung, draw, plan_rungs
from friends.bench.tuning_search import Round, Score, works
from friends.noise.random import RandomNoise
from friends.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Everything that decides what is searched, and how.

    Args:
        source: the data set, as ``friends.data.sources.load`` takes it.
        size: side to which images of mixed sizes are resized.
        model: the network.
        recipe: how it is going to be trained; the last rung trains like that.
        zeta, mu: strengths of the first candidates, in grey levels of 255.
        kinds: distributions of the random noise.
        lr, penalty: of the friendly noise's optimiser.
        candidates: how many are judged at the first rung.
        rungs: how many rungs there are.
        seeds: trainings of each candidate at the last rung.
        refine: whether finer settings enter at later rungs.
        accuracy_drop: how much accuracy the defense may cost, as a fraction.
        held_out: share of the training images that is judged on, not trained on.
        confirm: whether the chosen settings are trained once more, with new seeds and goals.
        seed: everything random follows from it.

    Raises:
        ValueError: a setting is out of range.
    """

    source: str
    size: int | None = None
    model: ModelSpec = field(default_factory=ModelSpec)
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=40))
    zeta: tuple[int, ...] = (8, 16, 32)
    mu: tuple[int, ...] = (8, 16, 32)
    kinds: tuple[RandomNoise, ...] = ("bernoulli", "uniform", "gaussian")
    lr: tuple[float, ...] = (10, 20, 50, 100)
    penalty: tuple[float, ...] = (1, 10)
    candidates: int = 24
    rungs: int = 3
    seeds: int = 3
    refine: bool = True
    accuracy_drop: float = 0.02
    held_out: float = 0.2
    confirm: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("zeta", "mu", "kinds", "lr", "penalty"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give at least one value")
        if not 0 <= self.accuracy_drop < 1:
            hint = f"; did you mean {self.accuracy_drop / 100:g}?" if 1 <= self.accuracy_drop <= 100 else ""
            raise ValueError(f"accuracy_drop is a fraction in [0, 1), not {self.accuracy_drop:g}{hint}")
        if self.recipe.epochs < 2:
            raise ValueError(f"at least 2 epochs are needed, not {self.recipe.epochs}: friendly noise is made after "
                             "the first")  # fmt: skip
        self.first()
        plan_rungs(candidates=self.candidates, images=1, epochs=2, seeds=self.seeds, rungs=self.rungs)

    def first(self) -> list[Candidate]:
        """The candidates of the first rung."""
        axes: dict[str, Any] = {name: getattr(self, name) for name in ("zeta", "mu", "kinds", "lr", "penalty")}
        return draw(self.candidates, self.seed, **axes)

    def ladder(self, images: int) -> list[Rung]:
        """The rungs for so many training images."""
        return plan_rungs(
            candidates=len(self.first()),
            images=images,
            epochs=self.recipe.epochs,
            seeds=self.seeds,
            rungs=self.rungs,
        )


@dataclass(frozen=True, kw_only=True)
class Tried:
    """An attack that was tried without a defense, and on whom."""

    mock: Mock
    undefended: Score
    clean: Score

    @property
    def works(self) -> bool:
        """Whether it succeeds."""
        return works(self.undefended, self.clean)


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What came out.

    Args:
        settings: what was asked for.
        data: names, counts and fingerprints of what was trained on and judged on.
        tried: the attacks that were tried, in order; the last is the one that was tuned against, unless none works.
        mock: the attack that settings were tuned against; None if there was no time to find one.
        rounds: the rungs that were begun.
        judged: the round that the choice rests on: the last with a finished candidate.
        chosen: the recommended settings; None where no candidate keeps the accuracy.
        confirmed: the chosen settings with new seeds and goals; None if that was not wanted or time ran out.
        out_of_time: whether time ran out before everything was done.
    """

    settings: Tuning
    data: Mapping[str, object]
    tried: tuple[Tried, ...]
    mock: Mock | None
    rounds: tuple[Round, ...]
    judged: Round | None
    chosen: Candidate | None
    confirmed: Round | None
    out_of_time: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a tuning is going to do, and about how long it takes.

    Args:
        candidates: of the first rung.
        rungs: from the cheapest to the dearest.
        trainings: how many victims are trained at most.
        seconds: an estimate from a short training on this device.
        bytes: room that the folder needs.
    """

    candidates: tuple[Candidate, ...]
    rungs: tuple[Rung, ...]
    trainings: int
    seconds: float
    bytes: int
