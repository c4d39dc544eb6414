"""Files that are there whole or not at all: written to a temporary name, synced, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Generator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield a temporary path beside ``path``; on success sync it and rename it over ``path``, else remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Windows cannot open folders; there the rename itself is all one gets."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def owned(folder: Path) -> Generator[None]:
    """Keep a second process from working in the same folder, where the system has file locks.

    The folder itself is locked, so nothing is left behind, and the lock ends with the process however that ends.
    What a process that was killed had half written is removed.

    Raises:
        BlockingIOError: another process is working in it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is working in {folder}; wait for it") from None
        except OSError:  # some network file systems cannot lock a folder
            pass
        for half in folder.rglob(".*.tmp"):
            half.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) so that ``path`` is never half of it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, atomically. Raises ``ValueError`` on NaN, which JSON does not have."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, object] | None = None) -> None:
    """Write named tensors and a JSON header as one safetensors file, atomically.

    Tensors are moved to the CPU; equal inputs give equal bytes.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}
    metadata = {"header": json.dumps(dict(header or {}), sort_keys=True, allow_nan=False)}
    with replacing(path) as temporary:
        temporary.write_bytes(save(plain, metadata=metadata))  # save_file would leave a file of its own if killed


def read_tensors(path: Path, *, max_bytes: int | None = None) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read what :func:`write_tensors` wrote. No code in the file can run: safetensors holds numbers only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is torn, not safetensors, larger than ``max_bytes``, or has no header of ours.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    if max_bytes is not None and path.stat().st_size > max_bytes:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than the {max_bytes} that it may have")
    try:
        with safe_open(str(path), framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
            metadata: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is torn or not a safetensors file: {error}") from error
    try:
        header = json.loads(metadata["header"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} has no header of ours: it was written by another program") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a header that is {type(header).__name__}, not an object")
    return tensors, header  # pyright: ignore[reportUnknownVariableType]


def tensors_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of named tensors are the same bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
