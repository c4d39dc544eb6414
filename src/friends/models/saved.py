"""Our networks as files: safetensors with what is needed to build them again. Nothing in a file can run."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from friends.data.files import read_tensors, write_tensors
from friends.models.classifier import Classifier

FORMAT = "friends-model-1"


def save(model: Classifier, path: Path, *, name: str, width: int | None, classes: tuple[str, ...]) -> None:
    """Write a network that ``build(name, width=width)`` made, atomically.

    Args:
        model: the network; its weights are written as they are.
        path: where to; missing folders are made.
        name: a key of ``MODELS``.
        width: as given to ``build``.
        classes: class names in the order of the logits.
    """
    header = {"format": FORMAT, "name": name, "width": width, "shape": model.shape, "classes": classes}
    write_tensors(path, model.state_dict(), header)


def load(path: Path) -> tuple[Classifier, str]:
    """Read a network, on the CPU, in eval mode, and the name it was built by.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is torn, foreign, or does not hold the network that it says.
    """
    from friends.models import build  # the table of names is built from this package's files

    tensors, header = read_tensors(path)
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a model of ours: format {header.get('format')!r}")
    try:
        c, h, w = cast("list[int]", header["shape"])
        name = str(header["name"])
        model = build(
            name,
            shape=(c, h, w),
            classes=len(cast("list[str]", header["classes"])),
            moments=((0.0,) * c, (1.0,) * c),
            width=cast("int | None", header["width"]),
            generator=torch.Generator().manual_seed(0),
        )
        model.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the network that it says: {error}") from error
    return model.eval(), name
