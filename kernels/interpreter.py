"""The kernels on CPU tensors through Triton's interpreter, for tests and rehearsals, repaired where it is wrong: bf16 products and
casts, TF32's own rounding, loop bounds under NumPy 2.4. (Triton 3.6 to 3.9.)"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import numpy as np


def load() -> bool:
    """Makes every kernel of this process an interpreted one; False where Triton is missing, or was imported before."""
    if importlib.util.find_spec("triton") is None or "triton" in sys.modules:
        return False
    # read by Triton's decorator, on its own library as on ours
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        # imported by the first launch otherwise, when the variable is gone
        import triton.experimental.gluon  # noqa: F401

        import svf_fast.kernels.backend  # noqa: F401
    finally:
        # not for processes that this one starts
        del os.environ["TRITON_INTERPRET"]
    _repair()
    return True


def _repair() -> None:
    import triton.language as tl
    import triton.runtime.interpreter as ti

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, _: Any) -> Any:
        def operand(t: Any) -> Any:
            if t.dtype.scalar == tl.bfloat16:
                return _widened(t.data)
            if t.dtype.scalar == tl.float32 and input_precision == ti._ir.INPUT_PRECISION.TF32:
                return _tf32(t.data)
            return t.data

        # half products are summed in the accumulator's width
        return ti.TensorHandle(np.matmul(operand(a), operand(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    stock_cast, stock_patch = ti.InterpreterBuilder.cast_impl, ti._patch_lang_tensor

    def cast(self: Any, source: Any, target: Any) -> Any:
        pair = source.dtype.scalar, target.scalar
        if pair == (tl.float32, tl.bfloat16):
            return ti.TensorHandle(_rounded(source.data), target.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return ti.TensorHandle(_widened(source.data), target.scalar)
        return stock_cast(self, source, target)

    def patch(tensor: Any, scope: Any) -> None:
        stock_patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(()))

    ti.InterpreterBuilder.create_dot = create_dot
    ti.InterpreterBuilder.cast_impl = cast
    ti._patch_lang_tensor = patch


def _widened(bits: np.ndarray) -> np.ndarray:
    """bf16 bits → float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """float32 → bf16 bits, to nearest even; NaN stays."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def _tf32(values: np.ndarray) -> np.ndarray:
    """float32 with ten bits of mantissa."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)
