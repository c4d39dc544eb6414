"""The three random noises, and the order in which noise is added."""

from __future__ import annotations

import pytest
import torch

from friends.noise.random import add_noise, random_noise

MU = 16 / 255
KINDS = ("bernoulli", "uniform", "gaussian")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(9))


def test_bernoulli_is_plus_or_minus_mu():
    e = random_noise(torch.zeros(50, 3, 16, 16), "bernoulli", MU, generator())
    assert set(e.unique().tolist()) == {-torch.tensor(MU).item(), torch.tensor(MU).item()}
    assert abs(float((e > 0).float().mean()) - 0.5) < 0.01


def test_uniform_fills_its_interval():
    e = random_noise(torch.zeros(50, 3, 16, 16), "uniform", MU, generator()) / MU
    assert -1 <= e.min() < -0.99 and 0.99 < e.max() <= 1
    found = e.flatten().quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))
    torch.testing.assert_close(found, torch.tensor([-0.8, -0.5, 0.0, 0.5, 0.8]), rtol=0, atol=0.02)


def test_gaussian_has_standard_deviation_mu_and_no_bound():
    e = random_noise(torch.zeros(50, 3, 16, 16), "gaussian", MU, generator()) / MU
    assert abs(float(e.std()) - 1) < 0.02
    inside = [float((e.abs() < k).float().mean()) for k in (1, 2)]
    assert abs(inside[0] - 0.683) < 0.01 and abs(inside[1] - 0.954) < 0.01
    assert e.abs().max() > 3


@pytest.mark.parametrize(("kind", "rms"), [("bernoulli", 1.0), ("uniform", 3**-0.5), ("gaussian", 1.0)])
def test_mean_rms_and_independence(kind, rms):
    e = random_noise(torch.zeros(200, 3, 8, 8), kind, MU, generator()) / MU
    assert abs(float(e.mean())) < 0.02
    assert abs(float(e.square().mean().sqrt()) - rms) < 0.02
    across = (e[1:] * e[:-1]).mean() / rms**2, (e[..., 1:] * e[..., :-1]).mean() / rms**2
    assert max(abs(float(c)) for c in across) < 0.03  # neither rows nor neighbouring pixels share their noise


@pytest.mark.parametrize("kind", KINDS)
def test_follows_from_the_generator_alone(kind):
    x = images(2, 3, 4, 4)
    kept, rng = x.clone(), torch.get_rng_state()
    first, again, other = (random_noise(x, kind, MU, generator(s)) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    g = generator(3)
    assert not torch.equal(random_noise(x, kind, MU, g), random_noise(x, kind, MU, g))  # redrawn at every step
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(x, kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_like_the_images(kind, dtype):
    e = random_noise(torch.zeros(0, 1, 5, 7, dtype=dtype), kind, MU, generator())
    assert e.shape == (0, 1, 5, 7) and e.dtype == dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_is_drawn_on_the_device_of_its_generator(kind):
    x = torch.zeros(4, 3, 8, 8, device="cuda")
    e = [random_noise(x, kind, MU, torch.Generator("cuda").manual_seed(1)) for _ in range(2)]
    assert e[0].is_cuda and torch.equal(*e)


def test_friendly_noise_is_clamped_and_random_noise_is_not():
    x = torch.tensor([0.0, 0.02, 0.5, 0.98, 1.0]).reshape(1, 1, 1, 5)
    friendly = torch.tensor([-0.1, -0.1, 0.1, 0.1, 0.1]).reshape(1, 1, 1, 5)
    clipped = torch.tensor([0.0, 0.0, 0.6, 1.0, 1.0]).reshape(1, 1, 1, 5)
    torch.testing.assert_close(add_noise(x, friendly, mu=0, generator=generator()), clipped)
    noisy = add_noise(x, friendly, mu=0.25, generator=generator(1))
    torch.testing.assert_close((noisy - clipped).abs(), torch.full_like(x, 0.25))
    many = add_noise(x.expand(50, 1, 1, 5), friendly.expand(50, 1, 1, 5), mu=0.25, generator=generator(1))
    assert many.min() == -0.25 and many.max() == 1.25  # beyond the pixels, on purpose


@pytest.mark.parametrize("kind", KINDS)
def test_random_noise_is_that_of_random_noise(kind):
    x = images(2, 3, 4, 4)
    found = add_noise(x, None, random=kind, mu=MU, generator=generator(7))
    assert torch.equal(found, x + random_noise(x, kind, MU, generator(7)))


def test_zero_strength_is_the_same_image_and_draws_nothing():
    x, g = images(2, 3, 4, 4), generator(5)
    before = g.get_state()
    assert add_noise(x, None, mu=0, generator=g) is x
    assert torch.equal(add_noise(x, torch.zeros_like(x), mu=0, generator=g), x)
    assert torch.equal(g.get_state(), before)


@pytest.mark.parametrize(
    ("kind", "mu", "words"),
    [
        ("bernouli", MU, "unknown random noise 'bernouli'; choose one of bernoulli, uniform, gaussian"),
        ("uniform", 16, "did you mean 16/255"),
        ("uniform", -0.1, "mu is in"),
        ("uniform", float("nan"), "mu is in"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refuses_wrong_settings(kind, mu, words):
    with pytest.raises(ValueError, match=words):
        random_noise(images(1, 1, 2, 2), kind, mu, generator())
