"""What the attacks on features share: which features, whose images are poisoned, and many goals in one batch.

The attacks are Bullseye Polytope, Convex Polytope and Poison Frogs. With phi the features that a victim's new linear
layer sees, held fixed, each moves phi of the poisons to phi of the goal. The feature of a goal with several images is
the mean of theirs.

A *stage* of a network is what it does from one layer with weights to the next: a convolution with the normalisation,
activation and pooling after it, or a residual block. Against a victim that trains the whole network the poisons are
held at several stages, as in the two polytope papers. These write of the outputs of all blocks; the networks that
Bullseye Polytope's authors released give the last residual block but one, and the penultimate features.

Fixed features make poisons independent of each other but for the objective of their goal, so the poisons of several
goals go through a network in one batch, with the result of one goal after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from friends.attacks.base import (
    Adaptive,
    Cost,
    Halfway,
    Job,
    JointObjective,
    Loop,
    Settings,
    Sizes,
    Surrogate,
    candidates,
    choose_bases,
    craft_many,
    identity_of,
    penultimate,
    place_of,
    poisoned,
    still,
)
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.types import Progress, Streams, silent

Layers = Literal["penultimate", "last-two", "all"]
"""At which stages the poisons' features are moved: the last, the last two, or every one."""

Bases = Literal["random", "nearest"]
"""Which images of the wanted class are poisoned: random ones, or those whose features are nearest to the goal's."""

TOGETHER = 512
"""Images of all goals in one forward pass: as many as one goal alone may have by default."""


@runtime_checkable
class FeatureAttack(Protocol):
    """The settings that are read here."""

    @property
    def budget(self) -> float: ...
    @property
    def surrogates(self) -> int: ...
    @property
    def bases(self) -> Bases: ...
    @property
    def batch(self) -> int: ...
    @property
    def adapt(self) -> Adaptive | None: ...


def check_features(attack: FeatureAttack) -> None:
    """Raise ``ValueError`` unless there is a surrogate and the choice of bases is known."""
    if attack.surrogates < 1:
        raise ValueError(f"at least one surrogate is needed, not {attack.surrogates}")
    if attack.bases not in get_args(Bases):
        raise ValueError(f"unknown bases {attack.bases!r}; choose one of {', '.join(get_args(Bases))}")


def check_layers(layers: Layers) -> None:
    """Raise ``ValueError`` unless ``layers`` is known."""
    if layers not in get_args(Layers):
        raise ValueError(f"unknown layers {layers!r}; choose one of {', '.join(get_args(Layers))}")


def feature_cost(attack: FeatureAttack, sizes: Sizes, looks: int) -> Cost:
    """The cost of one goal whose poisons are differentiated ``looks`` times by every surrogate.

    Its images are looked at once by every surrogate, and once more, with all candidates, to find the nearest bases.
    """
    forward, gradient = attack.adapt.passes(sizes.poisons) if attack.adapt else (0, 0)
    search = sizes.wanted + sizes.goal if attack.bases == "nearest" else 0
    return Cost(
        forward=forward + (sizes.goal + search) * attack.surrogates,
        gradient=gradient + sizes.poisons * looks * attack.surrogates,
        trainings=attack.surrogates + (attack.adapt is not None and attack.adapt.zeta > 0),
    )


def loop_cost(attack: FeatureAttack, loop: Loop, sizes: Sizes) -> Cost:
    """:func:`feature_cost` of an attack that uses the common outer loop."""
    return feature_cost(attack, sizes, loop.steps * loop.restarts * loop.draws)


# --- features ---


