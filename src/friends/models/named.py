"""A network by its name: one of ours, one of torchvision's or timm's, or what a function of the user's own returns.

Names come from the command line and from files. A name of ours, of torchvision or of timm can only choose from their
lists, and no weights are downloaded. An import path runs the module that it names, so files are not believed it: see
:func:`is_import_path`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from friends.models.classifier import Normalize, drawing_from

LIBRARIES = ("torchvision", "timm")
SHOWN = "resnet18, alexnet, lenet, convnet, tiny; torchvision:NAME; timm:NAME; package.module:function"
"""The kinds of names, for messages."""

Moments = tuple[tuple[float, ...], tuple[float, ...]]


class Wrapped(nn.Module):
    """``network(normalize(x))``: somebody else's network as one that takes pixels in [0, 1].

    Args:
        network: takes normalised images ``(b, channels, h, w)`` and returns logits, or an object with ``.logits``.
        moments: per-channel mean and standard deviation of the training pixels in [0, 1].
        channels: how many the network takes; grey images are repeated where it takes more.
    """

    def __init__(self, network: nn.Module, *, moments: Moments, channels: int) -> None:
        super().__init__()
        self.normalize = Normalize(*moments)
        self.network = network
        self.channels = channels

    def forward(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        """Logits of pixels in [0, 1]."""
        out = self.network(self.normalize(x).expand(-1, self.channels, -1, -1))
        return getattr(out, "logits", out)


def is_import_path(name: str) -> bool:
    """Whether a name stands for code of the user's own, which runs when it is used."""
    return ":" in name and name.partition(":")[0] not in LIBRARIES


def check_name(name: str, width: int | None = None) -> None:
    """Raise if :func:`network` could not make anything of a name; what it stands for is imported.

    Raises:
        ValueError: the name is unknown (the nearest known one is named), or a width is given for a network of others.
        ModuleNotFoundError: the package or module that it needs is not here.
    """
    if width is not None and ":" in name:
        raise ValueError(f"width is for networks of ours, not for {name!r}: leave it out")
    library, _, rest = name.partition(":")
    if is_import_path(name):
        _function(name)
    elif library in LIBRARIES:
        _check_known(rest, _known(library), f"{library} model")
    else:
        from friends.models import MODELS  # the table of names is built from this package's files

        _check_known(name, list(MODELS), "model")


def network(
    name: str,
    *,
    shape: tuple[int, int, int],
    classes: int,
    moments: Moments,
    generator: torch.Generator,
    width: int | None = None,
) -> nn.Module:
    """A new network with random weights, on the CPU, in training mode, that takes pixels in [0, 1].

    Args:
        name: a key of ``MODELS``; ``torchvision:NAME`` or ``timm:NAME``, of their classifiers; or
            ``package.module:function``, a function that is called with ``num_classes=`` and returns a module that
            takes normalised images of as many channels as the data have.
        shape, classes, moments, generator, width: as ``friends.models.build`` takes them.

    Raises:
        ValueError: as :func:`check_name`, or the function fails or returns no module.
        ModuleNotFoundError: as :func:`check_name`.
    """
    check_name(name, width)
    if ":" not in name:
        from friends.models import build

        return build(name, shape=shape, classes=classes, moments=moments, generator=generator, width=width)
    library, _, rest = name.partition(":")
    with drawing_from(generator):
        if library == "torchvision":
            made = _module(library).models.get_model(rest, weights=None, num_classes=classes)
        elif library == "timm":
            made = _module(library).create_model(rest, pretrained=False, num_classes=classes)
        else:
            made = _called(name, classes)
    return Wrapped(made, moments=moments, channels=3 if library in LIBRARIES else shape[0])


def _check_known(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"unknown {what} {name!r}; {f'did you mean {near[0]!r}?' if near else f'there are: {SHOWN}'}")


def _known(library: str) -> list[str]:
    """The names of a library's image classifiers."""
    module = _module(library)
    return list(module.models.list_models(module=module.models) if library == "torchvision" else module.list_models())


def _module(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"models {library}:NAME need the package {error.name}, which is not installed: pip install {error.name}"
        ) from error


def _function(path: str) -> Callable[..., object]:
    """The function that an import path names; its module is imported, from here or from the environment."""
    where, _, name = path.partition(":")
    if not all(part.isidentifier() for part in [*where.split("."), name]):
        raise ValueError(f"model {path!r} is no import path such as package.module:function; there are: {SHOWN}")
    try:
        with _here_importable():
            module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if where == missing or where.startswith(f"{missing}."):
            raise ModuleNotFoundError(
                f"model {path!r}: no module {missing!r} in {os.getcwd()} or in the environment"
            ) from error
        raise ModuleNotFoundError(f"model {path!r}: {where} needs the package {missing!r}") from error
    except Exception as error:  # a user's module may fail in any way
        raise ValueError(f"model {path!r}: importing {where} failed: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        near = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"model {path!r}: {where} has no function {name!r}{hint}")
    return found


def _called(path: str, classes: int) -> nn.Module:
    try:
        with _here_importable():
            made = _function(path)(num_classes=classes)
    except Exception as error:  # a user's function may fail in any way
        raise ValueError(
            f"model {path!r}: called with num_classes={classes} it fails: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"model {path!r} returns {type(made).__name__}, not a torch.nn.Module")
    return made


@contextlib.contextmanager
def _here_importable() -> Generator[None, None, None]:
    """Let modules of the current folder be imported; last, so that they stand in for nothing that is installed."""
    here = os.getcwd()
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)
