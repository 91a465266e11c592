"""What rules make modules with: equivariant linear maps, tied parameters, kinds of heads; and where rules are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from equiflop import nn as enn
from equiflop.groups import Rep
from equiflop.image_group import ImageGroup
from equiflop.models.substitution.checks import check_linear, no_counterpart
from equiflop.nn.attention import Heads, check_heads
from equiflop.nn.linear import OrderName
from equiflop.nn.norm import Weighting

Rule = Callable[["Substitution", Any, str], nn.Module]
Function = TypeVar("Function", bound=Rule)

_RULES: dict[type[nn.Module], Rule] = {}


def rule(*kinds: type[nn.Module]) -> Callable[[Function], Function]:
    """Take a function for the rule by which modules of these very classes, not of derived ones, become equivariant."""

    def register(function: Function) -> Function:
        _RULES.update(dict.fromkeys(kinds, function))
        return function

    return register


class Substitution:
    """Makes modules of a plain network equivariant.

    Args:
        group: the group that acts on the image.
        rep: type of the residual stream.
        heads: ``"coupled"``, ``"regular"``, or None: regular where ``|G|`` divides the number of heads, else coupled.
        weighting: of the layer norms.
        device: of new parameters.
        dtype: of new parameters; by default that of the plain ones.
    """

    def __init__(
        self,
        group: ImageGroup,
        rep: Rep,
        heads: Heads | None = None,
        *,
        weighting: Weighting = "entries",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.group = group
        self.rep = rep
        self.heads = heads
        self.weighting = weighting
        self.dd: dict[str, Any] = {"device": device, "dtype": dtype}

    def residual(self, module: nn.Module, path: str) -> nn.Module:
        """The equivariant counterpart of a module on the residual stream, most often the module itself, changed.

        Args:
            module: the module; its parameters hold nothing that is needed.
            path: its place in the network, for messages.

        Raises:
            ValueError: if there is no rule for it, or it does not fit the group.
        """
        rule = _RULES.get(type(module))
        if rule is None:
            raise no_counterpart(module, path)
        return rule(self, module, path)

    def children(self, module: nn.Module, path: str) -> None:
        """:meth:`residual` for all children."""
        for name, child in list(module.named_children()):
            setattr(module, name, self.residual(child, f"{path}.{name}"))

    def kept(self, module: nn.Module) -> nn.Module:
        """A plain module that stays, with memory and its own initial values."""
        if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
            device = self.dd["device"]
            module.to_empty(device=torch.get_default_device() if device is None else device)
            if self.dd["dtype"] is not None:
                module.to(self.dd["dtype"])
            module.requires_grad_(True)
            for part in reversed(list(module.modules())):
                reset = getattr(part, "reset_parameters", None)
                if callable(reset):
                    reset()
        return module

    def tie(self, module: nn.Module, name: str, *shape: int) -> None:
        """Give a parameter the shape in which it is stored."""
        if module._parameters.get(name) is not None:
            module._parameters[name] = nn.Parameter(torch.empty(shape, **self.like(module._parameters[name])))

    def tie_tokens(self, module: nn.Module, *names: str) -> None:
        """Class and register tokens of invariant channels."""
        for name in names:
            token = module._parameters.get(name)
            if token is not None:
                self.tie(module, name, 1, token.shape[1], self.rep.multiplicities[0])

    def field(self, grid: tuple[int, int], prefix: int) -> enn.PositionEmbedding:
        """A learned position embedding."""
        return enn.PositionEmbedding(self.rep, self.group, grid, prefix, **self.dd)

    def inward(self, linear: Any, path: str, order: OrderName, heads: int = 1, sections: int = 1) -> enn.Linear:
        """A linear map from the residual stream into a branch."""
        check_linear(linear, path, in_features=self.rep.dim)
        width = linear.out_features // sections
        inner = self.rep if order == "heads" else self.regular(width, path)
        if inner.dim != width:
            raise ValueError(f"{path} has {width} outputs a section, where coupled heads need {inner.dim}")
        options: dict[str, Any] = {"bias": linear.bias is not None, "sections": sections, "num_heads": heads, **self.dd}
        return enn.Linear(self.rep, inner, out_order=order, **options)

    def outward(self, linear: Any, path: str, order: OrderName, heads: int = 1) -> enn.Linear:
        """A linear map from a branch back to the residual stream."""
        check_linear(linear, path, out_features=self.rep.dim)
        inner = self.rep if order == "heads" else self.regular(linear.in_features, path)
        if inner.dim != linear.in_features:
            raise ValueError(f"{path} has {linear.in_features} inputs, where coupled heads need {inner.dim}")
        options: dict[str, Any] = {"bias": linear.bias is not None, "num_heads": heads, **self.dd}
        return enn.Linear(inner, self.rep, in_order=order, **options)

    def like(self, parameter: Any) -> dict[str, Any]:
        """Device and dtype of a new parameter in the place of a plain one."""
        dtype = self.dd["dtype"]
        return {"device": self.dd["device"], "dtype": parameter.dtype if dtype is None else dtype}

    def regular(self, width: int, path: str) -> Rep:
        """The multiple of the regular representation of a width."""
        return Rep.regular_of_dim(self.rep.group, width, f"width of {path}")

    def per_copy(self, num_heads: int, path: str) -> int:
        """Heads of every copy.

        Raises:
            ValueError: if the group's order does not divide their number.
        """
        order = self.rep.group.order
        if num_heads % order:
            raise ValueError(self.does_not_divide(num_heads, path))
        return num_heads // order

    def does_not_divide(self, num_heads: int, path: str) -> str:
        """The message for heads that the group cannot permute."""
        order, name = self.rep.group.order, self.group.name
        return (
            f"num_heads={num_heads} of {path} is not divisible by |G|={order} (group {name!r}), which heads need that "
            f"see positions or work one by one; use a multiple of {order}, or a group whose order divides {num_heads}"
        )

    def choose_heads(self, num_heads: int, path: str, per_head: bool) -> Heads:
        """Which heads an attention gets.

        Args:
            num_heads: how many it has.
            path: its place.
            per_head: whether it does something head by head that heads sharing every irrep cannot do.

        Raises:
            ValueError: if none fit.
        """
        order = self.rep.group.order
        if num_heads % order == 0 and self.heads != "coupled":
            if self.heads == "regular":
                check_heads(self.rep, num_heads, "regular")
            if self.rep.regular_copies or self.heads == "regular" or per_head:
                return "regular"
        if per_head and self.heads == "coupled":
            raise ValueError(f"heads='coupled' does not fit {path}, which works head by head; use heads='regular'")
        if per_head:
            raise ValueError(self.does_not_divide(num_heads, path))
        check_heads(self.rep, num_heads, self.heads or "coupled")
        return "coupled"
