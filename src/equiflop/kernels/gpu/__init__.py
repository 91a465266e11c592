"""Triton kernels for GPUs: changes of basis, activations and orders of heads inside the products."""
