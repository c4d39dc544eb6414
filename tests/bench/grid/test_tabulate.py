"""Tables of grids: what stands in them, beside the paper, and in four forms."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import record_samples as samples

from friends.bench.grid.record import Record
from friends.bench.grid.spec import Grid, Row, read_grid
from friends.bench.grid.summary import summarise
from friends.bench.grid.tabulate import Column, Entry, Table, tables, write
from friends.bench.statistics import clopper_pearson

GRID = Grid(
    name="mine",
    title="A grid",
    trial={
        "scenario": "scratch",
        "data": {"source": "digits"},
        "model": {"name": "small"},
        "goals": {"count": 1},
        "attack": {"name": "gradient-matching", "xi": "16/255", "budget": 0.01},
        "recipe": {"epochs": 2},
    },
    rows=(
        Row(name="friends-b", defenses=({"name": "friends", "zeta": "16/255", "mu": "16/255"},)),
        Row(name="strip", defenses=({"name": "strip"},)),
    ),
    seeds=(0, 1, 2, 3),
)


def mine(marks: dict[str, str], **changes: Any) -> list[Record]:
    rows = [samples.row(name, some, grid="mine", preset="", **changes) for name, some in marks.items()]
    return [record for row in rows for record in row]


def table_of(grid: Grid | None, records: list[Record]) -> Table:
    (table,) = tables(grid, summarise(records))
    return table


def cells(table: Table, row: str) -> dict[str, str]:
    """The entries of a row by column, marks included."""
    found = next(some for some in table.rows if row in (some[0].text, some[1].text))
    titles = [f"{c.group}: {c.title}" if c.group else c.title for c in table.head]
    return {title: entry.text + "*" * entry.mark for title, entry in zip(titles, found, strict=True)}


def test_a_small_table_as_a_whole() -> None:
    table = table_of(GRID, mine({"friends-b": "...x", "undefended": "xxxx", "clean": "...."}))
    assert table.markdown() == (
        "### A grid\n"
        "\n"
        "| defense | success % (95 % interval) | n | accuracy % | p (Holm) | seconds |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| undefended | 100.0 (39.8\u2013100.0) | 4 | 93.0 | \u2013 | 60.0 |\n"
        "| friends-b | 25.0 (0.6\u201380.6) | 4 | 93.0 | 0.25 | 60.0 |\n"
        "| strip | n/a | \u2013 | \u2013 | \u2013 | \u2013 |\n"
        "| clean | 0.0 (0.0\u201360.2) | 4 | 93.0 | \u2013 | 60.0 |\n"
        "\n"
        "- n counts goals of the attack; intervals: Clopper-Pearson. Seconds are the median of one model, its defense "
        "included.\n"
        "- p: two-sided exact McNemar test against the undefended models of the same seeds and goals, adjusted by Holm "
        "over the defenses of a point.\n"
        "- All rows: 4 trials: too few to tell 20 % from 50 %; 39 would.\n"
        "- n/a: strip: not defined for a targeted attack.\n"
    )


def test_rows_without_records_are_not_run_and_half_a_row_says_so() -> None:
    table = table_of(GRID, mine({"undefended": "xx"}))
    assert cells(table, "friends-b")["success % (95 % interval)"] == "not run"
    assert cells(table, "clean")["success % (95 % interval)"] == "not run"
    assert cells(table, "undefended")["n"] == "2 of 4"
    assert "All rows: not complete." in table.notes
    assert [row[0].text for row in table_of(GRID, []).rows] == ["undefended", "friends-b", "strip", "clean"]


def test_without_a_grid_only_what_was_run_is_shown() -> None:
    found = tables(None, summarise(samples.table3() + samples.table1()))
    assert [table.name for table in found] == ["table3", "table1"]
    assert [row[0].text for row in found[1].rows] == ["undefended", "friends-b", "deep-knn", "epic-0.1", "clean"]
    sizes = samples.row("undefended", "x") + samples.row("friends-b", ".", preset="small")
    with pytest.raises(ValueError, match=f"{sizes[0].cell} of preset 'paper' and {sizes[1].cell} of 'small'"):
        tables(None, summarise(sizes))


def test_records_of_another_grid_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"a row is of grid 'table1 paper' .*not of 'mine'"):
        tables(GRID, summarise(samples.table1()))
    with pytest.raises(ValueError, match=r"a row is of grid 'table1 paper' .*not of 'table1 small'"):
        tables(read_grid("table1", "small"), summarise(samples.table1()))


def test_the_paper_stands_beside_a_full_size_table_with_the_difference_and_a_mark() -> None:
    table = table_of(read_grid("table1", "paper"), samples.table1(20))
    row = cells(table, "friends-b")
    low, high = clopper_pearson(2, 20)
    assert row["success % (95 % interval)"] == f"10.0 ({100 * low:.1f}\u2013{100 * high:.1f})"
    assert (row["paper success %"], row["difference"], row["paper accuracy %"]) == ("0.00*", "+10.0", "91.52")
    row = cells(table, "epic-0.1")
    assert (row["paper success %"], row["difference"]) == ("0.00", "+0.0")
    assert cells(table, "undefended")["difference"] == "+15.0"
    (line,) = (line for line in csv.DictReader(io.StringIO(table.csv())) if line["defense"] == "friends-b")
    assert cells(table, "friends-b")["p (Holm)"] == f"{float(line['p_holm']):.2g}" != f"{float(line['p']):.2g}"
    assert cells(table, "undefended")["paper success %"] == "75.00"  # 18 of 20: 68.3 to 98.8 %
    assert cells(table, "ap-0.5")["paper success %"] == "10.00"
    assert any(note.startswith("* The paper's success rate lies outside") for note in table.notes)
    assert any("themselves means over 20 trials" in note for note in table.notes)


def test_a_scaled_down_table_shows_the_papers_numbers_but_is_never_held_against_them() -> None:
    """Far off in every row, and yet no mark, no difference: the sizes differ."""
    for changes in ({"preset": "small", "scaled_down": "two classes"}, {"preset": "small"}):
        records = [replace(r, hits=1 - r.hits) for r in samples.table1(12, **changes)]
        for grid in (None, read_grid("table1", "small")):
            table = table_of(grid, records)
            assert cells(table, "epic-0.1")["paper success %"] == "0.00"
            assert "difference" not in {column.title for column in table.head}
            assert not any(entry.mark for row in table.rows for entry in row)
            assert not any("outside" in note for note in table.notes)
            assert any("sizes differ from the paper's" in note for note in table.notes)
            lines = list(csv.DictReader(io.StringIO(table.csv())))
            assert {line["minus_paper_points"] for line in lines} == {""}
            assert {line["paper_outside"] for line in lines} == {""}
    full = samples.table1(12, scaled_down="fewer epochs")  # of the paper preset, but changed
    assert not any(entry.mark for row in table_of(None, full).rows for entry in row)


def test_the_paper_preset_on_other_data_is_not_held_against_the_paper_either() -> None:
    for changes in ({"train": 5000}, {"y_wanted": "7"}):
        table = table_of(None, [replace(r, hits=1 - r.hits) for r in samples.table1(20, **changes)])
        assert not any(entry.mark for row in table.rows for entry in row)
        assert any("other data than" in note for note in table.notes)


def test_a_grid_of_the_users_own_has_nothing_to_do_with_the_paper() -> None:
    table = table_of(None, samples.table1(preset=""))
    assert not any("paper" in column.title for column in table.head)
    assert not any("paper" in note for note in table.notes)


def test_what_the_paper_contradicts_itself_in_stands_below() -> None:
    notes = table_of(read_grid("table2", "paper"), samples.table2()).notes
    assert any(note.startswith("The paper's strip; neural-cleanse: more accurate") for note in notes)
    assert any("of the same poisons" in note for note in notes)


def test_an_axis_and_one_defense_have_the_form_of_table_3() -> None:
    table = table_of(read_grid("table3", "paper"), samples.table3(20))
    assert [row[0].text for row in table.rows][:2] == ["gradient-matching-8", "gradient-matching-16"]
    assert len(table.rows) == 6
    row = cells(table, "gradient-matching-8")
    assert row["n"] == "20"
    assert row["undefended: success % (95 % interval)"].startswith("75.0 (")
    assert row["undefended: paper's success, accuracy %"] == "50.00, 93.55*"
    assert row["friends-b: paper's success, accuracy %"] == "0.00, 91.55"
    assert row["friends-b: p (Holm)"] == "< 0.0001"  # 2 of 2^15
    assert cells(table, "metapoison")["friends-b: success % (95 % interval)"] == "not run"
    assert [group for group in dict.fromkeys(c.group for c in table.head) if group] == [
        "undefended",
        "friends-b",
        "clean",
    ]
    assert r"\multicolumn{4}{c}{undefended}" in table.latex()
    assert r"\cmidrule(lr){3-6}\cmidrule(lr){7-11}\cmidrule(lr){12-13}" in table.latex()
    assert '<td colspan="2"></td><th scope="colgroup" colspan="4">undefended</th>' in table.html()


def test_numbers_of_trials_that_differ_at_a_point_have_a_column_each() -> None:
    some = samples.table3(4)
    table = table_of(None, [r for r in some if r.seed or not r.is_undefended])
    row = cells(table, "gradient-matching-8")
    assert (row["undefended: n"], row["friends-b: n"]) == ("3", "4")


def test_several_axes_have_a_column_each() -> None:
    records: list[Record] = []
    for attack, xi in (("a", "8/255"), ("b", "8/255"), ("b", "16/255")):
        records += mine({"undefended": "xx", "friends-b": ".."}, labels={"attack": attack, "xi": xi})
    table = table_of(None, records)
    assert [column.title for column in table.head[:3]] == ["attack", "xi", "defense"]
    assert [tuple(e.text for e in row[:3]) for row in table.rows][1:3] == [
        ("a", "8/255", "friends-b"),
        ("b", "8/255", "undefended"),
    ]
    assert list(csv.DictReader(io.StringIO(table.csv())))[5]["axis xi"] == "16/255"
    assert '<th scope="row">b</th><th scope="row">16/255</th><th scope="row">friends-b</th>' in table.html()


def test_abstentions_show_both_accuracies_and_one_goal_no_interval() -> None:
    assert "80.0 (92.0 of those answered)" in table_of(None, samples.table2()).markdown()
    table = table_of(None, samples.backdoor_row("undefended", (0.4,)))
    assert cells(table, "undefended")["success % (95 % interval)"] == "40.0 (no interval)"


def test_what_a_defense_is_told_and_shared_seeds_are_said() -> None:
    records = mine({"undefended": "xx"}) + mine({"friends-b": ".."}, told="budget 1 %")
    assert "Told about the attack: friends-b: budget 1 %." in table_of(GRID, records).notes
    one_seed = [samples.record(goal=goal, grid="mine", preset="") for goal in range(3)]
    assert "count as independent" in table_of(GRID, one_seed).notes[0]
    assert "count as independent" not in table_of(GRID, records).notes[0]


def test_the_csv_has_all_numbers_in_full() -> None:
    table = table_of(read_grid("table1", "paper"), samples.table1(20))
    lines = {line["defense"]: line for line in csv.DictReader(io.StringIO(table.csv()))}
    line = lines["friends-b"]
    low, high = clopper_pearson(2, 20)
    assert (line["n"], line["models"], line["images"], line["hits"], line["planned"]) == ("20", "20", "20", "2", "20")
    assert (float(line["success_low"]), float(line["success_high"])) == (low, high)
    assert float(line["minus_paper_points"]) == 10.0
    assert (line["paper_success_percent"], line["paper_outside"], line["paper_minutes"]) == ("0.0", "true", "37")
    assert float(line["p_holm"]) >= float(line["p"]) > 0
    assert (lines["deep-knn"]["removed"], lines["deep-knn"]["removed_poisons"]) == ("700.0", "10.0")
    assert (float(line["control"]), lines["clean"]["control"]) == (0.0, "")
    assert (lines["ap-0.5"]["status"], lines["ap-0.5"]["success"]) == ("not run", "")
    assert lines["ap-0.5"]["paper_success_percent"] == "10.0"
    assert "\r" not in table.csv()
    stripped = table_of(GRID, mine({"undefended": "xx"}))
    status = {line["defense"]: line["status"] for line in csv.DictReader(io.StringIO(stripped.csv()))}
    assert status == {"undefended": "run", "friends-b": "not run", "strip": "n/a", "clean": "not run"}


NASTY = Table(
    "nas_ty",
    "50 % & more | <b>_x_</b> #1",
    (Column("a_b", number=False), Column("$p", "g&h"), Column("*", "g&h")),
    ((Entry("\\x{y}^~\n`[l](u)`"), Entry("1 < 2", mark=True), Entry('"q"')),),
    ("100 % of $5 & \u22123\u20134",),
)


def test_latex_is_escaped() -> None:
    text = NASTY.latex()
    assert r"\caption{50 \% \& more \textbar{} \textless{}b\textgreater{}\_x\_\textless{}/b\textgreater{} \#1}" in text
    assert r"\textbackslash{}x\{y\}\textasciicircum{}\textasciitilde{} `[l](u)` & 1 \textless{} 2$^{*}$ & " in text
    assert r"\label{tab:nas-ty}" in text
    assert r" & \multicolumn{2}{c}{g\&h} \\" in text
    assert r"100 \% of \$5 \& $-$3--4" in text
    for start, end in (("table", "table"), ("tabular", "tabular")):
        assert text.count(rf"\begin{{{start}}}") == text.count(rf"\end{{{end}}}") == 1
    assert [text.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == sorted(
        text.index(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")
    )


def test_every_line_of_a_latex_table_has_all_columns() -> None:
    for name in ("table1", "table3"):
        text = table_of(read_grid(name, "paper"), []).latex()
        columns = re.search(r"\\begin{tabular}{([lr]+)}", text)
        assert columns
        body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].strip().splitlines()[1:]
        assert {line.count(" & ") + 1 for line in body} == {len(columns[1])}
        assert all(line.endswith(r"\\") for line in body)


def test_markdown_is_escaped() -> None:
    lines = NASTY.markdown().splitlines()
    assert lines[0] == r"### 50 % & more \| \<b\>\_x\_\</b\> #1"
    assert lines[4] == r"| \\x{y}^~ \`\[l\](u)\` | 1 \< 2\* | " + '"q" |'
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines[2:5]}) == 1


def test_html_is_escaped_and_well_formed() -> None:
    text = NASTY.html()
    assert "<b>" not in text
    root = ET.fromstring(text)
    assert root.tag == "table"
    assert root.findtext("caption") == NASTY.title
    assert [th.get("scope") for th in root.findall("thead/tr/th")] == ["colgroup", "col", "col", "col"]
    assert [th.get("scope") for th in root.findall("tbody/tr/th")] == ["row"]
    assert "".join(root.find("tbody/tr/td").itertext()) == "1 < 2*"  # type: ignore[union-attr]
    assert root.findtext("tfoot/tr/td/ul/li") == NASTY.notes[0]


def test_a_row_must_fit_its_head() -> None:
    with pytest.raises(ValueError, match="'t': a row of 2 entries under 1 columns"):
        Table("t", "t", (Column("a"),), ((Entry("1"), Entry("2")),))


def test_three_files_a_table_are_written_whole(tmp_path: Path) -> None:
    found = tables(None, summarise(samples.table1() + samples.table3()))
    paths = write(found, tmp_path / "tables")
    assert [path.name for path in paths] == [f"{n}.{e}" for n in ("table1", "table3") for e in ("md", "tex", "csv")]
    assert paths[0].read_text(encoding="utf-8") == found[0].markdown()
    assert paths[1].read_text(encoding="utf-8") == found[0].latex()
    assert paths[5].read_text(encoding="utf-8") == found[1].csv()
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == sorted(path.name for path in paths)
    assert write(found, tmp_path / "tables") == paths  # again, over themselves


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "a\\b"])
def test_a_table_is_written_into_its_folder_only(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="plain file name of its own"):
        write([replace(NASTY, name=name)], tmp_path)
    with pytest.raises(ValueError, match="plain file name of its own, not 'nas_ty'"):
        write([NASTY, NASTY], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [f"table{i}" for i in range(1, 8)])
@pytest.mark.parametrize("preset", ["small", "paper"])
def test_every_table_of_the_paper_has_an_empty_form(name: str, preset: str) -> None:
    table = table_of(read_grid(name, preset), [])
    text = table.markdown()
    assert "not run" in text
    assert "paper" in text
    assert ("sizes differ" in text) == (preset == "small")
    ET.fromstring(table.html())
