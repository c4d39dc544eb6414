from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metapoison_slow import numeric_gradient, slow_recolour
from torch import Tensor

from friends.attacks.recolour import Recolour

SMALL = Recolour(grid=4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table(x: Tensor, settings: Recolour = SMALL, seed: int = 1) -> Tensor:
    shape = settings.start(x).shape
    return settings.project((2 * random(*shape, seed=seed) - 1) * settings.bound)


def test_a_table_of_zeros_changes_nothing_not_even_colours_outside_the_grid() -> None:
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * 3).T.reshape(1, 3, 9, 3)
    assert not SMALL.change(SMALL.start(corners), corners).any()
    assert SMALL.start(corners).shape == (1, 3, 4, 4, 4)


def test_it_is_the_slow_one() -> None:
    x = random(2, 3, 3, 4)
    x[0, :, 0, 0] = torch.tensor([1.0, 0.0, 0.0])  # V is beyond the grid
    x[0, :, 0, 1] = 1.0
    tables = table(x)
    for image, own, change in zip(x, tables, SMALL.change(tables, x), strict=True):
        assert change.abs().max() > 0.01
        assert torch.allclose(slow_recolour(image, own), image + change, atol=1e-5)


def test_equal_colours_change_alike_and_near_ones_nearly() -> None:
    x = random(1, 3, 8, 8)
    x[..., 4:] = x[..., :4]
    change = SMALL.change(table(x), x)
    assert torch.equal(change[..., 4:], change[..., :4])
    moved = SMALL.change(table(x), (x + 1e-4).clamp(max=1))
    assert (moved - change).abs().max() < 1e-3


def test_a_constant_table_shifts_luma_for_all_channels_and_differences_as_yuv_says() -> None:
    x = 0.2 + 0.5 * random(1, 3, 4, 4)
    tables = SMALL.start(x)
    tables[:, 0] = 0.03
    assert torch.allclose(SMALL.change(tables, x), torch.full_like(x, 0.03), atol=1e-6)
    tables = SMALL.start(x)
    tables[:, 1] = 0.03  # U: blue against green
    change = SMALL.change(tables, x)[0, :, 0, 0]
    assert change[0].abs() < 1e-6
    assert float(change[2]) == pytest.approx(0.03 * 2.0321, rel=1e-3)
    assert float(change[1]) == pytest.approx(-0.03 * 0.3946, rel=1e-3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.01, 0.3), st.sampled_from([1, 3]))
def test_no_pixel_moves_further_than_the_reach(seed: int, bound: float, channels: int) -> None:
    how, x = Recolour(bound=bound, grid=3), random(2, channels, 4, 5, seed=seed)
    tables = how.project(10 * (random(*how.start(x).shape, seed=seed + 1) - 0.5))
    assert how.change(tables, x).abs().max() <= how.reach + 1e-9
    assert tables.abs().max() <= bound


def test_the_reach_can_be_reached() -> None:
    x = torch.full((1, 3, 1, 1), 0.5, dtype=torch.float64)
    tables = SMALL.start(x)
    tables[:, 0], tables[:, 1] = SMALL.bound, SMALL.bound
    assert float(SMALL.change(tables, x)[0, 2].max()) == pytest.approx(SMALL.reach)
    assert SMALL.reach == pytest.approx(3.0321 * 0.04, rel=1e-4)


def test_projection_keeps_the_colours_of_the_grid_in_its_range() -> None:
    x = random(2, 3, 2, 2)
    clipped = Recolour(bound=0.5, grid=4).project(torch.full_like(SMALL.start(x), 1.0))
    for channel in range(3):
        along = clipped[0, channel].movedim(channel, 0).reshape(4, -1)
        assert torch.allclose(along, (1 - torch.linspace(0, 1, 4, dtype=x.dtype)).clamp(max=0.5)[:, None])
    low = Recolour(bound=0.5, grid=4).project(torch.full_like(SMALL.start(x), -1.0))
    assert float(low[0, 0, 0].abs().max()) == 0  # black gets no darker
    assert float(low[0, 0, 3].max()) == -0.5


def test_the_gradient_is_that_of_finite_differences() -> None:
    x, weight = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=5)
    leaf = table(x).requires_grad_()
    score = (SMALL.change(leaf, x) * weight).sum() + SMALL.roughness(leaf)
    gradient = torch.autograd.grad(score, leaf)[0]
    places = [(0, 0, 1, 2, 1), (1, 2, 2, 1, 2), (0, 1, 0, 2, 2)]
    numeric = numeric_gradient(
        lambda t: float((SMALL.change(t, x) * weight).sum() + SMALL.roughness(t)), leaf.detach(), places
    )
    assert [float(gradient[place]) for place in places] == pytest.approx(numeric, rel=1e-6, abs=1e-9)


def test_roughness_is_the_mean_square_of_the_slope_between_neighbours() -> None:
    x = random(2, 3, 2, 2)
    tables = table(x)
    slopes = []
    for d in (2, 3, 4):
        for i in range(3):
            neighbours = tables.select(d, i + 1) - tables.select(d, i)
            slopes += (4 * neighbours).flatten().tolist()
    assert float(SMALL.roughness(tables)) == pytest.approx(sum(s * s for s in slopes) / len(slopes))
    assert float(SMALL.roughness(torch.full_like(tables, 0.03))) == 0


def test_grey_images_get_a_tone_curve_and_other_numbers_of_channels_are_refused() -> None:
    x = torch.tensor([0.0, 1 / 6, 1 / 3, 1.0], dtype=torch.float64).view(1, 1, 1, 4)
    curve = torch.tensor([0.0, 0.03, 0.01, -0.02], dtype=torch.float64).view(1, 1, 4)
    assert torch.allclose(SMALL.change(curve, x).flatten(), torch.tensor([0.0, 0.015, 0.03, -0.02]).double())
    with pytest.raises(ValueError, match="one or three channels can be recoloured, not of 2: pass recolour=None"):
        SMALL.start(torch.zeros(1, 2, 4, 4))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("bound", 0, "bound is a part of the range of colours"),
        ("bound", 10, "bound is a part of the range of colours"),
        ("grid", 1, "at least 2 colours"),
        ("smoothness", -1, "smoothness is a weight >= 0, not -1"),
    ],
)
def test_impossible_settings_are_refused(setting: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recolour(**{setting: value})  # type: ignore[arg-type]
