"""One shard of a noise store: a safetensors file with the noise, the keys and the content hashes of some rows.

A shard may come from anywhere, so nothing in it is believed before it is checked: the header is capped in size and
validated by safetensors itself, the tensors must be exactly the expected ones, and every value must be within zeta.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int8
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from friends.data.files import write_tensors
from friends.noise.rows import Int64s

MAX_HEADER = 1 << 16
"""Bytes that a shard's header may have; ours has a few hundred."""

_CHUNK = 1 << 22
_SAFETENSORS_TYPES = {"content": "I64", "keys": "I64", "noise": "I8"}


@dataclass(frozen=True)
class Shard:
    """The rows of one file; the noise is mapped from the disk, not read."""

    noise: NDArray[np.int8]
    keys: Int64s
    content: Int64s


def write_shard(path: Path, noise: Int8[Tensor, "b c h w"], keys: Int64s, content: Int64s) -> dict[str, Any]:
    """Write a shard atomically. Returns what the manifest says of it: its size, its sha256, and that of its images.

    The images' is over the 64-bit hashes of the rows: the fingerprint of this part of the data set.
    """
    tensors = {"noise": noise, "keys": torch.from_numpy(keys), "content": torch.from_numpy(content)}
    write_tensors(path, tensors, {"format": "friends noise shard"})
    images = hashlib.sha256(content.astype("<i8").tobytes()).hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest(path), "images": images}


def digest(path: Path) -> str:
    """The sha256 of a file, read piece by piece."""
    sha = hashlib.sha256()
    for piece in _pieces(path, 0):
        sha.update(piece)
    return sha.hexdigest()


def whole(path: Path, record: dict[str, Any]) -> bool:
    """Whether the file is there and is, byte for byte, the one that the manifest recorded."""
    return path.is_file() and path.stat().st_size == record["bytes"] and digest(path) == record["sha256"]


def open_shard(path: Path, record: dict[str, Any], rows: int, shape: tuple[int, int, int]) -> Shard:
    """Map a shard whose size and header are as they must be; its values are not looked at.

    Raises:
        ValueError: the file is missing, torn, not safetensors, or holds other tensors than the manifest says.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    size = path.stat().st_size
    if size != record["bytes"]:
        raise ValueError(f"{path} is torn: it has {size} bytes, the manifest says {record['bytes']}")
    offsets = _offsets(path, {"content": (rows,), "keys": (rows,), "noise": (rows, *shape)})
    integers = np.dtype("<i8")
    return Shard(
        noise=np.asarray(np.memmap(path, np.int8, "r", offsets["noise"], (rows, *shape))),
        keys=np.fromfile(path, integers, rows, offset=offsets["keys"]).astype(np.int64),
        content=np.fromfile(path, integers, rows, offset=offsets["content"]).astype(np.int64),
    )


def refuse_damage(path: Path, record: dict[str, Any], limit: int) -> None:
    """Raise ``ValueError`` if a shard's bytes are not those of the manifest, or a value is beyond ``limit``."""
    if digest(path) != record["sha256"]:
        raise ValueError(f"{path} is torn: its sha256 is not the one in the manifest")
    start, values = _span(path, "noise")
    for piece in _pieces(path, start, values):
        grey = np.frombuffer(piece, np.int8)
        if grey.size and (grey.min() < -limit or grey.max() > limit):
            worst = max(-int(grey.min()), int(grey.max()))
            raise ValueError(f"{path} holds noise of {worst}/255, beyond its zeta of {limit}/255")


def _offsets(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Where each tensor starts in the file, after safetensors itself has accepted the header."""
    _header(path)  # its size is capped before anything parses it
    try:
        with safe_open(str(path), framework="np") as file:  # pyright: ignore[reportUnknownVariableType]
            names = sorted(file.keys())
            if names != sorted(expected):
                raise ValueError(f"{path} holds the tensors {', '.join(names)}, not {', '.join(sorted(expected))}")
            for name, shape in expected.items():
                piece = file.get_slice(name)
                kind, found = piece.get_dtype(), tuple(piece.get_shape())
                if kind != _SAFETENSORS_TYPES[name] or found != shape:
                    raise ValueError(f"{path}: {name} is {kind} {found}, not {_SAFETENSORS_TYPES[name]} {shape}")
    except SafetensorError as error:
        raise ValueError(f"{path} is torn or not a safetensors file: {error}") from error
    return {name: _span(path, name)[0] for name in expected}


def _span(path: Path, name: str) -> tuple[int, int]:
    """Start and length in bytes of a tensor; only for a header that safetensors has accepted."""
    start, header = _header(path)
    first, last = header[name]["data_offsets"]
    return start + first, last - first


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data start, and the header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"{path} claims a header of {length} bytes; at most {MAX_HEADER} are allowed")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is torn or not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is no object")
    return 8 + length, header  # pyright: ignore[reportUnknownVariableType]


def _pieces(path: Path, start: int, length: int | None = None) -> Iterator[bytes]:
    """A part of a file, piece by piece, so that memory does not grow with it."""
    with path.open("rb") as file:
        file.seek(start)
        left = path.stat().st_size - start if length is None else length
        while left > 0 and (piece := file.read(min(left, _CHUNK))):
            left -= len(piece)
            yield piece
