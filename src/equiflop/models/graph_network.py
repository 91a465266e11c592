"""Networks of sets and graphs whose output does not depend on the order of the nodes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equiflop.nn.permutation import GraphInvariants, GraphLinear, SetLinear


class SetNetwork(nn.Module):
    """Classifier of sets: residual blocks of a ``SetLinear`` and a pointwise GELU, mean over the nodes, linear head.

    Means over many nodes differ little between sets; a batch norm in front of the head brings the differences out.

    Args:
        in_channels: channels of a node.
        num_classes: outputs.
        width: channels inside.
        depth: number of blocks.
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if ``depth`` is negative, another number is not positive, or an input does not have its shape.

    Shape: nodes ``(B, n, in_channels)`` and a mask ``(B, n)``, False at padded nodes, to ``(B, num_classes)``.

    >>> SetNetwork(3, 10, width=8)(torch.zeros(2, 5, 3)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        width: int = 64,
        depth: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(depth, {"width": width, "num_classes": num_classes})
        self.embed = SetLinear(in_channels, width, device=device, dtype=dtype)
        self.norms = nn.ModuleList(nn.LayerNorm(width, device=device, dtype=dtype) for _ in range(depth))
        self.layers = nn.ModuleList(SetLinear(width, width, device=device, dtype=dtype) for _ in range(depth))
        self.act = nn.GELU()
        self.norm = nn.BatchNorm1d(width, device=device, dtype=dtype)
        self.head = nn.Linear(width, num_classes, device=device, dtype=dtype)

    def forward(self, nodes: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(nodes, mask)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + self.act(layer(norm(x), mask))
        if mask is None:
            return self.head(self.norm(x.mean(1)))
        counts = mask.sum(1, keepdim=True).clamp_min(1)
        return self.head(self.norm(x.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1) / counts))


class GraphBlock(nn.Module):
    """Residual block: layer norm over channels, ``GraphLinear``, GELU, on nodes and edges at once.

    Args:
        node_width: channels of a node.
        edge_width: channels of an edge.
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Shape: nodes ``(B, n, node_width)``, edges ``(B, n, n, edge_width)`` and a mask ``(B, n)`` to nodes and edges of the
        same shapes.
    """

    def __init__(
        self,
        node_width: int,
        edge_width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm_nodes = nn.LayerNorm(node_width, device=device, dtype=dtype)
        self.norm_edges = nn.LayerNorm(edge_width, device=device, dtype=dtype)
        self.linear = GraphLinear(node_width, edge_width, node_width, edge_width, device=device, dtype=dtype)
        self.act = nn.GELU()

    def forward(self, nodes: Tensor, edges: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mixed_nodes, mixed_edges = self.linear(self.norm_nodes(nodes), self.norm_edges(edges), mask)
        return nodes + self.act(mixed_nodes), edges + self.act(mixed_edges)


class GraphNetwork(nn.Module):
    """Classifier of graphs, invariant to the order of the nodes: blocks, linear invariants, a head of two layers.

    Means over many nodes differ little between graphs; a batch norm in front of the head brings the differences out.

    Args:
        in_nodes: channels of a node; 0 if only edges have features.
        in_edges: channels of an edge.
        num_classes: outputs.
        node_width: channels of a node inside.
        edge_width: channels of an edge inside.
        depth: number of blocks.
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if ``depth`` is negative, a width or the number of classes is not positive, or an input does not
            have its shape.

    Shape: nodes ``(B, n, in_nodes)``, edges ``(B, n, n, in_edges)`` and a mask ``(B, n)``, False at padded nodes, to
        ``(B, num_classes)``.

    >>> GraphNetwork(1, 2, 10)(torch.zeros(3, 5, 1), torch.zeros(3, 5, 5, 2)).shape
    torch.Size([3, 10])
    """

    def __init__(
        self,
        in_nodes: int,
        in_edges: int,
        num_classes: int,
        *,
        node_width: int = 32,
        edge_width: int = 16,
        depth: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(depth, {"node_width": node_width, "edge_width": edge_width, "num_classes": num_classes})
        self.embed = GraphLinear(in_nodes, in_edges, node_width, edge_width, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.blocks = nn.ModuleList(
            GraphBlock(node_width, edge_width, device=device, dtype=dtype) for _ in range(depth)
        )
        self.pool = GraphInvariants()
        invariants = node_width + 2 * edge_width
        self.norm = nn.BatchNorm1d(invariants, device=device, dtype=dtype)
        self.fc = nn.Linear(invariants, invariants, device=device, dtype=dtype)
        self.head = nn.Linear(invariants, num_classes, device=device, dtype=dtype)

    def forward(self, nodes: Tensor, edges: Tensor, mask: Tensor | None = None) -> Tensor:
        nodes, edges = self.embed(nodes, edges, mask)
        nodes, edges = self.act(nodes), self.act(edges)
        for block in self.blocks:
            nodes, edges = block(nodes, edges, mask)
        return self.head(self.act(self.fc(self.norm(self.pool(nodes, edges, mask)))))


def _check_sizes(depth: int, widths: dict[str, int]) -> None:
    if depth < 0:
        raise ValueError(f"depth={depth} is negative; it is the number of blocks")
    for argument, width in widths.items():
        if width < 1:
            raise ValueError(f"{argument}={width} is not positive; it must be at least 1")
