"""The page says what happened, whatever happened, needs nothing but itself, and cannot be written into by a class."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import report_samples as samples
import torch
from PIL import Image
from rich.console import Console

from friends.bench.pictures import strips
from friends.bench.record import Report
from friends.bench.report import caveats, facts, headline, label, render, summary, summary_table
from friends.data.images import LabeledImages

VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """What a browser would see: balanced elements (or an error), their attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and "head" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page(tmp_path: Path, report: Report, exhibit: Any = None) -> Page:
    return Page(render(report, exhibit, tmp_path / "report.html").read_text(encoding="utf-8"))


def of_arms(*outcomes: tuple[str, str], **changes: Any) -> Report:
    """A report of arms given as (name, goals won)."""
    return samples.report(tuple(samples.arm(name, hits, 0.9, 10.0) for name, hits in outcomes), **changes)


# ------------------------------------------------------------------------------------------------ in words


def test_the_headline_has_the_numbers() -> None:
    report = samples.report()
    assert headline(report) == "Undefended, the attack took over 7 of 8 targets; with FRIENDS-B, 2 of 8."
    said = summary(report).replace("\u202f", " ").replace("\u00a0", " ")
    # seven goals differ: six were saved, one was lost, so p = 2 * (1 + 7) / 2**7
    assert "p = 0.12: not enough to rule out chance" in said
    assert "98.1 % → 96.9 % (−1.2 points)" in said
    assert "0.20 s → 3.0 s" in said  # per model, not in all


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([("undefended", "....")], "The attack failed: with no defense it took over 0 of 4 targets."),
        ([("undefended", "...."), ("friends-b", "x...")], "The attack failed: with no defense it took over 0 of 4"),
        ([("undefended", "xx.."), ("friends-b", "x..x")], "FRIENDS-B made no difference: the attack took over 2 of 4"),
        (
            [("undefended", "x..."), ("friends-b", "xx..")],
            "took over 1 of 4 targets; with FRIENDS-B, 2 of 4, more than",
        ),
        ([("undefended", "x..."), ("friends-b", "...."), ("clean", "x...")], "did no better than no attack: it took"),
        ([("undefended", "xxx.")], "Undefended, the attack took over 3 of 4 targets."),
        ([("undefended", "xxx."), ("clean", "....")], "Undefended, the attack took over 3 of 4 targets."),
        ([("friends-u", "x...")], "With FRIENDS-U, the attack took over 1 of 4 targets; there is no undefended arm"),
        ([("clean", "x...")], "Trained on clean data, the attack took over 1 of 4 targets; there is no undefended"),
        ([("undefended", "x")], "Undefended, the attack took over 1 of 1 target."),
        ([("undefended", "xxx."), ("epic", "...."), ("friends-g", "x...")], "with FRIENDS-G, 1 of 4."),
        ([("undefended", "xxx."), ("epic", "....")], "with epic, 0 of 4."),
    ],
)
def test_the_headline_is_honest(tmp_path: Path, outcomes: list[tuple[str, str]], expected: str) -> None:
    report = of_arms(*outcomes)
    assert expected in headline(report)
    assert expected in page(tmp_path, report).text


def test_a_clear_difference_is_called_one() -> None:
    assert "p = 0.031: more than chance explains" in summary(of_arms(("undefended", "x" * 6), ("friends", "." * 6)))
    assert "p < 0.001: more" in summary(of_arms(("undefended", "x" * 11), ("friends", "." * 11)))


def test_equal_rates_have_no_p_in_the_summary() -> None:
    assert "p =" not in summary(of_arms(("undefended", "xx.."), ("friends-b", "x..x")))


def test_caveats_are_there_when_they_apply() -> None:
    text = " ".join(caveats(of_arms(("undefended", "xxx."), ("clean", "x..."))))
    assert "Few trials: with n = 4" in text
    assert "wanted answer for 1 of 4 targets" in text
    assert "Scaled down: two classes" in text
    missing = of_arms(("undefended", "xxx."))
    assert any("No clean control" in caveat for caveat in caveats(missing))
    refused = samples.report((replace(samples.ARMS[0], abstained=1200),))
    assert any("Undefended refused to answer 1,200" in caveat for caveat in caveats(refused))


