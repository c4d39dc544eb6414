"""Reports and exhibits for the tests of pages and records: real images, plausible numbers, every part adjustable."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from friends.bench.record import Arm, Exhibit, Report
from friends.data.images import LabeledImages


def epochs(accuracy: float, confidence: float, n: int = 12, seed: int = 0) -> tuple[dict[str, float], ...]:
    """A history that ends at the given values; test accuracy is measured at every third epoch only."""
    wiggle = np.random.default_rng(seed).normal(0, 0.03, n)
    lines: list[dict[str, float]] = []
    for e in range(n):
        done = 1 - (1 - (e + 1) / n) ** 2
        line = {"epoch": e + 1, "loss": 2.3 - 2 * done, "lr": 0.1, "seconds": 0.2}
        line["confidence"] = float(np.clip(confidence * done + (0 if e == n - 1 else wiggle[e]), 0, 1))
        if e % 3 == 2:
            line["accuracy"] = accuracy - 0.2 * (1 - done)
        lines.append(line)
    return tuple(lines)


def arm(name: str, hits: str, accuracy: float, seconds: float, **changes: Any) -> Arm:
    """An arm from a string of goals such as ``"xx.x"``, x being one that the attack won."""
    succeeded = tuple(mark == "x" for mark in hits)
    sure = np.random.default_rng(len(name)).uniform(0.0, 0.35, len(hits))
    confidence = tuple(float(1 - s if hit else s) for hit, s in zip(succeeded, sure, strict=True))
    history = tuple(epochs(accuracy, c, seed=i) for i, c in enumerate(confidence))
    values: dict[str, Any] = {
        "name": name, "defenses": (), "successes": sum(succeeded), "n": len(hits), "accuracy": accuracy,
        "accuracies": (accuracy,) * len(hits), "seconds": seconds, "confidence": confidence,
        "succeeded": succeeded, "history": history,
    }  # fmt: skip
    return Arm(**values | changes)


ARMS = (
    arm("undefended", "xxxxxxx.", 0.981, 1.6),
    arm("friends-b", ".x.....x", 0.969, 24.4, defenses=("Friends(zeta=32/255, mu=48/255)",)),
    arm("noise-only-b", "xx......", 0.942, 6.1, defenses=("Friends(zeta=0, mu=64/255)",)),
    arm("friendly-only", "xx.xx.x.", 0.957, 11.9, defenses=("Friends(zeta=48/255, mu=0)",)),
    arm("clean", "........", 0.982, 0.4, accuracies=(0.982, 0.982), notes="2 models share the goals"),
)


def report(arms: tuple[Arm, ...] = ARMS, **changes: Any) -> Report:
    """A report of a small transfer attack between threes and fives."""
    goals = [
        {"name": f"test image {17 * i + 4}", "y_true": "3", "y_wanted": "5"} for i in range(len(arms[0].succeeded))
    ]
    values: dict[str, Any] = {
        "name": "digits-bullseye",
        "key": "5b1e0c2f9a7d4431",
        "trial": {"seed": 7, "attack": {"class": "BullseyePolytope", "xi": 64 / 255, "steps": 150},
                  "arms": [{"name": "friends-b", "defenses": [{"class": "Friends", "zeta": 32 / 255}]}]},
        "seed": 7,
        "scenario": "transfer",
        "scaled_down": "two classes of digits, 400 training images and a network of 20,000 parameters.",
        "data": {"name": "mnist-mini", "train": 400, "test": 1000, "shape": [1, 28, 28], "classes": ["3", "5"],
                 "fingerprint": "9d3f11c7a0b2"},
        "model": {"name": "small", "parameters": 20314},
        "attack": {"name": "BullseyePolytope", "settings": {"steps": 150, "lr": 0.025}, "xi": 64 / 255,
                   "budget": 0.1, "poisons": 40},
        "goals": tuple(goals),
        "arms": arms,
        "versions": {"friends": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
        "commit": "0a1b2c3d4e",
        "device": "AMD EPYC 7B13",
        "threads": 1,
        "started": "2022-11-28T09:00:00+00:00",
        "seconds": {"pretraining": 4.2, "crafting, mean per target": 1.3, "training friends-b": 24.4},
    }  # fmt: skip
    return Report(**values | changes)


def exhibit(digits: LabeledImages, **changes: Any) -> Exhibit:
    """An exhibit of six fives and a three that is to be taken for one."""
    return exhibit_of(digits.x[digits.y == 5][:6], digits.x[digits.y == 3][0], **changes)


def exhibit_of(images: torch.Tensor, shown: torch.Tensor, **changes: Any) -> Exhibit:
    """An exhibit of given byte images: a smooth perturbation, friendly noise at its bound where images are flat."""
    g = torch.Generator().manual_seed(0)
    k, c, h, w = images.shape
    coarse = torch.randn(k, c, (h + 3) // 4, (w + 3) // 4, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, size=(h, w), mode="bilinear", align_corners=False)
    poisons = (images.short() + (smooth * 40).round().clamp(-64, 64).short()).clamp(0, 255).to(torch.uint8)
    sign = (2 * torch.randint(2, images.shape, generator=g) - 1) * 32
    flat = (images.float() - images.float().mean((2, 3), keepdim=True)).abs() > 40
    friendly = torch.where(flat, sign, torch.randint(-6, 7, images.shape, generator=g)).to(torch.int8)
    random = ((2 * torch.randint(2, images.shape, generator=g) - 1) * 48).to(torch.int8)
    counts = torch.bincount((friendly.flatten().long() + 255), minlength=511)
    values: dict[str, Any] = {
        "target": shown, "bases": images, "poisons": poisons, "friendly": friendly, "random": random,
        "histogram": counts, "zeta": 32 / 255, "mu": 48 / 255,
    }  # fmt: skip
    return Exhibit(**values | changes)


def photos() -> tuple[torch.Tensor, torch.Tensor]:
    """Five CIFAR photos and a target, ``(5, 3, 32, 32)`` and ``(3, 32, 32)`` bytes; skips where there are none."""
    beside = Path(__file__).parents[3] / "shared/data/cifar10-jpeg"
    folder = Path(os.environ.get("FRIENDS_CIFAR10", beside))
    if not (folder / "test.parquet").exists():
        pytest.skip(f"no CIFAR-10 at {folder}: set FRIENDS_CIFAR10")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = parquet.read_table(folder / "test.parquet", columns=["image"]).column("image")
    images = [
        np.array(Image.open(io.BytesIO(column[i].as_py()["bytes"]))) for i in (4000, 4001, 4002, 4003, 4004, 5005)
    ]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return x[:5], x[5]
