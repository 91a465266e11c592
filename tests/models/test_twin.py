"""Twins of timm's vision transformers: the same architecture, or a refusal."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerNorm, LayerScale
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import equiflop
from equiflop import EquiflopWarning
from equiflop.image_group import named_image_group
from equiflop.models import EquivariantVisionTransformer
from equiflop.models.twin import twin
from oracles import relative_error, scramble
from plain_weights import TRIVIAL, plain_weights

#: Names of timm, each for something that the others lack, and how they are made small.
FAMILIES: dict[str, dict[str, Any]] = {
    "vit_small_patch16_224.augreg_in1k": {"img_size": 64},
    "vit_base_patch16_224_miil": {"img_size": 48},  # no bias of queries, keys and values
    "vit_base_patch16_224.mae": {"img_size": 48, "num_classes": 7},
    "flexivit_small": {"img_size": 48},  # position embedding of the patches alone
    "deit3_small_patch16_224": {"img_size": 64},  # layer scale
    "vit_small_patch14_dinov2": {"img_size": 42},
    "vit_small_patch14_reg4_dinov2": {"img_size": 42},  # register tokens
    "vit_base_patch16_clip_224": {"img_size": 64},  # norm behind the embedding, no bias before it, eps 1e-5
    "vit_base_patch16_clip_quickgelu_224": {"img_size": 64},
    "vit_medium_patch16_gap_240": {"img_size": 48},  # no class token, mean of the tokens, then the norm
    "vit_base_patch16_siglip_gap_224": {"img_size": 64},  # norm before the mean
    "vit_base_patch32_siglip_gap_256": {"img_size": 96},  # GELU by tanh
    "vit_medium_patch16_reg1_gap_256": {"img_size": 64},  # register, no class token
    "eva_large_patch14_196": {"img_size": 42},  # class token, yet the mean
    "vit_intern300m_patch14_448": {"img_size": 56},  # any image size, no final norm
    "vit_base_patch16_radio_v3": {"img_size": 64},  # eight class-like tokens, no final norm
    "test_vit2": {"img_size": 48},  # any image size, register and class token
    "vit_base_patch16_siglip_224": {"img_size": 64},  # pooling by attention
    "vit_small_patch16_18x2_224": {"img_size": 48},  # attentions and MLPs in parallel
    "vit_base_patch16_rpn_224": {"img_size": 48},  # norms behind attention and MLP
    "vit_pwee_patch16_reg1_gap_256": {"img_size": 48},  # attention and MLP in parallel, norms of queries and keys
    "vit_base_patch16_xp_224": {"img_size": 48},  # the same with projections of their own
    "vit_dwee_patch16_reg1_gap_256": {"img_size": 48},  # differential attention
    "vit_dpwee_patch16_reg1_gap_256": {"img_size": 48},
    "vit_giant_patch14_dinov2": {"img_size": 42},  # packed SwiGLU
    "beit3_base_patch16_224": {"img_size": 48},  # norms inside attention and MLP
    "aimv2_large_patch14_224": {"img_size": 42},  # norm in the patch embedding, RMS norms, SwiGLU
    "test_vit4": {"img_size": 48},
    "deit_tiny_distilled_patch16_224": {"img_size": 48},
    "eva_giant_patch14_224": {"img_size": 42},  # biases of queries and values alone
    "eva02_base_patch14_224": {"img_size": 42},  # rotary embedding, norm inside SwiGLU
    "eva02_small_patch14_224": {"img_size": 42},
    "eva02_enormous_patch14_clip_224": {"img_size": 42},  # norms behind attention and MLP
    "vit_small_patch16_dinov3": {"img_size": 48},  # any image size
    "vit_7b_patch16_dinov3": {"img_size": 48},
    "vit_base_patch16_rope_224": {"img_size": 48},
    "vit_base_patch16_rope_mixed_ape_224": {"img_size": 48},  # learned frequencies of every head
    "vit_pe_core_base_patch16_224": {"img_size": 48},
    "vit_base_patch16_sapiens2": {"img_size": 48, "num_kv_heads": 2},
    "beit_base_patch16_224": {"img_size": 48},  # relative position bias by a table
    "vit_relpos_base_patch16_cls_224": {"img_size": 48},  # and by an MLP
    "vit_relpos_medium_patch16_rpn_224": {"img_size": 48},
    "vit_srelpos_small_patch16_224": {"img_size": 48},  # shared by all blocks
    "naflexvit_base_patch16_gap": {"pos_embed_grid_size": (3, 3)},
    "naflexvit_base_patch16_siglip": {"pos_embed_grid_size": (3, 3)},
    "naflexvit_base_patch16_radio_v3": {"pos_embed_grid_size": (3, 3)},
    # windows that do not divide the grid, relative positions along both axes, a neck
    "samvit_base_patch16": {"img_size": 48, "num_classes": 5, "window_size": 2, "global_attn_indexes": (1,)},
    "samvit_base_patch16_224": {"img_size": 48, "window_size": 2, "global_attn_indexes": (1,)},
}
#: timm's modules of vision transformers.
MODULES = (
    "vision_transformer",
    "deit",
    "eva",
    "beit",
    "vision_transformer_relpos",
    "vision_transformer_sam",
    "naflexvit",
)
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 3.0}

#: A twin of a network with weights, or of a tag, warns; what it says is tested by itself.
pytestmark = pytest.mark.filterwarnings("ignore:the twin is untrained:equiflop.EquiflopWarning")

every_family = pytest.mark.parametrize("name", FAMILIES)


def image_size(plain: Any) -> tuple[int, int]:
    """The size of a network's images; three patches by three where it takes any."""
    if hasattr(plain, "patch_embed"):
        return plain.patch_embed.img_size
    height, width = plain.embeds.patch_size
    return 3 * height, 3 * width


