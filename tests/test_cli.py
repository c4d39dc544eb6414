"""The command line as a user meets it: help, mistakes in one line, Ctrl-C, a real run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from friends.cli import app

runner = CliRunner()

TRIAL = """
scenario = "scratch"
[data]
source = "digits"
classes = ["3", "5"]
train = 100
test = 60
[model]
name = "tiny"
width = 8
[goals]
count = 1
[attack]
name = "gradient-matching"
xi = "64/255"
budget = 0.1
steps = 3
restarts = 1
augment = false
[recipe]
epochs = {epochs}
batch = 32
augment = false
[[arms]]
name = "friends-b"
  [[arms.defenses]]
  name = "friends"
  def_epoch = 1
"""


def plain(text: str) -> str:
    """Terminal output without its colours and line breaks."""
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", text))


def trial_file(folder: Path, epochs: int = 2) -> Path:
    file = folder / "mine.toml"
    file.write_text(TRIAL.replace("{epochs}", str(epochs)))
    return file


@pytest.mark.parametrize("command", [[], ["demo"], ["run"], ["noise"], ["attack"]])
def test_help_teaches(command: list[str]) -> None:
    out = runner.invoke(app, [*command, "--help"], env={"COLUMNS": "120", "NO_COLOR": "1"})
    assert out.exit_code == 0
    assert "friends" in out.stdout
    assert len(plain(out.stdout)) > 300


def test_version() -> None:
    out = runner.invoke(app, ["--version"])
    assert re.fullmatch(r"friends \d+\.\d+\.\d+", out.stdout.strip())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.toml"], "no trial file nowhere.toml"),
        (["run", "{trial}", "--device", "gpu"], "device 'gpu' cannot be used here"),
        (["run", "{trial}", "--threads", "-1"], "threads is a number >= 0"),
        (["noise", "digits"], "say where the store shall be made"),
        (["noise", "digitz", "-o", "{out}"], "digitz"),
        (["noise", "digits", "-o", "{out}", "--zeta", "16"], "16/255"),
        (["noise", "digits", "-o", "{out}", "--settings", "printed"], "printed"),
        (["noise", "digits", "-o", "{out}", "--model", "resnet81", "--epochs", "1"], "did you mean 'resnet18'"),
        (["noise", "digits", "-o", "{out}", "--weights", "none.safetensors"], "none.safetensors"),
        (["noise", "digits", "-o", "{out}", "--steps", "-1"], "steps >= 0"),
        (["noise", "digits", "-o", "{out}", "--zeta", "200/255"], "at most 127/255"),
        (["noise", "digits", "-o", "{out}", "--method", "newton"], "newton"),
        (["noise", "digits", "-o", "{out}", "--coding", "bit"], "unknown coding 'bit' of noise; choose one of int8"),
        (
            ["noise", "digits", "-o", "{out}", "--coding", "flips"],
            "the coding 'flips' keeps noise of the method 'flips'",
        ),
        (["noise", "digits", "-o", "{full}"], "not empty and no noise store"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    trial = trial_file(tmp_path)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("precious")
    given = [a.format(trial=trial, out=tmp_path / "store", full=full) for a in arguments]
    out = runner.invoke(app, given)
    assert out.exit_code == 2, out.output
    assert message in plain(out.stderr)
    assert "Traceback" not in out.output
    assert plain(out.stderr).startswith("error:")


def test_the_data_of_a_trial_can_be_ones_own(tmp_path: Path) -> None:
    arguments = ["run", str(trial_file(tmp_path)), "-o", str(tmp_path / "run"), "--device", "cpu"]
    out = runner.invoke(app, [*arguments, "--data", str(tmp_path / "nowhere")])
    assert out.exit_code == 2
    assert "nowhere" in plain(out.stderr)


def test_run_leaves_record_and_report_and_prints_the_table(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    out = runner.invoke(
        app, ["run", str(trial_file(tmp_path)), "-o", str(folder), "--device", "cpu"], env={"COLUMNS": "100"}
    )
    assert out.exit_code == 0, out.output
    assert "undefended" in plain(out.stdout).lower()
    assert "friends-b" in plain(out.stdout).lower()
    record = json.loads((folder / "record.json").read_text())
    assert [arm["name"] for arm in record["arms"]] == ["undefended", "friends-b", "clean"]
    assert (folder / "report.html").stat().st_size > 5_000
    again = runner.invoke(app, ["run", str(trial_file(tmp_path)), "-o", str(folder), "--device", "cpu"])
    assert "is finished" in plain(again.stdout)
    fresh = runner.invoke(app, ["run", str(trial_file(tmp_path)), "-o", str(folder), "--fresh", "--device", "cpu"])
    assert fresh.exit_code == 0
    assert json.loads((folder / "record.json").read_text())["started"] >= record["started"]


def test_noise_makes_a_store_with_a_proxy_and_describes_it(tmp_path: Path) -> None:
    from friends.noise.store import NoiseStore

    images = tmp_path / "images.npz"
    import numpy as np

    g = np.random.default_rng(0)
    y = np.arange(240) % 2
    x = (g.integers(0, 100, (240, 16, 16, 3)) + 120 * y[:, None, None, None]).astype(np.uint8)
    np.savez(images, x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    store = tmp_path / "store"
    arguments = ["noise", str(images), "-o", str(store), "--model", "convnet", "--width", "8", "--epochs", "8"]
    out = runner.invoke(app, [*arguments, "--steps", "3", "--zeta", "8/255", "--device", "cpu"], env={"COLUMNS": "120"})
    assert out.exit_code == 0, out.output
    made = NoiseStore.load(store)
    assert made.n == 240
    assert int(abs(made.tensor("cpu").short()).max()) <= 8
    assert not list(tmp_path.glob(".store*"))  # the proxy's training is gone
    told = runner.invoke(app, ["noise", str(store)], env={"COLUMNS": "120"})
    assert "8/255" in plain(told.stdout)
    assert "convnet" in plain(told.stdout)
    small = tmp_path / "small"
    arguments[3] = str(small)
    flips = ["--method", "flips", "--steps", "3", "--coding", "flips", "--device", "cpu"]
    out = runner.invoke(app, [*arguments, *flips], env={"COLUMNS": "120"})
    assert out.exit_code == 0, out.output
    assert "kl before coding" in plain(out.stdout)
    assert re.search(r"settings\W+flips, 3 steps, clean\|\|noisy\W", plain(out.stdout))
    assert set(NoiseStore.load(small).tensor().unique().tolist()) == {-16, 16}
    assert NoiseStore.load(small).info()["bytes_per_image"] < 48
    arguments[3] = str(store)
    other = runner.invoke(app, [*arguments, "--steps", "4", "--zeta", "8/255", "--device", "cpu"])
    assert other.exit_code == 2
    assert "steps" in plain(other.stderr)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_says_how_to_go_on_and_the_run_does(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "friends", "run", str(trial_file(tmp_path, epochs=4000)), "-o", str(folder)]
    command += ["--device", "cpu", "--threads", "1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background may have Ctrl-C ignored, which a child would inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(300):
        if (folder / "poisons").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "To go on: friends run" in plain(stderr)
    assert f"-o {folder}" in plain(stderr).replace("\n", "") or str(folder) in stderr.replace("\n", "")
    assert "Traceback" not in stderr
    assert (folder / "trial.json").exists()
    assert not (folder / "record.json").exists()


def test_noise_with_the_model_of_a_run_as_proxy(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = runner.invoke(app, ["run", str(trial_file(tmp_path)), "-o", str(folder), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    store = tmp_path / "store"
    weights = str(folder / "models" / "friends-b.safetensors")
    arguments = ["noise", "digits", "-o", str(store), "--weights", weights, "--steps", "1", "--device", "cpu"]
    out = runner.invoke(app, arguments, env={"COLUMNS": "120"})
    assert out.exit_code == 0, out.output
    assert "tiny from friends-b.safetensors" in plain(out.stdout)
    assert "3500" in plain(out.stdout).replace(",", "")
