"""Who may import whom: a row imports any row below it, nothing beside or above."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

from friends.attacks import ATTACKS
from friends.defenses import DEFENSES

SOURCE = Path(__file__).resolve().parents[1] / "src" / "friends"

ROWS: dict[str, int] = {
    "__main__": 8,
    "cli": 7,
    "cli_bench": 6,
    "cli_export": 6,
    "cli_train": 6,
    "cli_tune": 6,
    "terminal": 1,
    "integrations": 6,
    "bench": 5,
    "attacks": 4,
    "defenses": 4,
    "loaders": 3,
    "training": 2,
    "noise": 2,
    "models": 2,
    "data": 1,
    "modules": 1,
    "types": 0,
    "digest": 0,
    "_version": 0,
}


def part_of(module: str) -> str:
    """``friends.data.images`` -> ``data``; the package itself is ``""``."""
    return [*module.split("."), ""][1]


def imports_of(file: Path) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += names if node.module == "friends" else [str(node.module)]
    return [name for name in found if name.split(".")[0] == "friends"]


def test_every_arrow_points_down() -> None:
    arrows = 0
    for file in sorted(SOURCE.rglob("*.py")):
        here = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        for module in imports_of(file):
            there = part_of(module)
            arrows += here != there
            allowed = here == there or ROWS[there] < ROWS[here]
            assert allowed, f"{file.relative_to(SOURCE)} imports {module}: not below it"
    assert arrows > 20


@pytest.mark.parametrize(("folder", "table"), [("attacks", ATTACKS), ("defenses", DEFENSES)])
def test_no_method_imports_another_and_no_machinery_imports_a_method(folder: str, table: Mapping[str, type]) -> None:
    """Methods are the files of the classes in the folder's table; the rest is machinery that several share."""
    methods = {method.__module__.split(".")[-1] for method in table.values()}
    for file in (SOURCE / folder).glob("*.py"):
        if file.stem == "__init__":
            continue
        for module in imports_of(file):
            assert part_of(module) != folder or module.split(".")[-1] not in methods, f"{file.name} imports {module}"


def test_nothing_in_the_source_can_run_a_file() -> None:
    """No bare unpickling, no unrestricted torch.load, no eval, anywhere in the package."""
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            text = ast.unparse(node.func)
            where = f"{file.relative_to(SOURCE)}:{node.lineno}"
            assert text not in {"eval", "exec", "pickle.load", "pickle.loads", "joblib.load"}, where
            if text == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), where
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle":
                    assert ast.unparse(keyword.value) == "False", where


def test_importing_the_package_is_light() -> None:
    """The core does not need what only some commands need."""
    import subprocess
    import sys

    code = (
        "import sys, friends, friends.cli; "
        "heavy = {'torchvision', 'datasets', 'sklearn', 'pandas', 'matplotlib', 'mlxtend', 'pyarrow', 'jinja2'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
