"""The Triton kernels in networks that several processes train: DDP and FSDP2, by the interpreter, on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="no TRITON_INTERPRET=1 as in 'make test'"),
]

SCRIPT = """
import sys
import timm, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from equiflop import kernels
from equiflop.kernels.gpu import branch
from equiflop.runtime.processes import leave
from oracles import relative_error, scramble

dist.init_process_group("gloo")
rank = dist.get_rank()
taken = []
run = branch.by_triton
first = kernels.Variant("triton", branch.fits, lambda *a: taken.append(1) or run(*a), "")
kernels.TABLE["branches"] = (first, *kernels.TABLE["branches"][1:])


def network():
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 3}
    return scramble(timm.create_model(sys.argv[1], **sizes, drop_path_rate=0.0)).train()


images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
whole = network()
with kernels.reference():
    whole(images).square().mean().backward()
for way in ("ddp", "fsdp"):
    model = network()
    if way == "fsdp":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    run_model = DistributedDataParallel(model) if way == "ddp" else model
    taken.clear()
    with branch.anywhere():
        run_model(images[2 * rank : 2 * rank + 2]).square().mean().backward()
    assert len(taken) == 2, (way, taken)
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        assert relative_error(grad, q.grad) < 1e-4, (way, name)
print(f"ok{rank}")
leave()
"""


@pytest.mark.parametrize("name", ["flop_deit3_small_patch16_224"])
def test_gradients_are_those_of_one_process(name: str, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    tests = Path(__file__).parents[1]
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), name]
    path = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(re.findall(r"ok\d", done.stdout)) == ["ok0", "ok1"]  # they may write into one line
