"""Networks made for inference compute the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch

import equiflop
from equiflop.inference import fold_constants
from equiflop.nn import Block
from oracles import relative_error, scramble
from small_vits import DESIGNS, images_for, scrambled, small_vit


@pytest.mark.parametrize("group", ["flop", "flips", "rot4", "octic"])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"init_values": None}, {"proj_bias": False}])
def test_folding_keeps_the_function(group: str, options: dict[str, Any]) -> None:
    model = scrambled(small_vit(dtype=torch.float64, group=group, **options)).requires_grad_(False)
    folded = copy.deepcopy(model)
    for block in folded.blocks:
        fold_constants(block)
        assert isinstance(block.ls1, torch.nn.Identity) and isinstance(block.ls2, torch.nn.Identity)
    images = images_for(model)
    assert relative_error(folded(images), model(images)) < 1e-12
    assert equiflop.check(folded, randomize=False).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*DESIGNS.values(), "octic_hybrid_deit3_small_patch16_224", "flop_resmlp_12_224", "flop_convnext_tiny"]
)
def test_optimized_network_computes_the_same_and_leaves_the_original_alone(name: str) -> None:
    if "deit3" in name:
        model: Any = scrambled(small_vit(name))
        images = images_for(model)
    else:
        sizes: dict[str, Any] = {"dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1)}
        if "resmlp" in name:
            sizes = {"embed_dim": 32, "num_blocks": 2, "img_size": 64}
        model = scramble(timm.create_model(name, num_classes=7, **sizes).eval())
        images = torch.randn(2, 3, 64, 64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = equiflop.optimize_for_inference(model)
    with torch.no_grad():
        assert relative_error(fast(images), model(images)) < 1e-5
        if getattr(model, "invariant_output", True):
            assert relative_error(fast(images.flip(-1)), fast(images)) < 1e-5
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert any(isinstance(module, Block) for module in model.modules()) == ("deit3" in name)
