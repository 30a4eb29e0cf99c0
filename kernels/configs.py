"""The tile configurations that are offered for each kernel, by how it multiplies ("ieee" for half precisions, "tf32", "tf32x3";
kernel_set.precision) and the rank. All are compiled ahead of time (aot.py): none spills, all fit on compute capability 8.0 and up."""

from __future__ import annotations

from svf_fast.backends.kernel_set import Config

# The largest rank whose z tile stays on the chip.
LARGEST_RANK = 256


def rank_tile(rank: int) -> int:
    """The power of two that covers `rank`, at least what a tensor core takes."""
    return max(16, 1 << (rank - 1).bit_length())


def back_to_back_forward(rank: int, precision: str, is_int8: bool, is_roomy: bool) -> list[Config]:
    """Offers for back_to_back.forward, the one to take unmeasured first; none where the rank does not fit. `is_int8`: z is
    kept as int8, which takes registers. `is_roomy`: z is kept in full and every pixel visited, which leaves some."""
    BR = rank_tile(rank)
    if rank > LARGEST_RANK or precision == "tf32x3":
        # three products of a tile need more registers than there are
        return []
    if precision == "tf32":
        return [Config(64, 32 if BR > 128 else 64, 32, BR, 8, 2)]
    if BR > 128:
        return [Config(64, 64, 64, BR, 8, 3)] + [Config(128, 64, 64, BR, 8, 2)] * is_roomy
    if is_int8:
        return [Config(64, 64, 64, BR, 8, 3)]
    return [Config(64, 64, 64, BR, 4, 3), Config(128, 64, 64, BR, 8, 3)]


def back_to_back_backward(rank: int, precision: str, is_strided: bool) -> list[Config]:
    """Offers for back_to_back.backward, the one to take unmeasured first; none where the rank does not fit, nor what addresses
    every other pixel (`is_strided`) beside it."""
    BR = rank_tile(rank)
    if rank > LARGEST_RANK or precision == "tf32x3" or (precision == "tf32" and BR > 128 and is_strided):
        return []
    if precision == "tf32":
        return [Config(64, 32, 32 if BR > 128 else 64, BR, 8, 2)]
    if BR > 128:
        return [Config(64, 64, 64, BR, 8, 3)]
    return [Config(64, 64, 64, BR, 4, 3), Config(128, 64, 64, BR, 8, 3)]


def projection_forward(precision: str) -> list[Config]:
    """Offers for projection.forward, the one to take unmeasured first. BR is not used."""
    if precision == "ieee":
        return [Config(128, 128, 64, 0, 8, 3), Config(64, 64, 64, 0, 4, 3)]
    offers = [Config(64, 64, 32, 0, 4, 3), Config(128, 64, 32, 0, 8, 3)]
    return offers if precision == "tf32x3" else [*offers, Config(128, 128, 32, 0, 8, 3)]


def projection_backward(rank: int, precision: str) -> list[Config]:
    """Offers for projection.backward, the one to take unmeasured first. BK is not used."""
    BR = min(rank_tile(rank), 128)
    if precision == "ieee":
        return [Config(128, 64, 0, BR, 8, 3), Config(64, 64, 0, BR, 4, 3)]
    offers = [Config(64, 32, 0, min(BR, 64), 4, 3)]
    return offers if precision == "tf32x3" else [*offers, Config(128, 32, 0, BR, 8, 2)]


# Query positions × support positions × channels.
COSINE = {
    "ieee": Config(128, 128, 64, 0, 8, 3),
    "tf32": Config(64, 64, 32, 0, 4, 3),
    "tf32x3": Config(64, 64, 32, 0, 4, 3),
}
# Query positions × channels of the gathers in its backward.
COSINE_BACKWARD = Config(16, 0, 128, 0, 4, 1)
