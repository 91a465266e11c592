"""Equivariant networks beside their plain twins: cost, time and memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import equiflop
from equiflop.benchmark.fractions import Fractions, split_time
from equiflop.benchmark.memory import peak_memory
from equiflop.benchmark.timing import Spread, time_in_turns
from equiflop.classify.evaluation import MirrorAveraged
from equiflop.classify.model_spec import check_takes, create_model, input_keywords
from equiflop.inference import optimize_for_inference
from equiflop.models.entry_points import TWIN
from equiflop.runtime.progress import Progress

Mode = Literal["eager", "compile", "reduce-overhead", "max-autotune", "optimized"]
Step = Literal["forward", "train"]
MODES: tuple[Mode, ...] = get_args(Mode)
STEPS: tuple[Step, ...] = ("forward", "train")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    Attributes:
        modes: ``eager``; ``compile`` (``torch.compile``); ``reduce-overhead`` and ``max-autotune``, its modes of those
            names, which record CUDA graphs on GPUs; ``optimized`` (``equiflop.optimize_for_inference``; the plain
            network by the same function), for forward steps alone.
        steps: ``forward`` (evaluation mode, no gradients) and ``train`` (forward, backward and an SGD step).
        batch_sizes: images per step.
        dtype: one of ``DTYPES``; parameters and images.
        image_size: height and width in pixels.
        rounds: turns of every network.
        seconds: least length of a turn.
        mirrored: also time the plain network averaged over both mirrored views.
        both_attentions: also time the plain network with its attention written out (``set_fused_attn(False)``), and
            take the faster of the two for the speedup: fused attention can be slow backward on CPUs.
        autocast: dtype that products run in under ``torch.autocast``, or None.
        memory: also measure the peak memory of a step.
        fraction: also split the time of a step by kind of work (CPU).
        settings: keywords for all networks.
    """

    modes: tuple[Mode, ...] = ("compile",)
    steps: tuple[Step, ...] = ("forward",)
    batch_sizes: tuple[int, ...] = (8,)
    dtype: str = "float32"
    image_size: tuple[int, int] = (224, 224)
    rounds: int = 7
    seconds: float = 1.0
    mirrored: bool = False
    both_attentions: bool = False
    autocast: str | None = None
    memory: bool = False
    fraction: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One network in one setting.

    Attributes:
        name: timm's name, with ``" (both views)"`` behind it where logits are averaged over both mirrored views.
        model: the equivariant network that it is compared in.
        parameters: number of parameters.
        macs: MACs of one image; a training step makes about three times as many.
        mode: see :class:`BenchConfig`.
        step: see :class:`BenchConfig`.
        batch_size: images per step.
        latency: seconds per step.
        throughput: images per second.
        speedup: over the plain twin in its fastest form, the median over rounds of the ratio within a round.
        peak_bytes: most memory held during a step beside the parameters, gradients included; None if not measured.
        fractions: where the time goes; None if not measured.
    """

    name: str
    model: str
    parameters: int
    macs: int
    mode: Mode
    step: Step
    batch_size: int
    latency: Spread
    throughput: Spread
    speedup: Spread
    peak_bytes: int | None = None
    fractions: Fractions | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Entry:
        """Of what :meth:`as_dict` gave."""
        spreads = {key: Spread(**values[key]) for key in ("latency", "throughput", "speedup")}
        fractions = None if values["fractions"] is None else Fractions(**values["fractions"])
        return cls(**{**values, **spreads, "fractions": fractions})


def compare(
    name: str,
    config: BenchConfig,
    device: torch.device,
    progress: Progress | None = None,
    report: Callable[[Entry], None] = lambda entry: None,
) -> list[Entry]:
    """Measure an equivariant network and its plain twin in turns, in every setting.

    Args:
        name: an equivariant model, or any model of timm, which is then measured alone.
        config: what to measure.
        device: where.
        progress: the line that shows what happens.
        report: called with every entry as soon as it is known.

    Raises:
        ValueError: if a model or setting is unknown, or the combination makes no sense.
    """
    check_config(config)
    networks = _networks(name, config, device)
    entries = []
    for step in config.steps:
        for mode in config.modes:
            if mode == "optimized" and step == "train":
                continue
            for batch_size in config.batch_sizes:
                found = _measure(name, networks, config, step, mode, batch_size, device, progress)
                for entry in found:
                    report(entry)
                entries += found
    return entries


def check_config(config: BenchConfig) -> None:
    """See that the values are valid.

    Raises:
        ValueError: if not.
    """
    for label, values, valid in (("mode", config.modes, MODES), ("step", config.steps, STEPS)):
        for value in values:
            if value not in valid:
                raise ValueError(f"{label}={value!r} is unknown; choose from {', '.join(valid)}")
    for label, dtype in (("dtype", config.dtype), ("autocast", config.autocast)):
        if dtype not in DTYPES and (label, dtype) != ("autocast", None):
            raise ValueError(f"{label}={dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    if config.steps == ("train",) and config.modes == ("optimized",):
        raise ValueError("mode='optimized' is for inference; train with 'eager', 'compile' or another mode of it")
    for label, number in (("rounds", config.rounds), ("batch_size", min(config.batch_sizes, default=0))):
        if number < 1:
            raise ValueError(f"{label}={number} must be at least 1")


@dataclass
class _Network:
    name: str
    model: nn.Module
    macs: int
    parameters: int
    views: int = 1
    plain: bool = False


def _networks(name: str, config: BenchConfig, device: torch.device) -> list[_Network]:
    """The network, its plain twin, and the twin once more for both mirrored views."""
    wanted: list[tuple[str, dict[str, Any], int]] = [(name, dict(config.settings), 1)]
    if name in equiflop.equivariant_models() or name.startswith(TWIN):
        twin, settings = equiflop.plain_twin(name, config.settings)
        wanted.append((twin, settings, 1))
        if config.mirrored:
            wanted.append((twin, settings, 2))
    networks: list[_Network] = []
    for model_name, settings, views in wanted:
        size = input_keywords(model_name, (3, *config.image_size))
        keywords = {**{k: v for k, v in size.items() if k == "img_size"}, **settings}
        model = networks[-1].model if views == 2 else create_model(model_name, keywords)
        check_takes(model, model_name, (3, *config.image_size))
        macs = equiflop.macs(model, config.image_size) * views
        parameters = sum(p.numel() for p in model.parameters())
        label = f"{model_name} (both views)" if views == 2 else model_name
        plain = views == 1 and (len(wanted) == 1 or model_name != name)
        networks.append(_Network(label, model.to(device, DTYPES[config.dtype]), macs, parameters, views, plain))
    if config.both_attentions:
        networks += [_written_out(network) for network in networks if network.plain]
    return networks


def _written_out(network: _Network) -> _Network:
    """The same network with softmax and two products in place of fused attention."""
    model = copy.deepcopy(network.model)
    found = [module for module in model.modules() if hasattr(module, "fused_attn")]
    if not found:
        raise ValueError(f"both_attentions: {network.name} has no attention that could be written out")
    for module in found:
        setattr(module, "fused_attn", False)  # noqa: B010  (a Final attribute to the type checker)
    return replace(network, name=f"{network.name} (attention written out)", model=model)


def _measure(
    name: str,
    networks: Sequence[_Network],
    config: BenchConfig,
    step: Step,
    mode: Mode,
    batch_size: int,
    device: torch.device,
    progress: Progress | None,
) -> list[Entry]:
    torch._dynamo.reset()
    images = torch.randn(batch_size, 3, *config.image_size, device=device, dtype=DTYPES[config.dtype])
    calls = {network.name: _call(network, images, step, mode, config) for network in networks}
    times = time_in_turns(calls, config.rounds, config.seconds, device, progress, warm_up=2)
    plain = min((times[network.name] for network in networks if network.plain), key=median)
    entries = []
    for network in networks:
        seconds = times[network.name]
        entries.append(
            Entry(
                network.name,
                name,
                network.parameters,
                network.macs,
                mode,
                step,
                batch_size,
                Spread.of(seconds),
                Spread.of([batch_size / value for value in seconds]),
                Spread.of([p / value for p, value in zip(plain, seconds, strict=True)]),
                peak_memory(calls[network.name], device) if config.memory else None,
                _fractions(calls, network, images, step, config) if config.fraction and device.type == "cpu" else None,
            )
        )
    return entries


def _fractions(
    calls: Mapping[str, Callable[[], object]], network: _Network, images: Tensor, step: Step, config: BenchConfig
) -> Fractions:
    return split_time(calls[network.name], _call(network, images, step, "eager", config))


def _compiled(model: nn.Module, mode: Mode, name_kernels: bool) -> Callable[[Tensor], Tensor]:
    """By ``torch.compile``; with ``name_kernels`` a profiler sees the compiler's own loops (CPU)."""
    options: dict[str, Any] = {} if mode == "compile" else dict(torch._inductor.list_mode_options(mode))
    if name_kernels:
        options["cpp.enable_kernel_profile"] = True
    compiled: Callable[[Tensor], Tensor] = torch.compile(model, options=options or None)
    if not options.get("triton.cudagraphs"):
        return compiled

    def step(images: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the step before gave is no longer needed
        return compiled(images)

    return step


def _call(network: _Network, images: Tensor, step: Step, mode: Mode, config: BenchConfig) -> Callable[[], object]:
    """A function that makes one step."""
    products = DTYPES[config.autocast] if config.autocast is not None else None
    casting = torch.autocast(images.device.type, products, enabled=products is not None)
    model: nn.Module = MirrorAveraged(network.model) if network.views == 2 else network.model
    if step == "forward":
        model = model.eval()
        if mode == "optimized":
            model = optimize_for_inference(model)
        run: Callable[[Tensor], Tensor] = (
            model if mode in ("eager", "optimized") else _compiled(model, mode, config.fraction)
        )

        def forward() -> Tensor:
            with torch.no_grad(), casting:
                return run(images)

        return forward
    model = model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    loss_of: Callable[[Tensor], Tensor] = (
        model if mode in ("eager", "optimized") else _compiled(model, mode, config.fraction)
    )

    def train() -> None:
        with casting:
            logits = loss_of(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # last, so that the step's memory includes its gradients

    return train
