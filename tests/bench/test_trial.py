"""Trials: what a TOML file may say, and how it is told that it is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from friends.attacks.gradient_matching import GradientMatching
from friends.bench.trial import parse_trial, read_trial
from friends.data.augment import Augment
from friends.defenses import Friends
from friends.noise.friendly import PAPER, RELEASED

MINIMAL = {"data": {"source": "digits"}, "attack": {"name": "gradient-matching"}}

WHOLE = """
seed = 3
scenario = "transfer"
controls = 2
pretraining_images = 500
[data]
source = "digits"
classes = ["4", "9"]
train = 200
[model]
name = "tiny"
width = 16
[goals]
count = 5
true_class = "4"
wanted_class = "9"
correct = true
[attack]
name = "gradient-matching"
xi = "8/255"
budget = 0.05
augment = false
[pretraining]
epochs = 3
[recipe]
epochs = 10
augment = { shift = 2.0, flip = 0 }
[[arms]]
name = "friends-b"
  [[arms.defenses]]
  name = "friends"
  mu = "48/255"
  settings = { base = "paper", lr = 50 }
[[arms]]
name = "paper"
  [[arms.defenses]]
  name = "friends"
  settings = "paper"
"""


def test_a_whole_file_is_read_as_written(tmp_path: Path) -> None:
    file = tmp_path / "my-trial.toml"
    file.write_text(WHOLE)
    trial = read_trial(file)
    assert trial.name == "my-trial"
    assert (trial.seed, trial.scenario, trial.controls, trial.pretraining_images) == (3, "transfer", 2, 500)
    assert trial.data.classes == ("4", "9")
    assert isinstance(trial.attack, GradientMatching)
    assert trial.attack.xi == 8 / 255
    assert trial.attack.augment is None
    assert trial.recipe.augment == Augment(flip=0.0, shift=2.0)
    assert trial.recipe.epochs == 10
    assert trial.recipe.lr == 0.1  # the rest of the scenario's recipe
    assert trial.pretraining.epochs == 3
    first, second = (arm.defenses[0] for arm in trial.arms)
    assert first == Friends(mu=48 / 255, settings=replace(PAPER, lr=50.0))
    assert second == Friends(settings=PAPER)


def test_little_is_needed_and_the_rest_is_the_papers() -> None:
    trial = parse_trial(MINIMAL)
    assert trial.recipe.epochs == 80
    assert trial.model.name == "resnet18"
    assert parse_trial({**MINIMAL, "scenario": "transfer"}).recipe.epochs == 40
    assert Friends().settings == RELEASED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack": {"name": "gradient-macthing"}}, "unknown attack 'gradient-macthing', did you mean 'gradient-match"),
        (
            {"attack": {"name": "gradient-matching", "stepps": 1}},
            "unknown setting of attack gradient-matching 'stepps', did you",
        ),
        ({"attack": {"name": "gradient-matching", "xi": "16/0"}}, 'xi is a number such as 0.1 or "16/255"'),
        ({"attack": {"name": "gradient-matching", "steps": 2.5}}, "steps is an int, not 2.5"),
        ({"attack": {"name": "gradient-matching", "steps": True}}, "steps is an int"),
        ({"recipe": {"epochs": "many"}}, "recipe: epochs is an int, not 'many'"),
        ({"recipe": {"precision": "float16"}}, "precision is one of auto, float32, bfloat16, not 'float16'"),
        ({"seeed": 1}, "unknown setting of trial 'seeed', did you mean 'seed'"),
        ({"scenario": "scratsh"}, "unknown scenario 'scratsh', did you mean 'scratch'"),
        ({"arms": [{"name": "a"}]}, r"arm 'a' needs \[\[arms.defenses\]\]"),
        ({"arms": [{"name": "a", "defenses": [{"name": "epik"}]}]}, "unknown defense 'epik'"),
        ({"arms": [{"name": "a", "defenses": [{"name": "friends", "mu": 16}]}]}, r"did you mean 16/255"),
        ({"arms": [{"name": "clean", "defenses": []}]}, "same name"),
        ({"goals": {"count": 0}}, "at least one goal"),
        ({"goals": {"true_class": "4", "wanted_class": "4"}}, "wanted as the same class"),
        ({"controls": 100}, "one per target"),
        ({"name": "../up"}, "a trial's name names files"),
        ({"arms": [{"name": "../../evil", "defenses": []}]}, "an arm's name names files"),
        ({"pretraining_images": 20}, "pretraining_images is for transfer"),
        ({"arms": [{"name": "a", "defenses": [{"name": "friends", "settings": "papr"}]}]}, "did you mean 'paper'"),
        ({"data": {}}, "source"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_trial({**MINIMAL, **change})


def test_a_file_that_is_no_toml_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no trial file"):
        read_trial(tmp_path / "none.toml")
    file = tmp_path / "bad.toml"
    file.write_text("a = = 1")
    with pytest.raises(ValueError, match="not TOML"):
        read_trial(file)


def test_the_key_changes_with_every_setting_and_not_with_the_name() -> None:
    base = parse_trial(MINIMAL)
    assert replace(base, name="other").key() == base.key()
    changes = [
        {"seed": 1},
        {"recipe": {"lr": 0.05}},
        {"attack": {"name": "gradient-matching", "xi": "15/255"}},
        {"attack": {"name": "bullseye-polytope"}},
        {"arms": [{"name": "a", "defenses": [{"name": "friends"}]}]},
        {"arms": [{"name": "a", "defenses": [{"name": "friends", "settings": "paper"}]}]},
        {"goals": {"count": 7}},
        {"recipe": {"augment": False}},
    ]
    keys = {parse_trial({**MINIMAL, **change}).key() for change in changes} | {base.key()}
    assert len(keys) == len(changes) + 1


def test_the_examples_are_valid() -> None:
    examples = sorted((Path(__file__).resolve().parents[2] / "examples").rglob("*.toml"))
    assert examples
    for file in examples:
        assert read_trial(file).name == file.stem


def test_the_demo_is_valid() -> None:
    from importlib.resources import as_file, files

    with as_file(files("friends.bench") / "demo.toml") as file:
        trial = read_trial(Path(file))
    assert trial.name == "demo"
    assert trial.goals.count >= 8
    assert trial.arms
