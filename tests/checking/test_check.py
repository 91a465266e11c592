"""The tester is tested: it passes equivariant networks, and fails all others."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import equiflop
from equiflop import CheckReport
from equiflop.checking import randomize_parameters
from equiflop.cli.check import command as check_command
from small_vits import DESIGNS, small_vit

GROUP_ORDERS = {"flop": 2, "updown": 2, "flips": 4, "rot4": 4, "octic": 8}


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("group", GROUP_ORDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equivariant_networks_pass(design: str, group: str, dtype: torch.dtype) -> None:
    report = equiflop.check(small_vit(DESIGNS[design], dtype, group=group))
    assert report.passed, str(report)
    assert report.dtype == dtype and report.group.name == group
    assert len(report.errors) == GROUP_ORDERS[group]
    assert report.max_error == max(report.errors) <= report.tolerance
    assert report.tolerance == {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert report.errors[0] == 0.0  # the identity
    assert dtype == torch.float64 or max(report.errors[1:]) > 0.0 or group in ("flop", "updown")


def test_every_intermediate_feature_is_compared() -> None:
    report = equiflop.check(small_vit(reg_tokens=1, depth=3))
    compared = {row.what for row in report.rows}
    assert "output" in compared
    assert sum("features" in what for what in compared) == 3
    assert all(len([row for row in report.rows if row.what == what]) == 2 for what in compared)
    hybrid = equiflop.check(small_vit(DESIGNS["hybrid"]))
    assert not any(row.what == "output" for row in hybrid.rows)  # which is not claimed to be invariant
    assert any("features" in row.what for row in hybrid.rows)


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "resnet18", "convnext_atto", "mixer_s32_224"])
def test_plain_networks_fail(name: str) -> None:
    options: dict[str, Any] = {"depth": 2} if name.startswith("deit3") else {}
    model = timm.create_model(name, **options)
    for group in GROUP_ORDERS:
        report = equiflop.check(model, group=group, input_size=(224, 224) if "224" in name else (64, 64))
        assert not report.passed and report.max_error > 1e-2


def zero_init_plain() -> nn.Module:
    """Plain, but its branches start at zero: only randomised parameters show that it is not equivariant."""
    return small_vit_plain(init_values=0.0)


def small_vit_plain(**kwargs: Any) -> nn.Module:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
    return timm.create_model("deit3_small_patch16_224", **{**options, **kwargs}).double()


class Wrapped(nn.Module):
    """A model with something added, that still shows its features."""

    def __init__(self, change: Callable[[Tensor], Tensor], design: str = "equivariant") -> None:
        super().__init__()
        self.model = small_vit(DESIGNS[design], torch.float64)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.model(x))


class FreePosition(nn.Module):
    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.field = nn.Parameter(torch.zeros_like(like()))

    def forward(self, grid: Any = None) -> Tensor:
        return self.field


class BiasOnAllChannels(nn.Module):
    def __init__(self, inner: nn.Module, dim: int) -> None:
        super().__init__()
        self.inner = inner
        self.extra_bias = nn.Parameter(torch.zeros(dim, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.extra_bias


def free_position() -> Any:
    model = small_vit(dtype=torch.float64)
    model.pos_embed = FreePosition(model.pos_embed)
    return model


def bias_on_a_sign_channel() -> Any:
    """Zero in a fresh model, so that it shows in randomised parameters only."""
    model = small_vit(dtype=torch.float64, init_values=0.5)
    model.blocks[1].attn = AttentionWithBias(model.blocks[1].attn, 32)
    return model


class AttentionWithBias(BiasOnAllChannels):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.inner(x, **kwargs) + self.extra_bias


def pointwise_nonlinearity_on_irreps() -> Any:
    model = small_vit(dtype=torch.float64)
    model.blocks[0].register_forward_hook(lambda module, args, output: torch.relu(output))
    return model


def one_wrong_channel_in_the_first_block() -> Any:
    """The last block's features and the logits depend on it little; the first block's features show it."""
    model = small_vit(dtype=torch.float64)

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 3, 17] += 1e-6
        return output

    model.blocks[0].register_forward_hook(hook)
    return model


BROKEN: dict[str, Callable[[], nn.Module]] = {
    "free position embedding": free_position,
    "bias on sign channels": bias_on_a_sign_channel,
    "relu on irreps": pointwise_nonlinearity_on_irreps,
    "one channel off by 1e-6": one_wrong_channel_in_the_first_block,
    "plain with zero branches": zero_init_plain,
    "shifted image": lambda: ShiftedImage(),
}


class ShiftedImage(nn.Module):
    """An equivariant network behind a translation that does not commute with the mirror."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_vit(dtype=torch.float64)
        self.patch_embed = self.model.patch_embed

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.roll(1, -1))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_networks_fail(name: str) -> None:
    report = equiflop.check(BROKEN[name]())
    assert not report.passed
    assert report.max_error > 1e-9
    assert "NOT equivariant" in str(report)


