"""Networks of sets and graphs whose output does not depend on the order of the nodes."""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations

import torch
from torch import Tensor, nn

from equiflop.groups import Action, symmetric
from equiflop.models.sizes import check_sizes
from equiflop.nn.permutation import GraphInvariants, GraphLinear, SetLinear

#: Nodes of the sets and graphs on which :func:`equiflop.check` tries all permutations.
SAMPLE_NODES = 4


@lru_cache(maxsize=1)
def node_permutations() -> Action:
    """All permutations of ``SAMPLE_NODES`` nodes."""
    return Action.permuting(symmetric(SAMPLE_NODES), list(permutations(range(SAMPLE_NODES))))


class _NodeNetwork(nn.Module):
    """What sets and graphs say of themselves: permuted nodes leave the output as it is.

    The networks take any number of nodes; the group is that of the sample inputs, in half of which the last node is
    padding. Where the mask goes, the padding goes.
    """

    in_nodes: int
    in_edges: int | None = None

    @property
    def group(self) -> Action:
        """The permutations of the nodes of the sample inputs."""
        return node_permutations()

    def sample_inputs(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random nodes, edges (of graphs) and mask, for :func:`equiflop.check`."""
        lead = (batch_size, SAMPLE_NODES)
        mask = torch.ones(lead, dtype=torch.bool)
        mask[1::2, -1] = False
        nodes = torch.randn(*lead, self.in_nodes, generator=generator, dtype=torch.float64)
        if self.in_edges is None:
            return nodes, mask
        edges = torch.randn(*lead, SAMPLE_NODES, self.in_edges, generator=generator, dtype=torch.float64)
        return nodes, edges, mask

    def act_on_inputs(self, a: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Nodes, edges and mask in another order."""
        nodes, *edges, mask = inputs
        moved = [self.group.act(a, self.group.act(a, t, dim=1), dim=2) for t in edges]
        return (self.group.act(a, nodes, dim=1), *moved, self.group.act(a, mask, dim=1))

    def act_on_output(self, a: int, output: Tensor) -> Tensor:
        """Logits do not change."""
        return output


class SetNetwork(_NodeNetwork):
    """Classifier of sets: residual blocks of a ``SetLinear`` and a pointwise GELU, mean over the nodes, linear head.

    Means over many nodes differ little between sets; a batch norm in front of the head brings the differences out.

    Args:
        in_channels: channels of a node.
        num_classes: outputs.
        width: channels inside.
        depth: number of blocks.

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
        check_sizes(depth, {"width": width, "num_classes": num_classes})
        self.in_nodes = in_channels
        self.embed = SetLinear(in_channels, width, device=device, dtype=dtype)
        self.norms = nn.ModuleList(nn.LayerNorm(width, device=device, dtype=dtype) for _ in range(depth))
        self.layers = nn.ModuleList(SetLinear(width, width, device=device, dtype=dtype) for _ in range(depth))
        self.act = nn.GELU()
        self.norm = nn.BatchNorm1d(width, device=device, dtype=dtype)
        self.head = nn.Linear(width, num_classes, device=device, dtype=dtype)

    def named_features(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Features of the nodes after the embedding and every block, ``(B, n, width)``."""
        nodes, mask = inputs if len(inputs) == 2 else (*inputs, None)
        x = self.embed(nodes, mask)
        features = {"embedded nodes": x}
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            features[f"features {i}"] = x = x + self.act(layer(norm(x), mask))
        return features

    def act_on_features(self, a: int, name: str, features: Tensor) -> Tensor:
        """Nodes in another order."""
        return self.group.act(a, features, dim=1)

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


class GraphNetwork(_NodeNetwork):
    """Classifier of graphs, invariant to the order of the nodes: blocks, linear invariants, a head of two layers.

    Means over many nodes differ little between graphs; a batch norm in front of the head brings the differences out.

    Args:
        in_nodes: channels of a node; 0 if only edges have features.
        in_edges: channels of an edge.
        num_classes: outputs.
        node_width: channels of a node inside.
        edge_width: channels of an edge inside.
        depth: number of blocks.

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
        check_sizes(depth, {"node_width": node_width, "edge_width": edge_width, "num_classes": num_classes})
        self.in_nodes, self.in_edges = in_nodes, in_edges
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

    def named_features(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Nodes ``(B, n, node_width)`` and edges ``(B, n, n, edge_width)`` after the embedding and every block."""
        nodes, edges, mask = inputs if len(inputs) == 3 else (*inputs, None)
        nodes, edges = self.embed(nodes, edges, mask)
        nodes, edges = self.act(nodes), self.act(edges)
        features = {"embedded nodes": nodes, "embedded edges": edges}
        for i, block in enumerate(self.blocks):
            nodes, edges = block(nodes, edges, mask)
            features |= {f"nodes {i}": nodes, f"edges {i}": edges}
        return features

    def act_on_features(self, a: int, name: str, features: Tensor) -> Tensor:
        """Nodes in another order, along both axes of the edges."""
        moved = self.group.act(a, features, dim=1)
        return self.group.act(a, moved, dim=2) if "edges" in name else moved

    def forward(self, nodes: Tensor, edges: Tensor, mask: Tensor | None = None) -> Tensor:
        nodes, edges = self.embed(nodes, edges, mask)
        nodes, edges = self.act(nodes), self.act(edges)
        for block in self.blocks:
            nodes, edges = block(nodes, edges, mask)
        return self.head(self.act(self.fc(self.norm(self.pool(nodes, edges, mask)))))
