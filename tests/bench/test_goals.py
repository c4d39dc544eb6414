"""Targets: who is chosen, and that it follows from the seed."""

from __future__ import annotations

import pytest
import torch

from friends.bench.goals import choose_goals, make_trigger
from friends.bench.trial import GoalSpec, TriggerSpec
from friends.data.images import LabeledImages
from friends.data.triggers import Additive, Patch, Stamp
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


def test_several_images_of_one_goal_are_of_one_class_and_never_shared(digits: LabeledImages) -> None:
    goals = choose_goals(GoalSpec(count=3, images=4, true_class="3", wanted_class="5"), digits, Streams(0))
    shown = torch.cat([goal.x for goal in goals])
    assert [len(goal) for goal in goals] == [4, 4, 4]
    assert len(shown.flatten(1).unique(dim=0)) == 12
    assert all(bool((goal.y_true == 3).all()) for goal in goals)


def test_a_backdoor_goal_shows_images_with_the_trigger_each_at_a_place_of_its_own(digits: LabeledImages) -> None:
    spec = GoalSpec(count=2, true_class="3", wanted_class="5", images=50, trigger=TriggerSpec(kind="white", size=4))
    first, second = choose_goals(spec, digits, Streams(0))
    assert len(first) == 50
    assert bool((first.y_true == 3).all())
    assert bool((first.y_wanted == 5).all())
    assert isinstance(first.trigger, Patch)
    assert first.trigger.corner is None
    places = [(one[0] == 1).nonzero()[0].tolist() for one in first.x]  # handwriting is rarely white four by four
    assert len({tuple(place) for place in places}) > 20
    assert not torch.equal(first.x, second.x)
    again = choose_goals(spec, digits, Streams(0))[0]
    assert torch.equal(first.x, again.x)


def test_a_backdoor_may_be_asked_of_every_class_but_the_wanted_one(digits: LabeledImages) -> None:
    spec = GoalSpec(count=1, wanted_class="5", sources="all", trigger=TriggerSpec(kind="made"))
    (goal,) = choose_goals(spec, digits, Streams(0))
    assert set(goal.y_true.tolist()) == set(range(10)) - {5}
    assert isinstance(goal.trigger, Additive)
    assert not goal.trigger.pixels.any()


def test_triggers_are_where_they_are_said_to_be() -> None:
    x = torch.full((2, 3, 16, 20), 0.5)
    corner = make_trigger(TriggerSpec(kind="checkerboard", size=3, place="corner"), (3, 16, 20))(x, torch.Generator())
    assert (corner != x).nonzero().amin(0).tolist() == [0, 0, 13, 17]
    four = make_trigger(TriggerSpec(kind="checkerboard", size=3, place="corners"), (3, 16, 20))
    assert isinstance(four, Stamp)
    stamped = four(x, torch.Generator())
    assert int((stamped != x).sum()) == 2 * 3 * 4 * 9
    assert torch.equal(stamped, stamped.flip(3))
    with pytest.raises(ValueError, match="a trigger of 17 pixels a side does not fit images of 16x20"):
        make_trigger(TriggerSpec(size=17), (3, 16, 20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 0}, "at least one image"),
        ({"sources": "all"}, "sources = 'all' is for backdoors"),
        ({"trigger": TriggerSpec(), "correct": True}, "correct = true is for targets"),
        ({"keys": "standard", "true_class": "cat"}, "keys goes with count alone"),
        ({"keys": "standard", "count": 21}, "there are 20 standard keys, not 21"),
    ],
)
def test_goals_that_contradict_themselves_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GoalSpec(**settings)  # type: ignore[arg-type]
