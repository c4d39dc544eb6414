"""A whole data set as one byte tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LabeledImages:
    """Images and labels of a whole data set, as bytes: a poison that does not survive rounding is not a poison.

    Args:
        x: ``(n, c, h, w)`` uint8 pixels. The float pixels of the rest of the library are these divided by 255.
        y: ``(n,)`` int64 class ids, each in ``[0, len(classes))``.
        classes: the class names, in the order of their ids.
        name: what reports call this data, e.g. ``"cifar10-jpeg"``.

    Raises:
        TypeError: ``x`` is not uint8 or ``y`` not int64.
        ValueError: shapes do not fit, or a label is out of range (the first such row is named).
    """

    x: UInt8[Tensor, "n c h w"]
    y: Int64[Tensor, " n"]
    classes: tuple[str, ...]
    name: str = "images"

    def __post_init__(self) -> None:
        if self.x.dtype != torch.uint8 or self.y.dtype != torch.int64:
            raise TypeError(f"pixels must be uint8 and labels int64, not {self.x.dtype} and {self.y.dtype}")
        if self.x.ndim != 4 or self.y.shape != self.x.shape[:1]:
            raise ValueError(f"pixels (n, c, h, w) and labels (n,) expected, not {tuple(self.x.shape)} and "
                             f"{tuple(self.y.shape)}")  # fmt: skip
        if len(self.y):
            bad = ((self.y < 0) | (self.y >= len(self.classes))).nonzero()
            if len(bad):
                row = int(bad[0])
                raise ValueError(
                    f"label {int(self.y[row])} of row {row} is out of range: there are {len(self.classes)} classes"
                )

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        return f"LabeledImages({self.name}: {len(self)} of {self.shape}, {len(self.classes)} classes)"

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(c, h, w)`` of one image."""
        c, h, w = self.x.shape[1:]
        return c, h, w

    @property
    def device(self) -> torch.device:
        """Where the pixels are."""
        return self.x.device

    def pixels(self, rows: Tensor | slice | None = None) -> Float[Tensor, "b c h w"]:
        """Float32 pixels in [0, 1] of the given rows (all by default), before normalisation and augmentation."""
        x = self.x if rows is None else self.x[rows]
        return x.float() / 255

    def to(self, device: torch.device | str) -> LabeledImages:
        """The same data on another device."""
        return LabeledImages(self.x.to(device), self.y.to(device), self.classes, self.name)

    def rows(self, rows: Tensor | Sequence[int], name: str | None = None) -> LabeledImages:
        """The given rows, in the given order, with all classes kept."""
        index = rows if isinstance(rows, Tensor) else torch.tensor(rows, dtype=torch.int64)
        index = index.to(self.x.device)
        return LabeledImages(self.x[index], self.y[index], self.classes, name or self.name)

    def only_classes(self, wanted: Sequence[str | int]) -> LabeledImages:
        """The rows of some classes, renumbered 0, 1, ... in the order given.

        Raises:
            ValueError: a class is unknown, named twice, or has no image.
        """
        ids = [self._class_id(name) for name in wanted]
        if len(set(ids)) != len(ids):
            raise ValueError(f"a class is named twice in {list(wanted)}")
        keep = torch.zeros(len(self), dtype=torch.bool, device=self.x.device)
        y = torch.zeros_like(self.y)
        for new, old in enumerate(ids):
            of_class = self.y == old
            if not bool(of_class.any()):
                raise ValueError(f"class {self.classes[old]!r} has no image in {self.name}")
            keep |= of_class
            y[of_class] = new
        return LabeledImages(self.x[keep], y[keep], tuple(self.classes[old] for old in ids), self.name)

    def _class_id(self, wanted: str | int) -> int:
        if isinstance(wanted, int):
            if not 0 <= wanted < len(self.classes):
                raise ValueError(f"class {wanted} is out of range: there are {len(self.classes)} classes")
            return wanted
        if wanted not in self.classes:
            raise ValueError(f"unknown class {wanted!r}; the classes are {', '.join(self.classes)}")
        return self.classes.index(wanted)

    def sample(self, n: int, generator: torch.Generator) -> LabeledImages:
        """``n`` rows drawn without replacement, equally many of each class as far as that goes, in file order.

        Raises:
            ValueError: ``n`` is not in ``[1, len(self)]``.
        """
        if not 1 <= n <= len(self):
            raise ValueError(f"cannot draw {n} of {len(self)} images of {self.name}")
        shuffled = torch.randperm(len(self), generator=generator)
        rank = torch.empty(len(self), dtype=torch.int64)  # how many of its class come before it in the shuffle
        y = self.y.cpu()
        for c in range(len(self.classes)):
            of_class = shuffled[y[shuffled] == c]
            rank[of_class] = torch.arange(len(of_class))
        order = shuffled[torch.argsort(rank[shuffled], stable=True)]
        return self.rows(order[:n].sort().values)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over shape, pixels, labels and class names: the identity of this data, wherever it is stored."""
        sha = hashlib.sha256(repr((tuple(self.x.shape), self.classes)).encode())
        sha.update(self.x.cpu().contiguous().numpy().data)
        sha.update(self.y.cpu().contiguous().numpy().data)
        return sha.hexdigest()

    @cached_property
    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per-channel mean and standard deviation of the pixels in [0, 1]; exact, from the histogram of bytes."""
        if not len(self):
            raise ValueError(f"{self.name} has no image to take a mean of")
        mean: list[float] = []
        std: list[float] = []
        level = torch.arange(256, dtype=torch.float64) / 255
        for channel in range(self.x.shape[1]):
            count = torch.bincount(self.x[:, channel].flatten().cpu(), minlength=256).double()
            m = float((count * level).sum() / count.sum())
            mean.append(m)
            std.append(max(float((count * (level - m) ** 2).sum() / count.sum()) ** 0.5, 1 / 255))
        return tuple(mean), tuple(std)
