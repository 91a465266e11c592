"""ONNX files, run by ONNX Runtime."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from equiflop.deploy.targets.base import OPSET, Runner, Settings, Target, batches, onnx_program

#: ONNX Runtime 1.32 does not load quantised files of a newer version (it makes unsigned numbers of signed ones, and
#: trips over the type that is noted since version 21).
OPSET_OF_INT8 = 20


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
        program: Any = onnx_program(network, example, settings, opset)
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


def forget_sources(model: Any) -> None:
    """Remove what the exporter notes in an ONNX model: from which line of which file every node came."""
    graph = model.graph
    for part in (model, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""


class _Calibration:
    """Images one by one, as ONNX Runtime's quantiser asks for them."""

    def __init__(self, name: str, images: np.ndarray, batch: int) -> None:
        self.batches = iter([{name: part} for part in batches(images, batch)])

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
            reduce_range=True,  # weights from -64 to 64, see LARGEST_WEIGHT
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )
        return onnx.load(str(result))
