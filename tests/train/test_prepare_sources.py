"""What every preparation stands on: sources read alike in every packing, a workspace that is whole or not there, work in order."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from pascal_archives import as_folder, as_tar

from svf_fast.train.prepare.archives import open_source
from svf_fast.train.prepare.problems import Problems
from svf_fast.train.prepare.work import run_jobs
from svf_fast.train.prepare.workspace import Workspace

# one that ends at a block of tar's, one over several, an empty one
FILES = {
    "a/list.txt": b"one\ntwo\n",
    "a/block": bytes(512),
    "a/b/long": bytes(range(256)) * 9,
    "a/b/empty": b"",
    "other": b"x",
}


def as_zip(files: dict[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("a") if hasattr(archive, "mkdir") else None
        for name, content in files.items():
            archive.writestr(name, content)
    return path


PACKINGS: dict[str, Callable[[dict[str, bytes], Path], Path]] = {
    "folder": lambda files, path: as_folder(files, path / "files"),
    "tar": lambda files, path: as_tar(files, path / "files.tar"),
    "tgz": lambda files, path: as_tar(files, path / "files.tgz", "w:gz"),
    "zip": lambda files, path: as_zip(files, path / "files.zip"),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_source_gives_the_same_files_in_every_packing(tmp_path: Path, packing: str) -> None:
    source = open_source(PACKINGS[packing](FILES, tmp_path))
    assert sorted(source.names()) == sorted(FILES)
    assert {name: source.size(name) for name in FILES} == {name: len(content) for name, content in FILES.items()}
    assert dict(source.stream(list(FILES))) == FILES
    assert all(source.read(name) == content for name, content in FILES.items())
    assert list(source.stream([])) == []
    assert "a/b" not in source
    assert "a/b/long" in source
    files = {name: file.read_bytes() if isinstance(file, Path) else file for name, file in source.files(FILES)}
    assert files == FILES
    assert (source.local("other") is not None) is (packing == "folder")


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_part_below_a_marker_is_found_wherever_one_points(tmp_path: Path, packing: str) -> None:
    files = {f"top/VOC{year}/sets/train.txt": str(year).encode() for year in (2007, 2012)}
    source = open_source(PACKINGS[packing](files | {"top/readme": b"r"}, tmp_path))
    part = source.below("sets/train.txt", preferred="VOC2012")
    assert list(part.names()) == ["sets/train.txt"]
    assert part.read("sets/train.txt") == b"2012"
    assert part.where("sets/train.txt").endswith("top/VOC2012/sets/train.txt")
    assert list(source.below("VOC2007/sets/*.txt").names()) == [n.removeprefix("top/") for n in source.names()]
    with pytest.raises(ValueError, match=r"in 2 folders \(top/VOC2007/, top/VOC2012/\): point at one of them"):
        source.below("sets/train.txt")
    with pytest.raises(ValueError, match=r"holds no cls/\*\.mat"):
        source.below("cls/*.mat")


def test_a_folder_with_a_link_that_leads_back_up_ends(tmp_path: Path) -> None:
    as_folder({"a/file": b"1"}, tmp_path / "files")
    (tmp_path / "files" / "a" / "up").symlink_to(tmp_path / "files")
    assert open_source(tmp_path / "files").names() == ["a/file"]


def test_links_and_paths_of_an_archive_lead_nowhere(tmp_path: Path) -> None:
    """A tar may name files outside and links to them: names are only ever looked up, and links are no files."""
    with tarfile.open(tmp_path / "files.tar", "w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        outside = tarfile.TarInfo("../outside")
        outside.size = 1
        archive.addfile(outside, io.BytesIO(b"x"))
    assert list(open_source(tmp_path / "files.tar").names()) == ["../outside"]
    assert not (tmp_path.parent / "outside").exists()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_inside_a_tar_are_the_files_that_they_lead_to(tmp_path: Path, mode: Literal["w", "w:gz"]) -> None:
    with tarfile.open(tmp_path / "a.tar", mode) as archive:
        file = tarfile.TarInfo("top/a.txt")
        file.size = 1
        archive.addfile(file, io.BytesIO(b"x"))
        for name, kind, target in (
            ("top/hard.txt", tarfile.LNKTYPE, "top/a.txt"),
            ("top/soft.txt", tarfile.SYMTYPE, "../top/a.txt"),
            ("top/nowhere.txt", tarfile.SYMTYPE, "/etc/passwd"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
    names = ["top/a.txt", "top/hard.txt", "top/soft.txt"]
    source = open_source(tmp_path / "a.tar")
    assert source.names() == names
    assert dict(source.stream(names)) == dict.fromkeys(names, b"x")


def test_every_damaged_member_of_a_zip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:  # not compressed
        for name in ("first", "second", "third"):
            archive.writestr(name, name * 50)
    content = path.read_bytes()
    for name in (b"first", b"third"):
        content = content.replace(name * 2, name[::-1] * 2, 1)
    path.write_bytes(content)
    found: list[str] = []
    with pytest.raises(ValueError, match=r"a\.zip .*first: .*third: ") as caught:
        found += [name for name, _ in open_source(path).stream(["first", "second", "third"])]
    assert "second" not in str(caught.value)


@pytest.mark.parametrize("packing", ["tgz", "zip"])
def test_a_member_that_would_fill_the_memory_is_refused(
    packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svf_fast.train.prepare.archives._LARGEST_MEMBER_BYTES", 2000)
    source = open_source(PACKINGS[packing](FILES, tmp_path))
    assert source.read("a/block") == bytes(512)
    with pytest.raises(ValueError, match=rf"files\.{packing} .*a/b/long would have 2,304 bytes, more than 2,000"):
        source.read("a/b/long")


def test_a_workspace_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.write_bytes(b"picture")
    workspace = Workspace(tmp_path / "out", {"rule": 1})
    assert list(tmp_path.iterdir()) == [original]
    with workspace.begun():
        workspace.place("lists/a.txt", b"a")
        workspace.link("pictures/b", original)
    assert workspace.has("lists/a.txt")
    assert not workspace.has("lists/b.txt")
    assert not (tmp_path / "out").exists()
    again = Workspace(tmp_path / "out", {"rule": 1})
    assert again.is_begun
    assert again.has("pictures/b")
    again.finish()
    assert Workspace(tmp_path / "out", {"rule": 1}).is_finished
    assert sorted(p.name for p in tmp_path.iterdir()) == ["original", "out"]
    assert (tmp_path / "out/pictures/b").samefile(original)


def test_no_second_call_works_in_the_same_part_folder(tmp_path: Path) -> None:
    first, second = (Workspace(tmp_path / "out", {}) for _ in range(2))
    with first.begun():
        with pytest.raises(BlockingIOError, match=r"another call is at work in .*out\.part"), second.begun():
            pass
        first.place("file", b"1")
        first.finish()
    with pytest.raises(FileExistsError, match="out was made by another call"), second.begun():
        pass
    with pytest.raises(OSError, match=r"out\.part was taken away"):
        second.place("file", b"2")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_call_that_comes_when_another_has_just_finished_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (Workspace(tmp_path / "out", {}) for _ in range(2))

    def make_folder_late(path: Path, *_: object, **__: object) -> None:
        monkeypatch.undo()
        with first.begun():
            first.finish()
        path.mkdir()

    monkeypatch.setattr(Path, "mkdir", make_folder_late)
    with pytest.raises(FileExistsError, match="out was made by another call"), second.begun():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_top_of_the_disk_is_no_place_for_a_folder() -> None:
    with pytest.raises(FileExistsError, match="/ is there and no preparation of this command"):
        Workspace("/", {})


def test_a_part_folder_that_was_stopped_before_its_plan_is_taken_up(tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part/.plan.json.part").write_bytes(b"{")
    with Workspace(tmp_path / "out", {}).begun():
        assert sorted(path.name for path in (tmp_path / "out.part").iterdir()) == ["plan.json"]


def test_files_made_from_something_else_are_not_taken_up(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out", {})
    with workspace.begun():
        workspace.bind("labels.sha256", "1")
        workspace.bind("labels.sha256", "1")
        with pytest.raises(FileExistsError, match=r"out\.part was begun with other contents .*labels\.sha256"):
            workspace.bind("labels.sha256", "2")


def test_a_file_is_linked_again_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "original").write_bytes(b"picture")
    workspace = Workspace(tmp_path / "out", {})
    with workspace.begun():
        for _ in range(2):
            workspace.link("picture", tmp_path / "original")
    assert sorted(path.name for path in workspace.part.iterdir()) == ["picture", "plan.json"]


def test_a_file_that_may_not_be_linked_needs_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "original").write_bytes(b"picture")
    workspace = Workspace(tmp_path / "out", {})
    assert workspace.can_link(tmp_path / "original")
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert not workspace.can_link(tmp_path / "original")


def test_what_cannot_be_linked_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "original").write_bytes(b"picture")
    workspace = Workspace(tmp_path / "out", {})
    with workspace.begun():
        workspace.link("copy", tmp_path / "original")
    assert (workspace.part / "copy").read_bytes() == b"picture"


def test_a_file_that_a_power_cut_left_empty_is_not_there(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out", {})
    with workspace.begun():
        workspace.place("cut", b"")
    assert not workspace.has("cut")


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_problems_together(workers: int) -> None:
    problems, counted = Problems(), []
    jobs = (text for text in ["3", "one", "2", "two", *map(str, range(40))])
    results = run_jobs(int, jobs, workers=workers, problems=problems, progress=counted.append)
    assert results == [3, None, 2, None, *range(40)]
    assert counted == list(range(1, 45))
    with pytest.raises(ValueError, match=r"(?s)Lists: 2 problems\n  .*'one'\n  .*'two'"):
        problems.raise_all("Lists")


def test_jobs_are_made_only_a_few_ahead() -> None:
    made: list[int] = []

    def jobs() -> Iterator[str]:
        for number in range(1000):
            made.append(number)
            yield str(number)

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs(int, jobs(), workers=0, problems=Problems(), progress=stop)
    assert len(made) == 1


def test_a_workspace_can_be_given_to_workers(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out", {"a": 1})
    with workspace.begun():
        pickle.loads(pickle.dumps(workspace)).place("file", b"1")
    assert workspace.has("file")
