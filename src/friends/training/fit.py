"""The training loop: one for every attack, every defense and every scenario.

What differs between training from scratch, transfer and fine-tuning is the model that ``make_model`` returns and the
numbers in the :class:`Recipe`; the loop has no branch for it. What differs between defenses is in their hooks, drawn
in :mod:`friends.training.defense`.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from friends.data.artifacts import Artifacts
from friends.data.files import read_tensors, write_tensors
from friends.data.images import LabeledImages
from friends.digest import digest
from friends.modules import weights_hash
from friends.training.checkpoint import Checkpoint
from friends.training.defense import Defense, Predictor, Run, argmax_predictor, check_clean, check_composition
from friends.training.recipe import Recipe, sgd
from friends.types import Progress, Streams, silent

MakeModel = Callable[[torch.Generator], nn.Module]
Architectures = Callable[[str, torch.Generator], nn.Module]
Watch = Callable[[nn.Module, int], Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A finished training.

    Args:
        model: the network after the last epoch (never the best one: that would select on test data).
        predictor: the pipeline to judge; not the model's argmax if a defense abstains.
        history: per epoch, ``loss``, ``lr``, ``seconds``, ``kept`` rows and whatever ``watch`` returned.
        memory: what each defense kept, in the order of the defenses.
        keep: ``(n,)`` bool, the rows trained on in the last epoch.
        seconds: training time, defenses included, watching and saving not, over all the processes that it took.
        shared_seconds: what the probes and noises that it found ready-made had cost; alone it would have taken so much
            longer.
        used: the keys of the artifacts that it made or found, by kind.
    """

    model: nn.Module
    predictor: Predictor
    history: tuple[dict[str, float], ...]
    memory: tuple[dict[str, Tensor], ...]
    keep: Tensor
    seconds: float
    shared_seconds: float = 0.0
    used: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def removed(self) -> Tensor:
        """``(n,)`` bool: the rows that the defenses judged to be poison."""
        found = [kept["removed"] for kept in self.memory if "removed" in kept]
        return torch.stack(found).any(0) if found else ~self.keep


def fit(
    data: LabeledImages,
    make_model: MakeModel,
    *,
    recipe: Recipe,
    defenses: Sequence[Defense] = (),
    streams: Streams,
    clean: LabeledImages | None = None,
    architectures: Architectures | None = None,
    artifacts: Artifacts | None = None,
    watch: Watch | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 2.0,
    progress: Progress = silent,
    what: str = "training",
) -> Fitted:
    """Train a model, with any number of defenses, on the device where ``data`` is.

    Args:
        data: the training set; poisoned or not, nobody here can tell.
        make_model: makes the initial model from the stream ``"weights"``; takes pixels in [0, 1].
        recipe: how to train.
        defenses: applied in this order at every hook.
        streams: the training's random streams; equal streams give equal initial weights, order and augmentation
            whatever the defenses.
        clean: a reserve of clean images, for the defenses that are entitled to one.
        architectures: makes a network of another architecture by its name, for defenses that train a small proxy.
        artifacts: where probes and friendly noises are kept. Trainings that ask for the same one, in whatever process,
            make it once between them.
        watch: called with the model (in eval mode) and the number of finished epochs after every epoch; what it
            returns goes into the history. It cannot influence the training.
        checkpoint: folder to resume from and to save to. A training killed at any moment and started again with
            the same arguments ends with the same model: bit for bit on a CPU with as many threads, on a GPU as far
            as its kernels are deterministic.
        checkpoint_seconds: save after an epoch if that long has passed since the last time; always after the last.
        progress: told about every step.
        what: what ``progress`` calls this training.

    Raises:
        ValueError: empty data, a defense that is listed twice, defenses that do not compose, one without the clean
            images it needs, a checkpoint of another training (the first difference is named), or a defense that
            removed every row.
        FloatingPointError: the loss is no longer finite.
    """
    if len(data) == 0:
        raise ValueError(f"no image to train on in {data!r}")
    check_composition(defenses)
    check_clean(defenses, clean)
    minimised = _loss_of(defenses)
    probe = _Prober(data, make_model, recipe, streams, architectures, artifacts, checkpoint, progress)
    run = _start(data, make_model, recipe, defenses, streams, clean, probe, artifacts, progress)
    probe.run = run
    saved = Checkpoint(checkpoint, _identity(run, defenses)) if checkpoint else None
    history: list[dict[str, float]] = []
    before = 0.0
    clock = last = time.perf_counter()
    state = saved.load(run) if saved else None
    if state is None:
        for defense in defenses:
            defense.before_training(data, run)
    else:
        history, before = state
    aside = 0.0  # seconds spent watching and saving
    while run.epoch < run.epochs:
        history.append(_epoch(run, defenses, minimised, progress, what))
        pause = time.perf_counter()
        if watch is not None:
            history[-1] |= _watched(watch, run)
        if saved and (run.epoch >= run.epochs or pause - last >= checkpoint_seconds):
            saved.save(run, history, before + pause - clock - aside)
            last = time.perf_counter()
        aside += time.perf_counter() - pause
    run.model.eval()
    run.predictor = argmax_predictor(run.model)  # a defense may have replaced the model
    for defense in defenses:
        run.predictor = defense.after_training(run)
    run.model.eval()
    memory = tuple(run.memory(defense) for defense in defenses)
    seconds = before + time.perf_counter() - clock - aside
    return Fitted(run.model, run.predictor, tuple(history), memory, run.keep, seconds, run.shared_seconds, run.used)


