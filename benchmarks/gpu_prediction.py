"""What GPU kernels should take, on paper: operations and bytes of every kernel of a block, E and plain.

    python benchmarks/gpu_prediction.py --output benchmarks/gpu_prediction.json
    python benchmarks/gpu_prediction.py --kernels flop_deit3_base_patch16_224

A kernel takes as long as its operations at the rate that a card's products reach, or as its bytes at the bandwidth that
its copies reach, whichever is longer, and a moment to start. Rates are those of the profile of an H100 in
docs/performance.md, and the same shares of what is printed on an A100. Nothing here is measured; beside the profile,
the same sums are made of the kernels that were measured there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from equiflop.files import write_text
from equiflop.groups import FiniteGroup, Rep, cyclic, dihedral
from equiflop.kernels.lanes import Lanes, decode
from equiflop.kernels.layout import layout_of

BYTES = 2  # of bfloat16


@dataclass(frozen=True)
class Card:
    """What a card reaches.

    Attributes:
        products: operations of bfloat16 products per second.
        attention: the same of fused attention.
        bandwidth: bytes per second.
        start: seconds from one kernel to the next in a CUDA graph.
    """

    products: float
    attention: float
    bandwidth: float
    start: float = 2e-6


#: H100: 357e9 operations in 0.51 ms, attention's 15.3e9 in 0.08 ms, 310 MB in 0.103 ms (docs/performance.md). A100: 312
#: against 989e12 operations and 2.04 against 3.35e12 bytes, as printed.
CARDS = {"H100": Card(700e12, 190e12, 3.0e12), "A100": Card(221e12, 60e12, 1.83e12)}
#: Triton's products reach so much of the libraries' rate, at worst and at best.
TRITON = (0.75, 1.0)


class Size(NamedTuple):
    """Width, depth, heads and tokens of an image."""

    width: int
    depth: int
    heads: int
    tokens: int = 197


SIZES = {
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "huge": Size(1280, 32, 16, 257),
}
GROUPS: dict[str, FiniteGroup] = {"flop": cyclic(2), "octic": dihedral(4)}
#: Milliseconds of a block of ViT-B, batch 128, in the profile of docs/performance.md: plain and E, both compiled.
PROFILE = {"products": (0.51, 0.34), "attention": (0.08, 0.08), "GELU": (0.11, 0.11), "norms and sums": (0.09, 0.14)}


class Kernel(NamedTuple):
    """A kernel: what it is, its operations, and its bytes."""

    name: str
    operations: float
    bytes: float
    kind: str = "copy"

    def seconds(self, card: Card, rate: float = 1.0) -> float:
        """How long it takes, with products at a share of the libraries' rate."""
        reached = {"product": card.products * rate, "attention": card.attention}.get(self.kind, 1e30)
        return max(self.operations / reached, self.bytes / card.bandwidth) + card.start


def lanes_of(group: FiniteGroup) -> Lanes:
    """The lanes of a regular feature."""
    return decode(layout_of(Rep.regular(group, 2)).code)


class Writer:
    """Kernels of a block, in units of one activation of the network's width.

    Args:
        size: of the network.
        batch: images.
        group: None for plain.
    """

    def __init__(self, size: Size, batch: int, group: FiniteGroup | None = None) -> None:
        lanes = None if group is None else lanes_of(group)
        self.size, self.rows = size, batch * size.tokens
        self.macs = 1.0 if lanes is None else sum(d * w * w for d, w in lanes.spans) / lanes.count**2
        self.weights = 1.0 if lanes is None else lanes.weights / lanes.count**2
        self.kernels: list[Kernel] = []

    def product(self, name: str, size: float, activations: float, bytes_of_weight: int = BYTES) -> None:
        """A product whose weights are ``size * width * width`` numbers, with so many activations read and written."""
        square = size * self.size.width**2
        moved = activations * self.rows * self.size.width * BYTES + square * self.weights * bytes_of_weight
        self.kernels.append(Kernel(name, 2 * self.rows * square * self.macs, moved, "product"))

    def attention(self, name: str, passes: float, activations: float) -> None:
        """Fused attention: ``passes`` times its two products."""
        operations = passes * 4 * self.rows * self.size.tokens * self.size.width
        self.kernels.append(Kernel(name, operations, activations * self.rows * self.size.width * BYTES, "attention"))

    def copy(self, name: str, activations: float) -> None:
        """So many activations read and written."""
        self.kernels.append(Kernel(name, 0, activations * self.rows * self.size.width * BYTES))

    def sums(self, name: str, size: float) -> None:
        """Gradients of ``size * width * width`` weights, read in float32 from two parts, and written."""
        self.kernels.append(Kernel(name, 0, size * self.size.width**2 * self.weights * (2 * 4 + 2 * BYTES)))


