"""How time and memory grow: with the number of images, their size, the steps and the classes; and what ImageNet costs.

    python benchmarks/scaling.py [--quick]

writes ``benchmarks/results/scaling.json`` and ``scaling.svg``. Every point is a process of its own, on one thread, with
a network so small that what surrounds it shows. Peak memory is what the kernel says of the process (``VmHWM``), with
the pages of files that it has read by mapping them, which the kernel takes back when others want them;
``ru_maxrss`` would start at what the parent had. Before the work, most of it is Python and torch.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from friends import Friends
from friends.bench.provenance import commit, device_name, versions
from friends.data.images import LabeledImages
from friends.models import build
from friends.noise.dataset import NoisyDataset
from friends.noise.friendly import RELEASED, friendly_noise
from friends.noise.store import NoiseStore
from friends.training.fit import fit
from friends.training.recipe import Recipe
from friends.types import Streams

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
FORMAT = "friends-scaling-1"
CHEAP = ("convnet", 4)
MOMENTS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
POOL = 256

CURVES: dict[str, dict[str, Any]] = {
    "images": {"kind": "noise", "n": [5_000, 10_000, 20_000, 50_000]},
    "size": {"kind": "noise", "n": 1_000, "size": [16, 24, 32, 48, 64, 96]},
    "steps": {"kind": "noise", "n": 2_000, "steps": [1, 5, 10, 20, 30]},
    "classes": {"kind": "noise", "n": 2_000, "classes": [2, 10, 100, 1_000]},
    "training, undefended": {"kind": "training", "n": [5_000, 10_000, 20_000, 50_000], "defended": False},
    "training, FRIENDS": {"kind": "training", "n": [5_000, 10_000, 20_000, 50_000], "defended": True},
    "training from disk, FRIENDS": {"kind": "loader", "n": [5_000, 10_000, 20_000, 50_000]},
}
"""What is varied, by the list in it, and what is kept."""

USUAL = {"n": 2_000, "size": 32, "steps": 4, "classes": 10, "defended": False, "coding": ""}

IMAGENET = 1_281_167
IMAGENET_SHAPE = (3, 224, 224)
RATES = {"an NVIDIA H200 at a quarter of its 989 TFLOP/s in bfloat16 (assumed)": 247e12}
"""FLOP/s to divide by, besides what this machine is measured to reach."""


class Rolled:
    """As many images as are asked for, none of which is kept: a few random ones, rolled along their rows."""

    def __init__(self, n: int, size: int) -> None:
        self.n = n
        generator = torch.Generator().manual_seed(0)
        self.pool = torch.randint(256, (POOL, size, size, 3), generator=generator, dtype=torch.uint8)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> NDArray[Any]:
        return self.pool[index % POOL].roll(index // POOL, 1).numpy()


def cheap(size: int, classes: int) -> nn.Module:
    name, width = CHEAP
    return build(name, shape=(3, size, size), classes=classes, moments=MOMENTS, width=width,
                 generator=torch.Generator().manual_seed(0)).eval()  # fmt: skip


def peak() -> int:
    """The most bytes that this process has had in memory."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def codings() -> tuple[str, ...]:
    """How a store can keep noise."""
    parameters = inspect.signature(NoiseStore.generate).parameters
    if "coding" not in parameters:
        return ("",)
    from friends.noise.coding import Coding

    return get_args(Coding)


def make_noise(job: dict[str, Any]) -> int:
    """Generate a store; returns its bytes on disk."""
    settings = replace(RELEASED, steps=job["steps"])
    extra = {"coding": job["coding"]} if job["coding"] else {}
    with tempfile.TemporaryDirectory() as folder:
        NoiseStore.generate(cheap(job["size"], job["classes"]), Rolled(job["n"], job["size"]), folder,
                            settings=settings, **extra)  # fmt: skip
        return sum(file.stat().st_size for file in Path(folder).iterdir())


