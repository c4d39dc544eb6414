"""The site in a real browser, opened as a file: sorting, filtering, links, keyboard, phone, dark, without a script."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import record_samples as samples

from browsing import CONTRAST, look_at
from friends.bench.grid.record import append
from friends.bench.grid.site import write_site

pytestmark = pytest.mark.browser

SIZES = {"phone": (360, 740, True), "desk": (1280, 900, False)}
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">" + "x" * 80


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two usual grids, a figure, and one grid whose names are long and hostile."""
    place = tmp_path_factory.mktemp("grids")
    names: dict[str, Any] = {"grid": "own", "preset": "", "goal_name": HOSTILE, "device": HOSTILE}
    hostile = [
        samples.record(row, labels={axis: HOSTILE}, scaled_down=HOSTILE, **names)
        for axis in ("__proto__",)
        for row in ("undefended", HOSTILE)
    ]
    few = [samples.record("few", grid="table1", removed=(700, 10, 500))]
    parts = {"one": [*samples.table1(seeds=20), *few], "three": samples.table3(seeds=4, preset="smoke"), "own": hostile}
    for name, records in parts.items():
        append(place / name / "records.jsonl", records)
    (place / "one" / "figures").mkdir()
    drawing = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 300" width="900" height="300"/>'
    (place / "one" / "figures" / "costs.svg").write_text(drawing)
    return write_site([place / name for name in parts], place / "site")


def show(browser: Any, page: Path | str, size: str = "desk", *, dark: bool = False) -> None:
    look_at(browser, SIZES[size], dark=dark)
    browser.get("about:blank")  # else a change of the hash alone would load nothing
    browser.get(page if isinstance(page, str) else page.as_uri())


def visible(browser: Any, table: str = "table1-paper", column: int = 0) -> list[str]:
    """What stands in a column of the rows that are shown."""
    script = """return [...document.querySelectorAll(`table[data-name='${arguments[0]}'] tbody tr`)]
      .filter(row => row.offsetParent !== null).map(row => row.cells[arguments[1]].innerText.split('\\n')[0]);"""
    return [text.replace("\u202f", " ") for text in browser.execute_script(script, table, column)]


def head(browser: Any, key: str, table: str = "table1-paper") -> Any:
    return browser.find_element("css selector", f"table[data-name='{table}'] th[data-key='{key}']")


def wait(browser: Any, condition: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 5).until(lambda b: b.execute_script(f"return {condition}"))


