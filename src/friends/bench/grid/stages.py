"""The stages of a cell: data, surrogates, poisons, probe, noise, victim; each an artifact that is made once.

What an artifact is called follows from everything that it is made of: fingerprints of the data, settings, seed, and a
digest of the code that can change it. So twelve defenses share one poisoning, two grids share their undefended
models, and a change of the code makes anew what it concerns.
"""

from __future__ import annotations

import datetime
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from friends.bench.grid.energy import Meter
from friends.bench.grid.record import Record
from friends.bench.grid.spec import Cell
from friends.bench.lab import Lab
from friends.bench.provenance import commit, device_name, versions
from friends.bench.record import CLEAN, UNDEFENDED
from friends.bench.run import told
from friends.bench.trial import DataSpec, Trial, plain_value
from friends.bench.victims import craft, outcome_of, watching
from friends.data import sources
from friends.data.artifacts import Artifact, Artifacts
from friends.data.files import read_tensors, write_json, write_tensors
from friends.data.images import LabeledImages
from friends.data.poisoned import PoisonedDataset
from friends.digest import digest
from friends.training.evaluate import removal
from friends.training.fit import fit
from friends.types import Progress, silent

Plain = dict[str, Any]
KINDS = ("data", "surrogate", "pretraining", "poison", "probe", "noise", "victim")
_LABS = 2
"""How many trials' data and networks are kept in memory."""


