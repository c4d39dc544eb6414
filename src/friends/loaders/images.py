"""One image of anybody's pipeline as pixels, and pixels back as the same kind of image.

A kind that holds bytes (a PIL image, uint8) cannot hold what is below black or above white, nor fractions of a grey
level: there an image is rounded and clipped on its way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from friends.data.convert import CHANNELS, to_pixels
from friends.noise.rows import image_of, with_image

Back = Callable[[Tensor], object]
"""Pixels ``(c, h, w)`` -> an image of the kind that they were read from."""

Moments = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, by which images are normalised."""

EMITTED = ("image", "img", "pixel_values", "x", "input")
"""What fields of an item with the finished image are called, the likeliest first."""


def is_bytes(image: object) -> bool:
    """Whether this kind of image holds whole grey levels only."""
    return isinstance(image, Image.Image) or getattr(image, "dtype", None) in (torch.uint8, np.uint8)


def is_image(thing: object) -> bool:
    """Whether this looks like an image, of whatever numbers."""
    if isinstance(thing, Image.Image):
        return True
    return isinstance(thing, Tensor | np.ndarray) and thing.ndim in (2, 3)


def read(image: object, moments: Moments | None = None) -> tuple[Float[Tensor, "c h w"], Back]:
    """The pixels of an image, float32 in [0, 1], and the way back.

    Args:
        image: a PIL image, or a numpy array or tensor, of bytes or of floats in [0, 1].
        moments: what a float image was normalised with; None if it is pixels.

    Raises:
        TypeError, ValueError: it is no image, or its pixels are not in [0, 1].
    """
    if moments is not None and not is_bytes(image):
        return _read_normalised(image, moments)
    x = to_pixels(image.as_subclass(Tensor) if isinstance(image, Tensor) else image)
    if isinstance(image, Image.Image):
        return x, _to_pil
    if isinstance(image, np.ndarray):
        return x, _to_array(cast("NDArray[Any]", image))
    return x, _to_tensor(cast(Tensor, image))


def _read_normalised(image: object, moments: Moments) -> tuple[Tensor, Back]:
    if not isinstance(image, Tensor) or image.ndim != 3:
        raise TypeError(f"a normalised image is a float tensor (c, h, w), not {type(image).__name__}")
    mean, std = (torch.tensor(values, device=image.device).reshape(-1, 1, 1) for values in moments)
    kind, form = image.dtype, type(image)
    x = to_pixels(image.as_subclass(Tensor).float() * std + mean)
    return x, lambda x: ((x - mean) / std).to(kind).as_subclass(form)


def to_grey(x: Float[Tensor, "c h w"]) -> Tensor:
    """Pixels as bytes, rounded and clipped at black and white."""
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


def _to_pil(x: Tensor) -> object:
    grey = to_grey(x).cpu().numpy()
    return Image.fromarray(grey[0] if len(grey) == 1 else grey.transpose(1, 2, 0))


def _to_array(image: NDArray[Any]) -> Back:
    kind, flat = image.dtype, image.ndim == 2
    last = not flat and not (image.shape[0] in CHANNELS and image.shape[2] not in CHANNELS)  # as to_pixels reads it

    def back(x: Tensor) -> object:
        values = (to_grey(x) if kind == np.uint8 else x).cpu().numpy()
        values = values[0] if flat else values.transpose(1, 2, 0) if last else values
        return np.ascontiguousarray(values, dtype=kind)

    return back


def _to_tensor(image: Tensor) -> Back:
    kind, flat, form = image.dtype, image.ndim == 2, type(image)

    def back(x: Tensor) -> object:
        values = to_grey(x) if kind == torch.uint8 else x.to(kind)
        return (values[0] if flat else values).as_subclass(form)

    return back


def raw_image(item: object, field: str | None) -> object:
    """The image in an item: in the field of that name, or else where :func:`friends.noise.rows.image_of` finds it."""
    if field is None or not isinstance(item, Mapping):
        return image_of(item)
    fields = cast("Mapping[str, object]", item)
    if field not in fields:
        raise TypeError(f"an item of the data set has the fields {', '.join(map(repr, fields))}: none is {field!r}")
    return fields[field]


def with_raw_image(item: object, field: str | None, image: object) -> object:
    """The same item with another image in the place of :func:`raw_image`."""
    if field is None or not isinstance(item, Mapping):
        return with_image(item, image)
    return {**cast("Mapping[str, object]", item), field: image}


def emitted_image(item: object, field: str | None) -> object:
    """The finished image in an item, after all transforms; it may be in another field than the raw one. None if none.

    Only looked at, never replaced.
    """
    if isinstance(item, Mapping):
        fields = cast("Mapping[str, object]", item)
        named = [fields[name] for name in (*EMITTED, field or EMITTED[0]) if name in fields]
        return next((value for value in (*named, *fields.values()) if is_image(value)), None)
    if isinstance(item, tuple | list):
        return next((value for value in cast("Sequence[object]", item) if is_image(value)), None)
    return item if is_image(item) else None


def as_floats(x: Float[Tensor, "c h w"], image: object) -> Tensor:
    """Pixels in the place of an image that is to go on as floats: a tensor, of the image's own class if it is one."""
    return x.as_subclass(type(image)) if isinstance(image, Tensor) else x


class Canonical:
    """Bring images of any size to one: the shorter side to ``size``, then the square in the middle."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"canonical_size is at least 1, not {size}")
        self.size = size

    def __call__(self, image: object) -> object:
        """The image, of the same kind."""
        if isinstance(image, Image.Image):
            scale = self.size / min(image.size)
            width, height = (max(self.size, round(side * scale)) for side in image.size)
            left, top = (width - self.size) // 2, (height - self.size) // 2
            larger = image.resize((width, height), Image.Resampling.BILINEAR)
            return larger.crop((left, top, left + self.size, top + self.size))
        x, back = read(image)
        h, w = x.shape[1:]
        scale = self.size / min(h, w)
        size: tuple[int, int] = (max(self.size, round(h * scale)), max(self.size, round(w * scale)))
        mode: Literal["bilinear"] = "bilinear"
        x = torch.nn.functional.interpolate(x[None], size, mode=mode, antialias=True)[0].clamp(0, 1)
        top, left = (size[0] - self.size) // 2, (size[1] - self.size) // 2
        return back(x[:, top : top + self.size, left : left + self.size])
