"""Friendly noise in four passes, against the slow truth and against twenty steps of SGD."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from noise_helpers import small_net
from quick_slow import slow_quick
from torch import nn

from friends.modules import still
from friends.noise.friendly import FAST, PAPER, FriendlySettings, friendly_noise
from friends.noise.quick import box

ZETA = 16 / 255
FLIPS = replace(FAST, method="flips")


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Pixels with many values at exactly 0 and 1, where the box is."""
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=g, dtype=dtype) * 1.3 - 0.15).clamp(0, 1)


def corners(like: torch.Tensor, seed: int = 2) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(2, like.shape, generator=g) - 1).to(like) * ZETA


def divergence(net: nn.Module, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), still([net], freeze=True):
        p, q = net((x + e).clamp(0, 1)).log_softmax(1), net(x).log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("method", ["polyak", "flips"])
def test_agrees_with_one_image_and_one_value_at_a_time(method, steps):
    net, x = small_net().double().eval(), draw(6, 3, 9, 7, dtype=torch.float64)
    start = corners(x) * 4
    expected = slow_quick(net, x, start, method, 4 * ZETA, steps)
    chosen = replace(FAST, method=method, steps=steps, zeta=4 * ZETA, precision="float32")
    found = friendly_noise(net, x, chosen, initial=start)
    assert (expected - start).abs().max() > 1 / 255
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_four_passes_do_what_twenty_steps_do(digit_pixels, digit_net, precision):
    """Mean and 95th percentile of the divergence at most 15 % above the best SGD's, and noise no smaller."""
    x = digit_pixels[:512]
    rates = {lr: friendly_noise(digit_net, x, replace(PAPER, lr=lr)) for lr in (5.0, 10.0, 20.0)}
    slow = min(rates.values(), key=lambda e: float(divergence(digit_net, x, e).mean()))
    fast = friendly_noise(digit_net, x, replace(FAST, precision=precision))
    before, after = divergence(digit_net, x, slow), divergence(digit_net, x, fast)
    assert after.mean() <= 1.15 * before.mean()
    assert after.quantile(0.95) <= 1.15 * before.quantile(0.95)
    assert fast.abs().mean() >= slow.abs().mean()
    assert divergence(digit_net, x, corners(x)).mean() > 5 * after.mean()  # it was not friendly to begin with


def test_flips_stay_at_the_corners_and_change_few_signs(digit_pixels, digit_net):
    x = digit_pixels[:256]
    start = corners(x)
    found = friendly_noise(digit_net, x, FLIPS, initial=start)
    assert (found.abs() == torch.tensor(ZETA)).all()
    changed = (found != start).flatten(1).sum(1)
    assert 0 < changed.float().mean() < 0.1 * x[0].numel()
    assert divergence(digit_net, x, found).mean() < 0.35 * divergence(digit_net, x, start).mean()
    more = friendly_noise(digit_net, x, FLIPS, steps=8, initial=start)
    assert divergence(digit_net, x, more).mean() < divergence(digit_net, x, found).mean()


def test_polyak_noise_is_within_the_box():
    net, x = small_net(), draw(8, 3, 9, 6)
    e = friendly_noise(net, x, FAST, zeta=0.1)
    low, high = box(x, 0.1)
    assert (e >= low).all()
    assert (e <= high).all()
    assert (e.abs() == 0.1).float().mean() > 0.2


@pytest.mark.parametrize("chosen", [FAST, FLIPS], ids=["polyak", "flips"])
class TestBoth:
    def test_a_row_does_not_depend_on_its_batch(self, chosen):
        net, x = small_net().double(), draw(5, 3, 6, 6, dtype=torch.float64)
        start = corners(x)
        together = friendly_noise(net, x, chosen, initial=start)
        alone = torch.cat([friendly_noise(net, x[i : i + 1], chosen, initial=start[i : i + 1]) for i in range(5)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)

    def test_the_start_is_a_corner_drawn_from_the_generator(self, chosen):
        net, x = small_net(), torch.full((4, 3, 5, 5), 0.5)
        first, again, other = (
            friendly_noise(net, x, chosen, steps=0, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
        )
        assert torch.equal(first, again)
        assert 0.3 < float((first != other).float().mean()) < 0.7
        torch.testing.assert_close(first.abs(), torch.full_like(x, ZETA))

    def test_a_model_that_ignores_its_input_leaves_the_corner(self, chosen):
        constant = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        nn.init.zeros_(constant[1].weight)
        x = torch.full((2, 3, 2, 2), 0.5)
        start = corners(x)
        torch.testing.assert_close(friendly_noise(constant, x, chosen, initial=start), start)

    def test_no_images_and_no_strength(self, chosen):
        assert friendly_noise(small_net(), torch.zeros(0, 3, 4, 4), chosen).shape == (0, 3, 4, 4)
        assert not friendly_noise(small_net(), draw(2, 3, 4, 4), chosen, zeta=0.0).any()

    def test_nothing_of_the_model_changes(self, chosen):
        net = small_net().train()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        friendly_noise(net, draw(4, 3, 8, 8), chosen)
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
        assert net.training


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_method_or_precision_is_refused():
    with pytest.raises(ValueError, match="method"):
        FriendlySettings(method="newton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision"):
        FriendlySettings(precision="half")  # type: ignore[arg-type]