def equivariant(size: Size, batch: int, group: FiniteGroup, train: bool) -> list[Kernel]:
    """A block in the kernels of ``equiflop.kernels.gpu``."""
    w = Writer(size, batch, group)
    w.copy("norm", 2)
    w.product("qkv", 3, 1 + 3)
    w.attention("attention", 1, 4)
    w.product("proj + residual", 1, 1 + 2)
    w.copy("norm", 2)
    w.product("fc1 + GELU", 4, 1 + (8 if train else 4))
    w.product("fc2 + residual", 4, 4 + 2)
    if train:
        w.product("fc2 backward + GELU", 4, 1 + 4 + 8)
        w.product("fc2 weights", 4, 1 + 4, 8)
        w.sums("fc2 sums", 4)
        w.product("fc1 backward", 4, 4 + 1)
        w.product("fc1 weights", 4, 4 + 1, 8)
        w.sums("fc1 sums", 4)
        w.copy("norm backward", 4)
        w.product("proj backward", 1, 2)
        w.product("proj weights", 1, 2, 8)
        w.sums("proj sums", 1)
        w.attention("attention backward", 2.5, 8)
        w.copy("joining q, k, v", 6)
        w.product("qkv backward", 3, 3 + 1)
        w.product("qkv weights", 3, 3 + 1, 8)
        w.sums("qkv sums", 3)
        w.copy("norm backward", 4)
    return w.kernels


def plain(size: Size, batch: int, train: bool, fused: bool) -> list[Kernel]:
    """A plain block as TorchInductor compiles it; ``fused``: with GELU behind the product (``max-autotune``)."""
    w = Writer(size, batch)
    w.copy("sum + norm", 4)
    w.product("qkv", 3, 1 + 3)
    w.attention("attention", 1, 4)
    w.product("proj", 1, 2)
    w.copy("sum + norm", 4)
    w.product("fc1", 4, 1 + 4 + (4 if fused and train else 0))
    if not fused:
        w.copy("GELU", 8)
    w.product("fc2", 4, 4 + 1)
    if train:
        w.copy("layer scale", 2 + 1)
        w.copy("layer scale and bias sums", 3)
        w.product("fc2 backward", 4, 1 + 4)
        w.product("fc2 weights", 4, 1 + 4, BYTES)
        w.copy("GELU backward", 12)
        w.copy("bias sums", 4)
        w.product("fc1 backward", 4, 4 + 1)
        w.product("fc1 weights", 4, 4 + 1, BYTES)
        w.copy("norm backward", 4)
        w.copy("norm's sums", 2)
        w.copy("layer scale", 2 + 1)
        w.copy("layer scale and bias sums", 3)
        w.product("proj backward", 1, 2)
        w.product("proj weights", 1, 2, BYTES)
        w.attention("attention backward", 2.5, 8)
        w.copy("joining q, k, v", 6)
        w.copy("bias sums", 3)
        w.product("qkv backward", 3, 3 + 1)
        w.product("qkv weights", 3, 3 + 1, BYTES)
        w.copy("norm backward", 4)
        w.copy("norm's sums", 2)
    return w.kernels


def total(kernels: Sequence[Kernel], card: Card, rate: float = 1.0) -> float:
    """Seconds of a block."""
    return sum(kernel.seconds(card, rate) for kernel in kernels)


