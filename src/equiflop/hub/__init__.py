"""Trained networks as folders for the hub, which timm and transformers load."""

from equiflop.hub.card import Facts, Measured
from equiflop.hub.folder import Published, publish, push

__all__ = ["Facts", "Measured", "Published", "publish", "push"]
