"""`svf-fast reproduce` as a user meets it: two small runs, stopped and gone on with, collected and drawn; and what it refuses."""

import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest
from reproduce_fakes import write_log
from run_fakes import TINY, write_voc_folder

from svf_fast.train.cli import main
from svf_fast.train.files import locked
from svf_fast.train.reproduce.outcomes import last_line


def arguments(out: Path, root: Path, *more: str) -> list[str]:
    asked = ["--table", "5", "--rows", "frozen", "svf", "--folds", "0", "--out", str(out)]
    # the second run is long enough to be met on its way
    length = ["schedule.iterations=120", "frozen.schedule.iterations=6", "validation.every_iterations=60"]
    return ["reproduce", *asked, "--dataset", f"voc_folder:{root}", *more, *TINY, *length]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc_folder(tmp_path_factory.mktemp("data"))


def signal_at_step(out: Path, row: str, step: int, is_over: threading.Event) -> None:
    """SIGTERM to this process as soon as the row's run has done so many steps, unless the call is over before."""
    while not is_over.wait(0.01):
        for log in out.glob(f"runs/*-{row}-*/log.jsonl"):
            last = last_line(log)
            if last is not None and last["iteration"] >= step:
                os.kill(os.getpid(), signal.SIGTERM)
                return


@pytest.mark.slow
def test_two_runs_stopped_and_gone_on_with(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    is_over = threading.Event()
    watch = threading.Thread(target=signal_at_step, args=(out, "svf", 1, is_over))
    watch.start()
    status = main(arguments(out, root))
    is_over.set()
    watch.join()
    assert status == 1
    told = capsys.readouterr().out
    assert "stopped by SIGTERM: 1 of 2 done; the same command goes on" in told
    assert re.search(r"\+ SVF .*step \d+ of 120", told), told
    (frozen,) = out.glob("runs/*-frozen-*/log.jsonl")
    written_ns = frozen.stat().st_mtime_ns

    assert main([*arguments(out, root), "--figure", "6"]) == 0
    assert frozen.stat().st_mtime_ns == written_ns
    table = json.loads((out / "table5.json").read_text(encoding="utf-8"))
    assert [row["mean"]["status"] for row in table["blocks"][0]["rows"]] == ["", ""]
    assert (out / "figures" / "fold0-seed321" / "figure6.pdf").is_file()
    assert "figure6.png" in capsys.readouterr().out

    (out / "table5.md").unlink()
    assert main([*arguments(out, root), "--no-run"]) == 0
    assert "rank, here" in (out / "table5.md").read_text(encoding="utf-8")


def test_a_dry_run_tells_every_run_and_writes_nothing(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "out", root, "--dry-run")) == 0
    told = capsys.readouterr().out
    assert "pascal+resnet50+baseline+svf  " in told
    assert "120 steps, under 0.01 GPU hours, 1.5 GB" in told
    assert "2 runs, 2 of them not finished" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ([], "--table or --figure is missing"),
        (["--table", "5", "--rows", "sfv"], "no table asked for has a row sfv: did you mean svf?"),
        (["--table", "11"], "invalid choice: '11'"),
        (["--table", "5", "--dataset", "shapes"], "did you mean shapes5i?"),
        (["--table", "5", "--folds", "4"], "invalid choice: 4"),
        (["--table", "5", "--jobs", "0"], "--jobs is 0, expected 1 or more"),
        (["--table", "5", "data.fold=1"], "data.fold is what --folds says"),
        (["--table", "5"], "data.root is not set for pascal+resnet50+baseline+frozen"),
        (["--table", "5", "--no-run"], "holds no reproduction yet"),
    ],
)
def test_what_cannot_be_asked_gets_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[str], sentence: str
) -> None:
    assert main(["reproduce", "--out", str(tmp_path / "out"), *asked]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def begun(out: Path, dataset: str) -> None:
    out.mkdir()
    (out / "reproduce.json").write_text(json.dumps({"dataset": dataset}))


def test_a_folder_of_other_data_is_refused(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(tmp_path / "out", "shapes5i")
    for more in ([], ["--no-run"]):
        assert main(arguments(tmp_path / "out", root, *more)) == 2
        assert "holds runs on shapes5i, expected voc_folder" in capsys.readouterr().err


def test_two_calls_on_one_folder_are_refused(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(tmp_path / "out", f"voc_folder:{root}")
    with locked(tmp_path / "out"):
        assert main(arguments(tmp_path / "out", root)) == 1
    assert "another svf-fast reproduce" in capsys.readouterr().err


def test_runs_that_are_there_are_collected_and_a_figure_that_lacks_one_is_not_drawn(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    begun(out, f"voc_folder:{root}")
    main(arguments(out, root, "--dry-run"))
    name = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("pascal-resnet50-baseline-frozen")
    )
    write_log(out / "runs" / name, (6, 0.25, 0.5), steps=6)
    assert main([*arguments(out, root, "--no-run"), "--figure", "6"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"baseline† +- +65.07 +25.00", told)
    assert re.search(r"\+ SVF .*not run", told)
    assert "figure 6, fold 0, seed 321: not drawn, not finished: pascal-resnet50-baseline-svf" in told
