"""Official E(ResMLP) and E(ConvNeXt) weights: the converted network computes the official function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

import equiflop
import official_networks as official
from equiflop.convert import convert_official

GOLDENS: dict[str, tuple[str, dict[str, Any]]] = {
    "flop_resmlp": ("flop_resmlp_12_224", {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 2}),
    "flop_convnext": ("flop_convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)}),
    "flop_convnext_isotropic": ("flop_convnext_isotropic_small", {"depth": 2, "dim": 32, "ls_init_value": 1e-6}),
}


def _converted(state: dict[str, Tensor], name: str, **kwargs: Any) -> Any:
    model = timm.create_model(name, **kwargs).double().eval()
    model.load_state_dict(convert_official(state, model), strict=True)
    return model


def _same(model: Any, x: Tensor, features: Tensor, logits: Tensor, tolerance: float) -> None:
    with torch.no_grad():
        found = model.forward_head(model.forward_features(x), pre_logits=True)
        assert (found - features).abs().max() < tolerance * max(1.0, float(features.abs().max()))
        assert (model(x) - logits).abs().max() < tolerance * max(1.0, float(logits.abs().max()))


@pytest.mark.parametrize("golden", GOLDENS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_recorded_outputs_of_the_official_code(golden: str, dtype: torch.dtype, tolerance: float) -> None:
    tensors = load_file(Path(__file__).parent / "goldens" / f"{golden}.safetensors")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    name, kwargs = GOLDENS[golden]
    model = timm.create_model(name, num_classes=10, **kwargs).to(dtype).eval()
    model.load_state_dict(convert_official(state, model), strict=True)
    with torch.no_grad():
        x = tensors["input"].to(dtype)
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        assert (features - tensors["features"]).abs().max() < tolerance
        assert (model(x) - tensors["logits"]).abs().max() < tolerance


@pytest.mark.parametrize("symmetrised", [False, True])
@pytest.mark.parametrize(("side", "patch", "channels", "depth"), [(24, 6, 16, 3), (32, 4, 24, 1), (96, 16, 40, 2)])
def test_resmlp_of_other_dimensions(side: int, patch: int, channels: int, depth: int, symmetrised: bool) -> None:
    state = official.resmlp_state(side, patch, channels, depth, 7, symmetrised)
    x = torch.randn(3, 3, side, side, dtype=torch.float64)
    model = _converted(
        state,
        "flop_resmlp_24_224",
        img_size=side,
        patch_size=patch,
        embed_dim=channels,
        num_blocks=depth,
        num_classes=7,
        invariants="norm" if symmetrised else "trivial",
    )
    _same(model, x, *official.resmlp(state, x, patch, depth, symmetrised), 1e-10)


@pytest.mark.parametrize("symmetrised", [False, True])
@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
def test_convnext_of_other_dimensions(size: tuple[int, int], layer_scale: bool, symmetrised: bool) -> None:
    depths, dims = (2, 1, 1, 2), (8, 24, 20, 36)
    state = official.convnext_state(depths, dims, 7, layer_scale, symmetrised)
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    model = _converted(
        state,
        "flop_convnext_small",
        depths=depths,
        dims=dims,
        num_classes=7,
        ls_init_value=1e-6 if layer_scale else 0,
        invariants="norm" if symmetrised else "trivial",
    )
    _same(model, x, *official.convnext(state, x, depths, symmetrised), 1e-10)


@pytest.mark.parametrize("symmetrised", [False, True])
@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize(("patch", "size"), [(16, (64, 64)), (8, (56, 40))])
def test_isotropic_convnext_of_other_dimensions(
    patch: int, size: tuple[int, int], layer_scale: bool, symmetrised: bool
) -> None:
    state = official.isotropic_convnext_state(patch, 3, 24, 7, layer_scale, symmetrised)
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    model = _converted(
        state,
        "flop_convnext_isotropic_base",
        patch_size=patch,
        depth=3,
        dim=24,
        num_classes=7,
        ls_init_value=1e-6 if layer_scale else 0,
        invariants="norm" if symmetrised else "trivial",
    )
    _same(model, x, *official.isotropic_convnext(state, x, patch, 3, symmetrised), 1e-10)


def test_the_official_network_ignores_the_betas_of_resmlp() -> None:
    state = official.resmlp_state(24, 6, 16, 2, 7, False)
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    options = {"img_size": 24, "patch_size": 6, "embed_dim": 16, "num_blocks": 2, "num_classes": 7}
    before = _converted(state, "flop_resmlp_12_224", **options)(x)
    for name in state:
        if "norm1.beta" in name or "norm2.beta" in name:
            state[name] = state[name] + 5.0
    assert torch.equal(_converted(state, "flop_resmlp_12_224", **options)(x), before)


def test_first_mismatch_is_named() -> None:
    state = official.convnext_state((1, 1, 1, 1), (8, 8, 8, 8), 7, True, False)
    options = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "num_classes": 7}
    with pytest.raises(ValueError, match=r"'stages\.0\.0\.gamma\.alpha_sym' has no place in the model"):
        _converted(state, "flop_convnext_tiny", ls_init_value=0, **options)
    with pytest.raises(
        ValueError, match=r"'downsample_layers\.0\.0\.proj_sym\.weight' has shape .* needs \(8, 3, 4, 2\)"
    ):
        _converted(state, "flop_convnext_tiny", **{**options, "dims": (16, 8, 8, 8)})
    with pytest.raises(ValueError, match=r"'patch_embed\.proj_sym\.weight' is missing"):
        _converted(state, "flop_resmlp_12_224", img_size=32, patch_size=8, embed_dim=16, num_blocks=1)
    state["head.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'head\.weight' holds NaN"):
        _converted(state, "flop_convnext_tiny", **options)


def test_half_precision_models_get_their_own_dtype() -> None:
    state = official.isotropic_convnext_state(8, 1, 16, 3, False, False)
    model = timm.create_model("flop_convnext_isotropic_small", patch_size=8, depth=1, dim=16, num_classes=3).bfloat16()
    converted = convert_official(state, model)
    assert all(value.dtype == torch.bfloat16 for value in converted.values())


def test_models_without_official_counterpart_are_refused() -> None:
    plain = timm.create_model("convnext_isotropic_small", depth=1, dim=16)
    with pytest.raises(ValueError, match="no official counterpart"):
        convert_official({}, plain)
    with pytest.raises(ValueError, match="no official counterpart"):
        convert_official({}, timm.create_model("flop_convnext_tiny", depths=(1,), dims=(16,), group="flips"))
    assert equiflop.plain_twin("flop_convnext_isotropic_small") == ("convnext_isotropic_small", {})
