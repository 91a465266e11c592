"""Which vision transformers of timm have an equivariant twin, which are refused and why, and what a twin costs.

Every name of timm's modules of vision transformers is tried at full size, without memory; what is built is then checked
in float64 with two blocks and a small image (about 25 minutes on two cores).

    python benchmarks/timm_twins.py --output docs/twins.md
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.eva import Eva

import equiflop
from equiflop.models.twin import twin

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from oracles import relative_error, scramble
from plain_weights import TRIVIAL, plain_weights

MODULES = (
    *("vision_transformer", "deit", "eva", "beit", "vision_transformer_relpos", "vision_transformer_sam"),
    "naflexvit",
)
GROUPS = ("flop", "octic")
#: Networks with more parameters than this in one block are checked at a width of 32 channels a head.
LARGEST = 60_000_000
#: One of each well-known family.
WELL_KNOWN = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_base_patch32_224",
    "vit_base_patch8_224",
    "deit3_base_patch16_224",
    "deit_base_distilled_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_large_patch14_clip_quickgelu_224",
    "vit_base_patch16_siglip_224",
    "vit_so400m_patch14_siglip_224",
    "vit_base_patch14_dinov2",
    "vit_large_patch14_reg4_dinov2",
    "vit_giant_patch14_dinov2",
    "vit_giant_patch14_clip_224",
    "vit_so150m2_patch16_reg1_gap_256",
    "aimv2_large_patch14_224",
    "beit3_base_patch16_224",
    "vit_base_patch16_xp_224",
    "beit_base_patch16_224",
    "beitv2_large_patch16_224",
    "eva_giant_patch14_224",
    "eva02_small_patch14_224",
    "eva02_base_patch14_448",
    "eva02_large_patch14_448",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_dinov3",
    "vit_large_patch16_dinov3",
    "vit_7b_patch16_dinov3",
    "vit_base_patch16_rope_mixed_224",
    "vit_pe_core_large_patch14_336",
    "vit_relpos_base_patch16_224",
    "naflexvit_base_patch16_siglip",
)

INTRODUCTION = """# Twins of timm's vision transformers

`equiflop.twin(name, group)` builds the untrained equivariant twin of a vision transformer of timm: its own modules, one
by one, become equivariant, and a part without an equivariant counterpart is refused. Written by

```sh
{command}
```

with timm {timm} and torch {torch}. `equiflop train`, `check`, `bench` and `models` take `twin:NAME`, with
`--set group=octic` and so on; a folder that `timm.models.save_for_hf` made of a twin loads again.
`twin("convnext_tiny")` and `twin("resmlp_12_224")` are the registered networks; of ConvNeXt and ResMLP the sizes in
[Models](models.md) have a twin. Swin, Hiera, MaxViT, CaiT, ResNets, hybrid ViTs, ConvNeXtV2 and MLP-Mixer have none.
Weights are not carried over (a network with weights, or a name with a tag, draws a warning that says so):
[`equiflop distill`](distill.md) trains the twin from them.

Heads of a twin are regular where the group's order divides their number, those of the registered `flop_*` and `octic_*`
coupled, as published. Both have the same keys and shapes but are different functions: weights of one load into the
other without an error and give wrong answers. Load weights with the `heads` they were trained with.

**How it is possible.** The residual stream is ordered by irreps. Of a branch only the linear maps into it and out of it
are replaced: they change to the group's own basis on the way, `|G|` copies of the heads or hidden channels which the
group permutes, and all that is pointwise or works head by head stays timm's module: activations and gates, norms of
queries and keys, softmax. Whatever depends on position (rotary tables, relative position biases) copy `g` sees through
`g^-1`. That needs a number of heads that the group's order divides; networks with absolute position embeddings alone
can do without (`heads="coupled"`).
"""


def small_keywords(name: str) -> dict[str, Any]:
    """Keywords for two blocks and an image of four patches by four; the largest networks are made narrow as well."""
    with torch.device("meta"):
        plain = timm.create_model(name)
    naflex = hasattr(plain, "embeds")
    # timm resamples position embeddings in float32: the grid is that of the image
    keywords: dict[str, Any] = (
        {"pos_embed_grid_size": (4, 4)} if naflex else {"img_size": 4 * plain.patch_embed.patch_size[0]}
    )
    attention = getattr(plain.blocks[0], "attn", None)
    key_heads = [getattr(block.attn, "num_kv_heads", 0) for block in plain.blocks] if attention is not None else []
    keywords["depth"] = 2
    if isinstance(plain, Eva) and all(key_heads):  # one entry per block
        keywords["num_kv_heads"] = (min(key_heads), max(key_heads))
    if sum(p.numel() for p in plain.blocks[0].parameters()) > LARGEST:
        keywords |= {"embed_dim": 32 * plain.blocks[0].attn.num_heads, "mlp_ratio": 4.0}
    return keywords


def examine(name: str) -> dict[str, Any]:
    """Refusals at full size, and the errors of what is built, checked at small size."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for group in GROUPS:
        try:
            twin(name, group, device="meta")
            found[group] = None
        except ValueError as error:
            found[group] = str(error).removeprefix(f"{name} has no twin: ")
    if all(found[group] is not None for group in GROUPS):
        return found
    plain = scramble(timm.create_model(name, **small_keywords(name)).double()).eval()
    side = 4 * (plain.embeds if hasattr(plain, "embeds") else plain.patch_embed).patch_size[0]
    for group in GROUPS:
        if found[group] is None:
            report = equiflop.check(twin(plain, group), input_size=(side, side))
            found[f"{group} error"] = report.max_error if report.passed else f"{report.verdict}: {report.problems}"
    made = twin(plain, TRIVIAL)
    made.load_state_dict(plain_weights(plain, made), strict=True)
    images = torch.randn(2, plain.in_chans, side, side, dtype=torch.float64)
    with torch.no_grad():
        found["plain error"] = relative_error(made(images), plain(images))
    return found


