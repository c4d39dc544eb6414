"""The contract of every attack, and what each of them needs: bases, a surrogate held still, a data set of poisons.

An attack of bounded perturbations, whole::

    rows = choose_bases(train, goal, budget, streams("bases"))
    models = [surrogate(train, index=k) for k in ...]
    with still(models, ...):
        crafted = craft(train.pixels(rows), objectives, loop, ...)    # the outer loop, in crafting.py
    return poisoned(train, rows, crafted, goal, ...)                  # rounded to bytes, in place of their bases

An attack imports what it shares with others from here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from friends.attacks.adaptive import Adaptive
from friends.attacks.crafting import Crafted, Job, JointObjective, Loop, Objective, craft, craft_many
from friends.attacks.halfway import Halfway, identity_of
from friends.attacks.pixels import Start, check_xi
from friends.attacks.surrogate import Surrogate
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.data.triggers import Trigger
from friends.modules import logits_of, penultimate, still
from friends.types import Progress, Streams, silent

__all__ = [
    "About",
    "Adaptive",
    "Attack",
    "Cost",
    "Crafted",
    "Halfway",
    "Job",
    "JointObjective",
    "Loop",
    "ManyGoals",
    "Objective",
    "Settings",
    "Sizes",
    "Start",
    "Surrogate",
    "assembled",
    "bound_of",
    "candidates",
    "check_budget",
    "check_xi",
    "choose_bases",
    "craft",
    "craft_many",
    "identity_of",
    "logits_of",
    "penultimate",
    "place_of",
    "poison_count",
    "poisoned",
    "rounded",
    "source_rows",
    "still",
    "trigger_of",
    "wanted_class",
]


@runtime_checkable
class Settings(Protocol):
    """What an attack of bounded perturbations is, besides callable: a dataclass with a bound."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def xi(self) -> float:
        """l_inf bound in [0, 1] pixel units."""
        ...


@dataclass(frozen=True, kw_only=True)
class About:
    """What is to be known of an attack before it is run.

    Args:
        title: its usual name.
        paper: authors, venue, year and arXiv id.
        scenarios: in which its authors mean it to work: ``"scratch"``, ``"transfer"``, ``"finetune"``.
        aim: ``"target"``, single test images as they are, or ``"backdoor"``, every image with a trigger.
        clean_label: whether the poisons keep their true labels.
        makes_trigger: whether the attack makes the trigger itself; else it is given with the goal.
        trigger: kind, side in pixels and place of the trigger that its authors use, as in a trial's goals.
        unaugmented: whether it is for victims that do not augment.
    """

    title: str
    paper: str
    scenarios: tuple[str, ...]
    aim: Literal["target", "backdoor"]
    clean_label: bool = True
    makes_trigger: bool = False
    trigger: tuple[str, int, str] = ("colours", 8, "random")
    unaugmented: bool = False


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large a task is: what the cost of an attack depends on.

    Args:
        train: training images.
        wanted: training images of the wanted class.
        source: training images of the true class of the goal.
        goal: images of the goal.
        poisons: poisons of the goal.
    """

    train: int
    wanted: int
    source: int
    goal: int
    poisons: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What crafting for one goal costs, in images that pass through a surrogate.

    Args:
        forward: images that are only looked at.
        gradient: images that are differentiated once, with respect to weights or pixels.
        second: images that are differentiated twice, with respect to weights and then to pixels.
        trainings: how many surrogates are trained by the victim's recipe, in whole trainings.
    """

    forward: int = 0
    gradient: int = 0
    second: int = 0
    trainings: float = 1.0

    @property
    def passes(self) -> int:
        """Images that enter a surrogate while crafting, training it not counted."""
        return self.forward + self.gradient + self.second

    @property
    def forwards(self) -> float:
        """Crafting in units of one image's forward pass; what a gradient costs was measured on a ResNet-18."""
        return self.forward + GRADIENT * self.gradient + SECOND * self.second


GRADIENT, SECOND = 2.2, 9.9
"""What a gradient and a second-order gradient cost, in forward passes of the same image through a ResNet-18."""


@runtime_checkable
class Attack(Protocol):
    """A frozen dataclass of hyper-parameters. Calling it is pure: same data, goal and streams, same poisons (bit for
    bit on a CPU; on a GPU as far as its kernels are deterministic).

    Called with a ``checkpoint`` folder, a crafting that was killed goes on where it last saved, to the same poisons.
    The goal of what it returns is what success is judged by: that of the call, or, for an attack that makes its own
    trigger, the same images with that trigger.
    """

    about: ClassVar[About]

    def __call__(
        self,
        train: LabeledImages,
        goal: Goal,
        *,
        surrogate: Surrogate,
        streams: Streams,
        checkpoint: Path | None = None,
        progress: Progress = silent,
    ) -> PoisonedDataset: ...

    def cost(self, sizes: Sizes) -> Cost:
        """What crafting for one goal of such a task costs."""
        ...


@runtime_checkable
class ManyGoals(Protocol):
    """An attack that can craft for many goals in one batch: up to rounding, what crafting for each by itself gives."""

    def many(
        self,
        train: LabeledImages,
        goals: Sequence[Goal],
        *,
        surrogate: Surrogate,
        streams: Sequence[Streams],
        checkpoint: Path | None = None,
        progress: Progress = silent,
    ) -> list[PoisonedDataset]: ...


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


