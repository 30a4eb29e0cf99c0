"""What a run will cost before it starts: GPU memory and GPU hours, from its configuration alone, on the meta device: nothing is
allocated, computed or opened. Knows no run folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from svf_fast.train.assembly import build_base_learner, build_model
from svf_fast.train.config import (
    BaseConfig,
    Config,
    RunConfig,
    ScheduleConfig,
    StageConfig,
    ValidationConfig,
)
from svf_fast.train.data.folds import FOLD_RULES
from svf_fast.train.methods import Losses
from svf_fast.train.precision import Precision
from svf_fast.train.prepare.expected import COCO, PASCAL
from svf_fast.train.reproduce.live_bytes import LiveBytes

Shape = Sequence[int]

# Sustained products a second on an H200. Measured there: a training step of ResNet-50's layers 2-4, 473×473, batch 8, singular values
# tuned, as a CUDA graph, 19.0 ms in TF32 and 10.1 ms in bf16 (bench/results/device_suite_h200.json). It is 3.28 TFLOP in Algorithm 1's
# two products a convolution.
_STEP_TFLOP = 3.28
RATES: dict[Precision, float] = {
    "float32": _STEP_TFLOP * 1e12 / 0.0190,
    "bf16": _STEP_TFLOP * 1e12 / 0.0101,
    "fp16": _STEP_TFLOP * 1e12 / 0.0101,
}
ALLOWANCE_BYTES = 1_500_000_000  # CUDA's context, workspaces of convolutions, what the allocator cannot use
BASIS = (
    "GPU hours are a lower bound for one H200: FLOPs over the rate at which it took a training step of layers 2-4 (float32 as TF32 "
    f"{RATES['float32'] / 1e12:.0f}, bf16 and fp16 {RATES['bf16'] / 1e12:.0f} TFLOP/s, launched as one CUDA graph); validations included, "
    "loading, writing and launches left out, early stopping not reckoned with. GPU memory is in float32: the most that "
    f"tensors of a step take at one time, parameters and their momentum, and {ALLOWANCE_BYTES / 1e9:.1f} GB for all else."
)


@dataclass(frozen=True)
class Cost:
    """``steps`` and ``gpu_hours`` are None where nobody knows how many pictures an epoch has."""

    steps: int | None
    gpu_hours: float | None
    memory_bytes: int


class _Episodes(NamedTuple):
    """A training batch of episodes, on the meta device."""

    query_images: Tensor
    query_labels: Tensor
    support_images: Tensor
    support_labels: Tensor
    base_labels: Tensor
    categories: Tensor


class _Measured(NamedTuple):
    """FLOPs of a training step and of one sample's forward, bytes of a step."""

    step_flops: int
    sample_flops: int
    memory_bytes: int


def cost(config: Config | BaseConfig) -> Cost:
    """What a run of ``config`` costs. ValueError, a sentence, where its tuning strategy does not fit its backbone."""
    measured = _measure(_structure(config))
    steps = training_steps(config)
    if steps is None:
        return Cost(None, None, measured.memory_bytes)
    flops = steps * measured.step_flops + _validations(config, steps) * _judged(config) * measured.sample_flops
    return Cost(steps, flops / RATES[config.run.precision] / 3600, measured.memory_bytes)


