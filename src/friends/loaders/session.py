"""One training in a loop of the user's own: a protected loader, its epochs, the noise in between, and its state.

``Friends`` is a frozen value: settings, which can be compared, printed and used for many trainings. What changes while
a loop runs is a :class:`Session`. The methods of ``Friends`` look it up by the object itself (not by its value: two
equal defenses protect two loaders), so a session lives as long as the defense that it belongs to, and
``dataclasses.replace`` or a copy begins without one.

Workers see no session, only what :class:`friends.loaders.shared.Shared` says: the epoch, pauses, and the folder of the
noise, which each of them maps for itself.
"""

from __future__ import annotations

import os
import tempfile
import warnings
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from friends.data.files import sha256_of
from friends.loaders import together
from friends.loaders.checking import examine, refuse
from friends.loaders.clean import Clean, positions_in
from friends.loaders.loader import Loader, inner_loader, may_repeat, with_data
from friends.loaders.place import Options
from friends.loaders.protected import Noises, Protected
from friends.loaders.saved import is_used, packed, remove, unpack
from friends.loaders.shared import Shared
from friends.loaders.structure import Opened, randomness
from friends.loaders.view import Prepared, View, bare, refusal
from friends.noise.friendly import FriendlySettings
from friends.noise.manifest import NAME
from friends.noise.random import RandomNoise
from friends.noise.rows import Key
from friends.noise.store import NoiseStore
from friends.types import Progress, Streams, silent

FORMAT = "friends session 1"


@runtime_checkable
class Settings(Protocol):
    """The settings of ``Friends`` that a session reads."""

    @property
    def zeta(self) -> float: ...
    @property
    def mu(self) -> float: ...
    @property
    def random(self) -> RandomNoise: ...
    @property
    def def_epoch(self) -> int: ...
    @property
    def settings(self) -> FriendlySettings: ...
    @property
    def store(self) -> str | None: ...
    @property
    def proxy(self) -> str | None: ...
    @property
    def held(self) -> str: ...
    @property
    def kept(self) -> str: ...


_sessions: dict[int, Session] = {}


def session_of(defense: Settings) -> Session:
    """The session of this very object; begun if there is none."""
    if id(defense) not in _sessions:
        _sessions[id(defense)] = Session(defense)
        weakref.finalize(defense, _sessions.pop, id(defense), None)
    return _sessions[id(defense)]


@dataclass(frozen=True)
class Guarded:
    """What a session knows of its loader: its data, pixels of some rows, and what the model is shown for them."""

    data: Protected
    pixels: list[Tensor]
    view: View


