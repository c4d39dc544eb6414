"""A line a cell: it comes back as it was, survives a kill, and never mixes with what it cannot be compared to."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from record_samples import record

from friends.bench.grid.record import Record, append, merge, read, rows


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    some = [record(seed=s, labels={"xi": "8/255"}, removed=(9, 4, 5), told="budget") for s in range(3)]
    append(tmp_path / "records.jsonl", some[:1])
    append(tmp_path / "records.jsonl", some[1:])
    assert read(tmp_path / "records.jsonl") == some
    assert read(tmp_path / "none.jsonl") == []
    assert some[0].rate == 1
    assert some[0].is_undefended
    assert not some[0].is_control


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hits": 2}, "2 hits of 1 images"),
        ({"images": 0, "hits": 0}, "0 hits of 0 images"),
        ({"accuracy": 93.0}, r"accuracy is in \[0, 1\], not 93.0"),
        ({"confidence": math.nan}, r"confidence is in \[0, 1\], not nan"),
        ({"removed": (3, 1)}, "removed is"),
    ],
)
def test_numbers_that_cannot_be_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        record(**changes)  # type: ignore[arg-type]


def test_a_torn_line_is_left_out_and_cut_off(tmp_path: Path) -> None:
    path, some = tmp_path / "records.jsonl", [record(seed=s) for s in range(3)]
    append(path, some[:2])
    whole = path.read_bytes()
    for cut in range(len(whole.splitlines()[0]) + 2, len(whole), 97):
        path.write_bytes(whole[:cut])
        assert read(path) == some[:1]
    append(path, some[2:])
    assert read(path) == [some[0], some[2]]


def test_any_other_bad_line_is_an_error_that_names_it(tmp_path: Path) -> None:
    path, good = tmp_path / "records.jsonl", record().as_line()
    missing = json.loads(good)
    del missing["hits"]
    for line, words in (
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is no record of a cell"),
        (json.dumps({**json.loads(good), "new": 1}), "unknown fields new"),
        (json.dumps(missing), "hits"),
        (json.dumps({**json.loads(good), "hits": 7}), "line 2: cell .* 7 hits of 1"),
    ):
        path.write_text(f"{good}\n{line}\n")
        with pytest.raises(ValueError, match=words):
            read(path)


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from record_samples import record
from friends.bench.grid.record import append
for seed in range(40):
    append(Path(sys.argv[1]), [record(sys.argv[3], seed=seed, history=({"loss": 1.0},) * 200)])
"""


def test_two_processes_write_whole_lines(tmp_path: Path) -> None:
    path, here = tmp_path / "records.jsonl", str(Path(__file__).parent)
    calls = [[sys.executable, "-c", WRITER, str(path), here, name] for name in ("undefended", "friends-b")]
    writers = [subprocess.Popen(call) for call in calls]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    found = read(path)
    for name in ("undefended", "friends-b"):
        assert [r.seed for r in found if r.defense == name] == list(range(40))


def test_records_of_machines_become_one_list(tmp_path: Path) -> None:
    a, b = [record(seed=s) for s in (0, 1)], [record(seed=s) for s in (1, 2)]
    again = replace(b[0], seconds={"surrogates": 1.0, "crafting": 2.0, "training": 3.0}, device="GPU", threads=9)
    assert [r.seed for r in merge([a, [again, b[1]]])] == [0, 1, 2]
    assert merge([a, [again]])[1].device == "CPU"  # the first stays


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hits": 0, "confidence": 0.1}, "came out otherwise"),
        ({"accuracy": 0.94}, "came out otherwise"),
        ({"code": "0ther"}, r"made by other code \(0ther instead of c0de\)"),
    ],
)
def test_records_that_contradict_each_other_are_not_merged(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        merge([[record()], [replace(record(), **changes)]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"code": "0ther"}, "made by other code"),
        ({"settings": {**record().settings, "seed": 1, "xi": 3}}, "other settings than cell"),
        ({"scaled_down": "small"}, "other settings than cell"),
    ],
)
def test_seeds_of_other_code_or_settings_are_not_merged(changes: dict[str, object], words: str) -> None:
    assert len(merge([[record()], [record(seed=1)]])) == 2
    with pytest.raises(ValueError, match=words):
        merge([[record()], [record(seed=1, **changes)]])  # type: ignore[arg-type]


def test_points_that_share_a_model_each_keep_its_record() -> None:
    """Where an axis changes a defense alone, the undefended models of all points are one."""
    one, other = (record(labels={"mu": mu}, cell="the same") for mu in ("8/255", "16/255"))
    assert merge([[one, other]]) == [one, other]


def test_rows_are_in_the_order_of_their_pairs() -> None:
    some = [record(name, seed=s) for s in (2, 0, 1) for name in ("undefended", "epic")]
    found = rows(some)
    assert [defense for _, defense in found] == ["undefended", "epic"]
    assert {tuple(r.seed for r in of) for of in found.values()} == {(0, 1, 2)}


def test_what_counts_is_not_when_and_where() -> None:
    one = record(history=({"loss": 1.0, "seconds": 2.0},))
    two = replace(one, started="2026-01-01", device="GPU", seconds={}, history=({"loss": 1.0, "seconds": 3.0},))
    assert one.essence() == two.essence()
    assert one.essence() != replace(one, history=({"loss": 1.5, "seconds": 2.0},)).essence()
    assert isinstance(Record.from_line(one.as_line()).history, tuple)
