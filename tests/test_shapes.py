"""The shapes and types in our signatures are executed: the main paths run once under a runtime type checker.

In a process of its own, so that the tests of bad input meet our own errors and not the checker's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import importlib, pkgutil, sys
from pathlib import Path
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

tower = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as everywhere in Python
sys.modules["typecheck"] = type(sys)("typecheck")
sys.modules["typecheck"].tower = tower
with install_import_hook("friends", "typecheck.tower"):
    import friends
    for module in pkgutil.walk_packages(friends.__path__, "friends."):
        if module.name not in {"friends.__main__", "friends.cli"}:
            importlib.import_module(module.name)

import numpy as np
import torch
from friends.bench.run import run_trial
from friends.bench.trial import parse_trial
from friends.data import sources
from friends.noise.friendly import friendly_noise

out = Path(sys.argv[1])
torch.set_num_threads(1)
table = {
    "name": "shapes", "controls": 1,
    "data": {"source": "digits", "classes": ["3", "5"], "train": 60, "test": 30},
    "model": {"name": "tiny", "width": 8}, "goals": {"count": 1},
    "pretraining": {"epochs": 1, "batch": 32}, "recipe": {"epochs": 2, "batch": 32},
    "arms": [{"name": "friends-" + r[0], "defenses": [{"name": "friends", "random": r, "def_epoch": 1}]}
             for r in ("bernoulli", "uniform", "gaussian")],
}
for attack, scenario in (("gradient-matching", "scratch"), ("bullseye-polytope", "transfer")):
    settings = {"name": attack, "xi": 0.2, "budget": 0.1, "steps": 2, "restarts": 2}
    report = run_trial(parse_trial({**table, "attack": settings, "scenario": scenario}), out / attack)
    assert len(report.arms) == 5

train, _ = sources.load("digits")
few = train.sample(20, torch.Generator().manual_seed(0))
model = importlib.import_module("friends.models").build(
    "convnet", shape=few.shape, classes=10, moments=few.moments, generator=torch.Generator())
store = friends.NoiseStore.generate(model, few, out / "store", shard_rows=8)
noisy = friends.NoisyDataset([(x.numpy()[0], int(y)) for x, y in zip(few.x, few.y)], store)
assert noisy[3][0].shape == (1, 28, 28)
friends.DeviceNoise(store, "cpu")(few.pixels(), torch.arange(20), torch.Generator())
for norm in ("l2", "l1", "linf", "msq"):
    friendly_noise(model, few.pixels(), norm=norm, steps=2)
try:
    friendly_noise(model, few.x)
except TypeError as error:
    assert "bytes" in str(error) or "Float" in str(error), error
    print("the checker is on:", type(error).__module__)
"""


def test_the_main_paths_keep_their_shapes_and_types(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the checker is on: jaxtyping" in done.stdout
