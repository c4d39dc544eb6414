"""Real digits as a folder of PNG files of mixed sizes, one of them broken, as users have them."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from friends.data.images import LabeledImages

CLASSES = ("one", "three", "seven")


def write_digits(digits: LabeledImages, folder: Path, n: int = 300) -> Path:
    """``n`` digits of three classes as ``folder/CLASS/ROW.png``; every third is larger, and not square."""
    some = digits.only_classes(["1", "3", "7"]).sample(n, torch.Generator().manual_seed(0))
    for row, (x, y) in enumerate(zip(some.x, some.y, strict=True)):
        file = folder / CLASSES[int(y)] / f"{row:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(x[0].numpy())
        (image.resize((40, 36)) if row % 3 == 0 else image).save(file)
    whole = next(folder.rglob("*.png")).read_bytes()
    (folder / "three" / "zz-torn.png").write_bytes(whole[:60])
    return folder
