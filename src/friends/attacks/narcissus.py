"""Narcissus: one faint pattern, added to a few images of the wanted class, that looks more like the class than they do.

Yi Zeng, Minzhou Pan, Hoang Anh Just, Lingjuan Lyu, Meikang Qiu, Ruoxi Jia: *Narcissus: A Practical Clean-Label Backdoor
Attack with Limited Information*, CCS 2023, arXiv 2204.05255. With theta a surrogate, x_i all training images of the
wanted class y_w and A a random augmentation::

    t = argmin over |t| <= xi    mean_i CE(f(A(clip(x_i + t))), y_w)
    poisons   clip(x_i + t) for a few random i, with their labels
    test      clip(x + amplify * t) for any x

A victim finds in the poisons what it knows of the class anyway, but always in the same place, and comes to rely on it.
The pattern is universal, and shown more strongly at test time than in training.

The trigger is made here. The goal is given with clean images and an ``Additive`` trigger of zeros; that of the result
has the same images with the trigger on. Made large, the pattern moves models that were never poisoned too: an attack
is as good as its distance from the control.

Departures from the paper and its authors' code: the paper's attacker has images of the wanted class alone, and
pretrains the surrogate on public images of other classes (with the wanted class as one more) before five epochs on it.
With ``knows="all"`` the surrogate is the gray box of all attacks, trained on the clean training set. ``knows="class"``
keeps to the wanted class: in place of public images, the others are that class turned upside down, negative, or with
halves swapped. Then the pattern moves models that were never poisoned less. Whoever has public images passes a network
that was trained on them as ``surrogate``. There is no warm-up; the surrogate is in eval mode, theirs is left in
training mode. Their noise is added after augmentation, in making it and in training alike, so it stays in its place; a
poison in a file is augmented as a whole, and so it is here. The pattern is projected after every step, theirs is
clipped on use (and no longer moves where it is clipped). Adam instead of RAdam; the same step, 0.01 for pixels in
[-1, 1]. The pattern is rounded to whole grey levels, so that it is the same one everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
    candidates,
    check_budget,
    check_xi,
    choose_bases,
    identity_of,
    logits_of,
    place_of,
    rounded,
    still,
)
from friends.attacks.halfway import State
from friends.attacks.pixels import PixelAdam
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.data.triggers import Additive
from friends.types import Progress, Streams, silent

NAME = "narcissus"

Knows = Literal["all", "class"]
"""What the attacker trains surrogates on: the whole training set, or the images of the wanted class alone."""


@dataclass(frozen=True, kw_only=True)
class Narcissus:
    """A universal perturbation towards the wanted class, on a few of its images; amplified at test time.

    Args:
        xi: l_inf bound of the trigger in training, in [0, 1] pixel units.
        budget: number of poisons as a fraction of the whole training set.
        rounds: passes over all images of the wanted class while the trigger is made.
        tau: step size of Adam in [0, 1] pixel units.
        amplify: what the trigger is multiplied by at test time.
        surrogates: how many models the trigger is made on at once; their losses are averaged.
        augment: what the victim is expected to augment with, the trigger included; None for none.
        batch: images per step.
        knows: what surrogates are trained on: ``"all"``, the clean training set, or ``"class"``, the images of the
            wanted class and what :func:`views_of_class` makes of them.

    Raises:
        ValueError: a setting is out of range.
    """

    xi: float = 16 / 255
    budget: float = 0.0005
    rounds: int = 1000
    tau: float = 0.005
    amplify: float = 3.0
    surrogates: int = 1
    augment: Augment | None = field(default_factory=Augment)
    batch: int = 350
    knows: Knows = "all"

    about: ClassVar[About] = About(
        title="Narcissus",
        paper="Zeng et al., CCS 2023, arXiv 2204.05255",
        scenarios=("scratch", "finetune"),
        aim="backdoor",
        makes_trigger=True,
    )

    def cost(self, sizes: Sizes) -> Cost:
        """Every image of the wanted class is differentiated by every surrogate in every round."""
        return Cost(gradient=sizes.wanted * self.rounds * self.surrogates, trainings=self.surrogates)

    def __post_init__(self) -> None:
        check_xi(self.xi)
        check_budget(self.budget)
        if self.knows not in get_args(Knows):
            raise ValueError(f"unknown knows {self.knows!r}; choose one of {', '.join(get_args(Knows))}")
        for name in ("rounds", "surrogates", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("tau", "amplify"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is a positive number, not {getattr(self, name)}")

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
        """Poison ``train``, which is left as it was, as are the surrogates.

        Raises:
            ValueError: the goal does not fit the data, or has a trigger of its own; the budget is more than the
                wanted class has; or a surrogate's loss is not finite.
        """
        of_class, _ = candidates(train, goal, self.budget)
        if not isinstance(goal.trigger, Additive) or bool(goal.trigger.pixels.any()):
            raise ValueError(f"Narcissus makes its own trigger, but the goal {goal.name!r} has one or none: pass clean "
                             "images, and Additive zeros as their trigger")  # fmt: skip
        rows = choose_bases(train, goal, self.budget, streams("bases"))
        halfway = Halfway(checkpoint, identity_of(self, train, [goal], [streams]))
        seen = train if self.knows == "all" else views_of_class(train, of_class, int(goal.y_wanted[0]))
        models = [surrogate(seen, index=k) for k in range(self.surrogates)]
        images = train.pixels(of_class.to(train.device)).to(place_of(models[0]))
        with still(models, freeze=True):
            search = _Search(self, models, images, int(goal.y_wanted[0]), train.moments[0], streams)
            search.run(halfway, progress)
        trigger = whole_levels(search.trigger[0].float().cpu(), self.xi)
        clean = train.x[rows.to(train.device)]
        pixels = rounded(clean, trigger.expand(len(rows), -1, -1, -1), self.xi)
        scores: dict[str, object] = {
            "score_first": [search.first],
            "score_last": [search.last],
            "score": search.last,
        }
        shown = with_trigger(goal, Additive(self.amplify * trigger))
        return assembled(train, rows, pixels, shown, attack=NAME, settings=self, facts=scores)


class _Search:
    """The descent on the trigger, batch by batch of images: where it is, and what it has.

    Attributes:
        trigger: ``(1, c, h, w)``.
        first, last: mean loss over the first and over the last round.
    """

    def __init__(
        self,
        attack: Narcissus,
        models: Sequence[nn.Module],
        images: Float[Tensor, "n c h w"],
        wanted: int,
        fill: tuple[float, ...],
        streams: Streams,
    ) -> None:
        self.attack, self.models, self.images, self.fill, self.streams = attack, models, images, fill, streams
        self.labels = torch.full((len(images),), wanted, device=images.device)
        self.trigger = torch.zeros_like(images[:1])
        self.adam = PixelAdam(torch.ones_like(images[:1, :, :1, :1]), signed=False)
        self.round, self.first, self.last = 0, 0.0, 0.0

    def run(self, halfway: Halfway, progress: Progress) -> None:
        """All rounds that are left."""
        state = halfway.load(self.images.device)
        if state is not None:
            self._restore(*state)
        while self.round < self.attack.rounds:
            self._round()
            progress("narcissus", self.round, self.attack.rounds, f"loss {self.last:.4g}")
            halfway.offer(self._state)

    def _round(self) -> None:
        """Once over all images, a step for every batch."""
        attack, n = self.attack, len(self.images)

        def seen(x: Tensor) -> Tensor:
            return x if attack.augment is None else attack.augment(x, generator, self.fill)

        order = torch.randperm(n, generator=self.streams("order", self.round)).to(self.images.device)
        generator = self.streams("augment", self.round, device=self.images.device)
        self.last = 0.0
        for rows in order.split(attack.batch):
            loss, gradient = loss_of_trigger(self.models, self.images[rows], self.trigger, self.labels[rows], seen)
            self.trigger = self.adam.step(self.trigger, gradient, attack.tau).clamp(-attack.xi, attack.xi)
            self.last += loss * len(rows) / n
        if self.round == 0:
            self.first = self.last
        self.round += 1

    def _state(self) -> State:
        moments, steps = self.adam.state()
        numbers: dict[str, object] = {
            "round": self.round, "first": self.first, "last": self.last, "adam_steps": steps
        }  # fmt: skip
        return {"trigger": self.trigger, **moments}, numbers

    def _restore(self, tensors: dict[str, Tensor], numbers: dict[str, object]) -> None:
        self.trigger = tensors["trigger"]
        self.adam.restore(tensors, cast(int, numbers["adam_steps"]))
        self.round = cast(int, numbers["round"])
        self.first, self.last = cast(float, numbers["first"]), cast(float, numbers["last"])


def views_of_class(train: LabeledImages, rows: Int64[Tensor, " n"], wanted: int) -> LabeledImages:
    """What one can learn a class from if one has nothing else: its images as they are, against its images turned.

    Every other class gets all of them under a combination of its own of four changes: upside down, negative, left and
    right halves swapped, upper and lower halves swapped. (There are 15; more classes than that share.)

    Args:
        rows: of the images of the class ``wanted``.
    """
    upright = train.x[rows.to(train.device)]
    h, w = upright.shape[2:]
    views: list[Tensor] = []
    for label in range(len(train.classes)):
        distance = (label - wanted) % len(train.classes)
        changes = 1 + (distance - 1) % 15 if distance else 0
        view = upright.flip(2) if changes & 1 else upright
        view = 255 - view if changes & 2 else view
        view = view.roll(w // 2, 3) if changes & 4 else view
        views.append(view.roll(h // 2, 2) if changes & 8 else view)
    labels = torch.arange(len(views), device=train.device).repeat_interleave(len(rows))
    return LabeledImages(torch.cat(views), labels, train.classes, f"views of {train.classes[wanted]}")


def loss_of_trigger(
    models: Sequence[nn.Module],
    images: Float[Tensor, "b c h w"],
    trigger: Float[Tensor, "1 c h w"],
    labels: Int64[Tensor, " b"],
    seen: Callable[[Tensor], Tensor],
) -> tuple[float, Float[Tensor, "1 c h w"]]:
    """The loss of triggered images, mean over images and models, and its gradient with respect to the trigger.

    Args:
        seen: what augmentation makes of triggered images, clipped to [0, 1] before.

    Raises:
        ValueError: the loss is not finite.
    """
    leaf = trigger.detach().requires_grad_()
    x = seen((images + leaf).clamp(0, 1))
    loss = torch.stack([F.cross_entropy(logits_of(model, x), labels) for model in models]).mean()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"the loss of the trigger became {value}: the surrogate is not finite")
    return value, torch.autograd.grad(loss, leaf)[0]


def whole_levels(trigger: Float[Tensor, "c h w"], xi: float) -> Float[Tensor, "c h w"]:
    """The trigger in whole grey levels of at most ``floor(255 * xi)``, as it is in the bytes of the poisons."""
    bound = math.floor(xi * 255 + 1e-6)
    return (trigger * 255).round().clamp(-bound, bound) / 255


def with_trigger(goal: Goal, trigger: Additive) -> Goal:
    """The same goal with the trigger on its images."""
    return replace(goal, x=trigger(goal.x, torch.Generator()), trigger=trigger)
