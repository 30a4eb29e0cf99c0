"""Triton's interpreter on CPU tensors, repaired where it is wrong: bf16 products and casts, TF32's own rounding, and loop
bounds under NumPy 2.4. Imported before anything imports Triton; `IS_ON` says whether it was."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import torch

IS_ON = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()

if IS_ON and "triton" not in sys.modules:
    # read by Triton's decorator, on its own library as on ours
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import numpy as np

        # imported by the first launch otherwise, when the variable is gone
        import triton.experimental.gluon
        import triton.language as tl
        import triton.runtime.interpreter as ti

        import svf_fast.kernels.backend
    finally:
        # other tests start processes of their own
        del os.environ["TRITON_INTERPRET"]

    def _widened(bits: Any) -> Any:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def _rounded(values: Any) -> Any:
        """float32 → bf16 bits, to nearest even; NaN stays."""
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)

    def _tf32(values: Any) -> Any:
        """Ten bits of mantissa."""
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)

    def _create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, _: Any) -> Any:
        def operand(t: Any) -> Any:
            if t.dtype.scalar == tl.bfloat16:
                return _widened(t.data)
            if t.dtype.scalar == tl.float32 and input_precision == ti._ir.INPUT_PRECISION.TF32:
                return _tf32(t.data)
            return t.data

        # half products are summed in the accumulator's width
        return ti.TensorHandle(np.matmul(operand(a), operand(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    _stock_cast, _stock_patch = ti.InterpreterBuilder.cast_impl, ti._patch_lang_tensor

    def _cast(self: Any, source: Any, target: Any) -> Any:
        pair = source.dtype.scalar, target.scalar
        if pair == (tl.float32, tl.bfloat16):
            return ti.TensorHandle(_rounded(source.data), target.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return ti.TensorHandle(_widened(source.data), target.scalar)
        return _stock_cast(self, source, target)

    def _patch(tensor: Any, scope: Any) -> None:
        _stock_patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(()))

    ti.InterpreterBuilder.create_dot = _create_dot
    ti.InterpreterBuilder.cast_impl = _cast
    ti._patch_lang_tensor = _patch
