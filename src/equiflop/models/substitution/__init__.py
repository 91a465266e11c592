"""The parts of a plain vision transformer, each made equivariant in its place.

Rules go by the class of a layer, not by the name of a network. On the residual stream, which is ordered by irreps,
norms, layer scales and dropout are replaced. Of a branch only the linear maps that lead into it and out of it are: they
change to the group's basis on the way, where whatever is pointwise or works head by head is the plain module. What
depends on position is seen by copy ``g`` through ``g^-1``. A module, parameter or setting without a rule is refused.
"""

from equiflop.models.substitution.attention import attention, attention_pool
from equiflop.models.substitution.blocks import parallel_block, residual_block, standard_block
from equiflop.models.substitution.checks import check_learned, check_untouched
from equiflop.models.substitution.embeddings import naflex_embeds, patch_embed
from equiflop.models.substitution.parts import Substitution
from equiflop.models.substitution.positions import position_bias, rotary
from equiflop.models.substitution.sam import sam_block, sam_neck
from equiflop.models.substitution.stream import dropout, keep, layer_scale, mlp, norm, sequence

__all__ = [
    "Substitution",
    "attention",
    "attention_pool",
    "check_learned",
    "check_untouched",
    "dropout",
    "keep",
    "layer_scale",
    "mlp",
    "naflex_embeds",
    "norm",
    "parallel_block",
    "patch_embed",
    "position_bias",
    "residual_block",
    "rotary",
    "sam_block",
    "sam_neck",
    "sequence",
    "standard_block",
]
