"""How many kernels a compiled block starts on a GPU, forward and backward, E and plain, counted without a GPU.

    python benchmarks/gpu_launches.py --output benchmarks/gpu_launches.json

A block is traced on the CPU by TorchDynamo and AOTAutograd, as one graph, with the Triton kernels that a GPU would
take. TorchInductor then writes its program for that graph on tensors of a GPU that is not there, and what the program
starts is counted: kernels that Inductor made, our own, and those of PyTorch's libraries.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import timm
import torch
import triton
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

import equiflop
from equiflop.files import write_text
from equiflop.kernels.gpu import branch

NAMES = ("flop_deit3_base_patch16_224", "octic_deit3_base_patch16_224")
#: The card that is not there, an H100.
CARD = SimpleNamespace(
    name="none",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
)
#: What a program starts: Triton kernels, and operations of PyTorch's libraries.
STARTS = re.compile(r"^\s+(?:(\w+)\.run\(|.*?\b(extern_kernels\.\w+|torch\.ops\.aten\.\w+)[\w.]*\()", re.MULTILINE)


class Driver:
    """What Triton asks of a driver while kernels are written."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": 232448,
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": 32,
        }
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return lambda *arguments, **keywords: [1.0, 1.0, 1.0]


@contextmanager
def card() -> Iterator[None]:
    """Within this context PyTorch says that there is a GPU."""
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: CARD,
        "get_device_capability": lambda device=None: (CARD.major, CARD.minor),
        "is_bf16_supported": lambda *arguments, **keywords: True,
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", return_value=True))
        for name, answer in answers.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", answer))
            if name in vars(CudaInterface):  # it took them when it was imported
                stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(answer)))
        yield


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float | None = None, **keywords: Any) -> Tensor:
    """What a GPU takes for ``scaled_dot_product_attention`` in half precision."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=scale)[0]
    return out


def graphs_of(block: nn.Module, x: Tensor, dynamic: bool = False) -> list[fx.GraphModule]:
    """The graphs of a block: forward, and backward where gradients are asked for."""
    found: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        found.append(graph)
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    names = ("torch.nn.functional.scaled_dot_product_attention", "equiflop.kernels.branch.attend")
    with mock.patch(names[0], fused_attention), mock.patch(names[1], fused_attention):
        torch._dynamo.reset()
        compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=dynamic)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(x.requires_grad):
            out = compiled(x)
            if x.requires_grad:
                out.backward(torch.ones_like(out))
    return found


def program(graph: fx.GraphModule, backward: bool, inference: bool) -> str:
    """What TorchInductor writes for a graph whose tensors lie on a GPU."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = []
    with mode:
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
            if node.op == "placeholder":
                value = node.meta["val"]
                made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
                node.meta["val"] = made
                inputs.append(made)
    with card(), mode, V.set_fake_mode(mode):
        fx.passes.fake_tensor_prop.FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        compile_fx._recursive_post_grad_passes(graph, is_inference=inference)
        lowering = GraphLowering(graph, example_inputs=inputs, is_backward=backward, is_inference=inference)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            code = lowering.codegen()[0]
    return str(getattr(code, "value", code))


def counts(name: str, tokens: int, batch: int, step: str) -> list[Counter[str]]:
    """What the first block of a network starts: by operation how often, for one graph after the other.

    Args:
        name: timm's.
        tokens: of an image.
        batch: images.
        step: ``"forward"``, without gradients, or ``"train"``.
    """
    model = timm.create_model(name, depth=1).to(torch.bfloat16)
    block = model.blocks[0].train(step == "train").requires_grad_(step == "train")
    x = torch.randn(batch, tokens, model.embed_dim, dtype=torch.bfloat16, requires_grad=step == "train")
    with branch.anywhere():
        graphs = graphs_of(block, x)
    programs = [program(graph, i == 1, step == "forward") for i, graph in enumerate(graphs)]
    return [Counter(own or other for own, other in STARTS.findall(text)) for text in programs]


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help="names of E(ViT) or octic ViT")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    triton.runtime.driver.set_active(Driver())
    found: dict[str, dict[str, Any]] = {}
    print("| block of | forward | training: forward | backward |\n| --- | ---: | ---: | ---: |")
    for name in dict.fromkeys(other for each in options.names for other in (each, equiflop.plain_twin(each)[0])):
        all_three = [*counts(name, options.tokens, options.batch, "forward")]
        all_three += counts(name, options.tokens, options.batch, "train")
        steps = ("forward", "training forward", "backward")
        found[name] = {step: dict(count) for step, count in zip(steps, all_three, strict=True)}
        print(f"| {name} | " + " | ".join(str(count.total()) for count in all_three) + " |", flush=True)
    if options.output is not None:
        versions = {package: importlib.metadata.version(package) for package in ("torch", "triton", "timm")}
        command = " ".join(["python benchmarks/gpu_launches.py", *sys.argv[1:]])
        write_text(options.output, json.dumps({**versions, "command": command, "started": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
