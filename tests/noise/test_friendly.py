"""friendly_noise against slow references, its promises, and what it leaves behind: nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from friendly_slow import released_noise, slow_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from noise_helpers import small_net
from torch import nn

from friends.noise.friendly import PAPER, RELEASED, FriendlySettings, friendly_noise

ZETA = 16 / 255


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Pixels with many values at exactly 0 and 1, where the clamps are."""
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=g, dtype=dtype) * 1.3 - 0.15).clamp(0, 1)


def start(like: torch.Tensor, width: float = 24 / 255) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    return (2 * torch.rand(like.shape, generator=g, dtype=like.dtype) - 1) * width


def divergence(net: nn.Module, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        p, q = net.eval()(x + e).log_softmax(1), net(x).log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


@pytest.mark.parametrize("bound", ["project", "clip"])
@pytest.mark.parametrize("direction", ["noisy||clean", "clean||noisy"])
@pytest.mark.parametrize(("norm", "penalty"), [("l2", 1.0), ("l1", 1 / 55), ("linf", 1.0), ("msq", 30.0)])
def test_agrees_with_one_image_at_a_time(norm, penalty, direction, bound):
    net, x = small_net().double().eval(), draw(3, 3, 6, 5, dtype=torch.float64)
    chosen = FriendlySettings(norm=norm, penalty=penalty, steps=5, lr=20.0, direction=direction, bound=bound)
    first = start(x)
    expected = slow_noise(net, x, first, chosen)
    found = friendly_noise(net, x, chosen, initial=first)
    assert (expected - first).abs().max() > 1 / 255  # the optimisation did something
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_released_is_the_released_code():
    net, x = small_net().double().eval(), draw(128, 3, 6, 6, dtype=torch.float64)
    first = start(x, 8 / 255)
    expected = (x + released_noise(net, x, first, steps=3)).clamp(0, 1) - x
    found = friendly_noise(net, x, RELEASED, steps=3, initial=first)
    assert (expected - first).abs().max() > 1 / 255
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_released_on_real_digits_in_float32(digit_pixels, digit_net):
    x = digit_pixels[:128]
    first = start(x, 8 / 255)
    expected = (x + released_noise(digit_net.eval(), x, first, steps=20)).clamp(0, 1) - x
    found = friendly_noise(digit_net, x, initial=first)
    assert abs(float(found.abs().mean() - expected.abs().mean())) < 0.05 / 255
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    difference = found.flatten().quantile(levels) - expected.flatten().quantile(levels)
    assert difference.abs().max() < 0.1 / 255
    assert (found - expected).abs().mean() < 0.1 / 255


def test_settings_are_those_of_the_paper_and_of_the_code():
    assert (RELEASED.norm, RELEASED.direction, RELEASED.bound) == ("msq", "clean||noisy", "clip")
    assert (PAPER.norm, PAPER.direction, PAPER.bound) == ("l2", "noisy||clean", "project")
    for each in (RELEASED, PAPER):
        assert (each.zeta, each.steps, each.init) == (16 / 255, 20, 8 / 255)


def both_divergences(digit_pixels, net, chosen):
    """Of friendly noise, and of random signs with the rms of each row's friendly noise."""
    x = digit_pixels[:200] * 0.8 + 0.1  # no pixel at the ends, so that both noises fit in
    e = friendly_noise(net, x, chosen)
    rms = e.square().mean((1, 2, 3), keepdim=True).sqrt()
    signs = torch.randint(2, e.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert e.abs().mean() > 4 / 255
    return divergence(net, x, e), divergence(net, x, signs * rms)


@pytest.mark.parametrize("chosen", [PAPER, replace(RELEASED, lr=50.0)], ids=["paper", "released at lr 50"])
def test_far_friendlier_than_signs_of_the_same_size(digit_pixels, digit_net, chosen):
    ours, random = both_divergences(digit_pixels, digit_net, chosen)
    assert ours.mean() < 0.2 * random.mean(), (ours.mean(), random.mean())


def test_released_is_far_friendlier_for_most_images(digit_pixels, digit_net):
    """Not on average: lr 100 jumps over the valley where the model is steep, which leaves a heavy tail."""
    ours, random = both_divergences(digit_pixels, digit_net, RELEASED)
    assert ours.median() < 0.1 * random.median(), (ours.median(), random.median())
    assert (ours < random).float().mean() > 0.8


def test_paper_makes_the_noise_large(digit_pixels, digit_net):
    x = digit_pixels[:64] * 0.8 + 0.1
    size = {chosen: friendly_noise(digit_net, x, chosen).abs().mean() * 255 for chosen in (RELEASED, PAPER)}
    assert size[PAPER] > 13 and size[PAPER] > 1.5 * size[RELEASED], size


@pytest.mark.parametrize("chosen", [RELEASED, PAPER], ids=["released", "paper"])
def test_a_row_does_not_depend_on_its_batch(chosen):
    net, x = small_net().double(), draw(7, 3, 6, 6, dtype=torch.float64)
    first = start(x)
    together = friendly_noise(net, x, chosen, initial=first)
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    shuffled = friendly_noise(net, x[order], chosen, initial=first[order])
    alone = torch.cat([friendly_noise(net, x[i : i + 1], chosen, initial=first[i : i + 1]) for i in range(7)])
    repeated = friendly_noise(net, x[[3] * 4], chosen, initial=first[[3] * 4])
    for other in (shuffled[order.argsort()], alone):
        torch.testing.assert_close(other, together, rtol=0, atol=1e-9)
    torch.testing.assert_close(repeated, together[[3] * 4], rtol=0, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    b=st.integers(0, 4),
    c=st.sampled_from([1, 3, 4]),
    h=st.integers(2, 9),
    w=st.integers(2, 9),
    zeta=st.sampled_from([0.0, 1 / 255, 16 / 255, 0.5, 1.0]),
    chosen=st.sampled_from([RELEASED, PAPER, replace(PAPER, norm="l1"), replace(PAPER, norm="linf")]),
)
def test_stays_in_its_box_for_every_shape(b, c, h, w, zeta, chosen):
    x = draw(b, c, h, w, seed=h * 10 + w)
    e = friendly_noise(small_net(c), x, chosen, zeta=zeta, steps=4)
    assert e.shape == x.shape and e.dtype == torch.float32 and not e.requires_grad
    if b:
        assert e.abs().max() <= zeta + 1e-7
        assert (x + e).min() >= -1e-7 and (x + e).max() <= 1 + 1e-7
        assert (e.abs().max() > 0) == (zeta > 0)


class Fails(nn.Module):
    def __init__(self, after: int) -> None:
        super().__init__()
        self.inner, self.left = small_net(), after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of luck")
        torch.rand(3)  # a layer that draws
        return self.inner(x)


@pytest.mark.parametrize("after", [0, 3, 10**9], ids=["fails at once", "fails midway", "succeeds"])
def test_the_model_and_the_world_are_as_before(after):
    net = Fails(after)
    net.train()
    net.inner[1].eval()  # a batch norm that was frozen on purpose
    net.inner[0].weight.requires_grad_(False)
    net.inner[6].bias.grad = torch.ones(5)
    modes = [m.training for m in net.modules()]
    wants = [p.requires_grad for p in net.parameters()]
    state = copy.deepcopy(net.state_dict())
    torch.manual_seed(5)
    rng = torch.get_rng_state()
    x = draw(4, 3, 6, 6)
    kept = x.clone()
    if after < 100:
        with pytest.raises(RuntimeError, match="out of luck"):
            friendly_noise(net, x)
    else:
        friendly_noise(net, x)
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == wants
    assert all(torch.equal(a, b) for a, b in zip(state.values(), net.state_dict().values(), strict=True))
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, kept)
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert list(grads) == ["inner.6.bias"] and torch.equal(grads["inner.6.bias"], torch.ones(5))


def test_full_precision_under_autocast_and_without_grad():
    net, x = small_net(), draw(4, 3, 6, 6)
    plain = friendly_noise(net, x)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        mixed = friendly_noise(net, x)
        assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    assert torch.equal(plain, mixed)


def test_works_under_inference_mode():
    net, x = small_net(), draw(4, 3, 6, 6)
    plain = friendly_noise(net, x)
    with torch.inference_mode():
        inside = friendly_noise(net, x.clone())
    assert torch.equal(plain, inside)


def test_logits_may_be_in_an_object():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_net()

        def forward(self, x: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.inner(x), loss=None)

    x = draw(3, 3, 6, 6)
    assert torch.equal(friendly_noise(Wrapped(), x), friendly_noise(small_net(), x))


def test_the_start_is_drawn_from_the_generator():
    net, x = small_net(), draw(2, 3, 6, 6)
    draws = [friendly_noise(net, x, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0], friendly_noise(net, x))


def test_a_norm_alone_brings_the_settings_that_it_works_with():
    net, x = small_net(), draw(2, 3, 6, 6)
    assert torch.equal(friendly_noise(net, x, norm="l2"), friendly_noise(net, x, PAPER))
    assert torch.equal(friendly_noise(net, x, norm="msq"), friendly_noise(net, x, RELEASED))
    l1 = replace(PAPER, norm="l1", penalty=1 / 55)
    assert torch.equal(friendly_noise(net, x, norm="l1"), friendly_noise(net, x, l1))


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.full((1, 3, 4, 4), float("nan")), ValueError, r"in \[0, 1\].*nan"),
        (torch.full((1, 3, 4, 4), 1.5), ValueError, r"in \[1.5, 1.5\].*divide bytes by 255"),
        (torch.full((1, 3, 4, 4), -0.5), ValueError, "before normalisation"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, "divide bytes by 255"),
        (torch.zeros(3, 4, 4), ValueError, r"\(b, c, h, w\) expected, not \(3, 4, 4\)"),
    ],
    ids=["nan", "too large", "normalised", "bytes", "no batch"],
)
@pytest.mark.usefixtures("unchecked")
def test_refuses_what_are_no_pixels(x, error, words):
    with pytest.raises(error, match=words):
        friendly_noise(small_net(), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_refuses_a_half_precision_model(dtype):
    with pytest.raises(TypeError, match=r"model\.float\(\)"):
        friendly_noise(small_net().to(dtype), draw(1, 3, 4, 4))


def test_refuses_outputs_that_are_no_logits():
    x = draw(2, 3, 6, 6)
    with pytest.raises(
        ValueError, match=r"must return logits \(b, k\) for 2 images, not \(2, 108\)|not \(2, 3, 6, 6\)"
    ):
        friendly_noise(nn.Identity(), x)
    broken = small_net()
    with torch.no_grad():
        broken[6].bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        friendly_noise(broken, x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"zeta": 16}, "did you mean 16/255"),
        ({"zeta": -0.1}, "zeta is in"),
        ({"zeta": float("nan")}, "zeta is in"),
        ({"init": 8}, "did you mean 8/255"),
        ({"norm": "l3"}, "unknown norm 'l3'; choose one of l2, l1, linf, msq"),
        ({"direction": "both"}, "unknown direction"),
        ({"lr": 0.0}, "lr > 0"),
        ({"steps": -1}, "steps >= 0"),
        ({"penalty": -1.0}, "penalty >= 0"),
        ({"initial": torch.zeros(1, 3, 5, 5)}, "initial noise is"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refuses_wrong_settings(options, words):
    with pytest.raises(ValueError, match=words):
        friendly_noise(small_net(), draw(1, 3, 6, 6), **options)
