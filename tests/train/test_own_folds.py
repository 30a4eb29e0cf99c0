"""Any folder in VOC layout with folds of its own, as a user trains on it: settings, runs, evaluation, and the one line that
a mistake gets."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from run_fakes import TINY
from voc_folders import draw, line, write_label, write_picture

from svf_fast.train.assembly import base_training_pictures, fold_in
from svf_fast.train.checkpoint import load_checkpoint
from svf_fast.train.cli import main
from svf_fast.train.config import BaseConfig, DataConfig, config_from_plain
from svf_fast.train.data.fold_index import write_fold_index
from svf_fast.train.data.folds import Fold
from svf_fast.train.data.voc import VOCFolder

OWN = ("data.folds=folds.json", "data.train_list=lists/train.txt", "data.val_list=lists/val.txt")
SHORT = (*TINY, "schedule.iterations=2", "validation.every_iterations=2")
BASE = (
    "data.size=33",
    "data.batch=2",
    "data.workers=0",
    "backbone.stem=plain",
    "backbone.blocks=1,1,1,1",
    "backbone.width=4",
    "schedule.epochs=null",
    "schedule.iterations=2",
    "validation.every_epochs=null",
    "validation.every_iterations=2",
    "run.threads=1",
)


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes in three folds of two, one object a picture, one list for training and one for validation; in the last
    picture of each list class 1 lies beside class 3."""
    root = tmp_path_factory.mktemp("data") / "flowers"
    names = ["rose", "tulip", "lily", "aster", "iris", "poppy"]
    (root / "lists").mkdir(parents=True)
    (root / "classes.txt").write_text("".join(f"{number} {name}\n" for number, name in enumerate(names, start=1)))
    (root / "folds.json").write_text('{"novel": [[1, 2], [3, 4], [6, 5]]}')
    places = np.random.default_rng(0)
    for part in ("train", "val"):
        shown = {
            f"{part}_{names[c - 1]}{i}": [(c, *places.integers(0, 14, 2), 48, 48)] for c in range(1, 7) for i in "ab"
        }
        shown[f"{part}_both"] = [(3, 0, 0, 48, 48), (1, 50, 50, 14, 20)]
        for seed, (name, rectangles) in enumerate(shown.items()):
            write_picture(root / "JPEGImages" / f"{name}.jpg", 64, 72, seed)
            write_label(root / "SegmentationClass" / f"{name}.png", draw(64, 72, rectangles))
        (root / "lists" / f"{part}.txt").write_text("".join(line(name) + "\n" for name in shown))
    return root


def train(root: Path, folder: Path, *more: str) -> int:
    return main(["train", "voc_folder", f"data.root={root}", f"run.dir={folder}", *OWN, *SHORT, *more])


def train_base(root: Path, folder: Path, *more: str) -> int:
    return main(["train-base", "pascal_base_resnet50", f"data.root={root}", f"run.dir={folder}", *OWN, *BASE, *more])


