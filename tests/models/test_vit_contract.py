"""What users of timm expect of a vision transformer, of every registered E(ViT)."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import equiflop
from equiflop.grids import GridDecomposition
from equiflop.models import EquivariantVisionTransformer
from equiflop.nn import LayerNorm
from oracles import move_tokens, relative_error, scramble
from small_vits import DESIGNS, images_for, scrambled, small_vit

VIT_NAMES = [name for name in equiflop.equivariant_models() if "deit3" in name]
every_name = pytest.mark.parametrize("name", VIT_NAMES)
every_design = pytest.mark.parametrize("name", DESIGNS.values(), ids=DESIGNS)


def reduced(name: str, **kwargs: Any) -> Any:
    """The registered model with its own patch size and number of heads, at reduced width and depth."""
    patch = 14 if "patch14" in name else 16
    group = 8 if name.startswith("octic") else 2
    heads = timm.create_model(name, depth=1, device="meta").blocks[0].attn.num_heads
    options = {"img_size": 4 * patch, "embed_dim": group * heads, "depth": 4, "num_classes": 7}
    return timm.create_model(name, **{**options, **kwargs})


def test_names() -> None:
    sizes = [*(f"{size}_patch16" for size in ("tiny", "small", "medium", "base", "large")), "huge_patch14"]
    for prefix in ("flop", "flop_hybrid", "flop_inv", "octic", "octic_hybrid", "octic_inv"):
        for size in sizes[1:] if prefix.startswith("octic") else sizes:
            name = f"{prefix}_deit3_{size}_224"
            assert timm.is_model(name) and name in VIT_NAMES
            assert equiflop.plain_twin(name) == (f"deit3_{size}_224", {})
            assert timm.is_model(f"deit3_{size}_224")
    assert set(VIT_NAMES) <= set(timm.list_models("*deit3*"))
    with pytest.raises(ValueError, match=r"'flop_deit3_smal_patch16_224' is not.*did you mean flop_deit3_small"):
        equiflop.plain_twin("flop_deit3_smal_patch16_224")


def test_importing_leaves_timms_own_models_alone() -> None:
    assert type(timm.create_model("deit3_small_patch16_224", depth=1)).__name__ == "VisionTransformer"
    twin = timm.create_model("deit3_tiny_patch16_224", device="meta")
    assert (twin.embed_dim, len(twin.blocks), twin.blocks[0].attn.num_heads) == (192, 12, 3)
    assert twin.no_embed_class and twin.patch_embed.patch_size == (16, 16)


@every_name
def test_forward_backward(name: str) -> None:
    model = scrambled(reduced(name)).train()
    x = torch.randn(2, 3, *model.patch_embed.img_size, requires_grad=True)
    logits = model(x)
    assert logits.shape == (2, 7) and torch.isfinite(logits).all()
    logits.square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), key


@every_name
def test_same_shape_as_the_plain_twin(name: str) -> None:
    """Width, depth, heads, patch size, tokens, and the description of the input."""
    twin_name, overrides = equiflop.plain_twin(name)
    with torch.device("meta"):
        model, twin = timm.create_model(name), timm.create_model(twin_name, **overrides)
    assert isinstance(model, type(twin))
    assert model.embed_dim == twin.embed_dim == model.num_features and len(model.blocks) == len(twin.blocks)
    assert [b.attn.num_heads for b in model.blocks] == [b.attn.num_heads for b in twin.blocks]
    assert model.patch_embed.patch_size == twin.patch_embed.patch_size
    assert model.patch_embed.grid_size == twin.patch_embed.grid_size
    assert model.num_prefix_tokens == twin.num_prefix_tokens == 1 and model.no_embed_class == twin.no_embed_class
    cfg, other = model.pretrained_cfg, twin.pretrained_cfg
    assert cfg["input_size"] == (3, 224, 224) and cfg["num_classes"] == 1000 == model.num_classes
    assert (cfg["mean"], cfg["std"], cfg["classifier"]) == (other["mean"], other["std"], other["classifier"])
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 224, 224)


@every_design
@pytest.mark.parametrize("reg_tokens", [0, 2])
def test_forward_features_and_intermediates(name: str, reg_tokens: int) -> None:
    model = scrambled(small_vit(name, reg_tokens=reg_tokens))
    depth, prefix = len(model.blocks), 1 + reg_tokens
    outputs: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda m, i, o: outputs.append(o.detach())) for block in model.blocks]
    images = images_for(model)
    features = model.forward_features(images)
    for handle in handles:
        handle.remove()
    assert features.shape == (2, prefix + 16, 32)
    assert torch.equal(model.forward_head(features), model(images))

    final, maps = model.forward_intermediates(images)
    assert torch.equal(final, features) and len(maps) == depth
    for found, expected in zip(maps, outputs, strict=True):
        assert torch.equal(found, expected[:, prefix:].mT.unflatten(-1, (4, 4)))
    pairs = model.forward_intermediates(
        images, indices=[0, depth - 1], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    for (patches, tokens), expected in zip(pairs, (outputs[0], outputs[-1]), strict=True):
        assert torch.equal(torch.cat([tokens, patches], 1), expected)
    last = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True, output_fmt="NLC")
    assert torch.equal(last[0], features[:, prefix:])
    layers = model.get_intermediate_layers(images, n=2, reshape=True, norm=True, return_prefix_tokens=True)
    assert len(layers) == 2 and layers[-1][0].shape == (2, 32, 4, 4) and layers[-1][1].shape == (2, prefix, 32)
    assert torch.equal(layers[-1][0], features[:, prefix:].mT.unflatten(-1, (4, 4)))
    assert model.forward_intermediates(images, output_dict=True)["image_features"].shape == features.shape


@every_design
def test_prune_intermediate_layers(name: str) -> None:
    model = scrambled(small_vit(name))
    images = images_for(model)
    expected = model.forward_intermediates(images, [0], intermediates_only=True)[0]
    kept = model.prune_intermediate_layers([0], prune_head=True)
    assert kept == [0] and len(model.blocks) == 1
    assert torch.equal(model.forward_intermediates(images, [0], intermediates_only=True)[0], expected)


@every_design
def test_features_only(name: str) -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    backbone = timm.create_model(name, features_only=True, out_indices=(0, 1, 3), **options).eval()
    images = torch.randn(2, 3, 32, 32)
    features = backbone(images)
    assert [tuple(f.shape) for f in features] == [(2, 32, 4, 4)] * 3
    assert backbone.feature_info.channels() == [32] * 3 and backbone.feature_info.reduction() == [8] * 3
    rep = backbone.model.rep
    moved = backbone(images.flip(-1))
    expected = move_tokens("flop", rep, 1, features[0].flatten(2).mT.double(), (4, 4))
    assert relative_error(moved[0].flatten(2).mT, expected) < 1e-5
    assert len(timm.create_model(name, features_only=True, **options)(images)) == 3


@every_design
@pytest.mark.parametrize("pool", ["token", "avg", ""])
def test_head_follows_the_documented_order(name: str, pool: str) -> None:
    """Pooling, then the norm on the Rep (with average pooling), then invariants, then a linear classifier."""
    model = scrambled(
        small_vit(name, torch.float64, global_pool=pool, invariants="norm" if "hybrid" not in name else None)
    )
    tokens = model.forward_features(images_for(model))
    pooled = {"token": tokens[:, 0], "avg": tokens[:, 1:].mean(1), "": tokens}[pool]
    if pool == "avg":
        assert isinstance(model.norm, nn.Identity)
        pooled = model.fc_norm(pooled)
    else:
        assert isinstance(model.fc_norm, nn.Identity)
    if model.design == "equivariant":  # C2: |x| on the sign channels
        assert isinstance(model.fc_norm if pool == "avg" else model.norm, LayerNorm)
        pooled = torch.cat([pooled[..., :16], pooled[..., 16:].abs()], -1)
    assert model.head_hidden_size == pooled.shape[-1]
    assert relative_error(model.forward_head(tokens, pre_logits=True), pooled) < 1e-13
    assert relative_error(model.forward_head(tokens), pooled @ model.head.weight.T + model.head.bias) < 1e-13


def test_head_sizes() -> None:
    sizes = {"equivariant": (16, 32), "invariant": (32, 32)}
    for design, (trivial, norm) in sizes.items():
        assert small_vit(DESIGNS[design], invariants="trivial").head_hidden_size == trivial
        assert small_vit(DESIGNS[design], invariants="norm").head_hidden_size == norm
    assert small_vit(DESIGNS["hybrid"]).head_hidden_size == 32
    assert small_vit().head_hidden_size == 16  # the trivial irrep by default
    octic = small_vit(group="octic", invariants="norm")
    assert octic.head_hidden_size == 6 * 32 // 8
    projection = small_vit(DESIGNS["invariant"], group="octic").get_submodule("blocks.2.enter.proj")
    assert projection.in_features == 24 and projection.out_features == 32
    assert not any("enter" in key for key in small_vit(DESIGNS["invariant"]).state_dict())  # C channels: no projection


@every_design
def test_reset_classifier(name: str) -> None:
    model = small_vit(name, torch.float64)
    images = images_for(model)
    model.reset_classifier(0)
    assert isinstance(model.head, nn.Identity) and model.num_classes == 0
    assert model(images).shape == (2, model.num_features)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(model(images)[:, : model.head_hidden_size], pooled)
    model.reset_classifier(11, "avg")
    assert model.global_pool == "avg" and model(images).shape == (2, 11) and model.head.weight.dtype == torch.float64
    assert model.get_classifier() is model.head
    for pool in ("map", "nonsense"):
        with pytest.raises(ValueError, match=f"global_pool='{pool}'"):
            model.reset_classifier(11, pool)
    assert model.global_pool == "avg"
    model.reset_classifier(5)
    assert model(images).shape == (2, 5)
    without = small_vit(name, class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="class_token"):
        without.reset_classifier(5, "token")


@every_design
def test_num_classes_0(name: str) -> None:
    model = small_vit(name, num_classes=0)
    assert model(images_for(model)).shape == (2, model.num_features)


@every_design
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = scrambled(small_vit(name, torch.float64)).train()
    images = images_for(model)
    model(images).square().sum().backward()
    expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(images).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[key]) < 1e-12, key


@every_name
def test_layer_decay_groups_hold_every_parameter_once(name: str) -> None:
    model = reduced(name)
    skip = model.no_weight_decay()
    names = dict(model.named_parameters())
    assert skip <= set(names), "no_weight_decay names parameters that do not exist"
    assert "cls_token" in skip and any(key.startswith("pos_embed.") for key in skip)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.75)
    groups = optimizer.param_groups
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(found) == len(set(found)) and set(found) == {id(p) for p in model.parameters()}
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert all(decay[id(names[key])] == 0.0 for key in skip)
    assert decay[id(model.head.weight)] == 0.1 and decay[id(model.head.bias)] == 0.0
    layers = [
        scale[id(p)] for p in (next(model.patch_embed.parameters()), *(next(b.parameters()) for b in model.blocks))
    ]
    assert layers == sorted(layers) and len(set(layers)) == len(layers)  # smaller steps closer to the image
    assert scale[id(model.head.weight)] == 1.0
    assert scale[id(model.cls_token)] == layers[0]
    plain = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1)
    assert sum(len(group["params"]) for group in plain.param_groups) == len(names)


@every_design
@pytest.mark.parametrize("group", ["flop", "octic"])
def test_bfloat16_autocast(name: str, group: str) -> None:
    model = scrambled(small_vit(name, group=group))
    images = images_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images)
        moved = model(images.flip(-1))
        loss = found.float().square().mean()
    assert relative_error(found, model(images)) < 5e-2
    if model.design != "hybrid":
        assert relative_error(moved, found) < 3e-2
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "group"),
    [(name, "flop") for name in DESIGNS.values()]
    + [(DESIGNS["equivariant"], group) for group in ("updown", "flips", "rot4", "octic")],
)
def test_compiled_graph_is_whole(name: str, group: str) -> None:
    torch.compiler.reset()
    model = scrambled(small_vit(name, torch.float64, group=group, invariants=None if "hybrid" in name else "norm"))
    images = images_for(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(images), model(images)) < 1e-12


@pytest.mark.parametrize("group", ["flop", pytest.param("octic", marks=pytest.mark.slow)])
@pytest.mark.parametrize("gradients", [False, True])
def test_compiled_with_several_image_sizes(group: str, gradients: bool) -> None:
    """From the second size on the compiler takes height and width as unknowns; timm's plain network allows that."""
    torch.compiler.reset()
    model = scrambled(small_vit(dtype=torch.float64, group=group, dynamic_img_size=True))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(gradients):
        for size in ((32, 32), (40, 40), (48, 32), (24, 64)):
            images = images_for(model, size)
            assert relative_error(compiled(images), model(images)) < 1e-12, size


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DESIGNS.values(), "flop_deit3_huge_patch14_224"])
def test_compiled_by_inductor(name: str) -> None:
    torch.compiler.reset()
    model = scrambled(reduced(name, depth=2)).eval()
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    compiled = torch.compile(model, fullgraph=True)
    assert relative_error(compiled(images), model(images)) < 1e-5


