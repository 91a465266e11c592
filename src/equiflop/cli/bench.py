"""``equiflop bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from equiflop.cli.completion import complete_models
from equiflop.cli.options import ImageSize, KeyValue, device_option, json_option

if TYPE_CHECKING:
    from equiflop.benchmark.compare import Entry

_HEADER = f"{'network':<38}{'params M':>9}{'MACs G':>9}{'ms':>10}{'images/s':>10}{'speedup':>9}{'range':>13}"


@click.command(name="bench")
@click.argument("models", nargs=-1, shell_complete=complete_models)
@click.option(
    "--mode",
    "modes",
    multiple=True,
    default=["compile"],
    show_default=True,
    help="eager, compile, reduce-overhead or max-autotune (torch.compile's modes, with CUDA graphs on GPUs), or "
    "optimized (optimize_for_inference); repeatable.",
)
@click.option(
    "--step", "steps", multiple=True, default=["forward"], show_default=True, help="forward or train; repeatable."
)
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(min=1),
    multiple=True,
    default=[8],
    show_default=True,
    help="Images a step; repeatable.",
)
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16 or float16.")
@click.option("--img-size", type=ImageSize(), default="224", show_default=True, help="224 or 256x192, height first.")
@click.option(
    "--set", "settings", type=KeyValue(), multiple=True, help="A keyword of all models, such as depth=2; repeatable."
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=7,
    show_default=True,
    help="Turns of every network; the median counts.",
)
@click.option("--seconds", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Least length of a turn.")
@click.option("--mirrored", is_flag=True, help="Also time plain averaged over both mirrored views.")
@click.option(
    "--both-attentions",
    is_flag=True,
    help="Also time plain with its attention written out; the speedup is over the faster of the two.",
)
@click.option("--autocast", help="Run products in this dtype under torch.autocast, such as bfloat16.")
@click.option("--memory", is_flag=True, help="Also measure the peak memory of a step.")
@click.option(
    "--fraction",
    is_flag=True,
    help="Also split the time into matrix products, attention, pointwise work and copies (CPU), and compare the "
    "products with what they take by themselves.",
)
@click.option(
    "--accuracy", type=click.Path(path_type=Path), help="JSON file with accuracies by model name, for --plot."
)
@click.option("--plot", type=click.Path(path_type=Path, file_okay=False), help="Folder for the figures.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file for the results.")
@device_option
@json_option
def command(
    models: tuple[str, ...],
    modes: tuple[Any, ...],
    steps: tuple[Any, ...],
    batch_sizes: tuple[int, ...],
    dtype: str,
    img_size: tuple[int, int],
    settings: tuple[tuple[str, Any], ...],
    rounds: int,
    seconds: float,
    mirrored: bool,
    both_attentions: bool,
    autocast: str | None,
    memory: bool,
    fraction: bool,
    accuracy: Path | None,
    plot: Path | None,
    output: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Time MODELS beside their plain twins.

    A model and its plain twin take turns in one process, and "speedup" is the median over rounds of the ratio within a
    round: so it holds on machines with other load too. MODELS are names of "equiflop models", by default E(ViT-S) and
    E(ViT-B); a name of timm's own is timed alone. MACs are multiply-adds of one image.

    \b
    Examples:
      equiflop bench flop_deit3_base_patch16_224 --mode eager --mode compile --mode optimized
      equiflop bench flop_deit3_small_patch16_224 --step train --memory
      equiflop bench flop_deit3_base_patch16_224 --fraction
    """
    from equiflop.benchmark.compare import BenchConfig, check_config, compare
    from equiflop.benchmark.figures import check_figures, read_accuracies, write_figures
    from equiflop.classify.model_spec import check_model_name
    from equiflop.files import check_writable, write_text
    from equiflop.runtime.device import pick_device
    from equiflop.runtime.machine import describe_machine
    from equiflop.runtime.progress import Progress

    names = models or ("flop_deit3_small_patch16_224", "flop_deit3_base_patch16_224")
    for name in names:
        check_model_name(name)
    accuracies = read_accuracies(accuracy) if accuracy is not None else {}
    config = BenchConfig(
        modes=modes,
        steps=steps,
        batch_sizes=batch_sizes,
        dtype=dtype,
        image_size=img_size,
        rounds=rounds,
        seconds=seconds,
        mirrored=mirrored,
        both_attentions=both_attentions,
        autocast=autocast,
        memory=memory,
        fraction=fraction,
        settings=dict(settings),
    )
    check_config(config)
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"--output={output}: there is no folder {output.parent}")
    if output is not None:
        check_writable(output)
    if plot is not None:
        check_figures(plot)
    where = pick_device(device)
    machine = describe_machine(where)
    progress = Progress("bench")
    entries: list[Entry] = []
    last: list[tuple[Any, ...]] = []

    def text() -> str:
        result = {**machine, "dtype": dtype, "entries": [entry.as_dict() for entry in entries]}
        return json.dumps(result, indent=2) + "\n"

    def show(entry: Entry) -> None:
        progress.clear()
        entries.append(entry)
        if output is not None:  # after every entry, so that a long run that is stopped leaves what it found
            write_text(output, text())
        setting = (entry.step, entry.mode, entry.batch_size)
        if not as_json:
            if last[-1:] != [setting]:
                click.echo(f"\n{entry.step}, {entry.mode}, batch {entry.batch_size}, {dtype}\n{_HEADER}")
            click.echo(_line(entry))
        last.append(setting)

    try:
        for name in names:
            last.clear()
            compare(name, config, where, progress, show)
    except KeyboardInterrupt:
        progress.clear()
        if output is not None and entries:
            click.echo(f"wrote {output}, with what was measured until now", err=True)
        raise
    progress.clear()
    if output is not None:
        click.echo(f"\nwrote {output}", err=as_json)
    if plot is not None:
        for path in write_figures(plot, entries, accuracies):
            click.echo(f"wrote {path}", err=as_json)
    if as_json:
        click.echo(text(), nl=False)


def _line(entry: Entry) -> str:
    line = (
        f"{entry.name:<38}{entry.parameters / 1e6:>9.2f}{entry.macs / 1e9:>9.3f}{1e3 * entry.latency.median:>10.1f}"
        f"{entry.throughput.median:>10.2f}{entry.speedup.median:>9.2f}"
        f"{entry.speedup.lowest:>7.2f}-{entry.speedup.highest:.2f}"
    )
    if entry.peak_bytes is not None:
        line += f"\n    peak memory of a step {entry.peak_bytes / 2**20:,.1f} MiB beside the parameters"
    if entry.fractions is not None:
        total = sum(entry.fractions.seconds.values())
        shares = ", ".join(f"{kind} {100 * value / total:.0f} %" for kind, value in entry.fractions.seconds.items())
        products = entry.fractions.seconds["matrix products"]
        line += f"\n    {shares}"
        if products:
            rate = entry.fractions.products_macs / products / 1e9
            reached = entry.fractions.products_peak_seconds / products
            line += f"; products at {rate:.0f} GMAC/s, {100 * reached:.0f} % of what they reach alone"
    return line
