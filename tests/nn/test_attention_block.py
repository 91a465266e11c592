"""Attention, Mlp, Block, Dropout and Invariants against dense computations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equiflop import Rep
from equiflop.groups import flop
from equiflop.nn import Attention, Block, Dropout, Invariants, Mlp
from oracles import (
    LAYER_GROUPS,
    dense_attention,
    dense_linear,
    dense_norm,
    group,
    relative_error,
    scramble,
    tensor_action,
    to_spatial,
)


@given(name=st.sampled_from(LAYER_GROUPS), heads=st.integers(1, 3), data=st.data())
@settings(max_examples=60)
def test_attention_is_the_dense_one_and_commutes(name: str, heads: int, data: st.DataObject) -> None:
    g = group(name)
    shares = data.draw(st.lists(st.integers(1, 2), min_size=len(g.irreps), max_size=len(g.irreps)))
    rep = Rep(g, [heads * share for share in shares])
    layer = scramble(Attention(rep, heads, qkv_bias=data.draw(st.booleans()), dtype=torch.float64))
    x = torch.randn(2, data.draw(st.integers(1, 5)), rep.dim, dtype=torch.float64)
    found = layer(x).detach()
    assert (found - dense_attention(layer, x)).abs().max() < 1e-12
    for a in range(g.order):
        moved = layer(x @ tensor_action(rep, a).T) - found @ tensor_action(rep, a).T
        assert moved.abs().max() < 1e-12


def test_attention_with_absent_irreps() -> None:
    rep = Rep(group("D4"), (4, 0, 0, 0, 2))
    layer = scramble(Attention(rep, 2, dtype=torch.float64))
    x = torch.randn(1, 3, rep.dim, dtype=torch.float64)
    assert relative_error(layer(x), dense_attention(layer, x)) < 1e-12


def test_attention_moves_with_the_tokens() -> None:
    rep = Rep.regular(flop(), 6)
    layer = scramble(Attention(rep, 3, dtype=torch.float64))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    order = torch.randperm(7)
    assert (layer(x[:, order]) - layer(x)[:, order]).abs().max() < 1e-12


def test_attention_mask_and_causality() -> None:
    rep = Rep.regular(flop(), 4)
    layer = scramble(Attention(rep, 2, dtype=torch.float64))
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    causal = layer(x, is_causal=True)
    assert (causal - layer(x, attn_mask=mask)).abs().max() < 1e-12
    changed = x.clone()
    changed[:, 3:] += 1.0
    assert (layer(changed, is_causal=True) - causal)[:, :3].abs().max() < 1e-12


def test_attention_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"num_heads=4 does not divide.*divisor of 6"):
        Attention(Rep.regular(flop(), 6), 4)
    with pytest.raises(ValueError, match="num_heads=0"):
        Attention(Rep.regular(flop(), 6), 0)


def dense_mlp(layer: Mlp, x: Tensor) -> Tensor:
    spatial = torch.from_numpy(to_spatial(layer.fc1.out_rep))
    (w1, b1), (w2, b2) = dense_linear(layer.fc1), dense_linear(layer.fc2)
    hidden = F.gelu((x @ w1.T + b1) @ spatial.T) @ spatial
    return hidden @ w2.T + b2


@given(name=st.sampled_from(LAYER_GROUPS), copies=st.integers(1, 3), hidden=st.integers(1, 4), bias=st.booleans())
@settings(max_examples=60)
def test_mlp_is_the_dense_one_and_commutes(name: str, copies: int, hidden: int, bias: bool) -> None:
    g = group(name)
    rep = Rep.regular(g, copies)
    layer = scramble(Mlp(rep, Rep.regular(g, hidden), bias=bias, dtype=torch.float64))
    x = torch.randn(2, 3, rep.dim, dtype=torch.float64)
    found = layer(x).detach()
    assert (found - dense_mlp(layer, x)).abs().max() < 1e-12
    for a in range(g.order):
        assert (layer(x @ tensor_action(rep, a).T) - found @ tensor_action(rep, a).T).abs().max() < 1e-12


@pytest.mark.parametrize("name", LAYER_GROUPS)
@pytest.mark.parametrize("weighting", ["entries", "octic"])
def test_block_is_the_dense_one_and_commutes(name: str, weighting: str) -> None:
    g = group(name)
    rep = Rep.regular(g, 4)
    block = Block(rep, 2, init_values=0.5, norm_eps=1e-3, norm_weighting=weighting, dtype=torch.float64)  # type: ignore[arg-type]
    scramble(block).eval()
    x = torch.randn(2, 5, rep.dim, dtype=torch.float64)
    found = block(x).detach()
    if weighting == "entries":
        y = x + dense_scale(block.ls1, dense_attention(block.attn, dense_norm(x, rep, 1e-3, *affine(block.norm1))))
        y = y + dense_scale(block.ls2, dense_mlp(block.mlp, dense_norm(y, rep, 1e-3, *affine(block.norm2))))
        assert relative_error(found, y) < 1e-12
    for a in range(g.order):
        assert relative_error(block(x @ tensor_action(rep, a).T), found @ tensor_action(rep, a).T) < 1e-12


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    return norm.weight.detach(), norm.bias.detach()


def dense_scale(layer: Any, x: Tensor) -> Tensor:
    counts = [(irrep.dim, m) for irrep, m in zip(layer.rep.group.irreps, layer.rep.multiplicities, strict=True)]
    parts = layer.gamma.detach().split([m for _, m in counts])
    return x * torch.cat([part.repeat(d) for part, (d, _) in zip(parts, counts, strict=True)])


def test_block_without_layer_scale_or_hidden_fit() -> None:
    rep = Rep.regular(group("D4"), 2)
    assert not any("ls" in key for key in Block(rep, 2).state_dict())
    with pytest.raises(ValueError, match=r"mlp_ratio.*=20 is not divisible by \|G\|=8 \(group D4\)"):
        Block(rep, 2, mlp_ratio=1.25)


def test_drop_path_drops_whole_samples() -> None:
    rep = Rep.regular(flop(), 4)
    block = scramble(Block(rep, 2, init_values=1.0, drop_path=0.5, dtype=torch.float64)).train()
    x = torch.randn(1, 3, 8, dtype=torch.float64).expand(64, -1, -1)
    y = block(x).detach()
    kinds = {tuple(row.flatten().round(decimals=8).tolist()) for row in y}
    assert 2 <= len(kinds) <= 4  # each of two branches kept or dropped, for all tokens and channels together
    for a in (0, 1):
        torch.manual_seed(3)
        moved = block(x @ tensor_action(rep, a).T)
        torch.manual_seed(3)
        assert relative_error(moved, block(x) @ tensor_action(rep, a).T) < 1e-12


@given(name=st.sampled_from(LAYER_GROUPS), p=st.sampled_from([0.1, 0.5, 0.9]), seed=st.integers(0, 100), data=st.data())
@settings(max_examples=60)
def test_dropout_commutes_with_the_group(name: str, p: float, seed: int, data: st.DataObject) -> None:
    g = group(name)
    counts = data.draw(st.lists(st.integers(0, 4), min_size=len(g.irreps), max_size=len(g.irreps)))
    rep = Rep(g, [counts[0] + 1, *counts[1:]])
    layer = Dropout(rep, p).train()
    x = torch.randn(2, 3, rep.dim, dtype=torch.float64)
    for a in range(g.order):
        torch.manual_seed(seed)
        moved = layer(x @ tensor_action(rep, a).T)
        torch.manual_seed(seed)
        assert (moved - layer(x) @ tensor_action(rep, a).T).abs().max() < 1e-12
    assert torch.equal(layer.eval()(x), x)


def test_dropout_keeps_the_mean_and_drops_rows_together() -> None:
    rep = Rep(group("D4"), (0, 0, 0, 0, 500))
    found = Dropout(rep, 0.25).train()(torch.ones(50, 1000))
    assert found.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert found.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(found[:, :500], found[:, 500:])
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"p={p} is not a probability"):
            Dropout(rep, p)


def test_mlp_and_attention_dropout_train() -> None:
    rep = Rep.regular(group("D4"), 4)
    block = scramble(Block(rep, 2, proj_drop=0.3, attn_drop=0.3)).train()
    x = torch.randn(2, 4, rep.dim)
    torch.manual_seed(0)
    first = block(x)
    torch.manual_seed(1)
    assert not torch.equal(first, block(x))
    assert torch.equal(block.eval()(x), block(x))


@given(name=st.sampled_from(LAYER_GROUPS), data=st.data())
@settings(max_examples=60)
def test_invariants(name: str, data: st.DataObject) -> None:
    g = group(name)
    counts = data.draw(st.lists(st.integers(0, 3), min_size=len(g.irreps), max_size=len(g.irreps)))
    rep = Rep(g, [counts[0] + 1, *counts[1:]])
    x = torch.randn(2, 3, rep.dim, dtype=torch.float64)
    expected = []
    start = 0
    for i, (irrep, m) in enumerate(zip(g.irreps, rep.multiplicities, strict=True)):
        rows = torch.stack([x[..., start + row * m : start + (row + 1) * m] for row in range(irrep.dim)])
        expected.append(rows[0] if i == 0 else rows.square().sum(0).sqrt())
        start += irrep.dim * m
    norm, trivial = Invariants(rep, "norm"), Invariants(rep)
    assert norm.out_features == sum(rep.multiplicities) and trivial.out_features == rep.multiplicities[0]
    assert (norm(x) - torch.cat(expected, -1)).abs().max() < 1e-14
    assert torch.equal(trivial(x), expected[0])
    for a in range(g.order):
        moved = x @ tensor_action(rep, a).T
        assert (norm(moved) - norm(x)).abs().max() < 1e-12
        assert (trivial(moved) - trivial(x)).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["C2", "D4", "Q8"])
def test_gradient_of_the_norm_at_zero_is_zero(name: str) -> None:
    """Class tokens have zeros outside the trivial irrep."""
    rep = Rep.regular(group(name), 2)
    x = torch.zeros(1, rep.dim, requires_grad=True)
    Invariants(rep, "norm")(x).sum().backward()
    expected = torch.zeros(1, rep.dim)
    expected[:, : rep.multiplicities[0]] = 1.0
    assert x.grad is not None and torch.equal(x.grad, expected)


def test_published_mirror_attention() -> None:
    """Head vector [s-part | a-part], logits scaled by (C/H)^-1/2, from the published formula."""
    half, heads, tokens = 6, 3, 5
    rep = Rep.regular(flop(), half)
    layer = scramble(Attention(rep, heads, dtype=torch.float64))
    x = torch.randn(1, tokens, 2 * half, dtype=torch.float64)
    parts = []
    assert layer.qkv.bias is not None
    for name, channels, bias in (("A", x[..., :half], layer.qkv.bias), ("B", x[..., half:], 0.0)):
        qkv = channels @ layer.qkv.get_parameter(f"{name}.weight").T + bias
        parts.append([t.view(tokens, heads, half // heads).transpose(0, 1) for t in qkv[0].split(half, -1)])
    logits = sum(part[0] @ part[1].mT for part in parts) / math.sqrt(2 * half / heads)
    weights = logits.softmax(-1)
    s, a = ((weights @ part[2]).transpose(0, 1).flatten(1) for part in parts)
    s = s @ layer.proj.get_parameter("A.weight").T + layer.proj.bias
    a = a @ layer.proj.get_parameter("B.weight").T
    assert relative_error(layer(x)[0], torch.cat([s, a], -1)) < 1e-12
