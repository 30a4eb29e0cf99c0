"""From logs to the paper's table: means, spreads, differences, ranks, and words where there is no figure."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reproduce_fakes import write_log

from svf_fast.train.composition import shipped_parts
from svf_fast.train.reproduce.assignments import Assignments
from svf_fast.train.reproduce.collect import CollectedRow, CollectedTable, RowRun, collect
from svf_fast.train.reproduce.manifest import Row, paper
from svf_fast.train.reproduce.outcomes import Note, Outcome, Score, read_outcome, write_note
from svf_fast.train.reproduce.render import Circumstances, html, markdown, text, write_table
from svf_fast.train.reproduce.resolve import Case, Planner
from svf_fast.train.reproduce.scale import Dataset

ON_PAPER = Circumstances(is_of_paper=True, settings={"data": "paper"}, machine={"commit": "abc"})
ELSEWHERE = Circumstances(is_of_paper=False, settings={"data": "shapes5i"}, machine={"commit": "abc"})
Table = Callable[..., CollectedTable]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """``table(number, outcome_of)``: the collected table of outcomes by row and case."""
    planner = Planner(Dataset.read("paper"), tmp_path, Assignments((), shipped_parts()))

    def collected(
        number: str,
        outcome_of: Callable[[str, Case], Outcome | str],
        *,
        folds: tuple[int, ...] = (0, 1, 2, 3),
        seeds: tuple[int, ...] = (321,),
        shots: tuple[int, ...] = (1,),
        rows: tuple[str, ...] = (),
        is_of_paper: bool = True,
    ) -> CollectedTable:
        def run_of(key: str, row: Row, case: Case) -> RowRun:
            found = outcome_of(key, case)
            run = planner.few_shot("pascal", row.parts, case)
            obstacle = found if isinstance(found, str) else None
            return RowRun(case, run, Outcome("not run") if isinstance(found, str) else found, obstacle)

        facts = paper().tables[number]
        return collect(
            number,
            facts,
            run_of,
            rows=rows or list(facts.rows),
            shots=shots,
            folds=folds,
            seeds=seeds,
            is_of_paper=is_of_paper,
        )

    return collected


def finished(miou: float, fb_iou: float = 0.5) -> Outcome:
    return Outcome("finished", 400, 400, Score(miou, fb_iou, 400))


def row_of(collected: CollectedTable, key: str) -> CollectedRow:
    return next(row for row in collected.blocks[0].rows if row.key == key)


# --- outcomes


def test_a_finished_run_has_its_best_validation_and_the_fb_iou_of_the_same_one(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "run", (100, 0.3, 0.7), (200, 0.4, 0.5), (400, 0.4, 0.9))
    outcome = read_outcome(folder, tmp_path / "run.json")
    assert (outcome.state, outcome.score) == ("finished", Score(0.4, 0.5, 200))


def test_a_run_on_its_way_has_no_figure(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "run", (100, 0.3, 0.7), reached=120)
    outcome = read_outcome(folder, tmp_path / "run.json")
    assert (outcome.state, outcome.step, outcome.steps, outcome.score) == ("unfinished", 120, 400, None)


def test_a_line_cut_short_is_not_looked_at(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "run", reached=120)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"kind": "finis')
    assert read_outcome(folder, tmp_path / "run.json").step == 120


@pytest.mark.parametrize("content", [None, "", '{"kind": "sta'])
def test_a_run_without_a_log_was_not_run(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "log.jsonl").write_text(content)
    assert read_outcome(tmp_path / "run", tmp_path / "run.json") == Outcome("not run")


def test_a_failure_is_remembered_until_the_run_is_finished(tmp_path: Path) -> None:
    folder, note = write_log(tmp_path / "run", reached=7), tmp_path / "run.json"
    write_note(note, Note(12.5, "the loss is nan"))
    outcome = read_outcome(folder, note)
    assert (outcome.state, outcome.reason, outcome.seconds) == ("failed", "the loss is nan", 12.5)
    write_log(folder, (400, 0.4, 0.5))
    assert read_outcome(folder, note).state == "finished"


# --- cells


def test_a_mean_over_all_folds_stands_beside_the_papers(table: Table) -> None:
    values = {0: 0.60, 1: 0.70, 2: 0.65, 3: 0.55}
    row = row_of(table("5", lambda key, case: finished(values[case.fold])), "svf")
    assert row.mean.value == pytest.approx(62.5)
    assert row.paper == 67.14
    assert row.difference == pytest.approx(62.5 - 67.14)
    assert [cell.value for cell in row.folds] == pytest.approx([60, 70, 65, 55])


def test_fb_iou_is_taken_where_the_table_is_of_it(table: Table) -> None:
    row = row_of(table("3", lambda key, case: finished(0.6, 0.8)), "resnet50-bam-svf")
    assert row.mean.value == pytest.approx(80)
    assert row.paper == 80.13


def test_seeds_have_a_mean_and_a_sample_standard_deviation(table: Table) -> None:
    row = row_of(table("5", lambda key, case: finished(0.5 + 0.01 * case.seed), seeds=(1, 2, 3)), "svf")
    assert (row.mean.value, row.mean.spread) == (pytest.approx(52), pytest.approx(1))
    assert row.folds[0].spread == pytest.approx(1)


def test_a_mean_without_all_folds_is_partial_and_says_so(table: Table) -> None:
    collected = table("5", lambda key, case: finished(0.6) if case.fold < 2 else Outcome("not run"))
    row = row_of(collected, "svf")
    assert (row.mean.value, row.mean.status) == (pytest.approx(60), "partial: without folds 2, 3")
    assert row.difference is None
    assert row.rank is None


def test_a_partial_mean_names_the_folds_that_are_not_in_it(table: Table) -> None:
    apart = table("5", lambda key, case: finished(0.6) if case.fold == case.seed else Outcome("not run"), seeds=(0, 1))
    assert row_of(apart, "svf").mean.status == "partial: without folds 2, 3, not every seed in every fold"


def test_a_row_gains_over_the_one_that_the_paper_prints_it_against(table: Table) -> None:
    scores = {"frozen": 0.6, "svf": 0.62}
    collected = table("5", lambda key, case: finished(scores[key]), rows=("frozen", "svf"))
    assert (row_of(collected, "frozen").gain, row_of(collected, "svf").gain) == (None, pytest.approx(2.0))
    assert "+2.07" in markdown(collected, ELSEWHERE)
    assert "+2.00" in markdown(collected, ELSEWHERE)


def test_a_mean_without_all_seeds_says_so(table: Table) -> None:
    outcomes = {1: finished(0.6), 2: Outcome("not run")}
    row = row_of(table("5", lambda key, case: outcomes[case.seed], seeds=(1, 2)), "svf")
    assert (row.mean.value, row.mean.status, row.difference) == (pytest.approx(60), "1 of 2 seeds", None)


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Outcome("not run"), "not run"),
        (Outcome("unfinished", 120, 400), "step 120 of 400"),
        (Outcome("unfinished", 5000), "step 5,000"),
        (Outcome("failed", 7, 400, reason="the loss is nan"), "failed"),
        ("there is no layer 4", "does not apply"),
    ],
)
def test_where_there_is_no_figure_there_are_words(table: Table, outcome: Outcome | str, status: str) -> None:
    collected = table("5", lambda key, case: outcome)
    row = row_of(collected, "svf")
    assert (row.mean.value, row.mean.status, row.folds[0].status) == (None, status, status)
    told = text(collected, ON_PAPER)
    assert status in told
    reason = outcome if isinstance(outcome, str) else outcome.reason
    assert reason is None or reason in told


def test_folds_that_were_not_asked_for_leave_the_papers_mean_out_or_take_its_folds(table: Table) -> None:
    one = table("1", lambda key, case: finished(0.6), folds=(0, 1))
    assert row_of(one, "resnet50-baseline-svf").paper == pytest.approx((67.42 + 71.57) / 2)
    assert row_of(table("5", lambda key, case: finished(0.6), folds=(0, 1)), "svf").paper is None
    assert "Only the folds 0, 1" in text(one, ON_PAPER)


def test_on_other_data_the_order_is_by_the_papers_mean_whichever_folds_were_run(table: Table) -> None:
    collected = table("5", lambda key, case: finished(0.6), folds=(0,), is_of_paper=False)
    assert [row.paper_rank for row in collected.blocks[0].rows] == [2, 5, 3, 4, 6, 1]


def test_a_row_that_is_not_certain_has_neither_difference_nor_rank(table: Table) -> None:
    collected = table("7", lambda key, case: finished(0.6))
    row = row_of(collected, "svf_us")
    assert (row.paper, row.difference, row.rank) == (61.57, None, None)
    assert "61.57 ?" in text(collected, ON_PAPER)


def test_a_quoted_row_is_shown_without_a_run(table: Table) -> None:
    collected = table("2", lambda key, case: Outcome("not run"), rows=("vgg16-pfenet-quoted",))
    assert row_of(collected, "vgg16-pfenet-quoted").mean.status == "quoted"


def test_ranks_are_among_the_rows_that_have_both_figures(table: Table) -> None:
    scores = {"frozen": 0.30, "full_layers_1_4": 0.35, "full": 0.30, "svf": 0.20}
    collected = table("5", lambda key, case: finished(scores[key]) if key in scores else Outcome("not run"))
    ranks = {row.key: (row.paper_rank, row.rank) for row in collected.blocks[0].rows}
    assert ranks == {
        "frozen": (2, 2),
        "full_layers_1_4": (4, 1),
        "full": (3, 2),
        "full_layers_3_4": (None, None),
        "full_layer_4": (None, None),
        "svf": (1, 4),
    }


# --- what is written


def test_on_other_data_the_order_is_shown_and_no_difference(table: Table) -> None:
    collected = table("5", lambda key, case: finished(0.3))
    for told in (text(collected, ELSEWHERE), markdown(collected, ELSEWHERE), html(collected, ELSEWHERE)):
        assert "columns cannot be compared" in told
        assert "rank, here" in told
        assert "difference<" not in told
        assert "| difference" not in told
    assert "| difference |" in markdown(collected, ON_PAPER)


def test_slips_and_notes_are_told(table: Table) -> None:
    told = markdown(table("2", lambda key, case: Outcome("not run"), shots=(1, 5)), ON_PAPER)
    assert "+1.93 is printed, but 52.89 is 0.96 above 51.93" in told
    assert "run with the trick" in told


def test_the_page_is_whole_and_needs_no_other_file(table: Table) -> None:
    open_tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert not {"src", "href"} & {name for name, _ in attributes}
            if tag != "meta":
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    page = html(table("9", lambda key, case: finished(0.3)), ON_PAPER)
    Reader().feed(page)
    assert open_tags == []
    assert "S&#x27;W" in page


def test_three_files_are_written_and_the_json_holds_every_run(tmp_path: Path, table: Table) -> None:
    collected = table("5", lambda key, case: finished(0.3) if key == "svf" else Outcome("not run"), folds=(0, 2))
    paths = write_table(tmp_path, collected, ON_PAPER)
    assert [path.name for path in paths] == ["table5.md", "table5.html", "table5.json"]
    content = json.loads(paths[2].read_text(encoding="utf-8"))
    svf = content["blocks"][0]["rows"][-1]
    assert svf["mean"]["value"] == pytest.approx(30)
    assert [(run["fold"], run["state"]) for run in svf["runs"]] == [(0, "finished"), (2, "finished")]
    assert content["machine"] == {"commit": "abc"}