@pytest.mark.slow
def test_compiled_at_full_size() -> None:
    torch.compiler.reset()
    model = scrambled(timm.create_model("flop_deit3_small_patch16_224")).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert relative_error(torch.compile(model, fullgraph=True)(images), model(images)) < 1e-5


@pytest.mark.slow
def test_compiled_training_step() -> None:
    torch.compiler.reset()
    model = scrambled(small_vit(DESIGNS["equivariant"])).train()
    twin = copy.deepcopy(model)
    images = images_for(model)
    torch.compile(model, fullgraph=True)(images).square().sum().backward()
    twin(images).square().sum().backward()
    for (key, parameter), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert relative_error(parameter.grad, expected.grad) < 1e-4, key


@every_design
@pytest.mark.parametrize("strict", [False, True])
def test_export(name: str, strict: bool) -> None:
    model = scrambled(small_vit(name, torch.float64))
    program = torch.export.export(model, (images_for(model),), strict=strict)
    images = images_for(model)
    assert relative_error(program.module()(images), model(images)) < 1e-12


def test_export_with_any_batch_size() -> None:
    model = scrambled(small_vit(dtype=torch.float64))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images_for(model),), dynamic_shapes={"x": {0: batch}})
    images = images_for(model, batch=5)
    assert relative_error(program.module()(images), model(images)) < 1e-12


