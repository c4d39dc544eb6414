"""Run one trial from its settings to its report; killed anywhere, it goes on where it was.

Everything lands in one folder, each file written whole or not at all::

    trial.json                       the settings; a folder of another trial is refused
    times.json                       seconds by stage, over all the processes that it took
    poisons/goal-000.safetensors     what the attack made
    victims/goal-000-ARM.json        what became of one victim; control-000.json: of a model trained on clean data
    models/ARM.safetensors           the victims of the first goal
    exhibit.safetensors              what the pictures of the report show
    work/                            trainings in progress; removed at the end
    record.json, report.html         the result
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from friends.attacks.base import bound_of
from friends.bench import report
from friends.bench.exhibit import Exhibit
from friends.bench.lab import Lab
from friends.bench.provenance import commit, device_name, versions
from friends.bench.record import Arm, Report
from friends.bench.trial import ArmSpec, Trial
from friends.bench.victims import control, poisons, victim
from friends.data.files import owned, write_json
from friends.data.poisoned import Goal
from friends.training.defense import Defense
from friends.types import Progress, silent

NOISE = "friendly noise seconds"
STRENGTHS = ("eps", "xi", "zeta", "mu")
UNDEFENDED = ArmSpec(name="undefended")


def run_trial(
    trial: Trial, out: Path, *, device: str = "cpu", download: bool = False, progress: Progress = silent
) -> Report:
    """Run a trial, or what is left of it, and write its record and report.

    Args:
        trial: what to run.
        out: folder of the run; made if needed, resumed if it holds the same trial.
        device: ``"cpu"``, ``"cuda"``, ...
        download: whether a public data set that is not here may be fetched from its home.
        progress: told how far every step is.

    Returns:
        The report; also in ``out`` as ``record.json`` and ``report.html``.

    Raises:
        ValueError: the folder holds another trial (the first difference is named), or the settings do not fit the
            data; raised before any long work.
        BlockingIOError: another process runs in the folder.
    """
    _refuse_foreign(trial, out)
    out.mkdir(parents=True, exist_ok=True)
    with owned(out):
        return _run(Lab(trial, out, torch.device(device), progress, download))


def _run(lab: Lab) -> Report:
    trial, out, progress = lab.trial, lab.out, lab.progress
    if (out / "record.json").exists():  # finished before: nothing to train, but the page may be of an older version
        result = Report.read(out / "record.json")
        report.render(result, exhibit_of(out), out / "report.html")
        return result
    lab.check()
    _claim(trial, out)
    goals = lab.goals
    arms = (UNDEFENDED, *trial.arms)
    rows: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms} | {"clean": []}
    done, total, count = 0, len(goals) * len(arms) * trial.victims + trial.controls, 0
    judged: list[Goal] = []
    progress("trial", done, total, "poisons")
    for g, poisoned in enumerate(poisons(lab, goals)):
        judged.append(poisoned.goal)  # that of an attack that made its own trigger has it now
        count = max(count, len(poisoned.poison_idx))
        for arm in arms:
            for v in range(trial.victims):
                progress("trial", done, total, f"goal {g + 1}/{len(goals)}: {arm.name}")
                rows[arm.name].append(victim(lab, g, v, arm, poisoned))
                done += 1
    for c in range(trial.controls):
        progress("trial", done, total, f"clean model {c + 1}/{trial.controls}")
        rows["clean"].append(control(lab, c, judged[c :: trial.controls]))
        done += 1
    result = _report(lab, goals, rows, count)
    report.render(result, exhibit_of(out), out / "report.html")
    result.write(out / "record.json")
    shutil.rmtree(out / "work", ignore_errors=True)
    progress("trial", total, total)
    return result


def exhibit_of(out: Path) -> Exhibit | None:
    """What the pictures of a run show, if any victim left something."""
    file = out / "exhibit.safetensors"
    return Exhibit.load(file) if file.exists() else None


def run_folder(name: str, out: Path | None) -> Path:
    """Where a trial runs unless told otherwise: ``runs/NAME`` below the working directory."""
    return out if out is not None else Path("runs") / name


def _claim(trial: Trial, out: Path) -> None:
    """Make the folder this trial's, unless it is already."""
    file = out / "trial.json"
    if not file.exists():
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        write_json(file, {"key": trial.key(), "name": trial.name, "started": now, "settings": trial.settings()})


