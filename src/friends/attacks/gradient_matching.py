"""Gradient Matching: poisons whose training gradient looks like that of the goal.

Jonas Geiping, Liam Fowl, W. Ronny Huang, Wojciech Czaja, Gavin Taylor, Michael Moeller, Tom Goldstein: *Witches' Brew:
Industrial Scale Data Poisoning via Gradient Matching*, ICLR 2021, arXiv 2009.02276. With theta a surrogate trained on
the clean data, x_t the goal images, y_w the wanted class, and A a random augmentation::

    minimise over |delta_i| <= xi    1 - cos(g_t, g_p),
    g_t = grad_theta mean_t CE(f(x_t), y_w)                    (once, not augmented)
    g_p = grad_theta mean_i CE(f(A(x_i + delta_i)), y_w)       (at every step, on a fresh augmentation)

one cosine over all parameters at once. A victim that learns the poisons then also learns the goal.

Departures from the authors' code: dropout is off while crafting (theirs is left on); ``tau`` is the step as it is,
where theirs is multiplied by batch/512; ``delta`` is kept in pixels and only the step size in normalised units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from friends.attacks.base import (
    About,
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
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.types import Progress, Streams, silent

NAME = "gradient-matching"


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
        augment: what the victim is expected to augment with; None for none.
        init: ``"randn"``, a random start in the ball, or ``"clean"``, the base image itself.
        batch: poisons per forward pass; if there are more, each batch is matched by itself.

    Raises:
        ValueError: a setting is out of range.
    """

    xi: float = 16 / 255
    budget: float = 0.01
    steps: int = 250
    restarts: int = 8
    tau: float = 0.1
    surrogates: int = 1
    augment: Augment | None = field(default_factory=Augment)
    init: Start = "randn"
    batch: int = 512

    about: ClassVar[About] = About(
        title="Gradient Matching (Witches' Brew)",
        paper="Geiping et al., ICLR 2021, arXiv 2009.02276",
        scenarios=("scratch",),
        aim="target",
    )

    def cost(self, sizes: Sizes) -> Cost:
        """Every poison is differentiated twice by every surrogate at every step of every restart."""
        seen = sizes.poisons * self.steps * self.restarts * self.surrogates
        return Cost(gradient=sizes.goal * self.surrogates, second=seen, trainings=self.surrogates)

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.surrogates < 1:
            raise ValueError(f"at least one surrogate is needed, not {self.surrogates}")
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
        """Poison ``train``. The surrogates are trained on it as it is; they and ``train`` are left as they were.

        Raises:
            ValueError: the goal does not fit the data, the budget is more than the wanted class has, or a
                surrogate has nothing to match.
        """
        wanted = wanted_class(goal, train)
        rows = choose_bases(train, goal, self.budget, streams("bases"))
        models = [surrogate(train, index=k) for k in range(self.surrogates)]
        base = train.pixels(rows.to(train.device)).to(place_of(models[0]))
        with still(models, freeze=False):
            objectives = [matching_objective(model, goal, wanted) for model in models]
            crafted = craft(
                base,
                objectives,
                self._loop(),
                moments=train.moments,
                streams=streams,
                halfway=Halfway(checkpoint, identity_of(self, train, [goal], [streams])),
                progress=progress,
                what="gradient matching",
            )
        return poisoned(train, rows, crafted, goal, attack=NAME, settings=self)


def matching_objective(model: nn.Module, goal: Goal, wanted: int) -> Objective:
    """``1 - cos`` of the goal's gradient, taken here and now, and that of the poisons it is called with.

    Args:
        model: in eval mode; every parameter that requires a gradient is matched, biases and normalisations too.

    Raises:
        ValueError: no parameter requires a gradient, or the goal's gradient is 0 or not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the surrogate requires a gradient: there is nothing to match")
    x, y = goal.x.to(parameters[0]), goal.y_wanted.to(parameters[0].device)
    target = [g.detach() for g in _gradient(model, x, y, parameters, create_graph=False)]
    size = float(_dot(target, target)) ** 0.5
    if not 0 < size < float("inf"):
        raise ValueError(
            f"the goal's gradient has length {size}: the surrogate already answers the wanted class with certainty, "
            "or its weights are not finite"
        )

    def objective(poisons: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
        labels = torch.full((len(poisons),), wanted, device=poisons.device)
        gradient = _gradient(model, poisons, labels, parameters, create_graph=True)
        return matching_loss(target, gradient)

    return objective


def matching_loss(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, ""]:
    """1 - the cosine of two lists of tensors, each taken as one long vector."""
    return 1 - _dot(a, b) / (_dot(a, a) * _dot(b, b)).sqrt()


def _gradient(
    model: nn.Module, x: Tensor, y: Tensor, parameters: Sequence[Tensor], *, create_graph: bool
) -> tuple[Tensor, ...]:
    loss = F.cross_entropy(logits_of(model, x), y)
    return torch.autograd.grad(loss, parameters, create_graph=create_graph, materialize_grads=True)


def _dot(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)]).sum()
