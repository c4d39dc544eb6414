"""Convex Polytope: poisons whose features surround the goal's.

Chen Zhu, W. Ronny Huang, Ali Shafahi, Hengduo Li, Gavin Taylor, Christoph Studer, Tom Goldstein: *Transferable
Clean-Label Poisoning Attacks on Deep Neural Nets*, ICML 2019, arXiv 1905.05897. With phi the features that the victim's
new linear layer sees, x_j the bases and x_t the goal::

    minimise over |delta_j| <= xi and c on the simplex    1/2 |phi(x_t) - sum_j c_j phi(x_j + delta_j)|^2 / |phi(x_t)|^2

averaged over the surrogates, each of which has coefficients c of its own. A linear layer that puts the poisons in their
class then puts the goal there, which is in the polytope that they span. In every step first the coefficients are found,
with the poisons held fixed, by forward-backward splitting from those of the step before::

    c = projection of (c - gradient / L) onto the simplex, until |change of c| < tol |c|

and then the poisons make one step of Adam, of a constant 0.04 normalised units, from the clean base, not augmented.
Against a victim that trains the whole network this is done at several stages of it (``layers``; what a stage is, says
``features.py``), each with its own coefficients. Several goal images have coefficients of their own, too.

Departures. 1/L is a step that never overshoots, from a bound on L; the authors' is 2/L of a random estimate, and halved
where it overshot. The features' mean is subtracted first, which moves no minimum, as the coefficients sum to 1, but
makes L small. ``signed`` takes the outer loop of Gradient Matching's authors instead of Adam, as their port does:
signed Adam with a decaying step, random start, augmented if ``augment`` is given. Dropout is off while crafting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from friends.attacks.base import (
    About,
    Adaptive,
    Cost,
    Halfway,
    Loop,
    Sizes,
    Surrogate,
    check_budget,
    craft_many,
    place_of,
    poisoned,
    still,
)
from friends.attacks.features import (
    Bases,
    Group,
    Layers,
    OneOfMany,
    Task,
    check_features,
    check_layers,
    features,
    lengths,
    loop_cost,
    prepare,
)
from friends.attacks.halfway import State
from friends.attacks.simplex import simplex_fit
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.types import Progress, Streams, silent

NAME = "convex-polytope"


@dataclass(frozen=True, kw_only=True)
class ConvexPolytope(OneOfMany):
    """The distance of the goal's feature to the polytope of the poisons' features, minimised over the poisons' pixels.

    Args:
        xi: l_inf bound of the perturbation in [0, 1] pixel units.
        budget: number of poisons as a fraction of the whole training set.
        steps: steps of each restart.
        restarts: independent random starts (``signed`` only); the one with the lowest last distance is kept.
        tau: step size in normalised units (pixels divided by the channel's standard deviation); divided by
            ``surrogates`` if ``signed``.
        surrogates: how many extractors the poisons are crafted on at once.
        augment: what the victim is expected to augment with; None for none.
        signed: signed Adam with a decaying step from a random start; else plain Adam with a constant step from the
            clean base.
        tol: relative change at which the coefficients count as found.
        layers: ``"penultimate"`` against a new linear layer; ``"last-two"`` (as the authors) or ``"all"`` stages
            against a victim that trains the whole network.
        bases: ``"random"`` images of the wanted class, or those with the ``"nearest"`` features to the goal's.
        batch: poisons per forward pass; if there are more, each batch has a polytope of its own.
        adapt: the defense that the poisons are to survive; None for an attacker who knows of none.

    Raises:
        ValueError: a setting is out of range, or there are restarts where every start is the same.
    """

    xi: float = 16 / 255
    budget: float = 0.01
    steps: int = 1200
    restarts: int = 1
    tau: float = 0.04
    surrogates: int = 1
    augment: Augment | None = None
    signed: bool = False
    tol: float = 1e-6
    layers: Layers = "penultimate"
    bases: Bases = "random"
    batch: int = 512
    adapt: Adaptive | None = None

    about: ClassVar[About] = About(
        title="Convex Polytope",
        paper="Zhu et al., ICML 2019, arXiv 1905.05897",
        scenarios=("transfer", "finetune"),
        aim="target",
    )

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_features(self)
        check_layers(self.layers)
        if not 0 < self.tol < 1:
            raise ValueError(f"tol is a relative change in (0, 1), not {self.tol}")
        if not self.signed and self.restarts != 1:
            raise ValueError(
                f"plain Adam starts at the clean images, so its {self.restarts} restarts would be alike: "
                "pass restarts=1 or signed=True"
            )
        self._loop()

    def _loop(self) -> Loop:
        return Loop(
            xi=self.xi,
            steps=self.steps,
            restarts=self.restarts,
            tau=self.tau / self.surrogates if self.signed else self.tau,
            augment=self.augment,
            start="randn" if self.signed else "clean",
            signed=self.signed,
            batch=self.batch,
            adapt=self.adapt,
        )

    def cost(self, sizes: Sizes) -> Cost:
        """Every poison is differentiated by every surrogate at every draw of every step of every restart.

        The search for the coefficients needs no network and is not counted.
        """
        return loop_cost(self, self._loop(), sizes)

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
        with still(task.models, freeze=True):
            return [made for group in task.groups(checkpoint, progress) for made in self._group(task, group)]

    def _group(self, task: Task, group: Group) -> list[PoisonedDataset]:
        polytopes = [Polytope(model, group.goals, self.layers, self.tol) for model in task.models]

        def before_step(place: tuple[int, int], _delta: Tensor) -> None:
            for polytope in polytopes:
                polytope.begin(anew=place[1] == 0)

        crafted = craft_many(
            group.jobs,
            polytopes,
            self._loop(),
            moments=task.train.moments,
            before_step=before_step,
            halfway=_WithCoefficients(group.halfway, polytopes),
            progress=group.progress,
            what=NAME.replace("-", " "),
        )
        parts = zip(group.rows, crafted, group.goals, strict=True)
        return [poisoned(task.train, *part, attack=NAME, settings=self) for part in parts]


class Polytope:
    """The objective with one surrogate, which remembers the coefficients from one step to the next.

    A step may look at the poisons several times, batch by batch or draw by draw; each look has coefficients of its own.

    Args:
        model: in eval mode; the goals' features are taken here and now.
        goals: t goals, of m_1, ..., m_t images.
        layers: the stages.
        tol: relative change at which coefficients count as found.

    Raises:
        ValueError: a goal's feature is 0, to which no distance can be relative; or there is no such stage.
    """

    def __init__(self, model: nn.Module, goals: Sequence[Goal], layers: Layers, tol: float) -> None:
        self.model, self.tol = model, tol
        self.layers: Layers = layers
        place = place_of(model)
        with torch.no_grad():
            self.wanted = features(model, torch.cat([goal.x.to(place) for goal in goals]), layers)
        self.units = [lengths(stage).square() for stage in self.wanted]
        self.sizes = torch.tensor([len(goal) for goal in goals], device=place.device)
        self.owner = torch.arange(len(goals), device=place.device).repeat_interleave(self.sizes)
        self.coefficients: dict[str, Float[Tensor, "m b"]] = {}
        self.looks = 0

    def begin(self, *, anew: bool) -> None:
        """Before every step; ``anew`` before the first of a restart, to forget the coefficients."""
        self.looks = 0
        if anew:
            self.coefficients = {}

    def __call__(self, poisons: list[Tensor]) -> Float[Tensor, " t"]:
        """The goals' distances, averaged over stages and their images."""
        found = features(self.model, torch.cat(poisons), self.layers)
        total = torch.zeros(len(self.owner)).to(poisons[0])
        for k, (stage, wanted, unit) in enumerate(zip(found, self.wanted, self.units, strict=True)):
            of_goals = stage.unflatten(0, (len(poisons), -1))
            name = f"{self.looks}-{k}"
            c = simplex_fit(of_goals.detach(), wanted, self.owner, self.coefficients.get(name), tol=self.tol)
            self.coefficients[name] = c
            mixed = torch.einsum("mb,mbd->md", c.to(stage), of_goals[self.owner])
            total = total + (wanted - mixed).square().sum(1) / unit / 2 / len(found)
        self.looks += 1
        return torch.zeros(len(poisons)).to(total).index_add(0, self.owner, total) / self.sizes


class _WithCoefficients(Halfway):
    """State on disk that has the coefficients beside that of the outer loop."""

    def __init__(self, whole: Halfway, polytopes: Sequence[Polytope]) -> None:
        self.whole, self.polytopes = whole, polytopes

    def load(self, device: torch.device | str = "cpu") -> State | None:
        state = self.whole.load(device)
        if state is not None:
            for i, polytope in enumerate(self.polytopes):
                mine = f"coefficients-{i}-"
                polytope.coefficients = {
                    name.removeprefix(mine): c for name, c in state[0].items() if name.startswith(mine)
                }
        return state

    def offer(self, state: Callable[[], State], *, force: bool = False) -> None:
        def whole() -> State:
            tensors, numbers = state()
            held = {
                f"coefficients-{i}-{name}": c
                for i, polytope in enumerate(self.polytopes)
                for name, c in polytope.coefficients.items()
            }
            return {**tensors, **held}, numbers

        self.whole.offer(whole, force=force)
