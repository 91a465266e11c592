"""Networks on their way to where they run: exported in a form made for runtimes, and proven there."""

from equiflop.deploy.export import Exported, ExportError, export
from equiflop.deploy.prepare import prepared
from equiflop.deploy.proof import Proof, Speed
from equiflop.deploy.targets import TARGETS
from equiflop.deploy.targets.executorch import ExecuTorch, read_notes

__all__ = [
    "TARGETS",
    "ExecuTorch",
    "ExportError",
    "Exported",
    "Proof",
    "Speed",
    "export",
    "prepared",
    "read_notes",
]
