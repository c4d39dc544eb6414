"""One trial: data, attack, defenses, model, recipe and seed, as a frozen value that a TOML file spells out."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from friends.attacks import ATTACKS
from friends.attacks.base import Attack
from friends.data.augment import Augment
from friends.defenses import DEFENSES
from friends.noise.friendly import FAST, PAPER, RELEASED, FriendlySettings
from friends.training.defense import Defense, check_composition
from friends.training.recipe import RECIPES, Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

T = TypeVar("T")
Scenario = Literal["scratch", "transfer", "finetune"]


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which images.

    Args:
        source: a name or path that ``friends.data.sources.load`` understands.
        classes: only these, in this order; all by default.
        train: number of training images, a seeded subsample balanced over the classes; all by default.
        test: number of test images, likewise.
        size: side to which images are resized, for sources of mixed sizes.
        reserve: test images set apart, by a seeded draw, as the clean images that some defenses need. They are
            neither trained on by others nor tested on, and no goal has one of them.
    """

    source: str
    classes: tuple[str, ...] = ()
    train: int | None = None
    test: int | None = None
    size: int | None = None
    reserve: int | None = None

    def __post_init__(self) -> None:
        if self.reserve is not None and self.reserve < 1:
            raise ValueError(f"a reserve has at least one image, not {self.reserve}: leave it out for none")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which network: a name of ``friends.models.MODELS`` and its width (None: as its authors have it)."""

    name: str = "resnet18"
    width: int | None = None


@dataclass(frozen=True, kw_only=True)
class TriggerSpec:
    """The trigger of a backdoor.

    Args:
        kind: ``"colours"``, the colour grid of Hidden Trigger Backdoor and Sleeper Agent; ``"checkerboard"`` or
            ``"white"``, the patches of BadNets; ``"clean-label"``, the pattern of Turner et al., of 3 pixels a side;
            ``"made"``: the attack makes its own.
        size: side of the patch in pixels.
        place: ``"random"``, anew for every image; ``"corner"``, the lower right one; ``"corners"``, all four.
    """

    kind: Literal["colours", "checkerboard", "white", "clean-label", "made"] = "colours"
    size: int = 8
    place: Literal["random", "corner", "corners"] = "random"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a trigger has a side of at least 1 pixel, not {self.size}")
        if self.kind == "clean-label" and self.size != 3:
            raise ValueError(f"the pattern of the clean-label backdoor has 3 pixels a side, not {self.size}")


@dataclass(frozen=True, kw_only=True)
class GoalSpec:
    """What the attacker wants: single test images (targets), or all images with a trigger, put in another class.

    Args:
        count: how many goals; each is an attack of its own, with its own poisons and victims.
        true_class: class of the images; by default drawn anew for each goal, as in the standard protocol.
        wanted_class: class that they are to be taken for; by default one of the others, drawn anew.
        correct: whether targets are drawn only from images that the attacker's surrogate classifies rightly.
        images: images of a goal: by default one target, or 1,000 images with a trigger (all, if there are fewer).
        trigger: for a backdoor; None for targets, which are shown as they are.
        sources: for a backdoor, whether its images are of one class, or of every class but the wanted one.
        keys: ``"standard"`` takes class pair, target and bases from the standard keys of Gradient Matching's authors,
            the first ``count`` of them; the data must be CIFAR-10 in full.
    """

    count: int = 8
    true_class: str | None = None
    wanted_class: str | None = None
    correct: bool = False
    images: int | None = None
    trigger: TriggerSpec | None = None
    sources: Literal["class", "all"] = "class"
    keys: Literal["", "standard"] = ""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"at least one goal is needed, not {self.count}")
        if self.images is not None and self.images < 1:
            raise ValueError(f"a goal needs at least one image, not {self.images}")
        if self.true_class is not None and self.true_class == self.wanted_class:
            raise ValueError(f"targets of class {self.true_class!r} are wanted as the same class")
        if self.sources == "all" and (self.trigger is None or self.true_class is not None):
            raise ValueError("sources = 'all' is for backdoors whose images may be of any class: drop true_class, and "
                             "give a trigger")  # fmt: skip
        if self.correct and self.trigger is not None:
            raise ValueError("correct = true is for targets: a backdoor is judged on images as they come, against "
                             "the control")  # fmt: skip
        if self.keys:
            self._check_keys()

    def _check_keys(self) -> None:
        own = (self.true_class, self.wanted_class, self.images, self.trigger)
        if any(value is not None for value in own) or self.correct:
            raise ValueError("the standard keys say which classes and which target: keys goes with count alone")
        if self.count > 20:
            raise ValueError(f"there are 20 standard keys, not {self.count}")


@dataclass(frozen=True, kw_only=True)
class ArmSpec:
    """One way to train on the poisons: a name and the defenses in force."""

    name: str
    defenses: tuple[Defense, ...] = ()

    def __post_init__(self) -> None:
        _check_file_name("an arm's name", self.name)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One cell of the grid: an attack on some targets, the victim trained undefended and in each defended way.

    Args:
        name: names the run's folder.
        seed: everything random follows from it.
        scenario: from scratch, on frozen features of a pretrained network, or fine-tuning all of it.
        data, model, goals, attack: what is trained, and what is done to it.
        arms: the defended ways; ``undefended`` is always there and comes first.
        recipe: how victims (and, from scratch, surrogates) are trained.
        pretraining: how the network of a transfer or fine-tuning scenario is pretrained, on clean data.
        pretraining_images: how many images for that; ``data.train`` of them, a balanced draw, are what victims train
            on. By default exactly those.
        batchnorm: in transfer, ``"running"`` keeps the frozen features fixed, ``"batch"`` lets batch statistics
            drift as in the code released with the paper.
        controls: how many models are trained on clean data, for the rate at which targets are hit with no poison.
        victims: models trained on the poisons of each goal in each way; their mean is the goal's success.
        own_surrogates: whether each target gets its own surrogate; shared ones save time but tie targets together.
        scaled_down: what makes this smaller than the experiment it stands for; empty for full size.
    """

    name: str
    seed: int = 0
    scenario: Scenario = "scratch"
    data: DataSpec
    model: ModelSpec = ModelSpec()
    goals: GoalSpec = GoalSpec()
    attack: Attack
    arms: tuple[ArmSpec, ...] = ()
    recipe: Recipe = field(default_factory=Recipe)
    pretraining: Recipe = field(default_factory=Recipe)
    pretraining_images: int | None = None
    batchnorm: Literal["running", "batch"] = "running"
    controls: int = 1
    victims: int = 1
    own_surrogates: bool = False
    scaled_down: str = ""

    def __post_init__(self) -> None:
        _check_file_name("a trial's name", self.name)
        if self.pretraining_images is not None and (self.scenario == "scratch" or self.data.train is None):
            raise ValueError("pretraining_images is for transfer and finetune, where data.train says how many of them "
                             "the victims train on")  # fmt: skip
        names = ["undefended", "clean", *(arm.name for arm in self.arms)]
        if len(set(names)) != len(names):
            raise ValueError(f"two arms have the same name: {', '.join(names)}")
        if not 0 <= self.controls <= self.goals.count:
            raise ValueError(f"controls is a number of models from 0 to one per target, not {self.controls}")
        if self.victims < 1:
            raise ValueError(f"at least one victim is trained on the poisons of a goal, not {self.victims}")
        self._check_aim()
        for arm in self.arms:
            self._check_arm(arm)

    def _check_arm(self, arm: ArmSpec) -> None:
        """Refuse defenses that are not defined for the attack, do not compose, or lack the images that they need."""
        aim = self.attack.about.aim
        for defense in arm.defenses:
            about = defense.about
            if aim not in about.aims:
                known = " and ".join(f"a {other}" for other in about.aims)
                raise ValueError(f"arm {arm.name!r}: {about.title} is defined for {known}, not for a {aim} "
                                 f"such as {self.attack.about.title}'s: its result would be n/a")  # fmt: skip
            if about.clean and self.data.reserve is None:
                raise ValueError(f"arm {arm.name!r}: {about.title} needs clean images: set reserve in [data], the "
                                 "number of test images to set apart")  # fmt: skip
        try:
            check_composition(arm.defenses)
        except ValueError as error:
            raise ValueError(f"arm {arm.name!r}: {error}") from None

    def _check_aim(self) -> None:
        """Refuse goals of another kind than the attack's."""
        about, trigger = self.attack.about, self.goals.trigger
        if about.aim == "target" and trigger is not None:
            raise ValueError(f"{about.title} attacks single images: drop the trigger of [goals]")
        if about.aim == "backdoor" and trigger is None:
            kind = "made" if about.makes_trigger else "colours"
            raise ValueError(f'{about.title} is a backdoor: give [goals] a trigger = {{ kind = "{kind}" }}')
        if trigger is not None and about.makes_trigger != (trigger.kind == "made"):
            theirs = (
                "makes its own trigger: kind is 'made'" if about.makes_trigger else "needs a trigger of another kind"
            )
            raise ValueError(f"{about.title} {theirs}, not {trigger.kind!r}")

    def settings(self) -> dict[str, Any]:
        """Everything but the name, as plain JSON values, for records and hashes."""
        plain = cast("dict[str, Any]", plain_value(self))
        del plain["name"]
        return plain

    def key(self) -> str:
        """A hash of all settings. What is read from elsewhere, data and stores, is in it by path alone."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:16]


def _check_file_name(what: str, name: str) -> None:
    """Raise ``ValueError`` unless ``name`` is a plain file name: it becomes part of a path."""
    if not name or name.startswith(".") or any(not (c.isalnum() or c in "-_.+ ") for c in name):
        raise ValueError(f"{what} names files: letters, digits, '-', '_', '+' and '.', not {name!r}")


def plain_value(value: object) -> object:
    """A setting as plain JSON: frozen dataclasses become objects that carry their class's name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return fields if isinstance(value, Trial) else {"is": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [plain_value(item) for item in cast("tuple[object, ...]", value)]
    return value


