"""What the stages of one trial share: its data, the networks it trains, and how long everything took."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import nn

from friends import models
from friends.attacks.base import Sizes, Surrogate, poison_count
from friends.bench.goals import choose_goals, standard_goals
from friends.bench.trial import ArmSpec, DataSpec, Trial
from friends.data import sources
from friends.data.artifacts import Artifacts
from friends.data.files import write_json
from friends.data.images import LabeledImages
from friends.data.poisoned import Goal
from friends.defenses.friends import Friends
from friends.noise.random import RandomNoise
from friends.training.defense import Defense
from friends.training.evaluate import predict
from friends.training.fit import Fitted, Trained, Watch, fit, train_once
from friends.training.recipe import Recipe
from friends.types import Progress, Streams, silent


@dataclass(eq=False)
class Lab:
    """One trial at work in one folder.

    Args:
        trial: the settings.
        out: the folder; trainings in progress are in ``work/`` below it.
        device: where data, networks and training are.
        progress: told how far every step is.
        download: whether a public data set that is not here may be fetched from its home.
        artifacts: where surrogates, pretrained networks, probes and noises are kept; by default in ``work/`` too.
        read: reads the whole source of some data, training and test images; by default from where it is.
    """

    trial: Trial
    out: Path
    device: torch.device
    progress: Progress = silent
    download: bool = False
    artifacts: Artifacts = field(default=None)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    read: Callable[[DataSpec], tuple[LabeledImages, LabeledImages]] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    _reserve: LabeledImages | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.artifacts is None:  # pyright: ignore[reportUnnecessaryComparison]
            self.artifacts = Artifacts(self.out / "work" / "shared")
        self.work_in(self.out)

    def work_in(self, out: Path) -> None:
        """Work in another folder from now on, with the times that are written down there."""
        self.out, file = out, out / "times.json"
        self.seconds = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

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
        if self.read is not None:
            whole, test = self.read(spec)
        else:
            whole, test = sources.load(spec.source, size=spec.size, download=self.download, progress=self.progress)
        wanted = spec.train
        if trial.pretraining_images is not None:
            wanted = max(trial.pretraining_images, spec.train or 0)
        pool, test = sources.select(
            whole,
            test,
            classes=spec.classes or None,
            n_train=wanted,
            n_test=None if spec.test is None else spec.test + (spec.reserve or 0),
            streams=self.streams.child("data"),
        )
        test, self._reserve = self._set_apart(test)
        train = pool
        if spec.train is not None and spec.train < len(pool):
            train = pool.sample(spec.train, self.streams("data", "train"))
        return train.to(self.device), test.to(self.device), pool.to(self.device)

    def _set_apart(self, test: LabeledImages) -> tuple[LabeledImages, LabeledImages | None]:
        """The test images that remain, and the clean reserve."""
        reserve = self.trial.data.reserve
        if reserve is None:
            return test, None
        if reserve >= len(test):
            raise ValueError(f"a reserve of {reserve} leaves none of the {len(test)} test images of {test.name}")
        order = torch.randperm(len(test), generator=self.streams("data", "reserve"))
        rest, apart = order[reserve:].sort().values, order[:reserve].sort().values
        return test.rows(rest), test.rows(apart, f"{test.name}, reserve").to(self.device)

    def reserve_for(self, defenses: Sequence[Defense]) -> LabeledImages | None:
        """The clean reserve, if one of these defenses is entitled to it; an arm without such a one never sees it."""
        _ = self.data
        return self._reserve if any(defense.about.clean for defense in defenses) else None

    def sizes(self, goal: Goal) -> Sizes:
        """How large the task of the attacker of a goal is."""
        train = self.data[0]
        of_class = torch.bincount(train.y.cpu(), minlength=len(train.classes)).tolist()
        budget = getattr(self.trial.attack, "budget", None)
        return Sizes(
            train=len(train),
            wanted=of_class[int(goal.y_wanted[0])],
            source=sum(of_class[c] for c in goal.y_true.unique().tolist()),
            goal=len(goal),
            poisons=0 if budget is None else poison_count(budget, len(train)),
        )

    def check(self) -> None:
        """Refuse what cannot work before long work starts."""
        train = self.data[0]
        if len(train.classes) < 2:
            raise ValueError("an attack needs at least two classes")
        for name in (self.trial.goals.true_class, self.trial.goals.wanted_class):
            if name is not None and name not in train.classes:
                raise ValueError(f"goals name class {name!r}; the classes are {', '.join(train.classes)}")
        budget = getattr(self.trial.attack, "budget", None)
        if budget is not None:
            self._check_budget(poison_count(budget, len(train)))
        if self.trial.scenario not in self.trial.attack.about.scenarios:
            about = self.trial.attack.about
            warnings.warn(f"{about.title} is meant for {' and '.join(about.scenarios)}, not {self.trial.scenario}: do "
                          "not expect it to succeed", stacklevel=2)  # fmt: skip
        self._check_augmentation()
        for arm in self.trial.arms:
            self.check_arm(arm, self.trial.recipe)
        self.build(torch.Generator())  # an unknown network, or one that does not fit the images

    def check_arm(self, arm: ArmSpec, recipe: Recipe) -> None:
        """Refuse defenses that these data or a training by this recipe cannot have."""
        classes = len(self.data[0].classes)
        for defense in arm.defenses:
            if classes < defense.about.classes:
                raise ValueError(f"arm {arm.name!r}: {defense.about.title} is defined for {defense.about.classes} "
                                 f"classes or more, and the data have {classes}")  # fmt: skip
            if isinstance(defense, Friends):
                self._check_friends(arm.name, defense, recipe)

    def _check_augmentation(self) -> None:
        """Warn of an attacker who expects another augmentation than the victim's: a weak attack, not a defense."""
        attack, theirs = self.trial.attack, self.trial.recipe.augment
        if attack.about.unaugmented and theirs is not None:
            warnings.warn(f"{attack.about.title} is for victims that do not augment: set augment = false in [recipe], "
                          "or expect it to be weak", stacklevel=3)  # fmt: skip
        ours = getattr(attack, "augment", theirs)
        if ours != theirs:
            warnings.warn(f"the attack expects augmentation {ours}, but victims are trained with {theirs}: set both "
                          "alike, or expect a weaker attack", stacklevel=3)  # fmt: skip

    def _check_friends(self, arm: str, defense: Friends, recipe: Recipe) -> None:
        """Refuse noise that could not be there when it is needed."""
        if defense.store is not None:
            raise ValueError(
                f"arm {arm!r}: a store fits the images that it was made for, but a trial makes its poisoned images "
                "itself; use a store with fit(), or leave it out"
            )
        if defense.proxy is not None and defense.proxy not in models.MODELS:
            raise ValueError(f"arm {arm!r}: unknown proxy {defense.proxy!r}; choose one of {', '.join(models.MODELS)}")
        try:
            defense.refuse_length(recipe.epochs)
        except ValueError as error:
            raise ValueError(f"arm {arm!r}: {error}") from None

    def _check_budget(self, count: int) -> None:
        """Refuse more poisons than the smallest class that may be poisoned has images."""
        train, wanted = self.data[0], self.trial.goals.wanted_class
        if not self.trial.attack.about.clean_label:
            return  # its poisons come from all other classes
        sizes = torch.bincount(train.y.cpu(), minlength=len(train.classes)).tolist()
        for name, size in zip(train.classes, sizes, strict=True):
            if count > size and wanted in (None, name):
                raise ValueError(
                    f"the attack's budget is {count} poisons, but class {name!r} has only {size} training images"
                )

    def fit(
        self,
        data: LabeledImages,
        make: Callable[[torch.Generator], nn.Module],
        name: str,
        recipe: Recipe,
        streams: Streams,
        *,
        defenses: tuple[Defense, ...] = (),
        watch: Watch | None = None,
        checkpoint: Path | None = None,
    ) -> Fitted:
        """Train something under a name of its own; what is half done is kept in ``checkpoint``, if there is one."""
        return fit(
            data,
            make,
            recipe=recipe,
            defenses=defenses,
            streams=streams,
            clean=self.reserve_for(defenses),
            architectures=self.another,
            artifacts=self.artifacts,
            watch=watch,
            checkpoint=checkpoint,
            progress=self.progress,
            what=name,
        )

    def build(self, generator: torch.Generator) -> models.Classifier:
        """A new network of the trial's architecture, normalising with the moments of the clean training data."""
        train, _, pool = self.data
        spec = self.trial.model
        return models.build(
            spec.name,
            shape=train.shape,
            classes=len(train.classes),
            moments=(train if self.trial.scenario == "scratch" else pool).moments,
            width=spec.width,
            generator=generator,
        )

    def another(self, architecture: str, generator: torch.Generator) -> nn.Module:
        """A new network of another architecture, at that one's own width."""
        return models.build(
            architecture,
            shape=self.data[0].shape,
            classes=len(self.data[0].classes),
            moments=self.data[0].moments,
            generator=generator,
        )

    @cached_property
    def pretrained(self) -> models.Classifier:
        """The network that transfer and fine-tuning start from, trained on clean data."""
        trained = self._once("pretraining", self.data[2], self.trial.pretraining, self.streams.child("pretraining"))
        self.took("pretraining", trained.seconds)
        return cast(models.Classifier, trained.model)

    def _once(
        self, kind: str, data: LabeledImages, recipe: Recipe, streams: Streams, defenses: tuple[Defense, ...] = ()
    ) -> Trained:
        """A network of the trial's architecture, trained from new weights once for all who need it."""
        return train_once(
            self.artifacts,
            kind,
            data,
            self.build,
            recipe=recipe,
            streams=streams,
            defenses=defenses,
            progress=self.progress,
            what=kind,
        )

    @cached_property
    def goals(self) -> list[Goal]:
        """The goals of the trial; those of ``correct = true`` wait for a surrogate to be trained."""
        train, test, _ = self.data
        if self.trial.goals.keys:
            budget = cast(float, getattr(self.trial.attack, "budget", 0.01))
            return standard_goals(self.trial.goals.count, train, test, budget)
        right = None
        if self.trial.goals.correct:
            surrogate = self.shared_surrogate(train)
            with torch.no_grad():
                right = predict(lambda x: surrogate(x).argmax(1), test.x) == test.y.cpu()
        return choose_goals(self.trial.goals, test, self.streams, right)

    def make_victim(self, generator: torch.Generator) -> nn.Module:
        """A victim before training. All that sets the scenarios apart is here and in the recipe."""
        if self.trial.scenario == "scratch":
            return self.build(generator)
        if self.trial.scenario == "transfer":
            return models.transfer(self.pretrained, generator=generator, bn=self.trial.batchnorm)
        return models.finetune(self.pretrained, generator=generator)

    @cached_property
    def shared_surrogate(self) -> Surrogate:
        """The surrogates of an attacker who uses the same ones for all targets."""
        return self._surrogate("shared")

    def surrogate_of(self, g: int) -> Surrogate:
        """What the attacker of target ``g`` may train."""
        return self._surrogate(f"goal{g:03d}") if self.trial.own_surrogates else self.shared_surrogate

    def _surrogate(self, family: str) -> Surrogate:
        """Models of an attacker; ``family`` keeps those of different attackers apart. Each is trained once."""
        trained: dict[tuple[object, ...], tuple[nn.Module, dict[str, float]]] = {}

        def surrogate(
            data: LabeledImages,
            *,
            index: int = 0,
            epochs: int | None = None,
            start: nn.Module | None = None,
            noise: tuple[RandomNoise, float] | None = None,
        ) -> nn.Module:
            if start is not None:
                return self._train_surrogate(data, family, index, epochs, start, noise)
            if epochs == 0:  # new weights are made faster than found, and an attack may ask for very many
                weights = self.streams.child("surrogate", family, index)("weights")
                return self.build(weights).to(data.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            clean = data.fingerprint == self.data[0].fingerprint
            if self.trial.scenario != "scratch" and index == 0 and epochs is None and clean:
                return self.pretrained  # the victim's own features: a white box, whatever the victim does later
            if not clean:  # made for one goal, and asked for once
                return self._train_surrogate(data, family, index, epochs, None, noise)
            key = (index, epochs, noise)
            if key not in trained:
                before = set(self.seconds)
                model = self._train_surrogate(data, family, index, epochs, None, noise)
                trained[key] = model, {name: self.seconds[name] for name in self.seconds.keys() - before}
            for name, seconds in trained[key][1].items():  # whoever's time is taken next needs it too
                self.took(name, seconds)
            return trained[key][0]

        return surrogate

    def _train_surrogate(
        self,
        data: LabeledImages,
        family: str,
        index: int,
        epochs: int | None,
        start: nn.Module | None,
        noise: tuple[RandomNoise, float] | None,
    ) -> nn.Module:
        scratch = self.trial.scenario == "scratch"
        recipe = (self.trial.recipe if scratch else self.trial.pretraining).first(epochs)
        streams = self.streams.child("surrogate", family, index)
        defenses = () if noise is None else (Friends(zeta=0, random=noise[0], mu=noise[1]),)
        if start is not None:
            return self.fit(data, lambda _g: deepcopy(start), "surrogate", recipe, streams, defenses=defenses).model
        kind = "" if noise is None else f"-{noise[0]}{255 * noise[1]:g}"
        name = f"surrogate-{family}-{index}{kind}"
        if data.fingerprint == self.data[0].fingerprint:
            trained = self._once("surrogate", data, recipe, streams, defenses)
            model, seconds = trained.model, trained.seconds
        else:  # on poisons that are being made: nobody else will ask for it
            half = self.out / "work" / f"{name}-{recipe.epochs}-{data.fingerprint[:12]}"
            fitted = self.fit(data, self.build, name, recipe, streams, defenses=defenses, checkpoint=half)
            model, seconds = fitted.model, fitted.seconds
        self.took(f"training {name}, {recipe.epochs} epochs", seconds)
        return model
