"""Everything that is wrong with what a user gave, said at once."""

from __future__ import annotations

from collections.abc import Iterable


class Problems:
    """Sentences, one a problem, in the order in which they were found."""

    def __init__(self) -> None:
        self._sentences: list[str] = []

    def __len__(self) -> int:
        return len(self._sentences)

    def add(self, sentence: object) -> None:
        self._sentences.append(str(sentence))

    def extend(self, sentences: Iterable[object]) -> None:
        for sentence in sentences:
            self.add(sentence)

    def raise_all(self, what: str) -> None:
        """One ValueError that begins with `what` and lists every problem; nothing when there is none."""
        if self._sentences:
            count = "1 problem" if len(self) == 1 else f"{len(self)} problems"
            raise ValueError("\n  ".join([f"{what}: {count}", *self._sentences]))
