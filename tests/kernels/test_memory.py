"""Memory that is freed stays with the process."""

import platform
import subprocess
import sys

import pytest

# In a process of its own, since what glibc has learnt depends on all that was freed before. `hblks` counts the blocks
# that the system has mapped one by one, and that go back to it, page by page, when they are freed.
_SCRIPT = """
import ctypes, torch
class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2
def mapped_for(size):
    before = mallinfo2().hblks
    block = torch.empty(size, dtype=torch.uint8)
    return mallinfo2().hblks - before
print(mapped_for(9_000_000))
import equiflop.kernels
print(mapped_for(30_000_000), mapped_for(64_000_000))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc learns what to keep")
def test_large_features_come_from_memory_that_the_process_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0", "1"]
