"""A small E(ViT) and its plain twin, trained side by side and compared."""

from equiflop.demo.comparison import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
