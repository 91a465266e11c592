"""A line that shows how far long work has come."""

from __future__ import annotations

import io
import sys
import time
from typing import TextIO

_REDRAW_S = 0.2
_PLAIN_LINE_S = 30.0


class Progress:
    """One line that redraws itself on a terminal, and a plain line every half minute elsewhere.

    Args:
        label: what the work is.
        stream: where to write; by default standard error.
    """

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self.label = label
        self.stream = stream if stream is not None else sys.stderr
        self.live = self.stream.isatty()
        self.started = time.perf_counter()
        self.first_done: int | None = None
        self.drawn = self.started
        self.width = 0

    def update(self, done: int, total: int, text: str) -> None:
        """Say that ``done`` of ``total`` are done, and how long the rest will take at the pace so far."""
        now = time.perf_counter()
        if self.first_done is None:
            self.first_done, self.started = done, now
        pace = (done - self.first_done) / max(now - self.started, 1e-9)
        left = f"  {format_seconds((total - done) / pace)} left" if pace > 0 else ""
        self.note(f"{100 * done / total:3.0f} %  {text}{left}")

    def note(self, text: str) -> None:
        """Show ``text`` beside the label, unless something was shown a moment ago."""
        now = time.perf_counter()
        if now - self.drawn >= (_REDRAW_S if self.live else _PLAIN_LINE_S):
            self.drawn = now
            self._write(f"{self.label}  {text}")

    def clear(self) -> None:
        """Remove the live line, so that something else can be printed."""
        if self.live and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.stream.flush()
            self.width = 0

    def print(self, line: str) -> None:
        """Print a line that stays."""
        self.clear()
        self.stream.write(line + "\n")
        self.stream.flush()

    def _write(self, line: str) -> None:
        if not self.live:
            self.print(line)
            return
        self.stream.write("\r" + line.ljust(self.width))
        self.stream.flush()
        self.width = len(line)


class Silence(Progress):
    """Shows nothing: for processes beside the first."""

    def __init__(self) -> None:
        super().__init__("", io.StringIO())

    def _write(self, line: str) -> None:
        pass

    def print(self, line: str) -> None:
        """Say nothing."""


def format_seconds(seconds: float) -> str:
    """A duration for people: ``"42 s"``, ``"3 min 05 s"``, ``"2 h 10 min"``.

    >>> format_seconds(185)
    '3 min 05 s'
    """
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
