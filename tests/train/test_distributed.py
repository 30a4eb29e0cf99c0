"""Steps and validations divided, over parts of a batch and over processes, against the same done whole."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from run_fakes import QUIET, TINY, FakeMethod, fake_run, stop_after, write_voc_folder
from torch import nn

from svf_fast.train.checkpoint import load_checkpoint
from svf_fast.train.cli import main
from svf_fast.train.config import ConfigError, load_config
from svf_fast.train.distributed import PeerLost, ProcessError, Processes
from svf_fast.train.engine import LAST, LOG
from svf_fast.train.journal import read_journal
from svf_fast.train.methods.dropout import Dropout2d, Rows, rows_at_work
from svf_fast.train.runs import train
from svf_fast.train.step import share_statistics


class TwoFold(FakeMethod):
    """With a dropout that can be divided."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = Dropout2d(0.5)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_journal(folder / LOG) if line["kind"] == "step"]


def scores(folder: Path) -> list[dict[str, object]]:
    names = ("miou", "fb_iou", "class_iou", "branches", "training_miou")
    lines = [line for line in read_journal(folder / LOG) if line["kind"] == "validation"]
    return [{name: line[name] for name in names if name in line} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / LAST).method


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_dropout_of_some_rows_is_that_of_the_whole_batch(groups: int, inplace: bool) -> None:
    dropout = Dropout2d(0.4, inplace=inplace)
    whole = torch.rand(groups, 6, 5, 2, 3)
    torch.manual_seed(7)
    expected = torch.nn.functional.dropout2d(whole.flatten(0, 1), 0.4).unflatten(0, (groups, 6))
    state = torch.random.get_rng_state()
    for first, count in ((0, 2), (2, 3), (5, 1)):
        torch.manual_seed(7)
        with rows_at_work(Rows(first, count, 6)):
            found = dropout(whole[:, first : first + count].flatten(0, 1).clone(), groups)
        torch.testing.assert_close(
            found.unflatten(0, (groups, count)), expected[:, first : first + count], rtol=0, atol=0
        )
        assert torch.equal(torch.random.get_rng_state(), state)


def test_a_batch_in_parts_is_the_same_step(tmp_path: Path) -> None:
    fake_run(tmp_path / "whole", "data.batch=6", method=TwoFold()).train()
    fake_run(tmp_path / "parts", "data.batch=6", "run.accumulate=3", method=TwoFold()).train()
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-5)
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[name], tensor, rtol=1e-4, atol=1e-6)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data.batch is 2, expected a multiple of 3: 1 processes times run.accumulate=3"
    ):
        fake_run(tmp_path / "run", "run.accumulate=3")


def test_processes_share_everything_once() -> None:
    items = list(range(11))
    shared = [Processes(rank, 3).share(items) for rank in range(3)]
    assert sorted(item for share in shared for item in share) == items


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc_folder(tmp_path_factory.mktemp("pictures") / "data")


def settings(root: Path, folder: Path, *others: str) -> list[str]:
    return [*TINY, f"data.root={root}", f"run.dir={folder}", "run.device=cpu", *others]


def torchrun_command(processes: int, *arguments: str, command: tuple[str, ...] = ("train", "voc_folder")) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, "-m", "svf_fast.train", *command, *arguments]


def torchrun(
    processes: int, *arguments: str, command: tuple[str, ...] = ("train", "voc_folder")
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        torchrun_command(processes, *arguments, command=command),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_train_as_one(tmp_path: Path, pictures: Path) -> None:
    """Dropout active, validation of novel and base classes divided."""
    seen = "validation.training_episodes=5"
    one, two = tmp_path / "one", tmp_path / "two"
    train(load_config("voc_folder", settings(pictures, one, seen)), resume=False, console=QUIET)
    done = torchrun(2, *settings(pictures, two, seen))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished after step 6") == 1
    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-5)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-3, atol=1e-5)
    assert scores(two)[0].keys() == scores(one)[0].keys() >= {"training_miou"}
    evaluated = [evaluate_weights(folder, pictures) for folder in (one, two)]
    np.testing.assert_allclose(*evaluated, atol=0.02)
    # the same weights: what two processes add up is exactly what one counts
    assert [score["miou"] for score in scores(two)][-1] == evaluate_weights(two, pictures)


