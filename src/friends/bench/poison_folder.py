"""A folder of crafted poisons: what it says about itself, and whether it is still what it says.

Each file is written whole or not at all::

    manifest.json                what was crafted, with what settings, on what data; one entry per file
    goal-000.safetensors         the poisons of the first goal (friends.data.poisoned); the clean rest is not in it
    work/                        trainings and craftings in progress; removed at the end
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from friends.attacks import ATTACKS
from friends.attacks.base import bound_of, poison_count
from friends.bench.lab import Lab
from friends.bench.trial import Trial, construct
from friends.data.files import write_json
from friends.data.images import LabeledImages
from friends.data.poisoned import PoisonedDataset
from friends.types import Progress, silent

MANIFEST, WORK, FORMAT = "manifest.json", "work", "friends-attack-1"


@dataclass(frozen=True, kw_only=True)
class PoisonFile:
    """The poisons of one goal.

    Args:
        file: the file's name, without a folder.
        bytes, sha256: of the whole file.
        goal: what the attacker wants, in words.
        images: images that the goal is judged by.
        poisons: poisoned training images.
        largest_change: how far a pixel is from that of its base image at most, in levels of 255.
        score_first, score_last: the attack's objective, smaller is better, at the start and the end of the restart
            that was kept; None for attacks that have none.
        seconds: crafting, without training surrogates; the mean if several goals were crafted in one batch.
    """

    file: str
    bytes: int
    sha256: str
    goal: str
    images: int
    poisons: int
    largest_change: int
    score_first: float | None = None
    score_last: float | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file:
            raise ValueError(f"{self.file!r} is no plain file name")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of poisons says about itself.

    Args:
        key: hash of the settings; equal keys are the same poisons, on the same data and library versions.
        attack: the attack's name.
        settings: everything that the poisons follow from, as plain values.
        data: name, fingerprint, size and classes of the clean training set.
        planned: how many goals there will be.
        goals: those that are finished.
        seconds: by stage, over all the processes that it took.
        started: when, in UTC.
        versions, commit, device, threads: with what.
    """

    format: str = FORMAT
    key: str
    attack: str
    settings: dict[str, Any]
    data: dict[str, Any]
    planned: int
    goals: tuple[PoisonFile, ...] = ()
    seconds: dict[str, float] = field(default_factory=lambda: cast("dict[str, float]", {}))
    started: str = ""
    versions: dict[str, str] = field(default_factory=lambda: cast("dict[str, str]", {}))
    commit: str = ""
    device: str = ""
    threads: int = 1

    @property
    def finished(self) -> bool:
        """Whether every goal has its poisons."""
        return len(self.goals) == self.planned

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``, atomically."""
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is of another kind, or damaged.
        """
        file = folder / MANIFEST
        if not file.is_file():
            raise FileNotFoundError(f"{folder} is no folder of poisons: it has no {MANIFEST}")
        try:
            plain = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        if not isinstance(plain, dict) or cast("dict[str, Any]", plain).get("format") != FORMAT:
            raise ValueError(f"{file} is not the manifest of a folder of poisons")
        return construct(cls, cast("dict[str, Any]", plain), str(file))


def goal_file(g: int) -> str:
    """The name of the file of goal ``g``."""
    return f"goal-{g:03d}.safetensors"


def sha256_of(file: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def verify(folder: Path) -> Manifest:
    """The manifest of a folder whose files are all as they were written.

    Raises:
        FileNotFoundError: the manifest, or a file that it lists, is missing.
        ValueError: a file is torn, was changed, or is listed nowhere.
    """
    manifest = Manifest.read(folder)
    for entry in manifest.goals:
        file = folder / entry.file
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, though {MANIFEST} lists it")
        if (size := file.stat().st_size) != entry.bytes:
            raise ValueError(f"{file} has {size} bytes, not {entry.bytes}: it is torn")
        if sha256_of(file) != entry.sha256:
            raise ValueError(f"{file} was changed after it was written: its sha256 is not the one in {MANIFEST}")
    listed = {entry.file for entry in manifest.goals}
    strays = sorted(file.name for file in folder.glob("goal-*.safetensors") if file.name not in listed)
    if strays and manifest.finished:
        raise ValueError(f"{folder / strays[0]} is not listed in {MANIFEST}")
    return manifest


def trial_of(manifest: Manifest) -> Trial:
    """The trial that a folder was crafted from.

    Raises:
        ValueError: an attack or a setting is not known: another version crafted it.
    """
    if manifest.attack not in ATTACKS:
        raise ValueError(f"{MANIFEST} names the attack {manifest.attack!r}, which is not known here")
    plain = cast("dict[str, Any]", _plain(manifest.settings))
    attack = construct(ATTACKS[manifest.attack], plain.pop("attack"), f"attack {manifest.attack}")
    return construct(Trial, {**plain, "name": "poisons", "attack": attack, "controls": 0}, MANIFEST)


def _plain(value: object) -> object:
    """Settings without the names of their classes, as :func:`construct` takes them."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in cast("dict[str, object]", value).items() if name != "is"}
    return value


def clean_data(
    folder: Path, *, source: str | None = None, download: bool = False, progress: Progress = silent
) -> LabeledImages:
    """The training set that a folder of poisons was made for, the same draw of it.

    Args:
        source: where the data are now, if not where they were.
        download: whether a public data set that is not here may be fetched from its home.

    Raises:
        FileNotFoundError: the data are not there.
        ValueError: they are other data than the poisons were made for.
    """
    manifest = Manifest.read(folder)
    trial = trial_of(manifest)
    if source is not None:
        trial = replace(trial, data=replace(trial.data, source=source))
    clean = Lab(trial, folder / WORK, torch.device("cpu"), progress, download).data[0]
    if clean.fingerprint != manifest.data["fingerprint"]:
        raise ValueError(f"{folder} was made for other images than {clean!r} from {trial.data.source!r}")
    return clean


def read_poisons(folder: Path, clean: LabeledImages | None = None) -> Iterator[PoisonedDataset]:
    """The poisoned training sets of a folder, one after the other, each checked against what its attack claims.

    Args:
        clean: the training set that they were made for; by default it is loaded from where it was.

    Raises:
        FileNotFoundError, ValueError: as :func:`verify` and :func:`clean_data`; or a set breaks a claim.
    """
    manifest = verify(folder)
    clean = clean_data(folder) if clean is None else clean
    attack = trial_of(manifest).attack
    budget = getattr(attack, "budget", None)
    count = None if budget is None else poison_count(budget, len(clean))
    for entry in manifest.goals:
        poisoned = PoisonedDataset.load(folder / entry.file, clean)
        poisoned.check(clean, xi=bound_of(attack), budget=count, clean_label=attack.about.clean_label)
        yield poisoned


def export(folder: Path, clean: LabeledImages, to: Path) -> None:
    """Write the poisons of a folder once more, as the folders of pickles that the public benchmark reads.

    Args:
        to: made; ``goal-000/`` and so on below it.

    Raises:
        FileExistsError: ``to`` is not empty.
        ValueError: the format cannot hold a goal (see :mod:`friends.data.legacy`).
    """
    from friends.data.legacy import write_folder

    refuse_export(to)
    for g, poisoned in enumerate(read_poisons(folder, clean)):
        write_folder(poisoned, to / Path(goal_file(g)).stem)


def refuse_export(to: Path) -> None:
    """Raise ``FileExistsError`` unless ``to`` is free."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise FileExistsError(f"{to} is not empty: name another folder to export to")
