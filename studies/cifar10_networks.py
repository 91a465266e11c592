"""The networks that the study of accuracy per MAC compares, and how each is initialised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from torch import Tensor, nn

from equiflop.nn import Linear, Mlp


@register_model
def study_resmlp(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> MlpMixer:
    """timm's ResMLP with any patch size, width and depth; its own names fix them."""
    return MlpMixer(mlp_ratio=4, block_layer=partial(ResBlock, init_values=0.1), norm_layer=Affine, **kwargs)


@dataclass(frozen=True)
class Run:
    """One training: a network of a family, what is special about it, and a seed."""

    family: str
    variant: str
    model: str
    keywords: dict[str, Any] = field(compare=False)
    seed: int
    activation: str = "spatial"
    initialisation: str = "default"

    @property
    def name(self) -> str:
        """Name of its folder and of its line in the results."""
        return f"{self.family}-{self.variant}-seed{self.seed}"


VIT = {"patch_size": 4, "depth": 4, "num_heads": 4, "init_values": 1.0, "embed_dim": 64}
MLP = {"patch_size": 4, "num_blocks": 6}
CONV = {"depths": [2, 2, 2, 2], "ls_init_value": 1.0}
E_VIT = "flop_deit3_small_patch16_224"


def _main_runs(seeds: int) -> Iterator[Run]:
    """Plain, E of the same width, E widened to the MACs of plain; all networks of a seed before the next seed."""
    for seed in range(seeds):
        yield Run("vit", "plain", "deit3_small_patch16_224", VIT, seed)
        yield Run("vit", "E", E_VIT, VIT, seed)
        yield Run("vit", "E-wide", E_VIT, {**VIT, "embed_dim": 88}, seed)
        yield Run("resmlp", "plain", "study_resmlp", {**MLP, "embed_dim": 64, "img_size": 32}, seed)
        # timm initialises plain ResMLPs so; the published 0.02 of the E networks suits width 384 and more.
        like_plain = {"initialisation": "xavier"}
        yield Run("resmlp", "E", "flop_resmlp_12_224", {**MLP, "embed_dim": 64}, seed, **like_plain)
        yield Run("resmlp", "E-wide", "flop_resmlp_12_224", {**MLP, "embed_dim": 92}, seed, **like_plain)
        yield Run("convnext", "plain", "convnext_tiny", {**CONV, "dims": [48, 96, 192, 384]}, seed)
        yield Run("convnext", "E", "flop_convnext_tiny", {**CONV, "dims": [48, 96, 192, 384]}, seed)
        yield Run("convnext", "E-wide", "flop_convnext_tiny", {**CONV, "dims": [68, 136, 272, 544]}, seed)


def _ablations() -> Iterator[Run]:
    """Variations of the E networks, one seed each."""
    yield Run("resmlp", "E-init-published", "flop_resmlp_12_224", {**MLP, "embed_dim": 64}, 0)
    yield Run("vit", "E-init-by-fan-in", E_VIT, {**VIT, "weight_init": "reset"}, 0)
    yield Run("vit", "plain-init-by-fan-in", "deit3_small_patch16_224", VIT, 0, initialisation="fan-in")
    for activation in ("odd", "gated"):
        yield Run("vit", f"E-act-{activation}", E_VIT, VIT, 0, activation)
    for share, multiplicities in (("1/4", [16, 48]), ("3/4", [48, 16])):
        name = f"E-share-{share.replace('/', '-of-')}"
        yield Run("vit", name, E_VIT, {**VIT, "multiplicities": multiplicities}, 0)
    yield Run("vit", "E-invariants-norm", E_VIT, {**VIT, "invariants": "norm"}, 0)
    for k in (2, 1, 3):
        yield Run("vit", f"hybrid-{k}-of-4", "flop_hybrid_deit3_small_patch16_224", {**VIT, "equivariant_depth": k}, 0)