def test_randomisation_is_what_finds_zero_biases() -> None:
    assert equiflop.check(bias_on_a_sign_channel(), randomize=False).passed
    assert not equiflop.check(bias_on_a_sign_channel(), randomize=True).passed


def test_a_break_late_in_one_element_is_attributed_to_it() -> None:
    """A network with the up-down symmetry alone, tried with both flips."""
    model = small_vit(dtype=torch.float64, group="updown")
    report = equiflop.check(LogitsOnly(model), group="flips")
    assert not report.passed
    assert report.errors[1] < 1e-12 < 1e-3 < min(report.errors[2:])


class LogitsOnly(nn.Module):
    """The logits of a model and none of its features."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.patch_embed = model.patch_embed

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Constant(nn.Module):
    img_size = 16

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape[0], 5)


class Zero(Constant):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape[0], 5)


class NearlyConstant(Constant):
    def forward(self, x: Tensor) -> Tensor:
        return 1.0 + 1e-6 * x.mean((1, 2, 3))[:, None]


class NotANumber(Constant):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))[:, None] * float("nan")


class Infinite(Constant):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))[:, None] / 0.0


class NotANumberWhenMirrored(Constant):
    """NaN for one of the two images alone must not be lost in a maximum."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean((1, 2, 3))[:, None]
        return torch.where(x[:, :1, 0, 0] > x[:, :1, 0, -1], y, torch.nan)


@pytest.mark.parametrize("model", [Constant, Zero, NearlyConstant, NotANumber, Infinite, NotANumberWhenMirrored])
def test_worthless_outputs_fail(model: type[nn.Module]) -> None:
    report = equiflop.check(model())
    assert not report.passed
    if model is not NotANumberWhenMirrored:
        assert len(report.problems) == 1 and report.problems[0].startswith("output is")
        assert f"problem: {report.problems[0]}" in str(report)
    constant = model in (Constant, Zero, NearlyConstant)
    assert report.verdict == ("inconclusive" if constant else "not equivariant") == report.as_dict()["verdict"]
    last = str(report).splitlines()[-1]
    if constant:
        assert last.startswith("inconclusive: output is nearly the same for all images: largest relative error")
        assert "NOT equivariant" not in str(report)
    else:
        assert last.startswith("NOT equivariant: largest relative error inf")


def test_nearly_constant_and_not_equivariant() -> None:
    """Small differences between images are no excuse for a large error."""

    class Corner(Constant):
        def forward(self, x: Tensor) -> Tensor:
            return 1.0 + 3e-4 * x[:, 0, :1, 0].tanh()

    report = equiflop.check(Corner())
    assert report.problems and report.verdict == "not equivariant" and 1e-5 < report.max_error < 1e-3


def test_barely_trained_weights_are_inconclusive() -> None:
    """What one epoch leaves: logits that hardly depend on the image."""
    model = small_vit(dtype=torch.float64)
    with torch.no_grad():
        model.head.bias.fill_(1.0)
        model.head.weight.mul_(1e-6)
    report = equiflop.check(model, randomize=False)
    assert report.verdict == "inconclusive" and not report.passed and report.max_error < report.tolerance
    assert "inconclusive: output is nearly the same for all images" in str(report)


