"""What a figure shows, as plain numbers: computed once, drawn from nothing else, and written beside the picture."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from friends.data.files import write_text

FORMAT = "friends-figure-1"
DIGITS = 6
"""Significant digits of the numbers that are written down."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A figure before it is drawn; its picture follows from this alone.

    Args:
        name: of the figure and its files.
        title: one line.
        caption: what is seen and how it was computed, as it stands in the picture.
        alt: the same for who cannot see the picture, with the numbers that matter.
        scaled_down: how the runs behind it are smaller than the published ones; empty if they are not.
        n: how many of what the numbers rest on, by what: ``{"data sets": 12}``.
        settings: with what it was computed.
        missing: parts that are not there, and why; the picture says so in their place.
        numbers: everything that is drawn, as plain values.
    """

    name: str
    title: str
    caption: str
    alt: str
    scaled_down: str = ""
    n: Mapping[str, int] = field(default_factory=dict[str, int])
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    missing: Mapping[str, str] = field(default_factory=dict[str, str])
    numbers: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def write(self, path: Path) -> Path:
        """Write it as JSON, a line for each field and each of the numbers, atomically; the same each time."""
        fields = {"format": FORMAT, **asdict(self)}
        lines = [f" {json.dumps(name)}: {_text(value)}" for name, value in fields.items()]
        write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Sheet:
        """The sheet that :meth:`write` wrote. Raises ``ValueError`` where a file is no figure of ours."""
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or cast("dict[str, Any]", value).pop("format", None) != FORMAT:
            raise ValueError(f"{path} holds no numbers of a figure ({FORMAT})")
        return cls(**cast("dict[str, Any]", value))


def _text(value: object) -> str:
    """JSON; of a table, an entry a line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False)
    table = cast("dict[str, object]", value)
    lines = [f"  {json.dumps(name)}: {json.dumps(part, allow_nan=False)}" for name, part in table.items()]
    return "{\n" + ",\n".join(lines) + "\n }"


def plain(values: Tensor) -> Any:
    """A tensor as nested lists of floats of :data:`DIGITS` significant digits, or of whole numbers."""
    if not values.dtype.is_floating_point:
        return values.tolist()
    return json.loads(json.dumps(values.double().tolist()), parse_float=lambda text: float(f"{float(text):.{DIGITS}g}"))


def packed(values: Tensor) -> dict[str, Any]:
    """Bytes (uint8 or int8) as text: pictures would be long lists."""
    if values.dtype not in (torch.uint8, torch.int8):
        raise TypeError(f"pictures are packed as bytes, not {values.dtype}")
    raw = values.cpu().contiguous().numpy()
    text = base64.b64encode(raw.tobytes()).decode()
    return {"type": raw.dtype.name, "shape": list(raw.shape), "base64": text}


def unpacked(value: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """What :func:`packed` packed."""
    raw = np.frombuffer(base64.b64decode(value["base64"]), dtype=value["type"])
    return raw.reshape(value["shape"])


def levels(strength: float) -> str:
    """A strength in [0, 1] pixel units as the paper writes it: ``16/255``."""
    return f"{255 * strength:g}/255"
