"""The catalogue: every attack is in it, with what it costs and with every setting explained; the docs show it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest

from friends.attacks import ATTACKS
from friends.attacks.base import About, Cost, Sizes
from friends.attacks.catalogue import HEADER, amount, catalogue, markdown, paper_sizes
from friends.bench.trial import construct

DOCS = Path(__file__).resolve().parents[2] / "docs" / "attacks.md"


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A toy.

    Args:
        xi: l_inf bound in [0, 1] pixel units,
            of every poison.
        half: in [0, 1] pixel units.
        one, two: numbers: of ``something``, "quoted".
        quiet: whether.

    Raises:
        ValueError: never.
    """

    xi: float = 12 / 255
    one: int = 1
    two: float | None = None
    half: float = 0.5 / 255
    quiet: bool = False

    about: ClassVar[About] = About(
        title="Toy",
        paper="Nobody, 2020",
        scenarios=("transfer", "scratch"),
        aim="backdoor",
        clean_label=False,
        makes_trigger=True,
    )

    def cost(self, sizes: Sizes) -> Cost:
        return Cost(forward=sizes.goal, trainings=2.5)

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def test_every_attack_is_in_it_with_its_costs() -> None:
    entries = catalogue(ATTACKS)
    assert [entry.name for entry in entries] == list(ATTACKS)
    for entry in entries:
        assert len(entry.cells) == len(HEADER)
        assert entry.cost == ATTACKS[entry.name]().cost(paper_sizes(entry.attack))
        budget = getattr(entry.attack, "budget", None)
        assert budget is None or paper_sizes(entry.attack).poisons == round(50_000 * budget)


def test_gradient_matching_at_the_papers_size() -> None:
    """500 poisons, 250 steps, 8 restarts, differentiated twice: the number is known from the paper's protocol."""
    entry = catalogue({"gradient-matching": ATTACKS["gradient-matching"]})[0]
    assert entry.cost.second == 500 * 250 * 8
    assert entry.cells[2:5] == ("scratch", "one image", "kept")


def test_another_size() -> None:
    sizes = Sizes(train=100, wanted=10, source=10, goal=1, poisons=3)
    entry = catalogue({"gradient-matching": ATTACKS["gradient-matching"]}, sizes)[0]
    assert entry.cost.second == 3 * 250 * 8


def test_a_row() -> None:
    entry = catalogue({"toy": Toy})[0]
    row = ("toy", "Toy", "transfer, scratch", "backdoor, own trigger", "changed", "1 k", "2.5")
    assert entry.cells == row
    assert entry.cost.forward == 1000
    assert markdown([entry]).splitlines()[2] == "| `toy` | " + " | ".join(row[1:]) + " | Nobody, 2020 |"


def test_settings_are_explained_in_the_words_of_the_docstring() -> None:
    assert catalogue({"toy": Toy})[0].settings == [
        ("xi", "12/255", "l_inf bound in [0, 1] pixel units, of every poison."),
        ("one", "1", 'numbers: of something, "quoted".'),
        ("two", "false", 'numbers: of something, "quoted".'),
        ("half", "0.00196078", "in [0, 1] pixel units."),
        ("quiet", "false", "whether."),
    ]


@pytest.mark.parametrize("name", ATTACKS)
def test_every_setting_of_every_attack_is_explained_and_its_default_can_be_typed(name: str) -> None:
    settings = catalogue({name: ATTACKS[name]})[0].settings
    assert {setting.name for setting in settings} == {field.name for field in fields(ATTACKS[name])}  # type: ignore[arg-type]
    for setting in settings:
        assert setting.meaning, f"{name} does not say what {setting.name} is"
        if setting.default.endswith("/255"):
            changed = construct(ATTACKS[name], {setting.name: setting.default}, "test")
            assert getattr(changed, setting.name) == pytest.approx(getattr(ATTACKS[name](), setting.name))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1 k"), (275_000, "275 k"), (999_949, "1 M"), (9_900_002.2, "9.9 M"),
     (1.8e9, "1.8 G"), (999_400, "999 k")],
)  # fmt: skip
def test_amounts(number: float, text: str) -> None:
    assert amount(number) == text


def test_the_docs_show_the_catalogue() -> None:
    shown = DOCS.read_text(encoding="utf-8").partition("<!-- catalogue -->\n")[2].partition("<!-- end -->")[0]
    assert shown.strip() == markdown(catalogue(ATTACKS)).strip(), (
        "docs/attacks.md is not up to date: put there what "
        "python -c 'from friends.attacks import ATTACKS; from friends.attacks.catalogue import *; "
        "print(markdown(catalogue(ATTACKS)))' prints"
    )
