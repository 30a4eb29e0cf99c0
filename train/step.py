"""One optimisation step: losses of a batch, whole or in parts and over processes, gradients, rates, SGD. The same step up to
rounding however the batch is divided. Knows no schedule of validations and writes nothing."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from svf_fast.train.assembly import base_rates
from svf_fast.train.config import ConfigError, StageConfig
from svf_fast.train.distributed import PeerLost, Processes
from svf_fast.train.methods.dropout import Rows, rows_at_work
from svf_fast.train.precision import arithmetic
from svf_fast.train.schedule import factor
from svf_fast.train.tasks import DeviceBatch, Task
from svf_fast.train.tuning import ParameterGroup

# Of the gradients' norm, between compiled and not: far above what rounding does, far below what a wrong kernel does.
_MOST_DIFFERENCE = 0.1


@dataclass(frozen=True)
class StepResult:
    """Of the whole batch. ``is_taken`` is False where fp16 gradients overflowed and the weights stayed."""

    loss: float
    parts: dict[str, float]
    gradient_norm: float
    rates: dict[str, float]
    is_taken: bool
    scale: float | None  # of fp16's loss, in this step


class Stepper:
    """Takes steps with ``method``, which must be on ``device`` already.

    ConfigError where the batch cannot be divided as asked: it is not a multiple, or BatchNorm would see other
    statistics.
    """

    def __init__(
        self,
        config: StageConfig,
        method: nn.Module,
        groups: list[ParameterGroup],
        task: Task,
        *,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.config, self.method, self.task = config, method, task
        self.device, self.processes = device, processes
        self.parts = config.run.accumulate
        share, rest = divmod(config.data.batch, processes.size * self.parts)
        if rest:
            raise ConfigError(
                f"data.batch is {config.data.batch}, expected a multiple of {processes.size * self.parts}: "
                f"{processes.size} processes times run.accumulate={self.parts}"
            )
        self.share = share  # samples of one forward
        if config.run.compile:
            _require_compiler(device)
        share_statistics(method, processes, self.parts, device)
        options = config.optimiser
        self.optimiser = torch.optim.SGD(
            [{"params": group["params"], "name": group["name"]} for group in groups],
            lr=options.base_lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.run.precision == "fp16")
        self.base_rates = base_rates(config, groups)
        self._tuned = [parameter for group in groups for parameter in group["params"]]
        self._losses: nn.Module = _TaskLosses(method, task)
        self._to_compile: nn.Module | None = self._losses if config.run.compile else None
        if processes.size > 1:
            # Buffers need no broadcast: statistics are frozen, or synchronised. A stage that nothing reads (layer 4
            # with the prior from layer 3) has no gradient.
            self._losses = DistributedDataParallel(
                self._losses, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=True
            )

    def own_keys(self, keys: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """Of a step's samples those of this process, one tuple a forward."""
        start = self.processes.rank * self.share * self.parts
        for part in range(self.parts):
            first = start + part * self.share
            yield tuple(keys[first : first + self.share])

    def step(self, batches: Sequence[DeviceBatch], iteration: int, total: int) -> StepResult:
        """Step number ``iteration`` (from 0) of ``total`` on what ``own_keys`` named. The weights do not move when the
        loss or, without fp16, the gradient is not finite: the result tells."""
        decay = factor(self.config.schedule.name, iteration, total)
        rates = {name: decay * rate for name, rate in self.base_rates.items()}
        for group in self.optimiser.param_groups:
            group["lr"] = rates[group["name"]]
        self.method.train()
        self.optimiser.zero_grad(set_to_none=True)
        if self._to_compile is not None and self._compiled(self._to_compile, batches, iteration):
            self._to_compile = None
        loss, parts = self._backward(batches, iteration)
        self.scaler.unscale_(self.optimiser)
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self._tuned if p.grad is not None]))
        is_finite = bool(np.isfinite(loss)) and bool(np.isfinite(norm))
        if is_finite:
            self.scaler.step(self.optimiser)
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        if np.isfinite(loss):
            self.scaler.update()
        return StepResult(loss, parts, norm, rates, is_finite, scale)

    def _compiled(self, losses: nn.Module, batches: Sequence[DeviceBatch], iteration: int) -> bool:
        """Compile ``losses``; ConfigError unless the gradients of ``batches`` are what they were before. False where those
        overflow, as fp16's first ones do, and tell nothing."""
        expected = self._trial(batches, iteration)
        if not bool(torch.isfinite(expected).all()):
            return False
        # PyTorch's own generators: compiled or not, dropout draws the same
        losses.compile(options={"fallback_random": True})
        try:
            found = self._trial(batches, iteration)
        except (RuntimeError, AssertionError) as error:  # a compiler's errors have no class in common
            if isinstance(error, (torch.OutOfMemoryError, PeerLost)):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"run.compile is true, but this model does not compile (go on with run.compile=false --resume): {reason}"
            ) from error
        difference = float((found - expected).norm())
        norm = float(expected.norm())
        if not difference <= _MOST_DIFFERENCE * norm:
            self.processes.agreed(lambda: _refuse_compiled(difference / norm), (ConfigError,))
        return True

    def _trial(self, batches: Sequence[DeviceBatch], iteration: int) -> Tensor:
        """Gradients of a step that is not taken, in one row."""
        buffers = [(buffer, buffer.clone()) for buffer in self.method.buffers()]
        self._backward(batches, iteration)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._tuned]
        found = torch.cat([gradient.flatten() for gradient in gradients])
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        return found

    def _backward(self, batches: Sequence[DeviceBatch], iteration: int) -> tuple[float, dict[str, float]]:
        """Gradients of the mean over all pixels of the whole batch that are not void, and the losses.

        A loss is a mean over its own forward's pixels, so each one weighs as much as it has of them.
        """
        pixels = [self.task.scored_pixels(batch) for batch in batches]
        all_pixels = max(int(self.processes.total(np.array([sum(pixels)]))[0]), 1)
        is_whole = len(batches) == self.processes.size == 1
        found: list[tuple[float, Tensor, dict[str, Tensor]]] = []
        for part, (batch, own_pixels) in enumerate(zip(batches, pixels, strict=True)):
            weight = 1.0 if is_whole else own_pixels / all_pixels
            first = (self.processes.rank * self.parts + part) * self.share
            rows = Rows(first, self.share, self.config.data.batch)
            with (
                self._without_exchange(is_last=part == len(batches) - 1),
                _randomness_of_step(self.config.run.seed, iteration, self.device),
                rows_at_work(rows),
            ):
                with arithmetic(self.config.run.precision, self.device):
                    total, parts = self._losses(batch.to(self.device))
                # the exchange of gradients takes their mean over the processes, not their sum
                scaled = total if is_whole else total * (weight * self.processes.size)
                with self.processes.exchange():
                    self.scaler.scale(scaled).backward()
            found.append((weight, total.detach(), {name: value.detach() for name, value in parts.items()}))
        names = list(found[0][2])
        sums = np.zeros(1 + len(names))
        for weight, total, parts in found:
            sums += [weight * value.item() for value in (total, *(parts[name] for name in names))]
        loss, *values = (float(value) for value in self.processes.total(sums))
        return loss, dict(zip(names, values, strict=True))

    def _without_exchange(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Gradients of all parts but the last wait for it."""
        if is_last or not isinstance(self._losses, DistributedDataParallel):
            return nullcontext()
        exchange: AbstractContextManager[object] = self._losses.no_sync()
        return exchange


class _TaskLosses(nn.Module):
    """A task's losses as a module's forward, which is what is compiled and distributed."""

    def __init__(self, method: nn.Module, task: Task) -> None:
        super().__init__()
        self.method = method
        self._task = task

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self._task.losses(self.method, batch)
        return losses.total, losses.parts


def share_statistics(method: nn.Module, processes: Processes, parts: int, device: torch.device) -> None:
    """Where BatchNorm follows the batch, make it the whole batch's; ConfigError where that cannot be."""
    was_training = method.training
    method.train()
    following = [name for name, module in method.named_modules() if isinstance(module, _BatchNorm) and module.training]
    method.train(was_training)
    if not following or processes.size * parts == 1:
        return
    if parts > 1:
        raise ConfigError(
            f"run.accumulate is {parts}, but BatchNorm follows the batch here and would see a part of it: use 1"
        )
    if device.type != "cuda":
        raise ConfigError(
            f"BatchNorm follows the batch here, and {processes.size} processes share its statistics on GPUs only: "
            "use one process"
        )
    # those alone: what keeps its statistics has classes of its own
    for name in following:
        method.set_submodule(name, nn.SyncBatchNorm.convert_sync_batchnorm(method.get_submodule(name)))


def _refuse_compiled(difference: float) -> None:
    raise ConfigError(
        f"run.compile is true, but the compiled gradients are others (they differ by {difference:.2g} of their norm): "
        "go on with run.compile=false --resume"
    )


def _require_compiler(device: torch.device) -> None:
    """ConfigError unless a first small function can be compiled for ``device``."""
    try:
        torch.compile(lambda values: values * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # PyTorch's own errors here have no class in common
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"run.compile is true, but torch.compile does not work for {device.type} here: {reason}"
        ) from error


@contextmanager
def _randomness_of_step(seed: int, iteration: int, device: torch.device) -> Iterator[None]:
    """Dropout draws from PyTorch's global generators: inside, those belong to (seed, iteration), and afterwards they
    are as they were."""
    step_seed = int(np.random.SeedSequence((seed, iteration)).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(step_seed)
        yield
