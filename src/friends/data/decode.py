"""Encoded images (JPEG, PNG and their like) as one byte tensor, of one size or brought to one size."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from friends.data.convert import grey_or_rgb
from friends.types import Progress, silent

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")
MAX_PIXELS = 50_000_000
"""More pixels than this in one image are taken for a decompression bomb."""
CHUNK = 64
"""Images that a thread decodes at a time: one by one, handing over a small image costs a third of decoding it."""
WORKERS = 2


@dataclass(frozen=True)
class Encoded:
    """An image that is not decoded yet.

    Args:
        where: what errors call it: its path, or its file and row.
        data: the encoded bytes, or the file that holds them.
    """

    where: str
    data: bytes | Path


class BrokenImageError(ValueError):
    """An image that cannot be read; its message names it."""


def decode_all(
    images: Iterable[Encoded],
    n: int,
    *,
    size: int | None = None,
    skipped: dict[int, str] | None = None,
    progress: Progress = silent,
    what: str = "decode",
) -> UInt8[Tensor, "k c h w"]:
    """Decode ``n`` images into one tensor: one channel if all of them are grey, else three.

    Args:
        size: height and width to bring every image to (see :func:`square`); None demands that all are equal.
        skipped: takes up what is wrong with each image that cannot be read, by its place among the ``n``; these are
            then left out, so the tensor has fewer rows. None makes the first of them an error.

    Raises:
        BrokenImageError: an image is corrupt or implausibly large; it is named.
        ValueError: an image is not of the size of the first, or none can be read.
        FileNotFoundError: a file is not there.
    """
    out: np.ndarray[Any, np.dtype[Any]] | None = None
    first, grey, seen, done = "", True, 0, 0
    for image, pixels in _decoded(images, size, strict=skipped is None):
        seen += 1
        if seen % CHUNK == 0 or seen == n:
            progress(what, seen, n)
        if isinstance(pixels, str):
            assert skipped is not None
            skipped[seen - 1] = pixels
            continue
        if out is None:
            out, first = np.empty((n, 3, *pixels.shape[:2]), dtype=np.uint8), image.where
        if pixels.shape[:2] != out.shape[2:]:
            raise ValueError(f"images differ in size: {first} is {_hw(out.shape[2:])}, {image.where} is "
                             f"{_hw(pixels.shape)} (height x width); pass size= (--size) to make them one")  # fmt: skip
        grey = grey and pixels.ndim == 2
        out[done] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        done += 1
    if seen != n or n == 0:
        raise ValueError(f"{what}: {seen} images found where {n} were announced")
    if out is None:
        raise ValueError(f"{what}: none of {n} images can be read; the first: {(skipped or {})[0]}")
    return torch.from_numpy(out[:done, :1].copy() if grey else out[:done])


def decode(image: Encoded, size: int | None = None) -> np.ndarray[Any, np.dtype[Any]]:
    """Bytes ``(h, w)`` of a grey image or ``(h, w, 3)`` of any other. Raises ``BrokenImageError`` that names it."""
    try:
        source = io.BytesIO(image.data) if isinstance(image.data, bytes) else image.data
        with Image.open(source, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"it has {opened.width}x{opened.height} pixels")
            plain = grey_or_rgb(opened)
            return np.asarray(plain if size is None else square(plain, size))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BrokenImageError(f"{image.where} is too large for a training image, at most {MAX_PIXELS} pixels "
                         f"are decoded: {error}") from error  # fmt: skip
    except FileNotFoundError:
        raise
    except Exception as error:  # PIL's readers raise whatever a damaged file leads them to
        raise BrokenImageError(
            f"{image.where} is not a readable image: {str(error) or type(error).__name__}"
        ) from error


def square(image: Image.Image, size: int) -> Image.Image:
    """The central square of an "L" or "RGB" image, resized to ``size`` x ``size``; bilinear, antialiased."""
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def square_all(x: UInt8[Tensor, "n c h w"], size: int) -> UInt8[Tensor, "n c size size"]:
    """:func:`square` for images that are decoded already, channel by channel."""
    if x.shape[2:] == (size, size):
        return x
    out = np.empty((*x.shape[:2], size, size), dtype=np.uint8)
    for row, channel in np.ndindex(*out.shape[:2]):
        out[row, channel] = np.asarray(square(Image.fromarray(x[row, channel].numpy()), size))
    return torch.from_numpy(out)


def decoded_or_why(image: Encoded, size: int | None) -> np.ndarray[Any, np.dtype[Any]] | str:
    """:func:`decode`, or what is wrong with the image."""
    try:
        return decode(image, size)
    except BrokenImageError as error:
        return str(error)
    except FileNotFoundError:
        return f"{image.where} is not there"


def _decoded(
    images: Iterable[Encoded], size: int | None, *, strict: bool
) -> Iterator[tuple[Encoded, np.ndarray[Any, np.dtype[Any]] | str]]:
    """The images and their pixels, or what is wrong with them, in order; a few chunks are in memory at a time."""
    read = decode if strict else decoded_or_why

    def decode_chunk(chunk: list[Encoded]) -> list[np.ndarray[Any, np.dtype[Any]] | str]:
        return [read(image, size) for image in chunk]

    rest = iter(images)
    with ThreadPoolExecutor(WORKERS) as pool:
        while chunks := list(itertools.islice(_chunks(rest), 4 * WORKERS)):
            for chunk, pixels in zip(chunks, pool.map(decode_chunk, chunks), strict=True):
                yield from zip(chunk, pixels, strict=True)


def _chunks(rest: Iterator[Encoded]) -> Iterator[list[Encoded]]:
    while chunk := list(itertools.islice(rest, CHUNK)):
        yield chunk


def _hw(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]}"
