"""Friendly noise as an artifact: train a cheap proxy for a few epochs, and make the noise of a data set with it.

Source: Algorithm 1 of the FRIENDS paper, whose first lines train the model for a few epochs (with random noise only,
Algorithm 2), and Table 6, where the noise of one architecture protects another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from friends import models
from friends.data import sources
from friends.data.images import LabeledImages
from friends.defenses.friends import Friends
from friends.models.saved import load
from friends.noise.store import NoiseStore
from friends.training.fit import RECIPES, fit
from friends.types import Progress, Streams, silent


@dataclass(frozen=True, kw_only=True)
class StoreJob:
    """Everything that decides what is in a store.

    Args:
        source: the data set, as ``friends.data.sources.load`` takes it; its training part gets noise.
        defense: bound, settings and the random noise that the proxy is trained with.
        steps: SGD steps per image.
        model: the proxy network's name, and ``width`` its width.
        epochs: how long the proxy is trained.
        weights: a saved model to use as the proxy, instead of training one.
        seed: everything random follows from it.
        size: side to which images of mixed sizes are resized.
    """

    source: str
    defense: Friends
    steps: int = 20
    model: str = "resnet18"
    width: int | None = None
    epochs: int = 5
    weights: Path | None = None
    seed: int = 0
    size: int | None = None


def make_store(
    job: StoreJob, out: Path, *, device: torch.device | str = "cpu", progress: Progress = silent
) -> NoiseStore:
    """Make a store, or what is missing of it: the proxy resumes by epoch, the noise by shard.

    Raises:
        ValueError: the data, the proxy's weights or an existing store in ``out`` do not fit; says what and why.
    """
    progress("data", 0, 1, job.source)
    train = sources.load(job.source, size=job.size)[0].to(device)
    progress("data", 1, 1, job.source)
    proxy, name = _proxy(job, train, out, progress)
    settings = replace(job.defense.settings, zeta=job.defense.zeta, steps=job.steps)
    return NoiseStore.generate(
        proxy.to(device), train, out, settings=settings, seed=job.seed, proxy=name, progress=progress
    )


def _proxy(job: StoreJob, train: LabeledImages, out: Path, progress: Progress) -> tuple[nn.Module, str]:
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

    fitted = fit(
        train,
        make,
        recipe=replace(RECIPES["scratch"], epochs=job.epochs, drops=()),  # the first epochs of a long training
        defenses=[replace(job.defense, zeta=0.0)],  # random noise only
        streams=Streams(job.seed).child("proxy"),
        checkpoint=out.with_name(f".{out.name}.proxy"),
        progress=progress,
        what="proxy",
    )
    return fitted.model, f"{job.model}{f'-w{job.width}' if job.width else ''}, {job.epochs} epochs"
