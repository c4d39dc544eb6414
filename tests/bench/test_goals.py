"""Targets: who is chosen, and that it follows from the seed."""

from __future__ import annotations

import pytest
import torch

from friends.bench.goals import choose_goals
from friends.bench.trial import GoalSpec
from friends.data.images import LabeledImages
from friends.types import Streams


def test_targets_follow_from_the_seed_and_the_first_ones_do_not_depend_on_how_many(digits: LabeledImages) -> None:
    names = [g.name for g in choose_goals(GoalSpec(count=6), digits, Streams(0))]
    assert names == [g.name for g in choose_goals(GoalSpec(count=6), digits, Streams(0))]
    assert names[:3] == [g.name for g in choose_goals(GoalSpec(count=3), digits, Streams(0))]
    assert names != [g.name for g in choose_goals(GoalSpec(count=6), digits, Streams(1))]


def test_goals_tell_the_truth_about_their_image(digits: LabeledImages) -> None:
    for goal in choose_goals(GoalSpec(count=20), digits, Streams(0)):
        row = int(goal.name.split()[2].rstrip(":"))
        assert torch.equal(goal.x[0], digits.pixels()[row])
        assert int(goal.y_true[0]) == int(digits.y[row])
        assert int(goal.y_wanted[0]) != int(digits.y[row])


def test_classes_are_drawn_over_all_pairs_or_as_set(digits: LabeledImages) -> None:
    goals = choose_goals(GoalSpec(count=200), digits, Streams(0))
    assert len({int(g.y_true[0]) for g in goals}) == 10
    assert len({int(g.y_wanted[0]) for g in goals}) == 10
    fixed = choose_goals(GoalSpec(count=5, true_class="3", wanted_class="8"), digits, Streams(0))
    assert {(int(g.y_true[0]), int(g.y_wanted[0])) for g in fixed} == {(3, 8)}
    wanted = choose_goals(GoalSpec(count=100, wanted_class="8"), digits, Streams(0))
    assert {int(g.y_wanted[0]) for g in wanted} == {8}
    assert {int(g.y_true[0]) for g in wanted} == set(range(10)) - {8}


def test_no_image_is_a_target_twice_and_only_the_right_ones_are(digits: LabeledImages) -> None:
    few = digits.only_classes(["0", "1"]).sample(20, torch.Generator().manual_seed(0))
    right = torch.arange(20) % 2 == 0
    goals = choose_goals(GoalSpec(count=4), few, Streams(0), right)
    rows = [int(g.name.split()[2].rstrip(":")) for g in goals]
    assert len(set(rows)) == 4
    assert all(row % 2 == 0 for row in rows)
    with pytest.raises(ValueError, match="no rightly classified test image"):
        choose_goals(GoalSpec(count=1), few, Streams(0), torch.zeros(20, dtype=torch.bool))
