"""What every defense must keep, whatever it does: taken up by name, so a new row is tested unasked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from friends.data.images import LabeledImages
from friends.defenses import DEFENSES, ActivationClustering, DeepKNN, Friends, NeuralCleanse, SpectralSignatures, Strip
from friends.defenses.abl import ABL
from friends.defenses.adversarial_poisoning import AdversarialPoisoning
from friends.defenses.adversarial_training import AdversarialTraining
from friends.defenses.dp_sgd import DPSGD
from friends.defenses.epic import Epic
from friends.defenses.strong_augmentation import CutMix, Cutout, DPInstaHide, MaxUp, Mixup
from friends.models import build
from friends.training import Defense, Recipe, fit
from friends.types import Streams
from interrupting import Stop, stop_at

RECIPE = Recipe(epochs=4, batch=64, lr=0.05)

SMALL: dict[str, Defense] = {
    "friends": Friends(def_epoch=1),
    "adversarial-poisoning": AdversarialPoisoning(steps=2),
    "adversarial-training": AdversarialTraining(steps=2),
    "abl": ABL(isolate=0.1),
    "mixup": Mixup(),
    "cutmix": CutMix(),
    "cutout": Cutout(),
    "maxup": MaxUp(copies=2, warmup=1),
    "dp-instahide": DPInstaHide(),
    "deep-knn": DeepKNN(k=10),
    "spectral-signatures": SpectralSignatures(budget=0.05),
    "activation-clustering": ActivationClustering(reduction="pca", decide="silhouette", separation=0.3),
    "dp-sgd": DPSGD(),
    "epic": Epic(share=0.3, interval=1),
    "strip": Strip(overlays=10, frr=0.3),
    "neural-cleanse": NeuralCleanse(steps=3, per_update=20, reach=0.2, anomaly=0.5, epochs=1),
}
"""Each defense with settings that act within the few epochs of these tests."""

ZERO: dict[str, Defense] = {
    "friends": Friends(zeta=0, mu=0),
    "adversarial-poisoning": AdversarialPoisoning(fraction=0),
    "adversarial-training": AdversarialTraining(eps=0),
    "abl": ABL(isolate=0, turning_epoch=0),
    "mixup": Mixup(ways=1),
    "cutmix": CutMix(p=0),
    "cutout": Cutout(size=0),
    "maxup": MaxUp(copies=1),
    "dp-instahide": DPInstaHide(ways=1, scale=0),
    "deep-knn": DeepKNN(k=0),
    "spectral-signatures": SpectralSignatures(budget=0),
    "activation-clustering": ActivationClustering(decide="relative", share=0),
    "dp-sgd": DPSGD(clip=float("inf"), sigma=0),
    "epic": Epic(share=0),
    "strip": Strip(frr=0),
    "neural-cleanse": NeuralCleanse(steps=3, epochs=0),
}
"""Each defense at the strength at which it must do nothing."""


TOLD = {
    "deep-knn": {"budget", "k"},
    "spectral-signatures": {"budget"},
    "adversarial-poisoning": {"eps"},
    "abl": {"isolate"},
}
"""What each defense is told about the attack; the others are told nothing."""


@pytest.fixture(scope="module")
def few_digits(few_digits: LabeledImages) -> LabeledImages:
    """The digits at half their size, which is all that contracts need."""
    x = F.avg_pool2d(few_digits.x.float(), 2).round().to(torch.uint8)
    return LabeledImages(x, few_digits.y, few_digits.classes, few_digits.name)


def make(generator: torch.Generator) -> torch.nn.Module:
    return build("tiny", shape=(1, 14, 14), classes=3, moments=((0.13,), (0.31,)), width=8, generator=generator)


def trained(data: LabeledImages, *defenses: Defense, **more: object) -> dict[str, torch.Tensor]:
    """The weights, and under ``"answers"`` what the pipeline says to the first images, which may be to abstain."""
    clean = data.rows(torch.arange(0, 40)) if any(d.about.clean for d in defenses) else None
    fitted = fit(data, make, recipe=RECIPE, defenses=defenses, streams=Streams(0), clean=clean, **more)  # type: ignore[arg-type]
    return {**fitted.model.state_dict(), "answers": fitted.predictor(data.pixels(slice(40, 140)))}


KEPT: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}


def alone(data: LabeledImages, *names: str) -> dict[str, torch.Tensor]:
    """What ``trained`` gives with the small defenses of these names, trained once for all tests."""
    if names not in KEPT:
        KEPT[names] = trained(data, *(SMALL[name] for name in names))
    return KEPT[names]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_every_defense_is_here() -> None:
    assert SMALL.keys() == DEFENSES.keys()
    assert ZERO.keys() == DEFENSES.keys()


@pytest.mark.parametrize("name", DEFENSES)
def test_same_streams_same_bytes_and_it_does_something(few_digits: LabeledImages, name: str) -> None:
    assert equal(trained(few_digits, SMALL[name]), alone(few_digits, name))
    assert not equal(alone(few_digits, name), alone(few_digits))


@pytest.mark.parametrize("name", DEFENSES)
def test_zero_strength_equals_no_defense(few_digits: LabeledImages, name: str) -> None:
    assert equal(trained(few_digits, ZERO[name]), alone(few_digits))


@pytest.mark.parametrize("name", DEFENSES)
def test_global_generator_and_inputs_are_untouched(few_digits: LabeledImages, name: str) -> None:
    state, x, y = torch.get_rng_state(), few_digits.x.clone(), few_digits.y.clone()
    trained(few_digits, SMALL[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(few_digits.x, x)
    assert torch.equal(few_digits.y, y)


@pytest.mark.parametrize("name", DEFENSES)
def test_it_says_what_it_is_and_what_it_is_told(name: str) -> None:
    about, defense = DEFENSES[name].about, SMALL[name]
    assert about.title != Defense.about.title
    assert len(about.paper) > 20
    assert set(about.aims) <= {"target", "backdoor"}
    assert set(about.aims)
    assert set(about.told) == TOLD.get(name, set())
    assert set(defense.told()) <= set(about.told)
    assert about.clean == (name in {"strip", "neural-cleanse"})
    assert all(reason.strip() for reason in [*about.clashes.values(), *about.not_after.values()])


@pytest.mark.parametrize("name", [name for name in DEFENSES if name != "friends"])
def test_composes_with_friends_in_either_order(few_digits: LabeledImages, name: str) -> None:
    """Both noises are there, the rival acts, and nothing breaks."""
    both = Friends(def_epoch=1)
    for order in ([SMALL[name], both], [both, SMALL[name]]):
        clean = few_digits.rows(torch.arange(0, 40)) if SMALL[name].about.clean else None
        fitted = fit(few_digits, make, recipe=RECIPE, defenses=order, streams=Streams(0), clean=clean)
        assert int(fitted.memory[order.index(both)]["friendly"].abs().max()) > 0
        together = {**fitted.model.state_dict(), "answers": fitted.predictor(few_digits.pixels(slice(40, 140)))}
        assert all(bool(torch.isfinite(value).all()) for value in together.values())
        assert not equal(together, alone(few_digits, "friends"))
        assert not equal(together, alone(few_digits, name))


@pytest.mark.parametrize("name", DEFENSES)
@pytest.mark.parametrize("at", [3, 8, 14])
def test_resumes_to_the_same_result(few_digits: LabeledImages, name: str, at: int, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        trained(few_digits, SMALL[name], checkpoint=tmp_path, checkpoint_seconds=0, progress=stop_at(at))
    resumed = trained(few_digits, SMALL[name], checkpoint=tmp_path, checkpoint_seconds=0)
    assert equal(resumed, alone(few_digits, name))


@pytest.mark.parametrize("name", DEFENSES)
def test_its_repr_shows_every_setting_and_makes_it_again(name: str) -> None:
    from friends.noise.friendly import FriendlySettings

    text = repr(SMALL[name])
    again = eval(text, {**{c.__name__: c for c in DEFENSES.values()}, "FriendlySettings": FriendlySettings})  # noqa: S307
    assert again == SMALL[name]
