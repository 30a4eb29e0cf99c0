"""Initial weights from a seed of their own. torch.nn draws them from PyTorch's global CPU generator, so that generator
is borrowed and given back in the state it was in; nothing else in the project may touch it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded_initialisation(seed: int) -> Iterator[None]:
    """Modules built inside get the weights that belong to ``seed``, whatever was drawn before; the caller's stream
    goes on as if nothing had been drawn. Build on the CPU (or on the meta device) and move afterwards."""
    state = torch.random.default_generator.get_state()
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.default_generator.set_state(state)
