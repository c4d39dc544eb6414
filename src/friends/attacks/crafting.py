"""The outer loop that most attacks share, written once: projected descent on the pixels of the poisons.

Source: Gradient Matching (Geiping et al., ICLR 2021) and its authors' framework::

    for restart in range(restarts):
        delta = initial_delta(...)                        # N(0, 1) * xi, clipped to +-xi
        for step in range(steps):
            score, gradient = poison_gradient(...)        # on a fresh augmentation, summed over surrogates
            delta = adam.step(delta, gradient, ...)       # Adam on the sign of the gradient
            delta = project(delta, base, xi)              # |delta| <= xi, then 0 <= base + delta <= 1
        keep the restart whose last score is lowest

The poisons of several goals can be crafted in one batch (:func:`craft_many`): where they do not influence each other,
as with fixed features, that is exactly what crafting them one goal after the other gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from friends.attacks.adaptive import Adaptive
from friends.attacks.halfway import Halfway, State
from friends.attacks.pixels import PixelAdam, Start, check_xi, decay, initial_delta, project
from friends.data.augment import Augment
from friends.types import Progress, Streams, silent

Objective = Callable[[Tensor], Tensor]
"""What an attack minimises with one surrogate: augmented poisons ``(b, c, h, w)`` in, a scalar out."""

JointObjective = Callable[[list[Tensor]], Tensor]
"""The same for the poisons of t goals at once: a list of their augmented poisons in, ``(t,)`` scores out."""


BeforeStep = Callable[[tuple[int, int], Tensor], Sequence[Objective] | None]
"""Called before every step, also the first one after a kill, with the restart and step that come next and the present
perturbation; returns the objectives from here on, or None for those that the loop has."""


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
        batch: poisons of one goal per forward pass. More poisons are done in turn, each batch with its own
            objective, before one step is made with all.
        adapt: the defense that the poisons are to survive; None for an attacker who knows of none.
    """

    xi: float
    steps: int
    restarts: int
    tau: float
    augment: Augment | None
    start: Start
    signed: bool = True
    batch: int = 512
    adapt: Adaptive | None = None

    def __post_init__(self) -> None:
        check_xi(self.xi)
        if self.start not in get_args(Start):
            raise ValueError(f"unknown start {self.start!r}; choose one of {', '.join(get_args(Start))}")
        for name, value in (("steps", self.steps), ("restarts", self.restarts), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 < self.tau < math.inf:
            raise ValueError(f"tau, the step size, must be positive, not {self.tau}")

    @property
    def draws(self) -> int:
        """How often every poison is seen in one step."""
        return 1 if self.adapt is None else self.adapt.draws


@dataclass(frozen=True, eq=False)
class Job:
    """The poisons of one goal.

    Args:
        base: clean pixels in [0, 1], on the device of the surrogates.
        streams: ``("init", restart)``, ``("augment", restart, step)`` and ``("noise", restart, step)`` are drawn from.
        fixed: friendly noise that the victim is expected to add, for an adaptive attacker.
    """

    base: Float[Tensor, "p c h w"]
    streams: Streams
    fixed: Float[Tensor, "p c h w"] | None = None


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
    fixed: Float[Tensor, "p c h w"] | None = None,
    before_step: BeforeStep | None = None,
    halfway: Halfway | None = None,
    progress: Progress = silent,
    what: str = "poisons",
) -> Crafted:
    """:func:`craft_many` for one goal, whose objectives take the poisons and return a scalar."""

    def renewed(place: tuple[int, int], delta: Tensor) -> list[JointObjective] | None:
        changed = before_step(place, delta) if before_step else None
        return None if changed is None else [_joint(objective) for objective in changed]

    joint = [_joint(objective) for objective in objectives]
    job = Job(base, streams, fixed)
    return craft_many([job], joint, loop, moments=moments, before_step=renewed, halfway=halfway, progress=progress,
                      what=what)[0]  # fmt: skip


def _joint(objective: Objective) -> JointObjective:
    return lambda poisons: objective(poisons[0])[None]