def small(name: str, **options: Any) -> Any:
    """A network of timm at reduced size, in evaluation mode, all parameters of order one."""
    options = {**SMALL, **FAMILIES[name], **options}
    if isinstance(options.get("num_kv_heads"), int):
        options["num_kv_heads"] = options["num_heads"]
    plain = timm.create_model(name, **options)
    return scramble(plain.double()).eval()


def tiny(**options: Any) -> Any:
    """A network of timm's class, made by hand."""
    return scramble(VisionTransformer(**{"img_size": 32, "patch_size": 8, "num_classes": 7, **SMALL, **options})).eval()


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def assert_same_network(plain: Any, **overrides: Any) -> None:
    """The twin for the group of one element, with the plain network's weights, computes what that computes."""
    plain = plain.double()
    made: Any = twin(plain, TRIVIAL, **overrides)
    made.load_state_dict(plain_weights(plain, made), strict=True)
    images = torch.randn(2, plain.in_chans, *image_size(plain), dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(made(images), plain(images)) < 1e-10
        assert relative_error(made.forward_features(images), plain.forward_features(images)) < 1e-10
        pooled = [model.forward_head(model.forward_features(images), pre_logits=True) for model in (made, plain)]
        assert relative_error(*pooled) < 1e-10
        for found, expected in zip(
            *(model.forward_intermediates(images, intermediates_only=True) for model in (made, plain)), strict=True
        ):
            assert relative_error(found, expected) < 1e-10


@every_family
def test_the_twin_is_the_same_network(name: str) -> None:
    """With one group element nothing but the names of the weights may differ: nothing was dropped."""
    assert_same_network(small(name))


@pytest.mark.parametrize(
    "name", ["deit3_small_patch16_224", "vit_base_patch16_clip_224", "eva_large_patch14_196", "test_vit2"]
)
@pytest.mark.parametrize("design", ["hybrid", "invariant"])
def test_the_designs_with_plain_blocks_are_the_same_network(name: str, design: str) -> None:
    assert_same_network(small(name, depth=3), design=design)


@pytest.mark.parametrize(
    "options",
    [
        {"pos_embed": "none"},
        {"qkv_bias": False, "proj_bias": False},
        {"act_layer": "relu"},
        {"act_layer": nn.GELU},
        {"act_layer": "hard_swish"},
        {"global_pool": ""},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2},
        {"global_pool": "avg", "final_norm": False},
        {"fc_norm": True},
        {"final_norm": False},
        {"pre_norm": True, "init_values": 0.3},
        {"class_token": False, "global_pool": "avg", "pos_embed": "learn"},
        {"class_token": False, "global_pool": "avg", "reg_tokens": 3, "no_embed_class": True},
        {"reg_tokens": 3, "no_embed_class": True},
        {"num_classes": 0},
        {"in_chans": 1},
        {"mlp_ratio": 4304 / 1152, "embed_dim": 36},
        {"mlp_ratio": 0.75},
        {"img_size": (16, 40)},
        {"patch_size": (8, 4)},
        {"patch_size": 5, "img_size": 35},
        {"num_heads": 8},
        {"norm_layer": nn.LayerNorm},
        {"norm_layer": "rmsnorm", "qk_norm": True},
        {"qk_norm": True},
        {"scale_attn_norm": True, "scale_mlp_norm": True},
        {"embed_norm_layer": LayerNorm},
        {"global_pool": "map", "class_token": False},
        {"act_layer": nn.Softplus},
        {"mlp_layer": timm.layers.SwiGLU, "scale_mlp_norm": True},
        {"mlp_layer": timm.layers.SwiGLUPacked},
        {"attn_layer": "diff"},
        {"block_fn": timm.models.vision_transformer.ParallelThingsBlock},
        {"block_fn": timm.models.vision_transformer.ParallelScalingBlock, "qkv_bias": True},
        {"depth": 1},
    ],
    ids=str,
)
def test_every_option_is_mirrored(options: dict[str, Any]) -> None:
    assert_same_network(tiny(**options))


