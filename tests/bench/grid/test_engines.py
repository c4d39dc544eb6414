"""Tasks in processes of their own: the same results, within their memory, whatever becomes of a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from friends.bench.grid.drive import drive
from friends.bench.grid.engines import Inline, Workers, _gpu_name, cores, local_workers
from friends.bench.grid.plan import plan, tasks_of
from friends.bench.grid.run import record_of
from friends.bench.grid.spec import read_grid
from friends.bench.grid.stages import Workbench
from friends.bench.grid.tasks import Done, Engine, Task
from friends.data.artifacts import Artifacts

HELLO = "friends.bench.grid.tasks:hello"


def task(name: str, seconds: float = 0.0, **changes: object) -> Task:
    payload = {"say": name, "seconds": seconds}
    return Task(**{"name": name, "call": HELLO, "payload": payload, **changes})  # type: ignore[arg-type]


def test_workers_stay_and_share_the_work() -> None:
    with Workers(2) as engine:
        assert isinstance(engine, Engine)
        driven = drive([task(str(i), 0.4) for i in range(6)], engine)
    assert sorted(str(done.value["say"]) for done in driven.done) == list("012345")
    pids = {done.value["pid"] for done in driven.done}
    assert len(pids) == 2
    assert os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(str(pid)), 0)


def test_a_killed_worker_loses_nothing_but_its_task() -> None:
    told: list[Done] = []

    def kill_first(what: str, done: int, total: int, note: str = "", /) -> None:
        if done >= 2 and not killed:
            (worker,) = engine._workers
            killed.append(worker.process.pid)
            os.kill(worker.process.pid, signal.SIGKILL)

    killed: list[int] = []
    with Workers(1) as engine:
        driven = drive([task("a", 1.0), task("b")], engine, finished=told.append, progress=kill_first)
    assert sorted(str(done.value["say"]) for done in driven.done) == ["a", "b"]
    assert max(done.attempts for done in told) == 2
    assert driven.done[0].value["pid"] != killed[0]


def test_a_task_that_always_kills_its_worker_is_given_up_and_says_how() -> None:
    def kill(what: str, done: int, total: int, note: str = "", /) -> None:
        for worker in engine._workers:
            os.kill(worker.process.pid, signal.SIGKILL)

    with Workers(1) as engine:
        driven = drive([task("a", 5.0)], engine, progress=kill, retries=1)
    assert [done.attempts for done in driven.failed] == [2]
    assert "was killed by signal 9 (out of memory?)" in driven.failed[0].error


def test_memory_is_shared_out() -> None:
    with Workers(2, memory=10) as engine:
        tasks = [task(name, 0.3, memory=6) for name in "ab"]
        driven = drive(tasks, engine)
        assert len({done.value["pid"] for done in driven.done}) == 1  # never two at once
        with pytest.raises(ValueError, match=r"can never run here: it may take 1\.1e-08 GB, and the workers"):
            drive([task("large", memory=11)], engine)
    for wrong in ({"count": 0}, {"count": 1, "memory": 0}):
        with pytest.raises(ValueError, match=r"workers"):
            Workers(**wrong)


def test_mistakes_come_back_in_words() -> None:
    with Workers(1) as engine:
        bad = task("bad", payload={"error": "no such folder"})
        driven = drive([bad, task("good")], engine)
    assert [done.error for done in driven.failed] == ["no such folder"]
    assert [done.value["say"] for done in driven.done] == ["good"]


def test_a_mistake_is_not_taken_for_a_lost_worker() -> None:
    with Workers(1) as engine:
        driven = drive([task("odd", payload={"seconds": None}), task("good", value=-1)], engine)
        assert engine._started == 1  # the same process did both
    assert [(done.attempts, done.lost) for done in driven.failed] == [(1, False)]
    assert "TypeError" in driven.failed[0].error
    assert [done.value["say"] for done in driven.done] == ["good"]


def test_the_start_of_a_process_is_not_counted_to_its_task() -> None:
    """Torch alone takes a second and more to load, and estimates are corrected by these times."""
    words: list[float] = []
    with Workers(1) as engine:
        (done,) = drive([task("a", 0.2)], engine, progress=lambda *word: words.append(time.monotonic())).done
        ended = time.monotonic()
    assert 0.2 <= done.seconds < ended - words[0] + 0.5  # its first word is its first act


def test_gpus_are_dealt_out_and_too_many_workers_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert local_workers(0, memory=None, share=0.25, device="cuda").slots == 8
    assert local_workers(3, memory=None, share=0.5, device="cuda").slots == 3
    assert local_workers(0, memory=None, share=1.0, device="cuda:1").slots == 1
    with pytest.raises(ValueError, match=r"5 workers of 0.5 GPUs each do not fit on 2 GPUs: at most 4"):
        local_workers(5, memory=None, share=0.5, device="cuda")
    assert local_workers(0, memory=None, share=0.0, device="cpu").slots == cores()


def test_a_worker_sees_the_gpu_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers count what this process may see."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _gpu_name(1) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-8932f937")
    assert [_gpu_name(0), _gpu_name(1)] == ["2", "GPU-8932f937"]


ORPHAN = """
import sys, threading, time
from friends.bench.grid.engines import Workers
from friends.bench.grid.tasks import Task
engine = Workers(1)
engine.start(Task(name="a", call="friends.bench.grid.tasks:hello", payload={"seconds": 60}))
def word(what, done, total, note=""):
    print(engine._workers[0].process.pid, flush=True)
while True:
    engine.wait(60, word)
"""


def test_workers_end_with_the_process_that_started_them() -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {child} is still there")


@pytest.mark.parametrize("engine", [Inline(), Workers(2)], ids=["inline", "workers"])
def test_records_do_not_depend_on_the_engine(engine: Engine, tmp_path: Path) -> None:
    grid = read_grid("table1", "smoke").narrowed(only=["friends-b", "deep-knn"])
    bench = Workbench(Artifacts(tmp_path / "expected"))
    expected = {cell.row.name: bench.record(cell).essence() for cell in grid.cells()}
    payload = {"cache": str(tmp_path / "cache"), "device": "cpu"}
    tasks = tasks_of(plan(grid, Workbench(Artifacts(tmp_path / "cache"))), payload)
    with engine:
        driven = drive(tasks, engine)
    assert not driven.failed
    records = [record_of(done) for done in driven.done if done.task.name.startswith("cell ")]
    assert {record.defense: record.essence() for record in records} == expected
    made = [artifact.kind for artifact in Artifacts(tmp_path / "cache").list()]
    assert made.count("poison") == 1
    assert made.count("victim") == len(expected) == 4
