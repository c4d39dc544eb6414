"""The measurement of crafting's cost runs, and its arithmetic is that of ``cost()``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))


def test_it_prints_a_row_for_every_attack_and_what_it_was_measured_with(capsys: pytest.CaptureFixture[str]) -> None:
    import attack_cost

    attack_cost.main(["--only", "gradient-matching", "--networks", "tiny", "--repeats", "1"])
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("| gradient-matching |"))
    name, settings, counted, measured, _, share, _ = (cell.strip() for cell in row.strip("|").split("|"))
    assert name == "gradient-matching" and "steps=3" in settings and "budget=0.1" in settings
    assert counted == "1.43 k"  # 24 poisons, 3 steps, 2 restarts, 9.9 passes each; and the goal's gradient
    assert float(share) > 0 and measured
    assert "torch 2" in out and "thread" in out
