"""The paper's tables as data: figures that follow from one another, or are known not to, and a file that is checked when it is read."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from svf_fast.train.reproduce.manifest import MANIFEST, Published, Slip, paper, read_manifest
from svf_fast.train.schema import ConfigError

ROUNDING = 0.0101  # of two decimals
PAPER = Path(__file__).resolve().parents[3] / "shared" / "svf_paper.md"


def printed() -> Iterator[tuple[str, str, int, Published]]:
    for number, table in paper().tables.items():
        for key, row in table.rows.items():
            for shots, published in row.published.items():
                yield number, key, shots, published


def is_known_slip(number: str, row: str, shots: int, what: str) -> bool:
    return any((slip.row, slip.shots, slip.what) == (row, shots, what) for slip in paper().tables[number].slips)


@pytest.mark.parametrize(("number", "row", "shots", "published"), [case for case in printed() if case[3].folds])
def test_a_printed_mean_is_that_of_the_printed_folds(number: str, row: str, shots: int, published: Published) -> None:
    assert published.folds is not None
    follows = abs(sum(published.folds) / 4 - published.mean) < ROUNDING
    assert follows != is_known_slip(number, row, shots, "mean")


@pytest.mark.parametrize(("number", "row", "shots", "published"), [case for case in printed() if case[3].difference])
def test_a_printed_difference_is_that_to_the_row_it_is_against(
    number: str, row: str, shots: int, published: Published
) -> None:
    rows = paper().tables[number].rows
    against = rows[str(rows[row].against)].published[shots]
    assert published.difference is not None
    follows = abs(published.mean - against.mean - published.difference) < ROUNDING
    assert follows != is_known_slip(number, row, shots, "difference")


def test_rows_that_stand_in_several_tables_have_one_figure() -> None:
    means: dict[tuple[str, ...], set[float]] = {}
    for number, table in paper().tables.items():
        if table.metric == "miou" and table.data == "pascal":
            for row in table.rows.values():
                means.setdefault(row.parts, set()).add(row.published[1].mean)
        assert len(table.rows) == {"1": 18, "2": 13, "3": 6, "5": 6, "6": 5, "7": 7, "9": 7, "10": 5}.get(number, 4)
    assert {len(found) for found in means.values()} == {1}
    assert means["resnet50", "baseline", "frozen"] == {65.07}
    assert means["resnet50", "baseline", "svf"] == {67.14}


def test_what_table_7_does_not_say_for_certain_is_marked() -> None:
    rows = paper().tables["7"].rows
    certain = {key: row.published[1].mean for key, row in rows.items() if row.published[1].is_certain}
    assert certain == {"svf_u": 61.09, "svf": 67.14, "svf_v": 60.88}
    assert [row.published[1].mean for key, row in rows.items() if key not in certain] == [61.57, 60.42, 60.02, 61.24]


def test_a_quoted_row_has_no_run() -> None:
    quoted = [
        (number, key) for number, table in paper().tables.items() for key, row in table.rows.items() if row.quoted
    ]
    assert quoted == [("2", "vgg16-pfenet-quoted")]
    assert paper().tables["2"].rows["vgg16-pfenet-quoted"].parts == ()


@pytest.mark.skipif(not PAPER.is_file(), reason="the paper's text is not here")
def test_every_figure_stands_in_the_papers_text() -> None:
    found = set(re.findall(r"\d+\.\d\d", PAPER.read_text(encoding="utf-8")))
    ours = [(number, row, value) for number, row, _, each in printed() for value in (each.mean, *(each.folds or ()))]
    assert [entry for entry in ours if f"{entry[2]:.2f}" not in found] == []
    assert len(ours) > 300


def changed(tmp_path: Path, *keys: str, value: Any) -> Path:
    content = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    *sections, name = keys
    place = content
    for section in sections:
        place = place[section]
    place[name] = value
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("keys", "value", "sentence"),
    [
        (("tables", "5", "rows", "svf", "labels"), ["one"], "tables.5.rows.svf.labels has 1 values, expected 2"),
        (("tables", "5", "rows", "svf", "against"), "frozn", "tables.5.rows.svf.against is 'frozn'"),
        (("tables", "5", "rows", "svf", "parts"), [], "tables.5.rows.svf.parts: expected, or else quoted"),
        (("tables", "5", "metric"), "iou", "tables.5.metric is 'iou', expected one of 'miou', 'fb_iou'"),
        (("tables", "5", "titel"), "x", "unknown key tables.5.titel: did you mean tables.5.title"),
        (
            ("tables", "5", "rows", "svf", "published"),
            {1: {"men": 3.0}},
            "unknown key tables.5.rows.svf.published.1.men",
        ),
        (("tables", "5", "slips"), [{"row": "x", "shots": 1, "what": "mean", "note": ""}], "names the row 'x'"),
        (("figures", "2", "titel"), "x", "unknown key figures.2.titel"),
    ],
)
def test_a_mistake_in_a_manifest_is_named(tmp_path: Path, keys: tuple[str, ...], value: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        read_manifest(changed(tmp_path, *keys, value=value))


def test_a_slip_is_told_with_its_note() -> None:
    assert paper().tables["2"].slips[0] == Slip(
        "resnet50-baseline-svf", 5, "difference", "+1.93 is printed, but 52.89 is 0.96 above 51.93"
    )
