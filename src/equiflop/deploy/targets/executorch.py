"""ExecuTorch: programs (``.pte``) for small devices, which its backend XNNPACK takes whole.

What XNNPACK does not take is left to ExecuTorch's portable operators, and every change of hands copies. So graphs are
spelled in XNNPACK's own operators before they are lowered, those of plain networks as those of ours.
"""

from __future__ import annotations

import json
import operator
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from equiflop.deploy.targets.base import Runner, Settings, Target, torch_program
from equiflop.deploy.targets.pt2e import is_quantised, quantised, ranges
from equiflop.deploy.targets.xnnpack_spelling import FILLED, Spelled

aten = torch.ops.aten

#: Methods of a file that return its metadata and what XNNPACK took of it, as JSON.
ABOUT, DELEGATED = "equiflop", "equiflop_delegated"
#: Products, as they are called in lowered graphs.
PRODUCTS = ("aten.linear", "aten.addmm", "aten.mm", "aten.bmm", "aten.convolution")
#: Operators that read nothing of their first argument but its shape and type.
OF_A_SHAPE = (
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.full_like.default,
)


class ExecuTorch(Target):
    """Programs of ExecuTorch, for its backend XNNPACK."""

    precisions = ("float32", "int8")
    packages = ("executorch", "torchao")
    extra = "executorch"
    suffix = ".pte"
    dynamic = False  # XNNPACK slices tensors of fixed sizes alone

    def write(self, network: nn.Module, example: Tensor, path: Path, settings: Settings) -> None:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeProgramManager, to_edge_transform_and_lower

        graph: Any = folded(torch_program(network, example, settings, subtract_means=False).module())
        if settings.precision == "int8":
            assert settings.calibration is not None
            graph = quantised(graph, _quantizer(), settings.calibration, len(example))
        with torch.no_grad():
            program = torch.export.export(Spelled(graph, example), (example,))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).exported_program()
        notes = {ABOUT: json.dumps(settings.metadata), DELEGATED: json.dumps(delegated(lowered, settings.precision))}
        with open(path, "wb") as file:
            EdgeProgramManager(lowered, notes).to_executorch().write_to_file(file)

    def load(self, path: Path, precision: str, threads: int | None = None) -> Runner:
        if threads is not None:
            from executorch.extension.pybindings import portable_lib

            portable_lib._unsafe_reset_threadpool(threads)
        program = _opened(path)
        forward = program.load_method("forward")

        def run(images: np.ndarray) -> np.ndarray:
            assert program is not None  # holds the file's memory
            return forward.execute([torch.from_numpy(images)])[0].numpy()

        return run

    def share(self, path: Path, precision: str) -> float | None:
        """Of products, those that XNNPACK runs in the precision, as noted in the file when it was lowered."""
        noted = read_notes(path, DELEGATED)
        return noted["products"]["taken"] / max(noted["products"]["all"], 1)


def read_notes(path: str | Path, method: str = ABOUT) -> Any:
    """What a file says of itself, through ExecuTorch's runtime.

    Args:
        path: a ``.pte`` that :func:`equiflop.export` wrote.
        method: ``"equiflop"`` for the metadata; ``"equiflop_delegated"`` for what XNNPACK took.
    """
    return json.loads(_opened(path).load_method(method).execute([])[0])


def _opened(path: str | Path) -> Any:
    from executorch.runtime import Runtime, Verification

    return Runtime.get().load_program(Path(path), verification=Verification.Minimal)


def delegated(lowered: Any, precision: str) -> dict[str, Any]:
    """What XNNPACK takes of a lowered program.

    Returns:
        ``operators`` and ``products``, of each how many there are and how many are taken (products in the precision),
        and ``left``, the operators that are not taken by name.
    """
    outside = [node for node in _calls(lowered.graph_module) if "getitem" not in str(node.target)]
    left = Counter(_name(node) for node in outside if "delegate" not in _name(node))
    parts = [part.original_module.graph_module for _, part in lowered.graph_module.named_children()]
    taken = [node for part in parts for node in _calls(part) if "quantize_per" not in _name(node)]
    products = [node for node in taken if _name(node).startswith(PRODUCTS) and FILLED not in str(node.args)]
    as_asked = products if precision == "float32" else [node for node in products if _is_integer(node)]
    others = sum(count for name, count in left.items() if name.startswith(PRODUCTS))
    return {
        "operators": {"all": len(taken) + sum(left.values()), "taken": len(taken)},
        "products": {"all": len(products) + others, "taken": len(as_asked)},
        "left": dict(left),
    }


def _calls(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _is_integer(node: fx.Node) -> bool:
    """Whether XNNPACK multiplies integers: both factors come from int8, the product goes to it."""
    factors: list[Any] = list(node.args[:2])
    return all(is_quantised(factor) for factor in factors) and all("quantize_per" in _name(user) for user in node.users)


def _quantizer() -> Any:
    """Linear maps and convolutions; the stream between them stays float32."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer

    quantizer = XNNPACKQuantizer()
    for kind in (aten.linear.default, aten.conv2d.default):
        quantizer.set_operator_type(kind, ranges())
    return quantizer


def folded(graph: Any) -> Any:
    """A graph in which what parameters alone decide is computed, once for all."""
    known: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            known[node] = operator.attrgetter(node.target)(graph)
        elif node.target in OF_A_SHAPE:
            like = node.args[0].meta["val"]
            known[node] = node.target(torch.empty(tuple(like.shape), dtype=like.dtype), *node.args[1:], **node.kwargs)
        elif node.op == "call_function" and _is_fixed(node) and all(n in known for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
        if node.op == "call_function" and isinstance(known.get(node), Tensor):
            name = f"folded_{node.name}"
            graph.register_buffer(name, known[node].contiguous())
            with graph.graph.inserting_before(node):
                constant = graph.graph.get_attr(name)
            constant.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(constant)
            known[constant] = known[node]
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _is_fixed(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())
