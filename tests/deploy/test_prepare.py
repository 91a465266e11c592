"""Networks made for runtimes compute the same, by fewer operators."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import timm
import torch
from torch import Tensor, nn

import equiflop
from equiflop import Rep, kernels
from equiflop.deploy import prepared
from equiflop.deploy.prepare import FixedField, FoldedPatchEmbed
from equiflop.models import PoseEstimator, Segmenter
from equiflop.models.twin import twin
from equiflop.nn import LayerNorm, LayerScale, Linear
from oracles import group, relative_error, scramble
from small_models import ALL, KEYWORDS, small_model

GROUPS = ("flop", "updown", "flips", "rot4", "octic")
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 8, "num_classes": 7}


def same_function(model: Any, images: Tensor) -> nn.Module:
    """Prepare a network and see that it computes the same; it is left alone."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(images)
        made = prepared(model)
        for form in get_args(kernels.Form):
            for subtract_means in (True, False):
                with kernels.for_runtimes(form, subtract_means):
                    assert relative_error(made(images), expected) < 1e-11
        assert relative_error(made(images), expected) < 1e-11  # the folding by itself
        assert torch.equal(model(images), expected)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    return made


@pytest.mark.parametrize("name", ALL)
def test_every_family(name: str) -> None:
    model = small_model(name, torch.float64)
    same_function(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize("heads", ["coupled", "regular"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": None, "qkv_bias": False, "proj_bias": False},
        {"norm_weighting": "octic"},
        {"global_pool": "avg"},
        {"fc_norm": False, "final_norm": False},
        {"reg_tokens": 2, "no_embed_class": True},
        {"pre_norm": True},
        {"invariants": "magnitudes"},
        {"pos_embed": "none"},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_every_transformer(group: str, heads: str, options: dict[str, Any]) -> None:
    name = "flop_deit3_small_patch16_224"
    model = scramble(timm.create_model(name, group=group, heads=heads, **{**VIT, **options}).double().eval())
    same_function(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize(
    "name",
    [
        "eva02_base_patch14_224",
        "vit_small_patch16_dinov3",
        "beit_base_patch16_224",
        "vit_base_patch16_siglip_224",
        "vit_pwee_patch16_reg1_gap_256",
        "samvit_base_patch16",
    ],
)
@pytest.mark.parametrize("group", ["flop", "octic"])
def test_twins(name: str, group: str) -> None:
    patch = 14 if "patch14" in name else 16
    options: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 8, "mlp_ratio": 4.0, "img_size": 3 * patch}
    if "samvit" in name:
        options |= {"window_size": 2, "neck_chans": 16}
    model = scramble(twin(name, group, dtype=torch.float64, **options).eval())
    same_function(model, torch.randn(2, 3, 3 * patch, 3 * patch, dtype=torch.float64))


def test_backbones_of_maps() -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for wrap in (lambda b: PoseEstimator(b, 3, [(0, 1)]), lambda b: Segmenter(b, 4)):
        backbone = timm.create_model("flop_deit3_small_patch16_224", **VIT).double()
        same_function(scramble(wrap(backbone).eval()), images)


def test_features_that_are_read_raw_stay_what_they_are() -> None:
    """The stream is centred only where norms alone read it."""
    model = scramble(
        timm.create_model("flop_deit3_small_patch16_224", features_only=True, out_indices=(0, 1), **VIT).double().eval()
    )
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    made: Any = prepared(model)
    for found, expected in zip(made(images), model(images), strict=True):
        assert relative_error(found, expected) < 1e-11
    assert not any(module.centred for module in made.modules() if isinstance(module, LayerNorm))


def test_what_is_folded() -> None:
    made: Any = prepared(small_model(ALL[0]))
    assert type(made.patch_embed) is FoldedPatchEmbed and type(made.pos_embed) is FixedField
    norms = [module for module in made.modules() if isinstance(module, LayerNorm)]
    assert all(norm.centred and norm.weighting == "entries" for norm in norms)
    assert all(norm.weight is None for norm in norms[:-1])
    with torch.no_grad():
        features = made.patch_embed(torch.randn(1, 3, 32, 32)) + made.pos_embed()[:, -16:]
    inv, sign = features.chunk(2, dim=-1)
    assert inv.mean(-1).abs().max() < 1e-6 and sign.mean(-1).abs().max() < 1e-6


def test_sizes_may_stay_open() -> None:
    model = scramble(timm.create_model(ALL[0], **{**KEYWORDS[ALL[0]], "dynamic_img_size": True}).double().eval())
    made = prepared(model, dynamic_size=True)
    for size in ((32, 32), (48, 16)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad(), kernels.for_runtimes():
            assert relative_error(made(images), model(images)) < 1e-11


@pytest.mark.parametrize("name", ["C1", "C2", "C2xC2", "C4", "D4", "Q8", "C3", "D3"])
@pytest.mark.parametrize("orders", [("irreps", "irreps"), ("irreps", "group"), ("group", "irreps"), ("heads", "heads")])
@pytest.mark.parametrize("sections", [1, 3])
def test_linear_maps(name: str, orders: tuple[Any, Any], sections: int) -> None:
    rep = Rep.regular(group(name), 4)
    layer = scramble(
        Linear(rep, 2 * rep, in_order=orders[0], out_order=orders[1], sections=sections, num_heads=2).double()
    )
    x = torch.randn(2, 5, rep.dim, dtype=torch.float64)
    with kernels.for_runtimes():
        found = layer(x)
    assert relative_error(found, layer(x)) < 1e-12


@pytest.mark.parametrize("weighting", ["entries", "octic"])
@pytest.mark.parametrize("multiplicities", [(4, 4, 4, 4, 8), (3, 2, 5, 2, 4), (1, 2, 2, 2, 4)])
def test_norms(weighting: Any, multiplicities: tuple[int, ...]) -> None:
    norm = scramble(LayerNorm(Rep(group("D4"), multiplicities), weighting=weighting).double())
    x = 3 + torch.randn(2, 5, norm.rep.dim, dtype=torch.float64)
    with kernels.for_runtimes():
        found = norm(x)
    assert relative_error(found, norm(x)) < 1e-12


def test_a_watched_module_is_called() -> None:
    model = small_model(ALL[0])
    seen: list[str] = []
    made: Any = prepared(model)
    made.blocks[0].mlp.act.register_forward_hook(lambda *_: seen.append("act"))
    with torch.no_grad(), kernels.for_runtimes():
        made(torch.randn(1, 3, 32, 32))
    assert seen == ["act"]


def test_adapters_are_not_passed_by() -> None:
    """What is not in the weights cannot be folded or centred by them."""
    peft = pytest.importorskip("peft")
    model = small_model(ALL[0], torch.float64)
    targets = equiflop.linear_layers(model, ["proj", "fc1", "fc2"])
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    made: Any = same_function(
        scramble(adapted.base_model.model.double().eval()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    )
    assert not made.norm.centred and isinstance(made.blocks[0].ls1, LayerScale)


def test_macs_do_not_grow_but_for_the_patch_embedding() -> None:
    model = small_model(ALL[0])
    made = prepared(model)
    grown = equiflop.macs(made, (32, 32)) - equiflop.macs(model, (32, 32))
    assert grown == 16 * (8 * 8 * 3) * 32 // 2  # the other half of the convolution
