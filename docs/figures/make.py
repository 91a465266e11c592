"""Makes the figures of docs/how-it-works.md.

    python docs/figures/make.py [--checkpoint RUN]

The trained filters need a run of a mirror-equivariant ViT (``equiflop train``, a folder or weights file); without one
that figure is left as it is. Needs matplotlib and scikit-image (for the photograph of the cat).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from skimage.data import cat

from equiflop.grids import grid_decomposition, named_image_group
from equiflop.groups import (
    FiniteGroup,
    Rep,
    alternating,
    cyclic,
    dihedral,
    direct_product,
    flop,
    octahedral,
    symmetric,
)
from equiflop.nn import Linear, PatchEmbed

HERE = Path(__file__).parent
BLUE, RED, GREY = "#3b6ea5", "#b5483a", "#8a8a8a"


def save(figure: Any, name: str) -> None:
    """Write through a temporary file, so that an interrupted run leaves the old figure."""
    temporary = HERE / f".{name}"
    figure.savefig(temporary, dpi=110, bbox_inches="tight", metadata={"Software": None})
    temporary.replace(HERE / name)
    plt.close(figure)
    print(HERE / name)


def photograph() -> torch.Tensor:
    """The cat, 288x288 pixels, values from -1 to 1."""
    image = torch.from_numpy(cat()[6:294, 60:348].copy()).permute(2, 0, 1).float()
    return image[None] / 127.5 - 1.0


def draw_cat() -> None:
    """Invariant and sign-flipping channels of a patch embedding, for an image and its mirror image."""
    torch.manual_seed(3)
    group = named_image_group("flop")
    image = photograph()
    embed = PatchEmbed(Rep.regular(group, 4), group, img_size=288, patch_size=8, output_fmt="NHWC")
    figure, axes = plt.subplots(2, 4, figsize=(11.5, 5.9))
    channels = {"symmetric channel": 1, "antisymmetric channel": 5}
    maps = {}
    for row, (title, picture) in enumerate({"the cat": image, "the cat, mirrored": image.flip(-1)}.items()):
        axes[row, 0].imshow(((picture[0] + 1) / 2).permute(1, 2, 0))
        axes[row, 0].set_title(title)
        with torch.no_grad():
            features = embed(picture)[0]
        for column, (name, channel) in enumerate(channels.items(), start=1):
            field = features[..., channel] - (features[..., channel].mean() if column == 1 else 0.0)
            maps[row, column] = field
            limit = float(field.abs().max())
            axes[row, column].imshow(field, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axes[row, column].set_title(name)
    even = (maps[0, 1].flip(-1) - maps[1, 1]).abs().max() / maps[0, 1].abs().max()
    odd = (maps[0, 2].flip(-1) + maps[1, 2]).abs().max() / maps[0, 2].abs().max()
    texts = (
        f"The symmetric channel\nmoves with the cat\n({_deviation(even)}).",
        f"The antisymmetric channel\nmoves with the cat and\nchanges sign\n({_deviation(odd)}).",
    )
    for axis, text in zip(axes[:, 3], texts, strict=True):
        axis.axis("off")
        axis.text(0, 0.5, text, va="center")
    for axis in axes[:, :3].flat:
        axis.set_xticks([])
        axis.set_yticks([])
    save(figure, "cat.png")


def _deviation(size: torch.Tensor) -> str:
    return "bit for bit" if size == 0 else f"up to {size:.0e}"


def dense(linear: Linear) -> np.ndarray:
    """The matrix of an equivariant linear map."""
    with torch.no_grad():
        return linear(torch.eye(linear.in_rep.dim)).T.numpy()


def draw_blocks() -> None:
    """Weights of a plain linear layer and of equivariant ones of the same width."""
    torch.manual_seed(0)
    width = 48
    groups = {"plain": cyclic(1), "mirror (C2)": flop(), "square (D4)": dihedral(4), "cube (O)": octahedral()}
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.7))
    for axis, (title, group) in zip(axes, groups.items(), strict=True):
        rep = Rep.regular_of_dim(group, width)
        linear = Linear(rep, rep, bias=False)
        matrix = dense(linear)
        axis.imshow(np.where(matrix == 0, np.nan, np.abs(matrix) ** 0.5), cmap="Blues", vmin=-0.1)
        share = linear.macs_per_vector / width**2
        parameters = sum(p.numel() for p in linear.parameters()) / width**2
        axis.set_title(f"{title}\nMACs x {share:.3g}, parameters x {parameters:.3g}", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    save(figure, "blocks.png")


def saving(group: FiniteGroup) -> tuple[float, float]:
    """MACs and parameters of a wide equivariant linear layer, as a share of the plain one's."""
    macs = sum(irrep.dim**3 / irrep.endomorphism_dim for irrep in group.irreps) / group.order**2
    return macs, 1.0 / group.order


