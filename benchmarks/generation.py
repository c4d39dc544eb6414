"""Friendly noise: how long it takes, beside the released code and beside the network alone, and how good it is.

The floor is what no generator can go below that makes as many passes: once forward for the clean images, and then
forward and backward to the input at every step, through the same network, its batch normalisation folded away by
hand, channels last, at the batch size that suits the machine, with no normalisation of images, no loss and no update.

    python benchmarks/generation.py [--networks convnet] [--speed]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from interleaved import Spread, Timings, interleaved
from networks import NETWORKS, images, trained, without_normalisation
from released import Network
from released import friendly_noise as released_noise
from torch import Tensor
from torch.nn import functional as F

from friends.models import Classifier
from friends.modules import still
from friends.noise.friendly import FAST, PAPER, RELEASED, FriendlySettings, friendly_noise, optimised
from friends.noise.grey import grey_noise, initial_noise
from friends.noise.lean import lean

BATCHES = (128, 64)
GREY = 255
TARGET = {"convnet": 2.4, "resnet18": 2.2}
Rows = list[dict[str, Any]]


def row(name: str, spread: Spread, unit: str, target: str = "") -> dict[str, Any]:
    return {"name": name, "value": spread.median, "low": spread.low, "high": spread.high, "unit": unit,
            "target": target}  # fmt: skip


def single(name: str, value: float, unit: str, target: str = "") -> dict[str, Any]:
    return row(name, Spread(value, value, value), unit, target)


def in_batches(make: Callable[[Tensor], Tensor], x: Tensor, batch: int = 128) -> Tensor:
    return torch.cat([make(part) for part in x.split(batch)])


def ours(model: Classifier, x: Tensor, settings: FriendlySettings, batch: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return in_batches(lambda part: friendly_noise(model, part, settings, generator=generator), x, batch)


def bare(model: Classifier) -> Network:
    """The network for the floor: normalised images in, weights without gradient, channels last."""
    network = Network(model).eval().requires_grad_(False)
    without_normalisation(network)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def floor(network: Network, x: Tensor, passes: int, batch: int) -> None:
    """Forward once, for what the network says of the clean images, then so many times forward and backward."""
    for part in x.contiguous(memory_format=torch.channels_last).split(batch):
        with torch.no_grad():
            network(part)
        seen = part.detach().requires_grad_()
        for _ in range(passes):
            torch.autograd.grad(network(seen).sum(), seen)


def timed(model: Classifier, x_bytes: Tensor, rounds: int) -> Timings:
    """From images to noise: all the steps, or as few as the fast way takes. Includes the pass over clean images.

    Ours is timed as a training or a store calls it, for many images: the network is folded once, in the time, and the
    noise is rounded to grey levels.
    """
    network, folded, x, keys = Network(model), bare(model), x_bytes.float() / 255, range(len(x_bytes))

    def made(settings: FriendlySettings, batch: int) -> Tensor:
        return grey_noise(model, x_bytes, keys, settings, seed=0, batch_size=batch)

    jobs: dict[str, Callable[[], object]] = {
        "released": lambda: in_batches(lambda part: released_noise(network, part), x)
    }
    with still([model], freeze=True):
        f = lean(model, x)
    start = initial_noise(keys, (x.shape[1], x.shape[2], x.shape[3]), RELEASED.init, 0)

    def steps(batch: int) -> None:
        with still([model], freeze=True):
            for part, e in zip(x.split(batch), start.split(batch), strict=True):
                optimised(f, part, e, RELEASED)

    for batch in BATCHES:
        jobs[f"steps {batch}"] = lambda batch=batch: steps(batch)
        jobs[f"exact {batch}"] = lambda batch=batch: made(RELEASED, batch)
        jobs[f"floor {batch}"] = lambda batch=batch: floor(folded, x, RELEASED.steps, batch)
        jobs[f"fast {batch}"] = lambda batch=batch: made(FAST, batch)
    return interleaved(jobs, rounds=rounds)


def speed(name: str, model: Classifier, x: Tensor, *, rounds: int) -> Rows:
    """How long it takes; ``x`` are bytes."""
    timings = timed(model, x, rounds)
    rows: Rows = []
    for job in timings.cpu:
        each = timings.seconds(job)
        rows.append(row(f"{name}: {job}, CPU time per image", Spread(*(1e3 / len(x) * s for s in each)), "ms"))
        if not job.startswith("fast"):
            per_step = Spread(*(1e6 / len(x) / RELEASED.steps * s for s in each))
            rows.append(row(f"{name}: {job}, CPU time per image and step", per_step, "us"))
    best = {kind: min((job for job in timings.cpu if job.startswith(kind)), key=lambda job: timings.seconds(job).median)
            for kind in ("exact", "steps", "floor", "fast")}  # fmt: skip
    for kind, target in (("exact", f">= {TARGET[name]}"), ("floor", ""), ("fast", ">= 12")):
        rows.append(row(f"{name}: {kind}, times faster than released", timings.faster(best[kind]), "x", target))
    share = timings.faster(best["exact"], best["floor"])
    rows.append(row(f"{name}: floor as a share of exact", Spread(*(100 * s for s in share)), "%", ">= 90"))
    alone = timings.faster(best["steps"], best["floor"])
    rows.append(row(f"{name}: floor as a share of the exact steps alone", Spread(*(100 * s for s in alone)), "%"))
    return rows


class Quality:
    """What a noise does to a network's output, in the direction of Eq. 3."""

    def __init__(self, model: Classifier, x: Tensor, noise: Tensor) -> None:
        with torch.no_grad():
            clean = torch.cat([F.log_softmax(model(part), 1) for part in x.split(128)])
            noisy = torch.cat([F.log_softmax(model(part), 1) for part in (x + noise).clamp(0, 1).split(128)])
        divergence = (noisy.exp() * (noisy - clean)).sum(1)
        self.mean, self.p95 = float(divergence.mean()), float(divergence.quantile(0.95))
        self.size = GREY * float(noise.abs().mean())
        self.agreement = 100 * float((noisy.argmax(1) == clean.argmax(1)).float().mean())

    def rows(self, name: str) -> Rows:
        return [
            single(f"{name}: mean KL", self.mean, ""),
            single(f"{name}: 95th percentile of KL", self.p95, ""),
            single(f"{name}: mean size", self.size, "/255"),
            single(f"{name}: same class", self.agreement, "%"),
        ]


