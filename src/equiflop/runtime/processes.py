"""The processes that train one network together, started by torchrun; a single process is the simplest case."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from equiflop.runtime.device import pick_device

_TIMEOUT = timedelta(hours=2)  # the first process may have to download the data


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
        device: where this process computes.
    """

    rank: int
    count: int
    device: torch.device

    @classmethod
    def join(cls, device: str, fsdp: bool = False) -> Processes:
        """Join the processes that torchrun started; alone without torchrun.

        Args:
            device: see :func:`equiflop.runtime.pick_device`.
            fsdp: whether a network is to be shared out over them.

        Raises:
            ValueError: if the device does not exist, there are fewer CUDA devices than processes on this machine, or
                there is only one process to share out to.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if fsdp and count == 1:
            raise ValueError("fsdp: there is only one process to share out to; start several with torchrun")
        if count == 1:
            return cls(0, 1, pick_device(device))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        chosen = pick_device(device)
        if chosen.type == "cuda":
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"process {local} of this machine has no CUDA device of its own: there are "
                    f"{torch.cuda.device_count()}; start fewer with --nproc-per-node, or use --device cpu"
                )
            chosen = torch.device("cuda", local)
            torch.cuda.set_device(chosen)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_TIMEOUT)
        return cls(dist.get_rank(), dist.get_world_size(), chosen)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the processes; a sharded one does that by itself."""
        if self.count == 1 or isinstance(model, FSDPModule):
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    @contextmanager
    def averaging(self, network: nn.Module, last: bool) -> Iterator[None]:
        """Average gradients over the processes, or gather them here until the last of several batches.

        Args:
            network: what :meth:`wrap` gave.
            last: whether this is the last.
        """
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
        with network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext():
            yield

    def same_buffers(self, model: nn.Module) -> None:
        """Give all processes the first one's running statistics, which gradients do not keep equal."""
        if self.count > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    dist.broadcast(buffer, src=0)

    def same_weights(self, model: nn.Module) -> None:
        """Give all processes the first one's parameters and buffers, as they must be before the first step."""
        if self.count > 1:
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    shared = tensor.detach().to(self.device)
                    dist.broadcast(shared, src=0)
                    tensor.copy_(shared)

    def total(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over the processes, on the CPU."""
        if self.count == 1:
            return values
        shared = values.to(self.device, copy=True)
        dist.all_reduce(shared)
        return shared.cpu()

    def all_reduce_max(self, value: int) -> int:
        """Largest of a number over the processes."""
        if self.count == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return int(shared)

    def broadcast(self, value: Any) -> Any:
        """What the first process gives."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait_for_first(self) -> None:
        """Wait until the first process has come here; it does not wait for the others."""
        self.broadcast(None)

    def gathered(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, one behind the other."""
        if self.count == 1:
            return values
        lists: list[list[Any]] = [[] for _ in range(self.count)]
        dist.all_gather_object(lists, values)
        return [value for part in lists for value in part]


def leave(code: int = 0) -> None:
    """End the program, if it is one of several processes, when all of them have come to their end.

    That goes without Python's own way of ending, in which a thread of the group that still asks for the interpreter
    aborts the process now and then; torchrun then stops the others and takes all for failed.

    Args:
        code: exit code.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    dist.barrier()  # torchrun would stop the first, which still writes, when another has ended with a code
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
