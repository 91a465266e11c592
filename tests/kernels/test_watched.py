"""The switch to the references, and modules that somebody watches or replaced: then they are really called."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from equiflop import Rep, kernels
from equiflop.kernels import TABLE, choose
from equiflop.nn import Block
from equiflop.nn.mlp import Mlp
from oracles import group, relative_error, scramble


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations of which a variant was taken, in order."""
    names: list[str] = []
    whole = choose.choose

    def noting(operation: str, *args: Any) -> Callable[..., Any] | None:
        kernel = whole(operation, *args)
        if kernel is not None:
            names.extend([operation] * (len(args[2]) if operation == "branches" else 1))  # one for every branch
        return kernel

    for module in ("branch", "norm"):
        monkeypatch.setattr(f"equiflop.kernels.{module}.choose", noting)
    return names


def block_of(name: str = "C2", **options: Any) -> Block:
    rep = Rep.regular(group(name), 4)
    return scramble(Block(rep, 2, init_values=0.5, **options, dtype=torch.float64))


def features(block: Block) -> Tensor:
    return torch.randn(2, 5, block.rep.dim, dtype=torch.float64)


def test_the_context_forces_the_references(taken: list[str]) -> None:
    block = block_of()
    x = features(block)
    block(x)
    assert taken.count("branches") == 2
    taken.clear()
    with kernels.reference():
        with kernels.reference():
            block(x)
        block(x)
        assert taken == []
    block(x)
    assert taken.count("branches") == 2
    taken.clear()
    with pytest.raises(RuntimeError, match="on purpose"), kernels.reference():
        raise RuntimeError("on purpose")
    block(x)
    assert taken.count("branches") == 2


@pytest.mark.parametrize(("value", "forced"), [("reference", True), ("", False), ("other", False)])
def test_the_environment_variable(value: str, forced: bool) -> None:
    program = (
        "import torch; from equiflop import Rep, kernels; from equiflop.kernels import choose, branch; "
        "from equiflop.groups import flop; from equiflop.nn import Block; "
        "ran = []; eager = branch._body; branch._body = lambda *a, **k: (ran.append(1), eager(*a, **k))[1]; "
        "Block(Rep.regular(flop(), 4), 2)(torch.randn(1, 3, 8)); print(len(ran))"
    )
    environment = {**os.environ, "EQUIFLOP_KERNELS": value}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ("0" if forced else "2")


def test_compiled_functions_are_compiled_anew_for_the_references() -> None:
    block = block_of()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = features(block)
    first = compiled(x)
    with kernels.reference():
        assert relative_error(compiled(x), first) < 1e-12
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


LEAVES = (
    "norm1",
    "attn",
    "attn.qkv",
    "attn.qkv.A",
    "attn.qkv.B",
    "attn.q_norm",
    "attn.k_norm",
    "attn.norm",
    "attn.attn_drop",
    "attn.proj",
    "attn.proj.A",
    "attn.proj_drop",
    "ls1",
    "drop_path1",
    "norm2",
    "mlp",
    "mlp.fc1",
    "mlp.fc1.A",
    "mlp.act",
    "mlp.drop1",
    "mlp.norm",
    "mlp.fc2",
    "mlp.fc2.B",
    "mlp.drop2",
    "ls2",
    "drop_path2",
)
#: What torch calls of timm's attention where it is fused: there the dropout module is not.
UNCALLED = ("attn.attn_drop",)


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_see_their_module(name: str, kind: str, taken: list[str]) -> None:
    block = block_of(drop_path=0.5).eval()
    x = features(block)
    expected = block(x)
    taken.clear()
    calls: list[str] = []
    module = block.get_submodule(name)
    handle = getattr(module, f"register_{kind}_hook")(lambda *args: calls.append(name))
    found = block(x)
    assert taken.count("branches") == 1  # the other branch still has its kernel
    assert calls == ([] if name in UNCALLED else [name])
    assert relative_error(found, expected) < 1e-12
    handle.remove()
    taken.clear()
    block(x)
    assert taken.count("branches") == 2


@pytest.mark.parametrize("name", ["norm1", "attn.qkv.A", "mlp.fc2", "mlp.act"])
def test_backward_hooks_see_their_module(name: str, taken: list[str]) -> None:
    block = block_of()
    calls: list[str] = []
    block.get_submodule(name).register_full_backward_hook(lambda *args: calls.append(name))
    block(features(block).requires_grad_()).sum().backward()
    assert taken.count("branches") == 1 and calls == [name]


