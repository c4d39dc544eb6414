"""Pictures of poisons show the very bytes that were trained on, and nothing is made for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from grid_samples import run_here, tiny_grid
from PIL import Image

from friends.bench.grid.gallery import sheet, strips_of, write_pictures
from friends.bench.grid.record import read
from friends.bench.grid.stages import Workbench
from friends.data.artifacts import Artifacts


def test_pictures_show_what_was_trained_on(tmp_path: Path) -> None:
    grid = tiny_grid(seeds=2).narrowed(only=["friends-b", "epic"], at={"xi": ["64/255"]})
    run_here(grid, tmp_path / "cache", tmp_path / "out")
    records = read(tmp_path / "out" / "records.jsonl")
    bench = Workbench(Artifacts(tmp_path / "cache"))
    made = write_pictures(grid, records, bench, tmp_path / "out")
    shown = {record.defense for record in records if (tmp_path / "out" / "pictures" / record.cell).is_dir()}
    assert shown == {"undefended", "friends-b"}
    assert len(made) == 2  # of the first seed alone

    cell = next(c for c in grid.cells() if (c.row.name, c.seed) == ("friends-b", 0))
    strips = strips_of(cell, bench)
    assert strips is not None
    poisoned, clean = bench.poisoned(cell), bench.lab(cell).data[0]
    rows = poisoned.poison_idx[:8]
    _, before, added, poisons, noise, both = strips
    assert torch.equal(before.images, clean.x[rows])
    assert torch.equal(poisons.images, poisoned.train.x[rows])
    assert f"±{int((poisons.images.int() - before.images.int()).abs().max())}/255" in added.words
    friendly = bench.noise_of(cell)
    assert friendly is not None
    assert torch.equal(both.images.int(), (poisons.images.int() + friendly[rows].int()).clamp(0, 255))
    assert f"±{int(friendly[rows].int().abs().max())}/255" in noise.words

    drawn = sheet(strips)
    one = torch.from_numpy(np.array(drawn.crop((0, 3 * 58, 56, 3 * 58 + 56)).convert("L")))
    assert torch.equal(one[::2, ::2].to(torch.uint8), poisons.images[0, 0])  # enlarged twice, pixel for pixel
    words = json.loads(next(made[0].parent.glob("*.json")).read_text())
    assert "before the attack" in words["caption"]
    with Image.open(made[0]) as image:
        assert image.size[1] < drawn.size[1]  # undefended: no noise


def test_nothing_is_made_for_a_picture(tmp_path: Path) -> None:
    grid = tiny_grid(seeds=1).narrowed(only=["epic"], at={"xi": ["64/255"]})
    run_here(grid, tmp_path / "cache", tmp_path / "out")
    records = read(tmp_path / "out" / "records.jsonl")
    empty = Workbench(Artifacts(tmp_path / "other"))
    assert write_pictures(grid, records, empty, tmp_path / "out") == []
    assert [artifact.kind for artifact in Artifacts(tmp_path / "other").list()] == ["data"]
