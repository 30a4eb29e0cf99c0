"""Numbers from names: the golden data fill every tensor from the text of its state-dict key (specification, section
10.1), so that a model's weights need no file. Integer arithmetic and doubles only; no random generator."""

import math
import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# the increment and the two multipliers of SplitMix64
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
FIRST_MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)
SECOND_MULTIPLIER = np.uint64(0x94D049BB133111EB)


def stream(name: str, *shape: int) -> NDArray[np.float64]:
    """Numbers in [-1, 1) of that shape, row by row: the upper 24 bits of SplitMix64 that starts at the name's CRC."""
    count = math.prod(shape)
    state = np.arange(1, count + 1, dtype=np.uint64)  # arrays wrap around modulo 2⁶⁴ without a warning
    state *= GOLDEN_GAMMA
    state += np.uint64(zlib.crc32(name.encode()))
    for shift, multiplier in ((30, FIRST_MULTIPLIER), (27, SECOND_MULTIPLIER)):
        state ^= state >> np.uint64(shift)
        state *= multiplier
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(40)).reshape(shape) / 2.0**23 - 1.0


def entry_values(key: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    """What the state-dict entry ``key`` of that shape holds, in double. ValueError on an entry without a rule."""
    noise = stream(f"{seed}|{key}", *shape)
    match key.rpartition(".")[2], len(shape):
        case "num_batches_tracked", _:
            return np.zeros(shape)
        case "running_mean" | "bias", _:
            return 0.1 * noise
        case "running_var", _:
            return 1.0 + 0.2 * noise
        case "weight", 1 if key.endswith(".bn3.weight"):  # a residual branch's last BatchNorm
            return 0.3 + 0.1 * noise
        case "weight", 1:
            return 1.0 + 0.2 * noise
        case "weight", dimensions if dimensions >= 2:
            return math.sqrt(6.0 / math.prod(shape[1:])) * noise
    raise ValueError(f"state-dict entry {key} of shape {list(shape)} has no filling rule")


def filled_state(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """The state dict that ``module`` is to load: its own keys and dtypes, filled by the rule."""
    return {
        key: torch.from_numpy(np.asarray(entry_values(key, tuple(tensor.shape), seed))).to(tensor.dtype)
        for key, tensor in module.state_dict().items()
    }
