"""What the filters share: the features of a probe, the number of poisons to expect, and how rows are taken out.

A filter trains an undefended *probe* on all the data, poisons and all, looks at its penultimate features, clears the
rows of ``run.keep`` that it takes for poisons, and leaves the training that follows alone. All filters ask for the same
probe, so trainings that name one folder of probes train it once between them.
"""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from friends.data.images import LabeledImages
from friends.modules import penultimate, still
from friends.training.defense import Run
from friends.types import Progress, silent

CHUNK = 1000
"""Images in one forward pass through the probe."""


def check_budget(budget: float) -> None:
    """Raise ``ValueError`` unless the budget is a fraction that leaves something to keep."""
    if not 0 <= budget < 1:
        raise ValueError(f"budget is the expected share of poisons, in [0, 1), not {budget}")


def expected_poisons(budget: float, n: int) -> int:
    """How many of ``n`` images a budget is, rounded up, so that a small budget is not a filter that does nothing."""
    return math.ceil(budget * n - 1e-9)  # 0.07 * 100 is a little more than 7 in floating point


def probe_features(run: Run) -> Float[Tensor, "n d"]:
    """Train the shared probe, or find it ready-made, and return the features of all training images."""
    return features_of(run.probe(), run.data, run.progress)


def features_of(model: nn.Module, data: LabeledImages, progress: Progress = silent) -> Float[Tensor, "n d"]:
    """The penultimate features of un-augmented images, in eval mode and float32, chunk by chunk.

    Args:
        model: takes pixels in [0, 1], and is on the device of the data; its modes are put back.
        data: at least one image.
        progress: told about every chunk.

    Raises:
        FloatingPointError: a feature is not finite (the first such row is named).
    """
    parts: list[Tensor] = []
    with still([model], freeze=True, device=data.device), torch.no_grad():
        for idx in torch.arange(len(data), device=data.device).split(CHUNK):
            x = data.pixels(idx).contiguous(memory_format=torch.channels_last)
            parts.append(penultimate(model, x).flatten(1).float())
            progress("features", min(len(parts) * CHUNK, len(data)), len(data))
    features = torch.cat(parts)
    odd = (~features.isfinite().all(1)).nonzero()
    if len(odd):
        raise FloatingPointError(f"the probe's features of row {int(odd[0])} are not finite: lower lr")
    return features


def remove(run: Run, judged: Bool[Tensor, " n"], title: str) -> None:
    """Train on no row that was judged to be a poison, but never leave a class without its last images.

    A class of which every image would go is kept whole: the judgement says nothing about which of them are poisons,
    and a model that has never seen a class is no defended model. A warning says so, unless the class is one image.

    Args:
        run: its ``keep`` is narrowed; rows that other filters cleared stay cleared.
        judged: the rows taken for poisons.
        title: of the defense, for the warning.
    """
    y, classes = run.data.y, run.data.classes
    before = torch.bincount(y[run.keep], minlength=len(classes))
    after = torch.bincount(y[run.keep & ~judged], minlength=len(classes))
    spared = (before > 0) & (after == 0)
    run.keep = run.keep & (~judged | spared[y])
    for c in (spared & (before > 1)).nonzero().flatten().tolist():
        warnings.warn(
            f"{title} takes all {int(before[c])} images of class {classes[c]!r} that are left for poisons: they are "
            "kept; its settings expect more poisons than fit this class",
            stacklevel=2,
        )