def craft_many(
    jobs: Sequence[Job],
    objectives: Sequence[JointObjective],
    loop: Loop,
    *,
    moments: tuple[tuple[float, ...], tuple[float, ...]],
    before_step: Callable[[tuple[int, int], Tensor], Sequence[JointObjective] | None] | None = None,
    halfway: Halfway | None = None,
    progress: Progress = silent,
    what: str = "poisons",
) -> list[Crafted]:
    """Perturb the bases of every job within the ball so that the objectives, one per surrogate, become small.

    Args:
        objectives: all see the same augmented poisons; their gradients are summed and their scores averaged. Each
            job's poisons move down the gradient of the *sum* of the jobs' scores.
        moments: mean (what a shift brings in from outside) and standard deviation (the unit of ``tau``) per channel.
        before_step: as :data:`BeforeStep`, for attacks whose surrogates change on the way.
        halfway: where the state is kept, to go on after a kill; nowhere if None.
        what: what ``progress`` calls this.

    Raises:
        ValueError: a score is not finite, the state is that of another crafting, or the jobs have no poison or
            differ in their number of poisons.
    """
    _check_jobs(jobs)
    loops = _Loops(jobs, loop, torch.tensor(moments[1]).view(1, -1, 1, 1).to(jobs[0].base))
    state = halfway.load(jobs[0].base.device) if halfway else None
    if state is not None:
        loops.restore(*state)
    while loops.restart < loop.restarts:
        if before_step:
            objectives = before_step(loops.place, loops.delta) or objectives
        scores, gradient = joint_gradient(jobs, loops.delta, objectives, loop, loops.place, moments[0])
        note = f"restart {loops.restart}, score {sum(scores) / len(scores):.4f}"
        loops.step(scores, gradient)
        progress(what, loops.restart * loop.steps + loops.at, loop.restarts * loop.steps, note)
        if halfway:
            halfway.offer(loops.state)
    return [
        Crafted(best, first, last)
        for best, first, last in zip(loops.best.split(loops.sizes), loops.first, loops.last, strict=True)
    ]


class _Loops:
    """The loop's state over all jobs: where it is, what it has, and what the best restarts had."""

    def __init__(self, jobs: Sequence[Job], loop: Loop, std: Float[Tensor, "1 c 1 1"]) -> None:
        self.jobs, self.loop, self.std = jobs, loop, std
        self.sizes = [len(job.base) for job in jobs]
        self.base = jobs[0].base if len(jobs) == 1 else torch.cat([job.base for job in jobs])
        self.best = self.base
        self.first: list[list[float]] = [[] for _ in jobs]
        self.last: list[list[float]] = [[] for _ in jobs]
        self.restart = self.at = 0
        self._begin()

    @property
    def place(self) -> tuple[int, int]:
        """Restart and step that come next."""
        return self.restart, self.at

    def _begin(self) -> None:
        starts = [
            initial_delta(job.base, self.loop.xi, self.loop.start, job.streams("init", self.restart))
            for job in self.jobs
        ]
        self.delta = torch.cat(starts)
        self.adam = PixelAdam(self.std, signed=self.loop.signed)

    def step(self, scores: list[float], gradient: Tensor) -> None:
        """Move by one step; at the last one of a restart, keep what is best and begin the next."""
        loop = self.loop
        if self.at == 0:
            for j, score in enumerate(scores):
                self.first[j].append(score)
        rate = loop.tau * (decay(self.at, loop.steps) if loop.signed else 1)
        self.delta = project(self.adam.step(self.delta, gradient, rate), self.base, loop.xi)
        self.at += 1
        if self.at == loop.steps:
            self._finish(scores)

    def _finish(self, scores: list[float]) -> None:
        kept: list[Tensor] = []
        for j, (new, old) in enumerate(zip(self.delta.split(self.sizes), self.best.split(self.sizes), strict=True)):
            kept.append(new if scores[j] < min(self.last[j], default=math.inf) else old)
            self.last[j].append(scores[j])
        self.best = torch.cat(kept)
        self.restart, self.at = self.restart + 1, 0
        if self.restart < self.loop.restarts:
            self._begin()

    def state(self) -> State:
        """Everything that :meth:`restore` needs."""
        moments, steps = self.adam.state()
        numbers: dict[str, object] = {
            "restart": self.restart, "at": self.at, "adam_steps": steps, "first": self.first, "last": self.last
        }  # fmt: skip
        return {"delta": self.delta, "best": self.best, **moments}, numbers

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, object]) -> None:
        """Go on where :meth:`state` was taken."""
        self.restart, self.at = int(cast(int, numbers["restart"])), int(cast(int, numbers["at"]))
        self.first = cast("list[list[float]]", numbers["first"])
        self.last = cast("list[list[float]]", numbers["last"])
        self.delta, self.best = tensors["delta"], tensors["best"]
        self.adam = PixelAdam(self.std, signed=self.loop.signed)
        self.adam.restore(tensors, int(cast(int, numbers["adam_steps"])))


