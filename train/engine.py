"""One run from its first step to its last: training, validation, checkpoints, log. A run that is killed and resumed
ends with the same bits as one that was not: all chance in a step derives from the run's seed and the step's number.
"""

import math
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from svf_fast.train.batches import training_keys
from svf_fast.train.checkpoint import Checkpoint, RunState, load_method_state, save_checkpoint
from svf_fast.train.config import StageConfig
from svf_fast.train.distributed import ALONE, PeerLost, Processes
from svf_fast.train.footprint import begin_peak, peak_memory_mb
from svf_fast.train.interruption import StopRequest
from svf_fast.train.journal import Journal, SilentJournal
from svf_fast.train.precision import arithmetic
from svf_fast.train.progress import WorkProgress
from svf_fast.train.scalars import open_scalars, scalars_of
from svf_fast.train.step import Stepper, StepResult
from svf_fast.train.tasks import DeviceBatch, Task
from svf_fast.train.tuning import ParameterGroup
from svf_fast.train.validation import ValidationStopped

LAST, BEST, LOG, SCALARS = "last.pt", "best.pt", "log.jsonl", "tensorboard"
MOST_OVERFLOWS = 20  # fp16 steps in a row: the scale has fallen by 2^20 then


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
    """How a run ended: ``is_finished`` is False when a signal stopped it; ``sentence`` says so to a person. A signal that
    came with the last step ``is_asked_to_stop``, for what would follow."""

    is_finished: bool
    state: RunState
    sentence: str
    is_asked_to_stop: bool = False


