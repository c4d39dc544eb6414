"""Run one trial from its settings to its report; killed anywhere, it goes on where it was.

Everything lands in one folder, each file written whole or not at all::

    trial.json                       the settings; a folder of another trial is refused
    poisons/goal-000.safetensors     what the attack made
    victims/goal-000-ARM.json        what became of one victim
    models/ARM.safetensors           the victims of the first goal
    exhibit.safetensors              what the pictures of the report show
    times.json                       seconds by stage, over all the processes that it took
    work/                            checkpoints of trainings in progress; removed at the end
    record.json, report.html         the result
"""

from __future__ import annotations

import datetime
import json
import shutil
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from friends import models
from friends.bench import record, report
from friends.bench.record import Arm, Exhibit, Report
from friends.bench.trial import ArmSpec, Trial
from friends.data import sources
from friends.data.files import write_json
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal, PoisonedDataset
from friends.defenses.friends import Friends
from friends.models.saved import save
from friends.noise.random import random_noise
from friends.training.evaluate import accuracy, confidence, predict, success
from friends.training.fit import Fitted, Recipe, fit
from friends.types import Progress, Streams, silent

UNDEFENDED = ArmSpec(name="undefended")
SHOWN = 6
"""How many poisons the report shows."""


def run_trial(trial: Trial, out: Path, *, device: str = "cpu", progress: Progress = silent) -> Report:
    """Run a trial, or what is left of it, and write its record and report.

    Args:
        trial: what to run.
        out: folder of the run; made if needed, resumed if it holds the same trial.
        device: ``"cpu"``, ``"cuda"``, ...
        progress: told how far every step is.

    Returns:
        The report; also in ``out`` as ``record.json`` and ``report.html``.

    Raises:
        ValueError: the folder holds another trial (the first difference is named), or the settings do not fit the
            data; raised before any long work.
    """
    started = datetime.datetime.now(datetime.timezone.utc)
    _claim(trial, out)
    if (out / "record.json").exists():  # finished before: nothing to train, but the page may be of an older version
        result = Report.read(out / "record.json")
        report.render(result, exhibit_of(out), out / "report.html")
        return result
    lab = Lab(trial, out, torch.device(device), progress)
    lab.check()
    arms = (UNDEFENDED, *trial.arms)
    goals = lab.goals
    total = len(goals) * (1 + len(arms)) + trial.controls
    done = 0
    rows: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    for g in range(len(goals)):
        poisoned = lab.poisons(g)
        done += 1
        for arm in arms:
            progress("trial", done, total, f"target {g + 1}/{len(goals)}, {arm.name}")
            rows[arm.name].append(lab.victim(g, arm, poisoned))
            done += 1
    rows["clean"] = []
    for c in range(trial.controls):
        progress("trial", done, total, f"control {c + 1}/{trial.controls}")
        rows["clean"].append(lab.control(c))
        done += 1
    progress("trial", done, total, "report")
    result = lab.report(rows, started)
    report.render(result, exhibit_of(out), out / "report.html")
    result.write(out / "record.json")
    shutil.rmtree(out / "work", ignore_errors=True)
    return result


def exhibit_of(out: Path) -> Exhibit | None:
    """What the pictures of a run show, if any victim left something."""
    file = out / "exhibit.safetensors"
    return Exhibit.load(file) if file.exists() else None


def _claim(trial: Trial, out: Path) -> None:
    """Make the folder this trial's, or refuse it."""
    file = out / "trial.json"
    if not file.exists():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} holds something else: choose another folder with --out")
        write_json(file, {"key": trial.key(), "name": trial.name, "settings": trial.settings()})
        return
    theirs = json.loads(file.read_text(encoding="utf-8"))
    if theirs["key"] != trial.key():
        where = _first_difference(theirs["settings"], json.loads(json.dumps(trial.settings())))
        raise ValueError(f"{out} holds another trial: {where}. Choose another folder with --out, or delete this one.")


def _first_difference(theirs: object, ours: object, where: str = "") -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        a, b = cast("dict[str, object]", theirs), cast("dict[str, object]", ours)
        for name in sorted(a.keys() | b.keys()):
            if a.get(name) != b.get(name):
                return _first_difference(a.get(name), b.get(name), f"{where}.{name}" if where else name)
    return f"its {where or 'setting'} is {theirs!r}, not {ours!r}"


