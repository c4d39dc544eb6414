"""Every defense has a card in the documentation, and the example on it runs as it stands."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from friends.data.images import LabeledImages
from friends.defenses import DEFENSES
from friends.models import build

CARDS = Path(__file__).resolve().parents[1] / "docs" / "defenses"
FAMILY = dict.fromkeys(("mixup", "cutmix", "cutout", "maxup", "dp-instahide"), "strong-augmentation")
"""Defenses that share a card."""

PAGES = sorted(card for card in CARDS.glob("*.md") if card.stem != "README")


def card(name: str) -> str:
    return (CARDS / f"{FAMILY.get(name, name)}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DEFENSES)
def test_a_card_names_every_setting_and_what_the_defense_cannot_stop(name: str) -> None:
    text = card(name)
    assert DEFENSES[name].__name__ in text
    assert "annot stop" in text
    assert "**Departures" in text
    for field in dataclasses.fields(DEFENSES[name]):  # type: ignore[arg-type]
        assert f"`{field.name}" in text, f"{name}: the setting {field.name} is not on its card"


def test_the_index_links_every_card_and_names_every_defense() -> None:
    index = (CARDS / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"({page.name})" in index
    for name in DEFENSES:
        assert f"`{name}`" in index


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_example_on_a_card_runs(
    page: Path, few_digits: LabeledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def make_model(generator: torch.Generator) -> torch.nn.Module:
        moments = few_digits.moments
        return build("tiny", shape=few_digits.shape, classes=3, moments=moments, width=8, generator=generator)

    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {"data": few_digits, "make_model": make_model}
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)
    assert len(namespace["fitted"].history) >= 2  # type: ignore[attr-defined]
