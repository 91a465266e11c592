"""Equivariant linear maps across the tokens of a grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiflop.grids import ImageGroup
from equiflop.groups import Rep
from equiflop.kernels import layout_of
from equiflop.kernels.schur import mix_rows
from equiflop.nn.checks import check_axis
from equiflop.nn.grid import GridTransform
from equiflop.nn.linear import Linear


class TokenMixing(nn.Module):
    """A linear map of the tokens, the same for every channel, that commutes with the group's action on the grid.

    The tokens are taken apart into irreps of the grid's permutation representation, where the map is block-diagonal
    (Schur's lemma): half the MACs of a dense one for the mirror group.

    Its bias has one entry per trivial token coordinate, for all trivial channels. With ``matched_bias``, tokens and
    channels of any one-dimensional irrep have it too where the two irreps agree, since their product is then trivial
    (as in the published E(ResMLP), where antisymmetric tokens of antisymmetric channels have a bias).

    Args:
        rep: type of the channels.
        group: the group that acts on the grid.
        grid_size: rows and columns of the token grid.
        matched_bias: see above; only for groups whose irreps are all one-dimensional.

    Raises:
        ValueError: if the group does not act on the grid, or ``matched_bias`` does not apply to it.

    Shape: ``(B, rows * columns, rep.dim)`` to the same.
    """

    def __init__(
        self,
        rep: Rep,
        group: ImageGroup,
        grid_size: tuple[int, int],
        *,
        matched_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if matched_bias and any(irrep.dim > 1 for irrep in group.irreps):
            raise ValueError(f"matched_bias=True needs one-dimensional irreps; group {group.name!r} has others")
        self.rep = rep
        self.matched_bias = matched_bias
        self.transform = GridTransform(group, *grid_size, device=device, dtype=dtype)
        tokens = self.transform.rep
        self.linear = Linear(tokens, tokens, bias=False, device=device, dtype=dtype)
        self._layout = layout_of(tokens)
        self._channels = repr(rep)
        biases = sum(tokens.multiplicities) if matched_bias else tokens.multiplicities[0]
        self._biases = biases
        self.bias = nn.Parameter(torch.zeros(biases, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Weights as :class:`equiflop.nn.Linear`, bias 0."""
        self.linear.reset_parameters()
        nn.init.zeros_(self.bias)

    @property
    def macs_per_channel(self) -> int:
        """MACs for one channel of one image, the transforms included where they are matrix products."""
        return self.linear.macs_per_vector + 2 * self.transform.macs_per_channel

    def macs(self, *shapes: torch.Size) -> int:
        """Multiply-adds of the transform back; linear map and transform are modules that count themselves."""
        return shapes[0][0] * shapes[0][-1] * self.transform.macs_per_channel

    def forward(self, x: Tensor) -> Tensor:
        check_axis(x, self.rep.dim, self._channels)
        maps = self.linear.maps() if isinstance(self.linear, Linear) else None
        # Tokens first: then all images and channels are columns of one product, and nothing is turned but by copies
        # that are made anyway.
        rows = self.transform(x.transpose(0, 1).flatten(1))
        mixed = self.linear(rows.mT).mT if maps is None else mix_rows(rows, self._layout, maps)
        mixed = mixed.unflatten(-1, (-1, self.rep.dim)) + self._bias(mixed)
        return self.transform.inverse(mixed.flatten(1)).unflatten(-1, (-1, self.rep.dim)).transpose(0, 1)

    def _bias(self, like: Tensor) -> Tensor:
        """Shape ``(rows * columns, 1, rep.dim)``, or fewer rows that broadcast."""
        start = 0
        parts = []
        for token_block, channel_block in zip(self.transform.rep.blocks(), self.rep.blocks(), strict=True):
            count = token_block.multiplicity
            rows = token_block.stop - token_block.start
            if start < self._biases and count:
                bias = self.bias[start : start + count, None].expand(count, channel_block.multiplicity)
                parts.append(F.pad(bias, (channel_block.start, self.rep.dim - channel_block.stop)))
            elif rows:
                parts.append(self.bias.new_zeros(rows, self.rep.dim))
            start += count
        return torch.cat(parts).unsqueeze(1).to(like.dtype)

    def extra_repr(self) -> str:
        return f"channels {self.rep}, matched_bias={self.matched_bias}"
