"""Tools that look into a model, change it or trace it: hooks, adapters, quantisers, feature extractors, exporters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from timm.layers import set_fused_attn
from timm.models._features_fx import create_feature_extractor as timm_extractor
from timm.utils import AttentionExtract
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_extractor

import equiflop
from small_models import ALL, CONVNEXT, INVARIANT, OCTIC, RESMLP, VIT, classifier, first_block, small_model

peft = pytest.importorskip("peft")
torchao = pytest.importorskip("torchao.quantization")

_MLP = ("fc1", "act", "fc2")
#: What people watch: a name per kind of layer, and how often it is called in one forward pass.
WATCHED = {
    VIT: [f"blocks.1.{layer}" for layer in ("attn.qkv", "attn.proj", *(f"mlp.{part}" for part in _MLP))],
    OCTIC: [f"blocks.1.{layer}" for layer in ("attn.qkv", "attn.proj", *(f"mlp.{part}" for part in _MLP))],
    RESMLP: ["blocks.1.linear_tokens.linear", *(f"blocks.1.mlp_channels.{part}" for part in _MLP)],
    CONVNEXT: [f"stages.2.blocks.1.mlp.{part}" for part in _MLP],
}
CASES = [(name, layer) for name, layers in WATCHED.items() for layer in layers]
FAMILIES = list(WATCHED)


@pytest.fixture
def unfused() -> Iterator[None]:
    """Attention written out, with a module behind the softmax."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)