@pytest.mark.parametrize("name", ["flop_deit3_small_patch16_224", "flop_resmlp_12_224", "flop_convnext_tiny"])
@pytest.mark.parametrize("options", [{}, {"out_indices": (0, -1)}, {"out_indices": 1}])
def test_features_only(name: str, options: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32}
    sizes |= {"num_blocks": 4} if "resmlp" in name else {"depth": 4, "num_heads": 2}
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)} if "convnext" in name else sizes
    backbone = timm.create_model(name, features_only=True, **sizes, **options)
    size = (64, 64) if "convnext" in name else None
    report = equiflop.check(backbone.double(), input_size=size)
    assert report.passed, str(report)
    compared = {row.what for row in report.rows}
    assert len(compared) == len(backbone.feature_info.channels()) and all("features" in what for what in compared)
    inner = backbone.model
    first = inner.stages[0] if "convnext" in name else inner.blocks[0]
    first.register_forward_hook(lambda module, args, output: output.relu())
    assert equiflop.check(backbone, input_size=size).verdict == "not equivariant"


def test_features_that_say_nothing_of_themselves() -> None:
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    plain = timm.create_model("deit3_small_patch16_224", features_only=True, **options)
    with pytest.raises(ValueError, match=r"model=VisionTransformer with features_only=True does not say how its feat"):
        equiflop.check(plain)
    with pytest.raises(ValueError, match="model=FeatureListNet returns a list, of which check knows no rule"):
        equiflop.check(timm.create_model("resnet18", features_only=True), input_size=(64, 64))
    backbone = timm.create_model("flop_deit3_small_patch16_224", features_only=True, **options)
    flat = timm.models._features.FeatureGetterNet(backbone.model, output_fmt="NLC", out_indices=[3])
    with pytest.raises(ValueError, match="output_fmt='NLC' of features_only=True is not compared; use 'NCHW'"):
        equiflop.check(flat)
    hybrid = timm.create_model("flop_hybrid_deit3_small_patch16_224", features_only=True, out_indices=(3,), **options)
    assert "nothing was compared" in equiflop.check(hybrid).problems[0]


@pytest.mark.parametrize("group", GROUP_ORDERS)
def test_a_model_inside_another(group: str) -> None:
    """Image size, channels and group are those that a part says."""
    inner = small_vit(group=group, in_chans=1)
    report = equiflop.check(nn.Sequential(inner, nn.Linear(inner.num_classes, 3)))
    assert report.passed and report.group.name == group, str(report)
    assert {row.what for row in report.rows} == {"output"}
    assert not equiflop.check(nn.Sequential(inner, nn.Linear(inner.num_classes, 3)), tolerance=0.0).passed


def test_unknown_input_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"input_size is not given, and neither Sequential nor a part of it says one"):
        equiflop.check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
    assert equiflop.check(timm.create_model("resnet18"), batch_size=2).verdict == "not equivariant"


class Landmarks(nn.Module):
    """One number for each of three places: the middle, the left and the right eye."""

    img_size = 8

    def __init__(self, output_rep: Any, swapped: bool = False) -> None:
        super().__init__()
        self.output_rep = output_rep
        self.swapped = swapped

    def forward(self, x: Tensor) -> Tensor:
        parts = [x.sum(-1), x[..., :4].sum(-1), x[..., 4:].sum(-1)]
        return torch.stack([part.square().mean((1, 2)) for part in parts], 1)


def test_output_channels_that_change_places() -> None:
    eyes = equiflop.Action.permuting(equiflop.groups.cyclic(2), [(0, 1, 2), (0, 2, 1)])
    stay = equiflop.Action.permuting(equiflop.groups.cyclic(2), [(0, 1, 2), (0, 1, 2)])
    assert equiflop.check(Landmarks(eyes)).passed
    assert equiflop.check(Landmarks(stay)).verdict == "not equivariant"
    assert equiflop.check(Landmarks(None)).verdict == "not equivariant"
    with pytest.raises(ValueError, match=r"output_rep=Action\(C2, order=2, dim=3\): check it with that|group='octic'"):
        equiflop.check(Landmarks(eyes), group="octic")


def test_an_invariant_function_passes() -> None:
    class Mean(nn.Module):
        img_size = 16

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2, 3))[:, None]

    assert equiflop.check(Mean(), group="octic").passed


def test_the_model_is_not_touched() -> None:
    model = small_vit().train()
    model.blocks[0].eval()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    equiflop.check(model)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(rng, torch.get_rng_state()), "the caller's random numbers were used up"


