"""Which code made a result: a hash of the source that can change it, and of nothing else.

Comments, docstrings and layout do not count; a change of one attack does not touch the results of another.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_TABLES = ("friends", "friends.attacks", "friends.defenses", "friends.bench.trial", "friends.data.artifacts")
"""What names every method or setting, or only keeps results: which one is used is in the settings."""


def digest(*modules: str) -> str:
    """A hash (16 hex digits) of some modules of this package and of everything of ours that they import.

    Args:
        modules: dotted names, such as ``"friends.training.fit"``.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    return _digest(tuple(sorted(set(modules))))


@cache
def _digest(modules: tuple[str, ...]) -> str:
    found: set[str] = set()
    todo = list(modules)
    while todo:
        module = todo.pop()
        if module in found:
            continue
        if _file(module) is None:
            raise ModuleNotFoundError(f"no module {module} in {_PACKAGE}")
        found.add(module)
        todo += [name for name in _imports(module) if name not in found]
    sha = hashlib.sha256()
    for module in sorted(found):
        sha.update(f"{module}\n{_essence(module)}\n".encode())
    return sha.hexdigest()[:16]


def _file(module: str) -> Path | None:
    """The source of a module of ours; None if there is none."""
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    plain, package = path.with_suffix(".py"), path / "__init__.py"
    return plain if plain.is_file() and module != "friends" else package if package.is_file() else None


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(str(_file(module) and Path(str(_file(module))).read_text(encoding="utf-8")))


@cache
def _imports(module: str) -> tuple[str, ...]:
    """The modules of ours that a module imports, wherever in its text; names inside a module count as the module."""
    names: set[str] = set()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if _ours(name) else node.module for name in inside}
    return tuple(sorted(name for name in names if _ours(name) and name not in _TABLES))


def _ours(name: str) -> bool:
    return name.split(".")[0] == "friends" and _file(name) is not None


@cache
def _essence(module: str) -> str:
    """The code of a module without docstrings; comments and layout are not in the tree."""
    tree = ast.parse(ast.unparse(_tree(module)))  # a copy: the one kept is for imports
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [part for part in body if not _is_text(part)]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    return ast.unparse(tree)


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is a string by itself: a docstring, or the text below a constant."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def reaches(module: str, other: str) -> bool:
    """Whether a module imports another one of ours, directly or through others."""
    seen: set[str] = set()
    todo = [module] if _ours(module) else []
    while todo:
        here = todo.pop()
        if here == other:
            return True
        if here not in seen:
            seen.add(here)
            todo += _imports(here)
    return False
