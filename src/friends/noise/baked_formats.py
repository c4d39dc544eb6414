"""Images with friendly noise in them as files that other programs read: PNG, parquet, npz; all of them lossless."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from friends.data.files import replacing
from friends.data.images import LabeledImages
from friends.noise.store import NoiseStore
from friends.types import Progress

T = TypeVar("T")
Format = Literal["png", "parquet", "npz"]
AT_ONCE = 256
"""Images that are in memory with their noise at a time; the rows of a row group."""
FILE_ROWS = 4096
"""Images in a parquet file."""
NPZ = "images.npz"


@dataclass(frozen=True)
class Part:
    """Training or test images, as they are written.

    Args:
        name: ``"train"`` or ``"test"``.
        images: without noise.
        store: the noise of these images, row by row; None to write them as they are.
        names: the path of each in an image folder, from the part's folder on; empty for other formats.
    """

    name: str
    images: LabeledImages
    store: NoiseStore | None
    names: Sequence[str] = ()

    def pixels(self, rows: Sequence[int]) -> UInt8[Tensor, "b c h w"]:
        """clip(image + friendly noise) of some rows: whole grey levels, so nothing is rounded."""
        x = self.images.x[torch.as_tensor(list(rows))]
        if self.store is None:
            return x
        return (x.to(torch.int16) + self.store.grey(rows)).clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Piece:
    """One file: where it is in the export's folder, and which rows of which part it holds (npz: all of all parts)."""

    path: Path
    part: Part
    rows: range


def pieces(kind: Format, parts: Sequence[Part]) -> list[Piece]:
    """All files of an export in the order in which they are written."""
    if kind == "npz":
        return [Piece(Path(NPZ), parts[0], range(len(parts[0].images)))]
    return [piece for part in parts for piece in (_png_pieces(part) if kind == "png" else _parquet_pieces(part))]


def _png_pieces(part: Part) -> Iterator[Piece]:
    for row, name in enumerate(part.names):
        yield Piece(Path(part.name) / name, part, range(row, row + 1))


def _parquet_pieces(part: Part) -> Iterator[Piece]:
    n = len(part.images)
    count = -(-n // FILE_ROWS)
    for number in range(count):
        path = Path("data") / f"{part.name}-{number:05d}-of-{count:05d}.parquet"
        yield Piece(path, part, range(number * FILE_ROWS, min(n, (number + 1) * FILE_ROWS)))


def write(kind: Format, out: Path, left: Sequence[Piece], parts: Sequence[Part], progress: Progress) -> None:
    """Write files that are missing, each of them whole."""
    if kind == "png":
        _write_pngs(out, left, progress)
    elif kind == "parquet":
        for done, piece in enumerate(left):
            _write_parquet(out / piece.path, piece, progress)
            progress("write", done + 1, len(left))
    elif left:
        _write_npz(out / NPZ, parts, progress)


def png(pixels: UInt8[Tensor, "c h w"]) -> bytes:
    """A grey or RGB image as PNG."""
    buffer = io.BytesIO()
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_pngs(out: Path, left: Sequence[Piece], progress: Progress) -> None:
    done = 0
    for chunk in _chunks(left):
        for part in {id(piece.part): piece.part for piece in chunk}.values():
            mine = [piece for piece in chunk if piece.part is part]
            for piece, pixels in zip(mine, part.pixels([piece.rows[0] for piece in mine]), strict=True):
                with replacing(out / piece.path) as temporary:
                    temporary.write_bytes(png(pixels))
                done += 1
                progress("write", done, len(left))


def _write_parquet(path: Path, piece: Piece, progress: Progress) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"},
                "label": {"names": list(piece.part.images.classes), "_type": "ClassLabel"}}  # fmt: skip
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata=about)
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as file:
        for rows in _chunks(piece.rows):
            encoded = [{"bytes": png(pixels), "path": None} for pixels in piece.part.pixels(rows)]
            labels = piece.part.images.y[rows[0] : rows[-1] + 1].tolist()
            file.write_table(pa.table({"image": encoded, "label": labels}, schema=schema))
            progress("write rows", rows[-1] - piece.rows.start + 1, len(piece.rows))


def _write_npz(path: Path, parts: Sequence[Part], progress: Progress) -> None:
    """Channels last: then no height or width can be taken for a number of channels."""
    arrays: dict[str, Any] = {"classes": np.array(parts[0].images.classes, dtype=np.str_)}
    for part in parts:
        c, h, w = part.images.shape
        x = np.empty((len(part.images), h, w, c), dtype=np.uint8)
        for rows in _chunks(range(len(x))):
            x[rows[0] : rows[-1] + 1] = part.pixels(rows).permute(0, 2, 3, 1).numpy()
            progress("write rows", rows[-1] + 1, len(x))
        arrays |= {f"x_{part.name}": x, f"y_{part.name}": part.images.y.numpy()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _chunks(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(rows), AT_ONCE):
        yield rows[start : start + AT_ONCE]
