"""Friendly noise as whole grey levels, from a start that depends on a seed and an image's key alone.

On the byte lattice the noise is exact: image plus noise is again a byte image, no scale factor has to be kept, and a
value takes one byte. Rounding to it leaves the KL divergence of friendly noise unchanged.

The start of a row is part of the storage format, so its bits are defined here and may never change: Philox4x64-10
(Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011) with the key ``(seed, key)`` modulo 2^64 and the
counters 1, 2, ...; every 64-bit word gives two values, low half first; the upper 24 bits ``k`` of a half become
``(2k - 2^24) / 2^24 * init`` in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int8, Int64, UInt8
from torch import Tensor, nn

from friends.modules import still
from friends.noise.friendly import RELEASED, FriendlySettings, optimised
from friends.noise.lean import lean
from friends.noise.philox import corners
from friends.noise.random import check_strength
from friends.types import Progress, silent

MAX_GREY = 127
"""The largest grey level that a signed byte holds in both directions."""

_WORD = (1 << 64) - 1


def grey_limit(zeta: float) -> int:
    """The largest whole grey level within ``zeta``, e.g. 16 for 16/255.

    Raises:
        ValueError: ``zeta`` is not in [0, 127/255].
    """
    check_strength("zeta", zeta)
    limit = int(zeta * 255 + 1e-6)  # 16/255*255 may come out as 15.999999999999998
    if limit > MAX_GREY:
        raise ValueError(f"noise is stored as int8 grey levels, so zeta is at most 127/255, not {zeta * 255:g}/255")
    return limit


def initial_noise(
    keys: Int64[Tensor, " b"] | Sequence[int], shape: tuple[int, int, int], init: float, seed: int
) -> Float[Tensor, "b c h w"]:
    """The start of each row, uniform in [-init, init), a function of ``seed`` and its own key only.

    Args:
        keys: 64-bit integers, one per row.
        shape: ``(c, h, w)``.
        init: half width in [0, 1] pixel units.
        seed: any integer; taken modulo 2^64.

    Returns:
        float32 on the CPU; the same bits on every platform.
    """
    values = int(np.prod(shape))
    start = np.empty((len(keys), values), dtype=np.float32)
    for row, key in enumerate(keys.tolist() if isinstance(keys, Tensor) else keys):
        stream = np.random.Philox(key=np.array([seed & _WORD, key & _WORD], dtype=np.uint64))
        words = stream.random_raw((values + 1) // 2)
        halves = np.stack([words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)], 1).reshape(-1)[:values]
        start[row] = (halves >> np.uint64(8)).astype(np.float32)  # 24 bits: exact in float32
    start = (start * 2 - 2**24) * np.float32(2**-24) * np.float32(init)
    return torch.from_numpy(start).reshape(len(keys), *shape)


def grey_noise(
    model: nn.Module,
    x_bytes: UInt8[Tensor, "b c h w"],
    keys: Int64[Tensor, " b"] | Sequence[int],
    settings: FriendlySettings = RELEASED,
    *,
    seed: int,
    batch_size: int | None = None,
    progress: Progress = silent,
) -> Int8[Tensor, "b c h w"]:
    """The friendly noise of byte images in whole grey levels, batch by batch.

    Args:
        model: as :func:`friends.noise.friendly_noise` takes it; the work is done on its device.
        x_bytes: ``(b, c, h, w)`` uint8 pixels, not augmented.
        keys: one 64-bit integer per row, naming the stream that its start is drawn from.
        settings: how the noise is optimised; ``zeta`` at most 127/255.
        seed: of all the starts.
        batch_size: how many images are worked on at once, by default what suits the device. Up to rounding it does not
            change the result.
        progress: told after every batch.

    Returns:
        int8 grey levels on the device of ``x_bytes``, within zeta, and ``0 <= x_bytes + noise <= 255`` (``"flips"``
        alone leaves every value at +-zeta, for whoever adds it to clip).

    Raises:
        TypeError: ``x_bytes`` is not uint8.
        ValueError: not one key per row, ``zeta`` out of range, or what ``friendly_noise`` raises.
    """
    grey_limit(settings.zeta)
    if x_bytes.dtype != torch.uint8 or x_bytes.ndim != 4:
        raise TypeError(f"uint8 images (b, c, h, w) expected, not {x_bytes.dtype} {tuple(x_bytes.shape)}")
    if len(keys) != len(x_bytes) or (batch_size is not None and batch_size < 1):
        raise ValueError(f"{len(keys)} keys for {len(x_bytes)} images, in batches of {batch_size}")
    grey = torch.empty(x_bytes.shape, dtype=torch.int8, device=x_bytes.device)
    device = device_of(model, x_bytes.device)
    size = batch_size or batch_for(device)
    if len(x_bytes) == 0:
        return grey
    with still([model], freeze=True, device=device):
        f = lean(model, x_bytes[:size].to(device).float() / 255, settings.precision)
        for start in range(0, len(x_bytes), size):
            rows = slice(start, start + size)
            here = x_bytes[rows].to(device)
            initial = _start(keys[rows], (here.shape[1], here.shape[2], here.shape[3]), settings, seed)
            noise = optimised(f, here.float() / 255, initial.to(device), settings)
            grey[rows] = _rounded(noise, here, settings).to(grey.device)
            progress("friendly noise", min(start + size, len(x_bytes)), len(x_bytes))
    return grey


def batch_for(device: torch.device) -> int:
    """How many images to work on at once: what fits a processor's caches, or what fills a GPU."""
    return 64 if device.type == "cpu" else 512


def _start(
    keys: Tensor | Sequence[int], shape: tuple[int, int, int], settings: FriendlySettings, seed: int
) -> Float[Tensor, "b c h w"]:
    if settings.method == "sgd":
        return initial_noise(keys, shape, settings.init, seed)
    return corners(keys, shape, 1, seed) * settings.zeta


def _rounded(noise: Tensor, x_bytes: Tensor, settings: FriendlySettings) -> Int8[Tensor, "b c h w"]:
    """Whole grey levels within zeta and, unless every value must stay at +-zeta, within the image's box."""
    limit, level = grey_limit(settings.zeta), x_bytes.to(torch.int16)
    grey = (noise * 255).round().to(torch.int16).clamp(-limit, limit)
    if settings.method != "flips":
        grey = torch.minimum(torch.maximum(grey, -level), 255 - level)
    return grey.to(torch.int8)


def device_of(model: nn.Module, default: torch.device) -> torch.device:
    """Where the model lives: the device of its first parameter or buffer, else ``default``."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return default
