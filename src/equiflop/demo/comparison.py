"""The demo: train both networks in turns, measure them, show and save the results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from equiflop.benchmark.timing import throughput_in_turns
from equiflop.classify import ClassifierTrainer, MirrorAveraged, TrainConfig, evaluate
from equiflop.classify.recipe import load_recipe
from equiflop.counting import macs
from equiflop.data import ImageData, open_data
from equiflop.data.fashion_mnist import find_whole
from equiflop.demo.picture import Example, draw_picture
from equiflop.demo.results import (
    AVERAGED_NAME,
    E_NAME,
    PLAIN_NAME,
    DemoResults,
    FullSize,
    Row,
    format_table,
    write_results,
)
from equiflop.models import plain_twin
from equiflop.runtime.device import compile_problem, pick_device
from equiflop.runtime.interrupt import StopRequest
from equiflop.runtime.progress import Progress, format_seconds
from equiflop.training import CheckpointError

_RECIPE = "demo"
_FULL_SIZE_MODEL = "flop_deit3_small_patch16_224"
_FULL_SIZE_BATCH = 8
_EVALUATION_BATCH = 250
_EXAMPLES = 6


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does with its recipe, ``classify/recipes/demo.yaml``, which is the same for both networks.

    Attributes:
        data: name or folder of a data set; None for Fashion-MNIST: the whole set where it is found, else the part that
            comes with equiflop. Nothing is downloaded unless a name asks for it.
        out: folder for the results.
        epochs: passes over the training images; None for the recipe's, or as many fewer as a larger set needs for the
            same number of images.
        seed: decides initialisation, order and augmentation.
        model_kwargs: keywords of both models that go before the recipe's.
        compile: use ``torch.compile`` where it works.
        full_size: also measure the throughput of a full-size pair at 224 pixels.
        device: where to compute.
        rounds: turns for each network when throughput is measured.
        seconds: length of a turn.
    """

    data: str | None = None
    out: str = "demo-output"
    epochs: int | None = None
    seed: int = 0
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    compile: bool = True
    full_size: bool = True
    device: str = "auto"
    rounds: int = 5
    seconds: float = 1.0


def run_demo(settings: DemoSettings, say: Callable[[str], object] = print) -> DemoResults:
    """Train, measure, and write ``results.json``, ``demo.png``, both networks and sample images.

    Args:
        settings: what to do.
        say: prints a line.

    Raises:
        ValueError: if data or settings do not fit.
        TrainingInterrupted: if a signal asked to stop; the same call then goes on from there.
        OSError: if a file cannot be written.
    """
    started = time.perf_counter()
    recipe = load_recipe(_RECIPE)
    source = settings.data or ("fashion-mnist" if find_whole() is not None else str(recipe["data"]))
    data = open_data(source)
    say(f"Data: {data.name} from {data.origin}, {len(data.train):,} images to train on, {len(data.test):,} to test on")
    settings = replace(settings, data=source, epochs=settings.epochs or _epochs(recipe, data))
    settings = _compile_if_possible(settings, say)
    equivariant, plain = _trainers(settings, recipe, data)
    _train_in_turns(equivariant, plain, say)

    progress = Progress("measuring")
    images = next(data.test.batches(torch.arange(min(_EVALUATION_BATCH, len(data.test))), _EVALUATION_BATCH))[0]
    models = {
        E_NAME: equivariant.model.eval(),
        PLAIN_NAME: plain.model.eval(),
        AVERAGED_NAME: MirrorAveraged(plain.model).eval(),
    }
    evaluations = {
        name: evaluate(model, data.test, _EVALUATION_BATCH, plain.device, progress=progress)
        for name, model in models.items()
    }
    rates = throughput_in_turns(models, images.to(plain.device), settings.rounds, settings.seconds, progress)
    full_size = _measure_full_size(settings, plain.device, progress) if settings.full_size else None
    progress.clear()

    counts = {E_NAME: _size(equivariant), PLAIN_NAME: _size(plain)}
    counts[AVERAGED_NAME] = (counts[PLAIN_NAME][0], 2 * counts[PLAIN_NAME][1])
    results = DemoResults(
        data=data.name,
        settings={**asdict(settings), "training": equivariant.config.to_dict()},
        compiled=settings.compile,
        seconds=time.perf_counter() - started,
        rows=tuple(Row(name, *counts[name], evaluations[name], rates[name]) for name in models),  # type: ignore[arg-type]
        training_images_per_second=(_training_rate(equivariant), _training_rate(plain)),
        full_size=full_size,
    )
    _save(Path(settings.out), results, equivariant, plain, say)
    return results


def _epochs(recipe: dict[str, Any], data: ImageData) -> int:
    """The recipe's, or fewer: as many images in all as the recipe takes of its own data, on a larger set."""
    images = int(recipe["epochs"]) * len(open_data(recipe["data"]).train)
    return min(int(recipe["epochs"]), max(1, round(images / len(data.train))))


def _compile_if_possible(settings: DemoSettings, say: Callable[[str], object]) -> DemoSettings:
    if not settings.compile:
        return settings
    problem = compile_problem(pick_device(settings.device))
    if problem is None:
        return settings
    say(f"torch.compile does not work here, so everything runs without it, and E(ViT) gains less: {problem}")
    return replace(settings, compile=False)


