"""The official octic ViT as plain formulas on its own state dict, and random state dicts for it.

Written from the description of what it computes: features are 8-tuples (A1, A2, B1, B2, E left row 0 and 1, E right
row 0 and 1). Nothing here uses the library.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
IRREPS = ("A1", "A2", "B1", "B2")
TURN_AND_MIRROR = {"A1": (1, 1), "A2": (1, -1), "B1": (-1, 1), "B2": (-1, -1)}
# Rows: regular components; columns: isotypic ones.
SIGNS = """
+ + + + + + + -
+ + - - + - - -
+ + + + - - - +
+ + - - - + + +
+ - + - - + - -
+ - - + - - + -
+ - + - + - + +
+ - - + + + - +
"""
BASIS = (
    math.sqrt(2)
    / 4
    * torch.tensor(
        [[1.0 if sign == "+" else -1.0 for sign in line.split()] for line in SIGNS.strip().splitlines()],
        dtype=torch.float64,
    )
)


def unfold(quadrant: Tensor, name: str, scale: float, scale_of_e: float) -> list[Tensor]:
    """Squares ``(..., 2h, 2h)`` of a top-left quadrant ``(..., h, h)``: one, or two for E."""
    h = quadrant.shape[-1]
    square = quadrant.new_zeros((*quadrant.shape[:-2], 2 * h, 2 * h))
    square[..., :h, :h] = quadrant
    if name.startswith("E"):
        column = square + square.flip(-2)
        first = scale_of_e * (column - column.flip(-1))
        return [first, torch.rot90(first, 1, (-2, -1))]
    turn, mirror = TURN_AND_MIRROR[name]
    total = torch.zeros_like(square)
    for k in range(4):
        turned = torch.rot90(square, k, (-2, -1))
        total += turn**k * (turned + mirror * turned.flip(-1))
    return [scale * total]


def octic_vit(state: State, images: Tensor, heads: int, octic_blocks: int, invariant: bool) -> Tensor:
    """Normalised features of all tokens, ``(B, N, C)``."""
    x = []
    for name in (*IRREPS, "E_left", "E_right"):
        key = f"patch_embed.lift8.conv_{name}"
        bias = state.get(f"{key}.bias")
        for kernel in unfold(state[f"{key}.weight"], name, math.sqrt(2) / 4, 0.5):
            x.append(F.conv2d(images, kernel, bias, stride=kernel.shape[-1]))
    position = []
    for i, name in enumerate((*IRREPS, "E_left", "E_right")):
        position += unfold(state[f"pos_embed.{i}"].permute(2, 0, 1), name, 1.0, 1.0)
    x = [(part + field).flatten(2).transpose(1, 2) for part, field in zip(x, position, strict=True)]
    for tokens in ("register_tokens", "cls_token"):
        if f"{tokens}.0" in state:
            first = state[f"{tokens}.0"].expand(len(images), -1, -1)
            x = [torch.cat([first if i == 0 else torch.zeros_like(first), part], 1) for i, part in enumerate(x)]
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    for i in range(octic_blocks):
        x = octic_block(state, f"blocks.{i}", x, heads)
    if invariant:
        rows = [torch.sqrt(x[4] ** 2 + x[5] ** 2), torch.sqrt(x[6] ** 2 + x[7] ** 2)]
        invariants = torch.cat([x[0], x[1].abs(), x[2].abs(), x[3].abs(), *rows], -1)
        y = F.linear(invariants, state["invariant_proj.weight"], state["invariant_proj.bias"])
    else:
        y = torch.cat(x, -1)
    for i in range(octic_blocks, depth):
        y = plain_block(state, f"blocks.{i}", y, heads)
    return F.layer_norm(y, y.shape[-1:], state["norm.weight"], state["norm.bias"], 1e-6)


def norm(state: State, name: str, x: list[Tensor]) -> list[Tensor]:
    singles = [part - part.mean(-1, keepdim=True) for part in x[:4]]
    rows = [torch.cat([x[4], x[6]], -1), torch.cat([x[5], x[7]], -1)]
    rows = [row - row.mean(-1, keepdim=True) for row in rows]
    squares = [(part**2).mean(-1, keepdim=True) for part in singles]
    squares += [0.5 * (row**2).mean(-1, keepdim=True) for row in rows]
    total = torch.stack(squares).sum(0) + 1e-5
    sigma = math.sqrt(2) / 4 * torch.sqrt(total)
    alpha = state[f"{name}.scaling.alpha_E"]
    singles = [part / sigma * state[f"{name}.scaling.alpha_{i}"] for part, i in zip(singles, IRREPS, strict=True)]
    singles[0] = singles[0] + state[f"{name}.scaling.beta"]
    (left0, right0), (left1, right1) = ((row / sigma * alpha).chunk(2, -1) for row in rows)
    return [*singles, left0, left1, right0, right1]


def linear(state: State, name: str, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """One-dimensional irreps, and the two rows of E with both copies."""
    bias = state.get(f"{name}.lin_A1.bias")
    singles = [
        F.linear(part, state[f"{name}.lin_{irrep}.weight"], bias if irrep == "A1" else None)
        for part, irrep in zip(x[:4], IRREPS, strict=True)
    ]
    weight = state[f"{name}.lin_E.weight"]
    return singles, [F.linear(torch.cat([x[4 + row], x[6 + row]], -1), weight) for row in (0, 1)]


def octic_block(state: State, name: str, x: list[Tensor], heads: int) -> list[Tensor]:
    singles, rows = linear(state, f"{name}.attn.qkv", norm(state, f"{name}.norm1", x))
    batch, tokens, _ = x[0].shape
    parts = [part.view(batch, tokens, 3, heads, -1) for part in (*singles, *rows)]
    sizes = [part.shape[-1] for part in parts]
    q, k, v = torch.cat(parts, -1).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
    pieces = [piece.transpose(1, 2).flatten(2) for piece in mixed.split(sizes, -1)]
    rows = pieces[4:]
    (left0, right0), (left1, right1) = (row.chunk(2, -1) for row in rows)
    x = residual(state, name, "1", x, linear(state, f"{name}.attn.proj", [*pieces[:4], left0, left1, right0, right1]))
    singles, rows = linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.norm2", x))
    (left0, right0), (left1, right1) = (row.chunk(2, -1) for row in rows)
    isotypic = torch.stack([*singles, left0, left1, right0, right1])
    regular = torch.einsum("yx,x...->y...", BASIS, isotypic)
    hidden = list(torch.einsum("yx,y...->x...", BASIS, F.gelu(regular)))
    return residual(state, name, "2", x, linear(state, f"{name}.mlp.fc2", hidden))


def residual(
    state: State, name: str, branch: str, x: list[Tensor], y: tuple[list[Tensor], list[Tensor]]
) -> list[Tensor]:
    singles, rows = y
    for key in (f"{name}.gamma_{branch}", f"{name}.ls{branch}"):
        if f"{key}.alpha_E" in state:
            singles = [part * state[f"{key}.alpha_{i}"] for part, i in zip(singles, IRREPS, strict=True)]
            rows = [row * state[f"{key}.alpha_E"] for row in rows]
    (left0, right0), (left1, right1) = (row.chunk(2, -1) for row in rows)
    return [a + b for a, b in zip(x, [*singles, left0, left1, right0, right1], strict=True)]


def plain_block(state: State, name: str, x: Tensor, heads: int) -> Tensor:
    def apply(part: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.{part}.weight"], state.get(f"{name}.{part}.bias"))

    def normed(part: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.{part}.weight"], state[f"{name}.{part}.bias"], 1e-6)

    def scaled(branch: str, x: Tensor) -> Tensor:
        gammas = [state[k] for k in (f"{name}.gamma_{branch}", f"{name}.ls{branch}.gamma") if k in state]
        return x * gammas[0] if gammas else x

    batch, tokens, width = x.shape
    q, k, v = apply("attn.qkv", normed("norm1", x)).view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.mT / math.sqrt(width / heads)).softmax(-1) @ v
    x = x + scaled("1", apply("attn.proj", mixed.transpose(1, 2).flatten(2)))
    return x + scaled("2", apply("mlp.fc2", F.gelu(apply("mlp.fc1", normed("norm2", x)))))


def octic_state(
    channels: int = 32,
    depth: int = 2,
    octic_blocks: int = 1,
    patch: int = 4,
    side: int = 4,
    *,
    invariant: bool = False,
    dino: bool = False,
    registers: int = 0,
    class_token: bool = True,
    qkv_bias: bool = True,
    layer_scale: bool = True,
    classes: int = 5,
    chans: int = 3,
    seed: int = 0,
) -> State:
    """An official state dict with all parameters of order one; ``side`` tokens a side."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return noise / shape[-1] ** 0.5 if len(shape) > 1 else 0.3 + noise.abs()

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    c = channels // 8
    state: State = {}
    for i, name in enumerate((*IRREPS, "E_left", "E_right")):
        state[f"patch_embed.lift8.conv_{name}.weight"] = random(c, chans, patch // 2, patch // 2)
        state[f"pos_embed.{i}"] = random(side // 2, side // 2, c)
    state["patch_embed.lift8.conv_A1.bias"] = random(c)
    if class_token:
        state["cls_token.0"] = random(1, 1, c)
        state |= {f"cls_token.{i}": zeros(1, 1, c) for i in range(1, 8 if dino else 4)}
        if not dino:
            state["cls_token.4"] = zeros(1, 1, 2, 2 * c)
    if dino:
        state |= {f"mask_token.{i}": random(1, c) for i in range(8)}
    if registers:
        state["register_tokens.0"] = random(1, registers, c)
        state |= {f"register_tokens.{i}": zeros(1, registers, c) for i in range(1, 8)}
    shapes = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for i in range(depth):
        block = f"blocks.{i}"
        for part, (rows, columns) in shapes.items():
            bias = qkv_bias or part != "attn.qkv"
            if i < octic_blocks:
                for irrep in IRREPS:
                    state[f"{block}.{part}.lin_{irrep}.weight"] = random(rows * c, columns * c)
                state[f"{block}.{part}.lin_E.weight"] = random(2 * rows * c, 2 * columns * c)
                if bias:
                    state[f"{block}.{part}.lin_A1.bias"] = random(rows * c)
            else:
                state[f"{block}.{part}.weight"] = random(rows * channels, columns * channels)
                if bias:
                    state[f"{block}.{part}.bias"] = random(rows * channels)
        for j in (1, 2):
            scale = f"{block}.ls{j}" if dino else f"{block}.gamma_{j}"
            if i < octic_blocks:
                state |= {f"{block}.norm{j}.scaling.alpha_{irrep}": random(c) for irrep in IRREPS}
                state[f"{block}.norm{j}.scaling.alpha_E"] = random(2 * c)
                state[f"{block}.norm{j}.scaling.beta"] = random(c)
                if layer_scale:
                    state |= {f"{scale}.alpha_{irrep}": random(c) for irrep in IRREPS}
                    state[f"{scale}.alpha_E"] = random(2 * c)
            else:
                state[f"{block}.norm{j}.weight"], state[f"{block}.norm{j}.bias"] = random(channels), random(channels)
                if layer_scale:
                    state[f"{scale}.gamma" if dino else scale] = random(channels)
    if invariant:
        state["invariant_proj.weight"], state["invariant_proj.bias"] = random(channels, 6 * c), random(channels)
    state["norm.weight"], state["norm.bias"] = random(channels), random(channels)
    if classes:
        state["head.weight"], state["head.bias"] = random(classes, channels), random(classes)
    return state


def options_of(state: State, **options: Any) -> dict[str, Any]:
    """Keywords of our entry points for the sizes of a state dict."""
    classes, channels = state.get("head.weight", torch.empty(0, 0)).shape[0], state["norm.weight"].shape[0]
    patch = 2 * state["patch_embed.lift8.conv_A1.weight"].shape[-1]
    return {
        "img_size": 2 * state["pos_embed.0"].shape[0] * patch,
        "patch_size": patch,
        "embed_dim": channels,
        "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "in_chans": state["patch_embed.lift8.conv_A1.weight"].shape[1],
        "num_classes": classes,
        **options,
    }
