"""What a check found, and its verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from equiflop.equivariance import Comparison
from equiflop.groups import Action, FiniteGroup

Verdict = Literal["equivariant", "inconclusive", "not equivariant"]


@dataclass(frozen=True)
class CheckReport:
    """Result of :func:`check`.

    Attributes:
        group: the group that was tried, or its action.
        dtype: dtype of the comparison.
        tolerance: largest relative error that passes.
        rows: all comparisons.
        problems: other reasons not to pass, such as a constant output.
    """

    group: FiniteGroup | Action
    dtype: torch.dtype
    tolerance: float
    rows: tuple[Comparison, ...]
    problems: tuple[str, ...] = field(default=())

    @property
    def errors(self) -> tuple[float, ...]:
        """The largest relative error of every group element."""
        return tuple(
            max((row.error for row in self.rows if row.element == a), default=0.0) for a in range(self.group.order)
        )

    @property
    def max_error(self) -> float:
        """The largest relative error."""
        return max(self.errors)

    @property
    def verdict(self) -> Verdict:
        """``"equivariant"``; ``"not equivariant"`` if an error is too large; else ``"inconclusive"``.

        A network whose output hardly depends on the image is invariant to everything, so small errors say nothing of
        it: fresh or barely trained weights can be so.
        """
        if not all(row.error <= self.tolerance for row in self.rows):
            return "not equivariant"
        return "inconclusive" if self.problems else "equivariant"

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance and there is no other problem."""
        return self.verdict == "equivariant"

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "group": self.group.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tolerance": self.tolerance,
            "max_error": self.max_error,
            "problems": list(self.problems),
            "elements": [
                {
                    "element": a,
                    "name": self.group.element_name(a),
                    "error": error,
                    "errors": {row.what: row.error for row in self.rows if row.element == a},
                }
                for a, error in enumerate(self.errors)
            ],
        }

    def __str__(self) -> str:
        lines = [f"{'group element':<24} {'output':>10} {'features':>10}"]
        for a in range(self.group.order):
            output = [row.error for row in self.rows if row.element == a and row.what == "output"]
            features = [row.error for row in self.rows if row.element == a and row.what != "output"]
            cells = [f"{max(errors):.1e}" if errors else "-" for errors in (output, features)]
            lines.append(f"{self.group.element_name(a):<24} {cells[0]:>10} {cells[1]:>10}")
        dtype = str(self.dtype).removeprefix("torch.")
        numbers = f"largest relative error {self.max_error:.1e}, tolerance {self.tolerance:.0e} ({dtype})"
        lines += [f"problem: {problem}" for problem in self.problems]
        verdict = self.verdict.replace("not", "NOT")
        if self.verdict == "inconclusive":
            verdict += f": {self.problems[0].partition(',')[0]}"
        lines.append(f"{verdict}: {numbers}")
        return "\n".join(lines)
