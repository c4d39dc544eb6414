"""Gradient Matching: poisons whose training gradient looks like that of the goal.

Jonas Geiping, Liam Fowl, W. Ronny Huang, Wojciech Czaja, Gavin Taylor, Michael Moeller, Tom Goldstein: *Witches' Brew:
Industrial Scale Data Poisoning via Gradient Matching*, ICLR 2021, arXiv 2009.02276. With theta a surrogate trained on
the clean data, x_t the goal images, y_w the wanted class, and A a random augmentation::

    minimise over |delta_i| <= xi    1 - cos(g_t, g_p),
    g_t = grad_theta mean_t CE(f(x_t), y_w)                    (once, not augmented)
    g_p = grad_theta mean_i CE(f(A(x_i + delta_i)), y_w)       (at every step, on a fresh augmentation)

one cosine over all parameters at once, averaged over the surrogates if there are several. A victim that learns the
poisons then also learns the goal.

An ensemble may be *staggered*: its K surrogates are trained to different epochs of a recipe of E, as in the authors'
code, so that the poisons match the goal along the way and not only at its end::

    firstn       0, 1, ..., K-1
    full         0, ..., E             K whole epochs, evenly spaced, both ends included
    inbetween    the same without the ends, of K+2

Departures from the authors' code: dropout is off while crafting (theirs is left on); ``tau`` is the step as it is,
where theirs is multiplied by batch/512; ``delta`` is kept in pixels and only the step size in normalised units; the
margin loss ``cw`` is used for g_t alone (theirs also for g_p, where poisons that are learned already have none) and
compares with the best *other* class. Not here: surrogates that go on learning between the steps, and other losses than
the cosine, all off by default there. Ours: ``selection="max-gradient"``, by which Sleeper Agent (Souri et al., NeurIPS
2022) chooses its bases; random ones are the original.
"""

from __future__ import annotations

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
    logits_of,
    place_of,
    poisoned,
    still,
    wanted_class,
)
from friends.attacks.matching import longest_gradients, mean_gradient, objective_for, trainable
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.types import Progress, Streams, silent

NAME = "gradient-matching"

Stagger = Literal["firstn", "full", "inbetween"]
Criterion = Literal["cross-entropy", "cw"]
Selection = Literal["random", "max-gradient"]