class Session:
    """The state of one training.

    Raises:
        ValueError: the settings are for experiments with ``fit`` (``proxy``, ``held``).
    """

    def __init__(self, defense: Settings) -> None:
        if defense.proxy is not None:
            raise ValueError(f"in a loop of your own there is no proxy {defense.proxy!r}: make a store with any model, "
                             "friends.NoiseStore.generate, and pass its folder as store=")  # fmt: skip
        if defense.held != "own":
            raise ValueError(f"held={defense.held!r} is a control for experiments with fit")
        # values, not the object itself: the session must not keep it alive
        self._random: RandomNoise = defense.random
        self._zeta, self._mu, self._def_epoch = defense.zeta, defense.mu, defense.def_epoch
        self._settings = replace(defense.settings, zeta=defense.zeta)
        self._given, self._kept = defense.store, defense.kept
        self._shared = Shared()
        self._guarded: Guarded | None = None
        self._folder: Path | None = None
        self._stays = False
        self._seed, self._next, self._trained, self._turn = 0, 0, False, object()

    def protect(
        self, loader: Loader, options: Options, *, folder: str | Path | None, seed: int,
        keys: Sequence[Key] | Tensor | None,
    ) -> Loader:  # fmt: skip
        """The same loader, with noise on its images; see ``Friends.protect``."""
        if self._guarded is not None:
            raise ValueError("this Friends protects a loader already: make another one for another training")
        inner = inner_loader(loader)
        opened = Opened(inner.dataset)
        try:
            found, view = examine(loader, opened, options)
            refuse(found.blockers)
            assert found.place is not None and view is not None
            noises = Noises(self._random, self._mu, seed, may_repeat(inner))
            data = Protected(inner.dataset, found.place, noises, self._shared, opened.bare)
            if self._given is not None and self._zeta > 0:
                self._load(data, self._given, keys)
        except BaseException:
            opened.close()
            raise
        if found.place.bytes_because and self._mu > 0:
            warnings.warn(f"random noise is rounded and clipped at black and white: {found.place.bytes_because}. To "
                          "have it whole, put friends.NoiseHere() behind ToTensor and before anything random",
                          stacklevel=3)  # fmt: skip
        self._seed, self._guarded = seed, Guarded(data, found.pixels, view)
        self._stays = folder is not None
        self._folder = Path(os.path.abspath(folder)) if folder is not None else None
        return with_data(loader, data)

    @property
    def guarded(self) -> Guarded:
        """Raises ``RuntimeError`` unless there is a loader."""
        if self._guarded is None:
            raise RuntimeError("protect a loader first: loader = defense.protect(loader)")
        return self._guarded

    @property
    def store(self) -> NoiseStore | None:
        """The friendly noise in use."""
        return NoiseStore.load(self._shared.path, verify=False) if self._shared.path else None

    def epochs(self, model: nn.Module, n: int, progress: Progress) -> Iterator[int]:
        """Refuse what cannot work, at once; then give the epochs that are left."""
        self._refuse(model, n)
        return self._epochs(model, n, progress)

    def _refuse(self, model: nn.Module, n: int) -> None:
        guarded = self.guarded
        if n < 1:
            raise ValueError(f"a training has at least one epoch, not {n}")
        if self._next >= n and self._trained:
            raise ValueError(f"this Friends has trained its {n} epochs: make another one for another training")
        if self._zeta == 0 or self._shared.path:
            return
        if self._def_epoch >= n:
            raise ValueError(f"friendly noise would be made at epoch {self._def_epoch}, but training ends after {n}: "
                             "lower def_epoch")  # fmt: skip
        if self._given is not None:
            return
        blocker = refusal(model, guarded.pixels, guarded.view)
        refuse([] if blocker is None else [blocker])
        if self._folder is not None and self._next < self._def_epoch and is_used(self._folder):
            raise ValueError(f"{self._folder} is not empty. If it is the noise of this training, load the state that "
                             "was saved with it; if it is another's, pass it as store=; else choose another "
                             "folder")  # fmt: skip

    def _epochs(self, model: nn.Module, n: int, progress: Progress) -> Generator[int, None, None]:
        turn = self._turn = object()
        try:
            for epoch in range(self._next, n):
                self.begin(epoch, model, progress)
                yield epoch
        finally:
            if self._turn is turn:  # a loop that was left long ago may be cleaned up during the next one
                self._shared.epoch = -1

    def begin(self, epoch: int, model: nn.Module, progress: Progress = silent) -> None:
        """Start an epoch: for trainers that count epochs themselves. Friendly noise is made if it is time.

        In distributed training every rank must call this.
        """
        data = self.guarded.data
        self._shared.rank = together.rank()
        if self._zeta > 0 and not self._shared.path and epoch >= self._def_epoch:
            if self._given is not None:
                self._shared.use_store(os.path.abspath(self._given))
            else:
                path, identity = together.by_one(lambda told: self._make(model, told), progress)
                self._use(data, path, identity)
        self._shared.epoch, self._next, self._trained = epoch, epoch + 1, True

    def _make(self, model: nn.Module, progress: Progress) -> tuple[str, str]:
        """Make the friendly noise with the model as it is. Returns the folder and the hash of its manifest."""
        guarded = self.guarded
        prepared = Prepared(bare(model), guarded.view)
        with randomness():
            store = NoiseStore.generate(
                prepared, Clean(guarded.data), self._place_for_noise(), settings=self._settings,
                seed=Streams(self._seed).integer("friendly"), coding="bits" if self._kept == "bits" else "int8",
                progress=progress,
            )  # fmt: skip
        return str(store.path), sha256_of(store.path / NAME)

    def _place_for_noise(self) -> Path:
        """The folder of the store; if none was given, one that goes with the session."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="friends-"))
            weakref.finalize(self, remove, str(self._folder), os.getpid())
        return self._folder

    def _use(self, data: Protected, path: str, identity: str) -> None:
        """Make sure, in this process, that the store is there and of this loader's images; then tell the workers."""
        manifest = Path(path) / NAME
        if not manifest.is_file() or sha256_of(manifest) != identity:
            raise FileNotFoundError(f"rank {together.rank()} does not see the noise in {path}: pass "
                                    "protect(folder=...) on a disk that all machines share")  # fmt: skip
        store = NoiseStore.load(path, verify=False)
        store.check_zeta(self._zeta)
        with randomness():
            store.check(Clean(data))
        self._shared.use_store(str(store.path))

    def _load(self, data: Protected, path: str, keys: Sequence[Key] | Tensor | None) -> None:
        """Take the noise from a store that was made before."""
        store = NoiseStore.load(path)
        store.check_zeta(self._zeta)
        with randomness():
            data.positions = positions_in(store, data, keys)

    @contextmanager
    def paused(self) -> Generator[None]:
        """Clean images inside."""
        self.guarded  # noqa: B018
        self._shared.paused += 1
        try:
            yield
        finally:
            self._shared.paused -= 1

    def state_dict(self) -> dict[str, Any]:
        """What a later process needs to go on after the current epoch; tensors and plain values."""
        self.guarded  # noqa: B018
        state: dict[str, Any] = {"format": FORMAT, "settings": self._told(), "seed": self._seed, "next": self._next}
        if self._shared.path and self._given is None:
            path = Path(self._shared.path)
            files = {} if self._stays else packed(path)
            state["store"] = {"path": str(path), "identity": sha256_of(path / NAME), "files": files}
        return state

    def _told(self) -> dict[str, Any]:
        return {"zeta": self._zeta, "mu": self._mu, "random": self._random, "def_epoch": self._def_epoch,
                "settings": repr(self._settings), "kept": self._kept, "store": self._given}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called."""
        data = self.guarded.data
        if state.get("format") != FORMAT:
            raise ValueError(f"this is no state of Friends: its format is {state.get('format')!r}, not {FORMAT!r}")
        theirs = cast("Mapping[str, Any]", state["settings"])
        for name, value in self._told().items():
            if theirs.get(name) != value:
                raise ValueError(f"the state was saved with {name}={theirs.get(name)!r}, this Friends has {value!r}")
        if "store" in state:
            self._restore(data, state["store"])
        else:
            self._shared.use_store("")
        self._seed, self._next, self._trained = int(state["seed"]), int(state["next"]), False
        data.noises = replace(data.noises, seed=self._seed)

    def _restore(self, data: Protected, saved: Mapping[str, Any]) -> None:
        folder = Path(saved["path"])
        if saved["files"]:
            folder = self._place_for_noise()
            if is_used(folder) and sha256_of(folder / NAME) != saved["identity"]:
                raise ValueError(f"{folder} holds something else than the noise of this state: choose another folder")
            unpack(saved["files"], folder)
        self._use(data, str(folder), saved["identity"])
