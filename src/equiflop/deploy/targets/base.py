"""What every target is made of: its interface, and the two programs that targets start from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from equiflop.kernels import Form, for_runtimes

#: A file that is ready to run: images ``(B, C, H, W)`` to the output, both float32.
Runner = Callable[[np.ndarray], np.ndarray]

#: The version of ONNX's operators: the first with an operator for attention.
OPSET = 23

#: Largest int8 weight. x86 processors without VNNI (AMD before Zen 4, Intel before Cascade Lake) multiply activations,
#: with 128 added up to 255, by weights, and cut the sum of two such products to 16 bits: 2 * 255 * 64 still fits.
#: Where weights reach 127, sums of one sign are cut and those of the other are not, and mirror images differ.
LARGEST_WEIGHT = 64


@dataclass(frozen=True)
class Settings:
    """How a file is written.

    Attributes:
        precision: of products and weights.
        dynamic_batch: whether a batch of any size goes through.
        dynamic_size: whether images of any size do.
        calibration: for int8, images ``(N, C, H, W)`` by which ranges are found.
        metadata: what is written into the file, as text.
    """

    precision: str
    dynamic_batch: bool
    dynamic_size: bool
    calibration: np.ndarray | None
    metadata: dict[str, str]


class Target(ABC):
    """A place where networks run.

    Attributes:
        precisions: those that it knows.
        packages: what has to be installed, as modules.
        packages_of_int8: what int8 needs besides.
        extra: the extra of equiflop that brings them, or an empty string.
        suffix: of its files.
        dynamic: whether it takes sizes that are not fixed.
    """

    precisions: tuple[str, ...]
    packages: tuple[str, ...] = ()
    packages_of_int8: tuple[str, ...] = ()
    extra: str = ""
    suffix: str
    dynamic: bool = True

    @abstractmethod
    def write(self, network: nn.Module, example: torch.Tensor, path: Path, settings: Settings) -> None:
        """Write a network in the form made for runtimes."""

    @abstractmethod
    def load(self, path: Path, precision: str, threads: int | None = None) -> Runner:
        """Read a file for the processor of this machine."""

    def share(self, path: Path, precision: str) -> float | None:
        """The share of products that run in the precision; None where the target does not tell."""
        return 1.0


def dynamic_shapes(settings: Settings) -> Any:
    """Which axes of the images are free, as ``torch.export`` wants it said."""
    axes: dict[int, Any] = {}
    if settings.dynamic_batch:
        axes[0] = torch.export.Dim("batch", min=1)
    if settings.dynamic_size:
        axes |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    return (axes,) if axes else None


def torch_program(network: nn.Module, example: torch.Tensor, settings: Settings, subtract_means: bool = True) -> Any:
    """The program of ``torch.export`` of a prepared network.

    Args:
        network: as :func:`equiflop.deploy.prepared` makes it.
        example: images ``(B, C, H, W)``.
        settings: its precision and which sizes are free.
        subtract_means: whether norms do; see :func:`equiflop.kernels.for_runtimes`.
    """
    if settings.precision in ("bfloat16", "float16"):
        dtype = getattr(torch, settings.precision)
        network, example = network.to(dtype), example.to(dtype)
    with torch.no_grad(), for_runtimes(subtract_means=subtract_means):
        return torch.export.export(network, (example,), dynamic_shapes=dynamic_shapes(settings))


def onnx_program(
    network: nn.Module,
    example: torch.Tensor,
    settings: Settings,
    opset: int = OPSET,
    form: Form = "joined",
    outputs: Sequence[str] = ("output",),
) -> Any:
    """The ONNX program of a prepared network.

    Args:
        network: as :func:`equiflop.deploy.prepared` makes it.
        example: images ``(B, C, H, W)``.
        settings: its precision and which sizes are free.
        opset: version of ONNX's operators.
        form: of products and heads; see :func:`equiflop.kernels.for_runtimes`.
        outputs: their names.
    """
    with torch.no_grad(), for_runtimes(form, subtract_means=settings.precision != "int8"):
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=list(outputs),
            dynamic_shapes=dynamic_shapes(settings),
            verbose=False,
        )
    assert program is not None
    return program


def batches(images: np.ndarray, size: int) -> list[np.ndarray]:
    """Whole batches of a size."""
    return [images[i : i + size] for i in range(0, len(images) - size + 1, size)]
