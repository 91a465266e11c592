"""E(ResMLP) and E(ConvNeXt): what timm's users rely on, and equivariance through training."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from torch import nn

import equiflop

RESMLP = {"img_size": (48, 40), "patch_size": 8, "embed_dim": 32, "num_blocks": 3, "num_classes": 5}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (16, 32, 16, 32), "num_classes": 5}
ISOTROPIC = {"depth": 3, "dim": 32, "patch_size": 8, "ls_init_value": 1e-6, "num_classes": 5}

#: Every registered model of these families, its small version, and an image size with odd grids where it may have them.
SMALL: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    **{f"flop_resmlp_{size}_224": (RESMLP, (48, 40)) for size in ("12", "24", "big_24", "large_24")},
    **{f"flop_convnext_{size}": (CONVNEXT, (50, 64)) for size in ("tiny", "small", "base", "large", "xlarge")},
    **{f"flop_convnext_isotropic_{size}": (ISOTROPIC, (44, 40)) for size in ("small", "base", "large")},
}
ONE_PER_FAMILY = ("flop_resmlp_12_224", "flop_convnext_tiny", "flop_convnext_isotropic_small")


def _small(name: str, **kwargs: Any) -> tuple[Any, torch.Tensor]:
    options, size = SMALL[name]
    return timm.create_model(name, **{**options, **kwargs}), torch.randn(3, 3, *size)


def test_every_model_is_covered() -> None:
    others = [name for name in equiflop.equivariant_models() if "deit3" not in name]
    assert sorted(others) == sorted(SMALL)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.filterwarnings("ignore:patch_size")
def test_stages_of_convnext_shrink_where_those_of_timm_do(patch_size: int) -> None:
    """Behind a stem of patch size 2 the first stage halves the resolution as well."""
    images = torch.randn(1, 3, 64, 64)
    ours, theirs = (
        timm.create_model(name, patch_size=patch_size, **CONVNEXT) for name in ("flop_convnext_tiny", "convnext_tiny")
    )
    assert [info["reduction"] for info in ours.feature_info] == [info["reduction"] for info in theirs.feature_info]
    assert ours.forward_features(images).shape == theirs.forward_features(images).shape


@pytest.mark.parametrize("name", SMALL)
def test_methods_of_timm(name: str) -> None:
    model, x = _small(name)
    logits = model(x)
    assert logits.shape == (3, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (3, model.head_hidden_size)
    final, maps = model.forward_intermediates(x)
    assert len(maps) == len(model.feature_info)
    for found, info in zip(maps, model.feature_info, strict=True):
        assert found.shape[:2] == (3, info["num_chs"])
        assert found.shape[2:] == tuple(side // info["reduction"] for side in x.shape[2:])
    assert torch.equal(final, features)
    model.reset_classifier(11)
    assert model(x).shape == (3, 11)
    assert model.get_classifier().out_features == 11
    model.reset_classifier(0)
    assert model(x).shape == (3, model.num_features)
    assert isinstance(model.get_classifier(), nn.Identity)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_features_only_is_a_pyramid_of_equivariant_maps(name: str) -> None:
    model, x = _small(name, features_only=True)
    model.eval()
    maps, mirrored = model(x), model(x.flip(-1))
    assert [found.shape[1] for found in maps] == model.feature_info.channels()
    for i, (found, moved) in zip(model.feature_info.out_indices, zip(maps, mirrored, strict=True), strict=True):
        rep = model.model.feature_rep(i) if hasattr(model, "model") else model.feature_rep(i)
        action = rep.matrix(1).float()
        expected = torch.einsum("ij,bjhw->bihw", action, found).flip(-1)
        assert (moved - expected).abs().max() < 1e-5 * found.abs().max()


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
@pytest.mark.parametrize("group", ["flop", "updown", "flips"])
@pytest.mark.parametrize("invariants", ["trivial", "norm"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_equivariance(name: str, group: str, invariants: str, dtype: torch.dtype, tolerance: float) -> None:
    options, size = SMALL[name]
    if "convnext" in name and group != "flop":
        size = (64, size[1])  # rows are mirrored too
    report = equiflop.check(
        timm.create_model(name, group=group, invariants=invariants, **options).to(dtype), input_size=size
    )
    assert report.passed, str(report)
    assert report.tolerance == tolerance
    assert len(report.rows) == (1 + len(options.get("depths", range(3)))) * report.group.order


@pytest.mark.parametrize("group", ["rot4", "octic"])
def test_resmlp_under_quarter_turns(group: str) -> None:
    model = timm.create_model("flop_resmlp_12_224", group=group, **{**RESMLP, "img_size": 40})
    report = equiflop.check(model.double())
    assert report.passed, str(report)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_equivariance_survives_training(name: str) -> None:
    model, x = _small(name)
    model, x = model.double(), x.double()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    labels = torch.tensor([0, 1, 2])
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    report = equiflop.check(model, input_size=tuple(x.shape[2:]), randomize=False)
    assert report.max_error < 1e-12, str(report)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_gradients_with_checkpointing_are_the_same(name: str) -> None:
    model, x = _small(name)
    model(x).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(x).square().sum().backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_layer_decay_covers_every_parameter_once(name: str) -> None:
    model, _ = _small(name)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_compiled_and_exported(name: str) -> None:
    torch._dynamo.reset()
    model, x = _small(name)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(torch.compile(model, fullgraph=True)(x), expected, atol=1e-5)
        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}).module()
        assert torch.allclose(exported(x), expected, atol=1e-6)
        assert torch.allclose(exported(torch.cat([x, x])), torch.cat([expected, expected]), atol=1e-5)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_bfloat16_autocast_is_close(name: str) -> None:
    model, x = _small(name)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x)
    assert (found - expected).abs().max() < 3e-2 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_saved_as_a_hub_folder_and_loaded_back(name: str, tmp_path: Any) -> None:
    options, _ = SMALL[name]
    model, x = _small(name)
    save_for_hf(model.eval(), str(tmp_path), model_args=options)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flop_convnext_tiny", {"group": "octic"}, "group 'octic' has irreps of dimension above 1.*'flips'"),
        ("flop_convnext_tiny", {"dims": (10, 20, 40, 80)}, "channels=10 is not divisible by 4"),
        ("flop_convnext_tiny", {"dims": (16, 33, 64, 96)}, r"dims\[1\]=33 is not divisible by \|G\|=2"),
        ("flop_convnext_tiny", {"global_pool": "max"}, "global_pool='max' is not supported"),
        ("flop_convnext_tiny", {"pretrained": True}, "equiflop convert"),
        ("flop_resmlp_12_224", {"global_pool": "max"}, "global_pool='max' is not supported"),
        ("flop_resmlp_12_224", {"embed_dim": 385}, r"embed_dim=385 is not divisible by \|G\|=2"),
        ("flop_resmlp_12_224", {"img_size": (224, 230)}, "image width 230 is not a multiple of the patch width 16"),
        ("flop_resmlp_12_224", {"img_size": (224, 192), "group": "octic"}, "not square, which group 'octic' needs"),
        ("flop_resmlp_12_224", {"invariants": "all"}, "invariants='all' is unknown"),
    ],
)
def test_refusals_name_the_argument(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **options)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_unknown_keywords_are_errors(name: str) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        timm.create_model(name, no_such_option=1)


def test_convnext_names_the_image_sizes_that_work() -> None:
    model = timm.create_model("flop_convnext_tiny", **CONVNEXT)
    with pytest.raises(ValueError, match=r"width 100 is not a multiple of 32.*use 96 or 128"):
        model(torch.randn(1, 3, 64, 100))
    model = timm.create_model("flop_convnext_tiny", group="updown", **CONVNEXT)
    with pytest.raises(ValueError, match=r"height 100 is not a multiple of 32.*use 96 or 128"):
        model(torch.randn(1, 3, 100, 64))


def test_plain_twins_can_be_made() -> None:
    for name in SMALL:
        twin, overrides = equiflop.plain_twin(name)
        with torch.device("meta"):
            plain, equivariant = timm.create_model(twin, **overrides), timm.create_model(name)
        assert 1.9 < equiflop.macs(plain, (224, 224)) / equiflop.macs(equivariant, (224, 224)) <= 2.0
