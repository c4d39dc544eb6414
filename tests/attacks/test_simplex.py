from __future__ import annotations

import pytest
import torch
from features_slow import nearest_combination, project_by_bisection
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from friends.attacks import simplex
from friends.attacks.simplex import eigenvalue_bound, onto_simplex, simplex_fit


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(points: Tensor, wanted: Tensor, **more: float) -> Tensor:
    return simplex_fit(points[None], wanted[None], torch.tensor([0]), **more)[0]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 30), st.sampled_from([0.01, 1.0, 1000.0]))
def test_the_projection_is_the_slow_one(seed: int, n: int, scale: float) -> None:
    v = (random(3, n, seed=seed) - 0.3) * scale
    ours = onto_simplex(v)
    assert ours.min() >= 0
    assert torch.allclose(ours.sum(1), torch.ones(3, dtype=torch.float64), atol=1e-10)
    for row, own in zip(v, ours, strict=True):
        assert torch.allclose(own, project_by_bisection(row), atol=1e-9 * max(scale, 1))


def test_the_projection_leaves_the_simplex_and_forgets_a_common_shift() -> None:
    inside = torch.tensor([[0.2, 0.5, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(onto_simplex(inside), inside)
    assert torch.allclose(onto_simplex(inside + 7), inside)
    assert torch.equal(onto_simplex(torch.zeros(1, 4)), torch.full((1, 4), 0.25))  # ties share


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 12), st.integers(1, 20))
def test_the_coefficients_are_those_of_a_general_solver(seed: int, b: int, d: int) -> None:
    points, wanted = random(b, d, seed=seed), 2 * random(d, seed=seed + 1) - 0.5
    c = fitted(points, wanted, tol=1e-9)
    slow = nearest_combination(points, wanted)
    ours, theirs = ((wanted - c @ points).square().sum() for c in (c, slow))
    assert c.min() >= 0
    assert float(c.sum()) == pytest.approx(1, abs=1e-9)
    assert float(ours) <= float(theirs) * (1 + 1e-6) + 1e-9
    slope = points @ (c @ points - wanted)
    assert float((slope[c > 1e-6] - slope.min()).max()) < 1e-4  # no coefficient could be moved to a better place


def test_what_is_inside_the_polytope_is_met_and_what_is_outside_is_not() -> None:
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    inside, outside = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([2.0, 2.0], dtype=torch.float64)
    assert torch.allclose(fitted(points, inside, tol=1e-10) @ points, inside, atol=1e-6)
    assert torch.allclose(fitted(points, outside, tol=1e-10) @ points, torch.tensor([1.0, 1.0]).double(), atol=1e-6)


def test_rows_do_not_depend_on_each_other() -> None:
    points, wanted = random(3, 6, 10), 2 * random(5, 10, seed=1)
    owner = torch.tensor([0, 0, 1, 2, 2])
    together = simplex_fit(points, wanted, owner)
    for row, (own, target) in enumerate(zip(owner, wanted, strict=True)):
        assert torch.allclose(together[row], fitted(points[own], target), atol=1e-10)


def test_a_search_goes_on_from_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    points, wanted = random(8, 5), random(5, seed=1)
    whole = fitted(points, wanted, tol=1e-9)
    monkeypatch.setattr(simplex, "LIMIT", 2)
    again = simplex_fit(points[None], wanted[None], torch.tensor([0]), whole[None])[0]
    assert torch.allclose(again, whole, atol=1e-7)
    assert not torch.allclose(fitted(points, wanted), whole, atol=1e-3)


def test_one_point_and_equal_points_need_no_search() -> None:
    assert torch.equal(fitted(random(1, 4), random(4, seed=1)), torch.ones(1, dtype=torch.float64))
    assert torch.allclose(fitted(random(1, 4).expand(3, 4), random(4, seed=1)), torch.full((3,), 1 / 3).double())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 40), st.sampled_from([1e-6, 1.0, 1e6]))
def test_the_bound_is_above_the_largest_eigenvalue_and_close_to_it(seed: int, b: int, scale: float) -> None:
    points = scale * (random(2, b, 7, seed=seed) - 0.5)
    gram = points @ points.mT
    bound, exact = eigenvalue_bound(gram), torch.linalg.eigvalsh(gram)[:, -1]
    assert bool((bound >= exact * (1 - 1e-9)).all())
    assert bool((bound <= exact * b ** (1 / 8) * (1 + 1e-9)).all())
