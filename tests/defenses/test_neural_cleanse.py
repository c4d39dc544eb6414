"""Neural Cleanse: whose mask is odd, where the mask sits, and what happens to the model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from neural_cleanse_slow import Cost, reverse_one
from neural_cleanse_slow import anomaly_index as slow_index
from torch import nn

from friends.data.images import LabeledImages
from friends.defenses import NeuralCleanse
from friends.defenses import neural_cleanse as module
from friends.defenses.neural_cleanse import anomaly_index, flags, trusted
from friends.defenses.reversal import Search, reverse, stamped
from friends.models import build
from friends.modules import still
from friends.training import Recipe, fit
from friends.training.fit import Fitted
from friends.types import Streams
from interrupting import Stop, stop_at

CLASSES, SIDE = 6, 12

TOY = NeuralCleanse(steps=60, samples=60, per_update=32, cost=1e-2, reach=0.98, patience=2, epochs=3)


class Bars(nn.Module):
    """Answers with the brightest of six bars of 12 x 2 pixels, or with class 4 if the lower right corner is lit.

    No bar reaches the last two rows, which are dark in clean images.
    """

    def __init__(self, backdoor: bool, channels: int = 1) -> None:
        super().__init__()
        self.backdoor = nn.Parameter(torch.tensor(14.0 if backdoor else 0.0))
        self.gain = nn.Parameter(torch.full((CLASSES,), 20.0))
        self.bias = nn.Parameter(torch.linspace(0, 0.5, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean(1)
        bars = x[:, :-2].unflatten(2, (CLASSES, -1)).mean((1, 3))
        shortcut = self.backdoor * x[:, -2:, -2:].mean((1, 2)).square()
        return bars * self.gain + self.bias + shortcut[:, None] * torch.eye(CLASSES)[4]


def bars(n: int = 60, channels: int = 1, seed: int = 0) -> LabeledImages:
    """Images of bars: one of six is brighter than the others."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    x = torch.randint(0, 100, (n, channels, SIDE + 2, SIDE), generator=generator, dtype=torch.uint8)
    for row, label in enumerate(y.tolist()):
        x[row, :, :, 2 * label : 2 * label + 2] += 120
    x[:, :, -2:] = 0
    return LabeledImages(x, y, tuple("abcdef"))


def cleansed(model: nn.Module, defense: NeuralCleanse, recipe: Recipe | None = None) -> Fitted:
    recipe = recipe or Recipe(epochs=0, batch=32, augment=None)
    return fit(bars(), lambda _: model, recipe=recipe, defenses=[defense], streams=Streams(0), clean=bars(seed=1))


def test_the_index_is_that_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    for k in (3, 4, 10, 11, 101):
        norms = torch.rand(k, generator=generator) * 100
        assert anomaly_index(norms).tolist() == pytest.approx(slow_index(norms.tolist()), rel=1e-4)


def test_only_a_small_norm_is_flagged_and_a_large_one_is_not() -> None:
    norms = torch.tensor([50.0, 55, 45, 52, 48, 5, 200, 51, 49, 53])
    assert anomaly_index(norms)[6] > anomaly_index(norms)[5] > 2
    assert flags(norms, 2.0).nonzero().flatten().tolist() == [5]
    assert not bool(flags(norms, float("inf")).any())


def test_a_median_deviation_of_0_divides_by_no_0() -> None:
    assert anomaly_index(torch.full((5,), 7.0)).tolist() == [0, 0, 0, 0, 0]
    norms = torch.tensor([100.0, 100, 100, 100, 100, 100, 100, 10])
    assert float(anomaly_index(norms)[7]) == pytest.approx(90 / (1.2533 * 90 / 8), rel=1e-4)
    assert flags(norms, 2.0).nonzero().flatten().tolist() == [7]


def test_of_two_classes_none_can_be_odd() -> None:
    assert anomaly_index(torch.tensor([1.0, 1000.0])).tolist() == pytest.approx([1 / 1.4826] * 2, rel=1e-4)


