"""Counters of energy: read before and after, added up over processors, and silent where they say nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from friends.bench.grid.energy import Meter


def counter(powercap: Path, name: str, microjoules: int | str) -> None:
    folder = powercap / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")


def test_what_was_drawn_in_the_block_and_nothing_before(tmp_path: Path) -> None:
    counter(tmp_path, "intel-rapl:0", 7_000_000)
    with Meter(powercap=tmp_path) as meter:
        assert meter.joules == {}
        counter(tmp_path, "intel-rapl:0", 19_500_000)
    assert meter.joules == {"cpu": 12.5}


def test_packages_are_added_up_and_their_parts_not_counted_twice(tmp_path: Path) -> None:
    names = ["intel-rapl:0", "intel-rapl:0:0", "intel-rapl:0:1", "intel-rapl:1", "intel-rapl:1:0", "intel-rapl-mmio:0"]
    for name in names:
        counter(tmp_path, name, 0)
    with Meter(powercap=tmp_path) as meter:
        for joules, name in enumerate(names, 1):
            counter(tmp_path, name, joules * 1_000_000)
    assert meter.joules == {"cpu": 1.0 + 4.0}


def test_a_counter_that_overflowed_says_nothing(tmp_path: Path) -> None:
    counter(tmp_path, "intel-rapl:0", 262_000_000_000)
    with Meter(powercap=tmp_path) as meter:
        counter(tmp_path, "intel-rapl:0", 5_000_000)
    assert meter.joules == {}


@pytest.mark.parametrize("before", [None, "", "no number"])
def test_no_counter_is_no_number_and_no_error(tmp_path: Path, before: str | None) -> None:
    if before is not None:
        counter(tmp_path, "intel-rapl:0", before)
    with Meter(powercap=tmp_path) as meter:
        pass
    assert meter.joules == {}


def test_a_counter_that_vanishes_or_appears_says_nothing(tmp_path: Path) -> None:
    with Meter(powercap=tmp_path) as appears:
        counter(tmp_path, "intel-rapl:0", 5)
    with Meter(powercap=tmp_path) as vanishes:
        (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert appears.joules == vanishes.joules == {}


def test_errors_of_the_block_come_through_with_what_was_drawn(tmp_path: Path) -> None:
    counter(tmp_path, "intel-rapl:0", 0)
    meter = Meter(powercap=tmp_path)
    with pytest.raises(KeyError, match="mine"), meter:
        counter(tmp_path, "intel-rapl:0", 2_000_000)
        raise KeyError("mine")
    assert meter.joules == {"cpu": 2.0}


def test_the_gpu_is_asked_only_where_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([100.0, 350.25])
    monkeypatch.setattr(
        "friends.bench.grid.energy._gpu", lambda device: next(counts) if device.type == "cuda" else None
    )
    with Meter(torch.device("cuda"), powercap=tmp_path) as meter:
        pass
    assert meter.joules == {"gpu": 250.2}
    with Meter(torch.device("cpu"), powercap=tmp_path) as other:
        pass
    assert other.joules == {}
