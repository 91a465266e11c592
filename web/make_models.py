"""Write the networks of ``equiflop demo`` for the page: two ONNX files, and what was measured with them.

    equiflop demo --data fashion-mnist --epochs 8 --no-full-size --out demo-output
    python web/make_models.py --demo demo-output --output web/models

A file holds its weights in float16, with a cast to float32 behind each, which ONNX Runtime folds away as it loads the
file: half the bytes to fetch, arithmetic in float32. It has two outputs: ``logits``, and ``map``, the size of the
features of every token after the last block.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from equiflop.classify.evaluation import TIE
from equiflop.data import ImageData, open_data
from equiflop.deploy import prepared
from equiflop.deploy.subject import Subject
from equiflop.deploy.targets import Settings, quiet
from equiflop.deploy.targets.base import onnx_program
from equiflop.deploy.targets.onnx import forget_sources
from equiflop.files import write_atomically, write_text
from equiflop.kernels import join, layout_of, split
from equiflop.training import CheckpointError

#: The page's names of the two networks, and the demo's folders of them.
NETWORKS = ("equivariant", "plain")
#: Initialisers of fewer numbers stay in float32.
SMALL = 16


class WithMap(nn.Module):
    """A ViT that also tells how large the features of every token are.

    Args:
        network: a ViT of timm or an E(ViT), in the form made for runtimes.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        if not hasattr(network, "patch_embed") or not hasattr(network, "num_prefix_tokens"):
            raise ValueError(f"{type(network).__name__} is no ViT, and only those have maps; see 'equiflop export'")
        self.network, self.last_norm = network, network.norm
        network.norm = nn.Identity()  # the map is of what comes before it

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``(1, C, H, W)`` to logits ``(1, classes)`` and a map ``(1, rows, columns)``."""
        tokens = self.network.forward_features(images)
        logits = self.network.forward_head(self.last_norm(tokens))
        patches = tokens[:, self.network.num_prefix_tokens :]
        centred = patches - patches.mean(dim=-1, keepdim=True)  # norms do not see the mean
        return logits, centred.square().sum(dim=-1).sqrt().unflatten(1, self.network.patch_embed.grid_size)


def rounded(x: Tensor, dim: int) -> Tensor:
    """Numbers that sum to 0 along an axis, rounded to float16 such that they still do.

    What rounding adds to a sum is taken from its smallest number, again and again, until nothing is left.
    """
    near = x.half().double()
    for _ in range(6):
        place = near.abs().argmin(dim, keepdim=True)
        excess = near.sum(dim, keepdim=True)
        near.scatter_(dim, place, (near.gather(dim, place) - excess).half().double())
    assert not near.sum(dim).any(), "the sums did not converge"
    return near.to(x.dtype)


@torch.no_grad()
def round_what_is_centred(network: Any) -> None:
    """Bring to float16 what an E(ViT) writes into its residual stream.

    The norms count on rows whose mean is 0. Were every number rounded by itself, those means would shift a little, and
    mirroring would change probabilities 20 times as much (by up to 3e-5 in place of 2e-6 on 10,000 test images).
    """
    if not getattr(network.blocks[0].norm1, "centred", False):
        return

    def by_irrep(x: Tensor) -> Tensor:
        return join([rounded(part, -1) for part in split(x, layout_of(network.rep))])

    embed = network.patch_embed
    embed.kernel.copy_(by_irrep(embed.kernel.movedim(0, -1)).movedim(-1, 0))
    embed.kernel_bias.copy_(by_irrep(embed.kernel_bias))
    if network.pos_embed is not None:
        network.pos_embed.field.copy_(by_irrep(network.pos_embed.field))
    for block in network.blocks:
        for linear in (block.attn.proj, block.mlp.fc2):
            for irrep, weight in linear.weights():
                rows = weight.view(irrep.endomorphism_dim, -1, weight.shape[-1])
                rows.copy_(rounded(rows, 1))
            if linear.bias is not None:
                linear.bias.copy_(rounded(linear.bias, 0))


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph whose weights are stored in float16 and computed with in float32."""
    casts = []
    for value in model.graph.initializer:
        numbers = numpy_helper.to_array(value)
        if value.data_type != TensorProto.FLOAT or numbers.size < SMALL:
            continue
        name = value.name
        value.CopyFrom(numpy_helper.from_array(numbers.astype(np.float16), f"{name}.half"))
        casts.append(helper.make_node("Cast", [value.name], [name], to=TensorProto.FLOAT))
    forget_sources(model)
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


def onnx_bytes(subject: Subject) -> bytes:
    """The file of a network."""
    network = prepared(subject.model)
    round_what_is_centred(network)
    settings = Settings("float32", dynamic_batch=False, dynamic_size=False, calibration=None, metadata={})
    with quiet():
        program = onnx_program(WithMap(network), subject.example(1), settings, outputs=("logits", "map"))
    model = halved(program.model_proto)
    noted = {**subject.metadata("float32"), "weights": "float16", "outputs": json.dumps(["logits", "map"])}
    for key, value in noted.items():
        model.metadata_props.add(key=key, value=value)
    model.producer_name, model.producer_version = "equiflop", noted["version"]
    return model.SerializeToString()


