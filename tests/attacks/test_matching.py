from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from attacks_slow import loss_gradient, matching_score
from sleeper_slow import gradient_length
from torch import Tensor, nn

from friends.attacks.base import still
from friends.attacks.halfway import Halfway
from friends.attacks.matching import gradient_lengths, longest_gradients, matching_loss, mean_gradient, objective_for
from friends.data.images import LabeledImages
from friends.models import Classifier

Digits = tuple[LabeledImages, LabeledImages]


def some(digits: Digits, count: int = 9) -> tuple[Tensor, Tensor]:
    return digits[0].pixels(slice(0, count)).double(), digits[0].y[:count]


class Wrapped(nn.Module):
    """A model of another library's kind: its output is an object, and what it does depends on values."""

    def __init__(self, model: nn.Module, *, opaque: bool) -> None:
        super().__init__()
        self.model, self.opaque = model, opaque

    def forward(self, x: Tensor) -> object:
        if self.opaque and float(x.sum()) < 0:
            raise AssertionError
        return type("Output", (), {"logits": self.model(x)})()


@pytest.mark.parametrize("net", ["tiny_net", "bn_net"])
@pytest.mark.parametrize("batch", [1, 4, 9, 100])
def test_the_mean_gradient_is_that_of_all_images_whatever_the_batch(
    net: str, batch: int, digits: Digits, request: pytest.FixtureRequest
) -> None:
    model = copy.deepcopy(request.getfixturevalue(net)).double()
    x, y = some(digits)
    ours = mean_gradient(model, x, y, batch)
    assert [g.shape for g in ours] == [p.shape for p in model.parameters()]
    assert torch.allclose(torch.cat([g.flatten() for g in ours]), loss_gradient(model, x, y), rtol=1e-9, atol=1e-12)
    assert not any(g.requires_grad for g in ours)


def test_the_objective_matches_any_gradient_over_all_parameters_at_once(bn_net: Classifier, digits: Digits) -> None:
    model = copy.deepcopy(bn_net).double()
    x, _ = some(digits)
    objective = objective_for(model, mean_gradient(model, x[:4], torch.ones(4, dtype=torch.int64)), 1)
    assert float(objective(x[4:]).detach()) == pytest.approx(
        float(matching_score(model, x[4:], 1, x[:4]).detach()), rel=1e-9
    )
    parts = [torch.rand(3), torch.rand(2, 2)]
    assert float(matching_loss(parts, [7 * p for p in parts])) == pytest.approx(0, abs=1e-6)
    assert float(matching_loss(parts, [-p for p in parts])) == pytest.approx(2)


@pytest.mark.parametrize("net", ["tiny_net", "bn_net"])
@pytest.mark.parametrize("wrap", ["plain", "an object with logits", "not for vmap"])
def test_every_images_gradient_length_is_the_slow_one(
    net: str, wrap: str, digits: Digits, request: pytest.FixtureRequest
) -> None:
    model = copy.deepcopy(request.getfixturevalue(net)).double()
    x, y = some(digits)
    slow = torch.tensor([gradient_length(model, *pair) for pair in zip(x, y.tolist(), strict=True)])
    shown = model if wrap == "plain" else Wrapped(model, opaque=wrap == "not for vmap")
    assert torch.allclose(gradient_lengths(shown, x, y).float(), slow, rtol=1e-5)


def test_only_parameters_that_require_a_gradient_count(tiny_net: Classifier, digits: Digits) -> None:
    model = copy.deepcopy(tiny_net).double()
    x, y = some(digits)
    whole = gradient_lengths(model, x, y)
    model.body.requires_grad_(False)
    head = gradient_lengths(model, x, y)
    assert bool((head < whole).all())
    model.requires_grad_(False)
    for call in (lambda: gradient_lengths(model, x, y), lambda: mean_gradient(model, x, y)):
        with pytest.raises(ValueError, match="no parameter of the surrogate requires a gradient"):
            call()


def test_a_target_of_no_length_is_an_error(tiny_net: Classifier) -> None:
    for value in (0.0, float("inf")):
        with pytest.raises(ValueError, match="the goal's gradient has length"):
            objective_for(tiny_net, [torch.full_like(p, value) for p in tiny_net.parameters()], 1)


def test_the_longest_gradients_are_found_in_eval_mode_and_stay_chosen(
    bn_net: Classifier, digits: Digits, tmp_path: Path
) -> None:
    train, model = digits[0].rows(torch.arange(60)), copy.deepcopy(bn_net)
    rows = (train.y == 1).nonzero().flatten()
    ranked = sorted(rows.tolist(), key=lambda row: -gradient_length(model, train.pixels(slice(row, row + 1))[0], 1))
    kept = Halfway(tmp_path, "me")
    ours = longest_gradients([model.train()], train, 1, 7, kept)
    assert ours.tolist() == sorted(ranked[:7])
    assert model.training
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight.neg_()
    assert not torch.equal(longest_gradients([other], train, 1, 7), ours)
    assert torch.equal(longest_gradients([other], train, 1, 7, Halfway(tmp_path, "me")), ours)


def test_with_several_models_the_mean_length_counts(bn_net: Classifier, tiny_net: Classifier, digits: Digits) -> None:
    train = digits[0].rows(torch.arange(60))
    rows = (train.y == 1).nonzero().flatten()
    with still([bn_net, tiny_net], freeze=False):
        lengths = [gradient_lengths(model, train.pixels(rows), train.y[rows]) for model in (bn_net, tiny_net)]
    both = rows[(lengths[0] + lengths[1]).topk(5).indices].sort().values
    assert torch.equal(longest_gradients([bn_net, tiny_net], train, 1, 5), both)
    assert not torch.equal(longest_gradients([bn_net], train, 1, 5), longest_gradients([tiny_net], train, 1, 5))