def test_a_run_on_own_folds_trains_and_is_evaluated(
    flowers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(flowers, tmp_path / "run", "data.fold=2") == 0
    state = load_checkpoint(tmp_path / "run/last.pt").state
    assert (state.iteration, state.novel, state.base) == (2, (5, 6), (1, 2, 3, 4))
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run/last.pt")]) == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[2:4]] == ["iris", "poppy"]

    # the folder moved, and then its folds changed: the model would be asked for what it was trained on
    moved = shutil.copytree(flowers, tmp_path / "moved")
    assert main(["eval", str(tmp_path / "run/last.pt"), f"data.root={moved}"]) == 0
    (moved / "folds.json").write_text('{"novel": [[5, 6], [3], [1, 4]]}')
    assert main(["eval", str(tmp_path / "run/last.pt"), f"data.root={moved}"]) == 2
    assert capsys.readouterr().err.endswith(
        "last.pt was trained on a fold with the novel classes [5, 6] and the base classes [1, 2, 3, 4], but "
        "data.folds=folds.json now has [1, 4] and [2, 3, 5, 6]\n"
    )


def test_a_base_learner_of_own_folds_serves_the_same_fold_only(
    flowers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_base(flowers, tmp_path / "base", "data.fold=1", "data.crop_keep=any") == 0
    assert load_checkpoint(tmp_path / "base/last.pt").method["cls.4.weight"].shape[0] == 1 + 4
    bam = [*BASE, "data.folds=folds.json", "method.head_width=8", f"method.base_learner={tmp_path / 'base/last.pt'}"]
    bam += [f"data.root={flowers}", "validation.episodes=2"]
    capsys.readouterr()
    assert main(["train", "pascal_bam_resnet50", *bam, f"run.dir={tmp_path / 'other'}", "data.fold=0"]) == 2
    assert "is a base learner of the classes [1, 2, 5, 6], expected one of [3, 4, 5, 6]" in capsys.readouterr().err
    assert main(["train", "pascal_bam_resnet50", *bam, f"run.dir={tmp_path / 'same'}", "data.fold=1"]) == 0


def test_a_run_may_read_fold_indexes(flowers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = shutil.copytree(flowers, tmp_path / "data")
    fold, folder = Fold((1, 2), (3, 4, 5, 6)), VOCFolder(root)
    for name, part, ids, dropped in (("train", "train", fold.base, fold.novel), ("val", "val", fold.novel, ())):
        split = folder.split(f"lists/{part}.txt", ids, drop_images_with=dropped)
        write_fold_index(root / f"folds/fold0_{name}.json", split, rule=None, fold=None, dropped=dropped)
    indexes = ("data.train_list=folds/fold{fold}_train.json", "data.val_list=folds/fold{fold}_val.json")
    assert train(root, tmp_path / "indexes", *indexes) == 0
    assert train(root, tmp_path / "lists") == 0
    found, expected = (load_checkpoint(tmp_path / name / "last.pt").state for name in ("indexes", "lists"))
    assert found == expected
    capsys.readouterr()
    assert train(root, tmp_path / "new", *indexes, "data.drop_novel_images=false") == 2
    assert "left out that show any of [1, 2]; expected pictures left out that show any of []" in capsys.readouterr().err
    assert train_base(root, tmp_path / "new", indexes[0]) == 2
    assert "is a fold index, but every picture of a list is asked for" in capsys.readouterr().err


def test_the_check_of_a_lists_files_is_shown_where_there_is_no_terminal_too(
    flowers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svf_fast.train.progress.PLAIN_LINE_EVERY_S", 0)
    plain = {"method": {"name": "pspnet"}, "schedule": {}, "validation": {}}
    config = config_from_plain(plain, [f"data.root={flowers}", *OWN, *BASE], BaseConfig)
    said = io.StringIO()
    pictures = base_training_pictures(config, console=Console(file=said))
    assert said.getvalue() == f"checking lists/train.txt {len(pictures)}/{len(pictures)}  0:00:00 left\n"


@pytest.mark.parametrize(("base_filter", "stems"), [(False, 13), (True, 8)])
def test_a_base_learner_can_leave_out_pictures_with_novel_objects(flowers: Path, base_filter: bool, stems: int) -> None:
    settings = [f"data.root={flowers}", *OWN, *BASE, f"data.base_filter={base_filter}"]
    plain = {"method": {"name": "pspnet"}, "schedule": {}, "validation": {}}
    pictures = base_training_pictures(config_from_plain(plain, settings, BaseConfig), console=Console(quiet=True))
    assert len(pictures) == stems
    shown = [entry.present_classes for entry in pictures.split.entries]
    assert any(c in (1, 2) for classes in shown for c in classes) is not base_filter


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["data.fold=3"], "data.fold is 3, expected 0 to 2: the folds of {root}/folds.json"),
        (["data.folds=none.json"], "{root}/none.json does not exist"),
        (
            ["data.folds=pascal"],
            "data.folds is pascal, a rule for the classes 1 to 20, but {root}/classes.txt lists 6 classes "
            "([1, 2, 3, 4, 5, 6]): give another rule, or a JSON file of own folds",
        ),
        (["data.folds=pascl"], "data.folds is 'pascl', expected pascal, coco, coco_contiguous, or a .json file of own"),
        (["data.fold=-1"], "data.fold is -1, expected 0 or more"),
        (["data.folds=coco", "data.fold=4"], "data.fold is 4, expected 0 to 3"),
        (["data.root=null"], "data.root is not set, but data.folds=folds.json is a file of the data's folder: give it"),
    ],
)
def test_a_mistake_with_folds_gets_one_line_and_no_run(
    flowers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], sentence: str
) -> None:
    assert train(flowers, tmp_path / "run", *settings) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("svf-fast: " + sentence.replace("{root}", str(flowers)))
    assert printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_named_folds_need_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert fold_in(DataConfig(folds="coco", fold=1)).novel == tuple(range(2, 81, 4))
    assert main(["summary", "voc_folder", "data.folds=coco", *TINY]) == 0
    assert main(["summary", "voc_folder", "data.folds=folds.json", "method.name=pfenet", *TINY]) == 0


def test_the_folds_of_a_finished_model_stay(flowers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(flowers, tmp_path / "run") == 0
    for change in ("data.folds=pascal", "data.fold=1"):
        assert main(["eval", str(tmp_path / "run/last.pt"), change]) == 2
        assert f"{change} does not apply to a finished model" in capsys.readouterr().err


def test_checkpoints_from_before_there_were_folds_are_of_pascal() -> None:
    settings = {"data": {"fold": 2}, "schedule": {"iterations": 1}, "validation": {"every_iterations": 1}}
    assert fold_in(config_from_plain(json.loads(json.dumps(settings))).data).novel == (11, 12, 13, 14, 15)


def test_a_folder_of_ones_own_is_checked_and_gets_its_censuses(
    flowers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(flowers, tmp_path / "flowers")
    assert main(["prepare", "folder", str(root), "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert "lists/train.txt: " in said
    assert (
        "folds.json, fold 0: novel [1, 2]\n"
        "  lists/train.txt: 9 pictures to train on (8 of them without a novel class), 4 to validate on\n"
    ) in said
    assert "  1 rose: " in said
    assert sorted(path.name for path in (root / "lists").glob("*.json")) == ["train.census.json", "val.census.json"]
    assert VOCFolder(root).census("lists/val.txt") == VOCFolder(flowers).census("lists/val.txt")


def test_everything_that_is_wrong_with_a_folder_is_named_and_nothing_written(
    flowers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(flowers, tmp_path / "flowers")
    (root / "folds.json").write_text('{"novel": [[1], [9]]}')
    for path in sorted((root / "JPEGImages").glob("*"))[:2]:
        path.unlink()
    assert main(["prepare", "folder", str(root)]) == 2
    said = capsys.readouterr().err
    assert said.count("does not exist") == 2
    assert "folds.json: fold 1 has the class 9" in said
    assert list((root / "lists").glob("*.json")) == []
