"""Where tasks run on one machine: in this process, or in several that stay and keep their data in memory."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from friends.bench.grid.tasks import Done, Task, resolve
from friends.types import Progress

USER_ERRORS = (ValueError, OSError, ModuleNotFoundError, FloatingPointError)
"""Errors whose message says all: no traceback is shown."""


def attempt(task: Task, progress: Progress, worker: str) -> Done:
    """Run a task here; an error becomes part of how it ended."""
    begun = time.monotonic()
    try:
        value = resolve(task.call)(task.payload, progress)
    except USER_ERRORS as error:
        return Done(task=task, error=str(error), seconds=time.monotonic() - begun, worker=worker)
    except Exception:  # a mistake in one task is no reason to give up the others
        return Done(task=task, error=traceback.format_exc(), seconds=time.monotonic() - begun, worker=worker)
    return Done(task=task, value=value, seconds=time.monotonic() - begun, worker=worker)


class Inline:
    """One task at a time, in this process."""

    slots = 1

    def __init__(self) -> None:
        self._task: Task | None = None

    def fits(self, task: Task) -> bool:
        """Whether nothing waits to be run."""
        return self._task is None

    def problem(self, task: Task) -> str:
        """Nothing is too large: there is only this process."""
        return ""

    def start(self, task: Task) -> None:
        """Take a task; :meth:`wait` runs it."""
        self._task = task

    def wait(self, timeout: float, progress: Progress) -> list[Done]:
        """Run the task that was taken, however long that is."""
        if self._task is None:
            return []
        task, self._task = self._task, None
        return [attempt(task, progress, "here")]

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *error: object) -> None:
        self._task = None


@dataclass
class _Worker:
    """A process that does one task after the other."""

    name: str
    process: subprocess.Popen[str]
    log: IO[str]
    gpu: int | None
    task: Task | None = None
    begun: float = 0.0
    last: tuple[Any, ...] = field(default=())


class Workers:
    """Several processes of this machine.

    Args:
        count: how many.
        memory: bytes that all tasks that run at once may take together, by their estimates; no limit by default.
        gpus: numbers of the GPUs to use; each worker sees one of them alone, in turn; without any, all there are.
        threads: processor threads of each; by default the cores shared evenly.

    Raises:
        ValueError: no worker, or no memory.
    """

    def __init__(self, count: int, *, memory: int | None = None, gpus: Sequence[int] = (), threads: int = 0) -> None:
        if count < 1:
            raise ValueError(f"the number of workers is >= 1, not {count}")
        if memory is not None and memory < 1:
            raise ValueError(f"workers need memory, not {memory} bytes")
        self.slots, self._memory, self._gpus = count, memory, tuple(gpus)
        self._threads = threads or max(1, cores() // count)
        self._workers: list[_Worker] = []
        self._messages: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
        self._started = 0

    def problem(self, task: Task) -> str:
        """Whether a task alone is more than there is memory for."""
        if self._memory is not None and task.memory > self._memory:
            return f"it may take {task.memory / 1e9:.3g} GB, and the workers have {self._memory / 1e9:.3g} GB together"
        return ""

    def fits(self, task: Task) -> bool:
        """Whether a worker is free, and memory for the task."""
        running = [worker.task for worker in self._workers if worker.task is not None]
        if len(running) >= self.slots:
            return False
        return self._memory is None or sum(other.memory for other in running) + task.memory <= self._memory

    def start(self, task: Task) -> None:
        """Hand a task to a free worker; there is one process more if none is."""
        free = [worker for worker in self._workers if worker.task is None]
        worker = free[0] if free else self._hire()
        worker.task, worker.begun = task, time.monotonic()
        one = {} if worker.gpu is None else {"device": "cuda"}  # the only one that it sees
        line = json.dumps({"name": task.name, "call": task.call, "payload": {**task.payload, **one}})
        assert worker.process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone: its reader says so
            worker.process.stdin.write(line + "\n")
            worker.process.stdin.flush()

    def _hire(self) -> _Worker:
        """Start a process."""
        taken = [worker.gpu for worker in self._workers]
        gpu = min(self._gpus, key=taken.count) if self._gpus else None
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads), "MKL_NUM_THREADS": str(self._threads)}
        environment |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": _gpu_name(gpu)}
        log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (closed when the worker ends)
        process = subprocess.Popen(
            [sys.executable, "-m", "friends.bench.grid.worker", str(self._threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us to handle
        )
        self._started += 1
        worker = _Worker(f"worker {self._started}", process, log, gpu)
        self._workers.append(worker)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        return worker

    def _listen(self, worker: _Worker) -> None:
        """Pass on what a worker says, and at last that it says nothing any more."""
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            with contextlib.suppress(ValueError):
                self._messages.put((worker, json.loads(line)))
        self._messages.put((worker, None))

    def wait(self, timeout: float, progress: Progress) -> list[Done]:
        """Listen until a task has ended, at most so long."""
        limit = time.monotonic() + timeout
        while True:
            try:
                worker, message = self._messages.get(timeout=max(0.0, limit - time.monotonic()))
            except queue.Empty:
                return []
            done = self._gone(worker) if message is None else self._said(worker, message, progress)
            if done is not None:
                return [done]

    def _said(self, worker: _Worker, message: dict[str, Any], progress: Progress) -> Done | None:
        task = worker.task
        if task is None:
            return None
        if "progress" in message:
            what, *rest = message["progress"]
            progress(f"{worker.name}: {what}", *rest)
            return None
        worker.task = None
        seconds = float(message["seconds"])  # its own count, without the start of the process
        return Done(task=task, value=message["value"], error=message["error"], seconds=seconds, worker=worker.name)

    def _gone(self, worker: _Worker) -> Done | None:
        """A worker has ended by itself: its task is lost, unless it had none."""
        self._workers.remove(worker)
        code = worker.process.wait()
        worker.log.seek(0)
        said = worker.log.read()[-2000:]
        _close(worker)
        if worker.task is None:
            return None
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        error = f"{worker.name} {how}" + (" (out of memory?)" if code == -9 else "") + (f"\n{said}" if said else "")
        seconds = time.monotonic() - worker.begun
        return Done(task=worker.task, error=error, lost=True, seconds=seconds, worker=worker.name)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        """End all workers, at once: what they were doing has its checkpoints."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
            _close(worker)
        self._workers.clear()