def training_steps(config: StageConfig) -> int | None:
    """Steps of a run that is not stopped early; None where its epochs' length is not known."""
    if config.schedule.iterations is not None:
        return config.schedule.iterations
    pictures = training_pictures(config)
    return None if pictures is None else (config.schedule.epochs or 0) * (pictures // config.data.batch)


def training_pictures(config: StageConfig) -> int | None:
    """Pictures of an epoch: the field's own count on Pascal; on COCO reckoned from the shares of its validation pictures that show a
    novel class; of another list its lines."""
    data = config.data
    if data.train_list != "lists/train.txt":
        return _lines(config, data.train_list)
    drops = data.drop_novel_images if isinstance(config, Config) else data.base_filter
    if data.folds == "pascal":
        everything, fold = PASCAL.list_lengths["train"], PASCAL.folds["pascal"][data.fold]
        if isinstance(config, BaseConfig):
            return fold["train_trick"].pictures if drops else everything
        return fold["train_trick" if drops else "train"].pictures
    if data.folds == "coco":
        shown = COCO.folds["coco"][data.fold]["val"].pictures / COCO.list_lengths["val"]
        return round(COCO.list_lengths["train"] * (1 - shown)) if drops else COCO.list_lengths["train"]
    return None


def _lines(config: StageConfig, list_file: str) -> int | None:
    """Of a list of the run's fold; None where it is not here."""
    path = Path(config.data.root or "") / list_file.replace("{fold}", str(config.data.fold))
    return len(path.read_text(encoding="utf-8").splitlines()) if config.data.root and path.is_file() else None


def _validations(config: StageConfig, steps: int) -> int:
    rule = config.validation
    if rule.every_iterations is not None:
        return -(-steps // rule.every_iterations)
    return round((config.schedule.epochs or 1) / (rule.every_epochs or 1.0))


def _judged(config: Config | BaseConfig) -> int:
    """Samples of one validation."""
    if isinstance(config, Config):
        return config.validation.episodes + config.validation.training_episodes
    field = COCO if config.data.folds.startswith("coco") else PASCAL
    return _lines(config, config.data.val_list) or field.list_lengths["val"]


def _structure(config: Config | BaseConfig) -> Config | BaseConfig:
    """The configuration with all that does not change a step's cost at its default, so that equal steps are measured once."""
    data = replace(config.data, train_list="", val_list="", scale_range=(1.0, 1.0), workers=0, cache_mb=0)
    if data.folds in FOLD_RULES:
        data = replace(data, root=None, fold=0)
    common = {
        "data": replace(data, batch=data.batch // config.run.accumulate),
        "backbone": replace(config.backbone, weights=None),
        "schedule": ScheduleConfig(iterations=1),
        "run": RunConfig(),
    }
    if isinstance(config, Config):
        method = replace(config.method, base_learner=None, backbone_init=None)
        data = replace(common["data"], drop_novel_images=True)
        return replace(
            config, **{**common, "data": data}, method=method,
            validation=ValidationConfig(every_iterations=1, shots=config.validation.shots),
            optimiser=type(config.optimiser)(),
        )  # fmt: skip
    return replace(config, **common, optimiser=type(config.optimiser)())


@cache
def _measure(config: Config | BaseConfig) -> _Measured:
    with torch.device("meta"):
        return _measure_episodes(config) if isinstance(config, Config) else _measure_pictures(config)


def _measure_episodes(config: Config) -> _Measured:
    method = build_model(config, pretrained=False).method.train()
    batch = _episodes(config.data.batch, config.data.shots, config.data.size)
    step_flops, memory = _step(method, batch, lambda: method.losses(batch))
    one = _episodes(1, config.validation.shots or config.data.shots, config.data.size)
    sample_flops = _forward(method, lambda: method(one.query_images, one.support_images, one.support_labels))
    return _Measured(step_flops, sample_flops, memory)


def _measure_pictures(config: BaseConfig) -> _Measured:
    learner = build_base_learner(config, pretrained=False)[0].train()
    size = config.data.size
    images = torch.empty(config.data.batch, 3, size, size)
    labels = torch.zeros(config.data.batch, size, size, dtype=torch.int64)
    step_flops, memory = _step(learner, (images, labels), lambda: learner.losses(images, labels))
    return _Measured(step_flops, _forward(learner, lambda: learner(images[:1])), memory)


def _step(method: nn.Module, batch: Iterable[Tensor], losses: Callable[[], Losses]) -> tuple[int, int]:
    """FLOPs and bytes (see BASIS) of a training step."""
    owned = [*method.parameters(), *method.buffers(), *batch]
    with _counter() as counter, LiveBytes() as live:
        losses().total.backward()
    trained = sum(parameter.nbytes for parameter in method.parameters() if parameter.requires_grad)
    # the gradients are among what lived; momentum is not
    return counter.get_total_flops(), live.peak + sum(tensor.nbytes for tensor in owned) + trained + ALLOWANCE_BYTES


def _forward(method: nn.Module, predict: Callable[[], Tensor]) -> int:
    """FLOPs of one sample's evaluation."""
    method.eval()
    with torch.no_grad(), _counter() as counter:
        predict()
    return counter.get_total_flops()


def _episodes(batch: int, shots: int, size: int) -> _Episodes:
    images = torch.empty(batch, 1 + shots, 3, size, size)
    labels = torch.zeros(batch, 1 + shots, size, size, dtype=torch.int64)
    return _Episodes(
        query_images=images[:, 0],
        query_labels=labels[:, 0],
        support_images=images[:, 1:],
        support_labels=labels[:, 1:],
        base_labels=labels[:, 0],
        categories=torch.zeros(batch, dtype=torch.int64, device="cpu"),  # looked at before anything else
    )


def _conv2d_flops(x: Shape, v: Shape, s: Shape, u: Shape, *_: Any, out_shape: Sequence[Shape], **__: Any) -> int:
    """svf_fast::conv2d: x [N, Ci, H, W] by v [R, Ci, K, K], then by u [Co, R]."""
    pixels = out_shape[0][0] * math.prod(out_shape[0][2:])
    return 2 * pixels * (math.prod(v) + math.prod(u))


def _conv2d_backward_flops(dy: Shape, *rest: Any, **_: Any) -> int:
    """svf_fast::conv2d_backward: dy [N, Co, Ho, Wo] by u, and by v where dx is asked for."""
    v, u, need_dx = rest[4], rest[6], rest[-3]
    pixels = dy[0] * math.prod(dy[2:])
    return 2 * pixels * (math.prod(u) + (math.prod(v) if need_dx else 0))


def _max_cosine_flops(query: Shape, support: Shape, *_: Any, **__: Any) -> int:
    """svf_fast::max_cosine: every position of query [B, C, h, w] with every one of the support."""
    return 2 * math.prod(query) * math.prod(support[2:])


def _counter() -> FlopCounterMode:
    """Counts PyTorch's operations and the library's own."""
    own = torch.ops.svf_fast
    return FlopCounterMode(
        display=False,
        custom_mapping={
            own.conv2d: _conv2d_flops,
            own.conv2d_backward: _conv2d_backward_flops,
            own.max_cosine: _max_cosine_flops,
        },
    )
