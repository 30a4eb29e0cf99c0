"""Converting a model to singular-value fine-tuning, in place, and back: `convert`, `merge`, `disabled`,
`singular_values`. Knows modules and fusion; no dataset, no method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from svf_fast.contract import check
from svf_fast.frozen_norm import FrozenNorm, freeze_norm, is_batch_norm, thaw_norm
from svf_fast.functional import SAVES
from svf_fast.fuse import FusedForward, fuse_module, unfuse_module
from svf_fast.modules import PARAMETRIZATIONS, SVFConv2d, SVFLinear, SVFModule
from svf_fast.progress import track
from svf_fast.targets import Targets, chosen_modules

_Convertible = nn.Conv2d | nn.Linear


def convert(
    model: nn.Module,
    targets: Targets = None,
    *,
    rank: int | None = None,
    save: str = "exact",
    fuse: bool = True,
    parametrization: str = "direct",
) -> nn.Module:
    """Replaces every Conv2d and Linear within `targets` by its singular-value form, in place, and returns the model.

    The function is unchanged to float32 rounding. Within the targets every parameter but the singular values is frozen and
    BatchNorm runs on its running statistics for good. `merge` undoes it.

    Args:
        model: a bare Conv2d or Linear is converted too; then the new module is returned.
        targets: list of module-name prefixes, a regular expression searched in the names, or a predicate
            (name, module) -> bool; None means all.
        rank: singular values kept per layer and group; None keeps all of them.
        save: what layers keep for backward, "exact" | "int8" | "recompute" (see `functional.svf_conv2d`). With fuse=True,
            "recompute" keeps the first z of a block and the bits of its last ReLU.
        fuse: runs conv → BatchNorm → (+ residual) → ReLU as one op wherever that is provably the same function. A block whose
            children or plain attributes are changed later, or that gets hooks, runs layer by layer again.
        parametrization: "direct" trains s; "scale" trains a factor on s that starts at 1 (SVF paper, S_frozen · S_trainable).

    Raises ValueError or TypeError, before anything is changed, when nothing matches or a layer cannot be converted exactly
    (naming it).
    """
    check(isinstance(model, nn.Module), f"model must be an nn.Module, got {type(model).__name__}", TypeError)
    check(save in SAVES, f"save must be one of {', '.join(SAVES)}, got {save!r}")
    check(
        parametrization in PARAMETRIZATIONS,
        f"parametrization must be one of {', '.join(PARAMETRIZATIONS)}, got {parametrization!r}",
    )
    check(
        rank is None or (isinstance(rank, int) and rank >= 1), f"rank must be None or a positive integer, got {rank!r}"
    )
    chosen = chosen_modules(model, targets)
    converted_before = [n or "the model" for n, m in chosen.items() if isinstance(m, SVFModule)]
    check(not converted_before, f"already converted: {', '.join(converted_before[:5])}; merge the model first")
    layers = {n: m for n, m in chosen.items() if isinstance(m, (nn.Conv2d, nn.Linear))}
    check(layers, f"targets match {len(chosen)} modules of {type(model).__name__} but no Conv2d or Linear among them")
    _refuse_what_cannot_be_exact(model, chosen, layers)

    converted: dict[str, SVFModule] = {}
    for name, layer in track(list(layers.items()), "decomposing"):
        try:
            if isinstance(layer, nn.Conv2d):
                converted[name] = SVFConv2d(layer, rank=rank, save=save, parametrization=parametrization)
            else:
                converted[name] = SVFLinear(layer, rank=rank, save=save, parametrization=parametrization)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name or 'the model'}: {error}") from None
    # from here on nothing can fail
    for name, module in chosen.items():
        _freeze(module)
        if name in converted:
            converted[name].__dict__["_trained_before"] = module.__dict__.pop("_trained_before")
    if "" in converted:
        return converted[""]
    replacements = {id(layers[n]): m for n, m in converted.items()}
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            # not named_children(), which names a module that stands in two places once
            if id(child) in replacements:
                setattr(parent, child_name, replacements[id(child)])
    for module in chosen.values():
        if is_batch_norm(module):
            freeze_norm(module)
    if fuse:
        for module in _fusable_parents(model, list(converted)):
            fuse_module(module)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Back to plain modules and the original state-dict keys with W = U diag(s) Vᵀ, in place; returns the model.

    Parameters that trained before the conversion do so again, BatchNorm is ordinary again. ValueError, before anything is
    changed, when a merged weight is not finite (naming the layer) or when the model holds no converted layer.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SVFModule)}
    check(layers, f"{type(model).__name__} holds no converted layer to merge")
    disabled_now = [n or "the model" for n, layer in layers.items() if layer.is_disabled]
    check(
        not disabled_now,
        "the model is disabled: leave svf_fast.disabled(model) before merging, or its tuning would be lost",
    )
    plain: dict[int, nn.Module] = {}
    for name, layer in track(list(layers.items()), "merging"):
        assert isinstance(layer, (SVFConv2d, SVFLinear))
        merged = layer.merged()
        for key, parameter in merged.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ValueError(
                    f"{name or 'the model'}: the merged {key} holds values that are not finite; nothing was merged"
                )
            parameter.requires_grad_(key in layer.__dict__.get("_trained_before", ("weight", "bias")))
        plain[id(layer)] = merged
    for module in list(model.modules()):
        if isinstance(module, FusedForward):
            unfuse_module(module)
        if isinstance(module, FrozenNorm):
            thaw_norm(module)
        for key in module.__dict__.pop("_trained_before", ()) if id(module) not in plain else ():
            getattr(module, key).requires_grad_(True)
        for child_name, child in list(module._modules.items()):
            if id(child) in plain:
                setattr(module, child_name, plain[id(child)])
    return plain.get(id(model), model)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The pre-trained network again (s = s₀) for the block, without converting back; may be nested."""
    layers = [m for m in model.modules() if isinstance(m, SVFModule)]
    check(layers, f"{type(model).__name__} holds no converted layer to disable")
    before = [layer.is_disabled for layer in layers]
    for layer in layers:
        layer.is_disabled = True
    try:
        yield model
    finally:
        for layer, was_disabled in zip(layers, before, strict=True):
            layer.is_disabled = was_disabled


