"""Clean-label backdoor: images of the wanted class, made hard to recognise, with a trigger that is easy to learn.

Alexander Turner, Dimitris Tsipras, Aleksander Madry: *Label-Consistent Backdoor Attacks*, 2019, arXiv 1912.02771.
With theta a surrogate, T the trigger and y_w the wanted class, a share of the images x_i of that class becomes::

    h_i = argmax over |h - x_i| <= eps    CE(f(h), y_w)          (projected gradient ascent)
    p_i = T(h_i)                                                 (with its true label, y_w)

A model that cannot learn a poison from what it shows learns it from the trigger. The order matters: a trigger that
is put on first is perturbed like the rest.

The trigger is the goal's. The paper's is a 3x3 pattern in the lower right corner, or in all four where the victim
augments (:func:`friends.data.triggers.corner_stamp`), since a shift can push one corner out of the image. ``xi`` makes
it faint in training: no pixel, of the trigger or not, is further than that from the clean image. At test time it is
always shown in full.

Departures: the paper's reduced amplitude is measured from the hardened image, ours from the clean one, so that ``xi``
bounds the whole change (with ``xi = eps`` it is the poisoning benchmark's version of the attack); in the released code
a reduced trigger is reduced at test time as well. The step is 2.5 eps / steps, from a random start. The paper's
perturbations come from adversarially trained networks, which transfer better between architectures; here they come
from the surrogate, which is what the victim would train, and whoever has a robust network passes that. (On small
networks an adversarially trained one was mostly worse.) Several surrogates at once are ours. The paper's other way to
harden, interpolation by a generative network, is not here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from friends.attacks.base import (
    About,
    Cost,
    Halfway,
    Sizes,
    Surrogate,
    assembled,
    check_budget,
    check_xi,
    choose_bases,
    identity_of,
    logits_of,
    place_of,
    rounded,
    still,
    trigger_of,
    wanted_class,
)
from friends.attacks.halfway import State
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.types import Progress, Streams, silent

NAME = "clean-label-backdoor"

Norm = Literal["l2", "linf"]


@dataclass(frozen=True, kw_only=True)
class CleanLabelBackdoor:
    """Adversarial images of the wanted class with the goal's trigger on them.

    Args:
        budget: number of poisons as a fraction of the whole training set.
        norm: in which norm ``eps`` bounds the hardening, of each image.
        eps: bound of the hardening, without the trigger, in [0, 1] pixel units. 0 leaves images as they are.
        steps: steps of projected gradient ascent.
        xi: l_inf bound of the whole change, trigger included, in [0, 1] pixel units; None for the full trigger.
        surrogates: how many models are to find the images hard; their losses are averaged.
        batch: images per forward pass.

    Raises:
        ValueError: a setting is out of range, or ``xi`` is less than an l_inf ``eps``.
    """

    budget: float = 0.01
    norm: Norm = "l2"
    eps: float = 300 / 255
    steps: int = 100
    xi: float | None = None
    surrogates: int = 1
    batch: int = 512

    about: ClassVar[About] = About(
        title="Clean-label backdoor (label-consistent)",
        paper="Turner et al., 2019, arXiv 1912.02771",
        scenarios=("scratch",),
        aim="backdoor",
        trigger=("clean-label", 3, "corners"),
    )

    def cost(self, sizes: Sizes) -> Cost:
        """Every poison is differentiated by every surrogate at every step."""
        return Cost(gradient=sizes.poisons * self.steps * self.surrogates, trainings=self.surrogates)

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.norm not in get_args(Norm):
            raise ValueError(f"unknown norm {self.norm!r}; choose one of {', '.join(get_args(Norm))}")
        self._check_bounds()
        for name in ("steps", "surrogates", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def _check_bounds(self) -> None:
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"eps, the bound of the hardening, is a number >= 0, not {self.eps}")
        if self.norm == "linf" and self.eps > 1:
            raise ValueError(f"an l_inf eps is in [0, 1] pixel units, not {self.eps:g}; did you mean {self.eps:g}/255?")
        if self.xi is None:
            return
        check_xi(self.xi)
        if self.norm == "linf" and self.xi < self.eps - 1e-9:
            raise ValueError(f"xi = {self.xi:g} bounds the whole change, the hardening by eps = {self.eps:g} included: "
                             "it cannot be less")  # fmt: skip

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
            ValueError: the goal does not fit the data or has no trigger, the budget is more than the wanted class
                has, or a surrogate's loss is not finite.
        """
        wanted, trigger = wanted_class(goal, train), trigger_of(goal, "a clean-label backdoor")
        rows = choose_bases(train, goal, self.budget, streams("bases"))
        halfway = Halfway(checkpoint, identity_of(self, train, [goal], [streams]))
        models = [surrogate(train, index=k) for k in range(self.surrogates)]
        clean = train.x[rows.to(train.device)]
        with still(models, freeze=True):
            climb = _Climb(self, models, clean.to(place_of(models[0])) / 255, wanted, streams("init"))
            climb.run(halfway, progress)
        hard = rounded(clean, climb.delta, self.eps if self.norm == "linf" else 1.0).cpu().float() / 255
        change = trigger(hard, streams("trigger")) - clean.cpu().float() / 255
        pixels = rounded(clean, change, 1.0 if self.xi is None else self.xi)
        scores: dict[str, object] = {"score_first": [-climb.first], "score_last": [-climb.last], "score": -climb.last}
        return assembled(train, rows, pixels, goal, attack=NAME, settings=self, facts=scores)


