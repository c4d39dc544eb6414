"""Activation Clustering: the cut, the three rules, and the classes that cannot be cut."""

from __future__ import annotations

import activation_clustering_slow as slow
import pytest
import torch

from friends.data.images import LabeledImages
from friends.defenses import ActivationClustering, activation_clustering
from friends.defenses.activation_clustering import ORIGINAL, reduced, silhouette, smaller_cluster
from friends.models import build
from friends.training import Recipe, fit
from friends.types import Streams

RULES = [
    ActivationClustering(reduction=reduction, decide=decide)
    for reduction in ("none", "ica", "pca")
    for decide in ("smaller", "relative", "silhouette")
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_blob(n: int = 300, d: int = 30) -> torch.Tensor:
    return torch.randn(n, d, generator=seeded())


def two_blobs(n: int = 300, d: int = 30) -> torch.Tensor:
    """Every tenth row is in the smaller blob, 10 away."""
    features = one_blob(n, d)
    features[::10, 1] += 10
    return features


@pytest.mark.parametrize("defense", RULES, ids=lambda d: f"{d.reduction}-{d.decide}")
def test_of_two_blobs_exactly_the_small_one_is_removed(defense: ActivationClustering) -> None:
    judged = defense.judge(two_blobs(), seeded())
    assert judged.nonzero().flatten().tolist() == list(range(0, 300, 10))


@pytest.mark.parametrize("reduction", ["none", "ica", "pca"])
def test_of_one_blob_the_silhouette_removes_nothing_and_the_benchmark_a_large_part(
    reduction: activation_clustering.Reduction,
) -> None:
    judged = ActivationClustering(reduction=reduction, decide="silhouette").judge(one_blob(), seeded())
    assert int(judged.sum()) == 0
    unconditional = ActivationClustering(reduction=reduction).judge(one_blob(), seeded())
    assert 60 < int(unconditional.sum()) < 150


def test_the_relative_rule_depends_on_the_share() -> None:
    features = two_blobs()
    assert int(ActivationClustering(decide="relative", share=0.11).judge(features, seeded()).sum()) == 30
    assert int(ActivationClustering(decide="relative", share=0.1).judge(features, seeded()).sum()) == 0


def test_the_cut_is_the_best_of_all() -> None:
    for seed in range(5):
        points = torch.randn(9, 2, generator=seeded(seed))
        assert set(smaller_cluster(points, seeded()).nonzero().flatten().tolist()) == slow.best_cut(points)


def test_the_cut_does_not_depend_on_the_order_of_the_rows() -> None:
    order = torch.randperm(300, generator=seeded(1))
    for defense in (ActivationClustering(), ORIGINAL):
        assert torch.equal(defense.judge(two_blobs()[order], seeded()), defense.judge(two_blobs(), seeded())[order])


def test_the_silhouette_equals_the_slow_truth_and_sampling_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    points, small = two_blobs(60, 3), torch.arange(60) % 3 == 0  # not the best cut: some rows score below 0
    truth = slow.silhouette(points, small)
    assert silhouette(points, small, seeded()) == pytest.approx(truth, abs=1e-5)
    monkeypatch.setattr(activation_clustering, "ENTRIES", 7 * 60)  # chunks of seven rows
    assert silhouette(points, small, seeded()) == pytest.approx(truth, abs=1e-5)
    monkeypatch.setattr(activation_clustering, "SAMPLE", 40)
    sampled = silhouette(points, small, seeded())
    assert sampled != pytest.approx(truth, abs=1e-5)
    assert sampled == pytest.approx(truth, abs=0.1)


def test_a_cluster_of_one_row_has_no_silhouette() -> None:
    points, small = torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([False, False, True])
    assert silhouette(points, small, seeded()) == pytest.approx(slow.silhouette(points, small), abs=1e-6)
    assert slow.silhouette(points, small) == pytest.approx((8 / 9 + 7 / 8) / 3)


def test_principal_components_keep_distances_and_independent_ones_find_the_sources() -> None:
    sources = torch.rand(500, 3, generator=seeded()) - 0.5
    mixed = sources @ torch.tensor([[3.0, 1.0, 0.0, 2.0], [0.5, 2.0, 1.0, 0.0], [0.0, 1.0, 0.7, 0.3]])
    principal = reduced(mixed, "pca", 10, seeded())
    assert principal.shape == (500, 3)  # as many as the features span
    assert torch.allclose(torch.cdist(principal, principal), torch.cdist(mixed, mixed), atol=2e-3)
    assert reduced(mixed, "pca", 2, seeded()).shape == (500, 2)
    independent = reduced(mixed, "ica", 10, seeded())
    assert torch.allclose(independent.std(0), torch.ones(3), atol=0.01)

    def agreement(found: torch.Tensor) -> float:
        both = torch.corrcoef(torch.cat([sources, found], 1).T)[:3, 3:].abs()
        return float(both.amax(1).min())

    assert agreement(independent) > 0.98 > 0.9 > agreement(principal)


@pytest.mark.parametrize("defense", RULES, ids=lambda d: f"{d.reduction}-{d.decide}")
@pytest.mark.parametrize("features", [torch.ones(1, 4), torch.ones(6, 4), torch.tensor([[0.0, 1.0], [1.0, 0.0]])])
def test_a_class_that_cannot_be_cut_in_unequal_parts_is_kept(
    defense: ActivationClustering, features: torch.Tensor
) -> None:
    assert not bool(defense.judge(features, seeded()).any())


def test_three_images_and_ten_dimensions_are_borne() -> None:
    features = torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, 1.1], [0, 9, 0, 1]])
    for defense in RULES:
        assert int(defense.judge(features, seeded()).sum()) <= 1


def make(generator: torch.Generator) -> torch.nn.Module:
    return build("tiny", shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=8, generator=generator)


def test_in_a_training_it_removes_the_odd_tenth_of_a_class(few_digits: LabeledImages) -> None:
    """Every tenth three is shown in negative."""
    odd = (few_digits.y == 1).nonzero().flatten()[::10]
    x = few_digits.x.clone()
    x[odd] = 255 - x[odd]
    data = LabeledImages(x, few_digits.y, few_digits.classes)
    recipe = Recipe(epochs=2, batch=64, lr=0.05, augment=None)
    fitted = fit(data, make, recipe=recipe, defenses=[ActivationClustering()], streams=Streams(0))
    assert set(odd.tolist()) == set((fitted.removed & (data.y == 1)).nonzero().flatten().tolist())
    assert fitted.history[0]["kept"] == 300 - int(fitted.removed.sum())


def test_at_share_0_no_probe_is_trained(few_digits: LabeledImages) -> None:
    def fail(generator: torch.Generator) -> torch.nn.Module:
        made.append(1)
        return make(generator)

    made: list[int] = []
    defense = ActivationClustering(decide="relative", share=0)
    fit(few_digits, fail, recipe=Recipe(epochs=0), defenses=[defense], streams=Streams(0))
    assert made == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": "tsne"}, "unknown reduction 'tsne'; choose one of none, ica, pca"),
        ({"decide": "exclusionary"}, "unknown decide 'exclusionary'; choose one of smaller, relative, silhouette"),
        ({"dims": 0}, "not dims = 0"),
        ({"share": 0.6}, r"in \[0, 0.5\], not 0.6"),
        ({"separation": float("nan")}, r"in \[-1, 1\], not nan"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationClustering(**settings)  # type: ignore[arg-type]
