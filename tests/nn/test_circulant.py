"""CirculantLinear: the same map as Linear on the regular Rep of C_n, conjugated with the group Fourier transform."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import equiflop
from equiflop import Rep, macs
from equiflop.groups import cyclic
from equiflop.models.signal_network import SignalNetwork
from equiflop.nn import Linear
from equiflop.nn.circulant import CirculantLinear
from oracles import fourier, scramble

LENGTHS = (1, 2, 3, 4, 5, 8, 12)


def layer_of(n: int, in_channels: int = 3, out_channels: int = 4, bias: bool = True) -> CirculantLinear:
    layer = CirculantLinear(n, in_channels, out_channels, bias=bias, dtype=torch.float64)
    scramble(layer, seed=n)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", LENGTHS)
def test_equals_the_linear_map_of_the_irreps(n: int, bias: bool) -> None:
    g = cyclic(n)
    linear = Linear(Rep.regular(g, 3), Rep.regular(g, 4), bias=bias, dtype=torch.float64)
    scramble(linear, seed=n)
    layer = CirculantLinear(n, 3, 4, bias=bias, dtype=torch.float64)
    layer.load_linear_state(linear.state_dict())
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in linear.parameters())
    to_irreps = torch.from_numpy(fourier(g))
    x = torch.randn(5, n, 3, dtype=torch.float64)
    expected = to_irreps.T @ linear((to_irreps @ x).flatten(1)).unflatten(1, (n, 4))
    assert (layer(x) - expected).abs().max() < 1e-12
    returned = layer.linear_state()
    assert returned.keys() == linear.state_dict().keys()
    for name, value in linear.state_dict().items():
        assert (returned[name] - value).abs().max() < 1e-14, name


@pytest.mark.parametrize("n", LENGTHS)
def test_commutes_with_all_shifts(n: int) -> None:
    layer = layer_of(n)
    x = torch.randn(2, n, 3, dtype=torch.float64)
    for shift in range(n):
        assert (layer(x.roll(shift, 1)) - layer(x).roll(shift, 1)).abs().max() < 1e-12


@pytest.mark.parametrize("n", LENGTHS)
def test_is_the_circular_convolution_with_its_kernel(n: int) -> None:
    layer = layer_of(n)
    assert layer.bias is not None
    x = torch.randn(2, n, 3, dtype=torch.float64)
    expected = torch.zeros(2, n, 4, dtype=torch.float64)
    for place in range(n):
        for source in range(n):
            expected[:, place] += x[:, source] @ layer.kernel()[(place - source) % n].T
    expected += layer.bias
    assert (layer(x) - expected).abs().max() < 1e-12
    dense = (x.flatten(1) @ layer.matrix().T).unflatten(1, (n, 4)) + layer.bias
    assert (dense - expected).abs().max() < 1e-12


@pytest.mark.parametrize("n", LENGTHS)
def test_parameters_are_a_basis_of_all_kernels(n: int) -> None:
    layer = CirculantLinear(n, 2, 1, bias=False, dtype=torch.float64)
    kernels = []
    with torch.no_grad():
        for i in range(layer.weight.numel()):
            layer.weight.zero_()
            layer.weight.view(-1)[i] = 1.0
            kernels.append(layer.kernel().flatten())
    assert torch.linalg.matrix_rank(torch.stack(kernels)) == len(kernels) == 2 * n


def test_any_leading_axes() -> None:
    layer = layer_of(6)
    x = torch.randn(2, 5, 6, 3, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (2, 5, 6, 4)
    assert (layer(x[1, 2]) - y[1, 2]).abs().max() < 1e-14


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_gradients(n: int) -> None:
    layer = layer_of(n, 2, 2)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert layer.bias is not None
    inputs = [torch.randn(2, n, 2, dtype=torch.float64), layer.weight.detach(), layer.bias.detach()]
    assert torch.autograd.gradcheck(run, [tensor.clone().requires_grad_() for tensor in inputs])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)])
def test_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    exact = layer_of(8)
    layer = CirculantLinear(8, 3, 4, dtype=dtype)
    layer.load_state_dict(exact.state_dict())
    x = torch.randn(3, 8, 3, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    expected = exact(x.double())
    assert (y.double() - expected).abs().max() < tolerance * expected.abs().max()
    y.float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == dtype


def test_autocast() -> None:
    layer = CirculantLinear(8, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 8, 3))
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_unit_variance_at_initialisation(n: int) -> None:
    layer = CirculantLinear(n, 96, 128, dtype=torch.float64)
    y = layer(torch.randn(4096 // n, n, 96, dtype=torch.float64))
    assert y.var().item() == pytest.approx(1.0, rel=0.05)


def test_meta_device() -> None:
    with torch.device("meta"):
        network = SignalNetwork(8, 3, 4, width=8)
        assert network(torch.zeros(2, 8, 3)).shape == (2, 4)


@pytest.mark.parametrize(("n", "log2"), [(1, 0), (2, 1), (8, 3), (9, 4), (64, 6)])
def test_macs(n: int, log2: int) -> None:
    """Both transforms, and four real products for one complex one, as documented."""
    expected = (3 + 4) * n * log2 + 4 * (n // 2 + 1) * 3 * 4
    layer = CirculantLinear(n, 3, 4)
    assert layer.macs(torch.Size((n, 3))) == expected and layer.macs(torch.Size((5, 2, n, 3))) == 10 * expected
    assert macs(layer, ((n, 3),)) == expected


def test_macs_of_the_network() -> None:
    width, depth, n = 8, 2, 16
    circulant = [(3, width), *[(width, width)] * depth]
    expected = sum((a + b) * n * 4 + 4 * (n // 2 + 1) * a * b for a, b in circulant)
    expected += depth * n * width * width + width * 5
    assert macs(SignalNetwork(n, 3, 5, width=width, depth=depth), ((n, 3),)) == expected


def test_network_is_invariant_to_shifts_and_not_blind() -> None:
    network = SignalNetwork(12, 3, 5, width=8, depth=2, dropout=0.5, dtype=torch.float64).eval()
    scramble(network)
    x = torch.randn(2, 12, 3, dtype=torch.float64)
    for shift in range(12):
        assert (network(x.roll(shift, 1)) - network(x)).abs().max() < 1e-12
    assert (network(x.flip(1)) - network(x)).abs().max() > 1e-3


def test_network_exports() -> None:
    network = SignalNetwork(6, 3, 5, width=8, depth=1, dtype=torch.float64).eval()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    exported = torch.export.export(network, (x,)).module()
    assert (exported(x) - network(x)).abs().max() < 1e-12


def test_errors() -> None:
    for arguments in ((0, 1, 1), (4, 0, 1), (4, 1, -1)):
        with pytest.raises(ValueError, match="is not positive"):
            CirculantLinear(*arguments)
    layer = CirculantLinear(4, 3, 2)
    for shape in ((3,), (5, 3), (2, 4, 2)):
        with pytest.raises(ValueError, match=r"\(\.\.\., 4, 3\) is needed"):
            layer(torch.zeros(shape))
    state = layer.linear_state()
    with pytest.raises(ValueError, match=r"E1\.weight of shape None.*needs \(4, 3\)"):
        layer.load_linear_state({name: value for name, value in state.items() if name != "E1.weight"})
    with pytest.raises(ValueError, match=r"A\.weight of shape"):
        layer.load_linear_state({**state, "A.weight": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match=r"E2\.weight of shape \(4, 3\).*needs None"):
        layer.load_linear_state({**state, "E2.weight": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match="depth=-1"):
        SignalNetwork(4, 3, 2, depth=-1)


def test_repr_shows_the_period() -> None:
    assert "n=8, 3 -> 4 channels" in repr(CirculantLinear(8, 3, 4))


def test_bias_is_the_same_at_all_positions() -> None:
    layer = layer_of(5)
    y = layer(torch.zeros(1, 5, 3, dtype=torch.float64))
    assert layer.bias is not None and torch.equal(y[0], layer.bias.expand(5, 4))
    assert torch.equal(layer.linear_state()["A.bias"], layer.bias * math.sqrt(5))


@pytest.mark.parametrize("n", [1, 5, 12])
def test_check_of_the_network(n: int) -> None:
    network = SignalNetwork(n, 3, 5, width=8, depth=2)
    report = equiflop.check(network)
    assert report.passed and len(report.errors) == n and report.group == cyclic(n), str(report)
    assert {row.what for row in report.rows} == {"output", "embedded signal", "features 0", "features 1"}
    network.blocks[0].register_forward_hook(lambda module, args, y: y * torch.linspace(1, 2, n)[:, None])
    assert equiflop.check(network).verdict == ("equivariant" if n == 1 else "not equivariant")
