"""Runs: however one is interrupted, it ends with the bits of one that was not; what is not finite stops it; validation
and loading leave no trace in the weights."""

from __future__ import annotations

import errno
import io
import json
import math
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from run_fakes import FakeEpisodes, FakeMethod, fake_run, require_same_ending, told
from torch import Tensor, nn

from svf_fast.train import engine
from svf_fast.train.batches import training_keys
from svf_fast.train.checkpoint import load_checkpoint
from svf_fast.train.config import ConfigError
from svf_fast.train.engine import LAST, LOG, SCALARS, Run, TrainingError
from svf_fast.train.journal import read_journal
from svf_fast.train.methods import Losses, TrainingBatch
from svf_fast.train.methods.dropout import Dropout2d
from svf_fast.train.scalars import require_tensorboard
from svf_fast.train.tasks import SeenClasses
from svf_fast.train.validation import EpisodePlan


class Crash(Exception):
    """Stands for a process that ends here: nothing after it runs."""


class WatchedMethod(FakeMethod):
    """Calls ``at_step[n]`` in the n-th training step and ``at_validation[n]`` in the n-th validation episode."""

    def __init__(
        self, at_step: dict[int, Callable[[], None]], at_validation: dict[int, Callable[[], None]] | None = None
    ) -> None:
        super().__init__()
        self.hooks = {True: at_step, False: at_validation or {}}
        self.calls = {True: 0, False: 0}

    def forward(self, query: Tensor, supports: Tensor, support_labels: Tensor) -> Tensor:
        self.calls[self.training] += 1
        self.hooks[self.training].get(self.calls[self.training], lambda: None)()
        return super().forward(query, supports, support_labels)


def crash() -> None:
    raise Crash


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def resumed(folder: Path, *overrides: str) -> Run:
    run = fake_run(folder, *overrides)
    if (folder / LAST).is_file():
        run.restore(load_checkpoint(folder / LAST))
    return run


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Steps this small spend most of their time waking threads up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert fake_run(folder).train().is_finished
    return folder


