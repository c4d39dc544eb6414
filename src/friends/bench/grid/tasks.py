"""What engines run: a function of this package, by name, with plain values, and what it needs."""

from __future__ import annotations

import importlib
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

from friends.digest import digest
from friends.types import Progress

Call = Callable[[Mapping[str, Any], Progress], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A piece of work that any process, here or elsewhere, can do.

    Args:
        name: of the task, unique among those that run together.
        call: ``"module:function"`` of this package; called with the payload and a progress.
        payload: plain values.
        needs: names of tasks that must be done before.
        claims: two tasks that claim the same thing do not run at once: one would only wait for the other.
        value: the higher, the sooner.
        seconds: estimate.
        cpus, gpus: cores and share of a GPU that it takes.
        memory: bytes that it may take at most, by estimate.
    """

    name: str
    call: str
    payload: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    claims: frozenset[str] = frozenset()
    value: float = 0.0
    seconds: float = 0.0
    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a task ended.

    Args:
        task: which.
        value: what it returned; empty if it failed.
        error: what went wrong, with its traceback; empty if nothing.
        lost: whether its worker was lost, which says nothing about the task: it may be tried again.
        seconds: how long it ran.
        worker: where.
        attempts: how often it was started.
    """

    task: Task
    value: Mapping[str, Any] = field(default_factory=dict[str, Any])
    error: str = ""
    lost: bool = False
    seconds: float = 0.0
    worker: str = ""
    attempts: int = 1


@runtime_checkable
class Engine(Protocol):
    """Runs tasks; whoever drives it decides which and when."""

    @property
    def slots(self) -> int:
        """How many tasks may run at once."""
        ...

    def fits(self, task: Task) -> bool:
        """Whether a task may be started now, beside those that run."""
        ...

    def problem(self, task: Task) -> str:
        """Why a task can never run here, in words with the numbers; empty if it can."""
        ...

    def start(self, task: Task) -> None:
        """Begin a task that :meth:`fits`."""
        ...

    def wait(self, timeout: float, progress: Progress) -> list[Done]:
        """The tasks that have ended, waiting for one at most so many seconds."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, *error: object) -> None:
        """Stop whatever runs; its work folders stay."""
        ...


def resolve(call: str, package: str = "friends") -> Call:
    """The function that a task names.

    Raises:
        ValueError: it is not of this package: a task from elsewhere must not run just anything.
    """
    module, _, name = call.partition(":")
    if module.split(".")[0] != package or not name.isidentifier():
        raise ValueError(f"a task calls a function of {package}, such as {package}.bench:work, not {call!r}")
    return cast(Call, getattr(importlib.import_module(module), name))


def code_of_worker() -> str:
    """A hash of all code that cells run: workers must have that of whoever drives them."""
    return digest("friends.bench.grid.stages", "friends.attacks", "friends.defenses")


def hello(payload: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    """A task that does nothing, to try an engine out: says where it ran and with which code.

    Args:
        payload: ``seconds`` to wait, ``error`` to raise, ``say`` to say back; all may be missing.
        progress: told how far the waiting is.
    """
    seconds, steps = float(payload.get("seconds", 0)), 20
    for step in range(steps):
        progress("waiting", step, steps)
        time.sleep(seconds / steps)
    progress("waiting", steps, steps)
    if payload.get("error"):
        raise ValueError(str(payload["error"]))
    return {"say": payload.get("say"), "host": platform.node(), "pid": os.getpid(), "code": code_of_worker()}
