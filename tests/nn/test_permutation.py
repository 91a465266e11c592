"""Set and graph layers: all the linear maps that commute with the permutations of the nodes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import equiflop
from equiflop import Rep, macs
from equiflop.groups import symmetric
from equiflop.models.graph_network import GraphNetwork, SetNetwork
from equiflop.nn import Linear
from equiflop.nn.permutation import GraphInvariants, GraphLinear, SetLinear
from oracles import scramble

#: Axes of nodes of the input and the output, and the number of orbits of large groups (Bell numbers).
MAPS = {"node to node": (1, 1, 2), "node to edge": (1, 2, 5), "edge to node": (2, 1, 5), "edge to edge": (2, 2, 15)}


def index_permutation(n: int, order: int, images: tuple[int, ...]) -> np.ndarray:
    """The matrix of a permutation on tensors with ``order`` axes of nodes."""
    single = np.zeros((n, n))
    single[list(images), range(n)] = 1.0
    matrix: np.ndarray = np.eye(1)
    for _ in range(order):
        matrix = np.kron(matrix, single)
    return matrix


def orbits(n: int, order: int) -> int:
    """Orbits of S_n on index tuples: the average number of fixed tuples (Burnside)."""
    fixed = [sum(i == image for i, image in enumerate(images)) ** order for images in permutations(range(n))]
    total, rest = divmod(sum(fixed), len(fixed))
    assert rest == 0
    return total


def operator(apply: Callable[[Tensor], Tensor], n: int, order: int) -> np.ndarray:
    """The dense matrix of a linear map on tensors with ``order`` axes of nodes and one channel, from unit vectors."""
    units = torch.eye(n**order, dtype=torch.float64).view(-1, *[n] * order, 1)
    return apply(units).flatten(1).T.detach().numpy()


def graph_map(layer: GraphLinear, order_in: int, order_out: int, n: int) -> Callable[[Tensor], Tensor]:
    """One side of the input to one side of the output of a layer that has only these."""

    def apply(x: Tensor) -> Tensor:
        nodes = x if order_in == 1 else x.new_zeros(len(x), n, 0)
        edges = x if order_in == 2 else x.new_zeros(len(x), n, n, 0)
        return layer(nodes, edges)[order_out - 1]

    return apply


def terms(layer: nn.Module, apply: Callable[[Tensor], Tensor], n: int, order: int) -> list[np.ndarray]:
    """The operators of all weights of a one-channel layer, each weight 1 alone."""
    weights = [p for name, p in layer.named_parameters() if name != "bias"]
    found = []
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        for weight in weights:
            for i in range(weight.numel()):
                weight.view(-1)[i] = 1.0
                found.append(operator(apply, n, order))
                weight.view(-1)[i] = 0.0
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", MAPS)
def test_terms_span_all_maps_that_commute(name: str, n: int) -> None:
    """Every term commutes with every permutation, and there are as many independent ones as orbits."""
    order_in, order_out, count = MAPS[name]
    channels = (int(order_in == 1), int(order_in == 2), int(order_out == 1), int(order_out == 2))
    layer = GraphLinear(*channels, dtype=torch.float64)
    found = terms(layer, graph_map(layer, order_in, order_out, n), n, order_in)
    assert len(found) == count
    for images in permutations(range(n)):
        move_in, move_out = index_permutation(n, order_in, images), index_permutation(n, order_out, images)
        for term in found:
            assert np.abs(term @ move_in - move_out @ term).max() < 1e-12
    expected = orbits(n, order_in + order_out)
    assert expected == count or n < order_in + order_out
    assert np.linalg.matrix_rank(np.stack(found).reshape(count, -1)) == expected


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_set_terms_span_all_maps_that_commute(n: int) -> None:
    layer = SetLinear(1, 1, dtype=torch.float64)
    found = terms(layer, layer, n, 1)
    assert np.linalg.matrix_rank(np.stack(found).reshape(2, -1)) == orbits(n, 2) == 2
    for images in permutations(range(n)):
        move = index_permutation(n, 1, images)
        assert all(np.abs(term @ move - move @ term).max() < 1e-12 for term in found)


def test_the_number_of_terms_is_that_of_schurs_lemma() -> None:
    """Nodes are R^4 = trivial + standard, edges their square: the squares of multiplicities add up to the terms."""
    g = symmetric(4)

    def multiplicities(order: int) -> list[int]:
        fixed = np.array([sum(i == p for i, p in enumerate(images)) for images in permutations(range(4))])
        return [round(float((irrep.character() * fixed**order).mean())) for irrep in g.irreps]

    nodes, edges = multiplicities(1), multiplicities(2)
    named = {irrep.name: (a, b) for irrep, a, b in zip(g.irreps, nodes, edges, strict=True)}
    assert named == {"S4": (1, 2), "S31": (1, 3), "S22": (0, 1), "S211": (0, 1), "S1111": (0, 0)}
    for name, (order_in, order_out, count) in MAPS.items():
        pairs = zip((nodes, edges)[order_in - 1], (nodes, edges)[order_out - 1], strict=True)
        assert sum(a * b for a, b in pairs) == count, name


def test_set_linear_is_the_linear_map_of_the_irreps_of_s4() -> None:
    """``W_own`` on the standard irrep, ``W_own + W_mean`` on the trivial one."""
    g = symmetric(4)
    multiplicity = [{"S4": 1, "S31": 1}.get(irrep.name, 0) for irrep in g.irreps]
    in_rep, out_rep = Rep(g, [2 * m for m in multiplicity]), Rep(g, [3 * m for m in multiplicity])
    single = Rep(g, multiplicity)
    # The change of basis from nodes to irreps: the average of rho(g) A P(g)^T for any A, made orthogonal.
    moves = [index_permutation(4, 1, images) for images in permutations(range(4))]
    start = np.random.default_rng(0).standard_normal((4, 4))
    basis = np.mean([single.matrix(a).numpy() @ start @ moves[a].T for a in range(g.order)], axis=0)
    change = torch.from_numpy(basis / np.linalg.norm(basis, axis=1, keepdims=True))
    change[0] *= change[0, 0].sign()
    assert (change @ change.T - torch.eye(4, dtype=torch.float64)).abs().max() < 1e-12

    layer = SetLinear(2, 3, dtype=torch.float64)
    linear = Linear(in_rep, out_rep, dtype=torch.float64)
    scramble(layer)
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in linear.parameters())
    assert layer.bias is not None
    linear.load_state_dict(
        {
            "weight_S4": layer.weight_own + layer.weight_mean,
            "weight_S31": layer.weight_own,
            "bias": layer.bias * 2.0,  # the trivial coordinate is the sum of 4 nodes over sqrt(4)
        }
    )
    x = torch.randn(5, 4, 2, dtype=torch.float64)
    expected = change.T @ linear((change @ x).flatten(1)).unflatten(1, (4, 3))
    assert (layer(x) - expected).abs().max() < 1e-12


def random_graphs(nodes: int, edges: int, n: int = 5, batch: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, n, nodes, dtype=torch.float64), torch.randn(batch, n, n, edges, dtype=torch.float64)


def dense_graph_linear(layer: GraphLinear, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """All 27 terms and 3 biases, node by node and edge by edge."""
    n = x.shape[0]
    p, q, r = layer.in_nodes, layer.out_nodes, layer.out_edges
    assert layer.bias is not None
    row = [torch.stack([e[i, j] for j in range(n)]).sum(0) / n for i in range(n)]
    column = [torch.stack([e[j, i] for j in range(n)]).sum(0) / n for i in range(n)]
    per_node = [torch.cat([x[i], e[i, i], row[i], column[i]]) for i in range(n)]
    average = torch.cat([x.mean(0), e.mean((0, 1)), torch.stack([e[i, i] for i in range(n)]).sum(0) / n])
    assert average.shape == (p + 2 * layer.in_edges,)
    nodes = torch.zeros(n, q, dtype=x.dtype)
    edges = torch.zeros(n, n, r, dtype=x.dtype)
    for i in range(n):
        nodes[i] = layer.weight_nodes[:q] @ per_node[i] + layer.weight_graph[:q] @ average + layer.bias[:q]
        for j in range(n):
            edges[i, j] = layer.weight_edges[:r] @ e[i, j] + layer.weight_edges[r:] @ e[j, i]
            edges[i, j] += layer.weight_nodes[q : q + r] @ per_node[i]
            edges[i, j] += layer.weight_nodes[q + r : q + 2 * r] @ per_node[j]
            edges[i, j] += layer.weight_graph[q : q + r] @ average + layer.bias[q : q + r]
        edges[i, i] += layer.weight_nodes[q + 2 * r :] @ per_node[i]
        edges[i, i] += layer.weight_graph[q + r :] @ average + layer.bias[q + r :]
    return nodes, edges


@torch.no_grad()
@pytest.mark.parametrize("channels", [(2, 3, 4, 2), (0, 3, 2, 1), (2, 0, 0, 3), (1, 2, 3, 0)])
def test_equals_the_terms_written_out(channels: tuple[int, int, int, int]) -> None:
    layer = GraphLinear(*channels, dtype=torch.float64)
    scramble(layer)
    nodes, edges = random_graphs(*channels[:2], n=4)
    found = layer(nodes, edges)
    for i in range(len(nodes)):
        for one, expected in zip(found, dense_graph_linear(layer, nodes[i], edges[i]), strict=True):
            assert one[i].shape == expected.shape
            assert one.numel() == 0 or (one[i] - expected).abs().max() < 1e-12


def test_layers_with_many_channels_commute() -> None:
    layer = GraphLinear(2, 3, 4, 2, dtype=torch.float64)
    scramble(layer)
    nodes, edges = random_graphs(2, 3, n=4)
    out_nodes, out_edges = layer(nodes, edges)
    for images in permutations(range(4)):
        order = list(images)
        moved_nodes, moved_edges = layer(nodes[:, order], edges[:, order][:, :, order])
        assert (moved_nodes - out_nodes[:, order]).abs().max() < 1e-12
        assert (moved_edges - out_edges[:, order][:, :, order]).abs().max() < 1e-12


@pytest.mark.parametrize("filling", [0.0, 7.0, float("nan"), float("inf")])
def test_padding_changes_nothing(filling: float) -> None:
    """A graph of 3 nodes alone and among 5 places, whatever stands in the other two and wherever they are."""
    graph, sets, pool = (
        GraphLinear(2, 3, 4, 2, dtype=torch.float64),
        SetLinear(2, 4, dtype=torch.float64),
        GraphInvariants(),
    )
    network = GraphNetwork(2, 3, 5, node_width=8, edge_width=4, dtype=torch.float64)
    set_network = SetNetwork(2, 5, width=8, dtype=torch.float64)
    for module in (graph, sets, network, set_network):
        scramble(module).eval()
    nodes, edges = random_graphs(2, 3, n=3)
    places = [0, 2, 3]
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, places] = True
    padded_nodes = torch.full((3, 5, 2), filling, dtype=torch.float64)
    padded_edges = torch.full((3, 5, 5, 3), filling, dtype=torch.float64)
    padded_nodes[:, places] = nodes
    padded_edges[:, torch.tensor(places)[:, None], places] = edges

    found_nodes, found_edges = graph(padded_nodes, padded_edges, mask)
    expected_nodes, expected_edges = graph(nodes, edges)
    assert (found_nodes[:, places] - expected_nodes).abs().max() < 1e-12
    assert (found_edges[:, places][:, :, places] - expected_edges).abs().max() < 1e-12
    assert (found_nodes[~mask] == 0).all() and (found_edges[~mask] == 0).all() and (found_edges.mT[~mask] == 0).all()
    found = sets(padded_nodes, mask)
    assert (found[:, places] - sets(nodes)).abs().max() < 1e-12 and (found[~mask] == 0).all()
    assert (pool(padded_nodes, padded_edges, mask) - pool(nodes, edges)).abs().max() < 1e-12
    assert (network(padded_nodes, padded_edges, mask) - network(nodes, edges)).abs().max() < 1e-12
    assert (set_network(padded_nodes, mask) - set_network(nodes)).abs().max() < 1e-12


def test_gradients_do_not_see_padding() -> None:
    network = GraphNetwork(2, 3, 5, node_width=8, edge_width=4, dtype=torch.float64)
    nodes, edges = random_graphs(2, 3)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[:, 3:] = False
    nodes[:, 3:], edges[:, 3:], edges[:, :, 3:] = torch.nan, torch.nan, torch.nan
    network(nodes, edges, mask).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_an_empty_graph_is_finite() -> None:
    mask = torch.zeros(3, 5, dtype=torch.bool)
    nodes, edges = random_graphs(2, 3)
    assert torch.isfinite(GraphNetwork(2, 3, 5, dtype=torch.float64)(nodes, edges, mask)).all()
    assert torch.isfinite(SetNetwork(2, 5, dtype=torch.float64)(nodes, mask)).all()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_invariants_are_the_two_means_of_edges_and_one_of_nodes(n: int) -> None:
    nodes, edges = random_graphs(2, 3, n=n)
    diagonal = torch.stack([edges[:, i, i] for i in range(n)]).mean(0)
    others = [edges[:, i, j] for i in range(n) for j in range(n) if i != j]
    off = torch.stack(others).mean(0) if others else torch.zeros(3, 3, dtype=torch.float64)
    expected = torch.cat([nodes.mean(1), off, diagonal], dim=1)
    assert (GraphInvariants()(nodes, edges) - expected).abs().max() < 1e-12


def test_networks_are_invariant_and_not_blind() -> None:
    graph, sets = (
        scramble(GraphNetwork(2, 3, 5, node_width=8, edge_width=4, dtype=torch.float64)).eval(),
        scramble(SetNetwork(2, 5, width=8, dtype=torch.float64)).eval(),
    )
    nodes, edges = random_graphs(2, 3, n=4)
    for images in permutations(range(4)):
        order = list(images)
        moved_nodes, moved_edges = nodes[:, order], edges[:, order][:, :, order]
        assert (graph(moved_nodes, moved_edges) - graph(nodes, edges)).abs().max() < 1e-12
        assert (sets(moved_nodes) - sets(nodes)).abs().max() < 1e-12
        if order != sorted(order):  # another graph: the nodes moved, the edges not
            assert (graph(moved_nodes, edges) - graph(nodes, edges)).abs().max() > 1e-6
    assert (sets(nodes[:1]) - sets(nodes[1:2])).abs().max() > 1e-3


@pytest.mark.parametrize("n", [40, 80])
def test_unit_variance_at_initialisation(n: int) -> None:
    layer = GraphLinear(48, 32, 64, 64, dtype=torch.float64)
    assert layer.bias is not None and (layer.bias == 0).all()
    nodes, edges = layer(*random_graphs(48, 32, n=n, batch=2))
    off_diagonal = edges[:, ~torch.eye(n, dtype=torch.bool)]
    assert nodes.var().item() == pytest.approx(1.0, rel=0.15)
    assert off_diagonal.var().item() == pytest.approx(1.0, rel=0.1)
    y = SetLinear(96, 128, dtype=torch.float64)(torch.randn(8, n, 96, dtype=torch.float64))
    assert y.var().item() == pytest.approx(1.0, rel=0.1)


def test_macs() -> None:
    n, p, e, q, f = 6, 2, 3, 4, 5
    edge_terms, node_terms, graph_terms = 2 * f * e, (q + 3 * f) * (p + 3 * e), (q + 2 * f) * (p + 2 * e)
    expected = n * n * edge_terms + n * node_terms + graph_terms
    layer = GraphLinear(p, e, q, f)
    assert edge_terms + node_terms + graph_terms == 2 * q * p + 5 * f * p + 5 * q * e + 15 * f * e
    shapes = torch.Size((1, n, p)), torch.Size((1, n, n, e))
    assert layer.macs(*shapes) == macs(layer, ((n, p), (n, n, e))) == expected
    assert macs(SetLinear(p, q), ((n, p),)) == (n + 1) * p * q
    width = 8
    assert macs(SetNetwork(p, q, width=width, depth=2), ((n, p),)) == (n + 1) * (p + 2 * width) * width + width * q


def test_state_dict_dtype_and_meta() -> None:
    layer = GraphLinear(2, 3, 4, 5)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "weight_edges": (10, 3), "weight_nodes": (19, 11), "weight_graph": (14, 8), "bias": (14,),
    }  # fmt: skip
    assert SetLinear(2, 3).state_dict().keys() == {"weight_own", "weight_mean", "bias"}
    assert "bias" not in GraphLinear(2, 3, 4, 5, bias=False).state_dict()
    nodes, edges = layer.to(torch.bfloat16)(torch.randn(1, 3, 2).bfloat16(), torch.randn(1, 3, 3, 3).bfloat16())
    assert nodes.dtype == edges.dtype == torch.bfloat16
    with torch.device("meta"):
        network = GraphNetwork(1, 2, 4)
        assert network(torch.zeros(2, 5, 1), torch.zeros(2, 5, 5, 2)).shape == (2, 4)


def test_network_exports() -> None:
    network = GraphNetwork(2, 3, 5, node_width=8, edge_width=4, dtype=torch.float64).eval()
    inputs = (*random_graphs(2, 3), torch.tensor([[True] * 4 + [False]] * 3))
    exported = torch.export.export(network, inputs).module()
    assert (exported(*inputs) - network(*inputs)).abs().max() < 1e-12


def test_errors() -> None:
    with pytest.raises(ValueError, match="in_edges=-1 is negative"):
        GraphLinear(1, -1, 1, 1)
    with pytest.raises(ValueError, match="out_nodes=0 and out_edges=0"):
        GraphLinear(1, 1, 0, 0)
    with pytest.raises(ValueError, match="in_channels=0 is not positive"):
        SetLinear(0, 1)
    layer = GraphLinear(2, 3, 1, 1)
    nodes, edges = torch.zeros(1, 4, 2), torch.zeros(1, 4, 4, 3)
    with pytest.raises(ValueError, match=r"nodes have shape \(1, 4, 1\); \(B, n, 2\)"):
        layer(nodes[..., :1], edges)
    with pytest.raises(ValueError, match=r"edges have shape \(1, 4, 3, 3\); \(1, 4, 4, 3\)"):
        layer(nodes, edges[:, :, :3])
    for mask in (torch.ones(1, 4), torch.ones(1, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask has dtype"):
            layer(nodes, edges, mask)
    with pytest.raises(ValueError, match="depth=-1 is negative"):
        GraphNetwork(1, 1, 2, depth=-1)
    with pytest.raises(ValueError, match="width=0 is not positive"):
        SetNetwork(1, 2, width=0)


def test_repr_shows_the_terms() -> None:
    assert "nodes 2 -> 4, edges 3 -> 5" in repr(GraphLinear(2, 3, 4, 5))
    assert "2 -> 3 per node" in repr(SetLinear(2, 3))


@pytest.mark.parametrize(
    "make", [lambda: SetNetwork(3, 5, width=8), lambda: GraphNetwork(2, 3, 5), lambda: GraphNetwork(0, 1, 5)]
)
def test_check_of_the_networks(make: Callable[[], Any]) -> None:
    network = make()
    report = equiflop.check(network)
    assert report.passed and len(report.errors) == 24, str(report)
    assert report.group.element_name(1) == "(2 3)" and "(0 1 2)" in str(report)
    assert any("features 2" in row.what or "edges 1" in row.what for row in report.rows)

    def first_node_more(module: nn.Module, args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 0] *= 1.5
        return output

    layer = network.norms[1] if isinstance(network, SetNetwork) else network.blocks[1].norm_nodes
    layer.register_forward_hook(first_node_more)
    assert equiflop.check(network).verdict == "not equivariant"
