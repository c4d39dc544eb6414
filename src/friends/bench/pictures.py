"""The images of a report as strips: what the attacker started from, what was added, and what a model trains on."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int16, UInt8
from PIL import Image
from torch import Tensor

from friends.bench.exhibit import Exhibit

SHOWN = 6
"""Images in a strip: as many as can be told apart side by side on a phone."""
SIDE = 128
"""Small images are enlarged by a whole factor to about this many pixels, each pixel becoming a square."""


@dataclass(frozen=True)
class Picture:
    """One image: a ``data:`` URI, its size, and words for those who cannot see it."""

    uri: str
    alt: str
    width: int
    height: int


@dataclass(frozen=True)
class Strip:
    """Images of one kind side by side, and what they are."""

    title: str
    caption: str
    images: tuple[Picture, ...]


def target_picture(exhibit: Exhibit) -> Picture:
    """The image that the attacker wants misread."""
    return _picture(exhibit.target, "the target image")


def strips(exhibit: Exhibit) -> list[Strip]:
    """All strips that the exhibit has material for, in the order in which things happen to an image."""
    bases, poisons = (part[:SHOWN].cpu().to(torch.int16) for part in (exhibit.bases, exhibit.poisons))
    found = [
        _images("Base images", "Training images as they were before the attack.", bases),
        _noise("What the attacker added", "The perturbation, magnified", poisons - bases),
        _images("Poisons", "The same images as the victim gets them.", poisons),
    ]
    seen = poisons
    if exhibit.friendly is not None:
        friendly = exhibit.friendly[:SHOWN].cpu().to(torch.int16)
        seen = (poisons + friendly).clamp(0, 255)
        found.append(_noise("Friendly noise", "Made once for each image, magnified", friendly))
        found.append(_images("Poison + friendly noise", "The poison with its friendly noise added.", seen))
    if exhibit.random is not None:
        random = exhibit.random[:SHOWN].cpu().to(torch.int16)
        found.append(_noise("Random noise", "One draw of many: it is drawn anew at every step. Magnified", random))
        what = "Poison + friendly + random" if exhibit.friendly is not None else "Poison + random noise"
        found.append(_images(what, "What one training step sees, clipped for display only.", seen + random))
    return found


def _images(title: str, caption: str, grey: Int16[Tensor, "k c h w"]) -> Strip:
    bytes_ = grey.clamp(0, 255).to(torch.uint8)
    return Strip(title, caption, _each(bytes_, lambda i: f"{title}, image {i + 1}"))


def _noise(title: str, caption: str, grey: Int16[Tensor, "k c h w"]) -> Strip:
    """Noise, magnified, and by how much."""
    stretched, reach = magnified(grey)
    if reach == 0:
        caption = f"{caption}: there is none, all is mid-grey."
    else:
        caption = f"{caption}: mid-grey is 0, black to white is ±{reach}/255 (×{127.5 / reach:.2g})."
    return Strip(title, caption, _each(stretched, lambda i: f"{title} of image {i + 1}, at most {reach}/255"))


def _each(images: UInt8[Tensor, "k c h w"], alt: Callable[[int], str]) -> tuple[Picture, ...]:
    return tuple(_picture(image, alt(i)) for i, image in enumerate(images))


def _picture(image: UInt8[Tensor, "c h w"], alt: str) -> Picture:
    """A PNG of the image, enlarged."""
    drawn = enlarged(image, SIDE)
    stream = io.BytesIO()
    drawn.save(stream, format="PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(uri, alt, *drawn.size)


def magnified(grey: Int16[Tensor, "k c h w"]) -> tuple[UInt8[Tensor, "k c h w"], int]:
    """Noise around mid-grey, stretched so that its largest value becomes black or white; and this value."""
    reach = int(grey.abs().max())
    return (127.5 + grey.float() * (127.5 / max(1, reach))).round().to(torch.uint8), reach


def enlarged(image: UInt8[Tensor, "c h w"], side: int) -> Image.Image:
    """An image of one channel or three, by a whole factor to at most ``side`` pixels, so that its pixels stay crisp.

    One that is larger stays as it is.
    """
    _, h, w = image.shape
    rows = image.cpu().permute(1, 2, 0).contiguous().numpy()
    drawn = Image.fromarray(rows[:, :, 0] if rows.shape[2] == 1 else rows)
    factor = max(1, side // max(h, w))
    return drawn.resize((w * factor, h * factor), Image.Resampling.NEAREST)
