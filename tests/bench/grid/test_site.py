"""The site says what the records say, row by row and run by run, and cannot be written into or out of by a name."""

from __future__ import annotations

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import record_samples as samples
from typer.testing import CliRunner

from friends.bench.grid import site as site_module
from friends.bench.grid.record import Record, append
from friends.bench.grid.site import MARKER, write_site
from friends.bench.grid.site_words import (
    command,
    curve,
    loss_chart,
    p_text,
    page_name,
    seeds_text,
    size_text,
    slug,
    success_bar,
)
from friends.bench.grid.summary import summarise

VOID = {"meta", "link", "img", "br", "input"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}../../x"


class Page(HTMLParser):
    """The elements of a page (an error if they are not balanced), and the rows of its first table."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        data = data.replace("\u202f", " ")
        self.words.append(data)
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += f"|{data}" if "small" in self.open else data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def folder_of(place: Path, records: list[Record], **grid: object) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    append(place / "records.jsonl", records)
    if grid:
        (place / "grid.json").write_text(json.dumps(grid))
    return place


def page_of(out: Path, row: str) -> Page:
    (found,) = (out / "pages").glob(f"*/{row}-*.html")
    return Page(found)


def test_the_leaderboard_has_the_numbers_of_the_summaries(tmp_path: Path) -> None:
    records = samples.table1(seeds=20)
    grid = folder_of(tmp_path / "a", records, name="table1", title="Table 1: defenses")
    page = Page(write_site([grid], tmp_path / "site"))
    rows = {cells[0]: cells[1:] for cells in page.rows}
    assert list(rows) == ["Defense", "undefended", "clean", "friends-b", "deep-knn", "epic-0.1"]
    assert rows["undefended"][0] == "90 %|18 of 20"
    assert rows["undefended"][1] == "|68–99 %"  # Clopper and Pearson, 18 of 20
    assert rows["friends-b"][0] == "10 %|2 of 20"
    assert rows["friends-b"][4] == "91.5 %|± 0.1"
    assert rows["friends-b"][3] == "0 %"
    assert rows["friends-b"][5].startswith("< 0.001")
    assert rows["deep-knn"][5] == "1"
    assert rows["friends-b"][6] == "1.0 ×|1.0 min"
    assert rows["undefended"][5] == rows["clean"][5] == "–"
    assert "Table 1: defenses" in page.text


def test_the_papers_number_is_marked_only_where_it_can_be_compared(tmp_path: Path) -> None:
    data = {"train": 50_000}
    whole = folder_of(tmp_path / "whole", samples.table1(seeds=20, **data))
    small = folder_of(tmp_path / "small", samples.table1(seeds=20, scaled_down="a tenth of the images", **data))
    few = folder_of(tmp_path / "few", samples.table3(grid="my-grid"))
    rows = {}
    for place in (whole, small, few):
        page = Page(write_site([place], tmp_path / "site"))
        rows[place.name] = {cells[0]: cells[-1] for cells in page.rows}
        assert ("a tenth of the images" in page.text) == (place == small)
    assert rows["whole"]["undefended"] == "75.0 %|≈ within interval"  # 68 to 99 %
    assert rows["whole"]["friends-b"] == "0.0 %|≠ outside interval"  # 1 to 32 %
    assert rows["small"]["friends-b"] == "0.0 %"
    assert rows["whole"]["clean"] == "–"
    assert rows["few"]["Defense"] == "Cost|of one model"  # no column where the paper has nothing


def test_every_record_is_on_the_page_of_its_row(tmp_path: Path) -> None:
    records = samples.table1(seeds=3)
    write_site([folder_of(tmp_path / "a", records)], tmp_path / "site")
    for summary in summarise(records):
        page = page_of(tmp_path / "site", slug(summary.defense))
        assert len(page.rows) == 1 + len(summary.records)
        assert len([a for a in page.all("details") if (a.get("id") or "").startswith("run-")]) == 3
        for record in summary.records:
            for part in (record.cell, record.code, record.commit, record.goal_name, record.keys["poison"], "2.13"):
                assert part in page.text, part
            assert f"{record.confidence:.4f}" in page.text
    page = page_of(tmp_path / "site", "deep-knn")
    assert "700 rows, 10 of 500 poisons" in page.text
    assert '"budget": 0.01' in page.text
    charts = [str(a["aria-label"]) for a in page.all("svg")]
    assert charts[0] == "Confidence in the wanted class, mean of 3 models: from 0.23 to 0.90"
    assert [chart.partition(":")[0] for chart in charts[1:4]] == [
        "Training loss",
        "Confidence in the wanted class, one model",
        "Training loss",
    ]


def test_a_backdoor_row_counts_images_and_refusals(tmp_path: Path) -> None:
    write_site([folder_of(tmp_path / "a", samples.table2())], tmp_path / "site")
    page = page_of(tmp_path / "site", "strip")
    assert "2,450 of 4,000 images" in page.text
    assert "600 of 1,000 (60.0 %)" in page.text
    assert "1,200.0 images not answered" in page.text
    assert "sign-flip test" in page.text


def test_links_lead_somewhere_and_nothing_is_fetched_from_elsewhere(tmp_path: Path) -> None:
    some = [folder_of(tmp_path / "a", samples.table1(seeds=2)), folder_of(tmp_path / "b", samples.table3(seeds=2))]
    out = write_site(some, tmp_path / "site").parent
    pages = [out / "index.html", *(out / "pages").glob("*/*.html")]
    assert len(pages) == 1 + 5 + 4
    for path in pages:
        page, ids = Page(path), {a["id"] for _, a in Page(path).elements if "id" in a}
        assert len(page.all("script")) == 1
        assert not [a for _, a in page.elements if any(name.startswith("on") or name == "style" for name in a)]
        for _, attributes in page.elements:
            for name in ("href", "src"):
                target = attributes.get(name)
                if not target or target == "data:,":
                    continue
                assert ":" not in target, target
                file, _, place = unquote(target).partition("#")
                assert (path.parent / file).resolve().exists() if file else place in ids, target
                if file and place:
                    assert place in {a.get("id") for _, a in Page((path.parent / file).resolve()).elements}


def test_names_cannot_write_into_the_pages_or_out_of_the_folder(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"grid": HOSTILE, "labels": {HOSTILE: HOSTILE}, "scaled_down": HOSTILE, "told": HOSTILE}
    changes |= {"goal_name": HOSTILE, "y_true": HOSTILE, "device": HOSTILE, "commit": HOSTILE, "preset": HOSTILE}
    changes |= {"versions": {HOSTILE: HOSTILE}, "settings": {HOSTILE: HOSTILE}, "keys": {HOSTILE: HOSTILE}}
    records = [samples.record(name, **changes) for name in ("undefended", HOSTILE)]
    records.append(samples.record("other", **{**changes, "cell": "../../../../stolen", "goal": 1}))
    (tmp_path / "stolen").mkdir()
    (tmp_path / "stolen" / "secret.png").write_bytes(b"secret")
    grid = folder_of(tmp_path / "a" / "b", records, name=HOSTILE, title=HOSTILE, axes={HOSTILE: {}})
    out = write_site([grid], tmp_path / "site", title=HOSTILE).parent
    pages = list(out.rglob("*.html"))
    assert len(pages) == 4
    for path in pages:
        page = Page(path)
        assert len(page.all("script")) == 1
        assert page.all("img") == []
        assert "<script>alert(1)</script>" in page.text  # as words
        assert "{{ 7*7 }}" in page.text
    assert all(re.fullmatch(r"[a-z0-9.-]+", part) for path in out.rglob("*") for part in path.relative_to(out).parts)
    assert not list(out.rglob("*.png"))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "site", "stolen"}


def test_names_of_pages_are_stable_short_and_told_apart() -> None:
    assert page_name({"a": "x"}, "friends-b") == page_name({"a": "x"}, "friends-b")
    names = [page_name(labels, row) for labels in ({"a": "x"}, {"a": "X"}, {"b": "x"}) for row in ("f", "F", "é", "ö")]
    assert len(set(names)) == 12
    assert len(page_name({"a": "y" * 500}, "x" * 500)) < 80
    assert slug("…") == "x"


def test_figures_and_tables_come_along_with_their_words(tmp_path: Path) -> None:
    grid = folder_of(tmp_path / "a", samples.table1(seeds=2))
    for name in ("figures", "tables"):
        (grid / name).mkdir()
    (grid / "figures" / "trade off.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (grid / "figures" / "trade off.png").write_bytes(b"png")
    words = {"title": "Trade-off", "alt": "Dots <b>", "caption": "Success over accuracy."}
    (grid / "figures" / "trade off.json").write_text(json.dumps(words))
    (grid / "figures" / "other.png").write_bytes(b"png")
    (grid / "tables" / "table1.csv").write_text("a,b\n")
    page = Page(write_site([grid], tmp_path / "site"))
    other, trade = page.all("img")
    assert trade["alt"] == "Dots <b>"
    assert trade["src"] == "pages/table1-paper/figures/trade%20off.svg"
    assert "Success over accuracy." in page.text
    assert other["alt"] == "other"
    pages = tmp_path / "site" / "pages" / "table1-paper"
    assert (pages / "figures" / "trade off.png").read_bytes() == b"png"
    assert (pages / "table1.csv").read_text() == "a,b\n"
    assert (pages / "records.jsonl").read_bytes() == (grid / "records.jsonl").read_bytes()


def test_pictures_of_a_model_are_on_the_page_of_its_row(tmp_path: Path) -> None:
    records = samples.row("friends-b", "x.")
    grid = folder_of(tmp_path / "a", records)
    folder = grid / "pictures" / records[1].cell
    folder.mkdir(parents=True)
    (folder / "poisons.png").write_bytes(b"png")
    (folder / "poisons.json").write_text(json.dumps({"alt": "Eight frogs"}))
    write_site([grid], tmp_path / "site")
    (picture,) = page_of(tmp_path / "site", "friends-b").all("img")
    assert picture["alt"] == "Eight frogs"
    copied = tmp_path / "site" / "pages" / "table1-paper" / str(picture["src"])
    assert copied.read_bytes() == b"png"


def test_two_folders_of_one_grid_have_sections_of_their_own(tmp_path: Path) -> None:
    some = [folder_of(tmp_path / name, samples.table1(seeds=2)) for name in ("a", "b")]
    smoke = samples.table1(seeds=2, preset="smoke")
    append(some[1] / "records.jsonl", smoke)
    page = Page(write_site(some, tmp_path / "site"))
    names = [a["data-name"] for a in page.all("table")]
    assert names == ["table1-paper", "table1-paper-2", "table1-smoke"]
    assert all((tmp_path / "site" / "pages" / str(name)).is_dir() for name in names)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no records"):
        write_site([tmp_path / "empty"], tmp_path / "site")
    with pytest.raises(ValueError, match="no folder"):
        write_site([], tmp_path / "site")
    mixed = folder_of(tmp_path / "mixed", [samples.record(seed=0), samples.record(seed=1, code="0ther")])
    with pytest.raises(ValueError, match=r"mixed: .*code"):
        write_site([mixed], tmp_path / "site")
    assert not (tmp_path / "site").exists()  # all of this before anything is written
    assert "versions of the code" in Page(write_site([mixed], tmp_path / "site", mix=True)).text
    torn = folder_of(tmp_path / "torn", [samples.record()])
    (torn / "grid.json").write_text("{")
    with pytest.raises(ValueError, match=r"grid\.json is not JSON"):
        write_site([torn], tmp_path / "site")
    (torn / "grid.json").write_text("[]")
    with pytest.raises(ValueError, match=r"grid\.json is no grid"):
        write_site([torn], tmp_path / "site")


def test_a_site_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a"  # beside the records themselves
    grid = folder_of(out, samples.table1(seeds=2))
    write_site([grid], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    write_site([grid], out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before  # the same each time
    append(grid / "records.jsonl", [samples.record("new", seed=0)])

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(site_module, "_downloads", fail)
        with pytest.raises(OSError, match="disk full"):
            write_site([grid], out)
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {path: text for path, text in after.items() if path.name != "records.jsonl"} == {
        path: text for path, text in before.items() if path != grid / "records.jsonl" and path.name != "records.jsonl"
    }
    (out / "pages" / "table1-paper" / "gone-1.html").write_text("of a row that is no more")
    write_site([grid], out)
    assert list((out / "pages" / "table1-paper").glob("new-*.html"))
    assert not (out / "pages" / "table1-paper" / "gone-1.html").exists()
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "thesis.txt").write_text("years of work")
    grid = folder_of(tmp_path / "a", samples.table1(seeds=2))
    with pytest.raises(FileExistsError, match="pages is there"):
        write_site([grid], tmp_path)
    assert (tmp_path / "pages" / "thesis.txt").read_text() == "years of work"
    assert not (tmp_path / "pages" / MARKER).exists()


def test_the_index_stays_small(tmp_path: Path) -> None:
    records = [
        samples.record(name, seed=seed, grid="many", labels={"attack": f"attack-{i}"}, history=())
        for i in range(50)
        for name in ("undefended", "clean", "friends-b", "epic")
        for seed in range(2)
    ]
    index = write_site([folder_of(tmp_path / "a", records)], tmp_path / "site")
    size = index.stat().st_size
    assert size < 12_000 + 200 * 900  # 2,000 rows: less than 2 MB, whatever the number of runs
    assert records[0].cell not in index.read_text()


def test_commands_are_taken_by_the_program(tmp_path: Path) -> None:
    from friends.cli_bench import bench

    record = samples.record("friends-b", seed=2, grid="success-over-xi", preset="smoke", labels={"xi": "32/255"})
    words = shlex.split(command(record, [0, 2]))
    assert words[:3] == ["friends", "bench", "run"]
    place = ["--dry-run", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(bench, [*words[2:], *place])
    assert result.exit_code == 0, result.output
    wrong = ["no-such-row" if word == "friends-b" else word for word in words[2:]]
    assert CliRunner().invoke(bench, [*wrong, *place]).exit_code != 0


@pytest.mark.parametrize(
    ("seeds", "text"), [([0], "1"), ([0, 1, 2], "3"), ([2, 0, 0], "0,2"), ([3], "3,"), ([3, 5], "3,5")]
)
def test_seeds_as_the_program_takes_them(seeds: list[int], text: str) -> None:
    assert seeds_text(seeds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (12_345, "12.3 kB"), (999_700, "1 MB"), (2_500_000_000, "2.5 GB")],
)
def test_sizes_have_three_figures_and_their_unit(size: int, text: str) -> None:
    assert size_text(size) == text


def test_a_small_p_is_only_said_to_be_below_a_bound() -> None:
    assert [p_text(p) for p in (0.00099, 0.001, 0.0341, 1.0)] == ["< 0.001", "0.001", "0.034", "1"]
    assert [p_text(p, least=1e-4) for p in (0.00009, 0.0001, 0.00024)] == ["< 0.0001", "0.0001", "0.00024"]


def test_a_grid_of_the_users_own_and_odd_labels_are_quoted() -> None:
    record = samples.record("my row; rm -rf /", grid="mine", preset="", labels={"mu": "16 255"})
    assert shlex.split(command(record, [0])) == [
        *("friends", "bench", "run", "mine.toml", "--only", "my row; rm -rf /", "--at", "mu=16 255", "--seeds", "1")
    ]


def test_curves_are_thinned_but_keep_their_end() -> None:
    history = [{"epoch": i + 1.0, "loss": 1.0 / (i + 1)} for i in range(1000)] + [{"epoch": 1001.0, "loss": 9.0}]
    points = curve(history, "loss")
    assert len(points) <= 160
    assert points[-1] == (1001.0, 9.0)
    assert curve([{"loss": float("inf")}, {"loss": 1.0}], "loss") == ((2.0, 1.0),)
    assert curve(history, "confidence") == ()


@pytest.mark.parametrize("loss", [0.0, 1e-9, 0.3, 7.5, 5e6])
def test_any_loss_fits_its_chart(loss: float) -> None:
    chart = loss_chart(
        [samples.record(history=({"epoch": 1.0, "loss": loss}, {"epoch": 2.0, "loss": loss / 2}))], "ours"
    )
    assert chart is not None
    assert 3 <= chart.count('class="grid"') <= 7
    assert "nan" not in chart


def test_the_bar_shows_mean_interval_and_undefended() -> None:
    (summary,) = summarise(samples.row("friends-b", "x..."))
    bar = success_bar(summary.success, "ours", 0.75)
    low, high = (6 + 112 * value for value in (summary.success.low, summary.success.high))
    assert f"M{low:.0f} 8H{high:.0f}" in bar
    assert 'cx="34"' in bar  # a quarter of 112, from 6
    assert 'class="u" d="M90' in bar
    (one,) = summarise([samples.backdoor_row("friends-b", (0.5,))[0]])
    assert 'class="w"' not in success_bar(one.success, "ours", None)  # one value has no interval
