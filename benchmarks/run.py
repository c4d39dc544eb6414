"""All speed benchmarks: ``make bench``. Every number beside its target, and a record of the run.

    python benchmarks/run.py [--quick] [--only generation ...] [--data path/to/cifar-10]

A part is a module beside this one with ``measure() -> list[dict]``; a dict has ``name``, ``value``, ``low``,
``high``, ``unit`` and ``target``, a text such as ">= 2.4" or nothing. Records go to ``benchmarks/results``, as JSON
and as a page; those of ``--quick`` only to the screen, for they are not worth quoting.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import inspect
import json
import operator
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from friends.bench.provenance import commit, device_name, versions

PARTS = ("generation", "input_pipeline", "defended_step", "noise_storage", "crafting")
RESULTS = Path(__file__).resolve().parent / "results"
FORMAT = "friends-benchmark-1"
FIELDS = ("name", "value", "low", "high", "unit", "target")
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "=": operator.eq}
NOT_THERE = "not there yet"


def reached(row: dict[str, Any]) -> bool | None:
    """Whether the value is on the right side of its target; None where there is no target.

    Raises:
        ValueError: the target is not a comparison and a number.
    """
    target = str(row["target"]).strip()
    if not target:
        return None
    found = re.fullmatch(r"(>=|<=|>|<|=)\s*([\d.,e+-]+)(\s.*)?", target)
    if found is None:
        raise ValueError(f"the target of {row['name']!r} is not a comparison with a number: {target!r}")
    return bool(COMPARE[found[1]](float(row["value"]), float(found[2].replace(",", ""))))


def verdict(row: dict[str, Any]) -> str:
    return {True: "reached", False: "not reached", None: ""}[reached(row)]


def number(value: float) -> str:
    """Three digits that count; large numbers whole, with commas."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def reach(row: dict[str, Any]) -> str:
    """Lowest and highest, where there is more than one number."""
    return "" if row["low"] == row["high"] else f"{number(row['low'])}–{number(row['high'])}"


def shown(row: dict[str, Any]) -> str:
    """A value with its unit."""
    return f"{number(row['value'])} {row['unit']}".strip()


def part(name: str, quick: bool, data: str | None) -> dict[str, Any]:
    """What one part measured, or why it did not."""
    clock = time.perf_counter()
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return {"missing": NOT_THERE}
    takes = inspect.signature(module.measure).parameters
    given = {key: value for key, value in (("quick", quick), ("data", data)) if key in takes}
    rows = module.measure(**given)
    for row in rows:
        if set(row) != set(FIELDS):
            raise ValueError(f"{name}: a row has {', '.join(FIELDS)}, not {', '.join(row)}")
        reached(row)
    return {"seconds": round(time.perf_counter() - clock, 1), "rows": rows}


def tried(name: str, quick: bool, data: str | None) -> dict[str, Any]:
    """:func:`part`; a part that breaks does not take the others with it."""
    try:
        return part(name, quick, data)
    except Exception:
        traceback.print_exc()
        return {"missing": "failed"}


def record(parts: dict[str, dict[str, Any]], quick: bool) -> dict[str, Any]:
    """A run, with what it was made with."""
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "processor": device_name("cpu"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
        "commit": commit(),
        "quick": quick,
        "parts": parts,
    }


def table(run: dict[str, Any]) -> str:
    """A run as a page."""
    libraries = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    threads = f"{run['threads']} thread{'s' * (run['threads'] > 1)} of {run['cores']} cores"
    lines = ["# Speed", "",
             f"{run['processor']} ({run['capability']}), {threads}; {libraries}; commit {run['commit'] or '-'}; "
             f"{run['date']}.", "",
             "Medians, lowest and highest; ratios are taken within a round, so they stay where times move.",
             "", "    make bench", ""]  # fmt: skip
    for name, found in run["parts"].items():
        lines += [f"## {name}", ""]
        if "missing" in found:
            lines += [f"{found['missing'].capitalize()}.", ""]
            continue
        lines += ["| what | value | lowest–highest | target | |", "| --- | ---: | ---: | --- | --- |"]
        lines += [f"| {row['name']} | {shown(row)} | {reach(row)} | {row['target']} | "
                  f"{verdict(row)} |" for row in found["rows"]]  # fmt: skip
        lines += ["", f"{found['seconds']:.0f} seconds.", ""]
    return "\n".join(lines)


def targets(run: dict[str, Any]) -> str:
    """The rows of a run that have a target, as one table, for the documentation."""
    rows = [row for found in run["parts"].values() for row in found.get("rows", []) if row["target"]]
    lines = ["| what | value | lowest–highest | target | |", "| --- | ---: | ---: | --- | --- |"]
    lines += [f"| {row['name']} | {shown(row)} | {reach(row)} | {row['target']} | {verdict(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def place(run: dict[str, Any], folder: Path) -> Path:
    """The file for a run: date, processor, and the first number that is free."""
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", run["processor"].lower())).strip("-")
    taken = 1
    while (folder / f"{run['date']}-{slug}-{taken}.json").exists():
        taken += 1
    return folder / f"{run['date']}-{slug}-{taken}.json"


def write(run: dict[str, Any], folder: Path) -> Path:
    """Write the record and its page; returns the record's path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = place(run, folder)
    file.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(table(run), encoding="utf-8")
    return file


def main(arguments: Sequence[str] | None = None, *, folder: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a minute or two: to see that everything runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--data", help="CIFAR-10, or any other data set that the library reads")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    parts: dict[str, dict[str, Any]] = {}
    for name in chosen.only:
        print(f"{name} ...", flush=True)
        parts[name] = tried(name, chosen.quick, chosen.data)
    run = record(parts, chosen.quick)
    print(table(run))
    if not chosen.quick:
        print(f"Written: {os.path.relpath(write(run, folder))}")
    return int(any(found.get("missing") == "failed" for found in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
