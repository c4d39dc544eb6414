"""What a run leaves behind: one Report of plain values, written as JSON, from which every page and table is made.

A report is checked where it is made and again where it is read, so that a page never shows half a result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from friends.bench.exhibit import Exhibit as Exhibit
from friends.bench.provenance import commit as commit
from friends.bench.provenance import device_name as device_name
from friends.bench.provenance import versions as versions
from friends.bench.statistics import clopper_pearson as clopper_pearson
from friends.bench.statistics import mcnemar_exact as mcnemar_exact
from friends.bench.statistics import wilson as wilson
from friends.data.files import write_json

FORMAT = "friends-report-1"
Scenario = Literal["scratch", "transfer", "finetune"]
UNDEFENDED, CLEAN = "undefended", "clean"
"""The names of the two arms that others are compared with: poisoned without a defense, and the control."""


@dataclass(frozen=True)
class Arm:
    """One way to train (a defense, several, none, or the control), and how the attack fared against it.

    Args:
        name: ``"undefended"``, ``"friends-b"``, ``"noise-only-b"``, ...; ``"clean"`` is the control, which was
            trained on the data before the attack and judged on the same goals.
        defenses: the reprs of the defenses, settings and all.
        successes: how many of the ``n`` target images are classified as the attacker wants.
        n: target images judged: one per goal for a targeted attack, all triggered images for a backdoor.
        accuracy: mean clean test accuracy of the arm's models, in [0, 1]; an abstention is wrong.
        accuracies: the clean accuracy of each model, of which there may be fewer than goals.
        seconds: training time of all models of the arm together.
        confidence: per goal, the final softmax probability of the wanted class (its mean over a backdoor's images).
        succeeded: per goal, whether the attack succeeded (with several images or victims: on more than half).
        selective: clean accuracy of each model among the images that it answered; empty where none abstains.
        refused: per goal, the share of its images, over all its victims, that the pipeline refused to answer; such an
            image is no success of the attack. Empty where none abstains.
        removed: for each model, the training rows that the defenses judged to be poison; empty where none was.
        caught: for each model, how many of these rows are poison.
        shared: seconds of ``seconds`` that were not spent again, since a probe had been trained for another arm.
        told: what the defenses are told about the attack, and whether they see clean images; empty for nothing.
        rates: per goal, the share of its images, over all its victims, that the attack won; empty where every goal has
            one image and one victim, since ``succeeded`` says it.
        history: per goal, one mapping per epoch with any of ``epoch``, ``loss``, ``lr``, ``seconds``, ``accuracy``,
            ``confidence``; empty if nothing was recorded.
        abstained: clean test images that the pipeline refused to answer, over all models.
        notes: anything that a reader must know about this arm.

    Raises:
        ValueError: the numbers contradict each other, are out of range or not finite.
    """

    name: str
    defenses: tuple[str, ...]
    successes: int
    n: int
    accuracy: float
    accuracies: tuple[float, ...]
    seconds: float
    confidence: tuple[float, ...]
    succeeded: tuple[bool, ...]
    history: tuple[tuple[dict[str, float], ...], ...] = ()
    abstained: int = 0
    notes: str = ""
    rates: tuple[float, ...] = ()
    selective: tuple[float, ...] = ()
    refused: tuple[float, ...] = ()
    removed: tuple[int, ...] = ()
    caught: tuple[int, ...] = ()
    shared: float = 0.0
    told: str = ""

    def __post_init__(self) -> None:
        goals = len(self.succeeded)
        if not self.name or goals == 0:
            raise ValueError(f"arm {self.name!r} needs a name and at least one goal, it has {goals}")
        if self.n < goals or not 0 <= self.successes <= self.n:
            self._fail(f"{self.successes} successes of {self.n} images on {goals} goals")
        if self.n == goals and self.successes != sum(self.succeeded):
            self._fail(f"{self.successes} successes, but {sum(self.succeeded)} goals succeeded")
        if not self.rates and self.n > goals:
            self._fail(f"{self.n} images on {goals} goals, but no rates: which goals they belong to is unknown")
        if not self.rates:
            object.__setattr__(self, "rates", tuple(float(hit) for hit in self.succeeded))
        if [rate > 0.5 for rate in self.rates] != list(self.succeeded):
            self._fail(f"rates {self.rates} are not those of {goals} goals of which {sum(self.succeeded)} succeeded")
        if len(self.confidence) != goals:
            self._fail(f"{len(self.confidence)} confidences for {goals} goals")
        if len(self.history) > goals:
            self._fail(f"{len(self.history)} histories for {goals} goals")
        for what, values in (("accuracies", self.accuracies), ("confidence", self.confidence), ("rates", self.rates)):
            if not all(0 <= value <= 1 for value in values):  # also false for NaN
                self._fail(f"{what} must be in [0, 1], not {values}")
        if not self.accuracies or abs(self.accuracy - math.fsum(self.accuracies) / len(self.accuracies)) > 1e-6:
            self._fail(f"accuracy {self.accuracy} is not the mean of {self.accuracies}")
        if not 0 <= self.seconds < math.inf or self.abstained < 0:
            self._fail(f"seconds {self.seconds} and abstained {self.abstained} must be finite and not negative")
        values = (value for epochs in self.history for epoch in epochs for value in epoch.values())
        if not all(math.isfinite(value) for value in values):
            self._fail("its history holds a number that is not finite")
        self._check_defended()

    def _check_defended(self) -> None:
        """Refuse numbers of abstentions and removals that contradict the others."""
        models, goals = len(self.accuracies), len(self.succeeded)
        for what, values, wanted in (
            ("selective accuracies", self.selective, models),
            ("refusals", self.refused, goals),
            ("removals", self.removed, models),
            ("caught poisons", self.caught, len(self.removed)),
        ):
            if len(values) not in (0, wanted):
                self._fail(f"{len(values)} {what} for {models} models and {goals} goals")
        if not all(0 <= value <= 1 for value in (*self.selective, *self.refused)):
            self._fail(f"selective and refused must be in [0, 1], not {self.selective} and {self.refused}")
        if any(not 0 <= c <= r for c, r in zip(self.caught, self.removed, strict=False)):
            self._fail(f"caught {self.caught} of {self.removed} removed rows")
        if not 0 <= self.shared <= self.seconds + 1e-6:
            self._fail(f"{self.shared} shared seconds of {self.seconds}")

    def _fail(self, what: str) -> None:
        raise ValueError(f"arm {self.name!r}: {what}")

    @property
    def rate(self) -> float:
        """The share of target images that the attack won, every goal counting the same."""
        return math.fsum(self.rates) / len(self.rates)

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson 95 % interval of :attr:`rate`, from as many trials as there are goals.

        Images and victims of one goal are not independent, so goals are what is counted.
        """
        return wilson(math.fsum(self.rates), len(self.rates))

    @property
    def seconds_per_model(self) -> float:
        """Training time of one model: what arms with different numbers of models are compared by."""
        return self.seconds / len(self.accuracies)

    def to_json(self) -> dict[str, object]:
        """Plain values that :meth:`from_json` takes back."""
        return _fields_of(self)

    @classmethod
    def from_json(cls, value: object, where: str = "arm") -> Arm:
        """The arm that :meth:`to_json` wrote. Raises ``ValueError`` naming the field that is wrong."""
        return _build(cls, value, where)


@dataclass(frozen=True)
class Report:
    """One run: what was done, with what, and what came out.

    Args:
        name: what the page is called.
        key: the hash of the trial; equal keys are the same experiment.
        trial: all settings of the trial, as plain values.
        seed: the seed that everything random follows from.
        scenario: ``"scratch"``, ``"transfer"`` or ``"finetune"``.
        scaled_down: how and why the run is smaller than the published setting; empty if it is not.
        data: ``name``, ``train`` and ``test`` counts, ``shape``, ``classes``, ``fingerprint``.
        model: ``name``, ``parameters``.
        attack: ``name``, ``settings``, ``xi``, ``budget``, ``poisons``.
        goals: per goal ``name``, ``y_true``, ``y_wanted`` (class names or ids).
        arms: what is compared, all on the same goals.
        versions: see :func:`friends.bench.provenance.versions`.
        commit: see :func:`friends.bench.provenance.commit`; may be empty.
        device: see :func:`friends.bench.provenance.device_name`.
        threads: CPU threads used.
        started: when, in ISO 8601, UTC.
        seconds: wall time by stage.

    Raises:
        ValueError: a part is missing, arms do not share the goals, or a value is no JSON.
    """

    name: str
    key: str
    trial: dict[str, object]
    seed: int
    scenario: str
    scaled_down: str
    data: dict[str, object]
    model: dict[str, object]
    attack: dict[str, object]
    goals: tuple[dict[str, object], ...]
    arms: tuple[Arm, ...]
    versions: dict[str, str]
    commit: str
    device: str
    threads: int
    started: str
    seconds: dict[str, float]

    def __post_init__(self) -> None:
        if self.scenario not in get_args(Scenario):
            raise ValueError(f"unknown scenario {self.scenario!r}; choose one of {', '.join(get_args(Scenario))}")
        for what in ("trial", "data", "model", "attack", "goals", "versions", "seconds"):
            object.__setattr__(self, what, _plain(getattr(self, what), what))  # tuples become lists, once
        object.__setattr__(self, "goals", tuple(self.goals))
        for what in ("data", "model", "attack"):
            _require(getattr(self, what), ("name",), what)
        if not self.goals or not self.arms:
            raise ValueError(f"a report needs goals and arms, not {len(self.goals)} and {len(self.arms)}: nothing ran")
        for i, goal in enumerate(self.goals):
            _require(goal, ("name", "y_true", "y_wanted"), f"goals[{i}]")
        _check_arms(self.arms, len(self.goals))
        _check_time(self.started)

    def arm(self, name: str) -> Arm | None:
        """The arm of that name, or None."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def to_json(self) -> dict[str, object]:
        """Plain values that :meth:`from_json` takes back, with the format's name."""
        return {"format": FORMAT, **_fields_of(self)}

    @classmethod
    def from_json(cls, value: object, where: str = "report") -> Report:
        """The report that :meth:`to_json` wrote. Raises ``ValueError`` naming the field that is wrong."""
        content = dict(_mapping(value, where))
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"{where} is no report of ours: its format is not {FORMAT!r}")
        return _build(cls, content, where)

    def as_line(self) -> str:
        """The report as one line of JSON, without the line break: what result files consist of."""
        return json.dumps(self.to_json(), allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str, where: str = "report") -> Report:
        """The report in a JSON text or line. Raises ``ValueError`` on anything else; ``where`` names the place."""
        try:
            value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        return cls.from_json(value, where)

    def write(self, path: Path) -> None:
        """Write the report as indented JSON, atomically."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read what :meth:`write` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not JSON, not a report, or a field is missing, foreign, of another type or not finite.
        """
        return cls.from_text(path.read_text(encoding="utf-8"), str(path))


