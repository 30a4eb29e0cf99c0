"""Learning rates as pure functions of the iteration: a resumed run needs no scheduler state. Knows no optimiser.

``iteration`` counts the steps already taken, 0 … total − 1, and ``total`` the steps of the whole run.
"""

import math
from collections.abc import Callable
from typing import Literal

POLY_POWER = 0.9

Schedule = Literal["cosine", "constant", "poly"]


def cosine(iteration: int, total: int) -> float:
    """(1 + cos(π·it/T))/2: from 1 at the first step towards 0 (the SVF paper)."""
    return (1.0 + math.cos(math.pi * iteration / total)) / 2.0


def constant(iteration: int, total: int) -> float:
    """1 throughout: what the authors' released code amounts to, whose cosine scheduler is rebuilt at every step."""
    return 1.0


def poly(iteration: int, total: int) -> float:
    """(1 − it/T)^0.9 as in PFENet and BAM, which count from 1: the very last step has rate 0."""
    return (1.0 - (iteration + 1) / total) ** POLY_POWER


SCHEDULES: dict[Schedule, Callable[[int, int], float]] = {"cosine": cosine, "constant": constant, "poly": poly}


def factor(schedule: Schedule, iteration: int, total: int) -> float:
    """What the base rate is multiplied by at one step; ValueError when ``iteration`` lies outside the run."""
    if not 0 <= iteration < total:
        raise ValueError(f"iteration is {iteration}, expected 0 to {total - 1}")
    return SCHEDULES[schedule](iteration, total)
