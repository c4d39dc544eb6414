"""Words that every part of the house shares: named random streams, and how long work reports its progress.

Nothing here imports anything else of ours.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

ABSTAIN = -1
"""A prediction that is no class: the predictor refuses to answer (STRIP)."""


@dataclass(frozen=True)
class Streams:
    """Independent, named random streams that all follow from one seed.

    ``streams("order", 3)`` always starts the same generator, whatever was drawn elsewhere. Two trainings on one
    seed therefore share initial weights, batch order and augmentation even if only one of them draws noise, and a
    training that resumes at epoch 3 needs no stored generator state. The global generator is never touched.

    Args:
        seed: any integer; different seeds give unrelated streams.
    """

    seed: int

    def __call__(self, *name: str | int, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator on ``device`` for the stream called ``name``, e.g. ``("augment", epoch)``."""
        return torch.Generator(device=device).manual_seed(self.integer(*name))

    def integer(self, *name: str | int) -> int:
        """The 63-bit seed of the stream ``name``, for generators that are not torch's."""
        digest = hashlib.blake2b(repr((self.seed, name)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def child(self, *name: str | int) -> Streams:
        """A family of streams of its own, for a part that names streams itself (the k-th surrogate, say)."""
        return Streams(self.integer("child", *name))


@runtime_checkable
class Progress(Protocol):
    """How long work says how far it is. Called often; must be cheap.

    It may raise to stop the work, as Ctrl-C would: what was checkpointed stays, and the same call goes on with it.
    """

    def __call__(self, what: str, done: int, total: int, note: str = "", /) -> None: ...


def silent(what: str, done: int, total: int, note: str = "", /) -> None:
    """A ``Progress`` that says nothing."""
