"""The judge counts as the definitions say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from friends.data.images import LabeledImages
from friends.data.poisoned import Goal
from friends.training import ABSTAIN, accuracy, confidence, success
from friends.training.evaluate import predict, removal, verdict


def images(labels: list[int]) -> LabeledImages:
    """Images whose first pixel is their row number."""
    x = torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.arange(len(labels), dtype=torch.uint8)
    return LabeledImages(x, torch.tensor(labels, dtype=torch.int64), ("a", "b", "c"))


def answering(answers: list[int]):
    return lambda x: torch.tensor(answers)[(x[:, 0, 0, 0] * 255).round().long()]


def test_abstaining_is_wrong_when_strict_and_left_out_when_selective() -> None:
    judged = accuracy(answering([0, 1, ABSTAIN, 2]), images([0, 1, 2, 0]))
    assert (judged.correct, judged.abstained, judged.n) == (2, 1, 4)
    assert judged.strict == 0.5
    assert judged.selective == pytest.approx(2 / 3)
    assert accuracy(answering([ABSTAIN]), images([0])).selective == 0


def test_success_needs_the_wanted_class_not_just_a_wrong_one() -> None:
    data = images([0, 0, 0, 0])
    goal = Goal(data.pixels(), data.y, torch.tensor([1, 1, 1, 1]))
    assert success(answering([1, 2, ABSTAIN, 0]), goal).tolist() == [True, False, False, False]


def test_confidence_is_the_softmax_of_the_wanted_class() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    model.train()
    data = images([0, 1])
    goal = Goal(data.pixels(), data.y, torch.tensor([2, 0]))
    expected = torch.softmax(model(goal.x), 1)[torch.arange(2), goal.y_wanted]
    assert torch.allclose(confidence(model, goal), expected)
    assert model.training


def test_prediction_in_batches_equals_prediction_at_once() -> None:
    answers = torch.randint(3, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    data = images([0] * 50)
    assert predict(answering(answers), data.x, batch=7).tolist() == answers
    assert predict(answering(answers), data.x[:0]).tolist() == []


def test_accuracy_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no image"):
        accuracy(answering([]), images([]))


def test_removals_are_judged_by_precision_and_recall() -> None:
    removed = torch.tensor([True, True, True, False, False, False])
    judged = removal(removed, torch.tensor([1, 2, 4, 5]))
    assert (judged.removed, judged.caught, judged.poisons) == (3, 2, 4)
    assert judged.precision == pytest.approx(2 / 3)
    assert judged.recall == 0.5
    nothing = removal(torch.zeros(6, dtype=torch.bool), torch.tensor([], dtype=torch.int64))
    assert (nothing.precision, nothing.recall) == (0, 0)


def test_a_refused_image_is_no_success_though_the_model_would_have_given_the_wanted_class() -> None:
    goal = Goal(torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64))
    hits, refused = verdict(lambda x: torch.tensor([1, ABSTAIN, 0, 1]), goal)
    assert hits.tolist() == [True, False, False, True]
    assert refused.tolist() == [False, True, False, False]
