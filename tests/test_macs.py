"""macs() against formulas written out for whole networks, against torch's counter, and where it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import equiflop
from oracles import IMAGE_GROUPS, image_group
from small_vits import DESIGNS, small_vit

#: MACs of a map between regular Reps over those of a dense one: sum of d^3 / (e |G|^2).
SHARE = {
    "flop": Fraction(1, 2), "updown": Fraction(1, 2), "flips": Fraction(1, 4), "rot4": Fraction(3, 8),
    "octic": Fraction(3, 16),
}  # fmt: skip


def vit_macs(
    group: str | None,
    size: tuple[int, int],
    patch: int,
    width: int,
    depth: int,
    *,
    equivariant_depth: int | None = None,
    classes: int = 7,
    chans: int = 3,
    prefix: int = 1,
    mlp_ratio: float = 4.0,
    head_width: int | None = None,
) -> int:
    """Multiply-adds of a ViT, by hand: patches, q/k/v, q k^T and a v, projection, MLP, head. ``group=None``: plain."""
    patches = (size[0] // patch) * (size[1] // patch)
    tokens = patches + prefix
    share = SHARE[group] if group else Fraction(1)
    embed = share
    if group == "octic" and patch % 2:
        embed = share - Fraction(1, 16 * patch**2)
    hidden = int(width * mlp_ratio)
    total = Fraction(patches * chans * patch**2 * width) * embed
    for block in range(depth):
        here = share if equivariant_depth is None or block < equivariant_depth else Fraction(1)
        total += here * tokens * (4 * width * width + 2 * width * hidden)
        total += 2 * tokens * tokens * width
    order = image_group(group).order if group else 1
    total += classes * (width // order if head_width is None else head_width)
    assert total.denominator == 1
    return int(total)


@given(
    group=st.sampled_from([None, "flop", "octic", "flips"]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.sampled_from([4, 5, 8]),
    width=st.sampled_from([16, 32, 64]),
    depth=st.integers(1, 3),
    chans=st.integers(1, 4),
)
@settings(max_examples=40)
def test_equals_the_formula(
    group: str | None, rows: int, columns: int, patch: int, width: int, depth: int, chans: int
) -> None:
    columns = rows if group == "octic" else columns
    if group == "flips" and patch % 2:
        patch += 1  # odd patches of both flips have shares of their own; see the tests of grids
    size = (rows * patch, columns * patch)
    name = DESIGNS["equivariant"] if group else "deit3_small_patch16_224"
    options: dict[str, Any] = {"embed_dim": width, "depth": depth, "num_heads": 2, "num_classes": 7, "in_chans": chans}
    options |= {"group": group} if group else {}
    model = timm.create_model(name, img_size=size, patch_size=patch, device="meta", **options)
    assert equiflop.macs(model, size) == vit_macs(group, size, patch, width, depth, chans=chans)


@pytest.mark.parametrize("group", IMAGE_GROUPS)
def test_options_that_change_the_count(group: str) -> None:
    def count(**kwargs: Any) -> int:
        return equiflop.macs(small_vit(group=group, **kwargs), (32, 32))

    def by_hand(**kwargs: Any) -> int:
        return vit_macs(group, (32, 32), 8, 32, 2, **kwargs)

    assert count() == by_hand()
    assert count(reg_tokens=3) == by_hand(prefix=4)
    assert count(class_token=False, global_pool="avg") == by_hand(prefix=0)
    assert count(num_classes=0) == by_hand(classes=0)
    assert count(mlp_ratio=2.0) == by_hand(mlp_ratio=2.0)
    assert count(invariants="norm") == by_hand(head_width=sum(small_vit(group=group).rep.multiplicities))
    assert count(qkv_bias=False, init_values=None) == by_hand()


@pytest.mark.parametrize("design", ["hybrid", "invariant"])
def test_half_equivariant(design: str) -> None:
    model = small_vit(DESIGNS[design])
    assert equiflop.macs(model, (32, 32)) == vit_macs("flop", (32, 32), 8, 32, 4, equivariant_depth=2, head_width=32)
    octic = small_vit(DESIGNS[design], group="octic")
    expected = vit_macs("octic", (32, 32), 8, 32, 4, equivariant_depth=2, head_width=32)
    projection = 17 * 24 * 32 if design == "invariant" else 0
    assert equiflop.macs(octic, (32, 32)) == expected + projection


def test_transforms_by_products_are_counted(transforms_by_products: Callable[[], None]) -> None:
    """Where the Fourier transforms are matrix products they cost |G| per channel, back and forth."""
    fast = equiflop.macs(small_vit(), (32, 32))
    transforms_by_products()
    assert equiflop.macs(small_vit(), (32, 32)) == fast + 2 * 17 * 2 * 2 * 128


@pytest.mark.parametrize(
    "name",
    [
        "deit3_small_patch16_224",
        "resnet18",
        "convnext_atto",
        "resmlp_12_224",
        "mobilenetv3_small_050",
        "vgg11",
        "mixer_s32_224",
    ],
)
def test_plain_networks_agree_with_torchs_counter(name: str) -> None:
    model = timm.create_model(name).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # torch's counter does not see fused attention on the CPU
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert equiflop.macs(model, (224, 224)) * 2 == counter.get_total_flops()


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("group", ["flop", "octic"])
def test_equivariant_networks_agree_with_torchs_counter(
    design: str, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v

    model = small_vit(DESIGNS[design], group=group)
    expected = equiflop.macs(model, (32, 32))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert expected * 2 == counter.get_total_flops()


def test_fused_and_unfused_attention_count_the_same() -> None:
    model = timm.create_model("deit3_small_patch16_224", depth=2)
    fused = equiflop.macs(model, (224, 224))
    for block in model.blocks:
        block.attn.fused_attn = not block.attn.fused_attn
    assert equiflop.macs(model, (224, 224)) == fused


def test_input_size_forms() -> None:
    model = small_vit(in_chans=1)
    assert equiflop.macs(model, (32, 32)) == equiflop.macs(model, (1, 32, 32)) == equiflop.macs(model, [32, 32])  # type: ignore[arg-type]
    dynamic = small_vit(dynamic_img_size=True)
    assert equiflop.macs(dynamic, (48, 40)) == vit_macs("flop", (48, 40), 8, 32, 2)
    for size in ((32,), (2, 3, 32, 32), (0, 32), (-1, 32), 32, "32x32", None):
        with pytest.raises(ValueError, match=r"input_size=.*\(height, width\) or \(channels, height, width\)"):
            equiflop.macs(model, size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="img_size 32x32"):
        equiflop.macs(model, (40, 40))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_device_and_dtype(device: str, dtype: torch.dtype) -> None:
    model = small_vit(dtype=dtype).to(device)
    assert equiflop.macs(model, (32, 32)) == vit_macs("flop", (32, 32), 8, 32, 2)


def test_training_mode_is_restored_and_nothing_else_changes() -> None:
    model = small_vit(drop_path_rate=0.2).train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    expected = vit_macs("flop", (32, 32), 8, 32, 2)
    assert equiflop.macs(model, (32, 32)) == expected
    assert modes == [module.training for module in model.modules()]
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="img_size"):
        equiflop.macs(model, (40, 40))
    assert modes == [module.training for module in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_batch_norm_statistics_survive() -> None:
    model = timm.create_model("resnet18").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    equiflop.macs(model, (64, 64))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Uncounted(nn.Module):
    """A module of a user's own that multiplies by a matrix in some way."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(12, 12))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.flatten(1), self.weight)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": lambda x, w: x @ w,
    "F.linear": torch.nn.functional.linear,
    "einsum": lambda x, w: torch.einsum("bi,io->bo", x, w),
    "bmm": lambda x, w: torch.bmm(x[None], w[None])[0],
    "baddbmm": lambda x, w: torch.baddbmm(x[None], x[None], w[None])[0],
    "addmm": lambda x, w: torch.addmm(x, x, w),
    "mv": lambda x, w: torch.mv(w, x[0]),
    "dot": lambda x, w: torch.dot(x[0], w[0]),
    "conv1d": lambda x, w: torch.nn.functional.conv1d(x[:, None], w[:1, None, :3]),
    "conv2d": lambda x, w: torch.nn.functional.conv2d(x.view(-1, 3, 2, 2), w[:, :3, None, None]),
    "conv_transpose2d": lambda x, w: torch.nn.functional.conv_transpose2d(x.view(-1, 3, 2, 2), w[:3, :, None, None]),
    "bilinear": lambda x, w: torch.nn.functional.bilinear(x, x, w[None]),
    "addbmm": lambda x, w: torch.addbmm(x, x[None], w[None]),
    "tensordot": lambda x, w: torch.tensordot(x, w, 1),
    "chain": lambda x, w: torch.linalg.multi_dot([x, w, w]),
    "attention": lambda x, w: torch.nn.functional.scaled_dot_product_attention(
        *x.view(-1, 1, 3, 4).expand(3, -1, 1, 3, 4)
    ),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_without_a_counter_are_errors(product: str) -> None:
    model = nn.Sequential(nn.Identity(), Uncounted(PRODUCTS[product]))
    with pytest.raises(ValueError, match=r"'1' .*Uncounted.*counter"):
        equiflop.macs(model, (3, 2, 2))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
    "gru": lambda: nn.GRU(4, 4, batch_first=True),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
}


