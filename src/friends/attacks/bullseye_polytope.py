"""Bullseye Polytope: poisons whose mean feature is the goal's feature.

Hojjat Aghakhani, Dongyu Meng, Yu-Xiang Wang, Christopher Kruegel, Giovanni Vigna: *Bullseye Polytope: A Scalable
Clean-Label Poisoning Attack with Improved Transferability*, EuroS&P 2021, arXiv 2005.00191. With phi the features
that the victim's new linear layer sees, p_j = x_j + delta_j, x_t the goal, and A a random augmentation::

    authors      minimise over |delta_j| <= xi    |mean_j phi(A(p_j)) - phi(x_t)|_2 / |phi(x_t)|_2
    mean-square  minimise over |delta_j| <= xi    mean over features of (mean_j phi(A(p_j)) - phi(x_t))^2

A linear layer that puts the poisons in their class then puts the goal there, in the middle of them.

The two forms differ in the optimizer as well. ``mean-square`` is the port of Gradient Matching's authors, with their
outer loop: augmented, signed Adam with a decaying step, random start. The FRIENDS paper most likely used it.
``authors``, with the settings :data:`AUTHORS`, is the original: plain Adam with a constant step of 0.04 normalised
units from the clean base, not augmented.

Departures: dropout is off while crafting (the original averages over dropout). Several goal images are attacked by
the mean of their features. One restart is the default, where the port has 8: on digits the last scores of
three restarts differed by 1 to 14 percent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from friends.attacks.base import (
    About,
    Cost,
    Halfway,
    Loop,
    Objective,
    Sizes,
    Surrogate,
    check_budget,
    choose_bases,
    craft,
    identity_of,
    penultimate,
    place_of,
    poisoned,
    still,
)
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.types import Progress, Streams, silent

NAME = "bullseye-polytope"

Form = Literal["mean-square", "authors"]


@dataclass(frozen=True, kw_only=True)
class BullseyePolytope:
    """The distance of the poisons' mean feature to the goal's feature, minimised over the poisons' pixels.

    Args:
        xi: l_inf bound of the perturbation in [0, 1] pixel units.
        budget: number of poisons as a fraction of the whole training set.
        steps: steps of each restart.
        restarts: independent random starts; the one with the lowest last distance is kept.
        tau: step size in normalised units (pixels divided by the channel's standard deviation); divided by
            ``surrogates`` in the mean-square form.
        surrogates: how many extractors the poisons are crafted on at once.
        augment: what the victim is expected to augment with; None for none.
        form: ``"mean-square"``: mean squared distance, signed Adam with a decaying step, random start; or
            ``"authors"``: normalised Euclidean distance, plain Adam with a constant step, from the clean base.
        batch: poisons per forward pass; if there are more, each batch's own mean is moved.

    Raises:
        ValueError: a setting is out of range, or there are restarts where every start is the same.
    """

    xi: float = 16 / 255
    budget: float = 0.01
    steps: int = 250
    restarts: int = 1
    tau: float = 0.1
    surrogates: int = 1
    augment: Augment | None = field(default_factory=Augment)
    form: Form = "mean-square"
    batch: int = 512

    about: ClassVar[About] = About(
        title="Bullseye Polytope",
        paper="Aghakhani et al., EuroS&P 2021, arXiv 2005.00191",
        scenarios=("transfer", "finetune"),
        aim="target",
    )

    def cost(self, sizes: Sizes) -> Cost:
        """Every poison is differentiated by every surrogate at every step of every restart."""
        seen = sizes.poisons * self.steps * self.restarts * self.surrogates
        return Cost(forward=sizes.goal * self.surrogates, gradient=seen, trainings=self.surrogates)

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.form not in get_args(Form):
            raise ValueError(f"unknown form {self.form!r}; choose one of {', '.join(get_args(Form))}")
        if self.surrogates < 1:
            raise ValueError(f"at least one surrogate is needed, not {self.surrogates}")
        if self.form == "authors" and self.restarts != 1:
            raise ValueError(
                f"form 'authors' starts at the clean images, so its {self.restarts} restarts would be alike: "
                "pass restarts=1"
            )
        self._loop()

    def _loop(self) -> Loop:
        ours = self.form == "mean-square"
        return Loop(
            xi=self.xi,
            steps=self.steps,
            restarts=self.restarts,
            tau=self.tau / self.surrogates if ours else self.tau,
            augment=self.augment,
            start="randn" if ours else "clean",
            signed=ours,
            batch=self.batch,
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
        """Poison ``train``. In transfer learning the surrogate is the very extractor that the victim will use.

        Raises:
            ValueError: the goal does not fit the data, the budget is more than the wanted class has, or a
                surrogate has no penultimate features.
        """
        rows = choose_bases(train, goal, self.budget, streams("bases"))
        models = [surrogate(train, index=k) for k in range(self.surrogates)]
        base = train.pixels(rows.to(train.device)).to(place_of(models[0]))
        with still(models, freeze=True):
            objectives = [distance_objective(model, goal, self.form) for model in models]
            crafted = craft(
                base,
                objectives,
                self._loop(),
                moments=train.moments,
                streams=streams,
                halfway=Halfway(checkpoint, identity_of(self, train, [goal], [streams])),
                progress=progress,
                what="bullseye polytope",
            )
        return poisoned(train, rows, crafted, goal, attack=NAME, settings=self)


AUTHORS = BullseyePolytope(form="authors", tau=0.04, steps=1200, augment=None)
"""The original method, with the settings of the poisoning benchmark's version of it (but this library's bound)."""


def distance_objective(model: nn.Module, goal: Goal, form: Form) -> Objective:
    """The distance from the mean feature of the poisons it is called with to the goal's feature, taken here and now.

    Args:
        model: in eval mode.

    Raises:
        ValueError: the goal's feature is 0, to which no distance can be relative.
    """
    with torch.no_grad():
        centre = penultimate(model, goal.x.to(place_of(model))).mean(0)
    if form == "authors" and not bool(centre.any()):
        raise ValueError("the goal's feature is 0 everywhere: no distance can be relative to it")

    def objective(poisons: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
        away = penultimate(model, poisons).mean(0) - centre
        if form == "mean-square":
            return away.square().mean()
        return torch.linalg.vector_norm(away) / torch.linalg.vector_norm(centre)

    return objective
