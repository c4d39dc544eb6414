"""FRIENDS: friendly noise, made once and early, plus random noise, redrawn at every step.

Tian Yu Liu, Yu Yang, Baharan Mirzasoleiman: *Friendly Noise against Adversarial Noise: A Powerful Defense against
Data Poisoning Attacks*, NeurIPS 2022, arXiv 2208.10224. Algorithm 2, in our symbols::

    epochs before def_epoch:   train on x + m              m ~ random noise of strength mu, new at every step
    at def_epoch:              e_i = friendly noise of x_i under the current model (Algorithm 1), for every i, once
    from def_epoch on:         train on clip(x_i + e_i, 0, 1) + m

Departures: friendly noise is rounded to whole grey levels, which leaves its KL divergence unchanged and makes image
plus noise a byte image. Like the released code, random noise is on from the first epoch and is not clamped.

``fit`` calls the hooks. In a loop of one's own, :meth:`Friends.protect` and :meth:`Friends.epochs` do the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor, nn

from friends.data.images import LabeledImages
from friends.digest import digest
from friends.modules import weights_hash
from friends.noise.friendly import RELEASED, FriendlySettings
from friends.noise.grey import grey_limit
from friends.noise.philox import corners
from friends.noise.random import RandomNoise, add_noise, check_random, check_strength
from friends.noise.rows import Key
from friends.noise.store import NoiseStore, grey_noise
from friends.training.defense import About, Defense, Run
from friends.types import Progress, silent

Held = Literal["own", "shuffled", "random"]
Kept = Literal["int8", "bits"]


@dataclass(frozen=True, kw_only=True)
class Friends(Defense):
    """The Friendly Noise Defense.

    Args:
        zeta: bound of the friendly noise in [0, 1] pixel units; 0 leaves only the random noise.
        mu: strength of the random noise; 0 leaves only the friendly noise.
        random: ``"bernoulli"`` (FRIENDS-B), ``"uniform"`` (FRIENDS-U) or ``"gaussian"`` (FRIENDS-G).
        def_epoch: the epoch (from 0) at whose start friendly noise is made: 5 from scratch, 0 in transfer learning.
        settings: how friendly noise is optimised; its ``zeta`` is replaced by this one's.
        store: take the friendly noise from this store, made with any proxy model, instead of generating it. It
            must have been made for exactly the data that is trained on.
        proxy: make the friendly noise with another architecture, by its name, that is trained for it on the same data
            (Table 6 of the paper); ``fit`` must be told how to make one (``architectures``).
        proxy_epochs: how long that one is trained; the paper has 5.
        proxy_lr: its learning rate; None is the recipe's, which AlexNet and LeNet hardly bear.
        held: which noise is held fixed: ``"own"``, that of the image itself; or, as controls that tell what being
            friendly is worth, ``"shuffled"``, that of another image, or ``"random"``, +-zeta that nobody optimised.
        kept: ``"int8"``, or ``"bits"``: the sign of each value, times the mean size of the image's noise.

    Raises:
        ValueError: a strength outside [0, 1], an unknown distribution, a negative ``def_epoch``, both a store and a
            proxy; at the start of training, a store that does not fit the data, or a ``def_epoch`` that is never
            reached.
    """

    zeta: float = 16 / 255
    mu: float = 16 / 255
    random: RandomNoise = "bernoulli"
    def_epoch: int = 5
    settings: FriendlySettings = RELEASED
    store: str | None = None
    proxy: str | None = None
    proxy_epochs: int = 5
    proxy_lr: float | None = None
    held: Held = "own"
    kept: Kept = "int8"

    about: ClassVar[About] = About(
        title="FRIENDS",
        paper="Liu, Yang, Mirzasoleiman: Friendly Noise against Adversarial Noise, NeurIPS 2022, arXiv 2208.10224",
    )

    def __post_init__(self) -> None:
        check_random(self.random, self.mu)
        check_strength("zeta", self.zeta)
        if self.zeta > 127 / 255:
            raise ValueError(f"zeta is at most 127/255, not {self.zeta * 255:g}/255")
        if self.def_epoch < 0:
            raise ValueError(f"def_epoch is counted from 0, not {self.def_epoch}")
        if self.store is not None and self.proxy is not None:
            raise ValueError(f"friendly noise comes from a store or from a proxy, not from {self.store!r} and "
                             f"{self.proxy!r}")  # fmt: skip
        for name, value, known in (("held", self.held, get_args(Held)), ("kept", self.kept, get_args(Kept))):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
        if self.proxy_epochs < 1 or (self.proxy_lr is not None and not 0 < self.proxy_lr < float("inf")):
            raise ValueError(f"proxy_epochs >= 1 and proxy_lr > 0 expected, not {self.proxy_epochs}, {self.proxy_lr}")

    def before_training(self, data: LabeledImages, run: Run) -> None:
        """Refuse what could not work before any time is spent."""
        if run.epochs > 0:
            self.refuse_length(run.epochs)
        if self.zeta > 0 and self.store is not None:
            self._load(data)

    def refuse_length(self, epochs: int) -> None:
        """Raise ``ValueError`` if friendly noise is wanted, but a training of so many epochs never makes it."""
        if self.zeta > 0 and self.def_epoch >= epochs:
            raise ValueError(
                f"friendly noise would be made at epoch {self.def_epoch}, but training ends after {epochs}: "
                "lower def_epoch"
            )

    def _load(self, data: LabeledImages) -> NoiseStore:
        """The store, after making sure that it is of these images and this bound."""
        store = NoiseStore.load(str(self.store))
        store.check_zeta(self.zeta)
        store.check(data)
        return store

    def start_epoch(self, run: Run) -> None:
        """Make the friendly noise of the whole data set, or load it, once."""
        kept = run.memory(self)
        if self.zeta == 0 or run.epoch < self.def_epoch or "friendly" in kept:
            return
        noise = self._made(run)
        if self.kept == "bits":
            noise = one_bit(noise)
        if self.held == "shuffled":
            noise = noise[torch.randperm(len(noise), generator=run.streams("shuffled")).to(noise.device)]
        kept["friendly"] = noise

    def _made(self, run: Run) -> Int8[Tensor, "n c h w"]:
        """The noise of every image in grey levels, on the device of the data."""
        if self.held == "random":
            rows, level = torch.arange(len(run.data)), grey_limit(self.zeta)
            return corners(rows, run.data.shape, level, run.streams.integer("friendly")).to(run.device)
        if self.store is not None:
            return self._load(run.data).tensor(run.device)
        clock = time.perf_counter()
        model = self._maker(run)
        settings, seed = replace(self.settings, zeta=self.zeta), run.streams.integer("friendly")
        identity = {
            "data": run.data.fingerprint,
            "model": type(model).__name__ + weights_hash(model),
            "settings": repr(settings),
            "seed": seed,
            "code": digest("friends.noise.grey"),
        }

        def make() -> dict[str, Tensor]:
            rows = torch.arange(len(run.data))
            return {"friendly": grey_noise(model, run.data.x, rows, settings, seed=seed, progress=run.progress)}

        noise = run.once("noise", identity, make)["friendly"]
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        run.remarks["friendly noise seconds"] = time.perf_counter() - clock
        return noise

    def _maker(self, run: Run) -> nn.Module:
        """The model whose output friendly noise does not change."""
        if self.proxy is None:
            return run.model
        return run.probe(name="proxy", architecture=self.proxy, epochs=self.proxy_epochs, lr=self.proxy_lr)

    def pixels(self, x: Float[Tensor, "b c h w"], idx: Int64[Tensor, " b"], run: Run) -> Float[Tensor, "b c h w"]:
        """Add both noises to a batch."""
        if self.mu == 0 and self.zeta == 0:
            return x
        kept = run.memory(self)
        friendly = kept["friendly"][idx] if "friendly" in kept else None
        generator = run.generator(self, "random", run.epoch, run.step)
        return add_noise(x, friendly, random=self.random, mu=self.mu, generator=generator)

    # a loop of one's own; what changes while it runs is in friends.loaders, found by this very object

    def protect(
        self,
        loader: Any,
        *,
        normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
        canonical_size: int | None = None,
        image: str | None = None,
        folder: str | Path | None = None,
        seed: int = 0,
        keys: Sequence[Key] | Tensor | None = None,
    ) -> Any:
        """The same loader, with both noises on its images: same class, samplers, workers and kind of batches.

        Noise is added where images still are those that are stored, before anything random, padding or normalisation;
        the place is found by trying, and that nothing else changes is tried too. The transforms inside the data set
        are opened there; whoever else reads the data set finds everything as it was. Call it last, when nothing about
        the loader will change any more, and in distributed training in every rank.

        Args:
            loader: a ``DataLoader`` over any map-style data set, or timm's prefetcher around one.
            normalize: mean and standard deviation of each channel, if what the loop hands to the model is normalised
                in a way that the loader's transforms do not show.
            canonical_size: bring images of any size to squares of this one, before everything else.
            image: the field of items that holds the image, if it is called neither image nor img.
            folder: where the friendly noise is made, a byte a value, empty or not there yet. By default a temporary
                one; the noise is then a part of ``state_dict()``.
            seed: of both noises.
            keys: with ``store``, the key of each row of the data set in it.

        Raises:
            TypeError: there is no ``DataLoader``, or its data set has no rows.
            ValueError: no place for the noise was found, each reason with its way out (see :func:`friends.check`);
                the loader is protected already; the ``store`` is of other images.
        """
        from friends.loaders import Options, session_of

        options = Options(normalize=normalize, canonical_size=canonical_size, image=image)
        return session_of(self).protect(loader, options, folder=folder, seed=seed, keys=keys)

    def epochs(self, model: nn.Module, n: int, *, progress: Progress = silent) -> Iterator[int]:
        """The epochs 0 to n-1, or those that are left after ``load_state_dict``.

        At ``def_epoch`` the friendly noise of all images is made with the model as it is then. Only in between may a
        protected loader be iterated.

        Args:
            model: takes what the loader emits, and returns logits. Data parallelism is looked through.
            n: how many epochs there are in all.
            progress: told how far the friendly noise is.

        Raises:
            RuntimeError: no loader is protected.
            ValueError: at once, if ``def_epoch`` is never reached, the model does not take the images, or the folder
                is in use.
        """
        from friends.loaders import session_of

        return session_of(self).epochs(model, n, progress)

    def paused(self) -> AbstractContextManager[None]:
        """Inside, the protected loader gives clean images. Begin and end it between passes over the loader."""
        from friends.loaders import session_of

        return session_of(self).paused()

    def state_dict(self) -> dict[str, Any]:
        """The state after the current epoch, for a checkpoint: plain values, and the noise unless a folder was given.

        ``torch.load(..., weights_only=True)`` reads it.
        """
        from friends.loaders import session_of

        return session_of(self).state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the epoch in which ``state_dict`` was called; ``protect`` comes first.

        Raises:
            ValueError: the state is of other settings, or of other images.
        """
        from friends.loaders import session_of

        session_of(self).load_state_dict(state)


def one_bit(noise: Int8[Tensor, "n c h w"]) -> Int8[Tensor, "n c h w"]:
    """Noise of which only signs and the mean size of each image's are kept, as in a store of one bit a value."""
    level = noise.abs().float().mean((1, 2, 3), keepdim=True).round().to(torch.int8)
    return torch.where(noise > 0, level, -level)
