"""Random noise, redrawn at every step, and the one place where both noises are added to an image.

Source: FRIENDS (Friendly Noise against Adversarial Noise, NeurIPS 2022), section 3.3, and Algorithm 2:
``x_hat = x + eps + mu``, with ``mu`` from one of three distributions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor

RandomNoise = Literal["bernoulli", "uniform", "gaussian"]
"""The three distributions of the paper: FRIENDS-B, FRIENDS-U and FRIENDS-G."""


def bernoulli(x: Float[Tensor, "b c h w"], mu: float, generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Noise shaped like ``x``: -mu or +mu with equal probability, independently for every value. Rms is mu."""
    return signs(x.shape, generator).to(x.dtype) * mu


def signs(shape: tuple[int, ...], generator: torch.Generator) -> Int8[Tensor, " *shape"]:
    """-1 or +1, each with probability 1/2, on the device of ``generator``: every bit that it makes is a sign.

    One random number of 64 bits makes 64 of them, by way of a table of the eight signs in every byte.
    """
    count = math.prod(shape)
    words = torch.empty(-(-count // 64), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return _eight_signs(generator.device)[words.view(torch.uint8).int()].view(torch.int8)[:count].view(shape)


@cache
def _eight_signs(device: torch.device) -> Int64[Tensor, " 256"]:
    """For every byte its bits as eight bytes that are -1 or +1, held as one number so that they are moved at once."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (2 * bits - 1).to(torch.int8).view(torch.int64).flatten().to(device)


def uniform(x: Float[Tensor, "b c h w"], mu: float, generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Noise shaped like ``x``: uniform in [-mu, mu]. Rms is mu/sqrt(3)."""
    return (2 * torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 1) * mu


def gaussian(x: Float[Tensor, "b c h w"], mu: float, generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Noise shaped like ``x``: N(0, mu), mu being the standard deviation; unbounded, as in the released code."""
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype) * mu


RANDOM: dict[RandomNoise, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "bernoulli": bernoulli,
    "uniform": uniform,
    "gaussian": gaussian,
}


def random_noise(
    x: Float[Tensor, "b c h w"], kind: RandomNoise, mu: float, generator: torch.Generator
) -> Float[Tensor, "b c h w"]:
    """Noise shaped, typed and placed like ``x``, drawn from ``generator`` (which must be on the device of ``x``).

    Args:
        x: a batch of pixels; only its shape, type and device matter.
        kind: ``"bernoulli"``, ``"uniform"`` or ``"gaussian"``.
        mu: strength in [0, 1] pixel units (16/255 in the paper): the magnitude, the half width, or the standard
            deviation.

    Raises:
        ValueError: unknown ``kind`` or negative ``mu``.
    """
    check_random(kind, mu)
    return RANDOM[kind](x, mu, generator)


def check_random(kind: str, mu: float) -> None:
    """Raise ``ValueError`` unless this is a known distribution with a strength in [0, 1]."""
    if kind not in RANDOM:
        raise ValueError(f"unknown random noise {kind!r}; choose one of {', '.join(get_args(RandomNoise))}")
    check_strength("mu", mu)


def check_strength(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is in [0, 1], with a hint when it looks like grey levels."""
    if not 0 <= value <= 1:
        hint = f"; did you mean {value:g}/255?" if 1 < value <= 255 else ""
        raise ValueError(f"{name} is in [0, 1] pixel units, not {value!r}{hint}")


def add_noise(
    x: Float[Tensor, "b c h w"],
    friendly: Float[Tensor, "b c h w"] | Int8[Tensor, "b c h w"] | None,
    *,
    random: RandomNoise = "bernoulli",
    mu: float = 16 / 255,
    generator: torch.Generator,
) -> Float[Tensor, "b c h w"]:
    """Add both noises to a batch, in the order of the paper's system.

    The image plus its friendly noise is clamped to [0, 1]; then the random noise is added and **not** clamped. All
    this is in pixel space, before normalisation and before any flip, crop or shift: friendly noise belongs to the
    pixels of the stored image, and moves with them.

    Args:
        x: ``(b, c, h, w)`` float pixels in [0, 1].
        friendly: the friendly noise of the same images, in pixel units or, as int8, in grey levels; or None before
            there is any.
        random: distribution of the random noise.
        mu: strength of the random noise in [0, 1] pixel units; at 0 nothing is drawn.
        generator: where the random noise is drawn from.

    Returns:
        A new tensor, or ``x`` itself, bit for bit, when there is neither noise.
    """
    own = None
    if friendly is not None:
        own = friendly.to(x.dtype, copy=True)
        x = (own if friendly.is_floating_point() else own.div_(255)).add_(x).clamp_(0, 1)
    if mu == 0:
        return x
    if random != "bernoulli":
        return x + random_noise(x, random, mu, generator)
    check_random(random, mu)
    return torch.add(x, signs(x.shape, generator), alpha=mu, out=own)
