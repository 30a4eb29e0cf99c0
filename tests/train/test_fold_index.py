"""Fold indexes as files, and their making from the text caches that the field shares."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from voc_folders import draw, line, write_folder

from svf_fast.train.cli import main
from svf_fast.train.data.episodes import EpisodeSampler
from svf_fast.train.data.fold_index import read_fold_index, write_fold_index
from svf_fast.train.data.split import Split
from svf_fast.train.data.voc import VOCFolder
from svf_fast.train.prepare.folder import prepare_folder
from svf_fast.train.prepare.published import convert_published

QUIET = Console(quiet=True)
AUTHORS = "../data/VOCdevkit2012/VOC2012"
# class → pictures in which it is large; `tiny` shows class 2 on a few pixels only
PICTURES = {
    "a": [(1, 0, 0, 50, 50)],
    "ab": [(1, 0, 0, 50, 50), (2, 0, 50, 60, 40)],
    "b": [(2, 0, 0, 50, 50)],
    "c": [(3, 0, 0, 50, 50)],
    "tiny": [(1, 0, 0, 50, 50), (2, 60, 60, 3, 3)],
    "cd": [(3, 0, 0, 50, 50), (4, 0, 60, 5, 5)],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = write_folder(tmp_path / "data", {name: draw(80, 90, shown) for name, shown in PICTURES.items()})
    (root / "lists").mkdir()
    (root / "list.txt").rename(root / "lists/train.txt")
    return root


def made(root: Path) -> Split:
    """The split of classes 1 and 2 without pictures of class 4, written as an index."""
    split = VOCFolder(root).split("lists/train.txt", (1, 2), drop_images_with=(4,))
    write_fold_index(root / "folds/own/fold0_train.json", split, rule="own", fold=0, dropped=(4,))
    return split


def test_an_index_gives_the_split_that_was_written(root: Path) -> None:
    split = made(root)
    index = "folds/own/fold0_train.json"
    folder = VOCFolder(root)
    assert read_fold_index(root / index, root, folder.classes) == split
    assert folder.split(index, (2, 1), drop_images_with=(4,)) == split
    assert json.loads((root / index).read_text()) == {
        "format": "svf_fast fold index",
        "version": 1,
        "rule": "own",
        "fold": 0,
        "dropped": [4],
        "list": "lists/train.txt",
        "list_sha256": json.loads((root / index).read_text())["list_sha256"],
        "rows": [0, 1, 2, 4],
        "present_classes": [[1], [1, 2], [2], [1, 2]],
        "files_of_class": {"1": [0, 1, 3], "2": [1, 2]},
    }


def test_a_prepared_folder_may_move_with_its_indexes(root: Path) -> None:
    split = made(root)
    moved = root.rename(root.with_name("elsewhere"))
    found = VOCFolder(moved).split("folds/own/fold0_train.json", (1, 2), drop_images_with=(4,))
    assert (found.entries, found.files_of_class) == (split.entries, split.files_of_class)


def test_an_index_is_used_for_its_own_classes_only(root: Path) -> None:
    made(root)
    folder, index = VOCFolder(root), "folds/own/fold0_train.json"
    with pytest.raises(
        ValueError, match=r"is of fold 0 of own, with the classes \[1, 2\]; expected the classes \[1\]$"
    ):
        folder.split(index, (1,), drop_images_with=(4,))
    left_out = "pictures left out that show any of"
    with pytest.raises(ValueError, match=rf"with {left_out} \[4\]; expected {left_out} \[\]$"):
        folder.split(index, (1, 2))
    with pytest.raises(
        ValueError, match=r"fold0_train\.json is a fold index, but every picture of a list is asked for"
    ):
        folder.whole(index, (1, 2))
    with pytest.raises(ValueError, match=r"is of the classes \[2\], which .* does not have \(\[1\]\)"):
        read_fold_index(root / index, root, {1: "one"})


def test_a_class_with_too_few_pictures_is_named(root: Path) -> None:
    made(root)
    split = VOCFolder(root).split("folds/own/fold0_train.json", (1, 2), drop_images_with=(4,))
    with pytest.raises(
        ValueError, match=r"^class 2 \(two\) has 2 usable pictures in .*train\.txt; 2-shot episodes need 2"
    ):
        EpisodeSampler(split, shots=2, size=33)


def test_pictures_that_are_gone_are_all_named(root: Path) -> None:
    made(root)
    (root / "JPEGImages/a.jpg").unlink()
    (root / "SegmentationClass/tiny.png").unlink()
    (root / "JPEGImages/c.jpg").unlink()  # not in the index
    with pytest.raises(ValueError, match=r"^2 files of .*fold0_train\.json cannot be used:") as caught:
        VOCFolder(root).split("folds/own/fold0_train.json", (1, 2), drop_images_with=(4,))
    missing = [root / "JPEGImages/a.jpg", root / "SegmentationClass/tiny.png"]
    assert str(caught.value).splitlines()[1:] == [f"  {path} does not exist" for path in missing]


def test_pictures_that_changed_since_the_census_are_named(root: Path) -> None:
    made(root)
    prepare_folder(root, workers=0, console=QUIET)
    with (root / "JPEGImages/a.jpg").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"1 files of .*\n  .*a\.jpg has [\d,]+ bytes; it had [\d,]+ when"):
        VOCFolder(root).split("folds/own/fold0_train.json", (1, 2), drop_images_with=(4,))


def test_another_content_of_the_list_is_refused(root: Path) -> None:
    made(root)
    with (root / "lists/train.txt").open("a") as file:
        file.write(line("more") + "\n")
    with pytest.raises(ValueError, match=r"belongs to another content of .*lists/train\.txt: make the index anew"):
        VOCFolder(root).split("folds/own/fold0_train.json", (1, 2), drop_images_with=(4,))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "other"}, " is no svf_fast fold index"),
        ({"version": 2}, " has version 2 of svf_fast fold index; this program reads 1"),
        ({"list": 3}, ": list is damaged; expected the list's path and its hash; make the index anew"),
        ({"fold": "0"}, ": fold is damaged"),
        ({"dropped": [1]}, ": dropped is damaged"),
        ({"rows": []}, ": rows is damaged; expected ascending row numbers"),
        ({"rows": [0, 2, 1, 4]}, ": rows is damaged"),
        ({"rows": [0, 1, 2, True]}, ": rows is damaged"),
        ({"rows": [0, 1, 2, 6]}, " names line 7 of "),
        ({"present_classes": [[1]]}, ": present_classes is damaged; expected 4 lists of class ids, one a row"),
        ({"present_classes": [[1], [1, 2], [2], [1, 3]]}, ": present_classes is damaged"),
        ({"files_of_class": []}, ": files_of_class is damaged"),
        ({"files_of_class": {"one": [0]}}, ": files_of_class is damaged"),
        ({"files_of_class": {"9" * 5000: [0]}}, ": files_of_class is damaged"),
        (
            {"files_of_class": {"1": [0, 1, 3], "2": [0, 2]}},
            ": files_of_class is damaged; expected ascending positions",
        ),
        (
            {"files_of_class": {"1": [0, 1, 3], "2": [1, 9]}},
            ": files_of_class is damaged; expected ascending positions",
        ),
        ({"files_of_class": {"1": [0, 1, 3], "2": [1]}}, ": files_of_class is damaged; expected every row under"),
    ],
)
def test_a_damaged_index_is_refused(root: Path, changes: dict[str, object], sentence: str) -> None:
    made(root)
    path = root / "folds/own/fold0_train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match="^" + re.escape(str(path) + sentence)) as caught:
        VOCFolder(root).split("folds/own/fold0_train.json", (1, 2), drop_images_with=(4,))
    assert "\n" not in str(caught.value)


def write_caches(folder: Path, listed: dict[str, tuple[int, ...]], *classes: int) -> list[Path]:
    """The two text files of the authors' code, with the paths of their disk."""

    def pair(name: str) -> tuple[str, str]:
        image, label = line(name).split()
        return f"{AUTHORS}/{image}", f"{AUTHORS}/{label}"

    data_list, sub_classes = folder / "data_list_0.txt", folder / "sub_class_file_list_0.txt"
    data_list.write_text("".join(" ".join(pair(name)) + "\n" for name in listed))
    sub_classes.write_text(str({c: [pair(name) for name, ids in listed.items() if c in ids] for c in classes}))
    return [data_list, sub_classes]


