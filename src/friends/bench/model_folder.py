"""A trained model as a folder: its weights, and in plain JSON all that is needed to use them. Nothing in it can run.

``model.safetensors`` holds numbers only. ``model.json`` names the network by a name of ours, of torchvision or of timm;
where it is a function of the user's own, the path of this function is no more than a note: :func:`read` runs it only if
its caller names the same one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from friends.bench.provenance import versions
from friends.bench.training_settings import Training
from friends.bench.trial import plain_value
from friends.data.files import read_tensors, sha256_of, write_json, write_tensors
from friends.data.images import LabeledImages
from friends.models.named import is_import_path, network

FORMAT = "friends-trained-1"
WEIGHTS, ABOUT = "model.safetensors", "model.json"
MOST_JSON = 16 << 20
MOST_SIDE, MOST_WIDTH = 4096, 4096
"""More is taken for a forged file: it would fill the memory before the weights could say that they do not fit."""


@dataclass(frozen=True, eq=False)
class Saved:
    """A model that was read.

    Args:
        network: takes pixels in [0, 1], returns logits; on the CPU, in eval mode.
        name: what it was made by.
        shape: ``(c, h, w)`` of the images that it takes.
        classes: in the order of its logits.
        about: all of ``model.json``.
    """

    network: nn.Module
    name: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    about: Mapping[str, Any]


def write_weights(model: nn.Module, folder: Path) -> None:
    """Write the weights; equal weights give equal bytes."""
    write_tensors(folder / WEIGHTS, model.state_dict(), {"format": FORMAT})


def write_about(training: Training, train: LabeledImages, folder: Path, **more: object) -> None:
    """Write what belongs to weights that were written: with this file the folder is whole."""
    mean, std = train.moments
    about = {
        "format": FORMAT,
        "model": {"name": training.model.name, "width": training.model.width},
        "classes": list(train.classes),
        "shape": list(train.shape),
        "pixels": "in [0, 1]; the network's first layer normalises them",
        "normalisation": {"mean": list(mean), "std": list(std)},
        "resize": "shorter side to the height, bilinear with antialiasing, then the central square",
        "weights": {"file": WEIGHTS, "sha256": sha256_of(folder / WEIGHTS)},
        "defended": training.defense is not None,
        "seed": training.seed,
        "settings": plain_value(training),
        "versions": versions(),
        **more,
    }
    write_json(folder / ABOUT, about)


def read(folder: Path, *, model: str | None = None) -> Saved:
    """Read the model of a folder.

    Args:
        folder: what ``friends train`` left.
        model: the import path that the model was trained with, where it was one: naming it allows it to run.

    Raises:
        FileNotFoundError: there is no model in the folder.
        ValueError: a file is damaged or foreign, or the model is made by an import path that was not named.
        ModuleNotFoundError: the package that the network is from is not here.
    """
    about = _about(folder)
    try:
        made_by = cast("dict[str, Any]", about["model"])
        name, width = made_by["name"], made_by["width"]
        c, h, w = about["shape"]
        classes = about["classes"]
        expected = about["weights"]["sha256"]
        _check(name, width, (c, h, w), classes)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / ABOUT} is damaged: {error!r}") from error
    _allow(folder, name, model)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has {ABOUT}, but no {WEIGHTS}")
    if sha256_of(folder / WEIGHTS) != expected:
        raise ValueError(f"{folder / WEIGHTS} is not the file that {ABOUT} was written for: its sha256 is another")
    tensors, _ = read_tensors(folder / WEIGHTS)
    moments = ((0.0,) * c, (1.0,) * c)  # what it normalises with is among the weights
    with torch.random.fork_rng(devices=[]):
        made = network(name, shape=(c, h, w), classes=len(classes), moments=moments, width=width,
                       generator=torch.Generator().manual_seed(0))  # fmt: skip
    try:
        made.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit the network {name!r}: {error}") from error
    return Saved(made.eval(), name, (c, h, w), tuple(classes), about)


def _about(folder: Path) -> dict[str, Any]:
    file = folder / ABOUT
    if not file.is_file():
        what = f"{folder} has no {ABOUT}" if folder.is_dir() else f"there is no folder {folder}"
        raise FileNotFoundError(f"{what}: name a folder that friends train has finished")
    if file.stat().st_size > MOST_JSON:
        raise ValueError(f"{file} is damaged: it has {file.stat().st_size} bytes")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(about, dict) or cast("dict[str, Any]", about).get("format") != FORMAT:
        raise ValueError(f"{file} is not of a model that friends train has made")
    return cast("dict[str, Any]", about)


def _check(name: object, width: object, shape: tuple[object, ...], classes: object) -> None:
    """Raise ``ValueError`` for values that no training writes."""
    if not isinstance(name, str) or not (width is None or _whole(width, MOST_WIDTH)):
        raise ValueError(f"model {name!r} of width {width!r}")
    if shape[0] not in (1, 3) or not all(_whole(side, MOST_SIDE) for side in shape):
        raise ValueError(f"images of shape {shape!r}")
    if not isinstance(classes, list) or not all(isinstance(one, str) for one in cast("list[object]", classes)):
        raise ValueError("classes are a list of names")


def _whole(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _allow(folder: Path, name: str, model: str | None) -> None:
    """Raise ``ValueError`` unless a network may be made: a file alone never decides which code runs."""
    if is_import_path(name) and model != name:
        said = f", not {model!r}" if model else ""
        raise ValueError(
            f"the model in {folder} is made by the function {name!a}{said}, which would run here. If you trust it, "
            f"say so: --model {name!a}"
        )
    if model is not None and model != name:
        raise ValueError(f"the model in {folder} is {name!a}, not {model!r}")
