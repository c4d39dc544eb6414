"""From the images in memory to a batch that a network takes: both noises, flip and shift, no network.

A loop over single images, as the released code has it, beside whole batches, as :func:`friends.training.fit` makes
them: bytes to pixels, friendly noise and clip, Bernoulli noise, bilinear flip and shift, channels last. Nothing is
compiled, and nothing is left out: every batch draws from generators of its own, as a training that can be resumed must.

    python benchmarks/input_pipeline.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from generation import Rows, row
from interleaved import Spread, interleaved
from networks import images
from released import Images, Moments, loader, pil_images
from torch import Tensor, nn

from friends import Friends
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.noise.random import random_noise, signs
from friends.training.defense import Run
from friends.training.recipe import Recipe
from friends.types import Streams

BATCH = 128
RELEASED = "the released code, image by image"
FULL = "FRIENDS: both noises, flip and shift"


class Batches:
    """The batches of one epoch, as the training makes them.

    Args:
        data: the images.
        noise: int8 grey levels of each.
    """

    def __init__(self, data: LabeledImages, noise: Tensor) -> None:
        self.data, self.augment, self.streams, self.defense = data, Augment(), Streams(0), Friends()
        self.order = torch.randperm(len(data), generator=self.streams("order"))
        model = nn.Linear(1, 1)
        self.run = Run(data=data, model=model, optimizer=torch.optim.SGD(model.parameters()), recipe=Recipe(),
                       schedule=float, streams=self.streams, epochs=1, keep=torch.ones(len(data), dtype=torch.bool),
                       probe=lambda **_: model, _memory={0: {"friendly": noise}},
                       _defenses=(self.defense,))  # fmt: skip

    def __call__(self, *, defended: bool, augmented: bool = True) -> int:
        generator, values = self.streams("augment", 0), 0
        for step, idx in enumerate(self.order.split(BATCH)):
            self.run.step = step
            x = self.data.pixels(idx)
            if defended:
                x = self.defense.pixels(x, idx, self.run)
            if augmented:
                x = self.augment(x, generator, self.data.moments[0])
            values += x.contiguous(memory_format=torch.channels_last).numel()
        return values


def jobs(data: LabeledImages) -> dict[str, Callable[[], object]]:
    """The same images in every job."""
    levels = torch.Generator().manual_seed(0)
    noise = torch.randint(-16, 17, data.x.shape, generator=levels, dtype=torch.int8)
    theirs = Images(pil_images(data), data.y.tolist(), Moments(*map(list, data.moments)), friendly=noise.float() / 255)
    batches = Batches(data, noise)
    return {
        RELEASED: lambda: sum(len(x) for x, _, _ in loader(theirs)),
        FULL: lambda: batches(defended=True),
        "undefended: flip and shift": lambda: batches(defended=False),
        "FRIENDS, neither flip nor shift": lambda: batches(defended=True, augmented=False),
        "undefended, neither flip nor shift": lambda: batches(defended=False, augmented=False),
    }


def bernoulli(shape: tuple[int, ...], rounds: int) -> Rows:
    """Random noise alone: as its definition says, and from packed bits."""
    generator, x, times = torch.Generator().manual_seed(0), torch.zeros(BATCH, *shape), 40
    ways: dict[str, Callable[[], object]] = {
        "a random number for every value": lambda: 2 * torch.randint(2, x.shape, generator=generator) - 1,
        "signs from 64-bit words": lambda: signs(x.shape, generator),
        "signs from 64-bit words, as float32 of strength mu": lambda: random_noise(x, "bernoulli", 16 / 255, generator),
    }
    timings = interleaved({name: lambda way=way: [way() for _ in range(times)] for name, way in ways.items()},
                          rounds=rounds)  # fmt: skip
    rows: Rows = []
    for name in ways:
        each = Spread(*(1e6 * s / BATCH / times for s in timings.seconds(name)))
        rows.append(row(f"Bernoulli noise: {name}", each, "us per image", "<= 4" if "words" in name else ""))
    return rows


def measure(quick: bool = False, data: str | Path | None = None) -> Rows:
    """Every number; half a minute."""
    train, _ = images(data)
    few = train.rows(torch.arange(BATCH * (2 if quick else 20)))
    large = torch.zeros(8 * 2**20)  # as a training has: from then on the allocator keeps what a batch gives back
    del large
    rounds = 2 if quick else 9
    timings = interleaved(jobs(few), rounds=rounds)
    rows: list[dict[str, Any]] = []
    for name in timings.cpu:
        low, median, high = (len(few) / s for s in reversed(timings.seconds(name)))
        target = ">= 30000" if name == FULL else ""
        rows.append(row(name, Spread(low, median, high), "images/s per core", target))
    rows.append(row(f"{FULL}, times faster than the released code", timings.faster(FULL), "x"))
    return rows + bernoulli(train.shape, rounds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for found in measure():
        print(f"{found['name']:60} {found['value']:10.4g} ({found['low']:.4g}-{found['high']:.4g}) {found['unit']:18} "
              f"{found['target']}")  # fmt: skip
