"""Points of a cloud turned into features of regular type: the first layer of a point transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiflop.groups import Action, Rep, fourier_matrix
from equiflop.nn.fixed import FixedTensors
from equiflop.nn.initialise import fan_in_


def neighbourhoods(points: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """The nearest points of every point, itself included, as offsets, and weights that fade out with the distance.

    With ``r`` the distance of the first point that is left out, a point at distance ``d`` weighs ``1 - d^2 / r^2``
    (then the weights are divided by their sum). Where several points are equally far, it does not matter which of them
    are taken: at the edge of the neighbourhood they weigh 0, and inside it all of them are taken. So a weighted mean
    over the neighbourhood depends on the points continuously and not on their order. Where ``neighbours + 1`` points
    or more lie at one place, all weigh the same.

    Args:
        points: shape ``(B, N, 3)``.
        neighbours: size of a neighbourhood, below ``N``.

    Returns:
        Offsets ``(B, N, neighbours, 3)`` and weights ``(B, N, neighbours)``.

    Raises:
        ValueError: if there are not more than ``neighbours`` points.
    """
    count = points.shape[1]
    if count <= neighbours:
        raise ValueError(
            f"points has {count} points per cloud; neighbours={neighbours} needs at least {neighbours + 1}"
        )
    offsets = points.unsqueeze(1) - points.unsqueeze(2)
    squares, nearest = offsets.square().sum(dim=-1).topk(neighbours + 1, dim=-1, largest=False)
    offsets = offsets.gather(2, nearest[..., :-1, None].expand(-1, -1, -1, 3))
    reach = squares[..., -1:]
    weights = 1.0 - squares[..., :-1] / torch.where(reach > 0, reach, torch.ones_like(reach))
    return offsets, weights / weights.sum(dim=-1, keepdim=True)


class PointEmbed(FixedTensors):
    """A function on the group for every point, from its position and its neighbours, in the layout of a regular Rep.

    ``y_h = phi(h^-1 p, {h^-1 (q - p)})`` for all elements ``h``: one small plain network ``phi`` looks at the
    neighbourhood from every orientation. It is a linear map of ``(p, q - p)``, GELU, the weighted mean over the
    neighbours ``q`` (see :func:`neighbourhoods`) and a second linear map. When the cloud moves by ``g``, ``y_h``
    becomes ``y_(g^-1 h)``; the group Fourier transform takes that to ``rep``.

    Args:
        group: the group as it acts on points in space, by 3x3 matrices.
        copies: outputs of ``phi``: copies of the regular representation.
        hidden: hidden width of ``phi``; by default ``copies``.
        neighbours: points in a neighbourhood, the point itself included.

    Raises:
        ValueError: if a number is not positive or the group does not act on three coordinates.

    Shape: ``(B, N, 3)`` to ``(B, N, rep.dim)``.
    """

    matrices: Tensor
    fourier: Tensor

    def __init__(
        self,
        group: Action,
        copies: int,
        *,
        hidden: int | None = None,
        neighbours: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = copies if hidden is None else hidden
        for name, value in (("copies", copies), ("hidden", hidden), ("neighbours", neighbours)):
            if value < 1:
                raise ValueError(f"{name}={value} is not positive; PointEmbed needs {name} >= 1")
        if group.dim != 3:
            raise ValueError(f"group={group!r} acts on {group.dim} coordinates; PointEmbed needs an action on 3")
        self.in_rep = group
        self.rep = self.out_rep = Rep.regular(group, copies)
        self.hidden = hidden
        self.neighbours = neighbours
        self.fix("matrices", group.matrices, device, dtype)
        self.fix("fourier", fourier_matrix(group.group), device, dtype)
        self.weight = nn.Parameter(torch.empty(hidden, 6, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype))
        self.proj = nn.Linear(hidden, copies, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal with variance 1 / fan-in, biases 0."""
        for weight, bias in ((self.weight, self.bias), (self.proj.weight, self.proj.bias)):
            fan_in_(weight, weight.shape[1], bias)

    def macs(self, *shapes: torch.Size) -> int:
        """MACs for points of shape ``(B, N, 3)``, ``proj`` left out: turned weights, first map, Fourier transform."""
        order = self.rep.group.order
        turned = order * self.hidden * 2 * 3 * 3
        per_point = self.neighbours * 6 * order * self.hidden + order * self.rep.dim
        return turned + shapes[0][:-1].numel() * per_point

    def forward(self, points: Tensor) -> Tensor:
        offsets, weights = neighbourhoods(points, self.neighbours)
        vectors = torch.cat([points.unsqueeze(2).expand_as(offsets), offsets], dim=-1)
        order = self.rep.group.order
        # W (h^-1 v) = (W h^T) v: the weights are turned once, instead of every point.
        matrices = self.matrices.to(self.weight.dtype)
        turned = (self.weight.view(2 * self.hidden, 3) @ matrices.mT).reshape(order * self.hidden, 6)
        hidden = F.gelu(F.linear(vectors, turned, self.bias.repeat(order)))
        pooled = (hidden * weights.unsqueeze(-1)).sum(dim=-2)
        spatial = self.proj(pooled.unflatten(-1, (order, self.hidden)))
        return (self.fourier.to(spatial.dtype) @ spatial).flatten(-2)

    def extra_repr(self) -> str:
        return f"points -> {self.rep}, hidden={self.hidden}, neighbours={self.neighbours}"