def trigger_of(goal: Goal, attack: str) -> Trigger:
    """The trigger of a goal. Raises ``ValueError`` if it has none, which ``attack`` needs."""
    if goal.trigger is None:
        raise ValueError(f"the goal {goal.name!r} has no trigger, which {attack} needs: give it one, or use a targeted "
                         "attack, such as 'gradient-matching' or 'bullseye-polytope'")  # fmt: skip
    return goal.trigger


def source_rows(train: LabeledImages, goal: Goal) -> Int64[Tensor, " n"]:
    """All training rows of the goal's true classes, ascending. Raises ``ValueError`` if there is none."""
    rows = torch.isin(train.y.cpu(), goal.y_true.cpu()).nonzero().flatten()
    if len(rows) == 0:
        name = train.classes[int(goal.y_true[0])]
        raise ValueError(f"class {name!r} has no image in {train.name}: there is no source of triggered images")
    return rows


def check_budget(budget: float) -> None:
    """Raise ``ValueError`` unless ``budget`` is a fraction above 0."""
    if not 0 < budget <= 1:
        hint = f"; did you mean {budget / 100:g}?" if 1 < budget <= 100 else ""
        raise ValueError(f"budget is a fraction of the training set in (0, 1], not {budget!r}{hint}")


def bound_of(attack: Attack) -> float | None:
    """What an attack promises of every pixel of a poison: its ``bound`` if it has one, else its ``xi``, or nothing."""
    return cast("float | None", getattr(attack, "bound", getattr(attack, "xi", None)))


def poison_count(budget: float, n: int) -> int:
    """How many of ``n`` training images a budget is, rounded up."""
    return math.ceil(budget * n - 1e-9)  # 0.07 * 100 is a little more than 7 in floating point


def choose_bases(train: LabeledImages, goal: Goal, budget: float, generator: torch.Generator) -> Int64[Tensor, " p"]:
    """Rows of training images of the wanted class, ascending, without repeats: the images to be poisoned.

    Those that the goal prescribes, if it does; else random ones.

    Args:
        budget: how many, as a fraction of the whole training set, rounded up.
        generator: on the CPU.

    Raises:
        ValueError: the class has no image, or fewer than the budget asks for; or the prescribed ones are not as
            many as the budget, or not of the wanted class.
    """
    of_class, count = candidates(train, goal, budget)
    if goal.bases is not None:
        return _prescribed(train, goal.bases.cpu(), of_class, count)
    chosen = torch.randperm(len(of_class), generator=generator)[:count]
    return of_class[chosen].sort().values


def _prescribed(train: LabeledImages, bases: Tensor, of_class: Tensor, count: int) -> Int64[Tensor, " p"]:
    if len(bases) != count:
        raise ValueError(f"the goal prescribes {len(bases)} bases, but the budget is {count} poisons: a budget of "
                         f"{len(bases) / len(train):g} would be that many")  # fmt: skip
    astray = bases[~torch.isin(bases, of_class)]
    if len(astray):
        raise ValueError(f"the goal prescribes row {int(astray[0])} as a base, which is not of the wanted class: is "
                         "the data in the order that the rows were meant for?")  # fmt: skip
    return bases.sort().values


def candidates(train: LabeledImages, goal: Goal, budget: float) -> tuple[Int64[Tensor, " k"], int]:
    """All rows of the wanted class, ascending, and how many of them may be poisoned.

    Raises:
        ValueError: the class has no image, or fewer than the budget asks for.
    """
    wanted = wanted_class(goal, train)
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
    return of_class, count


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
    """The training set with crafted perturbations added to the bases, labels kept, and the record of how.

    Args:
        attack: the attack's name in ``ATTACKS``.
        settings: the attack, a dataclass; its fields go into the recipe as plain values.
    """
    pixels = rounded(train.x[rows.to(train.device)], crafted.delta, settings.xi)
    facts: dict[str, object] = {
        "score_first": crafted.first,
        "score_last": crafted.last,
        "score": min(crafted.last),
    }
    return assembled(train, rows, pixels, goal, attack=attack, settings=settings, facts=facts)


def assembled(
    train: LabeledImages,
    rows: Int64[Tensor, " p"],
    pixels: UInt8[Tensor, "p c h w"],
    goal: Goal,
    *,
    attack: str,
    settings: object,
    facts: Mapping[str, object] | None = None,
    relabel: bool = False,
) -> PoisonedDataset:
    """The training set with the bytes of the poisons in place of their bases.

    Args:
        attack, settings: as for :func:`poisoned`.
        facts: plain values about this crafting, for the recipe.
        relabel: give every poison the wanted class (dirty-label attacks).
    """
    x, y = train.x.clone(), train.y.clone()
    here = rows.to(x.device)
    x[here] = pixels.to(x.device)
    if relabel:
        y[here] = wanted_class(goal, train)
    recipe: dict[str, object] = {
        "attack": attack,
        **asdict(cast("Any", settings)),
        "poisons": len(rows),
        "wanted": train.classes[int(goal.y_wanted[0])],
        **(facts or {}),
    }
    return PoisonedDataset(LabeledImages(x, y, train.classes, train.name), rows, goal, recipe)


def place_of(model: nn.Module) -> Tensor:
    """A tensor on the device and of the precision at which a model works: its first parameter.

    Raises:
        ValueError: the model has no parameters.
    """
    for parameter in model.parameters():
        return parameter
    raise ValueError(f"the surrogate {type(model).__name__} has no parameters: there is nothing to attack")
