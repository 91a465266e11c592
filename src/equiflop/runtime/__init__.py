"""What a process runs on: its device, the processes beside it, the machine, progress on the terminal, and signals."""

from typing import TYPE_CHECKING

from equiflop.lazy import lazily

if TYPE_CHECKING:
    from equiflop.runtime.device import compile_problem, pick_device
    from equiflop.runtime.interrupt import StopRequest
    from equiflop.runtime.machine import describe_machine
    from equiflop.runtime.processes import Processes, leave
    from equiflop.runtime.progress import Progress, Silence, format_seconds

__all__ = [
    "Processes",
    "Progress",
    "Silence",
    "StopRequest",
    "compile_problem",
    "describe_machine",
    "format_seconds",
    "leave",
    "pick_device",
]

__getattr__ = lazily(
    __name__,
    {
        "equiflop.runtime.device": ["compile_problem", "pick_device"],
        "equiflop.runtime.interrupt": ["StopRequest"],
        "equiflop.runtime.machine": ["describe_machine"],
        "equiflop.runtime.processes": ["Processes", "leave"],
        "equiflop.runtime.progress": ["Progress", "Silence", "format_seconds"],
    },
)
