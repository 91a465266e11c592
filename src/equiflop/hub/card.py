"""What a model card says of a network."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import nn

import equiflop
from equiflop.classify.config import TrainConfig
from equiflop.classify.model_spec import create_model
from equiflop.classify.weights import TrainedModel

#: Settings of a training that the card leaves out: they name a place, or do not change the result.
_UNTOLD = {
    *("model", "model_kwargs", "data", "out", "start_from", "image_size", "channels"),
    *("teacher", "teacher_checkpoint", "teacher_kwargs"),
    *("device", "workers", "keep_checkpoints", "save_minutes", "tensorboard", "fsdp", "compile"),
}


@dataclass(frozen=True)
class Measured:
    """How good a network is.

    Attributes:
        data: what the test images are called.
        images: how many there are; None if that is not known.
        top1: share of images classified rightly, between 0 and 1.
        top5: share of images whose class is among the best five; None if that is not known.
        same_mirrored: share of images whose mirror image gets the same answer; None if that is not known.
    """

    data: str
    images: int | None
    top1: float
    top5: float | None = None
    same_mirrored: float | None = None


@dataclass(frozen=True)
class Facts:
    """What a model card says.

    Attributes:
        name: of the model.
        group: whose action the network follows, with its order; None for a plain network.
        invariant: whether the logits do not change at all.
        input_size: channels, height and width.
        classes: number of classes; 0 for a network without classifier.
        parameters: number of parameters.
        macs: multiply-adds of one image.
        plain: name, parameters and MACs of the plain twin; None if there is none of these sizes.
        measured: how good it is; None if nobody measured it.
        trained: how it was trained; None if that is not known.
        licence: of the weights; None if it is not stated.
        teacher: whose weights of timm it was distilled from; None if it was not, or from a file or a run.
    """

    name: str
    group: str | None
    invariant: bool
    input_size: tuple[int, int, int]
    classes: int
    parameters: int
    macs: int
    plain: tuple[str, int, int] | None
    measured: Measured | None
    trained: TrainConfig | None
    licence: str | None
    teacher: PretrainedCfg | None

    @classmethod
    def of(cls, trained: TrainedModel, measured: Measured | None, licence: str | None) -> Facts:
        """Those of a trained network."""
        spec, model = trained.spec, trained.model
        size = spec.preprocessing.input_size
        group: Any = getattr(model, "group", None)
        return cls(
            name=spec.name,
            group=group and f"{group.name}, {group.order} elements",
            invariant=group is not None and bool(getattr(model, "invariant_output", True)),
            input_size=size,
            classes=len(spec.classes),
            parameters=_parameters(model),
            macs=equiflop.macs(model, size),
            plain=_plain_twin(trained) if group is not None else None,
            measured=measured,
            trained=trained.config,
            licence=licence,
            teacher=_teacher(trained.config),
        )

    def rows(self) -> list[tuple[str, str]]:
        """The table."""
        channels, height, width = self.input_size
        parameters, macs = _short(self.parameters), _short(self.macs)
        if self.plain is not None:
            twin, plain_parameters, plain_macs = self.plain
            parameters += f" (plain `{twin}`: {_short(plain_parameters)})"
            macs += f" (plain: {_short(plain_macs)}, {plain_macs / self.macs:.2f} times as many)"
        rows = [("model", f"`{self.name}`"), ("group", self.group or "none: a plain network")]
        rows += [("input", f"{channels} x {height} x {width}"), ("classes", f"{self.classes or 'none: features'}")]
        rows += [("parameters", parameters), ("multiply-adds of one image", macs), *self._accuracy()]
        licence = self.licence or "not stated"
        if self.teacher is not None:
            rows.append(("distilled from", f"`{self.teacher.architecture}.{self.teacher.tag}` of timm"))
            licence += f" (the teacher's: {self.teacher.license or 'not stated'})"
        return [*rows, ("licence", licence)]

    def _accuracy(self) -> list[tuple[str, str]]:
        if not self.classes:
            return []
        found = self.measured
        if found is None:
            return [("top-1 accuracy", "not measured")]
        of = f"{found.images:,} test images" if found.images is not None else "the test images"
        rows = [("top-1 accuracy", f"{100 * found.top1:.2f} % of {of} of {found.data}")]
        if found.top5 is not None and self.classes > 5:
            rows.append(("top-5 accuracy", f"{100 * found.top5:.2f} %"))
        if found.same_mirrored is not None:
            rows.append(("same answer for the mirror image", f"{100 * found.same_mirrored:.2f} %"))
        return rows


def model_card(facts: Facts, repository: str) -> str:
    """The README.md of a published folder.

    Args:
        facts: what it says.
        repository: where the folder will be on the hub, for the lines that load it.
    """
    task = "image-classification" if facts.classes else "image-feature-extraction"
    measured = facts.measured if facts.classes else None
    results = None
    if measured is not None:
        name, top1 = measured.data, round(measured.top1, 6)
        results = [EvalResult(task, dataset_type=name, dataset_name=name, metric_type="accuracy", metric_value=top1)]
    data = ModelCardData(
        tags=[task, "timm", *(["transformers"] if _for_transformers(facts) else []), "equiflop", "equivariance"],
        library_name="timm",
        pipeline_tag=task,
        license=facts.licence,
        base_model=facts.teacher and facts.teacher.hf_hub_id,
        metrics=["accuracy"] if results else None,
        model_name=facts.name if results else None,
        eval_results=results,
    )
    table = "".join(f"| {name} | {value} |\n" for name, value in facts.rows())
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {facts.name}\n\n{_summary(facts)}\n\n| | |\n| --- | --- |\n{table}\n"
        f"## Training\n\n{_training(facts.trained)}\n\n## Usage\n\n{_usage(facts, repository)}"
    )


def _summary(facts: Facts) -> str:
    kind = "image classifier" if facts.classes else "image network without classifier"
    if facts.group is None:
        return f"An {kind}, trained with equiflop."
    exact = (
        "Its answer is the same for an image and for all images that the group makes of it, by construction."
        if facts.invariant
        else "Its first blocks are equivariant, the others are not."
    )
    octic = facts.group.startswith("octic")
    title, paper = ("Octic Vision Transformers", "2505.15441") if octic else ("Flopping for FLOPs", "2502.05169")
    return (
        f"An {kind} whose features transform under a group of image symmetries, made with equiflop after "
        f"[{title}](https://arxiv.org/abs/{paper}). {exact}"
    )


def _training(config: TrainConfig | None) -> str:
    if config is None:
        return "The file does not say how it was trained."
    defaults = {**TrainConfig.describe(), **config.describe()}
    told = ("epochs", "batch_size", "optimizer", "lr", "seed")
    lines = (
        ["- without training: the weights are projected from the teacher's, and fitted"]
        if not config.epochs
        else [
            f"- {item.name}: {getattr(config, item.name)}"
            for item in fields(config)
            if item.name not in _UNTOLD and (item.name in told or getattr(config, item.name) != defaults[item.name][0])
        ]
    )
    distills = bool(getattr(config, "distills", False))
    words = (("fine-tuned", config.start_from), ("distilled", config.teacher or distills))
    sources = [word for word, used in words if used]
    how = f", {' and '.join(sources)} from another network" if sources else ""
    command = "distill" if distills else "train"
    return f"By `equiflop {command}` on {data_name(config.data)}{how}:\n\n" + "\n".join(lines)


def _usage(facts: Facts, repository: str) -> str:
    lines = [
        "import equiflop, timm  # pip install equiflop; registers the models",
        f'model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
    ]
    if facts.classes and _for_transformers(facts):
        lines += [
            "# or by transformers",
            "from transformers import pipeline",
            f'pipeline("image-classification", "{repository}")("cat.jpg")',
        ]
    return "```python\n" + "\n".join(lines) + "\n```\n"


def _for_transformers(facts: Facts) -> bool:
    """transformers hands every network images of three channels."""
    return facts.input_size[0] == 3


def data_name(data: str) -> str:
    """What a data set is called, without the place on a disk where it lay."""
    if not data or data.startswith(("torch/", "hfds/")):
        return data
    return Path(data).expanduser().resolve().name


def _teacher(config: TrainConfig | None) -> PretrainedCfg | None:
    """What timm says of the weights that taught a student; None of others."""
    if config is None or not getattr(config, "distills", False):
        return None
    if config.teacher or getattr(config, "teacher_checkpoint", ""):
        return None
    found = get_pretrained_cfg(config.model)
    return found if found is not None and found.tag else None


def _plain_twin(trained: TrainedModel) -> tuple[str, int, int] | None:
    """Name, parameters and MACs of the plain twin, made on the meta device; None if timm cannot make it."""
    spec = trained.spec
    name, keywords = equiflop.plain_twin(spec.name, spec.kwargs)
    keywords["num_classes"] = len(spec.classes)
    try:
        with torch.device("meta"):
            plain = create_model(name, keywords)
        return name, _parameters(plain), equiflop.macs(plain, spec.preprocessing.input_size)
    except (TypeError, ValueError):  # some of timm's models do not take the keywords that ours do
        return None


def _short(number: int) -> str:
    """Four digits and a unit."""
    unit, name = next(
        (10**power, name) for power, name in ((9, " G"), (6, " M"), (3, " k"), (0, "")) if number >= 10**power
    )
    return f"{number / unit:.4g}{name}"


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
