"""Folders of poisons: what is in them, the same as in a whole run, stopped and resumed, refused, read back."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from friends.attacks import ATTACKS, halfway
from friends.bench import attacking, poison_folder
from friends.bench.attacking import attack_trial, craft_folder, crafting_only
from friends.bench.poison_folder import Manifest, clean_data, export, read_poisons, trial_of, verify
from friends.bench.run import run_trial
from friends.bench.trial import Trial, parse_trial
from friends.data.files import owned, read_tensors
from friends.data.poisoned import PoisonedDataset
from interrupting import Stop, stop_at_call

TABLE: dict[str, Any] = {
    "name": "small",
    "scenario": "scratch",
    "controls": 1,
    "data": {"source": "digits", "classes": ["3", "5"], "train": 80, "test": 60},
    "model": {"name": "tiny", "width": 4},
    "goals": {"count": 2},
    "attack": {"name": "gradient-matching", "xi": "64/255", "budget": 0.05, "steps": 4, "restarts": 2},
    "recipe": {"epochs": 2, "lr": 0.05, "batch": 32},
}


@pytest.fixture(scope="module")
def trial() -> Trial:
    return parse_trial(TABLE)


@pytest.fixture(scope="module")
def crafted(trial: Trial, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacking") / "poisons"
    craft_folder(trial, folder)
    return folder


@pytest.fixture
def folder(crafted: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(crafted, tmp_path / "poisons"))


def hashes(folder: Path) -> list[str]:
    return [entry.sha256 for entry in verify(folder).goals]


# -- crafting -----------------------------------------------------------------------------------------------------


def test_the_folder_holds_poisons_and_a_manifest_that_describes_them(crafted: Path, trial: Trial) -> None:
    assert sorted(file.name for file in crafted.iterdir()) == [
        "goal-000.safetensors", "goal-001.safetensors", "manifest.json"
    ]  # fmt: skip
    manifest = verify(crafted)
    assert manifest.finished and manifest.attack == "gradient-matching" and manifest.key == crafting_only(trial).key()
    assert manifest.data["name"] == "digits" and manifest.data["train"] == 80 and manifest.data["classes"] == ["3", "5"]
    assert manifest.settings["attack"]["xi"] == 64 / 255 and manifest.settings["recipe"]["epochs"] == 2
    assert not {"arms", "controls", "victims", "pretraining"} & manifest.settings.keys()
    assert manifest.versions["torch"] and manifest.device and manifest.started
    assert {"crafting 000", "crafting 001"} < manifest.seconds.keys()  # and the surrogate
    for entry in manifest.goals:
        assert entry.poisons == 4 and entry.largest_change == 64 and entry.images == 1
        assert "\u2192" in entry.goal and entry.seconds > 0
        _, header = read_tensors(crafted / entry.file)
        assert header["key"] == manifest.key and header["clean"] == manifest.data["fingerprint"]
        recipe: Any = header["recipe"]
        kept = recipe["score_last"].index(min(recipe["score_last"]))
        assert len(recipe["score_last"]) == 2 and entry.score_last == recipe["score_last"][kept]
        assert entry.score_first == recipe["score_first"][kept]


def test_they_are_the_poisons_of_the_whole_run(crafted: Path, trial: Trial, tmp_path: Path) -> None:
    run_trial(trial, tmp_path / "run")
    clean = clean_data(crafted)
    for g, poisoned in enumerate(read_poisons(crafted, clean)):
        theirs = PoisonedDataset.load(tmp_path / "run" / "poisons" / f"goal-{g:03d}.safetensors", clean)
        assert theirs.train.fingerprint == poisoned.train.fingerprint


def test_what_only_victims_depend_on_makes_no_other_crafting(crafted: Path, trial: Trial) -> None:
    other = replace(trial, name="other", controls=0, scaled_down="much", victims=3, pretraining=trial.recipe)
    before = hashes(crafted)
    assert craft_folder(other, crafted).finished  # refused if it were another
    assert hashes(crafted) == before
    transfer = replace(trial, scenario="transfer")
    assert crafting_only(transfer).key() == crafting_only(replace(transfer, recipe=trial.recipe.first(1))).key()
    assert crafting_only(transfer).key() != crafting_only(replace(transfer, pretraining=trial.recipe)).key()
    assert crafting_only(trial).key() != crafting_only(replace(trial, recipe=trial.recipe.first(1))).key()


def test_attacks_that_craft_many_goals_at_once_leave_one_file_a_goal(tmp_path: Path) -> None:
    table = {**TABLE, "attack": {"name": "bullseye-polytope", "xi": "64/255", "budget": 0.05, "steps": 3}}
    trial = parse_trial({**table, "scenario": "transfer", "pretraining": TABLE["recipe"], "goals": {"count": 3}})
    manifest = craft_folder(trial, tmp_path / "poisons")
    assert [entry.file for entry in manifest.goals] == [f"goal-{g:03d}.safetensors" for g in range(3)]
    assert len({entry.sha256 for entry in manifest.goals}) == 3


def test_an_attack_without_an_objective_has_no_score() -> None:
    assert attacking._scores({"attack": "x"}) == (None, None)
    assert attacking._scores({"score_first": [3.0, 2.0, 4.0], "score_last": [1.0, 0.5, 0.7]}) == (2.0, 0.5)


# -- stopped, resumed, refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("correct", [False, True])
def test_stopped_anywhere_it_goes_on_to_the_same_poisons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, correct: bool
) -> None:
    """Stopped at every tenth report again and again, in craftings and between goals."""
    trial = parse_trial({**TABLE, "goals": {"count": 2, "correct": correct}})
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    craft_folder(trial, whole)
    monkeypatch.setattr(halfway, "SECONDS", 0.0)
    stops, finished, seen = 0, False, set[int]()
    while not finished:
        assert stops < 20, "it begins anew after every stop"
        try:
            craft_folder(trial, torn, progress=stop_at_call(10))
            finished = True
        except Stop:
            stops += 1
            seen.add(len(Manifest.read(torn).goals) if (torn / "manifest.json").exists() else -1)
    assert stops >= 2 and {0, 1} <= seen
    assert hashes(torn) == hashes(whole)
    assert sorted(file.name for file in torn.iterdir()) == sorted(file.name for file in whole.iterdir())


def test_a_finished_folder_is_left_as_it_is(folder: Path, trial: Trial) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    told: list[str] = []
    craft_folder(trial, folder, progress=lambda what, *_: told.append(what))
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert told == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "its seed is 0, not 1"),
        ({"attack": {**TABLE["attack"], "steps": 5}}, "its attack.steps is 4, not 5"),
        ({"goals": {"count": 3}}, "its goals.count is 2, not 3"),
        ({"recipe": {**TABLE["recipe"], "augment": False}}, "its recipe.augment is"),
    ],
)
def test_a_folder_of_other_poisons_is_refused(crafted: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"holds other poisons: {words}"):
        craft_folder(parse_trial({**TABLE, **change}), crafted)


def test_a_folder_of_something_else_is_refused(trial: Trial, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds something else"):
        craft_folder(trial, tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "friends noise 1"}')
    with pytest.raises(ValueError, match="is not the manifest of a folder of poisons"):
        craft_folder(trial, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_second_process_in_the_folder_is_refused(folder: Path, trial: Trial) -> None:
    with owned(folder), pytest.raises(BlockingIOError, match="another process is working in"):
        craft_folder(trial, folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"name": "tinny"}}, "did you mean 'tiny'"),
        ({"goals": {"count": 1, "true_class": "7"}}, "goals name class '7'"),
        ({"goals": {"count": 1, "keys": "standard"}}, "CIFAR-10"),
        ({"attack": {**TABLE["attack"], "budget": 0.9}}, "72 poisons, but class '3' has only"),
        ({"data": {"source": "digits", "classes": ["3", "x"]}}, "unknown class 'x'"),
    ],
)
def test_mistakes_show_before_work_and_before_the_folder_is_claimed(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    told: list[str] = []
    with pytest.raises(ValueError, match=words):
        craft_folder(parse_trial({**TABLE, **change}), tmp_path / "p", progress=lambda what, *_: told.append(what))
    assert told == [] and not (tmp_path / "p" / "manifest.json").exists()
    assert craft_folder(parse_trial({**TABLE, "goals": {"count": 1}}), tmp_path / "p").finished


# -- reading ------------------------------------------------------------------------------------------------------


def test_read_back_with_the_data_from_where_they_were(crafted: Path, trial: Trial) -> None:
    assert trial_of(Manifest.read(crafted)).key() == crafting_only(trial).key()
    clean = clean_data(crafted)
    assert len(clean) == 80
    sets = list(read_poisons(crafted))
    assert len(sets) == 2
    for poisoned in sets:
        changed = (poisoned.train.x != clean.x).flatten(1).any(1).nonzero().flatten()
        assert torch.equal(changed, poisoned.poison_idx.sort().values)


def test_other_data_are_refused(crafted: Path, folder: Path, tmp_path: Path) -> None:
    import numpy as np

    with pytest.raises(ValueError, match=r"goal-000.safetensors was made for other training data"):
        next(read_poisons(crafted, clean_data(crafted).rows(range(79))))
    x = np.random.default_rng(0).integers(0, 255, (200, 28, 28), dtype=np.uint8)
    y = np.repeat([0, 1], 100)
    np.savez(tmp_path / "other.npz", x_train=x, y_train=y, x_test=x, y_test=y, classes=np.array(["3", "5"]))
    with pytest.raises(ValueError, match="was made for other images than LabeledImages"):
        clean_data(crafted, source=str(tmp_path / "other.npz"))


def spoilt_bytes(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: spoilt_bytes(f / "goal-001.safetensors"), "goal-001.safetensors was changed after it was written"),
        (
            lambda f: (f / "goal-000.safetensors").write_bytes(b"12"),
            r"goal-000.safetensors has 2 bytes, not \d+",
        ),
        (lambda f: (f / "goal-000.safetensors").unlink(), "goal-000.safetensors is missing"),
        (lambda f: shutil.copy(f / "goal-000.safetensors", f / "goal-002.safetensors"), "goal-002.* is not listed"),
        (lambda f: (f / "manifest.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is not the manifest of a folder of poisons"),
        (lambda f: (f / "manifest.json").unlink(), "is no folder of poisons: it has no manifest.json"),
    ],
)
def test_a_folder_that_is_not_as_it_was_written_is_refused(folder: Path, spoil: Any, words: str) -> None:
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        list(read_poisons(folder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attack": "magic"}, "names the attack 'magic', which is not known here"),
        ({"key": ...}, "missing"),
        ({"goals": [{"file": "../../etc/passwd"}]}, "missing|plain file name"),
        ({"colour": "red"}, "unknown setting"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(folder: Path, change: dict[str, Any], words: str) -> None:
    file = folder / "manifest.json"
    plain = json.loads(file.read_text()) | change
    file.write_text(json.dumps({name: value for name, value in plain.items() if value is not ...}))
    with pytest.raises(ValueError, match=words):
        list(read_poisons(folder))


def test_a_file_elsewhere_cannot_be_named(folder: Path) -> None:
    entry = Manifest.read(folder).goals[0]
    with pytest.raises(ValueError, match="is no plain file name"):
        replace(entry, file="../goal-000.safetensors")


def test_a_set_that_breaks_its_claim_is_refused_though_its_hashes_agree(folder: Path) -> None:
    """Whoever forges a set with all its hashes still has to keep the bound."""
    clean, manifest = clean_data(folder), Manifest.read(folder)
    poisoned = PoisonedDataset.load(folder / "goal-000.safetensors", clean)
    row = int(poisoned.poison_idx[0])
    poisoned.train.x[row] = 255 - clean.x[row]
    poisoned.save(folder / "goal-000.safetensors", clean=clean, key=manifest.key)
    file = folder / "goal-000.safetensors"
    forged = replace(manifest.goals[0], sha256=poison_folder.sha256_of(file), bytes=file.stat().st_size)
    replace(manifest, goals=(forged, manifest.goals[1])).write(folder)
    with pytest.raises(ValueError, match="more than xi = 64/255"):
        list(read_poisons(folder))


def test_exported_pickles_hold_the_same_poisons(crafted: Path, tmp_path: Path) -> None:
    from friends.data.legacy import read_folder

    clean = clean_data(crafted)
    export(crafted, clean, tmp_path / "pickles")
    for g, poisoned in enumerate(read_poisons(crafted, clean)):
        back = read_folder(tmp_path / "pickles" / f"goal-{g:03d}", clean)
        assert back.train.fingerprint == poisoned.train.fingerprint
    with pytest.raises(FileExistsError, match="is not empty"):
        export(crafted, clean, tmp_path / "pickles")


def test_the_blocks_of_the_docs_run(
    crafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = (Path(__file__).resolve().parents[2] / "docs" / "attacks.md").read_text(encoding="utf-8")
    shutil.copytree(crafted, tmp_path / "poisons")
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", docs, flags=re.DOTALL):
        exec(compile(block, "docs/attacks.md", "exec"), {})
    assert capsys.readouterr().out.count("gradient-matching") == 2


# -- the command line's words as a trial ---------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(
        'scenario = "transfer"\n[data]\nsource = "digits"\ntrain = 50\n[attack]\nname = "bullseye-polytope"\n'
        'xi = "8/255"\n[attack.augment]\nshift = 2.0\n[goals]\ncount = 5\ncorrect = true\n[pretraining]\nepochs = 7\n'
        '[recipe]\nepochs = 3\n[[arms]]\nname = "a"\n  [[arms.defenses]]\n  name = "friends"\n'
    )
    return path


def test_an_attacks_name_is_a_trial_with_the_papers_defaults() -> None:
    trial: Any = attack_trial("gradient-matching", {"data": {"source": "digits", "train": None}})
    assert trial.attack == ATTACKS["gradient-matching"]()
    assert trial.scenario == "scratch" and trial.goals.count == 1 and trial.model.name == "resnet18"
    assert trial.recipe.epochs == 80 and trial.data.train is None
    assert attack_trial("bullseye-polytope", {"data": {"source": "digits"}}).scenario == "transfer"


def test_what_is_said_replaces_what_a_file_says(file: Path) -> None:
    trial: Any = attack_trial(str(file))
    assert trial.goals.count == 5 and trial.goals.correct and trial.pretraining.epochs == 7 and trial.arms == ()
    assert trial.attack.augment.shift == 2.0 and trial.attack.augment.flip == 0.5
    options = {"": {"seed": 3}, "goals": {"count": 2}, "recipe": {"epochs": 9}, "data": {"classes": ["3", "5"]}}
    changed: Any = attack_trial(str(file), options, ["steps=11", "xi=3/255", "augment.flip=0", "form = authors"])
    assert changed.seed == 3 and changed.goals.count == 2 and changed.goals.correct
    assert changed.pretraining.epochs == 9  # what surrogates are trained by in this scenario
    assert changed.data.train == 50 and changed.data.classes == ("3", "5")
    assert changed.attack.steps == 11 and changed.attack.xi == 3 / 255 and changed.attack.form == "authors"
    assert changed.attack.augment.shift == 2.0 and changed.attack.augment.flip == 0.0
    scratch: Any = attack_trial(str(file), {"": {"scenario": "scratch"}, "recipe": {"epochs": 9}})
    assert scratch.recipe.epochs == 9


def test_a_victim_that_does_not_augment_is_one_belief() -> None:
    digits = {"source": "digits"}
    trial: Any = attack_trial("gradient-matching", {"data": digits, "recipe": {"augment": False}})
    assert trial.recipe.augment is None and trial.attack.augment is None
    kept: Any = attack_trial(
        "gradient-matching", {"data": digits, "recipe": {"augment": False}}, ["augment={flip=0.5, shift=1}"]
    )
    assert kept.recipe.augment is None and kept.attack.augment.shift == 1.0


@pytest.mark.parametrize("name", [name for name in ATTACKS if ATTACKS[name].about.aim == "backdoor"])
def test_a_backdoor_gets_a_trigger_unasked(name: str) -> None:
    made = ATTACKS[name].about.makes_trigger
    trial: Any = attack_trial(name, {"data": {"source": "digits"}})
    if made:
        assert trial.goals.trigger.kind == "made"
    else:
        given = trial.goals.trigger
        assert (given.kind, given.size, given.place) == ATTACKS[name].about.trigger
        options = {"data": {"source": "digits"}, "trigger": {"kind": "white", "size": 3, "place": "corner"}}
        said: Any = attack_trial(name, options)
        assert (said.goals.trigger.kind, said.goals.trigger.size, said.goals.trigger.place) == ("white", 3, "corner")


@pytest.mark.parametrize(
    ("what", "options", "settings", "words"),
    [
        ("gradient-matchin", {}, [], "unknown attack 'gradient-matchin', did you mean 'gradient-matching'"),
        ("magic", {}, [], "unknown attack 'magic', choose one of"),
        ("mine.toml", {}, [], "no trial file or folder mine.toml"),
        ("some/where", {}, [], "no trial file or folder some/where"),
        ("gradient-matching", {}, [], "say which images are poisoned: --data"),
        ("gradient-matching", {"data": {"source": "x"}}, ["stepz=1"], "did you mean 'steps'"),
        ("gradient-matching", {"data": {"source": "x"}}, ["steps"], "is given as NAME=VALUE"),
        ("gradient-matching", {"data": {"source": "x"}}, ["=3"], "is given as NAME=VALUE"),
        ("gradient-matching", {"data": {"source": "x"}}, ["steps=many"], "steps is an int, not 'many'"),
        ("gradient-matching", {"data": {"source": "x"}}, ["xi=16"], "did you mean 16/255"),
        ("gradient-matching", {"data": {"source": "x"}, "trigger": {"kind": "white"}}, [], "attacks single images"),
        ("gradient-matching", {"data": {"source": "x"}, "": {"scenario": "transfr"}}, [], "did you mean 'transfer'"),
        ("gradient-matching", {"data": {"source": "x"}, "goals": {"keys": "odd"}}, [], "keys is one of"),
    ],
)
def test_mistakes_name_what_was_meant(what: str, options: Any, settings: list[str], words: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        attack_trial(what, options, settings)


def test_files_that_are_no_trials(tmp_path: Path) -> None:
    for content, words in (("a = ", "is not TOML"), ("attack = 3\n[data]\nsource = 'x'", "attack")):
        (tmp_path / "bad.toml").write_text(content)
        with pytest.raises((ValueError, TypeError), match=words):
            attack_trial(str(tmp_path / "bad.toml"))
