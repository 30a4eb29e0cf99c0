"""The demo on a toy scale: it ends with a report, goes on where it stopped, and refuses a folder that is not its own."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from svf_fast.train import demo
from svf_fast.train.checkpoint import RunState
from svf_fast.train.demo import STRATEGIES, DemoSettings, run_demo
from svf_fast.train.engine import Outcome
from svf_fast.train.pretrain import PretrainConfig

pytestmark = pytest.mark.slow

TINY = DemoSettings(
    images=250,
    pretraining=PretrainConfig(steps=2, batch=4, crop=32),
    width=4,
    blocks=(1, 1, 1, 1),
    size=33,
    batch=2,
    head_width=8,
    iterations=4,
    validate_every=2,
    validation_episodes=10,
    scale_range=(0.2, 0.3),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output, told = tmp_path_factory.mktemp("runs") / "demo", io.StringIO()
    assert run_demo(output, settings=TINY, console=Console(file=told)) == 0
    return output, told.getvalue()


def test_it_ends_with_a_report_and_says_where(finished: tuple[Path, str]) -> None:
    output, told = finished
    assert str(output / "report.html") in told
    assert "novel-class mIoU at the end" in told
    assert (output / "report.html").stat().st_size > 50_000


def test_the_three_runs_differ_in_what_trains_and_in_what_is_kept(finished: tuple[Path, str]) -> None:
    results = json.loads((finished[0] / "results.json").read_text())
    freeze, full, svf = results["strategies"]
    assert [run["name"] for run in results["strategies"]] == list(STRATEGIES)
    assert freeze["backbone_parameters"] == 0 < svf["backbone_parameters"] < full["backbone_parameters"]
    assert freeze["head_parameters"] == full["head_parameters"] == svf["head_parameters"]
    assert freeze["kept_bytes"] < svf["kept_bytes"] < results["algorithm1_kept_bytes"]
    assert [len(run["losses"]) for run in results["strategies"]] == [4, 4, 4]
    assert [[point["step"] for point in run["curve"]] for run in results["strategies"]] == [[2, 4]] * 3
    assert {spectrum["kernel"] for spectrum in results["spectra"]} == {"3×3", "1×1"}
    assert all(value["before"] != value["after"] for value in results["moved"])


def test_what_is_finished_is_not_done_again(finished: tuple[Path, str]) -> None:
    output, _ = finished
    before = json.loads((output / "results.json").read_text())
    stamps = {path: path.stat().st_mtime_ns for path in [output / "backbone.safetensors", *output.glob("*/best.pt")]}
    shutil.rmtree(output / "svf")
    assert run_demo(output, settings=TINY, console=Console(file=io.StringIO())) == 0
    kept = [path for path in stamps if path.parent.name != "svf"]
    assert len(kept) == 3
    assert all(path.stat().st_mtime_ns == stamps[path] for path in kept)
    after = json.loads((output / "results.json").read_text())
    assert [run["final_miou"] for run in after["strategies"]] == [run["final_miou"] for run in before["strategies"]]
    assert after["strategies"][2]["losses"] == before["strategies"][2]["losses"]


def test_a_stopped_run_ends_the_demo_with_a_hint(finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "train", lambda *_, **__: Outcome(False, RunState(), "stopped by SIGINT"))
    told = io.StringIO()
    assert run_demo(finished[0], settings=TINY, console=Console(file=told)) == 1
    assert "goes on from there" in told.getvalue()


def test_a_folder_with_other_settings_is_refused(finished: tuple[Path, str]) -> None:
    with pytest.raises(ValueError, match="a demo with other settings"):
        run_demo(finished[0], settings=replace(TINY, seed=5), console=Console(file=io.StringIO()))


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no demo's folder"):
        run_demo(tmp_path, settings=TINY, console=Console(file=io.StringIO()))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
