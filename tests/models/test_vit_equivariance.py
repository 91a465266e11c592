"""E(ViT)s are equivariant: every option, group, size and dtype, before and after training."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from equiflop import ImageGroup
from equiflop.groups import direct_product, flop
from equiflop.models import EquivariantVisionTransformer
from oracles import IMAGE_GROUPS, move_tensor, relative_error, scramble
from small_vits import DESIGNS, images_for, scrambled, small_vit, worst_error

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "average pooling": {"global_pool": "avg"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no pooling": {"global_pool": ""},
    "registers": {"reg_tokens": 3},
    "registers, average over all tokens": {"reg_tokens": 2, "global_pool": "avg", "pool_include_prefix": True},
    "fc_norm": {"fc_norm": True},
    "no fc_norm": {"fc_norm": False, "global_pool": "avg"},
    "pre_norm": {"pre_norm": True},
    "no final norm": {"final_norm": False},
    "class token has a position": {"no_embed_class": False, "reg_tokens": 1},
    "no layer scale": {"init_values": None},
    "no qkv bias": {"qkv_bias": False},
    "no projection bias": {"proj_bias": False},
    "no position embedding": {"pos_embed": "none"},
    "narrow mlp": {"mlp_ratio": 2.0},
    "gray images": {"in_chans": 1},
    "relu": {"act_layer": "relu"},
    "odd grid": {"img_size": 40},
    "odd patches": {"img_size": 35, "patch_size": 5},
    "one token": {"img_size": 8},
    "four heads": {"num_heads": 4},
    "dropout in training only": {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "pos_drop_rate": 0.2, "drop_rate": 0.2},
    "stochastic depth": {"drop_path_rate": 0.3},
}


def size_of(options: dict[str, Any]) -> tuple[int, int]:
    size = options.get("img_size", 32)
    return (size, size) if isinstance(size, int) else size


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("group", ["flop", "octic"])
def test_every_option(design: str, options: str, group: str) -> None:
    kwargs = OPTIONS[options]
    width = 64 if kwargs.get("num_heads") == 4 else 32
    model = small_vit(DESIGNS[design], torch.float64, group=group, embed_dim=width, **kwargs)
    assert worst_error(scrambled(model), group, size_of(kwargs)) < 1e-12


@pytest.mark.parametrize("invariants", ["trivial", "norm", "magnitudes", "power_spectrum", "polynomial"])
@pytest.mark.parametrize("design", ["equivariant", "invariant"])
@pytest.mark.parametrize("group", IMAGE_GROUPS)
def test_invariants(group: str, design: str, invariants: str) -> None:
    model = small_vit(DESIGNS[design], torch.float64, group=group, invariants=invariants)
    assert worst_error(scrambled(model), group) < 1e-12


@pytest.mark.parametrize("design", ["equivariant", "invariant"])
@pytest.mark.parametrize(
    ("group", "multiplicities"),
    [("flop", (8, 24)), ("flop", (28, 4)), ("octic", (6, 2, 4, 0, 10)), ("rot4", (2, 6, 12))],
)
def test_any_share_of_every_irrep(group: str, multiplicities: tuple[int, ...], design: str) -> None:
    model = small_vit(DESIGNS[design], torch.float64, group=group, multiplicities=multiplicities)
    assert model.rep.multiplicities == multiplicities
    assert worst_error(scrambled(model), group) < 1e-12
    first = model.blocks[0]
    _, invariant = first.attn.proj.weights()[0]
    assert invariant.shape == (multiplicities[0], multiplicities[0])
    assert first.mlp.fc1.out_rep.regular_copies  # a nonlinearity in the spatial domain needs all irreps alike


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("group", IMAGE_GROUPS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_every_group_and_dtype(group: str, design: str, dtype: torch.dtype, tolerance: float) -> None:
    model = small_vit(DESIGNS[design], dtype, group=group)
    # A fresh model sees little of the image through layer scales of 1e-4.
    assert worst_error(model, group, spread=0.0) < tolerance
    assert worst_error(scrambled(model), group) < tolerance


@pytest.mark.parametrize("group", ["flop", "updown", "flips"])
@pytest.mark.parametrize("size", [(224, 224), (240, 240), (256, 192), (208, 240)])
def test_patch_16_sizes(group: str, size: tuple[int, int]) -> None:
    for name in DESIGNS.values():
        model = small_vit(name, torch.float64, group=group, patch_size=16, img_size=size)
        assert worst_error(scrambled(model), group, size) < 1e-12


@pytest.mark.parametrize("group", ["rot4", "octic"])
@pytest.mark.parametrize("size", [224, 240])
def test_patch_16_square_sizes(group: str, size: int) -> None:
    for name in DESIGNS.values():
        model = small_vit(name, torch.float64, group=group, patch_size=16, img_size=size)
        assert worst_error(scrambled(model), group, (size, size)) < 1e-12


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("group", IMAGE_GROUPS)
def test_dynamic_sizes(design: str, group: str) -> None:
    model = scrambled(small_vit(DESIGNS[design], torch.float64, group=group, dynamic_img_size=True))
    for size in ((32, 32), (40, 40), (24, 24), (48, 32), (24, 40)):
        assert dynamic_error(model, group, size) < 1e-12, size
    strict = small_vit(DESIGNS[design], torch.float64, group=group)
    strict.load_state_dict(model.state_dict())
    images = images_for(model)
    assert relative_error(model(images), strict(images)) < 1e-13


@torch.no_grad()
def dynamic_error(model: Any, group: str, size: tuple[int, int]) -> float:
    if size[0] == size[1] or not model.group.swaps_axes:
        return worst_error(model, group, size)
    images = images_for(model, size)
    if model.design == "hybrid":
        return 0.0  # its logits are not invariant; the features of non-square grids are compared by check
    expected = model(images)
    moved = [model(move_tensor(group, a, images)) for a in range(model.group.order)]
    return max(relative_error(value, expected) for value in moved)


def test_hybrid_logits_are_not_invariant() -> None:
    """Which is why its head sees more; and it shows that the comparison above can fail."""
    model = scrambled(small_vit(DESIGNS["hybrid"], torch.float64))
    assert model.invariant_output is False
    images = images_for(model)
    assert relative_error(model(images.flip(-1)), model(images)) > 1e-3


def test_the_wrong_group_is_noticed() -> None:
    model = scrambled(small_vit(dtype=torch.float64, group="updown"))
    images = images_for(model)
    assert relative_error(model(images.flip(-2)), model(images)) < 1e-12
    assert relative_error(model(images.flip(-1)), model(images)) > 1e-3


def test_plain_vit_is_not_invariant() -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
    model = scramble(timm.create_model("deit3_small_patch16_224", **options).double().eval())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert relative_error(model(images.flip(-1)), model(images)) > 1e-3


TRAINED = [("equivariant", group) for group in IMAGE_GROUPS] + [("hybrid", "flop"), ("invariant", "flop")]


@pytest.mark.parametrize(("design", "group"), TRAINED)
def test_stays_equivariant_under_training(design: str, group: str) -> None:
    """50 steps of AdamW with weight decay on all parameters; the constraints hold by construction."""
    options: dict[str, Any] = {"group": group, "img_size": 40, "reg_tokens": 1, "no_embed_class": False}
    model = small_vit(DESIGNS[design], init_values=0.1, drop_path_rate=0.1, proj_drop_rate=0.1, **options).train()
    fresh = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    images, labels = torch.randn(8, 3, 40, 40), torch.arange(8) % 7
    first = last = 0.0
    for step in range(50):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item(), loss.item()) if step == 0 else (first, loss.item())
    assert last < first
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, fresh[name]), name
    model.eval()
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)):
        trained = small_vit(DESIGNS[design], init_values=0.1, **options)
        trained.load_state_dict(model.state_dict())
        assert worst_error(trained.to(dtype), group, (40, 40)) < tolerance


def test_a_group_of_ones_own() -> None:
    """Mirrors at both diagonals: no name, no line of code in the model."""
    identity = [[1, 0], [0, 1]]
    slash, backslash, turn = [[0, 1], [1, 0]], [[0, -1], [-1, 0]], [[-1, 0], [0, -1]]
    group = ImageGroup(direct_product(flop(), flop()), [identity, slash, backslash, turn], "diagonals")
    model = EquivariantVisionTransformer(
        32, 8, embed_dim=32, depth=2, num_heads=2, num_classes=5, group=group, dtype=torch.float64
    )
    scramble(model).eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert relative_error(model(images.mT), model(images)) < 1e-12
    assert relative_error(model(images.mT.flip(-1, -2)), model(images)) < 1e-12
    assert relative_error(model(images.flip(-1)), model(images)) > 1e-3


@pytest.mark.parametrize(("depth", "equivariant_depth"), [(3, 0), (3, 1), (3, 3), (2, None)])
@pytest.mark.parametrize("design", ["hybrid", "invariant"])
@pytest.mark.parametrize("group", ["flop", "octic"])
def test_equivariant_depth(depth: int, equivariant_depth: int | None, design: str, group: str) -> None:
    model = small_vit(DESIGNS[design], torch.float64, depth=depth, equivariant_depth=equivariant_depth, group=group)
    from equiflop.nn import Block

    expected = depth // 2 if equivariant_depth is None else equivariant_depth
    assert [isinstance(block, Block) for block in model.blocks] == [i < expected for i in range(depth)]
    assert worst_error(scrambled(model), group) < 1e-12


@pytest.mark.parametrize("group", IMAGE_GROUPS)
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("size", [(40, 40), (48, 48), (24, 48)])
def test_set_input_size(group: str, design: str, size: tuple[int, int]) -> None:
    model = scrambled(small_vit(DESIGNS[design], torch.float64, group=group, reg_tokens=1, no_embed_class=False))
    if size[0] != size[1] and model.group.swaps_axes:
        with pytest.raises(ValueError, match=r"not square.*flips"):
            model.set_input_size(img_size=size)
        return
    model.set_input_size(img_size=size)
    assert model.patch_embed.grid_size == (size[0] // 8, size[1] // 8)
    assert model.pos_embed.grid_size == model.patch_embed.grid_size
    assert worst_error(model, group, size) < 1e-12
    with pytest.raises(ValueError, match="32x32"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
