"""A folder, a tar, a gzipped tar or a zip as one thing: named files with bytes. Nothing is ever extracted by an archive's own paths.
Knows nothing of data sets."""

from __future__ import annotations

import gzip
import os
import posixpath
import re
import stat
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)
_KEPT_TEXT_BYTES = 2**20
_BLOCK_BYTES = 2**20
_LARGEST_MEMBER_BYTES = 2**30  # once it is unpacked; the largest of COCO, an instance file, has a third


class Source(ABC):
    """Files by their posix paths, in a stable order. Every error is a sentence that names the source and what in it."""

    path: Path

    @property
    def name(self) -> str:
        """What to call the source in a sentence."""
        return str(self.path)

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Paths of all regular files."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file; KeyError when there is none."""

    @abstractmethod
    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """The files `names` with their bytes, each once, in the order that is fastest here."""

    def read(self, name: str) -> bytes:
        """One file. Of a gzipped tar this may read the whole archive: prefer `stream`."""
        return next(content for _, content in self.stream([name]))

    def local(self, name: str) -> Path | None:
        """The file itself where it is one on its own, for linking."""
        return None

    def __contains__(self, name: str) -> bool:
        try:
            self.size(name)
        except KeyError:
            return False
        return True

    def where(self, name: str) -> str:
        """A file in a sentence: a path, or the archive and the path in it."""
        return str(self.local(name) or f"{self.name}:{name}")

    def files(self, names: Iterable[str]) -> Iterator[tuple[str, bytes | Path]]:
        """As `stream`, but a file that is one on its own comes as its path: who works on it may read it."""
        packed = []
        for name in names:
            path = self.local(name)
            if path is None:
                packed.append(name)
            else:
                yield name, path
        yield from self.stream(packed)

    def below(self, marker: str, *, preferred: str = "") -> Source:
        """The part of the source that holds the file `marker` (a path, `*` for any name), wherever above it the user pointed.

        Where several folders hold one, the folder named `preferred` is taken. ValueError when that leaves none or more than one.
        """
        pattern = re.compile("(|.*/)" + re.escape(marker).replace(r"\*", "[^/]*"))
        found = sorted({match[1] for match in map(pattern.fullmatch, self.names()) if match})
        if len(found) > 1:
            found = [prefix for prefix in found if PurePosixPath(prefix).name == preferred] or found
        if not found:
            raise ValueError(f"{self.name} holds no {marker}, neither at its top nor in a folder below")
        if len(found) > 1:
            folders = ", ".join(prefix or "." for prefix in found)
            raise ValueError(f"{self.name} holds {marker} in {len(found)} folders ({folders}): point at one of them")
        return _Below(self, found[0]) if found[0] else self


def open_source(path: str | Path) -> Source:
    """A folder, or a .tar, .tar.gz, .tgz or .zip file, by its content rather than its name.

    Raises FileNotFoundError for a path that is not there and ValueError for a file that is none of these, or is cut short.
    """
    path = Path(path)
    if path.is_dir():
        return _Folder(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; a folder, .tar, .tgz or .zip is expected") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    if start.startswith(b"\x1f\x8b"):
        return _GzippedTar(path)
    if start.startswith(b"PK"):
        return _Zip(path)
    return _Tar(path)


class _Folder(Source):
    """Files below a folder; links are followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names = sorted(self._walk())

    def _walk(self) -> Iterator[str]:
        seen: set[str] = set()

        def refuse(error: OSError) -> None:
            raise ValueError(f"the folder {error.filename} cannot be read ({error.strerror})")

        for folder, inner, files in os.walk(self.path, onerror=refuse, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link that leads back up
                inner.clear()
                continue
            seen.add(real)
            relative = PurePosixPath(Path(folder).relative_to(self.path).as_posix())
            yield from (str(relative / file) for file in files)

    def names(self) -> Sequence[str]:
        return self._names

    def size(self, name: str) -> int:
        try:
            status = (self.path / name).stat()
        except OSError:
            raise KeyError(name) from None
        if not stat.S_ISREG(status.st_mode):
            raise KeyError(name)
        return status.st_size

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            try:
                yield name, (self.path / name).read_bytes()
            except OSError as error:
                raise ValueError(f"{self.path / name} cannot be read ({error.strerror})") from None

    def local(self, name: str) -> Path | None:
        return self.path / name


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes whatever it cannot read for the end of the archive; here only the zeros that mark the end are."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _StrictTarInfo:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            # the class of the end as it should be is not public
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise tarfile.ReadError(str(error)) from None


class _Tar(Source):
    """An uncompressed tar: read at the places that its headers name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, _Place] = {}
        try:
            with tarfile.open(path, "r:", tarinfo=_StrictTarInfo) as archive:
                # a name that comes twice counts as in an extraction: the last one stays
                for member in archive:
                    _note(member, self._places)
        except _DAMAGE as error:
            raise _damaged(path, error) from error

    def names(self) -> Sequence[str]:
        return list(self._places)

    def size(self, name: str) -> int:
        return self._places[name].size

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        with self.path.open("rb") as file:
            for name in sorted(names, key=lambda name: self._places[name].offset):
                place = self._places[name]
                file.seek(place.offset)
                content = file.read(place.size)
                if len(content) != place.size:
                    raise _damaged(self.path, f"{name} ends early")
                yield name, content


