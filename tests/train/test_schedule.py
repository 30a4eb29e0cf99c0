"""The rates of a run, step by step."""

from __future__ import annotations

import math

import pytest

from svf_fast.train.assembly import base_rates
from svf_fast.train.config import load_config
from svf_fast.train.schedule import SCHEDULES, Schedule, factor
from svf_fast.train.tuning import ParameterGroup


@pytest.mark.parametrize(
    ("schedule", "iteration", "expected"),
    [
        ("cosine", 0, 1.0),
        ("cosine", 50, 0.5),
        ("cosine", 25, (1 + math.sqrt(0.5)) / 2),
        ("cosine", 99, (1 + math.cos(math.pi * 0.99)) / 2),
        ("constant", 0, 1.0),
        ("constant", 99, 1.0),
        ("poly", 0, 0.99**0.9),
        ("poly", 49, 0.5**0.9),
        ("poly", 99, 0.0),
    ],
)
def test_factor(schedule: Schedule, iteration: int, expected: float) -> None:
    assert factor(schedule, iteration, 100) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 7, 1000])
def test_a_factor_is_a_share_and_never_rises(schedule: Schedule, total: int) -> None:
    factors = [factor(schedule, iteration, total) for iteration in range(total)]
    assert all(0 <= value <= 1 for value in factors)
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize("iteration", [-1, 100])
def test_a_step_outside_the_run_is_refused(iteration: int) -> None:
    with pytest.raises(ValueError, match=r"iteration is -?\d+, expected 0 to 99"):
        factor("cosine", iteration, 100)


def test_the_rate_in_effect_is_base_rate_times_scale_times_group() -> None:
    config = load_config("voc_folder", ["optimiser.base_lr=0.005", "optimiser.lr_scale=10"])
    groups = [
        ParameterGroup(name="head", params=[], lr_scale=1.0),
        ParameterGroup(name="backbone", params=[], lr_scale=0.1),
    ]
    assert base_rates(config, groups) == pytest.approx({"head": 0.05, "backbone": 0.005})
