"""Accuracy per MAC on CIFAR-10: plain networks with mirrored training images against their equivariant twins.

    python studies/cifar10/study.py run --data FOLDER      # resumes; FOLDER/train/CLASS/*.jpg, FOLDER/test/CLASS/*.jpg
    python studies/cifar10/study.py run                    # downloads CIFAR-10 by torchvision
    python studies/cifar10/study.py report                 # writes README.md's tables and accuracy.png

Every finished run is one line of results.jsonl; a run that was stopped goes on from its checkpoint.
A long file, since all that decides its numbers stands in it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from torch import Tensor, nn

import equiflop
from equiflop.classify import ClassifierTrainer, MirrorAveraged, TrainConfig, evaluate
from equiflop.data import ImageData, MemorySplit, Preprocessing
from equiflop.data.decode import decode_image, read_image
from equiflop.files import write_atomically, write_text
from equiflop.nn import Linear, Mlp
from equiflop.runtime.machine import describe_machine

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
NORMALISATION = Preprocessing((3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
RECIPE = {
    "epochs": 2,
    "batch_size": 64,
    "lr": 1.5e-3,
    "weight_decay": 0.05,
    "warmup_epochs": 0.3,
    "shift": 2,
    "save_minutes": 1.0,
    "keep_checkpoints": 1,
    "compile": True,
    "device": "cpu",
}
MARKERS = {"plain": "s", "E": "o", "E-wide": "^"}
COLOURS = {"vit": "tab:blue", "resmlp": "tab:orange", "convnext": "tab:green"}
NAMES = {"vit": "ViT", "resmlp": "ResMLP", "convnext": "ConvNeXt"}
TEST_BATCH = 250  # that of the trainer, so that nothing is compiled again


@register_model
def study_resmlp(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> MlpMixer:
    """timm's ResMLP with any patch size, width and depth; its own names fix them."""
    return MlpMixer(mlp_ratio=4, block_layer=partial(ResBlock, init_values=0.1), norm_layer=Affine, **kwargs)


@dataclass(frozen=True)
class Run:
    """One training: a network of a family, what is special about it, and a seed."""

    family: str
    variant: str
    model: str
    keywords: dict[str, Any] = field(compare=False)
    seed: int
    activation: str = "spatial"
    initialisation: str = "default"

    @property
    def name(self) -> str:
        """Name of its folder and of its line in the results."""
        return f"{self.family}-{self.variant}-seed{self.seed}"


VIT = {"patch_size": 4, "depth": 4, "num_heads": 4, "init_values": 1.0, "embed_dim": 64}
MLP = {"patch_size": 4, "num_blocks": 6}
CONV = {"depths": [2, 2, 2, 2], "ls_init_value": 1.0}
E_VIT = "flop_deit3_small_patch16_224"


def main_runs(seeds: int) -> Iterator[Run]:
    """Plain, E of the same width, E widened to the MACs of plain; all networks of a seed before the next seed."""
    for seed in range(seeds):
        yield Run("vit", "plain", "deit3_small_patch16_224", VIT, seed)
        yield Run("vit", "E", E_VIT, VIT, seed)
        yield Run("vit", "E-wide", E_VIT, {**VIT, "embed_dim": 88}, seed)
        yield Run("resmlp", "plain", "study_resmlp", {**MLP, "embed_dim": 64, "img_size": 32}, seed)
        # timm initialises plain ResMLPs so; the published 0.02 of the E networks suits width 384 and more.
        like_plain = {"initialisation": "xavier"}
        yield Run("resmlp", "E", "flop_resmlp_12_224", {**MLP, "embed_dim": 64}, seed, **like_plain)
        yield Run("resmlp", "E-wide", "flop_resmlp_12_224", {**MLP, "embed_dim": 92}, seed, **like_plain)
        yield Run("convnext", "plain", "convnext_tiny", {**CONV, "dims": [48, 96, 192, 384]}, seed)
        yield Run("convnext", "E", "flop_convnext_tiny", {**CONV, "dims": [48, 96, 192, 384]}, seed)
        yield Run("convnext", "E-wide", "flop_convnext_tiny", {**CONV, "dims": [68, 136, 272, 544]}, seed)


def ablations() -> Iterator[Run]:
    """Variations of the E networks, one seed each."""
    yield Run("resmlp", "E-init-published", "flop_resmlp_12_224", {**MLP, "embed_dim": 64}, 0)
    yield Run("vit", "E-init-by-fan-in", E_VIT, {**VIT, "weight_init": "reset"}, 0)
    yield Run("vit", "plain-init-by-fan-in", "deit3_small_patch16_224", VIT, 0, initialisation="fan-in")
    for activation in ("odd", "gated"):
        yield Run("vit", f"E-act-{activation}", E_VIT, VIT, 0, activation)
    for share, multiplicities in (("1/4", [16, 48]), ("3/4", [48, 16])):
        name = f"E-share-{share.replace('/', '-of-')}"
        yield Run("vit", name, E_VIT, {**VIT, "multiplicities": multiplicities}, 0)
    yield Run("vit", "E-invariants-norm", E_VIT, {**VIT, "invariants": "norm"}, 0)
    for k in (2, 1, 3):
        yield Run("vit", f"hybrid-{k}-of-4", "flop_hybrid_deit3_small_patch16_224", {**VIT, "equivariant_depth": k}, 0)


