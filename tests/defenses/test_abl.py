"""Anti-Backdoor Learning: its three losses, what it isolates, how phases change, and that all of it resumes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import abl_slow as slow
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from friends.data.images import LabeledImages
from friends.defenses import Friends
from friends.defenses.abl import ABL, ascent_loss, gated_loss, lowest, per_image_loss, scale_gradients
from friends.defenses.strong_augmentation import MaxUp, Mixup
from friends.models import build
from friends.training import Defense, Fitted, Recipe, Run, fit
from friends.types import Streams
from interrupting import Stop, stop_at

RECIPE = Recipe(epochs=8, batch=64, lr=0.05)


def make(generator: torch.Generator) -> nn.Module:
    return build("tiny", shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=8, generator=generator)


@dataclass(frozen=True)
class Look(Defense):
    """Comes after ABL and keeps, per epoch, what it set."""

    seen: list[dict[str, object]] = field(default_factory=list)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)

    def start_epoch(self, run: Run) -> None:
        losses = per_image_loss(run.model, run.data)
        self.optimizers.append(run.optimizer)
        self.seen.append({"augment": run.augment, "keep": run.keep.clone(), "losses": losses, "epochs": run.epochs})


def trained(
    data: LabeledImages,
    *defenses: Defense,
    recipe: Recipe = RECIPE,
    net: Callable[..., nn.Module] = make,
    **more: object,
) -> Fitted:
    return fit(data, net, recipe=recipe, defenses=defenses, streams=Streams(0), **more)  # type: ignore[arg-type]


# the losses


@pytest.mark.parametrize("losses", [[0.2, 0.9, 1.3], [0.1, 0.2, 0.3], [0.0, 0.0, 1.4], [0.4, 0.6]])
def test_phase_one_minimises_the_slow_loss_of_the_batch_mean(losses: list[float]) -> None:
    """0, 0 and 1.4 have a mean below gamma, though one image is far above it."""
    mean = torch.tensor(losses).mean()
    assert float(gated_loss(mean, 0.45, "lga")) == pytest.approx(slow.lga(losses, 0.45))
    assert float(gated_loss(mean, 0.45, "flooding")) == pytest.approx(slow.flooding(losses, 0.45))


@pytest.mark.parametrize("method", ["lga", "flooding"])
@pytest.mark.parametrize(("mean", "slope"), [(0.7, 1.0), (0.3, -1.0)])
def test_phase_one_descends_above_gamma_and_ascends_below(method: str, mean: float, slope: float) -> None:
    loss = torch.tensor(mean, requires_grad=True)
    gated_loss(loss, 0.5, method).backward()  # type: ignore[arg-type]
    assert loss.grad is not None
    assert float(loss.grad) == slope


def test_the_ascent_stops_for_images_beyond_the_cap_only() -> None:
    losses = torch.tensor([1.0, 3.0, 20.0], requires_grad=True)
    loss = ascent_loss(losses, cap=5.0)
    loss.backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == pytest.approx([-1 / 3, -1 / 3, 0])
    assert float(loss.detach()) == pytest.approx(-3.0)


@pytest.mark.parametrize("method", ["lga", "flooding"])
def test_phase_one_keeps_the_loss_near_gamma(digits: LabeledImages, method: str) -> None:
    """Where a training without it falls far below."""
    data = digits.only_classes(["1", "3", "7"]).sample(900, torch.Generator().manual_seed(0))
    recipe = replace(RECIPE, epochs=10, augment=None)
    abl = ABL(turning_epoch=10, finetune_epochs=0, unlearn_epochs=0, gamma=0.5, method=method)  # type: ignore[arg-type]
    look, plain = Look(), Look()
    trained(data, abl, look, recipe=recipe)
    trained(data, plain, recipe=recipe)
    gated = [float(torch.as_tensor(line["losses"]).mean()) for line in look.seen[4:]]
    falling = [float(torch.as_tensor(line["losses"]).mean()) for line in plain.seen[4:]]
    assert max(falling) < 0.1
    assert min(gated) > 0.2
    assert max(gated) < 1.0


# what is isolated


def test_the_isolated_rows_are_those_of_the_lowest_loss_at_the_turn(few_digits: LabeledImages) -> None:
    models: list[nn.Module] = []

    class Before(Look):
        def start_epoch(self, run: Run) -> None:
            if run.epoch == 2:
                models.append(make(torch.Generator()))
                models[0].load_state_dict(run.model.state_dict())

    fitted = trained(few_digits, Before(), ABL(isolate=0.1))
    isolated = fitted.memory[1]["isolated"].nonzero().flatten().tolist()
    assert set(isolated) == slow.isolated(models[0], few_digits.pixels(), few_digits.y, 0.1)
    assert len(isolated) == 30
    assert torch.equal(fitted.removed, fitted.memory[1]["isolated"])


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.001, 1), (0.25, 2), (0.99, 7)])
def test_a_share_of_the_kept_rows_is_isolated_and_at_least_one(share: float, count: int) -> None:
    losses = torch.tensor([5.0, 1, 4, 2, 0, 3, 9, 8])
    keep = torch.tensor([True] * 4 + [False] + [True] * 3)
    chosen = lowest(losses, keep, share)
    assert int(chosen.sum()) == count
    assert not bool(chosen[4])  # of the lowest loss, but not trained on
    assert chosen.nonzero().flatten().tolist() == sorted([1, 3, 5, 2, 0, 7, 6][:count])


def test_losses_of_images_are_taken_in_eval_mode_and_in_batches(few_digits: LabeledImages) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Dropout(), nn.Linear(784, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    torch.manual_seed(0)
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parts = per_image_loss(model, few_digits, batch=7)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    logits = model.eval()(few_digits.pixels())
    torch.testing.assert_close(parts, F.cross_entropy(logits, few_digits.y, reduction="none"))


def test_rows_that_a_filter_took_away_stay_away_and_count_as_removed(few_digits: LabeledImages) -> None:
    class Filter(Defense):
        def before_training(self, data: LabeledImages, run: Run) -> None:
            run.keep[:50] = False

    fitted = trained(few_digits, Filter(), ABL(isolate=0.1))
    assert [line["kept"] for line in fitted.history] == [250, 250, *[225] * 6, 25]
    assert not bool(fitted.memory[1]["isolated"][:50].any())
    assert int(fitted.removed.sum()) == 75
    assert bool(fitted.removed[:50].all())


# the phases


def test_phases_set_rows_augmentation_rates_and_fresh_optimizers(few_digits: LabeledImages) -> None:
    look = Look()
    fitted = trained(few_digits, ABL(isolate=0.1, lr=0.08, unlearn_lr=1e-3, unlearn_epochs=2), look)
    assert [line["kept"] for line in fitted.history] == [300, 300, *[270] * 6, 30, 30]
    assert [line["lr"] for line in fitted.history] == pytest.approx([0.08] * 6 + [0.008] * 2 + [1e-3] * 2)
    assert [line["augment"] for line in look.seen] == [False] * 2 + [True] * 6 + [False] * 2
    changes = [i for i in range(1, 10) if look.optimizers[i] is not look.optimizers[i - 1]]
    assert changes == [2, 8]
    assert torch.equal(fitted.keep, fitted.memory[0]["isolated"])


def test_phase_two_does_not_augment_if_the_recipe_does_not(few_digits: LabeledImages) -> None:
    look = Look()
    trained(few_digits, ABL(), look, recipe=replace(RECIPE, augment=None))
    assert not any(line["augment"] for line in look.seen)


def test_unlearning_raises_the_loss_of_the_isolated_rows(few_digits: LabeledImages) -> None:
    look = Look()
    abl = ABL(isolate=0.1, unlearn_epochs=4, unlearn_lr=0.03)
    fitted = trained(few_digits, abl, look)
    isolated = fitted.memory[0]["isolated"]
    losses = [torch.as_tensor(line["losses"])[isolated].mean() for line in look.seen[8:]]
    losses.append(per_image_loss(fitted.model, few_digits)[isolated].mean())
    assert losses == sorted(losses)
    assert float(losses[-1]) > 2 * float(losses[0]) + 0.05
    assert all(line["loss"] < 0 for line in fitted.history[8:])


@pytest.mark.parametrize("rate", [0.1, 100.0])
def test_an_ascent_that_would_diverge_ends_with_finite_weights(few_digits: LabeledImages, rate: float) -> None:
    abl = ABL(isolate=0.1, unlearn_epochs=60, unlearn_lr=rate)
    fitted = trained(few_digits, abl)
    isolated = fitted.memory[0]["isolated"]
    assert all(bool(value.isfinite().all()) for value in fitted.model.state_dict().values())
    assert float(per_image_loss(fitted.model, few_digits)[isolated].median()) > 1.0
    assert all(line["loss"] >= -math.log(3) - 1e-6 for line in fitted.history[8:])  # as likely as chance


def test_gradients_are_scaled_together_and_those_of_zero_stay_zero() -> None:
    def scaled(factor: float, exactly: bool) -> list[float]:
        gradients = [factor * torch.tensor([3.0, 0.0]), factor * torch.tensor([[4.0]])]
        scale_gradients(gradients, 2.0, exactly)
        return torch.cat([g.flatten() for g in gradients]).tolist()

    assert scaled(1.0, exactly=False) == pytest.approx([1.2, 0, 1.6])
    assert scaled(0.1, exactly=False) == pytest.approx([0.3, 0, 0.4])
    assert scaled(1e-9, exactly=True) == pytest.approx([1.2, 0, 1.6])
    assert scaled(0.0, exactly=True) == [0, 0, 0]


def test_the_ascent_leaves_what_was_learned_by_heart_only_with_normalised_steps(few_digits: LabeledImages) -> None:
    """Twenty epochs of the same rate, from poisons whose loss is nearly 0."""
    recipe = replace(RECIPE, epochs=30, augment=None)
    after = []
    for normalise in (False, True):
        abl = ABL(isolate=0.05, turning_epoch=2, unlearn_epochs=20, unlearn_lr=0.01, normalise=normalise)
        fitted = trained(few_digits, abl, recipe=recipe)
        after.append(float(per_image_loss(fitted.model, few_digits)[fitted.removed].mean()))
    assert after[0] < 0.1
    assert after[1] > 0.5


def test_batch_normalisation_keeps_its_statistics_while_unlearning(few_digits: LabeledImages) -> None:
    def net(generator: torch.Generator) -> nn.Module:
        body = make(generator)
        return nn.Sequential(nn.BatchNorm2d(1), body)

    @dataclass(frozen=True)
    class Statistics(Look):
        def start_epoch(self, run: Run) -> None:
            self.seen.append({"mean": run.model.state_dict()["0.running_mean"].clone()})

    look = Statistics()
    fitted = trained(few_digits, ABL(isolate=0.1), look, net=net)
    means = [float(torch.as_tensor(line["mean"])) for line in look.seen]
    assert len(set(means)) == 9  # it moves in every epoch before
    assert float(fitted.model.state_dict()["0.running_mean"]) == means[8]


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(80, (20, 60, 5)), (40, (10, 30, 2)), (20, (5, 15, 1)), (4, (1, 3, 1)), (1, (1, 1, 1)), (0, (0, 0, 0))],
)
def test_phases_are_stretched_like_the_recipe(epochs: int, expected: tuple[int, int, int]) -> None:
    assert ABL().lengths(epochs) == expected
    assert ABL(isolate=0).lengths(epochs) == (*expected[:2], 0)
    assert ABL(turning_epoch=0, isolate=0).lengths(epochs) == (0, epochs, 0)


def test_phases_given_as_numbers_are_not_stretched() -> None:
    abl = ABL(turning_epoch=20, finetune_epochs=60, unlearn_epochs=5)
    assert abl.lengths(40) == abl.lengths(80) == (20, 60, 5)
    assert replace(abl, unlearn_epochs=0).lengths(40) == (20, 60, 0)


def test_without_unlearning_the_isolated_rows_are_still_reported(few_digits: LabeledImages) -> None:
    fitted = trained(few_digits, ABL(isolate=0.1, unlearn_epochs=0))
    assert len(fitted.history) == 8
    assert torch.equal(fitted.keep, ~fitted.removed)


def test_a_training_of_no_epoch_is_none(few_digits: LabeledImages) -> None:
    fitted = trained(few_digits, ABL(), recipe=replace(RECIPE, epochs=0))
    assert fitted.history == ()
    assert bool(fitted.keep.all())


@pytest.mark.parametrize("at", [4, 12, 27, 39, 43])
def test_every_phase_resumes_to_the_same_bytes(few_digits: LabeledImages, at: int, tmp_path: Path) -> None:
    """Steps 1 to 10 are of phase 1, those to 40 of phase 2; of phase 3 there are 3 epochs of one step."""
    abl = ABL(isolate=0.1, unlearn_epochs=3, unlearn_lr=5e-3)
    whole = trained(few_digits, abl)
    stopper = stop_at(at) if at <= 40 else _stop_in_phase_three()
    with pytest.raises(Stop):
        trained(few_digits, abl, checkpoint=tmp_path, checkpoint_seconds=0, progress=stopper)
    resumed = trained(few_digits, abl, checkpoint=tmp_path, checkpoint_seconds=0)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    assert torch.equal(whole.removed, resumed.removed)
    strip = ("seconds",)
    lines = [[{k: v for k, v in line.items() if k not in strip} for line in f.history] for f in (whole, resumed)]
    assert lines[0] == lines[1]


def _stop_in_phase_three() -> Callable[..., None]:
    """Stops in the second epoch of phase 3, which has one step an epoch."""

    def progress(name: str, done: int, total: int, note: str = "", /) -> None:
        if (done, total) == (10, 11):
            raise Stop

    return progress


# with others, and bad input


def test_it_composes_with_friends_in_both_orders(few_digits: LabeledImages) -> None:
    for defenses in ([Friends(def_epoch=2), ABL()], [ABL(), Friends(def_epoch=2)]):
        fitted = trained(few_digits, *defenses)
        assert len(fitted.history) == 9


@pytest.mark.parametrize(
    ("other", "reason"),
    [(Mixup(), "none of their own"), (MaxUp(warmup=0), "loss among copies"), (ABL(gamma=0.4), "each sets the length")],
)
def test_clashes_say_why(few_digits: LabeledImages, other: Defense, reason: str) -> None:
    for defenses in ([ABL(), other], [other, ABL()]):
        with pytest.raises(ValueError, match=reason):
            trained(few_digits, *defenses)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"isolate": 1.0}, r"share of the data in \[0, 1\), not 1.0"),
        ({"isolate": -0.1}, "not -0.1"),
        ({"turning_epoch": -1}, "turning_epoch is a number of epochs or None, not -1"),
        ({"turning_epoch": 0}, "cannot tell which 1.00% to isolate"),
        ({"finetune_epochs": -2}, "finetune_epochs .* not -2"),
        ({"unlearn_epochs": -3}, "unlearn_epochs .* not -3"),
        ({"method": "LGA"}, "unknown method 'LGA'; choose one of lga, flooding"),
        ({"gamma": 0.0}, "gamma is positive and finite, not 0.0"),
        ({"lr": float("inf")}, "lr is positive and finite, not inf"),
        ({"unlearn_lr": -1.0}, "unlearn_lr .* not -1.0"),
        ({"cap": float("nan")}, "cap .* not nan"),
        ({"clip": 0.0}, "clip .* not 0.0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_settings_are_named(settings: dict[str, float], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        ABL(**settings)  # type: ignore[arg-type]