def test_fewer_heads_for_keys_and_values() -> None:
    options: dict[str, Any] = {"num_kv_heads": (16, 8), "num_heads": 16, "embed_dim": 128}
    assert_same_network(small("vit_base_patch16_sapiens2", **options))
    made: Any = twin(small("vit_base_patch16_sapiens2", **options), "octic")
    assert equiflop.check(made).max_error < 1e-12
    few = small("vit_base_patch16_sapiens2", num_kv_heads=(16, 4), num_heads=16, embed_dim=128)
    with pytest.raises(ValueError, match=r"num_heads=4 of keys and values of blocks.1.attn is not divisible by"):
        twin(few, "octic")


def test_any_image_size() -> None:
    """timm resamples the position embedding in float32, so that only its own grid compares exactly."""
    plain = tiny(dynamic_img_size=True)
    assert_same_network(plain)
    made: Any = twin(plain, "octic")
    assert made.dynamic_img_size and made(torch.randn(1, 3, 24, 48, dtype=torch.float64)).shape == (1, 7)
    assert equiflop.check(made, input_size=(24, 40)).max_error < 1e-12


@every_family
@pytest.mark.parametrize("group", ["flop", "octic"])
def test_twins_are_equivariant_and_cheaper(name: str, group: str) -> None:
    plain = small(name, embed_dim=64, num_heads=4 if group == "flop" else 8, mlp_ratio=4.0)
    made: Any = twin(plain, group)
    assert dtype_of(made) == torch.float64 and made.training == plain.training
    size = image_size(plain)
    report = equiflop.check(made, input_size=size)
    assert report.passed and report.max_error < 1e-12
    images = torch.randn(2, plain.in_chans, *size, dtype=torch.float64)
    with torch.no_grad():
        assert made(images).shape[:1] == plain(images).shape[:1]
        if plain.num_classes:
            assert made(images).shape == plain(images).shape
        assert made.forward_features(images).shape == plain.forward_features(images).shape
    assert equiflop.macs(made, size) == expected_macs(plain, group)


def expected_macs(plain: Any, group: str) -> int:
    """MACs of a twin by hand."""
    size = image_size(plain)
    return twin_macs(plain, equiflop.macs(plain, size), costs_of_linear_maps(plain, size), group)


