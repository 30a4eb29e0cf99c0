"""What the report promises: one file with everything inside, the figures it was given, and no file that is half there."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from svf_fast.train.demo_results import DemoResults, StrategyResult, ValidationPoint
from svf_fast.train.figures import PredictionRow
from svf_fast.train.report import render, write_report
from svf_fast.train.spectra import MovedValue, Spectrum

RNG = np.random.default_rng(0)


def _strategy(name: str, mious: list[float]) -> StrategyResult:
    return StrategyResult(
        name=name,
        trains="nothing",
        head_parameters=1234,
        backbone_parameters=56,
        head_rate=0.1,
        backbone_rate=None if name == "freeze" else 0.03,
        kept_bytes=3 * 2**20,
        step_ms=41.6,
        training_s=10.0,
        validation_s=2.0,
        losses=[0.5, 0.4, 0.3, 0.25],
        curve=[ValidationPoint(10 * i, m, 0.5 + m / 2, {"star": m, "r<i>ng": m}) for i, m in enumerate(mious, 1)],
    )


def _example() -> PredictionRow:
    picture = RNG.integers(0, 256, size=(30, 40, 3), dtype=np.uint8)
    mask = (RNG.random((30, 40)) > 0.5).astype(np.uint8)
    names = ("freeze", "full", "svf")
    return PredictionRow(
        "star", [(picture, mask)], picture, mask, dict.fromkeys(names, mask), dict.fromkeys(names, 0.5)
    )


@pytest.fixture(scope="module")
def results() -> DemoResults:
    return DemoResults(
        strategies=[_strategy("freeze", [0.1, 0.3, 0.2]), _strategy("full", [0.2]), _strategy("svf", [0.4321])],
        algorithm1_kept_bytes=30 * 2**20,
        spectra=[Spectrum("layer3.1.conv2", "3×3", [2.0, 1.0], [1.5, 1.2])],
        moved=[MovedValue("layer2.0.conv1", 3, 0.5, 0.4)],
        seed=321,
        class_names=["star", "r<i>ng"],
        validation_episodes=120,
        settings={"head_lr": 0.1},
        machine={"processor": "a <processor>"},
        pretraining={"seconds": 1.0},
        notes=["Chosen on base classes."],
        examples=[_example()],
    )


@pytest.fixture(scope="module")
def page(results: DemoResults) -> str:
    return render(results)


def test_the_page_loads_nothing_from_anywhere(page: str) -> None:
    sources = re.findall(r"(?:src|href)\s*=\s*['\"]([^'\"]{0,30})", page)
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert "<script" not in page


@pytest.mark.parametrize(
    "figure",
    [
        "43.21",
        "20.00",
        "30.00 <small>(step 20)</small>",
        "1,234",
        "30.00</td>",
        "42</td>",
        "0.03",
        "-20.0 %",
        "seed 321",
    ],
)
def test_the_page_shows_the_figures(page: str, figure: str) -> None:
    assert figure in page


def test_text_from_outside_is_escaped(page: str) -> None:
    assert "r<i>ng" not in page
    assert "a <processor>" not in page
    assert "r&lt;i&gt;ng" in page


def test_the_page_says_what_its_figures_do_not_carry(page: str) -> None:
    assert "One seed (321)" in page
    assert "no spread was measured" in page
    assert "Chosen on base classes." in page


def test_the_results_are_kept_as_json_beside_it(results: DemoResults, page: str, tmp_path: Path) -> None:
    path = write_report(results, tmp_path)
    data = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert path.read_text(encoding="utf-8") == page
    svf = data["strategies"][2]
    assert svf["final_miou"] == 0.4321
    assert data["strategies"][0]["best_step"] == 20
    assert data["moved"][0]["change"] == pytest.approx(-0.2)
    assert data["seed"] == 321
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_a_report_without_singular_values_or_examples_is_still_one(results: DemoResults) -> None:
    page = render(replace(results, spectra=[], moved=[], examples=[]))
    assert "No convolution of layer 3 was converted" in page


def test_a_run_without_validation_is_refused(results: DemoResults) -> None:
    broken = replace(results, strategies=[replace(results.strategies[0], curve=[])])
    with pytest.raises(ValueError, match="freeze has no validation point"):
        render(broken)