def features(model: nn.Module, x: Float[Tensor, "b c h w"], layers: Layers) -> list[Float[Tensor, "b _"]]:
    """What a network makes of images at its stages, flattened, the penultimate features last; differentiable.

    Raises:
        ValueError: the network has no penultimate features, or no stage before them where one is wanted.
    """
    if layers == "penultimate":
        return [penultimate(model, x)]
    ends = stage_ends(model)[:-1]
    if not ends:
        raise ValueError(f"{type(model).__name__} shows no stage before its last: use layers = 'penultimate'")
    seen: list[Tensor] = []

    def remember(_module: nn.Module, _inputs: tuple[Tensor, ...], out: Tensor) -> None:
        seen.append(out)

    hooks = [end.register_forward_hook(remember) for end in (ends if layers == "all" else ends[-1:])]
    try:
        last = penultimate(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    return [*(out.flatten(1) for out in seen), last]


def stage_ends(model: nn.Module) -> list[nn.Module]:
    """The last module of every stage, in order, without the head: the last linear layer and what comes after it.

    Modules in :class:`torch.nn.Sequential` are taken one by one; any other is a whole, as a residual block is.
    """
    parts = _parts(model)
    heads = [i for i, part in enumerate(parts) if isinstance(part, nn.Linear)]
    body = parts[: heads[-1]] if heads else parts
    begins = [i for i, part in enumerate(body) if any(p.ndim > 1 for p in part.parameters())]
    return [body[i - 1] for i in [*begins[1:], len(body)]] if begins else []


def _parts(module: nn.Module) -> list[nn.Module]:
    children = [[child] if not isinstance(child, nn.Sequential) else _parts(child) for child in module.children()]
    return [part for some in children for part in some]


def centres(model: nn.Module, goals: Sequence[Goal], layers: Layers) -> list[Float[Tensor, "t _"]]:
    """The features of goals, stage by stage: of their images as they are, neither augmented nor with noise.

    Args:
        model: in eval mode.
    """
    place = place_of(model)
    with torch.no_grad():
        of_goals = [[f.mean(0) for f in features(model, goal.x.to(place), layers)] for goal in goals]
    return [torch.stack(stage) for stage in zip(*of_goals, strict=True)]


def lengths(stage: Float[Tensor, "t d"]) -> Float[Tensor, " t"]:
    """The Euclidean lengths of goals' features, which distances are relative to.

    Raises:
        ValueError: one is 0.
    """
    norms = torch.linalg.vector_norm(stage, dim=1)
    if not bool(norms.all()):
        raise ValueError("the goal's feature is 0 everywhere: no distance can be relative to it")
    return norms


# --- what is crafted, for one goal or many ---


class OneOfMany:
    """An attack that crafts for one goal as it does for many."""

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
            ValueError: the goal does not fit the data, the budget is more than the wanted class has, or a
                surrogate has no penultimate features.
        """
        return self.many(train, [goal], surrogate=surrogate, streams=[streams], checkpoint=checkpoint,
                         progress=progress)[0]  # fmt: skip

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
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Group:
    """Some goals that are crafted in one batch.

    Args:
        goals: in the order of the call.
        rows: their bases.
        jobs: the pixels of these, and their streams.
        halfway: where their state is kept.
        progress: says how far all groups are.
    """

    goals: list[Goal]
    rows: list[Int64[Tensor, " p"]]
    jobs: list[Job]
    halfway: Halfway
    progress: Progress


@dataclass(frozen=True, eq=False)
class Task:
    """Everything that an attack on features needs before it crafts.

    Args:
        attack: its settings.
        train: the clean training set.
        goals: what is wanted, each with streams of its own.
        models: the surrogates.
        rows: the bases of every goal.
        jobs: their pixels.
    """

    attack: FeatureAttack
    train: LabeledImages
    goals: Sequence[Goal]
    models: Sequence[nn.Module]
    rows: list[Int64[Tensor, " p"]]
    jobs: list[Job]

    def groups(self, checkpoint: Path | None, progress: Progress) -> Iterator[Group]:
        """The goals, as many at a time as one batch holds."""
        at_once = max(1, TOGETHER // min(self.attack.batch, len(self.rows[0])))
        starts = range(0, len(self.goals), at_once)
        for k, start in enumerate(starts):
            span = slice(start, start + at_once)
            goals, rows, jobs = list(self.goals[span]), self.rows[span], self.jobs[span]
            identity = identity_of(self.attack, self.train, goals, [job.streams for job in jobs])
            halfway = Halfway(checkpoint, identity, name=f"craft-{k:03d}" if len(starts) > 1 else "craft")
            yield Group(goals, rows, jobs, halfway, _share(progress, k, len(starts)))


def _share(progress: Progress, k: int, of: int) -> Progress:
    """Progress of the ``k``-th of some groups that take equally long."""

    def told(what: str, done: int, total: int, note: str = "", /) -> None:
        progress(what, k * total + done, of * total, note)

    return told


def prepare(
    attack: FeatureAttack,
    train: LabeledImages,
    goals: Sequence[Goal],
    *,
    surrogate: Surrogate,
    streams: Sequence[Streams],
) -> Task:
    """Check everything, train the surrogates, and choose the bases of every goal.

    In transfer learning the surrogate is the very extractor that the victim will use.

    Raises:
        ValueError: a goal does not fit the data, the budget is more than its class has, the nearest bases are to be
            found where they are prescribed, there is no goal, or not one family of streams for each.
    """
    if not goals or len(goals) != len(streams):
        raise ValueError(f"one family of streams for each goal expected, not {len(streams)} for {len(goals)} goals")
    nearest = attack.bases == "nearest"
    rows = [choose_bases(train, goal, attack.budget, s("bases")) for goal, s in zip(goals, streams, strict=True)]
    if nearest and any(goal.bases is not None for goal in goals):
        raise ValueError("the goal prescribes its bases: bases = 'nearest' cannot choose others")
    informed = attack.adapt.informed(surrogate) if attack.adapt else surrogate
    models = [informed(train, index=k) for k in range(attack.surrogates)]
    if nearest:
        rows = [nearest_bases(models, train, goal, attack.budget) for goal in goals]
    place, jobs = place_of(models[0]), list[Job]()
    for some, own in zip(rows, streams, strict=True):
        fixed = attack.adapt.friendly(train, some, surrogate=surrogate, streams=own) if attack.adapt else None
        jobs.append(Job(train.pixels(some.to(train.device)).to(place), own, fixed))
    return Task(attack, train, goals, models, rows, jobs)


def craft_groups(
    task: Task,
    make: Callable[[nn.Module, Sequence[Goal]], JointObjective],
    loop: Loop,
    *,
    name: str,
    checkpoint: Path | None,
    progress: Progress,
) -> list[PoisonedDataset]:
    """Perturb the bases of every goal by the common outer loop, within the attack's bound, and put them in place.

    Args:
        make: the objective of some goals with one surrogate, held still.
        name: of the attack, in ``ATTACKS``.
    """
    made, bounded = list[PoisonedDataset](), cast("Settings", task.attack)
    with still(task.models, freeze=True):
        for group in task.groups(checkpoint, progress):
            crafted = craft_many(
                group.jobs,
                [make(model, group.goals) for model in task.models],
                loop,
                moments=task.train.moments,
                halfway=group.halfway,
                progress=group.progress,
                what=name.replace("-", " "),
            )
            parts = zip(group.rows, crafted, group.goals, strict=True)
            made += [poisoned(task.train, *part, attack=name, settings=bounded) for part in parts]
    return made


def nearest_bases(models: Sequence[nn.Module], train: LabeledImages, goal: Goal, budget: float) -> Int64[Tensor, " p"]:
    """The images of the wanted class whose penultimate features are nearest to the goal's, ascending.

    Distances are relative to the length of the goal's feature, and averaged over the models.
    """
    of_class, count = candidates(train, goal, budget)
    total = torch.zeros(len(of_class), dtype=torch.float64)
    with still(models, freeze=True), torch.no_grad():
        for model in models:
            (centre,) = centres(model, [goal], "penultimate")
            parts = [
                (penultimate(model, train.pixels(part.to(train.device)).to(centre)) - centre).norm(dim=1)
                for part in of_class.split(TOGETHER)
            ]
            total += torch.cat(parts).double().cpu() / float(lengths(centre))
    return of_class[total.argsort(stable=True)[:count]].sort().values
