"""Official octic weights: the converted model computes what the official network computes."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import equiflop
from equiflop.convert import convert_official, convert_with_report
from official_octic import octic_state, octic_vit, options_of
from oracles import relative_error
from test_convert import golden, model_like

NAMES = {"hybrid": "octic_hybrid_deit3_small_patch16_224", "invariant": "octic_inv_deit3_small_patch16_224"}


@pytest.mark.parametrize("design", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_recorded_outputs_of_the_official_code(design: str, dtype: torch.dtype, tolerance: float) -> None:
    config, state, images, features, logits = golden(f"octic_vit_{design}")
    model = model_like(config, NAMES[design]).to(dtype)
    model.load_state_dict(convert_official(state, model), strict=True)
    with torch.no_grad():
        found = model.forward_head(model.forward_features(images.to(dtype)), pre_logits=True)
        assert relative_error(found, features) < tolerance
        assert relative_error(model(images.to(dtype)), logits) < tolerance


@pytest.mark.parametrize("design", NAMES)
def test_the_formulas_are_the_official_code(design: str) -> None:
    config, state, images, features, logits = golden(f"octic_vit_{design}")
    state = {key: value.double() for key, value in state.items()}
    found = octic_vit(state, images.double(), config["num_heads"], config["depth"] // 2, design == "invariant")[:, 0]
    assert relative_error(found, features) < 1e-12
    assert relative_error(F.linear(found, state["head.weight"], state["head.bias"]), logits) < 1e-12


CASES: dict[str, dict[str, Any]] = {
    "DeiT": {},
    "DINOv2": {"dino": True, "classes": 0},
    "DINOv2 with registers": {"dino": True, "classes": 0, "registers": 3},
    "other width, five heads": {"channels": 80, "heads": 5},
    "one head": {"heads": 1},
    "patch 2h = 6": {"patch": 6},
    "patch 14": {"patch": 14, "side": 2},
    "six tokens a side": {"side": 6},
    "gray images": {"chans": 1},
    "no octic block": {"octic_blocks": 0},
    "all blocks octic": {"octic_blocks": 2},
    "three of four": {"depth": 4, "octic_blocks": 3},
    "pooled": {"class_token": False},
    "pooled, no octic block": {"class_token": False, "octic_blocks": 0},
    "pooled, all blocks octic": {"class_token": False, "octic_blocks": 2},
    "no qkv bias": {"qkv_bias": False},
    "no layer scale": {"layer_scale": False},
    "DINOv2, no layer scale": {"dino": True, "layer_scale": False},
}


def case(design: str, **options: Any) -> tuple[dict[str, Tensor], Any, Tensor, Tensor]:
    """An official state dict, a fresh model of ours, images, and what the official network makes of them."""
    heads = options.pop("heads", 2)
    state = octic_state(invariant=design == "invariant", **options)
    keywords = options_of(state, num_heads=heads, equivariant_depth=options.get("octic_blocks", 1))
    if not options.get("class_token", True):
        keywords |= {"class_token": False, "global_pool": "avg"}
    if not options.get("layer_scale", True):
        keywords["init_values"] = 0
    model = timm.create_model(
        NAMES[design],
        qkv_bias=options.get("qkv_bias", True),
        reg_tokens=options.get("registers", 0),
        **keywords,
    )
    size = keywords["img_size"]
    images = torch.randn(2, keywords["in_chans"], size, size, dtype=torch.float64)
    tokens = octic_vit(state, images, heads, options.get("octic_blocks", 1), design == "invariant")
    output = tokens[:, 0] if options.get("class_token", True) else tokens.mean(1)
    if "head.weight" in state:
        output = F.linear(output, state["head.weight"], state["head.bias"])
    return state, model.double().eval(), images, output


@pytest.mark.parametrize("design", NAMES)
@pytest.mark.parametrize("name", CASES)
def test_other_official_networks(name: str, design: str) -> None:
    state, model, images, output = case(design, **CASES[name])
    converted = convert_official(state, model)
    assert list(converted) == list(model.state_dict())
    model.load_state_dict(converted)
    with torch.no_grad():
        assert relative_error(model(images), output) < 1e-10
    single = model.float()
    single.load_state_dict(convert_official({k: v.float() for k, v in state.items()}, single))
    with torch.no_grad():
        assert relative_error(single(images.float()), output) < 1e-5


def test_an_invariant_model_is_octic_after_conversion() -> None:
    state, model, _, _ = case("invariant", dino=True, classes=0, registers=2)
    model.load_state_dict(convert_official(state, model))
    assert equiflop.check(model, group="octic", randomize=False).passed


def test_what_has_no_place_is_reported() -> None:
    state, model, _, _ = case("hybrid", dino=True, classes=0, registers=3)
    state["dino_head.mlp.0.weight"] = torch.zeros(2, 2)
    conversion = convert_with_report(state, model)
    masks = {name for name in conversion.left_out if name.startswith("mask_token.")}
    assert masks == {f"mask_token.{i}" for i in range(8)}
    assert "loss" in conversion.left_out["dino_head.mlp.0.weight"]
    assert "register_tokens.7" in conversion.left_out and "register_tokens.0" not in conversion.left_out


@pytest.mark.parametrize("design", NAMES)
@pytest.mark.parametrize("size", ["small", "base"])
def test_full_size_shapes_fit(design: str, size: str) -> None:
    model = timm.create_model(NAMES[design].replace("small", size))
    state = octic_state(model.embed_dim, 12, 6, 16, 14, invariant=design == "invariant", classes=1000)
    model.load_state_dict(convert_official(state, model), strict=True)


def test_what_does_not_fit_is_named() -> None:
    state, model, _, _ = case("hybrid")
    wrong: list[tuple[str, dict[str, Tensor], str]] = [
        ("missing", {k: v for k, v in state.items() if k != "norm.bias"}, "'norm.bias' is missing"),
        ("foreign", {**state, "norm.extra": torch.zeros(1)}, "'norm.extra' has no place"),
        ("token", {**state, "cls_token.4": torch.ones(1, 1, 2, 8)}, "'cls_token.4' is not zero"),
        ("shape", {**state, "pos_embed.5": torch.zeros(3, 3, 4)}, r"'pos_embed.5' has shape \(3, 3, 4\)"),
        ("nan", {**state, "head.bias": torch.full((5,), torch.nan)}, "'head.bias' holds NaN"),
    ]
    for _, damaged, message in wrong:
        with pytest.raises(ValueError, match=message):
            convert_official(damaged, model)


def test_models_that_the_official_code_cannot_have() -> None:
    state, _, _, _ = case("hybrid")
    options = options_of(state, num_heads=2)
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("octic_deit3_small_patch16_224", {}, "octic in every block"),
        (NAMES["hybrid"], {"global_pool": "avg", "class_token": False, "fc_norm": True}, "fc_norm=False"),
        (NAMES["hybrid"], {"img_size": 12}, "not a square of even side"),
        (NAMES["hybrid"], {"patch_size": 5, "img_size": 20}, "patches of even side"),
        (NAMES["invariant"], {}, "'invariant_proj.weight' is missing"),
        (NAMES["hybrid"], {"group": "rot4"}, "no official counterpart"),
    ]
    for name, changes, message in wrong:
        model = timm.create_model(name, **{**options, **changes})
        with pytest.raises(ValueError, match=message):
            convert_official(state, model)
