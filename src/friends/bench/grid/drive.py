"""Which task runs when: the most valuable first, as far as needs, room and time allow."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from friends.bench.grid.tasks import Done, Engine, Task
from friends.types import Progress, silent

POLL = 1.0
"""Seconds after which the time is looked at again, at most."""


class TimeUpError(BaseException):
    """Raised inside a task that runs in this process, when the time is over; what it has checkpointed stays.

    Like ``KeyboardInterrupt`` it is no ``Exception``: nothing that a task does about its errors may hold it up.
    """


@dataclass
class Driven:
    """What came of some tasks.

    Args:
        done: those that ended well.
        failed: those that ended in an error, or lost their worker too often.
        left: those that were not finished: not started, stopped, or needing one that failed.
        stopped: why there are any, in words; empty if there are none.
    """

    done: list[Done] = field(default_factory=list[Done])
    failed: list[Done] = field(default_factory=list[Done])
    left: list[Task] = field(default_factory=list[Task])
    stopped: str = ""


def drive(
    tasks: Sequence[Task],
    engine: Engine,
    *,
    minutes: float | None = None,
    finished: Callable[[Done], None] = lambda done: None,
    progress: Progress = silent,
    retries: int = 2,
    clock: Callable[[], float] = time.monotonic,
) -> Driven:
    """Run tasks until all are done, or the time is over.

    Args:
        tasks: in any order; see :class:`Task` for what decides.
        engine: where they run; it is not closed.
        minutes: no task is started that is not expected to end in time, and what still runs then is stopped. Tasks of
            the same kind that have ended correct the estimates.
        finished: told of every task that ended, well or not, one at a time in this thread.
        progress: handed to tasks that run in this process.
        retries: how often a task is started again after its worker was lost.
        clock: seconds.

    Raises:
        ValueError: two tasks of one name, a need that is no task, a circle of needs, or a task that can never run on
            this engine; nothing is started then.
    """
    _check(tasks, engine)
    limit = None if minutes is None else clock() + 60 * minutes
    board = _Board(tasks, limit, clock, retries)
    try:
        while True:
            _start(board, engine)
            if not board.running or board.late:
                break
            for done in engine.wait(POLL, _watched(progress, board)):
                ended = board.take(done)
                if ended is not None:
                    finished(ended)
    except TimeUpError:
        pass
    return board.result()


def _check(tasks: Sequence[Task], engine: Engine) -> None:
    names = [task.name for task in tasks]
    twice = [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"two tasks are called {twice[0]!r}")
    known = set(names)
    for task in tasks:
        missing = [name for name in task.needs if name not in known]
        if missing:
            raise ValueError(f"task {task.name!r} needs {missing[0]!r}, which is no task")
        problem = engine.problem(task)
        if problem:
            raise ValueError(f"task {task.name!r} can never run here: {problem}")
    done: set[str] = set()
    left = list(tasks)
    while left:
        ready = [task for task in left if done.issuperset(task.needs)]
        if not ready:
            raise ValueError(f"tasks need each other in a circle: {', '.join(task.name for task in left[:5])}")
        done.update(task.name for task in ready)
        left = [task for task in left if task.name not in done]


def _watched(progress: Progress, board: _Board) -> Progress:
    """Progress that ends a task of this process when the time is over."""
    if board.limit is None:
        return progress

    def watched(what: str, done: int, total: int, note: str = "", /) -> None:
        progress(what, done, total, note)
        if board.late:
            raise TimeUpError

    return watched


def _start(board: _Board, engine: Engine) -> None:
    """Start whatever may start now, the most valuable first."""
    for task in board.ready():
        if engine.fits(task) and not board.claimed(task) and board.in_time(task):
            board.begin(task)
            engine.start(task)


class _Board:
    """Which tasks wait, run and are done."""

    def __init__(self, tasks: Sequence[Task], limit: float | None, clock: Callable[[], float], retries: int) -> None:
        self.limit, self._clock, self._retries = limit, clock, retries
        self._waiting = {task.name: task for task in sorted(tasks, key=lambda task: -task.value)}
        self.running: dict[str, Task] = {}
        self._attempts: dict[str, int] = defaultdict(int)
        self._users: dict[str, list[Task]] = defaultdict(list)
        for task in tasks:
            for need in task.needs:
                self._users[need].append(task)
        self._good: set[str] = set()
        self._spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._result = Driven()
        self._too_long = False

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return self.limit is not None and self._clock() >= self.limit

    def ready(self) -> list[Task]:
        """Tasks whose needs are met, the most valuable first."""
        return [task for task in self._waiting.values() if self._good.issuperset(task.needs)]

    def claimed(self, task: Task) -> bool:
        """Whether one that runs claims the same."""
        return any(task.claims & other.claims for other in self.running.values())

    def seconds(self, task: Task) -> float:
        """The estimate, corrected by how long tasks of its kind took of theirs."""
        estimated, taken = self._spent[task.call]
        return task.seconds * (taken / estimated if estimated > 0 else 1.0)

    def in_time(self, task: Task) -> bool:
        """Whether it would end in time, and so would one of those that it is made for."""
        if self.limit is None:
            return True
        after = min((self.seconds(user) for user in self._users[task.name]), default=0.0)
        fits = self._clock() + self.seconds(task) + after <= self.limit
        self._too_long |= not fits
        return fits

    def begin(self, task: Task) -> None:
        """Note that a task starts."""
        self.running[task.name] = self._waiting.pop(task.name)
        self._attempts[task.name] += 1

    def take(self, done: Done) -> Done | None:
        """Note that a task has ended; ``None`` if it will be tried again."""
        task = self.running.pop(done.task.name)
        done = replace(done, attempts=self._attempts[task.name])
        if done.lost and done.attempts <= self._retries:
            rest = {**self._waiting, task.name: task}
            self._waiting = dict(sorted(rest.items(), key=lambda item: -item[1].value))
            return None
        if done.error:
            self._result.failed.append(done)
            return done
        self._good.add(task.name)
        if task.seconds > 0:  # what was expected to take no time, since it is there already, tells nothing
            spent = self._spent[task.call]
            spent[0] += task.seconds
            spent[1] += done.seconds
        self._result.done.append(done)
        return done

    def result(self) -> Driven:
        """What came of all."""
        result = self._result
        result.left = [*self.running.values(), *self._waiting.values()]
        if not result.left:
            return result
        failed: Mapping[str, Done] = {done.task.name: done for done in result.failed}
        needing = [task for task in result.left if not failed.keys().isdisjoint(task.needs)]
        if self.late or self._too_long:
            result.stopped = f"the time is over; {len(result.left)} tasks are left"
        elif needing:
            result.stopped = f"{len(needing)} tasks need one that failed"
        else:
            result.stopped = f"the engine has no room any more for the {len(result.left)} tasks that are left"
        return result
