"""The arithmetic of a run: float32, or automatic mixed precision. Knows no model and no configuration."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["float32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def arithmetic(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Inside, forward passes on ``device`` compute in ``precision``: autocast, so that parameters, singular values
    among them, and their gradients stay float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])