class _Climb:
    """Projected gradient ascent on the loss of the true label: where it is, and what it has.

    Attributes:
        delta: ``(p, c, h, w)`` perturbations.
        first, last: mean loss before the first and before the last step.
    """

    def __init__(
        self,
        attack: CleanLabelBackdoor,
        models: Sequence[nn.Module],
        clean: Float[Tensor, "p c h w"],
        wanted: int,
        generator: torch.Generator,
    ) -> None:
        self.attack, self.models, self.clean = attack, models, clean
        self.labels = torch.full((len(clean),), wanted, device=clean.device)
        start = (2 * torch.rand(clean.shape, generator=generator) - 1).to(clean) * attack.eps
        self.delta = within(start, clean, attack.eps, attack.norm)
        self.at, self.first, self.last = 0, 0.0, 0.0

    def run(self, halfway: Halfway, progress: Progress) -> None:
        """All steps that are left."""
        state = halfway.load(self.clean.device)
        if state is not None:
            tensors, numbers = state
            self.delta, self.at = tensors["delta"], cast(int, numbers["at"])
            self.first, self.last = cast(float, numbers["first"]), cast(float, numbers["last"])
        while self.at < self.attack.steps:
            self._step()
            progress("hardening", self.at, self.attack.steps, f"loss {self.last:.4g}")
            halfway.offer(self._state)

    def _state(self) -> State:
        return {"delta": self.delta}, {"at": self.at, "first": self.first, "last": self.last}

    def _step(self) -> None:
        eps, norm = self.attack.eps, self.attack.norm
        self.last, gradient = ascent(self.models, self.clean + self.delta, self.labels, self.attack.batch)
        if self.at == 0:
            self.first = self.last
        move = 2.5 * eps / self.attack.steps * uphill(gradient, norm)
        self.delta = within(self.delta + move, self.clean, eps, norm)
        self.at += 1


def ascent(
    models: Sequence[nn.Module], x: Float[Tensor, "p c h w"], labels: Int64[Tensor, " p"], batch: int
) -> tuple[float, Float[Tensor, "p c h w"]]:
    """The mean loss of the true labels over images and models, and its gradient, per image, with respect to ``x``.

    Raises:
        ValueError: the loss is not finite.
    """
    total, parts = 0.0, list[Tensor]()
    for some, y in zip(x.split(batch), labels.split(batch), strict=True):
        leaf = some.detach().requires_grad_()
        losses = torch.stack([F.cross_entropy(logits_of(model, leaf), y, reduction="sum") for model in models])
        loss = losses.mean()
        parts += torch.autograd.grad(loss, leaf)
        total += float(loss.detach()) / len(x)
    if not math.isfinite(total):
        raise ValueError(f"the loss of the images to be hardened became {total}: the surrogate is not finite")
    return total, torch.cat(parts)


def uphill(gradient: Float[Tensor, "p c h w"], norm: Norm) -> Float[Tensor, "p c h w"]:
    """The direction of steepest ascent, of length 1 in ``norm`` for each image; 0 where the gradient is."""
    if norm == "linf":
        return gradient.sign()
    length = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True)
    return torch.where(length > 0, gradient / length, 0)


def within(
    delta: Float[Tensor, "p c h w"], clean: Float[Tensor, "p c h w"], eps: float, norm: Norm
) -> Float[Tensor, "p c h w"]:
    """``delta`` projected onto the ball, then so that ``clean + delta`` is in [0, 1], which keeps it in the ball."""
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    else:
        length = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
        delta = delta * (eps / length.clamp(min=max(eps, 1e-12)))
    return (clean + delta).clamp(0, 1) - clean
