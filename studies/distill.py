"""How far a trained plain network can be taken over by its equivariant twin, on CIFAR-10: see distill/README.md.

    python studies/distill.py run --data FOLDER      # resumes; FOLDER/train/CLASS/*.jpg, FOLDER/test/CLASS/*.jpg
    python studies/distill.py run                    # downloads CIFAR-10 by torchvision
    python studies/distill.py report                 # writes the tables of distill/README.md and accuracy.png

Every finished run is one line of distill/results.jsonl; a run that was stopped goes on from its checkpoint. The
teachers' weights are kept in distill/teachers, so that students can be trained without training teachers first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import equiflop
from cifar10_images import TEST_BATCH, load_images, measure
from distill_report import report
from distill_runs import HERE, KEYWORDS, MODELS, RECIPE, STARTS, TEACHERS, WIDTHS, Run, all_runs, is_of
from equiflop.classify import ClassifierTrainer, MirrorAveraged, TrainConfig, load_model
from equiflop.classify.weights import save_weights
from equiflop.data import ImageData
from equiflop.distill import DistillConfig, DistillTrainer, PlainTeacher, mirror_report
from equiflop.distill.steer import steer
from equiflop.distill.teacher import sample_images
from equiflop.grids import named_image_group
from equiflop.runtime.machine import describe_machine
from job_queue import Results, options_of, run_all, run_one

RESULTS = Results(HERE / "results.jsonl")


def execute(run: Run, data: ImageData, folder: Path) -> dict[str, Any]:
    """Train (or go on), measure, and give the line of the results."""
    common: dict[str, Any] = {
        "data": "CIFAR-10",
        "out": str(folder / run.name),
        "seed": run.seed,
        "epochs": run.epochs,
        "warmup_epochs": 0.1 * run.epochs,
        **RECIPE,
    }
    keywords = {**KEYWORDS[run.family], **WIDTHS[run.family, run.width]}
    model = MODELS[run.family]
    config: TrainConfig
    if run.kind in ("teacher", "plain"):
        common |= {} if run.kind == "teacher" else {"start_from": str(run.teacher)}
        config = TrainConfig(model=model, model_kwargs=keywords, **common)
    elif run.kind == "scratch":
        keywords |= {"group": "flop", **run.changes.get("model_kwargs", {})}
        config = TrainConfig(model=f"twin:{model}", model_kwargs=keywords, **common)
    else:
        heads = {"heads": "regular"} if run.family == "vit" else {}
        common |= {"teacher": str(run.teacher), "init": run.kind}
        common |= {"model_kwargs": {**WIDTHS[run.family, run.width], **heads}}
        config = DistillConfig(model=model, **{**common, **run.changes})
    trainer = DistillTrainer(config, data) if isinstance(config, DistillConfig) else ClassifierTrainer(config, data)
    trainer.resume()
    trainer.run()
    trained = load_model(trainer.write_weights())
    if run.kind == "teacher":
        TEACHERS.mkdir(exist_ok=True)
        halves = {key: value.half() for key, value in trained.model.state_dict().items()}
        save_weights(run.teacher, halves, trained.spec)
        trained = load_model(run.teacher)
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
        **({} if run.epochs else _projected(run, trainer, data)),
        "train_loss": trainer.history[-1].train_loss if run.epochs else None,
        "train_seconds": sum(record.seconds for record in trainer.history),
        "epochs": [record.to_dict() for record in trainer.history],
        "config": config.to_dict()
        | {"out": run.name, "teacher": run.teacher.name if run.kind in STARTS else ""}
        | ({"start_from": run.teacher.name} if run.kind == "plain" else {}),
        "machine": describe_machine(torch.device("cpu")) | {"command": "python studies/distill.py run"},
    }


def _projected(run: Run, trainer: Any, data: ImageData) -> dict[str, Any]:
    """What an untrained student is when its weights are projected from its teacher's, but not fitted."""
    student = trainer.spec.build()
    teacher = trainer.teacher.cpu()
    images = map(teacher.normalised, sample_images(data.train, trainer.config, torch.device("cpu")))
    found = steer(student, teacher.model, images, fit=False)
    carried = {"stream": found.stream.kept, "heads": found.heads, "units": found.units}
    return {"projected": _measured(run, student, data), "carried_over": carried, "errors": trainer.steering.errors}


def _measured(run: Run, model: Any, data: ImageData) -> dict[str, Any]:
    """Test accuracy, alone and averaged over the views; a student's agreement, a teacher's symmetry by layer."""
    found = measure(model, data, torch.device("cpu"))
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


def main() -> None:
    """Read the command line."""
    options = options_of(__doc__, "runs/study-distill").parse_args()
    if options.what == "report":
        report(RESULTS.records())
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
