"""Where networks run: how each target's file is written, read again and run."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
import tempfile
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from equiflop.extras import check_installed
from equiflop.kernels import Form, for_runtimes

#: A file that is ready to run: images ``(B, C, H, W)`` to the output, both float32.
Runner = Callable[[np.ndarray], np.ndarray]

#: The version of ONNX's operators: the first with an operator for attention. ONNX Runtime 1.32 does not load quantised
#: files of it (it makes unsigned numbers of signed ones, and trips over the type that is noted since version 21).
OPSET = 23
OPSET_OF_INT8 = 20


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
    """

    precisions: tuple[str, ...]
    packages: tuple[str, ...] = ()
    packages_of_int8: tuple[str, ...] = ()
    extra: str = ""
    suffix: str

    @abstractmethod
    def write(self, network: nn.Module, example: torch.Tensor, path: Path, settings: Settings) -> None:
        """Write a network in the form made for runtimes."""

    @abstractmethod
    def load(self, path: Path, precision: str, threads: int | None = None) -> Runner:
        """Read a file for the processor of this machine."""

    def share(self, path: Path, precision: str) -> float | None:
        """The share of products that run in the precision; None where the target does not tell."""
        return 1.0


class Onnx(Target):
    """ONNX files, run by ONNX Runtime."""

    precisions = ("float32", "float16", "int8")
    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"
    suffix = ".onnx"

    def write(self, network: nn.Module, example: torch.Tensor, path: Path, settings: Settings) -> None:
        import onnx

        half = settings.precision == "float16"
        if half:
            network, example = network.half(), example.half()
        opset = OPSET_OF_INT8 if settings.precision == "int8" else OPSET
        program: Any = _onnx_program(network, example, settings, opset)
        model = program.model_proto
        if settings.precision == "int8":
            model = _quantised(model, settings)
        forget_sources(model)
        for key, value in settings.metadata.items():
            model.metadata_props.add(key=key, value=value)
        model.producer_name, model.producer_version = "equiflop", settings.metadata.get("version", "")
        onnx.save(model, str(path))

    def load(self, path: Path, precision: str, threads: int | None = None) -> Runner:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        dtype = np.float16 if precision == "float16" else np.float32
        return lambda images: session.run(None, {name: images.astype(dtype)})[0].astype(np.float32)

    def share(self, path: Path, precision: str) -> float | None:
        """For int8 the products both of whose factors are quantised; of the other precisions the file is made whole."""
        if precision != "int8":
            return 1.0
        import onnx

        graph = onnx.load(str(path), load_external_data=False).graph
        maker = {output: node for node in graph.node for output in node.output}
        products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "Conv", "Attention")]

        def is_quantised(name: str) -> bool:
            node = maker.get(name)
            while node is not None and node.op_type in ("Transpose", "Reshape"):
                node = maker.get(node.input[0])
            return node is not None and node.op_type == "DequantizeLinear"

        whole = [node for node in products if all(is_quantised(name) for name in node.input[:2])]
        return len(whole) / max(len(products), 1)


class OpenVino(Target):
    """OpenVINO's files (an ``.xml`` and a ``.bin`` beside it)."""

    precisions = ("float32", "bfloat16", "float16", "int8")
    packages = ("openvino", "onnx", "onnxscript")
    packages_of_int8 = ("nncf",)
    extra = "openvino"
    suffix = ".xml"

    def write(self, network: nn.Module, example: torch.Tensor, path: Path, settings: Settings) -> None:
        import openvino

        with tempfile.TemporaryDirectory() as folder:
            onnx_file, made = Path(folder) / "network.onnx", Path(folder) / path.name
            _onnx_program(network, example, settings, form="stacked").save(str(onnx_file))
            model = openvino.convert_model(str(onnx_file))
            if settings.precision == "int8":
                model = _quantised_by_nncf(model, settings)
            for key, value in settings.metadata.items():
                model.set_rt_info(value, ["equiflop", key])
            _note_for_model_api(model, settings.metadata)
            openvino.save_model(model, str(made), compress_to_fp16=settings.precision == "float16")
            del model  # it maps the first file
            for file in (made, made.with_suffix(".bin")):  # copied, since OpenVINO does not say that a disk is full
                shutil.copyfile(file, path.with_name(file.name))

    def load(self, path: Path, precision: str, threads: int | None = None) -> Runner:
        compiled = self._compiled(path, precision, threads)
        request = compiled.create_infer_request()
        return lambda images: np.array(request.infer({0: images})[0], dtype=np.float32)

    def share(self, path: Path, precision: str) -> float | None:
        """From the compiled model, as it really runs."""
        wanted = {"float32": {"f32"}, "bfloat16": {"bf16"}, "float16": {"f16", "f32"}, "int8": {"i8", "u8"}}[precision]
        products = []
        for node in self._compiled(path, precision, None).get_runtime_model().get_ops():
            info = node.get_rt_info()
            if str(info["layerType"].astype(str)) in (
                "FullyConnected",
                "MatMul",
                "Convolution",
                "ScaledDotProductAttention",
            ):
                products.append(str(info["runtimePrecision"].astype(str)) in wanted)
        return sum(products) / len(products) if products else None

    def _compiled(self, path: Path, precision: str, threads: int | None) -> Any:
        import openvino

        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        core = openvino.Core()
        hint = {"float32": "f32", "bfloat16": "bf16"}.get(precision)
        if hint is not None:  # else what the processor does best, for int8 between the products
            settings["INFERENCE_PRECISION_HINT"] = hint
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        return core.compile_model(str(path), "CPU", settings)


