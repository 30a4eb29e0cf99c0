"""The folder that a preparation fills: built beside its place, taken up again where it was left, renamed when it is whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from svf_fast.train.files import flush_folder, locked, write_atomically

_PLAN_FILE = "plan.json"
_BLOCK_BYTES = 4096


class Workspace:
    """`out` as it will be, in `out`.part until `finish`. Making one looks at the disk and writes nothing.

    `plan` is plain data that decides what the files will hold: a part folder of the same plan is gone on with. Raises FileExistsError
    when `out` or the part folder is something else, or of another plan. Can be pickled: workers place files of their own.
    """

    def __init__(self, out: str | Path, plan: Mapping[str, object]) -> None:
        self.out = Path(out).absolute()
        self.part = self.out.parent / f"{self.out.name}.part"
        self._plan = json.dumps(dict(plan), sort_keys=True, indent=1)
        self._refuse_other(self.out)
        if not self.is_finished:
            self._refuse_other(self.part)

    @property
    def is_finished(self) -> bool:
        """`out` is there already, whole and of this plan."""
        return (self.out / _PLAN_FILE).is_file()

    @property
    def is_begun(self) -> bool:
        """A part folder of this plan is there."""
        return (self.part / _PLAN_FILE).is_file()

    def require_room(self, needed_bytes: int) -> None:
        """OSError unless the folder can be made and its disk has `needed_bytes` free; what the part folder holds counts as there."""
        parent = self._existing_parent()
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(f"{self.out} cannot be made: {parent} is no folder that can be written to")
        # a hard link takes no room, and was not counted as needed
        found = [path.lstat() for path in self.part.rglob("*")] if self.is_begun else []
        held = sum(size_on_disk(status.st_size) for status in found if status.st_nlink == 1)
        needed, free = max(0, needed_bytes - held), shutil.disk_usage(parent).free
        if free < needed:
            raise OSError(
                f"{self.out} needs about {_megabytes(needed)} but the disk of {parent} has {_megabytes(free)} free"
            )

    def can_link(self, original: Path) -> bool:
        """Whether a link of a file can be made in the folder to be, and so takes no room: it lies on the same disk, and is the user's or
        one that he may write (Linux allows no others by default)."""
        status = original.stat()
        may_link = os.name != "posix" or status.st_uid == os.geteuid() or os.access(original, os.R_OK | os.W_OK)
        return may_link and status.st_dev == self._existing_parent().stat().st_dev

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Inside, the part folder is there, made or taken up again, and this process's own. BlockingIOError when another call is at work
        in it."""
        try:
            self.part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{self.part} cannot be made ({error.strerror})") from None
        with locked(self.part):
            # looked at only now: until the lock was free, another call could finish
            if self.is_finished:
                with suppress(OSError):  # not there, or not empty and so not made above
                    self.part.rmdir()
                raise FileExistsError(f"{self.out} was made by another call in the meantime")
            # a power cut must not leave a folder that no call takes for its own
            with self.writing(_PLAN_FILE) as path:
                write_atomically(path, lambda file: file.write(self._plan.encode()))
            yield

    def has(self, relative: str) -> bool:
        """The file is there from this run or an earlier one, and is not empty (as a power cut can leave one)."""
        try:
            return (self.part / relative).stat().st_size > 0
        except OSError:
            return False

    def place(self, relative: str, content: bytes) -> None:
        """Write a file of the part folder, whole or not at all; its folders are made."""
        with self.writing(relative) as path:
            write_atomically(path, lambda file: file.write(content), flush=False)

    def bind(self, relative: str, content: str) -> None:
        """Place a file that says what the others were made from. FileExistsError when an earlier call made them from something else."""
        path = self.part / relative
        if path.is_file() and path.read_text(encoding="utf-8") != content:
            raise FileExistsError(
                f"{self.part} was begun with other contents of files of the same names and sizes ({relative} says so); remove it"
            )
        self.place(relative, content.encode())

    def link(self, relative: str, original: Path) -> None:
        """Give a file of the part folder the content of `original`: a hard link where the disk allows one, else a copy."""
        with self.writing(relative) as path:
            _link_or_copy(original, path)

    def finish(self) -> None:
        """The part folder becomes `out`, after all of it is on the disk."""
        if hasattr(os, "sync"):
            os.sync()
        self.part.rename(self.out)
        flush_folder(self.out.parent)

    @contextmanager
    def writing(self, relative: str) -> Iterator[Path]:
        """The path of a file to be, its folders made; an OSError while it is written comes out as a sentence for the user."""
        path = self.part / relative
        try:
            if not self.part.is_dir():
                raise FileNotFoundError(errno.ENOENT, f"{self.part} was taken away")
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path
        except OSError as error:
            raise OSError(
                f"{path} cannot be written ({error.strerror or error}); what is done stays in {self.part}, and the same "
                "command goes on from it"
            ) from None

    def _refuse_other(self, folder: Path) -> None:
        if not (folder.exists() or folder.is_symlink()):
            return
        if not folder.is_dir():
            raise FileExistsError(f"{folder} is there and no folder; a folder is made there")
        try:
            found = (folder / _PLAN_FILE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            if {path.name for path in folder.iterdir()} <= {f".{_PLAN_FILE}.part"}:
                return  # empty, or stopped before its first file
            raise FileExistsError(
                f"{folder} is there and no preparation of this command; remove it or choose another folder"
            ) from None
        if found != self._plan:
            raise FileExistsError(
                f"{folder} was prepared from other files or with other options ({_differences(found, self._plan)}); remove it or choose "
                "another folder"
            )

    def _existing_parent(self) -> Path:
        parent = self.out.absolute().parent
        while not parent.exists():
            parent = parent.parent
        return parent


def digest_of(lines: Iterable[str]) -> str:
    """SHA-256 of lines, for a plan."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def size_on_disk(file_bytes: int) -> int:
    """What a file of so many bytes takes, in whole blocks."""
    return -(-file_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _link_or_copy(original: Path, path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        try:
            os.link(original.resolve(), part)
        except OSError:  # another disk, or one without hard links; a real trouble comes again when copying
            shutil.copyfile(original, part)
        part.replace(path)
    finally:
        # there still where both were links of one file already: then a rename does nothing
        part.unlink(missing_ok=True)


def _differences(found: str, wanted: str) -> str:
    try:
        theirs = dict(json.loads(found))
    except (ValueError, TypeError):
        return "its plan.json cannot be read"
    ours = json.loads(wanted)
    return "different: " + ", ".join(sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key)))


def _megabytes(amount: int) -> str:
    return f"{amount / 2**20:,.0f} MiB"
