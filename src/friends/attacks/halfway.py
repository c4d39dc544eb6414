"""A crafting in progress on disk: killed anywhere, it goes on where it last saved, to the same poisons.

Every loop of an attack that takes long keeps its state as named tensors and a few plain numbers, and offers them
after every step; they are written when enough time has passed since the last time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from friends.data.files import read_tensors, write_tensors
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal
from friends.data.triggers import trigger_to_file
from friends.types import Streams

SECONDS = 5.0
"""How long a loop works between two writings of its state."""

State = tuple[dict[str, Tensor], dict[str, object]]
"""Named tensors, and plain JSON values."""


class Halfway:
    """Where one loop keeps its state; without a folder nothing is kept.

    Args:
        folder: made if needed; None to keep nothing.
        identity: what makes this crafting this one and no other, from :func:`identity_of`.
        name: the loop's own file, for attacks that have several.

    Raises:
        ValueError: the file is torn, or holds the state of another crafting. Make this before long work.
    """

    def __init__(self, folder: Path | None, identity: str, *, name: str = "craft") -> None:
        self.file = None if folder is None else folder / f"{name}.safetensors"
        self.identity = identity
        self._last = time.monotonic()
        self._slowness = 1.0
        self.load()

    def load(self, device: torch.device | str = "cpu") -> State | None:
        """The state that was last written, tensors on ``device``; None if there is none."""
        if self.file is None or not self.file.exists():
            return None
        tensors, header = read_tensors(self.file)
        if header.get("identity") != self.identity:
            raise ValueError(
                f"{self.file} holds another crafting: other data, goal, settings or seed. Delete it, or choose "
                "another folder."
            )
        numbers = cast("dict[str, object]", header["numbers"])
        return {name: tensor.to(device) for name, tensor in tensors.items()}, numbers

    def offer(self, state: Callable[[], State], *, force: bool = False) -> None:
        """Write ``state()`` if :data:`SECONDS` have passed since the last time, or if forced.

        A state that takes longer than a twentieth of that to write is written as much more rarely.
        """
        begun = time.monotonic()
        if self.file is None or (not force and begun - self._last < SECONDS * self._slowness):
            return
        tensors, numbers = state()
        write_tensors(self.file, tensors, {"identity": self.identity, "numbers": numbers})
        self._last = time.monotonic()
        self._slowness = max(1.0, 20 * (self._last - begun) / max(SECONDS, 1e-9))


def identity_of(attack: object, train: LabeledImages, goals: list[Goal], streams: list[Streams]) -> str:
    """A hash of what the poisons follow from: attack, data, goals and seeds. Surrogates are not in it.

    (They follow from the same in a trial, which keeps every crafting in a folder of its own. Whoever trains surrogates
    in another way must choose another folder.)
    """
    sha = hashlib.sha256(repr((attack, [s.seed for s in streams], train.fingerprint)).encode())
    for goal in goals:
        held, named = trigger_to_file(goal.trigger)
        sha.update(repr(sorted(named.items())).encode())
        parts = {"x": goal.x, "true": goal.y_true, "wanted": goal.y_wanted, "bases": goal.bases, **held}
        for name, tensor in parts.items():
            if tensor is not None:
                sha.update(f"{name}{tuple(tensor.shape)}".encode())
                sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:32]
