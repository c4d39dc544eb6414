"""``friends bench`` as a user meets it: plan, run, go on, look, and every mistake in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from friends.bench.grid.record import Record, append, read
from friends.cli import app

GRID = """
title = "Two bounds"
scaled_down = "a test"
[trial]
scenario = "scratch"
data = { source = "digits", classes = ["4", "9"], train = 80, test = 40 }
model = { name = "tiny", width = 4 }
goals = { count = 1 }
attack = { name = "gradient-matching", xi = "64/255", budget = 0.1, steps = 2, restarts = 1, augment = false }
recipe = { epochs = 2, batch = 40, lr = 0.05, augment = false }
[axes.xi]
"32/255" = { attack = { xi = "32/255" } }
"64/255" = {}
[defenses]
epic = { name = "epic", share = 0.1, start = 1, interval = 1 }
dp-sgd = { name = "dp-sgd" }
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "mine.toml").write_text(GRID)
    return tmp_path


def bench(*arguments: str, ok: bool = True) -> Result:
    result = CliRunner().invoke(app, ["bench", *arguments])
    if ok:
        assert result.exit_code == 0, result.output + str(result.exception)
    return result


def wrong(*arguments: str) -> str:
    result = bench(*arguments, ok=False)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_a_grid_is_planned_run_in_parts_and_shown(here: Path) -> None:
    planned = bench("run", "mine.toml", "--dry-run").output
    assert "8 models, 8 to do, 2 poison sets to craft" in planned
    assert "scaled down: a test" in planned
    assert not (here / "bench" / "mine").exists()

    first = bench("run", "mine.toml", "--only", "epic", "--at", "xi=64/255", "--device", "cpu").output
    assert "epic, seed 0:" in first
    assert "not run" in (here / "bench" / "mine" / "tables" / "mine.md").read_text()  # the other rows
    records = read(here / "bench" / "mine" / "records.jsonl")
    assert [(r.labels["xi"], r.defense) for r in records] == [("64/255", n) for n in ("undefended", "clean", "epic")]

    second = bench("run", "mine.toml", "--device", "cpu").output
    assert "8 models, 5 to do, 1 poison sets to craft" in second
    folder = here / "bench" / "mine"
    assert read(folder / "records.jsonl")[:3] == records
    assert len(read(folder / "records.jsonl")) == 8
    assert {file.suffix for file in (folder / "tables").iterdir()} == {".md", ".tex", ".csv"}
    assert (folder / "site" / "index.html").is_file()
    assert {"success-over-xi.png", "success-over-xi.svg"} <= {file.name for file in (folder / "figures").iterdir()}

    again = bench("run", "mine.toml", "--device", "cpu").output
    assert "everything is done already" in again
    more = bench("run", "mine.toml", "--seeds", "0,3", "--only", "epic", "--device", "cpu").output
    assert "epic, seed 3:" in more
    assert "epic, seed 0:" not in more.split("Two bounds")[1]

    report = bench("report").output
    assert "1 grids: bench/site/index.html" in report
    (folder / "tables" / "mine.md").unlink()
    bench("tables", "bench/mine")
    assert "32/255" in (folder / "tables" / "mine.md").read_text()


def test_records_of_machines_are_merged_and_others_refused(here: Path) -> None:
    for seed in ("0,", "1,"):
        bench("run", "mine.toml", "--seeds", seed, "--only", "epic", "-o", f"part{seed[0]}", "--device", "cpu")
    assert "12 records in all" in bench("merge", "part0", "part1", "-o", "all").output
    assert len(read(here / "all" / "records.jsonl")) == 12
    assert (here / "all" / "grid.json").is_file()
    bench("merge", "part0", "-o", "all")  # what is there stays
    assert len(read(here / "all" / "records.jsonl")) == 12
    bench("tables", "all")
    line = json.loads((here / "part1" / "records.jsonl").read_text().splitlines()[0])
    append(here / "other.jsonl", [Record.from_line(json.dumps({**line, "code": "0ther", "seed": 7, "cell": "x"}))])
    assert "made by other code (0ther" in wrong("merge", "all", "other.jsonl", "-o", "mixed")
    assert not (here / "mixed").exists()
    assert "there are no records at" in wrong("merge", "nowhere", "-o", "x")


def test_records_of_other_settings_are_never_mixed_in(here: Path) -> None:
    bench("run", "mine.toml", "--only", "epic", "--device", "cpu")
    (here / "mine.toml").write_text(GRID.replace("epochs = 2", "epochs = 3"))
    said = wrong("run", "mine.toml", "--only", "epic", "--device", "cpu")
    assert "6 made with other settings or data" in said
    assert "--set-aside" in said
    bench("run", "mine.toml", "--only", "epic", "--set-aside", "--device", "cpu")
    folder = here / "bench" / "mine"
    assert len(read(folder / "records.jsonl")) == len(read(folder / "records-old-1.jsonl")) == 6


