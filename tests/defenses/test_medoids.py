"""Facility location: the quick greedy choices are the slow one, on real gradients, ties included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from epic_slow import greedy_slow, similarity_slow
from hypothesis import given, settings
from hypothesis import strategies as st

from friends.data.images import LabeledImages
from friends.defenses.epic import logit_gradients
from friends.defenses.medoids import alone, facility_location, lazy_greedy, plain_greedy, similarities
from friends.models import build


def points(n: int, seed: int = 0, d: int = 10) -> torch.Tensor:
    """Like gradients of logits: a softmax less a one-hot, most of them small."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(d, (n,), generator=generator)
    z = 3 * torch.randn(n, d, generator=generator) + 6 * torch.nn.functional.one_hot(y, d)
    return z.softmax(1) - torch.nn.functional.one_hot(y, d)


def test_lazy_plain_and_slow_greedy_choose_the_same_medoids_in_the_same_order() -> None:
    similarity = similarities(points(240), 10.0)
    want = greedy_slow(similarity.numpy(), 24)
    assert lazy_greedy(similarity, 24).tolist() == want
    assert plain_greedy(similarity, 24).tolist() == want
    assert want != sorted(want)


def test_lazy_and_plain_agree_where_several_blocks_of_rows_are_worked_on() -> None:
    similarity = similarities(points(1500, d=3), 3.0)
    assert torch.equal(lazy_greedy(similarity, 300), plain_greedy(similarity, 300))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.data())
def test_ties_go_to_the_first(n: int, data: st.DataObject) -> None:
    """Points on a line of few places: nearly everything is tied."""
    line = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    k = data.draw(st.integers(0, n))
    similarity = similarities(torch.tensor(line, dtype=torch.float32)[:, None], 1.0)
    want = greedy_slow(similarity.numpy(), k)
    assert lazy_greedy(similarity, k).tolist() == want
    assert plain_greedy(similarity, k).tolist() == want


def test_more_medoids_than_points_are_all_points() -> None:
    similarity = similarities(points(5), 10.0)
    assert sorted(facility_location(similarity, 9).tolist()) == [0, 1, 2, 3, 4]
    assert facility_location(similarity, 0).tolist() == []


def test_similarity_is_exact_where_torchs_default_is_not() -> None:
    """Nearly equal points far from the origin: through a matrix product their distance is lost."""
    x = points(60) * 1e-3 + 100
    x[1] = x[0]
    got = similarities(x, 10.0)
    assert np.allclose(got.numpy(), similarity_slow(x.numpy().astype(np.float64), 10.0), atol=1e-6)
    assert float(got[0, 1]) == 1.0
    assert torch.equal(got.diag(), torch.ones(60))
    assert torch.equal(got, got.T)
    assert float((torch.cdist(x, x, compute_mode="use_mm_for_euclid_dist") - torch.cdist(
        x, x, compute_mode="donot_use_mm_for_euclid_dist")).abs().max()) > 0.01  # fmt: skip


def test_the_lonely_point_is_alone_and_nobody_else() -> None:
    crowd = torch.zeros(9, 2)
    crowd[:4, 0] = torch.arange(4) * 0.01
    crowd[4:8, 0] = 1 + torch.arange(4) * 0.01
    crowd[8] = torch.tensor([0.5, 9.0])
    similarity = similarities(crowd, 2.0)
    medoids = facility_location(similarity, 3)
    assert 8 in medoids.tolist()
    assert alone(similarity, medoids).nonzero().flatten().tolist() == [8]
    assert not alone(similarity, medoids[:0]).any()


def test_equal_points_are_not_alone_though_each_may_be_a_medoid() -> None:
    similarity = similarities(torch.zeros(6, 2), 2.0)
    medoids = facility_location(similarity, 3)
    assert medoids.tolist() == [0, 1, 2]
    assert not alone(similarity, medoids).any()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="must be positive, not 0"):
        similarities(points(3), 0.0)
    with pytest.raises(ValueError, match="not finite"):
        similarities(torch.tensor([[float("nan")]]), 1.0)
    with pytest.raises(ValueError, match="not -1"):
        facility_location(similarities(points(3), 1.0), -1)


def test_medoids_of_a_networks_gradients(few_digits: LabeledImages) -> None:
    """Not of made-up points: the gradients that EPIC sees."""
    model = build("tiny", shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=4,
                  generator=torch.Generator().manual_seed(0))  # fmt: skip
    similarity = similarities(logit_gradients(model, few_digits, bias=False)[:200], 3.0)
    assert lazy_greedy(similarity, 20).tolist() == greedy_slow(similarity.numpy(), 20)
