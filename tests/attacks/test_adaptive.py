"""The attacker who expects FRIENDS: what he does to his poisons, pixel by pixel, and that it helps him."""

from __future__ import annotations

import copy
from dataclasses import replace

import adaptive_slow
import pytest
import torch
from attacks_slow import descend, matching_score
from torch import Tensor, nn

from friends.attacks import GradientMatching
from friends.attacks.adaptive import EARLIER_RUN, Adaptive
from friends.attacks.crafting import Loop, craft, poison_gradient
from friends.attacks.gradient_matching import matching_objective
from friends.attacks.pixels import initial_delta
from friends.data.augment import Augment
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal
from friends.models import Classifier
from friends.noise.friendly import PAPER, friendly_noise
from friends.noise.lean import PROBE
from friends.noise.random import RandomNoise, bernoulli, random_noise
from friends.types import Streams

Digits = tuple[LabeledImages, LabeledImages]
MOMENTS = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
MU, ZETA, XI = 48 / 255, 32 / 255, 64 / 255
QUICK = GradientMatching(xi=XI, budget=0.01, steps=3, restarts=1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


def loop(**changes: object) -> Loop:
    plain = {"xi": 16 / 255, "steps": 3, "restarts": 1, "tau": 0.1, "augment": None, "start": "clean"}
    return Loop(**{**plain, **changes})  # type: ignore[arg-type]


class Asked:
    """A surrogate function that hands out copies of one model and remembers how it was called."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[tuple[int, int | None, tuple[RandomNoise, float] | None]] = []

    def __call__(
        self,
        data: LabeledImages,
        *,
        index: int = 0,
        epochs: int | None = None,
        start: nn.Module | None = None,
        noise: tuple[RandomNoise, float] | None = None,
    ) -> nn.Module:
        self.calls.append((index, epochs, noise))
        return copy.deepcopy(self.model)


# --- what is done to the poisons ---


@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize("friendly", [False, True])
def test_poisons_are_disturbed_as_in_the_slow_version(friendly: bool, straight: bool) -> None:
    x = random(2, 3, 4, 5).requires_grad_()
    fixed = (random(2, 3, 4, 5, seed=1) - 0.5) if friendly else None
    adapt = Adaptive(mu=MU, zeta=0.5, straight_through=straight)
    ours = adapt.disturbed(x, fixed, generator(3))
    slow = adaptive_slow.disturbed(x, fixed, adaptive_slow.signs((2, 3, 4, 5), MU, generator(3)))
    assert torch.allclose(ours, slow, atol=1e-12)
    weight = random(2, 3, 4, 5, seed=2)
    got, expected = (torch.autograd.grad((out * weight).sum(), x)[0] for out in (ours, slow))
    if not straight:
        assert torch.allclose(got, expected)
        assert bool((expected == 0).any()) is friendly  # the clip stops gradients, but only where it clips
    else:
        assert torch.allclose(got, weight)


def test_random_noise_is_not_clipped_and_friendly_noise_is() -> None:
    white, up = torch.ones(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.3)
    seen = Adaptive(mu=0.25, zeta=0.3).disturbed(white, up, generator())
    assert set(seen.unique().tolist()) == {0.75, 1.25}
    seen = Adaptive(mu=0.25, zeta=0.3).disturbed(white - 0.1, -up, generator())
    assert seen.unique().tolist() == pytest.approx([0.35, 0.85])


@pytest.mark.parametrize("kind", ["bernoulli", "uniform", "gaussian"])
def test_the_noise_is_that_of_the_defense(kind: RandomNoise) -> None:
    x = random(8, 1, 6, 6)
    seen = Adaptive(random=kind, mu=MU).disturbed(x, None, generator(5))
    assert torch.equal(seen - x, (x + random_noise(x, kind, MU, generator(5))) - x)
    assert float((seen - x).abs().max()) > MU / 2


def test_noise_is_fresh_for_each_image_step_restart_and_draw() -> None:
    noises: list[Tensor] = []

    def watching(x: Tensor) -> Tensor:
        noises.extend((x.detach() - 0.5).split(1))
        return x.sum() * 0

    base = torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64)
    settings = loop(steps=2, restarts=2, adapt=Adaptive(mu=0.1, draws=3))
    craft(base, [watching], settings, moments=MOMENTS, streams=Streams(0))
    assert len(noises) == 2 * 2 * 2 * 3
    for i, noise in enumerate(noises):
        assert torch.allclose(noise.abs(), torch.full_like(noise, 0.1))
        for other in noises[:i]:
            agree = (noise * other > 0).double().mean()
            assert 0.3 < float(agree) < 0.7


def test_noise_comes_before_augmentation_and_moves_with_the_image() -> None:
    """Bilinear sampling averages independent noise, which a victim's does too; noise after it would keep its size."""
    sizes: list[float] = []

    def watching(x: Tensor) -> Tensor:
        sizes.append(float((x.detach() - 0.5).abs().flatten(1).mean(1).min()))
        assert float((x.detach() - 0.5).abs().max()) <= 0.1 + 1e-9
        return x.sum() * 0

    base, gray = torch.full((16, 3, 16, 16), 0.5, dtype=torch.float64), ((0.5,) * 3, (0.2,) * 3)
    settings = loop(steps=1, augment=Augment(), adapt=Adaptive(mu=0.1))
    craft(base, [watching], settings, moments=gray, streams=Streams(0))
    assert sizes[0] < 0.08
    seen = Augment()(base + bernoulli(base, 0.1, Streams(0)("noise", 0, 0)), Streams(0)("augment", 0, 0), gray[0])
    assert sizes[0] == pytest.approx(float((seen - 0.5).abs().flatten(1).mean(1).min()))


def test_an_attacker_draws_the_same_augmentation_whether_he_expects_noise_or_not() -> None:
    seen: list[Tensor] = []

    def watching(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return x.sum() * 0

    base = random(4, 3, 8, 8)
    for adapt in (None, Adaptive(mu=1e-6)):
        craft(base, [watching], loop(steps=1, augment=Augment(), adapt=adapt), moments=MOMENTS, streams=Streams(0))
    assert torch.allclose(seen[0], seen[1], atol=1e-5)


def test_the_gradient_is_the_mean_over_the_draws() -> None:
    def curved(x: Tensor) -> Tensor:
        return (x**3).sum() + (x.flip(-1) * x).sum() ** 2 / 100

    base, streams = random(3, 3, 8, 8), Streams(4)
    delta = 0.05 * (random(3, 3, 8, 8, seed=1) - 0.5)
    settings = loop(adapt=Adaptive(mu=0.2, draws=4), augment=Augment())
    score, gradient = poison_gradient(base, delta, [curved], settings, streams, MOMENTS[0], (1, 2))
    noise, shifts = streams("noise", 1, 2), streams("augment", 1, 2)
    scores: list[float] = []
    total = torch.zeros_like(delta)
    for _ in range(4):
        leaf = delta.clone().requires_grad_()
        one = curved(Augment()(base + leaf + bernoulli(base, 0.2, noise), shifts, MOMENTS[0]))
        scores.append(float(one.detach()))
        total += torch.autograd.grad(one, leaf)[0] / 4
    assert len(set(scores)) == 4
    assert score == pytest.approx(sum(scores) / 4)
    assert torch.allclose(gradient, total)


def test_expecting_noise_of_no_strength_is_expecting_none() -> None:
    base, results = random(3, 3, 8, 8), list[Tensor]()
    for adapt in (None, Adaptive(mu=0.0), Adaptive(mu=0.1)):
        settings = loop(augment=Augment(), adapt=adapt, start="randn")
        found = craft(base, [lambda x: ((x - 0.5) ** 2).sum()], settings, moments=MOMENTS, streams=Streams(0))
        results.append(found.delta)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# --- what he trains ---


def test_his_surrogates_are_trained_with_the_noise_unless_he_says_otherwise(
    tiny_net: Classifier, digits: Digits
) -> None:
    asked = Asked(tiny_net)
    Adaptive(mu=MU).informed(asked)(digits[0], index=3, epochs=7)
    Adaptive(mu=MU).informed(asked)(digits[0], noise=("gaussian", 0.1))
    assert asked.calls == [(3, 7, ("bernoulli", MU)), (0, None, ("gaussian", 0.1))]
    assert Adaptive(mu=MU, surrogates=False).informed(asked) is asked
    assert Adaptive(mu=0.0).informed(asked) is asked


def test_friendly_noise_comes_from_an_earlier_run_of_his_own_on_the_clean_images(
    tiny_net: Classifier, digits: Digits
) -> None:
    asked, train, rows = Asked(tiny_net), digits[0], torch.arange(3, 203, 2)
    assert Adaptive(mu=MU).friendly(train, rows, surrogate=asked, streams=Streams(0)) is None
    assert asked.calls == []
    adapt = Adaptive(mu=MU, zeta=ZETA, def_epoch=4)
    noise = adapt.friendly(train, rows, surrogate=asked, streams=Streams(0))
    assert noise is not None
    assert asked.calls == [(EARLIER_RUN, 4, ("bernoulli", MU))]
    expected = friendly_noise(tiny_net, train.pixels(rows), adapt.settings, zeta=ZETA, generator=Streams(0)("friendly"))
    assert torch.allclose(noise, expected, atol=1e-6)
    assert float(noise.abs().max()) == pytest.approx(ZETA)
    assert float((train.pixels(rows) + noise).min()) >= 0
    replace(adapt, mu=0.0).friendly(train, rows, surrogate=asked, streams=Streams(0))
    assert asked.calls[-1] == (EARLIER_RUN, 4, None)


def test_how_the_friendly_noise_is_made_can_be_chosen(tiny_net: Classifier, digits: Digits) -> None:
    asked, rows = Asked(tiny_net), torch.arange(10)
    released, paper = (
        Adaptive(zeta=ZETA, settings=settings).friendly(digits[0], rows, surrogate=asked, streams=Streams(0))
        for settings in (Adaptive().settings, PAPER)
    )
    assert released is not None
    assert paper is not None
    assert float((paper.abs() - released.abs()).abs().max()) > ZETA / 4


def test_what_his_friendly_noise_costs_is_counted(tiny_net: Classifier, digits: Digits) -> None:
    model, entered = copy.deepcopy(tiny_net), list[int]()
    model.register_forward_hook(lambda _, inputs, __: entered.append(len(inputs[0])))
    adapt = Adaptive(zeta=ZETA)
    noise = adapt.friendly(digits[0], torch.arange(150), surrogate=lambda *_, **__: model, streams=Streams(0))
    assert noise is not None
    assert sum(n for n in entered if n > PROBE) == sum(adapt.passes(150)) == 150 * (1 + adapt.settings.steps)
    assert sum(n for n in entered if n <= PROBE) <= 4 * PROBE  # with which the network is looked at, twice
    assert max(entered) <= 128
    assert Adaptive().passes(150) == (0, 0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mu": 16}, r"mu is in \[0, 1\] pixel units, not 16; did you mean 16/255"),
        ({"zeta": 16}, "zeta is in .* did you mean 16/255"),
        ({"random": "pink"}, "unknown random noise 'pink'; choose one of bernoulli, uniform, gaussian"),
        ({"draws": 0}, "draws >= 1 and def_epoch >= 0 expected, not 0 and 5"),
        ({"def_epoch": -1}, "not 1 and -1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adaptive(**settings)  # type: ignore[arg-type]


# --- the whole attack ---


@pytest.mark.parametrize(
    "adapt",
    [Adaptive(mu=MU), Adaptive(mu=MU, zeta=ZETA), Adaptive(mu=MU, draws=3)],
    ids=["bernoulli", "friendly", "averaged"],
)
def test_adaptive_gradient_matching_is_the_slow_one(
    adapt: Adaptive, tiny_net: Classifier, digits: Digits, goal: Goal
) -> None:
    model, train, streams = copy.deepcopy(tiny_net).double(), digits[0], Streams(5)
    asked = Asked(model)
    made = replace(QUICK, adapt=adapt)(train, goal, surrogate=asked, streams=streams)
    base = train.pixels(made.poison_idx).double()
    mean, std = (torch.tensor(m, dtype=torch.float64).view(1, -1, 1, 1) for m in train.moments)
    friendly: Tensor | None = None
    if adapt.zeta:
        friendly = friendly_noise(
            model, base.float(), adapt.settings, zeta=adapt.zeta, generator=streams("friendly")
        ).double()

    def score(pixels: Tensor, step: int) -> Tensor:
        shifts = streams("augment", 0, step)
        return adaptive_slow.expected_score(
            lambda x: matching_score(model, x, 1, goal.x.double()), pixels, friendly, mu=adapt.mu, draws=adapt.draws,
            noise=streams("noise", 0, step), augment=lambda x: Augment()(x, shifts, train.moments[0]))  # fmt: skip

    start = initial_delta(base, XI, "randn", streams("init", 0))
    delta = descend(score, base, start, mean=mean, std=std, xi=XI, tau=0.1, steps=3, signed=True)
    assert torch.equal(made.train.x[made.poison_idx], ((base + delta) * 255).round().to(torch.uint8))
    assert asked.calls[0] == (0, None, ("bernoulli", MU))
    assert made.recipe["adapt"]["mu"] == MU


def test_poisons_of_one_who_expects_noise_match_better_under_noise(
    ten_digits: tuple[LabeledImages, LabeledImages, Classifier],
) -> None:
    """Few poisons and strong noise, where it matters most; with so few steps a single draw would not be enough."""
    train, test, model = ten_digits
    with torch.no_grad():
        row = ((test.y == 1) & (model(test.pixels()).argmax(1) == 1)).nonzero()[0]
    goal = Goal(test.pixels(row), test.y[row], torch.tensor([8]))
    plain = GradientMatching(xi=XI, budget=0.004, steps=60, restarts=1, augment=None)
    strong, scores = 128 / 255, list[float]()
    for adapt in (None, Adaptive(mu=strong, draws=8)):
        made = replace(plain, adapt=adapt)(train, goal, surrogate=Asked(model), streams=Streams(0))
        objective, pixels = matching_objective(model, goal, 8), made.train.pixels(made.poison_idx)
        noise = generator(9)  # the same noise for both, none of it seen while crafting
        noisy = [float(objective(pixels + bernoulli(pixels, strong, noise)).detach()) for _ in range(8)]
        scores.append(sum(noisy) / len(noisy))
    assert scores[1] < scores[0] - 0.02
