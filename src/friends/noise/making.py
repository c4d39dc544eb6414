"""Making the shards of a noise store, one after the other, so that a kill at any moment costs one shard at most."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from friends.data.files import owned
from friends.noise.coding import decode
from friends.noise.cost import measure
from friends.noise.grey import grey_noise
from friends.noise.manifest import NAME, Manifest, Plan, shard_path
from friends.noise.picked import Coded
from friends.noise.rows import Int64s, Rows, contents, spread
from friends.noise.shards import open_shard, whole, write_shard
from friends.types import Progress

SAMPLE = 64
"""How many rows of a data set that is read from disk are compared with the store, unless told otherwise."""


def make_shards(model: nn.Module, images: Rows, folder: Path, plan: Plan, keys: Int64s, progress: Progress) -> None:
    """Bring the store in ``folder`` to completion, from whatever state an earlier call left it in.

    Raises:
        ValueError: the folder holds something else, or the images are others than those it was begun with.
        BlockingIOError: another process is at it.
    """
    images.refuse_unsteady()
    _make_folder(folder)
    with owned(folder):
        manifest = _begin_or_resume(folder, plan)
        _refuse_changed_images(folder, manifest, images)
        for shard, record in enumerate(manifest.shards):
            if record is None:
                manifest.shards[shard] = _make_shard(model, images, folder, plan, shard, keys, progress)
                manifest.write(folder)


def _make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a noise store is a folder")
    folder.mkdir(parents=True, exist_ok=True)
    ours = (folder / NAME).exists()
    strangers = sorted(file.name for file in folder.iterdir() if not file.name.endswith(".tmp"))
    if strangers and not ours:
        raise ValueError(f"{folder} is not empty and no noise store (it has {strangers[0]!r}); choose another folder")


def _begin_or_resume(folder: Path, plan: Plan) -> Manifest:
    """The manifest to continue, with every shard that is not whole marked as missing."""
    if not (folder / NAME).exists():
        manifest = Manifest(plan, [None] * plan.shards)
        manifest.write(folder)
        return manifest
    manifest = Manifest.read(folder)
    plan.refuse_other(manifest.plan, folder)
    for number, record in enumerate(manifest.shards):
        if record is not None and not whole(shard_path(folder, number), record):
            manifest.shards[number] = None
    return manifest


def _refuse_changed_images(folder: Path, manifest: Manifest, images: Rows) -> None:
    """Compare rows of the shards that are there: a store may not be continued on other images.

    All of them where the images are in memory; a spread sample where each would have to be read from disk.
    """
    plan = manifest.plan
    done = [number for number, record in enumerate(manifest.shards) if record is not None]
    some = range(len(done)) if images.in_memory else spread(len(done), 8)
    for number in (done[i] for i in some) if done else ():
        record = cast("dict[str, Any]", manifest.shards[number])
        rows = plan.rows(number)
        shard = open_shard(shard_path(folder, number), record, len(rows), plan.coder)
        chosen = np.arange(len(rows)) if images.in_memory else spread(len(rows), SAMPLE // 8)
        found = contents(images.bytes(chosen + rows.start, plan.shape))
        other = np.flatnonzero(found != shard.content[chosen])
        if len(other):
            row = rows.start + int(chosen[other[0]])
            raise ValueError(f"{folder} was begun with other images: row {row} differs. Choose another folder.")


def _make_shard(
    model: nn.Module, images: Rows, folder: Path, plan: Plan, shard: int, keys: Int64s, progress: Progress
) -> dict[str, Any]:
    rows = plan.rows(shard)
    mine = keys[rows.start : rows.stop]
    x = images.bytes(np.arange(rows.start, rows.stop), plan.shape)

    def shifted(what: str, done: int, total: int, note: str = "", /) -> None:
        progress(what, rows.start + done, plan.n, note)

    noise = grey_noise(model, x, mine.tolist(), plan.settings, seed=plan.seed, batch_size=plan.batch_size,
                       progress=shifted)  # fmt: skip
    path, coder, grey = shard_path(folder, shard), plan.coder, noise.cpu()
    parts = coder.encode(grey.numpy().reshape(len(rows), -1), mine)
    some = spread(len(rows), SAMPLE)
    decoded = torch.from_numpy(decode(coder, [Coded(path, parts)], np.zeros_like(some), some, mine[some]))
    cost = measure(model, x[some], grey[some], decoded.reshape(len(some), *plan.shape))
    return write_shard(path, parts, mine, contents(x)) | {"cost": cost.to_json()}
