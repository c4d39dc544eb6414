from __future__ import annotations

import math

import pytest
import torch
from attacks_slow import descend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from friends.attacks.crafting import Loop, craft, poison_gradient
from friends.attacks.pixels import PixelAdam, decay, initial_delta, milestones, project
from friends.data.augment import Augment
from friends.types import Streams

XI = 16 / 255
MOMENTS = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
STD = torch.tensor(MOMENTS[1], dtype=torch.float64).view(1, 3, 1, 1)
MEAN = torch.tensor(MOMENTS[0], dtype=torch.float64).view(1, 3, 1, 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


def loop(**changes: object) -> Loop:
    plain = {"xi": XI, "steps": 8, "restarts": 1, "tau": 0.1, "augment": None, "start": "randn"}
    return Loop(**{**plain, **changes})  # type: ignore[arg-type]


# --- start, bound, schedule ---


def test_the_random_start_is_a_clipped_normal_with_a_third_at_the_bound() -> None:
    delta = initial_delta(torch.zeros(50, 3, 16, 16), XI, "randn", generator())
    assert delta.abs().max() == torch.tensor(XI)
    assert (delta.abs() == delta.abs().max()).float().mean() == pytest.approx(0.317, abs=0.01)
    assert (delta[delta.abs() < XI]).std() == pytest.approx(0.54 * XI, rel=0.02)  # a normal cut off at one sigma
    assert not initial_delta(torch.zeros(2, 3, 4, 4), XI, "clean", generator()).any()


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


# --- the loop ---


def curved(x: Tensor) -> Tensor:
    """A smooth objective with a gradient of its own for every pixel."""
    weight = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view(x.shape[1:])
    return ((x * weight).sum((1, 2, 3)) ** 2).mean() + (x * weight.flip(2)).sin().mean()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("augment", [None, Augment()])
def test_the_loop_is_the_slow_one(signed: bool, augment: Augment | None) -> None:
    base, streams = random(3, 3, 8, 8), Streams(1)
    settings = loop(steps=8, augment=augment, signed=signed, start="randn" if signed else "clean")

    def score(pixels: Tensor, step: int) -> Tensor:
        if augment is not None:
            pixels = augment(pixels, streams("augment", 0, step), MOMENTS[0])
        return curved(pixels)

    start = initial_delta(base, XI, settings.start, streams("init", 0))
    slow = descend(score, base, start, mean=MEAN, std=STD, xi=XI, tau=0.1, steps=8, signed=signed)
    ours = craft(base, [curved], settings, moments=MOMENTS, streams=streams).delta
    assert (ours - start).abs().max() > 0.5 * XI
    assert torch.allclose(ours, slow, atol=1e-7)


def test_the_gradient_flows_through_the_augmentation() -> None:
    base, delta = random(2, 3, 8, 8), 0.1 * (random(2, 3, 8, 8, seed=1) - 0.5)

    def whole(d: Tensor) -> Tensor:
        return curved(Augment()(base + d, Streams(7)("augment", 0, 0), MOMENTS[0]))

    score, gradient = poison_gradient(base, delta, [curved], loop(augment=Augment()), Streams(7), MOMENTS[0])
    assert score == pytest.approx(float(whole(delta)))
    for place in [(0, 0, 4, 4), (1, 2, 3, 5), (1, 1, 0, 0)]:
        step = torch.zeros_like(delta)
        step[place] = 1e-5
        numeric = float(whole(delta + step) - whole(delta - step)) / 2e-5
        assert float(gradient[place]) == pytest.approx(numeric, rel=1e-4, abs=1e-9)


def test_augmentation_is_fresh_for_each_image_step_and_restart() -> None:
    seen: list[Tensor] = []

    def watching(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return x.sum() * 0

    base = random(1, 3, 8, 8).expand(3, 3, 8, 8)
    craft(base, [watching], loop(steps=2, restarts=2, augment=Augment(), start="clean", xi=1 / 255),
          moments=MOMENTS, streams=Streams(0))  # fmt: skip
    views = torch.cat(seen)
    assert len(views) == 12
    for i in range(12):
        for j in range(i):
            assert (views[i] - views[j]).abs().max() > 0.05


def test_what_is_shifted_in_is_the_mean_colour() -> None:
    corners: list[Tensor] = []

    def watching(x: Tensor) -> Tensor:
        corners.append(x.detach()[:, :, ::7, ::7])
        return x.sum() * 0

    craft(torch.ones(64, 3, 8, 8, dtype=torch.float64), [watching], loop(steps=1, augment=Augment(), start="clean"),
          moments=MOMENTS, streams=Streams(0))  # fmt: skip
    darkest = torch.cat(corners).amin((0, 2, 3))
    assert torch.allclose(darkest, torch.tensor(MOMENTS[0], dtype=torch.float64), atol=1e-6)


def test_surrogates_see_the_same_poisons_their_gradients_add_and_their_scores_average() -> None:
    base, delta, seen = random(2, 3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.float64), list[Tensor]()

    def other(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return 3 * (x**2).sum()

    def third(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return curved(x)

    both = poison_gradient(base, delta, [other, third], loop(augment=Augment()), Streams(0), MOMENTS[0])
    alone = [poison_gradient(base, delta, [f], loop(augment=Augment()), Streams(0), MOMENTS[0]) for f in (other, third)]
    assert torch.equal(seen[0], seen[1])
    assert both[0] == pytest.approx((alone[0][0] + alone[1][0]) / 2)
    assert torch.allclose(both[1], alone[0][1] + alone[1][1])


def test_more_poisons_than_a_batch_are_done_in_turn_before_one_step() -> None:
    base = random(5, 3, 8, 8)
    score, gradient = poison_gradient(base, torch.zeros_like(base), [curved], loop(batch=2), Streams(0), MOMENTS[0])
    parts = [poison_gradient(part, torch.zeros_like(part), [curved], loop(), Streams(0), MOMENTS[0])
             for part in base.split(2)]  # fmt: skip
    assert score == pytest.approx(sum(part[0] for part in parts) / 3)
    assert torch.allclose(gradient, torch.cat([part[1] for part in parts]))


def test_the_restart_with_the_lowest_last_score_is_kept() -> None:
    base, streams, settings = random(2, 3, 8, 8), Streams(3), loop(steps=1, restarts=5)

    def score(x: Tensor) -> Tensor:
        return (x - base).mean()

    result = craft(base, [score], settings, moments=MOMENTS, streams=streams)
    starts = [initial_delta(base, XI, "randn", streams("init", restart)) for restart in range(5)]
    assert result.last == pytest.approx([float(start.mean()) for start in starts])
    best = min(range(5), key=lambda i: result.last[i])
    step = PixelAdam(STD, signed=True).step(starts[best], torch.full_like(base, 1 / base.numel()), 0.1)
    assert torch.allclose(result.delta, project(step, base, XI), atol=1e-7)


def test_every_restart_begins_anew() -> None:
    base, settings = random(2, 3, 8, 8), loop(steps=6, restarts=2)
    for seed in range(9):
        streams = Streams(seed)
        result = craft(base, [curved], settings, moments=MOMENTS, streams=streams)
        if result.last[1] < result.last[0]:  # the second restart was kept
            break
    start = initial_delta(base, XI, "randn", streams("init", 1))
    slow = descend(lambda x, _: curved(x), base, start, mean=MEAN, std=STD, xi=XI, tau=0.1, steps=6, signed=True)
    assert torch.allclose(result.delta, slow, atol=1e-7)


def test_progress_counts_every_step_of_every_restart() -> None:
    told: list[tuple[str, int, int]] = []
    craft(random(1, 3, 8, 8), [curved], loop(steps=3, restarts=2), moments=MOMENTS, streams=Streams(0),
          progress=lambda what, done, total, note="": told.append((what, done, total)), what="test")  # fmt: skip
    assert told == [("test", done, 6) for done in range(1, 7)]


def test_a_score_that_is_not_finite_stops_the_attack() -> None:
    with pytest.raises(ValueError, match="the objective became nan"):
        craft(random(1, 3, 8, 8), [lambda x: x.sum() * math.nan], loop(), moments=MOMENTS, streams=Streams(0))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("xi", 16, r"xi is in \[1/255, 1\] pixel units, not 16; did you mean 16/255"),
        ("xi", 0.001, "xi is in"),
        ("steps", 0, "steps must be at least 1, not 0"),
        ("restarts", 0, "restarts must be at least 1"),
        ("batch", 0, "batch must be at least 1"),
        ("tau", 0.0, "tau, the step size, must be positive"),
        ("start", "zero", "unknown start 'zero'; choose one of randn, clean"),
    ],
)
def test_impossible_settings_are_refused(setting: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop(**{setting: value})
