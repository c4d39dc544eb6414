"""Hidden Trigger Backdoor: poisons that look like their class and have the features of triggered source images.

Aniruddha Saha, Akshayvarun Subramanya, Hamed Pirsiavash: *Hidden Trigger Backdoor Attacks*, AAAI 2020, arXiv
1910.00033. With phi the features that the victim's new linear layer sees, p_j = x_j + delta_j images of the wanted
class, and T(s_j) as many training images of the source class with the trigger T, each at a random place::

    minimise over |delta_j| <= xi    sum_j |phi(T(s_m(j))) - phi(p_j)|^2

by plain gradient descent with a decaying step. At every step the matching m is found anew, greedily and without
replacement: the nearest pair of all is matched first, then the nearest pair of the rest. (What each poison is pulled to
may change on the way; every triggered image attracts one poison.) A linear layer that puts the poisons in their class
then puts triggered images there.

:data:`AUTHORS` are the original settings, :data:`BENCHMARK` those of the poisoning benchmark's version. They differ in
the bound, the rate, and when they stop: once *each* poison is near enough, or once the sum over *all* is. The benchmark
has its trigger at one place, which is the goal's to say.

Departures: poisons replace their bases, where the authors add them to other data. ``candidates`` times as many as the
budget can be crafted and the nearest kept, as the paper does; the authors' code keeps what comes first in order of
distances rounded down. Where the source class has too few images, they are used again, with the trigger elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from friends.attacks.base import (
    About,
    Cost,
    Crafted,
    Halfway,
    Sizes,
    Surrogate,
    check_budget,
    check_xi,
    choose_bases,
    identity_of,
    penultimate,
    place_of,
    poisoned,
    source_rows,
    still,
    trigger_of,
)
from friends.attacks.pixels import project
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.types import Progress, Streams, silent

NAME = "hidden-trigger"

Whose = Literal["each", "all"]


@dataclass(frozen=True, kw_only=True)
class HiddenTrigger:
    """The squared distance of every poison's features to those of its triggered image, minimised over pixels.

    Args:
        xi: l_inf bound of the perturbation in [0, 1] pixel units.
        budget: number of poisons as a fraction of the whole training set.
        steps: steps of each batch, at most.
        rate: step size at first: pixels in [0, 1] per unit of the gradient. It goes with the scale of the features.
        factor, every: the step size is multiplied by ``factor`` after every so many steps.
        enough: a batch is finished once its squared distances are below this; 0 for never. What is near depends on
            the network, so the authors' 10 is in :data:`AUTHORS` and not the default.
        enough_of: whether ``"each"`` distance must be, or the sum of ``"all"``.
        candidates: how many times as many poisons are crafted, if the class has so many; the nearest are kept.
        batch: poisons that are matched to as many triggered images, apart from all others.

    Raises:
        ValueError: a setting is out of range.
    """

    xi: float = 16 / 255
    budget: float = 0.01
    steps: int = 5000
    rate: float = 0.01
    factor: float = 0.5
    every: int = 1000
    enough: float = 0.0
    enough_of: Whose = "each"
    candidates: int = 1
    batch: int = 100

    about: ClassVar[About] = About(
        title="Hidden Trigger Backdoor",
        paper="Saha et al., AAAI 2020, arXiv 1910.00033",
        scenarios=("transfer", "finetune"),
        aim="backdoor",
    )

    def cost(self, sizes: Sizes) -> Cost:
        """Each triggered image once, each crafted poison at every step; less if there is ``enough`` before."""
        crafted = min(sizes.poisons * self.candidates, max(sizes.wanted, sizes.poisons))
        return Cost(forward=crafted, gradient=crafted * self.steps, trainings=1)

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_xi(self.xi)
        for name in ("steps", "every", "candidates", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not (0 < self.rate < float("inf") and 0 < self.factor <= 1 and self.enough >= 0):
            raise ValueError(f"rate > 0, factor in (0, 1] and enough >= 0 expected, not {self.rate}, {self.factor}, "
                             f"{self.enough}")  # fmt: skip
        if self.enough_of not in get_args(Whose):
            raise ValueError(f"unknown enough_of {self.enough_of!r}; choose one of {', '.join(get_args(Whose))}")

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
            ValueError: the goal has no trigger or does not fit the data, no training image is of its true class, the
                budget is more than the wanted class has, or the surrogate has no penultimate features.
        """
        kept = choose_bases(train, goal, self.budget, streams("bases"))
        rows = kept if goal.bases is not None else self._widened(train, kept, streams("candidates"))
        triggered = triggered_images(train, goal, len(rows), streams("sources"))
        halfway = Halfway(checkpoint, identity_of(self, train, [goal], [streams]))
        model = surrogate(train)
        base = train.pixels(rows.to(train.device)).to(place_of(model))
        with still([model], freeze=True):
            pull = _Pull(self, model, base, triggered.to(base))
            pull.run(halfway, progress)
        nearest = pull.last.sort(stable=True).indices[: len(kept)].sort().values
        scores = [[float(all_of[nearest].mean())] for all_of in (pull.first, pull.last)]
        crafted = Crafted(pull.delta[nearest], *scores)
        return poisoned(train, rows[nearest.cpu()], crafted, goal, attack=NAME, settings=self)

    def _widened(self, train: LabeledImages, kept: Tensor, generator: torch.Generator) -> Int64[Tensor, " k"]:
        """The chosen bases and others of their class, ascending: all that poisons are made of."""
        of_class = (train.y.cpu() == train.y[kept[0]].cpu()).nonzero().flatten()
        others = of_class[~torch.isin(of_class, kept)]
        more = torch.randperm(len(others), generator=generator)[: len(kept) * (self.candidates - 1)]
        return torch.cat([kept, others[more]]).sort().values

    def rate_at(self, step: int) -> float:
        """The step size of a step, counted from 0."""
        return self.rate * self.factor ** (step // self.every)

    def finished(self, distances: Float[Tensor, " b"]) -> bool:
        """Whether these squared distances are small enough."""
        return float(distances.max() if self.enough_of == "each" else distances.sum()) < self.enough


AUTHORS = HiddenTrigger(enough=10)
"""The original method; its ``rate`` and ``enough`` are for the 4,096 features of AlexNet."""

BENCHMARK = HiddenTrigger(xi=8 / 255, rate=0.001, factor=0.95, every=2000, enough=10, enough_of="all")
"""The poisoning benchmark's version, for the 512 features of a ResNet-18 and 25 poisons."""


def triggered_images(
    train: LabeledImages, goal: Goal, count: int, generator: torch.Generator
) -> Float[Tensor, "count c h w"]:
    """So many random training images of the goal's true classes with its trigger, none twice while there are others.

    Raises:
        ValueError: the goal has no trigger, or no training image is of its true class.
    """
    trigger, rows = trigger_of(goal, "a backdoor"), source_rows(train, goal)
    rounds = -(-count // len(rows))
    drawn = torch.cat([rows[torch.randperm(len(rows), generator=generator)] for _ in range(rounds)])[:count]
    return trigger(train.pixels(drawn.to(train.device)), generator)


def nearest_pairs(distances: Float[Tensor, "n n"]) -> Int64[Tensor, " n"]:
    """For each column its row in the greedy matching: the nearest pair first, then the nearest of what is left.

    Pairs that are each other's nearest are matched at once: the greedy order would come to each of them before to any
    other pair that one of the two is in. Ties go to the lower row, then to the lower column.

    Args:
        distances: finite.
    """
    left = distances.clone()
    row_of = torch.full((len(left),), -1, dtype=torch.int64, device=left.device)
    columns = torch.arange(len(left), device=left.device)
    while bool((row_of < 0).any()):
        nearest = left.argmin(0)
        mutual = (left.argmin(1)[nearest] == columns) & (row_of < 0)
        row_of[mutual] = nearest[mutual]
        left[nearest[mutual], :] = torch.inf
        left[:, mutual] = torch.inf
    return row_of


def pulled(
    features: Callable[[Tensor], Tensor], poisons: Float[Tensor, "b c h w"], targets: Float[Tensor, "b d"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b c h w"]]:
    """Squared distance of each poison to the target that it is matched to, and the gradient of their sum.

    Raises:
        ValueError: a feature is not finite.
    """
    x = poisons.detach().requires_grad_()
    phi = features(x)
    apart = torch.cdist(targets, phi.detach(), compute_mode="donot_use_mm_for_euclid_dist")
    if not bool(torch.isfinite(apart).all()):
        raise ValueError("a distance between features is not finite: the surrogate's features are not")
    distances = (targets[nearest_pairs(apart)] - phi).square().sum(1)
    return distances.detach(), torch.autograd.grad(distances.sum(), x)[0]


class _Pull:
    """The descent, batch by batch: where it is, and what it has.

    Attributes:
        delta: ``(n, c, h, w)`` perturbations.
        first, last: ``(n,)`` squared distances of every poison before its first and before its last step.
    """

    def __init__(self, attack: HiddenTrigger, model: nn.Module, base: Tensor, triggered: Tensor) -> None:
        self.attack, self.base = attack, base
        self.features: Callable[[Tensor], Tensor] = lambda x: penultimate(model, x)
        with torch.no_grad():
            self.targets = torch.cat([self.features(part) for part in triggered.split(attack.batch)])
        self.delta = torch.zeros_like(base)
        self.first = torch.zeros(len(base), device=base.device, dtype=base.dtype)
        self.last = self.first.clone()
        self.part = self.step = 0

    def run(self, halfway: Halfway, progress: Progress) -> None:
        """All that is left to do."""
        state = halfway.load(self.base.device)
        if state is not None:
            tensors, numbers = state
            self.delta, self.first, self.last = tensors["delta"], tensors["first"], tensors["last"]
            self.part, self.step = int(cast(int, numbers["part"])), int(cast(int, numbers["step"]))
        parts, steps = -(-len(self.base) // self.attack.batch), self.attack.steps
        while self.part < parts:
            mean = self._descend()
            progress("hidden trigger", self.part * steps + self.step, parts * steps, f"mean distance {mean:.4g}")
            halfway.offer(self._state)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        return (
            {"delta": self.delta, "first": self.first, "last": self.last},
            {"part": self.part, "step": self.step},
        )

    def _descend(self) -> float:
        """One step of the present batch; then the next batch, if it was the last step."""
        attack = self.attack
        span = slice(self.part * attack.batch, (self.part + 1) * attack.batch)
        base, delta = self.base[span], self.delta[span]
        distances, gradient = pulled(self.features, base + delta, self.targets[span])
        self.delta[span] = project(delta - attack.rate_at(self.step) * gradient, base, attack.xi)
        if self.step == 0:
            self.first[span] = distances
        self.last[span] = distances
        self.step += 1
        if self.step == attack.steps or attack.finished(distances):
            self.part, self.step = self.part + 1, 0
        return float(distances.mean())
