"""The attacks as a list to choose from: what each is, what it is meant for, and what it costs at the paper's size.

Costs are counted, not measured: every attack says how many images it sends through a surrogate (:class:`Cost`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple, cast

from friends.attacks.base import About, Attack, Cost, Sizes, poison_count

PAPER_IMAGES, PAPER_CLASSES = 50_000, 10
"""CIFAR-10, on which the FRIENDS paper measures."""

BACKDOOR_IMAGES = 1000
"""Test images with a trigger: all of one class of CIFAR-10."""


class Setting(NamedTuple):
    """A setting of an attack: its name, its default as a trial file or ``--set`` would give it, and what it means."""

    name: str
    default: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One attack of the catalogue.

    Args:
        name: what the command line and trials call it.
        attack: with its default settings, which are its paper's.
        cost: of crafting for one goal at the paper's size, or the size that the catalogue was made for.
    """

    name: str
    attack: Attack
    cost: Cost

    @property
    def about(self) -> About:
        """Title, paper, scenarios and aim."""
        return self.attack.about

    @property
    def aim(self) -> str:
        """What a goal is, in words."""
        if self.about.aim == "target":
            return "one image"
        return "backdoor, own trigger" if self.about.makes_trigger else "backdoor"

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of the catalogue under :data:`HEADER`."""
        about, cost = self.about, self.cost
        return (
            self.name,
            about.title,
            ", ".join(about.scenarios),
            self.aim,
            "kept" if about.clean_label else "changed",
            amount(cost.forwards),
            f"{cost.trainings:.3g}",
        )

    @property
    def settings(self) -> list[Setting]:
        """Every setting, explained in the words of the attack's documentation."""
        meanings = _arguments(inspect.getdoc(type(self.attack)) or "")
        found: list[Setting] = []
        for field in fields(cast(Any, self.attack)):
            meaning = meanings.get(field.name, "")
            value = getattr(self.attack, field.name)
            levels = 255 * value if "pixel units" in meaning and isinstance(value, float) else 0.5
            whole = abs(levels - round(levels)) < 1e-9
            found.append(Setting(field.name, f"{round(levels)}/255" if whole else _typed(value), meaning))
        return found


def _typed(value: object) -> str:
    """A value as one would type it."""
    if value is None:
        return "false"
    if is_dataclass(value) and not isinstance(value, type):
        return "{" + ", ".join(f"{field.name}={_typed(getattr(value, field.name))}" for field in fields(value)) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


HEADER = ("name", "attack", "scenario", "aim", "labels", "passes", "models")
"""The columns; the last two are the cost for one goal: passes of an image forward, and models that are trained."""


def catalogue(attacks: Mapping[str, type[Attack]], sizes: Sizes | None = None) -> list[Entry]:
    """All attacks of a table such as ``ATTACKS``, with their default settings and what these cost.

    Args:
        sizes: how large the task is; by default that of the paper, with each attack's own budget.
    """
    entries: list[Entry] = []
    for name, cls in attacks.items():
        attack = cls()
        entries.append(Entry(name=name, attack=attack, cost=attack.cost(sizes or paper_sizes(attack))))
    return entries


def _arguments(documentation: str) -> dict[str, str]:
    """What the ``Args:`` section of a docstring says, by name, on one line each."""
    section = re.search(r"^Args:\n(.*?)(?:^\S|\Z)", documentation, flags=re.MULTILINE | re.DOTALL)
    found: dict[str, str] = {}
    for names, text in re.findall(
        r"^ {4}([\w, ]+?):\s(.*?)(?=^ {4}\S|\Z)", section[1] if section else "", flags=re.MULTILINE | re.DOTALL
    ):
        meaning = re.sub(r"``([^`]*)``", r"\1", " ".join(text.split()))
        found |= dict.fromkeys((name.strip() for name in names.split(",")), meaning)
    return found


def paper_sizes(attack: Attack) -> Sizes:
    """CIFAR-10 in full, with as many poisons as the attack's budget is of it."""
    of_class = PAPER_IMAGES // PAPER_CLASSES
    budget = getattr(attack, "budget", None)
    return Sizes(
        train=PAPER_IMAGES,
        wanted=of_class,
        source=of_class,
        goal=1 if attack.about.aim == "target" else BACKDOOR_IMAGES,
        poisons=0 if budget is None else poison_count(budget, PAPER_IMAGES),
    )


def amount(number: float) -> str:
    """A large number to three digits: 990, 12.5 k, 1.24 M, 1.8 G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def markdown(entries: Iterable[Entry]) -> str:
    """The catalogue as a Markdown table with the papers, as in ``docs/attacks.md``."""
    lines = [f"| {' | '.join((*HEADER, 'paper'))} |", "|" + " --- |" * (len(HEADER) + 1)]
    for entry in entries:
        name, *rest = entry.cells
        lines.append(f"| {' | '.join((f'`{name}`', *rest, entry.about.paper))} |")
    return "\n".join(lines) + "\n"
