"""Tasks on a cluster through Ray: the extra ``friends[ray]``.

Ray decides on which machine a task runs; needs, claims and values are ours (:mod:`friends.bench.grid.drive`). Nothing
travels but plain values: artifacts are in a folder that all machines see, or behind a URL.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Mapping
from typing import Any, cast

from friends.bench.grid.engines import attempt
from friends.bench.grid.tasks import Done, Task, code_of_worker
from friends.types import Progress, silent


def perform(name: str, call: str, payload: Mapping[str, Any], code: str) -> dict[str, Any]:
    """Run a task on whatever machine this is; refuses with other code than the driver's."""
    import platform

    import torch

    worker = platform.node()
    if code_of_worker() != code:
        error = (
            f"{worker} has other code of friends than the machine that drives the grid: install the same version on all"
        )
        return {"value": {}, "error": error, "seconds": 0.0, "worker": worker}
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    done = attempt(Task(name=name, call=call, payload=payload), silent, worker)
    return {"value": dict(done.value), "error": done.error, "seconds": done.seconds, "worker": worker}


class RayEngine:
    """A Ray cluster.

    Args:
        address: of a running cluster, such as ``"auto"`` or ``"ray://head:10001"``; ``None`` starts one on this
            machine alone.
        settings: handed to ``ray.init``.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
    """

    def __init__(self, address: str | None = None, **settings: Any) -> None:
        try:
            import ray
        except ImportError:
            raise ModuleNotFoundError("the engine ray needs Ray: pip install 'friends[ray]'") from None
        self._ray: Any = ray
        self._owner = not ray.is_initialized()
        if self._owner:
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            # Without an address Ray would join any cluster that it finds on this machine.
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **settings)
        self._code = code_of_worker()
        self._running: dict[Any, tuple[Task, float]] = {}
        self._remote = ray.remote(perform)

    @property
    def resources(self) -> dict[str, float]:
        """What all machines of the cluster have now: ``CPU``, ``GPU``, ``memory``."""
        return cast("dict[str, float]", self._ray.cluster_resources())

    @property
    def slots(self) -> int:
        """Processor cores of the cluster."""
        return max(1, int(self.resources.get("CPU", 1)))

    def problem(self, task: Task) -> str:
        """Whether no machine of the cluster is large enough for a task."""
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if any(_holds(node, task) for node in alive):
            return ""
        largest = {name: max((node.get(name, 0.0) for node in alive), default=0.0) for name in ("CPU", "GPU", "memory")}
        return (
            f"it needs {task.cpus:g} cores, {task.gpus:g} GPUs and {task.memory / 1e9:.3g} GB, and the most that a "
            f"machine of the cluster has is {largest['CPU']:g}, {largest['GPU']:g} and {largest['memory'] / 1e9:.3g} GB"
        )

    def fits(self, task: Task) -> bool:
        """Whether the cluster has room beside what was handed to it, by the sum of its resources."""
        have = self.resources
        running = [other for other, _ in self._running.values()]
        for name, of in (("CPU", "cpus"), ("GPU", "gpus"), ("memory", "memory")):
            needed = sum(getattr(other, of) for other in (*running, task))
            if needed > have.get(name, 0.0) + 1e-9:
                return False
        return True

    def start(self, task: Task) -> None:
        """Hand a task to Ray, which waits for room on one machine if need be."""
        threads = str(max(1, math.ceil(task.cpus)))
        remote = self._remote.options(
            name=task.name,
            num_cpus=task.cpus,
            num_gpus=task.gpus,
            memory=task.memory,
            max_retries=0,  # lost ones are ours to try again
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
        )
        one = {"device": "cuda"} if task.gpus else {}  # Ray shows a task the GPU that it may use
        handle = remote.remote(task.name, task.call, {**task.payload, **one}, self._code)
        self._running[handle] = (task, time.monotonic())

    def wait(self, timeout: float, progress: Progress) -> list[Done]:
        """The tasks that have ended, or lost their machine."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout)
        return [self._end(handle) for handle in ready]

    def _end(self, handle: Any) -> Done:
        task, begun = self._running.pop(handle)
        seconds = time.monotonic() - begun
        try:
            said = cast("dict[str, Any]", self._ray.get(handle))
        except self._ray.exceptions.RayTaskError as error:  # of the task itself: another machine will not help
            return Done(task=task, error=str(error), seconds=seconds, worker="a worker of Ray")
        except self._ray.exceptions.RayError as error:  # its worker or machine is gone, or out of memory
            words = f"lost with its worker ({type(error).__name__}): {error}"
            return Done(task=task, error=words, lost=True, seconds=seconds, worker="a worker of Ray")
        return Done(
            task=task, value=said["value"], error=said["error"], seconds=said["seconds"], worker=str(said["worker"])
        )

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *error: object) -> None:
        """Stop what runs, and leave the cluster; one that was started here ends."""
        for handle in self._running:
            with contextlib.suppress(Exception):  # it may have ended, or its machine
                self._ray.cancel(handle, force=True)
        self._running.clear()
        if self._owner:
            self._ray.shutdown()


def _holds(node: Mapping[str, float], task: Task) -> bool:
    """Whether one machine has what a task needs."""
    needed = {"CPU": task.cpus, "GPU": task.gpus, "memory": task.memory}
    return all(node.get(name, 0.0) + 1e-9 >= amount for name, amount in needed.items())
