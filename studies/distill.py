"""How far a trained plain network can be taken over by its equivariant twin, on CIFAR-10: see distill/README.md.

    python studies/distill.py run --data FOLDER      # resumes; FOLDER/train/CLASS/*.jpg, FOLDER/test/CLASS/*.jpg
    python studies/distill.py run                    # downloads CIFAR-10 by torchvision
    python studies/distill.py report                 # writes the tables of distill/README.md and accuracy.png

Every finished run is one line of distill/results.jsonl; a run that was stopped goes on from its checkpoint. The
teachers' weights are kept in distill/teachers, so that students can be trained without training teachers first.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import equiflop
from cifar10_images import load_images
from equiflop.classify import ClassifierTrainer, MirrorAveraged, TrainConfig, evaluate, load_model
from equiflop.classify.weights import save_weights
from equiflop.data import ImageData
from equiflop.distill import DistillConfig, DistillTrainer, PlainTeacher, mirror_report
from equiflop.grids import named_image_group
from equiflop.runtime.machine import describe_machine
from job_queue import Results, options_of, put_table, run_all, run_one, spread

HERE = Path(__file__).parent / "distill"
RESULTS = Results(HERE / "results.jsonl")
TEACHERS = HERE / "teachers"
EPOCHS = 20  # the teachers' budget
RECIPE: dict[str, Any] = {
    "batch_size": 128,
    "lr": 1.5e-3,
    "weight_decay": 0.05,
    "shift": 2,
    "save_minutes": 1.0,
    "keep_checkpoints": 1,
    "compile": True,
    "device": "cpu",
}
TEST_BATCH = 250  # that of the trainer, so that nothing is compiled again
NAMES = {"vit": "ViT", "convnext": "ConvNeXt"}
MODELS: dict[str, str] = {"vit": "deit3_small_patch16_224", "convnext": "convnext_tiny"}
KEYWORDS: dict[str, dict[str, Any]] = {
    "vit": {"patch_size": 8, "depth": 4, "num_heads": 4, "init_values": 1.0, "embed_dim": 128},
    "convnext": {"depths": [2, 2, 2, 2], "ls_init_value": 1.0, "dims": [32, 64, 128, 256]},
}
WIDTHS: dict[tuple[str, str], dict[str, Any]] = {
    ("vit", "1"): {"embed_dim": 128},
    ("vit", "3/4"): {"embed_dim": 96},
    ("convnext", "1"): {"dims": [32, 64, 128, 256]},
    ("convnext", "3/4"): {"dims": [24, 48, 96, 192]},
}
COLOURS = {"scratch": "tab:gray", "random": "tab:blue", "steer": "tab:red"}


@dataclass(frozen=True)
class Run:
    """A teacher, or a student of it.

    Attributes:
        family: "vit" or "convnext".
        kind: "teacher", "scratch" (the twin trained on labels), "random" or "steer" (distilled, from these weights).
        width: of the student in terms of the teacher's, "1" or "3/4".
        epochs: how long it is trained.
        seed: decides everything random.
        changes: settings other than those of the recipe; the name says which.
        note: what the name says of them.
    """

    family: str
    kind: str
    width: str = "1"
    epochs: int = EPOCHS
    seed: int = 0
    changes: dict[str, Any] = field(default_factory=dict, compare=False)
    note: str = ""

    @property
    def name(self) -> str:
        """Name of its folder and of its line in the results."""
        if self.kind == "teacher":
            return f"{self.family}-teacher"
        width = self.width.replace("/", "-of-")
        note = f"-{self.note}" if self.note else ""
        return f"{self.family}-width-{width}-{self.kind}{note}-epochs-{self.epochs}-seed{self.seed}"

    @property
    def teacher(self) -> Path:
        """Where its teacher's weights are."""
        return TEACHERS / f"{self.family}.safetensors"


def all_runs() -> list[Run]:
    """In order of what says most: the hypothesis with one seed, the short runs, the other seeds, widths, long runs."""
    found: dict[Run, None] = {Run(family, "teacher"): None for family in MODELS}
    for family in MODELS:
        kinds = ("scratch", "random", "steer") if family == "vit" else ("scratch", "random")
        found |= {Run(family, kind, epochs=epochs): None for epochs in (4, 1) for kind in kinds}
        if family == "vit":
            found[Run(family, "steer", epochs=2)] = None
    found |= dict.fromkeys(_repeated())
    for family in MODELS:
        kinds = ("scratch", "random", "steer") if family == "vit" else ("scratch", "random")
        found |= {Run(family, kind, "3/4", epochs): None for epochs in (4, 1) for kind in kinds}
    found |= dict.fromkeys(_variations())
    for kind in ("random", "steer", "scratch"):
        for family in MODELS:
            if family == "vit" or kind != "steer":
                found |= {Run(family, kind): None, Run(family, kind, "3/4"): None}
    return list(found)


