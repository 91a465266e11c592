"""Files that figures are drawn into."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from equiflop.extras import check_installed
from equiflop.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = ("png", "svg", "pdf")


def check_figure_file(output: Path, argument: str) -> None:
    """See, before anything is drawn, that a figure can be written.

    Args:
        output: the file.
        argument: that names it, for the message.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the file is not an image of a known kind.
    """
    if _kind(output) not in _FORMATS:
        raise ValueError(f"{argument}={str(output)!r} must end with .{', .'.join(_FORMATS)}")
    check_installed("matplotlib", "demo", "a figure")


def save_figure(figure: Figure, output: Path) -> None:
    """Write a figure.

    Raises:
        OSError: if it cannot be written; what was there before is then intact.
    """
    write_atomically(output, lambda file: figure.savefig(file, format=_kind(output), dpi=120))


def _kind(output: Path) -> str:
    return output.suffix.lower().removeprefix(".")