def logits_of(file: bytes) -> Any:
    """The file in ONNX Runtime, as a function of images ``(B, C, H, W)``, taken one by one as the page does."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> np.ndarray:
        return np.concatenate([session.run(["logits"], {"images": image[None]})[0] for image in images])

    return run


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits to probabilities."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_batches(data: ImageData) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All test images and their labels."""
    for batch in data.test.batches(torch.arange(len(data.test)), 500):
        yield batch.images.numpy(), batch.labels.numpy()


def measured(subject: Subject, file: bytes, data: ImageData) -> dict[str, Any]:
    """What a file does on all test images and their mirror images, and what the network in float32 does."""
    run = logits_of(file)
    right = right_mirrored = changed = right_before = images_seen = 0
    largest = 0.0
    for images, labels in test_batches(data):
        mirrored = np.ascontiguousarray(images[..., ::-1])
        logits, other = run(images), run(mirrored)
        with torch.no_grad():
            right_before += int((subject.model(torch.from_numpy(images)).argmax(1).numpy() == labels).sum())
        best = np.sort(logits, axis=1)[:, -2:]
        differs = (logits.argmax(1) != other.argmax(1)) & (best[:, 1] - best[:, 0] > TIE)
        right += int((logits.argmax(1) == labels).sum())
        right_mirrored += int((other.argmax(1) == labels).sum())
        changed += int(differs.sum())
        largest = max(largest, float(np.abs(softmax(logits) - softmax(other)).max()))
        images_seen += len(images)
    noted = subject.metadata("float32")
    return {
        "model": subject.name,
        "accuracy": right / images_seen,
        "accuracy_mirrored": right_mirrored / images_seen,
        "accuracy_in_float32": right_before / images_seen,
        "changed": changed,
        "largest_change_of_probability": largest,
        "macs": int(noted["macs"]),
        "parameters": int(noted["parameters"]),
        "bytes": len(file),
        "sha256": hashlib.sha256(file).hexdigest(),
    }


def _put(content: bytes, opened: IO[bytes]) -> None:
    opened.write(content)


def make(demo: Path, output: Path, source: str | None, say: Any = print) -> dict[str, Any]:
    """Write both files and ``about.json``.

    Args:
        demo: the folder of a demo, with the folders of both networks.
        output: where to write.
        source: the data set with the test images, or None for the demo's.
        say: prints a line.

    Raises:
        CheckpointError: if a network is missing or damaged.
        ValueError: if the networks do not fit together or the data.
        OSError: if a file cannot be read or written.
    """
    settings = json.loads((demo / "results.json").read_text())["settings"]
    named = " --data fashion-mnist" if settings["data"] == "fashion-mnist" else ""
    subjects = {name: Subject.of(demo / name) for name in NETWORKS}
    about = subjects["plain"].preprocessing
    if subjects["equivariant"].preprocessing != about or len({s.classes for s in subjects.values()}) > 1:
        raise ValueError(f"{demo}: the two networks differ in input or classes")
    data = open_data(source or settings["data"], preprocessing=about)
    networks = {}
    for name, subject in subjects.items():
        file = onnx_bytes(subject)
        networks[name] = measured(subject, file, data)
        write_atomically(output / f"{name}.onnx", partial(_put, file))
        found = networks[name]
        say(
            f"{name}.onnx: {found['bytes'] / 1e6:.2f} MB, accuracy {100 * found['accuracy']:.2f} % "
            f"(in float32 {100 * found['accuracy_in_float32']:.2f} %), mirrored {100 * found['accuracy_mirrored']:.2f} "
            f"%, {found['changed']:,} answers change, probabilities by at most "
            f"{found['largest_change_of_probability']:.1e}"
        )
    content = {
        "data": data.name,
        "test_images": len(data.test),
        "networks": networks,
        "classes": data.classes,
        "input_size": about.input_size,
        "mean": about.mean,
        "std": about.std,
        "training": _recipe(settings["training"]),
        "commands": [
            f"equiflop demo{named} --epochs {settings['epochs']} --seed {settings['seed']} --no-full-size "
            "--out demo-output",
            "python web/make_models.py --demo demo-output --output web/models",
        ],
        "versions": {
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__,
        },
    }
    write_text(output / "about.json", json.dumps(content, indent=2) + "\n")
    return content


def _recipe(training: dict[str, Any]) -> dict[str, Any]:
    sizes = training["model_kwargs"]
    return {
        **{key: training[key] for key in ("epochs", "seed", "lr")},
        **{key: sizes[key] for key in ("embed_dim", "depth", "num_heads", "patch_size")},
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Write the networks of 'equiflop demo' for the page.")
    parser.add_argument("--demo", type=Path, default=Path("demo-output"), help="folder of the demo")
    parser.add_argument("--output", type=Path, default=Path("web/models"), help="folder of the files")
    parser.add_argument("--data", help="Fashion-MNIST's folder  [default: where the demo found it]")
    given = parser.parse_args()
    try:
        make(given.demo, given.output, given.data)
    except FileNotFoundError as error:
        sys.exit(f"make_models.py: {error.filename} is missing; first run: equiflop demo --out {given.demo}")
    except (CheckpointError, ValueError, OSError) as error:
        sys.exit(f"make_models.py: {error}")


if __name__ == "__main__":
    main()