def twin_macs(plain: Any, plain_macs: int, linear: dict[str, int], group: str) -> int:
    """MACs of a twin by hand: what is no linear map costs the same, linear maps a share that the group fixes.

    Classifiers read the invariant channels alone. The small MLP of a relative position bias has a twin with fewer
    outputs, one per head of one copy. Where windows are padded, the linear maps see the tokens that are there, and one
    that is empty. A convolution in the group's basis costs what the plain one does.
    """
    order = {"flop": 2, "octic": 8}[group]
    share = {"flop": Fraction(1, 2), "octic": Fraction(3, 16)}[group]
    total = Fraction(plain_macs)
    for path, cost in linear.items():
        if ".rel_pos." in path or "shared_rel_pos." in path:
            total -= cost * (1 - Fraction(1, order)) if path.endswith("fc2") else 0
        elif ".attn." in path and getattr(plain.blocks[int(path.split(".")[1])], "window_size", None):
            grid, window = plain.patch_embed.grid_size, plain.blocks[int(path.split(".")[1])].window_size
            tokens, padded = (math.prod(n) for n in (grid, (-(-side // window) * window for side in grid)))
            total -= cost * (1 - share * Fraction(tokens + path.endswith("qkv"), padded))
        elif path != "neck.2":
            total -= cost * (1 - (Fraction(1, order) if path.startswith("head") else share))
    assert total.denominator == 1
    return int(total)


def costs_of_linear_maps(plain: Any, size: tuple[int, int]) -> dict[str, int]:
    """MACs of every linear map for one image, by hooks."""
    costs: dict[str, int] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            costs[path] = costs.get(path, 0) + output.numel() * module.weight[0].numel()

        return hook

    copied = copy.deepcopy(plain)
    for path, module in copied.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(note(path))
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # else the map is not called
    with torch.no_grad():
        weight = next(copied.parameters())
        copied(torch.zeros(1, plain.in_chans, *size, dtype=weight.dtype, device=weight.device))
    return costs


def test_a_name_gives_the_twin_of_that_network() -> None:
    with torch.device("meta"):
        made: Any = twin("vit_small_patch14_reg4_dinov2")
    assert type(made) is EquivariantVisionTransformer and made.design == "equivariant"
    assert next(made.parameters()).is_meta and made.training
    assert (made.embed_dim, len(made.blocks), made.blocks[0].attn.num_heads) == (384, 12, 6)
    assert (made.num_reg_tokens, made.num_classes, made.patch_embed.img_size) == (4, 0, (518, 518))
    assert made.norm.eps == 1e-6 and made.blocks[3].ls1.init_values == 1e-5 and made.no_embed_class
    config = timm.data.resolve_model_data_config(made)
    plain = timm.data.resolve_model_data_config(timm.create_model("vit_small_patch14_reg4_dinov2", device="meta"))
    assert config == plain
    assert not any(made.pretrained_cfg.get(key) for key in ("url", "hf_hub_id", "file"))
    assert twin("vit_base_patch16_224.augreg_in21k", device="meta").num_classes == 21843


def test_the_published_names_are_such_twins() -> None:
    """But for the epsilon of the norms, which the published flop networks halve, and the initial layer scale."""
    ours = timm.create_model("flop_deit3_small_patch16_224", device="meta")
    made: Any = twin("deit3_small_patch16_224", device="meta")
    assert {key: value.shape for key, value in made.state_dict().items()} == {
        key: value.shape for key, value in ours.state_dict().items()
    }
    assert equiflop.macs(made, (224, 224)) == equiflop.macs(ours, (224, 224))


def test_overrides_replace_what_was_read() -> None:
    options: dict[str, Any] = {
        "img_size": 64,
        "embed_dim": 64,
        "depth": 3,
        "num_heads": 4,
        "num_classes": 5,
        "in_chans": 1,
    }
    made: Any = twin("vit_base_patch16_clip_quickgelu_224", "octic", invariants="norm", global_pool="avg", **options)
    assert equiflop.check(made.double()).max_error < 1e-12
    assert made(torch.randn(1, 1, 64, 64, dtype=torch.float64)).shape == (1, 5)
    assert isinstance(made.norm, nn.Identity) and made.fc_norm.eps == 1e-5  # moves with the pooling, as in timm
    hybrid: Any = twin("vit_base_patch16_clip_224", design="hybrid", equivariant_depth=1, depth=2, device="meta")
    assert isinstance(hybrid.blocks[1], timm.models.vision_transformer.Block)
    assert {m.eps for m in hybrid.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    instead = twin("vit_base_patch16_siglip_224", global_pool="avg", device="meta", depth=1)
    assert instead.attn_pool is None and isinstance(instead.norm, nn.Identity)
    assert twin("eva02_small_patch14_224", "flop", depth=1, device="meta", norm_eps=1e-3).blocks[0].norm1.eps == 1e-3
    with pytest.raises(ValueError, match=r"takes no num_clases=5; did you mean num_classes"):
        twin("vit_small_patch16_224", num_clases=5)
    with pytest.raises(ValueError, match="override design='hybrid' is for twins of a VisionTransformer, not of a Eva"):
        twin("eva02_small_patch14_224", design="hybrid")
    with pytest.raises(ValueError, match="override depth=3 is for names of networks"):
        twin(tiny(), depth=3)
    with pytest.raises(ValueError, match=r"override norm_epss=1 is unknown; did you mean norm_eps\?"):
        twin(tiny(), norm_epss=1)
    with pytest.raises(ValueError, match="override img_size=48 is for names of networks"):
        twin(small("naflexvit_base_patch16_gap"), img_size=48)
    with pytest.raises(ValueError, match="pretrained=True: weights of a plain network have no equivariant image"):
        twin("vit_small_patch16_224", pretrained=True)


def test_the_twin_of_a_network_takes_over_what_was_replaced() -> None:
    made: Any = twin(tiny(), "flop", num_classes=3, img_size=48, global_pool="avg", invariants="norm")
    assert made(torch.randn(2, 3, 48, 48)).shape == (2, 3) and made.global_pool == "avg"
    assert made.head.in_features == 32


def test_what_acts_in_training_is_mirrored() -> None:
    plain = tiny(
        drop_path_rate=0.3,
        drop_rate=0.1,
        pos_drop_rate=0.15,
        proj_drop_rate=0.2,
        attn_drop_rate=0.25,
        patch_drop_rate=0.5,
        depth=4,
    ).train()
    plain.set_grad_checkpointing()
    made: Any = twin(plain)
    assert made.training and made.grad_checkpointing
    for found, expected in zip(made.blocks, plain.blocks, strict=True):
        assert getattr(found.drop_path1, "drop_prob", 0.0) == getattr(expected.drop_path1, "drop_prob", 0.0)
        assert (
            found.attn.attn_drop.p == 0.25 and found.attn.proj_drop.p == found.mlp.drop1.p == found.mlp.drop2.p == 0.2
        )
    assert (made.head_drop.p, made.pos_drop.p, made.patch_drop.prob) == (0.1, 0.15, 0.5)
    made(torch.randn(2, 3, 32, 32)).sum().backward()


@every_family
def test_functions_of_timm(name: str) -> None:
    plain = small(name)
    made: Any = twin(plain, "flop")
    height, width = image_size(plain)
    images = torch.randn(1, 3, height, width, dtype=torch.float64)
    assert len(made.forward_intermediates(images, intermediates_only=True)) == 2
    made.reset_classifier(4, global_pool="token" if "distilled" in name else "avg")
    assert made(images).shape == (1, 4)
    own_parts = re.compile(r"\.(weight_\w+|prefix)$|(?<=rope\.)rope\.")
    undecayed = {own_parts.sub("", key) for key in made.no_weight_decay()}
    undecayed = {key.replace("patch_embed.positions", "pos_embed") for key in undecayed}
    names = {key for key, _ in plain.named_parameters()}
    assert undecayed == names & set(plain.no_weight_decay())
    assert made.no_weight_decay() <= {key for key, _ in made.named_parameters()}
    side = made.embedding.patch_size[0]
    wide = (2 if "naflexvit_base_patch16_radio" in name else 3) * side  # that one takes square images alone
    made.set_input_size((2 * side, wide))
    images = torch.randn(1, 3, 2 * side, wide, dtype=torch.float64)
    assert made(images).shape == (1, 4)
    assert equiflop.check(made, input_size=images.shape[-2:]).max_error < 1e-12


def test_networks_that_timm_changed_are_read_as_they_are() -> None:
    plain = tiny(reg_tokens=1)
    plain.set_input_size((40, 24))
    plain.reset_classifier(3, "avg")
    plain.prune_intermediate_layers([0], prune_head=False)
    plain.requires_grad_(False)
    assert_same_network(plain)
    made: Any = twin(plain)
    assert made.patch_embed.grid_size == (5, 3) and made.num_classes == 3 and len(made.blocks) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_follows_the_network(dtype: torch.dtype) -> None:
    made: Any = twin(tiny().to(dtype))
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    assert made(torch.randn(1, 3, 32, 32, dtype=dtype)).dtype == dtype


def test_compiled_networks_are_read_like_others() -> None:
    plain = tiny()
    compiled: Any = torch.compile(plain)
    assert repr(twin(compiled)) == repr(twin(plain))


def test_the_network_itself_is_left_as_it_is() -> None:
    plain = small("eva02_base_patch14_224")
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    text = repr(plain)
    twin(plain)
    assert repr(plain) == text and all(torch.equal(before[key], value) for key, value in plain.state_dict().items())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "its class is ResNet; supported are timm's VisionTransformer, VisionTransformerDistilled, Eva"),
        ("vit_tiny_r_s16_p8_224", "patch_embed is a HybridEmbed"),
        ("vitamin_small_224", "patch_embed is a HybridEmbed"),
        ("eva02_tiny_patch14_224", r"num_heads=3 of blocks.0.attn is not divisible by \|G\|=2"),
        ("vit_dlittle_patch16_reg1_gap_256", r"num_heads=5 of blocks.0.attn .* use a multiple of 2, or"),
        ("vit_so400m_patch14_siglip_gap_384", "image height 384 is not a multiple of the patch height 14"),
        ("naflexvit_base_patch16_parfac_gap", "pos_embed='factorized' has no equivariant counterpart"),
        ("flop_deit3_small_patch16_224", "equivariant network already"),
    ],
)
def test_names_that_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} has no twin: .*{reason}") as error:
        twin(name)
    assert "\n" not in str(error.value)


def test_unknown_models() -> None:
    with pytest.raises(ValueError, match=r"'vit_base_patch16_225' is not a model of timm; did you mean vit_base"):
        twin("vit_base_patch16_225")
    with pytest.raises(ValueError, match=r"'qqq' is not a model of timm; timm.list_models\(\)"):
        twin("qqq")
    with pytest.raises(ValueError, match=r"Invalid pretrained tag \(nope\)"):
        twin("vit_base_patch16_224.nope")
    with pytest.raises(TypeError, match="model=3 is neither a name"):
        twin(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="class is Linear; supported are"):
        twin(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="group='flap' is unknown"):
        twin("vit_small_patch16_224", "flap")


@pytest.mark.parametrize(
    ("options", "group", "reason"),
    [
        ({"embed_dim": 36}, "octic", r"embed_dim=36 is not divisible by \|G\|=8"),
        ({"embed_dim": 48, "num_heads": 4}, "octic", "num_heads=4 does not divide every multiplicity"),
        ({"mlp_ratio": 2.6}, "octic", r"width of blocks.0.mlp.fc1=83 is not divisible by \|G\|=8"),
        ({"img_size": (32, 48)}, "octic", "img_size=.* is not square"),
        ({"qk_norm": True}, "octic", r"num_heads=2 of blocks.0.attn is not divisible by \|G\|=8"),
        ({"norm_layer": "layernorm2d"}, "flop", "blocks.0.norm1 is a LayerNorm2d"),
        ({"act_layer": nn.PReLU}, "flop", r"blocks.0.mlp.act \(PReLU\) has parameters"),
        ({"act_layer": partial(nn.Softmax, dim=-1)}, "flop", r"blocks.0.mlp.act \(Softmax\) is not pointwise"),
        ({"mlp_layer": timm.layers.GatedMlp}, "flop", "blocks.0.mlp is a GatedMlp, which has no"),
        ({"global_pool": "max"}, "flop", "global_pool='max' breaks the symmetry"),
        ({"global_pool": "avgmax"}, "flop", "global_pool='avgmax' breaks the symmetry"),
        ({"global_pool": "prr"}, "flop", "global_pool='prr' breaks the symmetry"),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, "flop", "dynamic_img_pad=True"),
        ({"depth": 0}, "flop", "no blocks"),
    ],
    ids=str,
)
def test_networks_that_are_refused(options: dict[str, Any], group: str, reason: str) -> None:
    plain = VisionTransformer(**{"img_size": 32, "patch_size": 8, "num_classes": 7, **SMALL, **options})
    with pytest.raises(ValueError, match=f"^VisionTransformer has no twin: .*{reason}"):
        twin(plain, group)


