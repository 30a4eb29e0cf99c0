"""What native kernels derive once from frozen tensors (packed and transformed weights), kept while the sources live and are unchanged.
Knows tensors, no layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class _Entry(NamedTuple):
    # no strong reference: a model that is gone frees what was derived from it
    storages: tuple[StorageWeakRef, ...]
    versions: tuple[int, ...]
    sums: tuple[int, ...]
    derived: Tensor


class DerivedTensors:
    """Tensors by what they were derived for and from. A source counts as unchanged while its storage and version counter are the
    same; writes through `.data` leave no trace there: after `recheck` its values are compared as well, once."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}
        self._doubtful: set[Hashable] = set()

    def get(self, purpose: Hashable, sources: tuple[Tensor | None, ...], derive: Callable[[], Tensor]) -> Tensor:
        """`derive()`, or what it returned before for the same purpose and unchanged sources."""
        given = [t for t in sources if t is not None]
        try:
            key = (purpose, tuple(None if t is None else _place(t) for t in sources))
            versions = tuple(t._version for t in given)
        except RuntimeError:
            # inference tensors count no versions, vmap's have no storage
            return derive()
        entry = self._entries.get(key)
        if key in self._doubtful:
            self._doubtful.discard(key)
            if entry is not None and entry.sums != _sums(given):
                entry = None
        # an address that a new storage took over belongs to another tensor
        if entry is None or entry.versions != versions or any(ref.expired() for ref in entry.storages):
            self._drop_expired()
            with torch.inference_mode(False), torch.no_grad():
                derived = derive()
            storages = tuple(StorageWeakRef(t.untyped_storage()) for t in given)
            entry = _Entry(storages, versions, _sums(given), derived)
            self._entries[key] = entry
        return entry.derived

    def recheck(self, *sources: Tensor) -> None:
        """The values of `sources` may have changed unseen."""
        places = set()
        for t in sources:
            try:
                places.add(_place(t))
            except RuntimeError:
                continue
        self._doubtful |= {key for key in self._entries if places.intersection(key[1])}  # type: ignore[index]

    def held_bytes(self) -> int:
        """Bytes of all that is kept now."""
        self._drop_expired()
        return sum(e.derived.untyped_storage().nbytes() for e in self._entries.values())

    def _drop_expired(self) -> None:
        self._entries = {k: e for k, e in self._entries.items() if not any(ref.expired() for ref in e.storages)}


def _place(t: Tensor) -> Hashable:
    return t.data_ptr(), t.dtype, tuple(t.shape), t.stride()


def _sums(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Two sums of each tensor's bits, over all and over the first half: a change of values changes one of them."""
    found: list[int] = []
    for t in tensors:
        raw = t.detach().flatten()
        raw = raw.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[raw.element_size()])
        found += [int(raw.sum()), int(raw[: len(raw) // 2].sum())]
    return tuple(found)
