"""Adversarial Training: what it makes of a batch, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from adversarial_training_slow import pgd_slowly
from torch.nn import functional as F

from friends.data.images import LabeledImages
from friends.defenses.adversarial_training import AdversarialTraining, pgd
from friends.models import build
from friends.models.classifier import Classifier
from friends.training import Defense, Recipe, Run, fit
from friends.types import Streams

EPS = 0.1


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(generator: torch.Generator, name: str = "tiny") -> Classifier:
    return build(name, shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=4, generator=generator)


@pytest.fixture(scope="module")
def trained(few_digits: LabeledImages) -> torch.nn.Module:
    return fit(few_digits, make, recipe=Recipe(epochs=12, batch=32, lr=0.02, augment=None), streams=Streams(0)).model


def attacked(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, **changes: float) -> torch.Tensor:
    settings = {"eps": EPS, "steps": 5, "step_size": EPS / 4} | changes
    return pgd(model, x, y, generator=stream(), **settings)  # type: ignore[arg-type]


def test_it_is_what_the_paper_says(few_digits: LabeledImages) -> None:
    x, y = few_digits.pixels(slice(90, 102)).double(), few_digits.y[90:102]
    for name in ("tiny", "convnet"):
        model = make(stream(1), name).double().eval()
        start = (2 * torch.rand(x.shape, generator=stream(), dtype=torch.float64) - 1) * EPS
        slow = pgd_slowly(model, x, y, start, eps=EPS, steps=5, step_size=EPS / 4)
        assert torch.allclose(x + attacked(model, x, y), slow, atol=1e-9)


def test_it_raises_the_loss_more_than_random_noise_of_equal_size(
    few_digits: LabeledImages, trained: torch.nn.Module
) -> None:
    x, y = few_digits.pixels(slice(100, 200)), few_digits.y[100:200]
    delta = attacked(trained, x, y)
    corner = torch.where(torch.rand(x.shape, generator=stream(7)) < 0.5, -EPS, EPS)  # as large as the bound allows
    with torch.no_grad():
        clean, random, worst = (float(F.cross_entropy(trained(x + d), y)) for d in (torch.zeros(()), corner, delta))
    assert worst > 3 * clean
    assert worst > 3 * random


def test_every_step_raises_the_loss(few_digits: LabeledImages, trained: torch.nn.Module) -> None:
    x, y = few_digits.pixels(slice(100, 200)), few_digits.y[100:200]
    with torch.no_grad():
        losses = [float(F.cross_entropy(trained(x + attacked(trained, x, y, steps=n)), y)) for n in (1, 2, 3, 4, 5)]
    assert losses == sorted(losses)


def test_the_bound_holds_and_pixels_stay_in_range(few_digits: LabeledImages, trained: torch.nn.Module) -> None:
    x, y = few_digits.pixels(slice(90, 122)), few_digits.y[90:122]
    delta = attacked(trained, x, y, steps=20)
    assert EPS - 1e-6 <= float(delta.abs().max()) <= EPS + 1e-6
    assert float((x + delta).min()) >= 0
    assert float((x + delta).max()) <= 1


def test_noise_outside_the_range_never_enlarges_the_perturbation(
    few_digits: LabeledImages, trained: torch.nn.Module
) -> None:
    x, y = few_digits.pixels(slice(90, 122)), few_digits.y[90:122]
    noisy = x + torch.where(torch.rand(x.shape, generator=stream(5)) < 0.5, -0.3, 0.3)
    delta = attacked(trained, noisy, y)
    assert float(delta.abs().max()) <= EPS + 1e-6
    assert bool((noisy + delta <= noisy.clamp(min=1)).all())
    assert bool((noisy + delta >= noisy.clamp(max=0)).all())


def test_an_image_is_attacked_by_itself(few_digits: LabeledImages) -> None:
    """Also with batch normalisation: the model is attacked in eval mode. So clipping per image still bounds it."""
    x, y = few_digits.pixels(slice(90, 98)).double(), few_digits.y[90:98]
    model = make(stream(1), "convnet").double().train()
    other_x, other_y = torch.cat([x[:1], 1 - x[1:]]), torch.cat([y[:1], (y[1:] + 1) % 3])
    assert torch.allclose(attacked(model, x, y)[0], attacked(model, other_x, other_y)[0], atol=1e-9)


def test_crafting_leaves_no_trace(few_digits: LabeledImages) -> None:
    x, y = few_digits.pixels(slice(90, 98)), few_digits.y[90:98]
    model = make(stream(1), "convnet").train()
    model.head.bias.requires_grad_(False)
    grads = [p.requires_grad for p in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    plain = attacked(model, x, y)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attacked(model, x, y), plain)
    assert not plain.requires_grad
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_soft_labels_are_attacked_too(few_digits: LabeledImages, trained: torch.nn.Module) -> None:
    x, y = few_digits.pixels(slice(90, 98)), few_digits.y[90:98]
    soft = F.one_hot(y, 3).float()
    assert torch.equal(attacked(trained, x, soft), attacked(trained, x, y))
    mixed = (soft + soft.flip(0)) / 2
    with torch.no_grad():
        before, after = (float(F.cross_entropy(trained(x + d), mixed)) for d in (0, attacked(trained, x, mixed)))
    assert after > before + 0.05


class Look(Defense):
    """Keeps the batches that went into the model."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def batch(self, x: torch.Tensor, y: torch.Tensor, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append((x, y))
        return x, y


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_the_first_part_of_every_batch_is_attacked(few_digits: LabeledImages, fraction: float) -> None:
    before, after = Look(), Look()
    defense = AdversarialTraining(fraction=fraction, steps=1, step_size=0.02, eps=0.02)
    recipe = Recipe(epochs=2, batch=128, lr=0.05)
    fit(few_digits, make, recipe=recipe, defenses=[before, defense, after], streams=Streams(0))
    assert [len(x) for x, _ in after.seen] == [128, 128, 44] * 2
    for (x, y), (crafted, labels) in zip(before.seen, after.seen, strict=True):
        count = int(len(x) * fraction)
        assert torch.equal(y, labels)
        assert torch.equal(crafted[count:], x[count:])
        assert float((crafted - x)[:count].abs().flatten(1).max(1).values.min()) > 0.015
        assert float((crafted - x).abs().max()) <= 0.02 + 1e-6


