"""BatchNorm that runs on its running statistics for good: an affine that keeps nothing for backward, ready to be folded
into the convolution before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svf_fast.contract import check
from svf_fast.swap import Swapped, restore, swap

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_PLAIN = {Tensor, nn.Parameter}


class Snapshot(NamedTuple):
    """The state of tensors that something was computed from: tells later whether it still holds."""

    # the tensors themselves, so that no other can take their place in memory
    sources: tuple[Tensor, ...]
    state: tuple
    # short vectors whose values are compared as well: writes through `.data` leave no trace in version counters
    vectors: tuple[Tensor, ...]

    @classmethod
    def of(cls, sources: Sequence[Tensor], vectors: Sequence[Tensor], *more: Any) -> Snapshot | None:
        """None where nothing is to be kept: inference tensors count no versions, vmap's have no storage."""
        # lists, not generators: this runs for every layer of every step
        if True in [t.is_inference() for t in sources]:
            return None
        try:
            state = (*more, *[(t._version, t.data_ptr(), t.dtype, t.device) for t in sources])
        except RuntimeError:
            return None
        return cls(tuple(sources), state, tuple(vectors))

    def with_copies(self) -> Snapshot:
        """The same, the vectors copied, to be compared with later states."""
        return self._replace(vectors=tuple(t.detach().clone() for t in self.vectors))

    def still_holds(self, now: Snapshot) -> bool:
        """Whether `now` is the same state.

        On an accelerator comparing values would synchronise: there writes through `.data` are noticed at the next `train()`
        or `eval()`.
        """
        if [*map(id, self.sources)] != [*map(id, now.sources)] or self.state != now.state:
            return False
        if not _PLAIN.issuperset(map(type, now.vectors)):
            return False
        if now.vectors[0].device.type != "cpu":
            return True
        try:
            return all(torch.equal(a, b) for a, b in zip(self.vectors, now.vectors, strict=True))
        except RuntimeError:
            # a tracer's mode has no values to compare
            return False


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
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in sources)):
            return self._compute()
        state = Snapshot.of(sources, sources, self.eps)
        if state is None:
            return self._compute()
        kept = self.__dict__.get("_scale_and_shift")
        if kept is None or not kept[0].still_holds(state):
            with torch.inference_mode(False), torch.no_grad():
                kept = (state.with_copies(), self._compute())
            if type(kept[1][0]) is not Tensor:
                # a tracer's stand-in must not outlive the trace
                return kept[1]
            self.__dict__["_scale_and_shift"] = kept
        return kept[1]

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
        scale, shift = (t.view(channels) for t in self.scale_and_shift())
        # in the statistics' width: rounded to half precision, shift = β − μ · scale would cancel badly
        return torch.addcmul(shift, x, scale).to(x.dtype)


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
    swap(module, FrozenAffine if type(module) in _NORMS else FrozenNorm)
    module.train(mode)


def thaw_norm(module: nn.Module) -> None:
    """Undoes `freeze_norm`; the module is in the mode that was asked for last."""
    module.__dict__.pop("_scale_and_shift", None)
    mode = module.__dict__.pop("_asked_mode")
    restore(module)
    module.train(mode)
