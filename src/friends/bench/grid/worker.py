"""A process that does tasks: lines of JSON come in, lines of JSON go out, until the process that started it is gone.

``python -m friends.bench.grid.worker THREADS``
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from typing import Any

PROGRESS_EVERY = 0.25
"""Seconds between two words on how far it is."""


def serve(threads: int) -> None:
    """Do one task after the other."""
    # Whatever else is printed goes to the log, not among the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    orders: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    import torch

    from friends.bench.grid.engines import attempt
    from friends.bench.grid.tasks import Task

    torch.set_num_threads(threads)
    told = 0.0

    def progress(what: str, done: int, total: int, note: str = "", /) -> None:
        nonlocal told
        now = time.monotonic()
        if done >= total or now - told > PROGRESS_EVERY:
            told = now
            print(json.dumps({"progress": [what, done, total, note]}), file=answers, flush=True)

    while True:
        order = orders.get()
        task = Task(name=order["name"], call=order["call"], payload=order["payload"])
        ended = attempt(task, progress, "worker")
        answer = {"value": dict(ended.value), "error": ended.error, "seconds": ended.seconds}
        print(json.dumps(answer), file=answers, flush=True)


def _listen(orders: queue.Queue[dict[str, Any]]) -> None:
    """Take orders; when nobody can give any more, end at once, whatever is being done: it has its checkpoints."""
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
