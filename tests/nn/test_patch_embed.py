"""GridTransform and PatchEmbed: equal to dense convolutions with kernels that the group leaves as they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equiflop import EquiflopWarning, ImageGroup, Rep
from equiflop.grids import grid_decomposition
from equiflop.groups import FiniteGroup, Irrep
from equiflop.nn import GridTransform, PatchEmbed
from oracles import (
    IMAGE_GROUPS,
    action,
    image_group,
    move_image,
    move_tensor,
    move_tokens,
    relative_error,
    scramble,
    tensor_action,
)


@given(name=st.sampled_from(IMAGE_GROUPS), height=st.integers(1, 7), width=st.integers(1, 7), n=st.integers(1, 4))
@settings(max_examples=100)
def test_grid_transform(name: str, height: int, width: int, n: int) -> None:
    """Orthogonal, equal to the matrix, and what comes out is a feature of type n * rep."""
    g = image_group(name)
    width = height if g.swaps_axes else width
    layer = GridTransform(g, height, width, dtype=torch.float64)
    x = torch.randn(2, height * width, n, dtype=torch.float64)
    found = layer(x)
    assert (found - torch.from_numpy(grid_decomposition(g, height, width).matrix) @ x).abs().max() < 1e-12
    assert (found.square().sum(1) - x.square().sum(1)).abs().max() < 1e-12
    rep = n * layer.rep
    for a in range(g.order):
        image = move_tensor(name, a, x.mT.unflatten(-1, (height, width)).contiguous())
        moved = layer(image.flatten(-2).mT).flatten(1)
        assert (moved - found.flatten(1) @ tensor_action(rep, a).T).abs().max() < 1e-12
    assert layer.macs_per_channel == 0


@given(name=st.sampled_from(IMAGE_GROUPS), height=st.integers(1, 7), width=st.integers(1, 7))
@settings(max_examples=60)
def test_grid_transform_inverse(name: str, height: int, width: int) -> None:
    g = image_group(name)
    layer = GridTransform(g, height, height if g.swaps_axes else width, dtype=torch.float64)
    x = torch.randn(2, layer.rep.dim, 3, dtype=torch.float64)
    assert (layer.inverse(layer(x)) - x).abs().max() < 1e-12
    assert (layer(layer.inverse(x)) - x).abs().max() < 1e-12


def turned_octic() -> ImageGroup:
    """The octic group with E in a basis for which there is no transform by additions."""
    octic = image_group("octic")
    angle = 0.3
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    irreps = [i if i.dim == 1 else Irrep(i.name, 2, i.type, turn @ i.matrices @ turn.T) for i in octic.irreps]
    return ImageGroup(FiniteGroup(octic.table, irreps, "turned D4"), octic.matrices)


@pytest.mark.parametrize("side", [2, 3, 4])
def test_grid_transform_of_other_bases(side: int) -> None:
    g = turned_octic()
    layer = GridTransform(g, side, side, dtype=torch.float64)
    assert layer.plan is None and layer.macs_per_channel == side**4
    x = torch.randn(side * side, 2, dtype=torch.float64)
    for a in range(8):
        image = move_tensor("octic", a, x.mT.unflatten(-1, (side, side)).contiguous())
        assert (
            layer(image.flatten(-2).mT).flatten() - tensor_action(2 * layer.rep, a) @ layer(x).flatten()
        ).abs().max() < 1e-12
    assert (layer.inverse(layer(x)) - x).abs().max() < 1e-12


def kernel_of(layer: PatchEmbed) -> Tensor:
    """The dense convolution kernel, by feeding images that are 1 at one pixel of one channel."""
    height, width = layer.patch_size
    pixels = layer.in_chans * height * width
    images = torch.eye(pixels, dtype=torch.float64).view(pixels, layer.in_chans, height, width)
    zero = layer(torch.zeros(1, layer.in_chans, height, width, dtype=torch.float64))
    with torch.no_grad():
        return (layer(images) - zero)[:, 0].T.reshape(-1, layer.in_chans, height, width)


def make(name: str, patch: tuple[int, int], copies: int = 2, chans: int = 2, **options: object) -> PatchEmbed:
    g = image_group(name)
    options = {"img_size": patch, "strict_img_size": False, "dtype": torch.float64, **options}
    return scramble(PatchEmbed(Rep.regular(g, copies), g, patch_size=patch, in_chans=chans, **options))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::equiflop.EquiflopWarning")
@given(
    name=st.sampled_from(IMAGE_GROUPS),
    patch=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    chans=st.integers(1, 3),
)
@settings(max_examples=120)
def test_patch_embed_is_a_convolution_with_an_invariant_kernel(
    name: str, patch: tuple[int, int], grid: tuple[int, int], chans: int
) -> None:
    g = image_group(name)
    patch = (patch[0], patch[0]) if g.swaps_axes else patch
    layer = make(name, patch, chans=chans)
    rep = layer.proj.out_rep
    kernel = kernel_of(layer)
    for a in range(g.order):  # rho(g) K(g^-1 p) = K(p)
        moved = np.einsum("oi,ichw->ochw", action(rep, a), move_image(name, a, kernel.numpy()))
        assert np.abs(moved - kernel.numpy()).max() < 1e-12
    images = torch.randn(2, chans, grid[0] * patch[0], grid[1] * patch[1], dtype=torch.float64)
    bias = torch.zeros(rep.dim, dtype=torch.float64)
    assert layer.proj.bias is not None
    bias[: rep.multiplicities[0]] = layer.proj.bias
    expected = F.conv2d(images, kernel, bias, stride=patch).flatten(2).mT
    found = layer(images).detach()
    assert relative_error(found, expected) < 1e-12
    for a in range(g.order):
        assert relative_error(layer(move_tensor(name, a, images)), move_tokens(name, rep, a, found, grid)) < 1e-12


@pytest.mark.filterwarnings("ignore::equiflop.EquiflopWarning")
@pytest.mark.parametrize("name", IMAGE_GROUPS)
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_patch_embed_can_be_every_invariant_kernel(name: str, p: int) -> None:
    """The parameters are a basis of the range of the group average of kernels: same dimension, and independent."""
    layer = make(name, (p, p), copies=1, chans=1)
    rep, g = layer.proj.out_rep, image_group(name)
    size = rep.dim * p * p
    kernels = torch.eye(size, dtype=torch.float64).view(size, rep.dim, p, p).numpy()
    average = sum(np.einsum("oi,nihw->nohw", action(rep, a), move_image(name, a, kernels)) for a in range(g.order))
    dimension = np.linalg.matrix_rank(average.reshape(size, size) / g.order)
    weights = [parameter for key, parameter in layer.named_parameters() if not key.endswith("bias")]
    assert sum(weight.numel() for weight in weights) == dimension
    found, sizes = [], []
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        for irrep, weight in layer.proj.weights():
            sizes += [float(irrep.dim)] * weight.numel()
            for i in range(weight.numel()):
                weight.view(-1)[i] = 1.0
                found.append(kernel_of(layer).flatten())
                weight.view(-1)[i] = 0.0
    gram = torch.stack(found) @ torch.stack(found).T  # orthogonal coordinates: every weight occurs once in each row
    assert (gram - torch.diag(torch.tensor(sizes, dtype=torch.float64))).abs().max() < 1e-12


@pytest.mark.parametrize("patch", [(2, 2), (4, 6), (3, 4)])
def test_published_mirror_kernels(patch: tuple[int, int]) -> None:
    """sqrt(1/2) [w | Fw] and sqrt(1/2) [w | -Fw], with w the left half as it is stored."""
    layer = make("flop", patch, copies=3, chans=3)
    height, half = patch[0], patch[1] // 2
    found = kernel_of(layer)
    for name, sign, rows in (("A", 1.0, slice(0, 3)), ("B", -1.0, slice(3, 6))):
        w = layer.proj.get_parameter(f"{name}.weight").detach().view(3, height, half, 3).permute(0, 3, 1, 2)
        expected = math.sqrt(0.5) * torch.cat([w, sign * w.flip(-1)], dim=-1)
        assert (found[rows] - expected).abs().max() < 1e-14


def test_bitwise_equivariance_of_the_mirror_embedding() -> None:
    """The halves of a patch are folded before any product, so mirroring changes no rounding."""
    layer = scramble(PatchEmbed(Rep.regular(image_group("flop"), 8), image_group("flop"), 32, 16))
    images = torch.randn(2, 3, 32, 32)
    tokens = layer(images).detach()
    assert torch.equal(layer(images.flip(-1)), move_tokens("flop", layer.proj.out_rep, 1, tokens, (2, 2)))


@pytest.mark.parametrize(
    ("name", "p", "missing"), [("flop", 1, "B"), ("octic", 3, "A2"), ("octic", 1, "A2, B1, B2, E")]
)
def test_small_patches_warn(name: str, p: int, missing: str) -> None:
    g = image_group(name)
    with pytest.warns(EquiflopWarning, match=f"too small for irreps {missing} of group '{name}'"):
        PatchEmbed(Rep.regular(g, 1), g, img_size=p, patch_size=p)


def test_output_formats_and_timms_interface() -> None:
    g = image_group("octic")
    layer = PatchEmbed(Rep.regular(g, 2), g, img_size=12, patch_size=4, output_fmt="NHWC")
    assert layer(torch.zeros(2, 3, 12, 12)).shape == (2, 3, 3, 16)
    assert layer.grid_size == (3, 3) and layer.num_patches == 9 and layer.img_size == (12, 12)
    assert layer.feat_ratio() == 4 and layer.feat_ratio(as_scalar=False) == (4, 4)
    assert layer.dynamic_feat_size((20, 8)) == (5, 2)
    layer.set_input_size((20, 8))
    assert layer.grid_size == (5, 2) and layer(torch.zeros(1, 3, 20, 8)).shape == (1, 5, 2, 16)


@pytest.mark.parametrize("p", [4, 5, 16])
def test_macs(p: int) -> None:
    mirror = PatchEmbed(Rep.regular(image_group("flop"), 4), image_group("flop"), p, p)
    assert mirror.proj.macs_per_vector * 2 == 3 * p * p * 8
    g = image_group("octic")
    octic = PatchEmbed(Rep.regular(g, 2), g, p, p)
    saved = 3 * p * p - (p % 2)  # 3/16, or 3/16 - 1/(16 p^2) at odd p
    assert octic.proj.macs_per_vector * 16 == saved * 3 * 16


def test_errors() -> None:
    flop, octic = image_group("flop"), image_group("octic")
    with pytest.raises(ValueError, match="image width 30 is not a multiple of the patch width 16; use 16 or 32"):
        PatchEmbed(Rep.regular(flop, 2), flop, (32, 30), 16)
    with pytest.raises(ValueError, match=r"image height 8 .*16"):
        PatchEmbed(Rep.regular(flop, 2), flop, (8, 32), 16)
    with pytest.raises(ValueError, match=r"patch_size=\(4, 8\) is not square.*flips"):
        PatchEmbed(Rep.regular(octic, 2), octic, 32, (4, 8))
    with pytest.raises(ValueError, match="patch_size=0"):
        PatchEmbed(Rep.regular(flop, 2), flop, 32, 0)
    layer = PatchEmbed(Rep.regular(flop, 2), flop, 32, 16)
    with pytest.raises(ValueError, match="48x32 pixels does not match img_size 32x32"):
        layer(torch.zeros(1, 3, 48, 32))
    with pytest.raises(ValueError, match="patch_size=8 cannot replace"):
        layer.set_input_size(patch_size=8)
    free = PatchEmbed(Rep.regular(flop, 2), flop, 32, 16, strict_img_size=False)
    with pytest.raises(ValueError, match="image width 40 is"):
        free(torch.zeros(1, 3, 48, 40))