class Run:
    """A run in ``folder``: ``last.pt``, ``best.pt`` (by validation mIoU) and ``log.jsonl``."""

    def __init__(
        self,
        config: StageConfig,
        parts: Parts,
        folder: Path,
        *,
        device: torch.device,
        console: Console,
        processes: Processes = ALONE,
    ) -> None:
        """ConfigError when the batch cannot be divided as the configuration asks."""
        self.config = config
        self.parts = parts
        self.folder = folder
        self.device = device
        self.processes = processes
        self.console = console if processes.is_first else Console(quiet=True)
        self.state = RunState()
        self.method = parts.method.to(device)
        self.stepper = Stepper(config, self.method, parts.groups, parts.task, device=device, processes=processes)
        schedule = config.schedule
        self.steps_per_epoch = len(parts.task.training) // config.data.batch
        self.total = schedule.iterations or (schedule.epochs or 0) * self.steps_per_epoch
        self._saved_iteration: int | None = None
        self._overflows = 0  # of fp16, in a row

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where ``checkpoint``, this folder's last one, was written."""
        load_method_state(self.method, checkpoint, self.folder / LAST)
        self.stepper.optimiser.load_state_dict(checkpoint.optimiser)
        if checkpoint.scaler:  # an older version's fp16 had none
            self.stepper.scaler.load_state_dict(checkpoint.scaler)
        self.state = checkpoint.state
        self._saved_iteration = checkpoint.state.iteration

    def train(self) -> Outcome:
        """Work until the last step, until validation stops getting better, or until SIGINT or SIGTERM.

        Raises TrainingError on a loss or gradient that is not finite, before it reaches the weights, and when the disk
        takes no more; the checkpoints written so far stay.
        """
        begin_peak(self.device)
        resumed_at = None if self._saved_iteration is None else self.state
        log = Journal(self.folder / LOG, resumed_at) if self.processes.is_first else SilentJournal()
        wants_scalars = self.config.run.tensorboard and self.processes.is_first
        try:
            with (
                log as self.journal,
                open_scalars(self.folder / SCALARS, self.state.iteration, wanted=wants_scalars) as self.scalars,
                StopRequest() as self.stop,
            ):
                self._journal_start()
                with WorkProgress(self.console) as self.progress:
                    self.progress.begin("training", self.state.iteration, self.total)
                    return self._work()
        except OSError as error:
            raise TrainingError(f"{error}; {self._what_is_good()}") from error
        except PeerLost as error:
            raise PeerLost(f"{error}; {self._what_is_good()}") from error

    def _work(self) -> Outcome:
        with closing(self._batches()) as batches:
            while not self._is_finished:
                if self._owes_validation:
                    is_milestone = self._validate()
                else:
                    self._step([next(batches) for _ in range(self.config.run.accumulate)])
                    is_milestone = self.state.iteration % self.config.run.checkpoint_every == 0
                must_stop = self.processes.any(bool(self.stop))
                if is_milestone or must_stop:
                    self._save(LAST)
                if must_stop and not self._is_finished:
                    return Outcome(False, replace(self.state), self._stopped_sentence())
        state = self.state
        best = {"best_miou": state.best_miou, "best_iteration": state.best_iteration}
        self._record("finished", **best, peak_memory_mb=peak_memory_mb(self.device))
        return Outcome(True, replace(state), self._finished_sentence(), self.processes.any(bool(self.stop)))

    def _batches(self) -> Generator[DeviceBatch, None, None]:
        data, task = self.config.data, self.parts.task
        keys = training_keys(
            task.training, data.batch, seed=self.config.run.seed, start=self.state.iteration, stop=self.total
        )
        return task.load((own for step in keys for own in self.stepper.own_keys(step)), data.workers)

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

    def _step(self, batches: list[DeviceBatch]) -> None:
        started_s = time.perf_counter()
        done = self.stepper.step(batches, self.state.iteration, self.total)
        self._overflows = 0 if done.is_taken else self._overflows + 1
        if not self._may_go_on(done):
            self.processes.agreed(lambda: self._refuse(done), (TrainingError,))
        self.state.iteration += 1
        step_ms = (time.perf_counter() - started_s) * 1000.0
        self._record(
            "step",
            loss=done.loss,
            parts=done.parts,
            # JSON has no infinity
            gradient_norm=done.gradient_norm if done.is_taken else None,
            rates=done.rates,
            **({} if done.scale is None else {"scale": done.scale}),
            step_ms=round(step_ms, 1),
        )
        shown = [
            f"loss {done.loss:.4f}",
            *(f"rate of {name} {rate:.3g}" for name, rate in done.rates.items()),
            f"{step_ms:.0f} ms a step",
            f"{peak_memory_mb(self.device):.0f} MB",
        ]
        self.progress.show("training", self.state.iteration, self.total, "  ".join(shown))

    def _may_go_on(self, done: StepResult) -> bool:
        is_fp16 = self.stepper.scaler.is_enabled()
        return done.is_taken or (is_fp16 and math.isfinite(done.loss) and self._overflows <= MOST_OVERFLOWS)

    def _refuse(self, done: StepResult) -> None:
        name, value = ("gradient's norm", done.gradient_norm) if math.isfinite(done.loss) else ("loss", done.loss)
        again = f", after {MOST_OVERFLOWS} skipped steps in a row" if self._overflows > MOST_OVERFLOWS else ""
        raise TrainingError(
            f"the {name} is {value} at step {self.state.iteration + 1}{again}: the rates are too high "
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
                    self.method,
                    workers=self.config.data.workers,
                    device=self.device,
                    watch=self._watch_validation,
                    processes=self.processes,
                )
        except ValidationStopped:
            return False
        state = self.state
        state.validated = state.iteration
        state.validations_since_best += 1
        if state.best_miou is None or found.miou > state.best_miou:
            state.best_miou, state.best_iteration, state.validations_since_best = found.miou, state.iteration, 0
        seconds = round(time.perf_counter() - started_s, 2)
        self._record("validation", **found.values, seconds=seconds, peak_memory_mb=peak_memory_mb(self.device))
        if state.best_iteration == state.iteration:
            self._save(BEST)
        self.progress.note(
            f"step {state.iteration}: {found.sentence}"
            f" (best mIoU {state.best_miou:.4f} after step {state.best_iteration})"
        )
        return True

    def _watch_validation(self, done: int, total: int) -> None:
        self.progress.show("validation", done, total)
        if self.processes.any(bool(self.stop)) and done < total:
            raise ValidationStopped

    def _record(self, kind: str, **values: Any) -> None:
        self.journal.write(kind, self.state.iteration, **values)
        for name, value in scalars_of(kind, values):
            self.scalars.add_scalar(name, value, self.state.iteration)

    def _save(self, name: str) -> None:
        if not self.processes.is_first:
            self._saved_iteration = self.state.iteration if name == LAST else self._saved_iteration
            return
        self.journal.sync()
        checkpoint = Checkpoint(
            config=self.config.to_plain(),
            state=self.state,
            method=self.method.state_dict(),
            optimiser=self.stepper.optimiser.state_dict(),
            scaler=self.stepper.scaler.state_dict(),
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
            processes=self.processes.size,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )

    def _what_is_good(self) -> str:
        if self._saved_iteration is None:
            return "no checkpoint had been written yet"
        return f"{self.folder / LAST} holds the run after step {self._saved_iteration}"

    def _stopped_sentence(self) -> str:
        return (
            f"stopped by {self.stop.signal_name or 'another process'} after step {self.state.iteration} of {self.total}; "
            f"{self.folder / LAST} is complete, --resume goes on from it"
        )

    def _finished_sentence(self) -> str:
        state = self.state
        early = f", {state.validations_since_best} validations after the best" if state.iteration < self.total else ""
        return (
            f"finished after step {state.iteration}{early}; best validation mIoU {state.best_miou:.4f} "
            f"after step {state.best_iteration}, in {self.folder / BEST}"
        )
