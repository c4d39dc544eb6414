"""What every attack needs: bases, drawn or prescribed; rounding to bytes; features; models held still; costs."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from friends.attacks import ATTACKS, GradientMatching
from friends.attacks.base import (
    GRADIENT,
    SECOND,
    About,
    Attack,
    Cost,
    Settings,
    assembled,
    candidates,
    check_budget,
    choose_bases,
    penultimate,
    place_of,
    poison_count,
    rounded,
    still,
    wanted_class,
)
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal
from friends.models import build


def images(labels: list[int], classes: int = 3) -> LabeledImages:
    x = torch.randint(256, (len(labels), 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return LabeledImages(x, torch.tensor(labels), tuple("abcdef"[:classes]))


def goal(wanted: list[int], size: int = 8) -> Goal:
    y = torch.tensor(wanted)
    return Goal(torch.rand(len(y), 1, size, size), (y + 1) % 3, y)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- bases ---


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.001, 1), st.integers(0, 5))
def test_bases_are_rows_of_the_wanted_class_without_repeats(wanted: int, others: int, budget: float, seed: int) -> None:
    data = images([1] * wanted + [0] * others)
    expected = -(-int(budget * len(data) * 10**6) // 10**6)
    if expected > wanted:
        return
    rows = choose_bases(data, goal([1]), budget, generator(seed))
    assert abs(len(rows) - budget * len(data)) < 1
    assert len(rows) >= budget * len(data) - 1e-6
    assert len(rows.unique()) == len(rows)
    assert bool((data.y[rows] == 1).all())


@pytest.mark.parametrize(("budget", "count"), [(0.01, 1), (0.07, 7), (0.071, 8), (0.29, 29)])
def test_the_number_of_poisons_is_rounded_up_but_not_by_floating_point(budget: float, count: int) -> None:
    assert len(choose_bases(images([0] * 60 + [1] * 40), goal([0]), budget, generator())) == count
    assert poison_count(budget, 100) == count


def test_bases_are_random_and_follow_the_stream() -> None:
    data = images([0, 1] * 50)
    rows = [choose_bases(data, goal([1]), 0.1, generator(seed)).tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    counts = torch.zeros(100)
    for seed in range(200):
        counts[choose_bases(data, goal([1]), 0.1, generator(seed))] += 1
    assert counts[1::2].min() > 15  # each of the 50 is expected 40 times
    assert counts[::2].max() == 0


def test_an_empty_class_and_too_large_a_budget_are_errors_with_the_way_out() -> None:
    data = images([0] * 8 + [1] * 2)
    with pytest.raises(ValueError, match="class 'c' has no image in images: there is nothing to poison"):
        choose_bases(data, goal([2]), 0.1, generator())
    with pytest.raises(ValueError, match=re.escape("asks for 3 poisons, but class 'b' has only 2 images in images: the "
                                                   "budget can be at most 0.2")):  # fmt: skip
        choose_bases(data, goal([1]), 0.3, generator())
    with pytest.raises(ValueError, match=r"fraction of the training set.*not 5; did you mean 0\.05"):
        check_budget(5)
    with pytest.raises(ValueError, match="fraction"):
        check_budget(float("nan"))


def test_the_wanted_class_must_be_one_that_exists() -> None:
    assert wanted_class(goal([1, 1]), images([0, 1])) == 1
    with pytest.raises(ValueError, match=r"wants the classes \[0, 2\]"):
        wanted_class(goal([0, 2]), images([0, 1]))
    with pytest.raises(ValueError, match="wants class 2, but there are 2 classes"):
        wanted_class(goal([2]), images([0, 1], classes=2))
    with pytest.raises(ValueError, match=r"goal images are \(1, 9, 9\), training images \(1, 8, 8\)"):
        wanted_class(goal([1], size=9), images([0, 1]))


# --- prescribed bases ---


def test_prescribed_bases_are_the_bases_in_order_and_nothing_is_drawn() -> None:
    data, drawn = images([0, 1] * 50), generator()
    state = drawn.get_state()
    wanted = replace(goal([1]), bases=torch.tensor([9, 3, 77]))
    assert choose_bases(data, wanted, 0.03, drawn).tolist() == [3, 9, 77]
    assert torch.equal(drawn.get_state(), state)


def test_prescribed_bases_that_do_not_fit_are_refused_with_the_way_out() -> None:
    data, wanted = images([0, 1] * 50), replace(goal([1]), bases=torch.tensor([9, 3, 77]))
    with pytest.raises(ValueError, match=r"prescribes 3 bases, but the budget is 5 poisons: a budget of 0\.03 would"):
        choose_bases(data, wanted, 0.05, generator())
    with pytest.raises(ValueError, match="prescribes row 4 as a base, which is not of the wanted class"):
        choose_bases(data, replace(wanted, bases=torch.tensor([9, 3, 4])), 0.03, generator())
    with pytest.raises(ValueError, match="prescribes row 100 as a base"):
        choose_bases(data, replace(wanted, bases=torch.tensor([9, 3, 100])), 0.03, generator())
    with pytest.raises(ValueError, match="row 9 is prescribed as a base more than once"):
        replace(wanted, bases=torch.tensor([9, 3, 9]))


def test_candidates_are_the_whole_class() -> None:
    rows, count = candidates(images([0, 1, 1, 0, 1]), goal([1]), 0.4)
    assert (rows.tolist(), count) == ([1, 2, 4], 2)


# --- putting poisons in place ---


def test_poisons_replace_their_bases_and_keep_their_labels_unless_told_otherwise() -> None:
    data, rows = images([0, 1, 1, 0]), torch.tensor([2, 0])
    pixels = torch.stack([torch.full((1, 8, 8), value, dtype=torch.uint8) for value in (7, 9)])
    attack = GradientMatching()
    for relabel, labels in ((False, [0, 1, 1, 0]), (True, [1, 1, 1, 0])):
        made = assembled(data, rows, pixels, goal([1]), attack="name", settings=attack, facts={"score": 0.5},
                         relabel=relabel)  # fmt: skip
        assert [int(made.train.x[row].float().mean()) for row in (2, 0)] == [7, 9]
        assert torch.equal(made.train.x[[1, 3]], data.x[[1, 3]])
        assert made.train.y.tolist() == labels
        assert data.y.tolist() == [0, 1, 1, 0]
        facts = {name: made.recipe[name] for name in ("attack", "score", "poisons", "wanted", "budget")}
        assert facts == {"attack": "name", "score": 0.5, "poisons": 2, "wanted": "b", "budget": 0.01}


# --- what an attack is and costs ---


def test_a_cost_counts_images_and_weighs_their_passes() -> None:
    cost = Cost(forward=10, gradient=100, second=1000)
    assert cost.passes == 1110
    assert cost.forwards == pytest.approx(10 + 100 * GRADIENT + 1000 * SECOND)
    assert 1 < GRADIENT < SECOND
    assert Cost().passes == Cost().forwards == 0


@pytest.mark.parametrize("name", ATTACKS)
def test_every_row_of_the_table_fulfils_the_contract(name: str) -> None:
    attack = ATTACKS[name]()
    assert isinstance(attack, Attack)
    assert isinstance(attack.about, About)
    assert attack.about.aim in ("target", "backdoor")
    assert not attack.about.makes_trigger or attack.about.aim == "backdoor"
    assert isinstance(attack, Settings) or getattr(attack, "xi", None) is None
    assert re.search(r"(19|20)\d\d", attack.about.paper)


# --- rounding ---


@settings(deadline=None, max_examples=50)
@given(st.floats(1 / 255, 1), st.integers(0, 10))
def test_after_rounding_to_bytes_the_bound_holds(xi: float, seed: int) -> None:
    base = torch.randint(256, (3, 2, 4, 4), generator=generator(seed), dtype=torch.uint8)
    delta = (torch.rand(base.shape, generator=generator(seed + 1)) * 4 - 2).clamp(-xi, xi)
    out = rounded(base, delta, xi)
    difference = (out.short() - base.short()).abs()
    assert difference.max() <= int(xi * 255 + 1e-6)
    wanted = (base.float() + 255 * delta).clamp(0, 255)
    assert (out.float() - wanted).abs().max() <= 1 + 1e-3  # half a grey level, or one where the bound is not whole


def test_rounding_is_to_the_nearest_byte_and_does_not_wrap() -> None:
    base = torch.tensor([0, 100, 100, 100, 250], dtype=torch.uint8).view(1, 1, 1, 5)
    delta = torch.tensor([-5, 1.6, -1.6, 0.4, 16]).view(1, 1, 1, 5) / 255
    assert rounded(base, delta, 16 / 255).flatten().tolist() == [0, 102, 98, 100, 255]


# --- features ---


def test_penultimate_features_are_the_method_where_there_is_one() -> None:
    model = build("tiny", shape=(1, 8, 8), classes=3, moments=((0.5,), (0.2,)), width=4, generator=generator())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(penultimate(model, x), model.features(x))


class Foreign(nn.Module):
    """Like torchvision's AlexNet: ``features`` is a stage; and its layers run in another order than listed."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(6, 3)
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
        self.middle = nn.Linear(5, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.relu(self.middle(torch.relu(self.features(x)))))


