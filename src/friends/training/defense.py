"""The contract of every defense, and what a defense may see while a model is trained.

The loop that calls the hooks (``fit``), as pseudocode::

    run = Run(data, model, optimizer, ...)           # never told which rows are poison, nor the attacker's goal
    refuse defenses that do not compose, or that lack the clean reserve that they need
    for d in defenses: d.before_training(data, run)  # filters train a probe, then set run.keep
    while run.epoch < run.epochs:
        for d in defenses: d.start_epoch(run)        # friendly noise is made; EPIC drops rows; ABL changes phase
        set the learning rate to run.schedule(run.epoch)
        for idx in shuffled(rows where run.keep):
            x, y = data.pixels(idx), data.y[idx]     # pixels in [0, 1]
            for d in defenses: x = d.pixels(x, idx, run)
            if run.augment: x = run.recipe.augment(x)
            for d in defenses: x, y = d.batch(x, y, run)
            loss = the one overridden d.loss, or cross-entropy, of run.model(x) and y
            loss.backward()
            for d in defenses: d.gradients(run)
            run.optimizer.step()
        run.epoch += 1                               # checkpoint here
    for d in defenses: run.predictor = d.after_training(run)

``run.model``, ``run.optimizer``, ``run.schedule``, ``run.epochs``, ``run.keep`` and ``run.augment`` are read again
every time, so a hook may replace them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from friends.data.artifacts import Artifacts
from friends.data.files import read_tensors, write_tensors
from friends.data.images import LabeledImages
from friends.modules import logits_of
from friends.training.recipe import Recipe
from friends.types import ABSTAIN, Progress, Streams, silent

__all__ = ["ABSTAIN", "About", "Defense", "Predictor", "Probe", "Run", "Trait", "argmax_predictor", "check_clean",
           "check_composition"]  # fmt: skip

Trait = Literal["mixes", "repeats", "drops", "phases", "crafts", "private", "abstains"]
"""What a defense does to a training that others must know: it mixes images of a batch (and gives soft labels), repeats
them, drops rows while training goes on, changes phase (loss, rows, optimizer), crafts perturbations with the model in
the middle of a step, bounds what a single image can do (differential privacy), or wraps the predictor in one that
abstains."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What is to be known of a defense before it is used.

    Args:
        title: its usual name.
        paper: authors, venue, year and arXiv id.
        aims: attacks that it is defined for: ``"target"``, single images as they are, ``"backdoor"``, a trigger.
        told: the settings that are knowledge about the attack, such as ``("budget",)``; shown in every table.
        clean: whether it needs a reserve of clean images outside the training data.
        classes: it is defined for data of at least so many classes.
        traits: what it does to a training.
        clashes: traits of other defenses that it does not compose with, and why.
        not_after: likewise, where the other one is listed before it.
    """

    title: str
    paper: str
    aims: tuple[str, ...] = ("target", "backdoor")
    told: tuple[str, ...] = ()
    clean: bool = False
    classes: int = 2
    traits: frozenset[Trait] = frozenset()
    clashes: Mapping[Trait, str] = field(default_factory=dict[Trait, str])
    not_after: Mapping[Trait, str] = field(default_factory=dict[Trait, str])


@runtime_checkable
class Predictor(Protocol):
    """A trained pipeline as its user sees it: pixels in, class ids out, or :data:`ABSTAIN`."""

    def __call__(self, x: Float[Tensor, "b c h w"], /) -> Int64[Tensor, " b"]: ...


@runtime_checkable
class Probe(Protocol):
    """Train another model on (part of) the same data, with the same recipe: what filters look through.

    The same call on the same data and streams gives the same model, so defenses that ask for the same probe can share
    it (``fit(..., artifacts=...)``).

    Args:
        keep: ``(n,)`` bool, the rows to train on; all by default.
        epochs: only the first so many epochs of the recipe.
        defenses: in force while it is trained.
        name: of its random streams; defenses that may share a probe leave it as it is.
        architecture: another network than the one in training, by name.
        lr: another learning rate than the recipe's.
    """

    def __call__(
        self,
        *,
        keep: Tensor | None = None,
        epochs: int | None = None,
        defenses: Sequence[Defense] = (),
        name: str = "probe",
        architecture: str | None = None,
        lr: float | None = None,
    ) -> nn.Module: ...


@dataclass(eq=False)
class Run:
    """One training in progress: everything that a hook may look at or change, and nothing that it must not see.

    Args:
        data: the training data, poisons and all, on the training device.
        model: the network being trained; takes pixels in [0, 1] (its first layer normalises), returns logits.
        optimizer: reassign it to start a phase with fresh momentum, and rebuild it in :meth:`Defense.resume`.
        recipe: how the loop trains.
        schedule: epoch -> learning rate, applied to every parameter group after ``start_epoch``.
        streams: random streams of this training. Draw from ``generator(self, ...)``, not from here.
        epochs: how many epochs the loop will run.
        epoch: the epoch being trained, from 0.
        step: the batch within the epoch, from 0.
        keep: ``(n,)`` bool, rows trained on.
        augment: whether flip and shift are on.
        clean: a clean reserve outside the training data, for the defenses that are entitled to one.
        probe: trains a helper model.
        artifacts: where probes and noises are kept for other trainings; use :meth:`once`.
        progress: where long steps say how far they are.
        remarks: numbers that a defense wants in this epoch's line of the history, such as how long a step took.
        shared_seconds: the time of what was found ready-made, probes and noises: what this training would have cost
            more had it been alone.
        used: keys of the artifacts that it made or found, by kind.
    """

    data: LabeledImages
    model: nn.Module
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    schedule: Callable[[int], float]
    streams: Streams
    epochs: int
    keep: Tensor
    probe: Probe
    clean: LabeledImages | None = None
    artifacts: Artifacts | None = None
    epoch: int = 0
    step: int = 0
    augment: bool = True
    progress: Progress = silent
    predictor: Predictor = field(init=False)
    remarks: dict[str, float] = field(default_factory=dict)
    shared_seconds: float = 0.0
    used: dict[str, str] = field(default_factory=dict[str, str])
    _memory: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    _defenses: tuple[Defense, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        self.predictor = argmax_predictor(self.model)

    @property
    def device(self) -> torch.device:
        """Where training happens."""
        return self.data.device

    def memory(self, defense: Defense) -> dict[str, Tensor]:
        """The tensors that a defense keeps during this training; they travel in the checkpoints.

        A defense itself is a frozen value and remembers nothing, so one object can serve many trainings. The name
        ``"removed"`` is kept for an ``(n,)`` bool tensor: rows that a defense judged to be poison, where ``run.keep``
        does not say it.
        """
        return self._memory[self._place(defense)]

    def generator(self, defense: Defense, *name: str | int) -> torch.Generator:
        """A random stream of this defense alone, on the training device.

        Adding or removing a defense of another kind does not change it. The generator starts anew at each call:
        name the epoch, and the step where there are draws at every step.
        """
        same = [d for d in self._defenses[: self._place(defense)] if type(d) is type(defense)]
        return self.streams(type(defense).__name__, len(same), *name, device=self.device)

    def once(
        self, kind: str, identity: Mapping[str, object], make: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Tensors that take long to make and that other trainings may need too: made, or found where one made them.

        Args:
            kind: what they are called among the artifacts, such as ``"noise"``.
            identity: plain values that determine them: settings, fingerprint of the data, hash of the weights, seed.
            make: makes them; must depend on nothing else.

        Returns:
            The tensors, on the training device.
        """
        if self.artifacts is None:
            return make()
        made = False

        def write(folder: Path) -> dict[str, object]:
            nonlocal made
            clock, made = time.perf_counter(), True
            write_tensors(folder / f"{kind}.safetensors", make())
            return {"seconds": time.perf_counter() - clock}

        artifact = self.artifacts.obtain(kind, identity, write, title=kind, progress=self.progress)
        self.used[kind] = artifact.key
        self.shared_seconds += 0.0 if made else float(str(artifact.facts["seconds"]))
        tensors, _ = read_tensors(artifact.file(f"{kind}.safetensors"))
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _place(self, defense: Defense) -> int:
        for place, other in enumerate(self._defenses):
            if other is defense:
                return place
        raise ValueError(f"{defense!r} does not take part in this training")


