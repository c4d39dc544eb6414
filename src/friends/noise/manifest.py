"""The manifest of a noise store: the plan by which it is made, and which of its shards are there.

A folder belongs to one plan. The plan is written before any work, so whoever starts again later, after a crash or by
mistake, continues exactly this store or is told what is different.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from friends.data.files import write_json
from friends.noise.coding import Coder, Coding, check_coding, coder
from friends.noise.cost import Cost
from friends.noise.friendly import FriendlySettings
from friends.noise.grey import grey_limit
from friends.noise.rows import Int64s

FORMAT = "friends noise 2"
BEFORE_CODINGS = "friends noise 1"
"""The format of stores that keep a byte a value and do not say so."""

NAME = "manifest.json"
MAX_MANIFEST = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that the bytes of a store follow from, besides the images.

    Args:
        n: number of images.
        shape: ``(c, h, w)`` of each.
        shard_rows: rows of every shard but the last.
        batch_size: images optimised at once; the last rounding of a float may depend on it.
        settings: how the noise is optimised.
        seed: of the starts.
        model: :func:`fingerprint` of the model.
        keys: sha256 of the rows' 64-bit keys, in order.
        proxy: what the model is called; a note for readers.
        coding: how the noise is kept.
    """

    n: int
    shape: tuple[int, int, int]
    shard_rows: int
    batch_size: int
    settings: FriendlySettings
    seed: int
    model: str
    keys: str
    proxy: str
    coding: Coding

    def __post_init__(self) -> None:
        if min(self.n, self.shard_rows, self.batch_size, *self.shape) < 1:
            raise ValueError(f"n, shape, shard_rows and batch_size must be positive, not {self.n}, {self.shape}, "
                             f"{self.shard_rows}, {self.batch_size}")  # fmt: skip
        check_coding(self.coding, self.settings.method)
        if grey_limit(self.settings.zeta) < 1:
            raise ValueError(f"zeta is {self.settings.zeta:g}, less than one grey level: there would be no noise")

    @property
    def shards(self) -> int:
        """How many shards the store has when it is complete."""
        return -(-self.n // self.shard_rows)

    def rows(self, shard: int) -> range:
        """The positions in a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.n))

    @cached_property
    def coder(self) -> Coder:
        """What reads and writes the noise."""
        return coder(self.coding, self.shape, grey_limit(self.settings.zeta), self.seed)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        """The plan back from JSON values. Raises ``KeyError``, ``TypeError`` or ``ValueError`` on any others."""
        c, h, w = value["shape"]
        numbers = [c, h, w, *(value[name] for name in ("n", "shard_rows", "batch_size", "seed"))]
        if not all(type(number) is int for number in numbers):
            raise TypeError("a number in it is no integer")
        settings = FriendlySettings(**value["settings"])
        fields: dict[str, Any] = {**value, "shape": (c, h, w), "settings": settings}
        return cls(**fields)

    def refuse_other(self, other: Plan, folder: Path) -> None:
        """Raise ``ValueError`` naming the first field in which the plan found in ``folder`` is another."""
        ours, theirs = _flat(self.to_json()), _flat(other.to_json())
        for name, value in ours.items():
            if theirs[name] != value:
                raise ValueError(
                    f"{folder} holds noise made another way: its {name} is {theirs[name]!r}, here it is {value!r}. "
                    "Choose another folder, or delete that one."
                )


def _flat(plan: dict[str, Any]) -> dict[str, Any]:
    settings = {f"settings.{name}": value for name, value in plan["settings"].items()}
    return {name: value for name, value in plan.items() if name != "settings"} | settings


@dataclass
class Manifest:
    """The plan and, for every shard, its size, sha256, fingerprint of images and what its coding costs.

    A shard that is missing is None.
    """

    plan: Plan
    shards: list[dict[str, Any] | None]

    @property
    def missing(self) -> int:
        """How many shards are not there yet."""
        return sum(shard is None for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write it atomically."""
        write_json(folder / NAME, {"format": FORMAT, "plan": self.plan.to_json(), "shards": self.shards})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest in ``folder``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not of this format, or says impossible things.
        """
        path = folder / NAME
        if not path.is_file():
            raise FileNotFoundError(f"no noise store at {folder}: there is no {NAME} in it")
        if path.stat().st_size > MAX_MANIFEST:
            raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {MAX_MANIFEST} are allowed")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is torn or no JSON: {error}") from error
        found = cast("dict[str, Any]", value).get("format") if isinstance(value, dict) else None
        if found not in (FORMAT, BEFORE_CODINGS):
            raise ValueError(f"{path} is not a noise store of this version: format {found!r}, not {FORMAT!r}")
        try:
            plan = Plan.from_json(value["plan"] if found == FORMAT else {**value["plan"], "coding": "int8"})
            shards = [_record(shard) for shard in value["shards"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        if len(shards) != plan.shards:
            raise ValueError(f"{path} is damaged: it lists {len(shards)} shards, the plan has {plan.shards}")
        return cls(plan, shards)


def _record(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    size, sha256, images = value["bytes"], value["sha256"], value["images"]
    if type(size) is not int or type(sha256) is not str or type(images) is not str:
        raise TypeError("a shard's size, sha256 or fingerprint of images is of the wrong type")
    record = {"bytes": size, "sha256": sha256, "images": images}
    return record | ({"cost": Cost.from_json(value["cost"]).to_json()} if "cost" in value else {})


def shard_path(folder: Path, shard: int) -> Path:
    """The file of a shard. Its name follows from its number: a manifest cannot point elsewhere."""
    return folder / f"shard-{shard:05d}.safetensors"


def fingerprint(model: nn.Module) -> str:
    """sha256 over the classes of all modules and the state (weights, running statistics): which model this is."""
    sha = hashlib.sha256()
    for name, module in model.named_modules():
        sha.update(f"{name}:{type(module).__qualname__};".encode())
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            sha.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def keys_digest(keys: Int64s) -> str:
    """sha256 over the keys as little-endian 64-bit integers."""
    return hashlib.sha256(keys.astype("<i8").tobytes()).hexdigest()
