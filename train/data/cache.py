"""Decoded pictures kept in memory up to a number of bytes. Knows files, not episodes."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from threading import Lock

from svf_fast.train.data.reading import Bytes, read_pair


class PairCache:
    """Picture and label pairs by file; when more than `limit_bytes` are held, the least recently used go first.

    May be used from several threads. A copy for another process is empty, so that pictures are not sent around.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"limit_bytes is {limit_bytes}; expected 0 (keep nothing) or more")
        self.limit_bytes = limit_bytes
        self.kept_bytes = 0
        self._pairs: OrderedDict[tuple[Path, Path], tuple[Bytes, Bytes]] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[PairCache], tuple[int]]:
        return PairCache, (self.limit_bytes,)

    def pair(self, image_path: Path, label_path: Path) -> tuple[Bytes, Bytes]:
        """Picture [H, W, 3] and label [H, W] as `read_pair` gives them; read-only, because they are shared."""
        key = (image_path, label_path)
        with self._lock:
            if key in self._pairs:
                self._pairs.move_to_end(key)
                return self._pairs[key]
        pair = read_pair(image_path, label_path)  # outside the lock: decoding is the slow part
        for array in pair:
            array.setflags(write=False)
        with self._lock:
            if key not in self._pairs:
                self._pairs[key] = pair
                self.kept_bytes += _bytes_of(pair)
            while self.kept_bytes > self.limit_bytes:
                _, oldest = self._pairs.popitem(last=False)
                self.kept_bytes -= _bytes_of(oldest)
        return pair


def _bytes_of(pair: tuple[Bytes, Bytes]) -> int:
    return sum(array.nbytes for array in pair)
