"""Memory that samples are written into so that a batch of them need not be copied together, and that is used again. Knows
no sample."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock

import numpy as np
import torch
from torch import Tensor

# Uninitialised memory for one sample's tensor: what it is called, its shape and dtype. A sample asks once for each name.
SampleMemory = Callable[[str, tuple[int, ...], torch.dtype], Tensor]


_LARGE_BLOCK_BYTES = 24 * 2**20  # below the 32 MiB up to which glibc takes note


def fresh_memory(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """For a sample that is alone."""
    return torch.empty(shape, dtype=dtype)


def keep_freed_memory() -> None:
    """Lets the process keep what the transforms' short-lived arrays leave behind, about 10 MB a thread.

    glibc hands freed memory back to the system above twice the largest block that was ever freed, and the transforms'
    arrays come to just more: each picture would wait for the system to clear the same memory anew, a quarter of its time.
    Freeing one large block moves that limit, as any large array of a program does; other systems do not notice.
    """
    torch.empty(_LARGE_BLOCK_BYTES, dtype=torch.uint8)


class Recycler:
    """Tensors whose memory is used again once nothing refers to it: no tensor, no view, nothing kept for a backward.

    The system clears memory before it hands it out, which takes longer than filling it with a batch. May be used from
    several threads.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)  # by bytes

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised, on the CPU."""
        size_bytes = math.prod(shape) * dtype.itemsize
        free = self._free[size_bytes]
        try:
            memory = free.pop()
        except IndexError:
            memory = torch.empty(size_bytes, dtype=torch.uint8)
        # a new array over the memory, which goes when the last tensor made of it does
        borrowed = memory.numpy()
        weakref.finalize(borrowed, free.append, memory).atexit = False
        return torch.from_numpy(borrowed).view(dtype).view(shape)


class BatchMemory:
    """Memory for `count` samples side by side: tensor `name` of sample i is row i of one tensor."""

    def __init__(self, recycler: Recycler, count: int) -> None:
        self._recycler = recycler
        self._count = count
        self._whole: dict[str, Tensor] = {}
        self._lock = Lock()

    def of_sample(self, position: int) -> SampleMemory:
        """Row `position`, for the use of one thread."""
        return partial(self._row, position)

    def _row(self, position: int, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        with self._lock:
            if name not in self._whole:
                self._whole[name] = self._recycler.empty((self._count, *shape), dtype)
            return self._whole[name][position]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """As torch.stack, of CPU tensors of one shape; nothing is copied of those that are a batch's memory, in order."""
    first = tensors[0]
    if all(_follows(first, position, tensor) for position, tensor in enumerate(tensors)):
        return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))
    # NumPy asks for large pages, which are sooner cleared than those that torch.stack gets
    return torch.from_numpy(np.stack([tensor.numpy() for tensor in tensors]))


def _follows(first: Tensor, position: int, tensor: Tensor) -> bool:
    """Whether `tensor` lies `position` places behind `first` in the same memory."""
    return (
        tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and tensor.storage_offset() == first.storage_offset() + position * first.numel()
        and tensor.is_contiguous()
        and (tensor.shape, tensor.dtype) == (first.shape, first.dtype)
    )