def _trainers(
    settings: DemoSettings, recipe: dict[str, Any], data: ImageData
) -> tuple[ClassifierTrainer, ClassifierTrainer]:
    twin, overrides = plain_twin(recipe["model"])
    keywords = {**recipe["model_kwargs"], **settings.model_kwargs}
    own = {
        "data": settings.data,
        "out": str(Path(settings.out) / "equivariant"),
        "model_kwargs": keywords,
        "epochs": settings.epochs,
        "seed": settings.seed,
        "compile": settings.compile,
        "device": settings.device,
    }
    config = TrainConfig.from_dict({**recipe, **own})
    plain_config = replace(
        config, model=twin, model_kwargs={**overrides, **keywords}, out=str(Path(settings.out) / "plain")
    )
    equivariant = ClassifierTrainer(config, data, Progress(f"{E_NAME:<9}"))
    plain = ClassifierTrainer(plain_config, data, Progress(f"{PLAIN_NAME:<9}"))
    for trainer in (equivariant, plain):
        try:
            trainer.resume()
        except CheckpointError:  # left by a demo with other settings
            trainer.start_anew()
    return equivariant, plain


def _train_in_turns(equivariant: ClassifierTrainer, plain: ClassifierTrainer, say: Callable[[str], object]) -> None:
    """One epoch each, in turns, with the state saved after every epoch."""
    say(
        f"Training {E_NAME} and its plain twin in turns, {equivariant.config.epochs} epochs each"
        + (" (compiling comes first: half a minute or so each)" if equivariant.config.compile else "")
    )
    with StopRequest() as stop, equivariant.session(stop), plain.session(stop):
        while not (equivariant.finished and plain.finished):
            trainer = min(equivariant, plain, key=lambda candidate: candidate.epoch)
            record = trainer.run_epoch()
            trainer.save()
            trainer.progress.clear()
            say(f"{trainer.progress.label}  {trainer.summary(record)}")


def _measure_full_size(settings: DemoSettings, device: torch.device, progress: Progress) -> FullSize:
    twin, overrides = plain_twin(_FULL_SIZE_MODEL)
    models = {
        _FULL_SIZE_MODEL: timm.create_model(_FULL_SIZE_MODEL).to(device).eval(),
        twin: timm.create_model(twin, **overrides).to(device).eval(),
    }
    counts = {name: macs(model, (224, 224)) for name, model in models.items()}
    if settings.compile:
        for model in models.values():
            model.compile(dynamic=False)
    images = torch.randn(_FULL_SIZE_BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(settings.seed))
    rates = throughput_in_turns(models, images.to(device), settings.rounds, settings.seconds, progress)
    return FullSize(
        equivariant=_FULL_SIZE_MODEL,
        plain=twin,
        macs=(counts[_FULL_SIZE_MODEL], counts[twin]),
        throughput=(rates[_FULL_SIZE_MODEL], rates[twin]),
        batch_size=_FULL_SIZE_BATCH,
        image_size=224,
    )


def _size(trainer: ClassifierTrainer) -> tuple[int, int]:
    """Parameters, and MACs for one image."""
    model = trainer.spec.build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, macs(model, trainer.spec.preprocessing.input_size)


def _training_rate(trainer: ClassifierTrainer) -> float:
    return statistics.median(record.samples_per_second for record in trainer.history)


def _save(
    out: Path,
    results: DemoResults,
    equivariant: ClassifierTrainer,
    plain: ClassifierTrainer,
    say: Callable[[str], object],
) -> None:
    examples = _changed_examples(equivariant, plain)
    write_results(out / "results.json", results)
    draw_picture(out / "demo.png", results, examples)
    for trainer in (equivariant, plain):
        trainer.write_weights()
        trainer.remove_checkpoints()
    say("")
    say(format_table(results))
    say("")
    say(f"Picture: {out / 'demo.png'}   numbers: {out / 'results.json'}   total: {format_seconds(results.seconds)}")
    if examples:
        sample = _save_sample(out / "samples", examples[0])
        say("An image that the plain network takes for something else when it is mirrored:")
        for trainer in (equivariant, plain):
            say(f"  equiflop predict {sample} --checkpoint {trainer.out}")


def _changed_examples(equivariant: ClassifierTrainer, plain: ClassifierTrainer) -> list[Example]:
    """Test images that both get right, but plain not when they are mirrored: the first of each confusion."""
    data = plain.data
    batch = _EVALUATION_BATCH
    examples: list[Example] = []
    seen: set[tuple[int, int]] = set()
    with torch.no_grad():
        for start in range(0, len(data.test) - batch + 1, batch):
            samples = torch.arange(start, start + batch)
            images, labels, _ = next(data.test.batches(samples, batch))
            ours, theirs, mirrored = (
                _classes(trainer, view)
                for trainer, view in ((equivariant, images), (plain, images), (plain, images.flip(-1)))
            )
            for i in ((theirs == labels) & (mirrored != labels) & (ours == labels)).nonzero().flatten().tolist():
                kind = (int(theirs[i]), int(mirrored[i]))
                if kind in seen or len(examples) == _EXAMPLES:
                    continue
                seen.add(kind)
                pixels = _pixels(images[i], data.preprocessing.mean, data.preprocessing.std)
                examples.append(Example(pixels, data.classes[kind[0]], data.classes[kind[1]]))
    return examples


def _classes(trainer: ClassifierTrainer, images: Tensor) -> Tensor:
    classes: Tensor = trainer.model(images.to(trainer.device)).argmax(dim=1).cpu()
    return classes


def _pixels(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Undo the normalisation: ``(C, H, W)`` to uint8 ``(H, W)`` for grey images or ``(H, W, 3)``."""
    plain = image * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    pixels = plain.mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels


def _save_sample(folder: Path, example: Example) -> Path:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (example.label.lower().replace("/", "-").replace(" ", "-") + ".png")
    Image.fromarray(example.pixels.numpy()).save(path)
    return path
