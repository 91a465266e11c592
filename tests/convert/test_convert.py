"""Official weights: the converted model computes what the official network computes.

Two sources say what that is: recorded inputs and outputs of the official code (``goldens/``), and an implementation
of its published formulas below, as plain functions of an official state dict, for options that the recordings lack.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

import equiflop
from equiflop.convert import convert_official
from oracles import relative_error
from small_vits import DESIGNS

DATA = Path(__file__).parent / "goldens"
GOLDENS = {"flop_vit": DESIGNS["equivariant"], "flop_vit_hybrid": DESIGNS["hybrid"]}
KAPPA = math.sqrt(0.5)
State = dict[str, Tensor]


def golden(name: str) -> tuple[dict[str, Any], State, Tensor, Tensor, Tensor]:
    """Constructor arguments, state dict, input, features and logits of the official code."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    return config, state, tensors["input"], tensors["features"], tensors["logits"]


def model_like(config: dict[str, Any], name: str, **kwargs: Any) -> Any:
    known = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes", "qkv_bias")
    return timm.create_model(name, **{key: config[key] for key in known if key in config}, **kwargs).eval()


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_recorded_outputs_of_the_official_code(name: str, dtype: torch.dtype, tolerance: float) -> None:
    config, state, images, features, logits = golden(name)
    model = model_like(config, GOLDENS[name]).to(dtype)
    converted = convert_official(state, model)
    assert all(value.dtype == dtype for value in converted.values())
    model.load_state_dict(converted, strict=True)
    with torch.no_grad():
        found = model.forward_head(model.forward_features(images.to(dtype)), pre_logits=True)
        assert relative_error(found, features) < tolerance
        assert relative_error(model(images.to(dtype)), logits) < tolerance


# The official E(ViT) as functions. Features are pairs (s, a); tokens are the left half of the grid row by row, then
# the right half with its columns reversed.

Pair = tuple[Tensor, Tensor]


