"""Multiply-adds (MACs) of a network, counted analytically from its modules.

MACs are those of matrix products, convolutions and attention (``q k^T`` and ``a v``). Every module type that makes some
has a counter here. A forward pass on the meta device (shapes, no numbers) supplies the input shapes, and watches
the products that are really made: a module whose products no counter explains is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import Attention, AttentionPoolLatent, AttentionRope, DiffAttention
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock
from timm.models.vision_transformer_relpos import RelPosAttention
from timm.models.vision_transformer_sam import Attention as SamAttention
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from equiflop.contract import CountsMacs

Counter = Callable[..., int]


def _vectors(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _linear(module: nn.Linear, x: Tensor, *_: Any) -> int:
    return _vectors(x) * module.in_features * module.out_features


def _conv(module: nn.Conv2d, x: Tensor, *_: Any) -> int:
    pixels = 1
    sizes = zip(x.shape[-2:], module.kernel_size, module.stride, module.dilation, _padding(module), strict=True)
    for size, kernel, stride, dilation, padding in sizes:
        pixels *= (size + padding - dilation * (kernel - 1) - 1) // stride + 1
    return x.shape[:-3].numel() * pixels * module.weight.numel()


def _padding(module: nn.Conv2d) -> tuple[int, int]:
    """Total padding along height and width."""
    if isinstance(module.padding, str):
        if module.padding == "valid":
            return 0, 0
        height, width = (d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
        return height, width
    height, width = module.padding
    return 2 * height, 2 * width


def _attention(module: Any, x: Tensor, *_: Any) -> int:
    """The products of queries, keys and values alone; the linear maps are modules of their own."""
    batch, tokens = x.shape[0], x.shape[1]
    return 2 * batch * module.num_heads * tokens * tokens * _head_dim(module)


def _head_dim(module: Any) -> int:
    return module.head_dim if hasattr(module, "head_dim") else module.proj.in_features // module.num_heads


def _attention_with_biases(module: Any, x: Tensor, *_: Any) -> int:
    """As :func:`_attention`; where queries and values have a bias of their own, also the map that made them."""
    own = module.q_bias is not None and not module.qkv_bias_separate
    return _attention(module, x) + (_vectors(x) * module.qkv.weight.numel() if own else 0)


def _differential_attention(module: DiffAttention, x: Tensor, *_: Any) -> int:
    """Two attention maps of ``head_dim`` channels for values of twice as many."""
    batch, tokens = x.shape[0], x.shape[1]
    return 6 * batch * module.num_heads * tokens * tokens * module.head_dim


def _attention_pool(module: AttentionPoolLatent, x: Tensor, *_: Any) -> int:
    return 2 * x.shape[0] * module.num_heads * module.latent_len * x.shape[1] * module.head_dim


def _windowed_attention(module: SamAttention, x: Tensor, *_: Any) -> int:
    """Attention on a grid of tokens, and queries times relative positions along both axes."""
    batch, height, width = x.shape[:3]
    positions = height + width if module.use_rel_pos else 0
    tokens = height * width
    return batch * module.num_heads * tokens * module.head_dim * (2 * tokens + positions)


COUNTERS: dict[type[nn.Module], Counter] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    Attention: _attention,
    AttentionRope: _attention,
    EvaAttention: _attention_with_biases,
    BeitAttention: _attention_with_biases,
    RelPosAttention: _attention,
    ParallelScalingBlock: _attention,
    DiffAttention: _differential_attention,
    DiffParallelScalingBlock: _differential_attention,
    AttentionPoolLatent: _attention_pool,
    SamAttention: _windowed_attention,
}


def counter_of(module: nn.Module) -> Counter | None:
    """How the products of a module of its own are counted: by its method ``macs``, or by a counter for its class."""
    if isinstance(module, CountsMacs):
        return lambda module, *inputs: module.macs(*(x.shape for x in inputs if isinstance(x, Tensor)))
    return next((COUNTERS[base] for base in type(module).__mro__ if base in COUNTERS), None)


def macs(model: nn.Module, input_size: tuple[int, ...] | tuple[tuple[int, ...], ...]) -> int:
    """MACs of one image (batch 1) through a network, in evaluation mode.

    Args:
        model: any network made of modules that have a counter, equivariant or plain.
        input_size: ``(height, width)`` or ``(channels, height, width)``; with two numbers the channels are
            ``model.in_chans``, or 3.
            For anything else, a tuple with the shape of every input without the batch axis, such as ``((n, C),)`` for a
            signal or ``((n, C), (n, n, D))`` for a graph.

    Raises:
        ValueError: if the input size is malformed, or a module makes products that no counter explains.

    >>> import timm
    >>> macs(timm.create_model("deit3_small_patch16_224"), (224, 224))
    4598882304
    """
    model = getattr(model, "_orig_mod", model)
    shapes = _nested_shapes(input_size) or (_input_shape(model, input_size),)
    counted: dict[str, int] = {}
    made = _MadeProducts()
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    with evaluating(model), _hooks(model, counted, made), torch.no_grad(), made:
        inputs = tuple(torch.empty(1, *shape, dtype=dtype, device="meta") for shape in shapes)
        torch.func.functional_call(model, state, inputs)
    types = {name: type(module).__name__ for name, module in model.named_modules()}
    for name in {*counted, *made.products}:
        if counted.get(name, 0) != made.products.get(name, 0):
            raise ValueError(
                f"module {name or 'model'!r} ({types[name]}) makes {made.products.get(name, 0)} MACs where its counter "
                f"says {counted.get(name, 0)}; equiflop.counting.COUNTERS has no counter that fits it"
            )
    return sum(counted.values())


def _nested_shapes(input_size: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of all inputs if ``input_size`` is a sequence of shapes, else an empty tuple."""
    if not isinstance(input_size, (tuple, list)) or not any(isinstance(shape, (tuple, list)) for shape in input_size):
        return ()
    if not all(isinstance(shape, (tuple, list)) and len(shape) and min(shape) >= 1 for shape in input_size):
        raise ValueError(f"input_size={input_size!r} must hold one shape of positive lengths for every input")
    return tuple(tuple(shape) for shape in input_size)


