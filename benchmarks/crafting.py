"""What crafting poisons costs, for two attacks and a small network; :mod:`attack_cost` measures them all."""

from __future__ import annotations

from typing import Any

from attack_cost import images, measured
from interleaved import Spread

ATTACKS = ("gradient-matching", "bullseye-polytope")
NETWORK = "tiny"


def measure(quick: bool = False) -> list[dict[str, Any]]:
    """Forward passes of one image that a crafting takes as long as, and that its attack says it costs."""
    rows: list[dict[str, Any]] = []
    for name in ATTACKS:
        ratios, _, cost = measured(name, NETWORK, images(), repeats=2 if quick else 5)
        low, middle, high = Spread.of([ratio / cost.forwards for ratio in ratios])
        rows.append({"name": f"{name} on {NETWORK}: measured cost over counted cost", "value": middle, "low": low,
                     "high": high, "unit": "x", "target": ""})  # fmt: skip
    return rows
