"""Deep k-NN: who votes, what wins, and what is refused before a probe is trained."""

from __future__ import annotations

import deep_knn_slow
import pytest
import torch

from friends.data.images import LabeledImages
from friends.defenses import DeepKNN, deep_knn
from friends.defenses.deep_knn import neighbours, outvoted
from friends.models import build
from friends.training import Recipe, Run, fit
from friends.types import Streams


def points(n: int, d: int = 6, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clouds, one a class, so that many votes are close."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    centres = 0.5 * torch.randn(classes, d, generator=generator)
    return centres[y] + torch.randn(n, d, generator=generator), y


@pytest.mark.parametrize("vote", ["majority", "plurality"])
@pytest.mark.parametrize("k", [1, 6, 25])
def test_it_equals_brute_force_on_500_points(k: int, vote: deep_knn.Vote, monkeypatch: pytest.MonkeyPatch) -> None:
    features, y = points(500)
    truth = deep_knn_slow.outvoted(features, y, k, vote)
    assert 20 < sum(truth) < 480
    assert outvoted(features, y, k=k, vote=vote).tolist() == truth
    monkeypatch.setattr(deep_knn, "ENTRIES", 70 * 500)  # eight chunks, the last one short
    assert outvoted(features, y, k=k, vote=vote).tolist() == truth


def test_features_far_from_the_origin_have_the_same_neighbours() -> None:
    features, y = points(300)
    far = features + 1000  # where squared norms drown the squared distances in float32
    assert outvoted(far, y, k=7).tolist() == deep_knn_slow.outvoted(far, y, 7, "majority")


def test_a_row_is_left_out_by_its_index_and_its_duplicates_vote() -> None:
    """Leaving out the first neighbour instead would leave out the duplicate for one row of each pair."""
    features = points(40)[0].repeat_interleave(2, 0)
    assert neighbours(features, torch.arange(80), 1)[:, 0].tolist() == [i ^ 1 for i in range(80)]
    opposite = torch.arange(80) % 2
    assert bool(outvoted(features, opposite, k=1).all())
    assert not bool(outvoted(features, opposite // 2, k=1).any())


def test_many_equal_rows_vote_by_their_labels() -> None:
    features, y = torch.zeros(20, 3), torch.tensor([0] * 15 + [1] * 5)
    assert outvoted(features, y, k=19).tolist() == [False] * 15 + [True] * 5


def test_a_tie_keeps_the_row_and_a_plurality_keeps_more_than_a_majority() -> None:
    features = torch.tensor([[0.0], [1.0], [-1.1], [2.0], [-2.1], [3.0]])
    y = torch.tensor([0, 0, 1, 0, 2, 3])
    judged = {k: bool(outvoted(features, y, k=k)[0]) for k in (1, 2, 3, 4, 5)}
    assert judged == {1: False, 2: False, 3: False, 4: False, 5: True}  # 1:0, 1:1, 2:1, 2:2, 2:3 for row 0
    assert not bool(outvoted(features, y, k=5, vote="plurality")[0])  # 2 against 1, 1 and 1
    assert not bool(outvoted(features[:3], y[:3], k=2, vote="plurality")[0])  # 1 against 1


def test_the_number_of_neighbours_follows_from_the_budget() -> None:
    assert DeepKNN().neighbours(50_000) == 1000  # the benchmark's
    assert DeepKNN(budget=0.07).neighbours(100) == 14
    assert DeepKNN(budget=0.001).neighbours(300) == 2  # not a filter that does nothing
    assert DeepKNN(budget=0).neighbours(300) == 0
    assert DeepKNN(budget=0.5, k=7).neighbours(300) == 7


def make(generator: torch.Generator) -> torch.nn.Module:
    return build("tiny", shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=8, generator=generator)


def test_it_finds_wrong_labels(few_digits: LabeledImages) -> None:
    wrong = torch.arange(0, 300, 30)
    y = few_digits.y.clone()
    y[wrong] = (y[wrong] + 1) % 3
    data = LabeledImages(few_digits.x, y, few_digits.classes)
    recipe = Recipe(epochs=4, batch=64, lr=0.05, augment=None)
    fitted = fit(data, make, recipe=recipe, defenses=[DeepKNN(budget=10 / 300)], streams=Streams(0))
    assert int(fitted.removed[wrong].sum()) >= 9
    assert int(fitted.removed.sum()) < 30
    assert fitted.history[0]["kept"] == 300 - int(fitted.removed.sum())


class NoProbe(DeepKNN):
    def before_training(self, data: LabeledImages, run: Run) -> None:
        run.probe = None  # type: ignore[assignment]
        super().before_training(data, run)


def test_what_cannot_work_is_refused_before_a_probe_is_trained(few_digits: LabeledImages) -> None:
    for defense in (NoProbe(k=300), NoProbe(budget=0.6)):
        with pytest.raises(ValueError, match=r"300 images cannot have k = 3[06]0 neighbours"):
            fit(few_digits, make, recipe=Recipe(epochs=1), defenses=[defense], streams=Streams(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 1.0}, r"in \[0, 1\), not 1.0"),
        ({"budget": float("nan")}, "not nan"),
        ({"k": -1}, "k is a number of neighbours, not -1"),
        ({"vote": "unanimity"}, "unknown vote 'unanimity'; choose one of majority, plurality"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepKNN(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="5 images cannot have k = 5"):
        outvoted(torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64), k=5)