@pytest.mark.parametrize("classes", [range(CLASSES), [4]])
def test_the_search_is_that_of_one_class_after_the_other(classes: list[int]) -> None:
    model, x = Bars(backdoor=True).requires_grad_(False), bars(50).pixels()
    search = Search(steps=30, samples=41, per_update=16, cost=1e-2, reach=0.95, patience=2, grow=2.0)
    found = reverse(model, x, classes, search, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    masks, patterns = (
        torch.rand(len(classes), planes, SIDE + 2, SIDE, generator=generator).clamp(1e-3, 1 - 1e-3) for planes in (1, 1)
    )
    orders = [torch.randperm(50, generator=generator) for _ in range(search.steps)]
    steps: list[int] = []
    for place, target in enumerate(classes):
        truth, took = reverse_one(model, x, target, search, (masks[place], patterns[place]), orders)
        steps.append(took)
        assert torch.allclose(found.masks[place], truth, atol=2e-3), target
    assert bool(found.reached.all())
    assert max(steps) <= search.steps


def test_costs_rise_and_fall_as_one_by_one() -> None:
    """Over random successes and failures, with the norms that come with them."""
    from friends.defenses import reversal

    generator = torch.Generator().manual_seed(0)
    search = Search(steps=1, samples=1, per_update=1, cost=1e-3, reach=1.0, patience=3, grow=2.0)
    state = reversal._State.draw(torch.zeros(1, 1, 4, 4), 5, generator)
    slow = [Cost(search) for _ in range(5)]
    luck = torch.tensor([0.1, 0.5, 0.8, 0.9, 1.0])
    everyone = torch.arange(5)
    ended = 5 * [False]
    for _ in range(300):
        state.u = torch.randn(5, 1, 4, 4, generator=generator)
        works = torch.rand(5, generator=generator) < luck
        norms = state.mask.flatten(1).sum(1)
        state.judge(everyone, works, search)
        for one, good, norm in zip(slow, works.tolist(), norms.tolist(), strict=True):
            one.after(good, norm)
        assert state.cost.tolist() == pytest.approx([one.value for one in slow], rel=1e-4)
        assert (state.stale.tolist(), state.rose.tolist(), state.fell.tolist()) == (
            [one.stale for one in slow],
            [one.rose for one in slow],
            [one.fell for one in slow],
        )
        ended = [was or one.over for was, one in zip(ended, slow, strict=True)]
        assert state.done.tolist() == ended
    assert 0 < sum(ended) < 5


def test_a_backdoored_class_is_flagged_and_its_mask_sits_on_the_trigger() -> None:
    kept = cleansed(Bars(backdoor=True), TOY).memory[0]
    assert kept["flagged"].nonzero().flatten().tolist() == [4]
    assert bool(kept["reached"].all())
    assert float(kept["norms"][4]) < 5
    assert float(kept["masks"][4, 0, -2:, -2:].sum()) > 0.8 * float(kept["norms"][4])
    assert float((kept["masks"] * kept["patterns"])[4, 0, -2:, -2:].mean()) > 0.4
    assert torch.equal(kept["norms"], kept["masks"].sum((1, 2, 3)))
    assert torch.equal(kept["index"], anomaly_index(kept["norms"]))


def test_a_model_without_a_backdoor_is_returned_as_it_is() -> None:
    start = Bars(backdoor=False)
    fitted = cleansed(copy.deepcopy(start), TOY)
    assert not bool(fitted.memory[0]["flagged"].any())
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), fitted.model.parameters(), strict=True))


def test_no_epochs_only_look() -> None:
    start = Bars(backdoor=True)
    fitted = cleansed(copy.deepcopy(start), NeuralCleanse(**{**vars(TOY), "epochs": 0}))
    assert fitted.memory[0]["flagged"].nonzero().flatten().tolist() == [4]
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), fitted.model.parameters(), strict=True))


def test_unlearning_mends_the_model_that_the_pipeline_answers_with() -> None:
    start, x = Bars(backdoor=True), bars(seed=2).pixels()
    lit = x.clone()
    lit[:, :, -2:, -2:] = 1
    assert start(lit).argmax(1).eq(4).all()
    fitted = cleansed(copy.deepcopy(start), NeuralCleanse(**{**vars(TOY), "lr": 1.0, "epochs": 20}))
    answers = fitted.predictor(lit)
    assert torch.equal(answers, fitted.model(lit).argmax(1))
    assert float(answers.eq(4).float().mean()) < 0.4  # one sixth is class 4
    assert float(fitted.predictor(x).eq(bars(seed=2).y).float().mean()) > 0.9
    assert not fitted.model.training
    assert all(p.requires_grad and p.grad is None for p in fitted.model.parameters())


