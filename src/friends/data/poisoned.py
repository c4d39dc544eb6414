"""What an attack wants (Goal) and what it made (PoisonedDataset), with the check that it kept its own promises."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, cast

import torch
from jaxtyping import Bool, Float, Int16, Int64, UInt8
from torch import Tensor

from friends.data.files import read_tensors, write_tensors
from friends.data.images import LabeledImages
from friends.data.triggers import Additive, Patch, Stamp, Trigger, trigger_from_file, trigger_to_file

__all__ = ["Additive", "Goal", "Patch", "PoisonedDataset", "Stamp", "Trigger"]

FORMAT, OLD_FORMAT = "friends-poisons-2", "friends-poisons-1"

PART = 4096
"""Images that are compared at a time."""


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
        self._check_rows(clean, budget)
        self._check_goal(clean)
        changed, relabelled = self._check_rest(clean)
        if clean_label and bool(relabelled.any()):
            self._refuse_label(clean, int(relabelled.nonzero()[0]), "a clean-label attack keeps labels")
        if not bool(changed[self.poison_idx.cpu()].any() | relabelled.any()):
            raise ValueError(f"none of the {len(self.poison_idx)} poisons differs from its base image: it would look "
                             "like a perfect defense")  # fmt: skip
        self._check_class()
        if xi is not None:
            self._check_bound(clean, math.floor(xi * 255 + 1e-6))

    def largest_change(self, clean: LabeledImages) -> int:
        """How far the pixel of a poison is from that of its base image at most, in whole levels of 255."""
        return int(self._changes(clean).max())

    def _changes(self, clean: LabeledImages) -> Int16[Tensor, " p"]:
        """The largest change of a pixel of each poison."""
        rows = self.poison_idx
        poison, base = self.train.x[rows.to(self.train.device)].cpu(), clean.x[rows.to(clean.device)].cpu()
        return (poison.short() - base.short()).abs().flatten(1).amax(1)

    def _check_rows(self, clean: LabeledImages, budget: int | None) -> None:
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
        if budget is not None and len(p) > budget:
            raise ValueError(f"{len(p)} poisons, but the budget is {budget}")

    def _check_goal(self, clean: LabeledImages) -> None:
        goal = self.goal
        goal.__post_init__()  # again: tensors can be changed
        if goal.x.shape[1:] != clean.x.shape[1:]:
            raise ValueError(f"goal images are {tuple(goal.x.shape[1:])}, training images {clean.shape}")
        labels = torch.cat([goal.y_true, goal.y_wanted]).cpu()
        unknown = labels[(labels < 0) | (labels >= len(clean.classes))]
        if len(unknown):
            raise ValueError(f"class {int(unknown[0])} of the goal is out of range: there are "
                             f"{len(clean.classes)} classes")  # fmt: skip
        if not all(bool(torch.isfinite(part).all()) for part in trigger_to_file(goal.trigger)[0].values()):
            raise ValueError("the goal's trigger has pixels that are not finite")
        if goal.bases is not None:
            others = self.poison_idx.cpu()[~torch.isin(self.poison_idx.cpu(), goal.bases.cpu())]
            if len(others):
                raise ValueError(f"poison {int(others[0])} is not among the bases that the goal prescribes")

    def _check_rest(self, clean: LabeledImages) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]:
        """Which rows have other pixels, and which another label; raises if one of them is no poison."""
        honest = torch.ones(len(clean), dtype=torch.bool)
        honest[self.poison_idx.cpu()] = False
        changed = differing_rows(self.train.x, clean.x)
        stray = (changed & honest).nonzero().flatten()
        if len(stray):
            raise ValueError(f"{len(stray)} images changed that are not listed as poisons, first: {int(stray[0])}")
        relabelled = self.train.y.cpu() != clean.y.cpu()
        astray = (relabelled & honest).nonzero().flatten()
        if len(astray):
            self._refuse_label(clean, int(astray[0]), "it is no poison")
        return changed, relabelled

    def _refuse_label(self, clean: LabeledImages, row: int, why: str) -> NoReturn:
        raise ValueError(f"row {row} has label {int(self.train.y[row])}, but it was {int(clean.y[row])}: {why}")

    def _check_class(self) -> None:
        labels = self.train.y.cpu()[self.poison_idx.cpu()]
        astray = (~torch.isin(labels, self.goal.y_wanted.cpu())).nonzero().flatten()
        if len(astray):
            row, label = int(self.poison_idx[astray[0]]), int(labels[astray[0]])
            name = repr(self.train.classes[label]) if 0 <= label < len(self.train.classes) else label
            raise ValueError(f"poison {row} is of class {name}, which the goal does not want: it would teach nothing "
                             "of use to the attacker")  # fmt: skip

    def _check_bound(self, clean: LabeledImages, bound: int) -> None:
        changes = self._changes(clean)
        far = (changes > bound).nonzero().flatten()
        if len(far):
            raise ValueError(f"poison {int(self.poison_idx[far[0]])} differs from its base image by "
                             f"{int(changes[far[0]])}/255, more than xi = {bound}/255")  # fmt: skip

    def save(self, path: Path, *, clean: LabeledImages | None = None, key: str = "") -> None:
        """Write the poisons, not the clean rest, as one safetensors file; atomic. Equal sets give equal bytes.

        Args:
            clean: the training set before the attack; its fingerprint goes into the file, so that whoever loads it
                with other data is told so at once.
            key: names the settings that it was made with, e.g. ``Trial.key()``.
        """
        goal = self.goal
        trigger_tensors, trigger_entries = trigger_to_file(goal.trigger)
        tensors = {
            "poison_x": self.train.x[self.poison_idx.to(self.train.device)],
            "poison_y": self.train.y[self.poison_idx.to(self.train.y.device)],
            "poison_idx": self.poison_idx,
            "goal_x": goal.x,
            "goal_y_true": goal.y_true,
            "goal_y_wanted": goal.y_wanted,
            **trigger_tensors,
        }
        if goal.bases is not None:
            tensors["goal_bases"] = goal.bases
        header: dict[str, object] = {
            "format": FORMAT,
            "attack": self.recipe.get("attack", ""),
            "recipe": dict(self.recipe),
            "key": key,
            "goal": goal.name,
            "clean": None if clean is None else clean.fingerprint,
            "poisoned": self.train.fingerprint,
            **trigger_entries,
        }
        write_tensors(path, tensors, header | {"sha256": seal(tensors, header)})

    @classmethod
    def load(cls, path: Path, clean: LabeledImages) -> PoisonedDataset:
        """Put a saved poison set back into the clean training set it was made for.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is torn, foreign, or was changed after it was written; or ``clean`` is not the data
                that it was made for. Says which.
        """
        tensors, header = read_tensors(path)
        _refuse_changed(path, tensors, header)
        if header.get("clean") not in (None, clean.fingerprint):
            raise _other_data(path, clean)
        try:
            train = _replaced(path, tensors, clean)
            if header.get("clean") is None and train.fingerprint != header["poisoned"]:
                raise _other_data(path, clean)
            recipe = cast("dict[str, object]", header["recipe"])
            return cls(train, tensors["poison_idx"], _goal(path, tensors, header), recipe)
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}: it is not a whole poison set") from error


def differing_rows(a: UInt8[Tensor, "n c h w"], b: UInt8[Tensor, "n c h w"]) -> Bool[Tensor, " n"]:
    """Which images of two equally large sets differ in any byte; on the CPU, a part at a time to save memory."""
    pairs = zip(a.split(PART), b.split(PART), strict=True)
    return torch.cat([(one != other.to(a.device)).flatten(1).any(1).cpu() for one, other in pairs])


def seal(tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> str:
    """sha256 over the named tensors and header entries of a file, but for the one that holds it."""
    rest = {name: value for name, value in header.items() if name != "sha256"}
    sha = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _refuse_changed(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> None:
    """Raise unless the file is of our format, and as it was written."""
    if header.get("format") == OLD_FORMAT:
        return  # had no seal: what it becomes is compared with ``poisoned``
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a poison set of ours: format {header.get('format')!r}")
    if header.get("sha256") != seal(tensors, header):
        raise ValueError(f"{path} was changed after it was written: its sha256 is not the one that it names; fetch it "
                         "again, or craft it anew")  # fmt: skip


def _other_data(path: Path, clean: LabeledImages) -> ValueError:
    return ValueError(
        f"{path} was made for other training data than {clean!r}: the same source, classes, subset and order of rows "
        "are needed"
    )


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