@dataclass(eq=False)
class Lab:
    """Everything that the stages of one trial share: data, models on request, and where files go."""

    trial: Trial
    out: Path
    device: torch.device
    progress: Progress = silent
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        file = self.out / "times.json"
        if file.exists():
            self.seconds |= json.loads(file.read_text(encoding="utf-8"))

    def took(self, stage: str, seconds: float) -> None:
        """Remember how long a stage took, also for a later process that resumes."""
        self.seconds[stage] = seconds
        write_json(self.out / "times.json", self.seconds)

    @cached_property
    def streams(self) -> Streams:
        """The streams that all others of the trial come from."""
        return Streams(self.trial.seed)

    @cached_property
    def data(self) -> tuple[LabeledImages, LabeledImages, LabeledImages]:
        """What victims train on, what they are tested on, and what networks are pretrained on."""
        trial, spec = self.trial, self.trial.data
        clock = time.perf_counter()
        self.progress("data", 0, 1, spec.source)
        whole, test = sources.load(spec.source, size=spec.size)
        wanted = spec.train
        if trial.pretraining_images is not None:
            wanted = max(trial.pretraining_images, spec.train or 0)
        pool, test = sources.select(
            whole,
            test,
            classes=spec.classes or None,
            n_train=wanted,
            n_test=spec.test,
            streams=self.streams.child("data"),
        )
        train = pool
        if spec.train is not None and spec.train < len(pool):
            train = pool.sample(spec.train, self.streams("data", "train"))
        self.took("loading data", time.perf_counter() - clock)
        self.progress("data", 1, 1, spec.source)
        return train.to(self.device), test.to(self.device), pool.to(self.device)

    def check(self) -> None:
        """Refuse what cannot work before long work starts."""
        train, _, _ = self.data
        for name in (self.trial.goals.true_class, self.trial.goals.wanted_class):
            if name is not None and name not in train.classes:
                raise ValueError(f"goals name class {name!r}; the classes are {', '.join(train.classes)}")
        if len(train.classes) < 2:
            raise ValueError("an attack needs at least two classes")
        for arm in self.trial.arms:
            for defense in arm.defenses:
                if isinstance(defense, Friends) and defense.zeta > 0 and defense.def_epoch >= self.trial.recipe.epochs:
                    raise ValueError(
                        f"arm {arm.name!r}: friendly noise would be made at epoch {defense.def_epoch}, but the recipe "
                        f"has {self.trial.recipe.epochs} epochs"
                    )

    # --- models ---

    def build(self, generator: torch.Generator) -> nn.Module:
        """A new network of the trial's architecture, normalising with the moments of the clean training data."""
        train, _, pool = self.data
        source = train if self.trial.scenario == "scratch" else pool
        spec = self.trial.model
        return models.build(
            spec.name,
            shape=train.shape,
            classes=len(train.classes),
            moments=source.moments,
            width=spec.width,
            generator=generator,
        )

    @cached_property
    def pretrained(self) -> nn.Module:
        """The network that transfer and fine-tuning start from, trained on clean data."""
        pool = self.data[2]
        fitted = self._fit(pool, self.build, "pretraining", self.trial.pretraining, self.streams.child("pretraining"))
        self.took("pretraining", fitted.seconds)
        return fitted.model

    def make_model(self, generator: torch.Generator) -> nn.Module:
        """A victim before training. All that sets the scenarios apart is here."""
        if self.trial.scenario == "scratch":
            return self.build(generator)
        pretrained = cast(models.Classifier, self.pretrained)
        if self.trial.scenario == "transfer":
            return models.transfer(pretrained, generator=generator, bn=self.trial.batchnorm)
        return models.finetune(pretrained, generator=generator)

    def surrogate(self, family: str) -> Callable[..., nn.Module]:
        """What an attacker may train; ``family`` keeps the surrogates of different attackers apart."""

        def train(
            data: LabeledImages, *, index: int = 0, epochs: int | None = None, start: nn.Module | None = None
        ) -> nn.Module:
            if self.trial.scenario != "scratch" and start is None and index == 0:
                return self.pretrained  # white-box features: the victim uses this very network
            streams = self.streams.child("surrogate", family, index)
            recipe = self.trial.recipe if self.trial.scenario == "scratch" else self.trial.pretraining
            recipe = recipe if epochs is None else replace(recipe, epochs=epochs)
            make = self.build if start is None else lambda _: deepcopy(cast(nn.Module, start))
            name = f"surrogate-{family}-{index}-{recipe.epochs}-{data.fingerprint[:12]}"
            keep = start is None  # a continued training has no name of its own to resume under
            fitted = self._fit(data, make, name, recipe, streams, keep=keep)
            self.took(f"training {name.rpartition('-')[0]}", fitted.seconds)
            return fitted.model

        memo: dict[tuple[str, int, int | None], nn.Module] = {}

        def remembered(
            data: LabeledImages, *, index: int = 0, epochs: int | None = None, start: nn.Module | None = None
        ) -> nn.Module:
            if start is not None:
                return train(data, index=index, epochs=epochs, start=start)
            key = (data.fingerprint, index, epochs)
            if key not in memo:
                memo[key] = train(data, index=index, epochs=epochs)
            return memo[key]

        return remembered

    @cached_property
    def _shared_surrogate(self) -> Callable[..., nn.Module]:
        return self.surrogate("shared")

    def _surrogate_of(self, g: int) -> Callable[..., nn.Module]:
        return self.surrogate(f"goal{g:03d}") if self.trial.own_surrogates else self._shared_surrogate

    def _fit(
        self,
        data: LabeledImages,
        make: Callable[[torch.Generator], nn.Module],
        name: str,
        recipe: Recipe,
        streams: Streams,
        *,
        arm: ArmSpec = UNDEFENDED,
        watch: Callable[[nn.Module, int], dict[str, float]] | None = None,
        keep: bool = True,
    ) -> Fitted:
        folder = self.out / "work" / name if keep else None
        return fit(
            data,
            make,
            recipe=recipe,
            defenses=arm.defenses,
            streams=streams,
            watch=watch,
            checkpoint=folder,
            progress=self.progress,
            what=name,
        )

    # --- goals and poisons ---

    @cached_property
    def goals(self) -> list[Goal]:
        """The targets, drawn from the test images."""
        train, test, _ = self.data
        spec, classes = self.trial.goals, train.classes
        eligible = torch.ones(len(test), dtype=torch.bool)
        if spec.correct:
            reference = self._shared_surrogate(train)
            right = predict(lambda x: reference(x).argmax(1), test.x)
            eligible = right == test.y.cpu()
        goals: list[Goal] = []
        for g in range(spec.count):
            generator = self.streams("goal", g)
            true, wanted = self._classes_of(generator)
            rows = ((test.y.cpu() == true) & eligible).nonzero().flatten()
            if len(rows) == 0:
                kind = "rightly classified " if spec.correct else ""
                raise ValueError(f"no {kind}test image of class {classes[true]!r} is left for target {g}")
            row = int(rows[torch.randint(len(rows), (1,), generator=generator)])
            eligible[row] = False  # every target once
            goals.append(
                Goal(
                    test.pixels(torch.tensor([row])).cpu(),
                    torch.tensor([true]),
                    torch.tensor([wanted]),
                    name=f"test image {row}: {classes[true]} \u2192 {classes[wanted]}",
                )
            )
        return goals

    def _classes_of(self, generator: torch.Generator) -> tuple[int, int]:
        """True and wanted class of a target, as set or drawn."""
        spec, classes = self.trial.goals, self.data[0].classes
        true = int(torch.randint(len(classes), (1,), generator=generator))
        other = int(torch.randint(len(classes) - 1, (1,), generator=generator))
        if spec.true_class is not None:
            true = classes.index(spec.true_class)
        if spec.wanted_class is not None:
            wanted = classes.index(spec.wanted_class)
            if spec.true_class is None and true == wanted:
                true = other + (other >= wanted)
            return true, wanted
        return true, other + (other >= true)

    def poisons(self, g: int) -> PoisonedDataset:
        """The poisoned training set of one goal, made or read, and checked against the attack's own claims."""
        train = self.data[0]
        file = self.out / "poisons" / f"goal-{g:03d}.safetensors"
        attack = self.trial.attack
        if file.exists():
            poisoned = PoisonedDataset.load(file, train)
        else:
            clock = time.perf_counter()
            poisoned = attack(
                train,
                self.goals[g],
                surrogate=self._surrogate_of(g),
                streams=self.streams.child("attack", g),
                progress=self.progress,
            )
            poisoned.check(train, xi=getattr(attack, "xi", None))
            poisoned.save(file)
            self.took(f"crafting {g:03d}", time.perf_counter() - clock)
        poisoned.check(train, xi=getattr(attack, "xi", None))
        return poisoned

    # --- victims ---

    def victim(self, g: int, arm: ArmSpec, poisoned: PoisonedDataset) -> dict[str, Any]:
        """Train one victim on the poisons of one goal, or read what became of it."""
        file = self.out / "victims" / f"goal-{g:03d}-{arm.name}.json"
        if file.exists():
            return cast("dict[str, Any]", json.loads(file.read_text(encoding="utf-8")))
        name = f"goal-{g:03d}-{arm.name}"
        fitted = self._fit(
            poisoned.train,
            self.make_model,
            name,
            self.trial.recipe,
            self.streams.child("victim", g),
            arm=arm,
            watch=self._watch(self.goals[g], accuracy_too=g == 0),
        )
        if g == 0:
            self._keep_model(fitted.model, arm.name)
            self._keep_exhibit(poisoned, arm, fitted)
        return self._judge(file, name, fitted, [self.goals[g]])

    def control(self, c: int) -> dict[str, Any]:
        """Train one model on clean data and ask it about every goal that falls to it."""
        file = self.out / "victims" / f"control-{c:03d}.json"
        if file.exists():
            return cast("dict[str, Any]", json.loads(file.read_text(encoding="utf-8")))
        name = f"control-{c:03d}"
        watch = self._watch(self.goals[0], accuracy_too=True) if c == 0 else None
        fitted = self._fit(
            self.data[0], self.make_model, name, self.trial.recipe, self.streams.child("victim", c), watch=watch
        )
        if c == 0:
            self._keep_model(fitted.model, "clean")
        return self._judge(file, name, fitted, self.goals[c :: self.trial.controls])

    def _judge(self, file: Path, name: str, fitted: Fitted, goals: Sequence[Goal]) -> dict[str, Any]:
        clean = accuracy(fitted.predictor, self.data[1])
        outcome: dict[str, Any] = {
            "hits": [int(success(fitted.predictor, goal, self.device).sum()) for goal in goals],
            "images": [len(goal) for goal in goals],
            "confidence": [float(confidence(fitted.model, goal, self.device).mean()) for goal in goals],
            "accuracy": clean.strict,
            "abstained": clean.abstained,
            "seconds": fitted.seconds,
            "history": fitted.history,
        }
        write_json(file, outcome)
        shutil.rmtree(self.out / "work" / name, ignore_errors=True)
        return cast("dict[str, Any]", json.loads(file.read_text(encoding="utf-8")))

    def _watch(self, goal: Goal, *, accuracy_too: bool) -> Callable[[nn.Module, int], dict[str, float]]:
        test = self.data[1]

        def watch(model: nn.Module, epoch: int) -> dict[str, float]:
            seen = {"confidence": float(confidence(model, goal, self.device).mean())}
            if accuracy_too:
                seen["accuracy"] = accuracy(lambda x: model(x).argmax(1), test).strict
            return seen

        return watch

    def _keep_model(self, model: nn.Module, name: str) -> None:
        spec, classes = self.trial.model, self.data[0].classes
        file = self.out / "models" / f"{name}.safetensors"
        save(cast(models.Classifier, model), file, name=spec.name, width=spec.width, classes=classes)

    # --- report ---

    def _keep_exhibit(self, poisoned: PoisonedDataset, arm: ArmSpec, fitted: Fitted) -> None:
        """Keep what the pictures show: of the first goal, and of the first arm that has friendly noise."""
        file = self.out / "exhibit.safetensors"
        place = next((i for i, d in enumerate(arm.defenses) if isinstance(d, Friends)), None)
        if file.exists() and (place is None or Exhibit.load(file).friendly is not None):
            return
        rows = poisoned.poison_idx[:SHOWN].cpu()
        friendly: Tensor | None = None
        histogram: Tensor | None = None
        random: Tensor | None = None
        zeta = mu = 0.0
        if place is not None:
            defense = cast(Friends, arm.defenses[place])
            zeta, mu = defense.zeta, defense.mu
            whole = fitted.memory[place].get("friendly")
            if whole is not None:
                friendly = whole[rows.to(whole.device)].cpu()
                histogram = torch.bincount(whole.flatten().cpu().long() + 255, minlength=511)
            draw = random_noise(poisoned.train.pixels(rows).cpu(), defense.random, mu, self.streams("exhibit"))
            random = (draw * 255).round().clamp(-127, 127).to(torch.int8)
        Exhibit(
            target=(poisoned.goal.x[0] * 255).round().to(torch.uint8),
            bases=self.data[0].x[rows].cpu(),
            poisons=poisoned.train.x[rows].cpu(),
            friendly=friendly,
            random=random,
            histogram=histogram,
            zeta=zeta,
            mu=mu,
        ).save(file)

    def report(self, rows: dict[str, list[dict[str, Any]]], started: datetime.datetime) -> Report:
        """Gather the outcomes of all victims into one record."""
        train, test, pool = self.data
        trial, attack = self.trial, self.trial.attack
        settings = trial.settings()
        first = self.poisons(0)
        net = self.build(torch.Generator().manual_seed(0))
        arms = [
            self._arm(arm.name, [repr(d) for d in arm.defenses], rows[arm.name]) for arm in (UNDEFENDED, *trial.arms)
        ]
        if rows["clean"]:
            arms.append(self._control_arm(rows["clean"]))
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
                "pretraining": len(pool) if trial.scenario != "scratch" else 0,
                "shape": list(train.shape),
                "classes": list(train.classes),
                "fingerprint": train.fingerprint,
            },
            model={
                "name": trial.model.name,
                "width": trial.model.width,
                "parameters": sum(p.numel() for p in net.parameters()),
            },
            attack={
                "name": type(attack).__name__,
                "settings": settings["attack"],
                "xi": getattr(attack, "xi", None),
                "budget": getattr(attack, "budget", None),
                "poisons": len(first.poison_idx),
            },
            goals=tuple(
                {
                    "name": goal.name,
                    "y_true": train.classes[int(goal.y_true[0])],
                    "y_wanted": train.classes[int(goal.y_wanted[0])],
                }
                for goal in self.goals
            ),
            arms=tuple(arms),
            versions=record.versions(),
            commit=record.commit(),
            device=record.device_name(self.device),
            threads=torch.get_num_threads(),
            started=started.isoformat(timespec="seconds"),
            seconds=self._times(rows),
        )

    def _arm(self, name: str, defenses: list[str], rows: list[dict[str, Any]]) -> Arm:
        accuracies = tuple(float(row["accuracy"]) for row in rows)
        hits = [int(hit) for row in rows for hit in row["hits"]]
        images = [int(m) for row in rows for m in row["images"]]
        return Arm(
            name=name,
            defenses=tuple(defenses),
            successes=sum(hits),
            n=sum(images),
            accuracy=sum(accuracies) / len(accuracies),
            accuracies=accuracies,
            seconds=sum(float(row["seconds"]) for row in rows),
            confidence=tuple(float(p) for row in rows for p in row["confidence"]),
            succeeded=tuple(2 * hit > m for hit, m in zip(hits, images, strict=True)),
            history=tuple(tuple(row["history"]) for row in rows),
            abstained=sum(int(row["abstained"]) for row in rows),
        )

    def _control_arm(self, rows: list[dict[str, Any]]) -> Arm:
        """The control: each clean model was asked about every ``controls``-th goal; put them back in order."""
        arm = self._arm("clean", [], rows)
        n, k = len(self.goals), len(rows)
        order = [g for c in range(k) for g in range(c, n, k)]
        place = sorted(range(n), key=lambda i: order[i])
        return replace(
            arm,
            succeeded=tuple(arm.succeeded[i] for i in place),
            confidence=tuple(arm.confidence[i] for i in place),
            notes=f"{k} {'model' if k == 1 else 'models'} trained on clean data, asked about {n} targets",
        )

    def _times(self, rows: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
        """Seconds by stage, over all the processes that it took."""
        crafting = [value for name, value in self.seconds.items() if name.startswith("crafting ")]
        times = {name: value for name, value in self.seconds.items() if not name.startswith("crafting ")}
        times["crafting, mean per target"] = sum(crafting) / len(crafting)
        for name, some in rows.items():
            if some:
                times[f"training {name}, mean per model"] = sum(float(row["seconds"]) for row in some) / len(some)
        return times


def run_folder(name: str, out: Path | None) -> Path:
    """Where a trial runs unless told otherwise: ``runs/NAME`` below the working directory."""
    return out if out is not None else Path("runs") / name


__all__ = ["Lab", "run_folder", "run_trial"]