def _larger() -> Iterator[Run]:
    """Twice the width, where E of the small width falls short; one seed each."""
    vit, mlp = {**VIT, "embed_dim": 128}, {**MLP, "embed_dim": 128}
    yield Run("vit", "plain-width-128", "deit3_small_patch16_224", vit, 0)
    yield Run("vit", "E-width-128", E_VIT, vit, 0)
    yield Run("resmlp", "plain-width-128", "study_resmlp", {**mlp, "img_size": 32}, 0)
    yield Run("resmlp", "E-width-128", "flop_resmlp_12_224", mlp, 0, initialisation="xavier")


def short_runs(seeds: int) -> list[Run]:
    """For two cores: two seeds of the main runs, the ablations, the other seeds, the second size."""
    main = list(_main_runs(seeds))
    return [*(run for run in main if run.seed < 2), *_ablations(), *(run for run in main if run.seed >= 2), *_larger()]


def full_runs(seeds: int) -> list[Run]:
    """Larger networks, for a GPU: the main comparison, a seed after the other, ViTs with both kinds of heads."""
    vit = {**VIT, "depth": 9, "num_heads": 6, "embed_dim": 192}
    mlp = {**MLP, "num_blocks": 12, "embed_dim": 192}
    conv = {**CONV, "depths": [2, 2, 6, 2], "dims": [64, 128, 256, 512]}
    runs: list[Run] = []
    for seed in range(seeds):
        runs += [
            Run("vit", "plain", "deit3_small_patch16_224", vit, seed),
            Run("vit", "E", E_VIT, {**vit, "heads": "coupled"}, seed),
            Run("vit", "E-regular-heads", E_VIT, {**vit, "heads": "regular"}, seed),
            Run("vit", "E-wide", E_VIT, {**vit, "heads": "coupled", "embed_dim": 264}, seed),
            Run("convnext", "plain", "convnext_tiny", conv, seed),
            Run("convnext", "E", "flop_convnext_tiny", conv, seed),
            Run("convnext", "E-wide", "flop_convnext_tiny", {**conv, "dims": [92, 184, 368, 736]}, seed),
            Run("resmlp", "plain", "study_resmlp", {**mlp, "img_size": 32}, seed),
            Run("resmlp", "E", "flop_resmlp_12_224", mlp, seed, initialisation="xavier"),
            Run("resmlp", "E-wide", "flop_resmlp_12_224", {**mlp, "embed_dim": 272}, seed, initialisation="xavier"),
        ]
    return runs


class SignActivation(nn.Module):
    """A nonlinearity on the irreps themselves, in place of one in the spatial domain, which an MLP hands over.

    Invariant channels take GELU; sign-flipping ones must take an odd function of themselves: ``b sigmoid(1.702 |b|)``
    ("odd"), or are gated by the invariant channels, ``b sigmoid(a)`` ("gated").
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """Of the mirror group's own basis, ``(..., 2 n)``, to the same."""
        p, q = x.chunk(2, dim=-1)
        a, b = (p + q) * 0.5**0.5, (p - q) * 0.5**0.5
        a, b = F.gelu(a), b * torch.sigmoid(1.702 * b.abs() if self.kind == "odd" else a)
        return torch.cat([a + b, a - b], dim=-1) * 0.5**0.5


def replace_activation(model: nn.Module, kind: str) -> None:
    """Let the MLPs of an E network use another nonlinearity."""
    for module in model.modules():
        if isinstance(module, Mlp):
            module.act = SignActivation(kind)


def initialise(model: nn.Module, rule: str, seed: int) -> None:
    """Initialise linear maps anew, behind the patch embedding and before the classifier.

    "xavier": Xavier's uniform rule, for the blocks of equivariant maps; "fan-in": normal of variance 1 / inputs, for
    plain maps, as the equivariant ones have it with ``weight_init="reset"``; "default": they stay as they are.
    """
    torch.manual_seed(seed)
    for name, module in model.named_modules():
        if rule == "xavier" and isinstance(module, Linear) and not name.startswith("stem"):
            module.init_weights(lambda weight, algebra: nn.init.xavier_uniform_(weight))
        elif rule == "fan-in" and isinstance(module, nn.Linear) and name.startswith("blocks"):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
