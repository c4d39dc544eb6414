"""What every command prints: texts as they are, and times that say no more than is known."""

from __future__ import annotations

import pytest

from friends.terminal import print_plain, rough_time


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "–"),
        (0.034, "0.034 s"),
        (9.97, "10 s"),
        (89.4, "89 s"),
        (90, "1.5 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (35 * 3600, "35 h"),
        (36 * 3600, "1.5 days"),
        (1234 * 86400, "1,234 days"),
    ],
)
def test_a_time_has_two_figures_and_its_unit(seconds: float, text: str) -> None:
    assert rough_time(seconds) == text


def test_names_and_paths_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_plain("runs/[bold]one[/bold]/[/]", style="dim")
    assert capsys.readouterr().out == "runs/[bold]one[/bold]/[/]\n"
