"""What the filters share: features, the shared probe, and the classes that are not emptied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from friends.data.artifacts import Artifacts
from friends.data.images import LabeledImages
from friends.defenses import ActivationClustering, DeepKNN, SpectralSignatures, filtering
from friends.defenses.filtering import expected_poisons, features_of, remove
from friends.models import build
from friends.training import Defense, Fitted, Recipe, Run, fit
from friends.types import Streams

RECIPE = Recipe(epochs=2, batch=64, lr=0.05)
FILTERS: list[Defense] = [DeepKNN(k=10), SpectralSignatures(budget=0.05), ActivationClustering()]


def make(generator: torch.Generator) -> nn.Module:
    return build("tiny", shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=8, generator=generator)


def filtered(data: LabeledImages, *defenses: Defense, artifacts: Artifacts | None = None) -> Fitted:
    return fit(data, make, recipe=RECIPE, defenses=defenses, streams=Streams(0), artifacts=artifacts)


def test_a_budget_is_counted_as_attackers_count_it() -> None:
    assert [expected_poisons(b, n) for b, n in ((0.01, 50_000), (0.07, 100), (0.001, 300), (0, 300))] == [500, 7, 1, 0]


def test_features_are_those_of_eval_mode_of_every_row_in_order(
    few_digits: LabeledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Dropout(), nn.Linear(784, 5), nn.ReLU())
    torch.nn.init.normal_(body[3].weight, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(body, nn.Linear(5, 3)).train()  # no features(): the input of its last linear layer
    body[1].running_mean.fill_(0.3)
    expected = body.eval()(few_digits.pixels()).detach()
    body.train()
    monkeypatch.setattr(filtering, "CHUNK", 64)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.allclose(features_of(model, few_digits), expected, atol=1e-6)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_features_that_are_not_finite_are_named(few_digits: LabeledImages) -> None:
    class Broken(nn.Module):
        def features(self, x: torch.Tensor) -> torch.Tensor:
            return 1 / (x - few_digits.pixels(slice(41, 42))).abs().flatten(1).sum(1, keepdim=True)

    with pytest.raises(FloatingPointError, match="row 41 are not finite"):
        features_of(Broken(), few_digits)


def test_filters_share_one_probe(few_digits: LabeledImages, tmp_path: Path) -> None:
    alone = [filtered(few_digits, defense) for defense in FILTERS]
    shared = [filtered(few_digits, defense, artifacts=Artifacts(tmp_path)) for defense in FILTERS]
    assert [artifact.kind for artifact in Artifacts(tmp_path).list()] == ["probe"]
    assert shared[0].shared_seconds == 0
    assert shared[1].shared_seconds > 0
    assert shared[2].shared_seconds == shared[1].shared_seconds
    for a, b in zip(alone, shared, strict=True):
        assert 0 < int(a.removed.sum()) < 300
        assert torch.equal(a.removed, b.removed)
        assert all(torch.equal(v, b.model.state_dict()[name]) for name, v in a.model.state_dict().items())


def test_two_filters_remove_what_either_would(few_digits: LabeledImages, tmp_path: Path) -> None:
    knn, spectral = (filtered(few_digits, d, artifacts=Artifacts(tmp_path)).removed for d in FILTERS[:2])
    both = filtered(few_digits, *FILTERS[:2], artifacts=Artifacts(tmp_path)).removed
    assert torch.equal(both, knn | spectral)


def remover(rows: Callable[[LabeledImages], torch.Tensor]) -> Defense:
    class Remover(Defense):
        def before_training(self, data: LabeledImages, run: Run) -> None:
            remove(run, rows(data), "This filter")

    return Remover()


def test_a_whole_class_is_never_removed(few_digits: LabeledImages) -> None:
    first = int((few_digits.y == 1).nonzero()[0])

    def judged(data: LabeledImages) -> torch.Tensor:
        return (data.y == 1) | (torch.arange(300) < 20)

    with pytest.warns(UserWarning, match="This filter takes all 100 images of class '3' that are left"):
        fitted = filtered(few_digits, remover(judged))
    assert torch.equal(fitted.removed, (few_digits.y != 1) & (torch.arange(300) < 20))

    rest = remover(lambda data: (data.y == 1) & (torch.arange(300) != first))
    fitted = filtered(few_digits, rest, remover(judged))  # one image is left, which says nothing: no warning
    assert bool(fitted.keep[first])
    assert torch.bincount(few_digits.y[fitted.keep])[1] == 1


@pytest.mark.parametrize("defense", FILTERS, ids=lambda d: type(d).__name__)
def test_colours_oblong_images_an_empty_class_and_a_class_of_one(defense: Defense) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 60 + [1] * 60 + [3])
    x = (torch.randint(0, 60, (121, 3, 9, 14), generator=generator) + 60 * y.view(-1, 1, 1, 1)).to(torch.uint8)
    data = LabeledImages(x, y, ("a", "b", "none", "one"))

    def make(generator: torch.Generator) -> nn.Module:
        moments = ((0.3,) * 3, (0.2,) * 3)
        return build("tiny", shape=(3, 9, 14), classes=4, moments=moments, width=8, generator=generator)

    recipe = Recipe(epochs=3, batch=50, lr=0.05, augment=None)
    fitted = fit(data, make, recipe=recipe, defenses=[defense], streams=Streams(0))
    assert torch.bincount(y[fitted.keep], minlength=4).gt(0).tolist() == [True, True, False, True]
