"""One step of training: a network with its objective, optimiser, scaler and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from equiflop.data.randomness import derive_seed
from equiflop.runtime.device import compile_problem
from equiflop.runtime.processes import Processes
from equiflop.runtime.progress import Progress
from equiflop.runtime.sharding import check_optimizer, own_share, shard, units, whole_weights
from equiflop.training.config import RunConfig
from equiflop.training.errors import CheckpointError, NonFiniteLossError
from equiflop.training.records import Sums
from equiflop.training.samples import Loaded, seed_everything
from equiflop.training.sharded_state import load_shards
from equiflop.training.state import TrainState, load_weights

_MIXING = 0x313  # what seeds numpy and Python in a step, apart from what seeds torch
#: By name the numbers in which a network computes in training.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Gives the loss of a batch, a scalar, and with it metrics if there are any: by name one value per sample, shape
#: ``(B,)``, or their mean. It is given the network, as a function, and the batch on the device. Networks that it asks,
#: such as a teacher, may stand in its attribute ``asked``, a list: they are compiled where the network is.
Objective = Callable[[Callable[..., Any], Any], "Tensor | tuple[Tensor, Mapping[str, Tensor | float]]"]


class Learner:
    """All that a step changes.

    Args:
        model: the network; moved to the device, or shared out over the processes.
        objective: what is minimised; moved to the device if it is a module.
        config: the run.
        processes: those that train together.
        steps_per_epoch: for the course of the learning rate.

    Raises:
        ValueError: if there is no such optimiser.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, config: RunConfig, processes: Processes, steps_per_epoch: int
    ) -> None:
        self.config = config
        self.processes = processes
        self.device = processes.device
        self.model = model
        if not config.fsdp:
            model.to(self.device)
        processes.same_weights(model)
        self.ema: ModelEmaV3 | None = None
        if config.ema_decay:  # one by one if sharded, as running statistics are not
            self.ema = ModelEmaV3(model, decay=config.ema_decay, foreach=not config.fsdp)
        self.objective = objective.to(self.device) if isinstance(objective, nn.Module) else objective
        if config.fsdp:
            for network in self.networks:
                shard(network, processes)
        self._wrapped = processes.wrap(model)
        self.optimizer = create_optimizer_v2(
            model, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine" if config.schedule == "cosine" else "step",
            decay_epochs=config.epochs + 1,  # of "step", which thus stays where it is
            num_epochs=max(config.epochs, 1),
            warmup_epochs=config.warmup_epochs,
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
        self._steps_per_epoch = steps_per_epoch
        self._to_compile = config.compile
        self.compiling = False  # until the first step has been made
        self._graphs = config.compile_mode != "default" and self.device.type == "cuda"

    @property
    def networks(self) -> list[nn.Module]:
        """The network and, if there is one, that of the averaged weights."""
        return [self.model] if self.ema is None else [self.model, self.ema.module]

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def compile(self, progress: Progress) -> None:
        """Compile the network and what the objective asks, if that was wanted, is not done yet and works here.

        It happens in the first step.
        """
        if not self._to_compile:
            return
        self._to_compile = False
        problem = compile_problem(self.device)
        if problem is not None:
            progress.print(f"torch.compile does not work here ({problem}); going on without it")
            return
        progress.note("compiling, which takes up to a minute")
        self.compiling = True
        for part in (units(self.model) if self.config.fsdp else []) or [self.model]:
            part.compile(dynamic=False, mode=self.config.compile_mode)
        for network in getattr(self.objective, "asked", ()):  # several times in a step, so without CUDA graphs
            network.compile(dynamic=False)

    def gradients(self, batches: list[Loaded], epoch: int, step: int) -> Sums:
        """Gradients of the mean loss of one or more batches; every sample of all processes weighs the same.

        Args:
            batches: what this process has to add.
            epoch: with the step it decides what is random.
            step: number in the epoch, from 0.

        Returns:
            what was found, in all processes; metrics of the objective are part of it.

        Raises:
            NonFiniteLossError: if the loss of one process is NaN or infinite; in all of them.
            TypeError: if the objective gives something else than a loss, or a loss with metrics.
            ValueError: if the loss is no scalar or has no gradient, or a metric is of another shape than the batch.
        """
        self.scheduler.step_update(self._total(epoch, step))
        self.optimizer.zero_grad(set_to_none=True)
        sums = Sums()
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with self.processes.averaging(self._wrapped, last):
                sums.add(self._gradient(batch, number, epoch, step))
            if self._graphs and not last:  # the next recorded pass writes where this one left its gradients
                for parameter in self.model.parameters():
                    parameter.grad = None if parameter.grad is None else parameter.grad.clone()
        return sums

    def update(self, epoch: int, step: int) -> None:
        """Change the weights by the gradients, and then their average."""
        self.compiling = False
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, step=self._total(epoch, step) + 1)
        if self._graphs:  # gradients lie where the next recorded pass, maybe one of a measurement, writes
            self.optimizer.zero_grad(set_to_none=True)

    def _total(self, epoch: int, step: int) -> int:
        return epoch * self._steps_per_epoch + step

    def _gradient(self, batch: Loaded, number: int, epoch: int, step: int) -> Sums:
        content = tree_map(lambda leaf: _moved(leaf, self.device), batch.content)
        place = (self.config.seed, epoch, step, number, self.processes.rank)
        seed_everything(derive_seed(*place), derive_seed(*place, _MIXING))
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        loss, metrics = _checked(self.objective(self.network, content), batch.count)
        value = float(loss.detach())
        finite = math.isfinite(value)
        names = sorted(metrics)
        found = [value * batch.count if finite else 0.0, batch.count, len(batch.problems), 0.0 if finite else 1.0]
        found += [metrics[name] for name in names]
        total_loss, seen, unreadable, diverged, *totals = self.processes.total(
            torch.tensor(found, dtype=torch.float64)
        ).tolist()
        if diverged:
            raise NonFiniteLossError(
                f"the loss is not finite ({value} here) in epoch {epoch + 1}, step {step + 1} (learning rate "
                f"{self.lr:.2e}); try a lower lr, more warm-up or a smaller clip_grad; the last checkpoint is intact"
            )
        of_all = max(seen, 1)  # of no sample, nothing is added
        share = batch.count * self.processes.count / of_all / self.config.accumulate
        self.scaler.scale(loss * share).backward()
        mean = total_loss / of_all / self.config.accumulate
        return Sums(mean, int(seen), int(unreadable), dict(zip(names, totals, strict=True)))

    def network(self, *inputs: Any, **keywords: Any) -> Any:
        """The network as the objective calls it: in the run's precision, its outputs in float32."""
        precision = PRECISIONS[self.config.precision]
        with torch.autocast(self.device.type, dtype=precision, enabled=precision is not torch.float32):
            outputs = self._wrapped(*inputs, **keywords)
        return tree_map(_full_precision, outputs)

    def check_finite(self, epoch: int, step: int) -> None:
        """See that the weights of all processes are finite.

        Raises:
            NonFiniteLossError: if one is not.
            ValueError: if the optimiser cannot be shared out.
        """
        finite = [torch.isfinite(own_share(parameter)).all() for parameter in self.model.parameters()]
        broken = bool(finite) and not bool(torch.stack(finite).all())
        if self.processes.all_reduce_max(int(broken)):
            raise NonFiniteLossError(
                f"a weight is not finite after epoch {epoch + 1}, step {step}; try a lower lr, more warm-up or a "
                "smaller clip_grad; the last checkpoint is intact"
            )
        if self.config.fsdp:
            check_optimizer(self.config.optimizer, self.optimizer)

    def same_buffers(self) -> None:
        """Give all processes the first one's running statistics."""
        for network in self.networks:
            self.processes.same_buffers(network)

    def state(self) -> dict[str, Any]:
        """The parts of a training state that a step changes."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: TrainState, path: Path) -> None:
        """Take them from a state that was read from ``path``.

        Raises:
            CheckpointError: if they do not fit.
        """
        if self.config.fsdp:
            state = load_shards(path, state, self.model, None if self.ema is None else self.ema.module, self.optimizer)
        load_weights(self.model, state.model, path)
        try:
            if self.ema is not None:
                load_weights(self.ema.module, state.ema or {}, path)
            self.scaler.load_state_dict(state.scaler)
            self.optimizer.load_state_dict(state.optimizer)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: the state of the optimiser does not fit ({error})") from error

    def final_weights(self) -> dict[str, Tensor]:
        """Those averaged where there are any; whole and on the CPU in the first process, all must call it."""
        return whole_weights(self.networks[-1])


def _moved(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.to(device, non_blocking=True)
    return leaf.to(device) if hasattr(leaf, "to") else leaf


def _full_precision(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if low else value


def _checked(result: Any, count: int) -> tuple[Tensor, dict[str, float]]:
    """The loss, and the sum of every metric over the samples."""
    loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(loss, Tensor) or not isinstance(metrics, Mapping):
        given = f"a pair of {type(loss).__name__} and {type(metrics).__name__}" if loss is not result else repr(result)
        raise TypeError(f"objective gave {given:.80}; it must give the loss, a tensor, or (loss, {{name: metric}})")
    if loss.ndim:
        raise ValueError(f"objective gave a loss of shape {tuple(loss.shape)}; it must be one number, such as its mean")
    if not loss.requires_grad:
        raise ValueError("objective gave a loss without a gradient; it must be made of what the network gives")
    return loss, {str(name): _sum(str(name), value, count) for name, value in metrics.items()}


def _sum(name: str, value: Tensor | float, count: int) -> float:
    if name == "loss":
        raise ValueError("objective gave a metric called 'loss', which the log has already; give it another name")
    if not isinstance(value, (Tensor, int, float)):
        raise TypeError(f"objective gave metric {name}={value!r}; it must be a tensor or a number")
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    if count == 0:
        return 0.0
    if not shape:
        return float(value) * count
    if shape != (count,):
        raise ValueError(
            f"objective gave metric {name!r} of shape {shape}; give ({count},), one a sample, or their mean"
        )
    return float(value.detach().sum())  # type: ignore[union-attr]
