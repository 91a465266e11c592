"""Numbers that networks are made with."""

from __future__ import annotations


def check_sizes(depth: int, widths: dict[str, int]) -> None:
    """See that a number of blocks and widths are possible.

    Raises:
        ValueError: if not.
    """
    if depth < 0:
        raise ValueError(f"depth={depth} is negative; it is the number of blocks")
    for argument, width in widths.items():
        if width < 1:
            raise ValueError(f"{argument}={width} is not positive; it must be at least 1")