def _repeated() -> Iterator[Run]:
    """The main rows with two more seeds."""
    for seed in (1, 2):
        for epochs in (4, 1, 2):
            for kind in ("steer", "random", "scratch"):
                if epochs != 2 or kind == "steer":
                    yield Run("vit", kind, epochs=epochs, seed=seed)
        for kind in ("random", "scratch"):
            yield Run("convnext", kind, epochs=4, seed=seed)


def _variations() -> Iterator[Run]:
    """Other settings at 20 % of the budget, one seed each."""
    slower: dict[str, Any] = {"lr": 5e-4}
    yield Run("vit", "steer", epochs=4, changes=slower, note="lr-5e-4")
    yield Run("vit", "random", epochs=4, changes=slower, note="lr-5e-4")
    labels: dict[str, Any] = {"label_weight": 1.0}
    for family in MODELS:
        yield Run(family, "random", epochs=4, changes=labels, note="labels")
    yield Run("vit", "steer", epochs=4, changes=labels, note="labels")


def execute(run: Run, data: ImageData, folder: Path) -> dict[str, Any]:
    """Train (or go on), measure, and give the line of the results."""
    common: dict[str, Any] = {
        "data": "CIFAR-10",
        "out": str(folder / run.name),
        "seed": run.seed,
        "epochs": run.epochs,
        "warmup_epochs": 0.1 * run.epochs,
        **RECIPE,
        **run.changes,
    }
    keywords = {**KEYWORDS[run.family], **WIDTHS[run.family, run.width]}
    model = MODELS[run.family]
    config: TrainConfig
    if run.kind == "teacher":
        config = TrainConfig(model=model, model_kwargs=keywords, **common)
    elif run.kind == "scratch":
        config = TrainConfig(model=f"twin:{model}", model_kwargs={**keywords, "group": "flop"}, **common)
    else:
        common |= {"teacher": str(run.teacher), "init": run.kind, "model_kwargs": WIDTHS[run.family, run.width]}
        config = DistillConfig(model=model, **common)
    trainer = DistillTrainer(config, data) if isinstance(config, DistillConfig) else ClassifierTrainer(config, data)
    before = trainer.measurement.of(trainer.learner.networks) if run.kind == "steer" else {}
    trainer.resume()
    trainer.run()
    trained = load_model(trainer.write_weights())
    if run.kind == "teacher":
        TEACHERS.mkdir(exist_ok=True)
        halves = {key: value.half() for key, value in trained.model.state_dict().items()}
        save_weights(run.teacher, halves, trained.spec)
        trained = load_model(run.teacher)
    steering = getattr(trainer, "steering", None)
    return {
        "run": run.name,
        "family": run.family,
        "kind": run.kind,
        "width": run.width,
        "seed": run.seed,
        "note": run.note,
        "macs": equiflop.macs(trained.model, (3, 32, 32)),
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        **_measured(run, trained.model, data),
        "before": before,
        "carried_over": steering and {"stream": steering.stream.kept, "heads": steering.heads, "units": steering.units},
        "train_loss": trainer.history[-1].train_loss,
        "train_seconds": sum(record.seconds for record in trainer.history),
        "epochs": [record.to_dict() for record in trainer.history],
        "config": config.to_dict() | {"out": run.name, "teacher": run.teacher.name if run.kind in COLOURS else ""},
        "machine": describe_machine(torch.device("cpu")) | {"command": "python studies/distill.py run"},
    }


def _measured(run: Run, model: Any, data: ImageData) -> dict[str, Any]:
    """Test accuracy, alone and averaged over the views; a student's agreement, a teacher's symmetry by layer."""
    device = torch.device("cpu")
    start = time.perf_counter()
    alone = evaluate(model, data.test, TEST_BATCH, device, classes=len(data.classes))
    found: dict[str, Any] = {
        "test_seconds_both_views": time.perf_counter() - start,
        "accuracy": alone.top1,
        "accuracy_both_views": evaluate(MirrorAveraged(model), data.test, TEST_BATCH, device).top1,
        "calibration_error": alone.calibration_error,
        "changed_when_mirrored": alone.changed_share,
    }
    trained = load_model(run.teacher)
    teacher = PlainTeacher(trained.spec, trained.model, "the teacher")
    teacher.take(data.preprocessing)
    if run.kind == "teacher":
        images = (batch.images for batch in data.train.batches(torch.arange(1000), TEST_BATCH))
        return found | {"layers": mirror_report(teacher, images, named_image_group("flop")).as_dict()["layers"]}
    return found | {"agreement": _agreement(model, teacher, data)}


@torch.no_grad()
def _agreement(model: Any, teacher: PlainTeacher, data: ImageData) -> float:
    """Share of the test images to which a student gives the class of its teacher averaged over both views."""
    averaged = MirrorAveraged(teacher.model).eval()
    model.eval()
    agreed = 0
    for batch in data.test.batches(torch.arange(len(data.test)), TEST_BATCH):
        agreed += int((model(batch.images).argmax(1) == averaged(batch.images).argmax(1)).sum())
    return agreed / len(data.test)


def is_of(record: dict[str, Any], run: Run) -> bool:
    """Whether a line of the results is of this run, with today's recipe."""
    wanted = {**RECIPE, "epochs": run.epochs, "seed": run.seed, **run.changes}
    return record["run"] == run.name and all(record["config"][name] == value for name, value in wanted.items())


