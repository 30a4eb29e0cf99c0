"""Pre-trained weights into a backbone: which published layouts are understood, and how their keys map. Strict: every
backbone entry must be there, nothing may be left over, and only classifiers (and stages that the backbone does not
have) are passed by. Knows no method."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from svf_fast.train.backbones.base import STAGES

# never part of a backbone: the ImageNet heads of ResNet and VGG files
CLASSIFIER_PREFIXES = ("fc.", "classifier.")
# nor these parts of few-shot checkpoints, in which a backbone stands under its own keys (PFENet, BAM, its base learner, the
# SVF paper's baseline)
FEW_SHOT_PREFIXES = (
    "down_query.", "down_supp.", "init_merge.", "alpha_conv.", "beta_conv.", "inner_cls.", "res1.", "res2.", "cls.",
    "ASPP_meta.", "res1_meta.", "res2_meta.", "cls_meta.", "learner_base.", "gram_merge.", "cls_merge.", "kshot_rw.",
    "ppm.", "encoder.",
)  # fmt: skip
DATA_PARALLEL_PREFIX = "module."

PLAIN_STEM = {"conv1": "layer0.0", "bn1": "layer0.1"}
DEEP_STEM = {
    "conv1": "layer0.0",
    "bn1": "layer0.1",
    "conv2": "layer0.3",
    "bn2": "layer0.4",
    "conv3": "layer0.6",
    "bn3": "layer0.7",
}
# index in torchvision's `features` of each stage's first module; 43 would be the last pool
VGG_STAGE_STARTS = (0, 7, 14, 24, 34, 43)


def load_backbone_weights(backbone: nn.Module, path: str | Path) -> None:
    """Fill ``backbone`` from a file: torchvision's ResNet or VGG-16-bn, the deep-stem ResNet of PFENet and BAM, a
    whole few-shot checkpoint of theirs, or this project's own layout; ``.safetensors`` or PyTorch's format.

    Raises FileNotFoundError, or ValueError when the file cannot be read, or when keys or shapes are not exactly those
    of the backbone; the backbone is then unchanged.
    """
    state, name = state_of(path)
    passed_by = CLASSIFIER_PREFIXES + (FEW_SHOT_PREFIXES if _has_own_layout(state) else ())
    state = {key: tensor for key, tensor in state.items() if not key.startswith(passed_by)}
    load_backbone_state(backbone, state, source=name)


def load_backbone_state(
    backbone: nn.Module, state: Mapping[str, Tensor], *, source: str, owner: str = "backbone"
) -> None:
    """As :func:`load_backbone_weights`, for a state dict that ``source`` names in errors, and for any module with a
    backbone's stages, which ``owner`` names."""
    mapped = backbone_keys(state)
    own = backbone.state_dict()
    absent_stages = tuple(f"{stage}." for stage in STAGES if not hasattr(backbone, stage))
    superfluous = [key for key in mapped if key not in own and not key.startswith(absent_stages)]
    # files older than PyTorch 0.4.1 have no num_batches_tracked, and a BatchNorm on running statistics never reads it
    missing = [key for key in own if key not in mapped and not key.endswith(".num_batches_tracked")]
    misshapen = [
        f"{key} {list(mapped[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in mapped and mapped[key].shape != own[key].shape
    ]
    problems = [
        f"{what}: {_some(keys)}"
        for what, keys in (
            ("missing", missing),
            ("superfluous", superfluous),
            ("of another shape", misshapen),
            ("of another kind", [key for key in own if key in mapped and _kind(mapped[key]) != _kind(own[key])]),
        )
        if keys
    ]
    if problems:
        raise ValueError(f"weights in {source} do not fit the {owner}; {'; '.join(problems)}")
    with torch.no_grad():
        for key, tensor in own.items():
            if key in mapped:
                tensor.copy_(mapped[key])


def backbone_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under this project's keys (``layer0.0.weight`` …). Unknown keys stay as they are."""
    state = plain_keys(state)
    rename = _renaming(state)
    return {rename(key): tensor for key, tensor in state.items()}


def plain_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without the prefix of keys that were written under DataParallel or DDP. ValueError where a key stands
    there with and without it."""
    plain = {key.removeprefix(DATA_PARALLEL_PREFIX): tensor for key, tensor in state.items()}
    if len(plain) < len(state):
        twice = [key for key in state if DATA_PARALLEL_PREFIX + key in state]
        raise ValueError(f"a state dict has keys with and without {DATA_PARALLEL_PREFIX!r}: {_some(twice)}")
    return plain


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file; a file that wraps them in ``{"state_dict": …}`` is opened up."""
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except (
        SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, OSError
    ) as error:  # fmt: skip
        # PyTorch's own text advises to load the file without protection: not to be passed on
        raise ValueError(
            f"{path} is not a complete PyTorch or safetensors file of tensors: it is cut short, or holds other objects"
        ) from error
    return _unwrapped(content, str(path))


def state_of(source: Mapping[str, Any] | str | Path) -> tuple[dict[str, Tensor], str]:
    """A state dict given as it is or as a file, wrapped in ``{"state_dict": …}`` or not, without prefixes, and what to
    call it in errors."""
    if isinstance(source, Mapping):
        name = "the state dict"
        return plain_keys(_unwrapped(source, name)), name
    return plain_keys(read_state(Path(source))), str(source)


def require_finite(state: Mapping[str, Tensor], name: str) -> None:
    """ValueError naming what of ``state`` is not a number or infinite."""
    broken = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"{name} holds values that are not finite: {_some(broken)}")


def _unwrapped(content: Any, name: str) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if isinstance(content, Mapping) and isinstance(content.get("method"), Mapping) and "config" in content:
        raise ValueError(
            f"{name} is a checkpoint of svf-fast, not a weight file: a base learner's goes into method.base_learner, with "
            "method.backbone_init=base_learner for its backbone alone"
        )
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ValueError(f"{name} holds no state dict of named tensors")
    require_finite(content, name)
    return dict(content)


def _renaming(state: Mapping[str, Tensor]) -> Callable[[str], str]:
    """The key map of the layout that ``state`` is in, told by the keys that only this layout has."""
    if _has_own_layout(state):
        return lambda key: key
    if any(key.startswith("features.") for key in state):
        return _vgg_key
    stem = DEEP_STEM if "conv3.weight" in state else PLAIN_STEM

    def resnet_key(key: str) -> str:
        module, _, entry = key.partition(".")
        return f"{stem[module]}.{entry}" if module in stem else key

    return resnet_key


def _has_own_layout(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("layer0.") for key in state)


def _vgg_key(key: str) -> str:
    parts = key.split(".", 2)
    if parts[0] != "features" or len(parts) < 3 or not parts[1].isdecimal():
        return key
    index = int(parts[1])
    for stage, start, end in zip(STAGES, VGG_STAGE_STARTS, VGG_STAGE_STARTS[1:], strict=False):
        if start <= index < end:
            return f"{stage}.{index - start}.{parts[2]}"
    return key


def _kind(tensor: Tensor) -> str:
    return "floating point" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integers"


def _some(keys: list[str], shown: int = 4) -> str:
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + more
