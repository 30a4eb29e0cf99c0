"""BatchNorm that runs on its running statistics for good: an affine that keeps nothing for backward, ready to be folded
into the convolution before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svf_fast.contract import check
from svf_fast.swap import Swapped, restore, swap

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class FrozenNorm(Swapped):
    """Mixin: eval mode whatever `train()` is asked for. Any subclass of torch's BatchNorm."""

    training: bool

    def train(self, mode: bool = True) -> nn.Module:
        # what `merge` gives back is in the mode that was asked for last
        self.__dict__["_asked_mode"] = mode
        return super().train(False)  # type: ignore[misc]


class FrozenAffine(FrozenNorm):
    """Mixin for torch's own BatchNorm classes: y = scale ⊙ x + shift, and `scale_and_shift()` for whoever folds it."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    eps: float
    num_features: int
    _check_input_dim: Any

    def __getstate__(self) -> Any:
        state = super().__getstate__()
        state.pop("_scale_and_shift", None)
        return state

    def train(self, mode: bool = True) -> nn.Module:
        # writes through `.data` leave no trace in version counters: a change of mode is where they happen
        self.__dict__.pop("_scale_and_shift", None)
        return super().train(mode)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """scale = γ / √(σ² + ε) and shift = β − μ · scale, [C] each; the same tuple until one of the sources changes."""
        sources = [t for t in (self.weight, self.bias, self.running_mean, self.running_var) if t is not None]
        if torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
            return self._compute()
        if torch.is_grad_enabled() and any(t.requires_grad for t in sources):
            return self._compute()
        key = (self.eps, *[(t._version, t.data_ptr(), t.dtype, t.device) for t in sources])
        kept = self.__dict__.get("_scale_and_shift")
        if kept is None or kept[0] != key or not same_values(kept[1], sources):
            with torch.inference_mode(False), torch.no_grad():
                kept = (key, [t.detach().clone() for t in sources], self._compute())
            if type(kept[2][0]) is not Tensor:
                # a tracer's stand-in must not outlive the trace
                return kept[2]
            self.__dict__["_scale_and_shift"] = kept
        return kept[2]

    def _compute(self) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(self.running_var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        if self.bias is None:
            return scale, -self.running_mean * scale
        return scale, torch.addcmul(self.bias, self.running_mean, scale, value=-1)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        check(x.shape[1] == self.num_features, f"x must have {self.num_features} channels, got shape {list(x.shape)}")
        channels = (1, -1) + (1,) * (x.ndim - 2)
        scale, shift = (t.to(x.dtype).view(channels) for t in self.scale_and_shift())
        return x * scale + shift


def same_values(kept: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    """Whether short vectors still hold what they held: catches writes through `.data`, which version counters miss.

    On a GPU the comparison would synchronise: there such writes are noticed at the next `train()` or `eval()`.
    """
    if any(type(t) not in (Tensor, nn.Parameter) for t in now):
        return False
    if now[0].device.type == "cuda":
        return True
    try:
        return all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    except RuntimeError:
        # a tracer's mode has no values to compare
        return False


def is_batch_norm(module: nn.Module) -> bool:
    """Any of torch's BatchNorm classes or a subclass of one."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def freeze_norm(module: nn.Module) -> None:
    """Puts a BatchNorm on its running statistics for good, in place. ValueError when it has none."""
    if isinstance(module, FrozenNorm):
        return
    if module.running_mean is None:
        raise ValueError("BatchNorm without running statistics cannot be frozen")
    mode = module.training
    swap(module, FrozenAffine if type(module) in _PLAIN else FrozenNorm)
    module.train(mode)


def thaw_norm(module: nn.Module) -> None:
    """Undoes `freeze_norm`; the module is in the mode that was asked for last."""
    module.__dict__.pop("_scale_and_shift", None)
    mode = module.__dict__.pop("_asked_mode")
    restore(module)
    module.train(mode)
