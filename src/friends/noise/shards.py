"""One shard of a noise store: a safetensors file with the coded noise, the keys and the content hashes of some rows.

A shard may come from anywhere, so nothing in it is believed before it is checked: the header is capped in size and
validated by safetensors itself, the tensors must be exactly those of the coding, and every value must be within zeta.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from friends.data.files import sha256_of, write_tensors
from friends.noise.coding import Coder, decode
from friends.noise.picked import Coded, Parts, chunks
from friends.noise.rows import Int64s

MAX_HEADER = 1 << 16
"""Bytes that a shard's header may have; ours has a few hundred."""

_TYPES = {"I8": np.dtype("i1"), "U8": np.dtype("u1"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
"""The types of tensors in a shard, as safetensors calls them."""


@dataclass(frozen=True)
class Shard:
    """The rows of one file; the coded noise is mapped from the disk, not read."""

    coded: Coded
    keys: Int64s
    content: Int64s


def write_shard(path: Path, parts: Parts, keys: Int64s, content: Int64s) -> dict[str, Any]:
    """Write a shard atomically. Returns what the manifest says of it: its size, its sha256, and that of its images.

    The images' is over the 64-bit hashes of the rows: the fingerprint of this part of the data set.
    """
    arrays = {**parts, "keys": keys, "content": content}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    write_tensors(path, tensors, {"format": "friends noise shard"})
    images = hashlib.sha256(content.astype("<i8").tobytes()).hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path), "images": images}


def whole(path: Path, record: dict[str, Any]) -> bool:
    """Whether the file is there and is, byte for byte, the one that the manifest recorded."""
    return path.is_file() and path.stat().st_size == record["bytes"] and sha256_of(path) == record["sha256"]


def open_shard(path: Path, record: dict[str, Any], rows: int, coder: Coder) -> Shard:
    """Map a shard whose size, header and offsets are as they must be; its noise is not looked at.

    Raises:
        ValueError: the file is missing, torn, not safetensors, or holds other tensors than the manifest says.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    size = path.stat().st_size
    if size != record["bytes"]:
        raise ValueError(f"{path} is torn: it has {size} bytes, the manifest says {record['bytes']}")
    layout = coder.layout(rows)
    arrays = _mapped(path, {**layout, "content": ("I64", (rows,)), "keys": ("I64", (rows,))})
    coded = Coded(path, {name: arrays[name] for name in layout})
    coder.check(coded)
    return Shard(coded, arrays["keys"].astype(np.int64), arrays["content"].astype(np.int64))


def refuse_damage(path: Path, record: dict[str, Any], rows: int, coder: Coder, limit: int) -> None:
    """Raise ``ValueError`` if a shard's bytes are not those of the manifest, or are not noise of at most ``limit``."""
    if sha256_of(path) != record["sha256"]:
        raise ValueError(f"{path} is torn: its sha256 is not the one in the manifest")
    shard = open_shard(path, record, rows, coder)  # a mapping of its own: what is read through it leaves memory again
    for some in chunks(rows, coder.values):
        row = np.arange(some.start, some.stop)
        grey = decode(coder, [shard.coded], np.zeros_like(row), row, shard.keys[some])
        worst = np.maximum(-grey.min(1).astype(np.int16), grey.max(1))
        loud = np.flatnonzero(worst > limit)
        if len(loud):
            raise ValueError(f"{path}: row {row[loud[0]]} holds noise of {worst[loud[0]]}/255, beyond its zeta of "
                             f"{limit}/255")  # fmt: skip


def _mapped(path: Path, expected: dict[str, tuple[str, tuple[int | None, ...]]]) -> dict[str, NDArray[Any]]:
    """The tensors of the file, mapped, after safetensors itself has accepted the header."""
    _header(path)  # its size is capped before anything parses it
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with safe_open(str(path), framework="np") as file:  # pyright: ignore[reportUnknownVariableType]
            names = sorted(file.keys())
            if names != sorted(expected):
                raise ValueError(f"{path} holds the tensors {', '.join(names)}, not {', '.join(sorted(expected))}")
            for name, (kind, shape) in expected.items():
                piece = file.get_slice(name)
                found_kind, found = piece.get_dtype(), tuple(piece.get_shape())
                if found_kind != kind or not _fits(found, shape):
                    raise ValueError(f"{path}: {name} is {found_kind} {found}, not {kind} {shape}")
                shapes[name] = found
    except SafetensorError as error:
        raise ValueError(f"{path} is torn or not a safetensors file: {error}") from error
    return {name: _map(path, _TYPES[kind], _offset(path, name), shapes[name]) for name, (kind, _) in expected.items()}


def _fits(found: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    return len(found) == len(shape) and all(wanted in (None, size) for size, wanted in zip(found, shape, strict=True))


def _map(path: Path, kind: np.dtype[Any], offset: int, shape: tuple[int, ...]) -> NDArray[Any]:
    if 0 in shape:  # nothing cannot be mapped
        return np.empty(shape, kind)
    return np.asarray(np.memmap(path, kind, "r", offset, shape))


def _offset(path: Path, name: str) -> int:
    """Where in the file a tensor starts; only for a header that safetensors has accepted."""
    start, header = _header(path)
    return start + header[name]["data_offsets"][0]


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