@every_name
def test_meta_device(name: str) -> None:
    """Construction and a run without numbers; then real numbers from a state dict."""
    with torch.device("meta"):
        model = reduced(name).eval()
        size = model.patch_embed.img_size
        assert model(torch.empty(2, 3, *size)).shape == (2, 7)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    real = scrambled(reduced(name)).eval()
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    images = torch.randn(2, 3, *size)
    assert torch.equal(model(images), real(images))


def test_device_and_dtype_keywords() -> None:
    model = small_vit(dtype=torch.float64)
    direct = EquivariantVisionTransformer(
        32, 8, embed_dim=32, depth=2, num_heads=2, num_classes=7, norm_eps=0.5e-6, dtype=torch.float64
    )
    assert {p.dtype for p in direct.parameters()} == {torch.float64}
    direct.load_state_dict(model.state_dict())
    assert torch.equal(direct.eval()(images := images_for(model)), model(images))


@every_design
@pytest.mark.parametrize("group", ["flop", "flips", "octic"])
def test_copies_pickles_and_files(name: str, group: str) -> None:
    model = scrambled(small_vit(name, group=group))
    images = images_for(model)
    expected = model(images)
    assert torch.equal(copy.deepcopy(model)(images), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = small_vit(name, group=group)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)


@every_design
def test_state_dict_is_parameters_alone(name: str) -> None:
    model = small_vit(name)
    assert set(model.state_dict()) == {key for key, _ in model.named_parameters()}
    assert set(model.train().state_dict()) == set(model.eval().state_dict())
    big = [key for key, value in model.named_parameters() if value.ndim > 2 and key not in ("cls_token", "reg_token")]
    assert big == []


