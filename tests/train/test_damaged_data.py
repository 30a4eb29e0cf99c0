"""What a user gets for damaged, missing or foreign data: a sentence that names it, exit status 2 (1 for a full disk), and nothing half
written."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pascal_archives import (
    HEIGHT,
    SMALL_TRAIN,
    WIDTH,
    Files,
    as_folder,
    as_tar,
    jpeg,
    mask,
    mat,
    sbd_mask,
    small_voc_and_sbd,
    voc_mask,
)
from PIL import Image
from rich.console import Console

from svf_fast.train.cli import main
from svf_fast.train.data.census import read_census
from svf_fast.train.data.fold_index import read_fold_index
from svf_fast.train.data.folds import read_folds
from svf_fast.train.data.lists import read_classes, read_pairs
from svf_fast.train.data.palette import palette_png
from svf_fast.train.data.voc import VOCFolder
from svf_fast.train.files import sha256_of
from svf_fast.train.prepare import finish, workspace
from svf_fast.train.prepare.pascal import prepare_pascal

JPG, PNG, MAT = "JPEGImages/2007_000002.jpg", "SegmentationClass/2007_000002.png", "cls/2008_000001.mat"
VAL, MAIN = "ImageSets/Segmentation/val.txt", "ImageSets/Main/train.txt"


def rgb_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(file, "png")
    return file.getvalue()


# name: (the file, what it becomes or None for no file, the sentence's end)
DAMAGED_FILES: dict[str, tuple[str, bytes | None, str]] = {
    "truncated JPEG": (JPG, jpeg()[:-40], f"{JPG} is truncated: its end marker is missing"),
    "empty JPEG": (JPG, b"", f"{JPG} cannot be decoded as a picture; a JPEG or PNG file is expected"),
    "missing picture": (JPG, None, f"{JPG} is missing"),
    "missing mask": (MAT, None, f"{MAT} are missing: one of them is expected"),
    "mask of another size": (PNG, voc_mask(3, 40, 64), f"{PNG} is 64x40"),
    "SBD mask of another size": (MAT, sbd_mask(3, 48, 60), f"{MAT} is 60x48"),
    "unknown class id": (PNG, palette_png(mask(77)), f"{PNG} holds the values [77], which are no class ids; expected 0 to 20, and 255"),
    "unknown class id of SBD": (MAT, sbd_mask(21), f"{MAT} holds the values [21], which are no class ids"),
    "truncated mask": (PNG, voc_mask(3)[:60], f"{PNG} cannot be decoded as a label image; a whole PNG file is expected"),
    "mask in colours": (PNG, rgb_png(), f"{PNG} is a label of Pillow mode RGB; expected one 8-bit channel"),
    "truncated .mat": (MAT, sbd_mask(3)[:-20], f"{MAT} is truncated or no mask of SBD; a MATLAB 5 file with GTcls.Segmentation"),
    ".mat of something else": (MAT, mat(mask(3), "Boundaries"), f"{MAT} is truncated or no mask of SBD"),
    ".mat with floats": (MAT, mat(mask(3).astype(float)), f"{MAT}: GTcls.Segmentation is float64 [48, 64]; uint8 [height, width] is"),
    "no .mat at all": (MAT, b"no matlab", f"{MAT} is truncated or no mask of SBD"),
    "empty list": (VAL, b"\n", f"{VAL} is empty; names of pictures are expected, one a line"),
    "list that is no text": (VAL, b"\xff\xfe\0", f"{VAL} is no text file"),
    "list with a path": (VAL, b"2009_000001\n../../etc/passwd\n", f"{VAL}: name 2 is '../../etc/passwd'; letters, digits, - and _"),
    "missing list": (VAL, None, f"{VAL} is missing"),
    "nothing says what trains": (MAIN, None, "ImageSets/Main/train.txt is missing, and SBD's folder has no train_noval.txt"),
}  # fmt: skip


def replace(files: tuple[Files, Files], name: str, content: bytes | None) -> None:
    for some in files:
        if name in some:
            del some[name]
            if content is not None:
                some[name] = content


def as_folders(root: Path, files: tuple[Files, Files] | None = None) -> list[str]:
    """The command for these files, as folders."""
    voc, sbd = files or small_voc_and_sbd()
    return command(root, as_folder(voc, root / "VOC2012"), as_folder(sbd, root / "sbd"))


def command(root: Path, voc: Path, sbd: Path) -> list[str]:
    return ["prepare", "pascal", "--voc", str(voc), "--sbd", str(sbd), "--out", str(root / "out"), "--workers", "0"]


def said(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    assert main(arguments) == status
    return capsys.readouterr().err


def left_over(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.startswith("out"))


@pytest.mark.parametrize("case", DAMAGED_FILES)
def test_a_damaged_file_is_named_before_anything_is_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, sentence = DAMAGED_FILES[case]
    files = small_voc_and_sbd()
    replace(files, name, content)
    assert sentence in said(as_folders(tmp_path, files), capsys)
    assert left_over(tmp_path) == []


def test_all_damaged_files_are_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = small_voc_and_sbd()
    cases = ["truncated JPEG", "unknown class id", "truncated .mat"]
    for case in cases:
        replace(files, *DAMAGED_FILES[case][:2])
    replace(files, "JPEGImages/2009_000001.jpg", None)
    replace(files, "JPEGImages/2009_000002.jpg", jpeg(40, 40))
    sentences = said(as_folders(tmp_path, files), capsys)
    assert "svf-fast: Nothing was written, because VOC 2012 or SBD is not whole: 5 problems\n" in sentences
    assert all(DAMAGED_FILES[case][2] in sentences for case in cases)
    assert "2009_000001.jpg is missing\n" in sentences
    assert "2009_000002.jpg is 40x40 pixels (width x height) but its label " in sentences


def test_all_missing_files_are_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = small_voc_and_sbd()
    gone = [f"JPEGImages/{name}.jpg" for name in SMALL_TRAIN]
    for name in gone:
        replace(files, name, None)
    sentences = said(as_folders(tmp_path, files), capsys)
    assert all(f"{name} is missing" in sentences for name in gone)


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0x55
    path.write_bytes(content)


def cut(path: Path, kept: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])


DAMAGED_ARCHIVES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "tar cut short": ("voc.tar", lambda path: cut(path, 0.6)),
    "tar with a broken header": ("voc.tar", lambda path: break_header(path)),
    "tgz cut short": ("sbd.tgz", lambda path: cut(path, 0.6)),
    "tgz with a flipped byte": ("sbd.tgz", lambda path: flip(path, 0.5)),
    "tgz with a wrong checksum": ("sbd.tgz", lambda path: flip(path, 0.9999)),
    "no archive": ("voc.tar", lambda path: path.write_bytes(b"<html>404 not found</html>" * 100)),
    "empty archive": ("sbd.tgz", lambda path: path.write_bytes(b"")),
}


def break_header(path: Path) -> None:
    content = path.read_bytes()
    at = content.index(b"JPEGImages/2007_000004.jpg")
    path.write_bytes(content[:at] + b"?" * 300 + content[at + 300 :])


@pytest.mark.parametrize("case", DAMAGED_ARCHIVES)
def test_a_damaged_archive_is_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, damage = DAMAGED_ARCHIVES[case]
    voc, sbd = small_voc_and_sbd()
    paths = as_tar(voc, tmp_path / "voc.tar"), as_tar(sbd, tmp_path / "sbd.tgz", "w:gz")
    damage(tmp_path / name)
    sentence = said(command(tmp_path, *paths), capsys)
    assert re.search(
        rf"{re.escape(name)} is no readable archive, or is damaged or cut short \(.+\); a whole \.tar", sentence
    )
    assert sentence.count("\n", sentence.index("svf-fast:")) == 2  # how many problems there are, and the one
    assert left_over(tmp_path) == []


def test_a_source_that_is_not_there_or_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = as_folders(tmp_path)
    voc, sbd = sound[3], sound[5]
    assert "nowhere does not exist" in said(command(tmp_path, tmp_path / "nowhere", Path(sbd)), capsys)
    assert "holds no ImageSets/Segmentation/train.txt" in said(command(tmp_path, Path(sbd), Path(sbd)), capsys)
    assert "holds no cls/*.mat" in said(command(tmp_path, Path(voc), Path(voc)), capsys)
    assert left_over(tmp_path) == []


def test_an_unreadable_folder_and_an_unreadable_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made up, because root may read everything."""
    arguments = as_folders(tmp_path)
    scan, read = os.scandir, Path.open

    def refuse_folder(path: str) -> object:
        if str(path).endswith("SegmentationClass"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    def refuse_file(path: Path, *rest: object, **options: object) -> object:
        if str(path).endswith(JPG):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse_folder)
        assert "SegmentationClass cannot be read (Permission denied)" in said(arguments, capsys)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse_file)
        assert f"{JPG} cannot be read (Permission denied)" in said(arguments, capsys)
    assert left_over(tmp_path) == []


