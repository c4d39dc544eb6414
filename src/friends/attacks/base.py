"""The contract of every attack, and what each of them needs: bases, a surrogate held still, a data set of poisons.

An attack of bounded perturbations, whole::

    rows = choose_bases(train, wanted_class(goal, train), budget, streams("bases"))
    models = [surrogate(train, index=k) for k in ...]
    with still(models, ...):
        crafted = craft(train.pixels(rows), objectives, loop, ...)    # the outer loop, in crafting.py
    return poisoned(train, rows, crafted, goal, ...)                  # rounded to bytes, in place of their bases

An attack imports what it shares with others from here.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from friends.attacks.crafting import Crafted, Loop, Objective, Start, craft
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.modules import logits_of, penultimate, still
from friends.types import Progress, Streams, silent

__all__ = [
    "Attack",
    "Crafted",
    "Loop",
    "Objective",
    "Settings",
    "Start",
    "Surrogate",
    "check_budget",
    "choose_bases",
    "craft",
    "logits_of",
    "penultimate",
    "place_of",
    "poison_count",
    "poisoned",
    "rounded",
    "still",
    "wanted_class",
]


@runtime_checkable
class Surrogate(Protocol):
    """Train me a model as the victim would: what a gray-box attacker can do. Built by the benchmark from ``fit``.

    In transfer learning it returns the pretrained network whose features the victim will use.

    Args:
        data: what to train on; Sleeper Agent passes its current poisons, everyone else the clean set.
        index: which of many; each has its own initial weights and batch order, none those of a victim.
        epochs: how far to train; None is the whole recipe. MetaPoison staggers its surrogates by this.
        start: continue from this model instead of a new one; it is left as it was.
    """

    def __call__(
        self,
        data: LabeledImages,
        *,
        index: int = 0,
        epochs: int | None = None,
        start: nn.Module | None = None,
    ) -> nn.Module: ...


@runtime_checkable
class Settings(Protocol):
    """What an attack of bounded perturbations is, besides callable: a dataclass with a bound."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def xi(self) -> float:
        """l_inf bound in [0, 1] pixel units."""
        ...


@runtime_checkable
class Attack(Protocol):
    """A frozen dataclass of hyper-parameters. Calling it is pure: same data, goal and streams, same poisons."""

    def __call__(
        self,
        train: LabeledImages,
        goal: Goal,
        *,
        surrogate: Surrogate,
        streams: Streams,
        progress: Progress = silent,
    ) -> PoisonedDataset: ...


def wanted_class(goal: Goal, train: LabeledImages) -> int:
    """The one class that the attacker wants; it is also the class of the poisons.

    Raises:
        ValueError: the goal wants several classes, one that does not exist, or its images do not fit the data.
    """
    wanted = goal.y_wanted.unique().tolist()
    if len(wanted) > 1:
        raise ValueError(f"this attack poisons one class, but the goal wants the classes {wanted}: split the goal")
    if not 0 <= wanted[0] < len(train.classes):
        raise ValueError(f"the goal wants class {wanted[0]}, but there are {len(train.classes)} classes")
    if goal.x.shape[1:] != train.x.shape[1:]:
        raise ValueError(f"goal images are {tuple(goal.x.shape[1:])}, training images {train.shape}")
    return int(wanted[0])


def check_budget(budget: float) -> None:
    """Raise ``ValueError`` unless ``budget`` is a fraction above 0."""
    if not 0 < budget <= 1:
        hint = f"; did you mean {budget / 100:g}?" if 1 < budget <= 100 else ""
        raise ValueError(f"budget is a fraction of the training set in (0, 1], not {budget!r}{hint}")


def poison_count(budget: float, n: int) -> int:
    """How many of ``n`` training images a budget is, rounded up."""
    return math.ceil(budget * n - 1e-9)  # 0.07 * 100 is a little more than 7 in floating point


def choose_bases(train: LabeledImages, wanted: int, budget: float, generator: torch.Generator) -> Int64[Tensor, " p"]:
    """Rows of random training images of class ``wanted``, ascending, without repeats: the images to be poisoned.

    Args:
        budget: how many, as a fraction of the whole training set, rounded up.
        generator: on the CPU.

    Raises:
        ValueError: the class has no image, or fewer than the budget asks for.
    """
    of_class = (train.y.cpu() == wanted).nonzero().flatten()
    count = poison_count(budget, len(train))
    name = train.classes[wanted]
    if len(of_class) == 0:
        raise ValueError(f"class {name!r} has no image in {train.name}: there is nothing to poison")
    if count > len(of_class):
        raise ValueError(
            f"a budget of {budget:g} asks for {count} poisons, but class {name!r} has only {len(of_class)} images "
            f"in {train.name}: the budget can be at most {len(of_class) / len(train):g}"
        )
    chosen = torch.randperm(len(of_class), generator=generator)[:count]
    return of_class[chosen].sort().values


def rounded(base: Tensor, delta: Float[Tensor, "p c h w"], xi: float) -> Tensor:
    """Bytes of ``base + delta`` that differ from the bytes ``base`` by at most ``floor(255 * xi)``."""
    bound = math.floor(xi * 255 + 1e-6)
    change = (delta * 255).round().clamp(-bound, bound).to(base.device, torch.int16)
    return (base.to(torch.int16) + change).clamp(0, 255).to(torch.uint8)


def poisoned(
    train: LabeledImages,
    rows: Int64[Tensor, " p"],
    crafted: Crafted,
    goal: Goal,
    *,
    attack: str,
    settings: Settings,
) -> PoisonedDataset:
    """The training set with the poisons in place of their bases, labels kept, and the record of how they were made.

    Args:
        attack: the attack's name in ``ATTACKS``.
        settings: the attack, a dataclass; its fields go into the recipe as plain values.
    """
    values = asdict(settings)
    x = train.x.clone()
    here = rows.to(x.device)
    x[here] = rounded(x[here], crafted.delta, settings.xi)
    recipe: dict[str, object] = {
        "attack": attack,
        **values,
        "poisons": len(rows),
        "wanted": train.classes[int(goal.y_wanted[0])],
        "score_first": crafted.first,
        "score_last": crafted.last,
        "score": min(crafted.last),
    }
    return PoisonedDataset(LabeledImages(x, train.y.clone(), train.classes, train.name), rows, goal, recipe)


def place_of(model: nn.Module) -> Tensor:
    """A tensor on the device and of the precision at which a model works: its first parameter.

    Raises:
        ValueError: the model has no parameters.
    """
    for parameter in model.parameters():
        return parameter
    raise ValueError(f"the surrogate {type(model).__name__} has no parameters: there is nothing to attack")
