"""Exporting a network: written in the form made for runtimes, proven in its runtime, then put in its place."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from equiflop.deploy import proof as proofs
from equiflop.deploy.prepare import prepared
from equiflop.deploy.proof import Proof
from equiflop.deploy.subject import Subject
from equiflop.deploy.targets import Settings, Target, quiet, target_of
from equiflop.deploy.targets.base import Runner
from equiflop.files import workshop
from equiflop.models.entry_points import plain_twin
from equiflop.warnings import EquiflopWarning

#: Images by which the ranges of int8 are found; fewer draw a warning.
CALIBRATION_IMAGES = 300


class ExportError(ValueError):
    """A network that cannot be exported, or a file that is not what it should be; nothing was written."""


@dataclass(frozen=True)
class Exported:
    """A file and what was found about it.

    Attributes:
        path: the file.
        name: of the model.
        to: the target.
        precision: of its products.
        batch: the size of its batches, or None for any.
        metadata: what is written in it.
        proof: what it does in its runtime.
    """

    path: Path
    name: str
    to: str
    precision: str
    batch: int | None
    metadata: dict[str, str]
    proof: Proof


def export(
    model: str | Path | nn.Module,
    path: str | Path,
    to: str = "onnx",
    precision: str = "float32",
    *,
    settings: dict[str, Any] | None = None,
    img_size: tuple[int, int] | None = None,
    data: str | None = None,
    dynamic_batch: bool = False,
    dynamic_size: bool = False,
    batch: int = 1,
    images: int = 64,
    compare: bool = False,
) -> Exported:
    """Write a network for a runtime, and prove there that the file does what the network does.

    The file is written under another name first, run in its runtime, and compared with the network: output, answers to
    moved images, likeliest classes, speed. Only a file that passes gets its name.

    Args:
        model: a network, the name of one (of ours, of timm, or ``twin:NAME``; random weights), or what ``equiflop
            train`` wrote.
        path: the file to write; the suffix is the target's (``.onnx``, ``.xml``, ``.pt2``, ``.pte``).
        to: ``"onnx"``, ``"openvino"``, ``"torch-export"``, ``"aoti"`` or ``"executorch"``.
        precision: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"int8"``, as far as the target knows it.
        settings: for a name, keywords of the model.
        img_size: height and width of the images, in place of the model's own.
        data: a data set whose test images are compared, and whose training images give int8 its ranges; see
            :func:`equiflop.data.open_data`.
        dynamic_batch: whether the file takes batches of any size.
        dynamic_size: whether it takes images of any size; for networks that do.
        batch: without ``dynamic_batch``, the size of its batches.
        images: how many images are compared.
        compare: whether the plain twin is exported the same way and timed beside it.

    Warns:
        EquiflopWarning: if int8 has fewer than 300 images to find its ranges from.

    Raises:
        ExportError: if the network cannot be exported or the file fails its proof; the message says why.
        ValueError: if an argument does not fit.
        ImportError: if a package of the target is missing; the message names the extra that brings it.
        OSError: if the file cannot be written.
    """
    target = target_of(to, precision)
    subject = Subject.of(model, settings, img_size)
    path = _checked_path(Path(path), target)
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    for name, asked in (("dynamic_batch", dynamic_batch), ("dynamic_size", dynamic_size)):
        if asked and not target.dynamic:
            raise ValueError(f"{name}=True: to={to!r} takes fixed sizes alone")
    if precision == "int8" and data is None:
        raise ValueError("precision='int8' finds its ranges from images; give data, such as the training set")
    plain = _plain_of(subject) if compare else None
    samples = proofs.sample_images(subject, data, images)
    calibration = None
    if precision == "int8":
        calibration = proofs.sample_images(subject, data, CALIBRATION_IMAGES, training=True).images
        if len(calibration) < CALIBRATION_IMAGES:
            text = f"int8 finds its ranges from {len(calibration)} images of {data}; {CALIBRATION_IMAGES} are better"
            warnings.warn(text, EquiflopWarning, stacklevel=2)
    fixed = None if dynamic_batch else batch
    options = Settings(precision, dynamic_batch, dynamic_size, calibration, subject.metadata(precision))
    with workshop(path) as folder:
        made = folder / path.name
        _write(subject, target, made, options, batch)
        runner = _runner(target, made, precision, f"{subject.name} for {to} in {precision}")
        found = proofs.prove(subject, target, made, runner, precision, fixed, samples)
        if found.faults:
            raise ExportError(f"{subject.name} for {to} in {precision}: {'; '.join(found.faults)}; nothing was written")
        if plain is None:
            found = dataclasses.replace(found, speed=proofs.speed(runner, samples.images, fixed))
        else:
            beside = folder / f"plain{target.suffix}"
            _write(plain, target, beside, dataclasses.replace(options, metadata=plain.metadata(precision)), batch)
            other = _runner(target, beside, precision, f"{plain.name} for {to} in {precision}")
            own, theirs, ratios = proofs.beside_plain(runner, other, samples.images, fixed)
            found = dataclasses.replace(found, speed=own, plain=theirs, speedup=ratios)
            del other
        del runner
        for file in sorted(folder.glob(f"{path.stem}.*"), key=lambda file: file == made):
            os.replace(file, path.with_name(file.name))  # what lies beside it first
    return Exported(path, subject.name, to, precision, fixed, options.metadata, found)


def _write(subject: Subject, target: Target, path: Path, options: Settings, batch: int) -> None:
    example = subject.example(2 if options.dynamic_batch else batch)
    network = prepared(subject.model, options.dynamic_size)
    try:
        with quiet():
            target.write(network, example, path, options)
    except OSError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # exporters wrap what went wrong in advice
            cause = cause.__cause__
        raise ExportError(f"{subject.name} cannot be exported: {_reason(cause)}; nothing was written") from error


def _runner(target: Target, path: Path, precision: str, title: str) -> Runner:
    """What runs a file; whatever its runtime raises becomes an ExportError."""

    @contextlib.contextmanager
    def failures_told(what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # runtimes have exception classes of their own
            reason = f"the runtime cannot {what} the file: {_reason(error)}"
            raise ExportError(f"{title}: {reason}; nothing was written") from error

    with failures_told("read"):
        run = target.load(path, precision)

    def told(images: np.ndarray) -> np.ndarray:
        with failures_told("run"):
            return run(images)

    return told


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _checked_path(path: Path, target: Target) -> Path:
    if path.suffix != target.suffix:
        raise ValueError(f"path={str(path)!r} must end in {target.suffix}")
    if path.is_dir():
        raise ValueError(f"path={str(path)!r} is a folder; give the name of a file ending in {target.suffix}")
    return path


def _plain_of(subject: Subject) -> Subject:
    """The plain twin with random weights, which take as long as others."""
    if subject.group is None:
        raise ValueError(f"compare=True: {subject.name} is a plain network itself")
    try:
        name, keywords = plain_twin(subject.name, subject.keywords)
    except ValueError as error:
        raise ValueError(f"compare=True: {error}") from error
    for source in ("pretrained", "checkpoint_path"):
        keywords.pop(source, None)
    channels, *size = subject.input_size
    given = {"num_classes": len(subject.classes), "in_chans": channels}
    return Subject.of(name, {**given, **keywords}, (size[0], size[1]))
