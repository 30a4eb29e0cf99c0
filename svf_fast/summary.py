"""`summary`: what trains, what fused, what did not and why, and the bytes that a picture keeps for backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from svf_fast.frozen_norm import FrozenNorm
from svf_fast.memory import kept_bytes
from svf_fast.modules import SVFConv2d, SVFModule


def summary(model: nn.Module, input_shape: Sequence[int] = (1, 3, 224, 224)) -> str:
    """A few lines for people about a converted model.

    Trainable and total parameters, every converted layer with its rank and what became of it in fusion, and the bytes that one
    picture of `input_shape` [1, C, H, W] keeps for backward, counted on fake tensors: nothing is computed or allocated.
    """
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SVFModule)}
    values = sum(m.s.numel() for m in layers.values() if m.s.requires_grad)
    norms = sum(isinstance(m, FrozenNorm) for m in model.modules())
    lines = [
        f"{type(model).__name__}: {trainable:,} of {total:,} parameters train "
        f"({100 * trainable / max(total, 1):.3f} %), {values:,} of them singular values in {len(layers)} layers",
        *([f"BatchNorm on running statistics for good: {norms}"] if norms else []),
        f"kept for backward, one picture {'×'.join(str(n) for n in input_shape[1:])}: {_kept(model, input_shape)}",
    ]
    width = max((len(n) for n in layers), default=0)
    for name, layer in layers.items():
        note = layer.fusion_note or ("not fused" if isinstance(layer, SVFConv2d) else "linear")
        if layer.u.requires_grad or layer.v.requires_grad:
            note = "plain composition: U or V trains"
        lines.append(f"  {name or '(root)':<{width}}  rank {layer.rank:>5}  {layer.save:<9}  {note}")
    return "\n".join(lines)


def _kept(model: nn.Module, input_shape: Sequence[int]) -> str:
    from torch._subclasses.fake_tensor import FakeTensorMode

    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.enable_grad():
            real = [*model.parameters(), *model.buffers()]
            # an op sees the parameter itself or its fake, depending on where it saves
            owned = [*real, *(mode.from_tensor(t) for t in real)]
            picture = torch.empty(*input_shape, dtype=dtype, device=device)
            kept = kept_bytes(lambda: model(picture), owned=[*owned, picture])
    except Exception as error:  # any model may be summarised, also one whose forward takes something else
        return f"not counted, the forward failed on such an input ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
    return f"{kept / 2**20:.1f} MiB"