class _GzippedTar(Source):
    """A gzipped tar has no places to jump to: every pass reads it from front to back.

    The first pass finds the names, reads to the end for gzip's checksum, and keeps short texts (lists).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, _Place] = {}
        self._texts: dict[str, bytes] = {}
        try:
            with gzip.open(path) as file:
                for archive, member in _pass_over(file):
                    name = _clean(member.name)
                    _note(member, self._places)
                    if member.isfile() and name.endswith(".txt") and member.size <= _KEPT_TEXT_BYTES:
                        self._texts[name] = _member_bytes(archive, member)
                while file.read(_BLOCK_BYTES):
                    pass
        except _DAMAGE as error:
            raise _damaged(path, error) from error

    def names(self) -> Sequence[str]:
        return list(self._places)

    def size(self, name: str) -> int:
        return self._places[name].size

    def read(self, name: str) -> bytes:
        return self._texts[name] if name in self._texts else super().read(name)

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        wanted: dict[int, list[str]] = {}
        for name in names:
            wanted.setdefault(self._places[name].offset, []).append(name)
        if not wanted:
            return
        try:
            with gzip.open(self.path) as file:
                for archive, member in _pass_over(file):
                    if not member.isfile() or member.offset_data not in wanted:
                        continue
                    content = _member_bytes(archive, member)
                    for name in wanted.pop(member.offset_data):
                        yield name, content
                    if not wanted:
                        return
        except _DAMAGE as error:
            raise _damaged(self.path, error) from error


class _Zip(Source):
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._members: Mapping[str, zipfile.ZipInfo] = {
                    _clean(member.filename): member for member in archive.infolist() if not member.is_dir()
                }
        except _DAMAGE as error:
            raise _damaged(path, error) from error

    def names(self) -> Sequence[str]:
        return list(self._members)

    def size(self, name: str) -> int:
        return self._members[name].file_size

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        with zipfile.ZipFile(self.path) as archive:
            damaged: list[str] = []
            for name in sorted(names, key=lambda name: self._members[name].header_offset):
                try:
                    _require_bearable(name, self.size(name))
                    content = archive.read(self._members[name])
                except _DAMAGE as error:
                    damaged.append(f"{name}: {error}")
                    continue
                yield name, content
            if damaged:
                raise _damaged(self.path, "; ".join(damaged))


class _Below(Source):
    """A source's files below a folder of it, named from there."""

    def __init__(self, source: Source, prefix: str) -> None:
        self.path = source.path
        self._source, self._prefix = source, prefix
        self._names = [name[len(prefix) :] for name in source.names() if name.startswith(prefix)]

    @property
    def name(self) -> str:
        return str(self._source.local(self._prefix) or f"{self._source.name}:{self._prefix}").rstrip("/")

    def names(self) -> Sequence[str]:
        return self._names

    def size(self, name: str) -> int:
        return self._source.size(self._prefix + name)

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for name, content in self._source.stream([self._prefix + name for name in names]):
            yield name[len(self._prefix) :], content

    def read(self, name: str) -> bytes:
        return self._source.read(self._prefix + name)

    def local(self, name: str) -> Path | None:
        return self._source.local(self._prefix + name)

    def where(self, name: str) -> str:
        return self._source.where(self._prefix + name)


@dataclass(frozen=True)
class _Place:
    offset: int
    size: int


def _clean(name: str) -> str:
    return name.removeprefix("./")


def _pass_over(file: gzip.GzipFile) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The files and links of a tar that can only be read forwards. tarfile's own gzip reader takes a cut file for a finished one."""
    with tarfile.open(fileobj=file, mode="r|", bufsize=_BLOCK_BYTES, tarinfo=_StrictTarInfo) as archive:
        for member in archive:
            if member.isfile() or member.islnk() or member.issym():
                yield archive, member


def _note(member: tarfile.TarInfo, places: dict[str, _Place]) -> None:
    """Where a member's bytes are: its own, or those of an earlier file of the archive that it is a link of."""
    name = _clean(member.name)
    if member.isfile():
        places[name] = _Place(member.offset_data, member.size)
        return
    target = _clean(member.linkname)
    if member.issym():
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
    if (member.islnk() or member.issym()) and target in places:
        places[name] = places[target]


def _member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    _require_bearable(member.name, member.size)
    file = archive.extractfile(member)
    if file is None:
        raise tarfile.ReadError(f"{member.name} is no regular file")
    content = file.read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} ends early")
    return content


def _require_bearable(name: str, member_bytes: int) -> None:
    """A few compressed bytes can stand for more than fits into the memory."""
    if member_bytes > _LARGEST_MEMBER_BYTES:
        raise RuntimeError(f"{name} would have {member_bytes:,} bytes, more than {_LARGEST_MEMBER_BYTES:,}")


def _damaged(path: Path, found: object) -> ValueError:
    return ValueError(
        f"{path} is no readable archive, or is damaged or cut short ({found}); a whole .tar, .tgz or .zip is expected"
    )