def _refuse_foreign(trial: Trial, out: Path) -> None:
    """Refuse a folder of another trial, or of something else."""
    file = out / "trial.json"
    if not file.exists():
        refuse_occupied(out)
        return
    theirs = json.loads(file.read_text(encoding="utf-8"))
    if theirs["key"] != trial.key():
        where = first_difference(theirs["settings"], json.loads(json.dumps(trial.settings())))
        raise ValueError(f"{out} holds another trial: {where}. Choose another folder with --out, or delete this one.")


def refuse_occupied(out: Path) -> None:
    """Raise ``ValueError`` if a folder not yet ours is a file, or holds more than what a kill left half done."""
    if out.exists() and (not out.is_dir() or any(not f.name.endswith(".tmp") for f in out.iterdir())):
        raise ValueError(f"{out} holds something else: choose another folder with --out")


def first_difference(theirs: object, ours: object, where: str = "") -> str:
    """The first setting in which two trials differ, in words."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        a, b = cast("dict[str, object]", theirs), cast("dict[str, object]", ours)
        for name in sorted(a.keys() | b.keys()):
            if a.get(name) != b.get(name):
                return first_difference(a.get(name), b.get(name), f"{where}.{name}" if where else name)
    return f"its {where or 'setting'} is {theirs!r}, not {ours!r}"


def _report(lab: Lab, goals: list[Goal], rows: dict[str, list[dict[str, Any]]], poisoned: int) -> Report:
    """Gather the outcomes of all victims, of ``poisoned`` poisons each, into one record."""
    trial, attack = lab.trial, lab.trial.attack
    train, test, pool = lab.data
    settings = trial.settings()
    arms = [_arm(arm, rows[arm.name], trial.victims) for arm in (UNDEFENDED, *trial.arms)]
    if rows["clean"]:
        arms.append(_control_arm(rows["clean"], len(goals)))
    network = lab.build(torch.Generator())
    return Report(
        name=trial.name,
        key=trial.key(),
        trial=settings,
        seed=trial.seed,
        scenario=trial.scenario,
        scaled_down=trial.scaled_down,
        data={
            "name": train.name,
            "train": len(train),
            "test": len(test),
            "pretraining": 0 if trial.scenario == "scratch" else len(pool),
            "shape": list(train.shape),
            "classes": list(train.classes),
            "fingerprint": train.fingerprint,
        },
        model={
            "name": trial.model.name,
            "width": trial.model.width,
            "parameters": sum(p.numel() for p in network.parameters()),
        },
        attack={
            "name": type(attack).__name__,
            "settings": settings["attack"],
            "xi": getattr(attack, "xi", None),
            "bound": bound_of(attack),
            "budget": getattr(attack, "budget", None),
            "poisons": poisoned,
        },
        goals=tuple(
            {
                "name": goal.name,
                "y_true": train.classes[int(goal.y_true[0])],
                "y_wanted": train.classes[int(goal.y_wanted[0])],
            }
            for goal in goals
        ),
        arms=tuple(arms),
        versions=versions(),
        commit=commit(),
        device=device_name(lab.device),
        threads=torch.get_num_threads(),
        started=json.loads((lab.out / "trial.json").read_text(encoding="utf-8"))["started"],
        seconds=_times(lab.seconds, rows),
    )


def _arm(arm: ArmSpec, rows: list[dict[str, Any]], victims: int) -> Arm:
    """The outcomes of the models of one arm, goal by goal; ``victims`` models of a goal come one after the other."""
    each = [
        (int(hit), int(m), float(p))
        for row in rows
        for hit, m, p in zip(row["hits"], row["images"], row["confidence"], strict=True)
    ]
    goals = [each[i : i + victims] for i in range(0, len(each), victims)]
    rates = tuple(sum(hit for hit, _, _ in goal) / sum(m for _, m, _ in goal) for goal in goals)
    accuracies = tuple(float(row["accuracy"]) for row in rows)
    return Arm(
        name=arm.name,
        defenses=tuple(repr(defense) for defense in arm.defenses),
        successes=sum(hit for hit, _, _ in each),
        n=sum(m for _, m, _ in each),
        accuracy=sum(accuracies) / len(accuracies),
        accuracies=accuracies,
        seconds=sum(float(row["seconds"]) for row in rows),
        confidence=tuple(sum(p for _, _, p in goal) / victims for goal in goals),
        succeeded=tuple(rate > 0.5 for rate in rates),
        rates=rates,
        history=tuple(tuple(row["history"]) for row in rows[::victims]),
        abstained=sum(int(row["abstained"]) for row in rows),
        told=told(arm.defenses),
        shared=sum(float(row.get("shared", 0)) for row in rows),
        **_defended(rows, victims),
    )


def _defended(rows: list[dict[str, Any]], victims: int) -> dict[str, Any]:
    """What the models of an arm refused to answer and removed, where they did."""
    found: dict[str, Any] = {}
    refused = [int(part) for row in rows for part in row.get("refused", [0] * len(row["hits"]))]
    images = [int(part) for row in rows for part in row["images"]]
    if any(refused) or any(row["abstained"] for row in rows):
        goals = range(0, len(refused), victims)
        found["refused"] = tuple(sum(refused[g : g + victims]) / sum(images[g : g + victims]) for g in goals)
        found["selective"] = tuple(float(row["selective"]) for row in rows)
    removed = [row["removed"] for row in rows if row.get("removed") is not None]
    if any(part[0] for part in removed):
        found["removed"] = tuple(int(part[0]) for part in removed)
        found["caught"] = tuple(int(part[1]) for part in removed)
    return found


def told(defenses: Sequence[Defense]) -> str:
    """What some defenses are told about the attack, in words: "budget 0.01; clean images"."""
    given = [(name, value) for defense in defenses for name, value in defense.told().items() if value is not None]
    parts = [f"{name} {printed(name, value)}" for name, value in given]
    parts += ["clean images"] if any(defense.about.clean for defense in defenses) else []
    return "; ".join(dict.fromkeys(parts))


def printed(name: str, value: object) -> str:
    """A setting as papers print it: strengths in pixel units as n/255."""
    if isinstance(value, float) and name in STRENGTHS:
        return f"{value * 255:g}/255"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _control_arm(rows: list[dict[str, Any]], n: int) -> Arm:
    """The control. Model c of k was asked about goals c, c+k, c+2k, ...: put them back in order."""
    arm, k = _arm(ArmSpec(name="clean"), rows, 1), len(rows)
    order = [g for c in range(k) for g in range(c, n, k)]
    place = sorted(range(n), key=lambda i: order[i])
    return replace(
        arm,
        succeeded=tuple(arm.succeeded[i] for i in place),
        rates=tuple(arm.rates[i] for i in place),
        confidence=tuple(arm.confidence[i] for i in place),
        notes=f"{k} {'model' if k == 1 else 'models'} trained on clean data, asked about {n} goals",
    )


def _times(seconds: dict[str, float], rows: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Seconds by stage, over all the processes that it took."""
    crafting = [value for name, value in seconds.items() if name.startswith("crafting ")]
    times = {name: value for name, value in seconds.items() if not name.startswith("crafting ")}
    if crafting:
        times["crafting, mean per target"] = sum(crafting) / len(crafting)
    for name, some in rows.items():
        if some:
            times[f"training {name}, mean per model"] = sum(float(row["seconds"]) for row in some) / len(some)
            noise = [line[NOISE] for row in some for line in row["history"] if NOISE in line]
            if noise:
                times[f"friendly noise of {name}, mean per model"] = sum(noise) / len(noise)
    return times
