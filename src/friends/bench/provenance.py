"""With what a result was made: versions, device and commit. Nothing that names a person or a machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from friends._version import __version__

_LIBRARIES = ("numpy", "scipy", "pillow", "safetensors", "scikit-learn")
_PACKAGE = Path(__file__).resolve().parent.parent


def versions() -> dict[str, str]:
    """The versions of everything that a number may depend on, by name; libraries that are absent are left out."""
    found = {"friends": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found | {name: number for name in _LIBRARIES if (number := _version(name))}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def device_name(device: torch.device | str) -> str:
    """What computes, e.g. ``"NVIDIA A40"`` or the processor's model name; never the name of the machine."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} ({platform.machine()})"
    return _cpu_model(Path("/proc/cpuinfo")) or platform.processor() or platform.machine() or "unknown processor"


def _cpu_model(cpuinfo: Path) -> str:
    """The first "model name" of a Linux processor list, or nothing."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "")


def commit(package: Path = _PACKAGE) -> str:
    """The short commit of the checkout that this package is imported from, with ``"-dirty"`` if it was edited.

    Empty when the package is installed, not checked out: also inside somebody else's repository, whose commit says
    nothing about this code. Edited means that any file of the package differs from the commit, or is new.
    """
    if not _git(package, "ls-files", "--", "__init__.py"):
        return ""
    short = _git(package, "rev-parse", "--short=10", "HEAD")
    return f"{short}-dirty" if short and _git(package, "status", "--porcelain", "--", ".") else short


def _git(folder: Path, *arguments: str) -> str:
    """What git says about ``folder``, or nothing: no git, no repository, no commit, no permission."""
    # a git hook sets GIT_DIR, which would send the question to another repository
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
