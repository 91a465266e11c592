"""Twins in the hands of timm and PyTorch: what their users do with any network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models._features_fx import FeatureGraphNet
from torch import Tensor, nn

import equiflop
from equiflop.models.twin import twin

#: One of every class of networks and of every kind of block.
NAMES = (
    "vit_base_patch16_siglip_224",
    "vit_pwee_patch16_reg1_gap_256",
    "deit_tiny_distilled_patch16_224",
    "eva02_base_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_rope_mixed_ape_224",
    "beit_base_patch16_224",
    "vit_relpos_base_patch16_cls_224",
    "vit_srelpos_small_patch16_224",
    "naflexvit_base_patch16_gap",
    "samvit_base_patch16",
)
every_kind = pytest.mark.parametrize("name", NAMES)


def fresh(name: str, **options: Any) -> Any:
    """A twin of three patches by three, two blocks deep."""
    patch = 14 if "patch14" in name else 16
    size: dict[str, Any] = {"pos_embed_grid_size": (3, 3)} if "naflex" in name else {"img_size": 3 * patch}
    if "samvit" in name:
        size |= {"neck_chans": 16, "window_size": 2, "global_attn_indexes": (1,)}
    return twin(name, **{"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 3.0, **size, **options})


def small(name: str, **options: Any) -> Any:
    """Its parameters of order one."""
    made = fresh(name, **options)
    generator = torch.Generator().manual_seed(0)
    equiflop.checking.randomize_parameters(made, generator)
    return made.eval()


def images(made: Any, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    height, width = (3 * side for side in made.embedding.patch_size)
    return torch.randn(batch, 3, height, width, dtype=dtype)


@every_kind
def test_backward_reaches_every_parameter(name: str) -> None:
    made = small(name).train()
    output = made(images(made))
    output.square().mean().backward()
    unreached = {path for path, parameter in made.named_parameters() if parameter.grad is None}
    assert unreached == set()


@every_kind
def test_a_folder_for_the_hub_loads_again(name: str, tmp_path: Path) -> None:
    made = small(name, num_classes=7)
    made.reset_classifier(5)
    timm.models.save_for_hf(made, tmp_path, model_config={"num_classes": 5})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(again) is type(made)
    x = images(made)
    torch.testing.assert_close(again(x), made(x))
    features = timm.create_model(
        f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=(0, 1)
    ).eval()
    assert [output.shape[1] for output in features(x)] == features.feature_info.channels()


def test_the_twin_of_a_network_loads_again_where_timm_can_make_that_network(tmp_path: Path) -> None:
    plain = timm.create_model("beit_base_patch16_224", img_size=48, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    with pytest.warns(equiflop.EquiflopWarning, match="untrained"):
        made = twin(plain, "updown").eval()
    timm.models.save_for_hf(made, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.group.name == "updown"
    x = images(made)
    torch.testing.assert_close(again(x), made(x))


def test_a_network_with_dropouts_and_one_that_was_changed(tmp_path: Path) -> None:
    """The twin of what timm can make again loads; of what it cannot, saving keeps a name that does not load wrongly."""
    options: dict[str, Any] = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False}
    plain = timm.create_model("vit_small_patch16_224", drop_path_rate=0.1, global_pool="avg", **options)
    with pytest.warns(equiflop.EquiflopWarning, match="untrained"):
        made = twin(plain).eval()
    timm.models.save_for_hf(made, tmp_path / "a")
    again = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()
    x = images(made)[..., :32, :32]
    torch.testing.assert_close(again(x), made(x))
    plain.pool_include_prefix = True
    with pytest.warns(equiflop.EquiflopWarning, match="untrained"):
        changed = twin(plain)
    timm.models.save_for_hf(changed, tmp_path / "b")
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_base_patch14_224"])
@pytest.mark.filterwarnings("ignore:loading weights of another model:equiflop.EquiflopWarning")
def test_weights_of_another_image_size_and_other_classes(name: str, tmp_path: Path) -> None:
    made = small(name, num_classes=5)
    timm.models.save_for_hf(made, tmp_path)
    side = made.embedding.patch_size[0]
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=4 * side, num_classes=3).eval()
    assert again(torch.randn(1, 3, 4 * side, 4 * side)).shape == (1, 3)
    assert equiflop.check(again.double(), randomize=False).max_error < 1e-12


@every_kind
def test_made_without_memory_and_given_its_weights(name: str) -> None:
    made = small(name)
    empty = fresh(name, device="meta")
    empty.load_state_dict(made.state_dict(), assign=True)
    x = images(made)
    torch.testing.assert_close(empty.eval()(x), made(x))


@every_kind
def test_deep_copies_and_state_dicts(name: str) -> None:
    made = small(name)
    x = images(made)
    expected = made(x)
    torch.testing.assert_close(copy.deepcopy(made)(x), expected)
    other = small(name)
    nn.init.constant_(next(other.parameters()), 0.0)
    other.load_state_dict(made.state_dict(), strict=True)
    torch.testing.assert_close(other(x), expected)


@every_kind
def test_features_by_a_symbolic_trace(name: str) -> None:
    made = small(name)
    x = images(made)
    outputs = FeatureGraphNet(made, (0, 1))(x)
    seen: list[Tensor] = []
    for block in made.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    made(x)
    for output, expected in zip(outputs, seen, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@every_kind
def test_export(name: str) -> None:
    made = small(name)
    x = images(made)
    exported = torch.export.export(made, (x,)).module()
    torch.testing.assert_close(exported(x), made(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every_kind
def test_compile(name: str) -> None:
    made = small(name)
    x = images(made)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(made, fullgraph=True)(x), made(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@every_kind
def test_jit_trace(name: str) -> None:
    made = small(name)
    x = images(made)
    with torch.no_grad():
        traced = torch.jit.trace(made, x, check_trace=False)
        torch.testing.assert_close(traced(x), made(x), rtol=1e-4, atol=1e-5)


@every_kind
def test_half_precision(name: str) -> None:
    made = small(name)
    x = images(made)
    half = made.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()
    mirrored = made(x.flip(-1).bfloat16())
    assert (mirrored - half).abs().max() < 0.1 * half.abs().max()


@every_kind
def test_gradient_checkpointing(name: str) -> None:
    made = small(name)
    x = images(made)
    made(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in made.parameters()]
    made.zero_grad()
    made.set_grad_checkpointing()
    made(x).sum().backward()
    for parameter, gradient in zip(made.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", ["flop", "octic"])
def test_tokens_of_any_image_size(group: str) -> None:
    """DINOv3: rotary tables of any grid, turned grids included."""
    made = small("vit_small_patch16_dinov3", group=group, num_heads=8, embed_dim=64).double()
    for size in ((48, 80), (32, 16), (16, 16)):
        assert equiflop.check(made, input_size=size).max_error < 1e-12


def test_any_image_size_with_a_position_embedding_as_well() -> None:
    made = small("eva02_base_patch14_224", dynamic_img_size=True).double()
    assert equiflop.check(made, input_size=(28, 70)).max_error < 1e-12


@pytest.mark.parametrize("name", ["eva02_base_patch14_224", "vit_base_patch16_rope_mixed_ape_224"])
def test_patches_are_dropped_with_their_positions(name: str) -> None:
    made = small(name, patch_drop_rate=0.5).train()
    made(images(made)).sum().backward()
    assert torch.isfinite(made(images(made))).all()
    assert equiflop.check(made.double()).max_error < 1e-12


def test_a_token_stays_invariant_under_an_optimiser() -> None:
    """Tokens, layer scales and biases are stored tied, so that no step breaks the symmetry."""
    made = small("beit_base_patch16_224", depth=2).double().train()
    optimiser = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        made(images(made, dtype=torch.float64)).square().mean().backward()
        optimiser.step()
    assert equiflop.check(made, randomize=False).max_error < 1e-12


@pytest.mark.parametrize("group", ["flop", "rot4"])
@pytest.mark.parametrize("name", ["vit_giant_patch14_dinov2", "aimv2_large_patch14_224", "eva02_base_patch14_224"])
def test_gates_start_as_in_timm(name: str, group: str) -> None:
    """Gates of a fresh network: one for ViTs with biases, nothing for those without, in EVA like other linear maps."""
    options: dict[str, Any] = {"img_size": 42, "embed_dim": 64, "depth": 1, "num_heads": 4, "mlp_ratio": 2.0}
    x = torch.randn(5, 64)
    gates = []
    networks: list[Any] = [timm.create_model(name, **options), twin(name, group, **options)]
    for network in networks:
        mlp = network.blocks[0].mlp
        gate = mlp.fc1_g(x) if hasattr(mlp, "fc1_g") else mlp.fc1(x).chunk(2, dim=-1)[1]
        gates.append((gate.mean().item(), gate.std().item()))
    assert gates[0][0] == pytest.approx(gates[1][0], abs=2e-2)
    assert (gates[0][1] < 1e-3) == (gates[1][1] < 1e-3) == (not name.startswith("eva"))


def test_one_draw_of_rotary_positions_for_all_copies() -> None:
    """Shifted and scaled positions in training: the same for the image and for the turned image."""
    augment = {"rope_shift_coords": 0.5, "rope_jitter_coords": 1.5, "rope_rescale_coords": 2.0}
    made = small("vit_small_patch16_dinov3", group="rot4", num_heads=4, embed_dim=64, **augment).double().train()
    x = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    outputs = []
    for view in (x, x.rot90(1, (-2, -1))):
        torch.manual_seed(0)
        outputs.append(made(view))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-10)


def test_how_strong_tokens_start() -> None:
    made = fresh("naflexvit_base_patch16_gap", token_std=1.0)
    assert made.embeds.pos_embed()[0].std() > 0.5
    post_norm = fresh("vit_base_patch16_rpn_224", init_values=1e-5)
    assert (post_norm.blocks[0].norm1.weight == 1e-5).all()
    parallel = timm.models.vision_transformer.ParallelScalingBlock
    assert fresh("naflexvit_base_patch16_gap", block_fn=parallel, fix_init=True).fix_init
