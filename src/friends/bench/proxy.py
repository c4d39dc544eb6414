"""Friendly noise as an artifact: train a cheap proxy for a few epochs, and make the noise of a data set with it.

Source: Algorithm 1 of the FRIENDS paper, whose first lines train the model for a few epochs (with random noise only,
Algorithm 2), and Table 6, where the noise of one architecture protects another.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from friends import models
from friends.data import sources
from friends.data.files import owned
from friends.data.images import LabeledImages
from friends.defenses.friends import Friends
from friends.models.saved import load
from friends.noise.coding import Coding, check_coding
from friends.noise.grey import grey_limit
from friends.noise.manifest import NAME
from friends.noise.store import NoiseStore
from friends.training.evaluate import accuracy
from friends.training.fit import fit
from friends.training.recipe import RECIPES
from friends.types import Progress, Streams, silent


@dataclass(frozen=True, kw_only=True)
class StoreJob:
    """Everything that decides what is in a store.

    Args:
        source: the data set, as ``friends.data.sources.load`` takes it; its training part gets noise.
        defense: bound and settings of the noise, and the random noise that the proxy is trained with.
        model: the proxy network's name, and ``width`` its width.
        epochs: how long the proxy is trained, at learning rate ``lr``.
        weights: a saved model to use as the proxy, instead of training one.
        seed: everything random follows from it.
        size: side to which images of mixed sizes are resized.
        coding: how the noise is kept; see :mod:`friends.noise.coding`.
    """

    source: str
    defense: Friends
    model: str = "resnet18"
    width: int | None = None
    epochs: int = 5
    lr: float = 0.1
    weights: Path | None = None
    seed: int = 0
    size: int | None = None
    coding: Coding = "int8"


def make_store(
    job: StoreJob,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    download: bool = False,
    progress: Progress = silent,
) -> NoiseStore:
    """Make a store, or what is missing of it: the proxy resumes by epoch, the noise by shard.

    While it is under way the proxy's training is in a hidden folder beside ``out``.

    Raises:
        ValueError: the settings, the data, the proxy's weights or an existing folder do not fit; says what and why,
            before the proxy is trained.
    """
    out = Path(os.path.abspath(out))
    settings = replace(job.defense.settings, zeta=job.defense.zeta)
    grey_limit(settings.zeta)
    check_coding(job.coding, settings.method)
    if job.epochs < 0:
        raise ValueError(f"epochs is a number >= 0, not {job.epochs}")
    if out.exists() and not (out / NAME).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty and no noise store; choose another folder")
    train = sources.load(job.source, size=job.size, download=download, progress=progress)[0].to(device)
    work = out.with_name(f".{out.name}.proxy-{hashlib.sha256(repr(job).encode()).hexdigest()[:8]}")
    work.mkdir(parents=True, exist_ok=True)
    with owned(work):
        proxy, name = _proxy(job, train, work, progress)
        store = NoiseStore.generate(
            proxy.to(device), train, out, settings=settings, seed=job.seed, proxy=name, coding=job.coding,
            progress=progress,
        )  # fmt: skip
    shutil.rmtree(work, ignore_errors=True)
    return store


def _proxy(job: StoreJob, train: LabeledImages, work: Path, progress: Progress) -> tuple[nn.Module, str]:
    """The network that the noise is made with, and what the store calls it."""
    if job.weights is not None:
        model, name = load(job.weights)
        if model.shape != train.shape:
            raise ValueError(f"{job.weights} is a network for images {model.shape}, the data are {train.shape}")
        return model, f"{name} from {job.weights.name}"

    def make(generator: torch.Generator) -> nn.Module:
        return models.build(
            job.model,
            shape=train.shape,
            classes=len(train.classes),
            moments=train.moments,
            width=job.width,
            generator=generator,
        )

    recipe = replace(RECIPES["scratch"], lr=job.lr).first(job.epochs)  # the first epochs of a long training
    fitted = fit(
        train,
        make,
        recipe=recipe,
        defenses=[replace(job.defense, zeta=0.0)],  # random noise only
        streams=Streams(job.seed).child("proxy"),
        checkpoint=work,
        progress=progress,
        what="proxy",
    )
    right = accuracy(fitted.predictor, train).strict
    if job.epochs > 0 and right < 1.2 / len(train.classes):
        warnings.warn(
            f"the proxy is right on only {100 * right:.0f} % of its training images: its noise cannot know what "
            f"matters in them. Train it longer, or with another learning rate than {job.lr:g}.",
            stacklevel=2,
        )
    width = "" if job.width is None else f" of width {job.width}"
    return fitted.model, f"{job.model}{width}, {job.epochs} epochs, right on {100 * right:.0f} % of these images"
