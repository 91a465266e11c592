"""Networks on their way to where they run: exported in a form made for runtimes, and proven there."""

from equiflop.deploy.executorch import ExecuTorch, read_notes
from equiflop.deploy.export import Exported, ExportError, export
from equiflop.deploy.prepare import prepared
from equiflop.deploy.proof import Proof, Speed
from equiflop.deploy.targets import TARGETS

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
