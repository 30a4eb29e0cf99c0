"""Mixed precision: which steps are skipped and which end a run, and that fp16's scale belongs to the run."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from run_fakes import FakeMethod, fake_run, require_same_ending, stop_after
from torch import Tensor

from svf_fast.train.checkpoint import load_checkpoint
from svf_fast.train.engine import LAST, LOG, MOST_OVERFLOWS, TrainingError
from svf_fast.train.journal import read_journal
from svf_fast.train.methods import Losses, TrainingBatch

FIRST_SCALE = 2.0**16  # PyTorch's


class Overflowing(FakeMethod):
    """Steps whose number is in ``overflows`` have a gradient that is not finite; from ``broken`` on the loss is not."""

    def __init__(self, overflows: Collection[int], broken: float = math.inf) -> None:
        super().__init__()
        self.overflows, self.broken, self.steps = overflows, broken, 0

    def losses(self, batch: TrainingBatch) -> Losses:
        self.steps += 1
        found = super().losses(batch)
        total: Tensor = found.total * (math.nan if self.steps >= self.broken else 1)
        # the root's slope is infinite at 0 where its value is finite
        return Losses(total + torch.sqrt(total * 0) if self.steps in self.overflows else total, found.parts)


def steps(folder: Path) -> list[dict[str, object]]:
    return [line for line in read_journal(folder / LOG) if line["kind"] == "step"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_mixed_precision_learns_and_keeps_its_weights_in_float32(tmp_path: Path, precision: str) -> None:
    run = fake_run(tmp_path, f"run.precision={precision}", "schedule.iterations=30", "validation.every_iterations=30")
    assert run.train().is_finished
    losses = [float(str(line["loss"])) for line in steps(tmp_path)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert {tensor.dtype for tensor in load_checkpoint(tmp_path / LAST).method.values()} == {torch.float32}


def test_an_overflow_leaves_the_weights_halves_the_scale_and_is_told(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "run.precision=fp16", method=Overflowing(range(1, 11)))
    before = {name: tensor.clone() for name, tensor in run.method.state_dict().items()}
    assert run.train().is_finished
    assert all(torch.equal(before[name], tensor) for name, tensor in run.method.state_dict().items())
    assert [line["gradient_norm"] for line in steps(tmp_path)] == [None] * 10
    assert [line["scale"] for line in steps(tmp_path)] == [FIRST_SCALE / 2**n for n in range(10)]
    assert load_checkpoint(tmp_path / LAST).scaler["scale"] == FIRST_SCALE / 2**10


def test_too_many_overflows_in_a_row_end_the_run(tmp_path: Path) -> None:
    longer = ("run.precision=fp16", "schedule.iterations=60", "validation.every_iterations=60")
    # one good step in between, and the count begins again
    good = MOST_OVERFLOWS + 1
    method = Overflowing([n for n in range(1, 100) if n != good])
    sentence = rf"the gradient's norm is nan at step {good + MOST_OVERFLOWS + 1}, after {MOST_OVERFLOWS} skipped steps in a row"
    with pytest.raises(TrainingError, match=sentence):
        fake_run(tmp_path, *longer, method=method).train()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_loss_that_is_not_finite_ends_the_run_at_once(tmp_path: Path, precision: str) -> None:
    with pytest.raises(TrainingError, match=rf"the loss is nan at step 5: .*{LAST} holds the run after step 3"):
        fake_run(tmp_path, f"run.precision={precision}", method=Overflowing((), broken=5)).train()


def test_in_bf16_a_gradient_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the gradient's norm is nan at step 2: "):
        fake_run(tmp_path, "run.precision=bf16", method=Overflowing((2,))).train()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_run_with_skipped_steps_goes_on_with_its_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    settings = ("run.precision=fp16", f"run.accumulate={parts}")
    overflows = (1, 2, 4, 6)
    fake_run(tmp_path / "whole", *settings, method=Overflowing(overflows)).train()
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert not fake_run(tmp_path / "cut", *settings, method=Overflowing(overflows)).train().is_finished
    method = Overflowing(overflows)
    run = fake_run(tmp_path / "cut", *settings, method=method)
    run.restore(load_checkpoint(tmp_path / "cut" / LAST))
    method.steps = 4 * parts
    assert run.train().is_finished
    require_same_ending(tmp_path / "cut", tmp_path / "whole")


def test_a_checkpoint_of_before_there_was_a_scale_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        fake_run(tmp_path, "run.precision=fp16").train()
    content = torch.load(tmp_path / LAST, weights_only=True)
    del content["scaler"]
    torch.save(content, tmp_path / LAST)
    run = fake_run(tmp_path, "run.precision=fp16")
    run.restore(load_checkpoint(tmp_path / LAST))
    assert run.train().is_finished