class TorchExport(Target):
    """Programs of ``torch.export``."""

    precisions = ("float32", "bfloat16", "float16", "int8")
    packages_of_int8 = ("torchao",)
    extra = "torchao"
    suffix = ".pt2"

    def write(self, network: nn.Module, example: torch.Tensor, path: Path, settings: Settings) -> None:
        program, whole = _program_in_int8(network, example, settings), io.BytesIO()
        torch.export.save(program, whole, extra_files={"equiflop.json": json.dumps(settings.metadata)})
        path.write_bytes(whole.getbuffer())  # torch's own writer ends the process where the disk is full

    def load(self, path: Path, precision: str, threads: int | None = None) -> Runner:
        return _torch_runner(self._program(path, precision).module(), precision)

    def share(self, path: Path, precision: str) -> float | None:
        """For int8, what the program says: a compiler multiplies integers, plain PyTorch what they stand for."""
        if precision != "int8":
            return super().share(path, precision)
        from equiflop.deploy.pt2e import share_of

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

        program = _program_in_int8(network, example, settings)
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


#: The targets by name.
TARGETS: dict[str, Target] = {
    "onnx": Onnx(),
    "openvino": OpenVino(),
    "torch-export": TorchExport(),
    "aoti": Aoti(),
}


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


def _torch_runner(network: Any, precision: str) -> Runner:
    dtype = torch.float32 if precision == "int8" else getattr(torch, precision)

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.from_numpy(images).to(dtype)).float().numpy()

    return run


def _dynamic_shapes(settings: Settings) -> Any:
    axes: dict[int, Any] = {}
    if settings.dynamic_batch:
        axes[0] = torch.export.Dim("batch", min=1)
    if settings.dynamic_size:
        axes |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    return (axes,) if axes else None


def _program(network: nn.Module, example: torch.Tensor, settings: Settings, subtract_means: bool = True) -> Any:
    if settings.precision in ("bfloat16", "float16"):
        dtype = getattr(torch, settings.precision)
        network, example = network.to(dtype), example.to(dtype)
    with torch.no_grad(), for_runtimes(subtract_means=subtract_means):
        return torch.export.export(network, (example,), dynamic_shapes=_dynamic_shapes(settings))


def _program_in_int8(network: nn.Module, example: torch.Tensor, settings: Settings) -> Any:
    if settings.precision != "int8":
        return _program(network, example, settings)
    from equiflop.deploy.pt2e import quantised_program

    assert settings.calibration is not None
    program = _program(network, example, settings, subtract_means=False)
    return quantised_program(program, example, settings.calibration, _dynamic_shapes(settings))


def _onnx_program(
    network: nn.Module, example: torch.Tensor, settings: Settings, opset: int = OPSET, form: Form = "joined"
) -> Any:
    with torch.no_grad(), for_runtimes(form, subtract_means=settings.precision != "int8"):
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=["output"],
            dynamic_shapes=_dynamic_shapes(settings),
            verbose=False,
        )
    assert program is not None
    return program


def forget_sources(model: Any) -> None:
    """Remove what the exporter notes in an ONNX model: from which line of which file every node came."""
    graph = model.graph
    for part in (model, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""


def _batches(images: np.ndarray, size: int) -> list[np.ndarray]:
    """Whole batches of a size."""
    return [images[i : i + size] for i in range(0, len(images) - size + 1, size)]


class _Calibration:
    """Images one by one, as ONNX Runtime's quantiser asks for them."""

    def __init__(self, name: str, images: np.ndarray, batch: int) -> None:
        self.batches = iter([{name: part} for part in _batches(images, batch)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def _quantised(model: Any, settings: Settings) -> Any:
    """int8 for products of linear maps and convolutions; symmetric, so that a flipped sign stays one."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    assert settings.calibration is not None
    del model.graph.value_info[:]  # the exporter's, which quantisation would contradict
    name = model.graph.input[0].name
    fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, str(source))
        quantize_static(
            str(source),
            str(result),
            _Calibration(name, settings.calibration, fixed or 1),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )
        return onnx.load(str(result))


def _quantised_by_nncf(model: Any, settings: Settings) -> Any:
    import nncf

    assert settings.calibration is not None
    batch = model.inputs[0].partial_shape[0]
    step = batch.get_length() if batch.is_static else 1
    batches = _batches(settings.calibration, step)
    model = nncf.quantize(
        model,
        nncf.Dataset(batches),
        preset=nncf.QuantizationPreset.PERFORMANCE,  # symmetric activations
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
        # Corrected biases would give sign-flipping channels one; the overflow fix has one more step on one side.
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            disable_bias_correction=True, overflow_fix=nncf.OverflowFix.DISABLE
        ),
    )
    _balance(model)
    return model


def _balance(model: Any) -> None:
    """Leave the step -128 of activations out, so that there are as many below zero as above."""
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize" or node.get_attributes()["levels"] != 256:
            continue
        low, high = (node.input_value(i).get_node().get_data() for i in (1, 2))
        if not (low < 0).all():
            continue
        narrow = ops.fake_quantize(node.input_value(0), -high, high, -high, high, 255, name=node.get_friendly_name())
        node.output(0).replace(narrow.output(0))


def _note_for_model_api(model: Any, metadata: dict[str, str]) -> None:
    """The names under which OpenVINO's Model API looks for a classifier's input and labels."""
    labels: Sequence[str] = json.loads(metadata["labels"])
    notes = {
        "model_type": "Classification" if labels else "",
        "mean_values": " ".join(str(255 * value) for value in json.loads(metadata["mean"])),
        "scale_values": " ".join(str(255 * value) for value in json.loads(metadata["std"])),
        "labels": " ".join(label.replace(" ", "_") for label in labels),
    }
    for key, value in notes.items():
        if value:
            model.set_rt_info(value, ["model_info", key])
