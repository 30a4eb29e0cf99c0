"""What the contract's tests run on: stock operations, and the compiled kernels in the instruction sets that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import svf_fast
from svf_fast.backends import native

STOCK = "torch"
NATIVE = [] if native.why_unusable("cpu") else [f"cpp {name}" for name in native.instruction_sets()]
# the newest and the oldest set stand for all, whose arithmetic test_native.py has
IMPLEMENTATIONS = list(dict.fromkeys([STOCK, *NATIVE[:1], *NATIVE[-1:]]))


@contextmanager
def running_on(name: str) -> Iterator[None]:
    """Every svf_fast op in that implementation."""
    backend, _, instruction_set = name.partition(" ")
    before = torch.ops.svf_fast_cpp.instruction_set() if instruction_set else ""
    try:
        if instruction_set:
            torch.ops.svf_fast_cpp.use_instruction_set(instruction_set)
        with svf_fast.backend(backend):
            yield
    finally:
        if instruction_set:
            torch.ops.svf_fast_cpp.use_instruction_set(before)