def quality(name: str, model: Classifier, x: Tensor) -> Rows:
    """The noise of every way, on the same images."""
    network = Network(model)
    generator = torch.Generator().manual_seed(0)
    corners = (2 * torch.randint(2, x.shape, generator=generator) - 1) * PAPER.zeta
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        theirs = in_batches(lambda part: released_noise(network, part), x)
    noises = {
        "released": theirs,
        "exact": ours(model, x, RELEASED, 64),
        "Eq. 3, lr 10": ours(model, x, PAPER, 64),
        "Eq. 3, lr 20": ours(model, x, replace(PAPER, lr=20.0), 64),
        "fast": ours(model, x, FAST, 64),
        "random corners": corners.clamp(-x, 1 - x),
    }
    found = {way: Quality(model, x, noise) for way, noise in noises.items()}
    rows = [line for way, judged in found.items() for line in judged.rows(f"{name}: {way}")]
    best = min((found["Eq. 3, lr 10"], found["Eq. 3, lr 20"]), key=lambda judged: judged.mean)
    fast = found["fast"]
    return [
        *rows,
        single(f"{name}: mean KL of fast over that of Eq. 3 in 20 steps", fast.mean / best.mean, "x", "<= 1.15"),
        single(f"{name}: p95 KL of fast over that of Eq. 3 in 20 steps", fast.p95 / best.p95, "x", "<= 1.15"),
        single(f"{name}: mean size of fast over that of Eq. 3 in 20 steps", fast.size / best.size, "x", ">= 1"),
    ]


def sameness(name: str, model: Classifier, x: Tensor, steps: int = 6) -> Rows:
    """How far exact noise is from the released code's, from the same start, after a few steps.

    At learning rate 100 rounding grows from step to step, so it is also told how far the released code gets from
    itself when its start is moved by a rounding error, and that in double precision the two agree.
    """
    initial = (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 1) * RELEASED.init
    settings = replace(RELEASED, steps=steps)

    def theirs(start: Tensor) -> Tensor:
        # ours keeps x + e in [0, 1], theirs leaves that to whoever adds it
        return released_noise(Network(model), x, steps=steps, initial=start).clamp(-x, 1 - x)

    reference, mine = theirs(initial), friendly_noise(model, x, settings, initial=initial)
    nudged = theirs(initial * (1 + torch.finfo(x.dtype).eps))
    ratio = Quality(model, x, mine).mean / Quality(model, x, reference).mean
    what = f"{name}: exact from released after {steps} steps"
    return [
        single(f"{what}, mean difference", apart(mine, reference), "/255", "<= 0.05"),
        single(f"{what}, KL", abs(100 * ratio - 100), "%", "<= 1"),
        single(f"{name}: released from itself, started a rounding error away", apart(nudged, reference), "/255"),
        single(f"{what} in float64, mean difference", in_double(model, x[:32], steps, initial[:32]), "/255", "<= 0.05"),
    ]


def in_double(model: Classifier, x: Tensor, steps: int, initial: Tensor) -> float:
    """Mean difference between exact and released in float64, at the step size of a batch of 128."""
    double, x, initial = copy.deepcopy(model).double(), x.double(), initial.double()
    rate = RELEASED.lr * len(x) / 128
    theirs = released_noise(Network(double), x, steps=steps, lr=rate, initial=initial).clamp(-x, 1 - x)
    return apart(friendly_noise(double, x, replace(RELEASED, steps=steps), initial=initial), theirs)


def apart(one: Tensor, other: Tensor) -> float:
    """Mean absolute difference, in grey levels."""
    return GREY * float((one - other).abs().mean())


def measure(
    quick: bool = False, data: str | Path | None = None, networks: Sequence[str] = tuple(NETWORKS), judged: bool = True
) -> Rows:
    """Every number of this page.

    Args:
        quick: fewer images and rounds: to see that it runs, not to quote.
        data: where the images are; see :func:`networks.images`.
        networks: some of :data:`networks.NETWORKS`.
        judged: whether to look at the noise, too, and not only at the clock.
    """
    train, test = images(data)
    rows: Rows = []
    for name in networks:
        model = trained(name, train, test)
        rows += speed(name, model, test.x[: 64 if quick else 128], rounds=2 if quick else 5)
        if judged:
            rows += sameness(name, model, test.pixels(slice(0, 128)))
            # whole batches: a short one takes larger steps in the released code
            rows += quality(name, model, test.pixels(slice(0, 128 if quick else 512)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", help="CIFAR-10, or any other data set that the library reads")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--speed", action="store_true", help="leave out how good the noise is")
    chosen = parser.parse_args()
    for line in measure(chosen.quick, chosen.data, chosen.networks, not chosen.speed):
        reach = "" if line["low"] == line["high"] else f"{line['low']:.4g}-{line['high']:.4g}"
        print(f"{line['name']:64} {line['value']:10.4g} {line['unit']:5} {reach:16} {line['target']}")


if __name__ == "__main__":
    main()
