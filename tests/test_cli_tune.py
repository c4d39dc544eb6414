"""``friends tune`` as a user meets it: a dry run, a real one, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from friends.bench import tuning, tuning_plan
from friends.bench.tuning_attack import Mock
from friends.cli_tune import grey_levels, numbers, tune
from friends.data.images import LabeledImages

runner = CliRunner()
app = typer.Typer()
app.command("tune")(tune)

QUICK = ["--model", "tiny", "--width", "8", "--epochs", "8", "--lr", "0.05", "--batch", "32", "--no-augment",
         "--device", "cpu", "--zeta", "0", "--mu", "8,64", "--kinds", "bernoulli", "--rungs", "1", "--seeds", "1",
         "--accuracy-drop", "0.2"]  # fmt: skip


@pytest.fixture
def source(few_digits: LabeledImages, tmp_path: Path) -> str:
    file = tmp_path / "few.npz"
    x, y = few_digits.x.numpy(), few_digits.y.numpy()
    np.savez(file, x_train=x, y_train=y, x_test=x, y_test=y)
    return str(file)


def said(*arguments: str, code: int = 0) -> str:
    """What the command prints, in one line."""
    result = runner.invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_a_dry_run_shows_candidates_rungs_and_time(source: str, tmp_path: Path) -> None:
    text = said(source, *QUICK, "--dry-run", "-o", str(tmp_path / "run"))
    assert "zeta 0, mu 8/255 bernoulli" in text
    assert "zeta 0, mu 64/255 bernoulli" in text
    assert "240" in text
    assert "about" in text
    assert "nothing was started" in text
    assert not (tmp_path / "run").exists()


def test_a_tuning_from_end_to_end(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "LADDER", (Mock(kind="stamp", xi=128, share=0.6),))
    monkeypatch.setattr(tuning_plan, "AGAIN", 1)
    out = tmp_path / "run"
    text = said(source, *QUICK, "-o", str(out))
    found = json.loads((out / "tuning.json").read_text())
    assert found["attacks tried"][0]["works"]
    assert "The attack works without a defense" in text
    assert "one training each, which says nothing of others" in text  # a single seed claims nothing
    assert found["python"] in text
    assert found["chosen"]["mu"] in (8, 64)
    assert "With new seeds and goals" in (out / "tuning.md").read_text()
    again = said(source, *QUICK, "-o", str(out))  # everything is there: nothing is trained
    assert again == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--zeta", "32:8"], "--zeta 32:8 is reversed: write 8:32"),
        (["--mu", "8,sixteen"], "--mu is a list such as 8,16,32 or a range such as 8:32, not '8,sixteen'"),
        (["--mu", "0.06"], "--mu is in whole grey levels of 255, 0 to 127, not 0.06; did you mean 15.3?"),
        (["--zeta", "200"], "0 to 127, not 200"),
        (["--noise-lr", "100:10"], "--noise-lr 100:10 is reversed"),
        (["--penalty", "-1"], "--penalty has numbers above 0"),
        (["--kinds", "laplace"], "laplace"),
        (["--model", "tinny"], "unknown model 'tinny'; did you mean 'tiny'?"),
        (["--candidates", "0"], "candidates is a number >= 1, not 0"),
        (["--seeds", "0"], "seeds is a number >= 1, not 0"),
        (["--minutes", "-1"], "minutes is a number > 0"),
        (["--zeta", "0", "--mu", "0"], "no candidate"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_mistake_is_one_line(source: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    text = said(source, *QUICK, *arguments, "-o", str(tmp_path / "run"), code=2)
    assert message in text
    assert text.startswith("error:")
    assert not (tmp_path / "run").exists()


def test_data_of_which_too_little_is_there_are_refused(few_digits: LabeledImages, tmp_path: Path) -> None:
    file = tmp_path / "few.npz"
    rows = few_digits.rows(list(range(0, 300, 10)))
    x, y = rows.x.numpy(), rows.y.numpy()
    np.savez(file, x_train=x, y_train=y, x_test=x, y_test=y)
    assert "training images: tuning needs 20 of every class" in said(str(file), *QUICK, code=2)


def test_ranges_double() -> None:
    assert grey_levels("zeta", "8:32") == (8, 16, 32)
    assert grey_levels("zeta", "8:40") == (8, 16, 32, 40)
    assert grey_levels("zeta", "0,8/255,16/255") == (0, 8, 16)
    assert grey_levels("mu", "0") == (0,)
    assert numbers("penalty", "0.5:2") == (0.5, 1.0, 2.0)
    with pytest.raises(ValueError, match="cannot start at 0"):
        numbers("penalty", "0:2")