def read_table(path: Path) -> dict[str, Any]:
    """The plain values of a TOML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no trial file {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def read_trial(path: Path) -> Trial:
    """The trial that a TOML file describes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML, or a name or value in it is wrong; says which, and what was meant perhaps.
    """
    table = read_table(path)
    try:
        return parse_trial(table, default_name=path.stem)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def parse_trial(table: Mapping[str, Any], default_name: str = "trial") -> Trial:
    """The trial that nested plain values describe; see ``docs/trials.md`` for the names."""
    top = dict(table)
    scenario = top.get("scenario", "scratch")
    if scenario not in RECIPES:
        raise ValueError(_unknown("scenario", str(scenario), RECIPES))
    settings: dict[str, Any] = {"name": default_name}
    if "data" not in top:
        raise ValueError('a trial needs [data] with source = "..."')
    if "attack" not in top:
        raise ValueError('a trial needs [attack] with name = "..."')
    settings["attack"] = _named("attack", ATTACKS, top.pop("attack"))
    settings["arms"] = tuple(_arm(arm) for arm in top.pop("arms", []))
    settings["recipe"] = _recipe(RECIPES[scenario], top.pop("recipe", {}), "recipe")
    settings["pretraining"] = _recipe(RECIPES["scratch"], top.pop("pretraining", {}), "pretraining")
    return construct(Trial, {**settings, **top}, "trial")


def _arm(table: Mapping[str, Any]) -> ArmSpec:
    rest = dict(table)
    name = rest.pop("name", None)
    if not isinstance(name, str):
        raise ValueError('every [[arms]] needs a name, e.g. name = "friends-b"')
    defenses = rest.pop("defenses", None)
    if defenses is None:
        raise ValueError(f"arm {name!r} needs [[arms.defenses]]; undefended is always there by itself")
    if rest:
        raise ValueError(f"unknown setting {next(iter(rest))!r} of arm {name!r}")
    return ArmSpec(name=name, defenses=tuple(_named("defense", DEFENSES, d) for d in defenses))


def _recipe(base: Recipe, table: Mapping[str, Any], where: str) -> Recipe:
    changed = dict(table)
    if changed.get("augment") is True:
        changed["augment"] = {}
    given = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    return construct(Recipe, {**given, **changed}, where)


def _named(kind: str, known: Mapping[str, type[T]], table: Mapping[str, Any]) -> T:
    rest = dict(table)
    name = rest.pop("name", None)
    if name not in known:
        raise ValueError(_unknown(kind, str(name), known))
    return construct(known[name], rest, f"{kind} {name}")


def _unknown(kind: str, name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"unknown {kind} {name!r}, " + (
        f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
    )


def construct(cls: type[T], settings: Mapping[str, Any], where: str) -> T:
    """Make a settings dataclass from plain values, each checked and converted to its field's type.

    Fractions may be written as they are printed: ``"16/255"``. ``false`` stands for None where None is allowed.

    Raises:
        ValueError: an unknown setting (with the nearest known one), a missing one, or a value of another type.
    """
    hints = get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cast(Any, cls)) if f.init}
    for name in settings:
        if name not in known:
            raise ValueError(_unknown(f"setting of {where}", name, known))
    values = {name: _convert(known[name], value, f"{where}: {name}") for name, value in settings.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {str(error).replace(cls.__name__ + '.__init__() ', '')}") from error


_FRIENDLY: dict[str, FriendlySettings] = {"paper": PAPER, "released": RELEASED, "fast": FAST}


def _convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint``."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None or (value is False and bool not in args):
            return None
        inner = [a for a in args if a is not type(None)]
        return _convert(inner[0], value, where) if len(inner) == 1 else value
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} is one of {', '.join(map(str, args))}, not {value!r}")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(args[0], item, where) for item in cast("list[Any]", value))
    if hint is FriendlySettings and isinstance(value, str):
        return _friendly(value, where)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        table = dict(cast("Mapping[str, Any]", value))
        base = _friendly(str(table.pop("base", "released")), where) if hint is FriendlySettings else None
        start = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)} if base else {}
        return construct(cast(type, hint), {**start, **table}, where)
    return _scalar(hint, value, where)


def _friendly(name: str, where: str) -> FriendlySettings:
    if name not in _FRIENDLY:
        raise ValueError(f"{where}: {_unknown('setting', name, _FRIENDLY)}")
    return _FRIENDLY[name]


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str):
        try:
            return float(Fraction(value))
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f'{where} is a number such as 0.1 or "16/255", not {value!r}') from error
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str, bool) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ValueError(f"{where} is {'an' if hint is int else 'a'} {hint.__name__}, not {value!r}")
    if hint is float:
        raise ValueError(f"{where} is a number, not {value!r}")
    return value


__all__ = [
    "ArmSpec",
    "Augment",
    "DataSpec",
    "GoalSpec",
    "ModelSpec",
    "Trial",
    "TriggerSpec",
    "parse_trial",
    "read_trial",
]
