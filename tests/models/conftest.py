from __future__ import annotations

from collections.abc import Iterator

import pytest
from jaxtyping import config


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch off the type checker that tests run under: a user has only the checks that the code itself makes."""
    before = bool(config.jaxtyping_disable)
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)
