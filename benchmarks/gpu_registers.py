"""Registers, spills and shared memory of every Triton kernel and tile that is tried, compiled without a GPU.

    python benchmarks/gpu_registers.py --output benchmarks/gpu_registers.json

Kernels are compiled for the architectures of A100 (sm_80) and H100 (sm_90) and assembled by Triton's own ptxas, which
says what they take. A tile that spills is marked; none in the lists should (``tests/kernels/test_gpu_reports.py``).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from equiflop.files import write_text
from equiflop.groups import FiniteGroup, Rep, cyclic, dihedral, direct_product
from equiflop.kernels.gpu import launch, norm_ops, product_ops, tiles
from equiflop.kernels.gpu.norms import Norm, NormBackward
from equiflop.kernels.gpu.products import Product
from equiflop.kernels.gpu.source import kernel
from equiflop.kernels.gpu.sums import RowSums, WeightSums
from equiflop.kernels.gpu.tiles import Tile
from equiflop.kernels.gpu.weight_gradients import WeightGradient
from equiflop.kernels.lanes import Lanes, decode
from equiflop.kernels.layout import layout_of

GROUPS = {"C2": cyclic(2), "C2xC2": direct_product(cyclic(2), cyclic(2)), "D4": dihedral(4)}
#: ViT-B: width, hidden width, heads.
WIDTH, HIDDEN, HEADS = 768, 3072, 12
#: Pointers whose numbers are float32 whatever the features are.
WIDE = ("inverse", "sums")


def lanes_of(group: FiniteGroup) -> Lanes:
    """The lanes of a regular feature."""
    return decode(layout_of(Rep.regular(group, 2)).code)


def kernels_of(lanes: Lanes) -> Iterator[tuple[str, Any, int, int]]:
    """Every kernel of a block, forward and backward: its use, what it is, and channels of a lane, in and out."""
    width, hidden = WIDTH // lanes.count, HIDDEN // lanes.count
    plain = Product(lanes, "irreps", "irreps")
    yield "qkv", replace(plain, writes="heads", sections_out=3, heads=HEADS, bias=True), width, width
    yield "proj", replace(plain, reads="heads", heads=HEADS, bias=True, scale=True, residual=True), width, width
    yield "fc1", replace(plain, activation="gelu", bias=True), width, hidden
    yield "fc1, training", replace(plain, activation="gelu", bias=True, keeps=True), width, hidden
    yield "fc2", replace(plain, bias=True, scale=True, residual=True), hidden, width
    yield "fc2, depth", replace(plain, bias=True, scale=True, residual=True, path=True), hidden, width
    yield "qkv, regular heads", replace(plain, writes="group", sections_out=3, bias=True), width, width
    yield "proj, regular heads", replace(plain, reads="group", bias=True, scale=True, residual=True), width, width
    yield "qkv, backward", replace(plain, reads="heads", sections_in=3, heads=HEADS), width, width
    yield "proj, backward", replace(plain, writes="heads", heads=HEADS), width, width
    yield "fc1, backward", plain, hidden, width
    yield "fc2, backward", replace(plain, activation="gelu", slopes=True), width, hidden
    yield "qkv, weights", WeightGradient(lanes, "irreps", "heads", 3, HEADS, bias=True), width, width
    yield "proj, weights", WeightGradient(lanes, "heads", "irreps", 1, HEADS, bias=True), width, width
    yield "fc1, weights", WeightGradient(lanes, "irreps", "irreps", bias=True), width, hidden
    yield "fc2, sums", WeightSums(lanes, 1, bias=True, scale=True), hidden, width
    yield "norm, sums", RowSums(), width, width
    entries = (1.0 / WIDTH,) * len(lanes.spans)
    yield "norm", Norm(lanes, entries, True, True), width, width
    yield "norm, backward", NormBackward(lanes, entries, True, True, True), width, width


def uses_of(lanes: Lanes, arch: int) -> Iterator[tuple[str, Any, int, int]]:
    """Those of an architecture: on Hopper, products are there with tiles by descriptors too."""
    for use, what, n_in, n_out in kernels_of(lanes):
        yield use, what, n_in, n_out
        if arch >= 90 and isinstance(what, Product) and tiles.may_have_descriptors(what):
            form = replace(what, descriptors=True, transposed="backward" in use)
            yield f"{use}, descriptors", form, n_in, n_out


def tiles_of(what: Any, arch: int) -> list[Tile | None]:
    """Those that are tried; None for norms and sums, which have one way."""
    if not isinstance(what, Product | WeightGradient):
        return [None]
    return list(tiles.candidates(what, arch))


def measure(what: Any, tile: Tile | None, n_in: int, n_out: int, arch: int) -> dict[str, Any]:
    """Compile one kernel with one tile."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel(what)
    if isinstance(what, WeightSums):
        known = {"N_IN": n_in, "N_OUT": n_out, "BM": product_ops.SUM_ROWS, "BN": product_ops.SUM_COLUMNS}
        options = {"num_warps": launch.SUM_WARPS}
    elif isinstance(what, RowSums):
        known = dict(zip(("BM", "BN"), norm_ops.ROW_SUM_TILE, strict=True))
        options = {"num_warps": launch.SUM_WARPS}
    elif tile is None:
        known = {"N": n_in, "WIDTH": 1 << (n_in - 1).bit_length(), "BM": norm_ops.NORM_ROWS}
        options = {"num_warps": norm_ops.NORM_WARPS}
    else:
        known = {**tile.constants(132), "N_IN": n_in, "N_OUT": n_out}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
    types, constants, hints = {}, {}, {}
    inner = "_out" if getattr(what, "transposed", False) else "_in"
    for i, name in enumerate(function.arg_names):
        if name in known or (name.startswith("w") and name.endswith(inner)):  # the inner step of weights is 1
            types[name], constants[(i,)] = "constexpr", known.get(name, 1)
        elif name in ("M", "SCALE_OF_M", "TOKENS", "LENGTH", "PARTS", "size") or (
            re.search("_(row|out|in)$", name) and name != "dy"
        ):
            types[name] = "i32"
            hints[(i,)] = [["tt.divisibility", 16]] if re.search("_(row|out|in)$", name) else []
        elif name == "eps":
            types[name] = "fp32"
        else:
            wide = name in WIDE or (name == "out" and isinstance(what, WeightGradient))
            wide = wide or (name == "x" and isinstance(what, RowSums))
            types[name], hints[(i,)] = "*fp32" if wide else "*bf16", [["tt.divisibility", 16]]
    source = ASTSource(function, types, constants, {key: value for key, value in hints.items() if value})
    made = triton_compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {
        "warps": options["num_warps"],
        "shared_bytes": made.metadata.shared,
        "wgmma": made.asm["ptx"].count("wgmma.mma_async"),
        "tma": made.asm["ptx"].count("cp.async.bulk.tensor"),
    } | assembled(made.asm["ptx"], arch)