def test_global_hooks_see_everything(taken: list[str]) -> None:
    block = block_of()
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module))
    try:
        block(features(block))
    finally:
        handle.remove()
    assert "branches" not in taken
    called = {name for name, module in block.named_modules() if any(module is other for other in seen)}
    assert {"norm1", "attn.qkv.A", "attn.qkv.B", "mlp.fc1.A", "mlp.act", "mlp.fc2.B", "ls2"} <= called


class Doubled(nn.Module):
    """A parametrisation, or a wrapper around a module."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * (x if self.inner is None else self.inner(x))


@pytest.mark.parametrize("name", ["attn.qkv.A", "attn.proj.B", "mlp.fc1.A", "mlp.fc2.B"])
def test_parametrised_and_wrapped_blocks(name: str, taken: list[str]) -> None:
    """A child whose output doubles counts twice, whether through its weights or a wrapper around it."""
    x = features(block_of())
    expected = block_of(qkv_bias=False, proj_bias=False)
    with torch.no_grad():
        expected.get_submodule(name).weight.mul_(2.0)  # type: ignore[operator]
    parametrised, wrapped = (block_of(qkv_bias=False, proj_bias=False) for _ in range(2))
    parametrize.register_parametrization(parametrised.get_submodule(name), "weight", Doubled())
    parent, _, child = name.rpartition(".")
    setattr(wrapped.get_submodule(parent), child, Doubled(wrapped.get_submodule(name)))
    taken.clear()
    for block in (parametrised, wrapped):
        assert relative_error(block(x), expected(x)) < 1e-12
    assert taken.count("branches") == 2 * 1 + 2 * 2  # the other branch of either, and both of what is expected, twice


@pytest.mark.parametrize("name", ["norm1", "attn", "attn.qkv", "attn.proj_drop", "ls1", "mlp", "mlp.fc2", "norm2"])
def test_replaced_modules_are_called(name: str, taken: list[str]) -> None:
    block = block_of()
    x = features(block)
    expected = block(x)
    parent, _, child = name.rpartition(".")
    inner = block.get_submodule(name)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    setattr(block.get_submodule(parent), child, Wrapper())
    taken.clear()
    assert relative_error(block(x), expected) < 1e-12
    assert taken.count("branches") == 1


def test_replaced_forward_is_called(taken: list[str]) -> None:
    block = block_of()
    block.mlp.act.forward = lambda x: torch.zeros_like(x)
    x = features(block)
    with kernels.reference():
        expected = block(x)
    assert relative_error(block(x), expected) < 1e-12
    assert taken.count("branches") == 1


def test_an_activation_that_is_not_pointwise_is_called_with_the_whole_axis(taken: list[str]) -> None:
    """Only the class that the MLP was made with is known to be pointwise."""
    block = block_of()
    block.mlp.act = nn.Softmax(dim=-1)
    x = features(block)
    found = block(x)
    assert taken.count("branches") == 1
    with kernels.reference():
        assert relative_error(found, block(x)) < 1e-12


def test_frozen_and_missing_parts(taken: list[str]) -> None:
    """Parameters that need no gradient, and layer scales replaced by identities, do not end the kernel."""
    block = block_of().requires_grad_(False)
    block.ls1 = nn.Identity()
    x = features(block).requires_grad_()
    found = torch.autograd.grad(block(x).square().sum(), x)
    assert taken.count("branches") == 2
    with kernels.reference():
        expected = torch.autograd.grad(block(x).square().sum(), x)
    assert relative_error(found[0], expected[0]) < 1e-12


def test_dropout_in_training_calls_the_modules(taken: list[str]) -> None:
    block = block_of(proj_drop=0.5, attn_drop=0.5).train()
    block(features(block))
    assert "branches" not in taken
    block.eval()(features(block))
    assert taken.count("branches") == 2


def test_exports_keep_plain_operators() -> None:
    block = block_of().eval()
    x = features(block)
    exported = torch.export.export(block, (x,)).module()
    assert relative_error(exported(x), block(x)) < 1e-12


def test_subclasses_that_override_forward_are_called(taken: list[str]) -> None:
    class Louder(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    block = block_of()
    plain = block.mlp
    block.mlp = scramble(Louder(block.rep, 4 * block.rep, dtype=torch.float64))
    block.mlp.load_state_dict(plain.state_dict())
    x = features(block)
    found = block(x)
    with kernels.reference():
        assert relative_error(found, block(x)) < 1e-12
    assert taken.count("branches") == 1


def test_operations_of_the_table_are_chosen_by_name() -> None:
    with pytest.raises(KeyError):
        choose.choose("nothing")
    assert set(TABLE) == {"branches", "attention", "activation", "layer_norm", "linear"}