def train(job: dict[str, Any]) -> int:
    """One epoch; with FRIENDS, all the friendly noise is made before it, in one step."""
    size, n = job["size"], job["n"]
    x = torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = LabeledImages(x, torch.arange(n) % 10, tuple("0123456789"))
    defense = Friends(def_epoch=0, settings=replace(RELEASED, steps=1))
    fit(data, lambda _: cheap(size, 10).train(), recipe=Recipe(epochs=1), streams=Streams(0),
        defenses=[defense] if job["defended"] else [])  # fmt: skip
    return x.numel()


def train_from_disk(job: dict[str, Any]) -> int:
    """One epoch of a plain loop over images that are not in memory, with noise from a store of one bit a value."""
    with tempfile.TemporaryDirectory() as folder:
        images = Rolled(job["n"], job["size"])
        model = cheap(job["size"], 10)
        store = NoiseStore.generate(model, images, folder, settings=replace(RELEASED, steps=1), coding="bits")
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
        for x in DataLoader(NoisyDataset(images, store), batch_size=128, shuffle=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()
            optimizer.step()
        return sum(file.stat().st_size for file in Path(folder).iterdir())


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """What one job costs this process; meant for a fresh one."""
    torch.set_num_threads(1)
    work = {"noise": make_noise, "training": train, "loader": train_from_disk}[job["kind"]]
    work(job | {"n": 8})  # libraries are loaded by the first use
    before, clock = peak(), time.process_time()
    stored = work(job)
    return {"seconds": time.process_time() - clock, "before": before, "peak": peak(), "bytes": stored}


def apart(job: dict[str, Any]) -> dict[str, Any]:
    """:func:`measured` in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{job}: {done.stderr[-2000:]}")
    return job | json.loads(done.stdout.splitlines()[-1])


def jobs(curve: dict[str, Any], shrink: int = 1) -> list[dict[str, Any]]:
    """The points of a curve."""
    varied = next(name for name, value in curve.items() if isinstance(value, list))
    points = [USUAL | curve | {varied: value} for value in curve[varied]]
    return [point | {"n": max(POOL, point["n"] // shrink)} for point in points]


class Bottleneck(nn.Module):
    """Three convolutions of ResNet-50; only their shapes matter here."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False),
            nn.Conv2d(inner, 4 * inner, 1, bias=False),
        )
        changes = stride != 1 or inputs != 4 * inner
        self.shortcut = nn.Conv2d(inputs, 4 * inner, 1, stride=stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.shortcut(x)


def resnet50(classes: int = 1000) -> nn.Module:
    """The convolutions of ResNet-50 (He et al., 2016; the stride in the 3x3 convolution) and its last layer."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, 64 * 2**stage, 2 if stage and not block else 1))
            inputs = 256 * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def flops(network: nn.Module, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Floating point operations for one image: forward, and forward with backward to the input. Nothing is computed."""
    network = network.to("meta").requires_grad_(False)
    x = torch.empty(1, *shape, device="meta")
    with FlopCounterMode(display=False) as forward:
        network(x)
    x.requires_grad_()
    with FlopCounterMode(display=False) as both:
        network(x).sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


def reached(steps: int = 6, n: int = 128) -> float:
    """FLOP/s that this machine reaches on one thread while it makes noise with a ResNet-18."""
    shape = (3, 32, 32)
    model = build(
        "resnet18", shape=shape, classes=10, moments=MOMENTS, generator=torch.Generator().manual_seed(0)
    ).eval()
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    friendly_noise(model, x, replace(RELEASED, steps=1))
    clock = time.process_time()
    friendly_noise(model, x, replace(RELEASED, steps=steps))
    seconds = time.process_time() - clock
    forward, both = flops(model, shape)
    return n * (forward + steps * both) / seconds


def bytes_per_image(coding: str, size: int) -> float:
    """What one more image adds to a store; for flips, on an untrained network's noise."""
    few, many = (apart(USUAL | {"kind": "noise", "n": n, "size": size, "steps": 1, "coding": coding}) for n in (32, 64))
    return (many["bytes"] - few["bytes"]) / 32


def imagenet(rate: float) -> dict[str, Any]:
    """What friendly noise for all of ImageNet takes: operations as counted, bytes as the store's files have them."""
    forward, both = flops(resnet50(), IMAGENET_SHAPE)
    rates = {f"one thread of this machine (measured, ResNet-18): {rate / 1e9:.0f} GFLOP/s": rate, **RATES}
    work = {passes: IMAGENET * (forward + passes * both) for passes in (20, 4)}
    fixed = [coding for coding in codings() if coding != "flips"]  # what flips take depends on the noise
    return {
        "images": IMAGENET,
        "shape": IMAGENET_SHAPE,
        "network": "ResNet-50",
        "gflop": {"forward": forward / 1e9, "forward and backward to the input": both / 1e9},
        "passes": {str(passes): {"pflop": total / 1e15, "hours": {what: total / speed / 3600 for what, speed in
                                                                rates.items()}} for passes, total in work.items()},
        "gigabytes": {coding or "int8": IMAGENET * bytes_per_image(coding, IMAGENET_SHAPE[1]) / 1e9
                      for coding in fixed},
        "gigabytes in float32, as the released code keeps it": IMAGENET * 4 * 3 * 224 * 224 / 1e9,
    }  # fmt: skip


def draw(curves: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """One panel a curve for time, and one for the memory against the number of images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "friends"
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), constrained_layout=True)
    for axis, (name, key, label) in zip(axes.flat, (("images", "n", "images"), ("size", "size", "height and width"),
                                                   ("steps", "steps", "steps"), ("classes", "classes", "classes")),
                                        strict=False):  # fmt: skip
        points = curves[name]
        axis.plot([p[key] for p in points], [1e3 * p["seconds"] / p["n"] for p in points], "o-")
        axis.set(xlabel=label, ylabel="ms per image, one core", ylim=(0, 1.1 * axis.get_ylim()[1]))
        if name == "classes":
            axis.set_xscale("log")
    memory = axes.flat[4]
    for name, label in (("images", "noise, to disk"), ("training, undefended", "training, undefended"),
                        ("training, FRIENDS", "training, FRIENDS"),
                        ("training from disk, FRIENDS", "training from disk, FRIENDS")):  # fmt: skip
        points = curves[name]
        memory.plot([p["n"] for p in points], [(p["peak"] - p["before"]) / 2**20 for p in points], "o-", label=label)
    memory.set(xlabel="images of 3x32x32", ylabel="MiB over an idle process", ylim=(0, 1.5 * memory.get_ylim()[1]))
    memory.legend(frameon=False, loc="upper left")
    size = axes.flat[5]
    points = curves["size"]
    size.plot([p["size"] for p in points], [(p["peak"] - p["before"]) / 2**20 for p in points], "o-")
    size.set(xlabel="height and width", ylabel="MiB over an idle process, noise", ylim=(0, None))
    name, width = CHEAP
    figure.suptitle(f"Friendly noise with {name} of width {width}: 4 steps, 32x32, 10 classes unless varied")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def measure(shrink: int = 1) -> dict[str, Any]:
    """All curves and the estimate."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, curve in CURVES.items():
        print(f"{name} ...", flush=True)
        curves[name] = [apart(job) for job in jobs(curve, shrink)]
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "processor": device_name("cpu"),
        "threads": 1,
        "versions": versions(),
        "commit": commit(),
        "quick": shrink > 1,
        "curves": curves,
        "imagenet": imagenet(reached()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a twentieth of the images: to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.job:
        print(json.dumps(measured(json.loads(chosen.job))))
        return
    found = measure(20 if chosen.quick else 1)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "scaling.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found["curves"], chosen.out / "scaling.svg")
    print(json.dumps(found["imagenet"], indent=1))


if __name__ == "__main__":
    main()
