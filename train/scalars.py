"""A run's log as TensorBoard's curves, beside the journal and never instead of it. Knows nothing of what the figures mean."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from svf_fast.train.schema import ConfigError, flatten


class Scalars(Protocol):
    """What a run needs of TensorBoard's writer."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object: ...


class _Nowhere:
    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> None:
        pass


def require_tensorboard() -> None:
    """ConfigError where the package is not installed: to be asked before a run begins."""
    try:
        import tensorboard  # noqa: F401 - an optional dependency
    except ImportError:
        raise ConfigError(
            "run.tensorboard is true, but the package is not installed: pip install tensorboard"
        ) from None


@contextmanager
def open_scalars(folder: Path, iteration: int, *, wanted: bool) -> Iterator[Scalars]:
    """Curves in ``folder`` that go on after ``iteration``: what was written of later steps is no longer shown."""
    if not wanted:
        yield _Nowhere()
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=iteration + 1)
    try:
        yield writer
    finally:
        writer.close()


def scalars_of(kind: str, values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of one line of the log as ``kind/name``."""
    for name, value in flatten(values).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{kind}/{name.replace('.', '/')}", float(value)