def larger() -> Iterator[Run]:
    """Twice the width, where E of the small width falls short; one seed each."""
    vit, mlp = {**VIT, "embed_dim": 128}, {**MLP, "embed_dim": 128}
    yield Run("vit", "plain-width-128", "deit3_small_patch16_224", vit, 0)
    yield Run("vit", "E-width-128", E_VIT, vit, 0)
    yield Run("resmlp", "plain-width-128", "study_resmlp", {**mlp, "img_size": 32}, 0)
    yield Run("resmlp", "E-width-128", "flop_resmlp_12_224", mlp, 0, initialisation="xavier")


class SignActivation(nn.Module):
    """A nonlinearity on the irreps themselves, in place of one in the spatial domain, which an MLP hands over.

    Invariant channels take GELU; sign-flipping ones must take an odd function of themselves: ``b sigmoid(1.702 |b|)``
    ("odd"), or are gated by the invariant channels, ``b sigmoid(a)`` ("gated").
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """Of the mirror group's own basis, ``(..., 2 n)``, to the same."""
        p, q = x.chunk(2, dim=-1)
        a, b = (p + q) * 0.5**0.5, (p - q) * 0.5**0.5
        a, b = F.gelu(a), b * torch.sigmoid(1.702 * b.abs() if self.kind == "odd" else a)
        return torch.cat([a + b, a - b], dim=-1) * 0.5**0.5


def replace_activation(model: nn.Module, kind: str) -> None:
    """Let the MLPs of an E network use another nonlinearity."""
    for module in model.modules():
        if isinstance(module, Mlp):
            module.act = SignActivation(kind)


def initialise(model: nn.Module, rule: str, seed: int) -> None:
    """Initialise linear maps anew, behind the patch embedding and before the classifier.

    "xavier": Xavier's uniform rule, for the blocks of equivariant maps; "fan-in": normal of variance 1 / inputs, for
    plain maps, as the equivariant ones have it with ``weight_init="reset"``; "default": they stay as they are.
    """
    torch.manual_seed(seed)
    for name, module in model.named_modules():
        if rule == "xavier" and isinstance(module, Linear) and not name.startswith("stem"):
            module.init_weights(lambda weight, algebra: nn.init.xavier_uniform_(weight))
        elif rule == "fan-in" and isinstance(module, nn.Linear) and name.startswith("blocks"):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)


def load_images(source: str | None, folder: Path) -> ImageData:
    """CIFAR-10 in memory, from JPEG files or from torchvision; read once and then kept in ``folder``."""
    kept = folder / "images.pt"
    content = torch.load(kept, weights_only=True) if kept.is_file() else {}
    if content.get("source") != str(source):
        content = read_images(source) | {"source": str(source)}
        write_atomically(kept, lambda file: torch.save(content, file))
    train, test = (MemorySplit(images, labels, NORMALISATION) for images, labels in (content["train"], content["test"]))
    return ImageData("CIFAR-10", source or "torchvision", tuple(content["classes"]), train, test)


