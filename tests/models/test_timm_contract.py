"""What timm's own tests ask of a model, asked of ours at small sizes; and the idioms of those who use timm."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models._features_fx import FeatureGraphNet
from torch import Tensor, nn

import equiflop
from small_models import ALL, CONVNEXT, INVARIANT, KEYWORDS, OCTIC, RESMLP, VIT, classifier, small_model


def images(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=dtype)


def channels_axis(name: str) -> int:
    return 1 if "convnext" in name else -1


@pytest.mark.parametrize("name", ALL)
def test_forward(name: str) -> None:
    outputs = timm.create_model(name, **KEYWORDS[name]).eval()(images(1))
    assert outputs.shape == (1, 1000)
    assert torch.isfinite(outputs).all()


@pytest.mark.parametrize("name", ALL)
def test_backward_reaches_every_parameter(name: str) -> None:
    model = timm.create_model(name, **KEYWORDS[name], num_classes=42).train()
    outputs = model(images())
    outputs.mean().backward()
    assert outputs.shape == (2, 42) and torch.isfinite(outputs).all()
    assert [path for path, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", ALL)
def test_configuration_names_parts_that_exist(name: str) -> None:
    model = timm.create_model(name, **KEYWORDS[name])
    state, cfg = model.state_dict(), model.default_cfg
    assert cfg["classifier"] == classifier(name)
    assert f"{cfg['classifier']}.weight" in state
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    first = cfg["first_conv"]
    assert isinstance(first, tuple)  # several layers, none of them a convolution that timm could adapt
    assert all(f"{path}.weight" in state for path in first)
    assert cfg["input_size"] == (3, 224, 224)


@pytest.mark.parametrize("name", ALL)
def test_widths_with_and_without_classifier(name: str) -> None:
    model, x = small_model(name), images()
    features = model.forward_features(x)
    assert features.shape[channels_axis(name)] == model.num_features
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    model.reset_classifier(0)
    output = model(x)
    assert output.shape == (2, model.num_features)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    torch.testing.assert_close(output[:, : model.head_hidden_size], pooled, rtol=1e-4, atol=1e-5)
    model.reset_classifier(0, "")
    unpooled = model(x)
    assert unpooled.shape == features.shape
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)
    torch.testing.assert_close(model.forward_features(x), features)


@pytest.mark.parametrize("name", ALL)
def test_a_backbone_for_ones_own_classifier(name: str) -> None:
    backbone = small_model(name, torch.float64, num_classes=0)
    x = images(3, torch.float64)
    own = nn.Linear(backbone.num_features, 5, dtype=torch.float64)
    features = backbone(x)
    assert own(features).shape == (3, 5)
    assert features.std(0).min() > 0  # every value tells images apart
    features.sum().backward()
    assert [path for path, parameter in backbone.named_parameters() if parameter.grad is None] == []
    backbone.head = own if "convnext" not in name else backbone.head
    if name in INVARIANT:
        torch.testing.assert_close(backbone(x.flip(-1)), backbone(x), rtol=1e-10, atol=1e-10)
    if name == OCTIC:
        torch.testing.assert_close(backbone(x.rot90(1, (-1, -2))), backbone(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [VIT, OCTIC, RESMLP, CONVNEXT])
def test_invariants_that_were_asked_for_are_returned_without_classifier(name: str) -> None:
    for kind in ("trivial", "norm"):
        model = small_model(name, num_classes=0, invariants=kind)
        features = model.forward_features(images())
        assert model.forward_head(features).shape == (2, model.head_hidden_size)
        torch.testing.assert_close(model.forward_head(features), model.forward_head(features, pre_logits=True))


def test_groups_of_turns_keep_all_features_without_classifier() -> None:
    for group in ("updown", "flips", "rot4", "octic"):
        for name in (VIT, RESMLP):
            options = {"group": group, "embed_dim": 64, "num_classes": 0}
            model = small_model(name, torch.float64, **options)
            x = images(2, torch.float64)
            output = model(x)
            assert output.shape == (2, 64)
            moved = x.flip(-2) if group in ("updown", "flips") else x.rot90(1, (-1, -2))
            torch.testing.assert_close(model(moved), output, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_features_only_and_intermediates(name: str) -> None:
    model, x = small_model(name), images()
    backbone = timm.create_model(name, **KEYWORDS[name], features_only=True, out_indices=(0, 1)).eval()
    backbone.load_state_dict(
        {f"model.{key}": value for key, value in model.state_dict().items() if f"model.{key}" in backbone.state_dict()}
    )
    outputs = backbone(x)
    assert [output.shape[1] for output in outputs] == backbone.feature_info.channels()
    assert all(output.ndim == 4 and torch.isfinite(output).all() for output in outputs)
    sides = [32 // reduction for reduction in backbone.feature_info.reduction()]
    assert [tuple(output.shape[-2:]) for output in outputs] == [(side, side) for side in sides]
    final, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert len(intermediates) == len(model.feature_info)
    wanted = backbone.feature_info.get_dicts()
    taken = [intermediates[[i["module"] for i in model.feature_info].index(info["module"])] for info in wanted]
    for output, expected in zip(outputs, taken, strict=True):
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", ALL)
def test_features_by_a_symbolic_trace(name: str) -> None:
    model, x = small_model(name), images()
    indices = (0, 1)
    outputs = FeatureGraphNet(model, indices)(x)
    seen: list[Tensor] = []
    for info in list(model.feature_info)[:2]:
        module = info["module"] if isinstance(info, dict) else info
        model.get_submodule(module).register_forward_hook(lambda m, i, o: seen.append(o))
    model(x)
    for output, expected in zip(outputs, seen, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[0], r"a batch of images \(batch, 3, height, width\) is needed; add the batch axis by x.unsqueeze"),
        (lambda x: x[:, :2], "input has 2 channels; this model has in_chans=3"),
        (lambda x: torch.cat([x, x], 1), "input has 6 channels; this model has in_chans=3"),
        (lambda x: (x * 50).to(torch.uint8), "input has dtype uint8; images must be floating-point, normalised"),
        (lambda x: x.long(), "input has dtype int64"),
        (lambda x: x[0, 0], r"input has shape \(32, 32\); a batch of images"),
        (lambda x: x.permute(0, 2, 3, 1), "input has 32 channels; this model has in_chans=3"),
    ],
    ids=["no batch axis", "two channels", "six channels", "uint8", "int64", "a matrix", "channels last"],
)
def test_inputs_that_are_no_batch_of_images_are_refused(name: str, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        small_model(name)(change(images()))
    assert "\n" not in str(caught.value)


def test_every_registered_name_has_a_configuration_of_that_form() -> None:
    for name in equiflop.equivariant_models():
        cfg = timm.models.get_pretrained_cfg(name)
        assert isinstance(cfg.first_conv, tuple) and cfg.classifier in ("head", "head.fc")
