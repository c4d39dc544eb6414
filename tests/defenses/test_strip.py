"""STRIP: what is overlaid with what, where the threshold lies, and who is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import scipy.stats
import torch
from strip_slow import strip_entropy
from torch import nn

from friends.data.images import LabeledImages
from friends.defenses import Strip
from friends.defenses import strip as module
from friends.defenses.strip import overlaid_entropy, threshold_of
from friends.models import build
from friends.training import ABSTAIN, Defense, Recipe, Run, fit
from friends.training.defense import Predictor
from friends.training.fit import Fitted
from friends.types import Streams
from interrupting import Stop, stop_at

RECIPE = Recipe(epochs=3, batch=64, lr=0.05, augment=None)


def make(generator: torch.Generator) -> nn.Module:
    return build("tiny", shape=(1, 28, 28), classes=3, moments=((0.13,), (0.31,)), width=8, generator=generator)


def three(digits: LabeledImages) -> tuple[LabeledImages, LabeledImages, LabeledImages]:
    """To train on, a clean reserve, and to test on: 300, 400 and 500 digits of three classes."""
    some = digits.only_classes(["1", "3", "7"])
    order = torch.randperm(len(some), generator=torch.Generator().manual_seed(0))
    return some.rows(order[:300]), some.rows(order[300:700]), some.rows(order[700:1200])


def trained(data: LabeledImages, clean: LabeledImages, *defenses: Defense) -> Fitted:
    return fit(data, make, recipe=RECIPE, defenses=defenses, streams=Streams(0), clean=clean)


class Always(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return self.logits.expand(len(x), -1)


def test_a_sure_model_scores_0_and_an_undecided_one_all_the_bits_of_its_classes() -> None:
    x, overlays = torch.rand(4, 3, 5, 7), torch.rand(6, 3, 5, 7)
    assert overlaid_entropy(Always([1000.0] + 9 * [0.0]), x, overlays).tolist() == [0, 0, 0, 0]
    assert overlaid_entropy(Always(10 * [0.3]), x, overlays).tolist() == pytest.approx(4 * [math.log2(10)])


@pytest.mark.parametrize("channels", [1, 3])
def test_entropies_are_those_of_the_paper(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * 5 * 4, 4)).requires_grad_(False)
    x, overlays = (torch.rand(n, channels, 5, 4, generator=generator) for n in (7, 9))
    truth = [strip_entropy(model, image, overlays) for image in x]
    assert max(truth) - min(truth) > 0.01
    assert overlaid_entropy(model, x, overlays).tolist() == pytest.approx(truth, abs=1e-5)
    monkeypatch.setattr(module, "PART", 4)  # as when there are more overlays than enter the network at a time
    assert overlaid_entropy(model, x, overlays).tolist() == pytest.approx(truth, abs=1e-5)


def test_images_are_summed_not_averaged_and_not_clamped() -> None:
    model = Always([0.0, 0.0])
    x, overlays = torch.full((1, 1, 2, 2), 0.9), torch.full((3, 1, 2, 2), 0.8)
    overlaid_entropy(model, x, overlays)
    assert torch.cat(model.seen).flatten().tolist() == pytest.approx(12 * [1.7])


def test_the_threshold_is_the_quantile_of_the_fitted_normal_or_of_the_entropies() -> None:
    entropies = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 2
    mean, std = scipy.stats.norm.fit(entropies.numpy())
    for frr in (0.01, 0.3):
        assert float(threshold_of(entropies, frr, "normal")) == pytest.approx(
            scipy.stats.norm.ppf(frr, mean, std), 1e-5
        )
        assert float((entropies < threshold_of(entropies, frr, "quantile")).float().mean()) == pytest.approx(
            frr, abs=2e-3
        )


@pytest.mark.parametrize(("how", "frr"), [("normal", 0.05), ("quantile", 0.05), ("quantile", 0.2)])
def test_about_as_many_clean_images_are_refused_as_asked_for(digits: LabeledImages, how: str, frr: float) -> None:
    train, clean, test = three(digits)
    fitted = trained(train, clean, Strip(overlays=10, frr=frr, fit=how))  # type: ignore[arg-type]
    refused = int((fitted.predictor(test.pixels()) == ABSTAIN).sum())
    assert abs(refused - frr * 500) < 3.5 * (500 * frr * (1 - frr) * (1 + 500 / 390)) ** 0.5  # test and calibration err


def test_what_was_calibrated_is_kept_and_no_overlay_takes_part(digits: LabeledImages) -> None:
    train, clean, _ = three(digits)
    strip = Strip(overlays=25, frr=0.1, calibration=60)
    fitted = trained(train, clean, strip)
    kept = fitted.memory[0]
    rows = kept["overlays"].tolist() + kept["calibration"].tolist()
    assert (len(kept["overlays"]), len(kept["calibration"]), len(set(rows))) == (25, 60, 85)
    truth = overlaid_entropy(fitted.model, clean.pixels(kept["calibration"]), clean.pixels(kept["overlays"])).detach()
    assert torch.equal(kept["entropies"], truth)
    assert torch.equal(kept["threshold"], threshold_of(truth, 0.1, "normal"))
    assert float(kept["mean"]) == pytest.approx(float(truth.mean()))
    assert float(kept["std"]) == pytest.approx(float(truth.std(correction=0)))


def test_answers_do_not_depend_on_the_images_beside(digits: LabeledImages) -> None:
    train, clean, test = three(digits)
    fitted = trained(train, clean, Strip(overlays=10, frr=0.3))
    x = test.pixels(slice(0, 60))
    together = fitted.predictor(x)
    assert 0 < int((together == ABSTAIN).sum()) < 60
    assert torch.equal(together, torch.cat([fitted.predictor(image[None]) for image in x]))
    assert torch.equal(together.flip(0), fitted.predictor(x.flip(0)))
    overlays = clean.pixels(slice(0, 10))
    alone = torch.cat([overlaid_entropy(fitted.model, image[None], overlays) for image in x])
    assert torch.equal(overlaid_entropy(fitted.model, x, overlays), alone)  # to the bit
    assert fitted.predictor(x[:0]).shape == (0,)


def test_accepted_images_are_answered_as_without_it(digits: LabeledImages) -> None:
    train, clean, test = three(digits)
    bare, fitted = trained(train, clean), trained(train, clean, Strip(overlays=10, frr=0.3))
    answers, before = fitted.predictor(test.pixels()), bare.predictor(test.pixels())
    accepted = answers != ABSTAIN
    assert torch.equal(answers[accepted], before[accepted])
    assert not bool((before == ABSTAIN).any())


def test_frr_0_refuses_nothing_and_calibrates_nothing(digits: LabeledImages) -> None:
    train, clean, test = three(digits)
    fitted = trained(train, clean.rows([0]), Strip(frr=0))
    assert torch.equal(fitted.predictor(test.pixels()), trained(train, clean).predictor(test.pixels()))
    assert fitted.memory[0] == {}


@dataclass(frozen=True)
class Shy(Defense):
    """Refuses every image that is dark in its middle."""

    def after_training(self, run: Run) -> Predictor:
        before = run.predictor
        return lambda x: torch.where(x[:, 0, 14, 14] < 0.5, ABSTAIN, before(x))


def test_it_goes_on_abstaining_where_the_pipeline_before_it_does(digits: LabeledImages) -> None:
    train, clean, test = three(digits)
    x = test.pixels()
    shy, strip, both = (
        trained(train, clean, *defenses).predictor(x) == ABSTAIN
        for defenses in ([Shy()], [Strip(overlays=10, frr=0.2)], [Shy(), Strip(overlays=10, frr=0.2)])
    )
    assert bool((shy & ~strip).any())
    assert bool((strip & ~shy).any())
    assert torch.equal(both, shy | strip)


def test_a_model_that_is_always_equally_sure_refuses_nothing(digits: LabeledImages) -> None:
    train, clean, test = three(digits)
    with pytest.warns(UserWarning, match="STRIP will refuse nothing: .* try fit='quantile'"):
        fitted = fit(
            train,
            lambda generator: Always([1000.0, 0.0, 0.0]),
            recipe=Recipe(epochs=0),
            defenses=[Strip()],
            streams=Streams(0),
            clean=clean,
        )
    assert fitted.predictor(test.pixels()).eq(0).all()


def test_a_training_killed_while_calibrating_ends_with_the_same_answers(digits: LabeledImages, tmp_path: Path) -> None:
    train, clean, test = three(digits)
    defenses = [Strip(overlays=10, frr=0.3)]
    whole = trained(train, clean, *defenses)
    with pytest.raises(Stop):
        fit(
            train,
            make,
            recipe=RECIPE,
            defenses=defenses,
            streams=Streams(0),
            clean=clean,
            checkpoint=tmp_path,
            progress=stop_at(100, "calibrating STRIP"),
        )
    again = fit(train, make, recipe=RECIPE, defenses=defenses, streams=Streams(0), clean=clean, checkpoint=tmp_path)
    assert len(again.history) == 3
    assert torch.equal(whole.memory[0]["entropies"], again.memory[0]["entropies"])
    assert torch.equal(whole.predictor(test.pixels()), again.predictor(test.pixels()))


def test_a_reserve_that_is_too_small_or_of_another_shape_is_refused_before_training(digits: LabeledImages) -> None:
    train, clean, _ = three(digits)
    with pytest.raises(ValueError, match="has 100 images; 100 overlays and 20 others to set the threshold are 120"):
        trained(train, clean.rows(range(100)), Strip())
    with pytest.raises(ValueError, match="has 150 images; 100 overlays and 100 others"):
        trained(train, clean.rows(range(150)), Strip(fit="quantile"))
    with pytest.raises(ValueError, match=r"of \(1, 28, 20\) images, the training data of \(1, 28, 28\)"):
        trained(train, LabeledImages(clean.x[..., :20], clean.y, clean.classes), Strip())
    with pytest.raises(ValueError, match="STRIP needs clean images"):
        fit(train, make, recipe=RECIPE, defenses=[Strip()], streams=Streams(0))


@pytest.mark.usefixtures("unchecked")
def test_settings_out_of_range_are_refused_by_name() -> None:
    for settings, message in (
        ({"overlays": 0}, "at least one overlay is needed, not 0"),
        ({"frr": 1.0}, r"\[0, 1\), not 1.0"),
        ({"frr": -0.1}, r"\[0, 1\), not -0.1"),
        ({"frr": float("nan")}, "not nan"),
        ({"fit": "median"}, "unknown fit 'median'; choose one of normal, quantile"),
        ({"calibration": 19}, "needs calibration >= 20 images, not 19"),
        (
            {"calibration": 99, "fit": "quantile"},
            "frr = 0.01 by fit = 'quantile' needs calibration >= 100 images, not 99",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Strip(**settings)  # type: ignore[arg-type]
