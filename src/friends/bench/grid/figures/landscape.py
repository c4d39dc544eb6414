"""Losses on a plane around images: how they change as pixels move along two random directions.

A direction moves every pixel value by +1 or -1, as Bernoulli noise does; so a step of 16/255 along it is Bernoulli
noise of strength 16/255, and no filter or scale of the network's own is needed. Two directions are orthogonal to the
last digit: on one half of the values they agree, on the other they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from friends.modules import logits_of, still
from friends.types import Progress, silent

BATCH = 1000
"""Images per forward pass."""


@dataclass(frozen=True, eq=False)
class Plane:
    """A square of places around images.

    Args:
        u, v: directions ``(c, h, w)`` of +1 and -1, orthogonal (where c*h*w is odd, one value of ``v`` is 0).
        steps: how far along each, ascending, in [0, 1] pixel units; the middle one is 0.
    """

    u: Float[Tensor, "c h w"]
    v: Float[Tensor, "c h w"]
    steps: Float[Tensor, " k"]

    def at(self, x: Float[Tensor, "b c h w"], row: int, column: int) -> Float[Tensor, "b c h w"]:
        """The images moved by ``steps[column]`` along u and ``steps[row]`` along v, cut to [0, 1]."""
        shift = self.steps[column] * self.u + self.steps[row] * self.v
        return (x + shift.to(x)).clamp(0, 1)


def random_plane(shape: tuple[int, int, int], reach: float, points: int, generator: torch.Generator) -> Plane:
    """A plane along two random orthogonal directions.

    Args:
        shape: ``(c, h, w)`` of an image.
        reach: how far each direction is followed either way, in [0, 1] pixel units.
        points: places along each direction; odd, so that the images themselves are among them.

    Raises:
        ValueError: ``points`` is even or less than 3, or ``reach`` is not in (0, 1].
    """
    if points < 3 or points % 2 == 0:
        raise ValueError(f"an odd number of points >= 3 has a middle, {points} has not")
    if not 0 < reach <= 1:
        raise ValueError(f"reach is in (0, 1] pixel units, not {reach!r}")
    size = shape[0] * shape[1] * shape[2]
    u = 2 * torch.randint(2, (size,), generator=generator).float() - 1
    order = torch.randperm(size, generator=generator)
    v = u.clone()
    v[order[: size // 2]] *= -1
    if size % 2:
        v[order[-1]] = 0
    half = points // 2
    steps = torch.arange(-half, half + 1) * (reach / half)
    return Plane(u.reshape(shape), v.reshape(shape), steps)


def over_plane(
    loss: Callable[[Float[Tensor, "b c h w"]], Tensor],
    x: Float[Tensor, "b c h w"],
    plane: Plane,
    *,
    what: str = "landscape",
    progress: Progress = silent,
) -> Float[Tensor, "k k"]:
    """``loss`` of the images at every place of the plane: rows along v, columns along u."""
    k = len(plane.steps)
    found = torch.zeros(k, k)
    for row in range(k):
        progress(what, row, k)
        for column in range(k):
            found[row, column] = float(loss(plane.at(x, row, column)))
    progress(what, k, k)
    return found


def along(
    loss: Callable[[Float[Tensor, "b c h w"]], Tensor],
    start: Float[Tensor, "b c h w"],
    way: Float[Tensor, "b c h w"],
    shares: Sequence[float],
) -> Float[Tensor, " s"]:
    """``loss`` of ``start`` plus shares of ``way``, cut to [0, 1]."""
    return torch.tensor([float(loss((start + share * way).clamp(0, 1))) for share in shares])


def training_loss(model: nn.Module, x: Float[Tensor, "b c h w"], y: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of images under a model in eval mode; nothing about the model changes."""
    device = next(model.parameters()).device
    with still([model], freeze=True), torch.no_grad():
        parts = zip(x.split(BATCH), y.split(BATCH), strict=True)
        sums = [F.cross_entropy(logits_of(model, a.to(device)), b.to(device), reduction="sum") for a, b in parts]
    return torch.stack(sums).sum() / len(x)


def roughness(surface: Float[Tensor, "k k"]) -> dict[str, float]:
    """How sharp a landscape is around its middle.

    Returns:
        ``centre``: the loss of the images themselves; ``mean``, ``lowest``, ``highest``: over the plane; ``range``:
        from the lowest to the highest; ``rise``: the mean over the plane less the centre. Negative where the images
        lie on a peak.
    """
    centre, mean = float(surface[len(surface) // 2, len(surface) // 2]), float(surface.mean())
    low, high = float(surface.min()), float(surface.max())
    found = {"centre": centre, "mean": mean, "lowest": low, "highest": high, "range": high - low, "rise": mean - centre}
    return {name: float(f"{value:.6g}") for name, value in found.items()}
