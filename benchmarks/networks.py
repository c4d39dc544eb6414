"""The images and the trained networks that benchmarks measure on, kept between runs in ``benchmarks/.cache``."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from friends.data import sources
from friends.data.images import LabeledImages
from friends.models import Classifier, build
from friends.models.saved import load, save
from friends.training.evaluate import accuracy
from friends.training.fit import fit
from friends.training.recipe import Recipe
from friends.types import Streams

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"
NETWORKS = {"convnet": 16, "resnet18": 16}
"""Name and width."""

TRAIN, EPOCHS, SEED = 15_000, 3, 0
"""Images and epochs that the networks are trained for, about one epoch of CIFAR-10: minutes, not a good network."""


def images(data: str | Path | None = None) -> tuple[LabeledImages, LabeledImages]:
    """Training and test images: CIFAR-10 from ``data`` or ``$FRIENDS_CIFAR10``, else the embedded digits.

    Args:
        data: anything that ``friends.data.sources.load`` takes.
    """
    source = data or os.environ.get("FRIENDS_CIFAR10")
    if source is None:
        shared = HERE.parents[1] / "shared" / "data" / "cifar10-jpeg"
        source = shared if shared.is_dir() else "digits"
    train, test = sources.load(source)
    if source == "digits":
        print("No CIFAR-10: set FRIENDS_CIFAR10 to a folder of it. Measured on 28x28 digits, whose numbers differ.")
    few = Streams(SEED)
    return train.sample(min(TRAIN, len(train)), few("train")), test.sample(min(1000, len(test)), few("test"))


def trained(name: str, train: LabeledImages, test: LabeledImages, *, epochs: int = EPOCHS) -> Classifier:
    """A network of :data:`NETWORKS`, trained for a few epochs or found where an earlier run left it."""
    file = CACHE / f"{name}-{NETWORKS[name]}-{epochs}-{train.fingerprint[:12]}.safetensors"
    if file.is_file():
        return load(file)[0]
    print(f"Training {name} of width {NETWORKS[name]} on {len(train)} images of {train.name} ...", flush=True)

    def make(generator: torch.Generator) -> nn.Module:
        return build(name, shape=train.shape, classes=len(train.classes), moments=train.moments,
                     width=NETWORKS[name], generator=generator)  # fmt: skip

    recipe = Recipe(epochs=epochs, lr=0.05, drops=(2 / 3,))
    fitted = fit(train, make, recipe=recipe, streams=Streams(SEED))
    model = fitted.model
    assert isinstance(model, Classifier)
    print(f"... right on {100 * accuracy(fitted.predictor, test).strict:.0f} % of the test images.", flush=True)
    save(model, file, name=name, width=NETWORKS[name], classes=train.classes)
    return load(file)[0]


def without_normalisation(model: nn.Module) -> None:
    """Put every batch normalisation of a network in eval mode into the convolution that stands before it, in place.

    For our own networks, whose layers stand in the order in which they run.
    """
    for parent in list(model.modules()):
        last: tuple[str, nn.Conv2d] | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and last is not None:
                setattr(parent, last[0], fuse_conv_bn_eval(last[1], child))
                setattr(parent, name, nn.Identity())
            last = (name, child) if isinstance(child, nn.Conv2d) else None