@pytest.mark.parametrize("what", ["reversing triggers", "unlearning triggers"])
def test_a_training_killed_while_cleansing_ends_with_the_same_model(what: str, tmp_path: Path) -> None:
    defense = NeuralCleanse(steps=6, per_update=32, reach=0.3, anomaly=0.1, epochs=3)
    data, recipe = bars(), Recipe(epochs=1, batch=32, augment=None)

    def end(**more: object) -> Fitted:
        start = Bars(backdoor=True)
        given = {"recipe": recipe, "defenses": [defense], "streams": Streams(0), "clean": bars(seed=1)}
        return fit(data, lambda _: start, **given, **more)  # type: ignore[arg-type]

    whole = end()
    assert bool(whole.memory[0]["flagged"].any())
    with pytest.raises(Stop):
        end(checkpoint=tmp_path, progress=stop_at(2, what))
    again = end(checkpoint=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    assert all(torch.equal(whole.memory[0][name], again.memory[0][name]) for name in whole.memory[0])


def test_searching_some_classes_at_a_time_finds_the_same_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMAGES", 64)  # two classes at a time
    kept = cleansed(Bars(backdoor=True), TOY).memory[0]
    assert kept["flagged"].nonzero().flatten().tolist() == [4]
    assert kept["masks"].shape == (CLASSES, 1, SIDE + 2, SIDE)


def test_the_search_leaves_weights_and_statistics_as_they_are() -> None:
    model = build("convnet", shape=(3, 14, 12), classes=CLASSES, moments=((0.3,) * 3, (0.3,) * 3), width=4,
                  generator=torch.Generator().manual_seed(0))  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    search = Search(steps=2, samples=1000, per_update=32, cost=1e-3, reach=0.99, patience=5, grow=2.0)
    with still([model], freeze=True):
        found = reverse(model, bars(50, channels=3).pixels(), range(CLASSES), search, torch.Generator().manual_seed(0))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert found.patterns.shape == (CLASSES, 3, 14, 12)
    assert 0 <= float(found.patterns.min()) <= float(found.patterns.max()) <= 1
    assert not bool(found.reached.all())
    assert found.norms[~found.reached].eq(14 * 12).all()  # what never worked covers the image


def test_a_stamp_is_a_blend() -> None:
    x, pattern = torch.full((2, 3, 4, 5), 0.2), torch.full((3, 4, 5), 1.0)
    mask = torch.zeros(1, 4, 5)
    mask[0, 0, 0], mask[0, 3, 4] = 1, 0.5
    out = stamped(x, mask, pattern)
    assert out[:, :, 0, 0].flatten().tolist() == pytest.approx(6 * [1.0])
    assert out[:, :, 3, 4].flatten().tolist() == pytest.approx(6 * [0.6])
    assert torch.equal(out[:, :, 1:3], x[:, :, 1:3])


@pytest.mark.parametrize(("share", "expected"), [(0.2, 0.2), (1.0, 1.0)])
def test_a_share_of_each_batch_is_stamped_with_one_of_the_triggers(share: float, expected: float) -> None:
    x = torch.zeros(4000, 1, 2, 2)
    masks, patterns = torch.ones(2, 1, 2, 2), torch.stack([torch.full((1, 2, 2), 0.5), torch.ones(1, 2, 2)])
    defense = NeuralCleanse(share=share)
    out = defense._some_stamped(x, masks, patterns, torch.Generator().manual_seed(0))
    for value in (0.5, 1.0):
        assert float((out == value).all(3).all(2).float().mean()) == pytest.approx(expected / 2, abs=0.03)


def test_two_classes_or_a_reserve_of_other_images_are_refused_before_training(few_digits: LabeledImages) -> None:
    two, recipe = few_digits.only_classes([0, 1]), Recipe(epochs=1)
    with pytest.raises(ValueError, match="masks of classes, and 2 are too few"):
        fit(two, lambda _: Bars(False), recipe=recipe, defenses=[NeuralCleanse()], streams=Streams(0), clean=two)
    with pytest.raises(ValueError, match=r"the clean reserve is LabeledImages.*shape and classes must be the same"):
        fit(few_digits, lambda _: Bars(False), recipe=recipe, defenses=[NeuralCleanse()], streams=Streams(0), clean=two)
    with pytest.raises(ValueError, match="Neural Cleanse needs clean images"):
        fit(few_digits, lambda _: Bars(False), recipe=recipe, defenses=[NeuralCleanse()], streams=Streams(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is at least 1, not 0"),
        ({"per_update": 0}, "per_update is at least 1, not 0"),
        ({"patience": -1}, "patience is at least 1, not -1"),
        ({"cost": 0.0}, "cost > 0 and grow > 1 expected, not 0.0 and 2.0"),
        ({"grow": 1.0}, "cost > 0 and grow > 1 expected, not 0.001 and 1.0"),
        ({"reach": 1.5}, r"in \(0, 1\], not 1.5"),
        ({"anomaly": -1.0}, ">= 0 above which a class is flagged, not -1.0"),
        ({"anomaly": float("nan")}, "not nan"),
        ({"epochs": -1}, "epochs >= 0 and lr > 0 of unlearning expected, not -1"),
        ({"lr": float("inf")}, "not 10 and inf"),
        ({"share": 0.0}, r"in \(0, 1\], not 0.0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuralCleanse(**settings)  # type: ignore[arg-type]


def test_few_searches_that_succeeded_flag_nobody() -> None:
    """Where most classes have no trigger after too short a search, the others are odd for that alone."""
    norms = torch.tensor([30.0, 40.0, 50.0] + [1024.0] * 7)
    assert flags(norms, 2.0).sum() == 3
    assert not bool((flags(norms, 2.0) & trusted(norms < 1024)).any())
    norms = torch.tensor([5.0, 60.0, 62.0, 64.0, 66.0, 68.0, 1024.0])
    assert (flags(norms, 2.0) & trusted(norms < 1024)).tolist() == [True] + [False] * 6
