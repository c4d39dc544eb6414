"""Triggers: what turns a clean image into one that a backdoor answers to.

A trigger is a frozen value that is called with pixels and a generator, and that a file can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Corners = Literal["lower-right", "all"]
"""Where :func:`corner_stamp` puts its pattern."""


@runtime_checkable
class Trigger(Protocol):
    """Pixels in [0, 1] in, triggered pixels in [0, 1] out; the input is left as it is."""

    def __call__(self, x: Float[Tensor, "b c h w"], generator: torch.Generator) -> Float[Tensor, "b c h w"]: ...


@dataclass(frozen=True, eq=False)
class Patch:
    """A patch pasted over the image, at an independent uniformly random place (Sleeper Agent) or a fixed one.

    Args:
        pixels: ``(c, ph, pw)`` float patch in [0, 1].
        corner: row and column of its upper left pixel, or None for a random place per image.

    Raises:
        ValueError: a pixel is not in [0, 1].
    """

    pixels: Float[Tensor, "c ph pw"]
    corner: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_unit("a patch's pixels", self.pixels)

    def __call__(self, x: Float[Tensor, "b c h w"], generator: torch.Generator) -> Float[Tensor, "b c h w"]:
        """A copy of ``x`` with the patch pasted in. Raises ``ValueError`` where the patch does not fit."""
        _, ph, pw = self.pixels.shape
        b, c, h, w = x.shape
        if ph > h or pw > w or self.pixels.shape[0] not in (1, c):
            raise ValueError(f"a patch of {tuple(self.pixels.shape)} does not fit images of {(c, h, w)}")
        if self.corner is not None and not (0 <= self.corner[0] <= h - ph and 0 <= self.corner[1] <= w - pw):
            raise ValueError(f"a patch of {(ph, pw)} at {self.corner} does not fit images of {(c, h, w)}")
        if self.corner is None:
            rows = torch.randint(h - ph + 1, (b,), generator=generator).tolist()
            columns = torch.randint(w - pw + 1, (b,), generator=generator).tolist()
        else:
            rows, columns = [self.corner[0]] * b, [self.corner[1]] * b
        out = x.clone()
        patch = self.pixels.to(x)
        for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
            out[i, :, row : row + ph, column : column + pw] = patch
        return out


@dataclass(frozen=True, eq=False)
class Stamp:
    """Pixels blended into the whole image by a mask: ``x * (1 - mask) + pixels * mask`` (BadNets, four corners).

    Args:
        pixels: ``(c, h, w)`` float pixels in [0, 1].
        mask: ``(h, w)`` share of the stamp in [0, 1] at every place; 0 leaves the image, 1 covers it.

    Raises:
        ValueError: a value is not in [0, 1], or the two differ in size.
    """

    pixels: Float[Tensor, "c h w"]
    mask: Float[Tensor, "h w"]

    def __post_init__(self) -> None:
        _check_unit("a stamp's pixels", self.pixels)
        _check_unit("a stamp's mask", self.mask)
        if self.mask.shape != self.pixels.shape[1:]:
            raise ValueError(f"a stamp of {tuple(self.pixels.shape)} cannot have a mask of {tuple(self.mask.shape)}")

    def __call__(self, x: Float[Tensor, "b c h w"], generator: torch.Generator) -> Float[Tensor, "b c h w"]:
        """A stamped copy of ``x``; nothing is drawn. Raises ``ValueError`` for images of another shape."""
        if x.shape[1:] != self.pixels.shape:
            raise ValueError(f"a stamp of {tuple(self.pixels.shape)} does not fit images of {tuple(x.shape[1:])}")
        mask = self.mask.to(x)
        return x * (1 - mask) + self.pixels.to(x) * mask


@dataclass(frozen=True, eq=False)
class Additive:
    """A perturbation added to the whole image and clipped to [0, 1] (Narcissus).

    Args:
        pixels: ``(c, h, w)`` what is added, float, of either sign. All 0 stands for a trigger that the attack has
            yet to make.
    """

    pixels: Float[Tensor, "c h w"]

    def __call__(self, x: Float[Tensor, "b c h w"], generator: torch.Generator) -> Float[Tensor, "b c h w"]:
        """``x + pixels`` in [0, 1]; nothing is drawn. Raises ``ValueError`` for images of another shape."""
        if x.shape[1:] != self.pixels.shape:
            raise ValueError(f"a trigger of {tuple(self.pixels.shape)} does not fit images of {tuple(x.shape[1:])}")
        return (x + self.pixels.to(x)).clamp(0, 1)


def _check_unit(what: str, values: Tensor) -> None:
    """Raise ``ValueError`` unless all values are in [0, 1]."""
    outside = values[~((values >= 0) & (values <= 1))]  # NaN is outside too
    if outside.numel():
        raise ValueError(f"{what} must be in [0, 1], not {float(outside.flatten()[0]):g}")


def colour_grid(size: int, channels: int = 3) -> Float[Tensor, "c s s"]:
    """The trigger of Hidden Trigger Backdoor and Sleeper Agent: four by four colours, scaled smoothly to ``size``.

    Args:
        size: side in pixels.
        channels: 3 for colour; 1 takes the mean over the colours.

    Raises:
        ValueError: another number of channels, or no size.
    """
    if size < 1 or channels not in (1, 3):
        raise ValueError(f"a colour grid has a side of at least 1 pixel and 1 or 3 channels, not {size}, {channels}")
    k, b, c, g, r, y, w = (
        (0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)
    )  # fmt: skip
    grid = [[r, g, b, w], [c, y, w, w], [k, k, b, k], [c, r, y, b]]
    colours = torch.tensor(grid, dtype=torch.float32).permute(2, 0, 1)[None]
    large = F.interpolate(colours, size=(80, 80), mode="bilinear")  # the published file has 80 pixels a side
    patch = F.interpolate(large, size=(size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)
    return patch if channels == 3 else patch.mean(0, keepdim=True)


def checkerboard(size: int, channels: int = 3) -> Float[Tensor, "c s s"]:
    """Black and white pixels in turn, the upper left one white: a usual trigger of BadNets.

    Raises:
        ValueError: no size.
    """
    if size < 1:
        raise ValueError(f"a checkerboard has a side of at least 1 pixel, not {size}")
    line = torch.arange(size)
    return ((line[:, None] + line[None]) % 2 == 0).float().expand(channels, size, size).clone()


def clean_label_pattern(channels: int = 3) -> Float[Tensor, "c 3 3"]:
    """The 3x3 trigger of the label-consistent backdoor: a white diagonal and a white lower right corner, on black."""
    k, w = 0.0, 1.0
    return torch.tensor([[k, k, w], [k, w, k], [w, k, w]]).expand(channels, 3, 3).clone()


def corner_stamp(
    pattern: Float[Tensor, "c ph pw"], shape: tuple[int, int, int], *, corners: Corners = "lower-right", margin: int = 0
) -> Stamp:
    """A stamp with a pattern in the lower right corner of the image or in all four.

    On the left the pattern is mirrored, so that all four corners stay what they are when the image is flipped. (Upside
    down it is not, as in the code of the label-consistent backdoor, where all four are from.)

    Args:
        pattern: float pixels in [0, 1].
        shape: ``(c, h, w)`` of the images.
        corners: ``"lower-right"`` or ``"all"``. A victim that shifts its images by some pixels pushes a pattern out of
            some of them if there is only one.
        margin: pixels between the pattern and the edges.

    Raises:
        ValueError: the pattern does not fit, or no such corners.
    """
    if corners not in get_args(Corners):
        raise ValueError(f"unknown corners {corners!r}; choose one of {', '.join(get_args(Corners))}")
    (c, h, w), (_, ph, pw) = shape, pattern.shape
    sides = 2 if corners == "all" else 1
    if margin < 0 or sides * (ph + margin) > h or sides * (pw + margin) > w or pattern.shape[0] not in (1, c):
        raise ValueError(f"a pattern of {tuple(pattern.shape)} with a margin of {margin} does not fit the corners "
                         f"({corners}) of images of {shape}")  # fmt: skip
    pixels, mask = torch.zeros(shape), torch.zeros(h, w)
    bottom, right = h - margin - ph, w - margin - pw
    for row in (bottom, margin)[:sides]:
        for column, part in ((right, pattern), (margin, pattern.flip(2)))[:sides]:
            pixels[:, row : row + ph, column : column + pw] = part
            mask[row : row + ph, column : column + pw] = 1
    return Stamp(pixels, mask)


def trigger_to_file(trigger: Trigger | None) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and header entries that hold a trigger; one of another kind is only named."""
    if trigger is None:
        return {}, {"trigger": "none"}
    if isinstance(trigger, Patch):
        return {"patch": trigger.pixels}, {"trigger": "patch", "corner": trigger.corner}
    if isinstance(trigger, Stamp):
        return {"stamp": trigger.pixels, "mask": trigger.mask}, {"trigger": "stamp"}
    if isinstance(trigger, Additive):
        return {"additive": trigger.pixels}, {"trigger": "additive"}
    return {}, {"trigger": "other"}


def trigger_from_file(where: str, tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> Trigger | None:
    """What :func:`trigger_to_file` wrote.

    Raises:
        KeyError: a part is missing.
        ValueError: begins with ``where``; the trigger is of a kind that no file can hold, or is torn.
    """
    kind = header["trigger"]
    if kind == "none":
        return None
    if kind not in ("patch", "stamp", "additive"):
        raise ValueError(f"{where} has a trigger that cannot be stored in a file")
    try:
        if kind == "stamp":
            return Stamp(tensors["stamp"], tensors["mask"])
        if kind == "additive":
            return Additive(tensors["additive"])
        return Patch(tensors["patch"], _corner(header["corner"]))
    except ValueError as error:
        raise ValueError(f"{where} has a torn trigger: {error}") from error


def _corner(value: object) -> tuple[int, int] | None:
    """A corner as JSON has it."""
    if value is None:
        return None
    parts = cast("list[object]", value) if isinstance(value, list) else []
    if [type(part) for part in parts] != [int, int]:
        raise ValueError(f"its corner is {value!r}, not a row and a column")
    return cast("tuple[int, int]", tuple(parts))