class Defense:
    """A way to train safely on data that may be poisoned. Every hook does nothing: override the one or two you need.

    A subclass is a frozen dataclass of settings. What it may know about the attack (an expected number of poisons,
    a bound) is a setting, so that it shows in the repr and in every table. State lives in ``run.memory(self)``;
    random draws come from ``run.generator(self, ...)``. A defense never learns which rows are poison: no hook is
    told, and ``fit`` is not either.
    """

    about: ClassVar[About] = About(title="a defense", paper="")

    def told(self) -> dict[str, object]:
        """What it is told about the attack, by the names of its settings."""
        return {name: getattr(self, name) for name in self.about.told}

    def before_training(self, data: LabeledImages, run: Run) -> None:
        """Before the first epoch. Filters train ``run.probe(...)`` here and clear rows of ``run.keep``."""

    def resume(self, run: Run) -> None:
        """After a checkpoint was loaded: rebuild what is no tensor, such as an optimizer that a phase replaced."""

    def start_epoch(self, run: Run) -> None:
        """Before epoch ``run.epoch``. Friendly noise is made here; a defense with phases changes phase here."""

    def pixels(self, x: Float[Tensor, "b c h w"], idx: Int64[Tensor, " b"], run: Run) -> Float[Tensor, "b c h w"]:
        """Pixels in [0, 1] before augmentation; ``idx`` are rows of the data. Noise tied to pixels lives here."""
        return x

    def batch(self, x: Float[Tensor, "b c h w"], y: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """The augmented batch, about to enter the model. May change its size and return soft labels ``(b, k)``."""
        return x, y

    def loss(self, logits: Float[Tensor, "b k"], y: Tensor, run: Run) -> Float[Tensor, ""]:
        """What is minimised. At most one defense of a training may override it."""
        return F.cross_entropy(logits, y)

    def gradients(self, run: Run) -> None:
        """Gradients are in ``.grad``, the optimizer has not stepped: clip here, or add noise."""

    def after_training(self, run: Run) -> Predictor:
        """The pipeline to use. May mend ``run.model``, or wrap ``run.predictor`` in one that abstains."""
        return run.predictor


def argmax_predictor(model: nn.Module) -> Predictor:
    """The predictor that answers with the class of the largest logit, in eval mode, without gradients."""

    def predict(x: Float[Tensor, "b c h w"]) -> Int64[Tensor, " b"]:
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return logits_of(model, x).argmax(1)
        finally:
            model.train(was_training)

    return predict


def check_composition(defenses: Sequence[Defense]) -> None:
    """Raise ``ValueError``, with the reason, if these defenses, in this order, do not compose."""
    for i, defense in enumerate(defenses):
        if any(other is defense for other in defenses[:i]):
            raise ValueError(f"{defense!r} is listed twice: it would share one memory and draw the same noise")
        about = defense.about
        for j, other in enumerate(defenses):
            reasons = {**about.clashes, **(about.not_after if j < i else {})} if j != i else {}
            for trait in sorted(other.about.traits & reasons.keys()):
                how = "" if trait in about.clashes else " in this order"
                raise ValueError(f"{about.title} and {other.about.title} do not compose{how}: {reasons[trait]}")
    own = [defense for defense in defenses if type(defense).loss is not Defense.loss]
    if len(own) > 1:
        raise ValueError(f"{own[0]!r} and {own[1]!r} both replace the loss: they do not compose")


def check_clean(defenses: Sequence[Defense], clean: LabeledImages | None) -> None:
    """Raise ``ValueError`` if a defense needs clean images and there are none."""
    for defense in defenses:
        if defense.about.clean and (clean is None or len(clean) == 0):
            raise ValueError(f"{defense.about.title} needs clean images that are not trained on: pass "
                             "fit(..., clean=...)")  # fmt: skip
