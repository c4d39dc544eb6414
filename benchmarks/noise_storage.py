"""Noise on disk: bytes of an image in each coding, how fast random rows are read back, and what that costs.

Rows are read as a training loop reads them: batches of random rows of a store of 13 shards, through
``NoiseStore.grey``. The flips of the timed store are as many as four passes make on a trained network; those that are
counted in bytes are real.
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
NAMES = {"int8": "a byte a value", "bits": "a bit a value", "flips": "seed and flips"}
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


def reading(stores: dict[Coding, NoiseStore], values: int, rounds: int) -> dict[int, Timings]:
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

        found[batch] = interleaved({coding: job(store) for coding, store in stores.items()}, rounds=rounds)
    return found


def speed(folder: Path, quick: bool) -> Rows:
    stores = {coding: store_of_corners(folder / coding, coding, 100 if quick else 1000) for coding in get_args(Coding)}
    values = VALUES * (1024 if quick else 16_384)
    rows: Rows = []
    for batch, timings in reading(stores, values, rounds=2 if quick else 9).items():
        for coding in stores:
            low, median, high = (values / 1e9 / s for s in reversed(timings.seconds(coding)))
            name = f"{NAMES[coding]}: random rows read, batches of {batch}"
            rows.append(row(name, Spread(low, median, high), "GB/s of noise per core", ">= 1"))
    return rows


def size(folder: Path, data: str | None, quick: bool) -> Rows:
    """The bytes of real noise, and the divergence before and after coding."""
    train, test = images(data)
    model, x = trained("convnet", train, test), train.rows(torch.arange(64 if quick else 1024))
    rows: Rows = []
    made: tuple[tuple[Coding, str, FriendlySettings, str], ...] = (
        ("int8", "Polyak steps", POLYAK, "<= 3072"),
        ("bits", "Polyak steps", POLYAK, "<= 385"),
        ("bits", "Eq. 3, 20 steps", PAPER, "<= 385"),
        ("flips", "flips", FLIPS, "<= 48"),
    )
    for number, (coding, name, settings, target) in enumerate(made):
        store = NoiseStore.generate(
            model, x, folder / f"real-{number}", settings=settings, coding=coding, shard_rows=128
        )
        info, title = store.info(), f"{NAMES[coding]} ({name})"
        rows.append(single(f"{title}: noise of an image", info["bytes_per_image"], "bytes", target))
        rows.append(single(f"{title}: bits of a value", info["bits_per_value"], "bits"))
        rows.append(single(f"{title}: mean KL before coding", info["kl_before_coding"], ""))
        rows.append(single(f"{title}: mean KL after coding", info["kl_after_coding"], ""))
    rows.append(single("all codings: key and hash of an image", 16, "bytes"))
    return rows


def measure(quick: bool = False, data: str | None = None) -> Rows:
    """Every number; about a minute, or seconds if quick."""
    with tempfile.TemporaryDirectory() as folder:
        return speed(Path(folder), quick) + size(Path(folder), data, quick)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for found in measure():
        print(f"{found['name']:60} {found['value']:10.4g} ({found['low']:.4g}-{found['high']:.4g}) {found['unit']:24} "
              f"{found['target']}")  # fmt: skip
