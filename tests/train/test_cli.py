"""The command line on a small folder of pictures: what each command prints, and the one line and the exit status that
every mistake gets."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_fakes import TINY, stop_after, write_voc_folder

from svf_fast.train.checkpoint import Checkpoint, load_checkpoint
from svf_fast.train.cli import main
from svf_fast.train.journal import read_journal
from svf_fast.train.score_sheet import score_table

STRATEGIES = ["freeze", "full", "svf"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc_folder(tmp_path_factory.mktemp("data") / "voc")


def arguments(pictures: Path, folder: Path, *more: str) -> list[str]:
    return ["train", "voc_folder", f"data.root={pictures}", f"run.dir={folder}", *TINY, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "freeze"
    assert main(arguments(pictures, folder, "tuning.strategy=freeze")) == 0
    return folder


def require_equal_weights(folder: Path, expected: Path) -> None:
    found, wanted = load_checkpoint(folder / "last.pt"), load_checkpoint(expected / "last.pt")
    assert found.state == wanted.state
    assert found.method.keys() == wanted.method.keys()
    assert all(torch.equal(found.method[key], tensor) for key, tensor in wanted.method.items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_train_then_eval(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], strategy: str) -> None:
    folder = tmp_path / "run"
    assert main(arguments(pictures, folder, f"tuning.strategy={strategy}")) == 0
    printed = capsys.readouterr().out
    assert "finished after step 6; best validation mIoU" in printed.splitlines()[-1]
    assert sorted(path.name for path in folder.iterdir()) == ["best.pt", "config.yaml", "last.pt", "log.jsonl"]
    trained = read_journal(folder / "log.jsonl")[0]["trainable"]
    tuned = {"freeze": set(), "full": {"backbone"}, "svf": {"singular_values"}}[strategy]
    assert set(trained) == {"head"} | tuned

    # the checkpoint alone gives back the scores of the run's own validation, of the model and not of a fresh one
    (tmp_path / "elsewhere").mkdir()
    moved = (folder / "last.pt").rename(tmp_path / "elsewhere" / "model.pt")
    validation = read_journal(folder / "log.jsonl")[-2]
    assert main(["eval", str(moved)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{moved}: after step 6, 4 episodes, in %"
    assert lines[2].split() == ["kind", "1", f"{100 * validation['class_iou']['kind 1']:.2f}"]
    assert ["mIoU", f"{100 * validation['miou']:.2f}"] in [line.split() for line in lines]
    assert ["FB-IoU", f"{100 * validation['fb_iou']:.2f}"] in [line.split() for line in lines]


def test_eval_takes_seeds_episodes_and_shots(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--seed", "1", "2", "3", "--episodes", "6", "--shots", "2"]
    assert main(["eval", str(finished / "best.pt"), *asked, "data.workers=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("6 episodes, in %")
    assert lines[1].split() == ["seed", "1", "seed", "2", "seed", "3"]
    assert [line.split()[0] for line in lines[2:10]] == ["kind"] * 5 + ["mIoU", "FB-IoU", "foreground"]
    assert all("mean" in line and "±" in line for line in lines[2:10])
    assert lines[10].endswith("counted as 0 there: kind 3, kind 4, kind 5")
    assert lines[11] == "±: sample standard deviation over the seeds (n - 1)"


def test_validation_in_training_follows_its_settings_as_eval_does(tmp_path: Path, pictures: Path) -> None:
    settings = ["tuning.strategy=freeze", "validation.order=list", "validation.batch=3"]
    assert main(arguments(pictures, tmp_path / "run", *settings)) == 0
    assert main(["eval", str(tmp_path / "run" / "last.pt"), "--out", str(tmp_path / "scores.json")]) == 0
    sheet = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    validation = read_journal(tmp_path / "run" / "log.jsonl")[-2]
    assert sheet["mean"]["figures"] == {key: validation[key] for key in ("miou", "fb_iou", "foreground_iou")}
    # the list's first four pictures are of class 1
    assert [row["episodes"] for row in sheet["per_seed"][0]["classes"]] == [4, 0, 0, 0, 0]
    assert main(arguments(pictures, tmp_path / "run", *settings[:2], "validation.batch=1", "--resume")) == 0


def test_eval_writes_what_it_shows_under_the_five_seeds(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, checkpoint = tmp_path / "scores.json", finished / "best.pt"
    asked = ["--five-seeds", "--episodes", "3", "--out", str(path), "validation.batch=2", "validation.order=list"]
    assert main(["eval", str(checkpoint), *asked]) == 0
    sheet = json.loads(path.read_text(encoding="utf-8"))
    assert [scores["seed"] for scores in sheet["per_seed"]] == [510, 365, 382, 322, 988]
    assert capsys.readouterr().out.splitlines()[1:] == score_table(sheet).splitlines()
    assert sheet["checkpoint"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert (sheet["protocol"]["order"], sheet["protocol"]["batch"]) == ("list", 2)
    # the list's first three pictures are of class 1
    assert [row["episodes"] for row in sheet["per_seed"][0]["classes"]] == [3, 0, 0, 0, 0]


def test_a_checkpoint_replaced_while_it_is_read_is_refused(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(finished / "last.pt", tmp_path))

    def read_and_replaced(given: str | Path) -> Checkpoint:
        checkpoint = load_checkpoint(given)
        path.write_bytes(path.read_bytes() + b"a later step")
        return checkpoint

    monkeypatch.setattr("svf_fast.train.judging.load_checkpoint", read_and_replaced)
    assert main(["eval", str(path)]) == 2
    assert f"{path} was replaced while it was read" in capsys.readouterr().err


def test_a_run_goes_on_from_its_own_config_file(tmp_path: Path, finished: Path) -> None:
    copy = tmp_path / "again"
    assert main(["train", str(finished / "config.yaml"), f"run.dir={copy}"]) == 0
    require_equal_weights(copy, finished)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_stopped_by_a_signal_is_resumed_to_the_same_weights(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    tuned = f"tuning.strategy={strategy}"
    assert main(arguments(pictures, tmp_path / "whole", tuned)) == 0
    stop_after(monkeypatch, 3)
    assert main(arguments(pictures, tmp_path / "stopped", tuned)) == 1
    assert "stopped by SIGTERM after step 3 of 6" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(arguments(pictures, tmp_path / "stopped", tuned, "--resume", "data.workers=1")) == 0
    require_equal_weights(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize(
    "method",
    [
        ["method.name=pfenet", "method.bins=1.0,0.5", "tuning.strategy=svf"],
        ["method.name=pfenet", "method.bn_mode=train", "tuning.strategy=freeze"],  # as in PFENet's own repository
        ["method.shot_reduction=sum", "data.shots=2", "method.recompute=supports"],
    ],
)
def test_a_methods_options_reach_it_and_its_run_is_resumed_to_the_same_weights(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, method: list[str]
) -> None:
    assert main(arguments(pictures, tmp_path / "whole", *method)) == 0
    stop_after(monkeypatch, 3)
    assert main(arguments(pictures, tmp_path / "stopped", *method)) == 1
    monkeypatch.undo()
    assert main(arguments(pictures, tmp_path / "stopped", *method, "--resume")) == 0
    require_equal_weights(tmp_path / "stopped", tmp_path / "whole")
    steps = [line for line in read_journal(tmp_path / "whole" / "log.jsonl") if line["kind"] == "step"]
    assert set(steps[0]["parts"]) == ({"main", "aux"} if "method.name=pfenet" in method else {"main"})
    counted = load_checkpoint(tmp_path / "whole" / "last.pt").method["layer0.1.num_batches_tracked"]
    # BatchNorm that follows training sees the queries and then the supports of each of six steps
    assert counted == (12 if "method.bn_mode=train" in method else 0)


def test_a_run_killed_is_resumed_to_the_same_weights(tmp_path: Path, pictures: Path, finished: Path) -> None:
    folder = tmp_path / "killed"
    command = arguments(pictures, folder, "tuning.strategy=freeze")
    process = subprocess.Popen(
        [sys.executable, "-m", "svf_fast.train", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    patience_s = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < patience_s:
        if len(read_journal(folder / "log.jsonl")) > 3:  # the beginning and three steps
            break
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert (folder / "log.jsonl").exists()
    assert main([*command, "--resume"]) == 0
    require_equal_weights(folder, finished)
    steps = [line["iteration"] for line in read_journal(folder / "log.jsonl") if line["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_resume_begins_a_run_that_has_no_checkpoint_yet(
    tmp_path: Path, pictures: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(pictures, tmp_path / "new", "tuning.strategy=freeze", "--resume")) == 0
    assert f"no checkpoint in {tmp_path / 'new'} yet: the run begins" in capsys.readouterr().out
    require_equal_weights(tmp_path / "new", finished)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_summary_says_what_trains(capsys: pytest.CaptureFixture[str], strategy: str) -> None:
    assert main(["summary", "voc_folder", *TINY, f"tuning.strategy={strategy}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  head: ") and line.endswith("rate 0.02") for line in lines)
    groups = [line.split(": ")[0].strip() for line in lines if " trainable parameters, rate " in line]
    assert groups == ["head", *{"freeze": [], "full": ["backbone"], "svf": ["singular_values"]}[strategy]]
    rate = {"freeze": "rate 0.02", "full": "rate 0.002", "svf": "rate 0.5"}[strategy]
    assert lines[-1].endswith(rate)


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    listed = [line.split()[0] for line in printed.splitlines() if line.startswith("    ")]
    assert {"demo", "train-base", "train", "eval", "summary"} <= set(listed)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "argument COMMAND: invalid choice: 'trian'"),
        (["train"], "the following arguments are required: CONFIG"),
        (["train", "voc_folder", "--fast"], "unrecognized arguments: --fast"),
        (["train", "voc_folder", "more"], "unrecognized arguments: more"),
        (["demo", "data.root=x"], "demo takes no key=value arguments, found data.root=x"),
        (
            ["train", "voc_foldr"],
            "no configuration file voc_foldr, and no shipped one of that name: did you mean voc_folder?",
        ),
        (["train", "voc_folder", "run.dir=out"], "data.root is not set: give the data's folder"),
        (["train", "voc_folder", "data.root=x"], "run.dir is not set: give the run's folder"),
        (["train", "voc_folder", "run.dir=out", "data.root=nowhere"], "is not a folder"),
        (["train", "voc_folder", "run.dir=out", "data.root=x", "tuning.stratgy=svf"], "did you mean tuning.strategy?"),
        (["train", "voc_folder", "run.dir=out", "data.root={data}", "data.fold=7"], "data.fold is 7, expected 0 to 3"),
        (["train", "voc_folder", "run.dir=out", "data.root={data}", "data.fold=2"], "fold2_train.txt does not exist"),
        (["train", "voc_folder", "run.dir=out", "data.root={data}", "data.batch=99"], "data.batch is 99, but"),
        (["train", "voc_folder", "run.dir=out", "data.root={data}", "data.shots=9"], "9-shot episodes need 9"),
        (
            ["train", "voc_folder", "run.dir=out", "data.root={data}", "backbone.weights=no.pth"],
            "no.pth",
        ),
        (
            ["train", "voc_folder", "run.dir=out", "data.root={data}", "run.device=cuda:99"],
            "run.device is cuda:99, but PyTorch",
        ),
        (["train", "voc_folder", "run.dir={data}/classes.txt", "data.root={data}"], "classes.txt, which is a file"),
        (["train", "voc_folder", "run.dir={run}", "data.root={data}"], "already holds a run: add --resume"),
        (
            ["train", "voc_folder", "run.dir={run}", "data.root={data}", "--resume"],
            "cannot be resumed with other settings",
        ),
        (["eval", "nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["eval", "{data}/classes.txt"], "is no readable checkpoint"),
        (["eval", "{cut}"], "is no readable checkpoint (cut short"),
        (["eval", "{run}/last.pt", "--seed", "x"], "'x' is not a whole number from 0"),
        (["eval", "{run}/last.pt", "--seed", "1", "2", "1"], "the seeds are 1, 2, 1; expected each once"),
        (
            ["eval", "{run}/last.pt", "--seed", "1", "--five-seeds"],
            "argument --five-seeds: not allowed with argument --seed",
        ),
        (["eval", "{run}/last.pt", "--out", "nowhere/x.json"], "nowhere/x.json cannot be written: nowhere is not a"),
        (["eval", "{run}/last.pt", "validation.batch=0"], "validation.batch is 0, expected 1 or more"),
        (
            ["eval", "{run}/last.pt", "validation.order=random"],
            "validation.order is 'random', expected one of 'permuted', 'list'",
        ),
        (["eval", "{run}/last.pt", "--episodes", "0"], "validation.episodes is 0, expected 1 to 1,000,000"),
        (["eval", "{run}/last.pt", "--shots", "few"], "validation.shots is 'few' (str), expected a whole number"),
        (["eval", "{run}/last.pt", "method.head_width=4"], "method.head_width=4 does not apply to a finished model"),
        (["eval", "{run}/last.pt", "data.root=nowhere"], "is not a folder"),
        (
            ["summary", "voc_folder", "backbone.weights={data}/classes.txt"],
            "is not a complete PyTorch or safetensors file",
        ),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(
    tmp_path: Path,
    pictures: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    cut = tmp_path / "cut.pt"
    cut.write_bytes((finished / "last.pt").read_bytes()[:5000])
    assert main([argument.format(data=pictures, run=finished, cut=cut) for argument in command]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_gets_one_line_and_status_1(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(pictures, tmp_path / "run", "tuning.strategy=freeze", "optimiser.base_lr=1e30")) == 1
    printed = capsys.readouterr().err
    assert "rates are too high" in printed
    assert printed.count("\n") == 1


def test_the_module_and_the_exit_status_of_a_process() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "svf_fast.train", "eval", "nowhere.pt"], capture_output=True, text=True, env=os.environ
    )
    assert (ended.returncode, ended.stderr) == (2, "svf-fast: no checkpoint at nowhere.pt\n")
