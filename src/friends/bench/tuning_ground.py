"""Where settings are proven: the attack on the user's data, and one training after the other, each done once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from friends.bench.lab import Lab
from friends.bench.trial import DataSpec, ModelSpec, Trial, plain_value
from friends.bench.tuning_attack import LADDER, Mock
from friends.bench.tuning_grid import Candidate, Row, Rung, noise_epoch
from friends.bench.victims import craft
from friends.data.artifacts import Artifact, Artifacts
from friends.data.images import LabeledImages
from friends.data.poisoned import PoisonedDataset
from friends.digest import digest
from friends.training.evaluate import accuracy, verdict
from friends.training.fit import fit
from friends.training.recipe import Recipe
from friends.types import Progress, silent


class Ground:
    """Where settings are proven: the data, the attack on them, and one training after the other, each done once.

    Args:
        train, held_out: what is trained on and what is judged on.
        model: the network, and ``recipe`` how it is trained at full length.
        repeats: how many goals the attacker has.
        seed: everything random follows from it.
        artifacts: keeps poisons and results, so that a killed tuning goes on where it was.
        device: where networks are trained.
        progress: told how far every step is; may raise to stop there.

    Raises:
        ValueError: the model is unknown or does not fit the images, or the attack does not fit the data.
    """

    def __init__(
        self,
        train: LabeledImages,
        held_out: LabeledImages,
        *,
        model: ModelSpec,
        recipe: Recipe,
        repeats: int,
        seed: int,
        artifacts: Artifacts,
        device: torch.device | str = "cpu",
        progress: Progress = silent,
    ) -> None:
        self.train, self.held_out, self.recipe, self.seed = train, held_out, recipe, seed
        self.model, self.repeats, self.artifacts = model, repeats, artifacts
        self.device, self.progress = torch.device(device), progress
        self.mock = LADDER[0]
        self._labs: dict[Mock, Lab] = {}
        self._poisoned: dict[tuple[Mock, int], PoisonedDataset] = {}
        self.lab.check()

    @property
    def lab(self) -> Lab:
        """The attack as a trial at work: its data, its surrogates, its goals."""
        if self.mock not in self._labs:
            known = next(iter(self._labs.values()), None)
            lab = Lab(
                self._trial(),
                self.artifacts.root / "work" / "tuning",
                self.device,
                self.progress,
                artifacts=self.artifacts,
                read=lambda _spec: (self.train, self.held_out),
            )
            if known is not None:
                lab.data = known.data  # the same images, once in memory
            self._labs[self.mock] = lab
        self._labs[self.mock].progress = self.progress
        return self._labs[self.mock]

    def _trial(self) -> Trial:
        """Surrogates are trained for half as long as victims: what they cost would else be most of a tuning."""
        recipe = replace(self.recipe, epochs=max(1, self.recipe.epochs // 2))
        return Trial(
            name="tuning",
            seed=self.seed,
            data=DataSpec(source=self.train.name),
            model=self.model,
            goals=self.mock.goals(self.repeats, self.train.shape),
            attack=self.mock.attack(self.train, recipe),
            recipe=recipe,
            controls=0,
        )

    def poisons(self, repeat: int) -> Artifact:
        """The poisons of one goal, made once."""
        lab = self.lab

        def make(folder: Path) -> dict[str, object]:
            lab.work_in(folder / "half" / "lab")
            (made,), seconds = craft(lab, lab.goals, [repeat], folder / "half" / "crafting")
            made.save(folder / "poisons.safetensors", clean=lab.data[0])
            return {"seconds": seconds, "poisons": len(made.poison_idx), "goal": made.goal.name}

        identity: dict[str, object] = {
            **self._data(),
            "attack": plain_value(lab.trial.attack),
            "goals": plain_value(replace(lab.trial.goals, count=1)),
            "goal": repeat,
            "recipe": plain_value(lab.trial.recipe),
            "code": digest(type(lab.trial.attack).__module__, "friends.bench.lab", "friends.bench.victims"),
        }
        return self.artifacts.obtain(
            "poison", identity, make, title=f"poisons for tuning, goal {repeat + 1}", progress=self.progress
        )

    def poisoned(self, repeat: int) -> PoisonedDataset:
        """The poisoned training set of one goal; the last one is kept in memory."""
        key = (self.mock, repeat)
        if key not in self._poisoned:
            file = self.poisons(repeat).file("poisons.safetensors")
            self._poisoned = {key: PoisonedDataset.load(file, self.lab.data[0])}
        return self._poisoned[key]

    def result(self, row: Row, rung: Rung, repeat: int) -> dict[str, Any]:
        """What came out of one training: hits, images, right answers, seconds. Done once."""
        poison = self.poisons(repeat)
        full = rung.images == len(self.train) and rung.epochs == self.recipe.epochs
        compiled = self.recipe.compile if full else False  # which takes longer than a short training saves by it
        recipe = replace(self.recipe, epochs=rung.epochs, compile=compiled)
        def_epoch = noise_epoch(rung.epochs)
        defenses = (row.defense(def_epoch),) if isinstance(row, Candidate) else ()

        def make(folder: Path) -> dict[str, object]:
            poisoned = self.poisoned(repeat)
            data = self.part(poisoned, rung, repeat, clean=row == "clean")
            try:
                fitted = fit(
                    data,
                    self.lab.make_victim,
                    recipe=recipe,
                    defenses=defenses,
                    streams=self.lab.streams.child("victim", repeat),
                    checkpoint=folder / "half" / "training",
                    progress=self.progress,
                    what="training",
                )
            except FloatingPointError as error:
                if not defenses:
                    raise
                return {"diverged": str(error), "seconds": 0.0}
            hits, _ = verdict(fitted.predictor, poisoned.goal, self.device)
            right = accuracy(fitted.predictor, self.lab.data[1]).correct
            return {"hits": int(hits.sum()), "shown": len(hits), "right": right, "seconds": fitted.seconds}

        identity: dict[str, object] = {
            **self._data(),
            "poison": poison.key,
            "row": row if isinstance(row, str) else "defended",
            "defenses": plain_value(defenses),
            "recipe": plain_value(recipe),
            "images": rung.images,
            "repeat": repeat,
            "code": digest("friends.training.fit", "friends.training.evaluate", "friends.defenses.friends"),
        }
        artifact = self.artifacts.obtain("tuning", identity, make, title=str(row), progress=self.progress)
        return dict(artifact.facts)

    def _data(self) -> dict[str, object]:
        """What every identity names."""
        return {
            "train": self.train.fingerprint,
            "held out": self.held_out.fingerprint,
            "model": plain_value(self.model),
            "seed": self.seed,
            "device": self.device.type,
        }

    def part(self, poisoned: PoisonedDataset, rung: Rung, repeat: int, *, clean: bool) -> LabeledImages:
        """So many images as the rung has, with the same share of every class and of poisons as in the whole."""
        whole = self.lab.data[0] if clean else poisoned.train
        if rung.images >= len(whole):
            return whole
        poison = torch.zeros(len(whole), dtype=torch.long)
        poison[poisoned.poison_idx.cpu()] = 1
        rows = strata(whole.y.cpu() * 2 + poison, rung.images, self.lab.streams("part", repeat))
        return whole.rows(rows.to(whole.device))


def strata(kind: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """About ``count`` rows ``(k,)``, ascending, with the same share of every kind, and one of each at least."""
    order = torch.randperm(len(kind), generator=generator)
    share = count / len(kind)
    parts = list[Tensor]()
    for which in kind.unique().tolist():
        rows = order[kind[order] == which]
        parts.append(rows[: max(1, round(share * len(rows)))])
    return torch.cat(parts).sort().values