def draw_savings() -> None:
    """Which group saves how much."""
    groups = {
        "mirror C2": flop(), "two mirrors C2xC2": direct_product(flop(), flop()), "thirds C3": cyclic(3),
        "quarter turns C4": cyclic(4), "triangle D3": dihedral(3), "square D4": dihedral(4), "hexagon D6": dihedral(6),
        "C8": cyclic(8), "tetrahedron A4": alternating(4), "cube O": octahedral(),
        "cube with reflections": direct_product(octahedral(), flop()), "permutations S5": symmetric(5),
    }  # fmt: skip
    values = {name: saving(group) for name, group in groups.items()}
    order = sorted(values, key=lambda name: -values[name][0])
    figure, axis = plt.subplots(figsize=(8.5, 4.6))
    places = np.arange(len(order))
    axis.barh(places + 0.19, [1 / values[name][0] for name in order], 0.36, color=BLUE, label="fewer MACs")
    axis.barh(places - 0.19, [1 / values[name][1] for name in order], 0.36, color=GREY, label="fewer parameters")
    for place, name in zip(places, order, strict=True):
        axis.text(1.03 / values[name][0], place + 0.19, f"{1 / values[name][0]:.3g}", va="center", fontsize=8)
        axis.text(1.03 / values[name][1], place - 0.19, f"{1 / values[name][1]:.3g}", va="center", fontsize=8)
    axis.set_yticks(places, order)
    axis.set_xscale("log")
    axis.set_xlim(1, 220)
    axis.set_xlabel("factor, linear layers between regular features")
    axis.legend(loc="lower right")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    save(figure, "savings.png")


def draw_filters(checkpoint: str) -> None:
    """The patch filters of a trained mirror-equivariant ViT with the largest weights, of either irrep."""
    from equiflop.classify import load_model

    model: Any = load_model(checkpoint).model
    embed = model.patch_embed
    basis = torch.from_numpy(np.array(grid_decomposition(model.group, *embed.patch_size).matrix)).float()
    figure, axes = plt.subplots(2, 10, figsize=(12, 2.9))
    blocks = list(embed.transform.rep.blocks())
    for row, (block, title) in enumerate(zip(blocks, ("symmetric", "antisymmetric"), strict=True)):
        weight = embed.proj.get_parameter(f"{block.irrep.name}.weight").detach()
        kernels = torch.einsum(
            "okc,kp->ocp", weight.unflatten(1, (block.multiplicity, -1)), basis[block.start : block.stop]
        )
        strongest = kernels.flatten(1).norm(dim=1).argsort(descending=True)[:10]
        for axis, index in zip(axes[row], strongest, strict=True):
            kernel = kernels[index].unflatten(-1, embed.patch_size).permute(1, 2, 0)
            scaled = kernel / kernel.abs().max()
            if embed.in_chans == 1:
                axis.imshow(scaled[..., 0], cmap="RdBu_r", vmin=-1, vmax=1)
            else:
                axis.imshow((scaled + 1) / 2)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row, 0].set_ylabel(title)
    save(figure, "filters.png")


def main() -> None:
    """Make them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", help="run folder or weights of a mirror-equivariant ViT")
    arguments = parser.parse_args()
    draw_cat()
    draw_blocks()
    draw_savings()
    if arguments.checkpoint:
        draw_filters(arguments.checkpoint)


if __name__ == "__main__":
    main()
