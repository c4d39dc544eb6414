"""``friends predict``: what a trained model says of images, a few at a time, whatever some of the files are like."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from friends.bench.model_folder import Saved
from friends.data.decode import Encoded, decoded_or_why
from friends.data.files import replacing
from friends.data.folders import SUFFIXES, images_below
from friends.training.evaluate import probabilities
from friends.types import Progress, silent

AT_ONCE = 1 << 24
"""Pixel values that are in memory at a time: 64 MB as float32."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of one file.

    Args:
        path: of the file.
        answers: the likeliest classes and their probabilities, from the top; none if the file cannot be read.
        error: why it cannot be read, or nothing.
    """

    path: Path
    answers: tuple[tuple[str, float], ...] = ()
    error: str = ""


def files_of(named: Sequence[Path]) -> list[Path]:
    """The files that are meant: those named, and all images of the folders that are, however deep.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a folder has no image.
    """
    found: list[Path] = []
    for path in named:
        if path.is_dir():
            below = images_below(path)
            if not below:
                raise ValueError(f"{path} has no image file: none that ends in {', '.join(sorted(SUFFIXES))}")
            found += below
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"there is no file or folder {path}")
    return found


def predict(
    saved: Saved,
    files: Sequence[Path],
    *,
    top: int = 1,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Iterator[Prediction]:
    """One prediction for each file, in order. The network is moved to ``device``.

    Images are brought to the size of those that the model was trained on, as these were: the shorter side to it, then
    the central square. Coloured images become grey for a model of grey ones, and the other way round.

    Raises:
        ValueError: ``top`` is not in ``[1, classes]``.
    """
    if not 1 <= top <= len(saved.classes):
        raise ValueError(f"--top is a number from 1 to {len(saved.classes)}, the model's classes, not {top}")
    return _predict(saved, files, top, device, progress)


def _predict(
    saved: Saved, files: Sequence[Path], top: int, device: torch.device | str, progress: Progress
) -> Iterator[Prediction]:
    c, h, w = saved.shape
    network = saved.network.to(device)
    some = max(1, min(256, AT_ONCE // (c * h * w)))
    for start in range(0, len(files), some):
        part = files[start : start + some]
        images = [pixels(file, saved.shape) for file in part]
        whole = [image for image in images if not isinstance(image, str)]
        said = iter(probabilities(network, torch.stack(whole), device=device) if whole else ())
        for file, image in zip(part, images, strict=True):
            if isinstance(image, str):
                yield Prediction(file, error=image)
            else:
                values, classes = next(said).topk(top)
                named = zip(classes.tolist(), values.tolist(), strict=True)
                yield Prediction(file, tuple((saved.classes[k], p) for k, p in named))
        progress("images", min(start + some, len(files)), len(files))


def pixels(file: Path, shape: tuple[int, int, int]) -> UInt8[Tensor, "c h w"] | str:
    """The pixels of a file as a model takes them, or why there are none."""
    c, h, w = shape
    read = decoded_or_why(Encoded(str(file), file), h if h == w else None)
    if isinstance(read, str):
        return read
    if read.shape[:2] != (h, w):
        return f"{file} has {read.shape[0]}x{read.shape[1]} pixels (height x width); the model takes {h}x{w}"
    if c == 1 and read.ndim == 3:
        read = np.asarray(Image.fromarray(read).convert("L"))
    rows = torch.from_numpy(np.array(read))
    return rows.permute(2, 0, 1).contiguous() if read.ndim == 3 else rows.expand(c, -1, -1).contiguous()


def write_csv(predictions: Iterable[Prediction], path: Path, top: int) -> None:
    """Write a table: a line for each file, with what is wrong with it in the last column."""
    header = ["path", *(name for k in range(1, top + 1) for name in (f"class {k}", f"probability {k}")), "error"]
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as f,
    ):
        table = csv.writer(f)
        table.writerow(header)
        for one in predictions:
            cells = [cell for name, value in one.answers for cell in (name, f"{value:.6f}")]
            table.writerow([one.path, *(cells or [""] * (2 * top)), one.error])
