"""equiflop: vision networks that are equivariant to a symmetry group and, because of it, cheaper."""

