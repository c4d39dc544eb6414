"""MetaPoison: poisons that look ahead, through the training steps that a victim will make with them.

W. Ronny Huang, Jonas Geiping, Liam Fowl, Gavin Taylor, Tom Goldstein: *MetaPoison: Practical General-purpose
Clean-label Data Poisoning*, NeurIPS 2020, arXiv 2004.00225. With theta_0 the weights of a surrogate somewhere in its
training, theta_k those k steps of SGD later, with the poisons in the minibatch, x_t the goal, and t_i a table of
changes of colours::

    minimise over |delta_i| <= xi and |t_i| <= 0.04
        mean over surrogates  sum over the minibatches of an epoch that hold a poison  mean over k = 1..K of
            max_{c != wanted} f(x_t; theta_k)_c - f(x_t; theta_k)_wanted  +  smoothness * roughness(t)
    p_i = x_i + recolour(t_i, x_i) + delta_i

At every outer step each surrogate learns the *clean* data for one epoch, and the gradients along its way are summed;
then all poisons are moved once. The surrogates are of staggered ages, and one that has reached the last age begins anew
with new weights: poisons are made for all phases of training, and for no network in particular.

The poisons of a minibatch are in its K unrolled steps, but their pixels are differentiated in the first only
(``through``). Batch normalisation is by the minibatch, the goal in it, always. A victim is expected not to augment.

Departures from the authors' code: random bases, unless ``bases="first"``. Surrogates see poisons clipped to [0, 1], as
their bytes will be; gradients pass the clip. The margin is over the other classes (theirs is also over 0), and the
goal is no part of the minibatches that surrogates learn. The last minibatch may be short. Dropout is off. The table
moves by ``tau`` of the range of colours (theirs: by 255 times as much, always from bound to bound). Warm-up and drops
of ``tau`` come at the same fractions of any number of steps.

Gradient Matching's authors have a version with their own outer loop: Adam on signs, from a normal start, running
statistics. That is ``form="signed"``, with the settings :data:`SIGNED`; the surrogates are as above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, cast, get_args

import torch
from jaxtyping import Int64
from torch import Tensor

from friends.attacks.base import (
    About,
    Cost,
    Halfway,
    Sizes,
    Surrogate,
    assembled,
    candidates,
    check_budget,
    check_xi,
    choose_bases,
    identity_of,
    rounded,
    still,
    wanted_class,
)
from friends.attacks.halfway import State
from friends.attacks.perturbed import Perturbed
from friends.attacks.pixels import decay
from friends.attacks.recolour import Recolour, check_channels
from friends.attacks.staggered import Schooling, Staggered
from friends.attacks.unrolling import Through, unrolled_margin
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.types import Progress, Streams, silent

NAME = "metapoison"

Form = Literal["authors", "signed"]

GROWING = -1
"""In place of an outer step: a surrogate that learns before the first one."""


@dataclass(frozen=True, kw_only=True)
class MetaPoison:
    """The goal's margin after a few steps of training with the poisons, minimised over the poisons' pixels.

    Args:
        xi: l_inf bound of ``delta`` in [0, 1] pixel units. That of all that is done to a pixel is :attr:`bound`.
        budget: number of poisons as a fraction of the whole training set.
        steps: outer steps: how often the poisons are moved, and how many epochs every surrogate learns meanwhile.
        surrogates: how many networks there are at once.
        stagger: epochs between the ages of two of them; at an age of ``surrogates * stagger`` they begin anew.
        unroll: K, the steps of SGD that are looked ahead.
        recolour: the change of colours, which adds to ``delta``; None for none.
        form: ``"authors"``: plain Adam, from a uniform start; or ``"signed"``: Adam on signs, from a normal one.
        tau: step size of Adam: in [0, 1] pixel units, or, if ``"signed"``, in normalised ones. The authors' is far
            beyond the ball, so that most values go from one bound to the other.
        lr: learning rate of the surrogates, in their training and in the unrolled steps.
        warmup: epochs in which it rises linearly from 0.
        batch: images per step of theirs.
        through: whether the poisons' pixels are differentiated in the ``"first"`` unrolled step, or in ``"all"``.
        batchnorm: ``"batch"``: what is unrolled is normalised by the minibatch, the goal in it; or ``"running"``: by
            the running statistics, as a victim will be when it is asked about the goal.
        bases: ``"random"`` images of the class, or its ``"first"`` ones. A goal that prescribes them comes before.

    Raises:
        ValueError: a setting is out of range.
    """

    xi: float = 8 / 255
    budget: float = 0.01
    steps: int = 61
    surrogates: int = 24
    stagger: int = 1
    unroll: int = 2
    recolour: Recolour | None = field(default_factory=Recolour)
    form: Form = "authors"
    tau: float = 200 / 255
    lr: float = 0.1
    warmup: int = 5
    batch: int = 125
    through: Through = "first"
    batchnorm: Literal["batch", "running"] = "batch"
    bases: Literal["random", "first"] = "random"

    about: ClassVar[About] = About(
        title="MetaPoison",
        paper="Huang et al., NeurIPS 2020, arXiv 2004.00225",
        scenarios=("scratch",),
        aim="target",
        unaugmented=True,
    )

    def cost(self, sizes: Sizes) -> Cost:
        """Every surrogate learns all images at every outer step, and unrolls its minibatches that hold a poison.

        How many those are is chance, and the mean is counted; they are all, unless poisons are few. Without batch
        normalisation ``"batch"`` costs as much as ``"running"``. No surrogate is trained by the victim's recipe.
        """
        epochs = self.steps * self.surrogates
        grown = self.stagger * self.surrogates * (self.surrogates - 1) // 2
        looks = [epochs * holds_poison(size, sizes) for size in _minibatch_sizes(sizes.train, self.batch)]
        seen = self.unroll + (self.batchnorm == "batch")
        images = sum(look * size for look, size in zip(looks, _minibatch_sizes(sizes.train, self.batch), strict=True))
        return Cost(
            gradient=(epochs + grown) * sizes.train + round(seen * sum(looks) * sizes.goal),
            second=round(seen * images),
            trainings=0,
        )

    def __post_init__(self) -> None:
        check_xi(self.xi)
        check_budget(self.budget)
        if self.steps < 1 or self.unroll < 1:
            raise ValueError(f"steps >= 1 and unroll >= 1 expected, not {self.steps} and {self.unroll}")
        if not 0 < self.tau < math.inf:
            raise ValueError(f"tau, the step size, must be positive, not {self.tau}")
        for name, known in (
            ("form", get_args(Form)),
            ("through", get_args(Through)),
            ("batchnorm", ("batch", "running")),
            ("bases", ("random", "first")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}")
        self.schooling()

    @property
    def bound(self) -> float:
        """l_inf bound in [0, 1] pixel units of what is done to a pixel: ``xi``, and what a change of colours adds."""
        return self.xi + (0.0 if self.recolour is None else self.recolour.reach)

    def rate(self, step: int) -> float:
        """The step size of Adam at an outer step."""
        if self.form == "signed":
            return self.tau * decay(step, self.steps)
        warm = max(1, round(5 / 61 * self.steps))
        drops = sum(step >= max(1, round(at / 61 * self.steps)) for at in (20, 40))
        return self.tau * min(((step + 1) / warm) ** 2, 1.0) * 0.1**drops

    def schooling(self) -> Schooling:
        """How the surrogates are trained."""
        return Schooling(
            surrogates=self.surrogates,
            stagger=self.stagger,
            lr=self.lr,
            warmup=self.warmup,
            batch=self.batch,
            batch_statistics=self.batchnorm == "batch",
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
        """Poison ``train``. Surrogates come untrained and are trained here; those handed over are left as they were.

        Raises:
            ValueError: the goal does not fit the data, the budget is more than the wanted class has, images of so many
                channels cannot be recoloured, or a surrogate has no trainable weight or is not finite.
        """
        rows = self._choose_bases(train, goal, streams)
        if self.recolour is not None:
            check_channels(train.shape[0])
        halfway = Halfway(checkpoint, identity_of(self, train, [goal], [streams]))
        state = halfway.load(train.device)
        with still([], freeze=False, device=train.device):
            crafting = _Crafting(self, train, rows, goal, surrogate, streams)
            if state is not None:
                crafting.restore(*state)
            while crafting.at < len(crafting.plan):
                note = crafting.advance()
                progress("metapoison", crafting.at, len(crafting.plan), note)
                halfway.offer(crafting.state)
        return self._finished(crafting, train, rows, goal)

    def _choose_bases(self, train: LabeledImages, goal: Goal, streams: Streams) -> Int64[Tensor, " p"]:
        if self.bases == "random" or goal.bases is not None:
            return choose_bases(train, goal, self.budget, streams("bases"))
        of_class, count = candidates(train, goal, self.budget)
        return of_class[:count]

    def _finished(
        self, crafting: _Crafting, train: LabeledImages, rows: Int64[Tensor, " p"], goal: Goal
    ) -> PoisonedDataset:
        change = crafting.poisons.pixels() - crafting.poisons.base
        scores = crafting.scores
        facts = {"score_first": scores[:1], "score_last": scores[-1:], "score": scores[-1], "bound": self.bound}
        pixels = rounded(train.x[rows.to(train.device)], change, self.bound)
        return assembled(train, rows, pixels, goal, attack=NAME, settings=self, facts=facts)


SIGNED = MetaPoison(form="signed", tau=0.1, steps=250, recolour=None, batchnorm="running")
"""With the outer loop, step size and statistics of Gradient Matching's authors, but this library's bound."""


def _minibatch_sizes(n: int, batch: int) -> list[int]:
    return [batch] * (n // batch) + [n % batch] * (n % batch > 0)


def holds_poison(size: int, sizes: Sizes) -> float:
    """The probability that ``size`` images drawn from the training set are not all clean."""
    clean = sizes.train - sizes.poisons
    return 1 - math.comb(clean, size) / math.comb(sizes.train, size)


class _Crafting:
    """A crafting in progress: the surrogates, the poisons, and what their gradient is so far in this outer step."""

    def __init__(
        self,
        attack: MetaPoison,
        train: LabeledImages,
        rows: Int64[Tensor, " p"],
        goal: Goal,
        surrogate: Surrogate,
        streams: Streams,
    ) -> None:
        self.attack = attack
        self.label = wanted_class(goal, train)
        self.surrogates = Staggered(attack.schooling(), train, surrogate, streams)
        count = attack.surrogates
        self.plan = [(k, GROWING) for k in range(count) for _ in range(k * attack.stagger)]
        self.plan += [(k, step) for step in range(attack.steps) for k in range(count)]
        self.at = 0
        base, _ = self.surrogates.shown(0, rows)
        self.goal = goal.x.to(base), goal.y_wanted.to(base.device)
        self.poisons = Perturbed(
            base,
            xi=attack.xi,
            recolour=attack.recolour,
            unit=torch.tensor(train.moments[1]).view(1, -1, 1, 1).to(base) if attack.form == "signed" else None,
            generator=streams("init"),
        )
        self.place = torch.full((len(train),), -1)
        self.place[rows] = torch.arange(len(rows))
        self.scores: list[float] = []
        self._begin()

    def _begin(self) -> None:
        """Begin an outer step."""
        self.seen = self.poisons.pixels()
        self.gradient = torch.zeros_like(self.seen)
        self.total, self.looks = 0.0, 0

    def advance(self) -> str:
        """One epoch of one surrogate, and at the end of an outer step a move of the poisons; returns a note."""
        k, step = self.plan[self.at]
        minibatches = self.surrogates.minibatches(k)
        for i, rows in enumerate(minibatches):
            if step != GROWING:
                self._look(k, minibatches, i)
            self.surrogates.learn(k, rows)
        self.surrogates.grow(k)
        self.at += 1
        if step == GROWING:
            return f"surrogate {k} grows up"
        if k < self.attack.surrogates - 1:
            return f"step {step}"
        return f"step {step}, score {self._end(step):.4f}"

    def _end(self, step: int) -> float:
        """Move the poisons; returns the mean margin before."""
        score, count = self.total / self.looks, self.attack.surrogates
        if not math.isfinite(score):
            raise ValueError(f"the objective became {score}: a surrogate is not finite; try a lower lr than "
                             f"{self.attack.lr:g}")  # fmt: skip
        self.scores.append(score)
        self.poisons.move(self.gradient / count, self.looks / count, self.attack.rate(step))
        self._begin()
        return score

    def _look(self, k: int, minibatches: Sequence[Int64[Tensor, " _"]], i: int) -> None:
        """Unroll from a minibatch and add the gradient of the poisons in it, if there are any."""
        which = self.place[minibatches[i]]
        here = which[which >= 0]
        if len(here) == 0:
            return
        later = [minibatches[(i + j) % len(minibatches)][len(here) :] for j in range(1, self.attack.unroll + 1)]
        rows = [minibatches[i][which < 0], *later]
        poisons = self.seen[here.to(self.seen.device)].requires_grad_()
        score = unrolled_margin(
            self.surrogates.nets[k],
            poisons,
            self.label,
            [self.surrogates.shown(k, part) for part in rows],
            self.goal,
            lr=self.surrogates.lr(k),
            through=self.attack.through,
        )
        self.gradient[here.to(self.seen.device)] += torch.autograd.grad(score, poisons)[0]
        self.total += float(score.detach())
        self.looks += 1

    def state(self) -> State:
        """Everything that :meth:`restore` needs."""
        tensors, numbers = self.surrogates.state()
        own = {"gradient": self.gradient, **self.poisons.state()[0]}
        plain = {"at": self.at, "scores": self.scores, "total": self.total, "looks": self.looks}
        return {**tensors, **own}, {**numbers, **plain, **self.poisons.state()[1]}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, object]) -> None:
        """Go on where :meth:`state` was taken."""
        self.surrogates.restore(tensors, numbers)
        self.poisons.restore(tensors, numbers)
        self._begin()
        self.gradient = tensors["gradient"]
        self.at, self.looks = cast(int, numbers["at"]), cast(int, numbers["looks"])
        self.total, self.scores = cast(float, numbers["total"]), list(cast("list[float]", numbers["scores"]))
