"""Operations that are executed in more than one way: a reference that reads like the mathematics, and faster variants.

``choose.TABLE`` lists every operation with its variants and the conditions under which each is taken. With
``kernels.reference()``, or the environment variable ``EQUIFLOP_KERNELS=reference``, the references alone are used. Here
stands all that is known of devices, dtypes, compilers and bytes; the layers above hold tensors and group theory.
"""

from equiflop.kernels.choose import TABLE, Form, Variant, for_runtimes, reference
from equiflop.kernels.gpu.branch import without_triton
from equiflop.kernels.layout import Layout, join, layout_of, split
from equiflop.kernels.memory import keep_freed_memory
from equiflop.kernels.orders import Order
from equiflop.kernels.runtime import linear as _linear_for_runtimes  # noqa: F401  (its variants come into the table)
from equiflop.kernels.stacked import branches as _stacked  # noqa: F401
from equiflop.kernels.watched import is_bare

__all__ = [
    "TABLE",
    "Form",
    "Layout",
    "Order",
    "Variant",
    "for_runtimes",
    "is_bare",
    "join",
    "layout_of",
    "reference",
    "split",
    "without_triton",
]

keep_freed_memory()