@pytest.mark.parametrize("name", MODULES)
def test_torchs_own_composite_modules_are_errors_or_counted_never_0(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MODULES[name]()

        def forward(self, x: Tensor) -> Tensor:
            tokens = x[:, 0]
            return self.inner(tokens, tokens, tokens)[0] if name == "attention" else self.inner(tokens)

    with pytest.raises(ValueError, match="counter"):
        equiflop.macs(Net(), (1, 3, 4))


def test_networks_with_uncounted_modules_are_errors() -> None:
    with pytest.raises(ValueError, match="WindowAttention"):
        equiflop.macs(timm.create_model("swin_tiny_patch4_window7_224"), (224, 224))


def test_a_subclass_that_computes_more_is_an_error() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    with pytest.raises(ValueError, match="Twice"):
        equiflop.macs(nn.Sequential(nn.Flatten(), Twice(12, 12)), (3, 2, 2))


def test_a_patched_linear_is_an_error() -> None:
    """A counter that does not fit what is really computed is not believed."""
    linear = nn.Linear(12, 12)
    linear.forward = lambda x: x @ linear.weight @ linear.weight  # type: ignore[assignment, method-assign]
    with pytest.raises(ValueError, match="MACs where its counter says"):
        equiflop.macs(nn.Sequential(nn.Flatten(), linear), (3, 2, 2))


def test_shared_modules_count_every_time() -> None:
    linear = nn.Linear(12, 12)
    assert equiflop.macs(nn.Sequential(nn.Flatten(), linear, linear, linear), (3, 2, 2)) == 3 * 144


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (nn.Conv2d(3, 8, 3), 6 * 6 * 8 * 27),
        (nn.Conv2d(3, 8, 3, padding=1), 8 * 8 * 8 * 27),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), 4 * 4 * 8 * 27),
        (nn.Conv2d(3, 8, 3, padding="same"), 8 * 8 * 8 * 27),
        (nn.Conv2d(3, 8, 3, padding="valid", dilation=2), 4 * 4 * 8 * 27),
        (nn.Conv2d(3, 6, (1, 3), groups=3), 8 * 6 * 6 * 3),
        (nn.Conv2d(3, 8, 4, stride=4), 2 * 2 * 8 * 48),
    ],
)
def test_convolutions(conv: nn.Conv2d, expected: int) -> None:
    assert equiflop.macs(conv, (8, 8)) == expected


def test_no_products_is_zero() -> None:
    assert equiflop.macs(nn.ReLU(), (8, 8)) == 0


def test_compiled_model() -> None:
    model = small_vit()
    compiled: Any = torch.compile(model, backend="eager")
    assert equiflop.macs(compiled, (32, 32)) == equiflop.macs(model, (32, 32))