def assembled(ptx: str, arch: int) -> dict[str, int]:
    """Registers per thread and spilled bytes, as ptxas says them."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    target = re.search(r"\.target (sm_\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        name = target.group(1) if target else f"sm_{arch}"
        words = [str(ptxas), "-v", f"--gpu-name={name}", str(file), "-o", str(file.with_suffix(".cubin"))]
        said = subprocess.run(words, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None, said
    return {
        "registers": int(registers.group(1)),
        "spilled_bytes": max(map(int, re.findall(r"(\d+) bytes spill", said))),
    }


def main() -> None:
    """Compile, print, write; the exit code tells whether anything spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90], help="80 for A100, 90 for H100")
    parser.add_argument("--only", help="part of the name of a use, such as fc1")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    print("| sm | group | kernel | tile | warps | stages | registers | spilled, bytes | shared, KiB |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for arch in options.arch:
        for group in options.groups:
            for use, what, n_in, n_out in uses_of(lanes_of(GROUPS[group]), arch):
                if options.only and options.only not in use:
                    continue
                for tile in tiles_of(what, arch):
                    entry = {"arch": arch, "group": group, "kernel": use, "tile": tile and asdict(tile)}
                    entry |= measure(what, tile, n_in, n_out, arch)
                    found.append(entry)
                    size = "rows" if tile is None else f"{tile.rows} x {tile.columns} x {tile.depth}"
                    size += ", persistent" if tile is not None and tile.persistent else ""
                    warps, stages = (entry["warps"], 1) if tile is None else (tile.warps, tile.stages)
                    print(
                        f"| {arch} | {group} | {use} | {size} | {warps} | {stages} | {entry['registers']} | "
                        f"{entry['spilled_bytes']} | {entry['shared_bytes'] / 1024:.0f} |",
                        flush=True,
                    )
    spills = [entry for entry in found if entry["spilled_bytes"]]
    print(f"\n{len(found)} kernels, {len(spills)} with spills")
    if options.output is not None:
        about = {"triton": importlib.metadata.version("triton"), "width": WIDTH, "hidden": HIDDEN, "heads": HEADS}
        content = {
            **about,
            "command": " ".join(["python benchmarks/gpu_registers.py", *sys.argv[1:]]),
            "kernels": found,
        }
        write_text(options.output, json.dumps(content, indent=1))
    sys.exit(bool(spills))


if __name__ == "__main__":
    main()
