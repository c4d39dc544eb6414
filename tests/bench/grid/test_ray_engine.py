"""A real cluster of two nodes on this machine: work on both, a node killed in the middle, the same records."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from friends.bench.grid.drive import drive
from friends.bench.grid.engines import Inline
from friends.bench.grid.plan import plan, tasks_of
from friends.bench.grid.ray_engine import RayEngine, perform
from friends.bench.grid.run import record_of
from friends.bench.grid.spec import Grid, read_grid
from friends.bench.grid.stages import Workbench
from friends.bench.grid.tasks import Done, Engine, Task
from friends.data.artifacts import Artifacts
from friends.types import Progress

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
NODE: dict[str, Any] = {"num_cpus": 1, "memory": 4 * 10**9, "object_store_memory": 80 * 10**6}
HELLO = "friends.bench.grid.tasks:hello"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head of one core, as far as Ray knows; it outlives the nodes that the tests add and kill."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_DEDUP_LOGS", "0")
        patched.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patched.setenv("RAY_health_check_period_ms", "500")
        patched.setenv("RAY_health_check_failure_threshold", "3")
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        try:
            yield cluster
        finally:
            cluster.shutdown()


def task(name: str, seconds: float = 0.0, **changes: object) -> Task:
    payload = {"say": name, "seconds": seconds}
    return Task(**{"name": name, "call": HELLO, "payload": payload, "memory": 10**8, **changes})  # type: ignore[arg-type]


def grid_tasks(grid: Grid, cache: Path) -> list[Task]:
    payload = {"cache": str(cache), "device": "cpu"}
    return tasks_of(plan(grid, Workbench(Artifacts(cache))), payload)


def essences(done: list[Done]) -> dict[str, object]:
    records = [record_of(one) for one in done if one.task.name.startswith("cell ")]
    return {f"{record.defense} {record.seed}": record.essence() for record in records}


class Killing(RayEngine):
    """Kills a node as soon as a task runs on it; what only waits for a process there, Ray would move by itself."""

    cluster: Any
    node: Any
    killed = False

    def wait(self, timeout: float, progress: Progress) -> list[Done]:
        if not self.killed and works(self.node):
            self.killed = True
            self.cluster.remove_node(self.node, allow_graceful=False)
        return super().wait(0.2, progress)


def works(node: Any) -> bool:
    """Whether a process of a node is at one of our tasks: Ray names its processes after what they do."""
    raylet = str(node.all_processes["raylet"][0].process.pid)
    listed = subprocess.run(["ps", "-A", "-o", "ppid=,args="], capture_output=True, text=True, check=True).stdout
    children = [line.split(maxsplit=1) for line in listed.splitlines() if line.split()[:1] == [raylet]]
    return any(child[-1].startswith("ray::work") for child in children)


def test_a_cluster_that_loses_a_node_ends_with_the_same_records(cluster: Any, tmp_path: Path) -> None:
    second = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    grid = read_grid("table1", "smoke").narrowed(only=["friends-b", "deep-knn", "dp-sgd"], seeds=[0, 1])
    expected = essences(drive(grid_tasks(grid, tmp_path / "inline"), Inline()).done)
    assert len(expected) == 2 * len({cell.row.name for cell in grid.cells()})
    ended: list[Done] = []

    def finished(done: Done) -> None:
        ended.append(done)
        if len(ended) == 3:
            cluster.remove_node(second, allow_graceful=False)

    tasks = grid_tasks(grid, tmp_path / "ray")
    with RayEngine(cluster.address) as engine:
        assert isinstance(engine, Engine)
        assert engine.slots == 2
        driven = drive(tasks, engine, finished=finished, retries=3)
        limit = time.monotonic() + 30
        while engine.slots > 1 and time.monotonic() < limit:  # Ray needs a moment to see that a node is gone
            time.sleep(0.2)
        assert engine.slots == 1
    assert [done.error for done in driven.failed] == []
    assert essences(driven.done) == expected
    made = [artifact.kind for artifact in Artifacts(tmp_path / "ray").list()]
    assert made.count("poison") == 2
    assert made.count("victim") == len(expected)
    assert Artifacts(tmp_path / "ray").check() == []


def test_both_nodes_work_and_a_task_is_never_blamed_for_its_node(cluster: Any) -> None:
    second = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    ended: list[Done] = []
    tasks = [task(f"work {i}", 2.0, value=-i) for i in range(4)]
    with Killing(cluster.address) as engine:
        engine.cluster, engine.node = cluster, second
        problem = engine.problem(task("large", memory=10**12))
        assert "it needs 1 cores, 0 GPUs and 1e+03 GB" in problem
        assert "GPU" in engine.problem(task("gpu", gpus=0.5))
        driven = drive(tasks, engine, finished=ended.append, retries=3)
        assert engine.killed
        wrong = drive([task("wrong", payload={"error": "no such thing"})], engine)
    assert sorted(str(done.value["say"]) for done in driven.done) == [f"work {i}" for i in range(4)]
    assert sorted(done.attempts for done in ended) == [1, 1, 1, 2]  # what ran on the node was run again, once
    assert [done.error for done in wrong.failed] == ["no such thing"]
    assert [done.attempts for done in wrong.failed] == [1]


def test_other_code_on_a_machine_is_refused() -> None:
    said = perform("a", HELLO, {}, "another digest")
    assert "has other code of friends" in said["error"]
    assert said["value"] == {}


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'friends\[ray\]'"):
        RayEngine()
