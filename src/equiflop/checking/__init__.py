"""Is a network really equivariant? The tester behind ``equiflop check`` and behind this project's own tests."""

from equiflop.checking.check import check, randomize_parameters
from equiflop.checking.own import own_input_size
from equiflop.checking.report import CheckReport, Verdict

__all__ = ["CheckReport", "Verdict", "check", "own_input_size", "randomize_parameters"]
