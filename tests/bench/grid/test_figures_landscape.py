"""Landscapes are taken along orthonormal directions, have the images in their middle, and match the attack's loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from friends.attacks.gradient_matching import matching_objective
from friends.attacks.matching import matching_loss, mean_gradient
from friends.bench.grid.figures.landscape import along, over_plane, random_plane, roughness, training_loss
from friends.bench.grid.figures.spread import divergence_spread, in_ball
from friends.data.poisoned import Goal
from friends.modules import still, weights_hash


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int = 0) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=draws(seed))
    return model


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 7)])
def test_directions_are_orthonormal_in_units_of_a_pixel(shape: tuple[int, int, int]) -> None:
    plane = random_plane(shape, 16 / 255, 5, draws())
    size = plane.u.numel()
    assert float((plane.u * plane.v).sum()) == 0
    assert float(plane.u.square().mean()) == float(plane.v.square().mean()) == 1
    assert set(plane.u.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(plane.u.mean())) < 4 / size**0.5


def test_an_odd_number_of_values_leaves_one_out() -> None:
    plane = random_plane((1, 3, 3), 0.1, 3, draws())
    assert float((plane.u * plane.v).sum()) == 0
    assert int((plane.v == 0).sum()) == 1


def test_steps_reach_as_far_as_told_and_hold_the_middle() -> None:
    plane = random_plane((1, 4, 4), 8 / 255, 9, draws())
    assert torch.allclose(255 * plane.steps, torch.arange(-4.0, 5) * 2)
    x = torch.rand(2, 1, 4, 4, generator=draws(1))
    assert torch.equal(plane.at(x, 4, 4), x)
    assert float((plane.at(x, 0, 8) - x).abs().max()) <= 2 * 8 / 255 + 1e-6
    assert float(plane.at(x * 0, 0, 8).min()) >= 0


@pytest.mark.parametrize("points", [1, 4])
def test_a_plane_without_a_middle_is_refused(points: int) -> None:
    with pytest.raises(ValueError, match="odd number of points"):
        random_plane((1, 4, 4), 0.1, points, draws())
    with pytest.raises(ValueError, match="reach"):
        random_plane((1, 4, 4), 16.0, 3, draws())


def test_rows_lie_along_v_and_columns_along_u() -> None:
    plane = random_plane((1, 4, 4), 0.1, 5, draws())
    x = torch.full((1, 1, 4, 4), 0.5)
    along_u = over_plane(lambda z: ((z - x) * plane.u).mean(), x, plane)
    assert torch.allclose(along_u, plane.steps.expand(5, 5), atol=1e-6)
    along_v = over_plane(lambda z: ((z - x) * plane.v).mean(), x, plane)
    assert torch.allclose(along_v, plane.steps[:, None].expand(5, 5), atol=1e-6)


def test_the_middle_of_a_matching_landscape_is_the_loss_of_the_attack() -> None:
    model = network().eval()
    goal = Goal(torch.rand(1, 3, 2, 2, generator=draws(1)), torch.tensor([0]), torch.tensor([2]))
    poison = torch.rand(1, 3, 2, 2, generator=draws(2))
    with still([model], freeze=False):
        objective = matching_objective(model, goal, 2)
        surface = over_plane(lambda x: objective(x).detach(), poison, random_plane((3, 2, 2), 0.05, 3, draws()))
        parts = mean_gradient(model, goal.x, goal.y_wanted), mean_gradient(model, poison, torch.tensor([2]))
    assert float(surface[1, 1]) == pytest.approx(float(matching_loss(*parts)), abs=1e-6)
    assert len(surface.unique()) == 9  # and it is not flat


def test_training_loss_is_the_mean_cross_entropy_and_leaves_the_model_as_it_was() -> None:
    model = network().train()
    x, y = torch.rand(2500, 3, 2, 2, generator=draws(1)), torch.arange(2500) % 3
    before, state = weights_hash(model), torch.random.get_rng_state()
    loss = training_loss(model, x, y)
    assert model.training
    assert weights_hash(model) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert float(loss) == pytest.approx(float(F.cross_entropy(model.eval()(x), y).detach()), rel=1e-5)


def test_along_a_line() -> None:
    start, way = torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 0.2)
    found = along(lambda z: z.mean(), start, way, (-1.0, 0.0, 1.0, 9.0))
    assert torch.allclose(found, torch.tensor([0.3, 0.5, 0.7, 1.0]))


def test_roughness_tells_a_peak_from_a_valley() -> None:
    steps = torch.arange(-2.0, 3)
    bowl = steps[:, None] ** 2 + steps**2
    assert roughness(bowl) == {"centre": 0.0, "mean": 4.0, "lowest": 0.0, "highest": 8.0, "range": 8.0, "rise": 4.0}
    assert roughness(-bowl)["rise"] == -4


def test_the_spread_of_kl_is_zero_in_a_ball_of_no_size_and_grows_with_it() -> None:
    model = network()
    x = 0.3 + 0.4 * torch.rand(20, 3, 2, 2, generator=draws(1))
    noises = torch.stack([torch.zeros_like(x), 0.05 * torch.ones_like(x), 0.2 * torch.ones_like(x)])
    offsets = in_ball(x, draws(2))
    found = torch.stack([divergence_spread(model, x, noises, offsets, r / 255).mean(1) for r in (0, 8, 32, 64)])
    assert found[0].tolist() == [0, 0, 0]
    assert found[:, 0].tolist() == [0, 0, 0, 0]  # without noise nothing differs
    assert bool((found[1:, 1:] > found[:-1, 1:]).all())
    assert bool((found[1:, 2] > found[1:, 1]).all())


def test_the_spread_of_kl_by_hand() -> None:
    model = network().eval()
    x, noise = torch.rand(1, 3, 2, 2, generator=draws(1)), torch.full((1, 3, 2, 2), 0.1)
    offsets = in_ball(x, draws(2), points=4)
    assert float(offsets.abs().max()) <= 1
    kl: list[float] = []
    for offset in offsets:
        z = (x + 0.1 * offset).clamp(0, 1)
        p, q = (model(where).softmax(1)[0].detach() for where in (z, z + noise))
        kl.append(sum(float(a) * (float(a.log()) - float(b.log())) for a, b in zip(p, q, strict=True)))
    by_hand = (sum((value - sum(kl) / 4) ** 2 for value in kl) / 3) ** 0.5
    assert float(divergence_spread(model, x, noise[None], offsets, 0.1)) == pytest.approx(by_hand, rel=1e-3)


def test_a_spread_needs_two_points() -> None:
    x = torch.rand(1, 3, 2, 2, generator=draws())
    with pytest.raises(ValueError, match="over 1 points"):
        divergence_spread(network(), x, x[None], in_ball(x, draws(), points=1), 0.1)