def _check_jobs(jobs: Sequence[Job]) -> None:
    sizes = {len(job.base) for job in jobs}
    if len(sizes) > 1:
        raise ValueError(f"goals that are crafted together need equally many poisons, not {sorted(sizes)}")
    if not sizes or 0 in sizes:
        raise ValueError("there is nothing to craft: no goal, or no poison")


def poison_gradient(
    base: Float[Tensor, "p c h w"],
    delta: Float[Tensor, "p c h w"],
    objectives: Sequence[Objective],
    loop: Loop,
    streams: Streams,
    fill: tuple[float, ...],
    place: tuple[int, int] = (0, 0),
    fixed: Float[Tensor, "p c h w"] | None = None,
) -> tuple[float, Float[Tensor, "p c h w"]]:
    """The mean score of the perturbed images of one goal, and the gradient of the summed scores."""
    joint = [_joint(objective) for objective in objectives]
    scores, gradient = joint_gradient([Job(base, streams, fixed)], delta, joint, loop, place, fill)
    return scores[0], gradient


def joint_gradient(
    jobs: Sequence[Job],
    delta: Float[Tensor, "s c h w"],
    objectives: Sequence[JointObjective],
    loop: Loop,
    place: tuple[int, int],
    fill: tuple[float, ...],
) -> tuple[list[float], Float[Tensor, "s c h w"]]:
    """Per job the mean score over surrogates, draws and batches, and the gradient with respect to ``delta``.

    The gradient is summed over surrogates and jobs, and averaged over the draws.

    Args:
        delta: the perturbations of all jobs, one after the other; all have equally many.
        place: restart and step, which name the streams of this step's augmentation and noise.
        fill: per-channel colour of what a shift brings in.

    Raises:
        ValueError: a score is not finite.
    """
    looks = [_Look(job, loop, place, fill, delta.device) for job in jobs]
    whole = delta.detach().unflatten(0, (len(jobs), -1))  # a view: (t, p, c, h, w)
    gradient = torch.empty_like(whole)
    totals = torch.zeros(len(jobs), dtype=torch.float64)
    starts = range(0, whole.shape[1], loop.batch)
    for start in starts:
        span = slice(start, start + loop.batch)
        scores, gradient[:, span] = _part(looks, whole[:, span], span, objectives, loop.draws)
        totals += scores / len(starts)
    for total in totals.tolist():
        if not math.isfinite(total):
            raise ValueError(
                f"the objective became {total}: the surrogate is not finite, or fits the poisons without any loss"
            )
    return totals.tolist(), gradient.flatten(0, 1)


def _part(
    looks: Sequence[_Look],
    delta: Float[Tensor, "t b c h w"],
    span: slice,
    objectives: Sequence[JointObjective],
    draws: int,
) -> tuple[Float[Tensor, " t"], Float[Tensor, "t b c h w"]]:
    """Score and gradient of one batch of every job's poisons."""
    leaf = delta.detach().requires_grad_()
    gradient = torch.zeros_like(leaf)
    totals = torch.zeros(len(looks), dtype=torch.float64)
    for _ in range(draws):
        seen = [look(own, span) for look, own in zip(looks, leaf.unbind(), strict=True)]
        # The objectives may differentiate twice; cutting the graph here keeps that away from the bilinear sampling.
        entered = [one.detach().requires_grad_() for one in seen]
        at_entry = [torch.zeros_like(one) for one in entered]
        for objective in objectives:
            scores = objective(entered)
            totals += scores.detach().cpu().double() / (len(objectives) * draws)
            for total, part in zip(at_entry, torch.autograd.grad(scores.sum(), entered), strict=True):
                total += part
        gradient += torch.autograd.grad(seen, leaf, at_entry)[0] / draws
    return totals, gradient


class _Look:
    """How the surrogates see a job's poisons in one step: the defense's noise, if expected, then augmentation.

    Each call is another draw. The noise has a stream of its own, so that an attacker who expects none draws the same
    augmentation.
    """

    def __init__(
        self, job: Job, loop: Loop, place: tuple[int, int], fill: tuple[float, ...], device: torch.device
    ) -> None:
        self.job, self.loop, self.fill = job, loop, fill
        self.shifts = job.streams("augment", *place, device=device)
        self.noise = job.streams("noise", *place, device=device)

    def __call__(self, delta: Float[Tensor, "b c h w"], span: slice) -> Float[Tensor, "b c h w"]:
        job, loop = self.job, self.loop
        seen = job.base[span] + delta
        if loop.adapt is not None:
            seen = loop.adapt.disturbed(seen, None if job.fixed is None else job.fixed[span], self.noise)
        return seen if loop.augment is None else loop.augment(seen, self.shifts, self.fill)
