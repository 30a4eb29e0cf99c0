"""Decoded pictures kept in memory up to a number of bytes. Knows files, not episodes."""

from __future__ import annotations

from pathlib import Path
from threading import Lock

from svf_fast.train.data.reading import Bytes, read_pair

DEFAULT_CACHE_BYTES = 512 * 2**20


class PairCache:
    """Picture and label pairs by file. What came first is kept while it fits into `limit_bytes`, and nothing is dropped for
    what comes later.

    Training meets every picture once an epoch, in a new order each time: of pictures that do not all fit, the ones used
    least recently are the ones that come next, so that dropping them finds fewer than keeping any fixed set does. May be
    used from several threads. A copy for another process is empty, so that pictures are not sent around.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"limit_bytes is {limit_bytes}; expected 0 (keep nothing) or more")
        self.limit_bytes = limit_bytes
        self.kept_bytes = 0
        self._pairs: dict[tuple[Path, Path], tuple[Bytes, Bytes]] = {}
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[PairCache], tuple[int]]:
        return PairCache, (self.limit_bytes,)

    def pair(self, image_path: Path, label_path: Path) -> tuple[Bytes, Bytes]:
        """Picture [H, W, 3] and label [H, W] as `read_pair` gives them; read-only, because they are shared."""
        key = (image_path, label_path)
        kept = self._pairs.get(key)
        if kept is not None:
            return kept
        pair = read_pair(image_path, label_path)  # outside the lock: decoding is the slow part
        for array in pair:
            array.setflags(write=False)
        pair_bytes = sum(array.nbytes for array in pair)
        with self._lock:
            if key not in self._pairs and self.kept_bytes + pair_bytes <= self.limit_bytes:
                self._pairs[key] = pair
                self.kept_bytes += pair_bytes
        return pair
