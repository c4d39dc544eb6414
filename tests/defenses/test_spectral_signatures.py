"""Spectral Signatures: the score is centred, and the counts are those that its settings say."""

from __future__ import annotations

import pytest
import spectral_signatures_slow as slow
import torch

from friends.data.images import LabeledImages
from friends.defenses import SpectralSignatures
from friends.defenses.spectral_signatures import outliers, spectral_scores
from friends.models import build
from friends.training import Recipe, fit
from friends.types import Streams


def planted(mean: float) -> torch.Tensor:
    """200 rows of one class around ``mean`` on the first axis, of which the first 20 stand out along that axis."""
    features = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    features[:20, 0] += 8
    features[:, 0] += mean
    return features


def test_scores_equal_those_of_the_slow_truth() -> None:
    features = planted(-3)
    assert torch.allclose(spectral_scores(features).double(), slow.scores(features), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mean", [0.0, -8.0])
def test_planted_outliers_are_found_wherever_the_mean_of_the_class_is(mean: float) -> None:
    y = torch.zeros(200, dtype=torch.int64)
    judged = outliers(planted(mean), y, {0: 20})
    assert judged.nonzero().flatten().tolist() == list(range(20))


def test_a_score_that_is_not_centred_would_miss_them_all() -> None:
    """With the clean rows at -8 and the planted ones at 0, the latter are what scores least."""
    assert slow.highest(slow.scores(planted(0), centred=False), 20) == set(range(20))
    assert not slow.highest(slow.scores(planted(-8), centred=False), 20) & set(range(20))
    assert slow.highest(slow.scores(planted(-8)), 20) == set(range(20))


def test_every_class_is_scored_by_itself() -> None:
    a, b = planted(0), planted(-8).roll(3, 1)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    features, y = torch.cat([a, b])[order], torch.tensor([0] * 200 + [2] * 200)[order]
    judged = outliers(features, y, {0: 20, 2: 20})
    assert set(order[judged].tolist()) == {*range(20), *range(200, 220)}


def test_counts_of_both_readings_of_the_budget() -> None:
    y = torch.arange(10).repeat_interleave(5000)
    assert SpectralSignatures().counts(y) == dict.fromkeys(range(10), 750)  # the benchmark's: 15 % of the data
    assert SpectralSignatures(budget_of="class").counts(y) == dict.fromkeys(range(10), 75)
    assert SpectralSignatures(budget=0.1, budget_of="class").counts(y) == dict.fromkeys(range(10), 750)
    uneven = torch.tensor([0] * 90 + [2] * 10)
    assert SpectralSignatures(budget=0.04).counts(uneven) == {0: 6, 2: 6}
    assert SpectralSignatures(budget=0.2, budget_of="class").counts(uneven) == {0: 27, 2: 3}
    assert SpectralSignatures(budget=0.2, budget_of="class", excess=1).counts(uneven) == {0: 18, 2: 2}


def test_no_more_than_half_of_a_class_is_removed() -> None:
    y = torch.tensor([0] * 197 + [1, 2, 2])
    judged = outliers(planted(0), y, {0: 500, 1: 500, 2: 500, 3: 500})
    assert torch.bincount(y[judged], minlength=3).tolist() == [98, 0, 1]


def test_identical_rows_and_no_rows_are_borne() -> None:
    assert spectral_scores(torch.ones(4, 3)).tolist() == [0, 0, 0, 0]
    nothing = outliers(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), {0: 5})
    assert nothing.tolist() == []


def test_in_a_training_it_clears_as_many_rows_of_each_class(few_digits: LabeledImages) -> None:
    def make(generator: torch.Generator) -> torch.nn.Module:
        return build("tiny", shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=8, generator=generator)

    recipe = Recipe(epochs=2, batch=64, lr=0.05, augment=None)
    fitted = fit(few_digits, make, recipe=recipe, defenses=[SpectralSignatures(budget=0.04)], streams=Streams(0))
    assert torch.bincount(few_digits.y[fitted.removed]).tolist() == [18, 18, 18]
    assert [line["kept"] for line in fitted.history] == [246, 246]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": -0.1}, r"in \[0, 1\), not -0.1"),
        ({"excess": 0.0}, "above 0, not 0.0"),
        ({"excess": float("inf")}, "above 0, not inf"),
        ({"budget_of": "most"}, "unknown budget_of 'most'; choose one of all, class"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectralSignatures(**settings)  # type: ignore[arg-type]
