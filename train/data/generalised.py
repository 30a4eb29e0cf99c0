"""Episodes of generalised few-shot segmentation (Lang et al. 2022, BAM): any picture is a query, whatever it shows, and the novel
class asked for need not be in it. Knows nothing of models and metrics."""

from __future__ import annotations

from collections.abc import Sequence

from svf_fast.train.data.cache import DEFAULT_CACHE_BYTES
from svf_fast.train.data.episodes import EpisodeSampler
from svf_fast.train.data.split import Split


class GeneralisedSampler(EpisodeSampler):
    """Episodes over every picture of a list (`VOCFolder.whole` for the fold's novel classes), with base labels, under the
    test transform.

    A picture without a base class asks for one of its own novel classes; any other for any novel class of the fold.
    Supports show the class on at least one pixel.
    """

    base_classes: tuple[int, ...]

    def __init__(
        self,
        split: Split,
        base_classes: Sequence[int],
        shots: int,
        size: int,
        seed: int,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        super().__init__(split, shots, size, seed, base_classes=base_classes, cache_bytes=cache_bytes)

    def candidate_classes(self, index: int) -> tuple[int, ...]:
        """The novel classes of which an episode with query `index` draws one."""
        present = self.split.entries[index].present_classes
        own = tuple(class_id for class_id in present if class_id in self.split.class_ids)
        return own if own and not set(present) & set(self.base_classes) else self.split.class_ids
