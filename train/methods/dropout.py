"""Dropout of whole channels that draws the same for a sample whether its batch is worked on as a whole, in parts, or spread over
processes. Knows no method; who splits a batch says which rows are at work."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """``count`` samples from ``first`` on, of a batch of ``total``."""

    first: int
    count: int
    total: int

    @property
    def are_all(self) -> bool:
        return self.count == self.total


_at_work: Rows | None = None


@contextmanager
def rows_at_work(rows: Rows) -> Iterator[None]:
    """Inside, :class:`Dropout2d` sees ``rows`` of a larger batch."""
    global _at_work
    before, _at_work = _at_work, None if rows.are_all else rows
    try:
        yield
    finally:
        _at_work = before


class Dropout2d(nn.Dropout2d):
    """As PyTorch's, bit for bit, for a whole batch. For some of its rows the factors of all rows are drawn, and theirs
    used: the generator ends where it would have, and each sample has its own factors."""

    def forward(self, input: Tensor, groups: int = 1) -> Tensor:
        """input [groups · B, C, H, W], the B samples of a group lying together."""
        if _at_work is None or not self.training or self.p == 0:
            return super().forward(input)
        channels = input.shape[1]
        drawn = input.new_empty(groups, _at_work.total, channels, 1, 1).bernoulli_(1 - self.p).div_(1 - self.p)
        factors = drawn[:, _at_work.first : _at_work.first + _at_work.count].flatten(0, 1)
        return input.mul_(factors) if self.inplace else input * factors
