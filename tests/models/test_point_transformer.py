"""The point transformer: invariance, its embedding against a dense oracle, its MACs, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import equiflop
from equiflop import Action, assert_equivariant
from equiflop.checking import randomize_parameters
from equiflop.grids import named_image_group
from equiflop.groups import FiniteGroup, Rep, cyclic, dihedral, fourier_matrix, octahedral, octahedral_rotations
from equiflop.groups.named import full_octahedral, full_octahedral_matrices
from equiflop.models.point_transformer import PlainPointTransformer, PointTransformer
from equiflop.nn.point_embed import PointEmbed, neighbourhoods
from oracles import fourier, relative_error, scramble, tensor_action

ORDERS = {"rotations": 24, "full": 48}


def quarter_turns() -> tuple[FiniteGroup, np.ndarray]:
    """C4 around the vertical axis."""
    turn = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    return cyclic(4), np.stack([np.linalg.matrix_power(turn, k) for k in range(4)])


def small_model(group: Any = "rotations", dtype: torch.dtype = torch.float64, **options: Any) -> PointTransformer:
    model = PointTransformer(
        5, group=group, **{"embed_dim": 96, "depth": 2, "num_heads": 2, "neighbours": 4, **options}
    )
    with torch.no_grad():
        randomize_parameters(model, torch.Generator().manual_seed(1))
    return model.to(dtype).eval()


def moved(model: PointTransformer, a: int, clouds: Tensor) -> Tensor:
    return clouds @ torch.from_numpy(model.group.matrices[a].copy()).to(clouds.dtype).T


def test_full_octahedral_group() -> None:
    group, matrices = full_octahedral(), full_octahedral_matrices()
    assert group.order == 48 and len(np.unique(matrices.reshape(48, 9), axis=0)) == 48
    assert np.array_equal(matrices[:, None] @ matrices[None], matrices[group.table])
    assert np.array_equal(matrices[::2], octahedral_rotations()) and np.array_equal(matrices[1], -np.eye(3))
    names = [irrep.name for irrep in group.irreps]
    assert names == ["A1g", "A1u", "A2g", "A2u", "Eg", "Eu", "T1g", "T1u", "T2g", "T2u"]
    for irrep in group.irreps:
        assert irrep.type == "real"
        assert np.abs(irrep.matrices[:, None] @ irrep.matrices[None] - irrep.matrices[group.table]).max() < 1e-14
        assert np.allclose(irrep.matrices[1], np.eye(irrep.dim) * (1 if irrep.name.endswith("g") else -1))
    assert np.array_equal(group.irreps[names.index("T1u")].matrices, matrices)
    assert np.abs(fourier_matrix(group) @ fourier_matrix(group).T - np.eye(48)).max() < 1e-14


@pytest.mark.parametrize("group", ["rotations", "full"])
@pytest.mark.parametrize("invariants", ["norm", "trivial"])
@torch.no_grad()
def test_logits_are_invariant_and_features_equivariant(group: str, invariants: str) -> None:
    model = small_model(group, invariants=invariants)
    clouds = torch.randn(3, 20, 3, dtype=torch.float64)
    logits, features = model(clouds), model.forward_features(clouds)
    assert (logits[0] - logits[1]).abs().max() > 1e-4 * logits.abs().max()
    assert model.group.order == ORDERS[group]
    for a in range(model.group.order):
        there = moved(model, a, clouds)
        assert relative_error(model(there), logits) < 1e-12
        assert relative_error(model.forward_features(there), features @ tensor_action(model.rep, a).T) < 1e-12


@pytest.mark.parametrize("group", ["rotations", "full"])
@torch.no_grad()
def test_order_place_and_size_do_not_matter(group: str) -> None:
    model = small_model(group)
    clouds = torch.randn(2, 20, 3, dtype=torch.float64)
    logits, features = model(clouds), model.forward_features(clouds)
    for seed in range(5):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
        assert relative_error(model(clouds[:, order]), logits) < 1e-12
        assert relative_error(model.forward_features(clouds[:, order]), features[:, order]) < 1e-12
    assert relative_error(model(7.0 * clouds + torch.tensor([1.0, -2.0, 3.0])), logits) < 1e-12


@pytest.mark.parametrize("group", ["rotations", "full", quarter_turns()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_check(group: Any, dtype: torch.dtype) -> None:
    model = small_model(group, dtype)
    report = equiflop.check(model)
    assert report.passed and report.verdict == "equivariant" and report.dtype == dtype, str(report)
    assert len(report.errors) == model.group.order and report.group == model.group
    names = {"output", "embedded points", "features 0", "features 1", "normalised features"}
    assert {row.what for row in report.rows} == names
    assert equiflop.check(model, randomize=False).passed


def test_check_finds_what_breaks_the_symmetry() -> None:
    model = small_model()
    model.blocks[0].register_forward_hook(lambda module, args, output: output.relu())
    report = equiflop.check(model)
    assert report.verdict == "not equivariant" and min(report.errors[1:]) > 1e-3 and report.errors[0] == 0.0
    assert {row.what for row in report.rows if row.error > 1e-3} == {"output", "features 0", "features 1"} | {
        "normalised features"
    }
    for argument, value in (("group", "octic"), ("input_size", (20, 3))):
        with pytest.raises(ValueError, match=f"{argument}=.*PointTransformer says its own group and inputs; leave it"):
            equiflop.check(model, **{argument: value})  # type: ignore[arg-type]


def test_embedding_says_how_the_group_acts() -> None:
    layer = PointEmbed(Action(octahedral(), octahedral_rotations()), 2, neighbours=4, dtype=torch.float64)
    scramble(layer)
    points = torch.randn(2, 9, 3, dtype=torch.float64)
    assert_equivariant(layer, layer.in_rep, layer.out_rep, layer.in_rep, points)
    with pytest.raises(AssertionError, match="not equivariant at element"):
        assert_equivariant(layer, layer.in_rep, None, layer.in_rep, points)


@torch.no_grad()
def test_mirror_images_are_told_apart_by_the_rotations_alone() -> None:
    clouds = torch.randn(2, 20, 3, dtype=torch.float64)
    mirrored = clouds * torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)
    rotations, full = small_model("rotations"), small_model("full")
    assert relative_error(full(mirrored), full(clouds)) < 1e-12
    assert relative_error(rotations(mirrored), rotations(clouds)) > 1e-3


@torch.no_grad()
def test_own_group_with_matrices() -> None:
    """A group given by its matrices, in any position: D3 about the diagonal of space."""
    third = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    swap = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    turns = [np.linalg.matrix_power(third, k) for k in range(3)]
    matrices = np.stack([*turns, *[swap @ turn for turn in turns]])
    for group in (quarter_turns(), (dihedral(3), matrices), Action(dihedral(3), matrices, "about the diagonal")):
        model = small_model(group)
        assert isinstance(model.group, Action) and model.rep.group == model.group.group
        clouds = torch.randn(2, 12, 3, dtype=torch.float64)
        for a in range(model.group.order):
            assert relative_error(model(moved(model, a, clouds)), model(clouds)) < 1e-12


@pytest.mark.parametrize("group", ["rotations", "full", "C4"])
@torch.no_grad()
def test_embedding_against_a_dense_construction(group: str) -> None:
    """``phi`` of the cloud turned back by every element, one neighbour after the other; then the dense transform."""
    named = {
        "rotations": (octahedral(), octahedral_rotations()),
        "full": (full_octahedral(), full_octahedral_matrices()),
    }
    g, matrices = named.get(group) or quarter_turns()
    layer = PointEmbed(Action(g, matrices), 2, hidden=3, neighbours=4, dtype=torch.float64)
    scramble(layer)
    points = torch.randn(2, 7, 3, dtype=torch.float64)
    expected = torch.zeros(2, 7, g.order, 2, dtype=torch.float64)
    for cloud in range(2):
        for i in range(7):
            distances = [float((q - points[cloud, i]).norm()) for q in points[cloud]]
            nearest = sorted(range(7), key=distances.__getitem__)
            weights = [1.0 - (distances[j] / distances[nearest[4]]) ** 2 for j in nearest[:4]]
            for h in range(g.order):
                back = torch.from_numpy(np.linalg.inv(matrices[h]))
                hidden = torch.zeros(3, dtype=torch.float64)
                for j, weight in zip(nearest[:4], weights, strict=True):
                    here, there = back @ points[cloud, i], back @ points[cloud, j]
                    value = layer.weight @ torch.cat([here, there - here]) + layer.bias
                    hidden += weight / sum(weights) * torch.nn.functional.gelu(value)
                expected[cloud, i, h] = layer.proj.weight @ hidden + layer.proj.bias
    isotypic = torch.einsum("rh,bnhc->bnrc", torch.from_numpy(fourier(g)), expected).flatten(-2)
    assert relative_error(layer(points), isotypic) < 1e-12
    assert layer.rep == Rep.regular(g, 2)


@torch.no_grad()
def test_ties_between_neighbours_do_not_matter() -> None:
    """Points of a lattice have many equally near neighbours; copies of a point have distance 0."""
    model = small_model(neighbours=6)
    lattice = torch.cartesian_prod(*[torch.arange(3.0, dtype=torch.float64)] * 3)
    lattice = (lattice * torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)).unsqueeze(0)
    doubled = torch.cat([lattice[:, :9], lattice[:, :9], lattice[:, :1].expand(1, 8, 3)], dim=1)
    for clouds in (lattice, doubled, torch.ones(1, 9, 3, dtype=torch.float64)):
        logits = model(clouds)
        assert torch.isfinite(logits).all()
        for a in range(model.group.order):
            order = torch.randperm(clouds.shape[1], generator=torch.Generator().manual_seed(a))
            assert relative_error(model(moved(model, a, clouds[:, order])), logits) < 1e-12


def test_neighbourhoods_fade_out() -> None:
    points = torch.tensor([[[0.0, 0, 0], [1.0, 0, 0], [0, 2.0, 0], [0, 0, -4.0]]])
    offsets, weights = neighbourhoods(points, 3)
    assert torch.equal(offsets[0, 0], points[0, :3])
    expected = torch.tensor([1.0, 1 - 1 / 16, 1 - 4 / 16])
    assert torch.allclose(weights[0, 0], expected / expected.sum())
    with pytest.raises(ValueError, match=r"points has 4 points per cloud; neighbours=4 needs at least 5"):
        neighbourhoods(points, 4)


@pytest.mark.parametrize(("group", "share"), [("rotations", Fraction(1, 9)), ("full", Fraction(1, 18))])
def test_linear_layers_cost_a_ninth_and_an_eighteenth(group: str, share: Fraction) -> None:
    model: Any = small_model(group)
    width = model.embed_dim
    for block in model.blocks:
        for layer, dense in (
            (block.attn.qkv, 3 * width * width),
            (block.attn.proj, width * width),
            (block.mlp.fc1, 4 * width * width),
            (block.mlp.fc2, 4 * width * width),
        ):
            turned = (
                (layer in (block.mlp.fc1, block.mlp.fc2)) * ORDERS[group] * 4 * width
            )  # the hidden axis, by a product
            assert layer.macs_per_vector == share * dense + turned
            weights = sum(weight.numel() for _, weight in layer.weights())
            assert weights == Fraction(dense, ORDERS[group])


@pytest.mark.parametrize("group", ["rotations", "full", None])
@pytest.mark.parametrize(("points", "width", "neighbours"), [(20, 96, 4), (33, 192, 8)])
def test_macs_equal_the_formula(group: str | None, points: int, width: int, neighbours: int) -> None:
    options: dict[str, Any] = {"embed_dim": width, "depth": 2, "num_heads": 2, "neighbours": neighbours}
    attention = 2 * 2 * points * points * width
    lifting = points * neighbours * 6 * width
    if group is None:
        model: Any = PlainPointTransformer(5, **options)
        expected = lifting + points * width**2 + attention + 2 * points * 12 * width**2 + 5 * width
    else:
        model = PointTransformer(5, **options, group=group)  # type: ignore[arg-type]
        order = ORDERS[group]
        share = {"rotations": Fraction(1, 9), "full": Fraction(1, 18)}[group]
        turned = width * 18
        phi = points * (width**2 // order + order * width)
        mlp_transforms = points * 2 * order * 4 * width
        blocks = 2 * (points * 12 * width**2 * share + mlp_transforms)
        expected = turned + lifting + phi + attention + blocks + 5 * model.head_hidden_size
    assert equiflop.macs(model, ((points, 3),)) == expected
    with pytest.raises(ValueError, match=r"points has shape .* need \(B, N, 3\)"):
        equiflop.macs(model, (points, 3))


@torch.no_grad()
def test_plain_twin_is_no_invariant() -> None:
    """The test above would notice a network that is not invariant; the order of points does not matter to it either."""
    model = PlainPointTransformer(5, embed_dim=48, depth=2, num_heads=2, neighbours=4).double().eval()
    clouds = torch.randn(2, 20, 3, dtype=torch.float64)
    turned = clouds @ torch.from_numpy(octahedral_rotations()[5]).T
    assert relative_error(model(turned), model(clouds)) > 1e-3
    assert relative_error(model(clouds.flip(1)), model(clouds)) < 1e-12
    assert relative_error(model(0.1 * clouds - 1.0), model(clouds)) < 1e-12


@torch.no_grad()
def test_dtypes_and_state_dict() -> None:
    """Constants are exact after a change of dtype and absent from the state dict."""
    model = small_model("full", dtype=torch.float32)
    clouds = torch.randn(2, 20, 3)
    names = set(model.state_dict())
    assert names == {name for name, _ in model.named_parameters()}
    for a in range(0, 48, 5):
        assert relative_error(model(moved(model, a, clouds)), model(clouds)) < 1e-4
    twin = small_model("full")
    twin.load_state_dict(model.state_dict())
    assert relative_error(model(clouds), twin(clouds.double())) < 1e-4
    wide = model.double()
    clouds = clouds.double()
    for a in range(48):
        assert relative_error(wide(moved(wide, a, clouds)), wide(clouds)) < 1e-12


def test_meta_device() -> None:
    with torch.device("meta"):
        model = PointTransformer(5, group="full", embed_dim=96, depth=1, num_heads=2)
        logits = model(torch.empty(2, 20, 3))
    assert logits.shape == (2, 5) and logits.is_meta


def test_trains() -> None:
    """All parameters get a gradient, and a few steps lower the loss."""
    model = PointTransformer(2, embed_dim=48, depth=1, num_heads=2, neighbours=4, drop_rate=0.1, drop_path_rate=0.1)
    clouds, labels = torch.randn(8, 12, 3), torch.arange(8) % 2
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(clouds), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_heads() -> None:
    for model in (small_model(), PlainPointTransformer(5, embed_dim=96, depth=1, num_heads=2).double()):
        clouds = torch.randn(2, 20, 3, dtype=torch.float64)
        features = model.forward_features(clouds)
        assert features.shape == (2, 20, 96) and model.num_features == model.embed_dim == 96
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        assert torch.equal(model.get_classifier()(pooled), model(clouds))
        model.reset_classifier(3)
        assert model(clouds).shape == (2, 3) and model.num_classes == 3
        model.reset_classifier(0)
        assert torch.equal(model(clouds), pooled) and model.num_classes == 0


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"group='cube' is unknown; choose 'rotations', 'full' or a pair"):
        PointTransformer(5, group="cube")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"embed_dim=100 is not divisible by \|G\|=24 \(group O\)"):
        PointTransformer(5, embed_dim=100)
    with pytest.raises(ValueError, match="num_heads=4 does not divide every multiplicity"):
        PointTransformer(5, group="full", embed_dim=96, num_heads=4)
    with pytest.raises(ValueError, match=r"group: matrices has shape \(4, 3, 3\); O needs \(24, 3, 3\)"):
        PointTransformer(5, group=(octahedral(), quarter_turns()[1]))
    with pytest.raises(ValueError, match="group: the matrices of C4 are not orthogonal"):
        PointTransformer(5, group=(cyclic(4), 2.0 * quarter_turns()[1]))
    with pytest.raises(ValueError, match="group: the matrices do not multiply like the elements of C4"):
        PointTransformer(5, group=(cyclic(4), quarter_turns()[1][[0, 2, 1, 3]]))
    with pytest.raises(ValueError, match=r"group=ImageGroup\(octic, order=8, dim=2\) acts on 2 coordinates"):
        PointTransformer(5, group=named_image_group("octic"))
    with pytest.raises(ValueError, match="acts on 2 coordinates; PointEmbed needs an action on 3"):
        PointEmbed(named_image_group("octic"), 2)
    with pytest.raises(TypeError, match=r"group=FiniteGroup\(O, order=24\) is none of 'rotations', 'full', an Action"):
        PointTransformer(5, group=octahedral())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neighbours=0 is not positive"):
        PointTransformer(5, neighbours=0)
    with pytest.raises(ValueError, match="neighbours=0 is not positive"):
        PlainPointTransformer(5, neighbours=0)
    with pytest.raises(ValueError, match="num_heads=5 does not divide embed_dim=192"):
        PlainPointTransformer(5, num_heads=5)
    with pytest.raises(ValueError, match="invariants='max' is unknown"):
        PointTransformer(5, invariants="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"points has shape \(2, 20, 2\); point transformers need \(B, N, 3\)"):
        small_model()(torch.randn(2, 20, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"points has 4 points per cloud; neighbours=4 needs at least 5"):
        small_model()(torch.randn(2, 4, 3, dtype=torch.float64))


@pytest.mark.slow
def test_example_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "point_clouds.py"
    output = tmp_path / "result.json"
    for networks in (["plain, augmented"], ["E(24)", "E(48)"]):
        command = [sys.executable, str(script), "--quick", "--output", str(output), "--networks", *networks]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1 + len(networks)
    rows = json.loads(output.read_text())["experiment"]
    assert list(rows) == ["plain, augmented", "E(24)", "E(48)"] and list(tmp_path.iterdir()) == [output]
    for name in ("E(24)", "E(48)"):
        upright, turned, _ = rows[name]["accuracy"].values()
        assert turned == pytest.approx(upright, abs=0.03)
