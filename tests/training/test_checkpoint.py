"""Checkpoints: foreign and torn ones are refused, memory is written once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from friends.data.images import LabeledImages
from friends.defenses import Friends
from friends.models import build
from friends.training import Defense, Recipe, Run, fit
from friends.types import Streams
from interrupting import Stop, stop_at

RECIPE = Recipe(epochs=2, batch=64, lr=0.05, augment=None)


def make(generator: torch.Generator) -> torch.nn.Module:
    return build("tiny", shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=8, generator=generator)


def test_a_checkpoint_of_another_training_is_refused_by_name(few_digits: LabeledImages, tmp_path: Path) -> None:
    fit(few_digits, make, recipe=RECIPE, streams=Streams(0), checkpoint=tmp_path, checkpoint_seconds=0)
    with pytest.raises(ValueError, match="its seed is"):
        fit(few_digits, make, recipe=RECIPE, streams=Streams(1), checkpoint=tmp_path, checkpoint_seconds=0)
    with pytest.raises(ValueError, match="its recipe is"):
        fit(
            few_digits,
            make,
            recipe=replace(RECIPE, lr=0.1),
            streams=Streams(0),
            checkpoint=tmp_path,
            checkpoint_seconds=0,
        )
    with pytest.raises(ValueError, match="its defenses is"):
        fit(
            few_digits,
            make,
            recipe=RECIPE,
            defenses=[Friends()],
            streams=Streams(0),
            checkpoint=tmp_path,
            checkpoint_seconds=0,
        )
    with pytest.raises(ValueError, match="its data is"):
        fit(
            few_digits.rows(range(200)),
            make,
            recipe=RECIPE,
            streams=Streams(0),
            checkpoint=tmp_path,
            checkpoint_seconds=0,
        )


def test_a_torn_checkpoint_is_refused(few_digits: LabeledImages, tmp_path: Path) -> None:
    fit(few_digits, make, recipe=RECIPE, streams=Streams(0), checkpoint=tmp_path, checkpoint_seconds=0)
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="torn"):
        fit(few_digits, make, recipe=RECIPE, streams=Streams(0), checkpoint=tmp_path, checkpoint_seconds=0)


def test_a_finished_training_is_not_trained_again(few_digits: LabeledImages, tmp_path: Path) -> None:
    first = fit(few_digits, make, recipe=RECIPE, streams=Streams(0), checkpoint=tmp_path, checkpoint_seconds=0)

    def boom(*_: object) -> None:
        raise AssertionError("trained again")

    again = fit(
        few_digits, make, recipe=RECIPE, streams=Streams(0), checkpoint=tmp_path, checkpoint_seconds=0, progress=boom
    )
    for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert again.history == first.history


def test_large_memory_is_written_only_when_it_changed(few_digits: LabeledImages, tmp_path: Path) -> None:
    written: list[tuple[str, int]] = []

    class Keeper(Defense):
        def start_epoch(self, run: Run) -> None:
            written.extend((p.name, p.stat().st_mtime_ns) for p in tmp_path.glob("memory-*"))
            if run.epoch == 1:
                run.memory(self)["big"] = torch.arange(1000)
            if run.epoch == 4:
                run.memory(self)["big"][0] = 7  # in place

    fit(
        few_digits,
        make,
        recipe=replace(RECIPE, epochs=6),
        defenses=[Keeper()],
        streams=Streams(0),
        checkpoint=tmp_path,
        checkpoint_seconds=0,
    )
    assert len({entry for entry in written if entry[0] == "memory-00002.safetensors"}) == 1
    assert {name for name, _ in written} == {"memory-00002.safetensors", "memory-00005.safetensors"}
    assert [p.name for p in tmp_path.glob("memory-*")] == ["memory-00005.safetensors"]


class Counter(Defense):
    """Replaces its tensor every epoch, so that the allocator uses addresses again."""

    def start_epoch(self, run: Run) -> None:
        run.memory(self)["count"] = run.memory(self).get("count", torch.zeros(1)) + 1


@pytest.mark.parametrize("epoch", [3, 6, 8, 10])
def test_memory_that_is_replaced_is_never_stale_after_a_resume(
    few_digits: LabeledImages, tmp_path: Path, epoch: int
) -> None:
    recipe, defense = replace(RECIPE, epochs=12), Counter()

    with pytest.raises(Stop):
        fit(
            few_digits,
            make,
            recipe=recipe,
            defenses=[defense],
            streams=Streams(0),
            checkpoint=tmp_path,
            checkpoint_seconds=0,
            progress=stop_at(epoch * 5 + 2),
        )
    fitted = fit(few_digits, make, recipe=recipe, defenses=[defense], streams=Streams(0), checkpoint=tmp_path)
    assert fitted.memory[0]["count"].item() == 12


def test_another_network_is_another_training(few_digits: LabeledImages, tmp_path: Path) -> None:
    fit(few_digits, make, recipe=RECIPE, streams=Streams(0), checkpoint=tmp_path)

    def other(generator: torch.Generator) -> torch.nn.Module:
        return build("lenet", shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), generator=generator)

    with pytest.raises(ValueError, match="its initial model is"):
        fit(few_digits, other, recipe=RECIPE, streams=Streams(0), checkpoint=tmp_path)
