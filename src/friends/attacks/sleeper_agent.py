"""Sleeper Agent: a hidden trigger, planted by poisons that never show it, in networks trained from scratch.

Hossein Souri, Liam Fowl, Rama Chellappa, Micah Goldblum, Tom Goldstein: *Sleeper Agent: Scalable Hidden Trigger
Backdoors for Neural Networks Trained from Scratch*, NeurIPS 2022, arXiv 2106.08970. With theta a surrogate, s_i all n
training images of the source class, T the trigger at a random place, y_w the wanted class, A a random augmentation::

    minimise over |delta_j| <= xi    1 - cos(g_s, g_p),
    g_s = grad_theta 1/n sum_i CE(f(T(s_i)), y_w)              (not augmented; anew for every surrogate)
    g_p = grad_theta mean_j CE(f(A(x_j + delta_j)), y_w)       (at every step, on a fresh augmentation)

The x_j are those images of the wanted class whose own gradients are longest on the clean surrogate. After every
1/(R+1) of the steps a new surrogate is trained on the data as it is poisoned by then, R times in all; delta, Adam's
moments and the decay of the step go on. ``adapt`` makes it the attacker of Table 5 of FRIENDS, who knows the defense.

Departures from the authors' code: it retrains one step later (after steps 51, 101, ... of 250; the paper has equal
parts); it retrains on floats, we on the bytes that would be published; dropout is off while crafting (theirs is left
on); ``tau`` is the step as it is, where theirs is multiplied by batch/512. With several surrogates the gradients'
lengths are averaged over them.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from friends.attacks.base import (
    About,
    Adaptive,
    Cost,
    Halfway,
    Loop,
    Objective,
    Sizes,
    Start,
    Surrogate,
    check_budget,
    choose_bases,
    craft,
    identity_of,
    place_of,
    poisoned,
    rounded,
    source_rows,
    still,
    trigger_of,
    wanted_class,
)
from friends.attacks.matching import longest_gradients, mean_gradient, objective_for
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.types import Progress, Streams, silent

NAME = "sleeper-agent"

Selection = Literal["max-gradient", "random"]
"""Which images of the wanted class are poisoned: those with the longest gradients, or any."""


@dataclass(frozen=True, kw_only=True)
class SleeperAgent:
    """``1 - cos(gradient of triggered source images, gradient of the poisons)``, minimised over the poisons' pixels.

    Args:
        xi: l_inf bound of the perturbation in [0, 1] pixel units.
        budget: number of poisons as a fraction of the whole training set.
        steps: steps of each restart.
        restarts: independent starts, each with retrained surrogates of its own; the one with the lowest last
            objective is kept.
        retrainings: how often new surrogates are trained on the poisons of that moment; 0 for never.
        selection: which images of the wanted class are poisoned, unless the goal prescribes them.
        tau: step size in normalised units (pixels divided by the channel's standard deviation); divided by
            ``surrogates``.
        surrogates: how many models the poisons are matched to at once; each is retrained.
        augment: what the victim is expected to augment with; None for none.
        init: ``"randn"``, a random start in the ball, or ``"clean"``, the base image itself.
        batch: poisons per forward pass; if there are more, each batch is matched by itself.
        source_batch: triggered source images per forward pass; changes nothing but memory.
        adapt: the defense that the poisons are to survive; None for an attacker who knows of none.

    Raises:
        ValueError: a setting is out of range.
    """

    xi: float = 16 / 255
    budget: float = 0.01
    steps: int = 250
    restarts: int = 1
    retrainings: int = 4
    selection: Selection = "max-gradient"
    tau: float = 0.1
    surrogates: int = 1
    augment: Augment | None = field(default_factory=Augment)
    init: Start = "randn"
    batch: int = 512
    source_batch: int = 512
    adapt: Adaptive | None = None

    about: ClassVar[About] = About(
        title="Sleeper Agent",
        paper="Souri et al., NeurIPS 2022, arXiv 2106.08970",
        scenarios=("scratch",),
        aim="backdoor",
    )

    def cost(self, sizes: Sizes) -> Cost:
        """Per surrogate: each candidate once, each source image per retraining, each poison twice at every step.

        An adaptive attacker's earlier run counts as one more whole training.
        """
        forward, gradient = self.adapt.passes(sizes.poisons) if self.adapt else (0, 0)
        looked_at = sizes.source * self.restarts * (1 + self.retrainings)
        if self.selection == "max-gradient":
            looked_at += sizes.wanted
        earlier = self.adapt is not None and self.adapt.zeta > 0
        return Cost(
            forward=forward,
            gradient=gradient + looked_at * self.surrogates,
            second=sizes.poisons * self.steps * self.restarts * self.surrogates * self._loop().draws,
            trainings=self.surrogates * (1 + self.restarts * self.retrainings) + earlier,
        )

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.surrogates < 1 or self.source_batch < 1:
            raise ValueError(f"surrogates >= 1 and source_batch >= 1 expected, not {self.surrogates}, "
                             f"{self.source_batch}")  # fmt: skip
        if not 0 <= self.retrainings < self.steps:
            raise ValueError(f"retrainings is a number from 0 to less than steps, not {self.retrainings} of "
                             f"{self.steps} steps")  # fmt: skip
        if self.selection not in get_args(Selection):
            raise ValueError(f"unknown selection {self.selection!r}; choose one of {', '.join(get_args(Selection))}")
        self._loop()

    @property
    def retrained_at(self) -> list[int]:
        """The steps, from 0, before which new surrogates are trained: at the ends of equal parts."""
        return [part * self.steps // (self.retrainings + 1) for part in range(1, self.retrainings + 1)]

    def _loop(self) -> Loop:
        return Loop(
            xi=self.xi,
            steps=self.steps,
            restarts=self.restarts,
            tau=self.tau / self.surrogates,
            augment=self.augment,
            start=self.init,
            batch=self.batch,
            adapt=self.adapt,
        )

    def __call__(
        self,
        train: LabeledImages,
        goal: Goal,
        *,
        surrogate: Surrogate,
        streams: Streams,
        checkpoint: Path | None = None,
        progress: Progress = silent,
    ) -> PoisonedDataset:
        """Poison ``train`` so that images of the goal's true classes with its trigger are taken for the wanted class.

        The goal's own images are not looked at: what is matched are *training* images of their classes.

        Raises:
            ValueError: the goal has no trigger or does not fit the data, no training image is of its true class, the
                budget is more than the wanted class has, or a surrogate has nothing to match.
        """
        wanted, sources = wanted_class(goal, train), triggered_sources(train, goal, streams("sources"))
        rows = choose_bases(train, goal, self.budget, streams("bases"))
        identity = identity_of(self, train, [goal], [streams])
        halfway, bases = Halfway(checkpoint, identity), Halfway(checkpoint, identity, name="bases")
        trained = self.adapt.informed(surrogate) if self.adapt else surrogate
        models = [trained(train, index=k) for k in range(self.surrogates)]
        if self.selection == "max-gradient" and goal.bases is None:
            rows = longest_gradients(models, train, wanted, len(rows), bases)
        fixed = self.adapt.friendly(train, rows, surrogate=surrogate, streams=streams) if self.adapt else None
        matched = _Matched(self, models, trained, train, rows, sources, wanted, checkpoint, identity)
        with matched.held:
            crafted = craft(
                train.pixels(rows.to(train.device)).to(place_of(models[0])),
                [],
                self._loop(),
                moments=train.moments,
                streams=streams,
                fixed=fixed,
                before_step=matched.before_step,
                halfway=halfway,
                progress=progress,
                what="sleeper agent",
            )
        return poisoned(train, rows, crafted, goal, attack=NAME, settings=self)


def triggered_sources(train: LabeledImages, goal: Goal, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """All training images of the goal's true classes with its trigger, each at a place of its own, drawn once.

    Raises:
        ValueError: the goal has no trigger, or no training image is of its true class.
    """
    trigger = trigger_of(goal, "a backdoor")
    return trigger(train.pixels(source_rows(train, goal).to(train.device)), generator)


@dataclass(eq=False)
class _Matched:
    """The models that the poisons are matched to, step by step: new ones after every part of the steps.

    Args:
        attack: how many there are, and when.
        clean: those of the first part, trained on the clean data.
        trained: where the others come from.
        train, rows: what they are trained on, but for the poisons in these rows.
        sources: triggered images, whose gradient is taken anew with every model.
        wanted: the class that they are wanted as.
        folder, identity: where the poisons that models were trained on are kept, to go on after a kill.
    """

    attack: SleeperAgent
    clean: list[nn.Module]
    trained: Surrogate
    train: LabeledImages
    rows: Int64[Tensor, " p"]
    sources: Float[Tensor, "n c h w"]
    wanted: int
    folder: Path | None
    identity: str
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    present: tuple[int, int] | None = None

    def before_step(self, place: tuple[int, int], delta: Float[Tensor, "p c h w"]) -> list[Objective] | None:
        """What the poisons are matched to from here on, if that changes at this step."""
        restart, step = place
        part = sum(step >= start for start in self.attack.retrained_at)
        if (restart, part) == self.present:
            return None
        self.held.close()  # models are trained as a victim's are, which is not while others are held still
        models = self._retrained(restart, part, step, delta) if part else self.clean
        self.held.enter_context(still(models, freeze=False))
        self.present = restart, part
        return [self._objective(model) for model in models]

    def _objective(self, model: nn.Module) -> Objective:
        labels = torch.full((len(self.sources),), self.wanted)
        gradient = mean_gradient(model, self.sources, labels, self.attack.source_batch)
        return objective_for(model, gradient, self.wanted)

    def _retrained(self, restart: int, part: int, step: int, delta: Tensor) -> list[nn.Module]:
        """New models, of indices that were never used, trained on the poisons as they were when this part began."""
        halfway = Halfway(self.folder, self.identity, name=f"retrained-{restart}-{part}")
        state = halfway.load()
        if state is not None:
            pixels = state[0]["pixels"]
        elif step == self.attack.retrained_at[part - 1]:
            pixels = rounded(self.train.x[self.rows.to(self.train.device)], delta, self.attack.xi)
            halfway.offer(lambda: ({"pixels": pixels}, {}), force=True)
        else:
            raise ValueError(f"{halfway.file} is missing, so step {step} cannot be gone on with: delete the folder")
        x = self.train.x.clone()
        x[self.rows.to(x.device)] = pixels.to(x.device)
        data = LabeledImages(x, self.train.y, self.train.classes, self.train.name)
        first = self.attack.surrogates * (restart * self.attack.retrainings + part)
        return [self.trained(data, index=first + k) for k in range(self.attack.surrogates)]
