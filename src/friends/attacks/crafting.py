"""The outer loop that most attacks share, written once: projected descent on the pixels of the poisons.

Source: Gradient Matching (Geiping et al., ICLR 2021) and its authors' framework::

    for restart in range(restarts):
        delta = initial_delta(...)                        # N(0, 1) * xi, clipped to +-xi
        for step in range(steps):
            score, gradient = poison_gradient(...)        # on a fresh augmentation, summed over surrogates
            delta = adam.step(delta, gradient, ...)       # Adam on the sign of the gradient
            delta = project(delta, base, xi)              # |delta| <= xi, then 0 <= base + delta <= 1
        keep the restart whose last score is lowest

Everything is in pixels in [0, 1], but the step size is in *normalised* units, as published: a step of ``tau`` moves a
pixel by ``tau * std`` of its channel. ``tau=0.1`` on CIFAR-10 is about 6/255.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from friends.data.augment import Augment
from friends.types import Progress, Streams, silent

Start = Literal["randn", "clean"]
"""Where the perturbation starts: at random in the ball, or at the clean base image."""

Objective = Callable[[Tensor], Tensor]
"""What an attack minimises with one surrogate: augmented poisons ``(b, c, h, w)`` in, a scalar out."""


def initial_delta(
    x: Float[Tensor, "p c h w"], xi: float, start: Start, generator: torch.Generator
) -> Float[Tensor, "p c h w"]:
    """A start like ``x``: N(0, 1) * xi clipped to +-xi, so that about a third of the values are at the bound, or 0.

    Drawn on the CPU: the same poisons start the same on every device.
    """
    if start == "clean":
        return torch.zeros_like(x)
    return (torch.randn(x.shape, generator=generator) * xi).clamp(-xi, xi).to(x)


def project(delta: Float[Tensor, "p c h w"], base: Float[Tensor, "p c h w"], xi: float) -> Float[Tensor, "p c h w"]:
    """Clip to +-xi, then so that ``base + delta`` is in [0, 1]; ``base`` is the clean image, never augmented."""
    return torch.minimum(torch.maximum(delta.clamp(-xi, xi), -base), 1 - base)


def milestones(steps: int) -> tuple[int, int, int]:
    """The steps at which the step size falls to a tenth: 3/8, 5/8 and 7/8 of the way, rounded as in the original."""
    return int(steps // 2.667), int(steps // 1.6), int(steps // 1.142)


def decay(step: int, steps: int) -> float:
    """The factor of the step size at ``step`` (from 0) of ``steps``; the first step is never reduced."""
    return 0.1 ** sum(0 < milestone <= step for milestone in milestones(steps))


class PixelAdam:
    """Adam (betas 0.9 and 0.999, eps 1e-8) in normalised units, on a perturbation in pixel units.

    Args:
        std: per-channel standard deviation of the pixels: one normalised unit.
        signed: give Adam the *sign* of the gradient. As the second moment of signs is 1, a step is then ``rate``
            times a running mean of signs. (The sign of Adam's step is another, weaker optimizer.)
    """

    def __init__(self, std: Float[Tensor, "1 c 1 1"], *, signed: bool) -> None:
        self.std = std
        self.signed = signed
        self._steps = 0
        self._mean: Tensor | float = 0.0
        self._square: Tensor | float = 0.0

    def step(self, delta: Tensor, gradient: Tensor, rate: float) -> Tensor:
        """The perturbation after one step of size ``rate`` (normalised units) against the gradient (per pixel)."""
        g = gradient * self.std  # d/d(delta/std)
        if self.signed:
            g = g.sign()
        self._steps += 1
        self._mean = 0.9 * self._mean + 0.1 * g
        self._square = 0.999 * self._square + 0.001 * g * g
        mean = self._mean / (1 - 0.9**self._steps)
        square = self._square / (1 - 0.999**self._steps)
        return delta - self.std * rate * mean / (square.sqrt() + 1e-8)


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The settings of the outer loop; an attack makes one of its own settings, which checks them.

    Args:
        xi: l_inf bound in [0, 1] pixel units.
        steps: steps of each restart.
        restarts: independent starts, of which the one with the lowest last score is kept.
        tau: step size in normalised units.
        augment: fresh at every step and for each image; None for none.
        start: where the perturbation starts.
        signed: Adam on signs with the decaying step size of the original, or plain Adam with a constant one.
        batch: poisons per forward pass. More poisons are done in turn, each batch with its own objective, before
            one step is made with all.
    """

    xi: float
    steps: int
    restarts: int
    tau: float
    augment: Augment | None
    start: Start
    signed: bool = True
    batch: int = 512

    def __post_init__(self) -> None:
        check_xi(self.xi)
        if self.start not in get_args(Start):
            raise ValueError(f"unknown start {self.start!r}; choose one of {', '.join(get_args(Start))}")
        for name, value in (("steps", self.steps), ("restarts", self.restarts), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 < self.tau < math.inf:
            raise ValueError(f"tau, the step size, must be positive, not {self.tau}")


def check_xi(xi: float) -> None:
    """Raise ``ValueError`` unless a perturbation bounded by ``xi`` can survive rounding to bytes."""
    if not 1 / 255 - 1e-9 <= xi <= 1:
        hint = f"; did you mean {xi:g}/255?" if 1 < xi <= 255 else ""
        raise ValueError(f"xi is in [1/255, 1] pixel units, not {xi!r}{hint}")


@dataclass(frozen=True, eq=False)
class Crafted:
    """What :func:`craft` found.

    Args:
        delta: the perturbation of the best restart, float pixels.
        first: score of each restart before its first step.
        last: score of each restart before its last step, on that step's augmentation; the lowest was kept.
    """

    delta: Float[Tensor, "p c h w"]
    first: list[float]
    last: list[float]


def craft(
    base: Float[Tensor, "p c h w"],
    objectives: Sequence[Objective],
    loop: Loop,
    *,
    moments: tuple[tuple[float, ...], tuple[float, ...]],
    streams: Streams,
    progress: Progress = silent,
    what: str = "poisons",
) -> Crafted:
    """Perturb ``base`` within the ball so that the objectives, one per surrogate, become small.

    Args:
        base: clean pixels in [0, 1], on the device of the surrogates.
        objectives: all see the same augmented poisons; their gradients are summed and their scores averaged.
        moments: mean (what a shift brings in from outside) and standard deviation (the unit of ``tau``) per channel.
        streams: ``("init", restart)`` and ``("augment", restart, step)`` are drawn from.
        what: what ``progress`` calls this.

    Raises:
        ValueError: a score is not finite.
    """
    fill, std = moments[0], torch.tensor(moments[1]).view(1, -1, 1, 1).to(base)
    best, first, last = base, list[float](), list[float]()
    for restart in range(loop.restarts):
        delta = initial_delta(base, loop.xi, loop.start, streams("init", restart))
        adam = PixelAdam(std, signed=loop.signed)
        score = math.inf
        for step in range(loop.steps):
            generator = streams("augment", restart, step, device=base.device)
            score, gradient = poison_gradient(base, delta, objectives, loop, generator, fill)
            if step == 0:
                first.append(score)
            rate = loop.tau * (decay(step, loop.steps) if loop.signed else 1)
            delta = project(adam.step(delta, gradient, rate), base, loop.xi)
            done = restart * loop.steps + step + 1
            progress(what, done, loop.restarts * loop.steps, f"restart {restart}, score {score:.4f}")
        if score < min(last, default=math.inf):
            best = delta
        last.append(score)
    return Crafted(best, first, last)


def poison_gradient(
    base: Float[Tensor, "p c h w"],
    delta: Float[Tensor, "p c h w"],
    objectives: Sequence[Objective],
    loop: Loop,
    generator: torch.Generator,
    fill: tuple[float, ...],
) -> tuple[float, Float[Tensor, "p c h w"]]:
    """The mean score of the perturbed images, and the gradient of the summed scores with respect to ``delta``."""
    total, gradients = 0.0, list[Tensor]()
    parts = range(0, len(base), loop.batch)
    for begin in parts:
        part = delta[begin : begin + loop.batch].detach().requires_grad_()
        seen = base[begin : begin + loop.batch] + part
        if loop.augment is not None:
            seen = loop.augment(seen, generator, fill)
        # The objectives may differentiate twice; cutting the graph here keeps that away from the bilinear sampling.
        entered = seen.detach().requires_grad_()
        at_entry = torch.zeros_like(entered)
        for objective in objectives:
            score = objective(entered)
            total += float(score.detach()) / (len(objectives) * len(parts))
            at_entry += torch.autograd.grad(score, entered)[0]
        gradients.append(torch.autograd.grad(seen, part, at_entry)[0])
    if not math.isfinite(total):
        raise ValueError(
            f"the objective became {total}: the surrogate is not finite, or fits the poisons without any loss"
        )
    return total, torch.cat(gradients)