def test_what_an_arm_was_told_removed_and_shared_stands_below_its_name(tmp_path: Path) -> None:
    told = replace(samples.ARMS[1], told="budget 0.1", removed=(50,) * 8, caught=(20,) * 8, shared=8.0, name="deep-knn")
    report = samples.report((samples.ARMS[0], told, samples.ARMS[-1]))
    page = render(report, None, tmp_path / "page.html").read_text(encoding="utf-8").replace("\u202f", " ")
    assert "told: budget 0.1; removed 50 images a model, 40.0 % of them poison: 50.0 % of the poisons" in page
    assert "its time counts a probe shared with other arms, 1.0 s" in page
    assert "2 models share the goals" in page


def test_caveats_are_absent_when_they_do_not() -> None:
    assert caveats(of_arms(("undefended", "x" * 20), ("clean", "." * 20), scaled_down="")) == []


def test_a_backdoor_counts_images() -> None:
    arms = [
        replace(arm, successes=hits, n=800, history=(), rates=tuple(0.9 if hit else 0.1 for hit in arm.succeeded))
        for arm, hits in zip(samples.ARMS, (650, 80), strict=False)
    ]
    report = samples.report(tuple(arms))
    report = replace(report, trial={**report.trial, "goals": {"trigger": {"is": "TriggerSpec"}}})
    assert headline(report).startswith(
        "Undefended, the attack took over 650 of 800 triggered images; with FRIENDS-B, 80"
    )
    assert any("800 answers belong to 8 goals and are not independent" in text for text in caveats(report))


@pytest.mark.parametrize(
    ("name", "shown"),
    [("friends-b", "FRIENDS-B"), ("noise-only-g", "Noise only (G)"), ("friendly-only", "Friendly only"),
     ("undefended", "Undefended"), ("clean", "Clean control"), ("EPIC-0.1", "EPIC-0.1")],
)  # fmt: skip
def test_arms_have_readable_names(name: str, shown: str) -> None:
    assert label(name) == shown


def test_strengths_are_in_255ths() -> None:
    found = dict(facts({"attack": {"xi": 16 / 255, "lr": 0.1}, "arms": [{"zeta": 8 / 255, "mu": 0.1}], "crop": [4, 4]}))
    assert found == {"attack.xi": "16/255", "attack.lr": "0.1", "arms.0.zeta": "8/255", "arms.0.mu": "0.1",
                     "crop": "4, 4"}  # fmt: skip


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_shows_every_arm_and_goal(tmp_path: Path, digits: LabeledImages) -> None:
    report = samples.report()
    seen = page(tmp_path, report, samples.exhibit(digits))
    text = seen.text.replace("\u202f", " ")
    for expected in ("7/8", "53–98 %", "0/8", "0–32 %", "15.2 ×", "64/255", "20,314", "friends run trial.toml",
                     "AMD EPYC 7B13", "2022-11-28 09:00 UTC", "Friends(zeta=32/255, mu=48/255)",
                     "2 models share the goals", *(str(goal["name"]) for goal in report.goals)):  # fmt: skip
        assert expected in text, expected
    order = [text.index(f"{label(arm.name)} ") for arm in report.arms]
    assert order[0] == min(order)
    assert text.count("taken over,") == sum(arm.successes for arm in report.arms)


def test_the_page_is_sound(tmp_path: Path, digits: LabeledImages) -> None:
    seen = page(tmp_path, samples.report(), samples.exhibit(digits))
    headings = [int(tag[1]) for tag, _ in seen.elements if re.fullmatch("h[1-6]", tag)]
    assert headings.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(headings))
    assert seen.all("html")[0]["lang"] == "en"
    assert all(image["alt"] for image in seen.all("img"))
    ids = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in seen.elements if "aria-labelledby" in a} <= set(ids)
    assert {scope for head in seen.all("th") for scope in [head["scope"]]} == {"col", "row"}


