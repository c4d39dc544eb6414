"""What an attacker may train: the one thing that attacks are handed besides data and a goal."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from friends.data.images import LabeledImages
from friends.noise.random import RandomNoise


@runtime_checkable
class Surrogate(Protocol):
    """Train me a model as the victim would: what a gray-box attacker can do. Built by the benchmark from ``fit``.

    In transfer learning it returns the pretrained network whose features the victim will use.

    Args:
        data: what to train on; Sleeper Agent passes its current poisons, everyone else the clean set.
        index: which of many; each has its own initial weights and batch order, none those of a victim.
        epochs: how far to train; None is the whole recipe. MetaPoison staggers its surrogates by this.
        start: continue from this model instead of a new one; it is left as it was.
        noise: distribution and strength of random noise to train with, for attackers who expect it of the victim.
    """

    def __call__(
        self,
        data: LabeledImages,
        *,
        index: int = 0,
        epochs: int | None = None,
        start: nn.Module | None = None,
        noise: tuple[RandomNoise, float] | None = None,
    ) -> nn.Module: ...
