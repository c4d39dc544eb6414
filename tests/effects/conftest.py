"""What the trials of effects have in common is made once, and nobody watches them.

Sixty thousand photographs take longer to decode than many a trial, the trials of transfer learning start from one
network, and looking at all goals after every epoch can take longer than the training: effects are measured at its end.
"""

from __future__ import annotations

import functools
import os

import pytest

from friends.bench import run, victims
from friends.data import sources
from friends.data.artifacts import Artifacts

decoded = functools.cache(sources.load)


@pytest.fixture(scope="session")
def clean_networks(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """One folder for all processes that test."""
    folder = tmp_path_factory.getbasetemp()
    return Artifacts((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "clean networks")


@pytest.fixture(autouse=True)
def _made_once_and_unwatched(monkeypatch: pytest.MonkeyPatch, clean_networks: Artifacts) -> None:
    monkeypatch.setattr(sources, "load", decoded)
    monkeypatch.setattr(run, "Lab", functools.partial(run.Lab, artifacts=clean_networks))
    monkeypatch.setattr(victims, "watching", lambda *_, **__: lambda model, epoch: {})
