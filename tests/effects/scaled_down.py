"""Run the scaled-down trial of an attack without defenses, for the tests of its effect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from friends.bench.record import Arm
from friends.bench.run import run_trial
from friends.bench.trial import read_trial

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "attacks"


def undefended_and_control(
    name: str, cifar10: Path, out: Path, *, recipe: dict[str, Any] | None = None, data: dict[str, Any] | None = None
) -> tuple[Arm, Arm]:
    """Four targets of the trial ``name``, each with poisons and a victim of its own, and two models of clean data.

    Args:
        recipe: settings of the recipe to change; ``data`` likewise.
    """
    trial = read_trial(EXAMPLES / f"{name}.toml")
    trial = replace(
        trial,
        seed=101,
        data=replace(trial.data, source=str(cifar10), **(data or {})),
        goals=replace(trial.goals, count=4),
        recipe=replace(trial.recipe, **(recipe or {})),
        arms=(),
        controls=2,
    )
    arms = {arm.name: arm for arm in run_trial(trial, out).arms}
    return arms["undefended"], arms["clean"]