def test_a_disk_that_fills_up_in_the_middle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = as_folders(tmp_path)
    write, written = workspace.write_atomically, []

    def full(path: Path, *rest: object, **options: object) -> None:
        if len(written) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(workspace, "write_atomically", full)
        sentence = said(arguments, capsys, status=1)
    assert re.search(
        r"out\.part/SegmentationClassAug/\S+ cannot be written \(No space left on device\); what is done stays in \S+out\.part, and the "
        "same command goes on from it",
        sentence,
    )
    assert left_over(tmp_path) == ["out.part"]
    assert main(arguments) == 0
    assert left_over(tmp_path) == ["out"]
    assert not list((tmp_path / "out").rglob(".*"))


def test_a_disk_that_fills_up_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = as_folders(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(finish, "write_fold_index", full)
        sentence = said(arguments, capsys, status=1)
    assert (
        "out.part/folds/pascal/fold0_train_trick.json cannot be written (No space left on device); what is" in sentence
    )
    assert left_over(tmp_path) == ["out.part"]
    assert main(arguments) == 0
    assert left_over(tmp_path) == ["out"]


def test_a_disk_that_is_too_small_or_not_writable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = as_folders(tmp_path)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(2**20, 2**20 - 100, 100))
        assert re.search(
            r"out needs about \d+ MiB but the disk of .* has 0 MiB free", said(arguments, capsys, status=1)
        )
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert re.search(r"out cannot be made: .* is no folder that can be written to", said(arguments, capsys))
    assert left_over(tmp_path) == []


