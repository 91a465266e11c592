"""Which vision transformers of timm have an equivariant twin, which are refused and why, and what a twin costs.

Every name of timm's modules ``vision_transformer`` and ``deit`` is tried, without memory (about ten minutes).

    python benchmarks/timm_twins.py --output docs/twins.md
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import timm
import torch

import equiflop
from equiflop.models.twin import twin

MODULES = ("vision_transformer", "deit")
GROUPS = ("flop", "octic")
#: One of each well-known family.
WELL_KNOWN = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_base_patch32_224",
    "vit_base_patch8_224",
    "deit3_base_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_large_patch14_clip_quickgelu_224",
    "vit_base_patch16_siglip_gap_256",
    "vit_so400m_patch14_siglip_gap_224",
    "vit_base_patch14_dinov2",
    "vit_large_patch14_reg4_dinov2",
    "vit_giant_patch14_clip_224",
    "vit_so150m2_patch16_reg1_gap_256",
)

INTRODUCTION = """# Twins of timm's vision transformers

`equiflop.twin(name, group)` builds the untrained equivariant twin of a vision transformer of timm: every module of it
has a counterpart, or the name is refused. Written by

```sh
{command}
```

with timm {timm} and torch {torch}. An override may replace what a refusal names, for instance
`equiflop.twin("vit_base_patch16_siglip_224", global_pool="avg")`. `twin("convnext_tiny")` and
`twin("resmlp_12_224")` are the registered networks. `equiflop train`, `check`, `bench` and `models` take `twin:NAME`,
with `--set group=octic` and so on. Weights are not carried over; a network with weights, or a name with a tag, draws a
warning that says so.
"""


def refusal(name: str, group: str) -> str | None:
    """Why a name has no twin; None where it has one."""
    try:
        twin(name, group, device="meta")
    except ValueError as error:
        return str(error).removeprefix(f"{name} has no twin: ")
    return None


def cost_row(name: str) -> str:
    """A line of the table: MACs at the network's own image size, and their ratios."""
    with torch.device("meta"):
        plain = timm.create_model(name)
    height, width = plain.patch_embed.img_size
    costs = [equiflop.macs(plain, (height, width))]
    costs += [equiflop.macs(twin(name, group, device="meta"), (height, width)) for group in GROUPS]
    ratios = [costs[0] / cost for cost in costs[1:]]
    cells = [f"{costs[0] / 1e9:.3f}"]
    cells += [
        cell for cost, ratio in zip(costs[1:], ratios, strict=True) for cell in (f"{cost / 1e9:.3f}", f"{ratio:.2f}")
    ]
    return f"| {name} | {height}x{width} | {' | '.join(cells)} |"


def main() -> None:
    """Try all names and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/twins.md"), help="Markdown file to write")
    arguments = parser.parse_args()
    counts, refused = [], []
    for group in GROUPS:
        reasons: dict[str, list[str]] = defaultdict(list)
        for module in MODULES:
            names = timm.list_models(module=module)
            found = {name: refusal(name, group) for name in names}
            for name, reason in found.items():
                if reason is not None:
                    reasons[reason].append(name)
            built = sum(reason is None for reason in found.values())
            counts.append(f"| {group} | {module} | {len(names)} | {built} | {len(names) - built} |")
            print(f"{group} {module}: {built} of {len(names)}", file=sys.stderr, flush=True)
        ordered = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
        refused.append("\n".join(f"| {reason} | {len(found)} | {', '.join(found)} |" for reason, found in ordered))
    command = f"python benchmarks/timm_twins.py --output {arguments.output}"
    sections = [
        INTRODUCTION.format(command=command, timm=timm.__version__, torch=torch.__version__),
        "## Built and refused\n",
        "| group | timm's module | names | built | refused |\n| --- | --- | ---: | ---: | ---: |",
        "\n".join(counts) + "\n",
    ]
    for group, table in zip(GROUPS, refused, strict=True):
        if group != GROUPS[0] and table == refused[0]:
            sections.append(f"Group {group} refuses the same names for the same reasons.\n")
        else:
            sections += [
                f"## Refused with group {group}\n",
                f"| reason | count | names |\n| --- | ---: | --- |\n{table}\n",
            ]
    header = " | ".join(f"{group} | ratio" for group in GROUPS)
    sections += [
        "## What a twin costs\n",
        "MACs (multiply-adds, G) of one image at the network's own size, and how many times fewer a twin makes.\n",
        f"| name | image | plain | {header} |\n| --- | --- | ---: |{' ---: | ---: |' * len(GROUPS)}",
        "\n".join(cost_row(name) for name in WELL_KNOWN) + "\n",
    ]
    arguments.output.write_text("\n".join(sections))


if __name__ == "__main__":
    main()
