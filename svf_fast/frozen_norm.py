"""BatchNorm that runs on its running statistics for good: an affine that keeps nothing for backward, ready to be folded
into the convolution before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from svf_fast.swap import Swapped, restore, swap

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class FrozenNorm(Swapped):
    """Mixin: eval mode whatever `train()` is asked for. Any subclass of torch's BatchNorm."""

    training: bool

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)  # type: ignore[misc]


class FrozenAffine(FrozenNorm):
    """Mixin for torch's own BatchNorm classes: y = scale ⊙ x + shift, and `scale_and_shift()` for whoever folds it."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    eps: float
    num_features: int

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_scale_and_shift", None)
        return state

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """scale = γ / √(σ² + ε) and shift = β − μ · scale, [C] each; cached until one of the four tensors changes."""
        sources = [t for t in (self.weight, self.bias, self.running_mean, self.running_var) if t is not None]
        if torch.compiler.is_compiling() or any(t.requires_grad for t in sources):
            return self._compute()
        key = [(t._version, t.data_ptr(), t.dtype, t.device) for t in sources]
        cached = self.__dict__.get("_scale_and_shift")
        if cached is None or cached[0] != key:
            with torch.no_grad():
                cached = (key, self._compute())
            self.__dict__["_scale_and_shift"] = cached
        return cached[1]

    def _compute(self) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(self.running_var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -self.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        return scale, shift

    def forward(self, x: Tensor) -> Tensor:
        channels = (1, -1) + (1,) * (x.ndim - 2)
        scale, shift = (t.to(x.dtype).view(channels) for t in self.scale_and_shift())
        return x * scale + shift


def is_batch_norm(module: nn.Module) -> bool:
    """Any of torch's BatchNorm classes or a subclass of one."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def freeze_norm(module: nn.Module) -> None:
    """Puts a BatchNorm on its running statistics for good, in place. ValueError when it has none."""
    if isinstance(module, FrozenNorm):
        return
    if module.running_mean is None:
        raise ValueError("BatchNorm without running statistics cannot be frozen")
    swap(module, FrozenAffine if type(module) in _PLAIN else FrozenNorm)
    module.eval()


def thaw_norm(module: nn.Module) -> None:
    """Undoes `freeze_norm`."""
    restore(module)