def _input_shape(model: nn.Module, input_size: Any) -> tuple[int, ...]:
    if not isinstance(input_size, (tuple, list)) or len(input_size) not in (2, 3) or min(input_size) < 1:
        raise ValueError(
            f"input_size={input_size!r} must be (height, width) or (channels, height, width), all positive"
        )
    if len(input_size) == 2:
        return (int(getattr(model, "in_chans", 3)), *input_size)
    return tuple(input_size)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a network in evaluation mode, and then every module in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _hooks(model: nn.Module, counted: dict[str, int], made: _MadeProducts) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        counter = counter_of(module)

        def before(
            module: nn.Module, args: tuple[Any, ...], name: str = name, counter: Counter | None = counter
        ) -> None:
            made.stack.append(name)
            if counter is not None:
                counted[name] = counted.get(name, 0) + counter(module, *args)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            made.stack.pop()

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _MadeProducts(TorchDispatchMode):
    """Adds up the multiply-adds of the operators that are really called, by the innermost module that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.products: dict[str, int] = {}
        self.stack: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        product = _macs_of_operator(func.overloadpacket, args, output)
        if product:
            name = self.stack[-1] if self.stack else ""
            self.products[name] = self.products.get(name, 0) + product
        return output


def _macs_of_operator(operator: Any, args: tuple[Any, ...], output: Any) -> int:
    aten = torch.ops.aten
    if operator in (aten.mm, aten.bmm, aten.mv, aten.dot):
        real_products = 4 if output.is_complex() else 1
        return output.numel() * args[0].shape[-1] * real_products
    if operator in (aten._fft_r2c, aten._fft_c2r):  # as CirculantLinear.macs says
        signal = args[0] if operator is aten._fft_r2c else output
        lengths = [signal.shape[dim] for dim in args[1]]
        return signal.numel() * sum((n - 1).bit_length() for n in lengths)
    if operator is aten._fft_c2c:  # twice a real one
        return 2 * output.numel() * sum((output.shape[dim] - 1).bit_length() for dim in args[1])
    if operator in (aten.addmm, aten.baddbmm, aten.addmv):
        return output.numel() * args[1].shape[-1]
    if operator is aten.addbmm:
        return args[1].numel() * args[2].shape[-1]
    if operator is aten._trilinear:  # no counter exists for it: any number above 0 makes it an error
        return max(output.numel(), 1)
    if operator in (aten.convolution, aten._convolution):
        x, weight, transposed = args[0], args[1], args[6]
        return (x if transposed else output).numel() * weight[0].numel()
    if operator in (
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
    ):
        query, key, value = args[:3]
        return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    return 0
