"""What training minimises: mixed images, soft targets, and the answers of a teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from equiflop.classify.config import TrainConfig
from equiflop.classify.model_spec import create_model, preprocessing_of
from equiflop.classify.weights import load_model
from equiflop.data import Preprocessing


class ClassifierObjective(nn.Module):
    """Mixing and loss of a configuration, as :class:`equiflop.training.Trainer` takes an objective.

    Args:
        config: the run.
        classes: names of the classes.
        preprocessing: of the images that the network sees.

    Raises:
        ValueError: if there is no such teacher, or it has other classes.
    """

    def __init__(self, config: TrainConfig, classes: tuple[str, ...], preprocessing: Preprocessing) -> None:
        super().__init__()
        self.config = config
        self.mixup = (
            Mixup(
                config.mixup,
                config.cutmix,
                prob=config.mix_probability,
                switch_prob=config.cutmix_probability,
                label_smoothing=config.label_smoothing,
                num_classes=len(classes),
            )
            if config.mixes
            else None
        )
        if config.loss == "bce":
            self.loss: nn.Module = BinaryCrossEntropy(smoothing=config.label_smoothing)
        else:
            self.loss = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.soft_loss: nn.Module = BinaryCrossEntropy(smoothing=0.0) if config.loss == "bce" else nn.CrossEntropyLoss()
        self.teacher = Teacher(config.teacher, classes, preprocessing) if config.teacher else None

    @property
    def asked(self) -> list[nn.Module]:
        """The teacher's network, if there is one."""
        return [] if self.teacher is None else [self.teacher.model]

    def forward(
        self, network: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a batch, and whether each image is classified rightly (a mixed one by its own label).

        Args:
            network: the classifier.
            batch: images ``(B, C, H, W)``, which may be overwritten, and labels ``(B,)``.
        """
        images, labels = batch
        images, targets = self.mix(images, labels)
        logits = network(images)
        loss = self.loss_of(logits.float(), targets, images)
        return loss, {"accuracy": logits.detach().argmax(dim=1) == labels}

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images with soft targets ``(B, classes)``, or both as they are.

        How is drawn from the generators of Python and numpy.

        Args:
            images: shape ``(B, C, H, W)``; overwritten.
            labels: shape ``(B,)``.
        """
        paired = len(images) // 2 * 2
        if self.mixup is None or not paired:
            return images, labels
        mixed, targets = self.mixup(images[:paired], labels[:paired])
        if paired < len(images):  # where images could not be read, the last may lack a partner
            smoothing = self.config.label_smoothing
            alone = F.one_hot(labels[paired:], targets.shape[1]).to(targets) * (1 - smoothing)
            mixed = torch.cat([mixed, images[paired:]])
            targets = torch.cat([targets, alone + smoothing / targets.shape[1]])
        return mixed, targets

    def loss_of(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """Mean loss of a batch.

        Args:
            logits: shape ``(B, classes)``.
            targets: labels ``(B,)`` or soft targets ``(B, classes)``.
            images: what the network saw; a teacher looks at them as well.
        """
        loss: Tensor = (self.loss if targets.ndim == 1 else self.soft_loss)(logits, targets)
        if self.teacher is None:
            return loss
        share = self.config.distillation_weight
        return (1 - share) * loss + share * self._distillation(logits, self.teacher(images))

    def _distillation(self, logits: Tensor, answers: Tensor) -> Tensor:
        if self.config.distillation == "hard":
            return F.cross_entropy(logits, answers.argmax(dim=1))
        t = self.config.distillation_temperature
        divergence = F.kl_div(
            F.log_softmax(logits / t, dim=1), F.log_softmax(answers / t, dim=1), reduction="batchmean", log_target=True
        )
        return divergence * t**2


class Teacher(nn.Module):
    """A trained network that answers on the images of another, in its own normalisation and size.

    Args:
        source: a run or file of equiflop, else a model that timm has weights for.
        classes: what its answers must be about.
        preprocessing: of the images that it is given.

    Raises:
        ValueError: if it does not exist or has other classes.
    """

    def __init__(self, source: str, classes: tuple[str, ...], preprocessing: Preprocessing) -> None:
        super().__init__()
        if Path(source).exists():
            trained = load_model(source)
            model, own, names = trained.model, trained.spec.preprocessing, trained.spec.classes
            if names != classes:
                raise ValueError(f"teacher={source!r} knows other classes than the data")
        else:
            model = create_model(source, {}, pretrained=True)
            count = getattr(model, "num_classes", None)
            if count != len(classes):
                raise ValueError(f"teacher={source!r} answers on {count} classes, the data has {len(classes)}")
            own = preprocessing_of(model)
        if own.input_size[0] != preprocessing.input_size[0]:
            raise ValueError(
                f"teacher={source!r} takes images of {own.input_size[0]} channels, the network of "
                f"{preprocessing.input_size[0]}; choose --channels"
            )
        self.model = model.eval().requires_grad_(False)
        self.size = own.input_size[1:]
        scale, shift = renormalising(preprocessing, own)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.scale: Tensor
        self.shift: Tensor

    def train(self, mode: bool = True) -> Teacher:
        """A teacher does not train."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes)``."""
        images = images * self.scale + self.shift
        if images.shape[-2:] != torch.Size(self.size):
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        logits: Tensor = self.model(images)
        return logits.float()


def renormalising(ours: Preprocessing, theirs: Preprocessing) -> tuple[Tensor, Tensor]:
    """``scale`` and ``shift``, ``(1, C, 1, 1)`` each: ``images * scale + shift`` are normalised in their way."""
    scale = [own / other for own, other in zip(ours.std, theirs.std, strict=True)]
    shift = [(m - n) / s for m, n, s in zip(ours.mean, theirs.mean, theirs.std, strict=True)]
    return torch.tensor(scale).view(1, -1, 1, 1), torch.tensor(shift).view(1, -1, 1, 1)
