from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from friends.data.augment import Augment


def slowly(x: Tensor, flip: list[bool], dx: list[float], dy: list[float], fill: tuple[float, ...]) -> Tensor:
    """One pixel after the other: flip the image, then look (dy, -dx or dx) further, between four neighbours."""
    b, c, h, w = x.shape
    out = torch.empty(b, c, h, w, dtype=torch.float64)

    def at(i: int, k: int, row: int, column: int) -> float:
        return float(x[i, k, row, column]) if 0 <= row < h and 0 <= column < w else fill[k]

    for i in range(b):
        for row in range(h):
            for column in range(w):
                # corner centre to corner centre: a flip sends column j to w-1-j, and the shift goes with it
                u = (w - 1) - (column + dx[i]) if flip[i] else column + dx[i]
                v = row + dy[i]
                r, q = math.floor(v), math.floor(u)
                fv, fu = v - r, u - q
                for k in range(c):
                    top = (1 - fu) * at(i, k, r, q) + fu * at(i, k, r, q + 1)
                    low = (1 - fu) * at(i, k, r + 1, q) + fu * at(i, k, r + 1, q + 1)
                    out[i, k, row, column] = (1 - fv) * top + fv * low
    return out


def drawn(b: int, seed: int, augment: Augment) -> tuple[list[bool], list[float], list[float]]:
    draw = torch.rand(3, b, generator=torch.Generator().manual_seed(seed))
    shifts = ((2 * draw[1:] - 1) * augment.shift).tolist()
    return (draw[0] < augment.flip).tolist(), shifts[0], shifts[1]


@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(0, 3),
    c=st.sampled_from([1, 3]),
    h=st.integers(2, 7),
    w=st.integers(2, 7),
    flip=st.sampled_from([0.0, 0.5, 1.0]),
    shift=st.sampled_from([0.0, 0.7, 2.0, 4.0, 20.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_slow_version(b: int, c: int, h: int, w: int, flip: float, shift: float, seed: int) -> None:
    augment = Augment(flip, shift)
    fill = (0.25, 0.5, 0.75)[:c]
    x = torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(seed + 1))
    fast = augment(x, torch.Generator().manual_seed(seed), fill)
    slow = slowly(x, *drawn(b, seed, augment), fill)
    assert fast.dtype == torch.float32 and fast.shape == x.shape
    assert torch.allclose(fast.double(), slow, atol=2e-5)


def whole_shift(x: Tensor, dx: int, dy: int) -> Tensor:
    """What a shift by whole pixels must be: every pixel is the one (dy, dx) further, or black."""
    out = torch.zeros_like(x)
    h, w = x.shape[2:]
    rows = [r for r in range(h) if 0 <= r + dy < h]
    columns = [q for q in range(w) if 0 <= q + dx < w]
    for r in rows:
        for q in columns:
            out[:, :, r, q] = x[:, :, r + dy, q + dx]
    return out


@pytest.mark.parametrize(("u", "v"), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.5), (0.5, 0.0)])
def test_a_whole_shift_is_an_index_shift(monkeypatch: pytest.MonkeyPatch, u: float, v: float) -> None:
    x = torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(0))
    draw = torch.tensor([[0.9], [u], [v]])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: draw)
    shifted = Augment(flip=0.5, shift=2)(x, torch.Generator(), (0.0, 0.0, 0.0))
    assert torch.allclose(shifted, whole_shift(x, round(4 * u - 2), round(4 * v - 2)), atol=1e-5)


def test_a_certain_flip_without_shift_is_a_mirror() -> None:
    x = torch.rand(4, 3, 5, 8)
    mirrored = Augment(flip=1, shift=0)(x, torch.Generator().manual_seed(0), (0.5, 0.5, 0.5))
    assert torch.allclose(mirrored, x.flip(3), atol=1e-6)


