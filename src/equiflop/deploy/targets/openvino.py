"""OpenVINO's files, and int8 by NNCF."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from equiflop.deploy.targets.base import LARGEST_WEIGHT, Runner, Settings, Target, batches, onnx_program


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
            onnx_program(network, example, settings, form="stacked").save(str(onnx_file))
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


def _quantised_by_nncf(model: Any, settings: Settings) -> Any:
    import nncf
    from nncf.openvino.quantization.backend_parameters import BackendParameters
    from openvino._offline_transformations import compress_quantize_weights_transformation

    assert settings.calibration is not None
    batch = model.inputs[0].partial_shape[0]
    step = batch.get_length() if batch.is_static else 1
    parts = batches(settings.calibration, step)
    model = nncf.quantize(
        model,
        nncf.Dataset(parts),
        preset=nncf.QuantizationPreset.PERFORMANCE,  # symmetric activations
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(parts),
        # Corrected biases would give sign-flipping channels one; the overflow fix, and so the compressing of weights,
        # is left to _balance, since NNCF's has one more step on one side.
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            disable_bias_correction=True,
            overflow_fix=nncf.OverflowFix.DISABLE,
            backend_params={BackendParameters.COMPRESS_WEIGHTS: False},
        ),
    )
    _balance(model)
    compress_quantize_weights_transformation(model)
    return model


def _balance(model: Any) -> None:
    """Quantise to as many steps below zero as above: -127 to 127 for activations, -64 to 64 for weights."""
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize":
            continue
        low, high = (node.input_value(i).get_node().get_data() for i in (1, 2))
        if not (low < 0).all():
            continue
        if node.input_value(0).get_node().get_type_name() == "Constant":
            high = high * (127 / LARGEST_WEIGHT)  # half of the steps are never used
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