class Workbench:
    """Makes and finds the artifacts of cells, on one device.

    Args:
        artifacts: the cache.
        device: where networks are trained.
        download: whether a public data set that is not here may be fetched from its home.
        progress: told how far every step is.
    """

    def __init__(
        self, artifacts: Artifacts, device: str = "cpu", *, download: bool = False, progress: Progress = silent
    ) -> None:
        self.artifacts, self.device, self.download, self.progress = artifacts, torch.device(device), download, progress
        self._labs: OrderedDict[str, Lab] = OrderedDict()
        self._sources: dict[tuple[str, int | None], tuple[LabeledImages, LabeledImages]] = {}
        self._facts: dict[tuple[str, int | None], Plain] = {}

    # What cells are made of

    def facts(self, spec: DataSpec) -> Plain:
        """Names, counts and fingerprints of a source: from the cache if its files have not changed since."""
        place = (spec.source, spec.size)
        if place not in self._facts:
            self._facts[place] = self._data(spec).facts
        return self._facts[place]

    def _data(self, spec: DataSpec) -> Artifact:
        """A source, decoded: what every process would otherwise do for itself."""

        def make(folder: Path) -> Plain:
            train, test = sources.load(spec.source, size=spec.size, download=self.download, progress=self.progress)
            tensors = {"train.x": train.x, "train.y": train.y, "test.x": test.x, "test.y": test.y}
            write_tensors(folder / "data.safetensors", tensors)
            facts: Plain = {"classes": list(train.classes), "shape": list(train.shape), "train": len(train)}
            facts |= {"train name": train.name, "test name": test.name, "test": len(test)}
            return facts | {"train fingerprint": train.fingerprint, "test fingerprint": test.fingerprint}

        code = digest("friends.data.sources")
        identity = {"source": _source_identity(spec.source), "size": spec.size, "code": code}
        return self.artifacts.obtain("data", identity, make, title=Path(spec.source).name, progress=self.progress)

    def source(self, spec: DataSpec) -> tuple[LabeledImages, LabeledImages]:
        """The training and test images of a source; the last one is kept in memory."""
        place = (spec.source, spec.size)
        if place not in self._sources:
            artifact = self._data(spec)
            facts = artifact.facts
            tensors, _ = read_tensors(artifact.file("data.safetensors"))
            classes = tuple(cast("list[str]", facts["classes"]))
            parts = (
                LabeledImages(tensors[f"{part}.x"], tensors[f"{part}.y"], classes, str(facts[f"{part} name"]))
                for part in ("train", "test")
            )
            self._sources = {place: cast("tuple[LabeledImages, LabeledImages]", tuple(parts))}
        return self._sources[place]

    def poison_identity(self, cell: Cell) -> Plain:
        """What determines the poisons of a cell; cells that share it share the poisons."""
        trial = cell.trial
        return {
            **self._setting(trial),
            "attack": plain_value(trial.attack),
            "goals": _but(plain_value(trial.goals), "count"),
            "goal": cell.goal,
            "own surrogates": trial.own_surrogates,
            "code": digest(*_poison_code(trial)),
        }

    def _setting(self, trial: Trial) -> Plain:
        """What attacker and victim share: data, networks, recipes, seed."""
        data, facts = cast(Plain, plain_value(trial.data)), self.facts(trial.data)
        pretrained = trial.scenario != "scratch"
        return {
            "data": {**_but(data, "source"), **{p: facts[f"{p} fingerprint"] for p in ("train", "test")}},
            "subset": [trial.data.train, trial.data.test],
            "model": plain_value(trial.model),
            "scenario": trial.scenario,
            "recipe": plain_value(trial.recipe),
            "pretraining": plain_value(trial.pretraining) if pretrained else None,
            "pretraining images": trial.pretraining_images,
            "batchnorm": trial.batchnorm if trial.scenario == "transfer" else None,
            "seed": trial.seed,
        }

    def victim_identity(self, cell: Cell) -> Plain:
        """What determines the outcome of a cell."""
        defenses = cell.arm.defenses
        return {
            "poison": self.artifacts.key("poison", self.poison_identity(cell)),
            "clean": cell.row.name == CLEAN,
            "defenses": plain_value(defenses),
            "recipe": plain_value(cell.recipe),
            "victim": cell.victim,
            "code": digest(*_victim_code(cell)),
        }

    def code(self, cell: Cell) -> str:
        """A hash of all code that can change what comes out of a cell."""
        return digest(*_poison_code(cell.trial), *_victim_code(cell))

    def cell_key(self, cell: Cell) -> str:
        """The key of a cell's settings and data, whatever the code: what records of two versions share."""
        identity = {**self.poison_identity(cell), **self.victim_identity(cell)}
        if cell.row.recipe:  # then the trial's own is that of surrogates alone
            identity["surrogate recipe"] = plain_value(cell.trial.recipe)
        return self.artifacts.key("cell", _but(identity, "poison", "code"))[:16]

    # Making them

    def lab(self, cell: Cell) -> Lab:
        """The data and networks of a cell's trial, which cells of the same setting share."""
        identity = {**_but(self.poison_identity(cell), "goal"), "count": cell.trial.goals.count}
        setting = self.artifacts.key("setting", identity)
        if setting not in self._labs:
            trial = replace(cell.trial, arms=())
            out = self.artifacts.root / "work" / f"lab-{setting}"
            lab = Lab(trial, out, self.device, self.progress, self.download, artifacts=self.artifacts, read=self.source)
            lab.check()
            self._labs[setting] = lab
            while len(self._labs) > _LABS:
                self._labs.popitem(last=False)
        self._labs.move_to_end(setting)
        self._labs[setting].progress = self.progress
        return self._labs[setting]

    def poison(self, cell: Cell) -> Artifact:
        """The poisons of a cell's goal: ``poisons.safetensors``, made or found."""

        def make(folder: Path) -> Plain:
            lab = self.lab(cell)
            lab.work_in(folder / "half" / "lab")
            with Meter(self.device) as meter:
                (poisoned,), seconds = craft(lab, lab.goals, [cell.goal], folder / "half" / "crafting")
            poisoned.save(folder / "poisons.safetensors", clean=lab.data[0], key=cell.trial.key())
            surrogates = sum(value for name, value in lab.seconds.items() if name.startswith(("training", "pretrain")))
            return {
                "seconds": seconds,
                "surrogates": surrogates,
                "joules": meter.joules,
                "goal": poisoned.goal.name,
                "poisons": len(poisoned.poison_idx),
                **_made_with(self.device),
            }

        title = f"{cell.trial.attack.about.title}, seed {cell.seed}, goal {cell.goal + 1}"
        identity = self.poison_identity(cell)
        return self.artifacts.obtain("poison", identity, make, title=title, progress=self.progress)

    def poisoned(self, cell: Cell) -> PoisonedDataset:
        """The poisoned training set of a cell."""
        return PoisonedDataset.load(self.poison(cell).file("poisons.safetensors"), self.lab(cell).data[0])

    def victim(self, cell: Cell, *, keep_model: bool = False) -> Artifact:
        """The outcome of a cell: ``outcome.json``, and the weights ``model.safetensors`` where they are kept."""
        identity = {**self.victim_identity(cell), "weights": keep_model}
        if not keep_model:  # an outcome with weights is an outcome
            kept = self.artifacts.find("victim", {**identity, "weights": True})
            if kept is not None:
                return kept
        poison = self.poison(cell)

        def make(folder: Path) -> Plain:
            lab = self.lab(cell)
            lab.check_arm(cell.arm, cell.recipe)
            poisoned = self.poisoned(cell)
            clean = cell.row.name == CLEAN
            streams = lab.streams.child("victim", cell.goal, *([cell.victim] if cell.victim else []))
            first = cell.goal == cell.victim == 0 and cell.row.name == UNDEFENDED  # accuracy by epoch costs time
            started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            with Meter(self.device) as meter:
                fitted = fit(
                    lab.data[0] if clean else poisoned.train,
                    lab.make_victim,
                    recipe=cell.recipe,
                    defenses=cell.arm.defenses,
                    streams=streams,
                    clean=lab.reserve_for(cell.arm.defenses),
                    architectures=lab.another,
                    artifacts=self.artifacts,
                    watch=watching(lab, poisoned.goal, accuracy_too=first),
                    checkpoint=folder / "half" / "training",
                    progress=self.progress,
                    what=cell.row.name,
                )
            found = None if clean else removal(fitted.removed, poisoned.poison_idx)
            outcome = outcome_of(lab, fitted, [poisoned.goal], found)
            goal, classes = poisoned.goal, lab.data[0].classes
            outcome |= {
                "goal": goal.name,
                "y_true": classes[int(goal.y_true[0])] if len(goal.y_true.unique()) == 1 else "any",
                "y_wanted": classes[int(goal.y_wanted[0])],
                "parameters": sum(p.numel() for p in lab.build(torch.Generator()).parameters()),
                "train": len(lab.data[0]),
                "used": dict(fitted.used),
            }
            write_json(folder / "outcome.json", outcome)
            if keep_model:
                write_tensors(folder / "model.safetensors", fitted.model.state_dict())
            facts = {"seconds": fitted.seconds, "started": started, "joules": meter.joules}
            return {**facts, "poison": poison.key, **_made_with(self.device)}

        return self.artifacts.obtain("victim", identity, make, title=str(cell), progress=self.progress)

    def victim_model(self, cell: Cell) -> nn.Module:
        """The trained network of a cell, in eval mode. Defenses that replace layers have none to be found again."""
        artifact = self.victim(cell, keep_model=True)
        model: nn.Module = self.lab(cell).make_victim(torch.Generator())
        model.load_state_dict(read_tensors(artifact.file("model.safetensors"))[0])
        return model.to(self.device).eval()

    def noise_of(self, cell: Cell) -> torch.Tensor | None:
        """The friendly noise ``(n, c, h, w)`` int8 in grey levels that a cell's training made, if it made some."""
        used = _outcome(self.victim(cell))["used"]
        noise = self.artifacts.by_key("noise", str(used["noise"])) if "noise" in used else None
        return None if noise is None else read_tensors(noise.file("noise.safetensors"))[0]["friendly"]

    def record(self, cell: Cell, *, keep_model: bool = False) -> Record:
        """Run a cell, or what is left of it, and say what came out."""
        poison, victim = self.poison(cell), self.victim(cell, keep_model=keep_model)
        found, made = _outcome(victim), victim.facts
        clean = cell.row.name == CLEAN
        removed = cast("list[int] | None", found["removed"])
        return Record(
            grid=cell.grid,
            preset=cell.preset,
            cell=self.cell_key(cell),
            labels=dict(cell.labels),
            defense=cell.row.name,
            defenses=tuple(repr(defense) for defense in cell.arm.defenses),
            told=told(cell.arm.defenses),
            seed=cell.seed,
            goal=cell.goal,
            victim=cell.victim,
            settings=_settings(cell),
            scaled_down=cell.scaled_down,
            goal_name=str(found["goal"]),
            y_true=str(found["y_true"]),
            y_wanted=str(found["y_wanted"]),
            code=self.code(cell),
            keys={"poison": poison.key, "victim": victim.key, **found["used"]},
            hits=int(found["hits"][0]),
            images=int(found["images"][0]),
            confidence=float(found["confidence"][0]),
            accuracy=float(found["accuracy"]),
            selective=float(found["selective"]),
            abstained=int(found["abstained"]),
            refused=int(found["refused"][0]),
            removed=tuple(removed) if removed and removed[0] else (),
            poisons=0 if clean else int(str(poison.facts["poisons"])),
            parameters=int(found["parameters"]),
            train=int(found["train"]),
            history=tuple(cast("list[dict[str, float]]", found["history"])),
            seconds={
                "surrogates": float(str(poison.facts["surrogates"])),
                "crafting": float(str(poison.facts["seconds"])),
                "training": float(found["seconds"]),
                "shared": float(found["shared"]),
            },
            joules={
                **{f"crafting, {name}": value for name, value in _numbers(poison.facts["joules"]).items()},
                **{f"training, {name}": value for name, value in _numbers(made["joules"]).items()},
            },
            versions=cast("dict[str, str]", made["versions"]),
            commit=str(made["commit"]),
            device=str(made["device"]),
            threads=int(str(made["threads"])),
            started=str(made["started"]),
        )


