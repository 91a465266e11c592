"""Linear maps of sets and graphs that commute with every order of the nodes (the symmetric group S_n)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiflop.nn.initialise import fan_in_


class SetLinear(nn.Module):
    """The general linear map of a set's features that commutes with all permutations: two terms.

    ``y_i = W_own x_i + W_mean mean_j x_j + bias``. A set feature is the trivial plus the standard irrep of S_n, so by
    Schur's lemma a map has one matrix for each: ``W_own`` on the standard irrep, ``W_own + W_mean`` on the trivial one.
    Means stand where the textbook has sums, so that the size of the set does not change the scale.

    Initialised so that independent inputs of variance 1 give outputs of variance 1 in large sets.
    Source: Maron et al., arXiv 1812.09902; Zaheer et al., arXiv 1703.06114.

    Args:
        in_channels: channels of a node of the input.
        out_channels: channels of a node of the output.
        bias: whether to add a bias, the same for all nodes.

    Raises:
        ValueError: if a number of channels is not positive, or the input does not have its shape.

    Shape: ``(B, n, in_channels)`` to ``(B, n, out_channels)``, and a mask ``(B, n)`` that is False at padded nodes:
        these are ignored in the input and zero in the output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for argument, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels < 1:
                raise ValueError(f"{argument}={channels} is not positive; a set has at least one channel")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.weight_own = nn.Parameter(torch.empty(out_channels, in_channels, device=device, dtype=dtype))
        self.weight_mean = nn.Parameter(torch.empty(out_channels, in_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal with variance ``1 / in_channels``, bias 0."""
        for weight in (self.weight_own, self.weight_mean):
            fan_in_(weight, self.in_channels, self.bias)

    def macs(self, *shapes: torch.Size) -> int:
        """MACs for nodes of shape ``(B, n, in_channels)``."""
        sets, nodes = shapes[0][:2]
        return sets * (nodes * self.weight_own.numel() + self.weight_mean.numel())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        _check_nodes(x, self.in_channels, mask)
        x = _without_padding(x, mask)
        pooled = F.linear(_mean(x, 1, _node_counts(x, mask)), self.weight_mean, self.bias)
        return _without_padding(F.linear(x, self.weight_own) + pooled.unsqueeze(1), mask)

    def extra_repr(self) -> str:
        return f"{self.in_channels} -> {self.out_channels} per node, bias={self.bias is not None}"


class GraphLinear(nn.Module):
    """The general linear map between node and edge features that commutes with all permutations of the nodes.

    The terms, each one ``(C_out, C_in)`` block: node to node 2, node to edge 5, edge to node 5, edge to edge 15. They
    are grouped by how many vectors they multiply, so that nothing of size ``n^2 x n^2`` is ever made:

    * ``weight_edges``, blocks [edge, transposed edge] by [edge]: ``n^2`` products each;
    * ``weight_nodes``, blocks [node, row of edges, column of edges, diagonal] by [node, diagonal, row mean, column
      mean]: ``n`` products each;
    * ``weight_graph``, blocks [node, all edges, diagonal] by [node mean, edge mean, diagonal mean]: one product each.

    The bias belongs to the last group: all nodes, all edges, and the diagonal once more. Pooling takes means, not sums,
    so that the size of the graph does not change the scale.

    Initialised so that independent inputs of variance 1 give nodes and off-diagonal edges of variance 1 in large
    graphs. Source: Maron et al., arXiv 1812.09902, sections 3 and 4.

    Args:
        in_nodes: channels of a node of the input; 0 for none.
        in_edges: channels of an edge of the input; 0 for none.
        out_nodes: channels of a node of the output; 0 for none.
        out_edges: channels of an edge of the output; 0 for none.
        bias: whether to add the biases.

    Raises:
        ValueError: if a number of channels is negative, the input or the output has none at all, or a tensor does not
            have its shape.

    Shape: nodes ``(B, n, in_nodes)`` and edges ``(B, n, n, in_edges)`` to nodes ``(B, n, out_nodes)`` and edges
        ``(B, n, n, out_edges)``, and a mask ``(B, n)`` that is False at padded nodes: these and their edges are ignored
        in the input and zero in the output. A side without channels is a tensor whose last axis has length 0.
    """

    def __init__(
        self,
        in_nodes: int,
        in_edges: int,
        out_nodes: int,
        out_edges: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        counts = {"in_nodes": in_nodes, "in_edges": in_edges, "out_nodes": out_nodes, "out_edges": out_edges}
        for argument, channels in counts.items():
            if channels < 0:
                raise ValueError(f"{argument}={channels} is negative; it is a number of channels, or 0 for none")
        for side in ("in", "out"):
            if counts[f"{side}_nodes"] + counts[f"{side}_edges"] == 0:
                raise ValueError(f"{side}_nodes=0 and {side}_edges=0 leave no channels; one of them must be positive")
        self.in_nodes, self.in_edges, self.out_nodes, self.out_edges = in_nodes, in_edges, out_nodes, out_edges

        def weight(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))

        self.weight_edges = weight(2 * out_edges, in_edges)
        self.weight_nodes = weight(out_nodes + 3 * out_edges, in_nodes + 3 * in_edges)
        self.weight_graph = weight(out_nodes + 2 * out_edges, in_nodes + 2 * in_edges)
        self.bias = nn.Parameter(torch.empty(out_nodes + 2 * out_edges, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal, their variance one over the number of inputs that do not shrink with pooling; bias 0."""
        to_nodes = 1.0 / math.sqrt(self.in_nodes + self.in_edges)
        to_edges = 1.0 / math.sqrt(2 * self.in_nodes + 4 * self.in_edges)
        with torch.no_grad():
            self.weight_edges.normal_(std=to_edges)
            for weight in (self.weight_nodes, self.weight_graph):
                weight[: self.out_nodes].normal_(std=to_nodes)
                weight[self.out_nodes :].normal_(std=to_edges)
            if self.bias is not None:
                self.bias.zero_()

    def macs(self, *shapes: torch.Size) -> int:
        """MACs for nodes of shape ``(B, n, in_nodes)`` and their edges."""
        graphs, nodes = shapes[0][:2]
        per_edge, per_node, per_graph = (w.numel() for w in (self.weight_edges, self.weight_nodes, self.weight_graph))
        return graphs * (nodes**2 * per_edge + nodes * per_node + per_graph)

    def forward(self, nodes: Tensor, edges: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _check_nodes(nodes, self.in_nodes, mask)
        _check_edges(edges, nodes, self.in_edges)
        nodes, edges = _without_padding(nodes, mask), _edges_without_padding(edges, mask)
        counts = _node_counts(nodes, mask)
        diagonal = _diagonal(edges)
        row_mean, column_mean = _mean(edges, 2, counts), _mean(edges, 1, counts)
        per_node = torch.cat([nodes, diagonal, row_mean, column_mean], dim=-1)
        per_graph = torch.cat([_mean(t, 1, counts) for t in (nodes, row_mean, diagonal)], dim=-1)

        node_terms = F.linear(per_node, self.weight_nodes)
        graph_terms = F.linear(per_graph, self.weight_graph, self.bias).unsqueeze(1)
        out_nodes, rows, columns, on_diagonal = node_terms.split([self.out_nodes, *[self.out_edges] * 3], dim=-1)
        all_nodes, all_edges, all_diagonal = graph_terms.split([self.out_nodes, *[self.out_edges] * 2], dim=-1)
        straight, transposed = F.linear(edges, self.weight_edges).chunk(2, dim=-1)
        out_edges = straight + transposed.transpose(1, 2) + (rows + all_edges).unsqueeze(2) + columns.unsqueeze(1)
        out_edges.diagonal(dim1=1, dim2=2).add_((on_diagonal + all_diagonal).mT)
        return _without_padding(out_nodes + all_nodes, mask), _edges_without_padding(out_edges, mask)

    def extra_repr(self) -> str:
        return (
            f"nodes {self.in_nodes} -> {self.out_nodes}, edges {self.in_edges} -> {self.out_edges}, "
            f"{sum(p.numel() for p in self.parameters())} parameters, bias={self.bias is not None}"
        )


class GraphInvariants(nn.Module):
    """The linear invariants of a graph: mean node, mean edge off the diagonal, mean edge on the diagonal.

    A linear layer behind them is the general invariant linear map (1 term per pair of channels for nodes, 2 for edges).
    In a graph of one node the mean off the diagonal is 0.

    Raises:
        ValueError: if a tensor does not have its shape.

    Shape: nodes ``(B, n, C)``, edges ``(B, n, n, D)`` and a mask ``(B, n)`` to ``(B, C + 2 D)``.
    """

    def forward(self, nodes: Tensor, edges: Tensor, mask: Tensor | None = None) -> Tensor:
        _check_nodes(nodes, nodes.shape[-1], mask)
        _check_edges(edges, nodes, edges.shape[-1])
        nodes, edges = _without_padding(nodes, mask), _edges_without_padding(edges, mask)
        counts = _node_counts(nodes, mask)
        diagonal = _diagonal(edges).sum(1)
        off_diagonal = (edges.sum((1, 2)) - diagonal) / (counts * (counts - 1)).clamp_min(1)
        return torch.cat([_mean(nodes, 1, counts), off_diagonal, diagonal / counts], dim=-1)


def _node_counts(nodes: Tensor, mask: Tensor | None) -> Tensor:
    """Number of nodes that are not padding, at least 1; shape ``(B, 1)``."""
    if mask is None:
        return nodes.new_full((nodes.shape[0], 1), max(nodes.shape[1], 1))
    return mask.sum(1, keepdim=True).clamp_min(1).to(nodes.dtype)


def _mean(x: Tensor, dim: int, counts: Tensor) -> Tensor:
    """Mean along an axis of nodes whose padding is zero."""
    return x.sum(dim) / counts.view(-1, *[1] * (x.ndim - 2))


def _diagonal(edges: Tensor) -> Tensor:
    """``(B, n, n, C)`` to ``(B, n, C)``."""
    return edges.diagonal(dim1=1, dim2=2).mT


def _without_padding(nodes: Tensor, mask: Tensor | None) -> Tensor:
    return nodes if mask is None else nodes.masked_fill(~mask.unsqueeze(-1), 0.0)


def _edges_without_padding(edges: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return edges
    return edges.masked_fill(~(mask.unsqueeze(1) & mask.unsqueeze(2)).unsqueeze(-1), 0.0)


def _check_nodes(nodes: Tensor, channels: int, mask: Tensor | None) -> None:
    if nodes.ndim != 3 or nodes.shape[-1] != channels:
        raise ValueError(f"nodes have shape {tuple(nodes.shape)}; (B, n, {channels}) is needed")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != nodes.shape[:2]):
        raise ValueError(
            f"mask has dtype {mask.dtype} and shape {tuple(mask.shape)}; torch.bool and {tuple(nodes.shape[:2])} are "
            "needed"
        )


def _check_edges(edges: Tensor, nodes: Tensor, channels: int) -> None:
    batch, n = nodes.shape[:2]
    if edges.shape != (batch, n, n, channels):
        raise ValueError(f"edges have shape {tuple(edges.shape)}; ({batch}, {n}, {n}, {channels}) is needed")
