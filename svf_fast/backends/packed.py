"""A layer's frozen factors in the order in which the compiled kernels read them, packed once and kept while the layer lives and they
are unchanged. Knows tensors and the op that packs, no layer."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from svf_fast.contract import Geometry

DTYPES = (torch.float32, torch.bfloat16)
# Fewer channels than this, and the transforms of Winograd's products cost more than they save.
_WINOGRAD_CHANNELS = 32
_WINOGRAD_WEIGHTS = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))

_changes_unseen = 0


def recheck() -> None:
    """Values may have been written through `.data`, which leaves no trace: they are compared once more before they count."""
    global _changes_unseen
    _changes_unseen += 1


@dataclass
class _Entry:
    """What was derived, and from what."""

    state: Hashable
    # a copy of the vector that was folded in
    scale: Tensor | None
    checksum: int
    # of `_changes_unseen` when the checksum was last compared
    seen: int
    derived: Tensor


def owner(t: Tensor) -> nn.Parameter | None:
    """The parameter that `t` is, or is a view of. Other tensors have nobody who would say that they changed (`train()`, `eval()`)."""
    for candidate in (t, t._base):
        if isinstance(candidate, nn.Parameter) and not candidate.is_inference():
            return candidate
    return None


class DerivedTensors:
    """What was derived from parameters or views of them, by purpose; it goes with the parameter."""

    def __init__(self) -> None:
        # a lock: several threads may run one model
        self._lock = threading.Lock()
        self._of: Any = WeakTensorKeyDictionary()

    def get(self, purpose: Hashable, source: Tensor, scale: Tensor | None, derive: Callable[[], Tensor]) -> Tensor:
        """`derive()`, or what it returned before for the same purpose, unchanged `source` and the same values of `scale`."""
        parameter = owner(source)
        if parameter is None:
            return derive()
        state = (parameter._version, source.data_ptr(), source.dtype, source.shape, source.stride())
        with self._lock:
            entry = self._of.setdefault(parameter, {}).get(purpose)
        if entry is not None and entry.state == state and _is_same(entry.scale, scale):
            if entry.seen == _changes_unseen:
                return entry.derived
            if entry.checksum == _checksum(source):
                entry.seen = _changes_unseen
                return entry.derived
        with torch.inference_mode(False), torch.no_grad():
            copied = None if scale is None else scale.detach().clone()
            entry = _Entry(state, copied, _checksum(source), _changes_unseen, derive())
        with self._lock:
            self._of.setdefault(parameter, {})[purpose] = entry
        return entry.derived

    def held_bytes(self) -> int:
        """Bytes of all that is kept now."""
        with self._lock:
            kept = [entry for purposes in self._of.values() for entry in purposes.values()]
        return sum(entry.derived.numel() * entry.derived.element_size() for entry in kept)


def _is_same(kept: Tensor | None, given: Tensor | None) -> bool:
    if kept is None or given is None:
        return kept is given
    return kept.dtype == given.dtype and torch.equal(kept, given)


def _checksum(t: Tensor) -> int:
    """CRC-32 of a CPU tensor's values in memory order."""
    raw = t.detach()
    if raw.ndim == 4 and raw.is_contiguous(memory_format=torch.channels_last):
        raw = raw.permute(0, 2, 3, 1)
    return zlib.crc32(raw.contiguous().view(-1).view(torch.uint8).numpy().data)


class PackedWeights:
    """Factors packed for the kernels of the instruction set in force; `ops` is the namespace of the compiled extension."""

    def __init__(self, ops: Any) -> None:
        self._ops = ops
        self._derived = DerivedTensors()

    def held_bytes(self) -> int:
        """Bytes of all that is packed now."""
        return self._derived.held_bytes()

    def right(self, v: Tensor, geometry: Geometry, dtype: torch.dtype) -> tuple[Tensor, bool]:
        """v [R, Ci, Kh, Kw] for the convolution, and whether transformed for Winograd's products."""
        is_winograd = self._is_winograd(v, geometry, dtype)
        return self._packed("right", v, None, is_winograd, dtype, lambda: v.permute(2, 3, 1, 0)), is_winograd

    def right_turned(self, v: Tensor, geometry: Geometry, dtype: torch.dtype) -> tuple[Tensor, bool]:
        """The same for the data gradient of a convolution of stride 1: taps in reverse, channels swapped."""
        is_winograd = self._is_winograd(v, geometry, dtype)

        def turned() -> Tensor:
            return v.flip(2, 3).permute(2, 3, 0, 1)

        return self._packed("right turned", v, None, is_winograd, dtype, turned), is_winograd

    def right_transposed(self, v: Tensor, dtype: torch.dtype) -> Tensor:
        """v for the data gradient of a strided or 1x1 convolution: channels swapped."""
        return self._packed("right transposed", v, None, False, dtype, lambda: v.permute(2, 3, 0, 1))

    def left(self, u: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """scale ⊙ u [Co, R] for the projection."""
        return self._packed("left", u, scale, False, dtype, lambda: _scaled(u, scale).mT[None, None])

    def left_transposed(self, u: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """scale ⊙ u for the projection's gradient."""
        return self._packed("left transposed", u, scale, False, dtype, lambda: _scaled(u, scale)[None, None])

    def _is_winograd(self, v: Tensor, geometry: Geometry, dtype: torch.dtype) -> bool:
        return (
            v.shape[2:] == (3, 3)
            and geometry.stride == (1, 1)
            and min(v.shape[:2]) >= _WINOGRAD_CHANNELS
            and (dtype == torch.float32 or not self._ops.has_half_products())
        )

    def _packed(
        self, purpose: str, source: Tensor, scale: Tensor | None, is_winograd: bool, dtype: torch.dtype,
        taps: Callable[[], Tensor],
    ) -> Tensor:  # fmt: skip
        def derive() -> Tensor:
            weight = taps()  # [Kh, Kw, k, n]
            if is_winograd:
                # G g Gᵀ
                g = torch.tensor(_WINOGRAD_WEIGHTS, dtype=torch.float64)
                weight = torch.einsum("ih,jw,hwkn->ijkn", g, g, weight.double()).float()
            elif weight.dtype not in DTYPES:
                weight = weight.float()
            return self._ops.pack(weight.reshape(-1, *weight.shape[2:]), dtype == torch.bfloat16)

        key = (purpose, is_winograd, dtype, self._ops.instruction_set())
        return self._derived.get(key, source, scale, derive)


def _scaled(u: Tensor, scale: Tensor | None) -> Tensor:
    return u if scale is None else u.float() * scale.float().unsqueeze(1)