def _check_arms(arms: tuple[Arm, ...], goals: int) -> None:
    names = [arm.name for arm in arms]
    if len(set(names)) != len(names):
        raise ValueError(f"two arms have the same name: {', '.join(names)}")
    for arm in arms:
        fewer_models = arm.name == CLEAN and arms[0].n % arm.n == 0  # one control a goal, of several victims
        if len(arm.succeeded) != goals or (arm.n != arms[0].n and not fewer_models):
            raise ValueError(f"arm {arm.name!r} was judged on {len(arm.succeeded)} goals with {arm.n} images, not on "
                             f"the {goals} goals with {arms[0].n} images that all arms share")  # fmt: skip


def _check_time(started: str) -> None:
    try:
        moment = datetime.fromisoformat(started.removesuffix("Z") + ("+00:00" if started.endswith("Z") else ""))
    except ValueError as error:
        raise ValueError(f"started must be a time in ISO 8601, not {started!r}") from error
    if moment.utcoffset() != timedelta(0):
        raise ValueError(f"started must be in UTC, such as 2022-11-28T09:00:00+00:00, not {started!r}")


def _require(value: Mapping[str, object], names: tuple[str, ...], where: str) -> None:
    missing = [name for name in names if name not in value]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: {dict(value)}")


def _plain(value: object, where: str) -> object:
    """``value`` as JSON keeps it; raises ``ValueError`` where it cannot."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {str(name): _plain(item, f"{where}.{name}") for name, item in items}
    if isinstance(value, (list, tuple)):
        items = cast("list[object]", value)
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(items)]
    raise ValueError(f"{where} is {value!r}, which JSON does not have: use finite numbers, text, lists and mappings")


def _fields_of(value: Any) -> dict[str, object]:
    """A dataclass as plain values, nested dataclasses through their own ``to_json``."""
    found: dict[str, object] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        nested = isinstance(item, tuple) and bool(item) and is_dataclass(item[0])
        found[field.name] = [part.to_json() for part in item] if nested else _plain(item, field.name)
    return found


def _build(cls: type[Any], value: object, where: str) -> Any:
    """An instance of a dataclass from plain values, every one of them checked against its annotation."""
    content = _mapping(value, where)
    known = {field.name: field for field in fields(cls)}
    foreign = sorted(content.keys() - known.keys())
    required = {name for name, field in known.items() if field.default is MISSING}
    missing = sorted(required - content.keys())
    if foreign or missing:
        raise ValueError(f"{where} has unknown fields [{', '.join(foreign)}] and lacks [{', '.join(missing)}]")
    kinds = get_type_hints(cls)
    values = {name: _typed(kinds[name], item, f"{where}.{name}") for name, item in content.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _typed(kind: Any, value: object, where: str) -> Any:
    """``value`` as the annotation ``kind`` (of the few kinds used above) says, or ``ValueError``."""
    if kind is object:
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, not {value!r}")
        return tuple(_typed(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if get_origin(kind) is dict:
        return {
            name: _typed(get_args(kind)[1], item, f"{where}.{name}") for name, item in _mapping(value, where).items()
        }
    if is_dataclass(kind):
        return _build(cast("type[Any]", kind), value, where)
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} must be {kind.__name__}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, not {value!r}")
    return value


def _mapping(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, not {value!r}")
    return cast("dict[str, object]", value)


def _no_number(text: str) -> object:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large a number")
    return number
