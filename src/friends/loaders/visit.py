"""One reading of one row: how noise finds its way into a pipeline that knows nothing of rows.

While a protected data set reads a row, a :class:`Visit` is the value of a context variable. The data set's own
transforms were replaced by a :class:`Stage` each, which hands the image to the visit at the step that was chosen, and
does what it always did when there is no visit: for other users of the same data set nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from friends.loaders.images import raw_image, with_raw_image

Transform = Callable[..., Any]

HERE = "here"
"""The name of every :class:`NoiseHere`."""

MAKES_TENSORS = frozenset(("ToTensor", "PILToTensor", "to_tensor", "pil_to_tensor"))
"""Steps that make a tensor of an image and that refuse what is one already."""

_now: ContextVar[Visit | None] = ContextVar("friends visit", default=None)


@dataclass(frozen=True)
class Cut:
    """Where in one transform the noise comes.

    Args:
        at: after how many of its steps; None if an earlier transform has added it.
        floats: the image is a float tensor from there on, so steps that make tensors are passed over.
    """

    at: int | None
    floats: bool


@dataclass
class Visit:
    """What happens to the image of a row while it is read.

    Args:
        cuts: where, by the names of the stages; where there is none a stage does what it always did.
        change: called with the image and :attr:`Cut.floats`; returns what goes on.
        first: done to the image as it enters the stage with the noise.
        image: the field of the image where a transform takes a whole batch of columns.
        uses: how often ``change`` was called.
        trace: the names of all stages that were passed, in order.
        step: what ran last, for messages.
    """

    cuts: Mapping[str, Cut]
    change: Callable[[object, bool], object]
    first: Callable[[object], object] | None = None
    image: str | None = None
    uses: int = 0
    trace: list[str] = field(default_factory=list[str])
    step: str = ""

    @contextmanager
    def here(self) -> Generator[None]:
        """Everything that is read inside is read on this visit."""
        before = _now.set(self)
        try:
            yield
        finally:
            _now.reset(before)

    def use(self, image: object, floats: bool) -> object:
        """The image is at its place."""
        self.uses += 1
        self.step = "the noise"
        return self.change(image, floats)

    def run(self, stage: Stage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """A stage with the noise in its place."""
        self.trace.append(stage.name)
        cut = self.cuts.get(stage.name)
        if cut is None:
            return stage.original(*args, **kwargs)
        if stage.batched:
            return stage.original(self._columns(args[0], cut), *args[1:], **kwargs)
        if kwargs or len(args) != 1:
            return self._opaque(stage, args, kwargs, cut)
        image = args[0]
        if self.first is not None and cut.at is not None:
            image = self.first(image)
        steps = stage.steps if cut.at or cut.floats else [stage.original]
        for number, step in enumerate(steps):
            if number == cut.at:
                image = self.use(image, cut.floats)
            image = self._stepped(step, image, cut, number)
        return self.use(image, cut.floats) if cut.at == len(steps) else image

    def _stepped(self, step: Transform, image: object, cut: Cut, number: int) -> object:
        self.step = name_of(step)
        added = cut.at is None or number >= cut.at
        floats = isinstance(image, Tensor) and image.is_floating_point()
        return image if cut.floats and added and floats and self.step in MAKES_TENSORS else step(image)

    def _opaque(self, stage: Stage, args: tuple[Any, ...], kwargs: dict[str, Any], cut: Cut) -> object:
        """A transform that takes more than an image: the first argument, or the one named image, is the image."""
        if cut.at is None:
            return stage.original(*args, **kwargs)
        image = args[0] if args else kwargs["image"]
        image = self.use(image if self.first is None else self.first(image), cut.floats)
        self.step = name_of(stage.original)
        return stage.original(image, *args[1:], **kwargs) if args else stage.original(**{**kwargs, "image": image})

    def _columns(self, columns: object, cut: Cut) -> object:
        """A batch of columns, as Hugging Face hands to a transform, of this one row."""
        images = cast("Sequence[object]", raw_image(columns, self.image))
        if self.first is not None:
            images = [self.first(image) for image in images]
        changed = [self.use(image, cut.floats) for image in images]
        self.step = "the transform"
        return with_raw_image(columns, self.image, changed)


class Stage:
    """A data set's transform, with an opening for the noise; everything else is the transform's own.

    Args:
        original: the transform.
        name: unique in its data set.
        batched: it takes a dict of columns.
    """

    def __init__(self, original: Transform, name: str, *, batched: bool = False) -> None:
        self.original, self.name, self.batched = original, name, batched

    @property
    def steps(self) -> list[Transform]:
        """The steps of a pipeline; of what cannot be looked into, itself."""
        return [self.original] if self.batched else steps_of(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the transform does; on a visit, with the noise in its place."""
        visit = _now.get()
        return self.original(*args, **kwargs) if visit is None else visit.run(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "original" or name.startswith("__"):  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.original, name)

    def __repr__(self) -> str:
        return repr(self.original)


class NoiseHere:
    """A step of your own pipeline that marks where the noise belongs: before anything random, while pixels are pixels.

    It returns its image unchanged unless a protected loader is reading it. An image of bytes (PIL, uint8) stays one, so
    random noise is clipped at black and white there; behind ``ToTensor()`` it is not::

        transform = Compose([ToTensor(), friends.NoiseHere(), RandomCrop(32, 4), RandomHorizontalFlip(), Normalize(...)])
    """  # noqa: E501

    def __call__(self, image: Any) -> Any:
        """The image, noisy if a protected loader reads it."""
        visit = _now.get()
        if visit is None:
            return image
        visit.trace.append(HERE)
        if HERE not in visit.cuts:
            return image
        return visit.use(image if visit.first is None else visit.first(image), False)

    def __repr__(self) -> str:
        return "NoiseHere()"


def steps_of(transform: Transform) -> list[Transform]:
    """The steps of a pipeline, those of pipelines in it too: ``Compose`` of any library, or ``nn.Sequential``.

    Choices (``RandomApply``, ``RandomOrder``) are one step.
    """
    if type(transform).__name__ == "Compose":
        inner: object = getattr(transform, "transforms", None)
    else:
        inner = list(cast(Any, transform)) if type(transform).__name__ == "Sequential" else None
    if not isinstance(inner, list | tuple) or not inner:
        return [transform]
    return [step for part in cast("Sequence[Transform]", inner) for step in steps_of(part)]


def name_of(step: object) -> str:
    """What to call a step in a message."""
    return str(getattr(step, "__name__", type(step).__name__))
