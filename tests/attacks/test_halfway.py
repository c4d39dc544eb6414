"""What is kept of a crafting in progress: when it is written, whose it is, and that a kill never tears it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from friends.attacks import GradientMatching, halfway
from friends.attacks.halfway import Halfway, State, identity_of
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal
from friends.data.triggers import Additive, Patch
from friends.types import Streams

STATE: State = ({"delta": torch.tensor([0.1, -0.2])}, {"at": 3, "last": [[0.1, 1e-30]]})


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(halfway.time, "monotonic", clock)
    return clock


def never() -> State:
    raise AssertionError("the state was asked for")


def test_without_a_folder_nothing_is_kept_nor_asked_for() -> None:
    nowhere = Halfway(None, "me")
    nowhere.offer(never, force=True)
    assert nowhere.load() is None


def test_what_was_offered_comes_back_bit_for_bit(tmp_path: Path) -> None:
    kept = Halfway(tmp_path / "new" / "folder", "me")
    assert kept.load() is None
    kept.offer(lambda: STATE, force=True)
    state = Halfway(tmp_path / "new" / "folder", "me").load()
    assert state is not None
    assert torch.equal(state[0]["delta"], STATE[0]["delta"])
    assert state[1] == STATE[1]


def test_state_is_asked_for_when_the_time_has_come_and_not_before(tmp_path: Path, clock: Clock) -> None:
    kept = Halfway(tmp_path, "me")
    clock.now += halfway.SECONDS - 0.01
    kept.offer(never)
    assert kept.load() is None
    clock.now += 0.02
    kept.offer(lambda: STATE)
    assert kept.load() is not None
    kept.offer(never)  # the clock began anew
    clock.now += halfway.SECONDS + 1
    kept.offer(lambda: ({"delta": torch.zeros(1)}, {}))
    state = kept.load()
    assert state is not None
    assert not state[0]["delta"].any()


def test_the_state_of_another_crafting_is_refused_before_work_and_says_where_it_is(tmp_path: Path) -> None:
    Halfway(tmp_path, "me").offer(lambda: STATE, force=True)
    with pytest.raises(ValueError, match=r"craft\.safetensors holds another crafting.*Delete it, or choose another"):
        Halfway(tmp_path, "you")


def test_a_torn_file_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    kept = Halfway(tmp_path, "me")
    kept.offer(lambda: STATE, force=True)
    assert kept.file is not None
    kept.file.write_bytes(kept.file.read_bytes()[:40])
    with pytest.raises(ValueError, match="is torn"):
        Halfway(tmp_path, "me")


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    kept = Halfway(tmp_path, "me")
    kept.offer(lambda: STATE, force=True)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, where, killed)
        kept.offer(lambda: ({"delta": torch.zeros(2)}, {}), force=True)
    state = kept.load()
    assert state is not None
    assert torch.equal(state[0]["delta"], STATE[0]["delta"])


def test_loops_of_one_crafting_keep_files_of_their_own(tmp_path: Path) -> None:
    one, other = Halfway(tmp_path, "me", name="bases"), Halfway(tmp_path, "me")
    one.offer(lambda: STATE, force=True)
    assert other.load() is None


# --- what makes a crafting this one ---


def goal(**changes: object) -> Goal:
    plain = Goal(torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 0]), torch.tensor([1, 1]))
    return replace(plain, **changes)


def data(value: int = 0) -> LabeledImages:
    return LabeledImages(torch.full((4, 1, 4, 4), value, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), ("a", "b"))


def test_equal_inputs_have_equal_identities_and_everything_else_another() -> None:
    attack, streams = GradientMatching(), [Streams(0)]
    patch, place = torch.ones(1, 2, 2), (0, 0)
    identities = [
        identity_of(attack, data(), [goal()], streams),
        identity_of(replace(attack, steps=9), data(), [goal()], streams),
        identity_of(attack, data(1), [goal()], streams),
        identity_of(attack, data(), [goal()], [Streams(1)]),
        identity_of(attack, data(), [goal(), goal()], [Streams(0), Streams(0)]),
        identity_of(attack, data(), [goal(x=torch.full((2, 1, 4, 4), 0.6))], streams),
        identity_of(attack, data(), [goal(x=torch.full((2, 1, 2, 8), 0.5))], streams),
        identity_of(attack, data(), [goal(y_true=torch.tensor([2, 0]))], streams),
        identity_of(attack, data(), [goal(y_wanted=torch.tensor([1, 2]))], streams),
        identity_of(attack, data(), [goal(bases=torch.tensor([2]))], streams),
        identity_of(attack, data(), [goal(bases=torch.tensor([3]))], streams),
        identity_of(attack, data(), [goal(trigger=Patch(patch))], streams),
        identity_of(attack, data(), [goal(trigger=Patch(patch, place))], streams),
        identity_of(attack, data(), [goal(trigger=Patch(patch * 0.5))], streams),
        identity_of(attack, data(), [goal(trigger=Additive(torch.zeros(1, 4, 4)))], streams),
    ]
    assert len(set(identities)) == len(identities)
    assert identities[0] == identity_of(GradientMatching(), data(), [goal()], [Streams(0)])
    assert identities[11] == identity_of(attack, data(), [goal(trigger=Patch(patch.clone()))], streams)
