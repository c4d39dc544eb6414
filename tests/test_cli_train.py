"""``friends train`` and ``friends predict`` as a user meets them: a dry run, a real one, and mistakes in one line."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from digit_folder import write_digits
from friends.cli_train import predict, train
from friends.data.images import LabeledImages

runner = CliRunner()
app = typer.Typer()
app.command("train")(train)
app.command("predict")(predict)

QUICK = ["--model", "tiny", "--width", "8", "--epochs", "3", "--lr", "0.05", "--batch", "32", "--device", "cpu"]
MENDED = [*QUICK, "--size", "24", "--skip-broken"]
DOCS = Path(__file__).resolve().parents[1] / "docs" / "train.md"


@pytest.fixture(scope="module")
def folder(digits: LabeledImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(digits, tmp_path_factory.mktemp("data") / "mine", 150)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "run"
    said("train", str(folder), *MENDED, "-o", str(out))
    return out


def said(*arguments: str, code: int = 0) -> str:
    """What the command prints, in one line."""
    result = runner.invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("\u202f", " ").split())


def test_a_dry_run_says_what_it_would_do_and_for_how_long(folder: Path, tmp_path: Path) -> None:
    text = said("train", str(folder), *MENDED, "--dry-run", "-o", str(tmp_path / "run"))
    for words in (
        "120 images of mine, grey, 24x24, 3 classes",
        "judged on 30 images: 20 % of the training images, held out",
        "tiny, 1,683 parameters",
        "3 epochs, batch 32, lr 0.05, auto precision",
        "FRIENDS, zeta 16/255, mu 16/255 bernoulli, friendly noise at the start of epoch 1",
        "skipped 1 image that cannot be read:",
        "zz-torn.png is not a readable image",
        "nothing was started",
    ):
        assert words in text, words
    assert re.search(r"time about [\d.]+ (s|min) on this device; [\d.]+ MB of images and noise", text)
    assert not (tmp_path / "run").exists()


def test_training_says_what_came_out_and_does_it_once(folder: Path, run: Path) -> None:
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    text = said("train", str(folder), *MENDED, "-o", str(run))
    assert "is finished; --fresh trains it again" in text
    assert f"use friends predict {run} IMAGES..." in text
    found = json.loads((run / "metrics.json").read_text())["measures"]
    assert f"the model is right on {found['right']} of 30 images" in text
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_other_settings_want_a_fresh_start_and_mistakes_with_it_delete_nothing(
    folder: Path, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    bare = ["train", str(folder), *MENDED, "--undefended", "-o", str(out)]
    assert "holds a training with defense" in said(*bare, code=2)
    assert "there is no file or folder" not in said("predict", str(out), str(folder / "one"))
    said(*bare, "--fresh", "--model", "tinny", code=2)
    assert (out / "model.json").exists()
    text = said(*bare, "--fresh")
    assert "none: --undefended" in text and "Trained without a defense" in text
    assert not json.loads((out / "model.json").read_text())["defended"]


def test_predicting_prints_classes_and_probabilities_and_reports_broken_files(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    file = sorted((folder / "seven").glob("0*.png"))[0]
    text = said("predict", str(run), str(file), "--top", "3")
    assert text.startswith(str(file)) and len(re.findall(r"(one|three|seven) \d+\.\d %", text)) == 3
    text = said("predict", str(run), str(folder), "--csv", str(tmp_path / "out.csv"), code=1)
    assert text.count(".png") >= 151 and "not read: " in text
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert len(lines) == 152 and lines[0] == "path,class 1,probability 1,error"


def test_names_in_files_cannot_command_the_terminal(run: Path, folder: Path, tmp_path: Path) -> None:
    name = tmp_path / "a\x1b[31m[bold]red.png"
    Image.new("L", (9, 9)).save(name)
    result = runner.invoke(app, ["predict", str(run), str(name)])
    assert result.exit_code == 0
    assert "\x1b" not in result.output and "[bold]red" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "24"], "zz-torn.png is not a readable image"),
        (["--size", "24"], "leave out all broken images with --skip-broken"),
        (["--skip-broken"], "images differ in size"),
        (["--skip-broken"], "(--size)"),
        (["--skip-broken", "--size", "0"], "--size is a number of pixels >= 1, not 0"),
        (["--held-out", "20"], "--held-out is a share between 0 and 1, not 20; did you mean 0.2?"),
        (["--held-out", "0.1", "--test", "digits"], "contradict each other"),
        (["--epochs", "0"], "--epochs is a number >= 1, not 0"),
        (["--batch", "0"], "batch >= 1"),
        (["--lr", "-1"], "lr > 0"),
        (["--precision", "float16"], "precision is one of auto, float32, bfloat16, not 'float16'"),
        (["--zeta", "many"], "zeta is a number such as 0.1 or \"16/255\", not 'many'"),
        (["--zeta", "16"], "zeta"),
        (["--zeta", "0", "--mu", "0"], "no defense: say --undefended if that is meant"),
        (["--random", "laplace"], "random is one of bernoulli, uniform, gaussian"),
        (["--settings", "papr"], "did you mean 'paper'?"),
        (["--def-epoch", "9"], "friendly noise would be made at epoch 9, but training ends after 3"),
        (["--model", "tinny"], "unknown model 'tinny'; did you mean 'tiny'?"),
        (["--model", "nowhere:make"], "width is for networks of ours"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_mistake_is_one_line(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    text = said("train", str(folder), *QUICK, *arguments, "-o", str(tmp_path / "run"), code=2)
    assert message in text
    assert text.startswith("error:") and text.count("error:") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/at/all", "no file or folder nowhere/at/all"),
        ("cifar11", "unknown data 'cifar11', did you mean 'cifar10'?"),
    ],
)
def test_data_that_are_not_there_are_one_line(source: str, message: str, tmp_path: Path) -> None:
    assert message in said("train", source, *QUICK, "-o", str(tmp_path / "run"), code=2)


def test_data_with_one_class_or_a_class_of_one_image_are_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one", tmp_path / "mine" / "one")
    arguments = [str(tmp_path / "mine"), *MENDED, "-o", str(tmp_path / "run")]
    assert "has one class, 'one': there is nothing to tell apart" in said("train", *arguments, code=2)
    (tmp_path / "mine" / "seven").mkdir()
    assert "class 'seven'" in said("train", *arguments, code=2)
    shutil.copy(sorted((folder / "seven").iterdir())[0], tmp_path / "mine" / "seven")
    assert "class 'seven' of mine has 1 image: two are needed" in said("train", *arguments, code=2)


def test_a_folder_with_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for options in ([], ["--fresh"]):
        text = said("train", str(folder), *MENDED, *options, "-o", str(tmp_path), code=2)
        assert "holds something else: choose another folder with --out" in text
    assert "is a file" in said("train", str(folder), *MENDED, "-o", str(tmp_path / "notes.txt"), code=2)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "x.png"], "there is no folder nowhere"),
        (["RUN", "nowhere.png"], "there is no file or folder nowhere.png"),
        (["RUN", "EMPTY"], "has no image file"),
        (["RUN", "IMAGES", "--top", "4"], "--top is a number from 1 to 3"),
        (["RUN", "IMAGES", "--model", "nets:make"], "is 'tiny', not 'nets:make'"),
        (["EMPTY", "IMAGES"], "has no model.json: name a folder that friends train has finished"),
    ],
)
def test_a_mistake_in_predicting_is_one_line(
    run: Path, folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    known = {"RUN": str(run), "IMAGES": str(folder / "one"), "EMPTY": str(tmp_path)}
    text = said("predict", *(known.get(word, word) for word in arguments), code=2)
    assert message in text and text.startswith("error:")


def test_the_commands_of_the_documentation_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command in a block marked ``bash``, in order, on small data and with a small network."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "photos")
    for name in ("one", "seven"):
        for day, file in zip(("monday", "tuesday"), sorted((folder / name).glob("0*.png")), strict=False):
            shutil.copy(file, f"photos/{name}/{day}.png")
    shutil.copy("photos/one/monday.png", "some.png")
    page = DOCS.read_text(encoding="utf-8")
    for name, text in re.findall(r"`(\w+\.(?:py|csv))`:\n\n```\w+\n(.*?)```", page, flags=re.DOTALL):
        Path(name).write_text(text)
    commands = [
        line.split("#")[0].split()[1:]
        for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(commands) >= 8
    for command in commands:
        small = [] if ":" in " ".join(command) else ["--width", "8"]
        small += [] if "--model" in command else ["--model", "tiny"]
        quick = ["--epochs", "2", "--lr", "0.01", "--batch", "32", "--device", "cpu", *small]
        result = runner.invoke(app, [*command, *(quick if command[0] == "train" else [])])
        assert result.exit_code == 0, (command, result.output)
    sys.modules.pop("my_nets", None)
    python = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[-1]
    exec(compile(python, "docs/train.md", "exec"), {})
    assert "some.png (('" in capsys.readouterr().out
