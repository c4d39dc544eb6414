"""Noise on disk: bytes of an image in each coding, how fast random rows are read back, and what that costs.

Rows are read as a training loop reads them: batches of random rows of a store of 13 shards, through
``NoiseStore.grey``. The timed store has 35 flips an image at random places; how many real noise has depends on the
network, so the bytes of that are counted, too. The signs alone, by Philox4x32-10, say what bounds reading flips.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from interleaved import Spread, Timings, interleaved
from networks import images, trained

from friends.noise.coding import Coding
from friends.noise.friendly import PAPER, FriendlySettings
from friends.noise.manifest import Manifest, Plan, keys_digest, shard_path
from friends.noise.philox import sign_bits, signed
from friends.noise.shards import write_shard
from friends.noise.store import NoiseStore

SHAPE, VALUES, LEVEL = (3, 32, 32), 3072, 16
SHARDS, FLIPS_OF_AN_IMAGE = 13, 35
BATCHES = (128, 512)
FLIPS = replace(PAPER, method="flips", steps=4)
POLYAK = replace(FLIPS, method="polyak")
NAMES = {"int8": "a byte a value", "bits": "a bit a value", "flips": "seed and flips", "signs": "the signs alone"}
Rows = list[dict[str, Any]]


def row(name: str, spread: Spread, unit: str, target: str = "") -> dict[str, Any]:
    return {"name": name, "value": spread.median, "low": spread.low, "high": spread.high, "unit": unit,
            "target": target}  # fmt: skip


def single(name: str, value: float, unit: str, target: str = "") -> dict[str, Any]:
    return row(name, Spread(value, value, value), unit, target)


def store_of_corners(folder: Path, coding: Coding, shard_rows: int) -> NoiseStore:
    """A store of seeded corners in which about so many signs of each image are turned, that no network made."""
    n = SHARDS * shard_rows
    keys, draws = np.arange(n, dtype=np.int64), np.random.default_rng(0)
    plan = Plan(n=n, shape=SHAPE, shard_rows=shard_rows, batch_size=128, settings=FLIPS, seed=0, model="",
                keys=keys_digest(keys), proxy="", coding=coding)  # fmt: skip
    records: list[dict[str, Any] | None] = []
    folder.mkdir()
    for shard in range(SHARDS):
        some = keys[plan.rows(shard).start : plan.rows(shard).stop]
        noise = signed(sign_bits(some, VALUES, 0), VALUES, LEVEL)
        turned = draws.random(noise.shape, np.float32) < FLIPS_OF_AN_IMAGE / VALUES
        parts = plan.coder.encode(np.where(turned, -noise, noise), some)
        records.append(write_shard(shard_path(folder, shard), parts, some, some))
    Manifest(plan, records).write(folder)
    return NoiseStore.load(folder)


def reading(stores: dict[str, NoiseStore], values: int, rounds: int) -> dict[int, Timings]:
    """Random rows in batches, of every coding in turns."""
    found: dict[int, Timings] = {}
    for batch in BATCHES:
        draws = np.random.default_rng(1)
        wanted = [draws.integers(0, len(stores["int8"]), batch) for _ in range(max(1, values // VALUES // batch))]

        def job(store: NoiseStore, wanted: list[np.ndarray[Any, Any]] = wanted) -> Callable[[], None]:
            def read() -> None:
                for rows in wanted:
                    store.grey(rows)

            return read

        def signs(wanted: list[np.ndarray[Any, Any]] = wanted) -> None:
            for rows in wanted:
                sign_bits(rows, VALUES, 0)

        jobs = {coding: job(store) for coding, store in stores.items()} | {"signs": signs}
        found[batch] = interleaved(jobs, rounds=rounds)
    return found


def speed(folder: Path, quick: bool) -> Rows:
    shard_rows = 100 if quick else 1000
    stores = {str(coding): store_of_corners(folder / coding, coding, shard_rows) for coding in get_args(Coding)}
    values = VALUES * (1024 if quick else 16_384)
    flips = stores["flips"].info()["bytes_per_image"]
    rows = [single(f"seed and flips: {FLIPS_OF_AN_IMAGE} flips of an image of CIFAR-10", flips, "bytes", "<= 48")]
    for batch, timings in reading(stores, values, rounds=2 if quick else 9).items():
        for coding in timings.cpu:
            low, median, high = (values / 1e9 / s for s in reversed(timings.seconds(coding)))
            name, target = f"{NAMES[coding]}: random rows read, batches of {batch}", ">= 1" if coding in stores else ""
            rows.append(row(name, Spread(low, median, high), "GB/s of noise per core", target))
    return rows


def size(folder: Path, network: str, data: str | None, quick: bool) -> Rows:
    """The bytes of real noise, and the divergence before and after coding."""
    train, test = images(data)
    model, x = trained(network, train, test), train.rows(torch.arange(64 if quick else 1024))
    rows: Rows = []
    made: tuple[tuple[Coding, str, FriendlySettings, str], ...] = (
        ("bits", "Polyak steps", POLYAK, "<= 385"),
        ("bits", "Eq. 3, 20 steps", PAPER, "<= 385"),
        ("flips", "flipped signs", FLIPS, "<= 48"),
    )
    for coding, name, settings, target in made:
        store = folder / f"{network}-{coding}-{name[0]}"
        info = NoiseStore.generate(model, x, store, settings=settings, coding=coding, shard_rows=128).info()
        title = f"{network}, {name}: {NAMES[coding]}"
        rows += [
            single(f"{title}, noise of an image", info["bytes_per_image"], "bytes", target),
            single(f"{title}, noise of a value", info["bits_per_value"], "bits"),
            single(f"{title}, mean KL before coding", info["kl_before_coding"], ""),
            single(f"{title}, mean KL after coding", info["kl_after_coding"], ""),
        ]
    return rows


def measure(quick: bool = False, data: str | None = None) -> Rows:
    """Every number; two minutes, or seconds if quick and the networks are trained."""
    networks = ("convnet",) if quick else ("convnet", "resnet18")
    with tempfile.TemporaryDirectory() as folder:
        real = [found for network in networks for found in size(Path(folder), network, data, quick)]
        return [*speed(Path(folder), quick), *real, single("all: key and hash of an image", 16, "bytes")]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for found in measure():
        print(f"{found['name']:60} {found['value']:10.4g} ({found['low']:.4g}-{found['high']:.4g}) {found['unit']:24} "
              f"{found['target']}")  # fmt: skip
