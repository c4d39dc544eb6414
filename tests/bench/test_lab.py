"""What an attacker is handed: models of the victim's kind, none of them a victim, and in transfer its very features."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from friends.bench.lab import Lab
from friends.bench.trial import parse_trial
from friends.data.images import LabeledImages
from friends.modules import penultimate
from friends.training.fit import fit

TABLE: dict[str, Any] = {
    "name": "small",
    "scenario": "scratch",
    "data": {"source": "digits", "classes": ["3", "5"], "train": 60, "test": 20},
    "model": {"name": "tiny", "width": 4},
    "goals": {"count": 2},
    "attack": {"name": "gradient-matching", "budget": 0.1, "augment": False},
    "pretraining": {"epochs": 1, "lr": 0.05, "batch": 32, "augment": False},
    "recipe": {"epochs": 1, "lr": 0.05, "batch": 32, "augment": False},
    "arms": [],
}


def lab(folder: Path, **changes: Any) -> Lab:
    return Lab(parse_trial({**TABLE, **changes}), folder, torch.device("cpu"))


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_no_surrogate_begins_as_a_victim_does_and_none_as_another(tmp_path: Path) -> None:
    """Weights of a victim would be more than a gray-box attacker can have."""
    it = lab(tmp_path)
    data = it.data[0]
    surrogate = it.surrogate_of(0)
    begun = [weights(surrogate(data, index=k, epochs=0)) for k in range(4)]
    begun += [weights(it.build(it.streams.child("victim", g)("weights"))) for g in range(4)]
    for i, one in enumerate(begun):
        assert all(not torch.equal(one, other) for other in begun[:i])


def test_a_surrogate_is_trained_by_the_recipe_of_the_victim(tmp_path: Path) -> None:
    it = lab(tmp_path)
    streams = it.streams.child("surrogate", "shared", 3)
    ours = it.surrogate_of(0)(it.data[0], index=3)
    same = fit(it.data[0], it.build, recipe=it.trial.recipe, streams=streams).model
    assert torch.equal(weights(ours), weights(same))
    other = fit(it.data[0], it.build, recipe=it.trial.recipe, streams=it.streams.child("victim", 0)).model
    assert not torch.equal(weights(ours), weights(other))


def test_in_transfer_the_surrogate_has_the_victims_features_before_and_after_training(tmp_path: Path) -> None:
    it = lab(tmp_path, scenario="transfer", attack={"name": "bullseye-polytope", "budget": 0.1, "augment": False})
    data = it.data[0]
    x = data.pixels(slice(0, 8))
    ours = it.surrogate_of(0)(data).eval()
    victim = fit(data, it.make_victim, recipe=it.trial.recipe, streams=it.streams.child("victim", 0)).model.eval()
    with torch.no_grad():
        assert torch.equal(penultimate(ours, x), penultimate(victim, x))
        assert not torch.equal(ours(x), victim(x))  # the head is new


def test_the_white_box_is_for_the_clean_data_and_the_whole_training_only(tmp_path: Path) -> None:
    """Whoever asks for less, or for a model of other data, gets what was asked for."""
    it = lab(tmp_path, scenario="finetune", attack={"name": "bullseye-polytope", "budget": 0.1, "augment": False})
    data = it.data[0]
    surrogate = it.surrogate_of(0)
    whole = weights(surrogate(data))
    assert torch.equal(whole, weights(it.pretrained))
    one_class = data.rows((data.y == 0).nonzero().flatten())
    assert not torch.equal(whole, weights(surrogate(one_class)))
    assert not torch.equal(whole, weights(surrogate(data, epochs=0)))


def test_an_informed_attackers_surrogates_are_trained_with_the_noise(tmp_path: Path) -> None:
    it = lab(tmp_path)
    surrogate, data = it.surrogate_of(0), it.data[0]
    plain = weights(surrogate(data, index=1))
    noisy = weights(surrogate(data, index=1, noise=("bernoulli", 32 / 255)))
    assert not torch.equal(plain, noisy)
    assert torch.equal(plain, weights(surrogate(data, index=1)))


def test_a_model_of_one_goals_poisons_is_not_kept_for_the_others(tmp_path: Path) -> None:
    it = lab(tmp_path)
    data = it.data[0]
    x = data.x.clone()
    x[0] = 255 - x[0]
    poisoned = LabeledImages(x, data.y, data.classes, data.name)
    surrogate = it.surrogate_of(0)
    assert surrogate(data, index=1) is surrogate(data, index=1)
    first, again = surrogate(poisoned, index=1), surrogate(poisoned, index=1)
    assert first is not again
    assert torch.equal(weights(first), weights(again))


@pytest.mark.parametrize(
    ("attack", "augment", "message"),
    [
        ({"name": "gradient-matching", "budget": 0.1}, False, "the attack expects augmentation Augment"),
        ({"name": "gradient-matching", "budget": 0.1, "augment": False}, True, "expects augmentation None"),
        ({"name": "metapoison", "budget": 0.1, "recolour": False}, True, "is for victims that do not augment"),
    ],
)
def test_an_attacker_who_expects_another_augmentation_is_warned_of(
    tmp_path: Path, attack: dict[str, Any], augment: bool, message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        lab(tmp_path, attack=attack, recipe={"epochs": 1, "augment": augment}).check()


def test_an_attacker_who_expects_what_is_true_is_not_warned_of(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lab(tmp_path).check()