def _close(worker: _Worker) -> None:
    for stream in (worker.process.stdin, worker.log):
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()


def local_workers(count: int, *, memory: int | None, share: float, device: str) -> Workers:
    """Workers for a device: one a core, or on GPUs as many as shares of them.

    Args:
        count: how many; 0 for as many as fit.
        memory: as of :class:`Workers`; by default three quarters of what the machine has.
        share: of a GPU, that one task takes.
        device: ``"cpu"``, ``"cuda"`` for all GPUs, or ``"cuda:1"`` for one.
    """
    gpus = _gpus(device)
    fit = int(len(gpus) / share + 1e-9) if gpus and share > 0 else cores()
    if gpus and count > max(fit, 1):
        raise ValueError(f"{count} workers of {share:g} GPUs each do not fit on {len(gpus)} GPUs: at most {fit}")
    return Workers(count or max(fit, 1), memory=memory or _most_memory(), gpus=gpus)


def cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpu_name(index: int) -> str:
    """What ``CUDA_VISIBLE_DEVICES`` calls the GPU that this process knows by a number: it may see only some itself."""
    seen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return seen[index] if seen else str(index)


def _gpus(device: str) -> list[int]:
    if not device.startswith("cuda"):
        return []
    import torch

    return [int(device[5:])] if device.startswith("cuda:") else list(range(torch.cuda.device_count()))


def _most_memory() -> int | None:
    try:
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 0.75)
    except (AttributeError, ValueError, OSError):  # Windows
        return None
