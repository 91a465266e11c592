"""Where networks run: how each target's file is written, read again and run."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from equiflop.deploy.targets.base import Runner, Settings, Target
from equiflop.deploy.targets.executorch import ExecuTorch
from equiflop.deploy.targets.onnx import Onnx
from equiflop.deploy.targets.openvino import OpenVino
from equiflop.deploy.targets.torch_export import Aoti, TorchExport
from equiflop.extras import check_installed

__all__ = ["TARGETS", "Runner", "Settings", "Target", "quiet", "target_of"]

#: The targets by name.
TARGETS: dict[str, Target] = {
    "onnx": Onnx(),
    "openvino": OpenVino(),
    "executorch": ExecuTorch(),
    "torch-export": TorchExport(),
    "aoti": Aoti(),
}


def target_of(name: str, precision: str) -> Target:
    """The target of a name.

    Raises:
        ValueError: if there is none, or it does not know the precision.
        ImportError: if a package that it needs is missing.
    """
    if name not in TARGETS:
        raise ValueError(f"to={name!r} is unknown; choose from {', '.join(TARGETS)}")
    target = TARGETS[name]
    if precision not in target.precisions:
        raise ValueError(f"precision={precision!r} is not one of {name}'s; choose from {', '.join(target.precisions)}")
    needed = (*target.packages, *(target.packages_of_int8 if precision == "int8" else ()))
    for package in needed:
        check_installed(package, target.extra, f"to={name!r}")
    return target


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk of their steps: nothing of it on standard output, and no warnings, which are about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
