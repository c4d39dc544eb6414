"""One item of any map-style dataset as pixels: PIL images, numpy arrays and tensors, bytes or floats.

Which axis holds the channels is decided by one rule: a tensor is ``(c, h, w)``, as torch has it; a numpy array is
``(h, w, c)``, as PIL gives it, unless its first axis has length 1, 3 or 4 and its last has not. Two axes are one
grey channel. What could be read in more than one way is refused, not guessed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

CHANNELS = (1, 3, 4)
ROUNDING = 1e-4
"""How far outside [0, 1] a float pixel may lie: resizing in float32 overshoots by about this much. It is clamped."""


def to_pixels(image: object) -> Float[Tensor, "c h w"]:
    """An image as float32 pixels in [0, 1], on the CPU unless it is a tensor that lives elsewhere.

    Args:
        image: a PIL image, or a numpy array or tensor of uint8 in [0, 255] or of floats in [0, 1].

    Raises:
        TypeError: it is none of these, or its numbers are neither uint8 nor floats.
        ValueError: it is empty, holds NaN or values outside [0, 1], or it is unclear which axis holds the channels.
    """
    raw = _channels_first(image)
    return raw.float() / 255 if raw.dtype == torch.uint8 else raw


def to_bytes(image: object) -> UInt8[Tensor, "c h w"]:
    """An image as uint8 pixels; floats are rounded to the nearest of 256 levels.

    Args and errors are those of :func:`to_pixels`, whose result is within 1/510 of this divided by 255.
    """
    raw = _channels_first(image)
    return raw if raw.dtype == torch.uint8 else (raw * 255).round().to(torch.uint8)


def grey_or_rgb(image: Image.Image) -> Image.Image:
    """The image in mode "L" if it has no colour by its mode, else in "RGB"; transparency is dropped.

    Raises:
        TypeError: it has 16-bit or float pixels, which have no 255 to end at.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise TypeError(f"a PIL image of mode {image.mode!r} has no fixed white: scale it to 8 bits yourself")
    if image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, PIL warns of transparent palettes
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def _channels_first(image: object) -> Tensor:
    """``(c, h, w)`` of uint8, or of float32 that was checked to be in [0, 1]."""
    if isinstance(image, Image.Image):
        image = np.asarray(grey_or_rgb(image))
    if isinstance(image, np.ndarray):
        raw = torch.from_numpy(_native(_array_to_chw(image)))
    elif isinstance(image, Tensor):
        raw = _tensor_to_chw(image.detach())
    else:
        raise TypeError(f"an image is a PIL image, a numpy array or a tensor, not {type(image).__name__}")
    if raw.numel() == 0:
        raise ValueError(f"an image of shape {tuple(raw.shape)} has no pixels")
    return raw if raw.dtype == torch.uint8 else _checked_floats(raw)


def _array_to_chw(array: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3:
        raise ValueError(f"an image has 2 or 3 axes, not the shape {array.shape}")
    if array.shape[0] in CHANNELS and array.shape[2] not in CHANNELS:
        return array
    if array.shape[2] not in CHANNELS:
        raise ValueError(f"unclear which axis of an array of shape {array.shape} holds the channels: "
                         f"neither the first nor the last is 1, 3 or 4; pass a (c, h, w) tensor")  # fmt: skip
    return array.transpose(2, 0, 1)


def _native(array: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """A writable copy in this machine's byte order: torch takes neither views backwards nor foreign floats."""
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise TypeError(f"pixels are uint8 in [0, 255] or floats in [0, 1], not {array.dtype}")
    return np.array(array, dtype=np.uint8 if array.dtype == np.uint8 else np.float32, order="C")


def _tensor_to_chw(x: Tensor) -> Tensor:
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise TypeError(f"pixels are uint8 in [0, 255] or floats in [0, 1], not {x.dtype}")
    if x.ndim == 2:
        return x[None]
    if x.ndim != 3:
        raise ValueError(f"an image has 2 or 3 axes, not the shape {tuple(x.shape)}")
    if x.shape[0] not in CHANNELS and x.shape[2] in CHANNELS:
        raise ValueError(f"a tensor is (c, h, w), but {tuple(x.shape)} looks like (h, w, c): use .permute(2, 0, 1)")
    return x


def _checked_floats(x: Tensor) -> Tensor:
    x = x.float()
    low, high = (float(bound) for bound in x.aminmax())  # both are NaN where any pixel is
    if low != low:
        raise ValueError("the image has NaN pixels")
    if low < -ROUNDING or high > 1 + ROUNDING:
        way_out = "divide by 255" if low >= 0 and high <= 255 else "take them before normalisation"
        raise ValueError(f"float pixels must be in [0, 1], but these are in [{low:g}, {high:g}]: {way_out}")
    return x.clamp(0, 1)
