"""``friends train`` underneath: real digits, killed and resumed, used again, and every number where it belongs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from digit_folder import CLASSES, write_digits
from friends.bench import model_folder, training_run
from friends.bench.predicting import files_of, pixels, predict, write_csv
from friends.bench.training_plan import look_ahead
from friends.bench.training_settings import Training, divide, prepare, renumbered
from friends.bench.trial import ModelSpec
from friends.data.images import LabeledImages
from friends.defenses.friends import Friends
from friends.training.recipe import Recipe
from interrupting import Stop, stop_at

RECIPE = Recipe(epochs=6, lr=0.05, batch=32, augment=None)


@pytest.fixture(scope="module")
def folder(digits: LabeledImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(digits, tmp_path_factory.mktemp("data") / "mine")


def job(folder: Path, **given: Any) -> Training:
    chosen: dict[str, Any] = {
        "source": str(folder),
        "size": 24,
        "skip_broken": True,
        "model": ModelSpec(name="tiny", width=8),
        "recipe": RECIPE,
        "defense": Friends(def_epoch=2),
    }
    return Training(**{**chosen, **given})


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training."""
    out = tmp_path_factory.mktemp("finished") / "run"
    training = job(folder)
    training_run.train(training, prepare(training), out)
    return out


def measured(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


# ------------------------------------------------------------------------------------------------ training


def test_a_training_from_end_to_end(run: Path) -> None:
    assert sorted(file.name for file in run.iterdir()) == sorted(training_run.OURS)  # the checkpoint is gone
    found = measured(run)
    assert found["data"]["train"] == 240 and found["data"]["held out"] == 60
    assert found["data"]["classes"] == sorted(CLASSES)
    assert found["data"]["skipped"] == 1 and "zz-torn.png" in found["skipped"][0]
    assert found["measures"]["accuracy"] > 0.85
    assert [sum(row) for row in found["measures"]["confusion"]] == [20, 20, 20]
    assert [line["epoch"] for line in found["history"]] == [1, 2, 3, 4, 5, 6]
    assert found["history"][-1]["held-out accuracy"] == found["measures"]["accuracy"]
    assert "friendly noise seconds" in found["history"][2]
    about = json.loads((run / "model.json").read_text())
    assert about["shape"] == [1, 24, 24] and about["classes"] == sorted(CLASSES) and about["defended"]
    assert about["settings"]["defense"]["zeta"] == 16 / 255 and about["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("stop", [3, 17, 45])
def test_a_training_that_is_stopped_and_resumed_has_the_same_bytes(
    run: Path, folder: Path, tmp_path: Path, stop: int
) -> None:
    training, out = job(folder), tmp_path / "run"
    prepared = prepare(training)
    with pytest.raises(Stop):
        training_run.train(training, prepared, out, checkpoint_seconds=0, progress=stop_at(stop))
    assert training_run.finished(out) is None
    assert training_run.epochs_done(out) == (stop - 1) // 8
    training_run.train(training, prepared, out)
    assert (out / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert measured(out)["measures"] == measured(run)["measures"]


@pytest.mark.parametrize("moment", ["write_weights", "write_about"])
def test_a_training_that_is_stopped_between_its_last_files_ends_the_same(
    run: Path, folder: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, out = job(folder), tmp_path / "run"
    prepared = prepare(training)

    def stop(*_: object, **__: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(model_folder, moment, stop)
        with pytest.raises(Stop):
            training_run.train(training, prepared, out)
    assert training_run.finished(out) is None
    training_run.train(training, prepared, out)
    assert (out / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


COMMAND = """
import sys, torch
torch.set_num_threads(1)
from friends.cli import app
app(["train", sys.argv[1], "-o", sys.argv[2], "--size", "24", "--skip-broken", "--model", "alexnet", "--width", "2",
     "--epochs", "12", "--lr", "0.02", "--batch", "32", "--device", "cpu", "--threads", "1", "--def-epoch", "2"])
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_a_command_that_is_killed_and_given_again_ends_with_the_same_bytes_though_the_network_has_dropout(
    folder: Path, tmp_path: Path
) -> None:
    def start(out: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(folder), str(tmp_path / out)], stdout=subprocess.PIPE
        )

    assert start("whole").wait() == 0
    killed = start("killed")
    while not (tmp_path / "killed" / "checkpoint" / "checkpoint.safetensors").exists():
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert training_run.finished(tmp_path / "killed") is None
    assert start("killed").wait() == 0
    whole, again = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "killed"))
    assert whole == again


def test_seeds_and_defenses_make_different_models_of_the_same_start(run: Path, folder: Path, tmp_path: Path) -> None:
    bare = job(folder, defense=None)
    found = training_run.train(bare, prepare(bare), tmp_path / "bare")
    assert (tmp_path / "bare" / "model.safetensors").read_bytes() != (run / "model.safetensors").read_bytes()
    assert not found["defended"] and not json.loads((tmp_path / "bare" / "model.json").read_text())["defended"]
    assert found["data"]["train fingerprint"] == measured(run)["data"]["train fingerprint"]


def test_mixed_precision_trains(folder: Path, tmp_path: Path) -> None:
    training = job(folder, recipe=replace(RECIPE, epochs=2, precision="bfloat16"), defense=Friends(def_epoch=1))
    found = training_run.train(training, prepare(training), tmp_path / "run")
    assert found["history"][-1]["loss"] < found["history"][0]["loss"]
    tensors = model_folder.read(tmp_path / "run").network.state_dict().values()
    assert all(value.dtype == torch.float32 for value in tensors)


def test_the_global_generator_is_left_as_it_was(folder: Path, tmp_path: Path) -> None:
    training = job(folder, recipe=replace(RECIPE, epochs=1), defense=None, model=ModelSpec(name="alexnet", width=2))
    prepared, state = prepare(training), torch.get_rng_state()
    look_ahead(training, prepared)
    training_run.train(training, prepared, tmp_path / "run")
    assert torch.equal(state, torch.get_rng_state())


def test_other_settings_or_other_data_in_a_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    training, out = job(folder), tmp_path / "run"
    with pytest.raises(Stop):
        training_run.train(training, prepare(training), out, checkpoint_seconds=0, progress=stop_at(10))
    with pytest.raises(ValueError, match=r"holds a training with recipe\.lr 0\.05, here it is 0\.04: .* --fresh"):
        training_run.check(replace(training, recipe=replace(RECIPE, lr=0.04)), out)
    with pytest.raises(ValueError, match="holds a training with defense"):
        training_run.check(replace(training, defense=None), out)
    moved = tmp_path / "mine"
    shutil.copytree(folder, moved)
    next((moved / "one").iterdir()).unlink()
    with pytest.raises(ValueError, match="of another training: its data is"):
        training_run.train(training, prepare(replace(training, source=str(moved))), out)


def test_forgetting_deletes_only_what_is_ours(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "notes.txt").write_text("mine")
    training_run.forget(out)
    assert [file.name for file in out.iterdir()] == ["notes.txt"]
    training_run.forget(out)
    assert (out / "notes.txt").exists()


# ------------------------------------------------------------------------------------------------ which images


def test_a_part_with_the_same_share_of_every_class_is_held_out(digits: LabeledImages) -> None:
    some = digits.only_classes(["1", "3"]).rows(list(range(40)) + list(range(500, 510)))
    inside, outside = divide(some, 0.2, seed=0)
    assert torch.bincount(outside.y).tolist() == [8, 2] and torch.bincount(inside.y).tolist() == [32, 8]
    assert {x.numpy().tobytes() for x in (*inside.x, *outside.x)} == {x.numpy().tobytes() for x in some.x}
    assert divide(some, 0.2, seed=0)[1].fingerprint == outside.fingerprint != divide(some, 0.2, seed=1)[1].fingerprint
    assert torch.bincount(divide(some, 0.01, seed=0)[1].y).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"class '3' of .* has 1 image: two are needed"):
        divide(some.rows([*range(10), 40]), 0.2, seed=0)


def test_other_images_are_judged_on_by_the_names_of_their_classes(folder: Path, digits: LabeledImages) -> None:
    (only := folder.parent / "only" / "three").mkdir(parents=True, exist_ok=True)
    shutil.copy(next((folder / "three").glob("0*.png")), only)
    prepared = prepare(job(folder, test=str(only.parent)))
    assert len(prepared.train) == 300 and prepared.held_out.y.tolist() == [2] * len(list(only.iterdir()))
    assert prepared.held_out.classes == prepared.train.classes == ("one", "seven", "three")
    assert "the images of" in prepared.judged_on
    with pytest.raises(ValueError, match="class '0' of digits is none of those that are trained: one, seven, three"):
        renumbered(digits, prepared.train.classes)


def test_data_with_a_test_part_are_judged_on_it_unless_a_share_is_held_out(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "split" / "train")
    for name in CLASSES:
        (tmp_path / "split" / "test" / name).mkdir(parents=True)
        shutil.copy(sorted((folder / name).iterdir())[0], tmp_path / "split" / "test" / name)
    prepared = prepare(job(tmp_path / "split"))
    assert (len(prepared.train), len(prepared.held_out)) == (300, 3) and "test part" in prepared.judged_on
    prepared = prepare(job(tmp_path / "split", held_out=0.1))
    assert (len(prepared.train), len(prepared.held_out)) == (270, 30) and "10 %" in prepared.judged_on


def test_an_outlook_counts_parameters_and_grows_with_epochs_and_noise(folder: Path) -> None:
    training = job(folder)
    prepared = prepare(training)
    outlook = look_ahead(training, prepared)
    assert outlook.parameters == sum(p.numel() for p in torch.nn.ModuleList([_tiny(prepared.train)]).parameters())
    assert outlook.seconds() > outlook.seconds(3) > outlook.seconds(5) > 0
    assert outlook.bytes == 24 * 24 * (2 * 240 + 60)
    assert look_ahead(job(folder, defense=None), prepared).noise_seconds == 0 < outlook.noise_seconds


def _tiny(train: LabeledImages) -> nn.Module:
    from friends.models import build

    return build("tiny", shape=train.shape, classes=3, moments=train.moments, width=8, generator=torch.Generator())


# ------------------------------------------------------------------------------------------------ predicting


def test_predictions_are_those_of_the_model_called_directly(run: Path, folder: Path) -> None:
    saved = model_folder.read(run)
    files = sorted(folder.rglob("0*.png"))
    images = torch.stack([pixels(file, saved.shape) for file in files])  # type: ignore[arg-type]
    with torch.no_grad():
        wanted = saved.network(images.float() / 255).softmax(1)
    found = list(predict(saved, files, top=3))
    assert [one.path for one in found] == files
    for row, one in zip(wanted, found, strict=True):
        values, order = row.sort(descending=True)
        assert [name for name, _ in one.answers] == [saved.classes[k] for k in order]
        assert [p for _, p in one.answers] == pytest.approx(values.tolist(), abs=1e-5)


def test_predictions_for_the_held_out_images_have_the_accuracy_of_the_report(run: Path, folder: Path) -> None:
    prepared = prepare(job(folder))
    saved = model_folder.read(run)
    with torch.no_grad():
        answers = saved.network(prepared.held_out.pixels()).argmax(1)
    assert int((answers == prepared.held_out.y).sum()) == measured(run)["measures"]["right"]
    held = {x.numpy().tobytes(): int(y) for x, y in zip(prepared.held_out.x, prepared.held_out.y, strict=True)}
    right = 0
    for one in predict(saved, files_of([folder])):
        image = pixels(one.path, saved.shape)
        if not isinstance(image, str) and image.numpy().tobytes() in held:
            right += one.answers[0][0] == one.path.parent.name
    assert right == measured(run)["measures"]["right"]


def test_broken_files_are_reported_and_do_not_stop_the_others(run: Path, folder: Path, tmp_path: Path) -> None:
    saved = model_folder.read(run)
    (tmp_path / "text.png").write_text("no image")
    named = [tmp_path / "text.png", folder / "three"]
    found = list(predict(saved, files_of(named), top=2))
    assert len(found) == 102
    assert [one.path.name for one in found if one.error] == ["text.png", "zz-torn.png"]
    write_csv(found, tmp_path / "out.csv", top=2)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "path,class 1,probability 1,class 2,probability 2,error"
    assert len(lines) == 103 and lines[1].startswith(f"{tmp_path / 'text.png'},,,,,") and "not a readable" in lines[1]
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        files_of([tmp_path / "nowhere.png"])
    with pytest.raises(ValueError, match="--top is a number from 1 to 3, the model's classes, not 4"):
        predict(saved, [], top=4)


def test_coloured_images_become_grey_for_a_model_of_grey_ones(run: Path, folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    saved = model_folder.read(run)
    file = sorted((folder / "seven").glob("0*.png"))[0]
    red = Image.merge("RGB", [Image.open(file), Image.new("L", Image.open(file).size), Image.open(file)]).resize(
        (24, 24)
    )
    red.save(tmp_path / "coloured.png")
    red.convert("L").save(tmp_path / "grey.png")
    coloured, grey = predict(saved, [tmp_path / "coloured.png", tmp_path / "grey.png"])
    assert grey.answers == coloured.answers


# ------------------------------------------------------------------------------------------------ files that lie


@pytest.fixture
def forged(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "forged")
    return tmp_path / "forged"


def change(folder: Path, **values: object) -> None:
    about = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**about, **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "theirs"}, "is not of a model that friends train has made"),
        ({"shape": [1, 24]}, "is damaged"),
        ({"shape": [1, 10**9, 10**9]}, "is damaged"),
        ({"shape": [1, 24.5, 24]}, "is damaged"),
        ({"classes": "abc"}, "classes are a list"),
        ({"classes": ["a", "b"]}, "does not fit the network 'tiny'"),
        ({"model": {"name": "tiny", "width": 10**9}}, "is damaged"),
        ({"model": {"name": ["tiny"], "width": 8}}, "is damaged"),
        ({"model": {"name": "tinny", "width": 8}}, "unknown model 'tinny'"),
        ({"model": {"name": "convnet", "width": 8}}, "does not fit the network 'convnet'"),
        ({"weights": {"sha256": "0" * 64}}, "its sha256 is another"),
        ({"model": None}, "is damaged"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_model_folder_that_does_not_hold_together_is_refused(
    forged: Path, values: dict[str, object], message: str
) -> None:
    change(forged, **values)
    with pytest.raises(ValueError, match=message):
        model_folder.read(forged)


def test_missing_files_of_a_model_are_named(forged: Path, tmp_path: Path) -> None:
    (forged / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has model\.json, but no model\.safetensors"):
        model_folder.read(forged)
    (forged / "model.json").write_text("{torn")
    with pytest.raises(ValueError, match="is damaged"):
        model_folder.read(forged)
    (forged / "model.json").unlink()
    with pytest.raises(FileNotFoundError, match="name a folder that friends train has finished"):
        model_folder.read(forged)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        model_folder.read(tmp_path / "nowhere")


def test_a_model_folder_alone_runs_no_code(forged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil_nets.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    for name in ("evil_nets:make", "evil_nets.sub:make", "os:system", "timm.models:x"):
        change(forged, model={"name": name, "width": None})
        with pytest.raises(ValueError, match=f"would run here. If you trust it, say so: --model '{name}'"):
            model_folder.read(forged)
        with pytest.raises(ValueError, match="not 'evil_nets:other'"):
            model_folder.read(forged, model="evil_nets:other")
    assert not (tmp_path / "ran").exists() and "evil_nets" not in sys.modules


def test_a_model_of_ones_own_is_used_when_its_path_is_named_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n"
        "def make(num_classes): return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(24 * 24, num_classes))\n"
    )
    try:
        training = job(folder, model=ModelSpec(name="own_nets:make"), recipe=replace(RECIPE, lr=0.02))
        found = training_run.train(training, prepare(training), tmp_path / "run")
        assert found["measures"]["accuracy"] > 0.7
        saved = model_folder.read(tmp_path / "run", model="own_nets:make")
        said = list(predict(saved, sorted((folder / "one").glob("0*.png"))))
        assert sum(one.answers[0][0] == "one" for one in said) > 70
    finally:
        sys.modules.pop("own_nets", None)
    with pytest.raises(ValueError, match="would run here"):
        model_folder.read(tmp_path / "run")


OWN = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, k, outputs=None):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(24 * 24), nn.Linear(24 * 24, outputs or k)
    def forward(self, x): return self.head(self.norm(x.flatten(1)))
def make(num_classes): return Net(num_classes)
def wrong_head(num_classes): return Net(num_classes, 7)
def half(num_classes): return Net(num_classes).bfloat16()
def other_size(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(5, num_classes))
"""


@pytest.mark.parametrize(
    ("function", "batch", "message"),
    [
        ("wrong_head", 32, "returns 7 logits for 3 classes"),
        ("half", 32, "float32 is needed"),
        ("other_size", 32, r"fails on images \(1, 24, 24\): RuntimeError"),
        ("make", 239, "The last batch of every epoch has a single image: choose another --batch than 239"),
    ],
)
def test_networks_that_do_not_fit_are_found_out_before_any_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, batch: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd_nets.py").write_text(OWN)
    training = job(folder, model=ModelSpec(name=f"odd_nets:{function}"), recipe=replace(RECIPE, batch=batch))
    try:
        with pytest.raises(ValueError, match=message):
            look_ahead(training, prepare(training))
    finally:
        sys.modules.pop("odd_nets", None)