def predictions() -> list[dict[str, object]]:
    """Of every card, group, size and step: milliseconds of a block, and the ratio to plain at its best."""
    found: list[dict[str, object]] = []
    for card_name, card in CARDS.items():
        for group_name, group in GROUPS.items():
            for size_name, size in SIZES.items():
                for step, batch in (("forward", 128), ("train", 64)):
                    train = step == "train"
                    fastest = min(total(plain(size, batch, train, fused), card) for fused in (False, True))
                    ours = [total(equivariant(size, batch, group, train), card, rate) for rate in TRITON]
                    found.append(
                        {
                            "card": card_name,
                            "group": group_name,
                            "size": size_name,
                            "step": step,
                            "batch": batch,
                            "plain_ms": 1e3 * fastest,
                            "ours_ms": [1e3 * seconds for seconds in ours],
                            "ratio": [fastest / seconds for seconds in ours],
                        }
                    )
    return found


def checked() -> dict[str, tuple[float, float, float, float]]:
    """The profile of a compiled block of ViT-B on an H100, batch 128: plain predicted and measured, E likewise.

    That E had its changes of basis, heads and GELU in kernels of TorchInductor.
    """
    card, size = CARDS["H100"], SIZES["base"]
    block = plain(size, 128, False, False)
    halves = Writer(size, 128, cyclic(2))
    for number in (3, 1, 4, 4):
        halves.product("", number, number + 1 if number > 1 else 2)
    parts = {
        "products": [kernel for kernel in block if kernel.kind == "product"],
        "attention": [kernel for kernel in block if kernel.kind == "attention"],
        "GELU": [kernel for kernel in block if kernel.name == "GELU"],
        "norms and sums": [kernel for kernel in block if "norm" in kernel.name],
    }
    ours = {**parts, "products": halves.kernels}
    return {
        name: (1e3 * total(parts[name], card), PROFILE[name][0], 1e3 * total(ours[name], card), PROFILE[name][1])
        for name in PROFILE
    }


def _show_kernels(name: str) -> None:
    group_name, _, rest = name.partition("_")
    found = [size for size in SIZES if size in rest]
    if group_name not in GROUPS or not found:
        raise SystemExit(f"--kernels={name} is no E(ViT) or octic ViT of {', '.join(SIZES)}")
    size = SIZES[found[0]]
    print("| kernel | GFLOP | MB | us on an H100 |\n| --- | ---: | ---: | ---: |")
    for label, block in (
        ("plain", plain(size, 64, True, False)),
        (group_name, equivariant(size, 64, GROUPS[group_name], True)),
    ):
        for kernel in block:
            print(
                f"| {label}: {kernel.name} | {kernel.operations / 1e9:.1f} | {kernel.bytes / 1e6:.0f} | "
                f"{1e6 * kernel.seconds(CARDS['H100']):.0f} |"
            )


def main() -> None:
    """Print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", help="a name, whose training step of a block, batch 64, is shown in full")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.kernels:
        _show_kernels(options.kernels)
        return
    print("| ViT-B, batch 128, ms | plain predicted | measured | E (Inductor) predicted | measured |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, values in checked().items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    print("\n| card | network | forward, batch 128 | training step, batch 64 |\n| --- | --- | ---: | ---: |")
    found = predictions()
    for forward, train in zip(found[::2], found[1::2], strict=True):
        ratios = [" to ".join(f"{ratio:.2f}" for ratio in entry["ratio"]) for entry in (forward, train)]  # type: ignore[attr-defined]
        print(
            f"| {forward['card']} | {forward['group']} ViT-{str(forward['size'])[0].upper()} | {' | '.join(ratios)} |"
        )
    if options.output is not None:
        content = {
            "command": " ".join(["python benchmarks/gpu_prediction.py", *sys.argv[1:]]),
            "cards": {name: asdict(card) for name, card in CARDS.items()},
            "triton": TRITON,
            "profile": checked(),
            "predicted": found,
        }
        write_text(options.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
