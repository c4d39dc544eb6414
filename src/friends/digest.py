"""Which code made a result: a hash of the source that can change it, and of nothing else.

Comments, docstrings and layout do not count; a change of one attack does not touch the results of another.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path
from typing import cast

_PACKAGE = Path(__file__).resolve().parent
_TABLES = ("friends", "friends.attacks", "friends.defenses", "friends.bench.trial", "friends.data.artifacts",
           "friends.loaders")  # fmt: skip
"""What names every method or setting, only keeps results, or serves others' loops: which is used is in the settings."""


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


_SILENT = ("ctx", "kind", "type_comment", "type_ignores", "type_params")
"""Fields of the tree that say nothing about what runs, or that only some versions of Python have."""


@cache
def _essence(module: str) -> str:
    """The code of a module as text that is the same in every version of Python: no comments, layout or docstrings."""
    return _spelt(_tree(module))


def _spelt(node: object) -> str:
    """A piece of a syntax tree. Written here because what ``ast`` prints changes from version to version."""
    if isinstance(node, list):
        parts = [part for part in cast("list[object]", node) if not _is_text(part)]
        return f"[{' '.join(_spelt(part) for part in parts)}]"
    if isinstance(node, ast.JoinedStr):
        return f"(JoinedStr {_spelt(_joined(node))})"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in _SILENT and value not in (None, [])]
    inside = " ".join(f"{name}={_spelt(value)}" for name, value in fields)
    return f"({type(node).__name__} {inside})"


def _joined(text: ast.JoinedStr) -> list[object]:
    """The parts of an f-string, neighbouring constants as one, none empty: versions cut them differently."""
    parts: list[object] = []
    for part in text.values:
        if isinstance(part, ast.Constant) and parts and isinstance(parts[-1], str):
            parts[-1] += str(part.value)
        else:
            parts.append(str(part.value) if isinstance(part, ast.Constant) else part)
    return [part for part in parts if part != ""]


def _is_text(node: object) -> bool:
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
