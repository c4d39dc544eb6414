"""Loaders: the one that reads, inside of whatever wraps it, and the same again with another data set."""

from __future__ import annotations

import copy
from collections.abc import Sized
from typing import Any, cast

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from friends.loaders.images import Moments
from friends.loaders.protected import Protected
from friends.loaders.structure import data_sets
from friends.noise.dataset import NoisyDataset

Loader = Any
"""A ``DataLoader`` of any subclass, or what wraps one: timm's prefetcher, a loader that Accelerate prepared."""

_WRAPS = ("base_dataloader", "loader")


def inner_loader(loader: Loader) -> DataLoader[Any]:
    """The ``DataLoader`` that reads the data set.

    Raises:
        TypeError: there is none, or its data set has no rows.
        ValueError: it is protected already.
    """
    name = _wrapped(loader)
    if name is not None:
        return inner_loader(getattr(loader, name))
    if not isinstance(loader, DataLoader):
        raise TypeError(f"a DataLoader is needed, not {type(loader).__name__}: the data set is wrapped inside of it")
    dataset = cast("DataLoader[Any]", loader).dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(f"{type(dataset).__name__} has no rows that noise could be made for once: it must have "
                        "len(dataset) and dataset[i]")  # fmt: skip
    if any(isinstance(inside, Protected | NoisyDataset) for inside in data_sets(dataset)):
        raise ValueError("the data set is protected already: noise would be added twice")
    if not len(cast(Sized, dataset)):
        raise ValueError("there is no image in the data set")
    return cast("DataLoader[Any]", loader)


def with_data(loader: Loader, data: Protected) -> Loader:
    """The same loader (class, samplers, workers, collation, what wraps it) over another data set."""
    other = copy.copy(loader)
    name = _wrapped(loader)
    if name is not None:
        setattr(other, name, with_data(getattr(loader, name), data))
        return other
    # a DataLoader refuses to be given another data set, lest its sampler not fit; this one is as long
    other.__dict__["dataset"] = data
    other.__dict__["_iterator"] = None
    return other


def prefetched(loader: Loader) -> Moments | None:
    """What a prefetcher like timm's normalises with behind the loader: it holds mean and std times 255."""
    if isinstance(loader, DataLoader) or not hasattr(loader, "loader"):
        return None
    mean, std = getattr(loader, "mean", None), getattr(loader, "std", None)
    if not isinstance(mean, torch.Tensor) or not isinstance(std, torch.Tensor):
        return prefetched(loader.loader)
    return tuple((mean.float().flatten() / 255).tolist()), tuple((std.float().flatten() / 255).tolist())


def may_repeat(loader: DataLoader[Any]) -> bool:
    """Whether a row may come twice in an epoch: whether it may not is known of torch's own samplers only."""
    sampler: Any = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    if type(sampler) is RandomSampler:
        return sampler.replacement or (sampler.num_samples > len(loader.dataset))  # pyright: ignore[reportArgumentType]
    return type(sampler) not in (SequentialSampler, DistributedSampler)


def _wrapped(loader: Loader) -> str | None:
    """The name of the attribute that holds the loader inside this one."""
    return next((name for name in _WRAPS if _holds_loader(getattr(loader, "__dict__", {}).get(name))), None)


def _holds_loader(thing: object) -> bool:
    return thing is not None and (isinstance(thing, DataLoader) or _wrapped(thing) is not None)
