"""Photographs are decoded once for all trials of a process: 60,000 of them take longer than many a trial."""

from __future__ import annotations

import functools

import pytest

from friends.data import sources

decoded = functools.cache(sources.load)


@pytest.fixture(autouse=True)
def _decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "load", decoded)
