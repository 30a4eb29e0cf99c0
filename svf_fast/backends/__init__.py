"""The registry of backends and the switch between them. A backend is an object that fulfils `contract.Backend`; adding
one is one file here (or in kernels/) and one `register` call."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from types import TracebackType
from typing import NamedTuple

import torch

from svf_fast.backends.composed import ComposedBackend
from svf_fast.backends.kernel_set import why_no_device
from svf_fast.contract import Backend

NAMES = ("auto", "torch", "cpp", "triton")


class _Entry(NamedTuple):
    # for a device type ("cpu", "cuda", ...)
    load: Callable[[str], Backend]
    # why it cannot run on a device type, or None when it can
    reason_unusable: Callable[[str], str | None]


def _load_native(device: str) -> Backend:
    from svf_fast.backends import cuda_kernels, native

    return cuda_kernels.make() if device == "cuda" else native.NativeBackend()


def _why_no_native(device: str) -> str | None:
    from svf_fast.backends import cuda_kernels, native

    return cuda_kernels.why_unusable() if device == "cuda" else native.why_unusable(device)


def _load_triton(device: str) -> Backend:
    from svf_fast.kernels.backend import make

    return make()


def _why_no_triton(device: str) -> str | None:
    if device != "cuda":
        return f"Triton's kernels run on CUDA devices, not on {device}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return why_no_device()


_composed = ComposedBackend()
_entries: dict[str, _Entry] = {
    "torch": _Entry(lambda device: _composed, lambda device: None),
    "cpp": _Entry(_load_native, _why_no_native),
    "triton": _Entry(_load_triton, _why_no_triton),
}
# `auto` takes the first that can run on the device.
_preference = ("triton", "cpp", "torch")


def register(name: str, load: Callable[[str], Backend], reason_unusable: Callable[[str], str | None]) -> None:
    """Makes a backend known under one of the names of the public contract."""
    _entries[name] = _Entry(load, reason_unusable)
    _resolve.cache_clear()


def why_unusable(name: str, device: str) -> str | None:
    """The reason why backend `name` cannot run on a device type, or None when it can."""
    return _entries[name].reason_unusable(device)


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    if name != "auto":
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        reasons = {device: why_unusable(name, device) for device in devices}
        if all(reasons.values()):
            raise RuntimeError(f"backend {name!r} is not available: {next(iter(reasons.values()))}")
    return name


def _from_environment() -> str:
    """SVF_FAST_BACKEND, or auto with a warning where that cannot be had: an import never fails over it."""
    name = os.environ.get("SVF_FAST_BACKEND", "auto")
    try:
        return _checked(name, "the environment variable SVF_FAST_BACKEND")
    except (ValueError, RuntimeError) as error:
        warnings.warn(f"{error}; using auto", stacklevel=2)
        return "auto"


_current = _from_environment()


def current() -> str:
    """The backend name in force in this process."""
    return _current


def select(device: torch.device) -> Backend:
    """The backend object that computes on `device` now."""
    return _resolve(_current, device.type)


@cache
def _resolve(name: str, device: str) -> Backend:
    if name != "auto":
        reason = why_unusable(name, device)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run on {device}: {reason}")
        return _entries[name].load(device)
    return next(_entries[n].load(device) for n in _preference if why_unusable(n, device) is None)


class backend:
    """Chooses the backend of every svf_fast op: `backend("torch")` for the process, `with backend("torch"):` for a block.

    Names: auto (the fastest that can run on the tensor's device), torch, cpp, triton. ValueError for any other name,
    RuntimeError with the reason for one that cannot run here. Backward runs in the backend that is in force then;
    backends share what is kept, so mixing them is sound.
    """

    def __init__(self, name: str) -> None:
        # process-wide rather than a context variable: autograd runs CUDA backward in threads of its own
        global _current
        self._name, self._previous = _checked(name, "backend"), _current
        _current = self._name

    def __enter__(self) -> str:
        return self._name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = self._previous
