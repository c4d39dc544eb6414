"""The README keeps its word: its Python blocks run, its commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import friends
from friends.data.images import LabeledImages
from friends.models import build

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run_one_after_the_other(
    digits: LabeledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    some = digits.sample(40, torch.Generator().manual_seed(0))
    tiny = build("tiny", shape=some.shape, classes=10, moments=some.moments, generator=torch.Generator())
    namespace: dict[str, object] = {
        "dataset": [(Image.fromarray(x[0].numpy()), int(y)) for x, y in zip(some.x, some.y, strict=True)],
        "proxy": tiny,
        "model": tiny,
        "augment": None,
        "images": some.pixels(),
        "rows": torch.arange(8),
        "generator": torch.Generator().manual_seed(0),
    }
    assert len(blocks("python")) >= 4
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    batch, labels = next(iter(namespace["loader"]))  # type: ignore[call-overload]
    assert batch.shape == (40, 1, 28, 28)
    assert sorted(labels.tolist()) == sorted(some.y.tolist())
    assert float(batch.min()) < 0  # random noise is not clamped
    assert len(namespace["both"].history) == 3  # type: ignore[attr-defined]
    history = namespace["fitted"].history  # type: ignore[attr-defined]
    assert history[-1]["loss"] < history[0]["loss"]


def test_protecting_a_loop_takes_at_most_five_lines() -> None:
    block = next(b for b in blocks("python") if "NoisyDataset" in b)
    assert len([line for line in block.splitlines() if line.strip()]) <= 5


def test_its_links_and_commands_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE), command
    for file in re.findall(r"^friends run (\S+)", "\n".join(blocks("sh")), flags=re.MULTILINE):
        assert (ROOT / file).is_file(), file


def test_every_document_has_no_dead_link() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_count_in_the_readme_stands_in_a_table_of_results() -> None:
    results = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "results").glob("*.md"))
    rows = re.findall(r"\| (\d+/\d+) \| (\d+–\d+ %) \| ([\d.]+ %) \|", README)
    assert len(rows) >= 10
    for success, interval, accuracy in rows:
        assert re.search(rf"\| {success} \| {interval} \|.*\| {accuracy} \|", results), (success, interval, accuracy)


def test_tables_of_results_are_what_their_records_say() -> None:
    from friends.bench.comparison import comparison_page
    from friends.bench.tables import page, read_records

    files = sorted(file for file in (ROOT / "results").rglob("*.jsonl") if "bench" not in file.parts)
    assert files
    for file in files:
        made = comparison_page if file.parent.name == "defenses" else page
        assert made(read_records(file)) == file.with_suffix(".md").read_text(encoding="utf-8"), file.name
        assert not re.search(r'"/(home|root|tmp|work)/', file.read_text(encoding="utf-8"))


def test_the_table_of_all_attacks_is_what_the_records_say() -> None:
    from friends.bench.tables import overview, read_records

    table = overview([read_records(file) for file in sorted((ROOT / "results" / "attacks").glob("*.jsonl"))])
    assert table == (ROOT / "results" / "attacks.md").read_text(encoding="utf-8")
    assert table in (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")


def test_every_attack_has_a_trial_and_results() -> None:
    from friends.attacks import ATTACKS
    from friends.bench.tables import read_records

    records = [read_records(file)[0] for file in (ROOT / "results" / "attacks").glob("*.jsonl")]
    assert {cls.__name__ for cls in ATTACKS.values()} == {record.attack["name"] for record in records}


def test_the_trial_in_the_documentation_is_valid(tmp_path: Path) -> None:
    from friends.bench.trial import read_trial

    page = (ROOT / "docs" / "trials.md").read_text(encoding="utf-8")
    block, goals = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    file = tmp_path / "documented.toml"
    file.write_text(block)
    trial = read_trial(file)
    assert trial.name == "my-trial"
    assert trial.arms[0].defenses[0] == friends.Friends()
    file.write_text('[data]\nsource = "digits"\n[attack]\nname = "sleeper-agent"\n' + goals)
    assert read_trial(file).goals.trigger is not None
