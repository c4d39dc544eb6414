"""What is said of a classifier is what one would count by hand."""

from __future__ import annotations

import math

import measures_slow as slow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from friends.bench.measures import BINS, measure, reliability


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 60), classes=st.integers(2, 6), seed=st.integers(0, 10**6), heat=st.sampled_from([0.2, 3.0]))
def test_all_measures_agree_with_counting(n: int, classes: int, seed: int, heat: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randn(n, classes, generator=generator, dtype=torch.float64) * heat).softmax(1)
    y = torch.randint(classes, (n,), generator=generator)
    found = measure(p, y, [f"c{k}" for k in range(classes)])
    confidence, answers = (part.tolist() for part in p.max(1))
    right = [a == b for a, b in zip(answers, y.tolist(), strict=True)]
    matrix = slow.confusion(answers, y.tolist(), classes)
    assert [list(row) for row in found.confusion] == matrix
    assert (found.images, found.right) == (n, sum(right))
    assert found.accuracy == pytest.approx(sum(right) / n)
    assert found.interval[0] <= found.accuracy <= found.interval[1]
    assert found.loss == pytest.approx(slow.negative_log_likelihood(p.tolist(), y.tolist()))
    for k, one in enumerate(found.classes):
        precision, recall = slow.precision_and_recall(matrix, k)
        assert (one.precision, one.recall) == (pytest.approx(precision), pytest.approx(recall))
        assert one.images == sum(matrix[k]) and one.answers == sum(row[k] for row in matrix)
        if precision is not None and recall is not None and precision + recall:
            assert one.f1 == pytest.approx(2 * precision * recall / (precision + recall))
    error, table = slow.expected_calibration_error(confidence, right, BINS)
    assert found.ece == pytest.approx(error)
    assert [(round(b.high * BINS), b.answers) for b in found.bins] == [row[:2] for row in table]
    assert [b.confidence for b in found.bins] == pytest.approx([row[2] for row in table])
    assert [b.accuracy for b in found.bins] == pytest.approx([row[3] for row in table])


def test_a_probability_on_a_border_belongs_to_the_bin_below() -> None:
    bins = reliability(torch.tensor([0.2, 0.4, 1.0], dtype=torch.float64), torch.tensor([True, False, True]), bins=5)
    assert [(b.low, b.high, b.accuracy) for b in bins] == [(0, 0.2, 1), (0.2, 0.4, 0), (0.8, 1.0, 1)]


def test_certain_answers_that_are_right_are_calibrated_and_those_that_are_wrong_are_not() -> None:
    p = torch.eye(3, dtype=torch.float64)
    assert measure(p, torch.arange(3), "abc").ece == 0
    wrong = measure(p, torch.tensor([1, 2, 0]), "abc")
    assert wrong.ece == 1 and math.isfinite(wrong.loss) and wrong.loss > 100


def test_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="no image"):
        measure(torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0, dtype=torch.int64), "ab")