def test_penultimate_features_of_a_foreign_model_are_what_its_last_linear_layer_sees() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Foreign(), torch.rand(2, 1, 8, 8, requires_grad=True)
    features = penultimate(model, x)
    assert torch.equal(features, torch.relu(model.middle(torch.relu(model.features(x)))))
    (gradient,) = torch.autograd.grad(features.sum(), x)
    assert gradient.abs().sum() > 0
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_without_a_linear_layer_has_no_features() -> None:
    with pytest.raises(ValueError, match=r"Sequential ran no nn\.Linear"):
        penultimate(nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()), torch.rand(2, 1, 8, 8))


# --- the surrogate held still ---


@pytest.mark.parametrize("freeze", [True, False])
def test_still_puts_modes_and_gradients_back_also_after_an_error(freeze: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(72, 2)).train()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="inside"), still([model], freeze=freeze):
        assert not any(m.training for m in model.modules())
        assert model[0].weight.requires_grad is not freeze
        model(torch.rand(4, 1, 8, 8))
        torch.rand(1)
        raise RuntimeError("inside")
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_still_keeps_the_global_random_state_and_switches_autocast_off() -> None:
    model = nn.Linear(4, 2)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16), still([model], freeze=False):
        torch.rand(3)
        assert model(torch.rand(1, 4)).dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_is_refused_because_the_signs_of_its_gradients_are_noise() -> None:
    model = nn.Linear(4, 2).bfloat16()
    with (
        pytest.raises(TypeError, match=r"'weight' is torch.bfloat16; float32 is needed here"),
        still([model], freeze=True),
    ):
        pass
    with pytest.raises(ValueError, match="the surrogate ReLU has no parameters"):
        place_of(nn.ReLU())


def test_tensorfloat_is_off_while_models_are_held_still_on_a_gpu_and_as_before_afterwards() -> None:
    from friends.modules import _without_tf32

    switches = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="stop"), _without_tf32(torch.device("cuda")):
            assert [switch.fp32_precision for switch in switches] == ["ieee", "ieee"]
            raise RuntimeError("stop")
        assert [switch.fp32_precision for switch in switches] == ["tf32", "tf32"]
        with _without_tf32(torch.device("cpu")):
            assert [switch.fp32_precision for switch in switches] == ["tf32", "tf32"]  # nothing to do there
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
