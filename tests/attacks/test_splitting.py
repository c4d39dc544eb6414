from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from friends.attacks.halfway import Halfway
from friends.attacks.splitting import Found, Rule, Splitting
from friends.types import silent


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CLEAN, WANTED = random(4, 1, 3, 2), random(4, 6, seed=1)


def quadratic(x: Tensor, rows: Tensor) -> Tensor:
    return (x.flatten(1) - WANTED[rows]).square().sum(1)


def problem(**changes: float | None) -> Splitting:
    rule = {"lam": 0.1, "factor": 0.5, "memory": 1, "beta": 0.0, "xi": None, **changes}
    return Splitting(quadratic, CLEAN, CLEAN, Rule(**rule), batch=3)  # type: ignore[arg-type]


def solved(p: Splitting, steps: int = 60) -> Found:
    return p.solve(CLEAN, steps, halfway=Halfway(None, ""), progress=silent, what="test")


@pytest.mark.parametrize("beta", [0.0, 0.3, 5.0])
def test_it_ends_where_distance_and_proximity_balance(beta: float) -> None:
    """For D = |p - w|^2 the minimum of D + beta |p - b|^2 is (w + beta b) / (1 + beta)."""
    exact = (WANTED.view_as(CLEAN) + beta * CLEAN) / (1 + beta)
    found = solved(problem(beta=beta))
    assert torch.allclose(found.x, exact, atol=1e-6)
    objective = (exact - WANTED.view_as(CLEAN)).square() + beta * (exact - CLEAN).square()
    assert torch.allclose(found.score, objective.flatten(1).sum(1), atol=1e-8)


def test_it_ends_within_the_bound_and_pixels_stay_pixels() -> None:
    found = solved(problem(xi=0.05))
    assert torch.allclose(found.x, CLEAN + (WANTED.view_as(CLEAN) - CLEAN).clamp(-0.05, 0.05), atol=1e-9)
    far = Splitting(lambda x, _: (x.flatten(1) - 3).square().sum(1), CLEAN, CLEAN, problem().rule, batch=9)
    assert torch.equal(solved(far).x, torch.ones_like(CLEAN))


def test_the_start_is_brought_within_the_bound() -> None:
    far = problem(xi=0.05).begin(torch.ones_like(CLEAN))
    assert torch.allclose(far.x, (CLEAN + 0.05).clamp(max=1))


def test_each_poison_has_a_step_size_of_its_own_that_falls_only_where_it_overshoots() -> None:
    steep, near = torch.tensor([1.0, 1.0, 15.0, 1.0], dtype=torch.float64), 0.4 + 0.2 * CLEAN
    wanted = 0.4 + 0.2 * WANTED
    p = Splitting(lambda x, rows: steep[rows] * (x.flatten(1) - wanted[rows]).square().sum(1), near, near,
                  problem().rule, batch=2)  # fmt: skip
    found = p.step(p.begin(near))
    assert found.lam.tolist() == [0.1, 0.1, 0.05, 0.1]
    assert torch.equal(found.x[2], near[2])  # what made it worse was not done
    assert torch.allclose(found.x[1], near[1] + 0.2 * (wanted[1].view_as(near[1]) - near[1]))
    end = p.solve(near, 120, halfway=Halfway(None, ""), progress=silent, what="test")
    assert torch.allclose(end.x, wanted.view_as(near), atol=1e-4)  # and it did not stand still


def test_the_objective_never_rises_with_a_memory_of_one_and_may_with_more() -> None:
    def bumpy(x: Tensor, rows: Tensor) -> Tensor:
        return quadratic(x, rows) + (40 * x.flatten(1)).sin().sum(1) / 40

    rose: dict[int, bool] = {}
    for memory in (1, 40):
        p = Splitting(bumpy, CLEAN, CLEAN, problem(memory=memory, lam=0.3).rule, batch=9)
        here, scores = p.begin(CLEAN), list[Tensor]()
        for _ in range(30):
            scores.append(here.score)
            here = p.step(here)
            limit = torch.stack(scores[-memory:]).mean(0)
            assert bool((here.score <= limit + 1e-12).all())
        rose[memory] = any(bool((b > a).any()) for a, b in pairwise(scores))
    assert rose == {1: False, 40: True}


def test_a_start_that_is_not_finite_is_refused_and_a_step_to_such_a_place_is_not_made() -> None:
    broken = Splitting(lambda x, _: x.flatten(1).sum(1) * torch.nan, CLEAN, CLEAN, problem().rule, batch=9)
    with pytest.raises(ValueError, match="the objective became nan: the surrogate is not finite"):
        broken.begin(CLEAN)

    def cliff(x: Tensor, rows: Tensor) -> Tensor:
        away = (x.flatten(1) - CLEAN[rows].flatten(1)).abs().amax(1)
        return torch.where(away > 0.01, torch.nan, 1.0) * quadratic(x, rows)

    found = solved(Splitting(cliff, CLEAN, CLEAN, problem().rule, batch=9), 30)
    assert bool(found.score.isfinite().all())
    assert bool((found.lam < 0.1).all())


def test_it_goes_on_where_its_state_was_kept(tmp_path: Path) -> None:
    p = problem(memory=40, beta=0.3, lam=2.0)
    whole = solved(p, 30)
    halfway = Halfway(tmp_path, "mine")
    part = solved(p, 11)
    halfway.offer(part.state, force=True)
    told: list[int] = []
    again = p.solve(CLEAN, 30, halfway=halfway, progress=lambda what, done, total, note="": told.append(done), what="t")
    assert told == list(range(12, 31))
    for name in ("x", "score", "gradient", "lam", "recent", "first"):
        assert torch.equal(getattr(again, name).nan_to_num(), getattr(whole, name).nan_to_num())
