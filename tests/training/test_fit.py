"""The loop: recipes, streams, hooks, and that nothing changes where nothing should."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from friends.data.images import LabeledImages
from friends.models import build
from friends.training import RECIPES, Defense, Recipe, Run, accuracy, fit
from friends.types import Streams

SHORT = Recipe(epochs=2, batch=64, lr=0.05)


def maker(data: LabeledImages, name: str = "tiny"):
    def make(generator: torch.Generator) -> nn.Module:
        return build(
            name, shape=data.shape, classes=len(data.classes), moments=data.moments, width=8, generator=generator
        )

    return make


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


def test_the_papers_schedule_drops_at_30_50_70_of_80_and_15_25_35_of_40() -> None:
    for recipe, drops in ((RECIPES["scratch"], (30, 50, 70)), (RECIPES["transfer"], (15, 25, 35))):
        rates = [recipe.lr_at(epoch) for epoch in range(recipe.epochs)]
        changed = tuple(e for e in range(1, recipe.epochs) if rates[e] != rates[e - 1])
        assert changed == drops
        assert rates[0] == 0.1
        assert rates[-1] == pytest.approx(1e-4)


def test_training_learns_real_digits(digits: LabeledImages) -> None:
    data = digits.only_classes(["3", "5"])
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    train, test = data.rows(order[:700]), data.rows(order[700:])
    recipe = Recipe(epochs=6, batch=64, lr=0.05, augment=None)
    fitted = fit(train, maker(train), recipe=recipe, streams=Streams(0))
    assert accuracy(fitted.predictor, test).strict > 0.93
    assert fitted.history[-1]["loss"] < 0.3 * fitted.history[0]["loss"]
    assert not fitted.model.training


def test_equal_streams_give_equal_models_and_other_seeds_do_not(few_digits: LabeledImages) -> None:
    a, b, c = (fit(few_digits, maker(few_digits), recipe=SHORT, streams=Streams(seed)).model for seed in (1, 1, 2))
    assert same(a, b)
    assert not same(a, c)


def test_the_global_generator_and_the_data_are_left_alone(few_digits: LabeledImages) -> None:
    before, pixels = torch.get_rng_state(), few_digits.x.clone()
    fit(few_digits, maker(few_digits), recipe=replace(SHORT, epochs=1), streams=Streams(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(few_digits.x, pixels)


def test_the_loop_equals_plain_pytorch(few_digits: LabeledImages) -> None:
    """Two epochs written out with torch.optim and a hand-made schedule give the same weights."""
    recipe = Recipe(epochs=2, batch=64, lr=0.05, augment=None, drops=(0.5,))
    streams = Streams(3)
    fitted = fit(few_digits, maker(few_digits), recipe=recipe, streams=streams)
    model = maker(few_digits)(streams("weights"))
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    model.train()
    for epoch in range(2):
        sgd.param_groups[0]["lr"] = 0.05 * (0.1 if epoch >= 1 else 1)
        for idx in torch.randperm(len(few_digits), generator=streams("order", epoch)).split(64):
            loss = F.cross_entropy(model(few_digits.x[idx].float() / 255), few_digits.y[idx])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    for ours, plain in zip(fitted.model.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("decay", "shrinks"), [("all", True), ("weights", False)])
def test_weight_decay_spares_norms_and_biases_only_when_told(
    few_digits: LabeledImages, decay: str, shrinks: bool
) -> None:
    class Still(Defense):
        """A loss without gradient: only the decay moves the weights."""

        def loss(self, logits, y, run):
            return logits.sum() * 0

    recipe = replace(SHORT, epochs=1, decay=decay, weight_decay=0.1)
    make = maker(few_digits, "convnet")
    start = weights(make(Streams(0)("weights")))
    end = weights(fit(few_digits, make, recipe=recipe, defenses=[Still()], streams=Streams(0)).model)
    affine = next(n for n in start if n.startswith("body") and n.endswith("weight") and start[n].ndim == 1)
    assert bool(end["head.weight"].norm() < start["head.weight"].norm()) is True
    assert bool(end[affine].norm() < start[affine].norm()) is shrinks


def test_only_trainable_parameters_move(few_digits: LabeledImages) -> None:
    def make(generator: torch.Generator) -> nn.Module:
        model = maker(few_digits)(generator)
        model.body.requires_grad_(False)
        return model

    start = weights(make(Streams(0)("weights")))
    end = weights(fit(few_digits, make, recipe=SHORT, streams=Streams(0)).model)
    assert not torch.equal(start["head.weight"], end["head.weight"])
    assert all(torch.equal(start[name], end[name]) for name in start if name.startswith("body"))


@dataclass(frozen=True)
class Recorder(Defense):
    """Writes down which hook was called when."""

    calls: tuple[list[tuple[object, ...]], ...] = ()

    def note(self, *what: object) -> None:
        self.calls[0].append(what)

    def before_training(self, data, run):
        self.note("before", len(data))

    def start_epoch(self, run):
        self.note("epoch", run.epoch)

    def pixels(self, x, idx, run):
        assert float(x.min()) >= 0
        assert float(x.max()) <= 1
        assert torch.equal(x, run.data.pixels(idx))
        self.note("pixels", run.step)
        return x

    def batch(self, x, y, run):
        self.note("batch", run.step)
        return x, y

    def gradients(self, run):
        assert all(p.grad is not None for p in run.model.parameters())
        self.note("gradients", run.step)

    def after_training(self, run):
        self.note("after", run.epoch)
        return run.predictor


def test_hooks_are_called_in_the_drawn_order(few_digits: LabeledImages) -> None:
    calls: list[tuple[object, ...]] = []
    recipe = replace(SHORT, epochs=1, batch=200)
    fit(few_digits, maker(few_digits), recipe=recipe, defenses=[Recorder((calls,))], streams=Streams(0))
    step = ["pixels", "batch", "gradients"]
    assert [c[0] for c in calls] == ["before", "epoch", *step, *step, "after"]
    assert [c[1] for c in calls if c[0] == "batch"] == [0, 1]


def test_a_defense_that_does_nothing_changes_nothing(few_digits: LabeledImages) -> None:
    plain = fit(few_digits, maker(few_digits), recipe=SHORT, streams=Streams(0)).model
    hooked = fit(few_digits, maker(few_digits), recipe=SHORT, defenses=[Recorder(([],))], streams=Streams(0)).model
    assert same(plain, hooked)


def test_watching_changes_nothing_and_is_written_down(few_digits: LabeledImages) -> None:
    make = maker(few_digits, "convnet")
    plain = fit(few_digits, make, recipe=SHORT, streams=Streams(0))

    def watch(model: nn.Module, epoch: int) -> dict[str, float]:
        assert not model.training
        model(few_digits.pixels(torch.arange(8)))
        return {"seen": float(epoch)}

    watched = fit(few_digits, make, recipe=SHORT, streams=Streams(0), watch=watch)
    assert same(plain.model, watched.model)
    assert [line["seen"] for line in watched.history] == [1.0, 2.0]


class TwoLosses(Defense):
    def loss(self, logits: torch.Tensor, y: torch.Tensor, run: Run) -> torch.Tensor:
        return F.cross_entropy(logits, y) * 2


def test_two_losses_are_refused(few_digits: LabeledImages) -> None:
    with pytest.raises(ValueError, match="both replace the loss"):
        fit(few_digits, maker(few_digits), recipe=SHORT, defenses=[TwoLosses(), TwoLosses()], streams=Streams(0))


def test_nothing_to_train_on_is_refused(few_digits: LabeledImages) -> None:
    class DropAll(Defense):
        def before_training(self, data: LabeledImages, run: Run) -> None:
            run.keep[:] = False

    with pytest.raises(ValueError, match="no image to train on"):
        fit(few_digits.rows([]), maker(few_digits), recipe=SHORT, streams=Streams(0))
    with pytest.raises(ValueError, match="removed all 300"):
        fit(few_digits, maker(few_digits), recipe=SHORT, defenses=[DropAll()], streams=Streams(0))


def test_a_diverging_loss_is_named(few_digits: LabeledImages) -> None:
    class Explode(Defense):
        def loss(self, logits: torch.Tensor, y: torch.Tensor, run: Run) -> torch.Tensor:
            return logits.sum() * float("nan")

    with pytest.raises(FloatingPointError, match="loss of epoch 0 is nan"):
        fit(few_digits, maker(few_digits), recipe=SHORT, defenses=[Explode()], streams=Streams(0))


def test_streams_are_named_independent_and_reproducible() -> None:
    a = torch.rand(4, generator=Streams(5)("order", 1))
    assert torch.equal(a, torch.rand(4, generator=Streams(5)("order", 1)))
    others = [
        Streams(5)("order", 2),
        Streams(5)("augment", 1),
        Streams(6)("order", 1),
        Streams(5).child("x")("order", 1),
    ]
    assert all(not torch.equal(a, torch.rand(4, generator=g)) for g in others)


def test_the_first_epochs_of_a_recipe_have_its_learning_rates() -> None:
    whole = RECIPES["scratch"]
    for epochs in (0, 1, 5, 31, 60, 80):
        part = whole.first(epochs)
        assert part.epochs == epochs
        assert [part.lr_at(e) for e in range(epochs)] == pytest.approx([whole.lr_at(e) for e in range(epochs)])
    assert whole.first(None) == whole


def test_a_model_that_a_hook_put_in_place_is_the_one_that_predicts(few_digits: LabeledImages) -> None:
    class Swap(Defense):
        def start_epoch(self, run: Run) -> None:
            if run.epoch == 1:
                run.model = maker(few_digits)(torch.Generator().manual_seed(77))

    fitted = fit(few_digits, maker(few_digits), recipe=SHORT, defenses=[Swap()], streams=Streams(0))
    assert torch.equal(fitted.predictor(few_digits.pixels()), fitted.model(few_digits.pixels()).argmax(1))


def test_models_that_return_an_object_with_logits_train_too(few_digits: LabeledImages) -> None:
    from types import SimpleNamespace

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.inner(x))

    plain = fit(few_digits, maker(few_digits), recipe=SHORT, streams=Streams(0))
    wrapped = fit(few_digits, lambda g: Wrapped(maker(few_digits)(g)), recipe=SHORT, streams=Streams(0))
    assert torch.equal(plain.predictor(few_digits.pixels()), wrapped.predictor(few_digits.pixels()))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": "weight"}, "unknown decay 'weight'; choose one of all, weights"),
        ({"precision": "bf16"}, "unknown precision 'bf16'"),
        ({"lr": float("nan")}, "lr > 0 expected"),
        ({"epochs": -1}, "epochs >= 0"),
        ({"drops": (1.5,)}, "fractions of the epochs"),
    ],
)
def test_bad_recipes_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)  # type: ignore[arg-type]


def test_one_defense_object_listed_twice_is_refused(few_digits: LabeledImages) -> None:
    defense = Defense()
    with pytest.raises(ValueError, match="listed twice"):
        fit(few_digits, maker(few_digits), recipe=SHORT, defenses=[defense, defense], streams=Streams(0))
