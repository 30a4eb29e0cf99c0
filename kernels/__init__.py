"""Triton kernels: one file a kernel family, its launcher beside it. A kernel knows tensors, no nn.Module and no dataset."""
