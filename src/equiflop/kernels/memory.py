"""Memory that the C library gives back to the system, and how it is made to keep it."""

import torch

#: The largest block from which glibc learns, less its own header and alignment; mallopt(3), ``M_MMAP_THRESHOLD``.
_LARGEST_LEARNT = 32 * 2**20 - 2**16


def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MB of freed memory instead of giving it back after every layer.

    What is given back comes again page by page, each one cleared and mapped by the system: tens of thousands of pages
    a forward step. glibc keeps twice the size of the largest block that it has mapped by itself and seen freed, and a
    network with half the features has smaller blocks, but as many of them. So one block of that size is taken and
    given back here. It is never written, so that no page of it is mapped. Other C libraries ignore it, and so does
    glibc where the environment says what to keep (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``).
    """
    torch.empty(_LARGEST_LEARNT, dtype=torch.uint8, device="cpu")