def test_nothing_to_do_is_the_same_bytes_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    x = torch.rand(2, 3, 4, 4)
    assert Augment(0, 0)(x, generator, (0.5,) * 3) is x
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 5), (2, 1, 5, 1)])
def test_one_pixel_wide_images_stay_finite_and_in_range(shape: tuple[int, int, int, int]) -> None:
    out = Augment()(torch.rand(shape), torch.Generator().manual_seed(0), (0.5,) * shape[1])
    assert bool(torch.isfinite(out).all()) and out.min() >= 0 and out.max() <= 1 + 1e-6


def test_outside_shows_the_fill_colour() -> None:
    x = torch.zeros(64, 3, 8, 8)
    out = Augment(flip=0, shift=4)(x, torch.Generator().manual_seed(0), (0.2, 0.4, 0.6))
    for channel, colour in enumerate((0.2, 0.4, 0.6)):
        assert float(out[:, channel].max()) == pytest.approx(colour, abs=1e-5)
    flat = torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1).expand(8, 3, 6, 6)
    assert torch.allclose(Augment()(flat, torch.Generator().manual_seed(0), (0.2, 0.4, 0.6)), flat, atol=1e-6)


def test_each_image_draws_its_own_and_half_are_flipped() -> None:
    row = torch.linspace(0, 1, 9).expand(400, 1, 9, 9)
    out = Augment(flip=0.5, shift=0)(row, torch.Generator().manual_seed(0), (0.5,))
    flipped = int((out[:, 0, 0, 0] > 0.5).sum())
    assert 160 < flipped < 240
    moved = Augment(flip=0, shift=3)(row, torch.Generator().manual_seed(0), (0.5,))
    centres = moved[:, 0, 4, 4]  # the ramp at the centre is 1/2 + shift/8
    assert len(centres.unique()) > 390
    assert float(centres.min()) == pytest.approx(0.5 - 3 / 8, abs=0.02)
    assert float(centres.max()) == pytest.approx(0.5 + 3 / 8, abs=0.02)


def test_the_global_generator_and_the_input_are_left_alone() -> None:
    x = torch.rand(3, 3, 6, 6)
    copy, state = x.clone(), torch.get_rng_state()
    a = Augment()(x, torch.Generator().manual_seed(5), (0.5,) * 3)
    b = Augment()(x, torch.Generator().manual_seed(5), (0.5,) * 3)
    assert torch.equal(a, b) and torch.equal(x, copy) and torch.equal(torch.get_rng_state(), state)


def test_gradient_reaches_the_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 5, 5, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.rand(2, 1, 5, 5, dtype=torch.float64, generator=generator)
    out = (Augment(0.5, 1.3)(x, torch.Generator().manual_seed(1), (0.4,)) * weight).sum()
    (gradient,) = torch.autograd.grad(out, x)
    nudge = torch.zeros_like(x)
    nudge[1, 0, 2, 2] = 1e-4  # linear in the pixels: a difference quotient is exact
    other = (Augment(0.5, 1.3)(x + nudge, torch.Generator().manual_seed(1), (0.4,)) * weight).sum()
    assert float(gradient[1, 0, 2, 2]) > 0.1
    assert ((other - out) / 1e-4).item() == pytest.approx(float(gradient[1, 0, 2, 2]), rel=1e-6)


@pytest.mark.parametrize(("flip", "shift", "words"), [(1.5, 4, "1.5"), (-0.1, 4, "-0.1"), (0.5, -1, "-1")])
def test_impossible_settings_are_refused(flip: float, shift: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Augment(flip, shift)


@pytest.mark.parametrize("name", ["flip", "shift"])
def test_nan_settings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="nan"):
        Augment(**{name: float("nan")})


def test_the_fill_must_have_a_value_per_channel() -> None:
    with pytest.raises(ValueError, match="2 fill values for 3 channels"):
        Augment()(torch.rand(1, 3, 4, 4), torch.Generator(), (0.5, 0.5))
