"""SHA-256 sums of files, each in a file beside it that ``sha256sum -c`` reads."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from equiflop.files import write_text


def checksum_file(path: Path) -> Path:
    """Where the checksum of a file stands."""
    return path.with_name(f"{path.name}.sha256")


def write_checksum(path: Path) -> None:
    """Write the checksum of a file.

    Raises:
        OSError: if it cannot be written.
    """
    write_text(checksum_file(path), f"{_sha256(path)}  {path.name}\n")


def verify(path: Path) -> None:
    """See that a file is the one whose checksum was written.

    Raises:
        ValueError: if it is another one, or the checksum is missing or damaged.
    """
    beside = checksum_file(path)
    try:
        noted = beside.read_text(encoding="utf-8", errors="replace").split()
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: no checksum {beside.name} beside it; if you trust the file: sha256sum {path.name} > {beside.name}"
        ) from error
    if not noted or not re.fullmatch("[0-9a-fA-F]{64}", noted[0]):
        raise ValueError(f"{beside}: does not begin with a SHA-256 sum of 64 hexadecimal digits")
    found = _sha256(path)
    if found != noted[0].lower():
        raise ValueError(
            f"{path}: SHA-256 {found[:12]}... where {beside.name} notes {noted[0][:12].lower()}...: damaged"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
