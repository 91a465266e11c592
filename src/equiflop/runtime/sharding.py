"""Networks whose parameters, gradients and optimiser are shared out over processes (FSDP2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from equiflop.runtime.processes import Processes


def units(model: nn.Module) -> list[nn.Module]:
    """The parts whose parameters are gathered together: entries of the lists called ``blocks``, inner ones first."""

    def entries(module: nn.Module) -> list[nn.Module]:
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return [entry for child in module.children() for entry in entries(child)]
        return [module]

    lists = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks"]
    return [entry for blocks in reversed(lists) for child in blocks.children() for entry in entries(child)]


def shard(model: nn.Module, processes: Processes) -> None:
    """Share a network's parameters out over all processes; each gathers those of a block while it computes it.

    The network moves to the device of the process, part by part.
    """
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for unit in units(model):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` was applied to a network: then all processes must call it equally often."""
    return isinstance(model, FSDPModule)


def own_share(value: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, if it is not shared out."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A network's state dict with whole tensors on the CPU, in the first process; all processes must call it."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def check_optimizer(name: str, optimizer: torch.optim.Optimizer) -> None:
    """See that an optimiser can be shared out, once it has made a step.

    Raises:
        ValueError: if it keeps tensors of other shapes than those of the parameters.
    """
    for parameter, values in optimizer.state.items():
        if any(isinstance(value, DTensor) and value.shape != parameter.shape for value in values.values()):
            raise ValueError(
                f"optimizer={name!r} keeps tensors of other shapes than its parameters, which fsdp cannot share out; "
                "use adamw, lamb or sgd"
            )