def test_the_page_needs_nothing_else(tmp_path: Path, digits: LabeledImages) -> None:
    path = render(samples.report(), samples.exhibit(digits), tmp_path / "report.html")
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"data:image/png;base64,[\w+/=]+", "", html))
    links = [a[name] for _, a in Page(html).elements for name in ("src", "href", "srcset", "xlink:href") if name in a]
    assert links
    assert all(link is not None and link.startswith("data:") for link in links)
    policy = next(a["content"] for a in Page(html).all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "hostile",
    ["<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "'onmouseover='alert(1)", "{{ 7 * 7 }}",
     "</title></style><svg onload=alert(1)>", "&lt;b&gt;", "\ud800 alone", "[red]x[/red] \x1b[31m"],
)  # fmt: skip
def test_hostile_names_are_text(tmp_path: Path, digits: LabeledImages, hostile: str) -> None:
    goals = tuple({"name": hostile, "y_true": hostile, "y_wanted": hostile} for _ in range(8))
    arms = (samples.ARMS[0], replace(samples.ARMS[1], name=hostile, notes=hostile, defenses=(hostile,)))
    report = samples.report(arms, goals=goals, name=hostile, key=hostile, device=hostile, scaled_down=hostile,
                            trial={hostile: hostile}, versions={hostile: hostile}, seconds={hostile: 1.0})  # fmt: skip
    plain = page(tmp_path, samples.report(samples.ARMS[:2]), samples.exhibit(digits))
    seen = page(tmp_path, report, samples.exhibit(digits))
    assert {tag for tag, _ in seen.elements} == {tag for tag, _ in plain.elements}
    assert {name for _, a in seen.elements for name in a} == {name for _, a in plain.elements for name in a}
    assert " ".join(hostile.replace("\ud800", "?").split()) in seen.text


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 5, 9), (3, 200, 150)])
def test_images_of_any_shape_are_shown(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    images = torch.randint(256, (2, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    seen = page(tmp_path, samples.report(), samples.exhibit_of(images, images[0]))
    pictures = seen.all("img")
    assert len(pictures) == 1 + 7 * 2
    c, h, w = shape
    for picture in pictures:
        drawn = picture_of(str(picture["src"]))
        factor = drawn.width // w
        assert drawn.size == (w * factor, h * factor) == (int(str(picture["width"])), int(str(picture["height"])))
        assert drawn.mode == ("L" if c == 1 else "RGB")


def picture_of(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))


def pixels_of(uri: str, side: int) -> torch.Tensor:
    """The bytes of a drawn digit, shrunk back to its own pixels."""
    small = picture_of(uri).resize((side, side), Image.Resampling.NEAREST)
    return torch.tensor(list(small.tobytes()), dtype=torch.int16).reshape(1, side, side)


def test_pictures_show_the_bytes_and_noise_to_scale(digits: LabeledImages) -> None:
    exhibit = samples.exhibit(digits)
    found = {strip.title: strip for strip in strips(exhibit)}
    assert list(found) == ["Base images", "What the attacker added", "Poisons", "Friendly noise",
                           "Poison + friendly noise", "Random noise", "Poison + friendly + random"]  # fmt: skip
    assert exhibit.friendly is not None
    assert exhibit.random is not None
    both = (exhibit.poisons.short() + exhibit.friendly).clamp(0, 255)
    expected = {
        "Base images": exhibit.bases,
        "Poisons": exhibit.poisons,
        "Poison + friendly noise": both,
        "Poison + friendly + random": (both + exhibit.random).clamp(0, 255),
    }
    for title, images in expected.items():
        assert torch.equal(pixels_of(found[title].images[4].uri, 28), images[4].short()), title
    friendly = pixels_of(found["Friendly noise"].images[4].uri, 28) - 127.5
    assert "±32/255 (×4)" in found["Friendly noise"].caption
    assert (friendly - exhibit.friendly[4] * 127.5 / 32).abs().max() <= 0.5


def test_an_exhibit_shows_only_what_it_has(tmp_path: Path, digits: LabeledImages) -> None:
    exhibit = samples.exhibit(digits, friendly=None, histogram=None, zeta=0.0)
    assert [strip.title for strip in strips(exhibit)][3:] == ["Random noise", "Poison + random noise"]
    assert "How much friendly noise" not in page(tmp_path, samples.report(), exhibit).text
    still = replace(exhibit, poisons=exhibit.bases, random=None)
    assert "there is none" in strips(still)[1].caption


def test_the_histogram_is_put_into_words(tmp_path: Path, digits: LabeledImages) -> None:
    counts = torch.zeros(511, dtype=torch.int64)
    counts[[255 - 32, 255, 255 + 10, 255 + 32]] = torch.tensor([100, 300, 450, 150])
    text = page(tmp_path, samples.report(), samples.exhibit(digits, histogram=counts)).text.replace("\u202f", " ")
    assert "1,000 in all. 25.0 % of them are moved by the full ±32/255, 30.0 % not at all." in text
    assert "+10/255: 45.00%" in text


def test_curves_are_drawn_where_the_history_has_them(tmp_path: Path) -> None:
    html = render(samples.report(), None, tmp_path / "all.html").read_text(encoding="utf-8")
    assert html.count('class="chart"') == len(samples.ARMS) + 1  # confidence of each arm, and accuracy of all
    assert len(re.findall(r'<path class="arm-\d thin"', html)) == 8 * len(samples.ARMS)
    assert "Undefended: mean confidence in the wanted class goes from" in html
    sparse = replace(samples.ARMS[0], history=(({"loss": 1.0},), ({"epoch": 3, "accuracy": 0.8},)))
    html = render(samples.report((sparse,)), None, tmp_path / "sparse.html").read_text(encoding="utf-8")
    assert html.count('class="chart"') == 1
    assert "<circle" in html  # a single point is no line


def test_no_history_means_no_charts(tmp_path: Path) -> None:
    report = samples.report((replace(samples.ARMS[0], history=()),))
    seen = page(tmp_path, report)
    assert "During training" not in seen.text
    assert seen.all("img") == []


def test_nothing_is_said_twice(tmp_path: Path) -> None:
    goals = tuple({"name": f"test image {i}: 3 → 5", "y_true": "3", "y_wanted": "5"} for i in range(8))
    attack = {
        "name": "BullseyePolytope",
        "settings": {"is": "BullseyePolytope", "xi": 60 / 255, "steps": 150},
        "xi": 60 / 255,
    }
    report = samples.report(goals=goals, attack=attack, trial={}, scaled_down="Small. ")
    text = page(tmp_path, report).text
    assert text.count("3 → 5") == 8
    assert text.count("60/255") == 1
    assert "Scaled down: Small. " in text


def test_defenses_are_quoted_in_255ths(tmp_path: Path) -> None:
    defense = "Friends(zeta=0.12549019607843137, mu=0.0, lr=0.12549019607843137, beta_mu=0.5)"
    text = page(tmp_path, samples.report((replace(samples.ARMS[0], defenses=(defense,)),))).text
    assert "Friends(zeta=32/255, mu=0/255, lr=0.12549019607843137, beta_mu=0.5)" in text


def test_no_change_has_no_sign() -> None:
    arms = (samples.arm("undefended", "x", 0.98, 1.0), samples.arm("friends-b", ".", 0.9799, 1.0))
    assert "(±0.0\u00a0points)" in summary(samples.report(arms))


def test_many_goals_are_folded(tmp_path: Path) -> None:
    report = of_arms(("undefended", "x." * 30), ("friends-b", "." * 60))
    assert "All 60 goals" in page(tmp_path, report).text


def test_an_exhibit_of_another_run_is_refused(tmp_path: Path, digits: LabeledImages) -> None:
    with pytest.raises(ValueError, match="shows goal 8, but the report has 8"):
        render(samples.report(), samples.exhibit(digits, goal=8), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_equal_reports_give_equal_pages(tmp_path: Path, digits: LabeledImages) -> None:
    first, second = (render(samples.report(), samples.exhibit(digits), tmp_path / name) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


# -------------------------------------------------------------------------------------------- the terminal


def test_the_table_fits_a_terminal_and_shows_markup_as_it_is() -> None:
    arms = (*samples.ARMS, replace(samples.ARMS[2], name="[red]odd"))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(samples.report(arms)))
    text = console.export_text()
    lines = [line for line in text.splitlines() if line.startswith(("Undefended ", "FRIENDS-B", "[red]odd"))]
    assert lines[0].split() == ["Undefended", "7/8", "53–98", "%", "–", "98.1", "%", "0.76", "1.6", "1.0", "×"]
    assert lines[1].split()[:5] == ["FRIENDS-B", "2/8", "7–59", "%", "0.12"]
    assert lines[2].split()[:2] == ["[red]odd", "2/8"]