def singular_values(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable singular values of every converted layer, by module name ("" for a bare converted layer)."""
    return {n: m.s for n, m in model.named_modules() if isinstance(m, SVFModule)}


def _freeze(module: nn.Module) -> None:
    """Freezes a module's own parameters and notes which of them trained, for `merge`."""
    own = [(key, p) for key, p in module.named_parameters(recurse=False)]
    trained = [key for key, p in own if p.requires_grad]
    # a module may be within the targets of two conversions
    module.__dict__["_trained_before"] = tuple({*module.__dict__.get("_trained_before", ()), *trained})
    for _, parameter in own:
        parameter.requires_grad_(False)


def _fusable_parents(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """The modules whose forward calls the converted layers: parents, past containers that have no forward."""
    parents: dict[int, nn.Module] = {}
    for name in names:
        path = name
        while path:
            path = path.rpartition(".")[0]
            parent = model.get_submodule(path)
            if not isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
                parents[id(parent)] = parent
                break
    return list(parents.values())


def _refuse_what_cannot_be_exact(
    model: nn.Module, chosen: dict[str, nn.Module], layers: dict[str, _Convertible]
) -> None:
    """ValueError or TypeError naming the first module that a conversion would change or break."""
    owners: dict[int, str] = {}
    chosen_ids = {id(m) for m in chosen.values()}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and not isinstance(weight, nn.parameter.UninitializedParameter):
            other = owners.setdefault(id(weight), name)
            is_tied = other != name and (id(module) in chosen_ids or other in layers)
            check(
                not is_tied,
                f"{name}: its weight is shared with {other}; one set of singular values cannot stand for both",
            )
        if isinstance(module, nn.MultiheadAttention):
            inside = [n for n in layers if n == name or n.startswith(f"{name}.")]
            check(
                not inside,
                f"{', '.join(inside)}: nn.MultiheadAttention reads this weight directly; leave it out of the targets",
            )
    for name, module in chosen.items():
        label = name or "the model"
        if is_batch_norm(module) and not isinstance(module, FrozenNorm):
            check(
                module.running_mean is not None,
                f"{label}: BatchNorm without running statistics cannot be frozen; leave it out of the targets",
            )
    for name, layer in layers.items():
        label, base = name or "the model", nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
        kind = type(layer)
        check(
            not isinstance(layer.weight, nn.parameter.UninitializedParameter),
            f"{label}: its weight is not initialised yet; run the model once first",
        )
        check(
            not getattr(layer, "parametrizations", None) and "weight" in layer._parameters,
            f"{label}: its weight is computed by a parametrization; remove that first",
        )
        is_own_function = any(
            getattr(kind, f, None) is not getattr(base, f, None) for f in ("forward", "_conv_forward")
        )
        check(
            not is_own_function,
            f"{label}: {kind.__name__} overrides {base.__name__}'s forward and cannot be converted exactly; leave it out of the targets",
            TypeError,
        )
        check(
            "forward" not in layer.__dict__,
            f"{label}: its forward was replaced on the instance; a conversion would lose that",
        )
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        check(
            not any(getattr(layer, h, None) for h in hooks),
            f"{label}: it has hooks, which a conversion would lose; remove them first and register them again afterwards",
        )
