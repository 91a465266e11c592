"""Accuracy per MAC on CIFAR-10: plain networks with mirrored training images against their equivariant twins.

    python studies/cifar10.py run --data FOLDER      # resumes; FOLDER/train/CLASS/*.jpg, FOLDER/test/CLASS/*.jpg
    python studies/cifar10.py run                    # downloads CIFAR-10 by torchvision
    python studies/cifar10.py report                 # writes the tables of cifar10/README.md and accuracy.png
    python studies/cifar10.py run --scale full       # larger networks, 50 epochs, on a GPU; results in --out

Every finished run is one line of cifar10/results.jsonl; a run that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equiflop
from cifar10_images import load_images, measure
from cifar10_networks import Run, full_runs, initialise, replace_activation, short_runs
from equiflop.classify import ClassifierTrainer, TrainConfig
from equiflop.data import ImageData
from equiflop.files import write_text
from equiflop.runtime.machine import describe_machine
from job_queue import Results, options_of, put_table, run_all, run_one, spread

HERE = Path(__file__).parent / "cifar10"
RESULTS = Results(HERE / "results.jsonl")
MARKERS = {"plain": "s", "E": "o", "E-wide": "^"}
COLOURS = {"vit": "tab:blue", "resmlp": "tab:orange", "convnext": "tab:green"}
NAMES = {"vit": "ViT", "resmlp": "ResMLP", "convnext": "ConvNeXt"}


@dataclass(frozen=True)
class Scale:
    """How large the networks are and how long they are trained.

    Attributes:
        runs: all of them, given a number of seeds.
        recipe: settings of the training.
    """

    runs: Callable[[int], list[Run]]
    recipe: dict[str, Any]


SHORT = {"epochs": 2, "batch_size": 64, "lr": 1.5e-3, "weight_decay": 0.05, "warmup_epochs": 0.3, "shift": 2}
FULL = {"epochs": 50, "batch_size": 256, "lr": 1e-3, "weight_decay": 0.05, "warmup_epochs": 5.0, "shift": 4}
HABITS = {"save_minutes": 1.0, "keep_checkpoints": 1, "compile": True}
SCALES = {
    "short": Scale(short_runs, {**SHORT, **HABITS, "device": "cpu"}),
    "full": Scale(full_runs, {**FULL, **HABITS, "precision": "bfloat16", "device": "auto"}),
}


def execute(run: Run, recipe: dict[str, Any], data: ImageData, folder: Path) -> dict[str, Any]:
    """Train (or go on), measure, and give the line of the results."""
    config = TrainConfig(
        model=run.model,
        data="CIFAR-10",
        out=str(folder / run.name),
        model_kwargs=run.keywords,
        seed=run.seed,
        **recipe,
    )
    trainer = ClassifierTrainer(config, data)
    if run.activation != "spatial":
        replace_activation(trainer.model, run.activation)
    initialise(trainer.model, run.initialisation, run.seed)
    trainer.resume()
    trainer.run()
    return {
        "run": run.name,
        "family": run.family,
        "variant": run.variant,
        "seed": run.seed,
        "macs": equiflop.macs(trainer.model, (3, 32, 32)),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        **measure(trainer.model, data, trainer.device),
        "train_loss": trainer.history[-1].train_loss,
        "train_seconds": sum(record.seconds for record in trainer.history),
        "epochs": [record.to_dict() for record in trainer.history],
        "config": config.to_dict() | {"out": run.name},
        "machine": describe_machine(trainer.device) | {"command": "python studies/cifar10.py run"},
    }


def is_of(record: dict[str, Any], run: Run, recipe: dict[str, Any]) -> bool:
    """Whether a line of the results is of this run, with this recipe."""
    config = record["config"]
    wanted = {**recipe, "model": run.model, "model_kwargs": run.keywords, "seed": run.seed}
    return record["run"] == run.name and all(config[name] == value for name, value in wanted.items())


Groups = dict[tuple[str, str], list[dict[str, Any]]]


def grouped(scale: Scale, records: list[dict[str, Any]]) -> Groups:
    """What is finished, by family and variant, seeds together."""
    groups: Groups = defaultdict(list)
    seeds = 1 + max((record["seed"] for record in records), default=0)
    for run in sorted(scale.runs(seeds), key=lambda run: list(COLOURS).index(run.family)):
        for record in records:
            if is_of(record, run, scale.recipe):
                groups[run.family, run.variant].append(record)
    return groups


def report() -> None:
    """Tables and figure from the results of the short runs."""
    groups = grouped(SCALES["short"], RESULTS.records())
    main = {key: records for key, records in groups.items() if key[1] in MARKERS}
    others = {key: records for key, records in groups.items() if key[1] not in MARKERS}
    for name, part in (("main", main), ("ablations", others)):
        put_table(HERE / "README.md", name, _table(part))
    _draw(main)
    print(_table(groups))


def _table(groups: Groups) -> str:
    lines = [
        "| network | MACs M | parameters M | seeds | accuracy % | both views % | changes % | training s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (family, variant), records in groups.items():
        cells = [
            f"{NAMES[family]} {variant}",
            f"{records[0]['macs'] / 1e6:.1f}",
            f"{records[0]['parameters'] / 1e6:.3f}",
            str(len(records)),
            spread([100 * record["accuracy"] for record in records]),
            spread([100 * record["accuracy_both_views"] for record in records]),
            spread([100 * record["changed_when_mirrored"] for record in records]),
            f"{statistics.mean(record['train_seconds'] for record in records):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _draw(groups: Groups) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for (family, variant), records in groups.items():
        points = [(1, variant, [100 * record["accuracy"] for record in records])]
        if variant == "plain":
            points.append((2, "plain, both views", [100 * record["accuracy_both_views"] for record in records]))
        for views, label, values in points:
            axes.errorbar(
                views * records[0]["macs"] / 1e6,
                statistics.mean(values),
                yerr=statistics.stdev(values) if len(values) > 1 else None,
                marker=MARKERS[variant],
                markerfacecolor=COLOURS[family] if views == 1 else "white",
                color=COLOURS[family],
                label=f"{NAMES[family]} {label}",
                linestyle="none",
                capsize=3,
            )
    axes.set(xlabel="multiply-adds of an image in millions", ylabel="test accuracy in %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(HERE / "accuracy.png", dpi=120)


def main() -> None:
    """Read the command line."""
    parser = options_of(__doc__, "runs/study-cifar10")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", choices=SCALES, default="short", help="for two cores, or for a GPU")
    parser.add_argument("--epochs", type=int, help="other than the scale's, not compiled: to see that it runs")
    options = parser.parse_args()
    if options.what == "report":
        report()
        return
    scale = SCALES[options.scale]
    runs = {run.name: run for run in scale.runs(options.seeds)}
    recipe, more = scale.recipe, ["--seeds", str(options.seeds), "--scale", options.scale]
    if options.epochs:
        recipe = {**recipe, "epochs": options.epochs, "warmup_epochs": 0.1 * options.epochs, "compile": False}
        more += ["--epochs", str(options.epochs)]
    if options.what == "one":
        data = load_images(options.data, options.out)
        run_one(options.name, options.out, lambda: execute(runs[options.name], recipe, data, options.out))
        return
    results = RESULTS if options.scale == "short" else Results(options.out / "results.jsonl")
    load_images(options.data, options.out)
    done = results.records()
    waiting = [name for name, run in runs.items() if not any(is_of(record, run, recipe) for record in done)]
    waiting = [name for name in waiting if options.name in (None, name)]
    more += ["--data", options.data] if options.data else []
    try:
        run_all(__file__, waiting, more, options.out, options.jobs, results)
    finally:
        if options.scale != "short":
            write_text(options.out / "table.md", _table(grouped(Scale(scale.runs, recipe), results.records())) + "\n")


if __name__ == "__main__":
    main()
