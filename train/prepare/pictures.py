"""The pictures that a preparation takes over as they are: their sizes, the room they need, their way into the folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from svf_fast.train.data.reading import encoded_size, image_size
from svf_fast.train.prepare.archives import Source
from svf_fast.train.prepare.workspace import Workspace, size_on_disk
from svf_fast.train.progress import WorkProgress


def picture_size(file: Path | bytes, where: str) -> tuple[int, int]:
    """(height, width) in pixels of a complete picture, by its path or its bytes; `where` names it in an error.

    Raises FileNotFoundError or ValueError.
    """
    return image_size(file) if isinstance(file, Path) else encoded_size(file, where)


def needed_bytes(source: Source, paths: Iterable[str], workspace: Workspace) -> int:
    """What pictures of `source` will take in the folder: nothing where they can be linked."""
    needed = 0
    for path in paths:
        local = source.local(path)
        if local is None or not workspace.can_link(local):
            needed += size_on_disk(source.size(path))
    return needed


def place_pictures(
    source: Source, target_of: Mapping[str, str], workspace: Workspace, shown: WorkProgress, name: str
) -> None:
    """Link or copy pictures of `source` (by path) to their paths in the folder, but for those that are there; `name` is what
    the progress is called."""
    missing = [path for path, target in target_of.items() if not workspace.has(target)]
    there = len(target_of) - len(missing)
    count = shown.counter(name, len(target_of), there)
    for done, (path, file) in enumerate(source.files(missing), start=there + 1):
        if isinstance(file, Path):
            workspace.link(target_of[path], file)
        else:
            workspace.place(target_of[path], file)
        count(done)
