"""``friends export`` on the command line, and the commands of its documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from digit_folder import write_digits
from friends.cli import app
from friends.data.images import LabeledImages
from friends.data.sources import load
from friends.noise.store import NoiseStore

runner = CliRunner()
DOCS = Path(__file__).resolve().parents[1] / "docs" / "export.md"
QUICK = ["--model", "tiny", "--width", "8", "--epochs", "8", "--lr", "0.05", "--steps", "2", "--device", "cpu"]


def said(*arguments: str, code: int = 0) -> str:
    """What the command prints, in one line."""
    result = runner.invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_the_commands_of_the_documentation_run(
    digits: LabeledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command in a block marked ``bash``, in order; then the Python, which finds the images with their noise."""
    monkeypatch.chdir(tmp_path)
    write_digits(digits, Path("photos"), 60)
    next(Path("photos").rglob("zz-torn.png")).unlink()
    page = DOCS.read_text(encoding="utf-8")
    commands = [line.split("#")[0].split()[1:] for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
                for line in block.splitlines()]  # fmt: skip
    assert len(commands) >= 5
    for command in commands:
        said(*command, *(QUICK if command[0] == "noise" else []))
    here: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "docs/export.md", "exec"), here)
    clean, store = load("photos", size=32)[0], NoiseStore.load("noise")
    noisy = (clean.x.int() + store.tensor()).clamp(0, 255).to(torch.uint8)
    for name in ("train", "same", "also"):
        assert torch.equal(here[name].x, noisy)  # type: ignore[attr-defined]
    assert here["bernoulli"].shape == here["gaussian"].shape == noisy.shape  # type: ignore[attr-defined]
    text = said("export", "photos", "--noise", "noise", "--size", "32", "-o", "again", "--dry-run")
    for words in ("train 48 images, with friendly noise", "test 12 images, unchanged", "noise at most 16/255, seed 0",
                  "60 files (png); about", "bytes to write to again", "nothing was written"):  # fmt: skip
        assert words in text
    assert not Path("again").exists()
    text = said("export", "photos", "--noise", "noise", "-o", "again", code=2)
    assert text.startswith("error:") and "pass size= (--size)" in text
    assert "holds a finished export" in said(
        "export", "photos", "--noise", "noise", "--size", "32", "-o", "noisy", code=2
    )