@pytest.mark.launch
def test_a_run_goes_on_in_another_number_of_processes(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun by one process, gone on with by two, whose second one gets a SIGTERM, ended by one again."""
    steps = ("schedule.iterations=120", "validation.every_iterations=120")
    whole, mixed = tmp_path / "whole", tmp_path / "mixed"
    train(load_config("voc_folder", settings(pictures, whole, *steps)), resume=False, console=QUIET)
    config = load_config("voc_folder", settings(pictures, mixed, *steps))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert not train(config, resume=False, console=QUIET).is_finished
    launched = subprocess.Popen(
        torchrun_command(2, *settings(pictures, mixed, *steps, "--resume")),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while len(losses(mixed)) < 8 and launched.poll() is None:
        time.sleep(0.005)
    children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    said, _ = launched.communicate(timeout=120)
    assert said.count("stopped by SIGTERM") + said.count("stopped by another process") == 1, said
    assert 8 <= len(losses(mixed)) < 120
    assert train(config, resume=True, console=QUIET).is_finished
    np.testing.assert_allclose(losses(mixed), losses(whole), rtol=2e-3)


def test_what_one_process_meets_it_tells_itself() -> None:
    with (
        pytest.raises(ProcessError, match=r"^process 2 of 3: picture.jpg cannot be read$"),
        Processes(2, 3).signed(OSError),
    ):
        raise OSError("picture.jpg cannot be read\nat all")
    with pytest.raises(OSError, match=r"^picture.jpg"), Processes(0, 3).signed(OSError):
        raise OSError("picture.jpg cannot be read")
    with pytest.raises(PeerLost), Processes(2, 3).signed(RuntimeError):
        raise PeerLost("another process of this run has ended")


@pytest.mark.launch
def test_when_a_process_dies_the_first_one_says_so_in_a_sentence(tmp_path: Path, pictures: Path) -> None:
    run = tmp_path / "run"
    endless = ("schedule.iterations=100000", "validation.every_iterations=100000")
    launched = subprocess.Popen(
        torchrun_command(2, *settings(pictures, run, *endless)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while len(losses(run)) < 5 and launched.poll() is None:
        time.sleep(0.02)
    second = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()[-1]
    os.kill(int(second), signal.SIGKILL)
    _, said = launched.communicate(timeout=120)
    own = [line for line in said.splitlines() if line.startswith("svf-fast: ")]
    assert len(own) == 1, said
    assert re.fullmatch(
        rf"svf-fast: another process of this run has ended; .*{LAST} holds the run after step \d+", own[0]
    )
    # torchrun's own report has the traceback of its command, ours has none
    assert "svf_fast/train" not in said


@pytest.mark.launch
def test_two_processes_evaluate_as_one(tmp_path: Path, pictures: Path) -> None:
    train(load_config("voc_folder", settings(pictures, tmp_path / "run")), resume=False, console=QUIET)
    asked = ["eval", str(tmp_path / "run" / LAST), "--episodes", "7", "--seed", "1", "2", "run.device=cpu"]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert main([*asked, "--out", str(one)]) == 0
    done = torchrun(2, "--out", str(two), command=tuple(asked))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("7 episodes, in %") == 1
    assert json.loads(two.read_text())["per_seed"] == json.loads(one.read_text())["per_seed"]


def evaluate_weights(folder: Path, root: Path) -> float:
    from svf_fast.train.judging import evaluate

    return evaluate(folder / LAST, console=QUIET).scores[0].miou


@pytest.mark.launch
def test_what_one_process_alone_cannot_do_is_told_and_ends_all(tmp_path: Path, pictures: Path) -> None:
    """The second process looks for its pictures where there are none; the first one would wait for it."""
    script = tmp_path / "lone.py"
    script.write_text(
        "import os, sys\nfrom svf_fast.train.cli import main\n"
        "second = os.environ['RANK'] == '1'\n"
        "sys.exit(main([a.replace('DATA', '/nowhere' if second else os.environ['DATA']) for a in sys.argv[1:]]))\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    given = settings(Path("DATA"), tmp_path / "run")
    found = subprocess.run(
        [sys.executable, *launcher, "train", "voc_folder", *given],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DATA": str(pictures)},
    )
    assert found.returncode != 0
    assert found.stderr.count("process 1 of 2: data root /nowhere is not a folder") == 1
    assert not (tmp_path / "run").exists()


def test_only_the_statistics_that_follow_the_batch_are_shared_over_gpus() -> None:
    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.follows, self.stays = nn.Sequential(nn.BatchNorm2d(4)), nn.BatchNorm2d(4)

        def train(self, mode: bool = True) -> Method:
            super().train(mode)
            self.stays.eval()
            return self

    method = Method()
    before = dict(method.named_parameters())
    share_statistics(method, Processes(0, 2), 1, torch.device("cuda"))
    assert [type(module) for module in (method.follows[0], method.stays)] == [nn.SyncBatchNorm, nn.BatchNorm2d]
    assert all(parameter is before[name] for name, parameter in method.named_parameters())
    with pytest.raises(ConfigError, match="2 processes share its statistics on GPUs only: use one process"):
        share_statistics(method, Processes(0, 2), 1, torch.device("cpu"))


def test_statistics_of_a_part_are_refused(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch_norm = ("tuning.strategy=freeze", "method.bn_mode=train", "run.accumulate=2")
    assert main(["train", "voc_folder", *settings(pictures, tmp_path / "run", *batch_norm)]) == 2
    assert "BatchNorm follows the batch here" in capsys.readouterr().err
