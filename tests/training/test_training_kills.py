"""A training killed with SIGKILL at random moments, again and again, ends with the bytes of one that ran through."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import sys, hashlib
from pathlib import Path
import torch
torch.set_num_threads(1)
from friends.data.images import LabeledImages
from friends.defenses import Friends
from friends.models import build
from friends.training import Recipe, fit
from friends.types import Streams

g = torch.Generator().manual_seed(0)
y = torch.randint(3, (240,), generator=g)
x = (torch.randint(0, 120, (240, 3, 16, 16), generator=g) + 40 * y[:, None, None, None]).to(torch.uint8)
data = LabeledImages(x, y, ("a", "b", "c"))
make = lambda g: build("convnet", shape=(3, 16, 16), classes=3, moments=data.moments, width=8, generator=g)
print("ready", flush=True)
fitted = fit(data, make, recipe=Recipe(epochs=10, batch=32, lr=0.02), defenses=[Friends(def_epoch=3)],
             streams=Streams(7), checkpoint=Path(sys.argv[1]), checkpoint_seconds=0)
sha = hashlib.sha256()
for name, value in sorted(fitted.model.state_dict().items()):
    sha.update(name.encode() + value.numpy().tobytes())
sha.update(fitted.memory[0]["friendly"].numpy().tobytes())
print("digest", sha.hexdigest(), [round(line["loss"], 9) for line in fitted.history], flush=True)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )


def finish(folder: Path) -> tuple[str, float]:
    process = start(folder)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    clock = time.perf_counter()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return out, time.perf_counter() - clock


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_ten_kills_do_not_change_a_byte(tmp_path: Path) -> None:
    expected, seconds = finish(tmp_path / "whole")
    assert expected.startswith("digest ")
    chance = random.Random(hashlib.sha256(b"kills").digest())
    kills = 0
    for _ in range(60):
        process = start(tmp_path / "killed")
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0, 0.35 * seconds))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        process.stdout.close()
        if kills >= 10:
            break
        if process.returncode == 0:  # it finished before the kill: start over in a new folder
            break
    while kills < 10:  # what is left of the ten, each on a fresh training
        fresh = tmp_path / f"again-{kills}"
        process = start(fresh)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.8 * seconds))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        kills += 1
        assert finish(fresh)[0] == expected
    assert kills >= 10
    assert finish(tmp_path / "killed")[0] == expected
    leftovers = [p.name for p in (tmp_path / "killed").iterdir() if p.name.startswith("memory")]
    assert len(leftovers) == 1