def read_images(source: str | None) -> dict[str, Any]:
    """Per split the images as bytes, shape ``(N, 3, 32, 32)``, and the labels; and the names of the classes."""
    content: dict[str, Any] = {}
    for part in ("train", "test"):
        if source is None:
            from torchvision.datasets import CIFAR10

            data = CIFAR10(str(Path.home() / ".cache" / "equiflop"), train=part == "train", download=True)
            classes = list(data.classes)
            pictures = [(decode_image(image, 3, part), label) for image, label in data]
        else:
            folder = Path(source) / part
            classes = sorted(place.name for place in folder.iterdir() if place.is_dir())
            pictures = [
                (read_image(path), label)
                for label, name in enumerate(classes)
                for path in sorted((folder / name).iterdir())
            ]
        images = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image, _ in pictures])
        images = images.view(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous()
        content |= {part: (images, torch.tensor([label for _, label in pictures])), "classes": classes}
    return content


def execute(run: Run, data: ImageData, folder: Path) -> dict[str, Any]:
    """Train (or go on), measure, and give the line of the results."""
    config = TrainConfig(
        model=run.model,
        data="CIFAR-10",
        out=str(folder / run.name),
        model_kwargs=run.keywords,
        seed=run.seed,
        **RECIPE,  # type: ignore[arg-type]
    )
    trainer = ClassifierTrainer(config, data)
    if run.activation != "spatial":
        replace_activation(trainer.model, run.activation)
    initialise(trainer.model, run.initialisation, run.seed)
    trainer.resume()
    trainer.run()
    start = time.perf_counter()
    alone = evaluate(trainer.model, data.test, TEST_BATCH, trainer.device, classes=len(data.classes))
    seconds = time.perf_counter() - start
    averaged = evaluate(MirrorAveraged(trainer.model), data.test, TEST_BATCH, trainer.device)
    return {
        "run": run.name,
        "family": run.family,
        "variant": run.variant,
        "seed": run.seed,
        "macs": equiflop.macs(trainer.model, (3, 32, 32)),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "accuracy": alone.top1,
        "accuracy_both_views": averaged.top1,
        "calibration_error": alone.calibration_error,
        "changed_when_mirrored": alone.changed_share,
        "train_loss": trainer.history[-1].train_loss,
        "train_seconds": sum(record.seconds for record in trainer.history),
        "test_seconds_both_views": seconds,
        "epochs": [record.to_dict() for record in trainer.history],
        "config": config.to_dict() | {"out": run.name},
        "machine": describe_machine(torch.device("cpu")),
    }


def all_runs(seeds: int) -> list[Run]:
    """Two seeds of the main runs, the ablations, the other seeds, the second size."""
    main = list(main_runs(seeds))
    return [*(run for run in main if run.seed < 2), *ablations(), *(run for run in main if run.seed >= 2), *larger()]


def finished() -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def is_of(record: dict[str, Any], run: Run) -> bool:
    """Whether a line of the results is of this run, with today's recipe."""
    config = record["config"]
    wanted = {**RECIPE, "model": run.model, "model_kwargs": run.keywords, "seed": run.seed}
    return record["run"] == run.name and all(config[name] == value for name, value in wanted.items())


def run_all(source: str | None, folder: Path, seeds: int, jobs: int) -> None:
    """All runs that are not in the results yet, so many at a time, each in a process of its own.

    Raises:
        SystemExit: if a run failed; the others were finished.
    """
    load_images(source, folder)
    done = finished()
    waiting = [run for run in all_runs(seeds) if not any(is_of(record, run) for record in done)]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    children: list[subprocess.Popen[bytes]] = []
    failed = []

    def start(run: Run) -> tuple[Run, int]:
        command = [sys.executable, __file__, "one", "--name", run.name, "--seeds", str(seeds), "--out", str(folder)]
        command += ["--data", source] if source else []
        (folder / run.name).mkdir(parents=True, exist_ok=True)
        with open(folder / run.name / "output.txt", "ab") as output:
            child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        children.append(child)
        return run, child.wait()

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(start, run) for run in waiting]
        try:
            for run, code in (future.result() for future in as_completed(futures)):
                if code:
                    failed.append(f"{run.name}: exit code {code}, see {folder / run.name / 'output.txt'}")
                else:
                    _add(json.loads((folder / run.name / "result.json").read_text()))
        except KeyboardInterrupt:  # what runs saves its state and stops, what waits does not begin
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()
            raise SystemExit("stopped; the same command goes on") from None
    if failed:
        raise SystemExit("\n".join(failed))


def _add(record: dict[str, Any]) -> None:
    """A line of the results, in the place of an older one of that name."""
    lines = [line for line in finished() if line["run"] != record["run"]]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, record])
    write_text(RESULTS, text)
    print(f"{record['run']}: {100 * record['accuracy']:.2f} %, {record['train_seconds']:.0f} s", flush=True)


def run_one(name: str, source: str | None, folder: Path, seeds: int) -> None:
    """One run by its name; writes ``result.json`` into its folder."""
    run = {run.name: run for run in all_runs(seeds)}[name]
    text = json.dumps(execute(run, load_images(source, folder), folder))
    write_text(folder / name / "result.json", text)


def report() -> None:
    """Tables and figure from the results."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    records = finished()
    seeds = 1 + max((record["seed"] for record in records), default=0)
    for run in sorted(all_runs(seeds), key=lambda run: list(COLOURS).index(run.family)):
        for record in records:
            if is_of(record, run):
                groups[run.family, run.variant].append(record)
    main = {key: records for key, records in groups.items() if key[1] in MARKERS}
    others = {key: records for key, records in groups.items() if key[1] not in MARKERS}
    page = HERE / "README.md"
    text = page.read_text()
    for name, part in (("main", main), ("ablations", others)):
        head, _, rest = text.partition(f"<!-- {name} -->")
        _, _, tail = rest.partition(f"<!-- end of {name} -->")
        text = f"{head}<!-- {name} -->\n{_table(part)}\n<!-- end of {name} -->{tail}"
    page.write_text(text)
    _draw(main)
    print(_table(groups))


def _table(groups: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
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
            _spread([100 * record["accuracy"] for record in records]),
            _spread([100 * record["accuracy_both_views"] for record in records]),
            _spread([100 * record["changed_when_mirrored"] for record in records]),
            f"{statistics.mean(record['train_seconds'] for record in records):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def _draw(groups: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "one", "report"))
    parser.add_argument("--data", help="folder with train/CLASS/* and test/CLASS/*; default: torchvision's CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("runs/study-cifar10"), help="folder for checkpoints")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, which share the processor's cores")
    parser.add_argument("--name", help="of the run that 'one' makes")
    options = parser.parse_args()
    if options.what == "run":
        run_all(options.data, options.out, options.seeds, options.jobs)
    elif options.what == "one":
        run_one(options.name, options.data, options.out, options.seeds)
    else:
        report()


if __name__ == "__main__":
    main()