def test_a_grid_that_shares_models_is_gone_on_with_at_every_point(here: Path) -> None:
    """Its axis changes a defense alone: after one undefended record, those of the other points are still to be made."""
    axis = """[axes.lr]
small = { defenses = { epic = { share = 0.1 } } }
large = { defenses = { epic = { share = 0.2 } } }
"""
    text = GRID[: GRID.index("[axes.xi]")] + axis + GRID[GRID.index("[defenses]") :]
    (here / "mine.toml").write_text(text)
    bench("run", "mine.toml", "--at", "lr=small", "--only", "undefended", "--device", "cpu")
    bench("run", "mine.toml", "--device", "cpu")
    records = read(here / "bench" / "mine" / "records.jsonl")
    assert len({record.row for record in records}) == len(records) == 8
    bench("merge", "bench/mine", "-o", "again")
    assert len(read(here / "again" / "records.jsonl")) == 8


def test_a_dry_run_changes_nothing(here: Path) -> None:
    bench("run", "mine.toml", "--only", "epic", "--device", "cpu")
    before = {path: path.read_bytes() for path in (here / "bench" / "mine").rglob("*") if path.is_file()}
    (here / "mine.toml").write_text(GRID.replace("epochs = 2", "epochs = 3"))
    wrong("run", "mine.toml", "--dry-run", "--set-aside", "--device", "cpu")
    assert {path: path.read_bytes() for path in (here / "bench" / "mine").rglob("*") if path.is_file()} == before


def test_the_cache_can_be_listed_checked_repaired_and_pruned(here: Path) -> None:
    bench("run", "mine.toml", "--only", "epic", "--device", "cpu")
    listed = bench("cache", "list").output
    assert all(kind in listed for kind in ("data", "poison", "surrogate", "victim"))
    assert "are as they were written" in bench("cache", "check").output
    poison = next((here / "bench" / "cache" / "poison").iterdir()) / "poisons.safetensors"
    raw = bytearray(poison.read_bytes())
    raw[-1] ^= 1
    poison.write_bytes(bytes(raw))
    assert "1 files are damaged" in wrong("cache", "check")
    assert "1 removed" in bench("cache", "check", "--repair").output
    assert not poison.exists()
    assert "would go" in bench("cache", "prune", "--keep", "1MB", "--dry-run").output
    assert "removed" in bench("cache", "prune", "--kind", "victim").output
    assert "victim" not in bench("cache", "list").output
    assert "say what shall go" in wrong("cache", "prune")
    done = bench("run", "mine.toml", "--only", "epic", "--device", "cpu").output
    assert "everything is done already" in done  # the records stay


def test_a_finished_grid_takes_no_time_even_with_its_cache_gone(here: Path) -> None:
    part = ["run", "mine.toml", "--only", "epic", "--at", "xi=64/255", "--device", "cpu"]
    bench(*part)
    bench("cache", "prune", "--keep", "0.001B")
    said = bench(*part, "--dry-run").output
    rows = [line.split("│")[1:-1] for line in said.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row[-4:]] for row in rows] == [["1", "1", "0", "–"]] * 3
    assert "3 models, 0 to do, 0 poison sets to craft: about – on one worker" in said
    assert "0 GB of cache" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "table9"], "no built-in grid 'table9'"),
        (["run", "none.toml"], "none.toml"),
        (["run", "mine.toml", "--preset", "huge"], "unknown preset 'huge'"),
        (["run", "mine.toml", "--only", "abl"], "has no row 'abl'; it has epic, dp-sgd"),
        (["run", "mine.toml", "--at", "xi"], "--at is AXIS=LABEL"),
        (["run", "mine.toml", "--at", "xi=3/255"], "no point xi = 3/255"),
        (["run", "mine.toml", "--seeds", "many"], "--seeds is how many"),
        (["run", "mine.toml", "--seeds", "0"], "--seeds is a number >= 1"),
        (["run", "mine.toml", "--engine", "slurm"], "unknown engine 'slurm'; choose inline, workers or ray"),
        (["run", "mine.toml", "--memory", "much"], "a size is a number with a unit, such as 16GB, not 'much'"),
        (["run", "mine.toml", "--workers", "-1"], "--workers is a number >= 1"),
        (["run", "mine.toml", "--engine", "workers", "--memory", "1MB"], "can never run here: it may take 0.924 GB"),
        (["run", "mine.toml", "--device", "tpu"], "device 'tpu' cannot be used here"),
        (["run", "mine.toml", "--minutes", "-3"], "--minutes is a number > 0"),
        (["run", "table1", "--preset", "small"], "cifar10"),
        (["run", "mine.toml", "--cache", "."], "holds other things and is no cache"),
        (["run", "mine.toml", "--cache-url", "nowhere://x"], "cannot keep artifacts at"),
        (["report"], "run a grid first"),
        (["tables", "nowhere"], "has no records.jsonl"),
    ],
)
def test_every_mistake_is_told_before_any_work(here: Path, arguments: list[str], words: str) -> None:
    if arguments[0] == "run":
        arguments = [*arguments, *([] if "--device" in arguments else ["--device", "cpu"])]
    assert words in wrong(*arguments)
    assert not list(here.glob("bench/*/records.jsonl"))
    assert not list(here.glob("bench/cache/victim/*"))


def test_the_built_in_grids_are_listed() -> None:
    said = bench("list").output
    assert all(f"table{i}" in said for i in range(1, 8))
    assert all(f"figure{i}" in said for i in range(1, 6))


def test_several_workers_are_a_word_away(here: Path) -> None:
    bench("run", "mine.toml", "--engine", "workers", "--workers", "2", "--only", "epic", "--device", "cpu")
    assert len(read(here / "bench" / "mine" / "records.jsonl")) == 6
