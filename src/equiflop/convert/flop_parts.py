"""Parts that the official mirror networks (arXiv 2502.05169) share, from their tensors to ours.

There a feature is a pair of tensors, symmetric and antisymmetric; here it is one axis, the antisymmetric channels
(irrep B) behind the symmetric ones (irrep A).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equiflop.convert.mapping import Mapping
from equiflop.nn import Affine, LayerNorm, LayerScale, Linear, PatchEmbed

#: Our irreps and the official suffixes.
PARTS = (("A", "sym"), ("B", "asym"))


class FlopMapping(Mapping):
    """Adds the parts of mirror networks."""

    def both(self, name: str, length: int) -> Tensor:
        """``<name>_sym`` and ``<name>_asym`` behind each other: one value per channel."""
        half = (length // 2,)
        return torch.cat([self.official.take(f"{name}_{part}", half) for _, part in PARTS])

    def linear(
        self, linear: Linear, source: str, target: str, stem: str = "linear", kernel: tuple[int, ...] = ()
    ) -> None:
        """``<source>.<stem>_sym.weight`` and ``_asym``, with the trailing axes ``kernel`` of a 1x1 convolution."""
        for (irrep, weight), (_, part) in zip(linear.weights(), PARTS, strict=True):
            found = self.official.take(f"{source}.{stem}_{part}.weight", (*weight.shape, *kernel))
            self.out[f"{target}.{irrep.name}.weight"] = linear.gain(irrep) * found.view(weight.shape)
        if linear.bias is not None:
            irrep, _ = linear.weights()[0]
            bias = self.official.take(f"{source}.{stem}_sym.bias", linear.bias.shape)
            self.out[f"{target}.{irrep.name}.bias"] = linear.bias_gain * bias

    def layer_norm(self, norm: LayerNorm, source: str, target: str) -> None:
        """``<source>.scaling``."""
        assert norm.weight is not None and norm.bias is not None
        self.out[f"{target}.weight"] = self.both(f"{source}.scaling.alpha", len(norm.weight))
        self.out[f"{target}.bias"] = self.official.take(f"{source}.scaling.beta", norm.bias.shape)

    def scale(self, module: nn.Module, source: str, target: str) -> None:
        """``<source>.alpha_sym`` and ``alpha_asym`` of a layer scale or an affine "norm", where there is one."""
        if isinstance(module, LayerScale):
            self.out[f"{target}.gamma"] = self.both(f"{source}.alpha", len(module.gamma))
        elif isinstance(module, Affine):
            self.out[f"{target}.weight"] = self.both(f"{source}.alpha", len(module.weight))

    def patch_embed(self, embed: PatchEmbed, source: str, target: str, weight_scale: float, bias_scale: float) -> None:
        """Left halves of mirrored kernels.

        A kernel ``[w | mirrored w]`` sees ``sqrt(2)`` times our orthonormal symmetric pixel coordinates.

        Args:
            embed: our module.
            source: its official name.
            target: its name in the model.
            weight_scale: ``sqrt(2)`` times what the official code multiplies its output with.
            bias_scale: what it multiplies its output with.
        """
        height, width = embed.patch_size
        if width % 2:
            raise ValueError(f"patch_size={embed.patch_size} is odd in width; official models have even patches")
        channels = embed.proj.out_rep.multiplicities[0]
        for irrep, part in PARTS:
            kernel = self.official.take(f"{source}.proj_{part}.weight", (channels, embed.in_chans, height, width // 2))
            self.out[f"{target}.proj.{irrep}.weight"] = weight_scale * kernel.permute(0, 2, 3, 1).flatten(1)
        if embed.proj.bias is not None:
            bias = self.official.take(f"{source}.proj_sym.bias", (channels,))
            self.out[f"{target}.proj.A.bias"] = bias_scale * bias

    def left_and_right(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Raster indices of the left half of a token grid, and of their mirror images, in the official order."""
        rows, columns = grid
        if columns % 2:
            raise ValueError(f"the token grid {rows}x{columns} is odd in width; official models have even grids")
        raster = torch.arange(rows * columns).view(rows, columns)
        return raster[:, : columns // 2].flatten(), raster[:, columns // 2 :].flip(1).flatten()