def _share_blocks(plain: Any) -> None:
    plain.blocks[1] = plain.blocks[0]


def _tie_weights(plain: Any) -> None:
    plain.blocks[1].attn.proj.weight = plain.blocks[0].attn.proj.weight


def _patch_method(plain: Any) -> None:
    plain.blocks[0].forward = lambda x, **_: x


def _hook(plain: Any) -> None:
    plain.blocks[1].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)


def _backward_hook(plain: Any) -> None:
    plain.blocks[1].register_full_backward_hook(lambda module, inputs, outputs: None)


def _weight_norm(plain: Any) -> None:
    nn.utils.parametrizations.weight_norm(plain.blocks[0].attn.qkv)


def _other_eps(plain: Any) -> None:
    plain.blocks[1].norm2.eps = 1e-3


def _norm_without_affine(plain: Any) -> None:
    plain.norm = LayerNorm(32, affine=False)


def _other_scale(plain: Any) -> None:
    plain.blocks[1].attn.scale = 1.0


def _other_dropout(plain: Any) -> None:
    plain.blocks[1].mlp.drop2.p = 0.5


def _scale_in_one_block(plain: Any) -> None:
    plain.blocks[1].ls2 = LayerScale(32, 0.1)


def _other_activation(plain: Any) -> None:
    plain.blocks[1].mlp.act = nn.ReLU()


