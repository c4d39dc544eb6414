"""Networks that take pixels in [0, 1]: the table of their names, and what makes a transfer victim of one.

A new network is a function from image shape and width to a :class:`Body`, and a row in :data:`MODELS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch

from friends.models.classifier import BatchNorm, Body, Classifier, Normalize, drawing_from, finetune, transfer
from friends.models.resnet import resnet18
from friends.models.small import alexnet, convnet, lenet, tiny

__all__ = [
    "MODELS",
    "BatchNorm",
    "Body",
    "Builder",
    "Classifier",
    "Normalize",
    "build",
    "finetune",
    "transfer",
]

Builder = Callable[..., Body]
"""``builder(shape, width=...)``: the body of a network for images ``(c, h, w)``; ``width`` has a default."""

MODELS: dict[str, Builder] = {
    "resnet18": resnet18,
    "alexnet": alexnet,
    "lenet": lenet,
    "convnet": convnet,
    "tiny": tiny,
}


def build(
    name: str,
    *,
    shape: tuple[int, int, int],
    classes: int,
    moments: tuple[tuple[float, ...], tuple[float, ...]],
    generator: torch.Generator,
    width: int | None = None,
) -> Classifier:
    """A new network with random weights, on the CPU, in training mode.

    Args:
        name: a key of :data:`MODELS`.
        shape: ``(c, h, w)`` of the images.
        classes: number of classes.
        moments: per-channel mean and standard deviation of the training pixels in [0, 1]
            (``LabeledImages.moments``).
        generator: where the weights are drawn from, and nowhere else: the same state gives the same weights, and
            the global generator stays as it is.
        width: channels of the first layer; each network's own default if None.

    Raises:
        ValueError: the name is unknown, or shape, classes, moments or width make no network of this kind.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(MODELS)}"
        raise ValueError(f"unknown model {name!r}; {hint}")
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"an image shape (c, h, w) expected, not {shape}")
    if classes < 1 or (width is not None and width < 1):
        raise ValueError(f"at least one class and a width of at least 1 expected, not {classes} and {width}")
    with drawing_from(generator):
        body = MODELS[name](shape) if width is None else MODELS[name](shape, width=width)
        return Classifier(body, shape=shape, classes=classes, moments=moments)