def test_sorting_by_click_and_by_key(browser: Any, site: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    show(browser, site)
    order = visible(browser)
    assert order == ["undefended", "clean", "friends-b", "deep-knn", "epic-0.1", "few"]
    button = head(browser, "success").find_element("tag name", "button")
    button.click()
    assert visible(browser) == ["clean", "epic-0.1", "few", "friends-b", "undefended", "deep-knn"]
    assert head(browser, "success").get_attribute("aria-sort") == "ascending"
    wait(browser, "document.getElementById('said').textContent.endsWith('sorted by Success, ascending')")
    button.send_keys(Keys.ENTER)
    assert visible(browser) == ["undefended", "deep-knn", "friends-b", "clean", "epic-0.1", "few"]
    assert head(browser, "success").get_attribute("aria-sort") == "descending"
    head(browser, "p").find_element("tag name", "button").send_keys(Keys.SPACE)
    assert head(browser, "success").get_attribute("aria-sort") is None
    ordered = visible(browser)  # the test of one pair says nothing: p is 1; what has no p comes last
    assert ordered[0] in ("epic-0.1", "friends-b")
    assert ordered[-2:] == ["undefended", "clean"]
    for _ in range(2):
        head(browser, "p").find_element("tag name", "button").click()
    assert visible(browser) == order
    assert browser.get_log("browser") == []


def test_numbers_in_labels_sort_as_numbers(browser: Any, site: Path) -> None:
    show(browser, site)
    head(browser, "axis attack", "table3-smoke").find_element("tag name", "button").click()
    labels = visible(browser, "table3-smoke", 1)
    assert labels == sorted(labels, key=lambda text: int(text.rsplit("-", 1)[1]))
    assert labels[0].endswith("-8")


def test_filters_count_and_live_in_the_address(browser: Any, site: Path) -> None:
    from selenium.webdriver.support.ui import Select

    show(browser, site)
    assert browser.find_element("id", "shown").text == "All 12 rows are shown."
    browser.find_element("name", "q").send_keys("FRIENDS")
    wait(browser, "document.getElementById('shown').value === '3 of 12 rows are shown.'")
    assert visible(browser) == ["friends-b"]
    assert browser.find_element("id", "none-own").is_displayed()
    assert not browser.find_element("css selector", "table[data-name='own']").is_displayed()
    Select(browser.find_element("name", "at.attack")).select_by_visible_text("gradient-matching-16")
    wait(browser, "document.getElementById('shown').value === '1 of 12 rows are shown.'")
    head(browser, "success", "table3-smoke").find_element("tag name", "button").click()
    address = browser.current_url
    assert address.endswith("#q=FRIENDS&at.attack=gradient-matching-16&sort.table3-smoke=ascending+success")
    show(browser, address)  # the link alone brings the view back
    assert browser.find_element("id", "shown").text == "1 of 12 rows are shown."
    assert browser.find_element("name", "q").get_attribute("value") == "FRIENDS"
    assert head(browser, "success", "table3-smoke").get_attribute("aria-sort") == "ascending"
    assert visible(browser, "table3-smoke", 1) == ["gradient-matching-16"]
    browser.find_element("css selector", "#filters button[type=reset]").click()
    wait(browser, "document.getElementById('shown').value === 'All 12 rows are shown.'")
    assert "q=" not in browser.current_url


def test_the_other_filters(browser: Any, site: Path) -> None:
    from selenium.webdriver.support.ui import Select

    show(browser, site)
    Select(browser.find_element("name", "preset")).select_by_visible_text("smoke")
    wait(browser, "document.getElementById('shown').value === '4 of 12 rows are shown.'")
    Select(browser.find_element("name", "preset")).select_by_visible_text("all")
    browser.find_element("name", "least").send_keys("5")
    wait(browser, "document.getElementById('shown').value === '5 of 12 rows are shown.'")
    assert "few" not in visible(browser)
    browser.find_element("name", "least").clear()
    Select(browser.find_element("name", "defense")).select_by_visible_text("undefended")
    wait(browser, "document.getElementById('shown').value === '4 of 12 rows are shown.'")
    show(browser, site.as_uri() + "#defense=no-longer-there&least=abc&sort.table1-paper=sideways+success&at.x=y&q=")
    assert browser.find_element("id", "shown").text == "All 12 rows are shown."
    assert browser.get_log("browser") == []


def test_a_row_opens_to_its_runs(browser: Any, site: Path) -> None:
    show(browser, site)
    browser.find_element("link text", "deep-knn").click()
    assert browser.find_element("tag name", "h1").text == "deep-knn"
    assert len(browser.find_elements("css selector", "tbody tr")) == 20
    details = browser.find_element("id", "run-3-1-1")
    assert details.get_attribute("open") is None
    browser.find_element("link text", "Seed 3, goal 1").click()
    wait(browser, "document.getElementById('run-3-1-1').open")
    assert "10 of 500 poisons" in details.text.replace("\u202f", " ")
    assert browser.execute_script("return document.activeElement.tagName") == "SUMMARY"
    assert details.find_element("css selector", ".chart").size["height"] > 100
    copy = browser.find_element("css selector", "button.copy")
    copy.click()
    wait(browser, "document.querySelector('button.copy').textContent !== 'Copy'")
    assert copy.text == "Copied"
    browser.find_element("link text", "table1").click()  # back to the row
    assert browser.execute_script("return document.querySelector('tr:target th').innerText") == "deep-knn"
    assert browser.get_log("browser") == []


def test_everything_by_keyboard(browser: Any, site: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> Any:
        ActionChains(browser).send_keys(*keys).perform()
        return browser.switch_to.active_element

    show(browser, site)
    skip = press(Keys.TAB)
    assert skip.text == "Skip to the content"
    assert browser.execute_script("return document.activeElement.getBoundingClientRect().top") >= 0
    press(Keys.ENTER)
    reached: list[str] = []
    for _ in range(60):
        active = press(Keys.TAB)
        ring = browser.execute_script("const s = getComputedStyle(document.activeElement); return s.outlineStyle")
        assert ring != "none", active.get_attribute("outerHTML")[:100]
        reached.append(active.get_attribute("name") or active.text or active.get_attribute("class"))
        if active.text == "friends-b":
            break
    assert {"q", "preset", "defense", "at.attack", "least", "Clear", "Success", "Cost", "undefended"} <= set(reached)
    press(Keys.ENTER)
    wait(browser, "document.querySelector('h1') && document.querySelector('h1').textContent === 'friends-b'")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_pages_fit_and_can_be_read(browser: Any, site: Path, size: str, dark: bool) -> None:
    hostile = next((site.parent / "pages" / "own").glob("script-*.html"))
    for page in (site, hostile, next((site.parent / "pages" / "table1-paper").glob("deep-knn-*.html"))):
        show(browser, page, size, dark=dark)
        browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert browser.execute_script("return innerWidth") == SIZES[size][0]
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), page
        assert browser.get_log("browser") == []
        assert browser.title.split("<")[0].strip() != "owned"
        ratios = browser.execute_script(CONTRAST)
        assert len(ratios) > 50
        worst = min(ratios, key=lambda pair: pair[0])
        assert worst[0] >= 4.5, worst
        fetched = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert all(name.startswith(("data:", site.parent.as_uri())) for name in fetched)


def test_the_theme_is_remembered_from_page_to_page(browser: Any, site: Path) -> None:
    def ground() -> str:
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    show(browser, site)
    light = ground()
    show(browser, site, dark=True)
    dark = ground()
    assert light != dark
    button = browser.find_element("id", "theme")
    assert button.text == "Theme: system"
    button.click()
    assert (button.text, ground()) == ("Theme: light", light)
    show(browser, next((site.parent / "pages" / "table1-paper").glob("few-*.html")), dark=True)
    assert ground() == light
    button = browser.find_element("id", "theme")
    button.click()
    show(browser, site)
    assert (browser.find_element("id", "theme").text, ground()) == ("Theme: dark", dark)
    browser.find_element("id", "theme").click()
    assert ground() == light  # as the system says


def test_without_a_script_everything_is_there(browser: Any, site: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, site)
        assert not browser.find_element("id", "filters").is_displayed()
        assert not browser.find_element("id", "theme").is_displayed()
        assert len([row for row in browser.find_elements("css selector", "tbody tr") if row.is_displayed()]) == 12
        browser.find_element("link text", "epic-0.1").click()
        assert browser.find_element("tag name", "h1").text == "epic-0.1"
        assert not any(button.is_displayed() for button in browser.find_elements("tag name", "button"))
        browser.find_element("css selector", "#run-0-1-1 summary").click()
        assert "c0de" in browser.find_element("id", "run-0-1-1").text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_print_is_dark_on_light_without_controls(browser: Any, site: Path) -> None:
    show(browser, site, dark=True)
    look_at(browser, (718, 1000, False), dark=True, medium="print")  # A4 between its margins
    try:
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert browser.execute_script("return getComputedStyle(document.body).color") == "rgb(27, 31, 36)"
        assert not browser.find_element("id", "filters").is_displayed()
        script = "return document.querySelector('table[data-name=table1-paper]').getBoundingClientRect().right"
        assert browser.execute_script(script) <= 718
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def test_headings_labels_and_tables_are_named(browser: Any, site: Path) -> None:
    for page in (site, next((site.parent / "pages" / "table1-paper").glob("deep-knn-*.html"))):
        show(browser, page)
        assert browser.execute_script(NAMELESS) == []
        levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
        assert levels[0] == levels.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))
        for landmark in ("header", "nav", "main", "footer"):
            assert browser.find_elements("tag name", landmark), landmark


NAMELESS = """
const named = e => e.getAttribute('aria-label')
  || document.getElementById(e.getAttribute('aria-labelledby'))?.textContent || e.querySelector('img')?.alt
  || (e.id && document.querySelector(`label[for='${e.id}']`)?.textContent) || e.textContent.trim();
return [...document.querySelectorAll('input, select, button, a, section, [role=region], nav, img, svg[role=img]')]
  .filter(e => !(e.tagName === 'IMG' ? e.alt : named(e))).concat(
    [...document.querySelectorAll('th:not([scope]), table:not(:has(caption)), .scroll:not([tabindex])')]
  ).map(e => e.outerHTML.slice(0, 120));
"""