def test_a_place_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, out = as_folders(tmp_path), tmp_path / "out"
    out.write_text("mine")
    assert "out is there and no folder; a folder is made there" in said(arguments, capsys)
    out.unlink()
    out.mkdir()
    (out / "mine").touch()
    assert "out is there and no preparation of this command; remove it or choose another folder" in said(
        arguments, capsys
    )
    (out / "mine").unlink()
    out.rmdir()
    part = tmp_path / "out.part"
    as_folder({"plan.json": b'{"data set": "coco"}', "kept": b"mine"}, part)
    assert "out.part was prepared from other files or with other options (different: base labels, data set" in said(
        arguments, capsys
    )
    (part / "plan.json").write_bytes(b"{")
    assert "its plan.json cannot be read" in said(arguments, capsys)
    assert sorted(path.name for path in part.iterdir()) == ["kept", "plan.json"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder."""
    root = tmp_path_factory.mktemp("whole")
    voc, sbd = small_voc_and_sbd()
    sources = as_folder(voc, root / "voc"), as_folder(sbd, root / "sbd")
    prepare_pascal(*sources, root / "out", workers=0, console=Console(quiet=True))
    return root / "out"


def read_a_census(path: Path, root: Path) -> object:
    list_file = root / "lists/train.txt"
    return read_census(path, read_pairs(list_file), sha256_of(list_file))


def read_an_index(path: Path, root: Path) -> object:
    return read_fold_index(path, root, read_classes(root / "classes.txt"))


def read_own_folds(path: Path, root: Path) -> object:
    return read_folds(path, read_classes(root / "classes.txt"))


@pytest.mark.parametrize(
    ("read", "original", "content", "sentence"),
    [
        (read_a_census, "lists/train.census.json", b'{"format":', r"is no JSON: .* in line 1, column \d+"),
        (read_a_census, "lists/train.census.json", b'{"format":"svf_fast fold index"}', "is no svf_fast census"),
        (read_an_index, "folds/pascal/fold1_train.json", b"\x80", "cannot be read as a JSON file"),
        (read_an_index, "folds/pascal/fold1_train.json", b"__import__('os')", "is no JSON"),
        (read_own_folds, None, b'{"novel": [[1, 2], [2]]}', "class 2 is novel in fold 0 and again in fold 1"),
        (read_own_folds, None, b'{"novel": [[1, 99]]}', "has the class 99, which classes.txt does not list"),
        (read_own_folds, None, b'{"novel": "all"}', "holds no folds; expected"),
        (read_own_folds, None, b'{"novel": [[%s]]}' % (b"9" * 5000), "cannot be read as a JSON file"),
    ],
    ids=[
        "cut census",
        "no census",
        "index of bytes",
        "code for an index",
        "class twice",
        "unknown class",
        "no folds",
        "digits",
    ],
)
def test_wrong_json_is_named(
    read: Callable[[Path, Path], object],
    original: str | None,
    content: bytes,
    sentence: str,
    whole: Path,
    tmp_path: Path,
) -> None:
    if original is not None:
        read(whole / original, whole)  # as it should be
    path = tmp_path / "wrong.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"wrong\.json.*{sentence}"):
        read(path, whole)


def test_files_that_are_damaged_after_the_preparation_are_named(whole: Path, tmp_path: Path) -> None:
    """The census knows every file's size: what is gone or has changed is looked at anew."""
    root = tmp_path / "data"
    shutil.copytree(whole, root)
    (root / f"JPEGImages/{SMALL_TRAIN[0]}.jpg").write_bytes(jpeg()[:-40])
    (root / f"SegmentationClassAug/{SMALL_TRAIN[1]}.png").unlink()
    with pytest.raises(ValueError, match="2 of the 20 lines") as caught:
        VOCFolder(root).split("lists/train.txt", range(1, 21))
    assert f"{SMALL_TRAIN[0]}.jpg is truncated" in str(caught.value)
    assert f"{SMALL_TRAIN[1]}.png does not exist" in str(caught.value)
