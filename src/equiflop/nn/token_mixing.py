"""Equivariant linear maps across the tokens of a grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equiflop.grids import ImageGroup
from equiflop.groups import Irrep, Rep
from equiflop.nn.grid import GridTransform
from equiflop.nn.linear import Linear, algebra_weight


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
        device: where the parameters are made.
        dtype: dtype of the parameters.

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
        biases = sum(tokens.multiplicities) if matched_bias else tokens.multiplicities[0]
        self.bias = nn.Parameter(torch.zeros(biases, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Bias 0; the weights reset themselves."""
        nn.init.zeros_(self.bias)

    @property
    def macs_per_channel(self) -> int:
        """MACs for one channel of one image, the transforms included where they are matrix products."""
        return self.linear.macs_per_vector + 2 * self.transform.macs_per_channel

    def forward(self, x: Tensor) -> Tensor:
        coordinates = self.transform(x)
        weights = {irrep.name: weight for irrep, weight in self.linear.weights()}
        mixed = []
        start = 0
        for token_block, channel_block in zip(self.transform.rep.blocks(), self.rep.blocks(), strict=True):
            irrep, count = token_block.irrep, token_block.multiplicity
            if not count:
                continue
            rows = coordinates[:, token_block.start : token_block.stop].unflatten(1, (irrep.dim, count))
            block = _mix(rows, weights[irrep.name], irrep)
            if start < len(self.bias):
                bias = self.bias[start : start + count, None].expand(count, channel_block.multiplicity)
                pad = (channel_block.start, self.rep.dim - channel_block.stop)
                block = block + nn.functional.pad(bias, pad)
            start += count
            mixed.append(block.flatten(1, 2))
        return self.transform.inverse(torch.cat(mixed, dim=1))

    def extra_repr(self) -> str:
        return f"channels {self.rep}, matched_bias={self.matched_bias}"


def _mix(rows: Tensor, weight: Tensor, irrep: Irrep) -> Tensor:
    """One irrep's block on token coordinates: shape ``(B, d, m, channels)`` to the same."""
    e = irrep.endomorphism_dim
    copies = irrep.regular_multiplicity
    wide = (
        rows if e == 1 else rows.unflatten(1, (e, copies)).transpose(1, 2).flatten(2, 3)
    )  # B, copies, e * m, channels
    if e > 1:
        weight = algebra_weight(weight.unflatten(0, (e, -1)))
    batch = wide.flatten(0, 1)
    mixed = torch.bmm(weight.expand(batch.shape[0], -1, -1), batch).unflatten(0, wide.shape[:2])
    return mixed if e == 1 else mixed.unflatten(2, (e, -1)).transpose(1, 2).flatten(1, 2)
