"""The page about loops of one's own keeps its word: each of its blocks runs by itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from loader_stand_ins import (
    DATA,
    Columns,
    Compose,
    Pictures,
    RandomCrop,
    RandomHorizontalFlip,
    ToTensor,
    augmented,
    net,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import friends

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "your-own-loop.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_a_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pictures = Pictures(transform=augmented())
    pictures.rows = [row % 5 for row in pictures.rows]  # labels that the net has
    loader = DataLoader(pictures, 6)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    given = {
        "friends": friends, "torch": torch, "F": F, "DataLoader": DataLoader, "Dataset": Dataset, "Compose": Compose,
        "ToTensor": ToTensor, "RandomCrop": RandomCrop, "RandomHorizontalFlip": RandomHorizontalFlip,
        "loader": loader, "original_loader": loader, "model": model, "optimizer": optimizer, "columns": Columns(),
        "images": DATA.pixels(), "train_step": lambda x, y: None,
    }  # fmt: skip
    exec(compile(block, "your-own-loop.md", "exec"), given)
    if "optimizer.step()" in block:
        assert not torch.equal(before, torch.cat([p.detach().flatten() for p in model.parameters()]))
    if "check(" in block:
        return
    defense = given.get("defense")
    assert (given["loader"] is not loader) and repr(given["loader"].dataset).startswith("Protected(")
    assert defense is None or isinstance(defense, friends.Friends)


def test_the_page_is_all_there():
    assert len(BLOCKS) == 6
