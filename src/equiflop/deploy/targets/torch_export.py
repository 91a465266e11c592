"""PyTorch's own files: programs of ``torch.export``, and packages that Inductor compiled ahead of time."""

from __future__ import annotations

import io
import json
import re
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from equiflop.deploy.targets.base import Runner, Settings, Target, dynamic_shapes, torch_program


class TorchExport(Target):
    """Programs of ``torch.export``."""

    precisions = ("float32", "bfloat16", "float16", "int8")
    packages_of_int8 = ("torchao",)
    extra = "torchao"
    suffix = ".pt2"

    def write(self, network: nn.Module, example: torch.Tensor, path: Path, settings: Settings) -> None:
        program, whole = _program_of(network, example, settings), io.BytesIO()
        torch.export.save(program, whole, extra_files={"equiflop.json": json.dumps(settings.metadata)})
        path.write_bytes(whole.getbuffer())  # torch's own writer ends the process where the disk is full

    def load(self, path: Path, precision: str, threads: int | None = None) -> Runner:
        return _torch_runner(self._program(path, precision).module(), precision)

    def share(self, path: Path, precision: str) -> float | None:
        """For int8, what the program says: a compiler multiplies integers, plain PyTorch what they stand for."""
        if precision != "int8":
            return super().share(path, precision)
        from equiflop.deploy.targets.pt2e import share_of

        return share_of(self._program(path, precision))

    def _program(self, path: Path, precision: str) -> Any:
        if precision == "int8":
            import torchao.quantization.pt2e  # noqa: F401  (brings the operators)
        return torch.export.load(str(path))


#: Calls of products in what Inductor writes.
AOTI_PRODUCTS = r"aoti_torch_cpu_+(?:qlinear|qconv|addmm|mm|bmm|mkldnn|linear|convolution|scaled_dot_product)\w*\("


class Aoti(Target):
    """Packages compiled ahead of time by Inductor (AOTInductor), for processors like this one."""

    precisions = ("float32", "bfloat16", "int8")
    packages_of_int8 = ("torchao",)
    extra = "torchao"
    suffix = ".pt2"

    def write(self, network: nn.Module, example: torch.Tensor, path: Path, settings: Settings) -> None:
        import torch._inductor

        program = _program_of(network, example, settings)
        options: dict[str, Any] = {"aot_inductor.metadata": settings.metadata}
        if settings.precision == "int8":
            options["freezing"] = True  # with constant weights it knows products of integers
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():  # copied for the same reason as in TorchExport
            made = Path(folder) / path.name
            torch._inductor.aoti_compile_and_package(program, package_path=str(made), inductor_configs=options)
            shutil.copyfile(made, path)

    def load(self, path: Path, precision: str, threads: int | None = None) -> Runner:
        import torch._inductor

        return _torch_runner(torch._inductor.aoti_load_package(str(path)), precision)

    def share(self, path: Path, precision: str) -> float | None:
        """For int8, from the calls in the package's own code."""
        if precision != "int8":
            return super().share(path, precision)
        with zipfile.ZipFile(path) as package:
            codes = [package.read(name).decode() for name in package.namelist() if name.endswith(".cpp")]
        calls = re.findall(AOTI_PRODUCTS, "".join(codes))
        return sum("__q" in call for call in calls) / max(len(calls), 1)


def _torch_runner(network: Any, precision: str) -> Runner:
    dtype = torch.float32 if precision == "int8" else getattr(torch, precision)

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.from_numpy(images).to(dtype)).float().numpy()

    return run


def _program_of(network: nn.Module, example: torch.Tensor, settings: Settings) -> Any:
    if settings.precision != "int8":
        return torch_program(network, example, settings)
    from equiflop.deploy.targets.pt2e import quantised_program

    assert settings.calibration is not None
    program = torch_program(network, example, settings, subtract_means=False)
    return quantised_program(program, example, settings.calibration, dynamic_shapes(settings))
