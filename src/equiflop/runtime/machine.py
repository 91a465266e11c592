"""What a measurement was made on and with."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import timm
import torch


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """Hardware, versions and command, as plain values for JSON.

    Args:
        device: where it ran; a GPU is named.
    """
    import equiflop

    hardware: dict[str, Any] = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if device is not None and device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    return {
        "hardware": hardware,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "equiflop": equiflop.__version__,
            "system": platform.platform(),
        },
        "command": " ".join([program(sys.argv[0]), *sys.argv[1:]]),
    }


def program(started: str) -> str:
    """How a program is called that was started as this: a script by Python, else the command line.

    Of the place of a script that was started by its whole path, its folder remains.
    """
    path = Path(started)
    if path.suffix != ".py" or path.name == "__main__.py":
        return "equiflop"
    return "python " + ("/".join(path.parts[-2:]) if path.is_absolute() else started)


def processor_name() -> str:
    """The processor's name: Linux notes it in /proc/cpuinfo, others tell Python."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
