"""The name of the code that made a result: it changes with what runs, and with nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import friends.digest as module
from friends.digest import digest, reaches

TREE = {
    "__init__.py": "",
    "low.py": "def low(x):\n    return x + 1\n",
    "high.py": "from friends.low import low\n\ndef high(x):\n    return low(x) * 2\n",
    "other.py": "def other():\n    return f'{1!r:>{2}} and {3}'\n",
    "late.py": "def late():\n    from friends import low\n    return low.low(1)\n",
}


def of_tree(folder: Path, changes: dict[str, str], modules: str = "friends.high") -> str:
    """The digest of a small package: computed in a process of its own, since digests are kept in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    text = Path(str(module.__file__)).read_text(encoding="utf-8")
    for name, code in {**TREE, "digest.py": text, **changes}.items():
        (folder / name).write_text(code, encoding="utf-8")
    program = f"import runpy; print(runpy.run_path({str(folder / 'digest.py')!r})['digest'](*{modules.split()!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_it_changes_with_what_runs_and_with_nothing_else(tmp_path: Path) -> None:
    first = of_tree(tmp_path / "a", {})
    assert len(first) == 16
    assert of_tree(tmp_path / "b", {}) == first
    words = '"""Words."""\n\n# a comment\ndef low(x):\n    """More words."""\n\n    return (x\n            + 1)\n'
    assert of_tree(tmp_path / "c", {"low.py": words}) == first
    assert of_tree(tmp_path / "d", {"other.py": "def other():\n    return 7\n"}) == first
    assert of_tree(tmp_path / "e", {"low.py": TREE["low.py"].replace("1", "2")}) != first
    assert of_tree(tmp_path / "f", {"low.py": TREE["low.py"].replace("1", "1.0")}) != first
    assert of_tree(tmp_path / "g", {"high.py": TREE["high.py"].replace("* 2", "@ 2")}) != first


def test_an_import_inside_a_function_counts(tmp_path: Path) -> None:
    first = of_tree(tmp_path / "a", {}, "friends.late")
    assert of_tree(tmp_path / "b", {"low.py": TREE["low.py"].replace("1", "2")}, "friends.late") != first


@pytest.mark.parametrize(
    ("old", "new"), [("!r", "!s"), (">", "<"), ("{2}", "{4}"), (" and ", " or "), ("{3}", "3"), ("f'", "'")]
)
def test_every_part_of_an_f_string_counts(tmp_path: Path, old: str, new: str) -> None:
    changed = {"other.py": TREE["other.py"].replace(old, new, 1)}
    assert of_tree(tmp_path / "a", {}, "friends.other") != of_tree(tmp_path / "b", changed, "friends.other")


def test_it_is_the_same_in_every_version_of_python(tmp_path: Path) -> None:
    """A value that was computed with Python 3.9 to 3.13: they cut and print syntax trees differently."""
    assert of_tree(tmp_path / "a", {}, "friends.high friends.other friends.late") == KNOWN


KNOWN = "acddac8d758e215b"


def test_one_method_does_not_touch_another() -> None:
    attack = "friends.attacks.gradient_matching"
    assert reaches(attack, "friends.attacks.base")
    assert not reaches(attack, "friends.attacks.metapoison")
    assert not reaches("friends.defenses.epic", "friends.defenses.friends")
    assert digest("friends.defenses.epic") != digest("friends.defenses.abl")
    assert digest("friends.defenses.epic", "friends.defenses.abl") == digest(
        "friends.defenses.abl", "friends.defenses.epic"
    )


def test_a_module_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"no module friends\.nothing"):
        digest("friends.nothing")
