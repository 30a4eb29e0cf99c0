"""SVFConv2d and SVFLinear: drop-in modules around the functional layer. They know tensors and the fused op, not the
model that they stand in."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svf_fast import backends
from svf_fast.backends.packed import recheck
from svf_fast.contract import Geometry, check, memory_format_of
from svf_fast.decompose import decompose, recompose
from svf_fast.frozen_norm import FrozenAffine, Snapshot
from svf_fast.functional import ACTIVATIONS, SAVES, autocast_dtype, fused_conv2d, svf_linear

PARAMETRIZATIONS = ("direct", "scale")


def fingerprint(weight: Tensor) -> Tensor:
    """SHA-256 of a base weight's float32 values and shape, uint8 [32]: tells whether singular values fit a weight."""
    if weight.is_meta:
        return torch.empty(32, dtype=torch.uint8, device=weight.device)
    values = weight.detach().to("cpu", torch.float32)
    digest = hashlib.sha256(repr(list(values.shape)).encode())
    digest.update(values.numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8, device=weight.device)


class _Merged(NamedTuple):
    """A merged weight, and what it was merged from."""

    state: Snapshot
    affine: tuple[Tensor, Tensor] | None
    weight: Tensor
    bias: Tensor | None


class SVFModule(nn.Module):
    """What the convolution and the linear layer share: factors, singular values, and the merged weight.

    Parameters: `s` [R] trainable (with parametrization="scale" a factor on the frozen values that starts at 1), `u` and
    `v` frozen (parameters rather than buffers: DDP broadcasts buffers at every forward), `bias` frozen.
    Buffers: `s0` [R] the singular values of the base weight, `base_fingerprint` uint8 [32].
    """

    s0: Tensor
    base_fingerprint: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        groups: int,
        rank: int | None,
        save: str,
        parametrization: str,
    ) -> None:
        super().__init__()
        check(save in SAVES, f"save must be one of {', '.join(SAVES)}, got {save!r}")
        check(
            parametrization in PARAMETRIZATIONS,
            f"parametrization must be one of {', '.join(PARAMETRIZATIONS)}, got {parametrization!r}",
        )
        u, s, v = decompose(weight, groups=groups, rank=rank)
        self.save, self.parametrization = save, parametrization
        self.s = nn.Parameter((s if parametrization == "direct" else torch.ones_like(s)).to(weight, copy=True))
        self.u = nn.Parameter(u.to(weight), requires_grad=False)
        layout = memory_format_of(weight) if weight.ndim == 4 else torch.contiguous_format
        self.v = nn.Parameter(v.to(weight).contiguous(memory_format=layout), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_buffer("s0", s.to(weight, copy=True))
        self.register_buffer("base_fingerprint", fingerprint(weight))
        # the pre-trained network again, while svf_fast.disabled(model) says so
        self.is_disabled = False
        # what `convert` found about this layer, for svf_fast.summary
        self.fusion_note = ""

    @property
    def rank(self) -> int:
        """Number of singular values, over all groups."""
        return self.s.shape[0]

    def singular_values(self) -> Tensor:
        """[R] singular values in force: `s`, `s0 · s`, or `s0` while disabled."""
        if self.is_disabled:
            return self.s0
        return self.s if self.parametrization == "direct" else self.s0 * self.s

    def checked_singular_values(self) -> Tensor:
        """`singular_values()`; ValueError or TypeError where s or v no longer fits u."""
        s, u, v = self.singular_values(), self.u, self.v
        if s.shape != (v.shape[0],) or s.device != u.device or v.device != u.device:
            raise ValueError(
                f"s must be [{v.shape[0]}] on {u.device} like u, got {list(s.shape)} on {s.device}; v is on {v.device}"
            )
        if s.dtype not in (u.dtype, torch.float32) or v.dtype != u.dtype:
            raise TypeError(f"s and v must be {u.dtype} like u (s may be float32), got {s.dtype} and {v.dtype}")
        return s

    @property
    def weight(self) -> Tensor:
        """The merged weight, differentiable in `s`: for code that reads a layer's weight instead of calling it."""
        return recompose(self.u, self.singular_values(), self.v)

    def merged_weight(self) -> Tensor:
        """U diag(s) Vᵀ in the base weight's shape, dtype and memory format, computed in float64."""
        layout = memory_format_of(self.v) if self.v.ndim == 4 else torch.contiguous_format
        with torch.no_grad():
            return self._merge_now(self.u.dtype, layout, None)[0]

    def check_kind(self, x: Tensor) -> None:
        """TypeError unless x has the layer's dtype or autocast will give it one; ValueError unless it is on its device."""
        check(isinstance(x, Tensor), f"x must be a tensor, got {type(x).__name__}", TypeError)
        if x.dtype != self.u.dtype and not (x.is_floating_point() and autocast_dtype(x) is not None):
            raise TypeError(f"x must be {self.u.dtype} like the layer's factors, got {x.dtype}")
        if x.device != self.u.device:
            raise ValueError(f"x is on {x.device}, the layer's factors on {self.u.device}")

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_merged_cache", None)
        return state

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop("_merged_cache", None)
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> SVFModule:
        # writes through `.data` leave no trace in version counters: a change of mode is where they happen
        self.__dict__.pop("_merged_cache", None)
        recheck()
        return super().train(mode)

    def _merged(
        self, dtype: torch.dtype, layout: torch.memory_format, norm: FrozenAffine | None
    ) -> tuple[Tensor, Tensor | None]:
        """Merged weight and bias of `dtype`, the affine folded in; kept until a source changes."""
        sources = [self.s, self.s0, self.u, self.v, *([] if self.bias is None else [self.bias])]
        affine = None if norm is None else norm.scale_and_shift()
        state = Snapshot.of(sources, [self.s], dtype, layout, self.is_disabled, self.parametrization)
        if state is None:
            return self._merge_now(dtype, layout, affine)
        kept = self.__dict__.get("_merged_cache")
        # the norm gives the same tuple as long as nothing in it has changed
        if kept is None or kept.affine is not affine or not kept.state.still_holds(state):
            with torch.inference_mode(False), torch.no_grad():
                kept = _Merged(state.with_copies(), affine, *self._merge_now(dtype, layout, affine))
            if type(kept.weight) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(kept.weight):
                # a tracer's or a transform's stand-in must not outlive it
                return kept.weight, kept.bias
            # a parameter: what a backend derives from it may be kept as long as it lives
            kept = kept._replace(weight=nn.Parameter(kept.weight, requires_grad=False))
            self.__dict__["_merged_cache"] = kept
        return kept.weight, kept.bias

    def _merge_now(
        self, dtype: torch.dtype, layout: torch.memory_format, affine: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """What `_merged` keeps, computed in float64."""
        weight = recompose(self.u.double(), self.singular_values().double(), self.v.double())
        bias = None if self.bias is None else self.bias.double()
        if affine is not None:
            scale, shift = (t.double() for t in affine)
            weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
            bias = shift if bias is None else bias * scale + shift
        weight = weight.to(dtype)
        if weight.ndim == 4:
            weight = weight.contiguous(memory_format=layout)
        return weight, None if bias is None else bias.to(dtype)


class SVFConv2d(SVFModule):
    """A Conv2d whose singular values are trained: y = u·(s ⊙ conv2d(x, v)) + bias (SVF paper, Algorithm 1), as one op.

    Without a graph to build (`torch.no_grad()`, or nothing requires a gradient) one ordinary convolution runs with the
    merged weight. See `functional.svf_conv2d` for `save`.
    """

    def __init__(
        self, conv: nn.Conv2d, *, rank: int | None = None, save: str = "exact", parametrization: str = "direct"
    ) -> None:
        super().__init__(
            conv.weight, conv.bias, groups=conv.groups, rank=rank, save=save, parametrization=parametrization
        )
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode, self.groups = conv.padding, conv.padding_mode, conv.groups
        self.train(conv.training)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, *, rank: int | None = None, save: str = "exact", parametrization: str = "direct"
    ) -> SVFConv2d:
        """Decomposes `conv`; the function is unchanged. `rank` None is full rank, exactly; per group for groups > 1.

        ValueError for an empty or non-finite weight or a rank that does not fit, TypeError for anything but a Conv2d.
        """
        check(isinstance(conv, nn.Conv2d), f"conv must be an nn.Conv2d, got {type(conv).__name__}", TypeError)
        return cls(conv, rank=rank, save=save, parametrization=parametrization)

    def merged(self) -> nn.Conv2d:
        """An ordinary convolution with W = U diag(s) Vᵀ, on the same device and with the same training mode."""
        conv = nn.utils.skip_init(
            nn.Conv2d, self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, self.padding_mode, device=self.u.device, dtype=self.u.dtype,
        )  # fmt: skip
        conv.weight = nn.Parameter(self.merged_weight())
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone())
        return conv.train(self.training)

    def plan(self) -> tuple[Geometry, tuple[int, int, int, int]]:
        """What the op convolves with, and the padding left, right, top and bottom that is done before it (reflect, replicate,
        circular, or unequal sides). Read afresh at each call: stride, padding and dilation, pairs, may be changed."""
        (stride_h, stride_w), (dilation_h, dilation_w) = self.stride, self.dilation
        if not isinstance(self.padding, str):
            top, left = self.padding
            bottom, right = top, left
        elif self.padding == "same":
            height, width = dilation_h * (self.kernel_size[0] - 1), dilation_w * (self.kernel_size[1] - 1)
            top, left = height // 2, width // 2
            bottom, right = height - top, width - left
        else:
            top = bottom = left = right = 0
        sides, padding = (0, 0, 0, 0), (top, left)
        if top != bottom or left != right or (self.padding_mode != "zeros" and (top or left)):
            sides, padding = (left, right, top, bottom), (0, 0)
        return Geometry((stride_h, stride_w), padding, (dilation_h, dilation_w), self.groups), sides

    def pad(self, x: Tensor, sides: tuple[int, int, int, int]) -> Tensor:
        """x with the padding that the op itself does not do, the second of `plan`."""
        if not any(sides):
            return x
        return F.pad(x, sides, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def check_input(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the output; TypeError or ValueError unless x is a batch that the layer takes."""
        self.check_kind(x)
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be [N, {self.in_channels}, H, W], got shape {list(x.shape)}")
        geometry, (left, right, top, bottom) = self.plan()
        height, width = x.shape[2:]
        size = geometry.output_size((height + top + bottom, width + left + right), self.kernel_size)
        if min(size) < 1:
            raise ValueError(
                f"x of height and width {[height, width]} is smaller than the kernel with this padding and dilation"
            )
        return size

    def forward(
        self,
        x: Tensor,
        *,
        norm: FrozenAffine | None = None,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """x [N, Ci, H, W] → act(norm(conv(x)) + residual) [N, Co, Ho, Wo]."""
        check(activation in ACTIVATIONS, f"activation must be None or 'relu', got {activation!r}")
        if isinstance(x, Tensor) and x.ndim == 3 and norm is None:
            # Conv2d takes unbatched pictures too, BatchNorm2d does not
            return self.forward(
                x.unsqueeze(0), residual=None if residual is None else residual.unsqueeze(0), activation=activation
            ).squeeze(0)  # fmt: skip
        size = self.check_input(x)
        if norm is not None and norm.num_features != self.out_channels:
            raise ValueError(f"norm must have {self.out_channels} channels like the output, got {norm.num_features}")
        autocast = autocast_dtype(x)
        dtype = x.dtype if autocast is None else autocast
        if residual is not None and not self.takes_residual(residual, (x.shape[0], self.out_channels, *size), dtype):
            return _activate(self.forward(x, norm=norm) + residual, activation)
        geometry, sides = self.plan()
        x = self.pad(x, sides)
        if not self.needs_graph(x, residual, norm) and not torch.compiler.is_compiling():
            return self._plain(x, norm, residual, activation, geometry, dtype)
        if autocast is not None:
            x = x.to(autocast)
        scale, shift = (None, None) if norm is None else norm.scale_and_shift()
        return fused_conv2d(
            x, self.v, self.checked_singular_values(), self.u, bias=self.bias, scale=scale, shift=shift,
            residual=residual, activation=activation, geometry=geometry, save=self.save,
        )  # fmt: skip

    def needs_graph(self, x: Tensor, residual: Tensor | None, norm: FrozenAffine | None) -> bool:
        """Whether anything that this call computes may need a gradient."""
        if not torch.is_grad_enabled():
            return False
        inputs = [x, residual, self.s, self.u, self.v, self.bias, *(() if norm is None else (norm.weight, norm.bias))]
        return any(t is not None and t.requires_grad for t in inputs)

    def takes_residual(self, residual: Any, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether the op may add `residual` to an output of that shape and dtype: no broadcast and no promotion."""
        return (
            isinstance(residual, Tensor)
            and residual.shape == shape
            and residual.dtype == dtype
            and residual.device == self.u.device
        )

    def _plain(
        self, x: Tensor, norm: FrozenAffine | None, residual: Tensor | None, activation: str | None, geometry: Geometry,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        layout = memory_format_of(x)
        weight, bias = self._merged(dtype, layout, norm)
        return backends.select(x.device).convolve(
            x.to(dtype), weight, bias, geometry, residual, activation == "relu", layout
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", rank={self.rank}, save={self.save!r}"
        return text + "".join(
            f", {name}={value!r}"
            for name, value, usual in (
                ("padding", self.padding, (0, 0)), ("dilation", self.dilation, (1, 1)), ("groups", self.groups, 1),
                ("padding_mode", self.padding_mode, "zeros"), ("parametrization", self.parametrization, "direct"),
            )
            if value != usual
        )  # fmt: skip


class SVFLinear(SVFModule):
    """A Linear whose singular values are trained: y = u·(s ⊙ (v·x)) + bias, as one op."""

    def __init__(
        self, linear: nn.Linear, *, rank: int | None = None, save: str = "exact", parametrization: str = "direct"
    ) -> None:
        super().__init__(linear.weight, linear.bias, groups=1, rank=rank, save=save, parametrization=parametrization)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.train(linear.training)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, rank: int | None = None, save: str = "exact", parametrization: str = "direct"
    ) -> SVFLinear:
        """Decomposes `linear`; the function is unchanged. Errors as `SVFConv2d.from_conv`."""
        check(isinstance(linear, nn.Linear), f"linear must be an nn.Linear, got {type(linear).__name__}", TypeError)
        return cls(linear, rank=rank, save=save, parametrization=parametrization)

    def merged(self) -> nn.Linear:
        """An ordinary linear layer with W = U diag(s) Vᵀ."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=self.u.device, dtype=self.u.dtype
        )
        linear.weight = nn.Parameter(self.merged_weight())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., In] → [..., Out]."""
        self.check_kind(x)
        check(
            x.ndim >= 1 and x.shape[-1] == self.in_features,
            f"x must be [..., {self.in_features}], got shape {list(x.shape)}",
        )
        needs_graph = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, self.s, self.u, self.v, self.bias)
        )
        if not needs_graph and not torch.compiler.is_compiling():
            return F.linear(x, *self._merged(autocast_dtype(x) or x.dtype, torch.contiguous_format, None))
        return svf_linear(x, self.v, self.singular_values(), self.u, bias=self.bias, save=self.save)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, save={self.save!r}"


def _activate(y: Tensor, activation: str | None) -> Tensor:
    return torch.relu(y) if activation == "relu" else y