def test_initialisation_is_as_published() -> None:
    model = timm.create_model("flop_deit3_small_patch16_224")
    for key, parameter in model.named_parameters():
        if key.startswith("patch_embed.proj.") and key.endswith("weight"):
            bound = (3 * 16 * 8) ** -0.5  # uniform; inputs of half a patch
            assert parameter.abs().max() <= bound and parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        elif key == "patch_embed.proj.A.bias":
            assert parameter.abs().max() <= (3 * 16 * 16) ** -0.5
        elif parameter.ndim >= 2:
            factor = 0.5**0.5 if ".mlp.fc" in key else 1.0  # of the transform into the group's basis
            assert parameter.std().item() == pytest.approx(0.02 * factor, rel=0.15), key
        elif key.endswith("gamma"):
            assert (parameter == 1e-4).all(), key
        elif "norm" in key and key.endswith("weight"):
            assert (parameter == 1).all(), key
        else:
            assert key.endswith("bias") and (parameter == 0).all(), key


def test_octic_tokens_are_initialised_as_published() -> None:
    """The published field at a token is the sum over the symmetries of folded parameters of standard deviation s.

    ``s = sqrt(2) / 2 * 8 * 0.02``; the fold has two terms for one-dimensional irreps at a token in general position (on
    a diagonal twice the same term) and one for every row of E.
    """
    for name in ("octic_deit3_small_patch16_224", "octic_inv_deit3_large_patch16_224"):
        model = timm.create_model(name, depth=2)
        s = 0.5**0.5 * 8 * 0.02
        assert model.cls_token.std().item() == pytest.approx(0.16, rel=0.4)  # 48 values
        field = model.pos_embed()[0].unflatten(0, (14, 14)).detach()
        width = model.rep.multiplicities[0]
        place = torch.arange(1, 6)
        off, on = field[0, place], field[place, place]  # five orbits each: 240 values or more
        off_means = [off[:, i * width : (i + 1) * width].std().item() for i in range(4)]
        assert off_means == pytest.approx([2**0.5 * s] * 4, rel=0.2)
        assert off[:, 4 * width :].std().item() == pytest.approx(s, rel=0.1)
        on_means = [on[:, i * width : (i + 1) * width].std().item() for i in range(4)]
        assert on_means == pytest.approx([2 * s if m > 1e-6 else 0.0 for m in on_means], rel=0.2)
        assert sum(m > 1e-6 for m in on_means) == 2
        assert on[:, 4 * width :].std().item() == pytest.approx(s, rel=0.1)
        everything = model.pos_embed.weight_E.std().item(), model.pos_embed.weight_A1[1:6].std().item()
        assert everything == pytest.approx((s, 2**0.5 * s), rel=0.2)