def _poison_code(trial: Trial) -> tuple[str, ...]:
    """The modules that poisons depend on."""
    attack = type(trial.attack).__module__
    return attack, "friends.bench.lab", "friends.bench.goals", "friends.bench.victims"


def _victim_code(cell: Cell) -> tuple[str, ...]:
    """The modules that a victim depends on, given its poisons."""
    shared = ("friends.training.fit", "friends.training.evaluate", "friends.bench.lab", "friends.bench.victims")
    return *shared, *(type(defense).__module__ for defense in cell.arm.defenses)


def _outcome(victim: Artifact) -> Plain:
    return cast(Plain, json.loads(victim.file("outcome.json").read_text(encoding="utf-8")))


def _numbers(value: object) -> dict[str, float]:
    return cast("dict[str, float]", value) if isinstance(value, dict) else {}


def _made_with(device: torch.device) -> Plain:
    """With what an artifact was made."""
    threads = torch.get_num_threads()
    return {"versions": versions(), "commit": commit(), "device": device_name(device), "threads": threads}


def _settings(cell: Cell) -> Plain:
    """All settings of a cell, without where on this machine its data are."""
    settings = {**_portable(cell.trial), "recipe": plain_value(cell.recipe)}
    return {**settings, "surrogate recipe": plain_value(cell.trial.recipe)} if cell.row.recipe else settings