def test_published_caches_become_an_index_of_the_same_split(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = write_caches(tmp_path, {"tiny": (1,), "a": (1,), "ab": (1, 2)}, 2, 1)
    told = convert_published(*caches, root=root, out=root / "lists/theirs.json", console=QUIET)
    assert told == f"{root}/lists/theirs.json: 3 pictures for the classes [1, 2] (classes of no known fold)"
    assert (root / "lists/theirs.txt").read_text() == "".join(line(name) + "\n" for name in ("tiny", "a", "ab"))
    split = VOCFolder(root).split("lists/theirs.json", (1, 2))
    assert [entry.present_classes for entry in split.entries] == [(1, 2), (1,), (1, 2)]
    assert split.files_of_class == {1: (0, 1, 2), 2: (2,)}
    made(root)
    with pytest.raises(FileExistsError, match=r"fold0_train\.json is another index; remove it"):
        convert_published(*caches, root=root, out=root / "folds/own/fold0_train.json", console=QUIET)
    # made again, by the command, the same; over another list, refused
    command = ["prepare", "index", *map(str, caches), "--root", str(root), "--out", str(root / "lists/theirs.json")]
    assert main(command) == 0
    assert capsys.readouterr().out == told + "\n"
    (tmp_path / "others").mkdir()
    others = write_caches(tmp_path / "others", {"tiny": (1,), "a": (1,), "ab": (1,)}, 1)
    with pytest.raises(FileExistsError, match=r"theirs\.json is another index; remove it, or give another --out"):
        convert_published(*others, root=root, out=root / "lists/theirs.json", console=QUIET)
    with pytest.raises(FileExistsError, match=r"lists/train\.txt is another list; remove it, or give another --out"):
        convert_published(*caches, root=root, out=root / "lists/train.json", console=QUIET)


@pytest.mark.parametrize(
    ("listed", "classes", "expected"),
    [
        ({"six": (6,), "twenty": (20,)}, range(6, 21), ("pascal", 0, [1, 2, 3, 4, 5])),
        ({"six": (6,), "both": (6,)}, range(6, 21), ("pascal", 0, [])),
        ({"one": (1,), "both": (1,)}, range(1, 6), ("pascal", 0, [])),
    ],
)
def test_the_fold_of_published_caches_is_found_by_its_classes(
    tmp_path: Path, listed: dict[str, tuple[int, ...]], classes: range, expected: tuple[str, int, list[int]]
) -> None:
    shown = {"one": [(1, 0, 0, 50, 50)], "six": [(6, 0, 0, 50, 50)], "twenty": [(20, 0, 0, 50, 50)]}
    shown["both"] = [(6, 0, 0, 50, 50), (1, 0, 50, 50, 40)]
    root = write_folder(tmp_path / "data", {name: draw(80, 90, drawn) for name, drawn in shown.items()})
    (root / "classes.txt").write_text("".join(f"{c} kind {c}\n" for c in range(1, 21)))
    convert_published(*write_caches(tmp_path, listed, *classes), root=root, out=root / "fold.json", console=QUIET)
    document = json.loads((root / "fold.json").read_text())
    assert (document["rule"], document["fold"], document["dropped"]) == expected


def dictionary_of(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "sub_class_file_list_0.txt").write_text(text) and None


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (dictionary_of("__import__('os').system('true')"), "sub_class_file_list_0.txt is not {class id: [("),
        (dictionary_of("{1: ["), "sub_class_file_list_0.txt is not {class id: [("),
        (dictionary_of("[]"), "sub_class_file_list_0.txt is not {class id: [("),
        (dictionary_of("{'1': []}"), "what it has for '1' is not a class id with a list of (image, label)"),
        (dictionary_of("{1: [('a',)]}"), "what it has for 1 is not a class id with a list of (image, label)"),
        (dictionary_of("{1: [('a', 'b'), ('a', 'b')]}"), "has a picture twice for class 1"),
        (dictionary_of("{1: [('x.jpg', 'x.png')]}"), "1 pictures of {folder}/sub_class_file_list_0.txt are not in"),
        (dictionary_of("{1: []}"), "2 pictures of {folder}/data_list_0.txt are under no class of"),
        (
            lambda folder: write_caches(folder, {"a": (1, 2), "ab": (1,)}, 1, 2),
            "labels do not show the class that they",
        ),
        (
            lambda folder: write_caches(folder, {"a": (1,), "gone": (1,)}, 1),
            "2 files of {folder}/data_list_0.txt are not",
        ),
        (lambda folder: write_caches(folder, {"a": (9,), "ab": (9,)}, 9), "the index has the classes [9], which"),
        (lambda folder: (folder / "data_list_0.txt").unlink(), "data_list_0.txt does not exist"),
    ],
)
def test_caches_of_no_use_get_a_sentence_and_nothing_is_written(
    root: Path, tmp_path: Path, spoil: Callable[[Path], Any], sentence: str
) -> None:
    caches = write_caches(tmp_path, {"a": (1,), "ab": (1,)}, 1)
    spoil(tmp_path)
    before = sorted(root.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence.replace("{folder}", str(tmp_path)))):
        convert_published(*caches, root=root, out=root / "lists/theirs.json", console=QUIET)
    assert sorted(root.rglob("*")) == before