@every_design
def test_drop_path_grows_linearly(name: str) -> None:
    model = small_vit(name, depth=4, drop_path_rate=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


@every_design
def test_training_mode_uses_dropout_and_evaluation_does_not(name: str) -> None:
    model = scrambled(small_vit(name, drop_rate=0.2, proj_drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.2))
    images = images_for(model)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))
    model.eval()


def test_patch_dropout() -> None:
    model = scrambled(small_vit(patch_drop_rate=0.5)).train()
    assert model.forward_features(images_for(model)).shape == (2, 1 + 8, 32)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "max": ({"global_pool": "max"}, r"global_pool='max' breaks the symmetry.*'token', 'avg' or 'map'"),
    "avgmax": ({"global_pool": "avgmax"}, r"global_pool='avgmax' breaks the symmetry"),
    "prr": ({"global_pool": "prr"}, r"global_pool='prr' breaks the symmetry"),
    "pooling": (
        {"global_pool": "mean"},
        r"global_pool='mean' is unknown or not supported here; use 'token', 'avg' or 'map'",
    ),
    "token": ({"class_token": False}, r"global_pool='token' needs class_token=True"),
    "width": ({"embed_dim": 770, "group": "octic"}, r"embed_dim=770 is not divisible by \|G\|=8 \(group D4\)"),
    "multiplicities of another width": (
        {"multiplicities": (20, 20)},
        r"multiplicities=\(20, 20\) of group 'flop' make 40 channels, not embed_dim=32",
    ),
    "multiplicities of another group": ({"multiplicities": (8, 8, 16)}, "has 3 entries; group C2 has 2 irreps"),
    "no invariant channel": ({"multiplicities": (0, 32)}, "hold no invariant channel"),
    "odd width": ({"embed_dim": 33}, r"embed_dim=33 is not divisible by \|G\|=2"),
    "heads": ({"num_heads": 5}, r"num_heads=5 does not divide.*divisor of 16"),
    "image": ({"img_size": (32, 36)}, r"image width 36 is not a multiple of the patch width 8; use 32 or 40"),
    "square": ({"img_size": (32, 40), "group": "octic"}, r"img_size=\(32, 40\) is not square.*flips"),
    "square rot4": ({"img_size": (32, 40), "group": "rot4"}, r"is not square.*flips"),
    "patch": ({"patch_size": (8, 16), "group": "octic"}, r"patch_size=\(8, 16\) is not square.*flips"),
    "group": ({"group": "d4"}, r"group='d4' is unknown; choose from flop, updown, flips, rot4, octic"),
    "invariants": ({"invariants": "max"}, r"invariants='max' is unknown; choose from trivial, norm"),
    "design": ({"design": "half"}, r"design='half' is unknown"),
    "mlp": ({"mlp_ratio": 0.99}, r"mlp_ratio.*=31 is not divisible by"),
    "depth": ({"equivariant_depth": 1}, r"equivariant_depth=1 applies to hybrid and inv"),
    "weight_init": ({"weight_init": "jax"}, r"weight_init='jax'"),
    "pos_embed": ({"pos_embed": "rope"}, r"pos_embed='rope' is unknown"),
    "padding": ({"dynamic_img_pad": True, "dynamic_img_size": True}, r"dynamic_img_pad=True"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals_name_argument_value_and_remedy(case: str) -> None:
    kwargs, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        small_vit(**kwargs)


def test_refusals_of_the_other_designs() -> None:
    with pytest.raises(ValueError, match=r"invariants='norm' does not apply to a hybrid"):
        small_vit(DESIGNS["hybrid"], invariants="norm")
    for design in ("hybrid", "invariant"):
        with pytest.raises(ValueError, match=r"equivariant_depth=9 is not in 0..depth=4"):
            small_vit(DESIGNS[design], equivariant_depth=9)
        with pytest.raises(ValueError, match="embed_dim=33 is not divisible"):
            small_vit(DESIGNS[design], embed_dim=33)
    with pytest.raises(ValueError, match=r"multiplicities=\(8, 24\) do not apply to a hybrid model"):
        small_vit(DESIGNS["hybrid"], multiplicities=(8, 24))


@every_name
def test_unknown_keywords_and_pretrained(name: str) -> None:
    with pytest.raises(TypeError, match="qk_scale"):
        reduced(name, qk_scale=1.0)
    with pytest.raises(ValueError, match=f"pretrained=True.*{name}.*") as error:
        timm.create_model(name, pretrained=True)
    assert "convert" in str(error.value) and "\n" not in str(error.value)


def test_wrong_image_sizes_are_clear_errors() -> None:
    model = small_vit()
    with pytest.raises(ValueError, match=r"32x40 pixels does not match img_size 32x32.*dynamic_img_size"):
        model(torch.zeros(1, 3, 32, 40))
    dynamic = small_vit(dynamic_img_size=True)
    with pytest.raises(ValueError, match="image width 36 is not a multiple of the patch width 8"):
        dynamic(torch.zeros(1, 3, 32, 36))
    with pytest.raises(ValueError, match="image height 36"):
        model.set_input_size((36, 32))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)  # the failed call changed nothing


