"""The official E(ResMLP) and E(ConvNeXt) as plain formulas on their own state dicts, and random state dicts for them.

Written from the description of what they compute: pairs (symmetric, antisymmetric) of features, tokens in mirrored
halves. Nothing here uses the library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

KAPPA = math.sqrt(0.5)
State = dict[str, Tensor]


def _patch_embed(state: State, name: str, x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Symmetric and antisymmetric convolution with mirrored kernels, without the factor sqrt(1/2)."""
    sym, asym = state[f"{name}.proj_sym.weight"], state[f"{name}.proj_asym.weight"]
    s = F.conv2d(x, torch.cat([sym, sym.flip(-1)], -1), state[f"{name}.proj_sym.bias"], stride=patch)
    return s, F.conv2d(x, torch.cat([asym, -asym.flip(-1)], -1), stride=patch)


def _layer_norm(state: State, name: str, s: Tensor, a: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    s, a = s - s.mean(axis, keepdim=True), a - a.mean(axis, keepdim=True)
    variance = s.square().mean(axis, keepdim=True) + a.square().mean(axis, keepdim=True)
    sigma = KAPPA * torch.sqrt(variance + 1e-6)
    shape = [1] * s.ndim
    shape[axis] = -1
    alpha_s, alpha_a, beta = (state[f"{name}.scaling.{p}"].view(shape) for p in ("alpha_sym", "alpha_asym", "beta"))
    return s / sigma * alpha_s + beta, a / sigma * alpha_a


def resmlp(state: State, x: Tensor, patch: int, depth: int, symmetrised: bool) -> tuple[Tensor, Tensor]:
    """Features before the classifier, and logits, of the official E(ResMLP)."""
    s, a = _patch_embed(state, "patch_embed", x, patch)
    columns = s.shape[-1]

    def halves(z: Tensor) -> tuple[Tensor, Tensor]:
        left, right = z[..., : columns // 2].flatten(2).mT, z[..., columns // 2 :].flip(-1).flatten(2).mT
        return KAPPA * (left + right), KAPPA * (left - right)

    (ss, sa), (as_, aa) = halves(s), halves(a)
    tuple4 = [ss, sa, as_, aa]
    hadamard = 0.5 * torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]).to(x)

    def affine(name: str, values: Sequence[Tensor]) -> list[Tensor]:
        return [v * state[f"{name}.alpha_{'sym' if i < 2 else 'asym'}"] for i, v in enumerate(values)]

    def across(name: str, values: Sequence[Tensor], irreps: Sequence[str], tokens: bool) -> list[Tensor]:
        out = []
        for i, (value, part) in enumerate(zip(values, irreps, strict=True)):
            weight, bias = state[f"{name}.lin_{part}.weight"], state[f"{name}.lin_{part}.bias"]
            value = weight @ value if tokens else value @ weight.mT
            if i in (0, 3):
                value = value + (bias[:, None] if tokens else bias)
            out.append(value)
        return out

    for i in range(depth):
        block = f"blocks.{i}"
        branch = across(f"{block}.attn", affine(f"{block}.norm1", tuple4), ("sym", "asym", "sym", "asym"), True)
        tuple4 = [v + b for v, b in zip(tuple4, affine(f"{block}.gamma_1", branch), strict=True)]
        channel_parts = ("sym", "sym", "asym", "asym")
        hidden = torch.stack(across(f"{block}.mlp.fc1", affine(f"{block}.norm2", tuple4), channel_parts, False))
        spatial = torch.einsum("ij,j...->i...", hadamard, hidden)
        hidden = torch.einsum("ij,j...->i...", hadamard, spatial * torch.sigmoid(1.702 * spatial))
        branch = across(f"{block}.mlp.fc2", list(hidden), channel_parts, False)
        tuple4 = [v + b for v, b in zip(tuple4, affine(f"{block}.gamma_2", branch), strict=True)]
    features = torch.cat([tuple4[0], tuple4[3]], dim=1)
    if symmetrised:
        features = torch.cat([features, torch.cat([tuple4[1], tuple4[2]], dim=1).abs()], dim=-1)
    features = (features * state["norm.alpha"] + state["norm.beta"]).mean(1)
    return features, features @ state["head.weight"].mT + state["head.bias"]


