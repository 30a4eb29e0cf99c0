"""VOC 2012 and SBD in every packing become one folder: the field's lists, masks of the better source, indexes of every fold."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from pascal_archives import (
    SMALL_TRAIN,
    SMALL_VAL,
    Files,
    as_folder,
    as_tar,
    below,
    class_of,
    mask,
    small_voc_and_sbd,
    voc_and_sbd,
    voc_mask,
)
from PIL import Image
from rich.console import Console

from svf_fast.train.cli import main
from svf_fast.train.data.base_labels import base_label_values
from svf_fast.train.data.fold_index import read_fold_index
from svf_fast.train.data.folds import fold_of
from svf_fast.train.data.lists import read_classes
from svf_fast.train.data.palette import palette_png
from svf_fast.train.data.reading import read_label
from svf_fast.train.data.voc import VOCFolder
from svf_fast.train.prepare import pascal_masks
from svf_fast.train.prepare.expected import PASCAL, Expected
from svf_fast.train.prepare.pascal import find_inputs, prepare_pascal
from svf_fast.train.prepare.pascal_lists import pascal_lists
from svf_fast.train.prepare.problems import Problems
from svf_fast.train.prepare.workspace import Workspace

LISTS = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "lists"
needs_lists = pytest.mark.skipif(not LISTS.is_dir(), reason="the field's own lists are not on this machine")


def packed(packing: str, voc: Files, sbd: Files, root: Path) -> tuple[Path, Path]:
    """Paths for --voc and --sbd, below the folders that the archives have in front."""
    voc, sbd = below("VOCdevkit/VOC2012", voc), below("benchmark_RELEASE/dataset", sbd)
    if packing == "folders":
        return as_folder(voc, root / "voc"), as_folder(sbd, root / "sbd")
    return as_tar(voc, root / "VOCtrainval.tar"), as_tar(sbd, root / "benchmark.tgz", "w:gz")


def prepare(sources: tuple[Path, Path], out: Path, **options: bool) -> str:
    return prepare_pascal(*sources, out, workers=0, console=Console(quiet=True), **options)


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return packed("folders", *small_voc_and_sbd(), tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def prepared(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "pascal"
    prepare(sources, out, base_labels=True)
    return out


def lines(names: list[str]) -> str:
    return "".join(f"JPEGImages/{name}.jpg SegmentationClassAug/{name}.png\n" for name in names)


@needs_lists
def test_the_rule_gives_the_fields_lists_from_what_the_archives_say(tmp_path: Path) -> None:
    """Archive trees with the membership facts of VOC and SBD: every line of both lists, 5,953 and 1,449, comes out."""
    wanted = {
        n: gzip.decompress((LISTS / f"{n}.txt.gz").read_bytes()).decode() for n in ("voc_sbd_merge_noduplicate", "val")
    }
    train, val = ([Path(line.split()[0]).stem for line in text.splitlines()] for text in wanted.values())
    by_sbd, only_voc = train[:5623], train[5623:]
    voc, sbd = voc_and_sbd(
        main_train=sorted([*by_sbd, "2012_999999"]),
        voc_train=sorted([*only_voc, *by_sbd[::4][:1134]]),
        voc_val=val,
        # the two lists of SBD divide the names in their own way, and hold pictures of VOC's validation
        sbd_train=[*by_sbd[1::2][::-1], *val[:700]],
        sbd_val=[*val[700:900], *by_sbd[::2]],
        size=(6, 8),
    )
    problems = Problems()
    inputs = find_inputs(
        as_tar(below("VOCdevkit/VOC2012", voc), tmp_path / "voc.tar"),
        as_tar(below("benchmark_RELEASE/dataset", sbd), tmp_path / "sbd.tar"),
        problems,
    )
    assert len(problems) == 0
    assert lines([*inputs.lists.train]) == wanted["voc_sbd_merge_noduplicate"]
    assert lines([*inputs.lists.val]) == wanted["val"]
    assert (len(inputs.lists.train), len(inputs.lists.val)) == (5953, 1449)
    assert inputs.lists.notes == ()
    from_voc = {name for name, (source, _) in inputs.masks.items() if source is inputs.voc}
    assert len(from_voc) == 330 + 1134 + 1449


@pytest.mark.parametrize("packing", ["folders", "archives"])
def test_lists_pictures_and_masks(packing: str, tmp_path: Path) -> None:
    voc, sbd = small_voc_and_sbd()
    sources = packed(packing, voc, sbd, tmp_path)
    report = prepare(sources, tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "lists/train.txt").read_text() == lines(SMALL_TRAIN)
    assert (out / "lists/val.txt").read_text() == lines(SMALL_VAL)
    for name in SMALL_TRAIN + SMALL_VAL:
        picture = out / f"JPEGImages/{name}.jpg"
        assert picture.read_bytes() == voc[f"JPEGImages/{name}.jpg"]
        assert picture.stat().st_nlink == (2 if packing == "folders" else 1)
        label = out / f"SegmentationClassAug/{name}.png"
        if f"SegmentationClass/{name}.png" in voc:
            assert label.read_bytes() == voc_mask(class_of(name))
        else:
            np.testing.assert_array_equal(read_label(label), mask(class_of(name)))
    assert read_classes(out / "classes.txt")[20] == "tvmonitor"
    assert sorted(p.name for p in tmp_path.iterdir() if "part" in p.name) == []
    assert re.search(r"out: 20 pictures in lists/train\.txt \(SHA-256 \w{12}…\), 6 pictures in lists/val\.txt", report)
    assert "lists/train.txt has 20 pictures, the published list 5,953" in report


def test_folders_and_archives_give_the_same_folder(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(packed("archives", *small_voc_and_sbd(), tmp_path), out, base_labels=True)
    ours, theirs = tree(out), tree(prepared)
    assert ours.keys() == theirs.keys()
    # the summary says where the files came from
    assert {name for name in ours if ours[name] != theirs[name]} == {"summary.json"}


@pytest.mark.parametrize("fold", range(4))
def test_the_indexes_are_the_splits_of_the_lists(prepared: Path, fold: int) -> None:
    folder, classes = VOCFolder(prepared), fold_of("pascal", fold)
    for kind, part, ids, dropped in (
        ("train", "train", classes.base, ()),
        ("train_trick", "train", classes.base, classes.novel),
        ("val", "val", classes.novel, ()),
    ):
        path = prepared / f"folds/pascal/fold{fold}_{kind}.json"
        if not path.is_file():
            assert f"{path.name} was not written" in " ".join(
                json.loads((prepared / "summary.json").read_text())["notes"]
            )
            continue
        index = read_fold_index(path, prepared, folder.classes, class_ids=ids, drop_images_with=dropped)
        assert index == folder.split(f"lists/{part}.txt", ids, drop_images_with=dropped)
        names = SMALL_TRAIN if part == "train" else SMALL_VAL
        assert [entry.image for entry in index.entries] == [
            f"JPEGImages/{name}.jpg" for name in names if class_of(name) in ids
        ]


def test_base_labels_are_written_as_bams_code_reads_them(prepared: Path) -> None:
    for fold in range(4):
        table = base_label_values(fold_of("pascal", fold).base)
        for part, names in (("train", SMALL_TRAIN), ("val", SMALL_VAL)):
            folder = prepared / f"base_labels/pascal/{part}/{fold}"
            assert sorted(path.stem for path in folder.iterdir()) == sorted(names)
            for name in names:
                label = read_label(prepared / f"SegmentationClassAug/{name}.png")
                np.testing.assert_array_equal(read_label(folder / f"{name}.png"), table[label])


def test_the_summary_says_what_was_made_and_what_differs(prepared: Path) -> None:
    summary = json.loads((prepared / "summary.json").read_text())
    sha256 = hashlib.sha256((prepared / "lists/train.txt").read_bytes()).hexdigest()
    assert summary["lists"]["train"] == {"pictures": 20, "sha256": sha256}
    assert not summary["agrees_with_the_field"]
    assert "lists/val.txt has 6 pictures, the published list 1,449" in summary["mismatches"]
    fold = summary["folds"]["pascal"][1]["train_trick"]
    assert (
        fold["pictures"] == sum(fold["of_class"].values()) == sum(not 6 <= class_of(name) <= 10 for name in SMALL_TRAIN)
    )
    assert summary["versions"]["numpy"] == np.__version__


def test_agreement_with_the_expected_counts_is_said(sources: tuple[Path, Path], tmp_path: Path) -> None:
    report = prepare_pascal(
        *sources, tmp_path / "out", workers=0, console=Console(quiet=True), expected=Expected({"train": 20, "val": 6})
    )
    assert "every count that is known of the published lists agrees" in report


def test_the_expected_counts_are_those_of_the_specification() -> None:
    folds = PASCAL.folds["pascal"]
    assert [tuple(f[kind].pictures for kind in ("train_trick", "train", "val")) for f in folds] == [
        (4208, 4760, 364),
        (3726, 4588, 445),
        (2752, 4097, 592),
        (4510, 5108, 336),
    ]
    assert folds[1]["train_trick"].of_class[20] == 190
    assert folds[2]["val"].of_class == {11: 73, 12: 125, 13: 76, 14: 74, 15: 386}
    assert all(not (f["train"].of_class.keys() & f["val"].of_class.keys()) for f in folds)
    assert {f["train"].of_class[20] for f in folds[:3]} == {287}


def test_the_command(
    sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["prepare", "pascal", "--voc", str(sources[0]), "--sbd", str(sources[1]), "--out", str(tmp_path / "out")]
    assert main([*command, "--workers", "0"]) == 0
    assert "pascal: fold  training †  training  validation" in capsys.readouterr().out
    assert main([*command, "--workers", "0"]) == 0
    assert "out is already prepared, from files of the same names and sizes" in capsys.readouterr().out
    assert main([*command, "--workers", "-1"]) == 2
    assert "'-1' is not a whole number from 0" in capsys.readouterr().err
    assert main([*command, "data.fold=1"]) == 2
    assert "takes no key=value arguments" in capsys.readouterr().err

    def fill_the_memory(*_: object, **__: object) -> str:
        raise MemoryError

    monkeypatch.setattr("svf_fast.train.prepare.pascal.prepare_pascal", fill_the_memory)
    assert main(command) == 1
    assert "out of memory; fewer --workers need less" in capsys.readouterr().err


@pytest.mark.parametrize("stop_after", [3, 30, 60])
def test_a_stopped_call_is_gone_on_with(
    stop_after: int,
    sources: tuple[Path, Path],
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    whole = Workspace.writing

    def stopping(self: Workspace, relative: str) -> AbstractContextManager[Path]:
        if len(made) == stop_after:
            raise KeyboardInterrupt
        made.append(relative)
        return whole(self, relative)

    monkeypatch.setattr(Workspace, "writing", stopping)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(sources, out, base_labels=True)
    assert not out.exists()
    first = set(made)
    stop_after = -1
    made.clear()
    prepare(sources, out, base_labels=True)
    assert tree(out) == tree(prepared)
    # what is small and depends on the rest is written again
    assert {n for n in first & set(made) if n.endswith((".jpg", ".png"))} == set()
    assert not out.with_name("out.part").exists()


def test_other_options_or_files_do_not_go_on_with_a_part(sources: tuple[Path, Path], tmp_path: Path) -> None:
    prepare(sources, tmp_path / "out")
    with pytest.raises(
        FileExistsError, match=r"out was prepared from other files or with other options \(different: base labels\)"
    ):
        prepare(sources, tmp_path / "out", base_labels=True)


def test_a_part_made_from_other_masks_of_the_same_size_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    sources, out = packed("folders", *small_voc_and_sbd(), tmp_path), tmp_path / "out"
    path = next(sources[0].rglob(f"SegmentationClass/{SMALL_VAL[0]}.png"))
    values = read_label(path)
    Image.fromarray(values).save(path, compress_level=0)
    with monkeypatch.context() as patched:
        patched.setattr("svf_fast.train.prepare.pascal.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(sources, out)
    file_bytes = path.stat().st_size
    Image.fromarray(np.where(values == 0, np.uint8(1), np.uint8(0))).save(path, compress_level=0)
    assert path.stat().st_size == file_bytes
    with pytest.raises(FileExistsError, match="begun with other contents of files of the same names and sizes"):
        prepare(sources, out)


def test_a_finished_folder_that_was_changed_is_told_from_a_whole_one(
    sources: tuple[Path, Path], prepared: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(prepared, tmp_path / "out")
    assert "is already prepared, from files of the same names and sizes" in prepare(sources, out, base_labels=True)
    (out / f"JPEGImages/{SMALL_VAL[0]}.jpg").unlink()
    with (out / f"SegmentationClassAug/{SMALL_VAL[1]}.png").open("ab") as file:
        file.write(b"more")
    (out / "lists/train.census.json").unlink()
    with pytest.raises(ValueError, match="has been changed since; remove it to have it made again: 3 problems"):
        prepare(sources, out, base_labels=True)


def test_missing_lists_of_both_sources_are_named_together(tmp_path: Path) -> None:
    voc, sbd = small_voc_and_sbd()
    del voc["ImageSets/Segmentation/val.txt"], sbd["train.txt"]
    with pytest.raises(ValueError, match=r"(?s)2 problems\n.*sbd.*train\.txt is missing\n.*val\.txt is missing$"):
        prepare(packed("folders", voc, sbd, tmp_path), tmp_path / "out")


def test_the_separately_published_list_is_followed_and_compared() -> None:
    given = {"sbd": ["c", "a", "x"], "voc_train": ["t", "a"], "voc_val": ["v"], "voc_main_train": ["a", "b", "c", "t"]}
    assert pascal_lists(**given, sbd_train_noval=None).train == ("a", "c", "t")
    assert pascal_lists(**given, sbd_train_noval=["a", "c"]).notes == ()
    other_order = pascal_lists(**given, sbd_train_noval=["c", "a"])
    assert other_order.train == ("c", "a", "t")
    assert "another order" in other_order.notes[0]
    other = pascal_lists(**given, sbd_train_noval=["a", "x"])
    assert other.train == ("a", "x", "t")
    assert "1 names are only in the file, 1 only in" in other.notes[0]
    alone = pascal_lists(**{**given, "voc_main_train": None}, sbd_train_noval=["a", "c"])
    assert alone.train == ("a", "c", "t")
    assert alone.notes == ()


def test_a_picture_of_validation_never_trains() -> None:
    lists = pascal_lists(
        sbd=["a", "v", "w"], voc_main_train=["a", "v"], voc_train=["b", "w"], voc_val=["w", "v"], sbd_train_noval=None
    )
    assert lists.train == ("a", "b")
    assert lists.val == ("w", "v")
    assert lists.notes == ("2 pictures of validation were left out of training, the first is v",)


def test_grey_masks_get_a_palette() -> None:
    file = io.BytesIO()
    Image.fromarray(mask(7)).save(file, "png")
    label = pascal_masks.check(pascal_masks.InputFile("a.png", "a.png", file.getvalue())).label
    assert label == palette_png(mask(7))