def cost_row(name: str) -> str:
    """A line of the table: MACs at the network's own image size, and their ratios."""
    with torch.device("meta"):
        plain = timm.create_model(name)
    size = plain.pretrained_cfg["input_size"][1:] if hasattr(plain, "embeds") else plain.patch_embed.img_size
    cost = equiflop.macs(plain, tuple(size))
    cells = [f"{cost / 1e9:.3f}"]
    for group in GROUPS:
        try:
            own = equiflop.macs(twin(name, group, device="meta"), tuple(size))
            cells += [f"{own / 1e9:.3f}", f"{cost / own:.2f}"]
        except ValueError:
            cells += ["-", "-"]
    return f"| {name} | {size[0]}x{size[1]} | {' | '.join(cells)} |"


def main() -> None:
    """Try all names and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/twins.md"), help="Markdown file to write")
    parser.add_argument("--jobs", type=int, default=2, help="networks that are examined at the same time")
    parser.add_argument("--state", type=Path, help="file of lines of JSON in which an interrupted run goes on")
    arguments = parser.parse_args()
    names = {module: timm.list_models(module=module) for module in MODULES}
    results: dict[str, dict[str, Any]] = {}
    if arguments.state and arguments.state.exists():
        results = dict(json.loads(line) for line in arguments.state.read_text().splitlines())
    tasks = [name for found in names.values() for name in found if name not in results]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=20) as pool:
        for name, found in zip(tasks, pool.imap(examine, tasks), strict=True):
            results[name] = found
            print(name, found, file=sys.stderr, flush=True)
            if arguments.state:
                with arguments.state.open("a") as file:
                    file.write(json.dumps([name, found]) + "\n")
        costs = pool.map(cost_row, WELL_KNOWN)
    command = f"python benchmarks/timm_twins.py --output {arguments.output}"
    sections = [
        INTRODUCTION.format(command=command, timm=timm.__version__, torch=torch.__version__),
        "## Built and refused\n",
        counts(names, results),
        "## Checked\n",
        checks(results),
    ]
    for group in GROUPS:
        sections += [f"## Refused with group {group}\n", refusals(results, group)]
    header = " | ".join(f"{group} | ratio" for group in GROUPS)
    sections += [
        "## What a twin costs\n",
        "MACs (multiply-adds, G) of one image at the network's own size, and how many times fewer a twin makes.\n",
        f"| name | image | plain | {header} |\n| --- | --- | ---: |{' ---: | ---: |' * len(GROUPS)}",
        "\n".join(costs) + "\n",
    ]
    arguments.output.write_text("\n".join(sections))


def counts(names: dict[str, list[str]], results: dict[str, dict[str, Any]]) -> str:
    """How many names of every module are built and refused."""
    lines = [
        "| group | timm's module | names | built | refused | of these: heads do not divide |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for group in GROUPS:
        total = [0, 0, 0, 0]
        for module, found in names.items():
            reasons = [results[name][group] for name in found]
            built = sum(reason is None for reason in reasons)
            heads = sum("num_heads=" in (reason or "") for reason in reasons)
            row = [len(found), built, len(found) - built, heads]
            total = [a + b for a, b in zip(total, row, strict=True)]
            lines.append(f"| {group} | {module} | {' | '.join(map(str, row))} |")
        lines.append(f"| {group} | all | {' | '.join(map(str, total))} |")
    return "\n".join(lines) + "\n"


def checks(results: dict[str, dict[str, Any]]) -> str:
    """The largest errors of what is built."""
    lines = [
        "Every network that is built, in float64, with two blocks and four patches by four (the largest ones 32\n"
        "channels a head wide): the largest relative error of logits and features under all elements of the group,\n"
        "and of the logits against the plain network's where the group has one element and the twin the plain\n"
        "weights, so that nothing was dropped.\n",
        "| what | networks | largest relative error |\n| --- | ---: | ---: |",
    ]
    for key, what in (("flop error", "flop"), ("octic error", "octic"), ("plain error", "one element, plain weights")):
        errors = {name: found[key] for name, found in results.items() if key in found}
        failed = [f"{name} ({error})" for name, error in errors.items() if isinstance(error, str)]
        largest = max(error for error in errors.values() if not isinstance(error, str))
        lines.append(f"| {what} | {len(errors)} | {largest:.1e} |")
        lines += [f"| {what}: failed | 1 | {text} |" for text in failed]
    return "\n".join(lines) + "\n"


def refusals(results: dict[str, dict[str, Any]], group: str) -> str:
    """The names that are refused, by reason."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, found in results.items():
        if found[group] is not None:
            reasons[found[group]].append(name)
    ordered = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
    rows = "\n".join(f"| {reason} | {len(found)} | {', '.join(found)} |" for reason, found in ordered)
    return f"| reason | count | names |\n| --- | ---: | --- |\n{rows.replace('|G|', '&#124;G&#124;')}\n"


if __name__ == "__main__":
    main()