@dataclass(frozen=True, kw_only=True)
class GradientMatching:
    """``1 - cos(gradient of the goal, gradient of the poisons)``, minimised over the poisons' pixels.

    Args:
        xi: l_inf bound of the perturbation in [0, 1] pixel units.
        budget: number of poisons as a fraction of the whole training set.
        steps: steps of each restart.
        restarts: independent starts on the same surrogates; the one with the lowest last objective is kept.
        tau: step size in normalised units (pixels divided by the channel's standard deviation); divided by
            ``surrogates``.
        surrogates: how many models the poisons are matched to at once.
        stagger: train the surrogates to different epochs, by one of the rules above; None trains all fully.
        epochs: how many epochs the victim's recipe has; needed to stagger.
        selection: which images of the wanted class become poisons: ``"random"``, or ``"max-gradient"``, those with the
            longest gradients of their own, in the mean over the surrogates. Bases that a goal prescribes go first.
        criterion: loss of the goal whose gradient is matched: ``"cross-entropy"``, or ``"cw"``, by how much the best
            other logit exceeds the wanted one.
        augment: what the victim is expected to augment with; None for none.
        init: ``"randn"``, a random start in the ball, or ``"clean"``, the base image itself.
        batch: poisons per forward pass; if there are more, each batch is matched by itself.
        adapt: the defense that the poisons are to survive; None for an attacker who knows of none.

    Raises:
        ValueError: a setting is out of range.
    """

    xi: float = 16 / 255
    budget: float = 0.01
    steps: int = 250
    restarts: int = 8
    tau: float = 0.1
    surrogates: int = 1
    stagger: Stagger | None = None
    epochs: int | None = None
    selection: Selection = "random"
    criterion: Criterion = "cross-entropy"
    augment: Augment | None = field(default_factory=Augment)
    init: Start = "randn"
    batch: int = 512
    adapt: Adaptive | None = None

    about: ClassVar[About] = About(
        title="Gradient Matching (Witches' Brew)",
        paper="Geiping et al., ICLR 2021, arXiv 2009.02276",
        scenarios=("scratch",),
        aim="target",
    )

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.surrogates < 1:
            raise ValueError(f"at least one surrogate is needed, not {self.surrogates}")
        for name, value, known in (
            ("stagger", self.stagger, (None, *get_args(Stagger))),
            ("selection", self.selection, get_args(Selection)),
            ("criterion", self.criterion, get_args(Criterion)),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(k for k in known if k)}")
        if self.stagger is not None:
            staggered(self.stagger, self.surrogates, self.epochs)
        self._loop()

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

    def cost(self, sizes: Sizes) -> Cost:
        """Every poison is differentiated twice by every surrogate at every draw of every step of every restart.

        An adaptive attacker's earlier run counts as one more whole training.
        """
        forward, gradient = self.adapt.passes(sizes.poisons) if self.adapt else (0, 0)
        looked_at = sizes.goal + (sizes.wanted if self.selection == "max-gradient" else 0)
        return Cost(
            forward=forward,
            gradient=gradient + looked_at * self.surrogates,
            second=sizes.poisons * self.steps * self.restarts * self.surrogates * self._loop().draws,
            trainings=self._trainings() + (self.adapt is not None and self.adapt.zeta > 0),
        )

    def _trainings(self) -> float:
        if self.stagger is None or not self.epochs:
            return self.surrogates
        return sum(staggered(self.stagger, self.surrogates, self.epochs)) / self.epochs

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
        """Poison ``train``. The surrogates are trained on it as it is; they and ``train`` are left as they were.

        Raises:
            ValueError: the goal does not fit the data, the budget is more than the wanted class has, a surrogate has
                nothing to match, or ``checkpoint`` holds another crafting.
        """
        wanted = wanted_class(goal, train)
        rows = choose_bases(train, goal, self.budget, streams("bases"))
        identity = identity_of(self, train, [goal], [streams])
        halfway = Halfway(checkpoint, identity)
        models = self._models(train, surrogate)
        if self.selection == "max-gradient" and goal.bases is None:
            rows = longest_gradients(models, train, wanted, len(rows), Halfway(checkpoint, identity, name="bases"))
        fixed = self.adapt.friendly(train, rows, surrogate=surrogate, streams=streams) if self.adapt else None
        with still(models, freeze=False):
            crafted = craft(
                train.pixels(rows.to(train.device)).to(place_of(models[0])),
                [matching_objective(model, goal, wanted, self.criterion) for model in models],
                self._loop(),
                moments=train.moments,
                streams=streams,
                fixed=fixed,
                halfway=halfway,
                progress=progress,
                what="gradient matching",
            )
        return poisoned(train, rows, crafted, goal, attack=NAME, settings=self)

    def _models(self, train: LabeledImages, surrogate: Surrogate) -> list[nn.Module]:
        """The surrogates, trained on the clean data."""
        informed = self.adapt.informed(surrogate) if self.adapt else surrogate
        if self.stagger is None:
            return [informed(train, index=k) for k in range(self.surrogates)]
        lengths = staggered(self.stagger, self.surrogates, self.epochs)
        return [informed(train, index=k, epochs=epochs) for k, epochs in enumerate(lengths)]


def staggered(rule: Stagger, surrogates: int, epochs: int | None) -> list[int]:
    """The epochs to which each surrogate is trained, ascending.

    Args:
        rule: see the top of this file.
        epochs: how many the whole recipe has.

    Raises:
        ValueError: the recipe's length is not given, or has too few epochs for so many surrogates.
    """
    if epochs is None or epochs < 1:
        raise ValueError(f"stagger = {rule!r} needs epochs, the length of the victim's recipe, not {epochs}")
    if surrogates - 1 > epochs:
        raise ValueError(f"{surrogates} surrogates cannot be staggered over a recipe of {epochs} epochs")
    if rule == "firstn":
        return list(range(surrogates))
    if rule == "inbetween":
        return [epochs * k // (surrogates + 1) for k in range(1, surrogates + 1)]
    return [epochs * k // max(surrogates - 1, 1) for k in range(surrogates)]


def matching_objective(model: nn.Module, goal: Goal, wanted: int, criterion: Criterion = "cross-entropy") -> Objective:
    """``1 - cos`` of the goal's gradient, taken here and now, and that of the poisons it is called with.

    Args:
        model: in eval mode; every parameter that requires a gradient is matched, biases and normalisations too.

    Raises:
        ValueError: no parameter requires a gradient, or the goal's gradient is 0 or not finite.
    """
    if criterion == "cross-entropy":
        return objective_for(model, mean_gradient(model, goal.x, goal.y_wanted), wanted)
    parameters = trainable(model)
    margin = margin_loss(logits_of(model, goal.x.to(parameters[0])), goal.y_wanted.to(parameters[0].device))
    return objective_for(model, torch.autograd.grad(margin, parameters, materialize_grads=True), wanted)


def margin_loss(logits: Float[Tensor, "b k"], wanted: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
    """By how much the largest other logit exceeds the wanted one, in the mean over images."""
    own = logits.gather(1, wanted[:, None])
    others = logits.scatter(1, wanted[:, None], -torch.inf)
    return (others.amax(1) - own[:, 0]).mean()
