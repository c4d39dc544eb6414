"""How much energy a stretch of work took, where the device tells.

An NVIDIA GPU counts the millijoules that it has drawn; on Linux the counters of ``powercap`` do so for the processor,
if the system lets us read them. Both count the whole device: what other processes used at the same time is in the
number, too.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

import torch

POWERCAP = Path("/sys/class/powercap")


class Meter(contextlib.AbstractContextManager["Meter"]):
    """Reads the counters when a block begins and when it ends.

    After the block :attr:`joules` has what was drawn between, by device: ``{"gpu": ..., "cpu": ...}``; a device that
    does not tell is not in it.

    Args:
        device: the one that works; the counter of a GPU is read only if it is one.
        powercap: where Linux shows the counters of the processor.
    """

    def __init__(self, device: torch.device | None = None, *, powercap: Path = POWERCAP) -> None:
        self.joules: dict[str, float] = {}
        self._device, self._powercap = device or torch.device("cpu"), powercap
        self._before: dict[str, float] = {}

    def __enter__(self) -> Meter:
        self._before = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        after = self._now()
        drawn = {name: after[name] - before for name, before in self._before.items() if name in after}
        # A counter that went backwards has overflowed or was reset: the difference says nothing.
        self.joules = {name: round(value, 1) for name, value in drawn.items() if value >= 0}

    def _now(self) -> dict[str, float]:
        """Joules drawn since some fixed moment."""
        counters = {"cpu": _processor(self._powercap), "gpu": _gpu(self._device)}
        return {name: value for name, value in counters.items() if value is not None}


def _processor(folder: Path) -> float | None:
    """The sum over the packages of the processor; ``None`` if the system has no such counters or hides them."""
    try:
        packages = sorted(folder.glob("intel-rapl:[0-9]*/energy_uj"))
        # intel-rapl:0:1 and the like are parts of intel-rapl:0.
        counts = [int(file.read_text()) for file in packages if file.parent.name.count(":") == 1]
    except (OSError, ValueError):
        return None
    return sum(counts) / 1e6 if counts else None


def _gpu(device: torch.device) -> float | None:
    """The counter of a GPU, through the management library where it is installed."""
    if device.type != "cuda":
        return None
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()  # pyright: ignore[reportUnknownMemberType]
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    except Exception:  # no driver, no permission, an old card: no number
        return None
