"""Poison Frogs, or feature collision: poisons each of which has the goal's feature.

Ali Shafahi, W. Ronny Huang, Mahyar Najibi, Octavian Suciu, Christoph Studer, Tudor Dumitras, Tom Goldstein: *Poison
Frogs! Targeted Clean-Label Poisoning Attacks on Neural Networks*, NeurIPS 2018, arXiv 1804.00792. With phi the features
that the victim's new linear layer sees, b_j the bases, x_t the goal, and A a random augmentation::

    collision    minimise over |delta_j| <= xi    mean_j |phi(A(b_j + delta_j)) - phi(x_t)|^2
    mean-square  minimise over |delta_j| <= xi    mean over features of (mean_j phi(A(b_j + delta_j)) - phi(x_t))^2
    original     minimise over p_j                |phi(p_j) - phi(x_t)|^2 + beta |p_j - b_j|^2
    benchmark    minimise over |p_j - b_j| <= xi  |phi(p_j) - phi(x_t)|^2

A linear layer that puts the poisons in their class then puts the goal there, which is where they are.

``collision``, ours, takes the bound and the outer loop of Gradient Matching's authors: augmented, signed Adam with a
decaying step, random start. ``mean-square`` is those authors' own port, for one goal image the same as their Bullseye
Polytope; there it has 8 restarts, here 1 by default.

``original``, with the settings :data:`ORIGINAL`, is Algorithm 1 of the paper, forward-backward splitting
(``splitting.py``), from bases that already hold the goal at an opacity: ``b = watermark * x_t + (1 - watermark) *
base``. Nothing bounds the perturbation, so ``xi`` is None; the recipe says how large it became. ``benchmark``, with the
settings :data:`BENCHMARK`, is the version of Schwarzschild et al., *Just How Toxic is Data Poisoning?*, ICML 2021: the
watermark is a start only, and the backward step a clip to the bound.

Departures. The step lam falls by a factor as in the authors' codes, but for each poison by itself: by 1/2 where the
objective is above the mean of its last 40 (``original``; there this was looked at every 40 steps only, and the distance
was not squared), by 1/5 where it rose (``benchmark``). A step after which it rose is not made; in the benchmark's code
it was made, and the poison stood still from then on. Nothing stops early. Pixels are in [0, 1], where ``original``'s
were in [0, 255], so beta and lam have other sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    JointObjective,
    Loop,
    Sizes,
    Surrogate,
    assembled,
    check_budget,
    penultimate,
    rounded,
    still,
)
from friends.attacks.features import (
    Bases,
    Group,
    OneOfMany,
    Task,
    centres,
    check_features,
    craft_groups,
    feature_cost,
    loop_cost,
    prepare,
)
from friends.attacks.splitting import Distance, Rule, Splitting
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.types import Progress, Streams, silent

NAME = "poison-frogs"

Form = Literal["collision", "mean-square", "original", "benchmark"]

SPLITTING = ("original", "benchmark")
"""The forms that are forward-backward splitting, not the common outer loop."""


@dataclass(frozen=True, kw_only=True)
class PoisonFrogs(OneOfMany):
    """The distance of each poison's feature to the goal's, minimised over the poison's pixels.

    Args:
        xi: l_inf bound of the perturbation in [0, 1] pixel units; None for the unbounded original, and only for it.
        budget: number of poisons as a fraction of the whole training set.
        steps: steps of each restart.
        restarts: independent random starts; the one with the lowest last distance is kept.
        tau: step size in normalised units (pixels divided by the channel's standard deviation), divided by
            ``surrogates``. In splitting the first lam, which falls where it is too large.
        surrogates: how many extractors the poisons are crafted on at once.
        augment: what the victim is expected to augment with; None for none. Splitting compares objectives from step
            to step and cannot augment.
        form: ``"collision"``, ``"mean-square"``, ``"original"`` or ``"benchmark"``, as at the top of this file.
        watermark: opacity of the goal in the bases (original) or in the start (benchmark); the other forms have none.
        beta: weight of the squared distance to the base, in pixels in [0, 1]; the original only.
        bases: ``"random"`` images of the wanted class, or those with the ``"nearest"`` features to the goal's.
        batch: poisons per forward pass.
        adapt: the defense that the poisons are to survive; None for an attacker who knows of none.

    Raises:
        ValueError: a setting is out of range, or not one of this form.
    """

    xi: float | None = 16 / 255
    budget: float = 0.01
    steps: int = 250
    restarts: int = 1
    tau: float = 0.1
    surrogates: int = 1
    augment: Augment | None = field(default_factory=Augment)
    form: Form = "collision"
    watermark: float = 0.0
    beta: float = 0.0
    bases: Bases = "random"
    batch: int = 512
    adapt: Adaptive | None = None

    about: ClassVar[About] = About(
        title="Poison Frogs (feature collision)",
        paper="Shafahi et al., NeurIPS 2018, arXiv 1804.00792",
        scenarios=("transfer", "finetune"),
        aim="target",
    )

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_features(self)
        if self.form not in get_args(Form):
            raise ValueError(f"unknown form {self.form!r}; choose one of {', '.join(get_args(Form))}")
        if (self.xi is None) != (self.form == "original"):
            raise ValueError("form 'original' has no bound: pass xi=None" if self.xi is not None else
                             f"form {self.form!r} has a bound: pass xi, e.g. 16/255")  # fmt: skip
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark is an opacity in [0, 1), not {self.watermark}")
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta is a weight of at least 0, not {self.beta}")
        self._check_form()
        self._loop()

    def _check_form(self) -> None:
        """Refuse what the form does not have."""
        splitting = self.form in SPLITTING
        if splitting and (self.augment is not None or self.adapt is not None or self.restarts != 1):
            raise ValueError(f"form {self.form!r} has one start, and compares objectives from step to step, which must "
                             "not be random: pass augment=None, adapt=None and restarts=1")  # fmt: skip
        for name, value, forms in (("watermark", self.watermark, SPLITTING), ("beta", self.beta, SPLITTING[:1])):
            if value and self.form not in forms:
                raise ValueError(f"{name} is for form {' or '.join(map(repr, forms))}, not {self.form!r}")

    def _loop(self) -> Loop:
        return Loop(
            xi=1.0 if self.xi is None else self.xi,
            steps=self.steps,
            restarts=self.restarts,
            tau=self.tau / self.surrogates,
            augment=self.augment,
            start="randn",
            batch=self.batch,
            adapt=self.adapt,
        )

    def cost(self, sizes: Sizes) -> Cost:
        """Every poison is differentiated by every surrogate at every draw of every step of every restart.

        In splitting also once before the first step.
        """
        if self.form in SPLITTING:
            return feature_cost(self, sizes, self.steps + 1)
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
        if self.form not in SPLITTING:
            make = collisions if self.form == "collision" else mean_collisions
            return craft_groups(task, make, self._loop(), name=NAME, checkpoint=checkpoint, progress=progress)
        with still(task.models, freeze=True):
            groups = task.groups(checkpoint, progress)
            return [made for group in groups for made in self._split(task, group)]

    def _split(self, task: Task, group: Group) -> list[PoisonedDataset]:
        """The poisons of some goals by forward-backward splitting."""
        sizes = torch.tensor([len(job.base) for job in group.jobs])
        clean = torch.cat([job.base for job in group.jobs])
        goals = torch.stack([goal.x.to(clean).mean(0) for goal in group.goals])
        marked = torch.lerp(clean, goals.repeat_interleave(sizes.to(clean.device), 0), self.watermark)
        base = marked if self.form == "original" else clean
        distance = squared_distances(task.models, group.goals, sizes)
        problem = Splitting(distance, clean, base, self._rule(), len(group.jobs) * self.batch)
        what = NAME.replace("-", " ")
        found = problem.solve(marked, self.steps, halfway=group.halfway, progress=group.progress, what=what)
        parts = [t.split(sizes.tolist()) for t in (found.x, found.first, found.score)]
        return [self._put(task.train, *part) for part in zip(group.rows, group.goals, *parts, strict=True)]

    def _rule(self) -> Rule:
        lam = self.tau / self.surrogates
        if self.form == "original":
            return Rule(lam=lam, factor=0.5, memory=40, beta=self.beta, xi=None)
        return Rule(lam=lam, factor=0.2, memory=1, beta=0.0, xi=self.xi)

    def _put(
        self, train: LabeledImages, rows: Tensor, goal: Goal, x: Tensor, first: Tensor, last: Tensor
    ) -> PoisonedDataset:
        """The data set of one goal, whose recipe says how far its poisons are from their bases."""
        base = train.x[rows.to(train.device)]
        delta = x.to(base.device) - base.float() / 255
        pixels = rounded(base, delta, 1.0 if self.xi is None else self.xi)
        change = (pixels.float() - base.float()).flatten(1) / 255
        facts: dict[str, object] = {
            "score_first": [float(first.mean())],
            "score_last": [float(last.mean())],
            "score": float(last.mean()),
            "linf": float(change.abs().max()),
            "l2": float(change.norm(dim=1).mean()),
        }
        return assembled(train, rows, pixels, goal, attack=NAME, settings=self, facts=facts)


ORIGINAL = PoisonFrogs(form="original", xi=None, beta=2.0, tau=1.0, steps=200, augment=None)
"""Algorithm 1 of the paper, for pixels in [0, 1]: with the beta of the poisoning benchmark's version of it (4.0 there,
where the 2 is missing), and a first step size that is too large and falls. The paper's experiments without transfer
have ``watermark=0.3`` as well."""

BENCHMARK = PoisonFrogs(form="benchmark", watermark=0.3, tau=0.001, steps=120, augment=None)
"""The poisoning benchmark's version with its settings (but this library's bound)."""


# --- the objectives of the common outer loop ---


def collisions(model: nn.Module, goals: Sequence[Goal]) -> JointObjective:
    """The mean squared distance of the poisons' features, each by itself, to that of their goal, taken here and now."""
    (centre,) = centres(model, goals, "penultimate")

    def objective(poisons: list[Tensor]) -> Float[Tensor, " t"]:
        found = penultimate(model, torch.cat(poisons)).unflatten(0, (len(poisons), -1))
        return (found - centre[:, None]).square().sum(2).mean(1)

    return objective


def mean_collisions(model: nn.Module, goals: Sequence[Goal]) -> JointObjective:
    """The squared distance of the poisons' mean feature to that of their goal, averaged over features."""
    (centre,) = centres(model, goals, "penultimate")

    def objective(poisons: list[Tensor]) -> Float[Tensor, " t"]:
        found = penultimate(model, torch.cat(poisons)).unflatten(0, (len(poisons), -1))
        return (found.mean(1) - centre).square().mean(1)

    return objective


# --- and of splitting ---


def squared_distances(models: Sequence[nn.Module], goals: Sequence[Goal], sizes: Int64[Tensor, " t"]) -> Distance:
    """The squared distance of each poison's feature to that of its goal, taken here and now, summed over the models.

    Args:
        models: in eval mode.
        goals: whose poisons come one after the other.
        sizes: how many each has.
    """
    stages = [centres(model, goals, "penultimate")[0] for model in models]
    wanted = [stage.repeat_interleave(sizes.to(stage.device), 0) for stage in stages]

    def distance(x: Float[Tensor, "b c h w"], rows: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
        apart = [penultimate(model, x) - centre[rows] for model, centre in zip(models, wanted, strict=True)]
        return torch.stack([one.square().sum(1) for one in apart]).sum(0)

    return distance