class Wrapper(nn.Module):
    """Any module in the place of another."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.module(x)


def images(dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=dtype)


def children(model: nn.Module, layer: str) -> list[str]:
    """The layer and the ``nn.Linear`` modules inside it."""
    inside = model.get_submodule(layer).named_modules()
    return [layer, *(f"{layer}.{path}" for path, module in inside if path and isinstance(module, nn.Linear))]


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_forward_hooks_see_their_layer_and_its_parts(name: str, layer: str) -> None:
    model, x = small_model(name, torch.float64), images()
    expected = model(x)
    seen: dict[str, Tensor] = {}
    watched = children(model, layer)
    for path in watched:
        model.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: seen.__setitem__(path, o))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert sorted(seen) == sorted(watched)
    assert len(watched) == 1 if layer.endswith("act") else len(watched) >= 3
    assert all(output.abs().max() > 0 for output in seen.values())


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_what_a_hook_returns_takes_effect(name: str, layer: str) -> None:
    model, x = small_model(name, torch.float64), images()
    expected = model(x)
    model.get_submodule(layer).register_forward_hook(lambda m, i, o: 0 * o)
    assert (model(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_backward_hooks_fire_and_gradients_stay(name: str, layer: str) -> None:
    model, x = small_model(name, torch.float64), images()
    model(x).square().sum().backward()
    expected = {path: parameter.grad.clone() for path, parameter in model.named_parameters()}
    model.zero_grad()
    fired = []
    for path in children(model, layer):
        model.get_submodule(path).register_full_backward_hook(lambda m, i, o, path=path: fired.append(path))
    model(x).square().sum().backward()
    assert sorted(fired) == sorted(children(model, layer))
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[path], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_a_wrapper_may_stand_in_a_layers_place(name: str, layer: str) -> None:
    model, x = small_model(name, torch.float64), images()
    expected = model(x)
    for path in reversed(children(model, layer)):
        wrapper = Wrapper(model.get_submodule(path))
        model.set_submodule(path, wrapper)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    wrappers = [module for module in model.modules() if isinstance(module, Wrapper)]
    assert wrappers and all(wrapper.calls == 1 for wrapper in wrappers)


@pytest.mark.usefixtures("unfused")
@pytest.mark.parametrize("heads", ["coupled", "regular"])
def test_attention_maps_can_be_extracted(heads: str) -> None:
    model, x = small_model(VIT, torch.float64, heads=heads), images()
    expected = model(x)
    for method in ("hook", "fx"):
        maps = AttentionExtract(model, method=method)(x)
        assert len(maps) == 2
        for attention in maps.values():
            assert attention.shape == (2, 2, 17, 17)
            torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, 17, dtype=torch.float64))
    here, there = (next(iter(AttentionExtract(model, method="hook")(i).values())) for i in (x, x.flip(-1)))
    moved = here[..., 0, 1:].unflatten(-1, (4, 4)).flip(-1).flatten(-2)
    moved = moved if heads == "coupled" else moved.flip(1)  # two regular heads are mirror images of each other
    torch.testing.assert_close(there[..., 0, 1:], moved)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.usefixtures("unfused")
def test_attention_dropout_is_watched() -> None:
    model, x = small_model(VIT, torch.float64), images()
    expected = model(x)
    seen: list[Tensor] = []
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda m, i, o: seen.append(o))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert len(seen) == 1
    model.blocks[0].attn.attn_drop = Wrapper(model.blocks[0].attn.attn_drop)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert model.blocks[0].attn.attn_drop.calls == 1


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", FAMILIES)
def test_parametrised_weights_are_used(name: str) -> None:
    model, x = small_model(name, torch.float64), images()
    layers = [path for layer in WATCHED[name] for path in children(model, layer)[1:]]
    for path in layers:
        model.get_submodule(path).weight.data.mul_(2)
    expected = model(x)
    for path in layers:
        model.get_submodule(path).weight.data.div_(2)
        parametrize.register_parametrization(model.get_submodule(path), "weight", Doubled())
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "change",
    [
        parametrizations.spectral_norm,
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
        lambda linear: nn.utils.parametrizations.weight_norm(linear, dim=None),  # type: ignore[arg-type]
    ],
    ids=["spectral norm", "pruning", "weight norm"],
)
def test_normalised_and_pruned_weights_stay_equivariant(name: str, change: Callable[[nn.Module], Any]) -> None:
    model, x = small_model(name, torch.float64), images()
    for path in equiflop.linear_layers(model):
        change(model.get_submodule(path))
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # norms that were just taken have to be taken again
    output = model(x)
    torch.testing.assert_close(model(x.flip(-1)), output, rtol=1e-10, atol=1e-10)
    plain = small_model(name, torch.float64)
    for path, parameter in plain.named_parameters():
        owner, _, attribute = path.rpartition(".")
        parameter.data = getattr(model.get_submodule(owner), attribute).detach().clone()
    torch.testing.assert_close(plain(x), output, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_counters_that_watch_linear_layers_see_all_products(name: str) -> None:
    model = small_model(name)
    counted = 0

    def count(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal counted
        counted += inputs[0].numel() * module.out_features

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    model(images(torch.float32, batch=1))
    attention = sum(2 * 17 * 17 * model.embed_dim for _ in model.blocks) if hasattr(model, "cls_token") else 0
    depthwise = 0
    if name == CONVNEXT:
        sizes = [
            (block.rep.dim if hasattr(block, "rep") else block.conv_dw.rep.dim, stage)
            for stage, s in enumerate(model.stages)
            for block in s.blocks
        ]
        depthwise = sum(width * (8 >> stage) ** 2 * 49 for width, stage in sizes)
    assert counted + attention + depthwise == equiflop.macs(model, (32, 32))


NAMES = ["qkv", "proj", "fc1", "fc2"]


def adapters_of(name: str) -> dict[str, Any]:
    """Ways to name the linear maps: exact names, all, and a pattern."""
    model = small_model(name)
    irreps = "|".join(irrep.name for irrep in model.group.irreps)
    layers = equiflop.linear_layers(model, NAMES if hasattr(model, "cls_token") else ["fc1", "fc2"])
    return {"names": layers, "all": "all-linear", "pattern": rf".*\.(qkv|proj|fc1|fc2)\.({irreps})"}


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)


@pytest.mark.parametrize("name", [*FAMILIES, "flop_hybrid_deit3_small_patch16_224"])
@pytest.mark.parametrize("way", ["names", "all", "pattern"])
def test_lora_adapts_trains_merges_and_stays_equivariant(name: str, way: str) -> None:
    model, x = small_model(name, torch.float64), images()
    before = model(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=adapters_of(name)[way])).eval()
    torch.testing.assert_close(adapted(x), before)  # an adapter starts as zero
    assert sum(hasattr(module, "lora_A") for module in model.modules()) >= 8
    randomise(adapted)
    output = adapted(x)
    assert (output - before).abs().max() > 1e-3
    if name in INVARIANT:
        torch.testing.assert_close(adapted(x.flip(-1)), output, rtol=1e-12, atol=1e-12)
    if name == OCTIC:
        torch.testing.assert_close(adapted(x.rot90(1, (-1, -2))), output, rtol=1e-12, atol=1e-12)
    output.square().sum().backward()
    trained = {path: p for path, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and "lora" in path for path, p in trained.items())
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x), output, rtol=1e-11, atol=1e-11)
    assert not any(hasattr(module, "lora_A") for module in merged.modules())


def test_a_lora_step_lowers_the_loss() -> None:
    model = small_model(VIT)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=equiflop.linear_layers(model, NAMES)))
    x, target = images(torch.float32, 8), torch.arange(8) % 7
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(adapted(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_ia3_and_target_parameters_stay_equivariant(name: str) -> None:
    x = images()
    layers = equiflop.linear_layers(small_model(name), ["fc1", "fc2"])
    ia3 = peft.IA3Config(target_modules=layers, feedforward_modules=[path for path in layers if ".fc2." in path])
    parameters = [f"{path}.weight" for path in layers]
    for config in (ia3, peft.LoraConfig(r=2, target_modules=[], target_parameters=parameters)):
        model = small_model(name, torch.float64)
        before = model(x)
        adapted = peft.get_peft_model(model, config).eval()
        randomise(adapted)
        output = adapted(x)
        assert (output - before).abs().max() > 1e-3
        torch.testing.assert_close(adapted(x.flip(-1)), output, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(adapted.merge_and_unload()(x), output, rtol=1e-11, atol=1e-11)


def test_linear_layers_names_what_tools_look_for() -> None:
    model = small_model(VIT)
    everything = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert equiflop.linear_layers(model) == everything
    found = equiflop.linear_layers(model, ["blocks.1.mlp.fc1", "head"])
    assert found == ["blocks.1.mlp.fc1.A", "blocks.1.mlp.fc1.B", "head"]
    assert "patch_embed.proj.A" in equiflop.linear_layers(model, ["proj"])
    hybrid = equiflop.linear_layers(small_model("flop_hybrid_deit3_small_patch16_224"), ["qkv"])
    equivariant = [f"blocks.{i}.attn.qkv.{irrep}" for i in (0, 1) for irrep in "AB"]
    assert hybrid == [*equivariant, "blocks.2.attn.qkv", "blocks.3.attn.qkv"]
    with pytest.raises(ValueError, match="'qk' is no linear map of EquivariantVisionTransformer"):
        equiflop.linear_layers(model, ["qkv", "qk"])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("config", [torchao.Int8WeightOnlyConfig, torchao.Int8DynamicActivationInt8WeightConfig])
def test_quantisers_find_all_linear_maps(name: str, config: Any) -> None:
    model, x = small_model(name), images(torch.float32)
    expected = model(x)
    layers = equiflop.linear_layers(model)
    torchao.quantize_(model, config())
    done = [path for path in layers if type(model.get_submodule(path).weight) is not nn.Parameter]
    assert done == layers and len(layers) >= 10
    output = model(x)
    scale = expected.abs().max()
    assert 0 < (output - expected).abs().max() < 0.1 * scale
    if name in INVARIANT:  # int8 activations round the mirrored features otherwise, half a step at most
        tolerance = 1e-5 if config is torchao.Int8WeightOnlyConfig else 0.05
        assert (model(x.flip(-1)) - output).abs().max() < tolerance * scale


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("extractor", [torchvision_extractor, timm_extractor])
def test_feature_extractors_of_symbolic_traces(name: str, extractor: Any) -> None:
    model, x = small_model(name, torch.float64), images(batch=3)
    block, head = first_block(name), classifier(name)
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: seen.__setitem__(path, o))
        for path in (block, head)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    found = extractor(model, [block, head])(x)
    for path in (block, head):
        torch.testing.assert_close(found[path], seen[path], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (VIT, {"heads": "regular", "global_pool": "avg"}),
        (VIT, {"invariants": "power_spectrum"}),
        (VIT, {"invariants": "polynomial", "class_token": False, "global_pool": "avg", "reg_tokens": 2}),
        (VIT, {"group": "rot4", "embed_dim": 64}),
        (VIT, {"num_classes": 0}),
        (OCTIC, {"num_classes": 0}),
        (OCTIC, {"invariants": "norm", "heads": "regular", "num_heads": 8}),
        (RESMLP, {"group": "octic"}),
        (RESMLP, {"head": "mean", "matched_bias": False, "invariants": "norm"}),
        (RESMLP, {"num_classes": 0}),
        (CONVNEXT, {"group": "flips", "invariants": "norm"}),
        (CONVNEXT, {"num_classes": 0}),
    ],
)
def test_all_options_can_be_traced_symbolically(name: str, options: dict[str, Any]) -> None:
    model, x = small_model(name, torch.float64, **options), images()
    output = torchvision_extractor(model, [classifier(name)])(x)[classifier(name)]
    torch.testing.assert_close(output, model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [VIT, OCTIC])
def test_a_symbolic_trace_takes_other_image_sizes(name: str) -> None:
    model = small_model(name, torch.float64, dynamic_img_size=True)
    traced = torchvision_extractor(model, ["head"])
    for size in ((32, 32), (48, 24), (16, 64)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(traced(x)["head"], model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("gradients", [True, False])
def test_torchscript_by_tracing(name: str, gradients: bool) -> None:
    model, x = small_model(name), images(torch.float32)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, x)  # checks itself with the same images
        more = images(torch.float32, 3)
        torch.testing.assert_close(traced(more), model(more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_torchscript_by_compiling_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"torch.jit.trace\(model, images\) or torch.export$"):
        torch.jit.script(small_model(name))


@pytest.mark.parametrize("name", [VIT, pytest.param(OCTIC, marks=pytest.mark.slow)])
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_free_batch_height_and_width(name: str, strict: bool) -> None:
    model = small_model(name, torch.float64, dynamic_img_size=True)
    rows, columns = (Dim(side, min=2, max=12) for side in ("rows", "columns"))
    shapes = ({0: Dim("batch"), 2: 8 * rows, 3: 8 * columns},)
    exported = torch.export.export(model, (images(),), dynamic_shapes=shapes, strict=strict).module()
    for batch, height, width in ((2, 32, 32), (1, 32, 32), (3, 48, 24), (2, 16, 96)):
        x = torch.randn(batch, 3, height, width, dtype=torch.float64)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_export_with_free_batch(name: str) -> None:
    model = small_model(name, torch.float64)
    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: Dim("batch")},)).module()
    for batch in (1, 3):
        x = images(batch=batch)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-10, atol=1e-10)
