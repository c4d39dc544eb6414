"""The pictures that a run leaves behind: one goal, its poisons, and the noise laid over them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Int, Int8, Int64, UInt8
from torch import Tensor

from friends.data.files import read_tensors, write_tensors

FORMAT = "friends-exhibit-1"
GREY_LEVELS = 511
"""Noise in whole grey levels is one of -255..255."""


@dataclass(frozen=True, eq=False)
class Exhibit:
    """What the pictures of a report show, for one goal. All in grey levels: 1 is 1/255 of the pixel range.

    Args:
        target: ``(c, h, w)`` uint8, the image that the attacker wants misread.
        bases: ``(k, c, h, w)`` uint8, a few training images before the attack.
        poisons: ``(k, c, h, w)`` uint8, the same images after it.
        friendly: ``(k, c, h, w)`` int8, the friendly noise of these poisons, or None.
        random: ``(k, c, h, w)`` int8 or int16, one draw of the random noise, or None.
        histogram: ``(511,)`` int64, how often each grey level -255..255 occurs in the friendly noise of the whole
            training set, or None.
        zeta: bound of the friendly noise in [0, 1] pixel units.
        mu: strength of the random noise in [0, 1] pixel units.
        goal: which goal of the report this is, from 0.

    Raises:
        TypeError: a tensor has the wrong type.
        ValueError: shapes do not fit each other, there is no poison, or a strength is outside [0, 1], or the
            friendly noise is stronger than ``zeta``.
    """

    target: UInt8[Tensor, "c h w"]
    bases: UInt8[Tensor, "k c h w"]
    poisons: UInt8[Tensor, "k c h w"]
    friendly: Int8[Tensor, "k c h w"] | None = None
    random: Int[Tensor, "k c h w"] | None = None
    histogram: Int64[Tensor, " levels"] | None = None
    zeta: float = 0.0
    mu: float = 0.0
    goal: int = 0

    def __post_init__(self) -> None:
        if self.target.ndim != 3 or self.target.shape[0] not in (1, 3):
            raise ValueError(f"the target is (c, h, w) with 1 or 3 channels, not {tuple(self.target.shape)}")
        if self.poisons.ndim != 4 or self.poisons.shape[0] == 0:
            raise ValueError(f"at least one poison (k, c, h, w) expected, not {tuple(self.poisons.shape)}")
        if self.poisons.shape[1:] != self.target.shape:
            raise ValueError(f"poisons {tuple(self.poisons.shape[1:])} and target {tuple(self.target.shape)} differ")
        like = tuple(self.poisons.shape)
        _check("target", self.target, tuple(self.target.shape), torch.uint8)
        _check("bases", self.bases, like, torch.uint8)
        _check("poisons", self.poisons, like, torch.uint8)
        _check("friendly", self.friendly, like, torch.int8)
        _check("random", self.random, like, torch.int8, torch.int16)
        _check("histogram", self.histogram, (GREY_LEVELS,), torch.int64)
        if not (0 <= self.zeta <= 1 and 0 <= self.mu <= 1) or self.goal < 0:
            raise ValueError(f"zeta and mu are in [0, 1] and goal >= 0, not {self.zeta}, {self.mu} and {self.goal}")
        strongest = 0 if self.friendly is None else int(self.friendly.to(torch.int16).abs().max())
        if strongest > round(255 * self.zeta):
            raise ValueError(f"friendly noise of {strongest}/255 is stronger than zeta = {255 * self.zeta:g}/255")

    def save(self, path: Path) -> None:
        """Write the pictures as one safetensors file; atomic."""
        stored = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in stored.items() if isinstance(value, Tensor)}
        write_tensors(path, tensors, {"format": FORMAT, "zeta": self.zeta, "mu": self.mu, "goal": self.goal})

    @classmethod
    def load(cls, path: Path) -> Exhibit:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is torn, foreign, or holds pictures that do not fit each other.
        """
        tensors, header = read_tensors(path)
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} is not an exhibit of ours: format {header.get('format')!r}")
        numbers = {name: header.get(name) for name in ("zeta", "mu", "goal")}
        if not all(isinstance(value, (int, float)) for value in numbers.values()):
            raise ValueError(f"{path} lacks zeta, mu or goal: {numbers}")
        values = cast("dict[str, float]", numbers)
        try:
            return cls(**tensors, zeta=values["zeta"], mu=values["mu"], goal=int(values["goal"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no exhibit: {error}") from error


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    if tensor is None:
        return
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