def test_set_input_size_keeps_the_function_where_nothing_changes() -> None:
    model = scrambled(small_vit(dtype=torch.float64))
    images = images_for(model)
    expected = model(images)
    model.set_input_size(img_size=(32, 32))
    assert torch.equal(model(images), expected)
    optimizer_names = set(model.no_weight_decay())
    model.set_input_size(img_size=48)
    assert set(model.no_weight_decay()) == optimizer_names <= {key for key, _ in model.named_parameters()}


def test_fast_mirror_path_equals_the_general_one(
    transforms_by_products: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all transforms by matrix products the model computes the same."""
    fast = scrambled(small_vit(dtype=torch.float64))
    transforms_by_products()
    monkeypatch.setattr("equiflop.grids.GridDecomposition.fast_plan", None)
    monkeypatch.setattr("equiflop.nn.grid.grid_decomposition", GridDecomposition)  # not the cached ones
    general = small_vit(dtype=torch.float64)
    state = fast.state_dict()
    for name, module in fast.named_modules():
        if name.endswith((".fc1", ".fc2")):  # there the factors of the transform stand in the weights
            for irrep in module.in_rep.group.irreps:
                state[f"{name}.{irrep.name}.weight"] = state[f"{name}.{irrep.name}.weight"] / module.gain(irrep)
            bias = f"{name}.{module.in_rep.group.irreps[0].name}.bias"
            state[bias] = state[bias] / module.bias_gain
    general.load_state_dict(state)
    fast_mlp, general_mlp = fast.blocks[0].mlp, general.blocks[0].mlp
    assert general_mlp.fc1.by_product and general_mlp.fc2.by_product
    assert not (fast_mlp.fc1.by_product or fast_mlp.fc2.by_product)
    assert "matrix product" in repr(general.patch_embed.transform)
    assert "matrix product" not in repr(fast)
    images = images_for(fast)
    assert relative_error(general(images), fast(images)) < 1e-12


def test_trivial_group_is_timms_network() -> None:
    """Over the group of one element every layer is the plain one, so the whole network is timm's."""
    import numpy as np

    from equiflop import ImageGroup
    from equiflop.groups import cyclic

    group = ImageGroup(cyclic(1), np.eye(2, dtype=int)[None], "none")
    model = scrambled(small_vit(dtype=torch.float64, group=group))
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
    plain = scramble(timm.create_model("deit3_small_patch16_224", **options).double().eval(), 1)
    state = {}
    for key, value in model.state_dict().items():
        name = key.replace("pos_embed.weight_A", "pos_embed").replace(".A.", ".")
        if name == "patch_embed.proj.weight":  # rows (pixel, channel); timm's kernel is (channel, row, column)
            value = value.unflatten(1, (8, 8, 3)).permute(0, 3, 1, 2)
        state[name] = value[None] if name == "pos_embed" else value
    plain.load_state_dict(state)
    images = images_for(model)
    assert relative_error(model(images), plain(images)) < 1e-11
