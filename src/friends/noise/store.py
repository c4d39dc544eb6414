"""The friendly noise of a whole data set on disk: made once, checked always, resumable after any crash.

A store is a folder with ``manifest.json`` and ``shard-00000.safetensors``, ... Noise is whole grey levels, which is
exact for byte images, in one of the codings of :mod:`friends.noise.coding`. Every row has a 64-bit key that names it
and a hash of the image that it was made for, so noise cannot silently reach another image.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor, nn

from friends.data.files import sha256_of
from friends.data.images import LabeledImages
from friends.noise.coding import Coding, decode
from friends.noise.friendly import RELEASED, FriendlySettings
from friends.noise.grey import device_of, grey_limit, grey_noise, initial_noise
from friends.noise.making import SAMPLE, make_shards
from friends.noise.manifest import NAME, Manifest, Plan, fingerprint, keys_digest, shard_path
from friends.noise.rows import Int64s, Key, MapDataset, Rows, contents, key_number, key_numbers, spread
from friends.noise.shards import Shard, open_shard, refuse_damage
from friends.noise.summary import summary
from friends.types import Progress, silent

__all__ = ["NoiseStore", "grey_noise", "initial_noise"]

Positions = Tensor | Sequence[int] | Int64s


class NoiseStore:
    """The friendly noise of a data set; made by :meth:`generate`, opened by :meth:`load`.

    The noise is mapped from the disk, so opening costs no memory, and a store that is sent to another process is
    opened there again. Rows are addressed by position (:meth:`rows`, :meth:`grey`) or by key (``store[key]``).
    """

    def __init__(self, path: Path, manifest: Manifest, shards: list[Shard], identity: str) -> None:
        self.path = path
        self._manifest, self._plan, self._identity = manifest, manifest.plan, identity
        self._coded = [shard.coded for shard in shards]
        self._keys = np.concatenate([shard.keys for shard in shards])
        self._content = np.concatenate([shard.content for shard in shards])

    @staticmethod
    def generate(
        model: nn.Module,
        data: LabeledImages | MapDataset,
        path: str | Path,
        *,
        settings: FriendlySettings = RELEASED,
        seed: int = 0,
        keys: Sequence[Key] | Tensor | None = None,
        proxy: str = "",
        coding: Coding = "int8",
        batch_size: int = 128,
        shard_rows: int = 4096,
        device: torch.device | str | None = None,
        progress: Progress = silent,
    ) -> NoiseStore:
        """Make the noise of every image, or continue where an earlier call was stopped; then open the store.

        Shards are written one by one and whole, so the process may be killed at any moment; the next call with the
        same arguments redoes at most one shard and ends with the same bytes. A complete store is opened at once.
        Memory does not grow with the number of images, apart from their keys and hashes, 16 bytes each.

        Args:
            model: takes pixels in [0, 1] and returns logits; see :func:`friends.noise.friendly_noise`.
            data: byte images, or any map-style data set whose items are images (PIL, numpy, tensors), tuples that
                start with one, or dicts with one under ``"image"`` or ``"img"``. Not augmented.
            path: the store's folder; made if need be.
            settings: how the noise is optimised; ``zeta`` at most 127/255.
            seed: of the random starts.
            keys: one unique integer or string per image (a path, an id); by default their positions.
            proxy: what to call the model in reports, e.g. ``"lenet, 5 epochs"``.
            coding: how noise is kept: ``"int8"``, a byte a value; ``"bits"``, a bit a value, its sign, and one size for
                each image; ``"flips"``, a tenth of a bit a value, for noise of the method ``"flips"``. With the last
                two, image plus noise may leave [0, 255], and is clipped where it is used. See
                :mod:`friends.noise.coding`; :meth:`info` says what it costs.
            batch_size: images optimised at once.
            shard_rows: images in a file.
            device: where to compute, if not where the model is; the model itself stays where it is.
            progress: told after every batch.

        Raises:
            ValueError: the folder holds anything else (the first difference is named), images differ in size or
                change when read again, keys repeat, or ``zeta`` or the coding does not fit.
            BlockingIOError: another process is generating into the folder.
        """
        images = Rows(data)
        numbers = key_numbers(keys, len(images))
        plan = Plan(n=len(images), shape=images.shape, shard_rows=shard_rows, batch_size=batch_size, settings=settings,
                    seed=seed, model=fingerprint(model), keys=keys_digest(numbers), proxy=proxy,
                    coding=coding)  # fmt: skip
        if device is not None and device_of(model, torch.device(device)) != torch.device(device):
            model = copy.deepcopy(model).to(device)
        make_shards(model, images, Path(path), plan, numbers, progress)
        return NoiseStore.load(path, verify=False)

    @staticmethod
    def load(path: str | Path, *, verify: bool = True) -> NoiseStore:
        """Open a store. Nothing in it can run code, and nothing is believed unchecked.

        Args:
            path: the store's folder.
            verify: also read every byte once: compare each shard's sha256 and check every value against zeta.

        Raises:
            FileNotFoundError: there is no store.
            ValueError: the store is incomplete, torn, of another format, or contradicts its own manifest.
        """
        folder = Path(os.path.abspath(path))
        manifest = Manifest.read(folder)
        plan = manifest.plan
        if manifest.missing:
            raise ValueError(
                f"{folder} is not complete: {manifest.missing} of {plan.shards} shards are missing. "
                "Run the command that made it again: it continues where it stopped."
            )
        shards: list[Shard] = []
        for number, record in enumerate(cast("list[dict[str, Any]]", manifest.shards)):
            file = shard_path(folder, number)
            shards.append(open_shard(file, record, len(plan.rows(number)), plan.coder))
            if verify:
                refuse_damage(file, record, len(plan.rows(number)), plan.coder, grey_limit(plan.settings.zeta))
        store = NoiseStore(folder, manifest, shards, sha256_of(folder / NAME))
        if keys_digest(store._keys) != plan.keys:
            raise ValueError(f"{folder} is damaged: the keys in its shards are not those of the manifest")
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self._identity)

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        return (
            f"NoiseStore({str(self.path)!r}: {self.n} of {self.shape}, zeta {grey_limit(self.zeta)}/255"
            + (f", made with {self.proxy}" if self.proxy else "")
            + ")"
        )

    @property
    def n(self) -> int:
        """Number of images."""
        return self._plan.n

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(c, h, w)`` of every image."""
        return self._plan.shape

    @property
    def zeta(self) -> float:
        """The bound of the noise in [0, 1] pixel units."""
        return self._plan.settings.zeta

    @property
    def settings(self) -> FriendlySettings:
        """How the noise was optimised."""
        return self._plan.settings

    @property
    def seed(self) -> int:
        """The seed of the random starts."""
        return self._plan.seed

    @property
    def proxy(self) -> str:
        """What the model that the noise was made with is called."""
        return self._plan.proxy

    @property
    def coding(self) -> Coding:
        """How the noise is kept: ``"int8"``, ``"bits"`` or ``"flips"``."""
        return self._plan.coding

    @property
    def keys(self) -> Int64[Tensor, " n"]:
        """The keys of all rows as 64-bit integers, in order of position; strings appear as their hashes."""
        return torch.from_numpy(self._keys.copy())

    def content(self, position: int) -> int:
        """The 64-bit hash of the image that a row was made for."""
        return int(self._content[position])

    def position(self, key: Key) -> int:
        """The position of a key. Raises ``KeyError`` naming the key if there is no such row."""
        number = key_number(key)
        place = int(np.searchsorted(self._keys, number, sorter=self._by_key))
        if place < self.n and self._keys[self._by_key[place]] == number:
            return int(self._by_key[place])
        raise KeyError(f"{self.path} has no noise for the key {key!r}")

    @cached_property
    def _by_key(self) -> Int64s:
        return np.argsort(self._keys, kind="stable")

    def __getitem__(self, key: Key | Sequence[Key]) -> Float[Tensor, "*b c h w"]:
        """The noise of one key ``(c, h, w)``, or of several ``(b, c, h, w)``, in [0, 1] pixel units."""
        if isinstance(key, Sequence) and not isinstance(key, str):
            return self.rows([self.position(one) for one in key])
        return self.rows([self.position(key)])[0]

    def rows(self, positions: Positions) -> Float[Tensor, "b c h w"]:
        """The float32 noise at the given positions, in [0, 1] pixel units: whole grey levels divided by 255."""
        return self.grey(positions).float() / 255

    def grey(self, positions: Positions) -> Int8[Tensor, "b c h w"]:
        """The noise at the given positions in grey levels.

        Raises:
            IndexError: a position is not in ``[0, n)``.
            ValueError: a row's bytes are no noise; the file is named.
        """
        raw = positions.cpu().numpy() if isinstance(positions, Tensor) else positions
        index = np.asarray(raw, dtype=np.int64).reshape(-1)
        if len(index) and (index.min() < 0 or index.max() >= self.n):
            outside = index[(index < 0) | (index >= self.n)][0]
            raise IndexError(f"position {outside} is not in a store of {self.n} images")
        shard, row = np.divmod(index, self._plan.shard_rows)
        grey = decode(self._plan.coder, self._coded, shard, row, self._keys[index])
        return torch.from_numpy(grey).reshape(len(index), *self.shape)

    def tensor(self, device: torch.device | str = "cpu") -> Int8[Tensor, "n c h w"]:
        """The whole noise in grey levels on a device, for training data that live there."""
        grey = torch.empty((self.n, *self.shape), dtype=torch.int8, device=device)
        for rows, noise in self._pieces():
            grey[rows.start : rows.stop] = noise.to(device)
        return grey

    def _pieces(self) -> Iterator[tuple[range, Int8[Tensor, "b c h w"]]]:
        """The positions of every shard with their noise."""
        for number in range(self._plan.shards):
            rows = self._plan.rows(number)
            yield rows, self.grey(np.arange(rows.start, rows.stop))

    def positions(self, n: int, keys: Sequence[Key] | Tensor | None = None) -> Int64s:
        """The position of each of ``n`` rows of a data set: that of its key, or by default the row itself.

        Raises:
            ValueError: the numbers of rows or keys do not fit, or a key is unknown or there twice.
        """
        if keys is None:
            if n != self.n:
                raise ValueError(
                    f"{self.path} holds the noise of {self.n} images, the data set has {n}: pass the key of each "
                    "row as keys=, or make the noise for this data set"
                )
            return np.arange(n)
        numbers = key_numbers(keys, n)
        place = np.searchsorted(self._keys, numbers, sorter=self._by_key).clip(max=self.n - 1)
        found = self._by_key[place]
        unknown = np.flatnonzero(self._keys[found] != numbers)
        if len(unknown):
            row = int(unknown[0])
            given = keys[row].item() if isinstance(keys, Tensor) else keys[row]
            raise ValueError(f"row {row}: {self.path} has no noise for its key {given!r}")
        return found

    def check(
        self,
        data: LabeledImages | MapDataset,
        *,
        rows: int | None = None,
        keys: Sequence[Key] | Tensor | None = None,
    ) -> None:
        """Raise unless the noise was made for exactly these images.

        Args:
            data: what the noise is to be added to.
            rows: how many rows, evenly spread, have their pixels compared. By default all of images in memory, and
                64 of a data set that has to be read; ``len(data)`` compares all.
            keys: the key of each row, if the data set is a part of the store's, or in another order.

        Raises:
            ValueError: the number of images, their size, a key or a row's pixels differ; the first is named.
        """
        images = Rows(data)
        default = None if images.in_memory else SAMPLE
        self.check_rows(images, self.positions(len(images), keys), default if rows is None else rows)

    def check_rows(self, images: Rows, positions: Int64s, count: int | None) -> None:
        """:meth:`check` with the position of each row given, on ``count`` rows or all."""
        if images.shape != self.shape:
            raise ValueError(f"{self.path} holds noise for images of {self.shape}, these are {images.shape}")
        chosen = spread(len(images), count)
        for start in range(0, len(chosen), 1024):
            some = chosen[start : start + 1024]
            found = contents(images.bytes(some, self.shape))
            other = np.flatnonzero(found != self._content[positions[some]])
            if len(other):
                raise ValueError(self.mismatch(int(some[other[0]]), int(found[other[0]])))

    def mismatch(self, row: int, content: int) -> str:
        """What to say when row ``row`` of a data set has another content hash than its noise was made for."""
        elsewhere = np.flatnonzero(self._content == content)
        where = (
            f"They belong to position {elsewhere[0]}: the data were re-ordered; pass the key of each row as keys=."
            if len(elsewhere)
            else "The data set augments its images (pass the augmentation as transform= instead), or it is another one."
        )
        return f"row {row}: these are not the pixels that the noise in {self.path} was made for. {where}"

    def check_zeta(self, zeta: float) -> None:
        """Raise ``ValueError`` unless the noise was made for this bound (in whole grey levels)."""
        ours, wanted = grey_limit(self.zeta), grey_limit(zeta)
        if ours != wanted:
            raise ValueError(f"the noise in {self.path} was made for zeta {ours}/255, not {wanted}/255")

    @property
    def fingerprint(self) -> str:
        """sha256 of the fingerprints of all shards' images: which data set this noise belongs to."""
        parts = "".join(str(record["images"]) for record in self._manifest.shards if record)
        return hashlib.sha256(parts.encode()).hexdigest()

    def info(self) -> dict[str, Any]:
        """What there is to say about the store, as JSON values; reads every shard once.

        The bytes of an image are those of its noise; its key and the hash of its pixels are 16 more. KL is the mean of
        KL(f(x+e) || f(x)) over a sample of the rows, for the noise as it was optimised and as it is read back; see
        :class:`friends.noise.cost.Cost`.
        """
        facts = summary(self._manifest, self._coded, (noise for _, noise in self._pieces()))
        return {"path": str(self.path), "images": self.fingerprint, **facts}


def _reopen(path: str, identity: str) -> NoiseStore:
    """The same store in another process."""
    store = NoiseStore.load(path, verify=False)
    if store._identity != identity:  # pyright: ignore[reportPrivateUsage]
        raise ValueError(f"the noise store {path} was replaced by another one while it was in use")
    return store
