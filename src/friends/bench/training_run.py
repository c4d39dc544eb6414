"""``friends train``: a classifier of the user's own images, protected by FRIENDS, in a folder of its own.

While a training is under way the folder holds ``job.json``, what was asked for, and ``checkpoint/``. At its end it
holds ``model.safetensors``, ``metrics.json``, ``report.html``, and ``model.json``, which is written last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from friends.bench import model_folder, training_report
from friends.bench.measures import Measures, measure
from friends.bench.provenance import commit, device_name, versions
from friends.bench.report import facts
from friends.bench.training_plan import network_of, own_randomness
from friends.bench.training_settings import Prepared, Training
from friends.bench.trial import plain_value
from friends.data.files import owned, read_tensors, write_json
from friends.data.images import LabeledImages
from friends.models.named import check_name
from friends.training.defense import About, Defense, Run
from friends.training.evaluate import probabilities
from friends.training.fit import Fitted, fit
from friends.types import Progress, Streams, silent

JOB, METRICS, REPORT, CHECKPOINT = "job.json", "metrics.json", "report.html", "checkpoint"
OURS = (JOB, METRICS, REPORT, model_folder.WEIGHTS, model_folder.ABOUT)
FORMAT = "friends-training-1"
JUDGED_AT_ONCE = 1 << 24
"""Pixel values that are judged in one batch: 64 MB as float32."""


@dataclass(frozen=True)
class _SeededLayers(Defense):
    """Defends nothing: layers such as dropout draw from the global generator, and that is seeded anew every epoch, so
    that a training that resumes at one goes on as it would have."""

    about: ClassVar[About] = About(title="seeded layers", paper="")

    def start_epoch(self, run: Run) -> None:
        seed = run.streams.integer("layers", run.epoch)
        torch.default_generator.manual_seed(seed)
        if run.device.type == "cuda":
            torch.cuda.manual_seed(seed)


def check(training: Training, out: Path, *, fresh: bool = False) -> None:
    """Raise for what can be known to be wrong before the data are read.

    Args:
        training: what is asked for.
        out: the folder.
        fresh: whether another training in it is going to be deleted.

    Raises:
        ValueError: the folder holds something else, or a training with other settings; the network is unknown.
        ModuleNotFoundError: the network's package is not here.
    """
    check_name(training.model.name, training.model.width)
    job = _job(out)
    if job is not None and not fresh:
        _refuse_other(training, job, out)


def finished(out: Path) -> dict[str, Any] | None:
    """The measurements of a training that is done, else None."""
    if not (out / model_folder.ABOUT).is_file():
        return None
    return cast("dict[str, Any]", json.loads((out / METRICS).read_text(encoding="utf-8")))


def epochs_done(out: Path) -> int:
    """How many epochs the checkpoint of a training that is under way has."""
    file = out / CHECKPOINT / "checkpoint.safetensors"
    return cast(int, read_tensors(file)[1]["epoch"]) if file.is_file() else 0


def forget(out: Path) -> None:
    """Delete what a training left in a folder, and nothing else."""
    if not (out / JOB).is_file():
        return
    with owned(out):
        shutil.rmtree(out / CHECKPOINT, ignore_errors=True)
        for name in reversed(OURS):  # what says that it is ours goes last
            (out / name).unlink(missing_ok=True)


def train(
    training: Training,
    prepared: Prepared,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    checkpoint_seconds: float = 2.0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train, or go on with what was stopped, and write the folder.

    Args:
        training: what is asked for.
        prepared: its images.
        out: the folder; made if it is not there.
        device: where to train.
        checkpoint_seconds: how often to save.
        progress: told about every step.

    Returns:
        What is in ``metrics.json``.

    Raises:
        ValueError: as :func:`check`, or the data are not those that the training was begun with.
        BlockingIOError: another process works in the folder.
        FloatingPointError: the loss is no longer finite.
    """
    check(training, out)
    out.mkdir(parents=True, exist_ok=True)
    with owned(out):
        if not (out / JOB).is_file():
            write_json(out / JOB, {"format": FORMAT, "settings": plain_value(training)})
        with own_randomness(device):
            fitted = _fit(training, prepared, out, device, checkpoint_seconds, progress)
        model_folder.write_weights(fitted.model, out)
        measures = _judge(fitted.model, prepared.held_out, device)
        found = _plain(training, prepared, fitted, measures, device)
        write_json(out / METRICS, found)
        training_report.render(found, out / REPORT)
        model_folder.write_about(
            training, prepared.train, out, data=found["data"], accuracy=measures.accuracy, commit=found["commit"]
        )
        shutil.rmtree(out / CHECKPOINT, ignore_errors=True)
    return found


def _fit(
    training: Training,
    prepared: Prepared,
    out: Path,
    device: torch.device | str,
    checkpoint_seconds: float,
    progress: Progress,
) -> Fitted:
    def watch(model: nn.Module, epoch: int) -> Mapping[str, float]:
        measures = _judge(model, prepared.held_out, device)
        return {"held-out accuracy": measures.accuracy, "held-out loss": measures.loss}

    return fit(
        prepared.train.to(device),
        network_of(training, prepared.train),
        recipe=training.recipe,
        defenses=[*([] if training.defense is None else [training.defense]), _SeededLayers()],
        streams=Streams(training.seed),
        watch=watch,
        checkpoint=out / CHECKPOINT,
        checkpoint_seconds=checkpoint_seconds,
        progress=progress,
    )


def _judge(model: nn.Module, data: LabeledImages, device: torch.device | str) -> Measures:
    c, h, w = data.shape
    batch = min(1000, max(1, JUDGED_AT_ONCE // (c * h * w)))
    return measure(probabilities(model, data.x, device=device, batch=batch), data.y.cpu(), data.classes)


def _plain(
    training: Training, prepared: Prepared, fitted: Fitted, measures: Measures, device: torch.device | str
) -> dict[str, Any]:
    """Everything that is known of a finished training, as plain JSON values."""
    train, held_out = prepared.train, prepared.held_out
    return {
        "format": FORMAT,
        "settings": plain_value(training),
        "defended": training.defense is not None,
        "data": {
            "name": train.name,
            "classes": list(train.classes),
            "shape": list(train.shape),
            "train": len(train),
            "held out": len(held_out),
            "judged on": prepared.judged_on,
            "skipped": len(prepared.skipped),
            "train fingerprint": train.fingerprint,
            "held out fingerprint": held_out.fingerprint,
        },
        "skipped": list(prepared.skipped),
        "measures": asdict(measures),
        "history": [dict(line) for line in fitted.history],
        "parameters": sum(parameter.numel() for parameter in fitted.model.parameters()),
        "seconds": round(fitted.seconds, 3),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }


def _job(out: Path) -> dict[str, str] | None:
    """The settings of the training that a folder holds, flat; None for one that is empty or not there.

    Raises:
        ValueError: it holds something else.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose a folder with --out")
    if not out.exists() or not [entry for entry in out.iterdir() if not entry.name.endswith(".tmp")]:
        return None
    try:
        job = json.loads((out / JOB).read_text(encoding="utf-8"))
        if job["format"] == FORMAT:
            return dict(facts(job["settings"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{out} holds something else: choose another folder with --out")


def _refuse_other(training: Training, theirs: Mapping[str, str], out: Path) -> None:
    """Raise ``ValueError`` for a training with other settings, naming the first."""
    ours = dict(facts(json.loads(json.dumps(plain_value(training)))))
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{out} holds a training with {name} {theirs.get(name, 'not set')}, here it is "
                f"{ours.get(name, 'not set')}: choose another folder with --out, or start over with --fresh"
            )