def _start(
    data: LabeledImages,
    make_model: MakeModel,
    recipe: Recipe,
    defenses: Sequence[Defense],
    streams: Streams,
    clean: LabeledImages | None,
    probe: _Prober,
    artifacts: Artifacts | None,
    progress: Progress,
) -> Run:
    """A run at epoch 0."""
    model = make_model(streams("weights")).to(device=data.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    keep = torch.ones(len(data), dtype=torch.bool, device=data.device)
    return Run(
        data=data,
        model=model,
        optimizer=sgd(model, recipe),
        recipe=recipe,
        schedule=recipe.lr_at,
        streams=streams,
        epochs=recipe.epochs,
        keep=keep,
        probe=probe,
        clean=clean,
        artifacts=artifacts,
        augment=recipe.augment is not None,
        progress=progress,
        _memory={place: {} for place in range(len(defenses))},
        _defenses=tuple(defenses),
    )


@dataclass(frozen=True)
class Trained:
    """A network that was trained once, and is found from then on.

    Args:
        model: in eval mode, on the device of its data.
        seconds: what its training took, whoever did it.
        found: whether it was there already.
        key: of the artifact; empty where none is kept.
    """

    model: nn.Module
    seconds: float
    found: bool
    key: str = ""


def train_once(
    artifacts: Artifacts | None,
    kind: str,
    data: LabeledImages,
    make_model: MakeModel,
    *,
    recipe: Recipe,
    streams: Streams,
    defenses: Sequence[Defense] = (),
    architectures: Architectures | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
    what: str = "training",
) -> Trained:
    """:func:`fit`, unless the same network has been trained before: same data, start, recipe, defenses and streams.

    Args:
        artifacts: where it is kept, weights alone; None keeps nothing.
        kind: what it is called there, such as ``"surrogate"``.
        checkpoint: where a training in progress is kept if there are no artifacts.
        data, make_model, recipe, streams, defenses, architectures, progress, what: as :func:`fit` takes them. The
            defenses must leave the layers of the network as they are.
    """
    made: list[Fitted] = []

    def train(half: Path | None) -> Fitted:
        with torch.enable_grad():  # a defense may ask for a probe from within no_grad
            return fit(
                data,
                make_model,
                recipe=recipe,
                defenses=defenses,
                streams=streams,
                architectures=architectures,
                artifacts=artifacts,
                checkpoint=half,
                progress=progress,
                what=what,
            )

    def make(folder: Path) -> dict[str, object]:
        made.append(train(folder / "half" / "training"))
        write_tensors(folder / "model.safetensors", made[0].model.state_dict())
        return {"seconds": made[0].seconds}

    if artifacts is None:
        fitted = train(checkpoint)
        return Trained(fitted.model, fitted.seconds, False)
    start = make_model(streams("weights"))  # what it starts from is part of what it is: it may be pretrained
    identity = {
        "data": data.fingerprint,
        "start": weights_hash(start),
        "recipe": repr(recipe),
        "defenses": repr(list(defenses)),
        "seed": streams.seed,
        "code": digest("friends.training.fit", "friends.models", *(type(d).__module__ for d in _ours(defenses))),
    }
    artifact = artifacts.obtain(kind, identity, make, title=f"{what}, {recipe.epochs} epochs", progress=progress)
    seconds = cast(float, artifact.facts["seconds"])
    if made:
        return Trained(made[0].model, seconds, False, artifact.key)
    start.load_state_dict(read_tensors(artifact.file("model.safetensors"))[0])
    model = start.to(device=data.device, memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]
    return Trained(model, seconds, True, artifact.key)


def _ours(defenses: Sequence[Defense]) -> list[Defense]:
    """The defenses of this package, whose code is known."""
    return [defense for defense in defenses if type(defense).__module__.split(".")[0] == "friends"]


class _Prober:
    """Trains helper models for the defenses of one training, or finds them ready-made."""

    def __init__(
        self,
        data: LabeledImages,
        make_model: MakeModel,
        recipe: Recipe,
        streams: Streams,
        architectures: Architectures | None,
        artifacts: Artifacts | None,
        checkpoint: Path | None,
        progress: Progress,
    ) -> None:
        self.data, self.make_model, self.recipe, self.streams = data, make_model, recipe, streams
        self.architectures, self.artifacts, self.checkpoint = architectures, artifacts, checkpoint
        self.progress = progress
        self.run: Run | None = None

    def __call__(
        self,
        *,
        keep: Tensor | None = None,
        epochs: int | None = None,
        defenses: Sequence[Defense] = (),
        name: str = "probe",
        architecture: str | None = None,
        lr: float | None = None,
    ) -> nn.Module:
        part = self.data if keep is None else self.data.rows(keep.nonzero().flatten())
        recipe = self.recipe.first(epochs)
        recipe = recipe if lr is None else replace(recipe, lr=lr)
        streams = self.streams.child("probe", name, *([architecture] if architecture else []))
        what = (part.fingerprint, repr(recipe), repr(list(defenses)), streams.seed)
        label = f"probe-{name}-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}"
        trained = train_once(
            self.artifacts,
            "probe",
            part,
            self.make_model if architecture is None else self._other(architecture),
            recipe=recipe,
            streams=streams,
            defenses=defenses,
            architectures=self.architectures,
            checkpoint=self.checkpoint / label if self.checkpoint else None,
            progress=self.progress,
            what=name,
        )
        if self.run is not None and trained.key:
            self.run.used["probe"] = trained.key
            self.run.shared_seconds += trained.seconds if trained.found else 0.0
        return trained.model

    def _other(self, architecture: str) -> MakeModel:
        make = self.architectures
        if make is None:
            raise ValueError(f"a defense asks for a proxy network {architecture!r}: pass fit(..., architectures=...), "
                             "which makes one by its name")  # fmt: skip
        return lambda generator: make(architecture, generator)


def _epoch(
    run: Run, defenses: Sequence[Defense], minimised: Defense, progress: Progress, what: str
) -> dict[str, float]:
    """Train one epoch; returns its line of the history and leaves ``run.epoch`` at the next one."""
    clock = time.perf_counter()
    run.remarks.clear()
    for defense in defenses:
        defense.start_epoch(run)
    lr = run.schedule(run.epoch)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    rows = _order(run)
    augment = run.streams("augment", run.epoch, device=run.device)
    total = torch.zeros((), device=run.device)
    run.model.train()
    forward = _forward(run)
    batches = rows.split(run.recipe.batch)
    for step, idx in enumerate(batches):
        run.step = step
        x, y = run.data.pixels(idx), run.data.y[idx]
        for defense in defenses:
            x = defense.pixels(x, idx, run)
        if run.augment and run.recipe.augment is not None:
            x = run.recipe.augment(x, augment, run.data.moments[0])
        for defense in defenses:
            x, y = defense.batch(x, y, run)
        call = forward if len(idx) == run.recipe.batch else run.model  # every other size would be compiled anew
        with _autocast(run):
            out = call(x.contiguous(memory_format=torch.channels_last))
        logits = cast(Tensor, getattr(out, "logits", out)).float()
        loss = minimised.loss(logits, y, run)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for defense in defenses:
            defense.gradients(run)
        run.optimizer.step()
        total += loss.detach() * len(idx)
        progress(what, run.epoch * len(batches) + run.step + 1, run.epochs * len(batches))
    mean = float(total) / len(rows)
    if mean != mean or mean in (float("inf"), float("-inf")):
        raise FloatingPointError(f"{what}: the loss of epoch {run.epoch} is {mean}; lower lr = {lr:g}")
    run.epoch += 1
    seconds = time.perf_counter() - clock
    return {"epoch": run.epoch, "loss": mean, "lr": lr, "seconds": seconds, "kept": len(rows), **run.remarks}


def _order(run: Run) -> Int64[Tensor, " k"]:
    """The rows of this epoch, shuffled; drawn on the CPU so that every device trains in the same order."""
    order = torch.randperm(len(run.data), generator=run.streams("order", run.epoch)).to(run.device)
    rows = order[run.keep[order]]
    if len(rows) == 0:
        raise ValueError(f"the defenses removed all {len(order)} training images before epoch {run.epoch}")
    return rows


def _forward(run: Run) -> Callable[[Tensor], Tensor]:
    """The model to call: compiled on a GPU, unless the recipe says otherwise."""
    wanted = run.recipe.compile if run.recipe.compile is not None else run.device.type == "cuda"
    if wanted and not any(map(shutil.which, ("cc", "gcc", "clang", "cl"))):
        warnings.warn("no C compiler on this machine: training goes on without torch.compile, slower", stacklevel=2)
        wanted = False
    if not wanted:
        return run.model
    compiled = _COMPILED.get(id(run.model))
    if compiled is None:
        _COMPILED.clear()  # one at a time: it holds the model
        compiled = _COMPILED[id(run.model)] = torch.compile(run.model, dynamic=False)  # pyright: ignore[reportArgumentType]
    return compiled


_COMPILED: dict[int, Callable[[Tensor], Tensor]] = {}


def _autocast(run: Run) -> contextlib.AbstractContextManager[object]:
    chosen = run.recipe.precision
    if chosen == "auto":
        chosen = "bfloat16" if run.device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.autocast(run.device.type, torch.bfloat16, enabled=chosen == "bfloat16")


def _watched(watch: Watch, run: Run) -> dict[str, float]:
    run.model.eval()
    with torch.no_grad():
        return dict(watch(run.model, run.epoch))


def _loss_of(defenses: Sequence[Defense]) -> Defense:
    """The one defense whose loss is minimised."""
    own = [defense for defense in defenses if type(defense).loss is not Defense.loss]
    return own[0] if own else Defense()


def _identity(run: Run, defenses: Sequence[Defense]) -> dict[str, str]:
    """What makes a training this one and no other, by name, for checkpoints."""
    return {
        "data": run.data.fingerprint,
        "recipe": repr(run.recipe),
        "defenses": repr(list(defenses)),
        "seed": str(run.streams.seed),
        "initial model": weights_hash(run.model),
        "clean reserve": run.clean.fingerprint if run.clean is not None else "none",
    }
