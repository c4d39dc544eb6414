"""EPIC: which rows are dropped, when, and that they never return."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from epic_slow import isolated_slow
from torch import nn

from friends.data.images import LabeledImages
from friends.defenses.epic import READING_A, READING_B, Epic, isolated, logit_gradients
from friends.models import build
from friends.training import Defense, Recipe, Run, fit
from friends.types import Streams

RECIPE = Recipe(epochs=5, batch=64, lr=0.05)


def make(generator: torch.Generator) -> nn.Module:
    return build("tiny", shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=8, generator=generator)


class Look(Defense):
    """Keeps ``run.keep`` as it stands when every epoch starts, and the model's mode; clears some rows at first."""

    def __init__(self, cleared: tuple[int, ...] = ()) -> None:
        self.cleared = cleared
        self.seen: list[torch.Tensor] = []

    def __repr__(self) -> str:
        return f"Look({self.cleared})"

    def before_training(self, data: LabeledImages, run: Run) -> None:
        run.keep[list(self.cleared)] = False

    def start_epoch(self, run: Run) -> None:
        self.seen.append(run.keep.clone())


def random_gradients(n: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    z = 2 * torch.randn(n, classes, generator=generator)
    return z.softmax(1) - nn.functional.one_hot(y, classes), y


def test_isolated_rows_are_those_of_the_definition() -> None:
    _, y = random_gradients(120, 3)
    gradients = torch.randn(120, 8, generator=torch.Generator().manual_seed(1))  # in 3 dimensions few stand alone
    want = isolated_slow(gradients.double().numpy(), y.tolist(), 3, 24)
    assert isolated(gradients, y, 3, 24).nonzero().flatten().tolist() == want
    assert 2 <= len(want) <= 22


def test_an_empty_class_a_class_of_one_and_too_few_images_for_a_medoid() -> None:
    gradients, y = random_gradients(41, 3)
    y[:] = 0
    y[7] = 2  # class 1 is empty, and the only image of class 2 is its medoid, which says nothing about it
    found = isolated(gradients, y, 3, 8)
    assert not found[7]
    assert found.any()
    assert not isolated(gradients, y, 3, 0).any()


def test_budgets_are_per_class_and_rounded_up() -> None:
    """11 of 31 rows with 3 medoids: 2 each for both halves, and 1 for the third, which can then drop nobody."""
    counts = (15, 15, 1)
    y = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    gradients, _ = random_gradients(31, 3)
    gradients[:30] *= 1e-3
    gradients[3], gradients[20] = torch.tensor([5.0, 0, 0]), torch.tensor([0, 5.0, 0])
    assert isolated(gradients, y, 3, 3).nonzero().flatten().tolist() == [3, 20]
    assert not isolated(gradients, y, 3, 2).any()  # ceil(15 * 2 / 31) = 1


def test_gradients_leave_out_the_last_bias_only_if_told(few_digits: LabeledImages) -> None:
    model = make(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.bias += torch.tensor([3.0, -1.0, 0.5])  # type: ignore[operator,union-attr]
        model.eval()
        z = model(few_digits.pixels())
        onehot = nn.functional.one_hot(few_digits.y, 3)
        with_bias, without = z.softmax(1) - onehot, (z - model.head.bias).softmax(1) - onehot  # type: ignore[operator,union-attr]
    model.train()
    assert torch.allclose(logit_gradients(model, few_digits, bias=True), with_bias, atol=1e-5)
    assert torch.allclose(logit_gradients(model, few_digits, bias=False), without, atol=1e-5)
    assert float((with_bias - without).abs().max()) > 0.1
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_model_whose_logits_come_from_no_linear_layer_keeps_its_bias_and_says_so(few_digits: LabeledImages) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.layers(x)

    model = Scaled()
    with pytest.warns(UserWarning, match="Scaled are not the output of an nn.Linear"):
        got = logit_gradients(model, few_digits, bias=False)
    assert torch.equal(got, logit_gradients(model, few_digits, bias=True))


@pytest.mark.parametrize(
    ("epic", "epochs", "want"),
    [
        (READING_A, 80, list(range(5, 71))),
        (READING_B, 80, list(range(5, 71, 5))),
        (Epic(start=5, interval=2), 40, list(range(6, 36, 2))),
        (Epic(start=2, interval=5), 40, list(range(5, 36, 5))),
        (Epic(start=0, interval=3, stop=1.0), 9, [0, 3, 6]),
        (Epic(share=0), 80, []),
    ],
)
def test_rounds_of_both_readings(epic: Epic, epochs: int, want: list[int]) -> None:
    assert epic.rounds(epochs) == want


def test_dropped_rows_never_return_though_all_are_looked_at(few_digits: LabeledImages) -> None:
    look = Look()
    fitted = fit(few_digits, make, recipe=RECIPE, defenses=[Epic(share=0.3, interval=1), look], streams=Streams(0))
    kept = [int(seen.sum()) for seen in look.seen]
    assert kept[0] == 300  # no round at epoch 0
    assert len(set(kept)) >= 3, kept
    assert not any((after & ~before).any() for before, after in pairwise(look.seen))
    assert [line.get("dropped", 0) for line in fitted.history] == [0.0, *(a - b for a, b in pairwise(kept))]
    assert torch.equal(fitted.removed, ~look.seen[-1])


def test_a_round_drops_exactly_the_isolated_rows_of_the_model_at_that_time(few_digits: LabeledImages) -> None:
    recipe = Recipe(epochs=3, batch=64, lr=0.05)
    look = Look()
    fit(few_digits, make, recipe=recipe, defenses=[Epic(start=2, interval=2, share=0.2), look], streams=Streams(0))
    model = fit(few_digits, make, recipe=recipe.first(2), streams=Streams(0)).model
    want = isolated_slow(logit_gradients(model, few_digits, bias=False).double().numpy(), few_digits.y.tolist(), 3, 60)
    assert look.seen[1].all()
    assert (~look.seen[2]).nonzero().flatten().tolist() == want
    assert 2 <= len(want) < 60


def test_rows_that_a_filter_cleared_stay_cleared(few_digits: LabeledImages) -> None:
    look = Look(cleared=(3, 141))
    fitted = fit(few_digits, make, recipe=RECIPE, defenses=[look, Epic(share=0.3, interval=1)], streams=Streams(0))
    assert not fitted.keep[[3, 141]].any()
    assert int(fitted.keep.sum()) < 298
    dropped = sum(line.get("dropped", 0) for line in fitted.history)
    assert int(fitted.keep.sum()) == 298 - dropped  # rows that were already out are not counted


def test_a_share_of_more_images_drops_more(few_digits: LabeledImages) -> None:
    kept = [
        int(fit(few_digits, make, recipe=RECIPE, defenses=[Epic(share=s, interval=1)], streams=Streams(0)).keep.sum())
        for s in (0.05, 0.3)
    ]
    assert 300 > kept[0] > kept[1] > 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 1.0}, "not 1.0"),
        ({"share": -0.1}, "not -0.1"),
        ({"share": float("nan")}, "not nan"),
        ({"start": -1}, "not -1 and 5"),
        ({"interval": 0}, "not 1 and 0"),
        ({"stop": 0.0}, "not 0.0"),
        ({"stop": 1.5}, "not 1.5"),
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Epic(**wrong)  # type: ignore[arg-type]


def test_a_training_without_a_round_is_refused(few_digits: LabeledImages) -> None:
    with pytest.raises(ValueError, match="EPIC would never look: in 5 epochs no multiple of interval = 5"):
        fit(few_digits, make, recipe=RECIPE, defenses=[Epic()], streams=Streams(0))


def test_it_does_not_compose_with_phases() -> None:
    from dataclasses import replace

    from friends.training.defense import check_composition

    class Phases(Defense):
        about = replace(Defense.about, title="phases", traits=frozenset({"phases"}))

    with pytest.raises(ValueError, match="EPIC and phases do not compose: both decide"):
        check_composition([Phases(), Epic()])
