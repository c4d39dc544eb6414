"""Start, bound, schedule and optimizer of perturbations, against the original's numbers and torch's own Adam."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from friends.attacks.pixels import PixelAdam, check_xi, decay, initial_delta, milestones, project

XI = 16 / 255
STD = torch.tensor([0.2, 0.25, 0.3], dtype=torch.float64).view(1, 3, 1, 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


# --- start, bound, schedule ---


def test_the_random_start_is_a_clipped_normal_with_a_third_at_the_bound() -> None:
    delta = initial_delta(torch.zeros(50, 3, 16, 16), XI, "randn", generator())
    assert delta.abs().max() == torch.tensor(XI)
    assert (delta.abs() == delta.abs().max()).float().mean() == pytest.approx(0.317, abs=0.01)
    assert (delta[delta.abs() < XI]).std() == pytest.approx(0.54 * XI, rel=0.02)  # a normal cut off at one sigma
    assert not initial_delta(torch.zeros(2, 3, 4, 4), XI, "clean", generator()).any()


def test_the_start_is_drawn_on_the_processor_in_single_precision_whatever_is_perturbed() -> None:
    single = initial_delta(torch.zeros(4, 3, 8, 8), XI, "randn", generator())
    double = initial_delta(torch.zeros(4, 3, 8, 8, dtype=torch.float64), XI, "randn", generator())
    assert double.dtype == torch.float64
    assert torch.equal(single, double.float())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.floats(1 / 255, 1))
def test_projection_bounds_the_perturbation_and_keeps_the_clean_image_plus_it_valid(seed: int, xi: float) -> None:
    base, delta = random(3, 2, 5, 4, seed=seed), random(3, 2, 5, 4, seed=seed + 1) * 4 - 2
    out = project(delta, base, xi)
    assert out.abs().max() <= xi
    assert (base + out).min() >= 0
    assert (base + out).max() <= 1
    inside = (delta.abs() <= xi) & (base + delta >= 0) & (base + delta <= 1)
    assert torch.equal(out[inside], delta[inside])


def test_the_step_falls_where_the_original_code_lets_it_fall() -> None:
    assert milestones(250) == (93, 156, 218)
    assert milestones(100) == (37, 62, 87)
    rates = [decay(step, 250) for step in range(250)]
    assert [i for i in range(1, 250) if rates[i] != rates[i - 1]] == [93, 156, 218]
    assert rates[0] == 1
    assert rates[93] == pytest.approx(0.1)
    assert rates[249] == pytest.approx(0.001)
    assert decay(0, 1) == 1  # a milestone at 0 is none


@pytest.mark.usefixtures("unchecked")
def test_a_bound_below_a_grey_level_or_in_grey_levels_is_refused() -> None:
    for xi in (1 / 255, 16 / 255, 1.0):
        check_xi(xi)
    for xi in (0.0, 0.9 / 255, -0.1, float("nan"), 256.0):
        with pytest.raises(ValueError, match=r"xi is in \[1/255, 1\] pixel units"):
            check_xi(xi)
    with pytest.raises(ValueError, match="not 16; did you mean 16/255"):
        check_xi(16)


# --- the optimizer ---


def test_the_first_step_is_tau_in_normalised_units_whatever_the_bound_and_the_gradient() -> None:
    gradient = (random(2, 3, 4, 4) - 0.5) * 1e-6
    moved = PixelAdam(STD, signed=True).step(torch.zeros_like(gradient), gradient, 0.1)
    assert torch.allclose(moved, -0.1 * STD * gradient.sign(), atol=1e-8)


@pytest.mark.parametrize("signed", [True, False])
def test_the_optimizer_is_torchs_adam_in_normalised_space(signed: bool) -> None:
    gradients = [random(2, 3, 4, 4, seed=seed) - 0.4 for seed in range(5)]
    ours, adam = torch.zeros(2, 3, 4, 4, dtype=torch.float64), PixelAdam(STD, signed=signed)
    theirs = torch.zeros_like(ours).requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.1)
    for gradient in gradients:
        ours = adam.step(ours, gradient, 0.1)
        theirs.grad = (gradient * STD).sign() if signed else gradient * STD
        optimizer.step()
    assert torch.allclose(ours, theirs.detach() * STD, atol=1e-12)


def test_the_sign_is_taken_before_adam_and_not_after() -> None:
    adam, delta = PixelAdam(torch.ones(1, 1, 1, 1), signed=True), torch.zeros(1, 1, 1, 1)
    for value in (100.0, -1.0, -1.0):  # on raw gradients the 100 would still rule the third step
        before, delta = delta, adam.step(delta, torch.full((1, 1, 1, 1), value), 1.0)
    mean = (0.1 * (0.9**2 - 0.9 - 1)) / (1 - 0.9**3)
    assert float(delta - before) == pytest.approx(-mean, rel=1e-5)
    assert 0 < -mean < 1  # smaller than a whole step, which the sign of Adam's step would be


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_restored_optimizer_goes_on_bit_for_bit(signed: bool, stop: int) -> None:
    gradients = [random(2, 3, 4, 4, seed=seed) - 0.4 for seed in range(5)]
    adam, delta = PixelAdam(STD, signed=signed), torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    whole = delta
    for gradient in gradients:
        whole = adam.step(whole, gradient, 0.1)
    first, second = PixelAdam(STD, signed=signed), PixelAdam(STD, signed=signed)
    for gradient in gradients[:stop]:
        delta = first.step(delta, gradient, 0.1)
    tensors, steps = first.state()
    second.restore({name: tensor.clone() for name, tensor in tensors.items()}, steps)
    for gradient in gradients[stop:]:
        delta = second.step(delta, gradient, 0.1)
    assert torch.equal(delta, whole)
