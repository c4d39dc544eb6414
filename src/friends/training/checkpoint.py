"""A training on disk: killed anywhere, it goes on from its last whole epoch and ends with the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from friends.data.files import read_tensors, write_tensors
from friends.training.defense import Run

FORMAT = "friends-checkpoint-1"


class Checkpoint:
    """The checkpoint of one training in a folder of its own.

    Defenses can remember much (friendly noise is as large as the data) that hardly ever changes, so their memory has
    a file of its own, written only when it changed and named in the main file, which is replaced last.

    Args:
        folder: where the files are; made when first needed.
        identity: names and values that make this training this one and no other.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.folder = folder
        self.identity = dict(identity)
        self._written: dict[str, tuple[Tensor, int]] | None = None
        self._memory_file = ""

    @property
    def path(self) -> Path:
        """The main file."""
        return self.folder / "checkpoint.safetensors"

    def save(self, run: Run, history: list[dict[str, float]], seconds: float) -> None:
        """Save a run between two epochs."""
        self._save_memory(run)
        tensors = {f"model/{name}": value for name, value in run.model.state_dict().items()}
        tensors["keep"] = run.keep
        scalars: dict[str, object] = {}
        for place, state in run.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{place}/{name}"] = value
                elif value is not None:
                    scalars[f"{place}/{name}"] = value
        header = {
            "format": FORMAT,
            "identity": self.identity,
            "epoch": run.epoch,
            "epochs": run.epochs,
            "augment": run.augment,
            "scalars": scalars,
            "memory": self._memory_file,
            "history": history,
            "seconds": seconds,
            "shared": run.shared_seconds,
            "used": run.used,
        }
        write_tensors(self.path, tensors, header)
        for old in self.folder.glob("memory-*.safetensors"):
            if old.name != self._memory_file:
                old.unlink(missing_ok=True)

    def _save_memory(self, run: Run) -> None:
        flat = {f"{place}/{name}": value for place, kept in run._memory.items() for name, value in kept.items()}  # pyright: ignore[reportPrivateUsage]
        if self._written is not None and _unchanged(flat, self._written):
            return
        self._memory_file = f"memory-{run.epoch:05d}.safetensors" if flat else ""
        if flat:
            write_tensors(self.folder / self._memory_file, flat)
        # the tensors themselves are kept: an address may be used again by another one
        self._written = {name: (value, value._version) for name, value in flat.items()}  # pyright: ignore[reportPrivateUsage]

    def load(self, run: Run) -> tuple[list[dict[str, float]], float] | None:
        """Put a saved state into a run at epoch 0. Returns its history and seconds, or None if nothing is saved.

        Raises:
            ValueError: the checkpoint is torn, or of another training; the first difference is named.
        """
        if not self.path.exists():
            return None
        tensors, header = read_tensors(self.path)
        self._refuse_foreign(header)
        run.epoch, run.epochs = cast(int, header["epoch"]), cast(int, header["epochs"])
        run.augment = bool(header["augment"])
        run.shared_seconds = cast(float, header.get("shared", 0.0))
        run.used |= cast("dict[str, str]", header.get("used", {}))
        run.keep = tensors.pop("keep").to(run.device)
        if header["memory"]:
            memory, _ = read_tensors(self.folder / str(header["memory"]))
            for name, value in memory.items():
                place, _, key = name.partition("/")
                run._memory[int(place)][key] = value.to(run.device)  # pyright: ignore[reportPrivateUsage]
        for defense in run._defenses:  # pyright: ignore[reportPrivateUsage]
            defense.resume(run)
        model = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
        run.model.load_state_dict(model)
        self._load_optimizer(run, tensors, cast("dict[str, object]", header["scalars"]))
        return cast("list[dict[str, float]]", header["history"]), cast(float, header["seconds"])

    @staticmethod
    def _load_optimizer(run: Run, tensors: Mapping[str, Tensor], scalars: Mapping[str, object]) -> None:
        state: dict[int, dict[str, object]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer/"):
                _, place, key = name.split("/", 2)
                state.setdefault(int(place), {})[key] = value
        for name, value in scalars.items():
            place, _, key = name.partition("/")
            state.setdefault(int(place), {})[key] = value
        for kept in state.values():  # SGD keeps a slot for momentum even before its first step
            kept.setdefault("momentum_buffer", None) if isinstance(run.optimizer, torch.optim.SGD) else None
        run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})

    def _refuse_foreign(self, header: Mapping[str, object]) -> None:
        if header.get("format") != FORMAT:
            raise ValueError(f"{self.path} is not a checkpoint of ours: format {header.get('format')!r}")
        theirs = cast("dict[str, str]", header["identity"])
        for name in [*self.identity, *sorted(theirs.keys() - self.identity.keys())]:
            if theirs.get(name) != self.identity.get(name):
                raise ValueError(
                    f"{self.path} is of another training: its {name} is {json.dumps(theirs.get(name))}, here it is "
                    f"{json.dumps(self.identity.get(name))}. Choose another folder, or delete this one."
                )


def _unchanged(now: Mapping[str, Tensor], written: Mapping[str, tuple[Tensor, int]]) -> bool:
    """Whether these are the very tensors that were written, and none was changed in place since."""
    return now.keys() == written.keys() and all(
        value is written[name][0] and value._version == written[name][1]  # pyright: ignore[reportPrivateUsage]
        for name, value in now.items()
    )
