"""Strong augmentation: what enters the model, which labels go with it, and which loss is minimised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import pytest
import strong_augmentation_slow as slow
import torch
from torch import Tensor
from torch.nn import functional as F

from friends.data.images import LabeledImages
from friends.defenses.mixing import (
    boxes,
    cutmix_batch,
    cutout_batch,
    dirichlet,
    laplacian,
    mixup_batch,
    per_sample_max,
    repeated,
    soft_labels,
)
from friends.defenses.strong_augmentation import CutMix, Cutout, DPInstaHide, MaxUp, Mixup
from friends.models import build
from friends.training import Defense, Recipe, Run, fit
from friends.types import Streams

RECIPE = Recipe(epochs=2, batch=64, lr=0.05, augment=None)
MIXERS = [Mixup(ways=3), CutMix(p=1), DPInstaHide(ways=3)]
CUTTERS = [Cutout(each=True), MaxUp(copies=2, warmup=0), MaxUp(copies=2, warmup=0, augment="shift")]


def make(generator: torch.Generator) -> torch.nn.Module:
    return build("tiny", shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=8, generator=generator)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(b: int, shape: tuple[int, int, int] = (3, 10, 7), classes: int = 4) -> tuple[Tensor, Tensor]:
    return torch.rand(b, *shape, generator=stream(5)), torch.arange(b) % classes


@dataclass(frozen=True)
class Look(Defense):
    """Comes after a defense and keeps every batch as it enters the model."""

    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def batch(self, x: Tensor, y: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        self.seen.append((x, y))
        return x, y


def entered(data: LabeledImages, *defenses: Defense, recipe: Recipe = RECIPE) -> list[tuple[Tensor, Tensor]]:
    look = Look()
    fit(data, make, recipe=recipe, defenses=[*defenses, look], streams=Streams(0))
    return look.seen


def replayed(seed: int, ways: int, alpha: float, b: int) -> tuple[list[float], list[list[int]]]:
    """The weights and permutations that a mixup draws from a fresh generator."""
    generator = stream(seed)
    weights = dirichlet(alpha, ways, generator)
    return weights.tolist(), [torch.randperm(b, generator=generator).tolist() for _ in range(ways)]


# mixup


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_mixup_is_the_slow_one_and_its_loss_the_weighted_sum_of_hard_losses(ways: int) -> None:
    x, y = batch_of(9)
    weights, orders = replayed(3, ways, 0.7, 9)
    images, labels = mixup_batch(x, soft_labels(y, 4), stream(3), ways=ways, alpha=0.7)
    for i in range(9):
        expected = slow.mixed_image(x, weights, [order[i] for order in orders])
        torch.testing.assert_close(images[i], expected)
    logits = torch.randn(9, 4, generator=stream(8))
    hard = [y[torch.tensor(order)] for order in orders]
    torch.testing.assert_close(F.cross_entropy(logits, labels), slow.mixup_loss(logits, weights, hard))


def test_no_permutation_of_mixup_is_the_identity_by_construction() -> None:
    """With one way the batch is only reordered: an implementation that keeps the first image in place would not."""
    x, y = batch_of(50)
    images, labels = mixup_batch(x, soft_labels(y, 4), stream(1), ways=1, alpha=1.0)
    assert not torch.equal(images, x)
    torch.testing.assert_close(images.sum(0), x.sum(0))
    torch.testing.assert_close(labels.sum(0), soft_labels(y, 4).sum(0))


@pytest.mark.parametrize(("alpha", "largest"), [(0.01, (0.95, 1.0)), (1.0, (0.68, 0.82)), (1000.0, (0.5, 0.53))])
def test_dirichlet_weights_have_the_right_spread(alpha: float, largest: tuple[float, float]) -> None:
    """Of two uniform weights the larger one is 3/4 on average; a small alpha does not underflow."""
    generator = stream()
    draws = torch.stack([dirichlet(alpha, 2, generator) for _ in range(400)])
    assert bool(draws.isfinite().all())
    torch.testing.assert_close(draws.sum(1), torch.ones(400, dtype=torch.float64))
    assert largest[0] <= float(draws.amax(1).mean()) <= largest[1]
    assert abs(float(draws[:, 0].mean()) - 0.5) < 0.07  # neither place is favoured


def test_dirichlet_has_the_variance_of_its_formula() -> None:
    generator = stream(2)
    draws = torch.stack([dirichlet(0.5, 4, generator) for _ in range(3000)])
    assert float(draws.var(0).mean()) == pytest.approx(0.25 * 0.75 / 3, rel=0.05)


# boxes


def test_a_box_has_the_side_that_was_asked_for_and_is_cut_off_at_the_edges() -> None:
    mask = boxes(torch.full((3000,), 9 / 16), 32, 16, stream())[:, 0]
    heights, widths = mask.any(2).sum(1), mask.any(1).sum(1)
    assert torch.equal(mask.sum((1, 2)), heights * widths)  # one filled rectangle each
    assert int(heights.max()) == 18
    assert int(widths.max()) == 9
    assert int(heights.min()) == 9  # the centre is in the image, so is half of the box
    centre = mask.float().mean(0)
    assert float(centre[16, 8]) == pytest.approx(9 / 16 * 9 / 16, abs=0.03)
    assert 0.5 * float(centre[16, 8]) > float(centre[0, 0]) > 0.05
    lengths = mask.any(2).float()
    assert bool(((lengths[:, 1:] - lengths[:, :-1]).abs().sum(1) <= 2).all())


@pytest.mark.parametrize(("share", "pixels"), [(0.0, 0), (1.0, 70)])
def test_boxes_of_nothing_and_boxes_of_the_whole_image(share: float, pixels: int) -> None:
    mask = boxes(torch.full((500,), share), 10, 7, stream())
    assert int(mask.sum((1, 2, 3)).max()) == pixels


def test_cutmix_is_the_slow_one_and_weighs_labels_by_the_true_area() -> None:
    x, y = batch_of(8)
    areas = []
    for seed in range(40):
        images, labels = cutmix_batch(x, soft_labels(y, 4), stream(seed), p=1.0, alpha=1.0)
        order, mask = _replayed_cut(x, seed)
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        box = (0, 0, 0, 0)
        if len(rows):
            box = (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
        expected = torch.stack([slow.boxed(x[i], x[order[i]], box) for i in range(8)])
        assert torch.equal(images, expected)
        area = (box[1] - box[0]) * (box[3] - box[2]) / 70
        logits = torch.randn(8, 4, generator=stream(seed))
        both = slow.mixup_loss(logits, [1 - area, area], [y, y[torch.tensor(order)]])
        torch.testing.assert_close(F.cross_entropy(logits, labels), both)
        areas.append(area)
    assert len(set(areas)) > 15
    assert min(areas) < 0.1 < 0.6 < max(areas)


def _replayed_cut(x: Tensor, seed: int) -> tuple[list[int], Tensor]:
    generator = stream(seed)
    torch.rand(1, generator=generator)
    share = (1 - dirichlet(1.0, 2, generator)[:1].float()).sqrt()
    mask = boxes(share, x.shape[2], x.shape[3], generator)[0, 0]
    return torch.randperm(len(x), generator=generator).tolist(), mask


def test_cutmix_cuts_a_share_p_of_the_batches_and_leaves_the_others_as_they_are() -> None:
    x, y = batch_of(8)
    soft = soft_labels(y, 4)
    untouched = 0
    for seed in range(200):
        images, labels = cutmix_batch(x, soft, stream(seed), p=0.5, alpha=1.0)
        untouched += torch.equal(images, x) and torch.equal(labels, soft)
    assert 80 <= untouched <= 130  # half, and a few boxes that are too small to have a pixel


@pytest.mark.parametrize("each", [False, True])
def test_cutout_fills_a_box_with_the_colour_and_nothing_else(each: bool) -> None:
    x, _ = batch_of(64)
    before, fill = x.clone(), (0.2, 0.4, 0.6)
    out = cutout_batch(x, stream(), size=0.5, fill=fill, each=each)
    assert torch.equal(x, before)
    filled = (out == torch.tensor(fill).view(1, 3, 1, 1)).all(1)
    changed = (out != x).any(1)
    assert torch.equal(filled, changed)  # random images have that colour nowhere else
    assert int(changed.sum((1, 2)).min()) >= 2 * 1
    assert int(changed.sum((1, 2)).max()) <= 5 * 3
    assert len(changed.flatten(1).unique(dim=0)) == (pytest.approx(50, abs=14) if each else 1)


def test_cutout_of_a_training_is_zero_after_normalisation(few_digits: LabeledImages) -> None:
    (mean,), (std,) = few_digits.moments
    model = build("tiny", shape=(1, 28, 28), classes=3, moments=((mean,), (std,)), width=8, generator=stream())
    x, _ = entered(few_digits, Cutout(size=1.0))[0]
    normalise = cast(Callable[[Tensor], Tensor], next(iter(model.children())))
    covered = x[:, 0, 13, 13]
    assert torch.equal(covered, torch.full_like(covered, mean))  # a box as large as the image covers its middle
    assert float(normalise(x)[:, 0, 13, 13].abs().max()) < 1e-6


# maxup


def test_maxup_is_the_largest_loss_of_each_image_where_the_mean_and_other_groupings_differ() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 30.0, 20.0, 10.0])  # images a b c, then their second copies
    assert per_sample_max(losses, 2).tolist() == [30, 20, 10]
    assert per_sample_max(losses, 3).tolist() == [20, 30]
    assert per_sample_max(losses, 1).tolist() == losses.tolist()


@pytest.mark.parametrize("soft", [False, True])
def test_maxup_loss_is_the_slow_one(few_digits: LabeledImages, soft: bool) -> None:
    """What the training minimised in its first step, from the logits that it had."""
    heard: list[tuple[Tensor, Tensor, Tensor]] = []

    class Heard(MaxUp):
        def loss(self, logits: Tensor, y: Tensor, run: Run) -> Tensor:
            value = super().loss(logits, y, run)
            heard.append((logits.detach(), y, value.detach()))
            return value

    mix = [Mixup()] if soft else []
    fit(few_digits, make, recipe=RECIPE, defenses=[*mix, Heard(copies=3, warmup=0)], streams=Streams(0))
    for logits, y, value in heard:
        torch.testing.assert_close(value, slow.maxup_loss(logits, y, 3))
    logits, y, value = heard[-1]
    assert len(logits) == 3 * (300 % 64)  # a last short batch
    assert float(value) > 1.01 * float(F.cross_entropy(logits, y))  # which is the mean over the copies
    assert (y.ndim == 2) == soft


@pytest.mark.parametrize("augment", ["cutout", "shift"])
def test_copies_are_of_the_same_image_and_cut_or_shifted_independently(few_digits: LabeledImages, augment: str) -> None:
    plain = entered(few_digits)[0]
    x, y = entered(few_digits, MaxUp(copies=3, warmup=0, augment=augment))[0]  # type: ignore[arg-type]
    assert torch.equal(y, plain[1].repeat(3))
    copies = x.view(3, 64, *x.shape[1:])
    (mean,) = few_digits.moments[0]
    fill = torch.tensor(mean, dtype=x.dtype)
    alike = [torch.equal(copies[j, i], copies[(j + 1) % 3, i]) for j in range(3) for i in range(64)]
    assert sum(alike) <= 4  # two boxes may happen to cover each other
    if augment == "cutout":
        for i in range(64):
            cut = copies[:, i] == fill
            assert torch.equal(copies[:, i][~cut], plain[0][i].expand(3, 1, 28, 28)[~cut])
            assert 0 < int(cut.sum((1, 2, 3)).min()) <= int(cut.sum((1, 2, 3)).max()) <= 15 * 15


def test_maxup_waits_for_its_warm_up(few_digits: LabeledImages) -> None:
    sizes = [len(x) for x, _ in entered(few_digits, MaxUp(copies=2, warmup=1))]
    assert sizes == [64, 64, 64, 64, 44, 128, 128, 128, 128, 88]
    plain = fit(few_digits, make, recipe=RECIPE, streams=Streams(0)).history
    maxed = fit(few_digits, make, recipe=RECIPE, defenses=[MaxUp(copies=2, warmup=1)], streams=Streams(0)).history
    assert maxed[0]["loss"] == plain[0]["loss"]
    assert maxed[1]["loss"] > plain[1]["loss"]


def test_a_batch_that_lost_rows_after_its_copies_were_made_is_refused() -> None:
    with pytest.raises(ValueError, match="7 losses cannot be of 2 copies"):
        per_sample_max(torch.rand(7), 2)


def test_repeats_go_copy_by_copy() -> None:
    assert repeated(torch.tensor([1, 2]), 3).tolist() == [1, 2, 1, 2, 1, 2]
    assert repeated(torch.tensor([[1, 2], [3, 4]]), 2).tolist() == [[1, 2], [3, 4], [1, 2], [3, 4]]


# noise


def test_laplacian_noise_has_the_moments_of_its_distribution() -> None:
    x = torch.zeros(100, 3, 30, 30)
    noise = laplacian(x, 8 / 255, stream())
    scale = 8 / 255
    assert abs(float(noise.mean())) < 0.01 * scale
    assert float(noise.abs().mean()) == pytest.approx(scale, rel=0.01)
    assert float(noise.var()) == pytest.approx(2 * scale**2, rel=0.02)
    beyond = [float((noise.abs() > k * scale).float().mean()) for k in (1, 3)]
    assert beyond == pytest.approx([0.3679, 0.0498], abs=0.003)  # exp(-1), exp(-3): no Gaussian


def test_instahide_is_mixup_plus_noise_that_is_not_clamped(few_digits: LabeledImages) -> None:
    noisy = entered(few_digits, DPInstaHide(ways=3, scale=8 / 255))
    clean = entered(few_digits, DPInstaHide(ways=3, scale=0))
    residual = torch.cat([a[0] - b[0] for a, b in zip(noisy, clean, strict=True)])
    assert float(residual.abs().mean()) == pytest.approx(8 / 255, rel=0.01)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(noisy, clean, strict=True))
    assert min(float(x.min()) for x, _ in noisy) < -8 / 255
    first, second = noisy[0][0] - clean[0][0], noisy[5][0] - clean[5][0]
    assert not torch.equal(first, second)


def test_noise_alone_leaves_labels_hard(few_digits: LabeledImages) -> None:
    _, y = entered(few_digits, DPInstaHide(ways=1))[0]
    assert y.ndim == 1


# all of them, in a training


@pytest.mark.parametrize("defense", MIXERS, ids=repr)
def test_soft_labels_sum_to_one_and_mix_several_classes(few_digits: LabeledImages, defense: Defense) -> None:
    for _, y in entered(few_digits, defense):
        assert y.shape[1] == 3
        torch.testing.assert_close(y.sum(1), torch.ones(len(y)))
        assert float(y.min()) >= 0
    y = torch.cat([y for _, y in entered(few_digits, defense)])
    assert float(((y > 0.01).sum(1) > 1).float().mean()) > 0.3


@pytest.mark.parametrize("second", [*MIXERS, *CUTTERS], ids=repr)
@pytest.mark.parametrize("first", MIXERS, ids=repr)
def test_soft_labels_of_an_earlier_defense_are_mixed_on(
    few_digits: LabeledImages, first: Defense, second: Defense
) -> None:
    once, twice = entered(few_digits, first), entered(few_digits, first, replace(second))  # type: ignore[type-var]
    (_, y), (_, z) = once[0], twice[0]
    torch.testing.assert_close(z.sum(1), torch.ones(len(z)))
    copies = len(z) // len(y)
    torch.testing.assert_close(z.mean(0), y.mean(0))  # whatever is mixed: permutations and weights keep the mean
    assert copies == (2 if isinstance(second, MaxUp) else 1)
    if second in CUTTERS:
        assert torch.equal(z, repeated(y, copies))


@pytest.mark.parametrize("defense", [*MIXERS, *CUTTERS], ids=repr)
def test_draws_change_from_step_to_step_and_epoch_to_epoch(few_digits: LabeledImages, defense: Defense) -> None:
    """Of batches that are all alike, so that only the draws can differ."""
    same = few_digits.rows(torch.arange(4).repeat(48))
    seen = entered(same, defense, recipe=Recipe(epochs=2, batch=192, augment=None))
    half = entered(same, defense, recipe=Recipe(epochs=1, batch=96, augment=None))
    assert not torch.equal(*(x.sum((0, 1)) for x, _ in seen))
    assert not torch.equal(*(x.sum((0, 1)) for x, _ in half))


@pytest.mark.parametrize("defense", [*MIXERS, *CUTTERS], ids=repr)
def test_a_batch_of_one_image_and_colour_images_that_are_not_square(defense: Defense) -> None:
    data = LabeledImages(
        torch.randint(256, (5, 3, 18, 12), generator=stream(), dtype=torch.uint8), torch.zeros(5).long(), ("a", "b")
    )

    def net(generator: torch.Generator) -> torch.nn.Module:
        return build("tiny", shape=(3, 18, 12), classes=2, moments=data.moments, width=4, generator=generator)

    fitted = fit(data, net, recipe=Recipe(epochs=2, batch=4, lr=0.01), defenses=[defense], streams=Streams(0))
    assert [line["kept"] for line in fitted.history] == [5, 5]
    assert all(bool(p.isfinite().all()) for p in fitted.model.parameters())


def test_mixing_a_batch_of_one_leaves_the_image_as_it_is() -> None:
    x, y = batch_of(1)
    images, labels = mixup_batch(x, soft_labels(y, 4), stream(), ways=4, alpha=1.0)
    torch.testing.assert_close(images, x)
    torch.testing.assert_close(labels, soft_labels(y, 4))
    images, labels = cutmix_batch(x, soft_labels(y, 4), stream(), p=1.0, alpha=1.0)
    torch.testing.assert_close(images, x)
    torch.testing.assert_close(labels, soft_labels(y, 4))


# bad input


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        (lambda: Mixup(ways=0), "at least 1, not 0"),
        (lambda: Mixup(alpha=0), "alpha is positive and finite, not 0"),
        (lambda: Mixup(alpha=float("nan")), "not nan"),
        (lambda: DPInstaHide(ways=-1), "not -1"),
        (lambda: DPInstaHide(scale=8), r"scale of the noise is in \[0, 1\], not 8"),
        (lambda: CutMix(p=1.5), r"p is in \[0, 1\], not 1.5"),
        (lambda: CutMix(alpha=-1), "not -1"),
        (lambda: Cutout(size=18), "not 18"),
        (lambda: MaxUp(copies=0), "not 0, 5"),
        (lambda: MaxUp(warmup=-1), "not 4, -1"),
        (lambda: MaxUp(size=-0.1), "not -0.1"),
        (lambda: MaxUp(augment="mixup"), "unknown augment 'mixup'; choose one of cutout, shift"),  # type: ignore[arg-type]
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_settings_are_named(settings: Callable[[], Defense], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        settings()


def test_a_warm_up_that_outlasts_the_training_is_refused(few_digits: LabeledImages) -> None:
    with pytest.raises(ValueError, match="from epoch 5 on, but training ends after 2: lower warmup"):
        fit(few_digits, make, recipe=RECIPE, defenses=[MaxUp()], streams=Streams(0))


def test_soft_labels_of_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"soft labels of 4 classes expected, not \(3, 5\)"):
        soft_labels(torch.rand(3, 5), 4)


def test_a_colour_with_other_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="1 fill values for 3 channels"):
        cutout_batch(batch_of(2)[0], stream(), size=0.5, fill=(0.5,), each=True)


def test_two_maxups_do_not_compose(few_digits: LabeledImages) -> None:
    with pytest.raises(ValueError, match="both replace the loss"):
        fit(few_digits, make, recipe=RECIPE, defenses=[MaxUp(warmup=0), MaxUp(warmup=1)], streams=Streams(0))
