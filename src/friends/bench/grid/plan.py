"""Before anything starts: what a grid consists of, what is there already, what the rest will take, and in which order.

The order is by value. A row says nothing without its undefended models, and little without the control, so these come
first; then FRIENDS, then its rivals; trial by trial (all seeds of the first goal, then of the second), so that whatever
is finished when time runs out is a whole table of fewer trials.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.nn import functional as F

from friends import models
from friends.attacks.base import Sizes, poison_count
from friends.bench.grid.record import Record
from friends.bench.grid.spec import Cell, Grid
from friends.bench.grid.stages import Workbench
from friends.bench.grid.tasks import Task
from friends.bench.record import CLEAN, UNDEFENDED
from friends.defenses.friends import Friends
from friends.digest import reaches

RELATIVE = {
    "AdversarialPoisoning": 12.0, "AdversarialTraining": 9.0, "ActivationClustering": 2.4, "SpectralSignatures": 2.2,
    "DeepKNN": 2.2, "ABL": 1.1, "MaxUp": 4.5, "DPInstaHide": 2.5, "EPIC": 1.6, "NeuralCleanse": 3.0, "Strip": 1.2,
    "Friends": 1.6, "DPSGD": 1.1,
}  # fmt: skip
"""Training with a defense over training without, for an estimate only: measured on small networks on a processor."""
EVALUATION = 0.3
"""Judging an image over training on it, in time."""
OVERHEAD = 0.2
"""Seconds that anything takes: files, hashes, the start of a training."""


@dataclass(frozen=True)
class Planned:
    """One cell of a plan.

    Args:
        cell: which.
        key: of the cell; see :meth:`Workbench.cell_key`.
        poison: key of its poisons.
        poisoned: whether these are there.
        done: whether its record can be written without training anything.
        order: place in the order of value, from 0.
        seconds: estimate for its own model; the poisons are estimated once in :attr:`Plan.poisons`.
        bytes: estimate of what it leaves in the cache.
        memory: estimate of what a worker needs for it.
    """

    cell: Cell
    key: str
    poison: str
    poisoned: bool
    done: bool
    order: float
    seconds: float
    bytes: int
    memory: int = 0


@dataclass(frozen=True)
class Plan:
    """All cells of a grid with what is known of them.

    Args:
        grid: the grid.
        cells: in the order of value.
        poisons: estimated seconds of crafting by key of the poisons, of those that are not there.
        measured: whether the times come from earlier runs of the same kind on this cache, at least in part.
    """

    grid: Grid
    cells: tuple[Planned, ...]
    poisons: Mapping[str, float]
    measured: bool

    @property
    def left(self) -> list[Planned]:
        """The cells that are not finished."""
        return [planned for planned in self.cells if not planned.done]

    @property
    def seconds(self) -> float:
        """Estimate for all that is left, on one worker."""
        return sum(planned.seconds for planned in self.left) + sum(self.poisons.values())

    @property
    def bytes(self) -> int:
        """Estimate of the disk that the rest needs."""
        return sum(planned.bytes for planned in self.left)


@dataclass
class Speed:
    """How fast this device is, measured where it is asked for the first time: seconds an image, by network."""

    device: torch.device
    found: dict[tuple[str, int | None, tuple[int, int, int], int], float] = field(default_factory=dict)

    def per_image(self, name: str, width: int | None, shape: tuple[int, int, int], classes: int) -> float:
        """Seconds to train on one image, forward and backward, in batches of 64."""
        place = (name, width, shape, classes)
        if place not in self.found:
            generator = torch.Generator().manual_seed(0)
            moments = ((0.5,) * shape[0], (0.25,) * shape[0])
            network = models.build(
                name, shape=shape, classes=classes, moments=moments, width=width, generator=generator
            )
            self.found[place] = _seconds_per_image(network.to(self.device), shape, classes)
        return self.found[place]


def _seconds_per_image(network: torch.nn.Module, shape: Sequence[int], classes: int, batch: int = 64) -> float:
    """The fastest of three steps; the first one warms up."""
    device = next(network.parameters()).device
    x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    y = torch.arange(batch, device=device) % classes
    times: list[float] = []
    for _ in range(4):
        clock = time.perf_counter()
        F.cross_entropy(network(x), y).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - clock)
    return min(times[1:]) / batch


def plan(grid: Grid, bench: Workbench, records: Sequence[Record] = ()) -> Plan:
    """Look at every cell: what is there, what the rest will take.

    Args:
        grid: the grid.
        bench: the cache to look into, and the device to estimate for.
        records: finished cells, here or of earlier runs: their times replace estimates for rows of the same kind.
    """
    rank, clock = _rank(grid), _Clock(bench, records)
    found: list[Planned] = []
    poisons: dict[str, float] = {}
    for cell in grid.cells():
        poison_identity, identity = bench.poison_identity(cell), bench.victim_identity(cell)
        poison = bench.artifacts.key("poison", poison_identity)
        poisoned = bench.artifacts.has("poison", poison_identity)
        kinds = [True] if grid.keep_models else [True, False]
        done = poisoned and any(bench.artifacts.has("victim", {**identity, "weights": kept}) for kept in kinds)
        training, crafting = clock.seconds(cell)
        if not poisoned:
            poisons.setdefault(poison, crafting)
        size = 0 if done else _bytes(cell, bench, grid.keep_models)
        seconds = 0.0 if done else training
        memory = _memory(cell, bench.facts(cell.trial.data))
        found.append(Planned(cell, bench.cell_key(cell), poison, poisoned, done, rank(cell), seconds, size, memory))
    found.sort(key=lambda planned: planned.order)
    return Plan(grid, tuple(found), poisons, clock.measured)


class _Clock:
    """How long cells take: as long as the others of their row did, else by size and this device's speed.

    Estimates by size are scaled by what the rows that have been run took of theirs.
    """

    def __init__(self, bench: Workbench, records: Sequence[Record]) -> None:
        self._bench, self._speed, self._past = bench, Speed(bench.device), _past(records)
        self._by_size: dict[object, tuple[float, float]] = {}
        self._ratios: dict[object, float] = {}
        self.measured = bool(self._past)

    def seconds(self, cell: Cell) -> tuple[float, float]:
        """Of training the victim, and of making its poisons."""
        place = (tuple(sorted(cell.labels.items())), cell.row.name)
        if place not in self._by_size:
            self._by_size[place] = _estimate(cell, self._bench, self._speed)
            for part, by_size in zip(("training", "crafting"), self._by_size[place], strict=True):
                if (*place, part) in self._past and by_size > 0:
                    self._ratios[(*place, part)] = self._past[(*place, part)] / by_size
        training, crafting = self._by_size[place]
        return self._known(place, "training", training), self._known(place, "crafting", crafting)

    def _known(self, place: tuple[object, ...], part: str, by_size: float) -> float:
        ratios = [ratio for where, ratio in self._ratios.items() if cast("tuple[object, ...]", where)[-1] == part]
        scale = statistics.median(ratios) if ratios else 1.0
        return self._past.get((*place, part), by_size * scale)


def _rank(grid: Grid) -> Callable[[Cell], float]:
    """The order of value: seed by seed, and in it undefended, control, FRIENDS, the others."""
    names = [UNDEFENDED, CLEAN, *(row.name for row in grid.rows if _is_friends(row.defenses))]
    names += [row.name for row in grid.rows if row.name not in names]
    points = [labels for labels, _ in grid.points()]
    rows = len(names)

    def order(cell: Cell) -> float:
        turn = (cell.victim * 1000 + cell.goal) * len(grid.seeds) + grid.seeds.index(cell.seed)
        return (turn * rows + names.index(cell.row.name)) * len(points) + points.index(dict(cell.labels))

    return order


def _is_friends(defenses: Sequence[Mapping[str, Any]]) -> bool:
    return any(defense.get("name") == "friends" for defense in defenses)


def _past(records: Sequence[Record]) -> dict[tuple[object, ...], float]:
    """The median times of rows that have been run."""
    times: dict[tuple[object, ...], list[float]] = {}
    for record in records:
        seconds = record.seconds
        times.setdefault((*record.row, "training"), []).append(seconds["training"] - seconds.get("shared", 0.0))
        times.setdefault((*record.row, "crafting"), []).append(seconds["surrogates"] + seconds["crafting"])
    return {place: statistics.median(some) for place, some in times.items()}


def _estimate(cell: Cell, bench: Workbench, speed: Speed) -> tuple[float, float]:
    """Seconds of training the victim, and of making its poisons, from images passed and this device's speed."""
    trial, facts = cell.trial, bench.facts(cell.trial.data)
    classes = len(trial.data.classes or facts["classes"])
    train = trial.data.train or int(facts["train"])
    test = trial.data.test or int(facts["test"])
    c, h, w = facts["shape"]
    image = speed.per_image(trial.model.name, trial.model.width, (c, h, w), classes)
    own = image / 3 if trial.scenario == "transfer" else image  # frozen features: no way back
    relative = max([1.0, *(RELATIVE.get(type(defense).__name__, 1.3) for defense in cell.arm.defenses)])
    training = cell.recipe.epochs * train * own * relative + test * image * EVALUATION
    pool = trial.pretraining_images or train
    surrogate = (trial.recipe.epochs if trial.scenario == "scratch" else trial.pretraining.epochs) * image
    surrogate *= train if trial.scenario == "scratch" else pool
    budget = getattr(trial.attack, "budget", None)
    per_class = train // classes
    sizes = Sizes(
        train=train,
        wanted=per_class,
        source=per_class,
        goal=trial.goals.images or (1 if trial.goals.trigger is None else min(1000, test // classes)),
        poisons=0 if budget is None else poison_count(budget, train),
    )
    cost = trial.attack.cost(sizes)
    return OVERHEAD + training, OVERHEAD + cost.forwards * image / 3 + cost.trainings * surrogate


def _bytes(cell: Cell, bench: Workbench, keep_models: bool) -> int:
    """What a cell leaves in the cache: outcome, noise, weights where they are kept."""
    facts = bench.facts(cell.trial.data)
    c, h, w = facts["shape"]
    train = cell.trial.data.train or int(facts["train"])
    noisy = any(isinstance(defense, Friends) and defense.zeta > 0 for defense in cell.arm.defenses)
    weights = 45_000_000 if keep_models and cell.trial.model.name == "resnet18" and not cell.trial.model.width else 0
    return 20_000 + weights + (train * c * h * w if noisy else 0)


def tasks_of(
    whole: Plan, payload: Mapping[str, Any], *, left: Sequence[Planned] | None = None, gpus: float = 0.0
) -> list[Task]:
    """The work that is left, as tasks: first the poisons, then the cells that share them.

    Args:
        whole: the plan.
        left: which cells; by default those that are not in the cache.
        payload: what every task needs to know beside its cell: ``cache``, ``device``, ...
        gpus: fraction of a GPU that a task takes.
    """
    tasks: list[Task] = []
    crafting: set[str] = set()
    for planned in whole.left if left is None else left:
        cell = planned.cell
        given = {**payload, "cell": cell.to_json(), "keep": whole.grid.keep_models}
        value, memory = -planned.order, planned.memory
        name = f"poison {planned.poison}"
        if not planned.poisoned and planned.poison not in crafting:
            crafting.add(planned.poison)
            tasks.append(
                Task(
                    name=name,
                    call="friends.bench.grid.stages:perform_poison",
                    payload=given,
                    claims=frozenset({_family(cell)}),
                    value=value + 0.5,
                    seconds=whole.poisons.get(planned.poison, 0.0),
                    gpus=gpus,
                    memory=memory,
                )
            )
        probes = any(reaches(type(d).__module__, "friends.defenses.filtering") for d in cell.arm.defenses)
        tasks.append(
            Task(
                name=f"cell {planned.key} {cell.row.name} {sorted(cell.labels.items())}",
                call="friends.bench.grid.stages:perform_cell",
                payload=given,
                needs=() if planned.poisoned else (name,),
                claims=frozenset({f"probe {planned.poison}"} if probes else ()),
                value=value,
                seconds=planned.seconds,
                gpus=gpus,
                memory=memory,
            )
        )
    return tasks


def _family(cell: Cell) -> str:
    """The surrogates that a poisoning may have to train, which others of the same setting and seed need too."""
    trial = cell.trial
    own = cell.goal if trial.own_surrogates else "shared"
    return (
        f"surrogates {trial.scenario} {trial.model} {trial.recipe} {trial.pretraining} {trial.data} {trial.seed} {own}"
    )


def _memory(cell: Cell, facts: Mapping[str, Any]) -> int:
    """A rough bound of what a worker needs: torch itself, the data in a few copies, activations of a batch."""
    c, h, w = facts["shape"]
    copies = 6 * (int(facts["train"]) + int(facts["test"])) * c * h * w
    wide = cell.trial.model.name == "resnet18" and not cell.trial.model.width
    return copies + (2_000_000_000 if wide else 900_000_000)
