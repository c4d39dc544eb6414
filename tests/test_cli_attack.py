"""`friends attack` as a user meets it: the catalogue, crafting, mistakes in one line, kills, a folder checked."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from friends.attacks import ATTACKS
from friends.bench.poison_folder import Manifest, verify
from friends.cli import app
from friends.data.files import owned
from test_cli import plain, trial_file

runner = CliRunner()

SMALL = ["--data", "digits", "--classes", "3,5", "--train", "80", "--test", "60", "--model", "tiny", "--width", "4",
         "--epochs", "2", "--lr", "0.05", "--batch", "32", "--no-augment", "--device", "cpu", "--set", "xi=64/255",
         "--set", "budget=0.05"]  # fmt: skip
MATCHING = ["gradient-matching", *SMALL, "--set", "steps=4", "--set", "restarts=2"]
KILLED = (
    "from friends.attacks import halfway; halfway.SECONDS = 0.0; import sys; from friends.cli import main; "
    "sys.argv[0] = 'friends'; main()"
)
"""The program, but for writing its state whenever it is offered."""


def said(arguments: list[str], columns: int = 120) -> Any:
    return runner.invoke(app, ["attack", *arguments], env={"COLUMNS": str(columns)})


@pytest.fixture(scope="module")
def crafted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "poisons"
    out = said([*MATCHING, "--goals", "2", "-o", str(folder)])
    assert out.exit_code == 0, out.output
    return folder


@pytest.mark.parametrize("arguments", [[], ["--list"], ["gradient-matching", "--list"]])
def test_the_catalogue(arguments: list[str]) -> None:
    out = said(arguments)
    assert out.exit_code == 0, out.output
    for name in ATTACKS:
        assert name in out.stdout
    assert "9.9 M" in out.stdout and "one image" in out.stdout
    narrow = said(arguments, 80)
    assert all(len(line) <= 80 for line in narrow.stdout.splitlines())
    for name in ATTACKS:
        assert name in narrow.stdout  # whole, to be copied


@pytest.mark.parametrize("name", ATTACKS)
def test_one_attack(name: str) -> None:
    out = said([name])
    assert out.exit_code == 0, out.output
    assert plain(ATTACKS[name].about.title) in plain(out.stdout)
    for field in fields(ATTACKS[name]):  # type: ignore[arg-type]
        assert field.name in out.stdout


def test_crafting_ends_with_a_table_of_what_was_crafted(crafted: Path, tmp_path: Path) -> None:
    out = said([*MATCHING, "--goals", "2", "-o", str(tmp_path / "again")])
    assert out.exit_code == 0, out.output
    text = plain(out.stdout)
    assert "gradient-matching: 2 of 2 goals" in text
    for entry in verify(crafted).goals:
        assert entry.goal in text and f"{entry.poisons} │ 64/255" in text
        assert f"{entry.score_first:.3g} → {entry.score_last:.3g}" in text
    assert [e.sha256 for e in verify(tmp_path / "again").goals] == [e.sha256 for e in verify(crafted).goals]


def test_the_same_command_leaves_finished_poisons_alone_and_fresh_crafts_anew(crafted: Path) -> None:
    before = Manifest.read(crafted)
    again = said([*MATCHING, "--goals", "2", "-o", str(crafted)])
    assert again.exit_code == 0 and "was finished" in plain(again.stdout)
    assert Manifest.read(crafted) == before
    fresh = said([*MATCHING, "--goals", "2", "-o", str(crafted), "--fresh"])
    assert fresh.exit_code == 0 and "was finished" not in plain(fresh.stdout)
    after = Manifest.read(crafted)
    assert after.seconds != before.seconds and [e.sha256 for e in after.goals] == [e.sha256 for e in before.goals]


def test_a_folder_is_described_and_checked(crafted: Path, tmp_path: Path) -> None:
    out = said([str(crafted)])
    assert out.exit_code == 0, out.output
    assert "gradient-matching: 2 of 2 goals" in plain(out.stdout) and "sizes and sha256 agree" in plain(out.stdout)
    assert "bound" not in plain(out.stdout)
    out = said([str(crafted), "--data", "digits", "--export", str(tmp_path / "pickles")])
    assert out.exit_code == 0, out.output
    assert "2 poisoned sets keep bound, budget and labels" in plain(out.stdout)
    assert (tmp_path / "pickles" / "goal-001" / "poisons.pickle").is_file()


def test_a_trial_file_is_crafted_without_its_victims(tmp_path: Path) -> None:
    out = said([str(trial_file(tmp_path)), "-o", str(tmp_path / "p"), "--set", "steps=2", "--device", "cpu",
                "--export", str(tmp_path / "pickles")])  # fmt: skip
    assert out.exit_code == 0, out.output
    settings = Manifest.read(tmp_path / "p").settings
    assert settings["attack"]["steps"] == 2 and settings["attack"]["budget"] == 0.1 and "arms" not in settings
    assert sorted(file.name for file in (tmp_path / "p").iterdir()) == ["goal-000.safetensors", "manifest.json"]
    assert (tmp_path / "pickles" / "goal-000" / "target.pickle").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gradient-matchin"], "did you mean 'gradient-matching'"),
        (["nowhere.toml", "-o", "{out}"], "no trial file or folder nowhere.toml"),
        (["gradient-matching", "-o", "{out}"], "say which images are poisoned: --data digits"),
        ([*MATCHING], "say where the poisons shall be saved"),
        ([*MATCHING, "-o", "{out}", "--set", "stepz=3"], "did you mean 'steps'"),
        ([*MATCHING, "-o", "{out}", "--set", "budget=5"], "did you mean 0.05?"),
        ([*MATCHING, "-o", "{out}", "--model", "resnet81"], "did you mean 'resnet18'"),
        ([*MATCHING, "-o", "{out}", "--data", "digitz"], "digitz"),
        ([*MATCHING, "-o", "{out}", "--data", "nowhere/at/all"], "nowhere/at/all"),
        ([*MATCHING, "-o", "{out}", "--classes", "3,x"], "unknown class 'x'"),
        ([*MATCHING, "-o", "{out}", "--wanted-class", "7"], "goals name class '7'"),
        ([*MATCHING, "-o", "{out}", "--keys", "standard"], "CIFAR-10"),
        ([*MATCHING, "-o", "{out}", "--keys", "standard", "--true-class", "3"], "keys goes with count alone"),
        ([*MATCHING, "-o", "{out}", "--goals", "0"], "at least one goal is needed"),
        ([*MATCHING, "-o", "{out}", "--scenario", "scrach"], "did you mean 'scratch'"),
        ([*MATCHING, "-o", "{out}", "--trigger", "white"], "attacks single images"),
        ([*MATCHING, "-o", "{out}", "--device", "gpu"], "device 'gpu' cannot be used here"),
        ([*MATCHING, "-o", "{full}"], "holds something else"),
        ([*MATCHING, "-o", "{out}", "--export", "{full}"], "is not empty: name another folder to export to"),
        (["{full}"], "is no folder of poisons: it has no manifest.json"),
        (["{full}", "-o", "{out}"], "is a folder of poisons; to craft, name an attack"),
        ([*MATCHING, "-o", "{crafted}", "--seed", "5"], "holds other poisons: its goals.count is 2, not 1"),
        ([*MATCHING, "-o", "{crafted}", "--goals", "2", "--seed", "5"], "holds other poisons: its seed is 0, not 5"),
        (["{crafted}", "--export", "{out}"], "to export poisons, say for which data they are"),
        (["{crafted}", "--data", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments: list[str], message: str, tmp_path: Path, crafted: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("precious")
    out = said([a.format(out=tmp_path / "out", full=full, crafted=crafted) for a in arguments])
    assert out.exit_code == 2, out.output
    assert message in plain(out.stderr)
    assert plain(out.stderr).startswith("error:") and len(out.stderr.strip().splitlines()) == 1
    assert "Traceback" not in out.output
    assert (full / "thesis.tex").read_text() == "precious"
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_other_data_than_the_poisons_are_for(crafted: Path, tmp_path: Path) -> None:
    import numpy as np

    y = np.repeat([0, 1], 60)
    x = np.random.default_rng(0).integers(0, 255, (120, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "other.npz", x_train=x, y_train=y, x_test=x, y_test=y, classes=np.array(["3", "5"]))
    out = said([str(crafted), "--data", str(tmp_path / "other.npz")])
    assert out.exit_code == 2
    assert "was made for other images than" in plain(out.stderr)


@pytest.mark.filterwarnings("default")
def test_an_attack_in_a_scenario_that_it_is_not_for_is_warned_of(tmp_path: Path) -> None:
    out = said([*MATCHING, "-o", str(tmp_path / "p"), "--scenario", "transfer"])
    assert out.exit_code == 0, out.output
    assert "warning: Gradient Matching (Witches' Brew) is meant for scratch, not transfer" in plain(out.stderr)


def test_an_attacks_name_is_not_taken_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert said([*MATCHING, "-o", "gradient-matching"]).exit_code == 0
    assert "1 of 1 goals" in plain(said(["./gradient-matching"]).stdout)


def test_a_second_process_in_the_folder_is_refused(crafted: Path) -> None:
    with owned(crafted):
        out = said([*MATCHING, "--goals", "2", "-o", str(crafted)])
    assert out.exit_code == 2
    assert "another process is working in" in plain(out.stderr)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_killed_in_a_crafting_it_goes_on_to_the_same_poisons(tmp_path: Path) -> None:
    """SIGKILL of a real process, once in the middle of a crafting; then the same command."""
    many = [*MATCHING, "--set", "steps=60", "--set", "restarts=1", "--goals", "2", "--threads", "1"]
    torn, whole = tmp_path / "torn", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, "-c", KILLED, "attack", *many, "-o", str(torn)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    wait_for(lambda: list((torn / "work" / "work").glob("crafting-*/craft.safetensors")), process)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert not Manifest.read(torn).finished
    half = said([str(torn)])
    assert half.exit_code == 0 and "not finished: the command that began it goes on with it" in plain(half.stdout)
    out = said([*many, "-o", str(torn)])
    assert out.exit_code == 0, out.output
    assert "resuming" in plain(out.stdout)
    assert said([*many, "-o", str(whole)]).exit_code == 0
    assert [content(file) for file in sorted(torn.glob("*.safetensors"))] == [
        content(file) for file in sorted(whole.glob("*.safetensors"))
    ]
    assert not (torn / "work").exists()


def wait_for(ready: Any, process: subprocess.Popen[bytes]) -> None:
    for _ in range(6000):
        if ready():
            return
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    raise AssertionError("it never got there")


def content(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_manifest_can_be_read_by_anyone(crafted: Path) -> None:
    plain_values = json.loads((crafted / "manifest.json").read_text())
    assert plain_values["attack"] == "gradient-matching"
    for entry in plain_values["goals"]:
        assert content(crafted / entry["file"]) == entry["sha256"]