def test_a_run_is_told_step_by_step(uninterrupted: Path) -> None:
    lines = read_journal(uninterrupted / LOG)
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["iteration"] for line in steps] == list(range(1, 11))
    assert all(line["parts"] == {"main": line["loss"]} for line in steps)
    assert all(math.isfinite(line["loss"]) and line["gradient_norm"] > 0 and line["step_ms"] > 0 for line in steps)
    cosine = [0.1 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert [line["rates"]["head"] for line in steps] == pytest.approx(cosine)
    validations = [line for line in lines if line["kind"] == "validation"]
    assert [line["iteration"] for line in validations] == [5, 10]
    assert set(validations[0]["class_iou"]) == {"one", "two"}
    assert (validations[0]["episodes"], validations[0]["seed"]) == (4, 321)
    assert (lines[0]["kind"], lines[0]["seed"], lines[0]["iterations"]) == ("start", 321, 10)


def test_training_learns(uninterrupted: Path) -> None:
    losses = [line["loss"] for line in read_journal(uninterrupted / LOG) if line["kind"] == "step"]
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("workers", [1, 3])
def test_results_do_not_depend_on_the_workers(tmp_path: Path, uninterrupted: Path, workers: int) -> None:
    fake_run(tmp_path, f"data.workers={workers}").train()
    require_same_ending(tmp_path, uninterrupted)


# saved after steps 3, 5, 6, 9, 10: before the first checkpoint, just before, at and just after one, at the end
@pytest.mark.parametrize("step", range(1, 11))
def test_a_run_that_died_ends_like_one_that_did_not(tmp_path: Path, uninterrupted: Path, step: int) -> None:
    with pytest.raises(Crash):
        fake_run(tmp_path, method=WatchedMethod({step: crash})).train()
    assert resumed(tmp_path).train().is_finished
    require_same_ending(tmp_path, uninterrupted)


@pytest.mark.parametrize("episode", [1, 4, 5, 8])
@pytest.mark.parametrize("end", [crash, terminate])
def test_a_validation_cut_short_is_done_again(
    tmp_path: Path, uninterrupted: Path, episode: int, end: Callable[[], None]
) -> None:
    run = fake_run(tmp_path, method=WatchedMethod({}, {episode: end}))
    if end is crash:
        with pytest.raises(Crash):
            run.train()
    else:
        # a request during the very last episode comes too late to stop anything
        assert run.train().is_finished == (episode == 8)
    assert resumed(tmp_path).train().is_finished
    require_same_ending(tmp_path, uninterrupted)


@pytest.mark.parametrize("step", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end_and_writes_a_checkpoint(
    tmp_path: Path, uninterrupted: Path, step: int, number: signal.Signals
) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    outcome = fake_run(tmp_path, method=WatchedMethod({step: lambda: signal.raise_signal(number)})).train()
    assert not outcome.is_finished
    assert outcome.sentence == (
        f"stopped by {number.name} after step {step} of 10; {tmp_path / LAST} is complete, --resume goes on from it"
    )
    assert load_checkpoint(tmp_path / LAST).state.iteration == step
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert resumed(tmp_path).train().is_finished
    require_same_ending(tmp_path, uninterrupted)


def test_a_run_stopped_again_and_again_ends_the_same(tmp_path: Path, uninterrupted: Path) -> None:
    for _ in range(10):
        run = fake_run(tmp_path, method=WatchedMethod({1: terminate}))
        if (tmp_path / LAST).is_file():
            run.restore(load_checkpoint(tmp_path / LAST))
        run.train()
    resumed(tmp_path).train()
    require_same_ending(tmp_path, uninterrupted)


def test_a_finished_run_resumed_changes_nothing(tmp_path: Path, uninterrupted: Path) -> None:
    fake_run(tmp_path).train()
    outcome = resumed(tmp_path).train()
    assert outcome.is_finished
    assert outcome.sentence.startswith("finished after step 10; best validation mIoU")
    require_same_ending(tmp_path, uninterrupted)


def test_a_line_cut_short_in_the_log_is_forgotten(tmp_path: Path, uninterrupted: Path) -> None:
    with pytest.raises(Crash):
        fake_run(tmp_path, method=WatchedMethod({8: crash})).train()
    with (tmp_path / LOG).open("a") as file:
        file.write('{"kind": "step", "itera')
    resumed(tmp_path).train()
    require_same_ending(tmp_path, uninterrupted)


def test_validation_leaves_training_alone(tmp_path: Path, uninterrupted: Path) -> None:
    fake_run(tmp_path, "validation.every_iterations=1", "validation.episodes=3").train()
    found, wanted = load_checkpoint(tmp_path / LAST), load_checkpoint(uninterrupted / LAST)
    assert all(torch.equal(found.method[key], tensor) for key, tensor in wanted.method.items())


def test_a_run_leaves_the_global_generator_alone_and_does_not_read_it(tmp_path: Path, uninterrupted: Path) -> None:
    run = fake_run(tmp_path)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    run.train()
    assert torch.equal(torch.get_rng_state(), before)
    require_same_ending(tmp_path, uninterrupted)


def test_another_seed_is_another_run(tmp_path: Path, uninterrupted: Path) -> None:
    fake_run(tmp_path, "run.seed=322").train()
    assert told(tmp_path)[0]["loss"] != told(uninterrupted)[0]["loss"]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    class Broken(WatchedMethod):
        def losses(self, batch: TrainingBatch) -> Losses:
            losses = super().losses(batch)
            if self.calls[True] < 8:
                return losses
            # the root's slope is infinite at 0 where its value is finite
            total = losses.total * math.nan if what == "loss" else losses.total + torch.sqrt(losses.total * 0)
            return Losses(total, losses.parts)

    sentence = rf"the {what}.* is nan at step 8: .*{LAST} holds the run after step 6"
    with pytest.raises(TrainingError, match=sentence) as raised:
        fake_run(tmp_path, method=Broken({})).train()
    assert "\n" not in str(raised.value)
    last = load_checkpoint(tmp_path / LAST)
    assert last.state.iteration == 6
    assert all(torch.isfinite(tensor).all() for tensor in last.method.values())


def test_a_full_disk_stops_the_run_and_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = engine.save_checkpoint

    def save_until_full(checkpoint: engine.Checkpoint, path: Path) -> None:
        if checkpoint.state.iteration > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(checkpoint, path)

    monkeypatch.setattr(engine, "save_checkpoint", save_until_full)
    with pytest.raises(TrainingError, match=rf"No space left on device; .*{LAST} holds the run after step 6"):
        fake_run(tmp_path).train()
    assert load_checkpoint(tmp_path / LAST).state.iteration == 6


def test_a_failure_before_any_checkpoint_says_so(tmp_path: Path) -> None:
    def vanish() -> None:
        raise FileNotFoundError("picture.jpg does not exist")

    with pytest.raises(TrainingError, match=r"picture\.jpg does not exist; no checkpoint had been written yet"):
        fake_run(tmp_path, method=WatchedMethod({2: vanish})).train()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["validation.every_iterations=4"], [4, 8, 10]),
        (["validation.every_iterations=20"], [10]),
        (["validation.every_iterations=null", "validation.every_epochs=1"], [3, 6, 9, 10]),
        (["validation.every_iterations=null", "validation.every_epochs=0.5"], [2, 3, 5, 6, 8, 9, 10]),
        (["schedule.iterations=null", "schedule.epochs=2"], [5, 6]),
    ],
)
def test_validation_comes_when_it_is_due_and_at_the_end(
    tmp_path: Path, overrides: list[str], expected: list[int]
) -> None:
    fake_run(tmp_path, *overrides).train()
    assert [line["iteration"] for line in read_journal(tmp_path / LOG) if line["kind"] == "validation"] == expected


def test_each_image_is_the_query_once_an_epoch() -> None:
    keys = [key for batch in training_keys(FakeEpisodes(), 2, seed=321, start=0, stop=10) for key in batch]
    # seven images make three batches of two; the seventh of an epoch's order is dropped
    epochs = [[index for epoch, index in keys if epoch == number] for number in range(4)]
    assert [len(set(indices)) for indices in epochs] == [len(indices) for indices in epochs] == [6, 6, 6, 2]
    assert len({tuple(indices) for indices in epochs[:3]}) == 3


