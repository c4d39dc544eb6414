"""The noise of a training inside its saved state, and the folders that it lies in meanwhile."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from friends.data.files import replacing

_FILE = re.compile(r"manifest\.json|shard-\d{5}\.safetensors")


def packed(folder: Path) -> dict[str, Tensor]:
    """The files of a store as bytes."""
    files = sorted(file for file in folder.iterdir() if _FILE.fullmatch(file.name))
    return {file.name: torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in files}


def unpack(files: Mapping[str, Tensor], folder: Path) -> None:
    """Write the files of a store back.

    Raises:
        ValueError: a name is not that of a store's file.
    """
    for name, content in files.items():
        if not _FILE.fullmatch(name):
            raise ValueError(f"this is no state of Friends: a noise store has no file {name!r}")
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content.cpu().numpy().tobytes())


def is_used(folder: Path) -> bool:
    """Whether there is something in a folder."""
    return folder.is_dir() and any(folder.iterdir())


def remove(folder: str, owner: int) -> None:
    """Remove a temporary folder, in the process that made it: a forked worker holds a copy of whoever cleans up."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
