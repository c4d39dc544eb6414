"""The page of a training says what was measured, needs nothing but itself, and cannot be written into by a class."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from test_report import Page

from browsing import CONTRAST, look_at
from digit_folder import write_digits
from friends.bench import training_run
from friends.bench.training_report import caveats, confusions, headline, render, summary
from friends.bench.training_settings import Training, prepare
from friends.bench.trial import ModelSpec
from friends.data.images import LabeledImages
from friends.defenses.friends import Friends
from friends.training.recipe import Recipe

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">" + "x" * 80
SIZES = {"phone": (390, 844, True), "small phone": (360, 740, True), "desk": (1280, 900, False)}


@pytest.fixture(scope="module")
def run(digits: LabeledImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_digits(digits, tmp_path_factory.mktemp("data") / "mine", 150)
    recipe = Recipe(epochs=4, lr=0.05, batch=32, augment=None)
    training = Training(source=str(folder), size=24, skip_broken=True, model=ModelSpec(name="tiny", width=8),
                        recipe=recipe, defense=Friends(def_epoch=1))  # fmt: skip
    out = tmp_path_factory.mktemp("model") / "run"
    training_run.train(training, prepare(training), out)
    return out


@pytest.fixture
def found(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


def hostile(found: dict[str, Any], classes: int = 3) -> dict[str, Any]:
    """The same numbers with names that attack the page."""
    changed = copy.deepcopy(found)
    changed["data"]["name"] = changed["settings"]["source"] = HOSTILE
    changed["skipped"] = [HOSTILE] * 60
    measures = changed["measures"]
    measures["classes"] = [{**measures["classes"][k % 3], "name": f"{HOSTILE}\u202e{k}"} for k in range(classes)]
    measures["confusion"] = [[7] * classes for _ in range(classes)]
    changed["data"]["classes"] = [one["name"] for one in measures["classes"]]
    return changed


def test_the_page_has_the_numbers(run: Path, found: dict[str, Any]) -> None:
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    text, measures = page.text.replace("\u202f", " "), found["measures"]
    assert headline(found) in text
    assert f"right on {measures['right']} of 30 images" in text
    for one in measures["classes"]:
        assert f"{one['name']} {one['images']} {100 * one['precision']:.1f} % {100 * one['recall']:.1f} %" in text
    assert f"{100 * measures['ece']:.1f} % how far" in text
    for row in measures["confusion"]:
        assert " ".join(map(str, row)) in text
    for one in measures["bins"]:
        assert f"{one['answers']} {100 * one['confidence']:.1f} % {100 * one['accuracy']:.1f} %" in text
    assert "zz-torn.png" in text and "1 image file could not be read and was left out" in text
    assert "16/255" in text and "Few images: with 30" in text
    assert len(page.all("svg")) == 7  # accuracy, three recalls, calibration, two curves


def test_the_page_asks_for_nothing_and_runs_nothing(run: Path, found: dict[str, Any], tmp_path: Path) -> None:
    for file in (run / "report.html", render(hostile(found), tmp_path / "page.html")):
        page = Page(file.read_text(encoding="utf-8"))
        assert not page.all("script") and not page.all("img")
        assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
        policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
        assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_many_classes_have_their_commonest_confusions_and_no_matrix(found: dict[str, Any], tmp_path: Path) -> None:
    many = hostile(found, classes=40)
    many["measures"]["confusion"][3][5] = 99
    text = Page(render(many, tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "All 40 classes" in text and "The first 50 of 60" in text
    assert "True class" not in text and "99, 26.6" in text


def test_mistakes_are_counted_from_the_commonest() -> None:
    assert confusions([[8, 2, 0], [0, 5, 0], [3, 1, 0]], "abc") == [
        ("c", "a", 3, "75.0\u202f%"), ("a", "b", 2, "20.0\u202f%"), ("c", "b", 1, "25.0\u202f%")]  # fmt: skip
    assert confusions([[8, 0], [0, 5]], "ab") == []


def test_it_says_when_a_model_is_too_sure_and_what_was_not_judged(found: dict[str, Any]) -> None:
    sure = copy.deepcopy(found)
    sure["measures"]["accuracy"] = 0.5
    sure["measures"]["bins"] = [{"answers": 30, "confidence": 0.9}]
    assert "too sure of itself" in summary(sure)
    sure["measures"]["accuracy"] = 0.95
    assert "not sure enough" in summary(sure)
    sure["measures"]["accuracy"] = 0.901
    assert "as sure as it is right" in summary(sure)
    sure["measures"]["classes"][0] |= {"images": 0, "recall": None}
    sure["measures"]["classes"][1] |= {"answers": 0, "precision": None}
    sure["defended"] = False
    said = " ".join(caveats(sure))
    assert "No image to judge on: one." in said and "Never the answer: seven." in said
    assert "No defense was in force" in said


@pytest.mark.browser
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["digits", "hostile"])
def test_the_page_works_at_every_width(
    browser: Any, run: Path, found: dict[str, Any], tmp_path: Path, kind: str, size: str
) -> None:
    path = run / "report.html" if kind == "digits" else render(hostile(found), tmp_path / "page.html")
    for dark in (False, True):
        look_at(browser, SIZES[size], dark=dark)
        browser.get(path.as_uri())
        browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.get_log("browser") == []
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert "owned" not in browser.title.split("<")[0]
        fetched = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert all(name.startswith("data:") for name in fetched)
        worst = min(browser.execute_script(CONTRAST), key=lambda pair: pair[0])
        assert worst[0] >= 4.5, worst
