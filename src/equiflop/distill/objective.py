"""What a distillation minimises: errors of features, brought into one type, and of answers. After Proteus."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiflop.classify.objective import ClassifierObjective
from equiflop.data import Preprocessing
from equiflop.distill.config import DistillConfig
from equiflop.distill.features import Features, features_of, types
from equiflop.distill.steer import Stream
from equiflop.distill.teacher import PlainTeacher
from equiflop.groups import Rep
from equiflop.image_group import ImageGroup
from equiflop.nn import LayerNorm, Linear
from equiflop.training.step import PRECISIONS


class Reader(nn.Sequential):
    """Reads a teacher's features at all views out of a student's: an equivariant norm and an equivariant linear map.

    Args:
        rep: type of the student's features.
        width: channels ``C`` of the teacher's.

    Shape: ``(B, N, rep.dim)`` to ``(B, N, |G| C)``, in the group's basis.
    """

    def __init__(self, rep: Rep, width: int) -> None:
        super().__init__(LayerNorm(rep, affine=False), Linear(rep, Rep.regular(rep.group, width), out_order="group"))

    @torch.no_grad()
    def steer(self, weight: Tensor, bias: Tensor, invariant: int) -> None:
        """Start from what gives the teacher's features of one view; those of the mirrored view follow.

        Args:
            weight: ``(C, student's channels)``, the first ``invariant`` of which the mirror leaves as they are.
            bias: ``(C,)``.
            invariant: how many there are.
        """
        linear = cast(Linear, self[1])
        root = math.sqrt(2.0)  # from the copy of the identity to orthonormal irreps
        for (irrep, block), part in zip(linear.weights(), weight.tensor_split([invariant], dim=1), strict=True):
            block.copy_(root * linear.gain(irrep) * part)
        if linear.bias is not None:
            linear.bias.copy_(root * linear.bias_gain * bias)


class Student(nn.Module):
    """An equivariant network together with what reads the teacher's features out of its own, in training alone.

    Args:
        student: the network, of timm's classes.
        widths: channels of the teacher's features, behind the last block and half way.
    """

    def __init__(self, student: Any, widths: tuple[int, int]) -> None:
        super().__init__()
        self.student = student
        self.group: ImageGroup = student.group
        last, middle = types(student)
        self.read_tokens = Reader(last, widths[0])
        self.read_middle = Reader(middle, widths[1])

    def steer_readers(self, stream: Stream, teacher: Any) -> None:
        """Let the readers give the teacher's features from the start, for a student that was steered from it.

        Args:
            stream: how the student's stream holds the teacher's.
            teacher: a network of timm's class ``VisionTransformer``.
        """
        basis = stream.basis.cpu().T * math.sqrt(stream.basis.shape[1] / stream.basis.shape[0])
        zero = basis.new_zeros(len(basis))
        self.read_middle.steer(basis, zero, stream.invariant)
        norm = teacher.norm
        affine = getattr(norm, "weight", None) is not None and norm.bias is not None
        scale, shift = (p.detach().double().cpu() for p in (norm.weight, norm.bias)) if affine else (zero + 1, zero)
        size = (scale.square() + shift.square()).mean().sqrt()  # the targets are normed once more
        self.read_tokens.steer(scale[:, None] / size * basis, shift / size, stream.invariant)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay: those of the network."""
        named = getattr(self.student, "no_weight_decay", set)  # ConvNeXt and ResMLP name none
        return {f"student.{name}" for name in named()}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images ``(B, C, H, W)`` to tokens ``(B, N, |G| C)``, middle ``(B, patches, |G| C')`` and the logits."""
        own = features_of(self.student, images)
        return self.read_tokens(own.tokens), self.read_middle(own.middle), own.logits


class DistillObjective(nn.Module):
    """Loss of a student against its teacher, as :class:`equiflop.training.Trainer` takes an objective.

    With ``t`` the teacher's normed features at all views (:meth:`PlainTeacher.views`) and ``r`` what is read out of
    the student's, it is the sum, each term times its weight, of the mean squares of ``r - t`` over the class token,
    the patch tokens and the patch tokens in the middle; of ``T^2 KL(softmax(a / T) || softmax(s / T))``, ``a``
    being the teacher's answers averaged over the views, ``s`` the student's and ``T`` the
    ``distillation_temperature``, or of the mean square of ``s - a``, or where the answer is an embedding of
    ``|s - a|^2 / |a|^2``; and of the loss on labels. Source of the terms: Proteus, Zhang et al., arXiv 2407.10366.

    Args:
        config: the run.
        teacher: the teacher.
        group: the student's.
        classes: of the data.
        preprocessing: of the images.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: PlainTeacher,
        group: ImageGroup,
        classes: tuple[str, ...],
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__()
        self.config = config
        self.group = group
        self.teacher = teacher
        self.labels = ClassifierObjective(replace(config, teacher=""), classes, preprocessing)

    @property
    def asked(self) -> list[nn.Module]:
        """What looks at a view for the teacher."""
        return [self.teacher.look]

    def forward(
        self, network: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a batch, and by name every term before it is weighed and whether student and teacher agree.

        Args:
            network: gives what :class:`Student` gives.
            batch: images ``(B, C, H, W)``, which may be overwritten, and labels ``(B,)``.
        """
        images, labels = batch
        images, targets = self.labels.mix(images, labels)
        precision = PRECISIONS[self.config.precision]
        with torch.autocast(images.device.type, dtype=precision, enabled=precision is not torch.float32):
            wanted = self.teacher.views(images, self.group)
        found = Features(*network(images))
        terms = self.terms(found, wanted)
        weights = self.weights(terms)
        loss = sum((weights[name] * term for name, term in terms.items()), start=images.new_zeros(()))
        if self.config.label_weight:
            loss = loss + self.config.label_weight * self.labels.loss_of(found.logits, targets, images)
        return loss, {**{name: term.detach() for name, term in terms.items()}, **self.agreement(found, wanted)}

    def terms(self, found: Features, wanted: Features) -> dict[str, Tensor]:
        """The terms of the loss that teacher and student have, by name; means over the batch.

        Args:
            found: what was read out of the student's features, and its logits.
            wanted: the teacher's.
        """
        prefix, answering = self.teacher.prefix_tokens, self.teacher.class_tokens
        terms = {}
        if answering:
            terms["class_error"] = F.mse_loss(found.tokens[:, :answering], wanted.tokens[:, :answering])
        terms["patch_error"] = F.mse_loss(found.tokens[:, prefix:], wanted.tokens[:, prefix:])
        terms["middle_error"] = F.mse_loss(found.middle, wanted.middle)
        terms["logits_error"] = self._error_of_answers(found.logits, wanted.logits)
        return terms

    def weights(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """The weight of every term."""
        return {name: getattr(self.config, name.replace("error", "weight")) for name in terms}

    def _error_of_answers(self, logits: Tensor, answers: Tensor) -> Tensor:
        if not self.teacher.classifies:
            error, size = (part.float().square().sum(dim=1) for part in (logits - answers, answers))
            return (error / size.clamp_min(torch.finfo(size.dtype).tiny)).mean()
        if self.config.logits_loss == "mse":
            return F.mse_loss(logits, answers)
        t = self.config.distillation_temperature
        ours, theirs = (F.log_softmax(values / t, dim=1) for values in (logits, answers))
        return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * t**2

    def agreement(self, found: Features, wanted: Features) -> dict[str, Tensor]:
        """Whether student and teacher, averaged over the views, give an image the same class; empty without classes."""
        if not self.teacher.classifies:
            return {}
        return {"agreement": found.logits.detach().argmax(dim=1) == wanted.logits.argmax(dim=1)}
