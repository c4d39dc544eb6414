"""Crafting poisons into a folder of their own: `friends attack`.

The same settings give the same poisons as in a whole trial (:mod:`friends.bench.run`), which also trains victims.
"""

from __future__ import annotations

import datetime
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from friends.attacks import ATTACKS
from friends.attacks.base import Attack, ManyGoals
from friends.bench.lab import Lab
from friends.bench.poison_folder import (
    MANIFEST,
    WORK,
    Manifest,
    PoisonFile,
    export,
    goal_file,
    refuse_export,
    sha256_of,
    verify,
)
from friends.bench.provenance import commit, device_name, versions
from friends.bench.run import first_difference, refuse_occupied
from friends.bench.trial import Trial, parse_trial, read_table
from friends.bench.victims import poisons
from friends.data.files import owned
from friends.data.poisoned import Goal, PoisonedDataset
from friends.training.recipe import RECIPES
from friends.types import Progress, silent

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

VICTIMS_ONLY = ("arms", "batchnorm", "controls", "scaled_down", "victims")
"""What a trial says about victims and reports: no poison depends on it."""


def craft_folder(
    trial: Trial,
    out: Path,
    *,
    device: str = "cpu",
    download: bool = False,
    export_to: Path | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Craft the poisons of every goal of a trial, or those that are missing, without training a victim.

    Args:
        trial: what to craft; see :func:`crafting_only`.
        out: folder of the poisons; made if needed, resumed if it holds the same crafting.
        device: ``"cpu"``, ``"cuda"``, ...
        download: whether a public data set that is not here may be fetched from its home.
        export_to: an empty or new folder that gets the poisons as pickles, too (:mod:`friends.data.legacy`).
        progress: told how far every step is.

    Returns:
        What was crafted; also in ``out``, see :mod:`friends.bench.poison_folder`.

    Raises:
        ValueError: the folder holds another crafting (the first difference is named), or the settings do not fit the
            data; raised before any long work.
        BlockingIOError: another process works in the folder.
        FileExistsError: ``export_to`` is not empty.
    """
    trial = crafting_only(trial)
    _refuse_foreign(trial, out)
    if export_to is not None:
        refuse_export(export_to)
    out.mkdir(parents=True, exist_ok=True)
    with owned(out):
        lab = Lab(trial, out / WORK, torch.device(device), progress, download)
        finished = (out / MANIFEST).exists() and verify(out).finished
        manifest = Manifest.read(out) if finished else _craft(lab, out)
        shutil.rmtree(out / WORK, ignore_errors=True)
        if export_to is not None:
            export(out, lab.data[0], export_to)
        return manifest


def crafting_only(trial: Trial) -> Trial:
    """The same trial without what no poison depends on: arms, controls, and recipes that no surrogate is trained by."""
    scratch = trial.scenario == "scratch"
    return replace(
        trial,
        arms=(),
        controls=0,
        victims=1,
        batchnorm="running",
        scaled_down="",
        recipe=trial.recipe if scratch else RECIPES[trial.scenario],
        pretraining=RECIPES["scratch"] if scratch else trial.pretraining,
    )


def _craft(lab: Lab, out: Path) -> Manifest:
    lab.check()
    goals = [] if lab.trial.goals.correct else lab.goals  # cheap: mistakes show before the folder is claimed
    manifest = Manifest.read(out) if (out / MANIFEST).exists() else _begun(lab, out)
    goals = goals or lab.goals
    missing = list(range(len(manifest.goals), len(goals)))
    together = isinstance(lab.trial.attack, ManyGoals) and not lab.trial.own_surrogates
    for some in [missing] if together and missing else [[g] for g in missing]:
        lab.progress("goals", some[0], len(goals), goals[some[0]].name if len(some) == 1 else f"{len(some)} together")
        for g, poisoned in zip(some, poisons(lab, goals, some), strict=True):
            entry = _publish(lab, out, g, goals[g], poisoned)
            manifest = replace(manifest, goals=(*manifest.goals, entry), seconds=dict(lab.seconds))
            manifest.write(out)
    lab.progress("goals", len(goals), len(goals))
    return manifest


def _begun(lab: Lab, out: Path) -> Manifest:
    """The manifest of a crafting that begins; from now on the folder is its own."""
    train = lab.data[0]
    manifest = Manifest(
        key=lab.trial.key(),
        attack=attack_name(lab.trial.attack),
        settings=_settings(lab.trial),
        data={
            "name": train.name,
            "fingerprint": train.fingerprint,
            "train": len(train),
            "shape": list(train.shape),
            "classes": list(train.classes),
        },
        planned=lab.trial.goals.count,
        started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        versions=versions(),
        commit=commit(),
        device=device_name(lab.device),
        threads=torch.get_num_threads(),
    )
    manifest.write(out)
    return manifest


def _publish(lab: Lab, out: Path, g: int, goal: Goal, poisoned: PoisonedDataset) -> PoisonFile:
    """Put finished poisons where they stay."""
    clean, file = lab.data[0], out / goal_file(g)
    poisoned.save(file, clean=clean, key=lab.trial.key())
    first, last = _scores(poisoned.recipe)
    return PoisonFile(
        file=file.name,
        bytes=file.stat().st_size,
        sha256=sha256_of(file),
        goal=goal.name,
        images=len(goal),
        poisons=len(poisoned.poison_idx),
        largest_change=poisoned.largest_change(clean),
        score_first=first,
        score_last=last,
        seconds=lab.seconds.get(f"crafting {g:03d}", 0.0),
    )


def _scores(recipe: Mapping[str, object]) -> tuple[float | None, float | None]:
    """First and last objective of the restart that was kept, or of the only one there is."""
    first, last = (cast("Sequence[float]", recipe.get(name) or ()) for name in ("score_first", "score_last"))
    if not first or len(first) != len(last):
        return None, None
    kept = min(range(len(last)), key=lambda restart: last[restart])
    return first[kept], last[kept]


def _settings(trial: Trial) -> dict[str, Any]:
    """What the poisons follow from, as plain values."""
    unused = (*VICTIMS_ONLY, "pretraining" if trial.scenario == "scratch" else "recipe")
    return {name: value for name, value in trial.settings().items() if name not in unused}


def _refuse_foreign(trial: Trial, out: Path) -> None:
    """Refuse a folder of another crafting, or of something else."""
    if not (out / MANIFEST).exists():
        refuse_occupied(out)
        return
    theirs = Manifest.read(out)
    if theirs.key != trial.key():
        where = first_difference(theirs.settings, json.loads(json.dumps(_settings(trial))))
        raise ValueError(f"{out} holds other poisons: {where}. Choose another folder with --out, or delete this one.")


def attack_name(attack: Attack) -> str:
    """What the table of attacks calls it."""
    return next((name for name, cls in ATTACKS.items() if cls is type(attack)), type(attack).__name__)


# -- what the command line says, as a trial ---------------------------------------------------------------------------


def attack_trial(
    what: str, options: Mapping[str, Mapping[str, Any]] | None = None, settings: Sequence[str] = ()
) -> Trial:
    """The trial that a command line describes: an attack's name or a trial file, and what is said besides.

    Args:
        what: an attack's name, for which everything has a default but the data; or a TOML file.
        options: values that replace those of the file, by table: ``{"data": {"source": "digits"}}``; ``""`` is the top.
            ``"recipe"`` is how surrogates are trained, which is a trial's ``pretraining`` where it has one. None is as
            if it was not said.
        settings: the attack's own, as ``"steps=100"``, ``"xi=16/255"`` or ``"adapt.mu=16/255"``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a name or a value is wrong; says which, and what was meant perhaps.
    """
    table, name = (_table_of_attack(what), what) if what in ATTACKS else (_table_of_file(what), Path(what).stem)
    given = {part: {k: v for k, v in values.items() if v is not None} for part, values in (options or {}).items()}
    table |= given.pop("", {})
    attack = _attack_of(table)
    if attack is not None:
        table.setdefault("scenario", attack.about.scenarios[0])
    recipe, trigger = given.pop("recipe", {}), given.pop("trigger", {})
    given["recipe" if table.get("scenario", "scratch") == "scratch" else "pretraining"] = recipe
    if recipe.get("augment") is False:  # one belief of the attacker: the victim does not augment
        given["recipe"] = {**given.get("recipe", {}), "augment": False}
        if "augment" in getattr(attack, "__dataclass_fields__", {}):
            given["attack"] = {"augment": False}
    if trigger or (attack is not None and attack.about.aim == "backdoor"):
        table["goals"] = _with_trigger(table.get("goals", {}), _published_trigger(attack), trigger)
    for part, values in given.items():
        if values:
            table[part] = {**table.get(part, {}), **values}
    if "source" not in table.get("data", {}):
        raise ValueError("say which images are poisoned: --data digits, for a first try, or the path of your own")
    for setting in settings:
        _set(table.setdefault("attack", {}), setting)
    return crafting_only(parse_trial({**table, "arms": [], "controls": 0}, default_name=name))


def _attack_of(table: Mapping[str, Any]) -> type[Attack] | None:
    """The attack that a table names, if there is one; if not, it is for :func:`parse_trial` to say so."""
    named = table.get("attack")
    return ATTACKS.get(str(cast("dict[str, Any]", named).get("name"))) if isinstance(named, dict) else None


def _with_trigger(goals: Mapping[str, Any], default: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Goals with a trigger: what was said of it, else what the file says, else the default."""
    return {**goals, "trigger": {**default, **(goals.get("trigger") or {}), **said}}


def _published_trigger(attack: type[Attack] | None) -> dict[str, Any]:
    """The trigger that an attack's authors use, as a trial says it."""
    if attack is None:
        return {}
    if attack.about.makes_trigger:
        return {"kind": "made"}
    kind, size, place = attack.about.trigger
    return {"kind": kind, "size": size, "place": place}


def _table_of_attack(name: str) -> dict[str, Any]:
    """A trial of nothing but an attack."""
    return {"attack": {"name": name}, "goals": {"count": 1}}


def _table_of_file(what: str) -> dict[str, Any]:
    """The table of a trial file."""
    import difflib

    path = Path(what)
    if not path.is_file():
        if path.suffix == ".toml" or path.name != what:
            raise FileNotFoundError(f"no trial file or folder {what}")
        near = difflib.get_close_matches(what, list(ATTACKS), n=1)
        meant = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(ATTACKS)}, or a trial file"
        raise ValueError(f"unknown attack {what!r}, {meant}")
    return read_table(path)


def _set(table: dict[str, Any], setting: str) -> None:
    """Put ``NAME=VALUE`` into the attack's table; ``a.b=VALUE`` into a table in it."""
    path, equals, text = setting.partition("=")
    *above, name = path.strip().split(".")
    if not equals or not name:
        raise ValueError(f"a setting of the attack is given as NAME=VALUE, e.g. steps=100, not {setting!r}")
    for part in above:
        if not isinstance(table.get(part), dict):
            table[part] = {}
        table = table[part]
    table[name] = _value(text.strip())


def _value(text: str) -> object:
    """A value as a trial file has it; what is none there, such as 16/255, is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