def _portable(trial: Trial) -> Plain:
    """The settings of a trial without where on this machine its data are, and without its arms."""
    settings = _but(trial.settings(), "arms")
    data = cast(Plain, settings["data"])
    return {**settings, "data": {**data, "source": Path(str(data["source"])).name}}


def _but(table: object, *names: str) -> Plain:
    return {name: value for name, value in cast(Plain, table).items() if name not in names}


def _source_identity(source: str) -> object:
    """What changes when the files of a source change: their names, sizes and times; a name for what has no files."""
    path = Path(source)
    if not path.exists():
        return source
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [[str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns] for file in found]


_BENCHES: dict[tuple[str, str], Workbench] = {}


def _bench(payload: Mapping[str, Any], progress: Progress) -> Workbench:
    """The workbench of this process for a cache and a device; its data stay in memory from task to task."""
    place = (str(payload["cache"]), str(payload["device"]))
    if place not in _BENCHES:
        artifacts = Artifacts(Path(place[0]), remote=payload.get("remote"))
        _BENCHES[place] = Workbench(artifacts, place[1], download=bool(payload.get("download")))
    _BENCHES[place].progress = progress
    return _BENCHES[place]


def perform_poison(payload: Mapping[str, Any], progress: Progress) -> Plain:
    """A task: the poisons of a cell. The payload has ``cache``, ``device`` and ``cell``."""
    artifact = _bench(payload, progress).poison(Cell.from_json(payload["cell"]))
    return {"key": artifact.key}


def perform_cell(payload: Mapping[str, Any], progress: Progress) -> Plain:
    """A task: a whole cell; returns its record as plain values."""
    record = _bench(payload, progress).record(Cell.from_json(payload["cell"]), keep_model=bool(payload.get("keep")))
    return cast(Plain, json.loads(json.dumps(asdict(record))))
