"""Kernels for NVIDIA GPUs in Triton, one operation a file. Imported only where a GPU computes."""
