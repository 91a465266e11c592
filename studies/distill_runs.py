"""What the study of distillation trains: teachers, and students with several starts, budgets and widths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "distill"
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
STARTS = {
    "plain": "plain network, trained on",
    "scratch": "no teacher",
    "random": "random",
    "steer": "steer",
}


@dataclass(frozen=True)
class Run:
    """A teacher, or a student of it.

    Attributes:
        family: "vit" or "convnext".
        kind: "teacher", "plain" (the teacher trained on), "scratch" (the twin trained on labels), "random" or "steer"
            (distilled, from these weights).
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
    """In order of what says most: one seed, the whole budget, two more seeds, the other width, variations."""
    found: dict[Run, None] = {Run(family, "teacher"): None for family in MODELS}
    for family in MODELS:
        found |= {Run(family, kind, epochs=epochs): None for epochs in (4, 1) for kind in _kinds(family)}
        if family == "vit":
            found[Run(family, "steer", epochs=2)] = None
    found |= dict.fromkeys(_untrained())
    found |= dict.fromkeys([_with_coupled_heads("steer", epochs=EPOCHS), Run("vit", "random"), Run("vit", "scratch")])
    found |= dict.fromkeys([*_coupled(), *_repeated(1), *_repeated(2)])
    for family in MODELS:
        found |= {Run(family, kind, "3/4", epochs): None for epochs in (4, 1) for kind in _kinds(family)}
    found |= dict.fromkeys([Run("convnext", "random"), Run("convnext", "scratch"), *_variations(), Run("vit", "steer")])
    found[_with_coupled_heads("steer", "3/4", EPOCHS)] = None
    for family in MODELS:
        found |= {Run(family, kind, "3/4"): None for kind in _kinds(family) if kind != "steer"}
    return list(found)


def _kinds(family: str) -> tuple[str, ...]:
    """The starts that there are for a family: ConvNeXts are not steered."""
    return ("scratch", "random", "steer") if family == "vit" else ("scratch", "random")


def _with_coupled_heads(kind: str, width: str = "1", epochs: int = 4, seed: int = 0) -> Run:
    """A ViT whose heads are mirrored by themselves, not exchanged for one another."""
    changes: dict[str, Any] = {"model_kwargs": {**WIDTHS["vit", width], "heads": "coupled"}}
    return Run("vit", kind, width, epochs, seed, changes, "coupled-heads")


def _untrained() -> Iterator[Run]:
    """Steered students as they are: with several numbers of images to steer by, kinds of heads, widths, images."""
    few = (1, 4, 16, 64, 256, 1024)
    for width, heads, numbers in (("1", "coupled", few), ("3/4", "coupled", (256,)), ("1", "regular", (256,))):
        for images in numbers:
            for seed in (0, 1, 2):
                keywords = {**WIDTHS["vit", width], "heads": heads}
                changes = {"model_kwargs": keywords, "init_images": images}
                yield Run("vit", "steer", width, 0, seed, changes, f"{heads}-heads-{images}-images")


def _coupled() -> Iterator[Run]:
    """Students with coupled heads: what steering gives them, and what they give by themselves."""
    for kind, width, epochs, seed in (
        ("steer", "1", 1, 0),
        ("steer", "1", 4, 0),
        ("random", "1", 4, 0),
        ("steer", "1", 1, 1),
        ("steer", "1", 1, 2),
        ("steer", "3/4", 4, 0),
        ("steer", "1", 4, 1),
        ("random", "1", 1, 0),
        ("steer", "1", 4, 2),
        ("scratch", "1", 4, 0),
        ("steer", "3/4", 1, 0),
    ):
        yield _with_coupled_heads(kind, width, epochs, seed)


def _repeated(seed: int) -> Iterator[Run]:
    """The main rows with another seed."""
    for epochs in (4, 1, 2):
        for kind in ("steer", "random", "scratch"):
            if epochs != 2 or kind == "steer":
                yield Run("vit", kind, epochs=epochs, seed=seed)
    for kind in ("random", "scratch"):
        yield Run("convnext", kind, epochs=4, seed=seed)


def _variations() -> Iterator[Run]:
    """Other settings, mostly at 20 % of the budget, one seed each but for those that train on with labels alone."""
    slower: dict[str, Any] = {"lr": 5e-4}
    yield Run("vit", "steer", epochs=4, changes=slower, note="lr-5e-4")
    yield Run("vit", "random", epochs=4, changes=slower, note="lr-5e-4")
    labels: dict[str, Any] = {"label_weight": 1.0}
    for family in MODELS:
        yield Run(family, "random", epochs=4, changes=labels, note="labels")
    for epochs, seed in ((4, 0), (4, 1), (4, 2), (EPOCHS, 0)):
        yield Run("vit", "plain", epochs=epochs, seed=seed)
    coupled = {**labels, "model_kwargs": {**WIDTHS["vit", "1"], "heads": "coupled"}}
    alone = dict.fromkeys(("class_weight", "patch_weight", "middle_weight", "logits_weight"), 0.0)
    for epochs in (4, EPOCHS):
        yield Run("vit", "steer", epochs=epochs, changes=coupled, note="coupled-heads-labels")
        for seed in (0, 1, 2) if epochs == 4 else (0,):
            changes = {**coupled, **alone}
            yield Run("vit", "steer", epochs=epochs, seed=seed, changes=changes, note="coupled-heads-labels-alone")


def is_of(record: dict[str, Any], run: Run) -> bool:
    """Whether a line of the results is of this run, with today's recipe."""
    if record["run"] != run.name:
        return False
    config = record["config"]
    wanted = {**RECIPE, "epochs": run.epochs, "seed": run.seed, **run.changes}
    keywords = wanted.pop("model_kwargs", {})
    same = all(config["model_kwargs"].get(name) == value for name, value in keywords.items())
    return same and all(config[name] == value for name, value in wanted.items())
