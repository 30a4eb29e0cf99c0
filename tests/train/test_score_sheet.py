"""What an evaluation leaves behind: mean and spread over its seeds, the JSON file and the table, which say the same."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from svf_fast.train.config import config_from_plain
from svf_fast.train.generalised import GeneralisedScores
from svf_fast.train.judging import Evaluation, GeneralisedEvaluation, Origin
from svf_fast.train.score_sheet import require_place, score_sheet, score_table, write_score_sheet
from svf_fast.train.validation import BranchScores, Scores

CONFIG = config_from_plain(
    {
        "data": {"root": "/data/coco", "shots": 5},
        "schedule": {"iterations": 1},
        "validation": {"every_iterations": 1, "episodes": 8, "order": "list", "batch": 4},
    }
)
ORIGIN = Origin(
    Path("/runs/best.pt"),
    "ab" * 32,
    17,
    CONFIG,
    torch.device("cpu"),
    Path("/data/coco/lists/val.txt"),
    "cd" * 16,
)
NAMES = {2: "bicycle", 6: "bus", 1: "person"}


def scores(seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    return Scores(
        miou=rng.random(),
        fb_iou=rng.random(),
        foreground_iou=rng.random(),
        class_iou={2: rng.random(), 6: 0.0},
        class_episodes={2: 8, 6: 0},
        episodes=8,
        seed=seed,
        branches=BranchScores(rng.random(), rng.random(), rng.random()),
    )


@pytest.fixture
def evaluation() -> Evaluation:
    return Evaluation(ORIGIN, tuple(scores(seed) for seed in (510, 365, 382)), NAMES)


def test_mean_and_spread_are_over_the_seeds(evaluation: Evaluation) -> None:
    sheet = score_sheet(evaluation)
    mious = [score.miou for score in evaluation.scores]
    assert sheet["mean"]["figures"]["miou"] == pytest.approx(np.mean(mious))
    assert sheet["spread"]["figures"]["miou"] == pytest.approx(np.std(mious, ddof=1))
    assert sheet["spread_is"].startswith("sample standard deviation")
    bicycle = [score.class_iou[2] for score in evaluation.scores]
    assert [row["iou"] for row in sheet["mean"]["classes"]] == pytest.approx([np.mean(bicycle), 0])
    assert [row["iou"] for row in sheet["spread"]["classes"]] == pytest.approx([np.std(bicycle, ddof=1), 0])
    assert set(sheet["mean"]["figures"]) == {
        *("miou", "fb_iou", "foreground_iou"),
        *("meta_miou", "meta_fb_iou", "base_miou"),
    }


def test_a_sheet_says_what_was_evaluated_how_and_with_what(evaluation: Evaluation) -> None:
    sheet = score_sheet(evaluation)
    assert sheet["checkpoint"] == {"path": "/runs/best.pt", "sha256": "ab" * 32, "iteration": 17}
    assert sheet["protocol"] == {
        "kind": "novel",
        "seeds": [510, 365, 382],
        "episodes": 8,
        "order": "list",
        "batch": 4,
        "shots": 5,
    }
    assert sheet["data"] == {"root": "/data/coco", "list": "/data/coco/lists/val.txt", "digest": "cd" * 16}
    assert sheet["settings"] == CONFIG.to_plain()
    assert {"PyTorch", "commit", "processor", "svf_fast"} <= set(sheet["machine"])
    assert sheet["machine"]["device"] == "CPU"
    assert sheet["created"].endswith("+00:00")
    assert sheet["per_seed"][1]["seed"] == 365
    assert sheet["per_seed"][1]["classes"][1] == {"id": 6, "name": "bus", "iou": 0.0, "episodes": 0}


def test_the_table_shows_the_sheet(evaluation: Evaluation) -> None:
    lines = score_table(score_sheet(evaluation)).splitlines()
    assert lines[0].split() == ["seed", "510", "seed", "365", "seed", "382"]
    assert [line[:19].strip() for line in lines[1:9]] == [
        *("bicycle", "bus", "mIoU", "FB-IoU", "foreground IoU"),
        *("meta branch mIoU", "meta branch FB-IoU", "base branch mIoU"),
    ]
    mious = [100 * score.miou for score in evaluation.scores]
    shown = [*(f"{miou:.2f}" for miou in mious), "mean", f"{np.mean(mious):.2f}", "±", f"{np.std(mious, ddof=1):.2f}"]
    assert lines[3].split() == ["mIoU", *shown]
    assert lines[9:] == [
        "without an episode under some seed, and counted as 0 there: bus",
        "±: sample standard deviation over the seeds (n - 1)",
    ]


def test_one_seed_has_no_spread(evaluation: Evaluation) -> None:
    sheet = score_sheet(replace(evaluation, scores=evaluation.scores[:1]))
    assert sheet["spread"] is None
    assert sheet["mean"]["figures"] == sheet["per_seed"][0]["figures"]
    assert "±" not in score_table(sheet)


def test_a_generalised_sheet_has_base_classes_that_no_episode_asks_for() -> None:
    found = GeneralisedScores(
        novel_miou=0.1,
        base_miou=0.2,
        miou=0.3,
        fb_iou=0.4,
        class_iou={1: 0.2, 2: 0.1, 6: 0.0},
        class_episodes={2: 3, 6: 5},
        episodes=8,
        seed=1,
    )
    sheet = score_sheet(GeneralisedEvaluation(ORIGIN, (found,), NAMES, tau=0.9, rule="base"))
    assert [sheet["protocol"][key] for key in ("kind", "tau", "rule")] == ["generalised", 0.9, "base"]
    assert [row["episodes"] for row in sheet["per_seed"][0]["classes"]] == [None, 3, 5]
    rows = [line.rsplit(maxsplit=1) for line in score_table(sheet).splitlines()[1:]]
    assert [(name.strip(), value) for name, value in rows] == [
        *(("person", "20.00"), ("bicycle", "10.00"), ("bus", "0.00")),
        *(("mIoU novel", "10.00"), ("mIoU base", "20.00"), ("mIoU all", "30.00"), ("FB-IoU", "40.00")),
    ]


def test_a_file_takes_the_place_of_an_older_one_whole_or_not_at_all(
    tmp_path: Path, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scores.json"
    path.write_text("older")
    sheet = score_sheet(evaluation)
    with monkeypatch.context() as patched:

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_score_sheet(path, sheet)
    assert path.read_text() == "older"
    write_score_sheet(path, sheet)
    assert json.loads(path.read_text(encoding="utf-8")) == sheet
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_place(tmp_path / "scores.json")
    with pytest.raises(ValueError, match="is a folder; expected the name of a JSON file"):
        require_place(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere/scores\.json cannot be written: .*nowhere is not a folder"):
        require_place(tmp_path / "nowhere" / "scores.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as a user who may not write there
    with pytest.raises(ValueError, match=r"scores\.json cannot be written: the folder .* takes no new files"):
        require_place(tmp_path / "scores.json")
