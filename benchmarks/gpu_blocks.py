"""One block of a network on a GPU: by the Triton kernels, by TorchInductor alone, and plain, in turns.

    python benchmarks/gpu_blocks.py flop_deit3_base_patch16_224 --step train --output blocks.json

All are compiled with CUDA graphs (``--mode``), so that launches do not count. Before, the kernels' outputs and
gradients are compared with those of the modules in float64. Without a GPU (``--device cpu``) the kernels are left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import equiflop
from equiflop import kernels
from equiflop.benchmark.timing import Spread, time_in_turns
from equiflop.files import write_text
from equiflop.runtime import describe_machine

#: What is compared, and the context in which it runs.
FORMS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "Triton": nullcontext,
    "Inductor": kernels.without_triton,
    "plain": nullcontext,
}


def step_of(
    block: nn.Module, x: Tensor, train: bool, mode: str, context: Callable[[], AbstractContextManager[None]]
) -> Callable[[], object]:
    """A compiled forward step, or forward and backward."""
    block = block.train(train).requires_grad_(train)
    compiled = torch.compile(block, mode=mode)
    x = x.detach().requires_grad_(train)
    dy = torch.randn_like(x)
    inputs = [x, *block.parameters()]

    def run() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        with context(), torch.set_grad_enabled(train):
            y = compiled(x)
            return torch.autograd.grad(y, inputs, dy) if train else y

    return run


def largest_error(block: nn.Module, x: Tensor) -> float:
    """Of the block's output and gradients by kernels, against the modules in float64; relative to the largest value."""
    exact = copy.deepcopy(block).double()
    dy = torch.randn_like(x)

    def everything(block: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = block(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], dy)]

    with kernels.reference():
        expected = everything(exact, x.double(), dy.double())
    found = everything(block, x, dy)
    errors = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(errors).max())


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time one block in its forms."""
    torch.manual_seed(0)
    train, device = options.step == "train", torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    plain, keywords = equiflop.plain_twin(name)
    models = {key: timm.create_model(key, depth=1, **more) for key, more in ((name, {}), (plain, keywords))}
    blocks = {key: model.blocks[0].to(device, dtype) for key, model in models.items()}
    tokens = models[name].patch_embed.num_patches + 1
    x = torch.randn(options.batch, tokens, models[name].embed_dim, device=device, dtype=dtype)
    forms = [form for form in FORMS if device.type == "cuda" or form != "Triton"]
    calls = {
        form: step_of(copy.deepcopy(blocks[plain if form == "plain" else name]), x, train, options.mode, FORMS[form])
        for form in forms
    }
    error = largest_error(copy.deepcopy(blocks[name]).requires_grad_(True), x[:2]) if "Triton" in forms else None
    times = time_in_turns(calls, options.rounds, options.seconds, device, warm_up=3)
    ratios = {form: [p / t for p, t in zip(times["plain"], times[form], strict=True)] for form in times}
    return {
        "name": name,
        "step": options.step,
        "batch": options.batch,
        "dtype": options.dtype,
        "mode": options.mode,
        "descriptors": options.descriptors,
        "largest_relative_error": error,
        "ms": {form: 1e3 * Spread.of(values).median for form, values in times.items()},
        "times_as_fast_as_plain": {form: vars(Spread.of(values)) for form, values in ratios.items()},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="names of E(ViT) or octic ViT")
    parser.add_argument("--step", choices=["forward", "train"], default="forward")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--mode", default="reduce-overhead", help="of torch.compile")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.2, help="least length of a turn")
    parser.add_argument("--descriptors", action="store_true", help="tiles of products by tensor descriptors (TMA)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.descriptors:
        os.environ["EQUIFLOP_TMA"] = "1"
    found: list[dict[str, Any]] = []
    for name in options.names:
        found.append(measure(name, options))
        print(json.dumps(found[-1]), flush=True)
    if options.output is not None:
        machine = describe_machine(torch.device(options.device))
        write_text(options.output, json.dumps({**machine, "blocks": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