def report() -> None:
    """Tables and figure from the results."""
    by_name = {record["run"]: record for record in RESULTS.records()}
    groups: dict[Run, list[dict[str, Any]]] = defaultdict(list)
    for run in all_runs():
        if run.name in by_name and is_of(by_name[run.name], run):
            groups[Run(run.family, run.kind, run.width, run.epochs, note=run.note)].append(by_name[run.name])
    teachers = {run.family: records[0] for run, records in groups.items() if run.kind == "teacher"}
    order = list(COLOURS)
    students = {run: records for run, records in groups.items() if run.kind in order}
    families = list(NAMES)
    ordered = sorted(
        students,
        key=lambda run: (families.index(run.family), run.width != "1", run.epochs, order.index(run.kind), run.note),
    )
    put_table(HERE / "README.md", "teachers", _teachers(teachers))
    put_table(HERE / "README.md", "students", _students({run: students[run] for run in ordered}, teachers))
    put_table(HERE / "README.md", "layers", _layers(teachers))
    _draw(students, teachers)


def _teachers(teachers: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| teacher | MACs M | parameters M | accuracy % | both views % | changes when mirrored % | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for family, record in teachers.items():
        shares = [100 * record[key] for key in ("accuracy", "accuracy_both_views", "changed_when_mirrored")]
        cells = [NAMES[family], f"{record['macs'] / 1e6:.1f}", f"{record['parameters'] / 1e6:.3f}"]
        cells += [*(f"{share:.2f}" for share in shares), f"{record['train_seconds'] / 60:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _students(groups: dict[Run, list[dict[str, Any]]], teachers: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| student | width | budget | start | MACs M | seeds | accuracy % | below teacher | agreement % | minutes |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    starts = {"scratch": "no teacher", "random": "random", "steer": "steer"}
    for run, records in groups.items():
        shares = [100 * record["accuracy"] for record in records]
        goal = 100 * teachers[run.family]["accuracy_both_views"]
        cells = [
            NAMES[run.family],
            run.width,
            f"{100 * run.epochs // EPOCHS} %",
            starts[run.kind] + (f", {run.note}" if run.note else ""),
            f"{records[0]['macs'] / 1e6:.1f}",
            str(len(records)),
            spread(shares),
            f"{goal - sum(shares) / len(shares):.2f}",
            spread([100 * record["agreement"] for record in records]),
            f"{sum(record['train_seconds'] for record in records) / len(records) / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _layers(teachers: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| teacher | place | best involution % | one for the width % | none % |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for family, record in teachers.items():
        for layer in record["layers"]:
            shares = (f"{100 * layer[key]:.1f}" for key in ("best", "common", "unchanged"))
            lines.append(f"| {NAMES[family]} | {layer['place']} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _draw(groups: dict[Run, list[dict[str, Any]]], teachers: dict[str, dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, family in zip(figure.subplots(1, len(teachers), squeeze=False)[0], teachers, strict=True):
        goal = 100 * teachers[family]["accuracy_both_views"]
        axes.axhline(goal, color="black", linestyle=":", label="teacher, both views")
        for kind, colour in COLOURS.items():
            for width, style in (("1", "-"), ("3/4", "--")):
                runs = sorted(
                    (run for run in groups if (run.family, run.kind, run.width, run.note) == (family, kind, width, "")),
                    key=lambda run: run.epochs,
                )
                if not runs:
                    continue
                budget = [100 * run.epochs / EPOCHS for run in runs]
                values = [[100 * record["accuracy"] for record in groups[run]] for run in runs]
                means = [sum(each) / len(each) for each in values]
                label = f"{'no teacher' if kind == 'scratch' else kind}, width {width}"
                axes.plot(budget, means, style, color=colour, marker="o" if width == "1" else "^", label=label)
        axes.set(xscale="log", xlabel="budget in % of the teacher's", title=NAMES[family])
        axes.set_xticks([5, 10, 20, 100], ["5", "10", "20", "100"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test accuracy in %")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(HERE / "accuracy.png", dpi=120)


def main() -> None:
    """Read the command line."""
    options = options_of(__doc__, "runs/study-distill").parse_args()
    if options.what == "report":
        report()
        return
    runs = {run.name: run for run in all_runs()}
    data = load_images(options.data, options.out)
    if options.what == "one":
        run_one(options.name, options.out, lambda: execute(runs[options.name], data, options.out))
        return
    done = RESULTS.records()
    waiting = [
        name
        for name, run in runs.items()
        if options.name in (None, name) and not any(is_of(record, run) for record in done)
    ]

    def ready(name: str) -> bool:
        """A student needs its teacher's weights."""
        return runs[name].kind == "teacher" or f"{runs[name].family}-teacher" in {r["run"] for r in RESULTS.records()}

    arguments = ["--data", options.data] if options.data else []
    run_all(__file__, waiting, arguments, options.out, options.jobs, RESULTS, ready)


if __name__ == "__main__":
    main()
