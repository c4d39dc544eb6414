"""Which task runs when, on an engine whose clock is ours."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from friends.bench.grid.drive import TimeUpError, drive
from friends.bench.grid.engines import Inline
from friends.bench.grid.tasks import Done, Engine, Task, resolve
from friends.types import Progress


def task(name: str, **changes: object) -> Task:
    given = {"call": "friends.bench.grid.tasks:hello", "payload": {"say": name}, "seconds": 10.0}
    return Task(name=name, **{**given, **changes})  # type: ignore[arg-type]


class Pretend:
    """Slots that take a task for as long as it says, on a clock of their own; some tasks lose their worker first."""

    def __init__(self, slots: int = 1, lost: dict[str, int] | None = None, takes: float = 1.0) -> None:
        self.slots, self.now, self.takes = slots, 0.0, takes
        self.lost = dict(lost or {})
        self.running: dict[str, tuple[float, Task]] = {}
        self.started: list[str] = []
        self.together: list[set[str]] = []

    def fits(self, task: Task) -> bool:
        return len(self.running) < self.slots

    def problem(self, task: Task) -> str:
        return "it is too large" if task.memory > 100 else ""

    def start(self, task: Task) -> None:
        assert self.fits(task)
        self.started.append(task.name)
        self.running[task.name] = (self.now + task.seconds * self.takes, task)
        self.together.append(set(self.running))

    def wait(self, timeout: float, progress: Progress) -> list[Done]:
        end, ended = min(self.running.values(), key=lambda item: item[0])
        if end > self.now + timeout:
            self.now += timeout
            return []
        self.now = max(self.now, end)
        del self.running[ended.name]
        seconds = ended.seconds * self.takes
        if self.lost.get(ended.name, 0) > 0:
            self.lost[ended.name] -= 1
            return [Done(task=ended, error="gone", lost=True, seconds=seconds)]
        bad = "bad" if "bad" in ended.name else ""
        return [Done(task=ended, value={"say": ended.name}, error=bad, seconds=seconds)]

    def __enter__(self) -> Pretend:
        return self

    def __exit__(self, *error: object) -> None:
        self.running.clear()


def names(some: Sequence[Done] | Sequence[Task]) -> list[str]:
    return [one.name if isinstance(one, Task) else one.task.name for one in some]


def test_the_most_valuable_comes_first_when_its_needs_are_met() -> None:
    tasks = [task("c", value=1), task("a", value=9, needs=("b",)), task("b", value=0), task("d", value=5)]
    engine = Pretend()
    assert isinstance(engine, Engine)
    told: list[Done] = []
    driven = drive(tasks, engine, finished=told.append, clock=lambda: engine.now)
    assert engine.started == ["d", "c", "b", "a"]
    assert names(driven.done) == names(told) == ["d", "c", "b", "a"]
    assert (driven.failed, driven.left, driven.stopped) == ([], [], "")
    assert told[0].value == {"say": "d"}


def test_two_that_claim_the_same_do_not_run_at_once() -> None:
    claim = frozenset({"probe"})
    tasks = [task("a", value=3, claims=claim), task("b", value=2, claims=claim), task("c", value=1)]
    engine = Pretend(slots=2)
    drive(tasks, engine, clock=lambda: engine.now)
    assert engine.started[:2] == ["a", "c"]
    assert not any({"a", "b"} <= some for some in engine.together)
    assert {"a", "c"} in engine.together


def test_what_needs_a_failed_one_is_left_and_the_rest_goes_on() -> None:
    tasks = [task("bad", value=9), task("after", needs=("bad",)), task("later", needs=("after",)), task("good")]
    engine = Pretend()
    driven = drive(tasks, engine, clock=lambda: engine.now)
    assert names(driven.failed) == ["bad"]
    assert names(driven.done) == ["good"]
    assert sorted(names(driven.left)) == ["after", "later"]
    assert "need one that failed" in driven.stopped


def test_a_lost_worker_is_not_the_tasks_fault_at_first() -> None:
    engine = Pretend(lost={"a": 2, "b": 3})
    told: list[Done] = []
    driven = drive([task("a"), task("b")], engine, finished=told.append, retries=2, clock=lambda: engine.now)
    assert engine.started.count("a") == engine.started.count("b") == 3
    assert names(driven.done) == ["a"]
    assert names(driven.failed) == ["b"]
    assert [done.attempts for done in told] == [3, 3]


def test_time_is_spent_on_what_fits_and_no_poison_is_made_for_nothing() -> None:
    poison = task("poison", value=9, seconds=40)
    tasks = [poison, task("its cell", value=8, seconds=30, needs=("poison",)), task("x", value=1, seconds=50)]
    engine = Pretend()
    driven = drive(tasks, engine, minutes=1, clock=lambda: engine.now)
    assert names(driven.done) == ["x"]  # 40 + 30 s would not fit
    assert engine.now <= 60
    assert "the time is over; 2 tasks are left" in driven.stopped


def test_estimates_learn_from_what_was_measured() -> None:
    """Everything takes ten times as long as was thought: after the first, the others are known not to fit."""
    engine = Pretend(takes=10.0)
    driven = drive(
        [task(str(i), value=-i, seconds=1) for i in range(9)], engine, minutes=0.25, clock=lambda: engine.now
    )
    assert names(driven.done) == ["0"]
    assert len(driven.left) == 8


def test_what_runs_when_the_time_is_over_is_left() -> None:
    engine = Pretend(takes=100.0)
    driven = drive([task("a", seconds=1), task("b", seconds=1)], engine, minutes=0.5, clock=lambda: engine.now)
    assert names(driven.done) == []
    assert sorted(names(driven.left)) == ["a", "b"]
    assert engine.now == pytest.approx(30, abs=1.1)


def test_a_task_in_this_process_is_stopped_when_the_time_is_over() -> None:
    now = itertools.count()
    driven = drive([task("a", seconds=0)], Inline(), minutes=0.2, clock=lambda: float(next(now)))
    assert names(driven.left) == ["a"]
    assert "the time is over" in driven.stopped


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([task("a"), task("a")], "two tasks are called 'a'"),
        ([task("a", needs=("b",))], "needs 'b', which is no task"),
        ([task("a", needs=("b",)), task("b", needs=("a",))], "in a circle: a, b"),
        ([task("a", memory=101)], "'a' can never run here: it is too large"),
    ],
)
def test_what_cannot_be_run_is_told_before_anything_starts(tasks: list[Task], words: str) -> None:
    engine = Pretend()
    with pytest.raises(ValueError, match=words):
        drive([task("good", value=99), *tasks], engine)
    assert engine.started == []


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3), st.sets(st.integers(0, 7), max_size=3)), max_size=8),
    st.integers(1, 3),
    st.dictionaries(st.integers(0, 7).map(str), st.integers(0, 2), max_size=3),
)
def test_whatever_the_tasks_all_are_done_in_order_and_once(
    some: list[tuple[float, int, set[int]]], slots: int, lost: dict[str, int]
) -> None:
    tasks = [
        task(str(i), value=value, claims=frozenset({str(claim)}), needs=tuple(str(n) for n in needs if n < i))
        for i, (value, claim, needs) in enumerate(some)
    ]
    engine = Pretend(slots, lost)
    driven = drive(tasks, engine, clock=lambda: engine.now)
    order = names(driven.done)
    assert sorted(order) == sorted(names(tasks))
    for one in tasks:
        assert all(order.index(need) < order.index(one.name) for need in one.needs)
    claims = {one.name: one.claims for one in tasks}
    for together in engine.together:
        assert all(not claims[a] & claims[b] for a, b in itertools.combinations(together, 2))


def test_inline_runs_and_says_what_went_wrong() -> None:
    wrong = task("wrong", payload={"error": "no such thing"})
    foreign = task("foreign", call="os:getcwd")
    told: list[Done] = []
    driven = drive([task("right"), wrong, foreign], Inline(), finished=told.append)
    assert names(driven.done) == ["right"]
    assert {done.task.name: done.error.split(",")[0] for done in driven.failed} == {
        "wrong": "no such thing",
        "foreign": "a task calls a function of friends",
    }
    assert driven.done[0].value["say"] == "right"


def test_a_mistake_of_any_kind_ends_its_own_task_alone() -> None:
    odd = task("odd", payload={"seconds": None})  # a TypeError
    missing = task("missing", call="friends.bench.grid.tasks:no_such_function")
    driven = drive([odd, missing, task("good")], Inline())
    assert names(driven.done) == ["good"]
    errors = {done.task.name: done.error for done in driven.failed}
    assert "Traceback" in errors["odd"]
    assert "TypeError" in errors["odd"]
    assert "no_such_function" in errors["missing"]


def test_an_engine_that_lost_its_room_says_why_tasks_are_left() -> None:
    class Shrinking(Pretend):
        def fits(self, task: Task) -> bool:
            return not self.started and super().fits(task)

    engine = Shrinking()
    driven = drive([task("a", value=1), task("b"), task("c")], engine, clock=lambda: engine.now)
    assert names(driven.done) == ["a"]
    assert driven.stopped == "the engine has no room any more for the 2 tasks that are left"


@pytest.mark.parametrize("call", ["os:getcwd", "friends.bench:__import__('os')", "friendsx.y:z", "friends.types"])
def test_a_task_calls_nothing_but_our_functions(call: str) -> None:
    with pytest.raises(ValueError, match="a task calls a function of friends"):
        resolve(call)


def test_the_end_of_time_is_not_swallowed_as_a_mistake() -> None:
    assert not issubclass(TimeUpError, Exception)
