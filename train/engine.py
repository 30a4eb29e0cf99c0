"""One run from its first step to its last: training, validation, checkpoints, log. A run that is killed and resumed
ends with the same bits as one that was not: all chance in a step derives from the run's seed and the step's number.
"""

import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from svf_fast.train.assembly import base_rates
from svf_fast.train.batches import training_keys
from svf_fast.train.checkpoint import Checkpoint, RunState, load_method_state, save_checkpoint
from svf_fast.train.config import StageConfig
from svf_fast.train.interruption import StopRequest
from svf_fast.train.journal import Journal
from svf_fast.train.precision import arithmetic
from svf_fast.train.progress import WorkProgress
from svf_fast.train.schedule import factor
from svf_fast.train.tasks import DeviceBatch, Task
from svf_fast.train.tuning import ParameterGroup
from svf_fast.train.validation import ValidationStopped

LAST, BEST, LOG = "last.pt", "best.pt", "log.jsonl"


class TrainingError(RuntimeError):
    """A run that cannot go on; the message is one sentence that says why and which checkpoint is good."""


@dataclass(frozen=True)
class Parts:
    """What a run works on: a model, its parameters in optimiser groups, and the task that trains and judges it."""

    method: nn.Module
    groups: list[ParameterGroup]
    task: Task


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``is_finished`` is False when a signal stopped it; ``sentence`` says so to a person."""

    is_finished: bool
    state: RunState
    sentence: str


class Run:
    """A run in ``folder``: ``last.pt``, ``best.pt`` (by validation mIoU) and ``log.jsonl``."""

    def __init__(
        self, config: StageConfig, parts: Parts, folder: Path, *, device: torch.device, console: Console
    ) -> None:
        self.config = config
        self.parts = parts
        self.folder = folder
        self.device = device
        self.console = console
        self.state = RunState()
        self.method = parts.method.to(device)
        options = config.optimiser
        self.optimiser = torch.optim.SGD(
            [{"params": group["params"], "name": group["name"]} for group in parts.groups],
            lr=options.base_lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )
        self.base_rates = base_rates(config, parts.groups)
        schedule = config.schedule
        self.steps_per_epoch = len(parts.task.training) // config.data.batch
        self.total = schedule.iterations or (schedule.epochs or 0) * self.steps_per_epoch
        self._saved_iteration: int | None = None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where ``checkpoint``, this folder's last one, was written."""
        load_method_state(self.method, checkpoint, self.folder / LAST)
        self.optimiser.load_state_dict(checkpoint.optimiser)
        self.state = checkpoint.state
        self._saved_iteration = checkpoint.state.iteration

    def train(self) -> Outcome:
        """Work until the last step, until validation stops getting better, or until SIGINT or SIGTERM.

        Raises TrainingError on a loss or gradient that is not finite, before it reaches the weights, and when the disk
        takes no more; the checkpoints written so far stay.
        """
        resumed_at = None if self._saved_iteration is None else self.state
        try:
            with Journal(self.folder / LOG, resumed_at) as self.journal, StopRequest() as self.stop:
                self._journal_start()
                with WorkProgress(self.console) as self.progress:
                    self.progress.begin("training", self.state.iteration, self.total)
                    return self._work()
        except OSError as error:
            raise TrainingError(f"{error}; {self._what_is_good()}") from error

    def _work(self) -> Outcome:
        with closing(self._batches()) as batches:
            while not self._is_finished:
                if self._owes_validation:
                    is_milestone = self._validate()
                else:
                    self._step(next(batches))
                    is_milestone = self.state.iteration % self.config.run.checkpoint_every == 0
                if is_milestone or self.stop:
                    self._save(LAST)
                if self.stop and not self._is_finished:
                    return Outcome(False, replace(self.state), self._stopped_sentence())
        return Outcome(True, replace(self.state), self._finished_sentence())

    def _batches(self) -> Generator[DeviceBatch, None, None]:
        data, task = self.config.data, self.parts.task
        keys = training_keys(
            task.training, data.batch, seed=self.config.run.seed, start=self.state.iteration, stop=self.total
        )
        return task.load(keys, data.workers)

    @property
    def _is_finished(self) -> bool:
        patience = self.config.schedule.patience
        ran_out = patience is not None and self.state.validations_since_best >= patience
        return ran_out or (self.state.iteration == self.total and not self._owes_validation)

    @property
    def _owes_validation(self) -> bool:
        """Whether the steps so far end a validation interval (or the run) that has not been validated yet."""
        iteration = self.state.iteration
        if iteration in (0, self.state.validated):
            return False
        rule = self.config.validation
        interval = rule.every_iterations or (rule.every_epochs or 0.0) * self.steps_per_epoch
        return iteration == self.total or iteration // interval > (iteration - 1) // interval

    def _step(self, batch: DeviceBatch) -> None:
        started_s = time.perf_counter()
        iteration = self.state.iteration
        decay = factor(self.config.schedule.name, iteration, self.total)
        rates = {name: decay * rate for name, rate in self.base_rates.items()}
        for group in self.optimiser.param_groups:
            group["lr"] = rates[group["name"]]
        batch = batch.to(self.device)
        self.method.train()
        self.optimiser.zero_grad(set_to_none=True)
        with _randomness_of_step(self.config.run.seed, iteration, self.device):
            with arithmetic(self.config.run.precision, self.device):
                losses = self.parts.task.losses(self.method, batch)
            losses.total.backward()
        loss_value, gradient_norm = losses.total.item(), self._gradient_norm()
        self._require_finite(loss_value, gradient_norm)
        self.optimiser.step()
        self.state.iteration += 1
        step_ms = (time.perf_counter() - started_s) * 1000.0
        self.journal.write(
            "step",
            self.state.iteration,
            loss=loss_value,
            parts={name: part.item() for name, part in losses.parts.items()},
            gradient_norm=gradient_norm,
            rates=rates,
            step_ms=round(step_ms, 1),
        )
        shown = [f"loss {loss_value:.4f}", *(f"rate of {name} {rate:.3g}" for name, rate in rates.items())]
        self.progress.show(
            "training", self.state.iteration, self.total, "  ".join([*shown, f"{step_ms:.0f} ms a step"])
        )

    def _gradient_norm(self) -> float:
        gradients = [p.grad for group in self.parts.groups for p in group["params"] if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _require_finite(self, loss: float, gradient_norm: float) -> None:
        for name, value in (("loss", loss), ("gradient's norm", gradient_norm)):
            if not math.isfinite(value):
                raise TrainingError(
                    f"the {name} is {value} at step {self.state.iteration + 1}: the rates are too high "
                    f"(optimiser.base_lr and its scales) or the data are broken; {self._what_is_good()}"
                )

    def _validate(self) -> bool:
        """Judge the model and keep the best; False when a stop was asked for before the end."""
        started_s = time.perf_counter()
        task = self.parts.task
        self.progress.begin("validation", 0, task.judged)
        try:
            with arithmetic(self.config.run.precision, self.device):
                found = task.judge(
                    self.method, workers=self.config.data.workers, device=self.device, watch=self._watch_validation
                )
        except ValidationStopped:
            return False
        state = self.state
        state.validated = state.iteration
        state.validations_since_best += 1
        if state.best_miou is None or found.miou > state.best_miou:
            state.best_miou, state.best_iteration, state.validations_since_best = found.miou, state.iteration, 0
        seconds = round(time.perf_counter() - started_s, 2)
        self.journal.write("validation", state.iteration, **found.values, seconds=seconds)
        if state.best_iteration == state.iteration:
            self._save(BEST)
        self.progress.note(
            f"step {state.iteration}: {found.sentence}"
            f" (best mIoU {state.best_miou:.4f} after step {state.best_iteration})"
        )
        return True

    def _watch_validation(self, done: int, total: int) -> None:
        self.progress.show("validation", done, total)
        if self.stop and done < total:
            raise ValidationStopped

    def _save(self, name: str) -> None:
        self.journal.sync()
        checkpoint = Checkpoint(
            config=self.config.to_plain(),
            state=self.state,
            method=self.method.state_dict(),
            optimiser=self.optimiser.state_dict(),
        )
        save_checkpoint(checkpoint, self.folder / name)
        if name == LAST:
            self._saved_iteration = self.state.iteration

    def _journal_start(self) -> None:
        self.journal.write(
            "start",
            self.state.iteration,
            iterations=self.total,
            seed=self.config.run.seed,
            trainable={group["name"]: sum(p.numel() for p in group["params"]) for group in self.parts.groups},
            parameters=sum(p.numel() for p in self.method.parameters()),
            device=str(self.device),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )

    def _what_is_good(self) -> str:
        if self._saved_iteration is None:
            return "no checkpoint had been written yet"
        return f"{self.folder / LAST} holds the run after step {self._saved_iteration}"

    def _stopped_sentence(self) -> str:
        return (
            f"stopped by {self.stop.signal_name} after step {self.state.iteration} of {self.total}; "
            f"{self.folder / LAST} is complete, --resume goes on from it"
        )

    def _finished_sentence(self) -> str:
        state = self.state
        early = f", {state.validations_since_best} validations after the best" if state.iteration < self.total else ""
        return (
            f"finished after step {state.iteration}{early}; best validation mIoU {state.best_miou:.4f} "
            f"after step {state.best_iteration}, in {self.folder / BEST}"
        )


@contextmanager
def _randomness_of_step(seed: int, iteration: int, device: torch.device) -> Iterator[None]:
    """Dropout draws from PyTorch's global generators: inside, those belong to (seed, iteration), and afterwards they
    are as they were."""
    step_seed = int(np.random.SeedSequence((seed, iteration)).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(step_seed)
        yield
