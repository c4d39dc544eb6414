"""Bullseye Polytope: poisons whose mean feature is the goal's feature.

Hojjat Aghakhani, Dongyu Meng, Yu-Xiang Wang, Christopher Kruegel, Giovanni Vigna: *Bullseye Polytope: A Scalable
Clean-Label Poisoning Attack with Improved Transferability*, EuroS&P 2021, arXiv 2005.00191. With phi the features
that the victim's new linear layer sees, p_j = x_j + delta_j, x_t the goal, and A a random augmentation::

    authors      minimise over |delta_j| <= xi    |mean_j phi(A(p_j)) - phi(x_t)|_2 / |phi(x_t)|_2
    mean-square  minimise over |delta_j| <= xi    mean over features of (mean_j phi(A(p_j)) - phi(x_t))^2

averaged over the surrogates. A linear layer that puts the poisons in their class then puts the goal there, in the
middle of them. Against a victim that trains the whole network the distance is averaged over several stages of it
(``layers``; what a stage is, says ``features.py``); those of ``mean-square`` are then relative to the goal's mean
square, so that no stage drowns the others.

The two forms differ in the optimizer as well. ``mean-square`` is the port of Gradient Matching's authors, with their
outer loop: augmented, signed Adam with a decaying step, random start. The FRIENDS paper most likely used it.
``authors``, with the settings :data:`AUTHORS`, is the original: plain Adam with a constant step of 0.04 normalised
units from the clean base, not augmented.

Departures: dropout is off while crafting (the original averages over draws of it). At a stage of feature maps the
distance is that of whole maps, as in the paper; the authors' code averages the distances at single positions, and
divides by 0 where the goal has no feature. One restart is the default, where the port has 8: on digits the last scores
of three restarts differed by 1 to 14 percent. The port has one stage only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from friends.attacks.base import (
    About,
    Adaptive,
    Cost,
    JointObjective,
    Loop,
    Sizes,
    Surrogate,
    check_budget,
)
from friends.attacks.features import (
    Bases,
    Layers,
    OneOfMany,
    centres,
    check_features,
    check_layers,
    craft_groups,
    features,
    lengths,
    loop_cost,
    prepare,
)
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.types import Progress, Streams, silent

NAME = "bullseye-polytope"

Form = Literal["mean-square", "authors"]


@dataclass(frozen=True, kw_only=True)
class BullseyePolytope(OneOfMany):
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
        layers: ``"penultimate"`` against a new linear layer; ``"last-two"`` (as the authors) or ``"all"`` stages
            against a victim that trains the whole network.
        bases: ``"random"`` images of the wanted class, or those with the ``"nearest"`` features to the goal's.
        batch: poisons per forward pass; if there are more, each batch's own mean is moved.
        adapt: the defense that the poisons are to survive; None for an attacker who knows of none.

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
    layers: Layers = "penultimate"
    bases: Bases = "random"
    batch: int = 512
    adapt: Adaptive | None = None

    about: ClassVar[About] = About(
        title="Bullseye Polytope",
        paper="Aghakhani et al., EuroS&P 2021, arXiv 2005.00191",
        scenarios=("transfer", "finetune"),
        aim="target",
    )

    def cost(self, sizes: Sizes) -> Cost:
        """Every poison is differentiated by every surrogate at every draw of every step of every restart."""
        return loop_cost(self, self._loop(), sizes)

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_features(self)
        check_layers(self.layers)
        if self.form not in get_args(Form):
            raise ValueError(f"unknown form {self.form!r}; choose one of {', '.join(get_args(Form))}")
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
            adapt=self.adapt,
        )

    def many(
        self,
        train: LabeledImages,
        goals: Sequence[Goal],
        *,
        surrogate: Surrogate,
        streams: Sequence[Streams],
        checkpoint: Path | None = None,
        progress: Progress = silent,
    ) -> list[PoisonedDataset]:
        """Poison ``train`` for each of several goals, which share the surrogates; raises as a call does."""
        task = prepare(self, train, goals, surrogate=surrogate, streams=streams)
        make = partial(distance_objective, form=self.form, layers=self.layers)
        return craft_groups(task, make, self._loop(), name=NAME, checkpoint=checkpoint, progress=progress)


AUTHORS = BullseyePolytope(form="authors", tau=0.04, steps=1200, augment=None)
"""The original method, with the settings of the poisoning benchmark's version of it (but this library's bound)."""


def distance_objective(
    model: nn.Module, goals: Sequence[Goal], form: Form, layers: Layers = "penultimate"
) -> JointObjective:
    """The distances from the mean features of the poisons it is called with to those of their goals.

    The goals' features are taken here and now.

    Args:
        model: in eval mode.

    Raises:
        ValueError: a goal's feature is 0, to which no distance can be relative; or there is no such stage.
    """
    wanted = centres(model, goals, layers)
    units = [_unit(stage, form, single=len(wanted) == 1) for stage in wanted]

    def objective(poisons: list[Tensor]) -> Float[Tensor, " t"]:
        means = [f.unflatten(0, (len(poisons), -1)).mean(1) for f in features(model, torch.cat(poisons), layers)]
        apart = [_size(mean - centre, form) for mean, centre in zip(means, wanted, strict=True)]
        return torch.stack([size / unit for size, unit in zip(apart, units, strict=True)]).mean(0)

    return objective


def _size(apart: Float[Tensor, "t d"], form: Form) -> Float[Tensor, " t"]:
    return torch.linalg.vector_norm(apart, dim=1) if form == "authors" else apart.square().mean(1)


def _unit(stage: Float[Tensor, "t d"], form: Form, *, single: bool) -> Float[Tensor, " t"]:
    """What the distance to each goal's feature is divided by."""
    if form == "authors":
        return lengths(stage)
    return torch.ones_like(stage[:, 0]) if single else lengths(stage).square() / stage.shape[1]
