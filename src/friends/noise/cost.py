"""What keeping noise in fewer bits costs: how friendly it still is when it is read back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor, nn

from friends.modules import logits_of, still
from friends.noise.divergence import divergence
from friends.noise.grey import device_of

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Noise as it was optimised beside noise as it is read back, on the same images.

    Args:
        rows: how many images.
        kl: mean of KL(f(x+e) || f(x)) in nats, x+e clipped to [0, 1], for the noise as it was optimised.
        kl_decoded: the same for the noise as it is read back.
        mean_abs: mean of ``|e|`` in grey levels, as optimised.
        mean_abs_decoded: the same as it is read back.
    """

    rows: int
    kl: float
    kl_decoded: float
    mean_abs: float
    mean_abs_decoded: float

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Cost:
        """Back from JSON values. Raises ``TypeError`` or ``ValueError`` on any others."""
        cost = Cost(**value)
        numbers = (cost.kl, cost.kl_decoded, cost.mean_abs, cost.mean_abs_decoded)
        if type(cost.rows) is not int or not all(type(cast(Any, number)) in (int, float) for number in numbers):
            raise TypeError("a number in what its coding costs is none")
        if cost.rows < 1 or not all(map(math.isfinite, numbers)):
            raise ValueError(f"what its coding costs is {cost}")
        return cost

    @staticmethod
    def mean(costs: Sequence[Cost]) -> Cost:
        """The cost on the images of several, at least one."""
        rows = sum(cost.rows for cost in costs)

        def pooled(name: str) -> float:
            return sum(cost.rows * getattr(cost, name) for cost in costs) / rows

        return Cost(rows=rows, kl=pooled("kl"), kl_decoded=pooled("kl_decoded"), mean_abs=pooled("mean_abs"),
                    mean_abs_decoded=pooled("mean_abs_decoded"))  # fmt: skip


def measure(
    model: nn.Module,
    x_bytes: UInt8[Tensor, "b c h w"],
    noise: Int8[Tensor, "b c h w"],
    decoded: Int8[Tensor, "b c h w"],
) -> Cost:
    """What the coding of the noise of some images costs, for a model that takes pixels in [0, 1].

    Numbers are rounded to a millionth, so that a store that is made again has the same bytes.
    """
    device = device_of(model, x_bytes.device)
    kl, kl_decoded = 0.0, 0.0
    with still([model], freeze=True, device=device), torch.no_grad():
        for start in range(0, len(x_bytes), _BATCH):
            some = slice(start, start + _BATCH)
            x = x_bytes[some].to(device)
            clean = _log_probabilities(model, x)
            kl += _divergence(model, x, noise[some], clean)
            kl_decoded += _divergence(model, x, decoded[some], clean)
    n = len(x_bytes)
    return Cost(rows=n, kl=round(kl / n, 6), kl_decoded=round(kl_decoded / n, 6), mean_abs=_mean_abs(noise),
                mean_abs_decoded=_mean_abs(decoded))  # fmt: skip


def _log_probabilities(model: nn.Module, x_grey: Tensor) -> Tensor:
    return torch.log_softmax(logits_of(model, x_grey.float() / 255).double(), 1)


def _divergence(model: nn.Module, x_bytes: Tensor, noise: Tensor, clean: Tensor) -> float:
    noisy = (x_bytes.to(torch.int16) + noise.to(x_bytes.device)).clamp(0, 255)
    return float(divergence(_log_probabilities(model, noisy), clean, "noisy||clean")[0].sum())


def _mean_abs(noise: Tensor) -> float:
    return round(float(noise.to(torch.int16).abs().double().mean()), 6)
