"""Singular values as files: a few KiB that fit one base weight and no other; and reading the released layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from svf_fast.contract import check
from svf_fast.decompose import decompose, recompose
from svf_fast.modules import SVFConv2d, SVFLinear, SVFModule, fingerprint

_FORMAT = "svf_fast singular values, version 1"
_PARTS = ("conv_U.weight", "conv_V.weight", "vector_S", "conv_U.bias")


def save_singular_values(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes every converted layer's singular values, their base values s₀ and the base weight's fingerprint.

    safetensors: `<layer>.s`, `<layer>.s0` [R], `<layer>.base_fingerprint` uint8 [32]. The values are those in force, whatever the
    parametrization. Written to a temporary file and renamed. ValueError when there is nothing to save or a value is not finite.
    """
    from safetensors.torch import save

    layers = _layers(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        s = layer.s if layer.parametrization == "direct" else layer.s0 * layer.s
        check(torch.isfinite(s).all(), f"{name or 'the model'}: its singular values are not finite; nothing was saved")
        for key, value in (("s", s), ("s0", layer.s0), ("base_fingerprint", layer.base_fingerprint)):
            tensors[_key(name, key)] = value.detach().cpu().contiguous().clone()
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} into")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        # save_file would make a file that only its owner reads
        temporary.write_bytes(save(tensors, metadata={"format": _FORMAT}))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load_singular_values(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads what `save_singular_values` wrote into a model converted from the same base weights, in place.

    FileNotFoundError for a missing file. ValueError, before anything is changed and naming every layer concerned, when the file
    is not such a file, or its names, ranks or base weights are not the model's.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file of singular values at {path}")
    layers = _layers(model)
    try:
        with safe_open(path, framework="pt") as file:
            found_format = (file.metadata() or {}).get("format")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None
    check(
        found_format == _FORMAT, f"{path} holds no singular values: expected format {_FORMAT!r}, found {found_format!r}"
    )

    stored = {key.rpartition(".")[0] for key in tensors}
    problems = [f"{n or 'the model'}: not in the file" for n in layers if n not in stored]
    problems += [f"{n or 'the root'}: in the file, not converted in the model" for n in sorted(stored - set(layers))]
    for name, layer in layers.items():
        if name not in stored:
            continue
        missing = [key for key in ("s", "s0", "base_fingerprint") if _key(name, key) not in tensors]
        if missing:
            problems.append(f"{name}: the file lacks {', '.join(missing)}")
            continue
        s, mark = tensors[_key(name, "s")], tensors[_key(name, "base_fingerprint")]
        s0, own_s0 = tensors[_key(name, "s0")].double().cpu(), layer.s0.detach().double().cpu()
        if s.shape != layer.s.shape or s0.shape != layer.s.shape:
            problems.append(f"{name}: rank {s.numel()} in the file, {layer.rank} in the model")
        elif not torch.equal(mark, layer.base_fingerprint.cpu()):
            problems.append(f"{name}: made for other base weights")
        elif not torch.isfinite(s).all():
            problems.append(f"{name}: values that are not finite")
        elif (s0 - own_s0).abs().max() > _s0_tolerance(layer) * own_s0.max():
            problems.append(f"{name}: its base singular values are not those of the model's factors")
        elif layer.parametrization == "scale" and (s[own_s0 == 0] != 0).any():
            problems.append(f"{name}: values on zero singular values, which a scale cannot express")
    check(not problems, f"{path} does not fit the model; nothing was loaded. " + "; ".join(problems))
    with torch.no_grad():
        for name, layer in layers.items():
            _set_singular_values(layer, tensors[_key(name, "s")])


def load_svf_pytorch(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Loads a state dict in the released layout (`X.conv_U.weight`, `X.conv_V.weight`, `X.vector_S` [1, R, 1, 1]) in place.

    For every X: a converted layer takes the factors and singular values as they are (the released code rounds ranks down, so
    the rank may change: then `s` is a new parameter; build the optimiser afterwards); an ordinary Conv2d or Linear takes the
    merged weight. All other entries load under their own names. A `module.` prefix is dropped. s₀ stays the base weight's where
    the factors are its own, else it becomes the loaded S. ValueError, before anything is changed, naming every key that does not fit.
    """
    is_wrapped = all(k.startswith("module.") for k in state_dict) and not hasattr(model, "module")
    entries = {k.removeprefix("module.") if is_wrapped else k: v for k, v in state_dict.items()}
    names = sorted(
        {k[: -len(".vector_S")] for k in entries if k.endswith(".vector_S")}
        | ({""} if "vector_S" in entries else set())
    )
    check(names, "state_dict holds no vector_S entry: not the released SVF layout")
    modules = dict(model.named_modules())
    problems: list[str] = []
    triples: dict[str, tuple[Tensor, Tensor, Tensor, Tensor | None]] = {}
    for name in names:
        u, v, s, bias = (entries.pop(_key(name, part), None) for part in _PARTS)
        module = modules.get(name)
        if u is None or v is None or s is None:
            problems.append(f"{name}: conv_U.weight, conv_V.weight and vector_S must come together")
        elif not isinstance(module, (SVFConv2d, SVFLinear, nn.Conv2d, nn.Linear)):
            problems.append(f"{name}: the model has no convolution or linear layer of that name")
        else:
            triples[name] = (u.flatten(1), s.flatten(), v, bias)
            problems += _misfits(name, module, *triples[name])
    rest = {k: v for k, v in model.state_dict().items() if not any(k.startswith(_key(n, "")) for n in names)}
    problems += [f"{k}: missing" for k in rest if k not in entries]
    problems += [f"{k}: not in the model" for k in entries if k not in rest]
    problems += [
        f"{k}: shape {list(entries[k].shape)}, the model has {list(v.shape)}"
        for k, v in rest.items()
        if k in entries and entries[k].shape != v.shape
    ]
    shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
    check(not problems, f"state_dict does not fit the model; nothing was loaded. {shown}")
    model.load_state_dict(entries, strict=False)
    with torch.no_grad():
        for name, (u, s, v, bias) in triples.items():
            module = modules[name]
            if isinstance(module, SVFModule):
                _set_factors(module, u, s, v)
            else:
                module.weight.copy_(recompose(u.double(), s.double(), v.double()).view_as(module.weight))
            if bias is not None and module.bias is not None:
                module.bias.copy_(bias)


def _s0_tolerance(layer: SVFModule) -> float:
    """How far two decompositions of one weight may be apart, relative to the largest singular value."""
    return 16 * torch.finfo(layer.s0.dtype).eps


def _layers(model: nn.Module) -> dict[str, SVFModule]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SVFModule)}
    check(layers, f"{type(model).__name__} holds no converted layer; convert it first")
    return layers


def _key(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _misfits(name: str, module: nn.Module, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> list[str]:
    if isinstance(module, (SVFConv2d, nn.Conv2d)):
        shape = [module.out_channels, module.in_channels // module.groups, *module.kernel_size]
    else:
        assert isinstance(module, (SVFLinear, nn.Linear))
        shape = [module.out_features, module.in_features]
    is_consistent = u.shape == (shape[0], len(s)) and list(v.shape[: len(shape)]) == [len(s), *shape[1:]]
    if not is_consistent or getattr(module, "groups", 1) != 1:
        return [
            f"{name}: U {list(u.shape)}, S {list(s.shape)}, V {list(v.shape)} do not make a weight {shape} without groups"
        ]
    if not all(torch.isfinite(t).all() for t in (u, s, v)):
        return [f"{name}: values that are not finite"]
    if (bias is None) != (module.bias is None):
        return [f"{name}: conv_U.bias is {'missing' if bias is None else 'superfluous'}"]
    return []


def _set_factors(layer: SVFModule, u: Tensor, s: Tensor, v: Tensor) -> None:
    base = recompose(layer.u.double(), layer.s0.double(), layer.v.double())
    u64, v64 = u.to(base), v.to(base).view(len(s), *base.shape[1:])
    # the base weight seen through the file's factors: its singular values, if they are its factors
    s0 = torch.einsum("or,oi,ri->r", u64, base.flatten(1), v64.flatten(1))
    left_out = (base - recompose(u64, s0, v64)).norm()
    best = decompose(base, rank=len(s))
    is_same_base = left_out <= (base - recompose(best.u, best.s, best.v)).norm() + 1e-5 * base.norm()
    if not is_same_base:
        s0 = s.to(base)
    if not is_same_base or (s0 - best.s).abs().max() > 1e-5 * best.s.max():
        # files of values fit factors in this order only
        layer.base_fingerprint.copy_(fingerprint(torch.cat([u64.flatten(), v64.flatten()])))
    like = layer.u
    if len(s) == layer.rank:
        layer.u.copy_(u)
        layer.v.copy_(v64)
        layer.s0.copy_(s0)
    else:
        layer.u = nn.Parameter(u.to(like), requires_grad=False)
        layer.v = nn.Parameter(v64.to(like), requires_grad=False)
        layer.s0 = s0.to(like)
        layer.s = nn.Parameter(torch.ones_like(layer.s0), requires_grad=layer.s.requires_grad)
    _set_singular_values(layer, s)


def _set_singular_values(layer: SVFModule, s: Tensor) -> None:
    """Makes `s` [R] the values in force; a factor on a zero base value has no effect and stays 1."""
    s = s.to(layer.s)
    if layer.parametrization == "scale":
        s = torch.where(layer.s0 == 0, torch.ones_like(s), s / layer.s0)
    layer.s.copy_(s)
