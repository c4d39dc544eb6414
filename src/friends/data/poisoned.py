"""What an attack wants (Goal) and what it made (PoisonedDataset), with the check that it kept its own promises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from friends.data.files import read_tensors, write_tensors
from friends.data.images import LabeledImages
from friends.data.triggers import Additive, Patch, Stamp, Trigger, trigger_from_file, trigger_to_file

__all__ = ["Additive", "Goal", "Patch", "PoisonedDataset", "Stamp", "Trigger"]

FORMAT = "friends-poisons-1"


@dataclass(frozen=True, eq=False)
class Goal:
    """What the attacker wants of the trained model: one image (targeted) or every triggered image (backdoor).

    Args:
        x: ``(m, c, h, w)`` float pixels in [0, 1], as they will be shown to the model: triggered already.
        y_true: ``(m,)`` their true labels.
        y_wanted: ``(m,)`` the labels that the attacker wants for them.
        trigger: for a backdoor, the function that made ``x`` from clean images, for attacks that apply it elsewhere.
        name: what reports call it, e.g. ``"test image 876: dog -> frog"``.
        bases: rows of the training set that the protocol prescribes to be poisoned (the standard keys, published
            setups); None leaves the choice to the attack.

    Raises:
        ValueError: the goal is empty, shapes do not fit, pixels are not in [0, 1], an image is already wanted
            as what it is, or a base is prescribed twice.
    """

    x: Float[Tensor, "m c h w"]
    y_true: Int64[Tensor, " m"]
    y_wanted: Int64[Tensor, " m"]
    trigger: Trigger | None = None
    name: str = "goal"
    bases: Int64[Tensor, " p"] | None = None

    def __post_init__(self) -> None:
        m = self.x.shape[0]
        if m == 0:
            raise ValueError("a goal without images: there would be nothing to attack")
        if self.x.ndim != 4 or self.y_true.shape != (m,) or self.y_wanted.shape != (m,):
            raise ValueError(f"a goal needs x (m, c, h, w) and two label vectors (m,), not {tuple(self.x.shape)}, "
                             f"{tuple(self.y_true.shape)}, {tuple(self.y_wanted.shape)}")  # fmt: skip
        if not bool(torch.isfinite(self.x).all()) or float(self.x.min()) < 0 or float(self.x.max()) > 1:
            raise ValueError("a goal's pixels must be in [0, 1]")
        same = (self.y_true == self.y_wanted).nonzero()
        if len(same):
            raise ValueError(f"goal image {int(same[0])} is wanted as its own class {int(self.y_true[same[0, 0]])}")
        if self.bases is not None and len(self.bases.unique()) != len(self.bases):
            row = next(row for row in self.bases.tolist() if int((self.bases == row).sum()) > 1)
            raise ValueError(f"row {row} is prescribed as a base more than once")

    def __len__(self) -> int:
        return len(self.y_true)

    @property
    def targeted(self) -> bool:
        """Whether this is a targeted attack (images as they are), not a backdoor (images with a trigger)."""
        return self.trigger is None


@dataclass(frozen=True, eq=False)
class PoisonedDataset:
    """A training set of which some rows were replaced by poisons, and what they are meant to achieve.

    Args:
        train: the whole training set with the poisons in place of their base images.
        poison_idx: ``(p,)`` int64 rows that are poisons, without repeats.
        goal: what the attacker wants.
        recipe: the attack that made it and its settings, as plain values, for reports.
    """

    train: LabeledImages
    poison_idx: Int64[Tensor, " p"]
    goal: Goal
    recipe: Mapping[str, object] = field(default_factory=lambda: cast("dict[str, object]", {}))

    def check(
        self, clean: LabeledImages, *, xi: float | None, budget: int | None = None, clean_label: bool = True
    ) -> None:
        """Raise unless the set is what the attack claims, measured on the bytes that a victim will train on.

        Args:
            clean: the training set before the attack.
            xi: l_inf bound of the perturbation in [0, 1] pixel units, e.g. 16/255; None for unbounded attacks.
            budget: largest number of poisons allowed.
            clean_label: whether labels must be unchanged.

        Raises:
            ValueError: naming the first row that breaks the claim, and by how much.
        """
        self._check_shape(clean)
        p = self.poison_idx.cpu()
        if budget is not None and len(p) > budget:
            raise ValueError(f"{len(p)} poisons, but the budget is {budget}")
        difference = (self.train.x.cpu().short() - clean.x.cpu().short()).abs().flatten(1).amax(1)
        listed = torch.zeros(len(clean), dtype=torch.bool)
        listed[p] = True
        stray = ((difference > 0) & ~listed).nonzero().flatten()
        if len(stray):
            raise ValueError(f"{len(stray)} images changed that are not listed as poisons, first: {int(stray[0])}")
        relabelled = self.train.y.cpu() != clean.y.cpu()
        wrong = (relabelled & ~listed) | (relabelled if clean_label else torch.zeros_like(relabelled))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            why = "a clean-label attack keeps labels" if clean_label else "it is no poison"
            raise ValueError(f"row {row} has label {int(self.train.y[row])}, but it was {int(clean.y[row])}: {why}")
        if not bool((difference[p] > 0).any() | relabelled[p].any()):
            raise ValueError(f"none of the {len(p)} poisons differs from its base image: it would look like a "
                             "perfect defense")  # fmt: skip
        astray = p[~torch.isin(self.train.y.cpu()[p], self.goal.y_wanted.cpu())]
        if len(astray):
            name = self.train.classes[int(self.train.y[astray[0]])]
            raise ValueError(f"poison {int(astray[0])} is of class {name!r}, which the goal does not want: it would "
                             "teach nothing of use to the attacker")  # fmt: skip
        if xi is not None:
            bound = math.floor(xi * 255 + 1e-6)
            far = (difference > bound).nonzero().flatten()
            if len(far):
                raise ValueError(f"poison {int(far[0])} differs from its base image by {int(difference[far[0]])}/255, "
                                 f"more than xi = {bound}/255")  # fmt: skip

    def _check_shape(self, clean: LabeledImages) -> None:
        if self.train.x.shape != clean.x.shape or self.train.classes != clean.classes:
            raise ValueError(f"poisoned set {self.train!r} and clean set {clean!r} differ in shape or classes")
        p = self.poison_idx
        if p.ndim != 1 or p.dtype != torch.int64 or len(p) == 0:
            raise ValueError("an empty poison set (or poison indices that are not a vector of int64): it would "
                             "look like a perfect defense")  # fmt: skip
        if int(p.min()) < 0 or int(p.max()) >= len(clean):
            raise ValueError(f"poison index {int(p.max() if int(p.min()) >= 0 else p.min())} is out of range: "
                             f"there are {len(clean)} training images")  # fmt: skip
        if len(p.unique()) != len(p):
            raise ValueError(f"{len(p) - len(p.unique())} poison indices are listed twice")
        if self.goal.x.shape[1:] != clean.x.shape[1:]:
            raise ValueError(f"goal images are {tuple(self.goal.x.shape[1:])}, training images {clean.shape}")
        labels = torch.cat([self.goal.y_true, self.goal.y_wanted]).cpu()
        unknown = labels[(labels < 0) | (labels >= len(clean.classes))]
        if len(unknown):
            raise ValueError(f"class {int(unknown[0])} of the goal is out of range: there are "
                             f"{len(clean.classes)} classes")  # fmt: skip

    def save(self, path: Path) -> None:
        """Write the poisons, not the clean rest, as one safetensors file; atomic."""
        goal = self.goal
        tensors = {
            "poison_x": self.train.x[self.poison_idx],
            "poison_y": self.train.y[self.poison_idx],
            "poison_idx": self.poison_idx,
            "goal_x": goal.x,
            "goal_y_true": goal.y_true,
            "goal_y_wanted": goal.y_wanted,
        }
        header: dict[str, object] = {
            "format": FORMAT,
            "recipe": dict(self.recipe),
            "goal": goal.name,
            "poisoned": self.train.fingerprint,
        }
        held, named = trigger_to_file(goal.trigger)
        if goal.bases is not None:
            held["goal_bases"] = goal.bases
        write_tensors(path, tensors | held, header | named)

    @classmethod
    def load(cls, path: Path, clean: LabeledImages) -> PoisonedDataset:
        """Put a saved poison set back into the clean training set it was made for.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is torn or foreign, or the result is not what was saved: ``clean`` is other data.
        """
        tensors, header = read_tensors(path)
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} is not a poison set of ours: format {header.get('format')!r}")
        try:
            train = _replaced(path, tensors, clean)
            if train.fingerprint != header["poisoned"]:
                raise ValueError(f"{path} was made for other training data than {clean!r}")
            recipe = cast("dict[str, object]", header["recipe"])
            return cls(train, tensors["poison_idx"], _goal(path, tensors, header), recipe)
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}: it is not a whole poison set") from error


def _replaced(path: Path, tensors: Mapping[str, Tensor], clean: LabeledImages) -> LabeledImages:
    """The clean training set with the poisons of a file in their rows."""
    idx, poison_x, poison_y = tensors["poison_idx"], tensors["poison_x"], tensors["poison_y"]
    types = (idx.dtype, poison_x.dtype, poison_y.dtype)
    if types != (torch.int64, torch.uint8, torch.int64):
        raise ValueError(f"{path} should hold int64 rows, uint8 pixels and int64 labels, not {types}")
    if idx.ndim != 1 or poison_x.shape[:1] != idx.shape or poison_y.shape != idx.shape:
        raise ValueError(f"{path} holds {len(poison_x)} images, {len(poison_y)} labels and {len(idx)} rows")
    outside = idx[(idx < 0) | (idx >= len(clean))]
    if len(outside):
        raise ValueError(f"{path} poisons row {int(outside[0])}, but there are {len(clean)} training images")
    if poison_x.shape[1:] != clean.x.shape[1:]:
        raise ValueError(f"{path} holds images of {tuple(poison_x.shape[1:])}, not {clean.shape}")
    x, y = clean.x.clone(), clean.y.clone()
    x[idx.to(x.device)] = poison_x.to(x.device)
    y[idx.to(y.device)] = poison_y.to(y.device)
    return LabeledImages(x, y, clean.classes, clean.name)


def _goal(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> Goal:
    """The goal of a file."""
    trigger = trigger_from_file(str(path), tensors, header)
    shown, y_true, y_wanted = tensors["goal_x"], tensors["goal_y_true"], tensors["goal_y_wanted"]
    return Goal(shown, y_true, y_wanted, trigger, str(header["goal"]), tensors.get("goal_bases"))
