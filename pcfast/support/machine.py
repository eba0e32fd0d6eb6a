"""What a result was computed on."""

from __future__ import annotations

import platform

import torch

from .._version import __version__


def describe_machine(device: torch.device) -> dict:
    """Versions, and the processor that ``device`` is, in plain values."""
    return {
        "pcfast": __version__,
        "torch": str(torch.__version__),  # a subclass of str, which weights_only refuses
        "python": platform.python_version(),
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The processor's name as Linux tells it; elsewhere its architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
