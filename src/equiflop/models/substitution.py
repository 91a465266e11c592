"""The parts of a plain vision transformer, each made equivariant in its place.

Longer than other files: the rules are one table, in the order in which a network computes.

Rules go by the class of a layer, not by the name of a network. On the residual stream, which is ordered by irreps,
norms, layer scales and dropout are replaced. Of a branch only the linear maps that lead into it and out of it are: they
change to the group's basis on the way, where whatever is pointwise or works head by head is the plain module. What
depends on position is seen by copy ``g`` through ``g^-1``. A module, parameter or setting without a rule is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import (
    Attention,
    AttentionPoolLatent,
    AttentionRope,
    DiffAttention,
    DropPath,
    GluMlp,
    LayerNorm,
    LayerNorm2d,
    LayerScale,
    Mlp,
    PatchDropout,
    PatchDropoutWithIndices,
    PatchEmbed,
    RelPosBias,
    RelPosMlp,
    RmsNorm,
    SwiGLU,
)
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
    init_random_2d_freqs,
)
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Block as BeitBlock
from timm.models.beit import RelativePositionBias
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, ResPostRelPosBlock
from timm.models.vision_transformer_sam import Attention as SamAttention
from timm.models.vision_transformer_sam import Block as SamBlock
from torch import nn

from equiflop import nn as enn
from equiflop.groups import Rep
from equiflop.image_group import ImageGroup
from equiflop.kernels import layout_of
from equiflop.models import twin_layers
from equiflop.models.tied import become
from equiflop.nn.attention import Heads, check_heads
from equiflop.nn.linear import OrderName
from equiflop.nn.norm import Weighting
from equiflop.nn.tied_conv import copies_of

Rule = Callable[["Substitution", Any, str], nn.Module]


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
            raise _no_counterpart(module, path)
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
            module._parameters[name] = nn.Parameter(torch.empty(shape, **self._like(module._parameters[name])))

    def tie_tokens(self, module: nn.Module, *names: str) -> None:
        """Class and register tokens of invariant channels."""
        for name in names:
            token = module._parameters.get(name)
            if token is not None:
                self.tie(module, name, 1, token.shape[1], self.rep.multiplicities[0])

    def field(self, grid: tuple[int, int], prefix: int) -> enn.PositionEmbedding:
        """A learned position embedding."""
        return enn.PositionEmbedding(self.rep, self.group, grid, prefix, **self.dd)

    def patch_embed(self, embed: PatchEmbed, path: str) -> enn.PatchEmbed:
        """Patch embedding, with the norm behind it."""
        _only(embed, path, modules=("proj", "norm"))
        _check_no_padding(embed)
        conv = embed.proj
        _check_patches(conv, f"{path}.proj", embed.patch_size, self.rep.dim)
        if embed.img_size is None or (not embed.flatten and embed.output_fmt not in ("NHWC", "NLC")):
            raise ValueError(f"{path} has img_size={embed.img_size}, output_fmt={embed.output_fmt}")
        made = enn.PatchEmbed(
            self.rep,
            self.group,
            embed.img_size,
            embed.patch_size,
            conv.in_channels,
            bias=conv.bias is not None,
            strict_img_size=embed.strict_img_size,
            output_fmt="NLC" if embed.flatten else embed.output_fmt.value,
            **self.dd,
        )
        made.norm = self.residual(embed.norm, f"{path}.norm")
        return made

    def rotary(self, rope: nn.Module, path: str, num_heads: int, grid: tuple[int, int] | None) -> enn.RotaryPositions:
        """Rotary position embedding for heads that are regular."""
        if type(rope) not in (RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, RotaryEmbeddingMRope):
            raise _no_counterpart(rope, path)
        per_copy = num_heads // self.rep.group.order
        if isinstance(rope, RotaryEmbeddingMixed):
            head_dim = rope.dim // rope.num_heads
            like = self._like(rope.freqs)
            rope.num_heads, rope.dim = per_copy, head_dim * per_copy
            rope.freqs = nn.Parameter(rope.freqs.new_empty(2, rope.depth, per_copy, head_dim // 2))
            self.kept(rope)
            options: dict[str, Any] = {"temperature": rope.temperature, "rotate": True, **like}
            rope.freqs = nn.Parameter(init_random_2d_freqs(head_dim, rope.depth, per_copy, **options))
        else:
            self.kept(rope)
        keeps_table = getattr(rope, "feat_shape", None) is not None
        return enn.RotaryPositions(rope, self.group, per_copy, grid if keeps_table else None)

    def position_bias(self, bias: nn.Module, path: str, prefix: int) -> enn.PositionBias:
        """Relative position bias, learned or by a small MLP, for heads that are regular."""
        if isinstance(bias, RelPosMlp):
            last = bias.mlp.fc2
            heads = self._per_copy(bias.num_heads, path)
            bias.mlp.fc2 = nn.Linear(last.in_features, heads, bias=last.bias is not None, device="meta")
            bias.num_heads, bias.bias_shape = heads, (*bias.bias_shape[:2], heads)
        elif isinstance(bias, RelPosBias | RelativePositionBias):
            rows, columns = bias.relative_position_bias_table.shape
            heads = self._per_copy(columns, path)
            bias.relative_position_bias_table = nn.Parameter(torch.empty(rows, heads, device="meta"))
            if isinstance(bias, RelPosBias):
                bias.bias_shape = (*bias.bias_shape[:2], heads)
        else:
            raise _no_counterpart(bias, path)
        return enn.PositionBias(self.kept(bias), self.group, prefix)

    def _per_copy(self, num_heads: int, path: str) -> int:
        order = self.rep.group.order
        if num_heads % order:
            raise ValueError(self._does_not_divide(num_heads, path))
        return num_heads // order

    def _does_not_divide(self, num_heads: int, path: str) -> str:
        order, name = self.rep.group.order, self.group.name
        return (
            f"num_heads={num_heads} of {path} is not divisible by |G|={order} (group {name!r}), which heads need that "
            f"see positions or work one by one; use a multiple of {order}, or a group whose order divides {num_heads}"
        )

    def _like(self, parameter: Any) -> dict[str, Any]:
        dtype = self.dd["dtype"]
        return {"device": self.dd["device"], "dtype": parameter.dtype if dtype is None else dtype}

    def inward(self, linear: Any, path: str, order: OrderName, heads: int = 1, sections: int = 1) -> enn.Linear:
        """A linear map from the residual stream into a branch."""
        _check_linear(linear, path, in_features=self.rep.dim)
        width = linear.out_features // sections
        inner = self.rep if order == "heads" else self._regular(width, path)
        if inner.dim != width:
            raise ValueError(f"{path} has {width} outputs a section, where coupled heads need {inner.dim}")
        options: dict[str, Any] = {"bias": linear.bias is not None, "sections": sections, "num_heads": heads, **self.dd}
        return enn.Linear(self.rep, inner, out_order=order, **options)

    def outward(self, linear: Any, path: str, order: OrderName, heads: int = 1) -> enn.Linear:
        """A linear map from a branch back to the residual stream."""
        _check_linear(linear, path, out_features=self.rep.dim)
        inner = self.rep if order == "heads" else self._regular(linear.in_features, path)
        if inner.dim != linear.in_features:
            raise ValueError(f"{path} has {linear.in_features} inputs, where coupled heads need {inner.dim}")
        options: dict[str, Any] = {"bias": linear.bias is not None, "num_heads": heads, **self.dd}
        return enn.Linear(inner, self.rep, in_order=order, **options)

    def _regular(self, width: int, path: str) -> Rep:
        return Rep.regular_of_dim(self.rep.group, width, f"width of {path}")

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
            raise ValueError(self._does_not_divide(num_heads, path))
        check_heads(self.rep, num_heads, self.heads or "coupled")
        return "coupled"

    # rules, by class

    def _keep(self, module: nn.Module, path: str) -> nn.Module:
        return self.kept(module)

    def _dropout(self, module: nn.Dropout, path: str) -> nn.Module:
        return enn.Dropout(self.rep, module.p)

    def _norm(self, module: Any, path: str) -> nn.Module:
        _check_norm(module, path, self.rep.dim)
        affine = module.weight is not None
        if isinstance(module, RmsNorm):
            return enn.RmsNorm(self.rep, module.eps, affine=affine, **self.dd)
        bias = module.bias is not None
        return enn.LayerNorm(self.rep, module.eps, affine=affine, bias=bias, weighting=self.weighting, **self.dd)

    def _inner_norm(self, module: Any, path: str, channels: int) -> nn.Module:
        """A norm over a whole axis in the group's basis."""
        if isinstance(module, nn.Identity):
            return module
        if type(module) not in _NORMS:
            raise _no_counterpart(module, path)
        _check_norm(module, path, channels)
        centred = not isinstance(module, RmsNorm)
        options: dict[str, Any] = {
            "affine": module.weight is not None,
            "bias": centred and module.bias is not None,
            **self.dd,
        }
        return enn.TiedNorm(channels, self.rep.group.order, module.eps, centred=centred, **options)

    def _layer_scale(self, module: LayerScale, path: str) -> nn.Module:
        if module.gamma.shape != (self.rep.dim,):
            raise ValueError(f"{path} has {tuple(module.gamma.shape)} factors where {self.rep.dim} are supported")
        return enn.LayerScale(self.rep, module.init_values, **self.dd)

    def _sequence(self, module: nn.Module, path: str) -> nn.Module:
        self.children(module, path)
        return module

    def _block(self, block: Any, path: str) -> nn.Module:
        self.children(block, path)
        _only(block, path, ("gamma_1", "gamma_2"))
        kind = _TIED.get(type(block))
        if kind is not None:
            block.rep, block._layout = self.rep, layout_of(self.rep)
            become(block, kind)
            for name in ("gamma_1", "gamma_2"):
                self.tie(block, name, sum(self.rep.multiplicities))
            block.reset_parameters()
        return block

    def _standard_block(self, block: Block, path: str) -> nn.Module:
        self._block(block, path)
        _only(block, path, modules=("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"))
        return enn.Block.of(block, self.rep)

    def _attention(self, attn: Any, path: str) -> nn.Module:
        parts = dict(attn.named_children())
        norms = [name for name in ("q_norm", "k_norm", "norm") if type(parts.get(name)) in _NORMS]
        coupled = type(attn) is Attention and not norms and "gate" not in parts
        heads = self.choose_heads(attn.num_heads, path, per_head=not coupled)
        kv_heads = getattr(attn, "num_kv_heads", attn.num_heads)
        if heads == "regular" and kv_heads % self.rep.group.order:
            raise ValueError(self._does_not_divide(kv_heads, f"keys and values of {path}"))
        order: OrderName = "heads" if heads == "coupled" else "group"
        for name, part in parts.items():
            where = f"{path}.{name}"
            if name in ("qkv", "q_proj", "k_proj", "v_proj", "gate"):
                sections = 3 if name == "qkv" else 1
                made: nn.Module = self.inward(part, where, order, attn.num_heads, sections)
            elif name == "proj":
                made = self.outward(part, where, order, attn.num_heads)
            elif name in ("q_norm", "k_norm", "sub_norm"):
                made = self._per_head_norm(part, where)
            elif name == "norm":
                made = self._inner_norm(part, where, attn.proj.in_features)
            elif name == "attn_drop":
                made = _exactly(part, nn.Dropout, where)
            elif name == "proj_drop":
                made = self._dropout(_exactly(part, nn.Dropout, where), where)
            elif name == "rel_pos" and isinstance(attn, RelPosAttention):
                made = self.position_bias(part, where, getattr(part, "prefix_tokens", 0))
            else:
                raise _no_counterpart(part, where)
            setattr(attn, name, made)
        if kv_heads != attn.num_heads:
            for name in ("k_proj", "v_proj"):
                become(getattr(attn, name), twin_layers.LinearToSharedHeads)
                getattr(attn, name).head_dim, getattr(attn, name).repeats = attn.head_dim, attn.num_kv_groups
            attn.num_kv_heads, attn.num_kv_groups, attn.kv_dim = attn.num_heads, 1, attn.attn_dim
        return self._own_parameters(attn, path, heads)

    def _sam_block(self, block: SamBlock, path: str) -> nn.Module:
        for name, part in list(block.named_children()):
            where = f"{path}.{name}"
            if name == "attn":
                block.attn = self._attention_of_copies(_exactly(part, SamAttention, where), where, block.window_size)
            else:
                setattr(block, name, self.residual(part, where))
        _only(block, path)
        become(block, twin_layers.TwinSamBlock)
        return block

    def _attention_of_copies(self, attn: Any, path: str, window_size: int) -> nn.Module:
        positions = ("rel_pos_h", "rel_pos_w")
        _only(attn, path, positions, ("qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop", "rope"))
        self.choose_heads(attn.num_heads, path, per_head=True)
        if attn.rope is not None and type(attn.rope) is not RotaryEmbeddingCat:
            raise _no_counterpart(attn.rope, f"{path}.rope")
        qkv = self.inward(attn.qkv, f"{path}.qkv", "group", sections=3)
        proj = self.outward(attn.proj, f"{path}.proj", "group")
        proj_drop = self._dropout(_exactly(attn.proj_drop, nn.Dropout, f"{path}.proj_drop"), f"{path}.proj_drop")
        for name in ("q_norm", "k_norm"):
            setattr(attn, name, self._per_head_norm(getattr(attn, name), f"{path}.{name}"))
        attn.qkv = attn.proj = attn.proj_drop = nn.Identity()
        attn.num_heads = self._per_copy(attn.num_heads, path)
        for name in positions:
            table = getattr(attn, name, None)
            if table is not None:
                setattr(attn, name, nn.Parameter(torch.zeros(table.shape, **self._like(table))))
        return twin_layers.AttentionOfCopies(attn, qkv, proj, proj_drop, self.group, window_size)

    def sam_neck(self, neck: Any, path: str) -> nn.Module:
        """The neck of SAM's encoder, or the norm of a map in its place."""
        if type(neck) is LayerNorm2d:
            _check_norm(neck, path, self.rep.dim)
            affine, bias = neck.weight is not None, neck.bias is not None
            options: dict[str, Any] = {"affine": affine, "bias": bias, "weighting": self.weighting, **self.dd}
            return twin_layers.NormOfMap(self.rep, neck.eps, **options)
        _only(_exactly(neck, nn.Sequential, path), path, modules=("0", "1", "2", "3"))
        proj, norm, conv, last_norm = neck
        for i, kernel in ((0, 1), (2, 3)):
            where = f"{path}.{i}"
            wanted = {"kernel_size": (kernel, kernel), "stride": (1, 1), "padding": (kernel // 2, kernel // 2)}
            _check_conv(neck[i], where, {**wanted, "dilation": (1, 1), "groups": 1, "out_channels": proj.out_channels})
        rep, copies = self._regular(proj.out_channels, path), copies_of(self.group)
        n = rep.dim // self.group.order
        return twin_layers.SamNeck(
            enn.Linear(self.rep, rep, proj.bias is not None, out_order="group", **self.dd),
            self._inner_norm(norm, f"{path}.1", rep.dim),
            enn.TiedConv2d(self.group, copies, copies, n, n, 3, bias=conv.bias is not None, **self.dd),
            self._inner_norm(last_norm, f"{path}.3", rep.dim),
            rep,
            **self.dd,
        )

    def _own_parameters(self, attn: Any, path: str, heads: Heads) -> nn.Module:
        """Parameters and buffers that an attention holds itself."""
        order = self.rep.group.order
        buffers = ("k_bias", "relative_position_index")
        if isinstance(attn, EvaAttention | BeitAttention):
            _only(attn, path, ("q_bias", "v_bias", "relative_position_bias_table"), buffers=buffers)
            attn.copies, attn.group = order, self.group
            attn.qkv_bias_separate = True  # else the weight of the map is used without the map
            if attn._parameters.get("q_bias") is not None:
                width = attn.q_bias.shape[0]
                attn.k_bias = torch.empty(width, **self._like(attn.q_bias))
            become(attn, _TIED[type(attn)])
            for name in ("q_bias", "v_bias"):
                if attn._parameters.get(name) is not None:
                    self.tie(attn, name, attn._parameters[name].shape[0] // order)
            if attn._parameters.get("relative_position_bias_table") is not None:
                table = attn.relative_position_bias_table
                self.tie(attn, "relative_position_bias_table", table.shape[0], table.shape[1] // order)
                size = attn.relative_position_index.shape
                attn.relative_position_index = torch.empty(size, dtype=torch.long, device=self.dd["device"])
            attn.reset_parameters()
            return attn
        if isinstance(attn, DiffAttention):
            self._lambdas(attn, path)
            return attn
        _only(attn, path)
        return enn.Attention.of(attn, self.rep, heads) if type(attn) is Attention else attn

    def _lambdas(self, module: Any, path: str, *others: str) -> None:
        """The factors of differential attention, where there are any: the same for all heads."""
        names = [name for name in module._parameters if name.startswith("lambda_")]
        _only(module, path, (*names, *others))
        for name in names:
            parameter = module._parameters[name]
            if parameter is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype, device=self.dd["device"])
                )
        module.reset_parameters()

    def _per_head_norm(self, norm: nn.Module, path: str) -> nn.Module:
        if not isinstance(norm, nn.Identity) and type(norm) not in _NORMS:
            raise _no_counterpart(norm, path)
        return self.kept(norm)

    def _mlp(self, mlp: Any, path: str) -> nn.Module:
        if isinstance(mlp, GluMlp) and mlp.chunk_dim != -1:
            raise ValueError(f"{path} is a convolution (use_conv=True), which has no equivariant counterpart")
        hidden = getattr(mlp.fc2, "in_features", 0)
        for name, part in list(mlp.named_children()):
            where = f"{path}.{name}"
            if name in ("fc1", "fc1_g", "fc1_x"):
                made: nn.Module = self.inward(part, where, "group", sections=2 if isinstance(mlp, GluMlp) else 1)
            elif name == "fc2":
                made = self.outward(part, where, "group")
            elif name == "norm":
                made = self._inner_norm(part, where, hidden)
            elif name == "act":
                made = _pointwise(part, where)
            elif name == "drop1":
                made = enn.Dropout(self._regular(hidden, where), _exactly(part, nn.Dropout, where).p, order="group")
            elif name == "drop2":
                made = self._dropout(_exactly(part, nn.Dropout, where), where)
            else:
                raise _no_counterpart(part, where)
            setattr(mlp, name, made)
        _only(mlp, path)
        return enn.Mlp.of(mlp, self.rep) if type(mlp) is Mlp else mlp

    def _parallel_block(self, block: Any, path: str) -> nn.Module:
        self.choose_heads(block.num_heads, path, per_head=True)
        hidden, width = block.in_split[0], block.in_split[1]
        _check_linear(block.in_proj, f"{path}.in_proj", in_features=self.rep.dim, out_features=hidden + 3 * width)
        reps = self._regular(width, f"{path}.in_proj"), self._regular(hidden, f"{path}.in_proj")
        for name, part in list(block.named_children()):
            where = f"{path}.{name}"
            if name == "in_proj":
                has_bias = part.bias is not None
                made: nn.Module = enn.LinearToSeveral(self.rep, [(reps[1], 1), (reps[0], 3)], has_bias, **self.dd)
            elif name == "out_proj":
                _check_linear(part, where, in_features=hidden + width, out_features=self.rep.dim)
                made = enn.LinearFromSeveral(reps, self.rep, part.bias is not None, **self.dd)
            elif name in ("attn_out_proj", "mlp_out_proj"):
                made = self.outward(part, where, "group")
            elif name in ("q_norm", "k_norm", "sub_norm"):
                made = self._per_head_norm(part, where)
            elif name == "mlp_act":
                made = _pointwise(part, where)
            elif name == "mlp_drop":
                made = enn.Dropout(reps[1], _exactly(part, nn.Dropout, where).p, order="group")
            elif name == "attn_drop":
                made = _exactly(part, nn.Dropout, where)
            else:
                made = self.residual(part, where)
            setattr(block, name, made)
        block.copies = self.rep.group.order
        become(block, _TIED[type(block)])
        self.tie(block, "mlp_bias", hidden // block.copies)
        self._lambdas(block, path, "mlp_bias")
        return block

    def _pool(self, pool: AttentionPoolLatent, path: str) -> nn.Module:
        _only(pool, path, ("latent",))
        if pool.mlp is None:
            raise ValueError(f"{path} has no output projection (out_features=0), which has no equivariant counterpart")
        projects = not isinstance(pool.q, nn.Identity)
        plain_norms = isinstance(pool.q_norm, nn.Identity) and isinstance(pool.k_norm, nn.Identity)
        heads = self.choose_heads(pool.num_heads, path, per_head=not (projects and plain_norms))
        order: OrderName = "heads" if heads == "coupled" else "group"
        for name, part in list(pool.named_children()):
            where = f"{path}.{name}"
            if name in ("q", "kv"):
                if projects or name == "kv":
                    setattr(pool, name, self.inward(part, where, order, pool.num_heads, 2 if name == "kv" else 1))
            elif name == "proj":
                pool.proj = self.outward(part, where, order, pool.num_heads)
            elif name in ("q_norm", "k_norm"):
                setattr(pool, name, self._per_head_norm(part, where))
            else:
                setattr(pool, name, self.residual(part, where))
        order_of_group = self.rep.group.order
        stored = self.rep.multiplicities[0] if projects else pool.latent_dim // order_of_group
        pool.rep, pool.copies = self.rep, order_of_group
        become(pool, twin_layers.TwinAttentionPool if projects else twin_layers.TwinAttentionPoolOfQueries)
        self.tie(pool, "latent", 1, pool.latent_len, stored)
        pool.reset_parameters()
        return pool

    def naflex_embeds(self, embeds: Any, path: str, in_chans: int) -> nn.Module:
        """The embedding of a NaFlexVit."""
        if embeds.pos_embed_type not in ("learned", "none"):
            raise ValueError(f"pos_embed={embeds.pos_embed_type!r} has no equivariant counterpart")
        _only(embeds, path, ("cls_token", "reg_token", "pos_embed"), ("proj", "norm", "pos_drop"))
        _check_no_padding(embeds)
        proj, patch = embeds.proj, embeds.patch_size
        check_learned(embeds.pos_embed, proj.weight.requires_grad)
        if isinstance(proj, nn.Conv2d):
            _check_patches(proj, f"{path}.proj", patch, self.rep.dim)
        else:
            _check_linear(proj, f"{path}.proj", math.prod(patch) * in_chans, self.rep.dim)
        size = tuple(p * n for p, n in zip(patch, embeds.pos_embed_grid_size or (1, 1), strict=True))
        options: dict[str, Any] = {"strict_img_size": False, "output_fmt": "NHWC", **self.dd}
        embeds.proj = enn.PatchEmbed(self.rep, self.group, size, patch, in_chans, bias=proj.bias is not None, **options)
        embeds.norm = self.residual(embeds.norm, f"{path}.norm")
        embeds.pos_drop = self.residual(embeds.pos_drop, f"{path}.pos_drop")
        embeds.rep = self.rep
        become(embeds, twin_layers.TwinNaFlexEmbeds)
        self.tie_tokens(embeds, "cls_token", "reg_token")
        if embeds.pos_embed is not None:
            grid = embeds.pos_embed.shape[1:3]
            del embeds.pos_embed
            embeds.pos_embed = self.field((grid[0], grid[1]), 0)
            embeds.pos_embed.resampling = {
                "mode": embeds.pos_embed_interp_mode,
                "antialias": embeds.pos_embed_antialias,
                "align_corners": embeds.pos_embed_align_corners,
            }
        embeds.reset_parameters()
        return embeds


_NORMS = (nn.LayerNorm, LayerNorm, LayerNorm2d, RmsNorm)
_TIED: dict[type[nn.Module], type[nn.Module]] = {
    EvaBlock: twin_layers.TwinEvaBlock,
    BeitBlock: twin_layers.TwinBeitBlock,
    EvaAttention: twin_layers.TwinEvaAttention,
    BeitAttention: twin_layers.TwinBeitAttention,
    ParallelScalingBlock: twin_layers.TwinParallelScalingBlock,
    DiffParallelScalingBlock: twin_layers.TwinDiffParallelScalingBlock,
}
_RULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys((nn.Identity, DropPath, PatchDropout, PatchDropoutWithIndices), Substitution._keep),
    **dict.fromkeys((nn.LayerNorm, LayerNorm, RmsNorm), Substitution._norm),
    **dict.fromkeys((nn.Sequential, nn.ModuleList), Substitution._sequence),
    **dict.fromkeys(
        (ResPostBlock, ParallelThingsBlock, EvaBlock, EvaBlockPostNorm, BeitBlock, RelPosBlock, ResPostRelPosBlock),
        Substitution._block,
    ),
    **dict.fromkeys((ParallelScalingBlock, DiffParallelScalingBlock), Substitution._parallel_block),
    **dict.fromkeys(
        (Attention, AttentionRope, EvaAttention, BeitAttention, RelPosAttention, DiffAttention),
        Substitution._attention,
    ),
    **dict.fromkeys((Mlp, GluMlp, SwiGLU), Substitution._mlp),
    nn.Dropout: Substitution._dropout,
    LayerScale: Substitution._layer_scale,
    Block: Substitution._standard_block,
    SamBlock: Substitution._sam_block,
    AttentionPoolLatent: Substitution._pool,
    PatchEmbed: Substitution.patch_embed,
}


def check_untouched(network: nn.Module) -> None:
    """See that a network is what its classes say: no hooks, no replaced methods, nothing shared between two places.

    Raises:
        ValueError: if not; it names the place.
    """
    for reason in _changes(network):
        raise ValueError(reason)


def _changes(network: nn.Module) -> Iterator[str]:
    seen: dict[int, str] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        where = f"module {path}" if path else "the network"
        if id(module) in seen and any(True for _ in module.parameters()):
            yield f"{where} is shared with {seen[id(module)]}"
        seen[id(module)] = where
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            yield f"{where} has hooks, which a twin cannot take over"
        for key in module.__dict__:
            if callable(getattr(type(module), key, None)):
                yield f"{where} has its own method {key!r}"
    owners: dict[int, str] = {}
    for path, parameter in network.named_parameters(remove_duplicate=False):
        if id(parameter) in owners:
            yield f"parameter {path} is shared with {owners[id(parameter)]}"
        owners[id(parameter)] = path


def _no_counterpart(module: nn.Module, path: str) -> ValueError:
    return ValueError(f"{path} is a {type(module).__name__}, which has no equivariant counterpart")


def _only(
    module: nn.Module,
    path: str,
    parameters: tuple[str, ...] = (),
    modules: tuple[str, ...] | None = None,
    buffers: tuple[str, ...] = (),
) -> None:
    """See that a module holds nothing itself but what is known; ``modules=None``: its children have their rules."""
    held = (
        ("parameter", module._parameters, parameters),
        ("buffer", module._buffers, buffers),
        ("module", module._modules, modules),
    )
    for kind, values, known in held:
        for name, value in values.items():
            if value is not None and known is not None and name not in known:
                raise ValueError(f"{kind} {path}.{name}".replace(" .", " ") + " has no equivariant counterpart")


def _check_no_padding(embed: Any) -> None:
    if embed.dynamic_img_pad:
        raise ValueError("dynamic_img_pad=True pads one side only, which breaks the symmetry; pad or resize the image")


def check_learned(field: nn.Parameter | None, trained: bool) -> None:
    """See that a position embedding is learned where the rest of the network is.

    Raises:
        ValueError: if not.
    """
    if field is not None and not field.requires_grad and trained:
        raise ValueError("fixed position embedding (pos_embed requires no gradient); that of a twin is learned")


def _exactly(module: nn.Module, kind: type[nn.Module], path: str) -> Any:
    if type(module) is not kind:
        raise ValueError(f"{path} is a {type(module).__name__} where {kind.__name__} is supported")
    return module


def _check_linear(linear: Any, path: str, in_features: int | None = None, out_features: int | None = None) -> None:
    _exactly(linear, nn.Linear, path)
    for key, wanted in (("in_features", in_features), ("out_features", out_features)):
        if wanted is not None and getattr(linear, key) != wanted:
            raise ValueError(f"{path} has {key}={getattr(linear, key)} where {wanted} is supported")


def _check_norm(norm: Any, path: str, channels: int) -> None:
    shape = tuple(norm.normalized_shape)
    if shape != (channels,):
        raise ValueError(f"{path} normalises {shape} where ({channels},) is supported")


def _check_patches(conv: Any, path: str, patch: tuple[int, int], width: int) -> None:
    settings = {"kernel_size": tuple(patch), "stride": tuple(patch), "padding": (0, 0)}
    _check_conv(conv, path, {**settings, "dilation": (1, 1), "groups": 1, "out_channels": width})


def _check_conv(conv: Any, path: str, settings: dict[str, Any]) -> None:
    _exactly(conv, nn.Conv2d, path)
    for key, wanted in settings.items():
        if getattr(conv, key) != wanted:
            raise ValueError(f"{path} has {key}={getattr(conv, key)} where {wanted} is supported")


def _pointwise(act: nn.Module, path: str) -> nn.Module:
    """See that an activation computes every entry from that entry alone."""
    if any(True for _ in act.parameters()) or any(True for _ in act.buffers()):
        raise ValueError(f"{path} ({type(act).__name__}) has parameters, which may differ between the group's copies")
    with torch.no_grad():
        x = torch.linspace(-3.0, 3.0, 24, dtype=torch.float64, device="cpu").view(2, 12)
        was_training = act.training
        whole = act.eval()(x)
        apart = torch.stack([act(entry) for entry in x.flatten()]).view(whole.shape) if whole.shape == x.shape else None
        act.train(was_training)
    if apart is None or not torch.allclose(whole, apart, rtol=1e-12, atol=1e-12):
        raise ValueError(f"{path} ({type(act).__name__}) is not pointwise")
    return act
