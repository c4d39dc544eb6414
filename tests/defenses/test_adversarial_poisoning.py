"""Adversarial Poisoning: what it makes of a batch, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from adversarial_poisoning_slow import alignment, flat_gradient, poison_slowly

from friends.data.images import LabeledImages
from friends.defenses.adversarial_poisoning import (
    AdversarialPoisoning,
    align,
    gradient_of,
    most_frequent,
    poison_batch,
    unit,
)
from friends.defenses.ball import project, share
from friends.defenses.friends import Friends
from friends.models import build
from friends.models.classifier import Classifier, transfer
from friends.training import Defense, Recipe, Run, fit
from friends.training.defense import About
from friends.types import Streams

MEAN, STD = torch.tensor(0.13).view(1, 1, 1, 1), torch.tensor(0.31).view(1, 1, 1, 1)
EPS = 16 / 255


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(name: str = "tiny", channels: int = 1, size: tuple[int, int] = (28, 28)) -> Classifier:
    moments = ((0.13,) * channels, (0.31,) * channels)
    return build(name, shape=(channels, *size), classes=3, moments=moments, width=4, generator=stream(1))


def poisoned(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, **changes: float) -> torch.Tensor:
    settings = {"fraction": 0.5, "eps": EPS, "steps": 5, "tau": 0.1} | changes
    return poison_batch(model, x, y, std=STD, generator=stream(), **settings)  # type: ignore[arg-type]


@pytest.fixture
def batch(few_digits: LabeledImages) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randperm(300, generator=stream(4))[:24]
    return few_digits.pixels(rows), few_digits.y[rows]


def test_it_is_what_the_paper_says(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Against normalised images, torch's Adam and both gradients at every step, with and without batch norm."""
    x, y = batch
    for name in ("tiny", "convnet"):
        model = network(name).double().eval()
        start = project(torch.randn(12, 1, 28, 28, generator=stream(), dtype=torch.float64) * EPS, x[:12].double(), EPS)
        slow = poison_slowly(model, x.double(), y, 12, start, mean=MEAN, std=STD, eps=EPS, steps=5, tau=0.1)
        fast = poisoned(model, x.double(), y)
        assert torch.allclose(fast, slow, atol=1e-6)


