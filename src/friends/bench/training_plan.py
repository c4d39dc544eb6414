"""Before a training: its network tried on a few images, and its time and room estimated."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from friends.bench.training_settings import Prepared, Training
from friends.bench.tuning_plan import FRIENDLY_STEP
from friends.data.images import LabeledImages
from friends.models.named import network
from friends.modules import logits_of
from friends.training.fit import MakeModel, fit
from friends.types import Streams

JUDGING = 0.35
"""What judging an image costs, in training steps on it: a forward pass."""
MOMENT = 1.0
"""Seconds that may be spent to see how fast a training is, on a processor."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a training is going to cost.

    Args:
        parameters: of the network.
        seconds_per_epoch: with judging.
        noise_seconds: to make the friendly noise.
        bytes: of the images and their noise in memory.
        epochs: all of them.
    """

    parameters: int
    seconds_per_epoch: float
    noise_seconds: float
    bytes: int
    epochs: int

    def seconds(self, done: int = 0) -> float:
        """What is left after so many epochs; the noise is taken to be made by then."""
        return self.seconds_per_epoch * (self.epochs - done) + (0.0 if done else self.noise_seconds)


def network_of(training: Training, train: LabeledImages) -> MakeModel:
    """What makes the network of a training."""

    def make(generator: torch.Generator) -> nn.Module:
        return network(
            training.model.name,
            shape=train.shape,
            classes=len(train.classes),
            moments=train.moments,
            generator=generator,
            width=training.model.width,
        )

    return make


def look_ahead(training: Training, prepared: Prepared, device: torch.device | str = "cpu") -> Outlook:
    """Try the network, train it for a moment on a few images, and say what all of it is going to cost.

    Raises:
        ValueError: the network does not fit the images, the classes or the batch size; says why.
    """
    train, defense, epochs = prepared.train, training.defense, training.recipe.epochs
    with own_randomness(device):
        model = network_of(training, train)(Streams(training.seed)("weights")).to(device)
        pause = try_out(model, training, train, device)
        each = _seconds_per_image(training, train, pause, device)
    friendly = defense is not None and defense.zeta > 0
    steps = 0.0 if defense is None or not friendly else defense.settings.steps * FRIENDLY_STEP
    return Outlook(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds_per_epoch=each * (len(train) + JUDGING * len(prepared.held_out)),
        noise_seconds=each * len(train) * steps,
        bytes=math.prod(train.shape) * (len(train) * (2 if friendly else 1) + len(prepared.held_out)),
        epochs=epochs,
    )


def try_out(model: nn.Module, training: Training, train: LabeledImages, device: torch.device | str) -> float:
    """Show a network a few images, as the loop will. Returns the seconds that it takes for one.

    Raises:
        ValueError: it fails, returns something else than logits of all classes, or its weights are not in float32.
    """
    name, shape, batch = training.model.name, train.shape, training.recipe.batch
    for parameter_name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"model {name!r} has {parameter_name} in {parameter.dtype}: float32 is needed; for faster "
                             "arithmetic there is --precision bfloat16")  # fmt: skip
    last = len(train) % batch or batch
    x = train.pixels(torch.arange(min(2, last, len(train)))).to(device)
    hint = ". It may want another --size" if ":" in name else ""
    if len(x) == 1:
        hint = f". The last batch of every epoch has a single image: choose another --batch than {batch}"
    try:
        model.train()
        logits = logits_of(model, x)
        model.eval()
        clock = time.perf_counter()
        with torch.no_grad():
            logits_of(model, x[:1])
        seconds = time.perf_counter() - clock
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # somebody else's network may fail in any way
        raise ValueError(f"model {name!r} fails on images {shape}: {type(error).__name__}: {error}{hint}") from error
    if logits.shape[1] != len(train.classes):
        raise ValueError(f"model {name!r} returns {logits.shape[1]} logits for {len(train.classes)} classes")
    return seconds


def _seconds_per_image(training: Training, train: LabeledImages, pause: float, device: torch.device | str) -> float:
    """What a step costs for each image of it, from a moment's training."""
    batch = training.recipe.batch
    most = 4 * batch if torch.device(device).type == "cuda" else max(2, int(MOMENT / 8 / max(pause, 1e-6)))
    count = min(len(train), 4 * batch, most)
    few = train.rows(torch.arange(count - count % batch if count > batch else count))  # no short batch at the end
    # a learning rate with which nothing diverges: only its time is wanted
    recipe = replace(training.recipe, epochs=2, lr=1e-9, batch=min(batch, len(few)), compile=False)
    fitted = fit(few.to(device), network_of(training, train), recipe=recipe, streams=Streams(training.seed))
    return fitted.history[-1]["seconds"] / len(few)


@contextmanager
def own_randomness(device: torch.device | str) -> Generator[None, None, None]:
    """Keep the global generators as they are, whatever layers such as dropout draw from them."""
    chosen = torch.device(device)
    with torch.random.fork_rng(devices=[chosen] if chosen.type == "cuda" else []):
        yield