def random_state(
    channels: int,
    depth: int,
    heads: int,
    patch: tuple[int, int],
    grid: tuple[int, int],
    *,
    design: str = "equivariant",
    classes: int = 5,
    chans: int = 3,
    qkv_bias: bool = True,
    mixer: bool = False,
    norms: bool = False,
    seed: int = 0,
) -> State:
    """An official state dict with all parameters of order one."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return noise / shape[-1] ** 0.5 if len(shape) > 1 else 0.3 + noise.abs()

    half, tokens = channels // 2, grid[0] * grid[1]
    state: State = {}
    for part in ("sym", "asym"):
        state[f"patch_embed.proj_{part}.weight"] = random(half, chans, patch[0], patch[1] // 2)
    state["patch_embed.proj_sym.bias"] = random(half)
    state["patch_embed.flatten_and_permute.permutation"] = permutation(grid)
    for i in (0, 1):
        state[f"pos_embed.{i}"] = random(1, tokens // 2, half)
        state[f"cls_token.{i}"] = random(1, 1, half) if i == 0 else torch.zeros(1, 1, half, dtype=torch.float64)
    equivariant = depth if design == "equivariant" else depth // 2

    def norm(name: str) -> None:
        state[f"{name}.scaling.alpha_sym"], state[f"{name}.scaling.alpha_asym"] = random(half), random(half)
        state[f"{name}.scaling.beta"] = random(half)

    def linear(name: str, a: int, b: int, bias: bool = True) -> None:
        state[f"{name}.linear_sym.weight"] = random(b // 2, a // 2)
        state[f"{name}.linear_asym.weight"] = random(b // 2, a // 2)
        if bias:
            state[f"{name}.linear_sym.bias"] = random(b // 2)

    sizes = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 4, "mlp.fc2": 1}
    for i in range(depth):
        block = f"blocks.{i}"
        for part, factor in sizes.items():
            width = 4 * channels if part == "mlp.fc2" else channels
            bias = qkv_bias or part != "attn.qkv"
            if i < equivariant:
                linear(f"{block}.{part}", width, factor * channels, bias)
            else:
                state[f"{block}.{part}.weight"] = random(factor * channels, width)
                if bias:
                    state[f"{block}.{part}.bias"] = random(factor * channels)
        for j in (1, 2):
            if i < equivariant:
                norm(f"{block}.norm{j}")
                state[f"{block}.gamma_{j}.alpha_sym"] = random(half)
                state[f"{block}.gamma_{j}.alpha_asym"] = random(half)
            else:
                state[f"{block}.norm{j}.weight"], state[f"{block}.norm{j}.bias"] = random(channels), random(channels)
                state[f"{block}.gamma_{j}"] = random(channels)
        if mixer and i < equivariant:
            state[f"{block}.attn.attn_mixer"] = random(2)
    if design == "equivariant":
        norm("norm")
    else:
        state["norm.weight"], state["norm.bias"] = random(channels), random(channels)
    features = channels if design != "equivariant" or norms else half
    state["head.weight"], state["head.bias"] = random(classes, features), random(classes)
    return state


def permutation(grid: tuple[int, int]) -> Tensor:
    rows, columns = grid
    left = [r * columns + c for r in range(rows) for c in range(columns // 2)]
    right = [r * columns + c for r in range(rows) for c in range(columns - 1, columns // 2 - 1, -1)]
    return torch.tensor(left + right)


def official_features(
    state: State, images: Tensor, heads: int, *, design: str = "equivariant", norms: bool = False, eps: float = 1e-6
) -> Tensor:
    """What the official classifier sees."""
    kernels = {part: state[f"patch_embed.proj_{part}.weight"] for part in ("sym", "asym")}
    patch = (kernels["sym"].shape[2], 2 * kernels["sym"].shape[3])
    full = {p: torch.cat([w, (1 if p == "sym" else -1) * w.flip(-1)], -1) for p, w in kernels.items()}
    order = permutation((images.shape[2] // patch[0], images.shape[3] // patch[1]))
    s = KAPPA * F.conv2d(images, full["sym"], state["patch_embed.proj_sym.bias"], stride=patch).flatten(2).mT[:, order]
    a = KAPPA * F.conv2d(images, full["asym"], stride=patch).flatten(2).mT[:, order]
    p0, p1 = state["pos_embed.0"], state["pos_embed.1"]
    s, a = s + torch.cat([p0, p0], 1), a + torch.cat([p1, -p1], 1)
    batch = images.shape[0]
    s = torch.cat([state["cls_token.0"].expand(batch, -1, -1), s], 1)
    a = torch.cat([state["cls_token.1"].expand(batch, -1, -1), a], 1)
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    equivariant = depth if design == "equivariant" else depth // 2
    x: Pair = (s, a)
    for i in range(equivariant):
        x = official_block(state, f"blocks.{i}", x, heads, eps)
    if design == "equivariant":
        s, a = official_norm(state, "norm", x, eps)
        return torch.cat([s[:, 0], a[:, 0].abs()], -1) if norms else s[:, 0]
    s, a = x
    y = torch.cat([KAPPA * (s + a), KAPPA * (s - a)] if design == "hybrid" else [s, a.abs()], -1)
    for i in range(equivariant, depth):
        y = deit_block(state, f"blocks.{i}", y, heads)
    return F.layer_norm(y, y.shape[-1:], state["norm.weight"], state["norm.bias"], 1e-6)[:, 0]


def official_norm(state: State, name: str, x: Pair, eps: float) -> Pair:
    s, a = (part - part.mean(-1, keepdim=True) for part in x)
    sigma = KAPPA * torch.sqrt((s**2).mean(-1, keepdim=True) + (a**2).mean(-1, keepdim=True) + eps)
    scale = f"{name}.scaling"
    return s / sigma * state[f"{scale}.alpha_sym"] + state[f"{scale}.beta"], a / sigma * state[f"{scale}.alpha_asym"]


def official_linear(state: State, name: str, x: Pair) -> Pair:
    bias = state.get(f"{name}.linear_sym.bias")
    s, a = x
    return F.linear(s, state[f"{name}.linear_sym.weight"], bias), F.linear(a, state[f"{name}.linear_asym.weight"])


def official_block(state: State, name: str, x: Pair, heads: int, eps: float) -> Pair:
    qkv = official_linear(state, f"{name}.attn.qkv", official_norm(state, f"{name}.norm1", x, eps))
    parts = []
    for part in qkv:
        batch, tokens, width = part.shape
        parts.append(part.view(batch, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4))
    m0, m1 = state.get(f"{name}.attn.attn_mixer", torch.ones(2, dtype=torch.float64))
    (qs, ks, vs), (qa, ka, va) = parts
    logits = (m0 * (qs @ ks.mT) + m1 * (qa @ ka.mT)) / math.sqrt(2 * qs.shape[-1])
    weights = logits.softmax(-1)
    mixed = official_linear(
        state,
        f"{name}.attn.proj",
        ((weights @ vs).transpose(1, 2).flatten(2), (weights @ va).transpose(1, 2).flatten(2)),
    )
    x = official_residual(state, f"{name}.gamma_1", x, mixed)
    s, a = official_linear(state, f"{name}.mlp.fc1", official_norm(state, f"{name}.norm2", x, eps))
    u, v = F.gelu(KAPPA * (s + a)), F.gelu(KAPPA * (s - a))
    hidden = (KAPPA * (u + v), KAPPA * (u - v))
    return official_residual(state, f"{name}.gamma_2", x, official_linear(state, f"{name}.mlp.fc2", hidden))


def official_residual(state: State, name: str, x: Pair, y: Pair) -> Pair:
    return x[0] + state[f"{name}.alpha_sym"] * y[0], x[1] + state[f"{name}.alpha_asym"] * y[1]


def deit_block(state: State, name: str, x: Tensor, heads: int) -> Tensor:
    def linear(part: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.{part}.weight"], state.get(f"{name}.{part}.bias"))

    def norm(j: int, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.norm{j}.weight"], state[f"{name}.norm{j}.bias"], 1e-6)

    batch, tokens, width = x.shape
    q, k, v = linear("attn.qkv", norm(1, x)).view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / math.sqrt(width / heads)).softmax(-1)
    x = x + state[f"{name}.gamma_1"] * linear("attn.proj", (weights @ v).transpose(1, 2).flatten(2))
    return x + state[f"{name}.gamma_2"] * linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm(2, x))))


@pytest.mark.parametrize("name", GOLDENS)
def test_the_formulas_above_are_the_official_code(name: str) -> None:
    config, state, images, features, logits = golden(name)
    state = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
    design = "hybrid" if name.endswith("hybrid") else "equivariant"
    found = official_features(state, images.double(), config["num_heads"], design=design)
    assert relative_error(found, features) < 1e-12
    assert relative_error(F.linear(found, state["head.weight"], state["head.bias"]), logits) < 1e-12


CASES: dict[str, dict[str, Any]] = {
    "every block": {},
    "symmetrised features": {"norms": True},
    "hybrid": {"design": "hybrid"},
    "hybrid, odd depth": {"design": "hybrid", "depth": 3},
    "early invariants": {"design": "invariant"},
    "attention mixer": {"mixer": True},
    "attention mixer, hybrid": {"mixer": True, "design": "hybrid"},
    "attention mixer, no bias": {"mixer": True, "qkv_bias": False},
    "no qkv bias": {"qkv_bias": False},
    "no qkv bias, early invariants": {"qkv_bias": False, "design": "invariant"},
    "wide grid": {"grid": (2, 6)},
    "tall grid": {"grid": (5, 2)},
    "oblong patches": {"patch": (6, 4)},
    "gray images": {"chans": 1},
    "other width": {"channels": 40, "heads": 5, "depth": 3},
    "one head": {"heads": 1},
}


def case(**options: Any) -> tuple[State, Any, Tensor, Tensor]:
    """An official state dict, a fresh model of ours, images, and the official logits."""
    defaults: dict[str, Any] = {"channels": 24, "depth": 2, "heads": 2, "patch": (8, 8), "grid": (4, 4), "chans": 3}
    options = defaults | options
    design, heads, norms = options.get("design", "equivariant"), options["heads"], options.get("norms", False)
    state = random_state(**options)
    size = tuple(g * p for g, p in zip(options["grid"], options["patch"], strict=True))
    model = timm.create_model(
        DESIGNS[design],
        img_size=size,
        patch_size=options["patch"],
        embed_dim=options["channels"],
        depth=options["depth"],
        num_heads=heads,
        num_classes=5,
        in_chans=options["chans"],
        qkv_bias=options.get("qkv_bias", True),
        **({"invariants": "norm"} if norms else {}),
    )
    images = torch.randn(2, options["chans"], *size, dtype=torch.float64)
    features = official_features(state, images, heads, design=design, norms=norms)
    return state, model.double().eval(), images, F.linear(features, state["head.weight"], state["head.bias"])


@pytest.mark.parametrize("name", CASES)
def test_other_official_networks(name: str) -> None:
    state, model, images, logits = case(**CASES[name])
    given = {key: value.clone() for key, value in state.items()}
    converted = convert_official(state, model)
    assert all(torch.equal(state[key], value) for key, value in given.items()), "the caller's weights were changed"
    assert list(converted) == list(model.state_dict())
    model.load_state_dict(converted)
    with torch.no_grad():
        assert relative_error(model(images), logits) < 1e-10
    single = model.float()
    single.load_state_dict(convert_official({k: v.float() for k, v in state.items()}, single))
    with torch.no_grad():
        assert relative_error(single(images.float()), logits) < 1e-5


def test_converting_twice_gives_the_same() -> None:
    state, model, _, _ = case(mixer=True)
    first = {key: value.clone() for key, value in convert_official(state, model).items()}
    second = convert_official(state, model)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_integer_permutation_may_be_absent_or_of_another_dtype() -> None:
    state, model, images, logits = case()
    key = "patch_embed.flatten_and_permute.permutation"
    state[key] = state[key].int()
    model.load_state_dict(convert_official(state, model))
    assert relative_error(model(images), logits) < 1e-10
    del state[key]
    assert set(convert_official(state, model)) == set(model.state_dict())


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_full_size_shapes_fit(size: str) -> None:
    """Key by key and shape by shape, for models as they are registered; the values do not matter here."""
    model = timm.create_model(f"flop_deit3_{size}_patch16_224")
    heads = model.blocks[0].attn.num_heads
    state = random_state(model.embed_dim, 12, heads, (16, 16), (14, 14), classes=1000)
    model.load_state_dict(convert_official(state, model), strict=True)
    assert torch.equal(model.head.weight, state["head.weight"].float())


def with_entry(state: State, key: str, value: Any) -> State:
    return {**state, key: value}


def without(state: State, key: str) -> State:
    return {name: value for name, value in state.items() if name != key}


def test_damaged_or_foreign_state_dicts() -> None:
    state, model, _, _ = case()
    qkv = "blocks.1.attn.qkv.linear_asym.weight"
    nan = state[qkv].clone()
    nan[3, 2] = math.nan
    order = state["patch_embed.flatten_and_permute.permutation"].flip(0)
    bad: list[tuple[State, str]] = [
        (without(state, qkv), f"'{qkv}' is missing"),
        (with_entry(state, qkv, state[qkv][:, :-1]), rf"'{qkv}' has shape \(36, 11\) where the model needs \(36, 12\)"),
        (
            with_entry(state, "blocks.2.norm1.scaling.beta", torch.zeros(12)),
            "'blocks.2.norm1.scaling.beta' has no place",
        ),
        (with_entry(state, qkv, nan), f"'{qkv}' holds NaN or infinity"),
        (with_entry(state, qkv, state[qkv] / 0.0), f"'{qkv}' holds NaN or infinity"),
        (with_entry(state, "patch_embed.flatten_and_permute.permutation", order), "token order of a 4x4 grid"),
        (with_entry(state, "cls_token.1", torch.ones(1, 1, 12)), "'cls_token.1' is not zero"),
        (with_entry(state, qkv, "text"), f"'{qkv}' is a str, not a tensor"),
        ({}, "missing"),
        ({"head.weight": torch.zeros(5, 12)}, "missing"),
    ]
    for wrong, message in bad:
        with pytest.raises(ValueError, match=message):
            convert_official(wrong, model)


def test_models_that_do_not_fit() -> None:
    state, _, _, _ = case()
    options: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    wrong: list[tuple[str, dict[str, Any], str]] = [
        (DESIGNS["equivariant"], {"embed_dim": 32}, r"shape \(12, 3, 8, 4\) where the model needs \(16, 3, 8, 4\)"),
        (DESIGNS["equivariant"], {"depth": 3}, "blocks.2.* is missing"),
        (DESIGNS["equivariant"], {"depth": 1}, "blocks.1.* has no place"),
        (DESIGNS["equivariant"], {"num_classes": 4}, "head.weight.*shape"),
        (DESIGNS["equivariant"], {"invariants": "norm"}, "head.weight.*shape"),
        (DESIGNS["equivariant"], {"qkv_bias": False}, "qkv.linear_sym.bias' has no place"),
        (DESIGNS["equivariant"], {"img_size": 48}, "token order|pos_embed"),
        (DESIGNS["equivariant"], {"reg_tokens": 2}, "'reg_token' of the model has no counterpart"),
        (DESIGNS["hybrid"], {}, "is missing"),
        (DESIGNS["equivariant"], {"patch_size": 7, "img_size": 28}, "odd in width"),
        (DESIGNS["equivariant"], {"group": "updown"}, "no official counterpart"),
        (DESIGNS["equivariant"], {"group": "octic", "num_heads": 1}, "octic in every block"),
    ]
    for name, changes, message in wrong:
        model = timm.create_model(name, **{**options, **changes})
        with pytest.raises(ValueError, match=message):
            convert_official(state, model)
    plain = timm.create_model("deit3_small_patch16_224", **options)
    with pytest.raises(ValueError, match="VisionTransformer has no official counterpart"):
        convert_official(state, plain)


def test_conversion_is_not_the_identity() -> None:
    """A model that ignored its weights would pass no test above; nor does a converted network stop being mirrored."""
    state, model, images, logits = case()
    model.load_state_dict(convert_official(state, model))
    assert equiflop.check(model, randomize=False).passed
    assert relative_error(model(images + 1.0), logits) > 1e-3