def test_the_gradients_align_step_by_step(few_digits: LabeledImages, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = batch
    recipe = Recipe(epochs=12, batch=32, lr=0.02, augment=None)
    model = fit(few_digits, lambda _: network(), recipe=recipe, streams=Streams(0)).model

    def reached(steps: int) -> float:
        return float(alignment(model, poisoned(model, x, y, steps=steps)[:12], y[:12], x[12:]))

    cosines = [reached(steps) for steps in range(1, 6)]
    assert cosines == sorted(cosines)
    assert cosines[-1] > cosines[0] + 0.02
    noise = project(torch.randn(12, 1, 28, 28, generator=stream(3)) * EPS, x[:12], EPS)
    assert cosines[-1] > float(alignment(model, x[:12] + noise, y[:12], x[12:])) + 0.1


def test_the_targets_gradient_is_the_same_at_every_step(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """It may be computed once: crafting leaves the network, and so g_T, as they were."""
    x, y = batch
    model = network("convnet").eval()
    fake = most_frequent(y[:12]).expand(12)
    cached = unit(gradient_of(model, x[12:], fake))
    align(model, x[:12], y[:12], cached, eps=EPS, steps=3, tau=0.1, std=STD, generator=stream())
    again = unit(gradient_of(model, x[12:], fake))
    assert all(torch.equal(a, b) for a, b in zip(cached, again, strict=True))
    assert not any(part.requires_grad for part in cached)
    slow = flat_gradient(model, x[12:], fake)
    assert torch.allclose(torch.cat([part.flatten() for part in cached]), slow / slow.norm(), atol=1e-6)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_the_first_part_moves_within_the_bound_and_the_rest_stays(
    batch: tuple[torch.Tensor, torch.Tensor], fraction: float
) -> None:
    x, y = batch
    before = x.clone()
    out = poisoned(network(), x, y, fraction=fraction)
    count = int(24 * fraction)
    assert out.shape == x.shape
    assert torch.equal(x, before)
    assert torch.equal(out[count:], x[count:])
    moved = (out - x)[:count].abs().flatten(1).max(1).values
    assert float(moved.max()) <= EPS + 1e-6
    assert float(moved.min()) > 0.9 * EPS
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1


def test_a_short_batch_is_cut_in_the_same_proportion() -> None:
    assert [share(n, 0.25) for n in (128, 80, 7, 3, 1)] == [32, 20, 1, 0, 0]
    assert share(80, 0.75) == 60
    assert share(100, 0.29) == 29  # whose product is just below 29 in floating point


def test_a_batch_without_poisons_or_targets_is_left_alone(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = batch[0][:1], batch[1][:1]
    assert poisoned(network(), x, y) is x
    assert poisoned(network(), *batch, eps=0) is batch[0]


def test_noise_outside_the_range_never_enlarges_the_perturbation(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = batch
    noisy = x + torch.where(torch.rand(x.shape, generator=stream(5)) < 0.5, -0.2, 0.2)
    out = poisoned(network(), noisy, y)
    assert float((out - noisy).abs().max()) <= EPS + 1e-6
    inside = (noisy >= 0) & (noisy <= 1)
    assert float(out[inside].min()) >= 0
    assert float(out[inside].max()) <= 1
    assert bool((out <= noisy.clamp(min=1)).all())  # nothing goes further out than it was
    assert bool((out >= noisy.clamp(max=0)).all())
    assert 0.1 < float(inside.float().mean()) < 0.9


def test_crafting_leaves_no_trace(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Running statistics, modes, gradients and the global generator; and it works under no_grad and autocast."""
    x, y = batch
    model = network("convnet").train()
    model.body[1].eval()  # a part that is held stays held
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    plain = poisoned(model, x, y)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(poisoned(model, x, y), plain)  # in full precision all the same
    assert not plain.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_fake_label_is_the_poisons_own_majority() -> None:
    assert int(most_frequent(torch.tensor([2, 0, 1, 2]))) == 2
    assert int(most_frequent(torch.tensor([5, 3, 5, 3]))) == 3


def test_a_vanishing_gradient_moves_nothing_into_nan(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A network that is certain of every image has a gradient of 0; the batch stays finite and in its bound."""
    x, _ = batch
    model = network()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
    out = poisoned(model, x, torch.zeros(24, dtype=torch.int64))
    assert bool(out.isfinite().all())
    assert float((out - x).abs().max()) <= EPS + 1e-6


def test_only_what_is_trained_counts_in_transfer_learning(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = batch
    model = transfer(network("convnet"), generator=stream(2)).double().eval()
    assert len(gradient_of(model, x.double(), y)) == 2  # weight and bias of the head
    start = project(torch.randn(12, 1, 28, 28, generator=stream(), dtype=torch.float64) * EPS, x[:12].double(), EPS)
    slow = poison_slowly(model, x.double(), y, 12, start, mean=MEAN, std=STD, eps=EPS, steps=5, tau=0.1)
    assert torch.allclose(poisoned(model, x.double(), y), slow, atol=1e-6)
    assert [p.requires_grad for p in model.parameters()] == [False] * (len(list(model.parameters())) - 2) + [True] * 2


def test_colour_images_that_are_not_square(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    x = torch.rand(6, 3, 12, 20, generator=stream())
    model = network("convnet", 3, (12, 20))
    std = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    out = poison_batch(model, x, batch[1][:6], fraction=0.5, eps=0.5, steps=1, tau=0.01, std=std, generator=stream())
    start = project(torch.randn(3, 3, 12, 20, generator=stream()) * 0.5, x[:3], 0.5)
    step = (out[:3] - x[:3] - start).abs()
    for channel, size in enumerate((0.001, 0.002, 0.003)):  # a normalised unit is each channel's own
        assert float(step[:, channel].max()) == pytest.approx(size, rel=1e-3)


class Look(Defense):
    """Keeps the batches that went into the model."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def batch(self, x: torch.Tensor, y: torch.Tensor, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append((x, y))
        return x, y


def test_every_step_is_crafted_anew_and_labels_keep_their_order(few_digits: LabeledImages) -> None:
    before, after = Look(), Look()
    recipe = Recipe(epochs=2, batch=128, lr=0.05)
    defense = AdversarialPoisoning(fraction=0.75, steps=1)
    fit(few_digits, lambda _: network(), recipe=recipe, defenses=[before, defense, after], streams=Streams(0))
    assert [len(x) for x, _ in after.seen] == [128, 128, 44] * 2
    for (x, y), (crafted, labels) in zip(before.seen, after.seen, strict=True):
        count = len(x) * 3 // 4
        assert torch.equal(y, labels)
        assert torch.equal(crafted[count:], x[count:])
        assert not torch.equal(crafted[:count], x[:count])
    first, second = ((after.seen[i][0] - before.seen[i][0])[:96] for i in (0, 3))
    assert float((first.sign() == second.sign()).float().mean()) < 0.9  # another start


class Has(Defense):
    def __init__(self, trait: str) -> None:
        self.about = About(title=trait, paper="", traits=frozenset({trait}))  # type: ignore[misc,arg-type]


def refuses(few_digits: LabeledImages, *defenses: Defense) -> str:
    with pytest.raises(ValueError, match="do not compose") as caught:
        fit(few_digits, lambda _: network(), recipe=Recipe(epochs=0), defenses=defenses, streams=Streams(0))
    return str(caught.value)


def test_what_it_does_not_compose_with(few_digits: LabeledImages) -> None:
    mine = AdversarialPoisoning()
    assert "hard label" in refuses(few_digits, Has("mixes"), mine)
    assert "copies" in refuses(few_digits, Has("repeats"), mine)
    assert "whole batch" in refuses(few_digits, mine, Has("private"))
    defenses = [mine, Friends(def_epoch=0), Has("mixes"), Has("repeats"), Has("drops"), Has("phases")]
    fit(few_digits, lambda _: network(), recipe=Recipe(epochs=0), defenses=defenses, streams=Streams(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 1.0}, r"fraction is in \[0, 1\), not 1.0"),
        ({"fraction": -0.1}, "fraction"),
        ({"eps": 16.0}, "did you mean 16/255"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"tau": 0.0}, "tau, the size of a step, must be positive, not 0.0"),
        ({"tau": float("nan")}, "tau"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdversarialPoisoning(**settings)  # type: ignore[arg-type]


def test_it_discloses_the_bound_that_it_is_told() -> None:
    assert AdversarialPoisoning().told() == {"eps": 16 / 255}


def test_a_share_that_is_no_image_is_refused(few_digits: LabeledImages) -> None:
    def small(generator: torch.Generator) -> torch.nn.Module:
        return build("tiny", shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=4, generator=generator)

    recipe = Recipe(epochs=1, batch=64)
    with pytest.raises(ValueError, match=r"fraction = 0\.01 of a batch of 64 is no image"):
        fit(few_digits, small, recipe=recipe, defenses=[AdversarialPoisoning(fraction=0.01)], streams=Streams(0))
