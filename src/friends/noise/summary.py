"""What there is to say about a noise store: what is in it, what it takes, and what its coding costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int8
from torch import Tensor

from friends.noise.cost import Cost
from friends.noise.grey import grey_limit
from friends.noise.manifest import Manifest
from friends.noise.picked import Coded


def summary(manifest: Manifest, coded: Sequence[Coded], pieces: Iterable[Int8[Tensor, "b c h w"]]) -> dict[str, Any]:
    """A complete store as JSON values.

    Args:
        manifest: of the store.
        coded: its noise as it is on disk.
        pieces: its noise as it is read back, all of it; read once.
    """
    plan, (c, h, w) = manifest.plan, manifest.plan.shape
    limit, values = grey_limit(plan.settings.zeta), plan.n * c * h * w
    total = bound = 0
    for noise in pieces:
        size = noise.abs()  # -128 cannot occur: zeta is at most 127
        total += int(size.sum(dtype=torch.int64))
        bound += int((size == limit).sum())
    kept = sum(part.nbytes for shard in coded for part in shard.parts.values())
    said = plan.to_json()
    return {
        **{name: said[name] for name in ("n", "shape", "proxy", "seed", "batch_size", "settings", "model", "coding")},
        "zeta": f"{limit}/255",
        "shards": plan.shards,
        "bytes": sum(record["bytes"] for record in manifest.shards if record),
        "bytes_per_image": round(kept / plan.n, 2),
        "bytes_per_image_of_key_and_hash": 2 * np.dtype(np.int64).itemsize,
        "bits_per_value": round(8 * kept / values, 4),
        "mean_abs": f"{total / values:.2f}/255",
        "share_at_bound": round(bound / values, 4),
        **_cost([Cost.from_json(record["cost"]) for record in manifest.shards if record and "cost" in record]),
    }


def _cost(costs: Sequence[Cost]) -> dict[str, Any]:
    """What the coding costs, if the store says: those of format 1 do not."""
    if not costs:
        return {}
    cost = Cost.mean(costs)
    return {
        "rows_measured": cost.rows,
        "kl_before_coding": round(cost.kl, 6),
        "kl_after_coding": round(cost.kl_decoded, 6),
        "mean_abs_before_coding": f"{cost.mean_abs:.2f}/255",
        "mean_abs_after_coding": f"{cost.mean_abs_decoded:.2f}/255",
    }