def _other_head(plain: Any) -> None:
    plain.head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 7))


def _head_without_bias(plain: Any) -> None:
    plain.head.bias = None


def _mlp_without_bias(plain: Any) -> None:
    plain.blocks[0].mlp.fc2.bias = None


def _patches_without_bias(plain: Any) -> None:
    plain.patch_embed.proj.bias = None


def _overlapping_patches(plain: Any) -> None:
    plain.patch_embed.proj.stride = (4, 4)


def _more_modules(plain: Any) -> None:
    plain.blocks[0].add_module("adapter", nn.Linear(32, 32))


def _more_parameters(plain: Any) -> None:
    plain.mask_token = nn.Parameter(torch.zeros(32))


def _missing_block_part(plain: Any) -> None:
    plain.blocks[1].norm1 = nn.Identity()


def _other_position_embedding(plain: Any) -> None:
    plain.pos_embed = nn.Parameter(torch.zeros(1, 9, 32))


def _fixed_position_embedding(plain: Any) -> None:
    plain.pos_embed.requires_grad_(False)


def _position_embedding_as_buffer(plain: Any) -> None:
    values = plain.pos_embed.detach()
    del plain.pos_embed
    plain.register_buffer("pos_embed", values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_share_blocks, "module blocks.1 is shared with module blocks.0"),
        (_tie_weights, "parameter blocks.1.attn.proj.weight is shared with blocks.0.attn.proj.weight"),
        (_patch_method, "module blocks.0 has its own method 'forward'"),
        (_hook, "module blocks.1.mlp has hooks"),
        (_backward_hook, "module blocks.1 has hooks"),
        (_weight_norm, "blocks.0.attn.qkv is a ParametrizedLinear where Linear is supported"),
        (_other_head, "module head is Sequential"),
        (_overlapping_patches, r"patch_embed.proj has stride=\(4, 4\) where \(8, 8\) is supported"),
        (_more_modules, "blocks.0.adapter is a Linear, which has no equivariant counterpart"),
        (_more_parameters, "parameter mask_token has no equivariant counterpart"),
        (_other_position_embedding, "parameter pos_embed is .1, 9, 32., which does not fit the tokens"),
        (_fixed_position_embedding, "fixed position embedding"),
        (_position_embedding_as_buffer, "buffer pos_embed has no equivariant counterpart"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_networks_changed_by_hand_are_refused(change: Callable[[Any], None], reason: str) -> None:
    """Nothing that a network has is dropped in silence, wherever it sits."""
    plain = copy.deepcopy(tiny())
    twin(plain, device="meta")
    change(plain)
    with pytest.raises(ValueError, match=f"has no twin: .*{reason}"):
        twin(plain, device="meta")


@pytest.mark.parametrize(
    "change",
    [
        _other_eps,
        _norm_without_affine,
        _other_scale,
        _other_dropout,
        _scale_in_one_block,
        _other_activation,
        _head_without_bias,
        _mlp_without_bias,
        _patches_without_bias,
        _missing_block_part,
    ],
)
def test_networks_changed_by_hand_have_the_twin_of_what_they_are(change: Callable[[Any], None]) -> None:
    plain = copy.deepcopy(tiny())
    change(plain)
    assert_same_network(scramble(plain))
    made: Any = twin(plain)
    assert made.blocks[1].mlp.drop2.p == plain.blocks[1].mlp.drop2.p


@pytest.mark.slow
def test_all_names_of_timm() -> None:
    """Every name is built or refused, and what is built costs what it should; two blocks stand for all."""
    names = [name for module in MODULES for name in timm.list_models(module=module)]
    built: dict[str, list[str]] = {"flop": [], "octic": []}
    refusals: dict[str, dict[str, str]] = {"flop": {}, "octic": {}}
    for name in names:
        options: dict[str, Any] = {} if "sapiens2" in name else {"depth": 2}  # those have one entry per block
        with torch.device("meta"):
            plain = timm.create_model(name, **options)
        size = image_size(plain)
        plain_cost, linear = equiflop.macs(plain, size), costs_of_linear_maps(plain, size)
        for group in built:
            try:
                made: Any = twin(name, group, device="meta", **options)
            except ValueError as error:
                refusals[group][name] = str(error)
                continue
            built[group].append(name)
            cost = equiflop.macs(made, size)
            assert cost == twin_macs(plain, plain_cost, linear, group) and cost < plain_cost, name
            made_parameters, plain_parameters = (sum(p.numel() for p in m.parameters()) for m in (made, plain))
            assert 0.95 < plain_parameters / made_parameters / made.group.order < 1.05, name
    for group, share in (("flop", 0.95), ("octic", 0.9)):
        texts = refusals[group]
        assert all(text.startswith(f"{name} has no twin: ") and "\n" not in text for name, text in texts.items())
        fitting = [name for name in names if "num_heads=" not in texts.get(name, "") or group == "flop"]
        assert len(built[group]) >= share * len(fitting)


def test_weights_that_are_left_behind_are_named() -> None:
    with torch.device("meta"):
        plain = timm.create_model("vit_tiny_patch16_224", depth=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin("vit_tiny_patch16_224", depth=1, device="meta")
        twin(plain)  # without memory, so without weights
    with pytest.warns(EquiflopWarning, match="those of the given network, have no equivariant image"):
        twin(small("deit3_small_patch16_224"))
    with pytest.warns(EquiflopWarning, match="those of 'vit_tiny_patch16_224.augreg_in21k'"):
        twin("vit_tiny_patch16_224.augreg_in21k", depth=1, device="meta")


@pytest.mark.parametrize(
    ("plain", "own"), [("convnext_tiny", "flop_convnext_tiny"), ("resmlp_12_224", "flop_resmlp_12_224")]
)
def test_names_of_other_families_give_the_registered_networks(plain: str, own: str) -> None:
    options: dict[str, Any] = {"device": "meta", "num_classes": 10}
    made, expected = twin(plain, **options), timm.create_model(own, **options)
    assert type(made) is type(expected) and made.group == expected.group
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}
    with pytest.warns(EquiflopWarning, match=f"those of '{plain}.fb_in1k'"):
        assert type(twin(f"{plain}.fb_in1k", **options)) is type(expected)
    settings = {"group": "updown", "drop_rate": 0.1, "norm_eps": 1e-5, "matched_bias": True}
    tagged = f"{plain}.fb_in1k"
    assert equiflop.plain_twin(f"twin:{tagged}", settings) == (tagged, equiflop.plain_twin(own, settings)[1])
    assert twin(plain, "updown", **options).group == named_image_group("updown")
    with pytest.raises(ValueError, match="heads='coupled' is for vision transformers"):
        twin(plain, heads="coupled", **options)
    with pytest.raises(ValueError, match="num_clases"):
        twin(plain, num_clases=3)


def test_a_refusal_recommends_only_what_the_network_has() -> None:
    with pytest.raises(ValueError, match=r"use 'avg' or 'map'$"):  # no class token
        twin("vit_base_patch16_siglip_224", global_pool="max", device="meta")
