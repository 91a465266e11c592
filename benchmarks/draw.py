"""The figures of docs/performance.md from recorded benchmarks: ``python benchmarks/draw.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from equiflop.benchmark.compare import Entry
from equiflop.benchmark.figures import write_figures
from equiflop.benchmark.timing import Spread

HERE = Path(__file__).parent
RECORDS = ("eager.json", "compile.json")


def read_entries(path: Path) -> list[Entry]:
    """What ``equiflop bench --output`` wrote."""
    entries = []
    for values in json.loads(path.read_text())["entries"]:
        spreads = {name: Spread(**values[name]) for name in ("latency", "throughput", "speedup") if values[name]}
        known: dict[str, Any] = {**values, **spreads}
        entries.append(Entry(**known))
    return entries


def main() -> None:
    """The last record of a network in a mode counts."""
    entries = {
        (entry.name, entry.model, entry.mode, entry.step, entry.batch_size): entry
        for name in RECORDS
        for entry in read_entries(HERE / name)
    }
    for path in write_figures(HERE.parent / "docs" / "performance", list(entries.values()), {}):
        print(path.relative_to(HERE.parent))


if __name__ == "__main__":
    main()