def test_reports_are_reproducible_and_depend_on_the_seed() -> None:
    model = small_vit()
    first, second, third = (equiflop.check(model, seed=seed) for seed in (0, 0, 1))
    assert first.as_dict() == second.as_dict()
    assert first.as_dict() != third.as_dict()


def test_report_as_text_and_json() -> None:
    report = equiflop.check(small_vit(group="octic"))
    assert isinstance(report, CheckReport)
    text = str(report)
    for words in ("identity", "quarter turn left", "half turn", "mirror left-right", "mirror at the diagonal /"):
        assert words in text
    assert "equivariant: largest relative error" in text and "tolerance 1e-05 (float32)" in text
    data = json.loads(json.dumps(report.as_dict()))
    assert data["passed"] is True and data["group"] == "octic" and len(data["elements"]) == 8
    assert data["max_error"] == pytest.approx(report.max_error)


def test_tolerance_and_input_size() -> None:
    model = small_vit(group="octic")
    assert not equiflop.check(model, tolerance=1e-12).passed
    assert equiflop.check(model, tolerance=1e-3).tolerance == 1e-3
    dynamic = small_vit(dynamic_img_size=True, group="octic", dtype=torch.float64)
    assert equiflop.check(dynamic, input_size=(48, 32)).passed
    assert equiflop.check(dynamic, input_size=(3, 32, 48)).passed
    gray = small_vit(in_chans=1)
    assert equiflop.check(gray).passed and equiflop.check(gray, input_size=(1, 32, 32)).passed
    for size in ((32,), (0, 32), (1, 2, 3, 4), "large"):
        with pytest.raises(ValueError, match="input_size"):
            equiflop.check(model, input_size=size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch_size=1 is too small"):
        equiflop.check(model, batch_size=1)
    with pytest.raises(ValueError, match="group='D4' is unknown"):
        equiflop.check(model, group="D4")
    with pytest.raises(ValueError, match="img_size"):
        equiflop.check(model, input_size=(40, 40))


@pytest.mark.parametrize("pool", ["", "avg"])
def test_models_without_pooling(pool: str) -> None:
    """Logits per token move with the tokens; that is equivariance, not its absence."""
    assert equiflop.check(small_vit(dtype=torch.float64, global_pool=pool)).passed


def test_models_without_parameters_pass_through() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double().mean((1, 2, 3))[:, None]

    report = equiflop.check(Mean(), input_size=(5, 5))
    assert report.dtype == torch.float32 and report.passed


def test_compiled_and_frozen_models() -> None:
    model = small_vit().requires_grad_(False)
    assert equiflop.check(model).passed
    compiled: Any = torch.compile(model, backend="eager")
    assert equiflop.check(compiled).passed


def test_randomised_parameters_are_of_order_one() -> None:
    model = small_vit()
    fresh = copy.deepcopy(model.state_dict())
    randomize_parameters(model, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, fresh[name]), name
        assert (parameter != 0).all() and torch.isfinite(parameter).all(), name
        if parameter.ndim == 1 and not name.endswith("bias"):
            assert parameter.min() >= 0.5 and parameter.max() <= 1.5, name
    logits = model(torch.randn(2, 3, 32, 32))
    assert 1e-2 < logits.abs().max() < 1e2


@pytest.mark.parametrize("problem", ["output is nearly the same for all images, so that it says nothing", None])
def test_command_ends_with_one_where_it_is_inconclusive(problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"input_size": (32, 32), "batch_size": 2}
    report = equiflop.check(small_vit(), **options)  # type: ignore[arg-type]
    report = CheckReport(report.group, report.dtype, report.tolerance, report.rows, (problem,) if problem else ())
    monkeypatch.setattr(equiflop, "check", lambda *args, **kwargs: report)
    small = [f"--set={name}={value}" for name, value in (("depth", 1), ("embed_dim", 32), ("num_heads", 2))]
    result = CliRunner().invoke(check_command, ["flop_deit3_tiny_patch16_224", *small])
    assert result.exit_code == (1 if problem else 0), result.output
    assert ("inconclusive: output is nearly the same for all images: largest" in result.output) == bool(problem)
    as_json = CliRunner().invoke(check_command, ["flop_deit3_tiny_patch16_224", *small, "--json"])
    assert json.loads(as_json.output)["verdict"] == ("inconclusive" if problem else "equivariant")
