"""The page in a real browser, on a phone and on a desk: no error, no sideways scrolling, every image there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import report_samples as samples

from browsing import CONTRAST, look_at
from friends.bench.report import render
from friends.data.images import LabeledImages

pytestmark = pytest.mark.browser

SIZES = {"phone": (390, 844, True), "small phone": (360, 740, True), "desk": (1280, 900, False)}


def show(browser: Any, path: Path, size: str, *, dark: bool = False) -> None:
    look_at(browser, SIZES[size], dark=dark)
    browser.get(path.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")


@pytest.fixture(params=["digits", "hostile"])
def shown(request: pytest.FixtureRequest, tmp_path: Path, digits: LabeledImages) -> Path:
    """A usual page, and one whose names are long and hostile, with photos."""
    if request.param == "digits":
        return render(samples.report(), samples.exhibit(digits), tmp_path / "report.html")
    name = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">" + "x" * 80
    goals = tuple({"name": name, "y_true": name, "y_wanted": "\u202efrog"} for _ in range(8))
    report = samples.report(goals=goals, name=name, trial={name: name})
    return render(report, samples.exhibit_of(*samples.photos()), tmp_path / "report.html")


@pytest.mark.parametrize("size", SIZES)
def test_the_page_works_at_every_width(browser: Any, shown: Path, size: str) -> None:
    show(browser, shown, size)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return innerWidth") == SIZES[size][0]
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    widths = browser.execute_script("return [...document.images].map(i => i.complete ? i.naturalWidth : 0)")
    assert len(widths) > 30
    assert min(widths) > 0
    text = browser.find_element("tag name", "body").text.replace("\u202f", " ")
    for number in ("7 of 8 targets", "2/8", "53–98 %", "96.9 %", "64/255"):
        assert number in text, number
    assert "owned" not in browser.title.split("<")[0]
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith("data:") for name in fetched)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, shown: Path, dark: bool) -> None:
    show(browser, shown, "desk", dark=dark)
    ratios = browser.execute_script(CONTRAST)
    assert len(ratios) > 50
    worst = min(ratios, key=lambda pair: pair[0])
    assert worst[0] >= 4.5, worst


def test_both_schemes_differ(browser: Any, tmp_path: Path) -> None:
    path = render(samples.report(), None, tmp_path / "report.html")
    grounds: set[str] = set()
    for dark in (False, True):
        show(browser, path, "phone", dark=dark)
        grounds.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
