"""The command ``equiflop``: starts in a moment, and ends with one line on Ctrl-C, whenever that comes.

It is no part of the package: ``import equiflop`` brings PyTorch and timm along, which takes seconds, and ``--help``
does not need them. Where this module is loaded, ``equiflop`` imports its parts when they are used.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_INTERRUPTED = 130
_process = os.getpid()
_noted = False


def main() -> None:
    """Run the command line with the arguments of the process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if the shell has it ignored
        signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _unraisable
    try:
        from equiflop.cli.main import main as command

        command(prog_name="equiflop")
    except KeyboardInterrupt:
        _leave()
    except Exception:  # what a library made of the interrupt
        if _noted:
            _leave()
        raise


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C. An import is not unwound: there is nothing to clean up, and some extensions end with a crash."""
    global _noted
    _noted = True
    if os.getpid() == _process and _importing(frame):
        _leave()
    raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False


def _unraisable(problem: sys.UnraisableHookArgs) -> None:
    """An exception that nothing can catch, such as Ctrl-C while an object is thrown away."""
    if isinstance(problem.exc_value, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(problem)


def _leave() -> NoReturn:
    os.write(2, b"equiflop: interrupted\n")
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