def _convnext_block(state: State, name: str, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    (s1, s2), (a1, a2) = s.chunk(2, 1), a.chunk(2, 1)

    def conv(path: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.dwconv.{path}.weight"]
        if path in ("sym_to_sym", "asym_to_asym"):
            kernel = torch.cat([weight, weight[..., :3].flip(-1)], -1)
        else:
            kernel = torch.cat([weight, torch.zeros_like(weight[..., :1]), -weight.flip(-1)], -1)
        return F.conv2d(x, kernel, state.get(f"{name}.dwconv.{path}.bias"), padding=3, groups=x.shape[1])

    ds = torch.cat([conv("sym_to_sym", s1), conv("asym_to_sym", a1)], 1)
    da = torch.cat([conv("sym_to_asym", s2), conv("asym_to_asym", a2)], 1)
    ds, da = _layer_norm(state, f"{name}.norm", ds, da, 1)

    def linear(part: str, x: Tensor, layer: str) -> Tensor:
        return F.conv2d(
            x, state[f"{name}.{layer}.linear_{part}.weight"], state.get(f"{name}.{layer}.linear_{part}.bias")
        )

    ds, da = linear("sym", ds, "pwconv1"), linear("asym", da, "pwconv1")
    u, v = F.gelu(KAPPA * (ds + da)), F.gelu(KAPPA * (ds - da))
    ds, da = linear("sym", KAPPA * (u + v), "pwconv2"), linear("asym", KAPPA * (u - v), "pwconv2")
    if f"{name}.gamma.alpha_sym" in state:
        ds = ds * state[f"{name}.gamma.alpha_sym"].view(1, -1, 1, 1)
        da = da * state[f"{name}.gamma.alpha_asym"].view(1, -1, 1, 1)
    return s + ds, a + da


def _convnext_head(state: State, s: Tensor, a: Tensor, symmetrised: bool) -> tuple[Tensor, Tensor]:
    features = s.mean((2, 3))
    if symmetrised:
        features = torch.cat([features, a.abs().mean((2, 3))], 1)
    features = F.layer_norm(features, features.shape[1:], state["norm.weight"], state["norm.bias"], 1e-6)
    return features, features @ state["head.weight"].mT + state["head.bias"]


def convnext(state: State, x: Tensor, depths: Sequence[int], symmetrised: bool) -> tuple[Tensor, Tensor]:
    """Features before the classifier, and logits, of the official E(ConvNeXt)."""
    s, a = (KAPPA * z for z in _patch_embed(state, "downsample_layers.0.0", x, 4))
    s, a = _layer_norm(state, "downsample_layers.0.1", s, a, 1)
    for i, depth in enumerate(depths):
        if i:
            name = f"downsample_layers.{i}"
            s, a = _layer_norm(state, f"{name}.0", s, a, 1)

            def conv(path: str, z: Tensor, name: str = name) -> Tensor:
                weight = state[f"{name}.1.{path}.weight"]
                sign = 1.0 if path in ("sym_to_sym", "asym_to_asym") else -1.0
                return F.conv2d(z, torch.cat([weight, sign * weight], -1), state.get(f"{name}.1.{path}.bias"), stride=2)

            s, a = conv("sym_to_sym", s) + conv("asym_to_sym", a), conv("sym_to_asym", s) + conv("asym_to_asym", a)
        for j in range(depth):
            s, a = _convnext_block(state, f"stages.{i}.{j}", s, a)
    return _convnext_head(state, s, a, symmetrised)


def isotropic_convnext(state: State, x: Tensor, patch: int, depth: int, symmetrised: bool) -> tuple[Tensor, Tensor]:
    """Features before the classifier, and logits, of the official isotropic E(ConvNeXt)."""
    s, a = (KAPPA * z for z in _patch_embed(state, "stem", x, patch))
    for i in range(depth):
        s, a = _convnext_block(state, f"blocks.{i}", s, a)
    return _convnext_head(state, s, a, symmetrised)


class _Maker:
    """Random entries, matrices scaled by their fan-in."""

    def __init__(self) -> None:
        self.state: State = {}

    def add(self, name: str, *shape: int) -> None:
        fan_in = math.prod(shape[1:]) or 1
        self.state[name] = torch.randn(shape, dtype=torch.float64) / (math.sqrt(fan_in) if len(shape) > 1 else 1.0)

    def patch_embed(self, name: str, channels: int, in_chans: int, patch: int) -> None:
        for part in ("sym", "asym"):
            self.add(f"{name}.proj_{part}.weight", channels // 2, in_chans, patch, patch // 2)
        self.add(f"{name}.proj_sym.bias", channels // 2)

    def scaling(self, name: str, half: int) -> None:
        for part in ("alpha_sym", "alpha_asym", "beta"):
            self.add(f"{name}.scaling.{part}", half)

    def convnext_block(self, name: str, channels: int, layer_scale: bool) -> None:
        half, quarter = channels // 2, channels // 4
        for path, columns in (("sym_to_sym", 4), ("asym_to_asym", 4), ("asym_to_sym", 3), ("sym_to_asym", 3)):
            self.add(f"{name}.dwconv.{path}.weight", quarter, 1, 7, columns)
            if columns == 3:
                self.state[f"{name}.dwconv.{path}.zero_center"] = torch.zeros(quarter, 1, 7, 1)
            if path.endswith("to_sym"):
                self.add(f"{name}.dwconv.{path}.bias", quarter)
        self.scaling(f"{name}.norm", half)
        for layer, rows, columns in (("pwconv1", 4 * half, half), ("pwconv2", half, 4 * half)):
            for part in ("sym", "asym"):
                self.add(f"{name}.{layer}.linear_{part}.weight", rows, columns, 1, 1)
            self.add(f"{name}.{layer}.linear_sym.bias", rows)
        if layer_scale:
            for part in ("sym", "asym"):
                self.add(f"{name}.gamma.alpha_{part}", half)

    def head(self, features: int, classes: int) -> None:
        for name, shape in (("norm.weight", (features,)), ("norm.bias", (features,))):
            self.add(name, *shape)
        self.add("head.weight", classes, features)
        self.add("head.bias", classes)


def resmlp_state(side: int, patch: int, channels: int, depth: int, classes: int, symmetrised: bool) -> State:
    """A random state dict of the official E(ResMLP) for a square image."""
    make, half, grid = _Maker(), channels // 2, side // patch
    make.patch_embed("patch_embed", channels, 3, patch)
    raster = torch.arange(grid * grid).view(grid, grid)
    indices = raster[:, : grid // 2], raster[:, grid // 2 :].flip(1)
    for part, index in zip(("left", "right"), indices, strict=True):
        make.state[f"patch_embed.flatten_and_permute_to_fourier.{part}_idx"] = index.flatten()
    tokens = grid * grid // 2
    for i in range(depth):
        for branch in ("1", "2"):
            for part in ("sym", "asym"):
                make.add(f"blocks.{i}.norm{branch}.alpha_{part}", half)
                make.add(f"blocks.{i}.norm{branch}.beta_{part}", half)
                make.add(f"blocks.{i}.gamma_{branch}.alpha_{part}", half)
        for part in ("sym", "asym"):
            for layer, rows, columns in (
                ("attn", tokens, tokens),
                ("mlp.fc1", 4 * half, half),
                ("mlp.fc2", half, 4 * half),
            ):
                make.add(f"blocks.{i}.{layer}.lin_{part}.weight", rows, columns)
                make.add(f"blocks.{i}.{layer}.lin_{part}.bias", rows)
    features = channels if symmetrised else half
    make.add("norm.alpha", features)
    make.add("norm.beta", features)
    make.add("head.weight", classes, features)
    make.add("head.bias", classes)
    return make.state


def convnext_state(
    depths: Sequence[int], dims: Sequence[int], classes: int, layer_scale: bool, symmetrised: bool
) -> State:
    """A random state dict of the official E(ConvNeXt)."""
    make = _Maker()
    make.patch_embed("downsample_layers.0.0", dims[0], 3, 4)
    make.scaling("downsample_layers.0.1", dims[0] // 2)
    for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        if i:
            make.scaling(f"downsample_layers.{i}.0", dims[i - 1] // 2)
            for path in ("sym_to_sym", "asym_to_sym", "sym_to_asym", "asym_to_asym"):
                make.add(f"downsample_layers.{i}.1.{path}.weight", dim // 2, dims[i - 1] // 2, 2, 1)
            make.add(f"downsample_layers.{i}.1.sym_to_sym.bias", dim // 2)
        for j in range(depth):
            make.convnext_block(f"stages.{i}.{j}", dim, layer_scale)
    make.head(dims[-1] if symmetrised else dims[-1] // 2, classes)
    return make.state


def isotropic_convnext_state(
    patch: int, depth: int, dim: int, classes: int, layer_scale: bool, symmetrised: bool
) -> State:
    """A random state dict of the official isotropic E(ConvNeXt)."""
    make = _Maker()
    make.patch_embed("stem", dim, 3, patch)
    for i in range(depth):
        make.convnext_block(f"blocks.{i}", dim, layer_scale)
    make.head(dim if symmetrised else dim // 2, classes)
    return make.state
