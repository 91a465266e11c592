"""Ctrl-C and SIGTERM as a wish to stop, which a loop can grant at a good moment."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Within the ``with`` block the first SIGINT or SIGTERM is noted; SIGINT then acts as usual again.

    Signals reach only the main thread; in another one the block changes nothing.
    """

    def __init__(self) -> None:
        self._noted: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def requested(self) -> signal.Signals | None:
        """The signal that came, if one did."""
        return self._noted

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = signal.Signals(number)
        if signal.SIGINT in self._previous:  # launchers may send SIGTERM more than once; Ctrl-C twice is meant
            signal.signal(signal.SIGINT, self._previous.pop(signal.SIGINT))  # type: ignore[arg-type]
        os.write(2, b"\nstopping after this step (Ctrl-C to stop at once)\n")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}


def leave_signals_to_the_parent(worker: int) -> None:
    """For a loader's workers: what asks a training to stop reaches them too, but they are still needed then."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
