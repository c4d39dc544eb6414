"""Forward-backward splitting on the pixels of poisons that do not know of each other.

Source: Algorithm 1 of Poison Frogs (Shafahi et al., NeurIPS 2018). For a poison p with its base b and a distance D::

    minimise    D(p) + beta |p - b|^2
    forward     p' = p - lam * gradient of D(p)
    backward    p  = (p' + 2 lam * beta * b) / (1 + 2 lam * beta), clipped to [0, 1], and to the bound if there is one

(The 2 is not in the paper, whose backward step therefore belongs to the objective with half of beta.)

Every poison has a step size lam of its own. A step after which the objective is above the mean of the last few is not
made; lam falls instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from friends.attacks.halfway import Halfway, State
from friends.types import Progress

Distance = Callable[[Float[Tensor, "b c h w"], Int64[Tensor, " b"]], Float[Tensor, " b"]]
"""What the forward steps minimise: pixels of some poisons, and which poisons they are, to a distance each."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How the steps are made.

    Args:
        lam: the first step size.
        factor: by which it falls.
        memory: of how many of the last objectives the mean is a step's limit.
        beta: weight of the squared distance to the base.
        xi: l_inf bound around the clean image; None for none.
    """

    lam: float
    factor: float
    memory: int
    beta: float
    xi: float | None


@dataclass(frozen=True, eq=False)
class Found:
    """Where n poisons are.

    Args:
        x: their pixels in [0, 1].
        score: their objectives there.
        gradient: of their distances, there.
        lam: the sizes of their next steps.
        recent: their last objectives, the latest last; NaN where there were none yet.
        first: their objectives at the start.
        at: steps made.
    """

    x: Float[Tensor, "n c h w"]
    score: Float[Tensor, " n"]
    gradient: Float[Tensor, "n c h w"]
    lam: Float[Tensor, " n"]
    recent: Float[Tensor, "n m"]
    first: Float[Tensor, " n"]
    at: int

    def state(self) -> State:
        """Everything that is needed to go on."""
        held = {name: getattr(self, name) for name in ("x", "score", "gradient", "lam", "recent", "first")}
        return held, {"at": self.at}


@dataclass(frozen=True, eq=False)
class Splitting:
    """A problem and how it is solved.

    Args:
        distance: D, differentiable.
        clean: images that the bound is around, pixels in [0, 1].
        base: images that the poisons are drawn to.
        rule: the steps.
        batch: poisons per call of ``distance``.
    """

    distance: Distance
    clean: Float[Tensor, "n c h w"]
    base: Float[Tensor, "n c h w"]
    rule: Rule
    batch: int

    def solve(
        self, start: Float[Tensor, "n c h w"], steps: int, *, halfway: Halfway, progress: Progress, what: str
    ) -> Found:
        """So many steps, or those that are left.

        Raises:
            ValueError: an objective is not finite at the start.
        """
        state = halfway.load(start.device)
        here = self.begin(start) if state is None else Found(**state[0], at=int(cast(int, state[1]["at"])))
        while here.at < steps:
            here = self.step(here)
            progress(what, here.at, steps, f"score {float(here.score.mean()):.4f}")
            halfway.offer(here.state)
        return here

    def begin(self, start: Float[Tensor, "n c h w"]) -> Found:
        """The start, brought within the bound."""
        x = self._within(start)
        score, gradient = self.look(x)
        if not bool(score.isfinite().all()):
            raise ValueError(f"the objective became {float(score.sum())}: the surrogate is not finite")
        recent = torch.full((len(score), self.rule.memory), torch.nan).to(score)
        recent[:, -1] = score
        return Found(x, score, gradient, torch.full_like(score, self.rule.lam), recent, score, 0)

    def step(self, here: Found) -> Found:
        """One step of each poison, forward and backward; or a smaller lam for the next."""
        there = self.backward(here.x - _each(here.lam) * here.gradient, here.lam)
        score, gradient = self.look(there)
        fine = score <= here.recent.nanmean(1)
        score = torch.where(fine, score, here.score)
        return Found(
            x=torch.where(_each(fine), there, here.x),
            score=score,
            gradient=torch.where(_each(fine), gradient, here.gradient),
            lam=torch.where(fine, here.lam, here.lam * self.rule.factor),
            recent=torch.cat([here.recent[:, 1:], score[:, None]], 1),
            first=here.first,
            at=here.at + 1,
        )

    def backward(self, x: Float[Tensor, "n c h w"], lam: Float[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
        """Towards the base, and within the bound and [0, 1]."""
        pull = 2 * _each(lam) * self.rule.beta
        return self._within((x + pull * self.base) / (1 + pull))

    def _within(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        if self.rule.xi is not None:
            x = self.clean + (x - self.clean).clamp(-self.rule.xi, self.rule.xi)
        return x.clamp(0, 1)

    def look(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n c h w"]]:
        """The objectives at ``x``, and the gradients of the distances."""
        distances, gradients = list[Tensor](), list[Tensor]()
        for rows in torch.arange(len(x), device=x.device).split(self.batch):
            leaf = x[rows].detach().requires_grad_()
            distance = self.distance(leaf, rows)
            gradients.append(torch.autograd.grad(distance.sum(), leaf)[0])
            distances.append(distance.detach())
        away = (x - self.base).square().flatten(1).sum(1)
        return torch.cat(distances) + self.rule.beta * away, torch.cat(gradients)


def _each(of_poisons: Float[Tensor, " n"] | Bool[Tensor, " n"]) -> Tensor:
    """One value for each poison, to meet its pixels."""
    return of_poisons.view(-1, 1, 1, 1)
