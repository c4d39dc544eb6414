"""Surrogates of staggered ages, which the attacker trains himself, on clean data, one epoch at a time.

Source: MetaPoison (Huang et al., NeurIPS 2020) and its authors' code: plain SGD on shuffled minibatches, without
augmentation or weight decay, at a learning rate that rises linearly in the first epochs. The k-th starts at an age of
``k * stagger`` epochs; one that has reached the last age begins anew, with new weights.

Nothing here depends on the poisons, and everything random on the surrogate, its generation and its age.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional as F

from friends.attacks.halfway import State
from friends.attacks.surrogate import Surrogate
from friends.attacks.unrolling import Functional, Minibatch
from friends.data.images import LabeledImages
from friends.types import Streams


@dataclass(frozen=True, kw_only=True)
class Schooling:
    """How the surrogates are trained.

    Args:
        surrogates: how many there are.
        stagger: epochs between the ages of two of them.
        lr: learning rate after the warm-up.
        warmup: epochs in which the learning rate rises to it.
        batch: images per step.
        batch_statistics: by what an unrolled step normalises, as for :class:`Functional`.
    """

    surrogates: int
    stagger: int
    lr: float
    warmup: int
    batch: int
    batch_statistics: bool

    def __post_init__(self) -> None:
        for name in ("surrogates", "stagger", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.lr < float("inf") or self.warmup < 0:
            raise ValueError(f"lr > 0 and warmup >= 0 expected, not {self.lr} and {self.warmup}")

    @property
    def last_age(self) -> int:
        """The age at which a surrogate begins anew."""
        return self.surrogates * self.stagger

    def lr_at(self, age: int) -> float:
        """The learning rate of a surrogate that was trained for ``age`` epochs."""
        return self.lr * min(1.0, (age + 1) / self.warmup) if self.warmup else self.lr


class Staggered:
    """The surrogates, all of age 0 at first.

    Args:
        train: the clean data.
        surrogate: where untrained networks come from; each is copied.
        streams: ``("order", surrogate, generation, age)`` are drawn from.
    """

    def __init__(self, schooling: Schooling, train: LabeledImages, surrogate: Surrogate, streams: Streams) -> None:
        self.schooling, self.train, self.surrogate, self.streams = schooling, train, surrogate, streams
        self.ages = [0] * schooling.surrogates
        self.generations = [0] * schooling.surrogates
        self.nets = [self._new(k) for k in range(schooling.surrogates)]

    def lr(self, k: int) -> float:
        """The present learning rate of surrogate ``k``."""
        return self.schooling.lr_at(self.ages[k])

    def minibatches(self, k: int) -> Sequence[Int64[Tensor, " _"]]:
        """The rows of the minibatches of its coming epoch; the last may be short."""
        generator = self.streams("order", k, self.generations[k], self.ages[k])
        return torch.randperm(len(self.train), generator=generator).split(self.schooling.batch)

    def shown(self, k: int, rows: Int64[Tensor, " b"]) -> Minibatch:
        """Clean images and their labels, where and as surrogate ``k`` takes them."""
        there, here = next(iter(self.nets[k].weights.values())), rows.to(self.train.device)
        return self.train.pixels(here).to(there), self.train.y[here].to(there.device)

    def learn(self, k: int, rows: Int64[Tensor, " b"]) -> None:
        """One step of SGD on the clean images of a minibatch."""
        x, y = self.shown(k, rows)
        weights = list(self.nets[k].weights.values())
        gradients = torch.autograd.grad(F.cross_entropy(self.nets[k].learning(x), y), weights, materialize_grads=True)
        lr = self.lr(k)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(gradient, alpha=lr)

    def grow(self, k: int) -> None:
        """An epoch of surrogate ``k`` is over: it is a year older, or, at the last age, new."""
        self.ages[k] += 1
        if self.ages[k] == self.schooling.last_age:
            self.ages[k] = 0
            self.generations[k] += 1
            self.nets[k] = self._new(k)

    def _new(self, k: int) -> Functional:
        index = k + self.schooling.surrogates * self.generations[k]
        model = copy.deepcopy(self.surrogate(self.train, index=index, epochs=0))
        return Functional(model, batch_statistics=self.schooling.batch_statistics)

    def state(self) -> State:
        """Everything that :meth:`restore` needs: all weights and statistics, ages and generations."""
        tensors = {
            f"surrogate-{k:03d}.{name}": tensor
            for k, net in enumerate(self.nets)
            for name, tensor in net.model.state_dict().items()
        }
        return tensors, {"ages": self.ages, "generations": self.generations}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, object]) -> None:
        """Go on where :meth:`state` was taken."""
        self.ages = list(cast("list[int]", numbers["ages"]))
        self.generations = list(cast("list[int]", numbers["generations"]))
        for k, net in enumerate(self.nets):
            names = net.model.state_dict()
            net.model.load_state_dict({name: tensors[f"surrogate-{k:03d}.{name}"] for name in names})
