"""Pictures of a grid's poisons: the goal, a few images before and after the attack, and the friendly noise on them.

One per poison set and one per row with friendly noise, of the first seed and goal of every point: a look at what the
numbers are about. The other rows of a point share the poisons of its undefended row.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int16, UInt8
from PIL import Image
from torch import Tensor

from friends.bench.grid.record import Record
from friends.bench.grid.spec import Cell, Grid
from friends.bench.grid.stages import Workbench
from friends.bench.pictures import enlarged, magnified
from friends.data.artifacts import Artifacts
from friends.data.files import replacing, write_json
from friends.types import Progress, silent

SHOWN = 8
"""Images side by side."""
SIDE = 64
"""Small images are enlarged by a whole factor to about this many pixels."""
GAP = 2


@dataclass(frozen=True)
class Strip:
    """A row of images of one kind, in bytes, and what they are."""

    words: str
    images: UInt8[Tensor, "k c h w"]


def write_pictures(
    grid: Grid, records: Sequence[Record], bench: Workbench, out: Path, *, progress: Progress = silent
) -> list[Path]:
    """Write ``OUT/pictures/CELL/poisons.png`` and the words about it; return the pictures.

    Only what is in the cache is drawn; nothing is crafted or trained. A picture that is there stays.

    Args:
        grid: on whatever data it was run on.
        records: of its cells.
        bench: finds poisons and noises.
        out: the folder of the grid.
    """
    chosen = _chosen(records)
    found: list[Path] = []
    for number, record in enumerate(chosen):
        progress("pictures", number, len(chosen))
        path = out / "pictures" / record.cell / "poisons.png"
        cell = grid.cell_at(record.labels, record.defense, record.seed, record.goal, record.victim)
        if not path.exists():
            strips = None if cell is None else strips_of(cell, bench)
            if strips is None:
                continue
            _write(path, record, strips)
        found.append(path)
    progress("pictures", len(chosen), len(chosen))
    return found


def _chosen(records: Sequence[Record]) -> list[Record]:
    """Of every point the first undefended model, and the first of every row that made friendly noise."""
    first: dict[object, Record] = {}
    for record in sorted(records, key=lambda r: r.pair):
        if record.is_undefended or "noise" in record.keys:
            first.setdefault(record.row, record)
    return list(first.values())


def strips_of(cell: Cell, bench: Workbench) -> list[Strip] | None:
    """What a picture shows; ``None`` if the poisons are not in the cache, or are no grey or colour images."""
    if not _is_there(cell, bench.artifacts, bench):
        return None
    poisoned = bench.poisoned(cell)
    clean = bench.lab(cell).data[0]
    if clean.shape[0] not in (1, 3):
        return None
    rows = poisoned.poison_idx[:SHOWN].to(clean.x.device)
    before, after = (part.x[rows].cpu().to(torch.int16) for part in (clean, poisoned.train))
    wanted = (poisoned.goal.x[:SHOWN].cpu() * 255).round().to(torch.uint8)
    strips = [
        Strip(f"what shall be misread ({poisoned.goal.name})", wanted),
        Strip("training images before the attack", before.to(torch.uint8)),
        _magnified("what the attacker added", after - before),
        Strip("poisons", after.to(torch.uint8)),
    ]
    noise = bench.noise_of(cell)
    if noise is not None:
        friendly = noise[rows.cpu()].to(torch.int16)
        strips.append(_magnified("friendly noise", friendly))
        strips.append(Strip("poisons with friendly noise", (after + friendly).clamp(0, 255).to(torch.uint8)))
    return strips


def _is_there(cell: Cell, artifacts: Artifacts, bench: Workbench) -> bool:
    return artifacts.has("poison", bench.poison_identity(cell)) and any(
        artifacts.has("victim", {**bench.victim_identity(cell), "weights": kept}) for kept in (True, False)
    )


def _magnified(words: str, grey: Int16[Tensor, "k c h w"]) -> Strip:
    stretched, reach = magnified(grey)
    return Strip(f"{words} (grey is 0, black and white ±{max(1, reach)}/255)", stretched)


def sheet(strips: Sequence[Strip]) -> Image.Image:
    """The strips below each other as one image on white."""
    tiles = [[enlarged(image, SIDE) for image in strip.images] for strip in strips]
    w, h = tiles[0][0].size
    columns = max(map(len, tiles))
    step_x, step_y = w + GAP, h + GAP
    drawn = Image.new("RGB", (columns * step_x - GAP, len(strips) * step_y - GAP), "white")
    for y, row in enumerate(tiles):
        for x, tile in enumerate(row):
            drawn.paste(tile, (x * step_x, y * step_y))
    return drawn


def _write(path: Path, record: Record, strips: Sequence[Strip]) -> None:
    stream = io.BytesIO()
    sheet(strips).save(stream, format="PNG", optimize=True)
    words = [f"{number}: {strip.words}" for number, strip in enumerate(strips, 1)]
    caption = f"Rows from top to bottom. {'; '.join(words)}."
    write_json(
        path.with_suffix(".json"),
        {
            "title": f"Poisons of seed {record.seed}, goal {record.goal + 1}",
            "caption": caption,
            "alt": f"{len(strips)} rows of up to {SHOWN} small images. {caption}",
        },
    )
    with replacing(path) as temporary:
        temporary.write_bytes(stream.getvalue())