def test_a_run_that_no_longer_gets_better_stops(tmp_path: Path) -> None:
    stuck = ["optimiser.base_lr=0", "validation.every_iterations=1", "schedule.patience=3"]
    outcome = fake_run(tmp_path, *stuck).train()
    assert outcome.is_finished
    assert outcome.sentence.startswith("finished after step 4, 3 validations after the best; best validation mIoU")
    assert resumed(tmp_path, *stuck).train().state.iteration == 4


def test_every_line_of_the_log_is_json_without_nan(uninterrupted: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in (uninterrupted / LOG).read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_groups_get_the_rates_of_their_scale(tmp_path: Path) -> None:
    method = FakeMethod()
    run = fake_run(tmp_path, method=method)
    groups = [
        engine.ParameterGroup(name="head", params=list(method.decide.parameters()), lr_scale=1.0),
        engine.ParameterGroup(name="backbone", params=list(method.features.parameters()), lr_scale=0.1),
    ]
    parts = engine.Parts(method, groups, run.parts.task)
    Run(run.config, parts, tmp_path, device=run.device, console=run.console).train()
    (first, *_) = [line for line in read_journal(tmp_path / LOG) if line["kind"] == "step"]
    assert first["rates"] == pytest.approx({"head": 0.2, "backbone": 0.02})


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_shows_step_loss_rate_and_time_left(tmp_path: Path, is_terminal: bool) -> None:
    run = fake_run(tmp_path)
    shown = io.StringIO()
    run.console = Console(file=shown, force_terminal=is_terminal, width=160)
    run.train()
    words = ["training", "/10", "loss ", "rate of head ", "ms a step", " left", "step 5: validation mIoU"]
    assert [word for word in words if word not in shown.getvalue()] == []
    assert ("\x1b" in shown.getvalue()) == is_terminal


def test_episodes_of_the_seen_classes_are_judged_and_decide_nothing(tmp_path: Path, uninterrupted: Path) -> None:
    run = fake_run(tmp_path)
    seen = SeenClasses(FakeEpisodes(), (1, 2), EpisodePlan(2, 321))
    parts = engine.Parts(run.method, run.parts.groups, replace(run.parts.task, seen=seen))
    Run(run.config, parts, tmp_path, device=run.device, console=run.console).train()
    found, alone = (
        [line for line in told(folder) if line["kind"] == "validation"] for folder in (tmp_path, uninterrupted)
    )
    for line in found:
        assert line.pop("training_miou") >= 0
        assert 0 < line.pop("training_fb_iou") != line["fb_iou"]
    assert found == alone


def test_curves_for_tensorboard_go_on_after_a_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.raises(Crash):
        fake_run(tmp_path, "run.tensorboard=true", method=WatchedMethod({6: crash})).train()
    resumed(tmp_path, "run.tensorboard=true").train()
    curves = accumulator.EventAccumulator(str(tmp_path / SCALARS)).Reload()
    told_losses = [(line["iteration"], line["loss"]) for line in told(tmp_path) if line["kind"] == "step"]
    shown = [(event.step, event.value) for event in curves.Scalars("step/loss")]
    assert shown == [(step, pytest.approx(loss)) for step, loss in told_losses]
    assert [event.step for event in curves.Scalars("validation/miou")] == [5, 10]
    assert {"step/rates/head", "step/step_ms", "validation/class_iou/one"} <= set(curves.Tags()["scalars"])


def test_tensorboard_that_is_not_there_is_said_before_the_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"run.tensorboard is true, but the package is not installed"):
        require_tensorboard()


class Dropping(FakeMethod):
    """With the dropout of the methods, whose draws torch.compile leaves as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = Dropout2d(0.5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_takes_the_same_steps(tmp_path: Path) -> None:
    losses = []
    for compiled in ("false", "true"):
        folder = tmp_path / compiled
        run = fake_run(folder, f"run.compile={compiled}", method=Dropping())
        assert run.train().is_finished
        losses.append([line["loss"] for line in told(folder) if line["kind"] == "step"])
        assert set(load_checkpoint(folder / LAST).method) == set(Dropping().state_dict())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("error", [0.01, 1.0])
def test_compiled_gradients_that_are_others_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    def compile_wrongly(module: nn.Module, **_: object) -> None:
        def wrong(*batch: object) -> tuple[Tensor, object]:
            total, parts = module.forward(*batch)
            return total - error * (total - total.detach()), parts

        module._compiled_call_impl = wrong

    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(nn.Module, "compile", compile_wrongly)
    run = fake_run(tmp_path, "run.compile=true")
    if error < 0.1:
        assert run.train().is_finished
        return
    with pytest.raises(ConfigError, match=r"compiled gradients are others \(they differ by 1 of their norm\)"):
        run.train()


def test_a_compiler_that_does_not_work_is_said_before_the_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler found\nat great length")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(ConfigError, match=r"run.compile is true, but .* for cpu here: no C\+\+ compiler found$"):
        fake_run(tmp_path, "run.compile=true")