def test_no_fraction_is_no_defense(few_digits: LabeledImages) -> None:
    recipe = Recipe(epochs=1, batch=64, lr=0.05)
    weights = [
        fit(few_digits, make, recipe=recipe, defenses=defenses, streams=Streams(0)).model.state_dict()
        for defenses in ([], [AdversarialTraining(fraction=0)])
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_batch_of_one_image_and_colour(few_digits: LabeledImages) -> None:
    moments = ((0.5,) * 3, (0.2,) * 3)
    model = build("convnet", shape=(3, 12, 20), classes=3, moments=moments, width=4, generator=stream(1))
    x = torch.rand(1, 3, 12, 20, generator=stream())
    delta = attacked(model, x, few_digits.y[:1])
    assert 0.5 * EPS < float(delta.abs().max()) <= EPS + 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 1.5}, r"fraction is in \[0, 1\], not 1.5"),
        ({"eps": 8.0}, "did you mean 8/255"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"step_size": -1.0}, "step_size, the size of a step, must be positive, not -1.0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdversarialTraining(**settings)  # type: ignore[arg-type]


def test_a_share_that_is_no_image_is_refused(few_digits: LabeledImages) -> None:
    def small(generator: torch.Generator) -> torch.nn.Module:
        return build("tiny", shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=4, generator=generator)

    recipe = Recipe(epochs=1, batch=64)
    with pytest.raises(ValueError, match=r"fraction = 0\.01 of a batch of 64 is no image"):
        fit(few_digits, small, recipe=recipe, defenses=[AdversarialTraining(fraction=0.01)], streams=Streams(0))
