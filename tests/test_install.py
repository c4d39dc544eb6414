"""What can go wrong while installing is said in one line. Played with a stand-in for Python, since the script is sh."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "install.sh"

FAKE = """#!/bin/sh
case "$*" in
    --version) echo "Python 3.${MINOR}.1" ;;
    *version_info*) [ "${MINOR}" -ge 10 ] ;;
    *"-m venv"*) [ -z "${NO_VENV}" ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *"-m pip"*) [ -z "${PIP_SAYS}" ] || { echo "${PIP_SAYS}"; exit 1; } ;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("sh") is None, reason="needs a POSIX shell")


def install(folder: Path, *, python: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    fake = folder / "python3"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    variables = {**os.environ, "MINOR": "11", "NO_VENV": "", "PIP_SAYS": "", **environment}
    command = ["sh", str(SCRIPT), python or str(fake), str(folder / "venv")]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder, timeout=60)


def test_success_leaves_the_mark_that_make_looks_for(tmp_path: Path) -> None:
    assert install(tmp_path).returncode == 0
    assert (tmp_path / "venv" / "installed").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MINOR": "9"}, "Python 3.9.1 is too old: Python 3.10 or newer is needed"),
        ({"NO_VENV": "1"}, "install Python's venv module"),
        ({"PIP_SAYS": "error: command 'gcc' failed: No such file or directory"}, "no C compiler was found"),
        ({"PIP_SAYS": "error: command '/usr/bin/x86_64-linux-gnu-gcc' failed with exit code 1"}, "no C compiler"),
        (
            {"PIP_SAYS": "NewConnectionError(': Failed to establish a new connection: Name or service not known')"},
            "the package index cannot be reached",
        ),
        ({"PIP_SAYS": "ERROR: [Errno 28] No space left on device"}, "the disk is full"),
        ({"PIP_SAYS": "ERROR: ResolutionImpossible"}, "pip failed: ERROR: ResolutionImpossible"),
    ],
)
def test_every_failure_is_one_line(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    done = install(tmp_path, **environment)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "venv" / "installed").exists()


def test_no_python_at_all(tmp_path: Path) -> None:
    done = install(tmp_path, python="python-that-is-not-there")
    assert done.returncode == 1
    assert done.stderr.startswith("install: no 'python-that-is-not-there' on this machine")
